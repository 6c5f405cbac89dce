"""What a whole training step costs under each objective, beside SupCon: CPU time, parameters, and what a loss keeps.

    python bench/step.py [--batch 256] [--size 32] [--steps 5] [--encoder resnet18]

Generated images; the objectives take turns, step by step, in one process of two threads. A ratio is the median over
turns of CPU seconds over SupCon's of the same turn. The memory of the losses themselves is in bench/kernel.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from kladi import config, toy
from kladi.learn import gradient_cache, training

OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "supcon": ("supcon", {}),
    "simclr": ("simclr", {}),
    "cross_entropy": ("cross_entropy", {}),
    "himulcon": ("himulcon", {}),
    "hwc": ("label_tree", {"mode": "scale", "lam": 0.0}),
    "hwc, mass": ("label_tree", {"lam": 0.0, "mode": "mass"}),
    "hwc, graded": ("label_tree", {"mode": "scale", "lam": 0.0, "positives": "graded"}),
    "hwc, view": ("label_tree", {"mode": "scale", "lam": 0.0, "positives": "view"}),
    "lam": ("label_tree", {"hwc": 0.0, "lam": 1.0}),
    "hwc + lam": ("label_tree", {"mode": "scale"}),
    "hwc + lam, ball": ("label_tree", {"mode": "scale", "geometry": "poincare"}),
    "hwc + lam, ball learned": ("label_tree", {"mode": "scale", "geometry": "poincare", "learn_curvature": True}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--encoder", default="resnet18")
    options = parser.parse_args()
    torch.set_num_threads(2)
    steps = {name: stepper(*OBJECTIVES[name], options) for name in OBJECTIVES}
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.steps + 1):
        for name, (step, _, _) in steps.items():
            start = time.process_time()
            step()
            if turn:  # the first is a warm-up
                spent[name].append(time.process_time() - start)
    base = spent["supcon"]
    print(f"supcon: {statistics.median(base):.2f} CPU seconds a step of {options.batch} images in two views")
    print("| objective | step over supcon's | parameters beyond encoder and projector | kept by the loss |")
    print("|---|---|---|---|")
    for name, (_, parameters, kept) in steps.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(spent[name], base, strict=True))
        print(f"| {name} | {ratio:.2f} | {parameters:,} | {kept:,} bytes |")


def stepper(name: str, args: dict[str, Any], options: argparse.Namespace) -> tuple[Callable[[], None], int, int]:
    """A training step on one batch, parameters of the losses, and bytes of their state."""
    dataset = toy.dataset(n=2 * options.batch, size=options.size, seed=0)
    settings = config.override(
        config.Config(),
        {
            "intensity.size": options.size,
            "encoder.name": options.encoder,
            "objective.name": name,
            "objective.args": args,
            "train.batch": options.batch,
            "train.workers": 0,
            "train.device": "cpu",
        },
    )
    t = training.assemble(dataset, settings, training.device(settings.train))
    batch = next(t.loader.epoch(0))

    def step() -> None:
        gradient_cache.backward(t.objective, batch, t.fabric, seed=0)
        t.optimizer.step()
        t.optimizer.zero_grad()

    parameters = sum(p.numel() for p in t.objective.losses.parameters())
    kept = sum(b.nbytes for b in t.objective.losses.state_dict().values())
    return step, parameters, kept


if __name__ == "__main__":
    main()

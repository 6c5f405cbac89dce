"""What topology costs: diagrams, distances beside gudhi's and hera's, and a training step with and without it.

    python bench/topology.py [--images 12]

CPU seconds on one thread, on two public photographs that scikit-learn ships: crops of 28 and 64 pixels, and squares as
high as the photograph, reduced to 224. The distance is that of an image to itself under noise of a twentieth of its
span; kladi's to 0.01 of the span, gudhi's to 1e-3, hera's to 1 %. gudhi's bottleneck distance is GPL, and is called
here alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from gudhi import bottleneck_distance
from gudhi.hera import bottleneck_distance as hera_distance
from PIL import Image
from sklearn.datasets import load_sample_images

from kladi import config as settings
from kladi import toy
from kladi.learn import gradient_cache, training
from kladi.structure.topology import Diagram, band, diagram, diagrams, relative_bottleneck

SIZES = (28, 64, 224)
WHOLE = 200
"""Pixels above which an image is a whole photograph, not a piece of it."""
STEPS, TURNS = 5, 11


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| pixels | points H0, H1 | diagrams a second | distance, ms | band, ms | gudhi, ms | hera, ms |")
    print("|---" * 7 + "|")
    for size in SIZES:
        print(distances(crops(size, options.images)))
    print("\n| encoder, pixels | images | step, ms | with topology, ms | ratio |\n|---|---|---|---|---|")
    for size, batch in ((64, 64), (28, 128)):
        print(step(size, batch))


def crops(size: int, count: int) -> list[np.ndarray]:
    """Grey squares, each to its own range."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        photo = Image.fromarray(load_sample_images().images[number % 2]).convert("L")
        side = photo.height if size > WHOLE else size
        left, top = (int(rng.integers(0, most - side + 1)) for most in photo.size)
        part = photo.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
        grey = np.asarray(part, dtype=np.float64)
        found.append((grey - grey.min()) / max(grey.max() - grey.min(), 1))
    return found


def distances(images: list[np.ndarray]) -> str:
    rng = np.random.default_rng(1)
    made = statistics.median(seconds(lambda: diagrams(images)) for _ in range(STEPS)) / len(images)
    pairs = []
    for image in images:
        own = diagram(image)
        pairs.append((own, diagram(np.clip(image + 0.05 * own.span * rng.normal(size=image.shape), 0, 1))))
    ways: tuple[Callable[[Diagram, Diagram], object], ...] = (
        relative_bottleneck,
        band,
        lambda a, b: [bottleneck_distance(x, y, 1e-3) for x, y in ((a.h0, b.h0), (a.h1, b.h1))],
        lambda a, b: [hera_distance(x, y, 0.01) for x, y in ((a.h0, b.h0), (a.h1, b.h1))],
    )
    cells = []
    for way in ways:
        some = pairs if images[0].shape[0] < WHOLE or way in (relative_bottleneck, band) else pairs[:2]
        cells.append(f"{1000 * statistics.median(seconds(lambda p=p, w=way: w(*p)) for p in some):.1f}")
    size, first = images[0].shape[0], pairs[0][0]
    return f"| {size} | {len(first.h0)}, {len(first.h1)} | {1 / made:,.0f} | {' | '.join(cells)} |"


def step(size: int, batch: int) -> str:
    """A whole training step on ready views: encoder, SimCLR, backward, AdamW. Without and with topology in turns."""
    without, with_it = stepper(size, batch, sees="image"), stepper(size, batch, sees="both")
    turns = [(seconds(without), seconds(with_it)) for _ in range(TURNS + 1)][1:]  # the first is a warm-up
    ratio = statistics.median(theirs / ours for ours, theirs in turns)
    plain, fused = (1000 * statistics.median(cost) for cost in zip(*turns, strict=True))
    return f"| resnet18, {size} | {batch} | {plain:.0f} | {fused:.0f} | {ratio:.2f} |"


def stepper(size: int, batch: int, sees: str) -> Callable[[], None]:
    """The same views each time, with their diagrams or without."""
    asked = {"topology.on": True, "topology.sees": sees, "topology.calibration": 32, "objective.name": "simclr"}
    shown = {"intensity.size": size, "train.batch": batch, "train.workers": 0, "train.device": "cpu"}
    config = settings.override(settings.Config(), {**asked, **shown})
    t = training.assemble(toy.dataset(n=2 * batch, size=size, seed=0), config, training.device(config.train))
    views = next(t.loader.epoch(0))

    def work() -> None:
        gradient_cache.backward(t.objective, views, t.fabric, seed=0)
        t.optimizer.step()
        t.optimizer.zero_grad()

    return work


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()

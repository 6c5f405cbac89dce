"""What topology costs: diagrams, distances beside gudhi's and hera's, and a training step with and without it.

    python bench/topology.py [--images 12]

CPU seconds on one thread, on two public photographs that scikit-learn ships: crops of 28 and 64 pixels, and squares as
high as the photograph, reduced to 224. The distance is that of an image to itself under noise of a twentieth of its
span; kladi's to 0.01 of the span, gudhi's to 1e-3, hera's to 1 %. gudhi's bottleneck distance is GPL, and is called
here alone.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from kladi.data.views.batch import Batch, Diagrams, View
from kladi.learn.training import built_encoder
from kladi.structure.topology import Diagram, band, diagram, diagrams, relative_bottleneck

SIZES = (28, 64, 224)
WHOLE = 200
"""Pixels above which an image is a whole photograph, not a piece of it."""
STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| pixels | points H0, H1 | diagrams a second | distance, ms | band, ms | gudhi, ms | hera, ms |")
    print("|---" * 7 + "|")
    for size in SIZES:
        print(distances(crops(size, options.images)))
    print("\n| encoder, pixels | step, ms | with topology, ms | ratio |\n|---|---|---|---|")
    for size, batch in ((64, 32), (28, 64)):
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
    """Forward and backward of two views, ready diagrams, resnet18."""
    config = settings.override(settings.Config(), {"intensity.size": size})
    costs = []
    for on in (False, True):
        encoder = built_encoder(dataclasses.replace(config, topology=settings.Topology(on=on))).train()
        image = torch.randn(2 * batch, 1, size, size)
        diagrams = Diagrams(torch.rand(2 * batch, 72, 2), torch.ones(2 * batch, 72, dtype=torch.bool)) if on else None
        one = Batch((View(image, diagrams),), {}, {}, torch.arange(batch))
        costs.append(min(seconds(lambda e=encoder, b=one: backward(e, b)) for _ in range(STEPS)))
    plain, fused = (1000 * cost for cost in costs)
    return f"| resnet18, {size} | {plain:.0f} | {fused:.0f} | {fused / plain:.2f} |"


def backward(encoder: torch.nn.Module, batch: Batch) -> None:
    encoder.zero_grad()
    encoder(*batch.views[0].inputs).square().mean().backward()


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()

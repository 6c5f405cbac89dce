"""How strong may an operation be? Measured on training images, an operation and a band at a time.

For each strength of a geometric grid: the share of images whose diagram moves by a distance inside the band. The
longest run of strengths with a share of at least 60 % is the range that training draws from. An operation without one
is left out of that band.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float32, Float64, UInt64
from torch import Tensor

from kladi.data.views import philox
from kladi.data.views.bounded import OPERATIONS, RANDOM, Draw, changed
from kladi.data.views.region import Looks
from kladi.errors import UserError
from kladi.structure.topology import BANDS, Diagram, diagrams, relative_bottleneck

GRID = tuple(round(0.02 * 1.6**k, 4) for k in range(7))
"""Strengths tried, in spans."""
DRAWS, ENOUGH, LEAST_SPAN, LEAST_OPERATIONS = 3, 0.6, 0.05, 2
STREAM = "calibration"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Range:
    """The strengths of an operation in a band. share, median: of images inside it, and of their distances, over the
    range. n: images and draws measured at each strength."""

    low: float
    high: float
    share: float
    median: float
    n: int


@dataclass(frozen=True)
class Reach:
    """How far one strength of an operation moves diagrams. quantiles: of the relative distance, at `QUANTILES`."""

    strength: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Strengths:
    """ranges: band -> operation -> `Range`; what is not there is not used. skipped: images with next to no topology.
    reaches: operation -> what was measured, by strength."""

    ranges: Mapping[str, Mapping[str, Range]]
    skipped: int
    reaches: Mapping[str, tuple[Reach, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Original:
    """Images with what their diagrams are made of, and these diagrams: what strengths are relative to.

    images: before anything is done to them; operations are done before images are reduced to the side of diagrams.
    """

    images: Float32[Tensor, "n C S S"]
    row_id: UInt64[np.ndarray, " n"]
    looks: Looks
    diagrams: tuple[Diagram, ...]

    @classmethod
    def of(cls, images: Float32[Tensor, "n C S S"], row_id: UInt64[np.ndarray, " n"], looks: Looks) -> Original:
        return cls(images, row_id, looks, tuple(diagrams(looks.v(images))))

    @property
    def unit(self) -> Float64[np.ndarray, " n"]:
        """Grey levels of a strength of 1: a span, in the images' own units."""
        return np.array([found.span for found in self.diagrams]) * (self.looks.high - self.looks.low)

    def some(self, keep: np.ndarray) -> Original:
        rows = np.flatnonzero(keep)
        kept = tuple(self.diagrams[row] for row in rows)
        return Original(self.images[torch.from_numpy(rows)], self.row_id[rows], self.looks.some(rows), kept)


def calibrate(
    images: Float32[Tensor, "n C S S"],
    row_id: UInt64[np.ndarray, " n"],
    looks: Looks,
    seed: int = 0,
) -> Strengths:
    """The ranges for these images.

    Args:
        images: in [0, 1], training images alone, at the size and by the pipeline of the training.
        row_id: of each, so that the draws are those rows' own.
        looks: where in them their diagrams are made.

    Raises:
        UserError: no image has topology to speak of.
    """
    every = Original.of(images, row_id, looks)
    keep = np.array([found.span >= LEAST_SPAN for found in every.diagrams], dtype=bool)
    if not keep.any():
        raise UserError(f"none of {len(images):,} images has a component or a hole of contrast {LEAST_SPAN} or more")
    original = every.some(keep)
    ranges: dict[str, dict[str, Range]] = {band: {} for band in BANDS}
    reaches: dict[str, tuple[Reach, ...]] = {}
    for name in OPERATIONS:
        measured = {u: moved(original, name, u, seed) for u in GRID}
        for band in BANDS:
            found = _range(band, measured, lambda u, name=name: moved(original, name, u, seed))
            if found is not None:
                ranges[band][name] = found
        reaches[name] = tuple(Reach(u, _quantiles(measured[u])) for u in sorted(measured))
    return Strengths(ranges, int((~keep).sum()), reaches)


def require_enough(strengths: Strengths) -> None:
    """Refuse to train on views of a single kind.

    Raises:
        UserError: names the band that has too few operations.
    """
    for band, found in strengths.ranges.items():
        if len(found) < LEAST_OPERATIONS:
            low, high = BANDS[band]
            raise UserError(
                f"{len(found)} of {len(OPERATIONS)} operations move the diagrams of these images by {low:.0%} to "
                f"{high:.0%} of their span ({band} views); {LEAST_OPERATIONS} are needed; larger images have more "
                "topology (--intensity.size, --topology.side)"
            )


def moved(original: Original, name: str, strength: float, seed: int) -> Float64[np.ndarray, " m"]:
    """Relative distance of each image, and of each draw where the operation is random, from its original."""
    found: list[float] = []
    for number in range(DRAWS if name in RANDOM else 1):
        up = philox.uniform(seed, STREAM, original.row_id, 0, 0, number) < 0.5
        draw = Draw(up, original.row_id, seed, number)
        x = changed(original.images.clone(), name, strength * original.unit, draw)
        after = diagrams(original.looks.v(x))
        found += [relative_bottleneck(d, e) for d, e in zip(original.diagrams, after, strict=True)]
    return np.array(found)


def _range(band: str, measured: dict[float, np.ndarray], more: Callable[[float], np.ndarray]) -> Range | None:
    """The longest run of strengths that mostly fall into the band; a run of one is looked at more closely, and what is
    measured for it is added to `measured`."""
    run = _longest(sorted(measured), measured, band)
    if len(run) == 1:
        known = sorted(measured)
        at = known.index(run[0])
        low, high = known[max(at - 1, 0)], known[min(at + 1, len(known) - 1)]
        for u in np.geomspace(low, high, 7)[1:-1]:
            measured.setdefault(round(float(u), 4), more(round(float(u), 4)))
        run = _longest(sorted(measured), measured, band)
    if not run:
        return None
    inside = np.concatenate([measured[u] for u in run])
    return Range(run[0], run[-1], _share(inside, band), float(np.median(inside)), len(measured[run[0]]))


def _longest(strengths: list[float], measured: Mapping[float, np.ndarray], band: str) -> list[float]:
    best: list[float] = []
    run: list[float] = []
    for u in strengths:
        run = [*run, u] if _share(measured[u], band) >= ENOUGH else []
        best = run if len(run) > len(best) else best
    return best


def _quantiles(distances: Float64[np.ndarray, " n"]) -> tuple[float, ...]:
    return tuple(round(float(q), 5) for q in np.quantile(distances, QUANTILES))


def _share(distances: Float64[np.ndarray, " n"], band: str) -> float:
    """Of distances in the band; the upper end belongs to the next one, and to the last."""
    low, high = BANDS[band]
    last = band == list(BANDS)[-1]
    return float(((distances >= low) & ((distances <= high) if last else (distances < high))).mean())

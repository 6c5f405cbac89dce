"""Where in an image its diagram is made, and between which grey levels: all views of an image share both.

The diagram of a region is that of its bounding box, resized to the side of all diagrams, with what lies outside the
region at the darkest level: it enters the filtration last, and makes neither component nor hole.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, UInt32, UInt64
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

BINS = 256
LEAST_AREA, MOST_AREA = 0.01, 0.95
"""Of the image; what is smaller or larger is taken for no region."""
FLAT = 1e-5
"""A range below a step of 16 bits is rounding: a flat region has no topology."""
NEIGHBOURS = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class Region:
    """A part of an image. box: first and last row and column, the last excluded. mask: bool[H, W] inside the box."""

    box: tuple[int, int, int, int]
    mask: Bool[np.ndarray, "H W"]

    @classmethod
    def of(cls, mask: Bool[np.ndarray, "S S"]) -> Region | None:
        """The smallest box round a mask; None where the mask is next to nothing or next to everything."""
        if not LEAST_AREA <= mask.mean() <= MOST_AREA:
            return None
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        return cls((top, bottom, left, right), mask[top:bottom, left:right])

    def cut(self, grey: Float64[Tensor, "S S"], side: int) -> tuple[Float64[Tensor, "s s"], Bool[np.ndarray, "s s"]]:
        """The box and its mask, resized to `side`; the mask by nearest neighbours, grey levels by means over what is
        inside: nothing outside has a say."""
        top, bottom, left, right = self.box
        mask = torch.from_numpy(self.mask)[None, None].double()
        part, weight = (
            functional.interpolate(x, size=(side, side), mode="bilinear", antialias=True)[0, 0]
            for x in (grey[None, None, top:bottom, left:right].double() * mask, mask)
        )
        inside = functional.interpolate(mask, size=(side, side), mode="nearest-exact")[0, 0] > 0
        if not inside.any():  # a thin line may lie between all samples
            inside = weight >= weight.max()
        return (part / weight.clamp(min=1e-9)).where(inside, 0.0), inside.numpy()


@dataclass(frozen=True)
class Looks:
    """How images become what their diagrams are made of, v in [0, 1]: found on the unchanged images, used on every view
    of them.

    side: of v. low, high: grey levels that become 0 and 1. regions: of each image, None for the whole of it.
    """

    side: int
    low: Float64[np.ndarray, " b"]
    high: Float64[np.ndarray, " b"]
    regions: tuple[Region | None, ...]

    @classmethod
    def of(cls, images: Float[Tensor, "b C S S"], side: int, masks: Sequence[Bool[np.ndarray, "S S"]] = ()) -> Looks:
        """Of these images; the masks say where to look, without them it is everywhere."""
        regions = tuple(Region.of(mask) for mask in masks) if len(masks) else (None,) * len(images)
        blank = cls(side, np.zeros(len(images)), np.ones(len(images)), regions)
        seen = [
            level if inside is None else level[inside] for level, inside in zip(*blank._levels(images), strict=True)
        ]
        low, high = (np.array([extreme(x) for x in seen], dtype=np.float64) for extreme in (np.min, np.max))
        return cls(side, low, np.where(high - low < FLAT, low, high), regions)

    def v(self, images: Float[Tensor, "b C S S"]) -> Float64[np.ndarray, "b s s"]:
        """The mean over channels in [0, 1] by the range of the unchanged image, zero outside the region; zero
        everywhere where that has no range."""
        level, insides = self._levels(images)
        width = (self.high - self.low)[:, None, None]
        v = np.divide(level - self.low[:, None, None], width, out=np.zeros_like(level), where=width > 0)
        for i, inside in enumerate(insides):
            if inside is not None:
                v[i][~inside] = 0.0
        return np.clip(v, 0, 1)

    def marks(self, pixel_digest: UInt64[np.ndarray, " b"]) -> UInt32[np.ndarray, " b"]:
        """A checksum of each: equal looks at equal pixels have equal ones."""
        found = []
        for pixels, low, high, region in zip(pixel_digest, self.low, self.high, self.regions, strict=True):
            mark = zlib.crc32(np.array([low, high]).tobytes(), zlib.crc32(pixels.tobytes()))
            if region is not None:
                mark = zlib.crc32(region.mask.tobytes(), zlib.crc32(np.array(region.box).tobytes(), mark))
            found.append(mark)
        return np.array(found, dtype=np.uint32)

    def some(self, rows: Sequence[int] | np.ndarray) -> Looks:
        """Those of some of the images."""
        return Looks(self.side, self.low[rows], self.high[rows], tuple(self.regions[row] for row in rows))

    def _levels(self, images: Tensor) -> tuple[Float64[np.ndarray, "b s s"], list[Bool[np.ndarray, "s s"] | None]]:
        """Grey levels of the region of each image, at the side of diagrams, and what of them is inside."""
        grey = images.detach().cpu().double().mean(dim=1)  # some devices have no float64
        if all(region is None for region in self.regions):
            return shrunk(grey, self.side).numpy(), [None] * len(grey)
        levels: list[np.ndarray] = []
        insides: list[np.ndarray | None] = []
        for level, region in zip(grey, self.regions, strict=True):
            part, inside = (shrunk(level[None], self.side)[0], None) if region is None else region.cut(level, self.side)
            levels.append(part.numpy())
            insides.append(inside)
        return np.stack(levels), insides


def foregrounds(images: Float[Tensor, "b C S S"]) -> list[Bool[np.ndarray, "S S"]]:
    """Of each image the thing in front of its ground, found by grey level alone.

    Otsu's threshold parts the levels in two; the part that reaches the border of the image less is the front; of that
    the largest connected piece, with its holes filled: a ring would make a hole of its own.

    Source: Otsu, A threshold selection method from gray-level histograms, 1979.
    """
    return [_front(image) for image in images.detach().cpu().double().mean(dim=1).numpy()]


def _front(grey: Float64[np.ndarray, "S S"]) -> Bool[np.ndarray, "S S"]:
    bright = grey > otsu(grey)
    border = np.ones_like(bright)
    border[1:-1, 1:-1] = False
    front = bright if bright[border].mean() <= 0.5 else ~bright
    pieces, count = ndimage.label(front, NEIGHBOURS)
    if not count:
        return front
    largest = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    return np.asarray(ndimage.binary_fill_holes(largest))


def otsu(grey: Float64[np.ndarray, "S S"]) -> float:
    """The threshold t that parts the levels at most: w0 w1 (m0 - m1)^2 of the levels up to t and above it; the smallest
    such of `BINS` levels between the least and the greatest."""
    low, high = float(grey.min()), float(grey.max())
    if low == high:
        return high
    count, edges = np.histogram(grey, bins=BINS, range=(low, high))
    centre = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(count)[:-1], count.sum()
    sum_below, whole = np.cumsum(count * centre)[:-1], float((count * centre).sum())
    gap = sum_below / np.maximum(below, 1) - (whole - sum_below) / np.maximum(total - below, 1)
    return float(edges[1 + np.argmax(below * (total - below) * gap**2)])


def shrunk(x: Float[Tensor, "*b S S"], side: int) -> Float[Tensor, "*b s s"]:
    """Reduced to the side that diagrams are made of, by means over areas; never enlarged."""
    return functional.adaptive_avg_pool2d(x, side) if x.shape[-1] > side else x

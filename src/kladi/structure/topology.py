"""Topology of a grey image: which bright parts are connected, which dark ones are enclosed, and how firmly.

Superlevel filtration in the T-construction: pixels are the top cells, and with v in [0, 1] a pixel enters at t = 1 - v,
the brightest first. A point (birth, death) of H0 is a bright component that appears at t = birth and meets an older one
at t = death; a point of H1 is a dark region that is closed in at t = birth and filled at t = death. Bright pixels are
neighbours along edges and corners (8), dark ones along edges alone (4); a dark blob that touches the border of the
image is no hole. The component that never dies is left out. In the other construction, where pixels are vertices, the
same image has other diagrams: never compare the two.

Source: Kaczynski, Mischaikow, Mrozek, Computational Homology, 2004; Bleile et al., The persistent homology of dual
digital image constructions, 2022, for T and V.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64

from kladi.errors import UserError
from kladi.structure.bottleneck import Points, bottleneck, persistence, within

DROPPED, TOLERANCE = 0.016, 0.002
"""Of a span: points of at most the first change a distance by half as much; bisection ends at the second."""
BANDS = {"weak": (0.05, 0.15), "strong": (0.15, 0.25)}
"""Relative bottleneck distance of an augmented image from its original: least, and what it stays below."""


@dataclass(frozen=True, eq=False)
class Diagram:
    """The finite points (birth, death) of an image with birth < death, most persistent first; then by birth and death.

    h0: float64[n, 2], bright components. h1: float64[m, 2], enclosed dark regions.
    """

    h0: Points
    h1: Points
    construction: ClassVar[str] = "superlevel-T"

    @classmethod
    def empty(cls) -> Diagram:
        """That of an image without topology."""
        return cls(np.zeros((0, 2)), np.zeros((0, 2)))

    @property
    def span(self) -> float:
        """The greatest persistence; 0 without a point."""
        return max((float(persistence(points)[0]) for points in (self.h0, self.h1) if len(points)), default=0.0)

    @property
    def digest(self) -> str:
        """SHA-256 of the construction and the points."""
        said = hashlib.sha256(f"{self.construction} {len(self.h0)} {len(self.h1)} ".encode())
        return hashlib.sha256(said.digest() + np.concatenate([self.h0, self.h1]).astype("<f8").tobytes()).hexdigest()

    def tokens(self, k0: int = 48, k1: int = 96) -> tuple[Float32[np.ndarray, "k 2"], Bool[np.ndarray, " k"]]:
        """The k0 most persistent points of H0, then the k1 of H1, k = k0 + k1; and which of them are points.

        What the mask calls no point is zero, and must not be read as one.
        """
        tokens, mask = np.zeros((k0 + k1, 2), dtype=np.float32), np.zeros(k0 + k1, dtype=bool)
        for points, first, most in ((self.h0, 0, k0), (self.h1, k0, k1)):
            count = min(len(points), most)
            tokens[first : first + count], mask[first : first + count] = points[:count], True
        return tokens, mask


def diagram(image: Float[np.ndarray, "..."]) -> Diagram:
    """The persistence diagram of a grey image, bright on dark.

    Args:
        image: float[H, W], v in [0, 1], any size from 1 x 1.

    Raises:
        ValueError: not two-dimensional, empty, or a value that is not finite or outside [0, 1].

    >>> ring = np.zeros((9, 9))
    >>> ring[2:7, 2:7] = 1.0
    >>> ring[4, 4] = 0.25
    >>> found = diagram(ring)
    >>> found.h0.tolist(), found.h1.tolist()
    ([], [[0.0, 0.75]])
    """
    return diagrams([image])[0]


def diagrams(images: Iterable[Float[np.ndarray, "..."]]) -> list[Diagram]:
    """Those of several images of any sizes; what `diagram` gives for each, in less time.

    Raises:
        ValueError: as `diagram`.
    """
    return [Diagram(_ordered(h0), _ordered(h1)) for h0, h1 in _tool().transform([_entering(x) for x in images])]


def relative_bottleneck(d: Diagram, other: Diagram, *, exact: bool = False) -> float:
    """How far `other` is from `d`: the bottleneck distance in spans of `d`, the greater of H0 and H1.

        d_rel = max over H0, H1 of d_B(d, other) / span(d)

    At most max|x - y| / span(d) for images x, y of one size. Not symmetric: the span is that of `d`. Where `d` has no
    point it is 0 if `other` has none either, else infinity.

    Args:
        exact: to 1e-9 of all points. Otherwise points of persistence up to 0.016 span are left out, and the result is
            off by at most 0.01.
    """
    span = d.span
    if span == 0:
        return 0.0 if other.span == 0 else math.inf
    faint, tolerance = (0.0, 1e-9) if exact else (DROPPED * span, TOLERANCE * span)
    pairs = [(_above(a, faint), _above(b, faint)) for a, b in ((d.h0, other.h0), (d.h1, other.h1))]
    return max(bottleneck(a, b, tolerance) for a, b in pairs) / span


def band(d: Diagram, other: Diagram) -> str:
    """The band of `BANDS` that the relative distance lies in: "below", "weak", "strong" or "beyond".

    The question is decided at three radii, without the distance; points of up to 0.016 span are left out.
    """
    span = d.span
    if span == 0:
        return "below" if other.span == 0 else "beyond"
    pairs = [(_above(a, DROPPED * span), _above(b, DROPPED * span)) for a, b in ((d.h0, other.h0), (d.h1, other.h1))]
    for name, radius in (("below", BANDS["weak"][0]), ("weak", BANDS["weak"][1]), ("strong", BANDS["strong"][1])):
        if all(within(a, b, radius * span) for a, b in pairs):
            return name
    return "beyond"


def _entering(image: Float[np.ndarray, "..."]) -> Float64[np.ndarray, "H W"]:
    """When each pixel enters the filtration; refuses what is no grey image in [0, 1]."""
    values = np.asarray(image, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a diagram is of a grey image [H, W], not of shape {values.shape}")
    if not np.isfinite(values).all():  # given one, the tool returns a plausible diagram or ends the process
        raise ValueError("a diagram is of finite values; the image has NaN or infinity")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise ValueError(f"a diagram is of values in [0, 1]; the image has {low:g} to {high:g}")
    return 1 - values


@functools.cache
def _tool() -> Any:
    """gudhi's fast path for two dimensions; its class wants one `fit` before it transforms."""
    try:
        from gudhi.sklearn import CubicalPersistence
    except ImportError as error:
        raise UserError('topology needs a package: pip install "kladi[topology]"') from error
    return CubicalPersistence(homology_dimensions=[0, 1]).fit([])


def _ordered(points: Points) -> Points:
    """The finite points, so that equal multisets are equal arrays."""
    found = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    found = found[np.isfinite(found[:, 1])]
    return found[np.lexsort((found[:, 1], found[:, 0], -persistence(found)))]


def _above(points: Points, faint: float) -> Points:
    """The points whose persistence exceeds `faint`; they come first."""
    return points[: int(np.count_nonzero(persistence(points) > faint))]

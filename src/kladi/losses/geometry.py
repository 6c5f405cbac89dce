"""Sphere and Poincaré ball as pure functions, and the two frozen values that choose between them.

A geometry answers six questions: where does an embedding land (`embed`), how alike are two points (`similarities`), how
far apart (`distances`, `distance`), where is the middle of many (`moments`, `mean`), what lies a fraction `t` of the
way to another point (`step`), and how wide is the space (`diameter`). Whatever asks only these works in both.

The ball has sectional curvature -c, c > 0: points with ||x|| < 1/sqrt(c) and the distance

    d(x, y) = (2 / sqrt(c)) asinh( sqrt(c) ||x - y|| / sqrt((1 - c ||x||^2) (1 - c ||y||^2)) )

which is the usual artanh form without its clamp: finite gradients at x = y, and d -> 2 ||x - y|| as c -> 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

NULL_NORM = 1e-12
"""A row shorter than this has no direction: it stays (almost) at the origin and gets no gradient."""
NULL_MEAN = 1e-6
"""Points on the sphere whose plain mean is shorter than this have no middle."""
REACH = 3.0
"""sqrt(curvature) * clip may be at most this: points beyond sit so near the rim that float32 cannot part them."""
_BALL_MARGIN = {torch.float32: 4e-3, torch.float64: 1e-5}
"""How far inside the rim the projection puts a point, as a share of the radius: rounding spoils what is nearer."""


def at_least_float32(z: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """float64 stays, everything shorter becomes float32: products of half floats lose the pairs that matter."""
    return z if z.dtype == torch.float64 else z.float()


def _squared_norm(x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n 1"]:
    return (x * x).sum(-1, keepdim=True)


# --- sphere --------------------------------------------------------------------------------------------------------


def normalise(z: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
    """`z / max(||z||, 1e-12)`: each row to length one, a zero row to zero.

    >>> normalise(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])

    A row shorter than 1e-12 gets no gradient. Its true gradient is 1e12 times that of its neighbours, along no
    meaningful direction, and would drown the batch.
    """
    square = _squared_norm(z)
    null = square <= NULL_NORM**2
    length = torch.where(null, torch.ones_like(square), square).sqrt()
    return torch.where(null, z.detach() / NULL_NORM, z / length)


def squared_distances(x: Float[Tensor, "n D"], y: Float[Tensor, "m D"], exact: bool = False) -> Float[Tensor, "n m"]:
    """`||x_i - y_k||^2` of all pairs without ever holding n x m x D numbers; at least eps^2, with no gradient there.

    By one matmul, which loses digits for near pairs; `exact=True` subtracts first: slower, for evaluation.
    """
    if exact:
        square = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    else:
        square = _squared_norm(x) + _squared_norm(y).T - 2 * x @ y.T
    return square.clamp_min(torch.finfo(x.dtype).eps ** 2)


def _row_square(x: Float[Tensor, "*n D"], y: Float[Tensor, "*n D"]) -> Float[Tensor, "*n"]:
    return ((x - y) ** 2).sum(-1).clamp_min(torch.finfo(x.dtype).eps ** 2)


@dataclass(frozen=True)
class Sphere:
    """Unit vectors, their cosine, and the chord between them. A zero embedding stays at zero."""

    name: ClassVar[str] = "sphere"
    diameter: ClassVar[float] = 2.0

    def embed(self, z: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """`normalise`."""
        return normalise(z)

    def similarities(self, x: Float[Tensor, "n D"], y: Float[Tensor, "m D"]) -> Float[Tensor, "n m"]:
        """Cosines of all pairs."""
        return x @ y.T

    def distances(self, x: Float[Tensor, "n D"], y: Float[Tensor, "m D"], exact: bool = False) -> Float[Tensor, "n m"]:
        """Chords `||x - y||` of all pairs; `exact` as in `squared_distances`."""
        return squared_distances(x, y, exact).sqrt()

    def distance(self, x: Float[Tensor, "*n D"], y: Float[Tensor, "*n D"]) -> Float[Tensor, "*n"]:
        """Chord of each row of `x` with the same row of `y`."""
        return _row_square(x, y).sqrt()

    def moments(self, x: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "n D"], Float[Tensor, " n"]]:
        """The numerator and denominator of each point's share in a mean; sums of them are handed to `mean`."""
        return x, torch.ones_like(x[:, 0])

    def mean(
        self, numerator: Float[Tensor, "m D"], denominator: Float[Tensor, " m"]
    ) -> tuple[Float[Tensor, "m D"], Bool[Tensor, " m"]]:
        """`sum x / ||sum x||` from the summed moments, and whether there is a middle at all (opposites have none)."""
        defined = (numerator.norm(dim=-1) / denominator.clamp_min(1)) >= NULL_MEAN
        return normalise(numerator), defined & (denominator > 0)

    def step(
        self, start: Float[Tensor, "*n D"], end: Float[Tensor, "*n D"], t: Float[Tensor, "*n 1"]
    ) -> Float[Tensor, "*n D"]:
        """`normalise((1 - t) start + t end)`; halfway between opposites there is no such point, and `start` stays."""
        mixed = (1 - t) * start + t * end
        return torch.where(mixed.norm(dim=-1, keepdim=True) < NULL_MEAN, start, normalise(mixed))


# --- Poincaré ball -------------------------------------------------------------------------------------------------


def clip_norm(z: Float[Tensor, "*n D"], clip: float | Tensor) -> Float[Tensor, "*n D"]:
    """`z min(1, clip / ||z||)`: rows longer than `clip` are cut to it, and get no gradient along themselves."""
    return z * (clip / _length(z)).clamp_max(1)


def _length(z: Float[Tensor, "*n D"]) -> Float[Tensor, "*n 1"]:
    """Norm with a zero gradient at zero, and never zero, so that it may divide. 1e-18 squares without underflow."""
    return _squared_norm(z).clamp_min(1e-36).sqrt()


def expmap0(v: Float[Tensor, "*n D"], curvature: float | Tensor) -> Float[Tensor, "*n D"]:
    """`tanh(sqrt(c) ||v||) v / (sqrt(c) ||v||)`: the point reached from the origin along `v`; 0 at v = 0."""
    length = curvature**0.5 * _length(v)
    return v * (torch.tanh(length) / length)


def project(x: Float[Tensor, "*n D"], curvature: float | Tensor) -> Float[Tensor, "*n D"]:
    """Pull points at or beyond the rim just inside it (a share of 4e-3 of the radius in float32, 1e-5 in float64)."""
    return clip_norm(x, (1 - _BALL_MARGIN.get(x.dtype, 4e-3)) / curvature**0.5)


def mobius_add(x: Float[Tensor, "*n D"], y: Float[Tensor, "*n D"], curvature: float | Tensor) -> Float[Tensor, "*n D"]:
    """`x (+) y`, the translation of y by x."""
    c, xy, xx, yy = curvature, (x * y).sum(-1, keepdim=True), _squared_norm(x), _squared_norm(y)
    return ((1 + 2 * c * xy + c * yy) * x + (1 - c * xx) * y) / (1 + 2 * c * xy + c * c * xx * yy)


def geodesic_step(
    x: Float[Tensor, "*n D"], y: Float[Tensor, "*n D"], t: Float[Tensor, "*n 1"], curvature: float | Tensor
) -> Float[Tensor, "*n D"]:
    """`x (+) (t (x) (-x (+) y))`: the point a share `t` of the way from x to y along the geodesic."""
    way = mobius_add(-x, y, curvature)
    length = (curvature**0.5 * _length(way)).clamp_max(1 - torch.finfo(x.dtype).eps)
    return project(mobius_add(x, torch.tanh(t * torch.atanh(length)) * way / length, curvature), curvature)


@dataclass(frozen=True)
class PoincareBall:
    """The ball of sectional curvature `-curvature`; embeddings are tangent vectors at its centre, cut at `clip`.

    Raises ValueError unless curvature > 0, clip > 0 and sqrt(curvature) clip <= 3: beyond that, points sit so near the
    rim that float32 cannot tell them apart. A curvature that is a tensor (see `LearnedCurvature`) gets gradients.
    """

    curvature: float | Tensor = 0.1
    clip: float = 2.3
    name: ClassVar[str] = "poincare"

    def __post_init__(self) -> None:
        curvature = self.number
        if not (math.isfinite(curvature) and curvature > 0):
            raise ValueError(f"curvature must be positive, not {curvature}; 0.1 is the default")
        if not self.clip > 0:
            raise ValueError(f"clip must be positive, not {self.clip}; 2.3 is the default")
        reach = curvature**0.5 * self.clip
        if reach > REACH * (1 + 1e-6):
            raise ValueError(
                f"sqrt(curvature) * clip is {reach:.3g}, and must not exceed {REACH:g}; with curvature {curvature:g}, "
                f"clip may be at most {REACH / curvature**0.5:.3g}"
            )

    @property
    def number(self) -> float:
        """The curvature without its gradient."""
        return self.curvature.item() if isinstance(self.curvature, Tensor) else self.curvature

    @property
    def diameter(self) -> float:
        """Largest distance between two embedded points: `d(0, exp_0 v) = 2 ||v||`, so four times the clip."""
        return 4 * self.clip

    def embed(self, z: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """`exp_0` of the clipped row."""
        return expmap0(clip_norm(z, self.clip), self.curvature)

    def similarities(self, x: Float[Tensor, "n D"], y: Float[Tensor, "m D"]) -> Float[Tensor, "n m"]:
        """Negative distances of all pairs."""
        return -self.distances(x, y)

    def distances(self, x: Float[Tensor, "n D"], y: Float[Tensor, "m D"], exact: bool = False) -> Float[Tensor, "n m"]:
        """Hyperbolic distances of all pairs; `exact` as in `squared_distances`."""
        gamma = self.gamma(x) * self.gamma(y).T
        return self.from_chord(squared_distances(x, y, exact).sqrt() * gamma)

    def distance(self, x: Float[Tensor, "*n D"], y: Float[Tensor, "*n D"]) -> Float[Tensor, "*n"]:
        """Hyperbolic distance of each row of `x` to the same row of `y`."""
        gamma = (self.gamma(x) * self.gamma(y)).squeeze(-1)
        return self.from_chord(_row_square(x, y).sqrt() * gamma)

    def gamma(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n 1"]:
        """`(1 - c ||x||^2)^(-1/2)`: how much the ball stretches chords that end in x."""
        return (1 - self.curvature * _squared_norm(x)).rsqrt()

    def from_chord(self, u: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
        """`(2 / sqrt(c)) asinh(sqrt(c) u)` of `u = ||x - y|| gamma(x) gamma(y)`."""
        root = self.curvature**0.5
        return (2 / root) * torch.asinh(root * u)

    def moments(self, x: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "n D"], Float[Tensor, " n"]]:
        """`2x / (1 - c ||x||^2)` and `(1 + c ||x||^2) / (1 - c ||x||^2)`; sums of them are handed to `mean`."""
        scaled = self.curvature * _squared_norm(x)
        return 2 * x / (1 - scaled), ((1 + scaled) / (1 - scaled)).squeeze(-1)

    def mean(
        self, numerator: Float[Tensor, "m D"], denominator: Float[Tensor, " m"]
    ) -> tuple[Float[Tensor, "m D"], Bool[Tensor, " m"]]:
        """Einstein midpoint `k / (1 + sqrt(1 - c ||k||^2))`, k = numerator / denominator; undefined only for none."""
        defined = denominator > 0
        klein = numerator / torch.where(defined, denominator, torch.ones_like(denominator))[:, None]
        inside = (1 - self.curvature * _squared_norm(klein)).clamp_min(0).sqrt()
        return klein / (1 + inside), defined

    def step(
        self, start: Float[Tensor, "*n D"], end: Float[Tensor, "*n D"], t: Float[Tensor, "*n 1"]
    ) -> Float[Tensor, "*n D"]:
        """`geodesic_step`."""
        return geodesic_step(start, end, t, self.curvature)


class LearnedCurvature(nn.Module):
    """A curvature that training chooses: `c = (3 / clip)^2 sigmoid(a)` with one parameter `a`, so that 0 < c holds and
    sqrt(c) clip < 3 too, wherever the optimiser goes. Losses that share one space share one of these.

    Args:
        start: c before the first step.
        clip: of the ball.

    >>> LearnedCurvature(0.1)().curvature
    tensor(0.1000, grad_fn=<MulBackward0>)
    """

    def __init__(self, start: float = 0.1, clip: float = 2.3) -> None:
        super().__init__()
        if not 0 < clip < math.inf:
            raise ValueError(f"clip must be positive, not {clip}; 2.3 is the default")
        self.clip, self._most = clip, (REACH / clip) ** 2
        if not 0 < start < self._most:
            raise ValueError(f"a learned curvature must begin between 0 and {self._most:.3g}, not at {start}")
        self.logit = nn.Parameter(torch.tensor(math.log(start / (self._most - start))))

    @override
    def forward(self) -> PoincareBall:
        """The ball as it is now; distances in it reach the parameter."""
        return PoincareBall(self._most * torch.sigmoid(at_least_float32(self.logit)), self.clip)


Geometry = Sphere | PoincareBall


def named(geometry: str, curvature: float = 0.1, clip: float = 2.3) -> Geometry:
    """The geometry of that name. Raises ValueError for another name, and for a ball that float32 cannot hold.

    Args:
        geometry: "sphere" or "poincare".
        curvature: c > 0 of the ball, whose sectional curvature is -c; the sphere ignores it.
        clip: embeddings longer than this are cut to it before they enter the ball; the sphere ignores it.
    """
    if geometry == "sphere":
        return Sphere()
    if geometry == "poincare":
        return PoincareBall(float(curvature), float(clip))
    raise ValueError(f'geometry must be "sphere" or "poincare", not {geometry!r}')


class LossInSpace(nn.Module):
    """A loss whose embeddings live in a geometry: a fixed one, or a ball whose curvature is learned.

    Raises ValueError as `named` does, and for a learned curvature without a ball or with another clip.
    """

    def __init__(self, geometry: str, curvature: float | LearnedCurvature, clip: float) -> None:
        super().__init__()
        self.learned = curvature if isinstance(curvature, LearnedCurvature) else None
        if self.learned is not None and (geometry != "poincare" or clip != self.learned.clip):
            raise ValueError(f'a learned curvature is of geometry "poincare" with clip {self.learned.clip:g}')
        self._fixed = Sphere() if isinstance(curvature, LearnedCurvature) else named(geometry, curvature, clip)

    @property
    def space(self) -> Geometry:
        """The geometry as it is now."""
        return self._fixed if self.learned is None else self.learned()

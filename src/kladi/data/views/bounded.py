"""Changes of an image whose effect on its topology is bounded: strengths are shares of the diagram's own span.

An amount a = u span (hi - lo) is in grey levels, with u the strength, the span that of the image's diagram and lo, hi
the range it was normalised by. "Blended" is x + min(1, a / max|y - x|) (y - x), so that no pixel moves by more than a:
by the stability of persistence the diagram then moves by at most u spans. Fixed strengths would not do: spans differ
tenfold between images of one data set.

Source: the families are those of TopoCL (Meng et al., CVPR 2026); strengths and units are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int, UInt64
from torch import Tensor
from torch.nn import functional

from kladi.data.views import philox
from kladi.data.views.augment import blur, power

TURNS = 8
"""Flips and quarter turns of a square; none of them changes a diagram."""
GAMMA, SIGMA = 0.5, 1.0
"""Logarithm of the exponent, and pixels, of the changes that are blended."""


@dataclass(frozen=True)
class Draw:
    """What is random in one view of `b` images.

    up: brighter or darker, where an operation can do both. row_id, seed, epoch, view: the counter of the noise.
    """

    up: Bool[np.ndarray, " b"]
    row_id: UInt64[np.ndarray, " b"]
    seed: int = 0
    epoch: int = 0
    view: int = 0


Images = Float32[Tensor, "b C S S"]
Amount = Float32[Tensor, "b 1 1 1"]


def noise(x: Images, amount: Amount, draw: Draw) -> Images:
    """Gaussian, of standard deviation `amount`; not bounded pixel by pixel."""
    drawn = philox.normals(draw.seed, "bounded noise", draw.row_id, draw.epoch, draw.view, x[0].numel())
    return x + amount * torch.from_numpy(drawn).to(x.device).view_as(x)


def blurred(x: Images, amount: Amount, draw: Draw) -> Images:  # noqa: ARG001
    """Blended with a Gaussian blur of one pixel."""
    return _blend(x, blur(x, np.full(len(x), SIGMA)), amount)


def brightness(x: Images, amount: Amount, draw: Draw) -> Images:
    """Brighter or darker by `amount` everywhere."""
    return x + torch.where(_up(draw, x), amount, -amount)


def contrast_up(x: Images, amount: Amount, draw: Draw) -> Images:  # noqa: ARG001
    """Away from the image's mean, the farthest pixel by `amount`."""
    return x + _towards_mean(x, -amount)


def contrast_down(x: Images, amount: Amount, draw: Draw) -> Images:  # noqa: ARG001
    """Towards the image's mean, the farthest pixel by `amount`, at most all the way."""
    return x + _towards_mean(x, amount)


def gamma(x: Images, amount: Amount, draw: Draw) -> Images:
    """Blended with x ^ e^(1/2) or x ^ e^(-1/2)."""
    return _blend(x, power(x.clone(), np.exp(np.where(draw.up, -GAMMA, GAMMA))), amount)


def dilation(x: Images, amount: Amount, draw: Draw) -> Images:  # noqa: ARG001
    """Blended with the maximum over a cross of 3 x 3 pixels."""
    return _blend(x, _dilated(x), amount)


def erosion(x: Images, amount: Amount, draw: Draw) -> Images:  # noqa: ARG001
    """Blended with the minimum over a cross of 3 x 3 pixels."""
    return _blend(x, -_dilated(-x), amount)


Operation = Callable[[Images, Amount, Draw], Images]
OPERATIONS: dict[str, Operation] = {
    "noise": noise,
    "blur": blurred,
    "brightness": brightness,
    "contrast up": contrast_up,
    "contrast down": contrast_down,
    "gamma": gamma,
    "dilation": dilation,
    "erosion": erosion,
}
RANDOM = frozenset({"noise", "brightness", "gamma"})
"""Those whose result hangs on the draw."""


def changed(x: Images, name: str, amount: Float64[np.ndarray, " b"], draw: Draw) -> Images:
    """One operation on each image, clipped to [0, 1]; an amount of 0 changes nothing."""
    column = torch.from_numpy(amount.astype(np.float32)).to(x.device).view(-1, 1, 1, 1)
    return OPERATIONS[name](x, column, draw).clamp_(0, 1)


def turned(x: Images, turn: Int[np.ndarray, " b"]) -> Images:
    """Each image by one of the eight flips and quarter turns, 0 being none."""
    out = torch.empty_like(x)
    for one in np.unique(turn):
        rows = torch.from_numpy(np.flatnonzero(turn == one)).to(x.device)
        part = x[rows].flip(3) if one >= TURNS // 2 else x[rows]
        out[rows] = torch.rot90(part, int(one) % 4, (2, 3))
    return out


def _blend(x: Tensor, y: Tensor, amount: Tensor) -> Tensor:
    most = (y - x).abs().amax(dim=(1, 2, 3), keepdim=True)
    return x + (amount / most.clamp(min=1e-12)).clamp(max=1.0) * (y - x)


def _towards_mean(x: Tensor, amount: Tensor) -> Tensor:
    """The change that moves the farthest pixel by `amount` towards the mean."""
    # A sum over one image at a time does not hang on the batch.
    mean = torch.stack([image.double().mean() for image in x]).to(x.dtype).view(-1, 1, 1, 1)
    most = (x - mean).abs().amax(dim=(1, 2, 3), keepdim=True)
    return (amount / most.clamp(min=1e-12)).clamp(max=1.0) * (mean - x)


def _dilated(x: Tensor) -> Tensor:
    wide = functional.pad(x, (1, 1, 1, 1), mode="replicate")
    size = x.shape[-1]
    beside = [wide[:, :, r : r + size, c : c + size] for r, c in ((0, 1), (1, 0), (1, 2), (2, 1))]
    return torch.stack([x, *beside]).amax(dim=0)


def _up(draw: Draw, x: Tensor) -> Tensor:
    return torch.from_numpy(draw.up).to(x.device).view(-1, 1, 1, 1)

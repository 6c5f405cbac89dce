"""Training views: parameters drawn from (seed, epoch, row, view), then one pure batched transform on any device.

A view is resampled once (crop, rotation and flips composed), then brightness, contrast, gamma, saturation and hue,
blur, noise, normalisation. A sample's view has the same bits in whatever batch it is made, by however many threads:
every step consists of operations whose result for an element depends on that element alone. `torch.mean`, matrix
products, convolutions and `pow` are no such operations (their order of summation, or the code for an array's last few
elements, depends on the shape of the batch) and do not occur here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int, UInt, UInt64
from torch import Tensor
from torch.nn import functional

from kladi import config
from kladi.data.views import philox
from kladi.data.views.resample import affine, crop, resample, whole
from kladi.errors import UserError

(
    AREA,
    SHAPE,
    ACROSS,
    DOWN,
    ANGLE,
    FLIP_HORIZONTAL,
    FLIP_VERTICAL,
    BRIGHTNESS,
    CONTRAST,
    GAMMA,
    SATURATION,
    HUE,
    BLUR,
    SIGMA,
) = range(14)
"""Number of each draw. A new one goes to the end, so that the others keep their values."""

SIGMA_RANGE = (0.1 / 224, 2.0 / 224)
"""Blur as in SimCLR, 0.1 to 2 pixels on an image of 224, here as a share of the side."""
CACHED = 1 << 19
"""Values of float32 worked on at once on a CPU: 2 MB, about what a core can keep near."""
LUMINANCE = np.array([0.299, 0.587, 0.114])
CHROMA = np.array([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
"""Rows I and Q of the YIQ colour space; grey has none of either."""


@dataclass(frozen=True)
class Parameters:
    """What is done to each of `b` images in one view; `unchanged(b)` does nothing.

    window: whether views show a part of the image; otherwise all of it, and the next four are not read.
    area: share of the image's area.
    ratio: least and greatest width over height of the part.
    shape, across, down: the ratio within what fits, and the place of the part, in [0, 1).
    angle: radians, counter-clockwise.
    flip_horizontal, flip_vertical: mirror left to right, top to bottom.
    brightness: factor. contrast: factor about the view's mean luminance. gamma: exponent.
    saturation: factor of the chroma. hue: shift in turns.
    sigma: standard deviation of the Gaussian blur as a share of the view's side; 0 is none.
    noise: standard deviation of additive Gaussian noise in units of the [0, 1] range.
    seed, epoch, view, row_id: the counter of the noise, which is drawn when it is added.
    """

    window: bool
    ratio: tuple[float, float]
    area: Float64[np.ndarray, " b"]
    shape: Float64[np.ndarray, " b"]
    across: Float64[np.ndarray, " b"]
    down: Float64[np.ndarray, " b"]
    angle: Float64[np.ndarray, " b"]
    flip_horizontal: Bool[np.ndarray, " b"]
    flip_vertical: Bool[np.ndarray, " b"]
    brightness: Float64[np.ndarray, " b"]
    contrast: Float64[np.ndarray, " b"]
    gamma: Float64[np.ndarray, " b"]
    saturation: Float64[np.ndarray, " b"]
    hue: Float64[np.ndarray, " b"]
    sigma: Float64[np.ndarray, " b"]
    noise: Float64[np.ndarray, " b"]
    row_id: UInt64[np.ndarray, " b"]
    seed: int = 0
    epoch: int = 0
    view: int = 0

    def of(self, rows: slice) -> Parameters:
        """The parameters of some of the images."""
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{k: v[rows] for k, v in arrays.items() if isinstance(v, np.ndarray)})


def draw(augment: config.Augment, seed: int, epoch: int, row_id: UInt64[np.ndarray, " b"], view: int) -> Parameters:
    """The parameters of view number `view` of each row in that epoch; a strength of 0 gives exactly "no change".

    Area: uniform. Ratio: uniform in the logarithm. Angle: uniform in +- rotation. Brightness, contrast, saturation:
    uniform in 1 +- strength. Gamma: exp of uniform +- strength, so that darker and lighter are alike. Hue: uniform in
    +- strength turns. Blur: with its probability, sigma uniform in `SIGMA_RANGE` of the side.

    Raises:
        UserError: an impossible strength.
    """
    check(augment)
    u = philox.uniform(seed, "augment", row_id, epoch, view, np.arange(SIGMA + 1)).T
    lowest, highest = augment.crop
    sign = 2 * u - 1
    return Parameters(
        window=lowest < 1,
        ratio=augment.ratio,
        area=lowest + (highest - lowest) * u[AREA],
        shape=u[SHAPE],
        across=u[ACROSS],
        down=u[DOWN],
        angle=math.radians(augment.rotation) * sign[ANGLE],
        flip_horizontal=u[FLIP_HORIZONTAL] < augment.flip_horizontal,
        flip_vertical=u[FLIP_VERTICAL] < augment.flip_vertical,
        brightness=1 + augment.brightness * sign[BRIGHTNESS],
        contrast=1 + augment.contrast * sign[CONTRAST],
        gamma=np.exp(augment.gamma * sign[GAMMA]),
        saturation=1 + augment.saturation * sign[SATURATION],
        hue=augment.hue * sign[HUE],
        sigma=np.where(u[BLUR] < augment.blur, SIGMA_RANGE[0] + (SIGMA_RANGE[1] - SIGMA_RANGE[0]) * u[SIGMA], 0.0),
        noise=np.full(len(row_id), augment.noise),
        row_id=row_id,
        seed=seed,
        epoch=epoch,
        view=view,
    )


def unchanged(count: int) -> Parameters:
    """Parameters of `count` images that change nothing: the whole image as it is."""
    ones, zeros, no = np.ones(count), np.zeros(count), np.zeros(count, dtype=bool)
    return Parameters(
        window=False,
        ratio=(1.0, 1.0),
        area=ones,
        shape=zeros,
        across=zeros,
        down=zeros,
        angle=zeros,
        flip_horizontal=no,
        flip_vertical=no,
        brightness=ones,
        contrast=ones,
        gamma=ones,
        saturation=ones,
        hue=zeros,
        sigma=zeros,
        noise=zeros,
        row_id=np.zeros(count, dtype=np.uint64),
    )


def apply(
    images: UInt[Tensor, "b C s s"] | UInt[np.ndarray, "b C s s"],
    extent: Int[np.ndarray, "b 4"],
    parameters: Parameters,
    intensity: config.Intensity,
) -> Float32[Tensor, "b C size size"]:
    """One view of each image, on the device of `images`, normalised by `intensity.mean` and `intensity.std`.

        x <- clip(contrast (brightness x - m) + m)      m: mean luminance of brightness x
        x <- x ^ gamma
        x <- clip(saturation and hue)                   rotation and scaling in the chroma plane of YIQ; 3 channels
        x <- Gaussian blur                              edges repeated
        x <- clip(x + noise)
        x <- (x - mean) / std

    Args:
        images: stored squares, uint8 or uint16, zero outside `extent`; 0..255 or 0..65535 is [0, 1].
        extent: (top, left, height, width) of each image inside its square, on the CPU.
        parameters: from `draw`, or `unchanged`.
        intensity: size, mean and std of the encoder's input.

    Raises:
        ValueError: saturation or hue on other than 3 channels; images of another number of channels than `intensity`;
            a mean or std of neither one value nor one a channel.
    """
    pixels = images if isinstance(images, Tensor) else torch.from_numpy(np.require(images, requirements="W"))
    if pixels.shape[1] != intensity.channels:
        raise ValueError(f"images have {pixels.shape[1]} channels, intensity.channels is {intensity.channels}")
    for name, values in (("mean", intensity.mean), ("std", intensity.std)):
        if len(values) not in (1, intensity.channels):
            raise ValueError(
                f"intensity.{name} has {len(values)} values for {intensity.channels} channels; give 1 or all"
            )
    count, channels, size = len(pixels), pixels.shape[1], intensity.size
    out = torch.empty((count, channels, size, size), dtype=torch.float32, device=pixels.device)
    mean, std = (
        torch.tensor(v, dtype=torch.float32).to(out.device)[:, None, None] for v in (intensity.mean, intensity.std)
    )
    # On a CPU a few images at a time: what one step writes is still in the cache when the next step reads it.
    step = max(1, CACHED // (channels * size * size)) if pixels.device.type == "cpu" else count
    for first in range(0, count, step):
        rows = slice(first, first + step)
        view = _view(pixels[rows], extent[rows], parameters.of(rows), size)
        torch.div(view.sub_(mean), std, out=out[rows])
    return out


def plain(
    images: UInt[Tensor, "b C s s"] | UInt[np.ndarray, "b C s s"],
    extent: Int[np.ndarray, "b 4"],
    intensity: config.Intensity,
) -> Float32[Tensor, "b C size size"]:
    """The evaluation view: the whole image, its longer side filling the square, zeros around it, normalised.

    Exactly what `apply` gives where every strength is 0 and `augment.crop` is (1, 1).
    """
    return apply(images, extent, unchanged(len(extent)), intensity)


@functools.lru_cache
def check(augment: config.Augment, channels: int | None = None) -> None:
    """Refuse impossible strengths, and with `channels` those that this number of channels cannot have.

    Raises:
        UserError: names the key and the values that would do.
    """
    a = augment
    if not 0 < a.crop[0] <= a.crop[1] <= 1:
        raise UserError(f"--augment.crop {_text(a.crop)}: takes least,most with 0 < least <= most <= 1")
    if not 0 < a.ratio[0] <= a.ratio[1] < math.inf:
        raise UserError(f"--augment.ratio {_text(a.ratio)}: takes least,most with 0 < least <= most")
    limits = {"flip_horizontal": 1, "flip_vertical": 1, "blur": 1, "rotation": 180, "hue": 0.5}
    limits |= {"brightness": 1, "contrast": 1, "saturation": 1, "gamma": 5, "noise": 1}
    for key, most in limits.items():
        if not 0 <= getattr(a, key) <= most:
            raise UserError(f"--augment.{key} {getattr(a, key)}: takes 0 to {most}")
    if channels is not None and channels != 3 and (a.saturation or a.hue):
        key = "hue" if a.hue else "saturation"
        raise UserError(f"--augment.{key} {getattr(a, key)}: {channels} channel has no colour; give 0")


def _view(pixels: Tensor, extent: np.ndarray, p: Parameters, size: int) -> Tensor:
    """What `apply` promises, before normalisation."""
    window = crop(extent, p.area, p.ratio, p.shape, p.across, p.down) if p.window else whole(extent)
    transform = affine(window, p.angle, p.flip_horizontal, p.flip_vertical, size)
    view = resample(pixels, transform, size)
    view = _light(view, p, full=float(torch.iinfo(pixels.dtype).max))
    view = _on(view, p.gamma != 1, lambda part, rows: power(part, p.gamma[rows]))
    view = _on(
        view, (p.saturation != 1) | (p.hue != 0), lambda part, rows: _tint(part, p.saturation[rows], p.hue[rows])
    )
    view = _on(view, p.sigma > 0, lambda part, rows: blur(part, p.sigma[rows] * size))
    return _on(view, p.noise > 0, lambda part, rows: _noise(part, p, rows))


def _text(pair: tuple[float, float]) -> str:
    return f"{pair[0]:g},{pair[1]:g}"


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    """One float32 number an image, to multiply images with; float64 stays on the CPU (some devices have none)."""
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(like.device).view(-1, 1, 1, 1)


def _on(view: Tensor, mask: np.ndarray, change: Callable[[Tensor, np.ndarray], Tensor]) -> Tensor:
    """`change` applied to the masked images only: the others keep their very bits, and cost nothing."""
    rows = np.flatnonzero(mask)
    if len(rows) == 0:
        return view
    if len(rows) == len(mask):
        return change(view, rows)
    index = torch.from_numpy(rows).to(view.device)
    view[index] = change(view[index], rows)
    return view


def _light(view: Tensor, p: Parameters, full: float) -> Tensor:
    """Integer units to [0, 1] with brightness and contrast in one affine map an image, clipped once at the end."""
    gain = p.brightness / full
    if (p.contrast == 1).all():
        return view.mul_(_column(gain, view)).clamp_(0, 1)
    offset = _column(gain * (1 - p.contrast), view) * _mean_luminance(view, full)
    return view.mul_(_column(gain * p.contrast, view)).add_(offset).clamp_(0, 1)


def _mean_luminance(view: Tensor, full: float) -> Tensor:
    """[b, 1, 1, 1], in integer units. A sum of integers is exact, and so the same in any order of summation."""
    exact = torch.int32 if view[0, 0].numel() * full < 2**31 else torch.int64
    total = view.round().to(torch.int32).sum(dim=(2, 3), dtype=exact).to(torch.float32)
    if total.shape[1] == 3:
        red, green, blue = (float(weight) for weight in LUMINANCE)
        total = total[:, 0] * red + total[:, 1] * green + total[:, 2] * blue
    return (total / view[0, 0].numel()).view(-1, 1, 1, 1)


def power(view: Tensor, gamma: np.ndarray) -> Tensor:
    """x ^ gamma as exp(gamma log x), 0 staying 0; in place. (`pow` treats the last few elements of an array apart.)"""
    return view.log_().mul_(_column(gamma, view)).exp_()


def _tint(view: Tensor, saturation: np.ndarray, hue: np.ndarray) -> Tensor:
    """Scale and turn the chroma plane of YIQ, luminance kept; a grey pixel stays exactly as it is."""
    if view.shape[1] != 3:
        raise ValueError(f"saturation and hue need 3 channels, not {view.shape[1]}")
    to_yiq = np.vstack([LUMINANCE, CHROMA])
    turn = np.zeros((len(hue), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * np.cos(2 * np.pi * hue)
    turn[:, 2, 1] = saturation * np.sin(2 * np.pi * hue)
    turn[:, 1, 2] = -turn[:, 2, 1]
    # The matrix minus identity has rows that sum to 0, so that differences to green suffice, which are 0 on grey.
    change = np.linalg.inv(to_yiq) @ turn @ to_yiq - np.eye(3)
    red, blue = view[:, :1] - view[:, 1:2], view[:, 2:] - view[:, 1:2]
    for c in range(3):
        view[:, c : c + 1] += _column(change[:, c, 0], view) * red + _column(change[:, c, 2], view) * blue
    return view.clamp_(0, 1)


def blur(view: Tensor, sigma: np.ndarray) -> Tensor:
    """Gaussian of `sigma` pixels, cut at 3 sigma, along columns and then rows; the edge is repeated outwards."""
    reach = np.ceil(3 * sigma)
    radius = int(reach.max())
    offset = np.arange(radius + 1)[:, None]
    taps = np.where(offset <= reach, np.exp(-0.5 * (offset / sigma) ** 2), 0.0)
    taps /= taps[0] + 2 * taps[1:].sum(axis=0)
    for dim, padding in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        size = view.shape[dim]
        padded = functional.pad(view, padding, mode="replicate")
        view, pair = view * _column(taps[0], view), torch.empty_like(view)
        for k in range(1, radius + 1):
            torch.add(padded.narrow(dim, radius - k, size), padded.narrow(dim, radius + k, size), out=pair)
            view += pair.mul_(_column(taps[k], view))
    return view


def _noise(view: Tensor, p: Parameters, rows: np.ndarray) -> Tensor:
    drawn = philox.normals(p.seed, "noise", p.row_id[rows], p.epoch, p.view, view[0].numel())
    drawn *= p.noise[rows, None].astype(np.float32)
    return (view + torch.from_numpy(drawn).to(view.device).view_as(view)).clamp_(0, 1)

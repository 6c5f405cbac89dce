"""One affine resample: crop, rotation, flips and change of size are composed first, then each pixel is read once.

Coordinates are continuous pixels of the stored square, x to the right and y down; the centre of pixel (0, 0) is at
(0.5, 0.5). A window is (left, top, width, height).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int, UInt
from torch import Tensor
from torch.nn import functional


def whole(extent: Int[np.ndarray, "b 4"]) -> Float64[np.ndarray, "b 4"]:
    """The square window that shows the whole image: its longer side fills it, the rest is the zeros around it.

    Args:
        extent: (top, left, height, width) of the image inside the stored square.
    """
    top, left, height, width = extent.T.astype(np.float64)
    side = np.maximum(height, width)
    return np.stack([left + (width - side) / 2, top + (height - side) / 2, side, side], axis=1)


def crop(
    extent: Int[np.ndarray, "b 4"],
    area: Float64[np.ndarray, " b"],
    ratio: tuple[float, float],
    shape: Float64[np.ndarray, " b"],
    across: Float64[np.ndarray, " b"],
    down: Float64[np.ndarray, " b"],
) -> Float64[np.ndarray, "b 4"]:
    """A window inside the image with a share `area` of its pixels and a width over height within `ratio`.

    The ratio is drawn from those at which a window of that area fits, uniformly in the logarithm. Where none fits (an
    image more elongated than `ratio` allows) the nearest ratio is kept and the window is the largest of it, so that
    `ratio` is never exceeded. The usual rejection sampling needs an unknown number of draws; this needs one.

    Args:
        extent: (top, left, height, width) of the image inside the stored square.
        area: share of the image's area, in (0, 1].
        ratio: least and greatest width over height.
        shape, across, down: uniform on [0, 1): the ratio within its range, and where the window lies.
    """
    top, left, height, width = extent.T.astype(np.float64)
    whole_ratio = np.log(width / height)
    least, most = np.log(ratio[0]), np.log(ratio[1])
    slack = -np.log(area)  # ratios from whole_ratio - slack to whole_ratio + slack fit
    low = np.clip(whole_ratio - slack, least, most)
    high = np.clip(whole_ratio + slack, least, most)
    chosen = np.exp(low + shape * (high - low))
    wide = np.sqrt(area * height * width * chosen)
    tall = np.sqrt(area * height * width / chosen)
    shrink = np.minimum(1.0, np.minimum(width / wide, height / tall))
    wide, tall = wide * shrink, tall * shrink
    return np.stack([left + across * (width - wide), top + down * (height - tall), wide, tall], axis=1)


def affine(
    window: Float64[np.ndarray, "b 4"],
    angle: Float64[np.ndarray, " b"],
    flip_horizontal: Bool[np.ndarray, " b"],
    flip_vertical: Bool[np.ndarray, " b"],
    size: int,
) -> Float64[np.ndarray, "b 2 3"]:
    """Where each pixel of the view is read: (x, y) = affine . (u, v, 1), with (u, v) pixels from the view's centre.

    Args:
        window: (left, top, width, height), what the view shows.
        angle: radians; the content turns counter-clockwise about the window's centre, before it is stretched to the
            square, so a rotation never shears.
        flip_horizontal, flip_vertical: mirror the view left to right, top to bottom.
        size: side of the view, pixels.
    """
    left, top, width, height = window.T
    right = width / size * np.where(flip_horizontal, -1.0, 1.0)
    down = height / size * np.where(flip_vertical, -1.0, 1.0)
    cos, sin = np.cos(angle), np.sin(angle)
    x = np.stack([cos * right, -sin * down, left + width / 2], axis=1)
    y = np.stack([sin * right, cos * down, top + height / 2], axis=1)
    return np.stack([x, y], axis=1)


def resample(
    images: UInt[Tensor, "b C s s"], transform: Float64[np.ndarray, "b 2 3"], size: int
) -> Float32[Tensor, "b C {size} {size}"]:
    """The views, bilinear, in the integer units of `images`; zero outside the stored square.

    Against aliasing a view is read from the square reduced by 2, 4, ... where it makes the image smaller by more than
    sqrt(2), sqrt(8), ...; with the store of the same `size` that never happens (8/7 at most). Measured on medical
    images: at 8/7 within 42 dB of antialiased filters, which agree with each other to 40 dB; from 148 to 64 pixels the
    reduced square gives 41 dB, the unreduced one 34.

    Each sample's bits depend on that sample alone, not on the batch or the number of threads: the grid is made of exact
    products and sums instead of a matrix product, and `grid_sample` and `avg_pool2d` work sample by sample.
    """
    step = np.sqrt((transform[:, :, :2] ** 2).sum(axis=1)).max(axis=1)
    level = np.floor(np.log2(np.maximum(step, 1.0)) + 0.5).astype(np.int64)
    pixels = images.to(torch.float32)
    if not level.any():
        return _read(pixels, transform, size)
    out = pixels.new_empty((*pixels.shape[:2], size, size))
    for one in np.unique(level):
        rows = np.flatnonzero(level == one)
        out[rows] = _read(_reduced(pixels[rows], 1 << int(one)), transform[rows] / (1 << int(one)), size)
    return out


def _reduced(pixels: Tensor, factor: int) -> Tensor:
    """Means of `factor` x `factor` pixels; zeros complete the last ones, as there are zeros outside."""
    if factor == 1:
        return pixels
    missing = -pixels.shape[-1] % factor
    return functional.avg_pool2d(functional.pad(pixels, (0, missing, 0, missing)), factor)


def _read(pixels: Tensor, transform: np.ndarray, size: int) -> Tensor:
    """`grid_sample` on the affine grid."""
    scaled = transform * (2 / pixels.shape[-1])
    scaled[:, :, 2] -= 1  # grid_sample's units: -1 and 1 are the edges of the square
    at = torch.from_numpy(scaled.astype(np.float32)).to(pixels.device)[:, :, :, None, None]
    offset = torch.arange(size, device=pixels.device, dtype=torch.float32) + (0.5 - size / 2)
    along, across = at[:, :, 0] * offset, at[:, :, 1] * offset[:, None] + at[:, :, 2]
    grid = along + across  # [b, 2, size, size]: grid_sample reads this layout faster than pairs
    return functional.grid_sample(pixels, grid.permute(0, 2, 3, 1), align_corners=False)

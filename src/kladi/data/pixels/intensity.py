"""Stored values -> [0, 1] as integers -> the square of the store. The arithmetic behind `images`, without files."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int32, UInt8, UInt16
from PIL import Image

from kladi import config as settings

Integers = UInt8[np.ndarray, "..."] | UInt16[np.ndarray, "..."]

PERCENTILE_SAMPLE = 4_000_000
"""Percentiles of more values than this are taken from every k-th, the least k that suffices."""


@dataclass(frozen=True)
class Window:
    """`center` and `width` in the units of the values, and the DICOM function that uses them."""

    center: float
    width: float
    function: str = "LINEAR"


def linear(x: Float64[np.ndarray, ...], center: float, width: float) -> Float64[np.ndarray, ...]:
    """DICOM's LINEAR window (PS3.3 C.11.2.1.2.1): [0, 1], for integers c and w, w >= 1.

    0 for x <= c - 1/2 - (w - 1)/2, 1 for x > c - 1/2 + (w - 1)/2, else (x - (c - 1/2))/(w - 1) + 1/2.
    Width 1 is a step: 0 up to c - 1/2, 1 beyond.

    Raises:
        ValueError: width under 1.
    """
    if not width >= 1:
        raise ValueError(f"a LINEAR window needs width >= 1, not {width}")
    if width == 1:
        return (x > center - 0.5).astype(np.float64)
    return np.clip((x - (center - 0.5)) / (width - 1) + 0.5, 0.0, 1.0)


def linear_exact(x: Float64[np.ndarray, ...], center: float, width: float) -> Float64[np.ndarray, ...]:
    """DICOM's LINEAR_EXACT window (C.11.2.1.3.2): (x - c)/w + 1/2, clipped to [0, 1]; width above 0.

    Raises:
        ValueError: width not above 0.
    """
    if not width > 0:
        raise ValueError(f"a LINEAR_EXACT window needs width > 0, not {width}")
    return np.clip((x - center) / width + 0.5, 0.0, 1.0)


def sigmoid(x: Float64[np.ndarray, ...], center: float, width: float) -> Float64[np.ndarray, ...]:
    """DICOM's SIGMOID window (C.11.2.1.3.1): 1 / (1 + exp(-4 (x - c)/w)); width above 0.

    Raises:
        ValueError: width not above 0.
    """
    if not width > 0:
        raise ValueError(f"a SIGMOID window needs width > 0, not {width}")
    t = np.clip(-4.0 * (x - center) / width, -700.0, 700.0)  # exp stays finite; beyond, the value is 0 or 1 anyway
    return 1.0 / (1.0 + np.exp(t))


def percentile_bounds(
    x: Float64[np.ndarray, ...], keep: Bool[np.ndarray, ...] | None, low: float, high: float
) -> tuple[float, float]:
    """The `low` and `high` percentiles of the values that `keep` marks; (0, 0) where it marks none."""
    values = x.ravel() if keep is None else x[keep]
    if values.size == 0:
        return 0.0, 0.0
    step = -(-values.size // PERCENTILE_SAMPLE)
    bounds = np.percentile(values[::step], [low, high])
    return float(bounds[0]), float(bounds[1])


def between(x: Float64[np.ndarray, ...], low: float, high: float) -> Float64[np.ndarray, ...]:
    """(x - low) / (high - low), clipped to [0, 1]; all zero where the bounds are equal (a constant image)."""
    if not high > low:
        return np.zeros_like(x)
    return np.clip((x - low) / (high - low), 0.0, 1.0)


def to_integers(unit: Float64[np.ndarray, ...], bits: int) -> Integers:
    """[0, 1] -> uint8 (bits 8) or uint16 (bits 16), rounded to the nearest; error at most 1/2 step."""
    if bits == 8:
        return np.rint(unit * 255.0).astype(np.uint8)
    return np.rint(unit * 65535.0).astype(np.uint16)


def from_any_range(
    x: np.ndarray,
    intensity: settings.Intensity,
    *,
    bounds: tuple[float, float] | None = None,
    zero_nonfinite: bool = False,
) -> tuple[UInt16[np.ndarray, ...], str]:
    """Values without a range of their own (floats, signed or 32-bit integers) -> uint16 and the rule that was used.

    Floats that all lie in [0, 1] are taken as they are. Otherwise `window = "fixed"` is a LINEAR_EXACT window, and
    anything else is percentiles: those of `bounds` (a whole volume's) if given, else of this image.

    Args:
        x: any real dtype, [H, W] or [H, W, 3].
        intensity: the pipeline.
        bounds: percentiles found before, over more than this image.
        zero_nonfinite: NaN and infinity stay out of the percentiles and end at 0; the caller refuses them otherwise.
    """
    values = np.asarray(x, dtype=np.float64)
    finite = np.isfinite(values) if zero_nonfinite else None
    if finite is not None and bool(finite.all()):
        finite = None
    if finite is not None:
        values = np.where(finite, values, 0.0)
    known = values if finite is None else values[finite]
    if intensity.window == "fixed":
        unit, rule = linear_exact(values, float(intensity.center), float(intensity.width)), "fixed"
    elif bounds is None and x.dtype.kind == "f" and known.size and known.min() >= 0.0 and known.max() <= 1.0:
        unit, rule = values, "full range"
    else:
        low, high = bounds or percentile_bounds(values, finite, float(intensity.low), float(intensity.high))
        unit, rule = between(values, low, high), "percentile"
    if finite is not None:
        unit = np.where(finite, unit, 0.0)
    return to_integers(unit, 16), rule


def luminance(rgb: Integers) -> Integers:
    """RGB [H, W, 3] -> grey [H, W]: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601) in 16-bit fixed point.

    The weights add up to 65,536, so equal channels come back exactly. Same rule at 8 and 16 bits.
    """
    if rgb.dtype == np.uint8:
        return np.asarray(Image.fromarray(rgb).convert("L"))  # Pillow's own fixed point is this very formula
    wide = rgb.astype(np.uint32)  # 65535 * 65536 + 32768 still fits
    grey = (wide[..., 0] * 19595 + wide[..., 1] * 38470 + wide[..., 2] * 7471 + 32768) >> 16
    return grey.astype(rgb.dtype)


def widen(pixels: Integers) -> UInt16[np.ndarray, ...]:
    """uint8 -> uint16 by x 257, so that v/255 and (257 v)/65535 are the same number."""
    return pixels.astype(np.uint16) * np.uint16(257) if pixels.dtype == np.uint8 else pixels


def store_side(size: int) -> int:
    """Side of the stored square: `size` x 8/7, rounded up, so that a crop of the store is no enlargement."""
    return -(-size * 8 // 7)


def fit(pixels: Integers, side: int) -> tuple[Integers, Int32[np.ndarray, " 4"]]:
    """Resize with the aspect kept, the longer side to `side`, centred on zeros.

    Bilinear with antialiasing (the triangle spans the whole reduction), so no value leaves the image's own range and a
    constant stays constant. Each side is rounded to the nearest pixel and is at least 1.

    Args:
        pixels: [C, H, W], uint8 or uint16.
        side: of the square, pixels.

    Returns:
        The square [C, side, side] of the same dtype, and (top, left, height, width) of the image in it.
    """
    channels, height, width = pixels.shape
    scale = side / max(height, width)
    new_height = max(1, math.floor(height * scale + 0.5))
    new_width = max(1, math.floor(width * scale + 0.5))
    top, left = (side - new_height) // 2, (side - new_width) // 2
    square = np.zeros((channels, side, side), dtype=pixels.dtype)
    square[:, top : top + new_height, left : left + new_width] = _resized(pixels, new_height, new_width)
    return square, np.array([top, left, new_height, new_width], dtype=np.int32)


def _resized(pixels: Integers, height: int, width: int) -> Integers:
    if pixels.shape[1:] == (height, width):
        return pixels
    size, how = (width, height), Image.Resampling.BILINEAR
    if pixels.dtype == np.uint8 and len(pixels) == 3:
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        return np.asarray(image.resize(size, how)).transpose(2, 0, 1)
    if pixels.dtype == np.uint8:
        return np.stack([np.asarray(Image.fromarray(np.ascontiguousarray(c)).resize(size, how)) for c in pixels])
    planes = [np.asarray(Image.fromarray(c.astype(np.float32)).resize(size, how)) for c in pixels]
    return np.rint(np.clip(np.stack(planes), 0.0, 65535.0)).astype(np.uint16)

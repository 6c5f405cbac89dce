"""What a reader of one file format hands over: an open file, its frames, and the one way to say "not readable".

Nothing here imports torch: the decoder processes load these modules and must start quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kladi import config as settings

MIN_SIDE = 8
"""Images with a shorter side, in pixels, are left out: nothing medical is that small."""


class Unreadable(Exception):
    """This file, or this frame of it, gives no image. `reason` holds no path and nothing of the file's content.

    Args:
        reason: what the user reads after the file's name.
        code: row of the fault list (reliability), e.g. "I2".
        skip: no fault but a file that is no image by design (a structured report); counted apart.
    """

    def __init__(self, reason: str, code: str = "I2", *, skip: bool = False):
        super().__init__(reason)
        self.reason = reason
        self.code = code
        self.skip = skip


@dataclass(frozen=True)
class Limits:
    """Bounds that are checked against a file's header, before anything of that size is allocated."""

    max_pixels: int = 178_956_970
    """Pixels of one image."""
    max_bytes: int = 1 << 30
    """Bytes of all pixels of one file, unpacked."""
    max_inflated: int = 512 << 20
    """Bytes that a deflated stream may grow to."""
    max_ratio: int = 200
    """Times its own size that a deflated stream may grow to."""
    nonfinite: Literal["leave_out", "zero"] = "leave_out"

    @classmethod
    def of(cls, data: settings.Data) -> Limits:
        return cls(max_pixels=data.max_pixels, nonfinite=data.nonfinite)


@dataclass(frozen=True)
class Frame:
    """One picture as a reader gives it: already in [0, 1], as integers.

    pixels: uint8 (0..255) or uint16 (0..65535), [H, W] grey or [H, W, 3] RGB.
    notes: (code, sentence) of what was done or looks odd; they become warnings.
    window: which rule made [0, 1] of the stored values: "full range", "VOI LUT", "file window", "percentile", "fixed".
    """

    pixels: np.ndarray
    notes: tuple[tuple[str, str], ...] = ()
    window: str = "full range"


@dataclass(frozen=True)
class Opened:
    """A file whose header has been read and found sound.

    kind: the format by content, "PNG".
    frames: pages, slices or frames in it; at least 1.
    default: the frame that stands for the whole file.
    read: frame -> Frame; raises Unreadable.
    """

    kind: str
    frames: int
    default: int
    read: Callable[[int], Frame]
    notes: tuple[tuple[str, str], ...] = ()


def check_size(width: int, height: int, limits: Limits) -> None:
    """Refuse what is too small to be an image or too large to be decoded; called before allocation.

    Raises:
        Unreadable: I5 for a side under 8 pixels, I4 for more than `limits.max_pixels`.
    """
    if min(width, height) < MIN_SIDE:
        raise Unreadable(f"{width} x {height} pixels; the shorter side must have {MIN_SIDE}", "I5")
    if width * height > limits.max_pixels:
        raise Unreadable(
            f"{width:,} x {height:,} pixels are more than --data.max_pixels {limits.max_pixels:,}",
            "I4",
        )

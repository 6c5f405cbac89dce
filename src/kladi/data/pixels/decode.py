"""One file -> [0, 1] as integers, whatever its format; the rules are written out in `images`. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kladi import config as settings
from kladi.data.pixels import raster, signature
from kladi.data.pixels.frame import MIN_SIDE, Frame, Limits, Opened, Unreadable
from kladi.data.pixels.intensity import Integers, luminance, widen
from kladi.data.pixels.open_file import open_file

LARGEST_FILE = 4 << 30
"""Bytes; a file is read whole before it is decoded."""


@dataclass(frozen=True)
class Decoded:
    """One image, in [0, 1] as integers.

    pixels: uint8 (/255) or uint16 (/65535), [C, H, W], C as the pipeline asks, size as in the file (a large JPEG may
        have been decoded at 1/2, 1/4 or 1/8, never below three times the stored side).
    colour: whether the channels of the file differ anywhere.
    blank: whether every channel is constant.
    window: which rule made [0, 1] of the stored values.
    notes: (code, sentence) of what was done or looks odd.
    kind: the format of the file, by content.
    """

    pixels: Integers
    colour: bool
    blank: bool
    window: str
    notes: tuple[tuple[str, str], ...]
    kind: str


def decode(
    path: str | Path, frame: int = -1, intensity: settings.Intensity | None = None, limits: Limits | None = None
) -> Decoded:
    """Read one image file through the intensity pipeline.

    Args:
        path: the file; its content decides the format, not its suffix.
        frame: page, slice or frame, from 0; -1: the file's default (the first, of a volume the middle one).
        intensity: default `config.Intensity()`.
        limits: default `Limits()`.

    Raises:
        Unreadable: no image; the reason has no path in it.
    """
    intensity, limits = intensity or settings.Intensity(), limits or Limits()
    opened = open_bytes(read_bytes(path), intensity, limits, name=str(path))
    return read_frame(opened, frame, intensity)


def read_bytes(path: str | Path) -> bytes:
    """The whole file.

    Raises:
        Unreadable: missing, not readable, or larger than `LARGEST_FILE`.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_FILE:
            raise Unreadable(f"{size:,} bytes in one file; at most {LARGEST_FILE:,}", "I4")
        try:
            return file.read()
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror or type(error).__name__})", "I14") from error


def open_bytes(data: bytes, intensity: settings.Intensity, limits: Limits, name: str = "") -> Opened:
    """Find the format of `data` and read its header. `name` only serves to notice a wrong suffix.

    Raises:
        Unreadable: no format that is read, or a header that is refused.
    """
    if not data:
        raise Unreadable("empty file", "I1")
    kind = signature.kind_of(data[:512])
    promised = signature.promised(name)
    try:
        opened = _reader(kind, data, intensity, limits)
    except Unreadable:
        raise
    except Exception as error:  # whatever a decoder raises on damaged bytes, the run goes on
        raise Unreadable(f"damaged {kind} ({type(error).__name__})", "I13") from error
    if promised not in (None, opened.kind):
        note = ("I3", f"content is {opened.kind}, the suffix says {promised}")
        opened = Opened(opened.kind, opened.frames, opened.default, opened.read, (*opened.notes, note))
    return opened


def _reader(kind: str, data: bytes, intensity: settings.Intensity, limits: Limits) -> Opened:
    if kind in {"PNG", "JPEG", "GIF", "BMP", "TIFF", "WebP", "JPEG 2000"}:
        return raster.open_raster(data, kind, intensity, limits)
    if kind in {"NPY", "NPZ", "NIfTI", "gzip"}:
        from kladi.data.pixels import arrays

        return arrays.open_array(data, kind, intensity, limits)
    if kind == "DICOM":
        from kladi.data.pixels import dicom

        return dicom.open_dicom(data, intensity, limits)
    raise Unreadable(f"no image: content is {kind}", "I3")


def read_frame(opened: Opened, frame: int, intensity: settings.Intensity) -> Decoded:
    """Decode one frame of an open file and bring it to the pipeline's number of channels.

    Raises:
        Unreadable: the frame does not exist or cannot be decoded.
    """
    index, notes = frame, opened.notes
    if frame < 0:
        index = opened.default
        if opened.frames > 1:
            said = f'frame {index + 1} of {opened.frames} is read; a column "frame" in a row of its own names another'
            notes = (*notes, ("I11", said))
    elif frame >= opened.frames:
        raise Unreadable(f"frame {frame} does not exist: the file has {opened.frames}", "I11")
    try:
        picture = opened.read(index)
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"damaged {opened.kind} ({type(error).__name__})", "I13") from error
    shape = picture.pixels.shape
    if len(shape) not in (2, 3) or min(shape[:2]) < MIN_SIDE or shape[2:] not in ((), (3,)):
        raise Unreadable(f"damaged {opened.kind}: decoded to an array of shape {shape}", "I13")
    return finish(picture, intensity, opened.kind, notes)


def finish(
    picture: Frame, intensity: settings.Intensity, kind: str, notes: tuple[tuple[str, str], ...] = ()
) -> Decoded:
    """A reader's frame -> the channels of the pipeline, [C, H, W]."""
    pixels = picture.pixels
    colour = pixels.ndim == 3 and not _channels_agree(pixels)
    if pixels.ndim == 3 and not colour:
        pixels = pixels[..., 0]
    blank = _is_blank(pixels)
    if intensity.channels == 1:
        pixels = luminance(pixels)[None] if colour else pixels[None]
    else:
        pixels = pixels.transpose(2, 0, 1) if colour else np.broadcast_to(pixels, (3, *pixels.shape))
    return Decoded(np.ascontiguousarray(pixels), colour, blank, picture.window, (*picture.notes, *notes), kind)


def _is_blank(pixels: np.ndarray) -> bool:
    """Whether every pixel equals the first; the middle row tells nearly always."""
    first = pixels[0, 0]
    return bool((pixels[len(pixels) // 2] == first).all()) and bool((pixels == first).all())


def _channels_agree(pixels: np.ndarray) -> bool:
    return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all())


def count_frames(path: str | Path, limits: Limits | None = None) -> int:
    """Pages, slices or frames in a file, from its header.

    Raises:
        Unreadable: as `decode`.
    """
    return open_bytes(read_bytes(path), settings.Intensity(), limits or Limits(), name=str(path)).frames


__all__ = ["Decoded", "Unreadable", "count_frames", "decode", "finish", "open_bytes", "read_frame", "widen"]

"""PNG, JPEG, TIFF, GIF, BMP, WebP and JPEG 2000 -> `Frame`s: Pillow, and tifffile for the TIFFs that Pillow narrows."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from kladi import config as settings
from kladi.data.pixels.frame import Frame, Limits, Opened, Unreadable, check_size
from kladi.data.pixels.intensity import from_any_range, store_side

_PILLOW_NAME = {"JPEG 2000": "JPEG2000", "WebP": "WEBP"}
_TO_GREY = {"1", "L", "LA"}
_TO_RGB = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK"}
_SIXTEEN = {"I;16", "I;16L", "I;16B", "I;16N"}
_DRAFT_MARGIN = 3
"""A JPEG may be decoded at 1/2, 1/4 or 1/8 size as long as this many times the stored side is left."""


def open_raster(data: bytes, kind: str, intensity: settings.Intensity, limits: Limits) -> Opened:
    """Read the header of `data`, a file of format `kind`; pixels are decoded by `Opened.read`.

    Raises:
        Unreadable: damaged, truncated, too small or too large, or of a mode without a written rule.
    """
    found = _bytes_missing(data, kind)
    if found:
        raise Unreadable(found, "I2")
    try:
        image = _open(data, kind)
    except Unreadable as fault:
        if kind == "TIFF" and fault.code == "I2":  # a layout that Pillow does not know; tifffile may
            return _open_tifffile(data, intensity, limits)
        raise
    check_size(image.width, image.height, limits)
    pages = int(getattr(image, "n_frames", 1)) if kind in {"GIF", "TIFF"} else 1
    if kind == "TIFF" and _pillow_narrows(image):
        return _open_tifffile(data, intensity, limits)
    header: list[Image.Image] = [image]  # serves the first page read; others open the file anew, because Pillow's
    # state after a page that failed is not to be trusted

    def read(page: int) -> Frame:
        return _read(header.pop() if header else _open(data, kind), data, kind, page, intensity, limits)

    return Opened(kind, pages, 0, read)


def _open(data: bytes, kind: str) -> Image.Image:
    name = _PILLOW_NAME.get(kind, kind)
    formats = ["JPEG", "MPO"] if name == "JPEG" else [name]
    with warnings.catch_warnings():
        # Pillow warns above half of our own limit, which check_size holds against the header right after.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=formats)
        except Image.DecompressionBombError as error:
            raise Unreadable("more pixels than Pillow accepts; --data.max_pixels cannot raise that", "I4") from error
        except Image.UnidentifiedImageError as error:
            raise Unreadable(f"damaged {kind}: no readable header in {len(data):,} bytes") from error


def _read(
    image: Image.Image, data: bytes, kind: str, page: int, intensity: settings.Intensity, limits: Limits
) -> Frame:
    if page or kind in {"GIF", "TIFF"}:  # counting the pages has moved it
        image.seek(page)
        check_size(image.width, image.height, limits)
    turned = _orientation(image) if kind == "TIFF" else 1  # Pillow turns a TIFF itself, and forgets that it did
    longest = _DRAFT_MARGIN * store_side(intensity.size)
    if kind == "JPEG" and max(image.size) >= 2 * longest:  # the mean difference is 0.3 of 255; four times as fast
        share = longest / max(image.size)
        image.draft(None, (max(1, round(image.width * share)), max(1, round(image.height * share))))
    inverted, bits = _white_is_zero(image, kind), _tiff_bits(image, kind)
    try:
        image.load()
        turned = turned if kind == "TIFF" else _orientation(image)
        notes = () if turned == 1 else (("I10", f"turned upright by its EXIF orientation ({turned})"),)
        if kind == "PNG" and data[24:25] == b"\x10" and image.mode in {"RGB", "RGBA"}:
            return _wide_png(data, turned, notes)
    except (OSError, EOFError, SyntaxError) as error:
        raise Unreadable(_load_fault(str(error), kind, len(data)), "I2") from error
    if kind != "TIFF" and turned != 1:
        ImageOps.exif_transpose(image, in_place=True)
    return _by_mode(image, intensity, limits, notes, inverted=inverted, bits=bits)


def _wide_png(data: bytes, orientation: int, notes: tuple[tuple[str, str], ...]) -> Frame:
    """All 16 bits of a PNG with several channels, of which Pillow's unpackers keep 8.

    "RGB;16B" takes the upper byte of each big-endian value; "RGB;16L" would take the upper byte of a little-endian one,
    which in these files is the lower. Grey with alpha is 4 bytes a pixel, which unpack as RGBA: the first two are grey.
    """
    if data[25:26] == b"\x04":
        both = _unpacked(data, "RGBA")
        pixels = both[..., 0] << 8 | both[..., 1]
    else:
        mode = "RGB" if data[25:26] == b"\x02" else "RGBA"
        pixels = (_unpacked(data, f"{mode};16B") << 8 | _unpacked(data, f"{mode};16L"))[..., :3]
    return Frame(np.ascontiguousarray(_TURNS[orientation](pixels)), notes)


def _unpacked(data: bytes, rawmode: str) -> np.ndarray:
    image: Any = _open(data, "PNG")
    image.tile = [image.tile[0]._replace(args=rawmode)]
    image.load()
    return np.asarray(image).astype(np.uint16)


def _by_mode(
    image: Image.Image,
    intensity: settings.Intensity,
    limits: Limits,
    notes: tuple[tuple[str, str], ...],
    *,
    inverted: bool,
    bits: int,
) -> Frame:
    """The written rule of each Pillow mode; see the table in `images`."""
    mode = image.mode
    if mode in _TO_GREY:
        grey = image.convert("L") if mode == "1" else image.getchannel(0)
        return Frame(np.asarray(grey), notes)
    if mode in _TO_RGB:
        return Frame(np.asarray(image.convert("RGB")), notes)
    if mode in _SIXTEEN:
        pixels = np.asarray(image).astype(np.uint16)
        if bits < 16:
            pixels = np.rint(pixels * (65535.0 / (2**bits - 1))).astype(np.uint16)
        return Frame(65535 - pixels if inverted else pixels, notes)
    if mode in {"I", "F"}:
        pixels = check_finite(np.asarray(image), limits)
        integers, rule = from_any_range(pixels, intensity, zero_nonfinite=limits.nonfinite == "zero")
        return Frame(65535 - integers if inverted else integers, notes, rule)
    raise Unreadable(f"pixel mode {mode} has no rule", "I6")


def check_finite(pixels: np.ndarray, limits: Limits) -> np.ndarray:
    """`pixels`, unless they hold NaN or infinity and `data.nonfinite` is "leave_out".

    Raises:
        Unreadable: I8, with the number of such pixels.
    """
    if pixels.dtype.kind == "f" and limits.nonfinite == "leave_out":
        bad = int(pixels.size - np.isfinite(pixels).sum())
        if bad:
            raise Unreadable(f'{bad:,} pixels are NaN or infinite; --data.nonfinite "zero" keeps such images', "I8")
    return pixels


def _load_fault(message: str, kind: str, size: int) -> str:
    """Our own words for Pillow's: its messages may quote bytes of the file."""
    cut = any(word in message.lower() for word in ("truncated", "no data", "unexpected end", "end of file"))
    return f"truncated {kind} ({size:,} bytes)" if cut else f"damaged {kind} ({size:,} bytes)"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or the EXIF block is broken."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, OSError, KeyError, TypeError, IndexError):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _bytes_missing(data: bytes, kind: str) -> str:
    """A sentence where the file's own bookkeeping says that its end is missing; empty where it does not.

    PNG: the chunk lengths, up to IEND. Decoders accept a PNG without its last bytes; we do not, because what is cut off
    may be the check sum that would have shown the damage.
    """
    if kind != "PNG":
        return ""
    at = 8
    while at + 8 <= len(data):
        length, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        at += 12 + length
        if name == b"IEND":
            return "" if at <= len(data) else f"truncated PNG ({len(data):,} of {at:,} bytes)"
    return f"truncated PNG ({len(data):,} of at least {max(at, len(data) + 1):,} bytes)"


# TIFF ---------------------------------------------------------------------------------------------------------------
_BITS, _SAMPLES, _PHOTOMETRIC, _FORMAT = 258, 277, 262, 339
_OFFSETS, _COUNTS = ((273, 324), (279, 325))


def _tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})


def _white_is_zero(image: Image.Image, kind: str) -> bool:
    """Pillow inverts WhiteIsZero below 16 bits and leaves it alone from there on."""
    return kind == "TIFF" and _tags(image).get(_PHOTOMETRIC) == 0 and image.mode not in {"1", "L"}


def _tiff_bits(image: Image.Image, kind: str) -> int:
    bits = _tags(image).get(_BITS, (16,)) if kind == "TIFF" else (16,)
    return int(bits[0]) if isinstance(bits, tuple) and bits and 8 < bits[0] <= 16 else 16


def _pillow_narrows(image: Image.Image) -> bool:
    """Several samples of more than 8 bits: Pillow would keep the upper 8."""
    bits = _tags(image).get(_BITS, (8,))
    return isinstance(bits, tuple) and len(bits) > 1 and max(bits) > 8


def _open_tifffile(data: bytes, intensity: settings.Intensity, limits: Limits) -> Opened:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        pages = len(tiff.pages)
    return Opened("TIFF", pages, 0, lambda page: _read_tifffile(data, page, intensity, limits))


def _read_tifffile(data: bytes, index: int, intensity: settings.Intensity, limits: Limits) -> Frame:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages[index]
        check_size(page.imagewidth, page.imagelength, limits)
        if page.photometric not in {0, 1, 2}:
            raise Unreadable(f"TIFF colour space {int(page.photometric)} of such pixels has no rule", "I6")
        try:
            pixels = np.asarray(page.asarray())
        except (ValueError, RuntimeError, OSError) as error:  # e.g. a compression that needs another package
            raise Unreadable(f"damaged TIFF, or compression {int(page.compression)} of such pixels", "I6") from error
        if int(page.planarconfig) == 2 and pixels.ndim == 3:
            pixels = np.moveaxis(pixels, 0, -1)
        orientation = page.tags.get(274)
    turn = _TURNS.get(int(orientation.value) if orientation else 1, _TURNS[1])
    notes = () if turn is _TURNS[1] else (("I10", "turned upright by its TIFF orientation"),)
    pixels = turn(pixels)
    if pixels.ndim == 3:
        pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0]
    if pixels.dtype in (np.uint8, np.uint16):
        full = np.iinfo(pixels.dtype).max
        return Frame(np.ascontiguousarray(full - pixels if page.photometric == 0 else pixels), notes)
    pixels = check_finite(pixels, limits)
    integers, rule = from_any_range(pixels, intensity, zero_nonfinite=limits.nonfinite == "zero")
    return Frame(integers, notes, rule)


_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(a, 0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a, 1),
}
"""EXIF and TIFF orientation -> what brings the picture upright."""

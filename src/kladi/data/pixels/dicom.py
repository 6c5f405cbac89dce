"""DICOM pixels: header -> decoder -> RGB, or the grey chain of `dicom_grey`.

1. Header with the allow-listed tags only; what is no image by its SOP class is skipped. A deflated file is inflated
   within bounds. Rows x Columns x samples x bytes x frames is at most 1 GiB, and the file stores as much as that says;
   both are checked before anything is allocated. A compressed frame must say the same size in its own header.
2. Native and RLE values are masked to BitsStored at HighBit, the sign from PixelRepresentation.
3. Palette, YBR and planar colour become RGB once, and stop there: colour gets no window.
4. Modality LUT, else slope and intercept. 5. VOI LUT, else the file's first window, else percentiles (or always
   percentiles, or the fixed window, as `config.Intensity` says). 6. MONOCHROME1 and INVERSE: 1 - y. Padding ends at 0.
7. uint8 where at most 8 bits were stored, else uint16.

Decoders: pydicom (native, RLE), Pillow (JPEG baseline, JPEG 2000); `kladi[dicom]` adds JPEG-LS, HTJ2K, JPEG lossless
and 12-bit JPEG.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
from pydicom import uid
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import get_decoder

from kladi import config as settings
from kladi.data.pixels.dicom_grey import read_grey, to_pixels
from kladi.data.pixels.dicom_header import PIXEL_TAGS, Header, integer, quiet, read_header, texts
from kladi.data.pixels.dicom_palette import apply_palette
from kladi.data.pixels.dicom_tags import Skipped, Tags, read_tags
from kladi.data.pixels.frame import Frame, Limits, Opened, Unreadable, check_size

GREY = {"MONOCHROME1", "MONOCHROME2"}
COLOUR = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"}
PALETTE = "PALETTE COLOR"
DECODERS = {
    uid.RLELossless: ("pydicom",),
    uid.JPEGBaseline8Bit: ("pillow", "gdcm"),
    uid.JPEGExtended12Bit: ("pillow", "gdcm"),
    uid.JPEGLossless: ("gdcm",),
    uid.JPEGLosslessSV1: ("gdcm",),
    uid.JPEGLSLossless: ("pyjpegls", "gdcm"),
    uid.JPEGLSNearLossless: ("pyjpegls", "gdcm"),
    uid.JPEG2000Lossless: ("pillow", "pylibjpeg"),
    uid.JPEG2000: ("pillow", "pylibjpeg"),
    uid.HTJ2KLossless: ("pylibjpeg",),
    uid.HTJ2KLosslessRPCL: ("pylibjpeg",),
    uid.HTJ2K: ("pylibjpeg",),
}
"""Transfer syntax -> who is asked, in order. Not asked on purpose: pylibjpeg for classic JPEG (GPL) and for RLE (it
loops for ever or panics on damaged frames), GDCM for JPEG 2000 (an old OpenJPEG)."""


@dataclass(frozen=True)
class Layout:
    """How the pixels of a file lie, checked against each other."""

    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    planar: int
    allocated: int
    stored: int
    high: int
    signed: bool
    syntax: str
    big_endian: bool

    @property
    def frame_bits(self) -> int:
        """Of one native frame."""
        values = self.rows * self.columns * self.samples
        if self.photometric == "YBR_FULL_422":  # two pixels share their colour
            values = self.rows * self.columns * 2
        return values * self.allocated


def open_dicom(data: bytes, intensity: settings.Intensity, limits: Limits) -> Opened:
    """Read and check the header of `data`.

    Raises:
        Unreadable: with `skip` for what is no image (D1, D2), else D2 to D13.
    """
    header = read_header(io.BytesIO(data), PIXEL_TAGS, limits, pixels=True)
    with quiet():
        dataset = header.dataset
        if not header.has_pixels:
            raise Unreadable("DICOM without Pixel Data", "D2", skip=True)
        if "PixelData" not in dataset:
            raise Unreadable(f"Pixel Data is cut off ({len(data):,} bytes), or not of integers", "D9")
        layout = read_layout(header)
        stored: Any = dataset["PixelData"].value
        pixels = bytes(stored) if isinstance(stored, bytes | bytearray | memoryview) else b""
        check_layout(layout, len(pixels), limits, told=header.syntax is not None)
        if layout.syntax not in _NATIVE and not _plugins(layout.syntax):
            raise Unreadable(f'{_syntax_name(layout.syntax)}: pip install "kladi[dicom]"', "D3")
    return Opened("DICOM", layout.frames, 0, lambda i: _read(dataset, pixels, layout, i, intensity), header.notes)


def read_layout(header: Header) -> Layout:
    """The image pixel module.

    Raises:
        Unreadable: an element that is missing or impossible.
    """
    dataset = header.dataset
    found: dict[str, int] = {}
    for name, default in _NUMBERS.items():
        value = integer(dataset, name)
        if value is None and texts(dataset, name):
            raise Unreadable(f"{name} is no number", "D9")
        value = default if value is None else value
        if value is None:
            raise Unreadable(f"{name} is missing", "D9")
        found[name] = value
    photometric = (texts(dataset, "PhotometricInterpretation") or [""])[0].upper()
    allocated = found["BitsAllocated"]
    stored = found["BitsStored"] if found["BitsStored"] >= 0 else allocated
    high = found["HighBit"] if found["HighBit"] >= 0 else stored - 1
    layout = Layout(
        rows=found["Rows"],
        columns=found["Columns"],
        frames=found["NumberOfFrames"],
        samples=found["SamplesPerPixel"],
        photometric=photometric,
        planar=found["PlanarConfiguration"],
        allocated=allocated,
        stored=stored,
        high=high,
        signed=found["PixelRepresentation"] == 1,
        syntax=header.syntax or uid.ImplicitVRLittleEndian,
        big_endian=header.big_endian,
    )
    samples = 3 if photometric in COLOUR else 1
    if photometric not in COLOUR | GREY | {PALETTE} or layout.samples != samples:
        known = photometric if photometric in _OTHER_PHOTOMETRIC else "of an unknown kind"
        raise Unreadable(f"photometric interpretation {known} with {layout.samples} samples is not read", "D8")
    if allocated not in (1, 8, 16, 32) or not 1 <= stored <= allocated or not stored - 1 <= high < allocated:
        raise Unreadable(f"BitsAllocated {allocated}, BitsStored {stored}, HighBit {high} do not fit together", "D4")
    return layout


_NUMBERS = {
    "Rows": None,
    "Columns": None,
    "NumberOfFrames": 1,
    "SamplesPerPixel": 1,
    "PlanarConfiguration": 0,
    "BitsAllocated": None,
    "BitsStored": -1,
    "HighBit": -1,
    "PixelRepresentation": 0,
}
_OTHER_PHOTOMETRIC = COLOUR | GREY | {PALETTE, "YBR_PARTIAL_422", "YBR_PARTIAL_420", "HSV", "ARGB", "CMYK", "XYB"}
_NATIVE = {
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
}


def check_layout(layout: Layout, length: int, limits: Limits, *, told: bool) -> None:
    """Sizes against bounds and against the `length` bytes that are stored; `told`: the file names its syntax.

    Raises:
        Unreadable: I4, I5, D2 or D9, with the numbers.
    """
    if layout.frames < 1:
        raise Unreadable(f"NumberOfFrames is {layout.frames}", "D9")
    total = layout.rows * layout.columns * layout.samples * -(-layout.allocated // 8) * layout.frames
    size = f"{layout.columns} x {layout.rows} x {layout.frames} frames x {layout.samples} samples"
    if total > limits.max_bytes:
        raise Unreadable(f"{size} are {total:,} bytes, more than {limits.max_bytes:,}", "D9")
    check_size(layout.columns, layout.rows, limits)
    if layout.syntax not in _NATIVE:
        return
    expected = -(-layout.frame_bits * layout.frames // 8)
    if not told and length not in (expected, expected + expected % 2):
        raise Unreadable(f"no transfer syntax, and {length:,} bytes are not the {expected:,} of {size}", "D2")
    if length < expected:
        raise Unreadable(f"cut off: {size} are {expected:,} bytes; the file stores {length:,}", "D9")
    if length - expected >= max(2, layout.frame_bits // 8):
        raise Unreadable(f"{size} are {expected:,} bytes; the file stores {length:,}: NumberOfFrames is wrong", "D9")


def _read(dataset: pydicom.Dataset, pixels: bytes, layout: Layout, index: int, intensity: settings.Intensity) -> Frame:
    with quiet():
        if layout.photometric in GREY:
            values = stored_values(dataset, pixels, layout, index)
            grey = read_grey(dataset, index, signed=layout.signed, stored=layout.stored, big_endian=layout.big_endian)
            shown, rule = to_pixels(values, grey, intensity, 8 if layout.stored <= 8 else 16)
            return Frame(shown, grey.notes, rule)
        colour = _colour(dataset, pixels, layout, index)
    if layout.stored <= 8 and colour.dtype != np.uint8:
        colour = np.rint(colour / 257.0).astype(np.uint8)
    return Frame(np.ascontiguousarray(colour))


def stored_values(dataset: pydicom.Dataset, pixels: bytes, layout: Layout, index: int) -> np.ndarray:
    """One frame of stored integers [H, W] (or [H, W, 3] in RGB), masked and signed.

    Native and RLE words may carry something else (old overlays) outside BitsStored; the other codecs store the bits
    themselves.
    """
    if layout.syntax not in _NATIVE and layout.syntax != uid.RLELossless:
        return _decoded(dataset, pixels, layout, index, stored=layout.stored, signed=layout.signed)
    raw = _decoded(dataset, pixels, layout, index, stored=layout.allocated, signed=False)
    if layout.allocated == 1:
        return raw
    if layout.stored == layout.allocated and not layout.signed:
        return raw
    values = raw.astype(np.int32 if layout.allocated <= 16 else np.int64) >> (layout.high + 1 - layout.stored)
    values &= (1 << layout.stored) - 1
    if layout.signed:
        sign = 1 << (layout.stored - 1)
        values = (values ^ sign) - sign
    return values


def _colour(dataset: pydicom.Dataset, pixels: bytes, layout: Layout, index: int) -> np.ndarray:
    """[H, W, 3], uint8 or uint16, full range."""
    if layout.photometric == PALETTE:
        values = stored_values(dataset, pixels, layout, index)
        return apply_palette(values, dataset, signed=layout.signed, big_endian=layout.big_endian)
    rgb = stored_values(dataset, pixels, layout, index)
    if layout.signed:
        raise Unreadable("signed colour is not read", "D8")
    if layout.stored <= 8:
        return np.rint(rgb * (255.0 / (2**layout.stored - 1))).astype(np.uint8)
    return np.rint(rgb * (65535.0 / (2**layout.stored - 1))).astype(np.uint16)


# Codecs --------------------------------------------------------------------------------------------------------------


def _decoded(
    dataset: pydicom.Dataset, pixels: bytes, layout: Layout, index: int, *, stored: int, signed: bool
) -> np.ndarray:
    options: dict[str, Any] = {
        "rows": layout.rows,
        "columns": layout.columns,
        "samples_per_pixel": layout.samples,
        "photometric_interpretation": layout.photometric,
        "planar_configuration": layout.planar,
        "bits_allocated": layout.allocated,
        "bits_stored": stored,
        "pixel_representation": int(signed),
        "number_of_frames": layout.frames,
        "pixel_keyword": "PixelData",
    }
    if layout.syntax in _NATIVE:
        options["pixel_vr"] = "OW" if layout.allocated > 8 else dataset["PixelData"].VR
        options["allow_excess_frames"] = False
        return get_decoder(layout.syntax).as_array(pixels, index=index, **options)[0]
    frame = _one_frame(dataset, pixels, layout, index)
    if layout.syntax in _JPEG_2000:
        # Some writers put a whole JP2 file in; pydicom's walk through its boxes never ends where one has length 0.
        frame = frame[max(0, frame.find(_J2K_START)) :]
    _check_codestream(frame, layout)
    options["number_of_frames"] = 1
    tried = 0
    for plugin in _plugins(layout.syntax):
        tried += 1
        with contextlib.suppress(Exception):  # the next decoder may read it; if none does, that is told
            if plugin == "gdcm" and layout.syntax == uid.JPEGExtended12Bit and layout.stored > 8:
                return _twelve_bits(frame, layout)
            alone = encapsulate([frame], has_bot=False)
            return get_decoder(layout.syntax).as_array(alone, index=0, decoding_plugin=plugin, **options)[0]
    name = f"{_syntax_name(layout.syntax)}, {layout.stored} bits"
    raise Unreadable(f"{name}: damaged, or not read by any of {tried} decoders (kladi[dicom] has all)", "D15")


def _twelve_bits(frame: bytes, layout: Layout) -> np.ndarray:
    """12-bit lossy JPEG, grey: GDCM reads it, but pydicom does not ask it to."""
    import gdcm

    if layout.samples != 1:
        raise Unreadable("12-bit JPEG in colour is not read", "D8")
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(frame)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((layout.columns, layout.rows, 1))
    image.SetDataElement(element)
    grey = gdcm.PhotometricInterpretation.GetPIType("MONOCHROME2")
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(grey))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(layout.syntax))))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, layout.stored, layout.stored - 1, int(layout.signed)))
    raw = image.GetBuffer().encode("utf-8", "surrogateescape")  # GDCM hands bytes over as text
    dtype = np.int16 if layout.signed else np.uint16
    return np.frombuffer(raw, dtype=dtype).reshape(layout.rows, layout.columns)


def _one_frame(dataset: pydicom.Dataset, pixels: bytes, layout: Layout, index: int) -> bytes:
    offsets, lengths = (
        dataset[name].value if name in dataset else None
        for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")
    )
    extended = (offsets, lengths) if isinstance(offsets, bytes) and isinstance(lengths, bytes) and offsets else None
    return get_frame(pixels, index, number_of_frames=layout.frames, extended_offsets=extended)


def _plugins(syntax: str) -> list[str]:
    """Names of the installed decoders that are asked for a transfer syntax, in order."""
    try:
        available = get_decoder(syntax).available_plugins
    except NotImplementedError:
        return []
    return [name for name in DECODERS.get(uid.UID(syntax), ()) if name in available]


def _syntax_name(syntax: str) -> str:
    """ "JPEG-LS Lossless Image Compression" -> "JPEG-LS Lossless"; a private syntax is not spelt out."""
    known = uid.UID_dictionary.get(syntax)
    return re.split(r" \(|, ", known[0])[0].removesuffix(" Image Compression") if known else "a private transfer syntax"


def _check_codestream(frame: bytes, layout: Layout) -> None:
    """A compressed frame's own size against the header's, before a decoder allocates what it says.

    Raises:
        Unreadable: D9 where they differ.
    """
    size = _jpeg_2000_size(frame) if layout.syntax in _JPEG_2000 else _jpeg_size(frame)
    if layout.syntax != uid.RLELossless and size is not None and size != (layout.columns, layout.rows):
        said = f"{size[0]} x {size[1]}"
        raise Unreadable(f"the compressed frame is {said}, the header says {layout.columns} x {layout.rows}", "D9")


_JPEG_2000 = {uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2K, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL}


_J2K_START = b"\xff\x4f\xff\x51"  # start of codestream, then its size


def _jpeg_2000_size(frame: bytes) -> tuple[int, int]:
    if not frame.startswith(_J2K_START) or len(frame) < 24:
        raise Unreadable(f"truncated JPEG 2000 frame ({len(frame):,} bytes)", "D9")
    x1, y1, x0, y0 = (int.from_bytes(frame[at : at + 4], "big") for at in (8, 12, 16, 20))
    return x1 - x0, y1 - y0


def _jpeg_size(frame: bytes) -> tuple[int, int] | None:
    """From the first start-of-frame marker of JPEG or JPEG-LS."""
    at = 2
    while at + 9 < len(frame) and frame[at] == 0xFF:
        marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return int.from_bytes(frame[at + 7 : at + 9], "big"), int.from_bytes(frame[at + 5 : at + 7], "big")
        at += 2 + length
    return None


__all__ = ["Layout", "Skipped", "Tags", "open_dicom", "read_layout", "read_tags", "stored_values"]

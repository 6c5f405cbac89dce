"""DICOM's grey chain: stored values -> modality step -> VOI -> MONOCHROME1 -> [0, 1] as integers.

Order and formulas: PS3.3 C.11.1, C.11.2, C.7.6.3. Each step takes the per-frame functional group before the shared one
before the top level of the file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pydicom
from jaxtyping import Bool, Float64, Integer, UInt8, UInt16

from kladi import config as settings
from kladi.data.pixels.dicom_header import items, numbers, texts, words
from kladi.data.pixels.frame import Unreadable
from kladi.data.pixels.intensity import between, linear, linear_exact, percentile_bounds, sigmoid, to_integers

FUNCTIONS = {"LINEAR": linear, "LINEAR_EXACT": linear_exact, "SIGMOID": sigmoid}


@dataclass(frozen=True)
class Table:
    """A look-up table: values below `first` take the first entry, values beyond the end the last."""

    first: int
    entries: Float64[np.ndarray, " n"]
    bits: int

    def look_up(self, x: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
        return self.entries[np.clip(np.rint(x) - self.first, 0, len(self.entries) - 1).astype(np.int64)]


@dataclass(frozen=True)
class Grey:
    """What one frame's header says about its grey values.

    slope, intercept: the rescale; used where there is no `modality` table.
    voi: table, or (center, width, function), or None.
    inverse: MONOCHROME1, or a presentation look-up table of shape INVERSE.
    padding: least and greatest stored value that is no image.
    """

    slope: float
    intercept: float
    modality: Table | None
    voi: Table | tuple[float, float, str] | None
    inverse: bool
    padding: tuple[int, int] | None
    notes: tuple[tuple[str, str], ...] = ()


def read_grey(dataset: pydicom.Dataset, frame: int, *, signed: bool, stored: int, big_endian: bool) -> Grey:
    """The grey chain of frame `frame`.

    Raises:
        Unreadable: D5 for a rescale slope of 0.
    """
    notes: list[tuple[str, str]] = []
    pixels = functional(dataset, frame, "PixelValueTransformationSequence") or dataset
    slopes, intercepts = numbers(pixels, "RescaleSlope"), numbers(pixels, "RescaleIntercept")
    slope, intercept = slopes[0] if slopes else 1.0, intercepts[0] if intercepts else 0.0
    tables = items(dataset, "ModalityLUTSequence")
    modality = _table(tables[0], big_endian=big_endian, signed=signed) if tables else None
    if modality is None and slope == 0:
        raise Unreadable("RescaleSlope is 0: all values would be one", "D5")
    below_zero = signed or (modality is None and min(intercept, intercept + slope) < 0)
    voi = _voi(dataset, frame, notes, big_endian=big_endian, signed=below_zero)
    photometric = texts(dataset, "PhotometricInterpretation")
    inverse = photometric[:1] == ["MONOCHROME1"] or texts(dataset, "PresentationLUTShape")[:1] == ["INVERSE"]
    padding = _padding(dataset, signed=signed, stored=stored, big_endian=big_endian)
    return Grey(slope, intercept, modality, voi, inverse, padding, tuple(notes))


def to_pixels(
    values: Integer[np.ndarray, "H W"], grey: Grey, intensity: settings.Intensity, bits: int
) -> tuple[UInt8[np.ndarray, "H W"] | UInt16[np.ndarray, "H W"], str]:
    """Stored values -> [0, 1] as uint8 (`bits` 8) or uint16, and the rule that made it.

    The chain is a function of the stored value alone, so where a picture has more pixels than possible values it is
    computed once for each value and looked up: the same numbers, several times as fast.
    """
    lowest, highest = int(values.min()), int(values.max())
    if highest - lowest >= values.size:
        unit, rule = to_unit(values, grey, intensity)
        return to_integers(unit, bits), rule
    every = np.arange(lowest, highest + 1)[None]
    kept = values if grey.padding is None else values[_keep(values, grey.padding)]
    bounds = None
    if intensity.window != "fixed" and (intensity.window == "percentile" or grey.voi is None):
        bounds = percentile_bounds(_modality(kept, grey), None, float(intensity.low), float(intensity.high))
    unit, rule = to_unit(every, grey, intensity, bounds=bounds)
    return to_integers(unit, bits)[0][values - lowest], rule


def to_unit(
    values: Integer[np.ndarray, "H W"],
    grey: Grey,
    intensity: settings.Intensity,
    *,
    bounds: tuple[float, float] | None = None,
) -> tuple[Float64[np.ndarray, "H W"], str]:
    """Stored values [H, W] -> [0, 1], and the rule that made them: "VOI LUT", "file window", "percentile", "fixed".

    Padding stays out of the percentiles (or `bounds`, where they are known) and ends at 0, also in an inverted picture.

    Raises:
        Unreadable: D5 where the rescale leads beyond the largest float.
    """
    keep = _keep(values, grey.padding)
    x = _modality(values, grey)
    voi = grey.voi if intensity.window == "file" else None
    if intensity.window == "fixed":
        unit, rule = linear(x, float(intensity.center), max(float(intensity.width), 1.0)), "fixed"
    elif isinstance(voi, Table):
        unit, rule = np.clip(voi.look_up(x) / (2**voi.bits - 1), 0.0, 1.0), "VOI LUT"
    elif voi is not None:
        center, width, function = voi
        unit, rule = FUNCTIONS[function](x, center, width), "file window"
    else:
        low, high = bounds or percentile_bounds(x[keep], None, float(intensity.low), float(intensity.high))
        unit, rule = between(x, low, high), "percentile"
    if grey.inverse:
        unit = 1.0 - unit
    return np.where(keep, unit, 0.0), rule


def _modality(values: Integer[np.ndarray, "..."], grey: Grey) -> Float64[np.ndarray, "..."]:
    x = values.astype(np.float64)
    if grey.modality is not None:
        return grey.modality.look_up(x)
    with np.errstate(over="ignore"):
        x = x * grey.slope + grey.intercept
    if not np.isfinite(x).all():
        raise Unreadable("RescaleSlope or RescaleIntercept leads beyond the largest number", "D5")
    return x


def functional(dataset: pydicom.Dataset, frame: int, name: str) -> pydicom.Dataset | None:
    """The functional group `name` of a frame: its own, else the shared one, else None."""
    own = items(dataset, "PerFrameFunctionalGroupsSequence")
    for group in [*own[frame : frame + 1], *items(dataset, "SharedFunctionalGroupsSequence")[:1]]:
        found = items(group, name)
        if found:
            return found[0]
    return None


def _voi(
    dataset: pydicom.Dataset, frame: int, notes: list[tuple[str, str]], *, big_endian: bool, signed: bool
) -> Table | tuple[float, float, str] | None:
    """The VOI table, else the first window that can be used, else None."""
    place = functional(dataset, frame, "FrameVOILUTSequence") or dataset
    for item in items(place, "VOILUTSequence")[:1]:
        table = _table(item, big_endian=big_endian, signed=signed)
        if table is not None:
            return table
        notes.append(("D6", "VOI LUT is damaged; ignored"))
    centers, widths = numbers(place, "WindowCenter"), numbers(place, "WindowWidth")
    if not centers or not widths:
        return None
    named = texts(place, "VOILUTFunction")
    function = named[0].upper() if named else "LINEAR"
    if function not in FUNCTIONS:
        notes.append(("D6", "VOI LUT function is unknown; read as LINEAR"))
        function = "LINEAR"
    center, width = centers[0], widths[0]
    if width <= 0 or (function == "LINEAR" and width < 1):
        notes.append(("D6", "window width is 0, negative or below what its function allows; ignored"))
        return None
    if min(len(centers), len(widths)) > 1:
        notes.append(("D6", f"{min(len(centers), len(widths))} windows; the first is used"))
    return center, width, function


def _table(item: pydicom.Dataset, *, big_endian: bool, signed: bool) -> Table | None:
    """A LUT item; None where it makes no sense. 0 entries mean 65,536; 8-bit entries may be packed two a word."""
    descriptor = words(item, "LUTDescriptor", big_endian=big_endian)
    data = words(item, "LUTData", big_endian=big_endian)
    if len(descriptor) != 3 or not len(data):
        return None
    count, first, bits = (int(v) for v in descriptor)
    count = count or 65536
    if signed and first >= 32768:
        first -= 65536
    if not 1 <= bits <= 16:
        return None
    if bits <= 8 and len(data) == -(-count // 2) and count > 1:
        data = data.astype(">u2" if big_endian else "<u2").view(np.uint8)
    if len(data) < count:
        return None
    return Table(first, data[:count].astype(np.float64), bits)


def _padding(dataset: pydicom.Dataset, *, signed: bool, stored: int, big_endian: bool) -> tuple[int, int] | None:
    """Least and greatest padding value as stored integers; None where there is none that the pixels can hold."""
    values = [_as_stored(dataset, n, signed=signed, big_endian=big_endian) for n in _PADDING]
    lowest, highest = (-(1 << (stored - 1)), (1 << (stored - 1)) - 1) if signed else (0, (1 << stored) - 1)
    known = [v for v in values if v is not None]
    if values[0] is None or not known:
        return None
    low, high = min(known), max(known)
    return (low, high) if high >= lowest and low <= highest else None


_PADDING = ("PixelPaddingValue", "PixelPaddingRangeLimit")


def _as_stored(dataset: pydicom.Dataset, name: str, *, signed: bool, big_endian: bool) -> int | None:
    """16 bits, read with the sign of the pixels whatever VR the writer chose."""
    value = words(dataset, name, big_endian=big_endian)
    if not len(value):
        return None
    return int(value[:1].view(np.int16)[0]) if signed else int(value[0])


def _keep(values: Integer[np.ndarray, "..."], padding: tuple[int, int] | None) -> Bool[np.ndarray, "..."]:
    """Where there is an image; everywhere if all of it would be padding."""
    if padding is None:
        return np.ones(values.shape, dtype=bool)
    outside = (values < padding[0]) | (values > padding[1])
    return outside if bool(outside.any()) else ~outside

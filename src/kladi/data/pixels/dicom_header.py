"""A DICOM file's header within bounds: only the allow-listed tags are read, and nothing is inflated without a limit."""

from __future__ import annotations

import io
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_dataset
from pydicom.tag import Tag

from kladi.data.pixels.arrays import inflate
from kladi.data.pixels.frame import Limits, Unreadable

PIXEL_GROUP = 0x7FE0
FILE_TAGS = ("SOPClassUID", "ImageType", "LossyImageCompression", "BurnedInAnnotation")
PIXEL_TAGS = (
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "ModalityLUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "PresentationLUTShape",
    "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "PixelData",
)
"""Everything that decoding needs; the allow-list of the reliability document, and nothing else."""

NO_IMAGE = (
    "1.2.840.10008.1.3.10",  # media directory (DICOMDIR)
    "1.2.840.10008.5.1.4.1.1.4.2",  # MR spectroscopy
    "1.2.840.10008.5.1.4.1.1.9.",  # waveforms
    "1.2.840.10008.5.1.4.1.1.11.",  # presentation states
    "1.2.840.10008.5.1.4.1.1.30",  # parametric maps
    "1.2.840.10008.5.1.4.1.1.66",  # raw data, registrations, fiducials, segmentations
    "1.2.840.10008.5.1.4.1.1.67",  # real world value mapping
    "1.2.840.10008.5.1.4.1.1.88.",  # structured reports, key objects
    "1.2.840.10008.5.1.4.1.1.104.",  # encapsulated documents
    "1.2.840.10008.5.1.4.1.1.481.",  # radiotherapy, except the image below
    "1.2.840.10008.5.1.4.34.",  # radiotherapy plans and records
    "1.2.840.10008.5.1.4.38.",  # hanging protocols
)
RT_IMAGE = "1.2.840.10008.5.1.4.1.1.481.1"
NO_IMAGE_MODALITIES = {"SR", "PR", "KO", "SEG", "REG", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "DOC", "ECG"}


@dataclass(frozen=True)
class Header:
    """The allow-listed part of a file.

    dataset: elements, values not yet converted.
    syntax: transfer syntax UID; None where the file names none.
    big_endian: of the data set and of native pixels.
    has_pixels: whether Pixel Data was met.
    notes: (code, sentence).
    """

    dataset: pydicom.Dataset
    syntax: str | None
    big_endian: bool
    has_pixels: bool
    notes: tuple[tuple[str, str], ...] = ()


@contextmanager
def quiet() -> Generator[None]:
    """pydicom warns, value by value, about what we answer ourselves; its words may quote the file."""
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore", UserWarning)
        yield


def read_header(file: io.BufferedIOBase, tags: tuple[str, ...], limits: Limits, *, pixels: bool) -> Header:
    """The elements `tags` of a DICOM file; with `pixels`, Pixel Data too, otherwise the reading stops before it.

    Raises:
        Unreadable: a skip for what is no image (D1), else what is damaged.
    """
    head = file.read(132)
    start = 132 if head[128:132] == b"DICM" else 0
    notes = ()
    if start and (head.startswith((b"MZ", b"\x7fELF"))):
        notes = (("D14", "its preamble begins like a program; the preamble is not used"),)
    try:
        with quiet():
            return _read(file, start, tags, limits, pixels=pixels, notes=notes)
    except Unreadable:
        raise
    except RecursionError as error:
        raise Unreadable("sequences are nested too deep", "D13") from error
    except Exception as error:
        raise Unreadable(f"damaged DICOM ({type(error).__name__})", "D13") from error


def _read(
    file: io.BufferedIOBase, start: int, tags: tuple[str, ...], limits: Limits, *, pixels: bool, notes: tuple[Any, ...]
) -> Header:
    file.seek(start)
    meta = read_dataset(_binary(file), False, True, stop_when=lambda tag, _vr, _length: tag >> 16 != 2)
    syntax = _text(meta, "TransferSyntaxUID") or None
    if _text(meta, "MediaStorageSOPClassUID").startswith(NO_IMAGE[0]):
        raise Unreadable("DICOM directory, no image", "D1", skip=True)
    implicit, little = _encoding(file, syntax)
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        file = io.BytesIO(inflate(file.read(), limits, -15))
    met: list[bool] = []

    def stop(tag: Any, _vr: str | None, _length: int) -> bool:
        at_pixels = tag >> 16 == PIXEL_GROUP
        if at_pixels:
            met.append(True)
        return at_pixels and not pixels

    wanted: list[Any] = [Tag(name) for name in dict.fromkeys((*FILE_TAGS, *tags))]
    at = file.tell()
    try:
        dataset = read_dataset(_binary(file), implicit, little, stop_when=stop, specific_tags=wanted)
    except (LookupError, ValueError):  # pydicom insists on the character set; NUL in it is more than it bears
        file.seek(at)
        file = io.BytesIO(_without_charset(file.read(), little=little))
        met.clear()
        dataset = read_dataset(_binary(file), implicit, little, stop_when=stop, specific_tags=wanted)
    refuse_no_image(dataset)
    if not met and (not len(dataset) or _broken_off(file, dataset)):
        raise Unreadable("damaged DICOM: its elements do not fill the file, and Pixel Data is not among them", "D13")
    return Header(dataset, syntax, not little, bool(met), notes)


def _binary(file: Any) -> Any:
    """pydicom's annotation asks for more than it uses."""
    return file


def _broken_off(file: io.BufferedIOBase, dataset: pydicom.Dataset) -> bool:
    """Whether the last element promised more than there was, or reading stopped before the end."""
    at = file.tell()
    if at != file.seek(0, io.SEEK_END):
        return True
    raw = [e for e in dataset.values() if isinstance(e, RawDataElement) and isinstance(e.value, bytes)]
    return any(e.length != 0xFFFFFFFF and len(e.value or b"") != e.length for e in raw)


def _without_charset(data: bytes, *, little: bool) -> bytes:
    """`data` with blanks as the value of SpecificCharacterSet (0008,0005), which means the default one."""
    at = data.find(b"\x08\x00\x05\x00" if little else b"\x00\x08\x00\x05")
    explicit = data[at + 4 : at + 6] == b"CS"
    raw = data[at + 6 : at + 8] if explicit else data[at + 4 : at + 8]
    length = int.from_bytes(raw, "little" if little else "big")
    if at < 0 or length > 256:
        raise Unreadable("damaged DICOM (character set)", "D13")
    return data[: at + 8] + b" " * length + data[at + 8 + length :]


def _encoding(file: io.BufferedIOBase, syntax: str | None) -> tuple[bool, bool]:
    """(implicit, little endian) of the data set at the current position."""
    if syntax is not None:
        return syntax == uid.ImplicitVRLittleEndian, syntax != uid.ExplicitVRBigEndian
    at = file.tell()
    first = file.read(6)
    file.seek(at)
    explicit = first[4:6].isalpha() and first[4:6].isupper()
    return not explicit, not (first[:1] == b"\0" and first[1:2] != b"\0")


def refuse_no_image(dataset: pydicom.Dataset) -> None:
    """Raise the skip of D1 for objects that hold no picture by design."""
    sop = _text(dataset, "SOPClassUID")
    listed = any(sop == p or (sop.startswith(p) and (p.endswith(".") or sop[len(p)] == ".")) for p in NO_IMAGE)
    if listed and sop != RT_IMAGE:
        known = uid.UID_dictionary.get(sop)
        raise Unreadable(f"{known[0].removesuffix(' Storage') if known else 'DICOM object'}, no image", "D1", skip=True)
    modality = _text(dataset, "Modality")
    if modality in NO_IMAGE_MODALITIES:
        raise Unreadable(f"{modality} object, no image", "D1", skip=True)


def _text(dataset: pydicom.Dataset, name: str) -> str:
    """An element as text without padding; empty where it is absent, empty or broken."""
    values = texts(dataset, name)
    return values[0] if values else ""


def texts(dataset: pydicom.Dataset, name: str) -> list[str]:
    """All values of an element as text, blanks and NUL trimmed, empty ones dropped; broken elements are as absent."""
    try:
        if name not in dataset:
            return []
        value: Any = dataset[name].value
    except Unreadable:
        raise
    except Exception:  # noqa: BLE001 - an unknown character set, invalid bytes, ...: unknown, and the file survives
        return []
    found = (str(one).strip(" \0\t\r\n") for one in _several(value) if one is not None)
    return [one for one in found if one]


def numbers(dataset: pydicom.Dataset, name: str) -> list[float]:
    """All finite values of a numeric element; what is no number is dropped."""
    found = []
    for one in texts(dataset, name):
        try:
            value = float(one)
        except ValueError:
            continue
        if np.isfinite(value):
            found.append(value)
    return found


def integer(dataset: pydicom.Dataset, name: str) -> int | None:
    """The first value of a numeric element as an integer; None where absent."""
    values = numbers(dataset, name)
    return int(values[0]) if values else None


def words(dataset: pydicom.Dataset, name: str, *, big_endian: bool) -> np.ndarray:
    """A table element (OW, US, or "US or SS" left as bytes) as uint16; empty where absent."""
    if name not in dataset:
        return np.zeros(0, dtype=np.uint16)
    value: Any = dataset[name].value
    if isinstance(value, bytes):
        whole = value[: len(value) // 2 * 2]
        return np.frombuffer(whole, dtype=">u2" if big_endian else "<u2").astype(np.uint16)
    if value is None:
        return np.zeros(0, dtype=np.uint16)
    return (np.array([int(v) for v in _several(value)], dtype=np.int64) & 0xFFFF).astype(np.uint16)


def _several(value: Any) -> list[Any]:
    """One value or many as a list; text and bytes are one."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]


def items(dataset: pydicom.Dataset | None, name: str) -> list[pydicom.Dataset]:
    """The items of a sequence; none where it is absent or no sequence."""
    if dataset is None or name not in dataset:
        return []
    value: Any = dataset[name].value
    return list(value) if isinstance(value, pydicom.Sequence) else []

"""DICOM tags -> label cells and a patient: an allow-list, one written reading for each, and nothing else is read.

modality    Modality, lower case; CR, DX and RG are "xr"; OT, or a Secondary Capture object: unknown
anatomy     BodyPartExamined against AnatomicRegionSequence, FrameAnatomySequence or PrimaryAnatomicStructureSequence,
            each through the ladder of `structure.anatomy`; two that disagree: unknown, counted
laterality  ImageLaterality, FrameLaterality, Laterality: "l", "r"; B is "l|r", U is "unpaired"
view        ViewPosition, ViewCodeSequence; for CT and MR the plane of ImageOrientationPatient: the normal is row x
            column, its largest component names "sagittal", "coronal" or "axial", below 0.8 it is "oblique"
device      Manufacturer, the vendor by its prefix, else the first word; TransducerType
patient     PatientID with its issuer; absent: StudyInstanceUID. A group, never a label; whoever keeps it hashes it

Unknown is None, never a guess. Descriptions, protocol names and private tags are never read: free text carries names.
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
from pydicom import uid

from kladi.data.pixels.dicom_header import Header, integer, items, numbers, quiet, read_header, texts
from kladi.data.pixels.frame import Limits, Unreadable
from kladi.data.pixels.open_file import open_file
from kladi.data.pixels.signature import kind_of
from kladi.structure.anatomy import combine_anatomy, normalise_anatomy

TAGS = (
    "Modality",
    "BodyPartExamined",
    "AnatomicRegionSequence",
    "PrimaryAnatomicStructureSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "ImageLaterality",
    "Laterality",
    "ViewPosition",
    "ViewCodeSequence",
    "ImageOrientationPatient",
    "Manufacturer",
    "TransducerType",
    "PatientID",
    "IssuerOfPatientID",
    "StudyInstanceUID",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "BitsAllocated",
)
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
X_RAY = {"CR", "DX", "RG"}
VENDORS = (
    ("siemens", "siemens"),
    ("ge ", "ge"),
    ("gems", "ge"),
    ("general electric", "ge"),
    ("philips", "philips"),
    ("adac", "philips"),
    ("marconi", "philips"),
    ("canon", "canon"),
    ("toshiba", "canon"),
    ("hitachi", "hitachi"),
    ("aloka", "hitachi"),
    ("fuji", "fujifilm"),
    ("agfa", "agfa"),
    ("carestream", "carestream"),
    ("kodak", "carestream"),
    ("hologic", "hologic"),
    ("lorad", "hologic"),
    ("samsung", "samsung"),
    ("medison", "samsung"),
    ("mindray", "mindray"),
    ("esaote", "esaote"),
    ("acuson", "siemens"),
    ("zeiss", "zeiss"),
    ("carl zeiss", "zeiss"),
    ("topcon", "topcon"),
    ("heidelberg", "heidelberg"),
    ("shimadzu", "shimadzu"),
    ("united imaging", "united imaging"),
    ("uih", "united imaging"),
)


@dataclass(frozen=True)
class Tags:
    """What a file says about its picture; text, ready to be cells of a manifest.

    attributes: modality, anatomy, laterality, view, device -> cell (several values joined by "|"), None where unknown.
    patient: raw id, only ever to be grouped and hashed; None where neither patient nor study is named.
    patient_kind: "patient" or "study"; "" where there is none.
    frames: in the file.
    burnt_in: whether the header says that text is burnt into the picture.
    rungs: attribute -> how its text was understood ("exact", "compact", ...), for the coverage report.
    conflict: whether two sources named different anatomy.
    warnings: sentences without any value of the file.
    """

    attributes: dict[str, str | None]
    patient: str | None
    patient_kind: str
    frames: int
    burnt_in: bool
    rungs: dict[str, str] = field(default_factory=dict)
    conflict: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """Why a file of a DICOM folder gives no row. `by_design`: it is no image at all; else it is damaged: left out."""

    reason: str
    code: str
    by_design: bool


def read_tags(path: str | Path, *, limits: Limits | None = None) -> Tags | Skipped:
    """Read the allow-listed tags of one file; pixels are not touched.

    Args:
        path: any file; what is no DICOM is `Skipped`.
        limits: bounds that the promised number of pixels must keep.
    """
    limits = limits or Limits()
    try:
        with open_file(path) as file:
            head = file.read(512)
            kind = kind_of(head) if head else "empty"
            if kind != "DICOM":
                return Skipped(f"no DICOM: content is {kind}", "D1", True)
            file.seek(0)
            header = read_header(file, TAGS, limits, pixels=False)
            with quiet():
                return _tags(header, os.fstat(file.fileno()).st_size, limits)
    except Unreadable as fault:
        return Skipped(fault.reason, fault.code, fault.skip)
    except RecursionError:
        return Skipped("sequences are nested too deep", "D13", False)
    except Exception as error:  # noqa: BLE001 - a damaged header is this file's end, not the run's
        return Skipped(f"damaged DICOM ({type(error).__name__})", "D13", False)


def select_frames(count: int, choice: str) -> list[int]:
    """The frames that become rows: "all", "middle", "first", or "n" for every n-th from the first.

    Raises:
        ValueError: another choice.
    """
    if choice == "all":
        return list(range(count))
    if choice == "first":
        return [0]
    if choice == "middle":
        return [count // 2]
    if choice.isdigit() and int(choice) > 0:
        return list(range(0, count, int(choice)))
    raise ValueError(f'frames = "{choice}" is not all, middle, first or a number above 0')


def _tags(header: Header, size: int, limits: Limits) -> Tags:
    dataset = header.dataset
    if not header.has_pixels:
        raise Unreadable("DICOM without Pixel Data", "D2", skip=True)
    frames = _frames(dataset, size, limits)
    groups = items(dataset, "PerFrameFunctionalGroupsSequence")[:1] + items(dataset, "SharedFunctionalGroupsSequence")
    modality = _modality(dataset)
    anatomy, rung, conflict = _anatomy(dataset, groups)
    patient, kind = _patient(dataset)
    burnt_in = texts(dataset, "BurnedInAnnotation")[:1] == ["YES"]
    warnings: list[str] = []  # what is odd about the file itself is said when it is decoded
    if burnt_in:
        warnings.append("the header says that text is burnt into the picture")
    if _is_secondary_capture(dataset):
        warnings.append("secondary capture: a screen picture, its modality is unknown")
    if modality == "us":
        warnings.append("ultrasound: text is usually burnt into the picture")
    attributes = {
        "modality": modality,
        "anatomy": "|".join(sorted(anatomy)) or None,
        "laterality": _laterality(dataset, groups),
        "view": _view(dataset, groups, modality),
        "device": _device(dataset),
    }
    return Tags(attributes, patient, kind, frames, burnt_in, {"anatomy": rung}, conflict, tuple(warnings))


def _frames(dataset: pydicom.Dataset, size: int, limits: Limits) -> int:
    """Number of frames, refused where it is impossible: each frame of any encoding takes 8 bytes of the file."""
    frames = integer(dataset, "NumberOfFrames")
    frames = 1 if frames is None else frames
    sides = [integer(dataset, name) or 0 for name in ("Rows", "Columns")]
    samples, bits = integer(dataset, "SamplesPerPixel") or 1, integer(dataset, "BitsAllocated") or 8
    total = sides[0] * sides[1] * samples * -(-bits // 8) * frames
    told = f"{sides[1]} x {sides[0]} x {frames} frames"
    if frames < 1:
        raise Unreadable(f"NumberOfFrames is {frames}", "D9")
    if total > limits.max_bytes:
        raise Unreadable(f"{told} are {total:,} bytes, more than {limits.max_bytes:,}", "D9")
    if frames > 1 and frames * 8 > size:
        raise Unreadable(f"{told} in a file of {size:,} bytes", "D9")
    return frames


def _is_secondary_capture(dataset: pydicom.Dataset) -> bool:
    sop = (texts(dataset, "SOPClassUID") or [""])[0]
    return sop == SECONDARY_CAPTURE or sop.startswith(SECONDARY_CAPTURE + ".")


def _modality(dataset: pydicom.Dataset) -> str | None:
    """Only a term of two to sixteen letters counts: anything longer is free text."""
    values = texts(dataset, "Modality")
    if not values or _is_secondary_capture(dataset):
        return None
    modality = values[0].upper()
    if modality == "OT" or not (modality.isascii() and modality.isalpha() and 2 <= len(modality) <= 16):
        return None
    return "xr" if modality in X_RAY else modality.lower()


def _anatomy(dataset: pydicom.Dataset, groups: list[pydicom.Dataset]) -> tuple[frozenset[str], str, bool]:
    """What the free tag and the coded sequences say together: (values, rung, whether they disagree)."""
    named, rung = normalise_anatomy((texts(dataset, "BodyPartExamined") or [None])[0])
    coded_items = items(dataset, "AnatomicRegionSequence")
    for group in groups:
        for frame_anatomy in items(group, "FrameAnatomySequence"):
            coded_items += items(frame_anatomy, "AnatomicRegionSequence")
    coded_items += items(dataset, "PrimaryAnatomicStructureSequence")
    coded, coded_rung = next((found for found in map(_coded, coded_items) if found[0]), (frozenset(), "unknown"))
    values, conflict = combine_anatomy([named, coded])
    return values, rung if named or not coded else coded_rung, conflict


def _coded(item: pydicom.Dataset) -> tuple[frozenset[str], str]:
    """A code by its meaning, else by pydicom's own concept dictionary; we bundle no table of codes."""
    for meaning in texts(item, "CodeMeaning")[:1]:
        found = normalise_anatomy(meaning)
        if found[0]:
            return found
    scheme, value = texts(item, "CodingSchemeDesignator"), texts(item, "CodeValue")
    known = _meanings().get((scheme[0], value[0])) if scheme and value else None
    return normalise_anatomy(known) if known else (frozenset(), "unknown")


@cache
def _meanings() -> dict[tuple[str, str], str]:
    """(scheme, code) -> meaning, for SNOMED CT and its older form in DICOM; loaded at the first code that needs it."""
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import snomed_mapping

    current = {code.value: code.meaning for code in codes.SCT.concepts.values()}
    found = {("SCT", value): meaning for value, meaning in current.items()}
    for old, new in snomed_mapping["SRT"].items():
        if new in current:
            found[("SRT", old)] = found[("SNM3", old)] = current[new]
    return found


def _laterality(dataset: pydicom.Dataset, groups: list[pydicom.Dataset]) -> str | None:
    values = texts(dataset, "ImageLaterality")
    for group in groups:
        for frame_anatomy in items(group, "FrameAnatomySequence"):
            values += texts(frame_anatomy, "FrameLaterality")
    values += texts(dataset, "Laterality")
    meant = {"L": "l", "R": "r", "B": "l|r", "U": "unpaired"}
    return next((meant[v.upper()] for v in values if v.upper() in meant), None)


def _view(dataset: pydicom.Dataset, groups: list[pydicom.Dataset], modality: str | None) -> str | None:
    positions = texts(dataset, "ViewPosition")
    if positions:
        return _word(positions[0])
    for item in items(dataset, "ViewCodeSequence")[:1]:
        for meaning in texts(item, "CodeMeaning")[:1]:
            return _word(meaning)
    return _plane(dataset, groups) if modality in {"ct", "mr"} else None


def _plane(dataset: pydicom.Dataset, groups: list[pydicom.Dataset]) -> str | None:
    """The plane of a slice, from the normal of its rows and columns; None where they are missing or degenerate."""
    values = numbers(dataset, "ImageOrientationPatient")
    for group in groups:
        for orientation in items(group, "PlaneOrientationSequence"):
            values = values or numbers(orientation, "ImageOrientationPatient")
    if len(values) != 6:
        return None
    normal = np.cross(values[:3], values[3:])
    length = float(np.linalg.norm(normal))
    if not 0.5 < length < 2.0:  # rows and columns are unit vectors at right angles, or this is no orientation
        return None
    share = np.abs(normal) / length
    return "oblique" if share.max() < 0.8 else ("sagittal", "coronal", "axial")[int(share.argmax())]


def _device(dataset: pydicom.Dataset) -> str | None:
    for name in texts(dataset, "Manufacturer")[:1]:
        folded = " ".join(re.sub(r"[^\w]+|_", " ", name.casefold().replace(".", "")).split()) + " "
        for prefix, vendor in VENDORS:
            if folded.startswith(prefix):
                return vendor
        return _word(folded.split()[0]) if folded.strip() else None
    return next((_word(kind) for kind in texts(dataset, "TransducerType")), None)


def _word(text: str) -> str | None:
    """Free text as one value: lower case, "|" would separate two."""
    folded = " ".join(text.replace("|", " ").casefold().split())
    return folded[:64] or None


def _patient(dataset: pydicom.Dataset) -> tuple[str | None, str]:
    """The id as text, trimmed and NFC; the issuer goes in front where there is one, as two hospitals both have a 1."""
    ids, issuers = texts(dataset, "PatientID"), texts(dataset, "IssuerOfPatientID")
    if ids:
        parts = [unicodedata.normalize("NFC", part).strip(" \0") for part in (*issuers[:1], ids[0])]
        return "\x1f".join(parts), "patient"
    studies = texts(dataset, "StudyInstanceUID")
    if studies and uid.UID(studies[0]).is_valid:
        return studies[0], "study"
    return None, ""

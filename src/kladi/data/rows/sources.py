"""Public data sets as they lie on disk after download, recognised by their layout: rows, groups, and known defects.

Each reader takes the files that a walk found and returns a `Source`, or None where the layout is another one. What is
known to be wrong with a set is a finding, so that nobody has to have read the letters about it.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kladi.data.findings import Finding, counted
from kladi.errors import UserError

MOST_BYTES = 64 * 2**20
"""Of a table or an annotation beside the images."""


@dataclass
class Source:
    """A recognised set: one entry a row in every list.

    name: as people call it. columns: further columns, e.g. modality and anatomy; "" where unknown.
    """

    name: str
    path: list[str] = field(default_factory=list)
    frame: list[int] = field(default_factory=list)
    label: list[str | None] = field(default_factory=list)
    patient: list[str | None] = field(default_factory=list)
    split: list[str | None] = field(default_factory=list)
    columns: dict[str, list[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(
        self,
        path: str,
        *,
        label: str | None = None,
        patient: str | None = None,
        split: str | None = None,
        frame: int = -1,
        **columns: str,
    ) -> None:
        """One row; every row names the same further columns."""
        for name, value in columns.items():
            self.columns.setdefault(name, []).append(value)
        for values, value in (
            (self.path, path),
            (self.frame, frame),
            (self.label, label),
            (self.patient, patient),
            (self.split, split),
        ):
            values.append(value)  # type: ignore[arg-type]

    def warn(self, message: str) -> None:
        self.findings.append(Finding("M19", "warning", f"{self.name}: {message}"))

    def skip(self, number: int, word: str, why: str) -> None:
        if number:
            self.findings.append(Finding("I3", "skipped", f"{self.name}: {counted(number, word)} {why}"))


def recognise(root: Path, paths: Sequence[str]) -> Source | None:
    """The set whose layout this folder has, None where it is nobody's."""
    for reader in READERS:
        source = reader(root, paths)
        if source is not None and source.path:
            source.findings.insert(
                0,
                Finding("M19", "warning", f"recognised as {source.name}; a metadata.csv in the folder overrides that"),
            )
            return source
    return None


# --- BUSI ----------------------------------------------------------------------------------------------------------

_BUSI = re.compile(r"(?:.*/)?(benign|malignant|normal)/(?:benign|malignant|normal) \(\d+\)(_mask(?:_\d+)?)?\.png")


def busi(root: Path, paths: Sequence[str]) -> Source | None:  # noqa: ARG001  all readers are called alike
    """`{benign,malignant,normal}/<class> (i).png` with masks beside them."""
    matches = [_BUSI.fullmatch(path) for path in paths]
    if not paths or not all(matches):
        return None
    source = Source("BUSI")
    for path, match in zip(paths, matches, strict=True):
        if match and not match.group(2):
            source.add(path, label=match.group(1), modality="US", anatomy="breast")
    source.skip(len(paths) - len(source.path), "mask", "not read as images")
    source.warn(
        "no patient ids, duplicates and near-duplicates under both classes, axilla images and burnt-in marks are known "
        "(Pawlowska et al., Data in Brief 48:109247)"
    )
    return source


# --- RadImageNet ---------------------------------------------------------------------------------------------------

_RADIMAGENET = re.compile(
    r"(?:.*/)?(?:(CT)/(abd|lung)|(MR)/(abd|af|brain|hip|knee|shoulder|spine)|(US))/(?:[^/]+/)?([^/]+)/[^/]+\.png"
)
_AREAS = {"abd": "abdomen", "af": "ankle_foot"}


def radimagenet(root: Path, paths: Sequence[str]) -> Source | None:
    """`{CT,MR}/<anatomy>/<pathology>/*.png` and `US/[<anatomy>/]<label>/*.png`, at any depth below the root."""
    # Folders called MR/brain/... are anybody's: only the set's own top folder makes it this set.
    if root.name != "radiology_ai" and not all("radiology_ai" in path.split("/") for path in paths):
        return None
    matches = [_RADIMAGENET.fullmatch(path) for path in paths]
    if len(paths) < 2 or not all(matches) or not any(m and (m.group(1) or m.group(3)) for m in matches):
        return None
    source = Source("RadImageNet")
    for path, match in zip(paths, matches, strict=True):
        if match is None:
            continue
        ct, ct_area, mr, mr_area, _, name = match.groups()
        pathology = name.rstrip("_")  # some copies end a folder's name with a stray underscore
        area = ct_area or mr_area or ("thyroid" if "thyroid" in path.casefold() else "abd")
        modality, anatomy = ct or mr or "US", _AREAS.get(area, area)
        label = f"{modality}/{anatomy}/{pathology}"
        source.add(path, label=label, modality=modality, anatomy=anatomy)
    source.warn("no patient ids; duplicates under different labels and blank images are known")
    return source


# --- BreakHis ------------------------------------------------------------------------------------------------------

_BREAKHIS = re.compile(r"(?:.*/)?SOB_([BM])_(A|F|PT|TA|DC|LC|MC|PC)-(\d+)-([0-9]+)([A-Z]*)-(40|100|200|400)-\d+\.png")
_SUBTYPES = {
    "A": "benign/adenosis",
    "F": "benign/fibroadenoma",
    "PT": "benign/phyllodes_tumor",
    "TA": "benign/tubular_adenoma",
    "DC": "malignant/ductal_carcinoma",
    "LC": "malignant/lobular_carcinoma",
    "MC": "malignant/mucinous_carcinoma",
    "PC": "malignant/papillary_carcinoma",
}


def breakhis(root: Path, paths: Sequence[str]) -> Source | None:  # noqa: ARG001  all readers are called alike
    """`SOB_<B,M>_<subtype>-<year>-<slide>-<magnification>-<n>.png`; the slide, its letters aside, is the patient."""
    matches = [_BREAKHIS.fullmatch(path) for path in paths]
    if not paths or not all(matches):
        return None
    source = Source("BreakHis")
    kinds: dict[str, set[str]] = {}
    for path, match in zip(paths, matches, strict=True):
        if match is None:
            continue
        _, code, year, slide, _, magnification = match.groups()
        kinds.setdefault(f"{year}-{slide}", set()).add(code)
        source.add(
            path,
            label=_SUBTYPES[code],
            patient=f"{year}-{slide}",
            modality="SM",
            anatomy="breast",
            magnification=magnification,
        )
    torn = sum(len(codes) > 1 for codes in kinds.values())
    if torn:
        source.warn(f"{counted(torn, 'slide')} stand under two subtypes; their images stay together")
    source.warn("slide numbers with letters (22549AB, ...) are taken as one patient")
    return source


# --- HAM10000 ------------------------------------------------------------------------------------------------------

_HAM_TABLE = re.compile(r"HAM10000_metadata(\.csv)?", re.IGNORECASE)


def ham10000(root: Path, paths: Sequence[str]) -> Source | None:
    """`HAM10000_images_part_{1,2}/ISIC_*.jpg` and `HAM10000_metadata.csv`; the lesion is the patient."""
    tables = [p for p in sorted(root.iterdir()) if p.is_file() and _HAM_TABLE.fullmatch(p.name)]
    if not tables or not any("ISIC_" in path for path in paths):
        return None
    rows = _table(tables[0], ("lesion_id", "image_id", "dx"))
    by_image: dict[str, dict[str, str]] = {}
    repeated = 0
    for row in rows:
        repeated += row["image_id"] in by_image
        by_image.setdefault(row["image_id"], row)
    source = Source("HAM10000")
    unlisted = 0
    for path in paths:
        row = by_image.get(Path(path).stem)
        if row is None:
            unlisted += 1
            continue
        source.add(
            path,
            label=row["dx"],
            patient=row["lesion_id"],
            modality="XC",
            anatomy="skin",
            localization=row.get("localization", ""),
        )
    source.skip(unlisted, "image", "without a row in the table (or a segmentation)")
    if repeated:
        source.warn(f"{counted(repeated, 'row')} of the table repeat an image, as in one re-hosted copy")
    source.warn("the lesion is the group; some lesions have two ids (Abhishek 2025)")
    return source


# --- DDTI ----------------------------------------------------------------------------------------------------------

_DDTI = re.compile(r"(?:.*/)?(\d+)_(\d+)\.jpg")
_TIRADS = {"2": "benign", "3": "benign", "4a": "malignant", "4b": "malignant", "4c": "malignant", "5": "malignant"}


def ddti(root: Path, paths: Sequence[str]) -> Source | None:
    """`<case>.xml` beside `<case>_<k>.jpg`; the label is the TI-RADS grade in two classes."""
    matches = [_DDTI.fullmatch(path) for path in paths]
    if not paths or not all(matches):
        return None
    grades: dict[str, str] = {}
    for path, match in zip(paths, matches, strict=True):
        case = match.group(1) if match else ""
        file = (root / path).with_name(f"{case}.xml")
        if case not in grades and file.is_file():
            found = re.search(r"<tirads>\s*([^<\s]*)\s*</tirads>", _text(file), re.IGNORECASE)
            grades[case] = found.group(1).lower() if found else ""
    if not grades:
        return None
    source, ungraded = Source("DDTI"), 0
    for path, match in zip(paths, matches, strict=True):
        case = match.group(1) if match else ""
        label = _TIRADS.get(grades.get(case, ""))
        if label is None:
            ungraded += 1
            continue
        source.add(path, label=label, patient=case, modality="US", anatomy="thyroid", tirads=grades[case])
    source.skip(ungraded, "image", "without a TI-RADS grade")
    source.warn("classes are risk grades (2, 3 benign; 4a to 5 malignant), not pathology")
    return source


# --- MRNet ---------------------------------------------------------------------------------------------------------

_MRNET = re.compile(r"(?:.*/)?(train|valid)/(axial|coronal|sagittal)/(\d+)\.npy")


def mrnet(root: Path, paths: Sequence[str]) -> Source | None:
    """`{train,valid}/{axial,coronal,sagittal}/NNNN.npy`; `{train,valid}-{abnormal,acl,meniscus}.csv` have no header."""
    matches = [_MRNET.fullmatch(path) for path in paths]
    if not paths or not all(matches):
        return None
    known: dict[tuple[str, str], dict[str, str]] = {}
    for part in ("train", "valid"):
        for finding in ("abnormal", "acl", "meniscus"):
            file = root / f"{part}-{finding}.csv"
            for line in _text(file).splitlines() if file.is_file() else ():
                case, _, value = line.partition(",")
                known.setdefault((part, case.strip().zfill(4)), {})[finding] = value.strip()
    source = Source("MRNet")
    for path, match in zip(paths, matches, strict=True):
        part, plane, case = match.groups() if match else ("", "", "")
        facts = known.get((part, case.zfill(4)), {})
        acl = {"1": "acl_tear", "0": "acl_intact"}.get(facts.get("acl", ""))
        source.add(
            path,
            label=acl,
            patient=case.zfill(4),
            split={"train": "train", "valid": "val"}[part],
            modality="MR",
            anatomy="knee",
            view=plane,
            abnormal=facts.get("abnormal", ""),
            meniscus=facts.get("meniscus", ""),
        )
    source.warn("the exam is the group (patients were not published); a volume is read as its middle slice")
    return source


# --- MedMNIST ------------------------------------------------------------------------------------------------------

MEDMNIST = {
    "path": ("SM", "colon", ""),
    "chest": ("XR", "chest", ""),
    "pneumonia": ("XR", "chest", ""),
    "derma": ("XC", "skin", ""),
    "oct": ("OPT", "retina", ""),
    "retina": ("OP", "retina", ""),
    "breast": ("US", "breast", ""),
    "blood": ("SM", "blood", ""),
    "tissue": ("SM", "kidney", ""),
    "organa": ("CT", "abdomen", "axial"),
    "organc": ("CT", "abdomen", "coronal"),
    "organs": ("CT", "abdomen", "sagittal"),
}
"""Name of a set -> modality, anatomy, view."""
_MEDMNIST = re.compile(rf"(?:.*/)?({'|'.join(MEDMNIST)})mnist(?:_(?:64|128|224))?\.npz")
PARTS = ("train", "val", "test")


def medmnist(root: Path, paths: Sequence[str]) -> Source | None:
    """`<name>.npz`, `<name>_{64,128,224}.npz` with `{train,val,test}_{images,labels}`: one row an image."""
    matches = [_MEDMNIST.fullmatch(path) for path in paths]
    if not paths or not all(matches):
        return None
    source = Source("MedMNIST")
    for path, match in zip(paths, matches, strict=True):
        name = match.group(1) if match else ""
        modality, anatomy, view = MEDMNIST[name]
        frame = 0
        for part in PARTS:
            for row in _medmnist_labels(root / path, part):
                label = f"{name}/{int(row[0])}" if len(row) == 1 else None  # several findings are no place in a tree
                source.add(
                    path, label=label, split=part, frame=frame, modality=modality, anatomy=anatomy, view=view, set=name
                )
                frame += 1
    if any(match and match.group(1) == "breast" for match in matches):
        source.warn("BreastMNIST is BUSI (0 malignant, 1 normal or benign): do not use both")
    if any(match and match.group(1) == "derma" for match in matches):
        source.warn("DermaMNIST is HAM10000 split across lesions: images of one lesion stand in two splits")
    source.warn("no patient ids")
    return source


def _medmnist_labels(file: Path, part: str) -> np.ndarray:
    """Labels [N, L] of a part; no pickle is read, and nothing but this array is unpacked."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            labels = np.asarray(arrays[f"{part}_labels"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file.name}: {part}_labels cannot be read ({type(error).__name__})") from error
    return labels.reshape(len(labels), -1)


READERS: tuple[Callable[[Path, Sequence[str]], Source | None], ...] = (
    busi,
    breakhis,
    ham10000,
    mrnet,
    medmnist,
    ddti,
    radimagenet,
)


def _table(file: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(_text(file))))
    lacking = [name for name in needed if rows and name not in rows[0]]
    if not rows or lacking:
        raise UserError(f"{file.name}: " + (f"lacks the column {lacking[0]}" if lacking else "is empty"))
    return [{key: value or "" for key, value in row.items() if isinstance(key, str)} for row in rows]


def _text(file: Path) -> str:
    if file.stat().st_size > MOST_BYTES:
        raise UserError(f"{file.name} is larger than {MOST_BYTES:,} bytes")
    return file.read_text(encoding="utf-8-sig", errors="replace")

"""A folder -> the image files in it, recognised by content, and what its sub-folders say about them.

The walk is sorted, so that the same folder gives the same rows; hidden files are passed over, links that lead out of
the folder are not followed, a DICOMDIR is a file like any other.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kladi.data.findings import Finding, Severity, counted, listed, quoted
from kladi.data.pixels import signature
from kladi.data.rows.cells import SPLITS

AMBIGUOUS = {"NPZ": (".npz",), "BMP": (".bmp", ".dib"), "gzip": (".nii.gz",)}
"""Kinds whose first bytes other files share (a spreadsheet is a zip, a note may begin BM): the suffix must agree."""
TABLES = tuple(f"{stem}{suffix}" for stem in ("metadata", "manifest") for suffix in (".csv", ".tsv", ".parquet"))
"""Names of a manifest that lies inside the folder it describes."""
APART: dict[str, tuple[str, Severity, str, str]] = {
    "link": ("M7", "skipped", "link", "out of the folder not followed; --data.allow_outside true follows them"),
    "no text": ("I15", "skipped", "file", "whose name is no Unicode text"),
    "closed folder": ("I14", "warning", "folder", "that cannot be opened"),
}
"""What is counted apart from files that are no images."""


@dataclass(frozen=True)
class Walk:
    """Files that are, or claim to be, images: path relative to the root with "/", and the kind by content."""

    paths: list[str]
    kinds: list[str]
    findings: list[Finding]


@dataclass(frozen=True)
class Layout:
    """What sub-folders mean: a label and a split for each path, None where they mean none."""

    label: list[str | None]
    split: list[str | None]
    findings: list[Finding]


def walk(root: Path, *, allow_outside: bool = False) -> Walk:
    """Every image of a folder, in the order of the paths.

    A file is a row when its content is an image or when its suffix promises one: a damaged scan must be named, not
    passed over. Everything else is counted.
    """
    paths: list[str] = []
    kinds: list[str] = []
    others: Counter[str] = Counter()
    apart: Counter[str] = Counter()
    for path, kind in sorted(_files(root, allow_outside=allow_outside)):
        if kind in APART:
            apart[kind] += 1
        elif _is_row(path, kind):
            paths.append(path)
            kinds.append(kind)
        else:
            others[_suffix(path)] += 1
    found = []
    if others:
        by_suffix = [f"{count:,} {suffix}" for suffix, count in others.most_common()]
        found.append(
            Finding("I3", "skipped", f"{counted(others.total(), 'file')} that are no images: {listed(by_suffix, 5)}")
        )
    for kind, count in apart.items():
        code, severity, word, what = APART[kind]
        found.append(Finding(code, severity, f"{counted(count, word)} {what}"))
    return Walk(paths, kinds, found)


def _files(root: Path, *, allow_outside: bool) -> Iterator[tuple[str, str]]:
    """(path, kind by content) of each file that is not hidden; kind "link" and "no text" are not read."""
    top = os.path.realpath(root)
    below = top.rstrip(os.sep) + os.sep
    seen = {top}
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(root / folder) as entries:
                listing = list(entries)
        except OSError:
            yield folder, "closed folder"
            continue
        for entry in listing:
            path = f"{folder}{entry.name}"
            if entry.name.startswith("."):
                continue
            if not path.isprintable() and not _is_unicode(path):
                yield path.encode("utf-8", "replace").decode(), "no text"
            elif entry.is_symlink():
                real = os.path.realpath(entry.path)
                inside = real == top or real.startswith(below)
                if not inside and not allow_outside:
                    yield path, "link"
                elif entry.is_dir() and not inside and real not in seen:
                    seen.add(real)  # a folder inside is walked anyway; one outside only once, so that no circle closes
                    waiting.append(f"{path}/")
                elif entry.is_file():
                    yield path, _kind(Path(entry.path))
                elif not Path(entry.path).exists():
                    yield path, "missing"  # a link to nothing; the decoder names it
            elif entry.is_dir():
                waiting.append(f"{path}/")
            elif entry.is_file():
                yield path, _kind(Path(entry.path))
            else:
                yield path, "special"


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(path: Path) -> str:
    try:
        with path.open("rb", buffering=0) as file:
            head = file.read(512)
    except OSError:
        return "unreadable"
    return signature.kind_of(head) if head else "empty"


def _is_row(path: str, kind: str) -> bool:
    if kind == "special":
        return False
    promised = signature.promised(path)
    if kind in AMBIGUOUS:
        return path.casefold().endswith(AMBIGUOUS[kind]) or promised not in (None, kind)
    return kind in signature.READABLE or promised is not None


def _suffix(path: str) -> str:
    """The suffix, where it is short and plain enough to be one and not a part of a name."""
    suffix = Path(path).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z]{1,8}", suffix) else "without a usual suffix"


# --- what sub-folders say ------------------------------------------------------------------------------------------

WRAPPERS = {"images", "image", "imgs", "img", "data", "scans", "files", "png", "jpg", "jpeg", "dicom", "dcm"}
NO_CLASS = WRAPPERS | {"mask", "masks", "annotations", "labels", "seg", "segmentation", "segmentations", "groundtruth"}
PERSON = re.compile(
    r"(?i)((sub|subj|subject|pat|patient|participant|case|person|id|p|s|study|series|scan|exam|visit|ses|session|site|"
    r"img|image|vol|volume|slice|fold|batch|part)s?[-_ .]*\d+\b.*)|.*\d{3,}.*|\d+(\.\d+){2,}"
)
"""Names that say who or which one, not what: sub-01, patient 7, 000123, a UID."""
MOST_DEPTH = 6
LEAST_IMAGES = 5
"""Images a class on average; fewer look like the folders of patients."""


def layout(paths: Sequence[str], patients: Sequence[str | None] = ()) -> Layout:
    """Labels and splits from the names of sub-folders, where these are clearly classes.

    Clearly: every image lies in a sub-folder (below train, val, test, if all do); there are at least two of them, with
    five images on average, and of two patients where patients are known; no name is one of a person, a number of three
    digits, or of a kind of file. Nested folders spell the tree: `CT/chest/normal/1.png` is labelled `CT/chest/normal`.

    Args:
        paths: relative to the folder, with "/".
        patients: of each path, where the files say; otherwise empty.
    """
    nothing: list[str | None] = [None] * len(paths)
    folders = [path.split("/")[:-1] for path in paths]
    folders = _without_wrapper(folders)
    split: list[str | None] = nothing
    if folders and all(parts and parts[0].casefold() in SPLITS for parts in folders):
        split = [*(SPLITS[parts[0].casefold()] for parts in folders)]
        folders = _without_wrapper([parts[1:] for parts in folders])
    found: list[Finding] = []
    if any(split):
        counts = ", ".join(f"{name} {count:,}" for name, count in Counter(split).items())
        found.append(Finding("M19", "warning", f"splits are taken from the sub-folders: {counts}"))
    if not any(folders):
        return Layout(nothing, split, found)
    why = _no_classes(folders) or _one_patient_each(folders, patients)
    if why:
        message = f"sub-folders are not taken as labels: {why}; a metadata.csv in the folder can label"
        return Layout(nothing, split, [*found, Finding("M13", "warning", message)])
    label = ["/".join(parts) for parts in folders]
    names = sorted(set(label))
    shown = listed([quoted(name) for name in names])
    message = f"labels are taken from the sub-folders: {counted(len(names), 'class', 'classes')}, {shown}"
    found.append(Finding("M13", "warning", message))
    return Layout([*label], split, found)


def _without_wrapper(folders: list[list[str]]) -> list[list[str]]:
    """Without leading folders that hold everything, such as images/."""
    while folders and all(parts for parts in folders) and len({parts[0] for parts in folders}) == 1:
        folders = [parts[1:] for parts in folders]
    return folders


def _no_classes(folders: list[list[str]]) -> str:
    """Why the folders are no classes; empty where they are."""
    if not all(folders):
        return "some images lie outside them"
    if max(map(len, folders)) > MOST_DEPTH:
        return f"they are nested more than {MOST_DEPTH} deep"
    sizes = Counter("/".join(parts) for parts in folders)
    names = {part for parts in folders for part in parts}
    if any(PERSON.fullmatch(name) for name in names):
        return "their names look like those of persons or series"  # which may be names, so none is shown
    files = sorted(name for name in names if name.casefold() in NO_CLASS)
    if files:
        return f"{quoted(files[0])} names a kind of file"
    if len(folders) < LEAST_IMAGES * len(sizes):
        return f"they hold fewer than {LEAST_IMAGES} images on average"
    return ""


def _one_patient_each(folders: list[list[str]], patients: Sequence[str | None]) -> str:
    """Whether most folders are patients; empty where they are not, or where nobody knows."""
    who: dict[str, set[str]] = {}
    for parts, patient in zip(folders, patients or [None] * len(folders), strict=True):
        if patient is not None:
            who.setdefault("/".join(parts), set()).add(patient)
    counts = sorted(map(len, who.values()))
    return "most hold the images of one patient" if counts and counts[len(counts) // 2] < 2 else ""

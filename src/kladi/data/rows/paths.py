"""Manifest cells -> files: which may be read, which exist, and which are something else. Nothing is opened.

Rows are checked in columns, and each folder is listed once: a million rows cost as many system calls as they have
folders. What leaves the folder of the manifest (`..`, an absolute path, a link, a network share) is refused unless
`data.allow_outside`; what is no regular file (a pipe or a device would never end) is refused always.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from kladi.data.findings import Finding, Severity

OK, MISSING, FOLDER, SPECIAL, OUTSIDE, LINK, NUL, REMOTE, BLANK = range(9)
"""State of a row: a regular file; nothing there; a folder; a pipe, device or socket; a path that is spelt to leave the
folder; a link that leaves it; a NUL byte; an address on a network; no path at all."""


@dataclass(frozen=True)
class Located:
    """One entry a row.

    path: as it is opened: "/" between the parts, the spelling of the disk (Unicode composition); null where blank.
    state: one of the constants above, int8.
    windows: whether any path had backslashes, which were read as "/".
    """

    path: pl.Series
    state: pl.Series
    windows: bool


def locate(root: Path, cells: pl.Series, *, allow_outside: bool = False) -> Located:
    """Find the file of each row.

    Args:
        root: what relative paths are relative to.
        cells: paths as written, trimmed; null where blank.
        allow_outside: accept what leaves `root`.
    """
    text = cells.str.replace_all("\\", "/", literal=True)
    windows = bool((text != cells).any())
    if allow_outside and text.str.contains(_FILE_URL).any():
        text = pl.Series([_without_scheme(t) for t in text], dtype=pl.String)
    path = _normal(text)
    state = pl.select(
        pl.when(path.is_null())
        .then(BLANK)
        .when(path.str.contains("\0", literal=True))
        .then(NUL)
        .when(path.str.contains(_REMOTE) & ~path.str.contains(_FILE_URL))
        .then(REMOTE)
        .when(pl.lit(not allow_outside) & path.str.contains(_LEAVING))
        .then(OUTSIDE)
        .when(path.is_in(["", ".", "/"]))
        .then(FOLDER)
        .otherwise(OK)
        .cast(pl.Int8)
    ).to_series()
    likely = (state == OK).fill_null(value=False)
    found, spelling = _on_disk(root, path.filter(likely), allow_outside=allow_outside)
    where = likely.arg_true()
    return Located(path.scatter(where, spelling).alias("path"), state.scatter(where, found).alias("state"), windows)


def faults(located: Located, row: pl.Series, root: Path) -> list[Finding]:
    """What is wrong with the paths, one finding a kind.

    Args:
        located: what `locate` gave.
        row: manifest row of each.
        root: named only when not a single file is there, since then it is the likely mistake.
    """
    found = []
    state = located.state
    if len(state) and (state == MISSING).all():
        what = f"none of the {len(state):,} files is there; paths are relative to {root.resolve()}"
        found.append(Finding("M5", "error", what, tuple(row.to_list())))
    else:
        for kind, (code, severity, what) in FAULTS.items():
            rows = tuple(row.filter(state == kind).to_list())
            if rows:
                found.append(Finding(code, severity, what, rows))
    if located.windows:
        found.append(Finding("M7", "warning", 'backslashes in paths are read as "/"'))
    return found


FAULTS: dict[int, tuple[str, Severity, str]] = {
    MISSING: ("M5", "left out", "file missing"),
    BLANK: ("M5", "left out", "no path"),
    FOLDER: ("M6", "error", "the path is a folder; give the folder itself as DATA"),
    OUTSIDE: ("M7", "error", "the path leaves the folder (.., absolute, share); --data.allow_outside true accepts it"),
    LINK: ("M7", "error", "the path is a link out of the folder; --data.allow_outside true accepts it"),
    NUL: ("M7", "error", "NUL byte in the path"),
    SPECIAL: ("M7", "error", "a device, pipe or socket, no file"),
    REMOTE: ("M7", "error", "an address, no file; nothing is fetched: copy the files and name them"),
}
"""State -> code, severity for an image, and words."""

_FILE_URL = r"^(?i:file:)"
_REMOTE = r"^[A-Za-z][A-Za-z0-9+.-]+:/"  # a drive has one letter
_DRIVE = r"^[A-Za-z]:" if os.name == "nt" else r"^[A-Za-z]:/"  # elsewhere "a:b.png" is a name
_LEAVING = rf"^/|{_DRIVE}|^(?i:file:)|(^|/)\.\.(/|$)"


def _normal(text: pl.Series) -> pl.Series:
    """`./a//b/./c` -> `a/b/c`; a share keeps its two leading slashes."""
    return (
        text.str.replace_all(r"([^:/])/{2,}", "${1}/")
        .str.replace_all(r"/(\./)+", "/")
        .str.replace(r"^(\./)+", "")
        .str.replace(r"/\.?$", "/")
        .str.replace(r"([^/])/$", "${1}")
    )


def _without_scheme(text: str | None) -> str | None:
    """file:///a%20b -> /a b; file://server/share -> //server/share."""
    if text is None or text[:5].casefold() != "file:":
        return text
    rest = text[5:]
    if rest.startswith("//"):
        host, _, rest = rest[2:].partition("/")
        rest = f"/{rest}" if host.casefold() in {"", "localhost"} else f"//{host}/{rest}"
    encoded = re.sub(rb"%([0-9A-Fa-f]{2})", lambda m: bytes([int(m[1], 16)]), rest.encode())
    return encoded.decode("utf-8", "replace")


# --- the disk ------------------------------------------------------------------------------------------------------


def _on_disk(root: Path, path: pl.Series, *, allow_outside: bool) -> tuple[pl.Series, pl.Series]:
    """State of each path, and how the disk spells it; one folder at a time, so that memory stays small."""
    disk = _Disk(root, None if allow_outside else os.path.realpath(root))
    found = np.full(len(path), MISSING, dtype=np.int8)
    spelt: dict[int, str] = {}
    by_folder = pl.DataFrame(
        {
            "folder": path.str.extract(r"^(.*/)", 1).fill_null(""),
            "name": path.str.extract(r"([^/]*)$", 1),
            "row": pl.arange(0, len(path), eager=True),
        }
    ).group_by("folder", maintain_order=True)
    for folder, names, rows in by_folder.agg("name", "row").iter_rows():
        spelling, states = disk.listing(folder)
        found[rows] = [states.get(name, MISSING) for name in names]
        if spelling != folder or (found[rows] == MISSING).any():
            actual = {_key(name): name for name in states}
            for row, name in zip(rows, names, strict=True):
                there = name if name in states else actual.get(_key(name))
                if there is not None:
                    found[row], spelt[row] = states[there], f"{spelling}{there}"
    return pl.Series(found), path.clone().scatter(list(spelt), list(spelt.values())) if spelt else path


def _key(name: str) -> str:
    """Disks and manifests compose letters differently; on Windows and macOS case does not matter either."""
    composed = unicodedata.normalize("NFC", name)
    return composed.casefold() if sys.platform in {"win32", "darwin"} else composed


@dataclass
class _Disk:
    """Folders below `root`, each listed once.

    inside: the real path that nothing may leave; None where everything is allowed.
    """

    root: Path
    inside: str | None
    real: dict[str, str] = field(default_factory=dict)

    def listing(self, folder: str) -> tuple[str, dict[str, int]]:
        """How the disk spells `folder`, and the state of every entry in it; empty where there is no such folder."""
        for spelling in dict.fromkeys((folder, *(unicodedata.normalize(form, folder) for form in ("NFC", "NFD")))):
            try:
                entries = os.scandir(self.root / spelling)
            except OSError:
                continue
            leaves = not self._is_inside(self._real(spelling))
            with entries:
                return spelling, {e.name: LINK if leaves else self._state(e) for e in entries}
        return folder, {}

    def _state(self, entry: os.DirEntry[str]) -> int:
        try:
            if entry.is_symlink():
                if not self._is_inside(os.path.realpath(entry.path)):
                    return LINK
                mode = entry.stat().st_mode
                return OK if stat.S_ISREG(mode) else FOLDER if stat.S_ISDIR(mode) else SPECIAL
            return OK if entry.is_file() else FOLDER if entry.is_dir() else SPECIAL
        except OSError:  # a link to nothing, or a file that vanished
            return MISSING

    def _is_inside(self, real: str) -> bool:
        return self.inside is None or real == self.inside or real.startswith(self.inside.rstrip(os.sep) + os.sep)

    def _real(self, folder: str) -> str:
        """`realpath`, remembered for every folder on the way: one system call a folder, not one a part."""
        parts = folder.rstrip("/").split("/")
        if folder.startswith("/") or ".." in parts:
            return os.path.realpath(self.root / folder)
        here, prefix = self.real.setdefault("", os.path.realpath(self.root)), ""
        for name in filter(None, parts):
            prefix = f"{prefix}{name}/"
            if prefix not in self.real:
                below = f"{here.rstrip(os.sep)}{os.sep}{name}"
                self.real[prefix] = os.path.realpath(below) if os.path.islink(below) else below  # noqa: PTH114
            here = self.real[prefix]
        return here

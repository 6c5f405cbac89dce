"""DATA as a user names it -> one table of rows: a .csv, .tsv or .parquet, a folder of images, or a folder of DICOM.

Mistakes that leave nothing to check (no such file, no path column, an undecodable byte) are raised; what is wrong with
single rows is collected, so that all of it is listed at once. No pixel is read, and nothing is written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from kladi import config as settings
from kladi.data.findings import Finding, counted, listed, quoted
from kladi.data.pixels.signature import kind_of
from kladi.data.rows import cells as row_cells
from kladi.data.rows import columns as roles
from kladi.data.rows import dicom_rows, folders, labels, sources, table_files
from kladi.data.rows.paths import OK, faults, locate
from kladi.data.rows.repeats import drop_repeats
from kladi.errors import UserError, suggestion

ROLES = ("row", "path", "frame", "label", "patient", "split")
"""Columns that every table has; the manifest's own columns follow."""


@dataclass(frozen=True)
class Manifest:
    """Rows that have a file, and what was found out about all rows without opening a picture.

    root: what relative paths are relative to.
    table: `row` (int64, 1-based; a file of several frames is several rows of one number), `path` (relative to root, or
        absolute), `frame` (int64, -1 for the whole file), `label` (a node of the tree), `patient` (the raw id: it is
        grouped by and hashed, never written), `split` ("train", "val", "test"), then the other columns; text is null
        where blank.
    metadata: columns that become label sets.
    findings: what was found on the way; `checks.check` adds what the columns say together.
    described: "kind" of DATA, "encoding" and "dialect" of text, "aliases" (role -> column of another name), "rungs"
        (how DICOM text was understood).
    set_aside: rows without a file that may be read, columns as in `table`: they are checked like all others.
    """

    root: Path
    table: pl.DataFrame
    metadata: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    described: dict[str, Any] = field(default_factory=dict)
    set_aside: pl.DataFrame = field(default_factory=lambda: _empty())

    def paths(self, rows: Sequence[int]) -> tuple[str, ...]:
        """Where the user finds `rows`: for the console only, a path may carry a name."""
        both = pl.concat([self.table.select("row", "path"), self.set_aside.select("row", "path")])
        known = dict(both.filter(pl.col("row").is_in(list(rows))).iter_rows())
        return tuple(known.get(row) or "" for row in rows)


def read(data: str | Path, config: settings.Data) -> Manifest:
    """The rows of `data`.

    Args:
        data: a .csv, .tsv or .parquet file; or a folder, which is walked unless it holds `metadata.csv` or
            `manifest.csv` (or .tsv, .parquet), which then describes it.
        config: which metadata, which frames, what is allowed.

    Raises:
        UserError: nothing is there, it holds no rows, its columns cannot be told, or it cannot be decoded.
    """
    path = Path(data)
    if not (config.frames in {"all", "middle", "first"} or re.fullmatch(r"0*[1-9]\d*", config.frames, re.ASCII)):
        words = ("all", "middle", "first")
        raise UserError(
            f"--data.frames {config.frames} is not all, middle, first or a number{suggestion(config.frames, words)}"
        )
    if path.is_dir():
        tables = [name for name in folders.TABLES if (path / name).is_file()]
        if len(tables) > 1:
            raise UserError(f"{path} holds {listed(tables, 6)}; name the one that is meant as DATA")
        return _from_table(path / tables[0], config) if tables else _from_folder(path, config)
    if path.is_file():
        return _from_table(path, config)
    if path.exists():
        raise UserError(f"{path} is neither a file nor a folder")
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"{path} is not there{suggestion(path.name, beside)}")


# --- a table -------------------------------------------------------------------------------------------------------


def _from_table(path: Path, config: settings.Data) -> Manifest:
    cells = table_files.read(path)
    header = list(cells.columns)
    known = roles.recognise(header, config.metadata, str(path), dicom=True)
    table, said, found = _assemble(cells, known, config)
    located = locate(path.parent, table["path"], allow_outside=config.allow_outside)
    table = table.with_columns(located.path)
    found += [*cells.findings, *_untrimmed(cells, known), *faults(located, table["row"], path.parent)]
    readable = table["row"].filter(located.state == OK)
    table, repeats = drop_repeats(table)
    there = table["row"].is_in(readable.implode())
    present, aside = table.filter(there), table.filter(~there)
    likely = present["path"].str.contains(dicom_rows.MAYBE_DICOM).fill_null(value=False).arg_true().to_list()
    dicom = [position for position in likely if _is_dicom(path.parent / present["path"][position])]
    columns = {name.casefold() for name in present.columns}
    missing = [name for name in roles.ATTRIBUTES if name not in columns]
    rungs: dict[str, Any] = {}
    if dicom:
        tagged = dicom_rows.add_tags(
            present, dicom, path.parent, config.frames, columns=missing, patients="patient_id" not in known.role
        )
        present, rungs = tagged.table, {"rungs": tagged.rungs}
        found += tagged.findings
        aside = aside.with_columns(pl.lit(None, dtype=pl.String).alias(name) for name in missing)
    elif known.absent:
        options = [name for name in header if name not in known.role.values()]
        name = known.absent[0]
        raise UserError(f"--data.metadata {name} is no column of {path}{suggestion(name, options)}")
    kind = {".parquet": "parquet", ".tsv": "TSV"}.get(path.suffix.lower(), "CSV")
    described = {"kind": kind, **cells.described, "aliases": {**known.aliases, **said}, **rungs}
    return Manifest(path.parent, present, config.metadata, (*found, *repeats), described, aside.select(present.columns))


def _assemble(
    cells: table_files.Cells, known: roles.Columns, config: settings.Data
) -> tuple[pl.DataFrame, dict[str, str], list[Finding]]:
    """The table with one column a role, the words used for splits, and findings."""
    blank = pl.Series([None], dtype=pl.String).new_from_index(0, len(cells.row))
    by_role = {name: cells.columns[known.role[name]] if name in known.role else blank for name in roles.ROLES}
    row = cells.row
    frame, frame_faults = row_cells.frames(by_role["frame"], row)
    label, label_faults = labels.clean(by_role["label"], row, config)
    patient, patient_faults = row_cells.patients(by_role["patient_id"], row)
    split, said, split_faults = row_cells.splits(by_role["split"], row)
    made = dict(zip(ROLES, (row, by_role["path"], frame, label, patient, split), strict=True))
    asked = {column: name for name, column in known.metadata.items()}
    for name, column in cells.columns.items():
        if name in known.role.values() and name not in asked:
            continue
        wanted = asked.get(name, name)
        made.setdefault(wanted, column)  # a column that is called like one of ours, e.g. "row", gives way
    for name, column in known.metadata.items():
        if column == known.role.get("label"):
            made[name] = label
    return pl.DataFrame(made), said, [*frame_faults, *label_faults, *patient_faults, *split_faults]


def _untrimmed(cells: table_files.Cells, known: roles.Columns) -> list[Finding]:
    rows: dict[int, None] = {}
    names = []
    for name in ("label", "patient_id", "split"):
        changed = cells.untrimmed.get(known.role.get(name, ""), ())
        if changed:
            names.append(name)
            rows.update(dict.fromkeys(changed))
    if not rows:
        return []
    what = f"{counted(len(rows), 'row')} with blanks or decomposed letters in {', '.join(names)}: trimmed and composed"
    return [Finding("M10", "warning", what, tuple(sorted(rows)))]


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb", buffering=0) as file:
            return kind_of(file.read(512)) == "DICOM"
    except OSError:
        return False  # the decoder says what is wrong with it


# --- a folder ------------------------------------------------------------------------------------------------------


def _from_folder(root: Path, config: settings.Data) -> Manifest:
    walked = folders.walk(root, allow_outside=config.allow_outside)
    n = len(walked.paths)
    if not n:
        seen = "; ".join(finding.message for finding in walked.findings)
        raise UserError(f"{root} has no rows: no image and no DICOM file in it" + (f" ({seen})" if seen else ""))
    source = sources.recognise(root, walked.paths)
    if source is not None:
        return _from_source(root, source, walked, config)
    dicom = [position for position, kind in enumerate(walked.kinds) if kind == "DICOM"]
    _check_folder_metadata(root, config.metadata, any_dicom=bool(dicom))
    blank: list[str | None] = [None] * n
    table = _table(list(range(1, n + 1)), walked.paths, [-1] * n, blank, blank, blank)
    tagged = dicom_rows.add_tags(table, dicom, root, config.frames, columns=roles.ATTRIBUTES if dicom else ())
    table = tagged.table
    laid_out = folders.layout(table["path"].to_list(), table["patient"].to_list())
    row = table["row"]
    label, label_faults = labels.clean(pl.Series("label", laid_out.label, dtype=pl.String), row, config)
    table = table.with_columns(label.alias("label"), pl.Series("split", laid_out.split, dtype=pl.String))
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in Counter(walked.kinds).most_common())
    described: dict[str, Any] = {"kind": f"folder, {kinds}", "aliases": {}}
    if dicom:
        described["rungs"] = tagged.rungs
    found = (*walked.findings, *tagged.findings, *laid_out.findings, *label_faults)
    return Manifest(root, table, config.metadata, found, described)


def _from_source(root: Path, source: sources.Source, walked: folders.Walk, config: settings.Data) -> Manifest:
    """A public data set that was recognised by its layout."""
    unknown = [name for name in config.metadata if name not in source.columns]
    if unknown:
        raise UserError(f"--data.metadata {unknown[0]}: {source.name} has none{suggestion(unknown[0], source.columns)}")
    numbers = {path: number for number, path in enumerate(dict.fromkeys(source.path), start=1)}
    row = [numbers[path] for path in source.path]
    table = _table(row, source.path, source.frame, source.label, source.patient, source.split)
    table = table.with_columns(pl.Series(name, [v or None for v in values]) for name, values in source.columns.items())
    described: dict[str, Any] = {"kind": f"folder, {source.name}", "aliases": {}}
    return Manifest(root, table, config.metadata, (*walked.findings, *source.findings), described)


def _check_folder_metadata(root: Path, metadata: Sequence[str], *, any_dicom: bool) -> None:
    """A folder of pictures has no columns; one of DICOM has those that the tags give."""
    options = roles.ATTRIBUTES if any_dicom else ()
    for name in metadata:
        if name not in options:
            advice = suggestion(name, options) or "; a metadata.csv inside can hold columns"
            raise UserError(f"--data.metadata {name}: the files in {root} have no {quoted(name)}{advice}")


def _table(
    row: list[int],
    path: list[str],
    frame: list[int],
    label: list[str | None],
    patient: list[str | None],
    split: list[str | None],
) -> pl.DataFrame:
    kinds = dict.fromkeys(ROLES, pl.String) | {"row": pl.Int64, "frame": pl.Int64}
    return pl.DataFrame(dict(zip(ROLES, (row, path, frame, label, patient, split), strict=True)), schema=kinds)


def _empty() -> pl.DataFrame:
    return _table([], [], [], [], [], [])

"""Tables of the same patients -> matrices with a row a patient: joined by id at the border, every fault named.

Ids are compared and dropped: what travels on is the row that a patient has in each file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int64

from kladi.data.findings import Finding, counted, line, listed, quoted
from kladi.data.rows import table_files
from kladi.data.rows.columns import means
from kladi.errors import UserError, suggestion
from kladi.structure.lattice import MOST_MODALITIES

MISSING_WORDS = frozenset({"na", "n/a", "nan", "null", "none", "missing", "?", "-", "."})
"""Cells that say that there is nothing, in any case."""
ROW = "row"
"""The key that joins by row number where no column is called so."""
LARGEST = 1e100
MOST_LEVELS, LEAST_OUTCOMES = 50, 20
LEAST_PATIENTS = 10
"""That two tables must share."""


@dataclass(frozen=True)
class PatientTables:
    """Modalities of the same patients.

    names: of the tables. features: of each, the columns that are used. values: float64[n, d_m] of each, a row of NaN
    where the patient is not in it. rows: int64[n, M], 1-based row in each file, 0 where there is none. findings: what
    was done and left out, no id in them. outcome: float64[n], NaN where unknown; None where none was asked for.
    """

    names: tuple[str, ...]
    features: tuple[tuple[str, ...], ...]
    values: tuple[Float64[np.ndarray, "n _"], ...]
    rows: Int64[np.ndarray, "n M"]
    findings: tuple[Finding, ...]
    outcome: Float64[np.ndarray, " n"] | None = None

    @property
    def present(self) -> Bool[np.ndarray, "n M"]:
        return self.rows > 0


@dataclass(frozen=True)
class Table:
    """A modality by itself: read from a file here, or a matrix that somebody else has read.

    ids: of its rows, each once. row: 1-based number of each in its file. outcome: of its rows, where it has one.
    columns: all that the file has.
    """

    name: str
    ids: list[str]
    row: list[int]
    features: tuple[str, ...]
    values: Float64[np.ndarray, "n d"]
    findings: tuple[Finding, ...] = ()
    outcome: Float64[np.ndarray, " n"] | None = None
    columns: tuple[str, ...] = ()


def read(
    paths: Sequence[Path | Table],
    *,
    key: str = "",
    leave_out: Sequence[str] = (),
    levels: Sequence[str] = (),
    outcome: str = "",
) -> PatientTables:
    """Read the tables and join them.

    Args:
        paths: .csv, .tsv or .parquet, one a modality; or tables that were read before.
        key: the column of ids in all of them; "" finds one that is called like it; "row", where no column is called so,
            is the number of the row.
        leave_out: columns that are not used.
        levels: columns of text that become one column of 0 and 1 a value.
        outcome: a column of one table that is no feature but what factors are asked about: numbers, or two words, of
            which the second in the alphabet is 1; "" for none.

    Raises:
        UserError: names the table and the column or row: fewer than two tables, no ids, an id twice, text where numbers
            belong, infinities, no column left, or tables that share fewer than 10 patients.
    """
    if len(paths) < 2:
        raise UserError(f"{len(paths)} table; factors are shared by two or more: kladi factors a.csv b.csv --out F")
    names = [path.name if isinstance(path, Table) else path.stem for path in paths]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UserError(f'two tables are called "{twice}"; rename one of the files')
    if len(paths) > MOST_MODALITIES:
        raise UserError(f"{len(paths)} tables; at most {MOST_MODALITIES} can be told apart")
    for name in (*levels, *leave_out):
        if name == outcome:
            raise UserError(f"--outcome {outcome} is asked about, and cannot be left out or split up too")
    every = [
        path if isinstance(path, Table) else _table(path, name, key, leave_out, levels, outcome)
        for path, name in zip(paths, names, strict=True)
    ]
    known = {column for one in every for column in one.columns}
    for option, columns in (("levels", levels), ("leave-out", leave_out)):
        asked = [column for column in columns if column not in known]
        if asked:
            raise UserError(f"--{option} {asked[0]} is no column of these tables{suggestion(asked[0], sorted(known))}")
    place = {patient: i for i, patient in enumerate(dict.fromkeys(p for one in every for p in one.ids))}
    rows = np.zeros((len(place), len(every)), dtype=np.int64)
    values = []
    asked_about: np.ndarray | None = None
    for m, one in enumerate(every):
        where = [place[patient] for patient in one.ids]
        if one.outcome is not None:
            if asked_about is not None:
                raise UserError(
                    f"--outcome {outcome} is a column of two tables; rename one or leave it out of the file"
                )
            asked_about = np.full(len(place), np.nan)
            asked_about[where] = one.outcome
        table = np.full((len(place), one.values.shape[1]), np.nan)
        table[where], rows[where, m] = one.values, one.row
        values.append(table)
    if outcome and asked_about is None:
        raise UserError(f"--outcome {outcome} is no column of these tables{suggestion(outcome, sorted(known))}")
    _require_meeting(rows > 0, every)
    findings = [finding for one in every for finding in one.findings]
    alone = int(((rows > 0).sum(axis=1) == 1).sum())
    if alone:
        findings.append(Finding("F1", "warning", f"{counted(alone, 'patient')} in one table only"))
    return PatientTables(
        tuple(names), tuple(one.features for one in every), tuple(values), rows, tuple(findings), asked_about
    )


def _require_meeting(present: Bool[np.ndarray, "n M"], every: list[Table]) -> None:
    for m, one in enumerate(every):
        for k in range(m):
            both = int((present[:, m] & present[:, k]).sum())
            if both < LEAST_PATIENTS:
                two = f"{every[k].name} and {one.name}"
                like = f"; ids look like {shape_of(every[k].ids[0])} and {shape_of(one.ids[0])}" if not both else ""
                raise UserError(f"{two} share {counted(both, 'patient')}; {LEAST_PATIENTS} are needed{like}")


def shape_of(text: str) -> str:
    """An id's form without the id: letters as A, digits as 9."""
    return quoted("".join("9" if c.isdigit() else "A" if c.isalpha() else c for c in text))


@dataclass(frozen=True)
class Words:
    """What messages call the options where they are given: that for levels, for leaving out, and how ids are named."""

    levels: str
    leave_out: str
    key: str


OPTIONS = Words("--levels", "--leave-out", "--key COLUMN names it")


@dataclass(frozen=True)
class Columns:
    """Columns of numbers, and of 0 and 1 for text that was split up.

    values: float64[n, d], NaN where blank.
    """

    features: tuple[str, ...]
    values: Float64[np.ndarray, "n d"]


def columns_of(
    cells: Mapping[str, pl.Series],
    row: pl.Series,
    where: str,
    *,
    levels: Sequence[str] = (),
    words: Words = OPTIONS,
    spare: int = 1,
) -> Columns:
    """Cells as numbers.

    Args:
        cells: text by column. row: number of each row, for messages. where: the file, for messages.
        levels: columns of text that become one column of 0 and 1 a value.
        words: what a message calls the options.
        spare: of the values of a column of levels, the first in the alphabet so many have no column of their own: 1
            where all others at 0 say it, 0 where which one that is must not hang on all rows together.

    Raises:
        UserError: text where numbers belong, infinities, or a column of levels with very many values.
    """
    features: list[str] = []
    columns: list[np.ndarray] = []
    plain = [column for column in cells if column not in levels]
    numbers, is_text = _numbers([cells[column] for column in plain], len(row))
    place = {column: i for i, column in enumerate(plain)}
    for column, raw in cells.items():
        if column in levels:
            raw = known(raw)
            _require_few(raw, column, f"{where}: {words.levels} {column}")
            for value in raw.drop_nulls().unique().sort().to_list()[spare:]:
                features.append(f"{column}={value}")
                columns.append((raw == value).cast(pl.Float64).fill_null(float("nan")).to_numpy())
        elif not is_text[place[column]]:
            features.append(column)
            columns.append(numbers[place[column]])
    infinite = np.argwhere(np.abs(numbers) > LARGEST)
    if len(infinite):
        column = int(infinite[0][0])
        rows = tuple(row.gather(infinite[infinite[:, 0] == column, 1]).to_list())
        said = Finding("F4", "error", f"infinite or beyond 1e100 in column {quoted(plain[column])}", rows)
        raise UserError(f"{where}: {line(said)}")
    text = [column for column, is_one in zip(plain, is_text, strict=True) if is_one]
    if text:
        what = listed([quoted(column) for column in text])
        raise UserError(
            f"{where}: text where numbers belong in {counted(len(text), 'column')}: {what}; "
            f"{words.leave_out} {text[0]} drops it, {words.levels} makes a column of each value where they are few"
        )
    return Columns(tuple(features), np.stack(columns, axis=1) if columns else np.zeros((len(row), 0)))


def identified(
    path: Path, key: str = "", *, by_path: bool = False, words: Words = OPTIONS
) -> tuple[table_files.Cells, str, pl.Series]:
    """A file's cells, the column that says whose each row is ("" where it is the row's number), and what it says.

    Args:
        by_path: whether a column of image paths will do in the place of patient ids, and goes before them.

    Raises:
        UserError: broken cells, no such column, a row without an id, or an id twice.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a .csv, .tsv or .parquet in it, or embeddings.npz")
    cells = table_files.read(path)
    images = [column for column in cells.columns if by_path and means(column, "path")]
    numbered = key == ROW and ROW not in cells.columns
    column = "" if numbered else images[0] if images else _id_column(list(cells.columns), key, path, words)
    ids = cells.row.cast(pl.String) if numbered else cells.columns[column]
    blank = cells.row.filter(ids.is_null()).to_list()
    if blank:
        raise UserError(f"{path}: {line(Finding('F2', 'error', f'no id in column {quoted(column)}', tuple(blank)))}")
    twice = cells.row.filter(ids.is_duplicated()).to_list()
    if twice:
        one = ("an image", "one row an image") if images else ("a patient", "one row a patient")
        said = line(Finding("F3", "error", f"{one[0]} twice in column {quoted(column)}", tuple(twice)))
        raise UserError(f"{path}: {said}; {one[1]} is needed")
    broken = [finding for finding in cells.findings if finding.severity == "error"]
    if broken:
        raise UserError(f"{path}: {line(broken[0])}")
    return cells, column, ids


def _table(path: Path, name: str, key: str, leave_out: Sequence[str], levels: Sequence[str], outcome: str) -> Table:
    cells, ids_column, ids = identified(path, key)
    findings = [Finding(f.code, f.severity, f"{name}: {f.message}", f.rows) for f in cells.findings]
    used = {c: raw for c, raw in cells.columns.items() if c not in {ids_column, outcome, *leave_out}}
    found = columns_of(used, cells.row, str(path), levels=levels)
    there = np.asarray(~np.isnan(found.values).all(axis=1))
    if not there.all():
        findings.append(Finding("F7", "warning", f"{name}: {counted(int((~there).sum()), 'row')} without any value"))
    values, features = _filled(found.values[there], found.features, name, findings)
    if not features:
        raise UserError(f"{path} has no column of numbers that differ between patients")
    kept = pl.Series(values=there.tolist(), dtype=pl.Boolean)
    about = _outcome(cells.columns[outcome], outcome, path)[there] if outcome in cells.columns else None
    names, rows = ids.filter(kept).to_list(), cells.row.filter(kept).to_list()
    return Table(name, names, rows, tuple(features), values, tuple(findings), about, tuple(cells.columns))


def _require_few(raw: pl.Series, column: str, asked: str) -> None:
    """A column of many words is more likely a name or an id, which must not be written out."""
    words, rows = raw.drop_nulls().n_unique(), len(raw) - raw.null_count()
    most = min(MOST_LEVELS, max(2, rows // 2))
    if means(column, "patient_id") or words > most:
        said = f"{counted(words, 'different word')} in {counted(rows, 'row')}"
        raise UserError(f"{asked} has {said}, as names have; it takes {most} at most")


def _outcome(raw: pl.Series, column: str, path: Path) -> Float64[np.ndarray, " n"]:
    """Numbers, or two words as 0 and 1."""
    numbers = numbers_of(raw)
    if numbers is None:
        words = raw.drop_nulls().unique().sort().to_list()
        if len(words) != 2:
            raise UserError(
                f"{path}: --outcome {column} has {len(words)} different words; it takes numbers or two words"
            )
        numbers = (raw == words[1]).cast(pl.Float64).fill_null(float("nan")).to_numpy().astype(np.float64)
    seen = numbers[~np.isnan(numbers)]
    if len(seen) < LEAST_OUTCOMES:
        raise UserError(f"{path}: {counted(len(seen), 'patient')} with --outcome {column}; {LEAST_OUTCOMES} are needed")
    if np.abs(seen).max() > LARGEST or seen.min() == seen.max():
        raise UserError(f"{path}: --outcome {column} is infinite or beyond 1e100 somewhere, or the same everywhere")
    return numbers


def _id_column(columns: list[str], key: str, path: Path, words: Words) -> str:
    if key:
        if key not in columns:
            raise UserError(f"--key {key} is no column of {path}{suggestion(key, columns)}")
        return key
    found = [column for column in columns if means(column, "patient_id") or column.casefold() in {"id", ""}]
    if len(found) != 1:
        what = f"{len(found)} columns that could be patient ids" if found else "no column of patient ids"
        raise UserError(f"{path} has {what}; {words.key}; columns: {listed([quoted(c) for c in columns], 8)}")
    return found[0]


def known(raw: pl.Series) -> pl.Series:
    """Without the words that say that there is nothing."""
    return raw.set(raw.str.to_lowercase().is_in(list(MISSING_WORDS)).fill_null(value=False), None)


def numbers_of(raw: pl.Series) -> Float64[np.ndarray, " n"] | None:
    """Floats, NaN where blank; None where a cell is text."""
    numbers, is_text = _numbers([raw], len(raw))
    return None if is_text[0] else numbers[0]


def _numbers(columns: Sequence[pl.Series], n: int) -> tuple[Float64[np.ndarray, "k n"], Bool[np.ndarray, " k"]]:
    """Floats, NaN where blank or text, and which columns have a cell of text; one pass for all of them."""
    if not columns or not n:
        return np.zeros((len(columns), n)), np.zeros(len(columns), dtype=bool)
    text = known(pl.concat([column.alias("") for column in columns]))
    numbers = text.cast(pl.Float64, strict=False)
    odd = (numbers.is_null() & text.is_not_null()).to_numpy().reshape(-1, n)
    return numbers.fill_null(float("nan")).to_numpy().astype(np.float64).reshape(-1, n), np.asarray(odd.any(axis=1))


def _filled(
    values: Float64[np.ndarray, "n d"], features: Sequence[str], name: str, findings: list[Finding]
) -> tuple[Float64[np.ndarray, "n k"], list[str]]:
    """Without columns that say nothing; blanks become the mean of their column."""
    missing = np.isnan(values)
    with np.errstate(invalid="ignore"):
        seen = np.where(missing, 0.0, values)
        count = np.maximum((~missing).sum(axis=0), 1)
        mean = seen.sum(axis=0) / count
        spread = np.where(missing, 0.0, np.abs(values - mean)).max(axis=0, initial=0.0)
    kept = spread > 1e-12 * np.maximum(np.abs(mean), 1e-300)
    constant = [quoted(feature) for feature, keep in zip(features, kept, strict=True) if not keep]
    if constant:
        what = f"{name}: {counted(len(constant), 'column')} with the same value everywhere: {listed(constant)}"
        findings.append(Finding("F5", "left out", what))
    if missing[:, kept].any():
        blanks, columns = int(missing[:, kept].sum()), int(missing[:, kept].any(axis=0).sum())
        what = f"{name}: {counted(blanks, 'blank cell')} in {counted(columns, 'column')} filled with the column's mean"
        findings.append(Finding("F6", "warning", what))
    return np.where(missing, mean, values)[:, kept], [f for f, keep in zip(features, kept, strict=True) if keep]

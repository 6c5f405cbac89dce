"""The cells that say what a row is for: split, frame and patient. What cannot be read is a finding, never a guess."""

from __future__ import annotations

import polars as pl

from kladi.data.findings import Finding, counted, listed, quoted
from kladi.data.rows.table_files import BLANKS
from kladi.errors import suggestion
from kladi.structure.synonyms import UNKNOWN

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Word of a split column, in any case -> what it means."""


def splits(cell: pl.Series, row: pl.Series) -> tuple[pl.Series, dict[str, str], list[Finding]]:
    """(train, val, test or null; meaning -> other words used for it; findings) of a split column."""
    words = [word for word in cell.drop_nulls().unique().sort() if word.casefold() in SPLITS]
    wrong = [word for word in cell.drop_nulls().unique().sort() if word.casefold() not in SPLITS]
    split = cell.replace_strict(words, [SPLITS[w.casefold()] for w in words], default=None, return_dtype=pl.String)
    said: dict[str, str] = {}
    for word in words:
        meaning = SPLITS[word.casefold()]
        if word != meaning:
            said[meaning] = f"{said[meaning]}, {word}" if meaning in said else word
    found = []
    for word in wrong[:20]:
        rows = tuple(row.filter(cell == word).to_list())
        found.append(Finding("M19", "error", f"split {quoted(word)}{suggestion(word, SPLITS)}", rows))
    if len(wrong) > 20:
        rows = tuple(row.filter(cell.is_in(wrong[20:])).to_list())
        found.append(Finding("M19", "error", f"{counted(len(wrong) - 20, 'more word')} in split", rows))
    blank = cell.is_null()
    if blank.any() and not blank.all():
        rows = tuple(row.filter(blank).to_list())
        found.append(Finding("M19", "warning", f"{counted(len(rows), 'row')} without a split: taken as train", rows))
    return split, said, found


def frames(cell: pl.Series, row: pl.Series) -> tuple[pl.Series, list[Finding]]:
    """Frame numbers from 0, -1 for the whole file, which blank means too."""
    number = cell.str.replace(r"\.0+$", "").cast(pl.Int64, strict=False)
    wrong = cell.is_not_null() & (number.is_null() | (number < -1))
    found = []
    if wrong.any():
        rows = tuple(row.filter(wrong).to_list())
        words = listed([quoted(word) for word in cell.filter(wrong).unique().sort()])
        message = f"a frame is a whole number from 0, or blank for the whole file; not {words}"
        found.append(Finding("I11", "error", message, rows))
    return number.set(wrong.fill_null(value=True), -1).fill_null(-1), found


def patients(cell: pl.Series, row: pl.Series) -> tuple[pl.Series, list[Finding]]:
    """Patient ids without padding; a token that says "unknown" names nobody, so such rows never become one patient."""
    trimmed = cell.str.strip_chars(BLANKS + "\0")
    token = trimmed.str.to_lowercase().is_in(sorted(UNKNOWN))
    said = token & (trimmed != "")
    found = []
    if said.any():
        rows = tuple(row.filter(said).to_list())
        words = listed([quoted(word) for word in trimmed.filter(said).unique().sort()])
        message = f"{counted(len(rows), 'row')} with patient id {words}: taken as blank"
        found.append(Finding("M17", "warning", message, rows))
    return trimmed.set(token, None), found

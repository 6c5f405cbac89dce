"""Rows that name one picture more than once: the same row again is dropped, a contradiction is an error."""

from __future__ import annotations

import polars as pl

from kladi.data.findings import Finding, counted

ROLE_WORDS = {"label": "labels", "patient": "patients", "split": "splits"}


def drop_repeats(table: pl.DataFrame) -> tuple[pl.DataFrame, list[Finding]]:
    """The table with one row for each (path, frame), and what was found.

    Identical rows: the first is kept, with a warning. Two labels, patients or splits for one picture: an error that
    lists the rows. Rows that differ in other columns only: the first is kept, with a warning.
    """
    key = ["path", "frame"]
    again = table.select(pl.struct(key).is_duplicated()).to_series() & table["path"].is_not_null()
    if not again.any():
        return table, []
    repeated = table.filter(again)
    found = []
    for role, word in ROLE_WORDS.items():
        torn = repeated.filter(pl.col(role).n_unique().over(key) > 1)
        if torn.height:
            pictures = torn.select(pl.struct(key).n_unique()).item()
            advice = "; several labels belong in one cell (a|b)" if role == "label" else ""
            what = f"{counted(pictures, 'picture')} with two {word}{advice}"
            found.append(Finding("M4", "error", what, tuple(torn["row"].to_list())))
    others = [name for name in table.columns if name != "row"]
    first = pl.struct(others).is_first_distinct()
    same, rest = repeated.filter(~first), repeated.filter(first)
    if same.height:
        what = f"{counted(same.height, 'identical row')} dropped, the first of each kept"
        found.append(Finding("M3", "warning", what, tuple(same["row"].to_list())))
    later = rest.filter(~pl.struct(key).is_first_distinct())
    contradicted = {row for finding in found if finding.severity == "error" for row in finding.rows}
    odd = [row for row in later["row"].to_list() if row not in contradicted]
    if odd:
        what = f"{counted(len(odd), 'row')} dropped that name a picture again with other metadata; the first is kept"
        found.append(Finding("M3", "warning", what, tuple(odd)))
    first_of_each = table.select(pl.struct(key).is_first_distinct()).to_series() | table["path"].is_null()
    return table.filter(first_of_each), found

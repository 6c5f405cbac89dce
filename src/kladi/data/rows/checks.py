"""What the columns of a manifest say together, before any picture is opened: splits, patients, labels against the tree.

Each check is a function of the manifest that returns findings; `check` runs them all, so that a user mends everything
in one go. Splits and labels of rows whose file is missing are checked too; only rows with a file are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from kladi import config as settings
from kladi.data.findings import SHOWN, Finding, Severity, counted, listed, quoted
from kladi.data.rows.labels import parts, prefixes
from kladi.data.rows.manifest import Manifest
from kladi.structure.taxonomy import Taxonomy

FEWEST_PATIENTS = 3
"""A class with fewer cannot stand in train, val and test."""
PLACEHOLDER_SHARE = 0.5
"""One patient id on a larger share of the rows than this is likely no patient."""
LEADING_ZEROS = r"(^|[^0-9.,])0+([0-9])"


def check(
    manifest: Manifest,
    data: settings.Data,
    taxonomy: Taxonomy | None = None,
    *,
    supervised: bool = False,
    folds: int = 0,
) -> tuple[Finding, ...]:
    """Everything that can be said about a manifest without pixels.

    Args:
        manifest: its own findings are not repeated.
        data: `taxonomy` (named in messages; without a file the labels themselves are the tree) and `allow_leak`.
        taxonomy: the tree that labels must be nodes of.
        supervised: whether the objective needs labels: then none, or a single class, is an error.
        folds: of the evaluation; fewer patients lower it, which is said. 0: nothing is said.
    """
    every = _rows_of(manifest.table, manifest.set_aside)
    present = _rows_of(manifest.table)
    tree = taxonomy if data.taxonomy else None  # a tree made of the labels holds every label
    return (
        *splits(every, allow_leak=data.allow_leak),
        *patients(present, folds=folds),
        *labels(every, tree, Path(data.taxonomy).name),
        *classes(present, supervised=supervised),
    )


def _rows_of(*tables: pl.DataFrame) -> pl.DataFrame:
    rows = pl.concat([table.select("row", "label", "patient", "split") for table in tables])
    return rows.unique("row", keep="first", maintain_order=True).sort("row")  # frames of one file are one row here


def splits(rows: pl.DataFrame, *, allow_leak: bool = False) -> list[Finding]:
    """M16: a patient in two splits. The first rows of the finding are pairs, one row in each split."""
    known = rows.drop_nulls(["patient", "split"])
    torn = known.filter(pl.col("split").n_unique().over("patient") > 1)
    if not torn.height:
        return []
    between = torn.group_by("patient").agg(pl.col("split").unique().sort(), pl.col("row").min().alias("first"))
    pairs = Counter(" and ".join(names) for names in between.sort("first")["split"].to_list())
    where = ", ".join(f"{count:,} in {names}" if len(pairs) > 1 else f"in {names}" for names, count in pairs.items())
    evidence = torn.unique(["patient", "split"], keep="first", maintain_order=True)
    evidence = evidence.join(between.select("patient", "first"), on="patient").sort("first", "row")
    ordered = dict.fromkeys([*evidence["row"].to_list(), *torn["row"].to_list()])
    severity: Severity = "warning" if allow_leak else "error"
    what = f"{counted(between.height, 'patient')} in two splits ({where})"
    mend = "" if allow_leak else "; move the rows, or remove the column split"
    return [Finding("M16", severity, what + mend, tuple(ordered))]


def patients(rows: pl.DataFrame, *, folds: int = 0) -> list[Finding]:
    """M17 (blank ids), M18 (fewer patients than folds), M9 and M10 (ids that differ in zeros or case only)."""
    if not rows.height:
        return []
    patient = rows["patient"]
    found: list[Finding] = []
    blank = patient.is_null()
    if blank.all():
        what = "no patient ids (column patient_id): images of one patient cannot be kept together"
        found.append(Finding("M17", "warning", what))
    elif blank.any():
        what = f"{counted(int(blank.sum()), 'row')} without a patient id: each is a patient of its own"
        found.append(Finding("M17", "warning", what, tuple(rows["row"].filter(blank).to_list())))
    counts = rows.drop_nulls("patient").group_by("patient").len().sort("len", descending=True)
    if counts.height and rows.height >= 20 and counts["len"][0] > PLACEHOLDER_SHARE * rows.height:
        share = counts["len"][0] / rows.height
        what = f"one patient id stands on {share:.0%} of the rows; leave it blank if it is a placeholder"
        found.append(Finding("M17", "warning", what))
    found += _alike(rows.drop_nulls("patient"), "patient", pl.col("patient").str.to_lowercase(), "M10", "case only")
    zeros = pl.col("patient").str.replace_all(LEADING_ZEROS, "${1}${2}")
    found += _alike(rows.drop_nulls("patient"), "patient", zeros, "M9", "leading zeros only")
    groups = counts.height + int(blank.sum())
    if 0 < groups < folds:
        mend = f"{groups} folds, not {folds}" if groups >= FEWEST_PATIENTS else "too few for folds"
        found.append(Finding("M18", "warning", f"{counted(groups, 'patient')}: {mend}"))
    return found


def _alike(rows: pl.DataFrame, column: str, key: pl.Expr, code: str, what: str) -> list[Finding]:
    """Values that become equal by `key`; ids of people are counted, not shown."""
    spelt = rows.with_columns(key=key).filter(pl.col(column).n_unique().over("key") > 1)
    if not spelt.height:
        return []
    number = spelt[column].n_unique()
    return [Finding(code, "warning", f"{number:,} {column} ids differ in {what}", tuple(spelt["row"].to_list()))]


def labels(rows: pl.DataFrame, tree: Taxonomy | None, file: str) -> list[Finding]:
    """T5 (not in the tree), several labels in a cell, M10 (differ in case), M9 (differ in leading zeros)."""
    labelled = rows.drop_nulls("label")
    names = labelled["label"].unique().sort().to_list()
    several = [name for name in names if len(parts(name)) > 1 and not (tree is not None and name in tree)]
    found = []
    if several:
        what = (
            f"several labels in one cell ({listed([quoted(name) for name in several])}); a label tree takes one: "
            "keep the finest, or give the column another name and ask for it with --data.metadata"
        )
        found.append(Finding("M4", "error", what, _rows(labelled, several)))
    single = [name for name in names if name not in set(several)]
    if tree is not None:
        unknown = [name for name in single if name not in tree]
        found += _not_in_tree(labelled, unknown, tree, file)
        single = unknown  # spellings that the tree itself tells apart are no twins
    found += _case_twins(labelled, single)
    found += _zero_twins(labelled, single)
    return found


def _not_in_tree(labelled: pl.DataFrame, unknown: list[str], tree: Taxonomy, file: str) -> list[Finding]:
    often = labelled.filter(pl.col("label").is_in(unknown)).group_by("label").len()
    by_count = [name for name, _ in sorted(often.iter_rows(), key=lambda entry: (-entry[1], entry[0]))]
    found = []
    for name in by_count[:SHOWN]:
        near = ", ".join(quoted(node) for node in tree.closest(name))
        what = f"label {quoted(name)} is not in {file}" + (f"; closest: {near}" if near else "")
        found.append(Finding("T5", "error", what, _rows(labelled, [name])))
    rest = by_count[SHOWN:]
    if rest:
        what = f"{counted(len(rest), 'more label')} not in {file}"
        found.append(Finding("T5", "error", what, _rows(labelled, rest)))
    return found


def _case_twins(labelled: pl.DataFrame, names: Iterable[str]) -> list[Finding]:
    """Nodes, at any level, that differ in case only: one class would be learnt as two."""
    spelt: dict[str, dict[str, list[str]]] = {}
    for name in names:
        for node in prefixes(name):
            spelt.setdefault(node.casefold(), {}).setdefault(node.rpartition("/")[2], []).append(name)
    found = []
    for node, spellings in sorted(spelt.items()):
        if len(spellings) > 1:
            above = node.rpartition("/")[0]
            both = " and ".join(quoted(spelling) for spelling in sorted(spellings))
            where = f" below {quoted(above)}" if above else ""
            what = f"labels {both}{where} differ in case only; --data.fold_case true merges them"
            rows = _rows(labelled, [name for same in spellings.values() for name in same])
            found.append(Finding("M10", "error", what, rows))
    return _first(found)


def _zero_twins(labelled: pl.DataFrame, names: list[str]) -> list[Finding]:
    spelt = pl.DataFrame({"label": names}, schema={"label": pl.String}).with_columns(
        key=pl.col("label").str.replace_all(LEADING_ZEROS, "${1}${2}")
    )
    twins = spelt.group_by("key").agg(pl.col("label").sort()).filter(pl.col("label").list.len() > 1).sort("key")
    found = []
    for _, same in twins.iter_rows():
        both = " and ".join(quoted(name) for name in same[:4])
        what = f"labels {both} differ in leading zeros only: they stay {len(same)} labels"
        found.append(Finding("M9", "warning", what, _rows(labelled, same)))
    return _first(found)


def classes(rows: pl.DataFrame, *, supervised: bool = False) -> list[Finding]:
    """M13 (how many are labelled), M14 (one class), M15 (a class of one image or few patients)."""
    if not rows.height:
        return []
    labelled = rows.drop_nulls("label")
    severity: Severity = "error" if supervised else "warning"
    if not labelled.height:
        return [Finding("M13", "error", "no row has a label, and this objective needs them")] if supervised else []
    found = []
    if labelled.height < rows.height:
        what = f"{labelled.height:,} of {counted(rows.height, 'row')} have a label; the rest feeds terms without labels"
        found.append(Finding("M13", "warning", what))
    names = labelled["label"].unique().sort().to_list()
    if len(names) == 1:
        what = f"one class only ({quoted(names[0])}): nothing to tell apart by labels"
        return [*found, Finding("M14", severity, what)]
    return [*found, *_rare(labelled)]


def _rare(labelled: pl.DataFrame) -> list[Finding]:
    if labelled["patient"].null_count() == labelled.height:
        labelled = labelled.with_columns(patient=pl.col("row").cast(pl.String))
    # A blank id is a patient of its own.
    who = pl.col("patient").n_unique() - pl.col("patient").is_null().any() + pl.col("patient").null_count()
    sizes = labelled.group_by("label").agg(pl.len().alias("images"), who.cast(pl.Int64).alias("patients")).sort("label")
    found = []
    for name, images, people in sizes.filter(pl.col("patients") < FEWEST_PATIENTS).iter_rows():
        held = f"{counted(images, 'image')} of {counted(people, 'patient')}"
        what = f"label {quoted(name)} has {held}: too few to test on, scored at its parent or dropped by name"
        found.append(Finding("M15", "warning", what, _rows(labelled, [name])))
    return _first(found)


def _rows(labelled: pl.DataFrame, names: list[str]) -> tuple[int, ...]:
    return tuple(labelled.filter(pl.col("label").is_in(names))["row"].to_list())


def _first(found: list[Finding]) -> list[Finding]:
    """The first 20 of a kind, and one that counts the rest and holds its rows."""
    rest = found[SHOWN:]
    if not rest:
        return found
    rows = tuple(sorted({row for finding in rest for row in finding.rows}))
    more = Finding(rest[0].code, rest[0].severity, f"and {len(rest):,} more of this kind", rows)
    return [*found[:SHOWN], more]

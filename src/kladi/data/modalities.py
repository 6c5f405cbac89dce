"""Tables beside images -> modalities of the same rows: columns of the manifest, files of patients, ready embeddings.

A file that has a column of image paths is joined by image, one with patient ids by patient, `embeddings.npz` by the
content of the image. Ids and paths are compared and dropped. Scale and centre are those of the training rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Bool, Float32, Float64, Int, UInt64

from kladi import config as settings
from kladi.data.embeddings import Embeddings
from kladi.data.findings import Finding, counted, line, listed, quoted, visible
from kladi.data.patient_tables import Words, columns_of, identified, known, numbers_of, shape_of
from kladi.data.rows import columns
from kladi.data.rows.columns import means
from kladi.data.rows.manifest import ROLES
from kladi.data.rows.paths import locate
from kladi.data.rows.table_files import Cells
from kladi.errors import UserError, suggestion
from kladi.structure.lattice import MOST_MODALITIES

COVARIATES = "covariates"
"""Name of the modality that columns of the manifest make."""
SETTINGS = Words("--data.levels", "--data.leave_out", 'call it "patient_id", or "path" where rows are of images')
LEAST_ROWS = 10
"""Training images that a table must speak of."""
FARTHEST = 1e6
"""Deviations from the mean at most: what is held out may be anything."""


@dataclass(frozen=True)
class Beside:
    """A table as it was read, a row an image. values: float64[n, d], NaN where blank; a row of NaN: it is not in it."""

    name: str
    features: tuple[str, ...]
    values: Float64[np.ndarray, "n d"]

    @property
    def present(self) -> Bool[np.ndarray, " n"]:
        return np.asarray(~np.isnan(self.values).all(axis=1))


@dataclass(frozen=True)
class Modality:
    """A table as an objective reads it.

    features: of the table. values: float32[n, d], of mean 0 and variance 1 over the training rows that are in it; a
    blank cell is 0, and so is the row of an image that is not in it. present: bool[n], which are.
    """

    name: str
    features: tuple[str, ...]
    values: Float32[np.ndarray, "n d"]
    present: Bool[np.ndarray, " n"]


def read(
    table: pl.DataFrame, row_id: UInt64[np.ndarray, " n"], root: Path, data: settings.Data
) -> tuple[tuple[Beside, ...], list[Finding]]:
    """What `data.tables` and `data.covariates` name, for each row of a manifest's table; and what was found.

    Args:
        table, row_id: of the images, as `Manifest` and `Store` have them. root: of the manifest's paths.

    Raises:
        UserError: names file and column: two of one name, no ids, an id twice, text where numbers belong, infinities.
    """
    findings: list[Finding] = []
    every = [_covariates(table, data, findings)] if data.covariates else []
    paths = [Path(text) for text in data.tables]
    files = {path: identified(path, by_path=True, words=SETTINGS) for path in paths if not _is_embedded(path)}
    _require_known(data, {column for cells, _, _ in files.values() for column in cells.columns})
    for path in paths:
        file = files.get(path)
        found = _joined(path, file, table, root, data, findings) if file else _embedded(path, row_id)
        there = int(found.present.sum())
        if there < len(table):
            what = f"table {found.name}: {counted(there, 'row')} of {len(table):,} are in it"
            findings.append(Finding("F1", "warning", what))
        every.append(found)
    names = [one.name for one in every]
    twice = next((name for i, name in enumerate(names) if name in ("image", *names[:i])), None)
    if twice is not None:
        raise UserError(f'two modalities are called "{twice}"; rename one of the files')
    if len(every) >= MOST_MODALITIES:
        raise UserError(f"--data.tables: {len(every)} tables beside the image; {MOST_MODALITIES - 1} at most")
    return tuple(every), findings


def _is_embedded(path: Path) -> bool:
    return path.suffix.lower() == ".npz"


def _name(path: Path) -> str:
    """What a modality is called: its file; of an embeddings.npz, which all are called, its folder."""
    name = visible(path.stem)
    if name == "embeddings" and path.absolute().parent.name:
        name = visible(path.absolute().parent.name)
    if "+" in name:
        raise UserError(f'table "{name}": a "+" in its name would stand for two modalities; rename the file')
    return name


def _require_known(data: settings.Data, columns: set[str]) -> None:
    for option, asked in (("levels", data.levels), ("leave_out", data.leave_out)):
        unknown = [name for name in asked if name not in columns | set(data.covariates)]
        if unknown:
            what = f"--data.{option} {unknown[0]} is no column of the files that --data.tables names"
            raise UserError(f"{what}{suggestion(unknown[0], sorted(columns))}")


def standardised(every: Sequence[Beside], train: Bool[np.ndarray, " n"]) -> tuple[Modality, ...]:
    """By mean and deviation of the training rows, without the columns that are the same in all of these.

    Raises:
        UserError: a table that too few training rows are in, or in which nothing differs between them.
    """
    return tuple(_standardised(one, train) for one in every)


def _standardised(one: Beside, train: Bool[np.ndarray, " n"]) -> Modality:
    present = one.present
    seen = one.values[present & train]
    if len(seen) < LEAST_ROWS:
        raise UserError(
            f"table {one.name}: {counted(len(seen), 'training image')} of {int(train.sum()):,} have a row in it; "
            f"{LEAST_ROWS} are needed"
        )
    blank = np.isnan(seen)
    count = np.maximum((~blank).sum(axis=0), 1)
    mean = np.where(blank, 0.0, seen).sum(axis=0) / count
    deviation = np.sqrt(np.square(np.where(blank, 0.0, seen - mean)).sum(axis=0) / count)
    kept = deviation > 1e-12 * np.maximum(np.abs(mean), 1e-150)
    if not kept.any():
        raise UserError(f"table {one.name}: no column differs between training images: {listed(one.features)}")
    values = np.clip((one.values[:, kept] - mean[kept]) / deviation[kept], -FARTHEST, FARTHEST)
    features = tuple(feature for feature, keep in zip(one.features, kept, strict=True) if keep)
    return Modality(one.name, features, np.nan_to_num(values, nan=0.0).astype(np.float32), present)


def _covariates(table: pl.DataFrame, data: settings.Data, findings: list[Finding]) -> Beside:
    """Columns of the manifest: numbers as they are, words as a column of 0 and 1 each."""
    text = {name: table[name] for name in table.columns if name not in ROLES and table[name].dtype == pl.String}
    chosen: dict[str, pl.Series] = {}
    for name in data.covariates:
        role = _role(name)
        if role:
            raise UserError(f"--data.covariates {name} says the {role} of a row, and is no covariate")
        if name not in text:
            raise UserError(f"--data.covariates {name} is no column of the manifest{suggestion(name, list(text))}")
        chosen[name] = text[name]
    levels = [name for name, raw in chosen.items() if name in data.levels or _are_words(name, raw, table["row"])]
    words = replace(SETTINGS, levels="--data.covariates")
    found = columns_of(chosen, table["row"], "the manifest", levels=levels, words=words, spare=0)
    for name in levels:
        count = sum(feature.startswith(f"{name}=") for feature in found.features)
        findings.append(Finding("F9", "warning", f"covariate {quoted(name)}: {counted(count, 'word')}, a column each"))
    if not found.features:
        raise UserError(f"--data.covariates {','.join(data.covariates)}: each has one value only")
    return Beside(COVARIATES, found.features, found.values)


def _are_words(name: str, raw: pl.Series, row: pl.Series) -> bool:
    """Whether a column is of words; one of numbers with a few words in it is a mistake."""
    if numbers_of(raw) is not None:
        return False
    cells = known(raw)
    number = cells.str.replace(",", ".", literal=True).cast(pl.Float64, strict=False).is_not_null()
    odd = row.filter(cells.is_not_null() & (cells.cast(pl.Float64, strict=False).is_null())).to_list()
    if number.sum() * 2 >= len(cells) - cells.null_count():
        what = Finding("F4", "error", f"--data.covariates {name}: no number, where most cells are one", tuple(odd))
        raise UserError(f"{line(what)}; --data.levels {name} takes them as words")
    return True


def _role(column: str) -> str:
    """What a column of that name says of a row, where it says anything but a fact of the patient."""
    if column == "mask":
        return column
    return next((role for role in columns.ROLES if means(column, role)), "")


def _joined(
    path: Path,
    file: tuple[Cells, str, pl.Series],
    table: pl.DataFrame,
    root: Path,
    data: settings.Data,
    findings: list[Finding],
) -> Beside:
    """A file of patients or of images."""
    (cells, column, ids), name = file, _name(path)
    findings += [Finding(f.code, f.severity, f"table {name}: {f.message}", f.rows) for f in cells.findings]
    roles = [other for other in cells.columns if other != column and other not in data.leave_out and _role(other)]
    if roles:
        what = f"table {name}: {listed([quoted(r) for r in roles])} say who or what a row is, and are not used"
        findings.append(Finding("F8", "warning", what))
    unused = {column, *roles, *data.leave_out}
    used = {other: raw for other, raw in cells.columns.items() if other not in unused}
    levels = [level for level in data.levels if level in used]
    found = columns_of(used, cells.row, str(path), levels=levels, words=SETTINGS, spare=0)
    if not found.features:
        raise UserError(f"{path}: no column is left to use")
    of_images = means(column, "path")
    ids = locate(root, ids, allow_outside=True).path if of_images else ids
    place = {one: i for i, one in enumerate(ids.to_list())}
    whose = (table["path"] if of_images else table["patient"]).to_list()
    values = _placed(found.values, np.array([-1 if one is None else place.get(one, -1) for one in whose]))
    if np.isnan(values).all():
        whose = table["patient"].drop_nulls()
        like = "" if of_images or not len(whose) else f"; ids look like {shape_of(ids[0])} and {shape_of(whose[0])}"
        what = "image" if of_images else "patient"
        raise UserError(f"{path}: no {what} of DATA has a value by its column {quoted(column)}{like}")
    blank = int(np.isnan(found.values).sum())
    if blank:
        what = f"table {name}: {counted(blank, 'blank cell')} stand at the mean of their column"
        findings.append(Finding("F6", "warning", what))
    return Beside(name, found.features, values)


def _embedded(path: Path, row_id: UInt64[np.ndarray, " n"]) -> Beside:
    """What `kladi embed` has written of the same images, e.g. by another encoder."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name its embeddings.npz")
    found = Embeddings.read(path)
    bad = int((~np.isfinite(found.features).all(axis=1)).sum())
    if bad:
        raise UserError(f"{path}: {counted(bad, 'row')} with NaN or infinity")
    values = _placed(found.features.astype(np.float64), found.places(row_id))
    if np.isnan(values).all():
        raise UserError(f"{path}: no image of DATA is among its rows")
    return Beside(_name(path), tuple(f"feature {i}" for i in range(values.shape[1])), values)


def _placed(values: Float64[np.ndarray, "k d"], at: Int[np.ndarray, " n"]) -> Float64[np.ndarray, "n d"]:
    """Rows of a file, a row an image; NaN where `at` is -1."""
    return np.where((at >= 0)[:, None], values[at], np.nan)

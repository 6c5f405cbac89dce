"""Tables beside images -> modalities of the same rows: columns of the manifest, files of patients, ready embeddings.

A file that has a column of image paths is joined by image, one with patient ids by patient, `embeddings.npz` by the
content of the image. Ids and paths are compared and dropped. Scale and centre are those of the training rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float32, Float64, UInt64

from kladi import config as settings
from kladi.data.embeddings import Embeddings
from kladi.data.findings import Finding, counted, listed, quoted
from kladi.data.patient_tables import columns_of, identified, numbers_of
from kladi.data.rows.columns import means
from kladi.data.rows.manifest import ROLES
from kladi.errors import UserError, suggestion
from kladi.structure.lattice import MOST_MODALITIES

COVARIATES = "covariates"
"""Name of the modality that columns of the manifest make."""
LEAST_ROWS = 10
"""Training images that a table must speak of."""


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
    table: pl.DataFrame, row_id: UInt64[np.ndarray, " n"], data: settings.Data
) -> tuple[tuple[Beside, ...], list[Finding]]:
    """What `data.tables` and `data.covariates` name, for each row of a manifest's table; and what was found.

    Args:
        table, row_id: of the images, as `Manifest` and `Store` have them.

    Raises:
        UserError: names file and column: two of one name, no ids, an id twice, text where numbers belong, infinities.
    """
    every = [_covariates(table, data)] if data.covariates else []
    findings: list[Finding] = []
    columns: set[str] = set()
    for text in data.tables:
        path = Path(text)
        found = _embedded(path, row_id) if path.suffix.lower() == ".npz" else _joined(path, table, data, columns)
        known = int(found.present.sum())
        if known < len(table):
            what = f"table {found.name}: {counted(known, 'row')} of {len(table):,} are in it"
            findings.append(Finding("F1", "warning", what))
        every.append(found)
    for option, asked in (("levels", data.levels), ("leave_out", data.leave_out)):
        unknown = [name for name in asked if name not in columns]
        if unknown:
            what = f"--data.{option} {unknown[0]} is no column of the files that --data.tables names"
            raise UserError(f"{what}{suggestion(unknown[0], sorted(columns))}")
    names = [one.name for one in every]
    twice = next((name for i, name in enumerate(names) if name in ("image", *names[:i])), None)
    if twice is not None:
        raise UserError(f'two modalities are called "{twice}"; rename one of the files')
    if len(every) >= MOST_MODALITIES:
        raise UserError(f"--data.tables: {len(every)} tables beside the image; {MOST_MODALITIES - 1} at most")
    return tuple(every), findings


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
    values = (one.values[:, kept] - mean[kept]) / deviation[kept]
    features = tuple(feature for feature, keep in zip(one.features, kept, strict=True) if keep)
    return Modality(one.name, features, np.nan_to_num(values, nan=0.0).astype(np.float32), present)


def _covariates(table: pl.DataFrame, data: settings.Data) -> Beside:
    """Columns of the manifest: numbers as they are, words as a column of 0 and 1 each."""
    known = {name: table[name] for name in table.columns if name not in ROLES and table[name].dtype == pl.String}
    chosen: dict[str, pl.Series] = {}
    for name in data.covariates:
        if name not in known:
            role = next((r for r in ("label", "patient_id", "path", "split") if name == r or means(name, r)), "")
            what = f"says the {role} of a row, and is no covariate" if role else "is no column of the manifest"
            raise UserError(f"--data.covariates {name} {what}{'' if role else suggestion(name, list(known))}")
        chosen[name] = known[name]
    levels = [name for name, raw in chosen.items() if numbers_of(raw) is None]
    found = columns_of(chosen, table["row"], "the manifest", levels=levels, prefix="--data.")
    if not found.features:
        raise UserError(f"--data.covariates {','.join(data.covariates)}: each has one value only")
    return Beside(COVARIATES, found.features, found.values)


def _joined(path: Path, table: pl.DataFrame, data: settings.Data, columns: set[str]) -> Beside:
    """A file of patients or of images; its columns are added to `columns`."""
    cells, column, ids = identified(path, by_path=True, prefix="--data.")
    columns |= set(cells.columns)
    used = {name: raw for name, raw in cells.columns.items() if name not in {column, *data.leave_out}}
    levels = [name for name in data.levels if name in used]
    found = columns_of(used, cells.row, str(path), levels=levels, prefix="--data.")
    whose = table["path"] if means(column, "path") else table["patient"]
    what = "image" if means(column, "path") else "patient"
    values = _placed(found.values, ids.to_list(), whose.to_list())
    _require_met(values, path, f"{what} of DATA is in its column {quoted(column)}")
    return Beside(path.stem, found.features, values)


def _embedded(path: Path, row_id: UInt64[np.ndarray, " n"]) -> Beside:
    """What `kladi embed` has written of the same images, e.g. by another encoder."""
    found = Embeddings.read(path)
    bad = int((~np.isfinite(found.features).all(axis=1)).sum())
    if bad:
        raise UserError(f"{path}: {counted(bad, 'row')} with NaN or infinity")
    values = _placed(found.features.astype(np.float64), found.row_id.tolist(), row_id.tolist())
    _require_met(values, path, "image of DATA is among its rows")
    return Beside(path.stem, tuple(f"feature {i}" for i in range(values.shape[1])), values)


def _placed(values: Float64[np.ndarray, "k d"], ids: list[Any], whose: list[Any]) -> Float64[np.ndarray, "n d"]:
    """Rows of a file, a row an image; NaN where the file has none."""
    place = {one: i for i, one in enumerate(ids)}
    at = np.array([-1 if one is None else place.get(one, -1) for one in whose], dtype=np.int64)
    return np.where((at >= 0)[:, None], values[at], np.nan)


def _require_met(values: Float64[np.ndarray, "n d"], path: Path, what: str) -> None:
    if np.isnan(values).all():
        raise UserError(f"{path}: no {what}")

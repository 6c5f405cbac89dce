"""DATA as a user names it -> `Dataset`: read, check, decode once, join. Faults are collected before any is raised."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Int, UInt64
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from kladi import config as settings
from kladi.data import masks, modalities
from kladi.data.dataset import HELD_OUT, TEST, TRAIN, VAL, Dataset
from kladi.data.decoded import store
from kladi.data.decoded.store import Store
from kladi.data.findings import Finding, line, merged
from kladi.data.modalities import Beside
from kladi.data.pixels.masks import Mask
from kladi.data.rows import checks, manifest, sample
from kladi.data.rows.labels import file_tree
from kladi.data.rows.manifest import ROLES, Manifest
from kladi.data.views import philox
from kladi.errors import UserError
from kladi.sections import WITH_LABELS
from kladi.structure.labelset import LabelSets
from kladi.structure.synonyms import read as read_synonyms
from kladi.structure.taxonomy import Taxonomy

SHOWN_ERRORS = 3
"""Errors that a command other than `check` lists: a mistake is three lines at most."""
SHOWN_COLUMNS = ("modality", "anatomy", "laterality", "view", "device", "site", "source")
"""Columns that a report may colour by: facts of the acquisition, never free text about a person."""


@dataclass(frozen=True)
class Inspection:
    """All that was found out about DATA. `findings` come in the order manifest, taxonomy, pixels, tables, joined rows.

    tables: those beside the images, a row an image of the store.
    masks: of each image of the store, where they were asked for.
    """

    manifest: Manifest
    taxonomy: Taxonomy | None
    store: Store | None
    findings: tuple[Finding, ...]
    tables: tuple[Beside, ...] = ()
    masks: tuple[Mask | None, ...] = ()

    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]


def load(data: str | Path, config: settings.Config) -> tuple[Dataset, Inspection]:
    """The joined data set, and what was found on the way.

    Raises:
        UserError: the data cannot be trained on; the message lists every error.
    """
    inspection = inspect(data, config)
    errors = inspection.errors()
    if errors:
        more = (
            [f"and {len(errors) - SHOWN_ERRORS} more; kladi check lists them all"] if len(errors) > SHOWN_ERRORS else []
        )
        raise UserError("\n".join([line(finding) for finding in errors[:SHOWN_ERRORS]] + more))
    return join(inspection, config), inspection


def inspect(data: str | Path, config: settings.Config) -> Inspection:
    """Read the manifest, check it, decode every image into the store; collect the faults instead of raising them."""
    rows = sample.at_most(manifest.read(data, config.data), config.data.most_per_label, config.train.seed)
    taxonomy, tree_findings = _taxonomy(rows, config.data)
    supervised = config.objective.name in WITH_LABELS
    findings = [*rows.findings, *tree_findings, *checks.check(rows, config.data, taxonomy, supervised=supervised)]
    built, pixel_findings = store.build(
        [rows.root / path for path in rows.table["path"]],
        rows.table["frame"].to_list(),
        config.intensity,
        store_folder(config.data),
        rows=rows.table["row"].to_list(),
        config=config.data,
    )
    findings += pixel_findings
    found_masks: tuple[Mask | None, ...] = ()
    if config.topology.region == "mask":
        found_masks, said_of_masks = masks.read(rows, built, config.data)
        findings += said_of_masks
    left_out = {row for f in findings if f.severity == "left out" for row in f.rows}
    asked = len({*rows.table["row"].to_list(), *left_out})
    if asked and len(left_out) / asked > config.data.max_left_out:
        message = (
            f"{len(left_out):,} of {asked:,} images cannot be read ({len(left_out) / asked:.0%}), "
            f"more than --data.max_left_out {config.data.max_left_out}"
        )
        findings.append(Finding("M5", "error", message, tuple(sorted(left_out))))
    findings = merged(findings)  # a header is read twice, for its tags and for its pixels
    tables: tuple[Beside, ...] = ()
    if built is not None and len(built):
        try:
            tables, said = modalities.read(rows.table[built.source.tolist()], built.row_id, rows.root, config.data)
        except UserError as error:  # listed with all other faults
            said = [Finding("F0", "error", str(error))]
        findings += said
    inspection = Inspection(rows, taxonomy, built, tuple(findings), tables, found_masks)
    if not inspection.errors():
        findings += _leaks(join(inspection, config), config.data)
    return Inspection(rows, taxonomy, built, tuple(findings), tables, found_masks)


def join(inspection: Inspection, config: settings.Config) -> Dataset:
    """Manifest rows that have pixels, as integers: the border behind which no text travels."""
    pixels, taxonomy = inspection.store, inspection.taxonomy
    if pixels is None or len(pixels) == 0:
        raise UserError("no image could be read")
    table = inspection.manifest.table[pixels.source.tolist()]
    names = tuple(dict.fromkeys(inspection.manifest.metadata))
    patients = table["patient"]
    group = patient_groups(patients, pixels.pixel_digest)
    target = _targets(table["label"], taxonomy)
    split = _splits(table["split"], group, target, pixels.row_id, config.data.held_out, config.train.seed)
    return Dataset(
        store=pixels,
        row_id=pixels.row_id,
        manifest_row=table["row"].to_numpy().astype(np.int64),
        group=group,
        split=split,
        taxonomy=taxonomy,
        target=target,
        label_sets=_label_sets(table.select(names), config.data),
        columns=_columns(table, (*names, *config.data.keep)),
        has_patients=patients.null_count() < len(patients),
        masks=inspection.masks,
        modalities=modalities.standardised(inspection.tables, split == TRAIN),
    )


def store_folder(data: settings.Data) -> Path:
    """Where decoded pixels are kept: `data.store`, else the user's cache folder. Never beside the data."""
    if data.store:
        return Path(data.store)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kladi" / "store"


def patient_groups(patients: pl.Series, pixel_digest: UInt64[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Connected components of "same patient" and "same decoded pixels", as 0..G-1 in order of first appearance.

    A blank patient id joins nothing by itself: such a row is its own group unless its pixels occur elsewhere.
    """
    n = len(patients)
    rows = np.arange(n)
    known = np.flatnonzero(patients.is_not_null().to_numpy())
    codes = np.unique(patients.gather(known).to_numpy().astype(str), return_inverse=True)[1] if len(known) else known
    pixels = np.unique(pixel_digest, return_inverse=True)[1]
    # A bipartite graph: rows on one side, patients and pixel digests on the other.
    left = np.concatenate([known, rows])
    right = np.concatenate([n + codes, n + n + pixels])
    graph = coo_matrix((np.ones(len(left), dtype=bool), (left, right)), shape=(3 * n, 3 * n))
    component = connected_components(graph, directed=False)[1][:n]
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


def _taxonomy(rows: Manifest, data: settings.Data) -> tuple[Taxonomy | None, list[Finding]]:
    """The tree of the file, else the one that the labels' slash paths spell."""
    tree = file_tree(data)
    if tree is None:
        labels = rows.table["label"].drop_nulls().unique().sort().to_list()
        if not labels:
            return None, []
        tree = Taxonomy.from_paths(labels)
    return tree, [Finding("T2", "warning", text, ()) for text in tree.findings]


def _label_sets(columns: pl.DataFrame, data: settings.Data) -> LabelSets | None:
    """The metadata columns as label sets, by the user's synonyms and trees; None without columns."""
    if not columns.width:
        for key in ("metadata_trees", "synonyms"):
            if getattr(data, key):
                raise UserError(f"--data.{key} needs metadata: name its columns with --data.metadata a,b")
        return None
    return LabelSets.from_columns(
        {name: columns[name].to_list() for name in columns.columns},
        synonyms=read_synonyms(data.synonyms) if data.synonyms else None,
        taxonomies={name: Taxonomy.read(Path(str(file))) for name, file in data.metadata_trees.items()},
        unmapped=data.unmapped,
    )


def _targets(labels: pl.Series, taxonomy: Taxonomy | None) -> Int[np.ndarray, " n"]:
    target = np.full(len(labels), -1, dtype=np.int64)
    if taxonomy is not None:
        known = labels.is_not_null().to_numpy()
        names, inverse = np.unique(labels.drop_nulls().to_numpy().astype(str), return_inverse=True)
        target[known] = taxonomy.index([str(name) for name in names])[inverse] if len(names) else []
    return target


def _splits(
    split: pl.Series,
    group: Int[np.ndarray, " n"],
    target: Int[np.ndarray, " n"],
    row_id: UInt64[np.ndarray, " n"],
    held_out_share: float,
    seed: int,
) -> Int[np.ndarray, " n"]:
    """The manifest's split; where it has none at all, a share of the patients of each label is held out, by lot.

    A row without a split in a manifest that has them is a training row.
    """
    if split.null_count() < len(split):
        parts = {"train": TRAIN, "val": VAL, "test": TEST}
        return np.array([parts.get(name, TRAIN) for name in split], dtype=np.int64)
    # Each patient is drawn by its least row id, so that adding rows of others moves nobody.
    least = np.full(int(group.max()) + 1, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(least, group, row_id)
    drawn = philox.uniform(seed, "split", least, 0, 0, 0)
    order = np.argsort(drawn, kind="stable")
    # A patient stands for one of its labels, that of its least row: rare labels keep their share on both sides.
    label = np.full(len(least), -1, dtype=np.int64)
    stands = row_id == least[group]
    label[group[stands]] = target[stands]
    held_out = np.zeros(len(least), dtype=bool)
    for one in np.unique(label):
        of_label = order[label[order] == one]
        held_out[of_label[: round(held_out_share * len(of_label))]] = True
    return np.where(held_out[group], HELD_OUT, TRAIN).astype(np.int64)


def _columns(table: pl.DataFrame, asked: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    names = [n for n in dict.fromkeys([*asked, *SHOWN_COLUMNS]) if n in table.columns and n not in ROLES]
    return {name: tuple(table[name].fill_null("").to_list()) for name in names}


def _leaks(dataset: Dataset, data: settings.Data) -> list[Finding]:
    """Groups (patients, identical pixels) that stand in two splits."""
    least = np.full(int(dataset.group.max()) + 1, 9)
    most = np.full_like(least, -1)
    np.minimum.at(least, dataset.group, dataset.split)
    np.maximum.at(most, dataset.group, dataset.split)
    leaking = np.flatnonzero(least != most)
    if not len(leaking):
        return []
    rows = tuple(int(r) for r in np.sort(dataset.manifest_row[np.isin(dataset.group, leaking)]))
    severity = "warning" if data.allow_leak else "error"
    message = (
        f"{len(leaking)} patients or identical images stand in two splits; move the rows, or remove the column split"
    )
    return [Finding("M16", severity, message, rows)]

"""What `kladi check` says: the data in a few lines, then every finding with its rows."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kladi import config as settings
from kladi.data import masks
from kladi.data.dataset import PARTS, TRAIN, Dataset
from kladi.data.findings import Finding, counted, line, listed, visible
from kladi.data.load import Inspection, join
from kladi.data.rows.columns import ATTRIBUTES
from kladi.data.rows.manifest import ROLES, Manifest
from kladi.structure import coverage

Lines = Iterator[tuple[str, str]]
SHOWN = 20
"""Findings of one severity that are listed; the rest is counted."""
SHOWN_VALUES = 5
"""Values of an attribute that are named."""


def described(inspection: Inspection) -> str:
    """`UTF-8, comma, 12,480 rows`."""
    facts = [str(v) for k, v in inspection.manifest.described.items() if k in {"kind", "encoding", "dialect"} and v]
    return ", ".join([*facts, f"{inspection.manifest.table.height:,} rows"])


def lines(inspection: Inspection, config: settings.Config, seconds: float, **rules: Any) -> Lines:
    """The data in a few lines: columns, images, patients, splits, labels, structure; `rules` of `metadata_lines`."""
    manifest, store = inspection.manifest, inspection.store
    aliases = manifest.described.get("aliases") or {}
    named = [f"{role} <- {column}" for role, column in aliases.items()]
    metadata = [f"metadata <- {', '.join(manifest.metadata)}"] if manifest.metadata else []
    if named or metadata:
        yield "columns", "   ".join([*named, *metadata])
    used = {*ROLES, *manifest.metadata, *ATTRIBUTES, *config.data.covariates, *config.data.keep}
    used |= {masks.COLUMN} if inspection.masks else set()
    unused = [name for name in manifest.table.columns if name not in used]
    if unused:
        takes = "--data.metadata and --data.covariates take columns"
        yield "unused", f"{listed([visible(name) for name in unused], 8)} ({takes})"
    if store is None or len(store) == 0:
        yield "images", "none readable"
        return
    facts = [f"{count:,} {name}" for counts in store.facts.values() for name, count in counts.items()]
    rate = f"{seconds:.0f} s on {os.cpu_count()} cores"
    yield (
        "images",
        f"{len(store):,} readable, {rate}: {', '.join(facts)}" if facts else f"{len(store):,} readable, {rate}",
    )
    if inspection.masks:
        yield "masks", f"{sum(mask is not None for mask in inspection.masks):,} of {len(store):,} images"
    if not inspection.errors():
        dataset = join(inspection, config)
        yield from _joined(dataset)
        for one in dataset.modalities:
            known = f"{int(one.present.sum()):,} of {len(dataset):,} images"
            yield "table", f"{one.name}: {counted(len(one.features), 'column')}, {known}"
        yield from metadata_lines(dataset, config.train.batch, **rules)


def finding_lines(findings: Sequence[Finding], manifest: Manifest | None = None) -> Lines:
    """Skipped, left out, warnings (W1, W2, ...), errors (E1, E2, ...): each list headed by its name once.

    With the manifest, files that are left out are named: for the console only, as a path may carry a name.
    """
    for severity, name, letter in (
        ("skipped", "skipped", ""),
        ("left out", "left out", ""),
        ("warning", "warnings", "W"),
        ("error", "errors", "E"),
    ):
        chosen = [finding for finding in findings if finding.severity == severity]
        for i, finding in enumerate(chosen[:SHOWN]):
            number = f"{letter}{i + 1} " if letter else ""
            files = ""
            if manifest is not None and severity == "left out" and finding.rows:
                paths = [visible(path) for path in manifest.paths(finding.rows[:3]) if path]
                files = f" ({listed(paths, 3)})" if paths else ""
            yield (name if i == 0 else ""), number + line(finding) + files
        if len(chosen) > SHOWN:
            yield "", f"and {len(chosen) - SHOWN:,} more"


def notes(inspection: Inspection) -> dict[str, Any]:
    """What a run keeps of the findings: code, severity, words and row numbers; never a path."""
    kept = [f for f in inspection.findings if f.severity in {"left out", "skipped", "warning"}]
    return {"findings": [{"code": f.code, "severity": f.severity, "message": f.message, "rows": f.rows} for f in kept]}


def write_csv(findings: Iterable[Finding], path: Path) -> None:
    """Every finding and row, for a spreadsheet; a text that it would run as a formula gets a leading quote."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["severity", "code", "row", "message"])
    for finding in findings:
        message = f"'{finding.message}" if finding.message[:1] in "=+-@\t\r" else finding.message
        for row in dict.fromkeys(finding.rows) or ("",):  # frames of one file are one row
            writer.writerow([finding.severity, finding.code, row, message])
    path.write_text(out.getvalue(), encoding="utf-8")


def _joined(dataset: Dataset) -> Lines:
    sizes = np.bincount(dataset.group)
    if dataset.has_patients:
        yield "patients", f"{len(sizes):,}, with {sizes.min()}-{sizes.max()} images, median {int(np.median(sizes))}"
    else:
        yield "patients", f"no patient ids: {len(sizes):,} groups of identical images stand in for patients"
    parts = Counter(PARTS[s] for s in dataset.split.tolist())
    yield "splits", ", ".join(f"{name} {count:,}" for name, count in parts.items())
    if dataset.taxonomy is not None:
        yield "labels", _labels(dataset)


def _labels(dataset: Dataset) -> str:
    tree, labelled = dataset.taxonomy, dataset.target >= 0
    if tree is None or not labelled.any():
        return "none"
    nodes, counts = np.unique(dataset.target[labelled], return_counts=True)
    depths = tree.depth[nodes]
    rare = int(nodes[np.argmin(counts)])
    patients = len(np.unique(dataset.group[dataset.target == rare]))
    depth = f"depth {depths.min()}-{depths.max()}" if depths.min() != depths.max() else f"depth {depths.max()}"
    images = f"{counts.min()} image{'s' if counts.min() > 1 else ''} of {patients} patients"
    return (
        f"{labelled.sum():,} images ({labelled.mean():.0%}) on {len(nodes)} labels, {depth}; "
        f"rarest {visible(tree.names[rare])}, {images}"
    )


def metadata_lines(
    dataset: Dataset, batch: int, *, weights: Mapping[str, float] | None = None, threshold: float | None = None
) -> Lines:
    """What each attribute knows of the training rows, and whom the loss would draw together in a batch.

    Args:
        batch: images a step.
        weights, threshold: of the metadata loss; its own defaults where they are not given.
    """
    train = np.flatnonzero(dataset.split == TRAIN)
    if dataset.label_sets is None or not len(train):
        return
    batch = min(batch, len(train))
    sets = dataset.label_sets.weighted(weights or {}).take(train)
    found = coverage.of(sets, dataset.group[train], batch=batch, threshold=threshold)
    for attribute in found.attributes:
        yield "metadata", _attribute(attribute)
    if found.expected_positives is not None and found.positive_share is not None and found.own_view_only is not None:
        yield (
            "pairs",
            f"threshold {found.threshold:.3g}: an anchor has {found.expected_positives:.0f} positives "
            f"({found.positive_share:.0%}) in a batch of {batch:,}; {found.own_view_only:.1%} only their own view",
        )
    for text in found.findings:
        yield "note", text


def _attribute(found: coverage.AttributeCoverage) -> str:
    """`anatomy: 93% known; chest 812, brain 520, 10 more; 14 rows no synonym fits`."""
    values = [f"{visible(value)} {rows:,}" for value, rows in found.values[:SHOWN_VALUES]]
    more = len(found.values) - len(values) + found.hidden
    parts = [f"{found.name}: {found.known:.0%} known", ", ".join([*values, f"{more} more"] if more else values)]
    if found.unmapped_rows:
        shown = [f"{visible(text)} ({patients} patients)" for text, patients in found.unmapped[:SHOWN_VALUES]]
        parts.append(f"{found.unmapped_rows:,} rows no synonym fits{': ' if shown else ''}{', '.join(shown)}")
    return "; ".join(part for part in parts if part)

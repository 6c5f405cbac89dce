"""Rows that are DICOM files: their tags become cells, their frames become rows, what is no image is skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from kladi.data.findings import Finding, Severity
from kladi.data.rows.columns import ATTRIBUTES

if TYPE_CHECKING:
    from kladi.data.pixels.dicom_tags import Tags

MAYBE_DICOM = r"(?i)\.(dcm|dicom|dic|ima|\d+)$|(^|/)[^/.]+$"
"""Names that DICOM files go by: a usual suffix, the number that ends a UID, or no suffix at all."""


@dataclass(frozen=True)
class Tagged:
    """table: with one row a frame, without the files that give no row. rungs: attribute -> how many were read how."""

    table: pl.DataFrame
    findings: list[Finding]
    rungs: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass
class _Notes:
    """What was noticed, by sentence, with the rows."""

    rows: dict[tuple[str, Severity, str], list[int]] = field(default_factory=dict)
    rungs: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, code: str, severity: Severity, what: str, row: int) -> None:
        self.rows.setdefault((code, severity, what), []).append(row)

    def read(self, tags: Tags, row: int) -> None:
        for name, rung in tags.rungs.items():
            self.rungs.setdefault(name, Counter())[rung] += 1
        if tags.conflict:
            self.add("D12", "warning", "two tags name different anatomy, taken as unknown", row)
        if tags.patient_kind == "study":
            self.add("M17", "warning", "no patient id, the study stands in for the patient", row)
        for sentence in tags.warnings:
            self.add("D12", "warning", sentence, row)

    def findings(self) -> list[Finding]:
        order = ("left out", "skipped", "warning", "error")
        found = [Finding(code, severity, what, tuple(rows)) for (code, severity, what), rows in self.rows.items()]
        return sorted(found, key=lambda finding: order.index(finding.severity))


def add_tags(
    table: pl.DataFrame,
    dicom: Iterable[int],
    root: Path,
    frames: str,
    *,
    columns: Sequence[str] = ATTRIBUTES,
    patients: bool = True,
) -> Tagged:
    """Read the tags of the DICOM files among the rows.

    Args:
        table: columns row, path, frame, patient, ...
        dicom: positions of the rows that are DICOM by content.
        root: what the paths are relative to.
        frames: which frames of a file become rows; a row that names its frame stays as it is.
        columns: attributes to add as columns; null on rows that are not DICOM.
        patients: whether the tags' patient stands where the row has none.
    """
    from kladi.data.pixels.dicom_tags import Skipped, read_tags, select_frames  # loads pydicom: only where it is needed

    positions = set(dicom)
    number, path, given = table["row"].to_list(), table["path"].to_list(), table["frame"].to_list()
    source: list[int] = []
    frame: list[int] = []
    cells: dict[str, list[str | None]] = {name: [] for name in columns}
    patient: list[str | None] = []
    notes = _Notes()
    for position in range(table.height):
        tags = read_tags(root / path[position]) if position in positions else None
        if isinstance(tags, Skipped):
            notes.add(tags.code, "skipped" if tags.by_design else "left out", tags.reason, number[position])
            continue
        chosen = [given[position]]
        if tags is not None:
            if given[position] < 0 and tags.frames > 1:
                chosen = select_frames(tags.frames, frames)
            notes.read(tags, number[position])
        source += [position] * len(chosen)
        frame += chosen
        patient += [tags.patient if tags is not None else None] * len(chosen)
        for name in columns:
            cells[name] += [tags.attributes.get(name) if tags is not None else None] * len(chosen)
    expanded = table[source].with_columns(
        pl.Series("frame", frame, dtype=pl.Int64),
        *(pl.Series(name, values, dtype=pl.String) for name, values in cells.items()),
    )
    if patients:
        expanded = expanded.with_columns(pl.coalesce("patient", pl.Series("patient", patient, dtype=pl.String)))
    return Tagged(expanded, notes.findings(), {name: dict(counts) for name, counts in notes.rungs.items()})

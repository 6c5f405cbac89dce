"""What a run folder says of the encoder: how it was trained, on which rows, and whether it may be tested on these.

Everything is read from the files that training left; nothing that a file does not say is guessed, and what is unknown
is said to be unknown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32

from kladi.data.dataset import Dataset
from kladi.evaluate.readouts.regimes import OwnAnswers
from kladi.learn import journal, lineage, run_folder
from kladi.learn.lineage import Lineage
from kladi.losses import geometry as spaces
from kladi.models import backbones, heads
from kladi.sections import WITHOUT_LABELS, WITHOUT_STRUCTURE

MOST_POINTS = 2000
"""Points of the training curves that are kept."""
_NO_CURVE = frozenset({"images", "waited", "seconds", "idle", "at_stop"})
_NO_MONITOR = frozenset({"step", "epoch", "seconds", "waited", "lr", "images"})


@dataclass(frozen=True)
class Pretraining:
    """How the encoder came to be.

    objective: name of the preset or the user's own loss; "" where it is unknown.
    supervised: whether it read labels (anything but view-only and metadata objectives; unknown ones are taken to).
    reads_metadata: whether it read the metadata columns.
    space: where its head's embeddings live.
    seen: bool[n], rows of the data set that it was trained on, or whose patient it was; None where that is unknown.
    epochs, images_seen, seed: of its own training, None where unknown.
    before: what it began with; what that read and saw counts as read and seen.
    curves, monitors: from its journal.
    """

    objective: str = ""
    supervised: bool = True
    reads_metadata: bool = False
    space: spaces.Geometry = field(default_factory=lambda: spaces.named("sphere"))
    seen: Bool[np.ndarray, " n"] | None = None
    epochs: int | None = None
    images_seen: int | None = None
    seed: int | None = None
    before: Lineage = field(default_factory=Lineage)
    curves: tuple[Mapping[str, Any], ...] = ()
    monitors: tuple[Mapping[str, Any], ...] = ()

    def label_free_for(self, task: str) -> bool:
        """Whether what the task asks was hidden from training: labels, or the metadata column that stands in."""
        return not self.supervised and (task == "label" or not self.reads_metadata)


def of_run(run: Path, dataset: Dataset) -> Pretraining:
    """What a finished run says.

    Raises:
        UserError: the folder holds no finished encoder.
    """
    described = backbones.read_description(run)["kladi"]
    objective = described.get("objective") or {}
    name, args = str(objective.get("name", "")), dict(objective.get("args") or {})
    lines = journal.read(run / "metrics.jsonl")
    epochs = described.get("epochs")
    before = lineage.of_run(run)
    names = {name} | before.objectives
    return Pretraining(
        objective=name,
        supervised=bool(names - WITHOUT_LABELS),
        reads_metadata=bool(names - WITHOUT_STRUCTURE),
        space=_space(args),
        seen=seen_rows(run, dataset),
        epochs=round(epochs) if isinstance(epochs, int | float) else None,
        images_seen=lineage.images_seen(run),
        seed=described.get("seed"),
        before=before,
        curves=tuple(_curves(lines)),
        monitors=tuple(_monitors(lines)),
    )


def space_of(run: Path) -> spaces.Geometry:
    """Where a finished run's embeddings live; a curvature that was learned is the one that training ended with."""
    return _space((backbones.read_description(run)["kladi"].get("objective") or {}).get("args") or {})


def own_answers(run: Path, z: Float32[np.ndarray, "n D"] | None) -> OwnAnswers | None:
    """What the run's own classifier says of its embeddings; None where it trained none."""
    found = heads.classifier(run)
    if found is None or z is None:
        return None
    return OwnAnswers(found.log_probabilities(torch.from_numpy(z)).numpy(), found.nodes)


def _space(args: Mapping[str, Any]) -> spaces.Geometry:
    geometry = str(args.get("geometry", "sphere"))
    return spaces.named(geometry, float(args.get("curvature", 0.1)), float(args.get("clip", 2.3)))


def seen_rows(run: Path, dataset: Dataset) -> Bool[np.ndarray, " n"] | None:
    """Rows that the run, or one before it, was trained on, and all rows of their patients; None where it kept no list.

    A run lists every row that it began with by its id, and which of them it trained on: the split of today's manifest
    does not matter.
    """
    if not (run / "rows.safetensors").is_file():
        return None
    before = run_folder.read_rows(run)
    trained_on = np.union1d(before.row_id[before.trained], lineage.of_run(run).row_id)
    seen = np.isin(dataset.row_id, trained_on)
    return np.isin(dataset.group, dataset.group[seen])


def _curves(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of single steps, the share of idle anchors as one number a term, thinned evenly to 2,000."""
    steps = [line for line in lines if "loss" in line]
    stride = max(1, -(-len(steps) // MOST_POINTS))
    out = []
    for line in steps[::stride]:
        point = {key: value for key, value in line.items() if key not in _NO_CURVE and _is_number(value)}
        idle = line.get("idle")
        if isinstance(idle, dict):
            point |= {f"idle {term}": share for term, share in idle.items() if _is_number(share)}
        out.append(point)
    return out


def _monitors(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Looks at the fixed rows: every number of a line that is no step."""
    return [
        {"step": line["step"], "metric": key, "value": float(value)}
        for line in lines
        if "loss" not in line
        for key, value in line.items()
        if key not in _NO_MONITOR and _is_number(value)
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""The cells of a study: the smallest pieces that are measured, kept and never measured again.

A frozen cell is one arm and pretraining seed on one question: all its folds, whose probes are solved together. A
fine-tuning cell is one fold. A cell is kept under the digest of everything it depends on; what a killed process left
half done does not exist.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from kladi import __version__
from kladi.data.dataset import TRAIN, Dataset
from kladi.data.load import load
from kladi.evaluate.answers import Task, values
from kladi.evaluate.embed import Embeddings
from kladi.evaluate.measure import Measured, Method, measure
from kladi.evaluate.readouts.finetune import fine_tune
from kladi.evaluate.readouts.regimes import Part, cannot
from kladi.evaluate.record.results import Row
from kladi.learn import run_folder
from kladi.losses import geometry as spaces
from kladi.study import arms as every
from kladi.study import design, record
from kladi.study.arms import Arm
from kladi.study.design import Study
from kladi.study.questions import Asked, ask, fewer_labels, shuffled_labels


@dataclass(frozen=True)
class Cell:
    """What is measured at once. regime "frozen" is all that reads embeddings; fold and repeat are of fine-tuning."""

    arm: str
    seed: int
    question: str
    regime: str
    fraction: float = 1.0
    fold: int = -1
    repeat: int = -1

    @property
    def file(self) -> str:
        """A name that a person can read; the digest inside the file is what counts."""
        said = json.dumps(asdict(self), sort_keys=True)
        return f"{self.regime}-{hashlib.sha256(said.encode()).hexdigest()[:16]}.npz"

    def __str__(self) -> str:
        share = f", {self.fraction:.0%} of the labels" if self.fraction < 1 else ""
        fold = f", fold {self.fold} of repeat {self.repeat}" if self.fold >= 0 else ""
        return f"{self.arm} seed {self.seed}, {self.question}, {self.regime}{share}{fold}"


@dataclass(frozen=True)
class Context:
    """A study, its data and its folds, as every process has them."""

    study: Study
    folder: Path
    dataset: Dataset
    data_digest: str
    arms: tuple[Arm, ...]
    asked: dict[str, Asked]
    warnings: tuple[str, ...]
    device: str

    def run_of(self, arm: Arm, seed: int) -> Path:
        """Where the arm's encoder and embeddings of that seed are."""
        return self.folder / "runs" / f"{arm.name}-{seed}-{arm.digest(seed, self.data_digest)[:10]}"

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def seeds(self, arm: Arm) -> range:
        return range(self.study.seeds if arm.drawn else 1)

    def parts(self, cell: Cell) -> tuple[Part, ...]:
        """Of a drawn arm the repeats that belong to its seed, of another all."""
        asked = self.asked[cell.question]
        drawn = self.arm(cell.arm).drawn
        parts = [p for p in asked.parts if not drawn or p.repeat % self.study.seeds == cell.seed]
        return tuple(fewer_labels(p, asked, self.dataset, cell.fraction, self.study.seed) for p in parts)


@lru_cache(maxsize=1)
def context(path: Path, folder: Path) -> Context:
    """The context of a study file, read once a process.

    Raises:
        UserError: whatever is wrong with the study or its data; a patient in two splits among them.
    """
    study = design.read(path)
    found = every.arms(study)
    dataset, inspection = load(study.data, study.config)
    pretrained = any(arm.kind == "pretrained" for arm in found)
    unseen: Bool[np.ndarray, " n"] = (dataset.split != TRAIN) if pretrained else np.ones(len(dataset), dtype=bool)
    asked = {question.name: ask(question, dataset, unseen, study) for question in study.questions}
    warnings = [f.message for f in inspection.findings if f.severity == "warning"]
    warnings += [warning for one in asked.values() for warning in one.warnings]
    data_digest = run_folder.digest(dataset)
    return Context(study, folder, dataset, data_digest, found, asked, tuple(warnings), every.device_of(study.config))


def cells(context: Context) -> list[Cell]:
    """Every cell of the study, in the order of its table."""
    study = context.study
    found: list[Cell] = []
    for name, asked in context.asked.items():
        for arm in context.arms:
            for seed in context.seeds(arm):
                if study.frozen:
                    found += [Cell(arm.name, seed, name, "frozen", fraction) for fraction in study.label_fractions]
                if "finetune" in study.regimes and arm.kind not in {"histogram", "shuffled_labels"}:
                    found += [
                        Cell(arm.name, seed, name, "finetune", 1.0, part.fold, part.repeat)
                        for part in asked.parts
                        if not arm.drawn or part.repeat % study.seeds == seed
                    ]
    return found


def digest(cell: Cell, context: Context) -> str:
    """Over everything that decides what the cell holds."""
    arm, asked, study = context.arm(cell.arm), context.asked[cell.question], context.study
    said = [
        __version__,
        asdict(cell),
        _source(arm, context).digest(cell.seed, context.data_digest),
        asked.digest,
        study.seed,
        study.seeds,
        study.frozen if cell.regime == "frozen" else asdict(study.finetune),
    ]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def done(cell: Cell, context: Context) -> Measured | None:
    """What was measured before, None where that is not there."""
    return record.read(context.folder / "cells" / cell.file, digest(cell, context))


def prepared(arm: Arm, seed: int, context: Context) -> Embeddings:
    """The arm's embeddings, pretrained and embedded where that was not done before."""
    return every.prepare(arm, seed, context.dataset, context.run_of(arm, seed), context.device)


def run(cell: Cell, context: Context) -> None:
    """Measure a cell and keep it."""
    measured = _fine_tuned(cell, context) if cell.regime == "finetune" else _frozen(cell, context)
    record.write(context.folder / "cells" / cell.file, measured, digest(cell, context))


def _source(arm: Arm, context: Context) -> Arm:
    """The arm whose encoder is read: shuffled labels are asked of the reference."""
    return context.arm(arm.control_of) if arm.kind == "shuffled_labels" else arm


def _frozen(cell: Cell, context: Context) -> Measured:
    arm, asked, study = context.arm(cell.arm), context.asked[cell.question], context.study
    embedded = prepared(_source(arm, context), cell.seed, context)
    method = Method(arm.name, embedded.features, embedded.z, _space(arm), arm.kind == "histogram", arm.control_of)
    parts = context.parts(cell)
    ask_each = [(asked.task, parts)]
    if arm.kind == "shuffled_labels":  # other targets in every fold, so every fold is measured by itself
        ask_each = [(_retargeted(asked, part, study.seed), (part,)) for part in parts]
    out = Measured()
    for task, chosen in ask_each:
        one = measure(method, task, chosen, seed=cell.seed, label_fraction=cell.fraction, regimes=study.frozen)
        out.rows += one.rows
        out.answers += one.answers if cell.fraction == 1 else []
        out.means += one.means if cell.fraction == 1 else []
        out.warnings += one.warnings
    return out


def _retargeted(asked: Asked, part: Part, seed: int) -> Task:
    task = asked.task
    return Task(task.name, task.taxonomy, shuffled_labels(asked, part, seed), task.group)


def _fine_tuned(cell: Cell, context: Context) -> Measured:
    arm, asked = context.arm(cell.arm), context.asked[cell.question]
    part = next(p for p in asked.parts if (p.fold, p.repeat) == (cell.fold, cell.repeat))
    encoder = every.encoder_of(arm, cell.seed, context.dataset, context.run_of(arm, cell.seed))
    answers = fine_tune(
        encoder,
        context.dataset,
        asked.task,
        part,
        context.study.config,
        context.study.finetune,
        method=arm.name,
        seed=context.study.seed + cell.repeat,
        device=context.device,
    )
    base = {"method": arm.name, "regime": "finetune", "dataset": asked.task.name, "seed": cell.seed}
    place = {"fold": cell.fold, "repeat": cell.repeat}
    if answers is None:
        reason = cannot(part, asked.task)
        return Measured(
            rows=[Row(metric=context.study.primary, value=None, n=0, n_patients=0, reason=reason, **base, **place)]
        )
    rows = [
        Row(
            metric=value.metric,
            value=value.value,
            n=len(value.rows),
            n_patients=asked.task.patients(value.rows),
            reason=value.reason,
            **base,
            **place,
        )
        for value in values(answers, asked.task)
    ]
    return Measured(rows=rows, answers=[answers])


def _space(arm: Arm) -> spaces.Geometry:
    args = arm.config.objective.args
    return spaces.named(
        str(args.get("geometry", "sphere")), float(args.get("curvature", 0.1)), float(args.get("clip", 2.3))
    )

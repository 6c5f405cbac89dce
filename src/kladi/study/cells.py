"""The cells of a study: the smallest pieces that are measured, kept and never measured again.

A frozen cell is one arm and pretraining seed on one question: all its folds, whose probes are solved together. A
fine-tuning cell is one fold. A cell is kept under the digest of everything it depends on; what a killed process left
half done does not exist.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from kladi import __version__
from kladi import config as settings
from kladi.data.dataset import TRAIN, Dataset
from kladi.data.embeddings import Embeddings
from kladi.data.findings import line
from kladi.data.load import load
from kladi.errors import RunStopped
from kladi.evaluate.answers import SCALE, Task, Value
from kladi.evaluate.measure import Keeper, Measured, Method, measure
from kladi.evaluate.pretraining import own_answers, seen_rows, space_of
from kladi.evaluate.readouts.finetune import Start, begin, fine_tune
from kladi.evaluate.readouts.published import COMPAT, Published, Regime, published
from kladi.evaluate.readouts.regimes import Part, cannot
from kladi.evaluate.record.account import network
from kladi.evaluate.splits import VAL
from kladi.learn import run_folder
from kladi.losses import geometry as spaces
from kladi.models.backbones import Encoder
from kladi.study import arms as every
from kladi.study import design, record
from kladi.study.arms import Arm
from kladi.study.design import Study
from kladi.study.questions import Asked, ask, fewer_labels, shuffled_labels

_BEGUN: dict[tuple[str, str, int, int], Start | None] = {}
"""The start of the last fine-tuning: one, as it holds an encoder."""


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

    @property
    def stamp(self) -> str:
        """Of the study and its data, by which a process knows whether the context that it holds is still the one."""
        return f"{self.study.digest} {self.data_digest}"

    def run_of(self, arm: Arm, seed: int) -> Path:
        """Where the arm's encoder and embeddings of that seed are."""
        return self.folder / "runs" / f"{arm.name}-{seed}-{arm.digest(seed, self.data_digest)[:10]}"

    def before(self, arm: Arm, seed: int) -> Path | None:
        """The run that the arm's pretraining begins with."""
        return self.run_of(arm.after, seed) if arm.after else None

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
def held(path: Path, folder: Path, stamp: str) -> Context:
    """The context in a worker, read once for a study and its data as they are.

    Raises:
        RunStopped: they have changed since the study began.
    """
    found = context(path, folder)
    if found.stamp != stamp:
        raise RunStopped(
            "the study or its data have changed while it ran; the same command begins with them as they are"
        )
    return found


def context(path: Path, folder: Path) -> Context:
    """The context of a study file as it and its data are now.

    Raises:
        UserError: whatever is wrong with the study or its data; a patient in two splits among them.
    """
    study = design.read(path)
    found = every.arms(study)
    columns = [name for question in study.questions for name in (question.column, question.shift) if name]
    dataset, inspection = load(study.data, settings.override(study.config, {"data.keep": columns}))
    pretrained = any(arm.kind == "pretrained" for arm in found)
    unseen: Bool[np.ndarray, " n"] = (dataset.split != TRAIN) if pretrained else np.ones(len(dataset), dtype=bool)
    for arm in found:
        every.shuffled(arm, 0, dataset)  # what cannot be shuffled is said before anything is trained
    met, said = _met_before(found, dataset)
    unseen &= ~met
    asked = {question.name: ask(question, dataset, unseen, study) for question in study.questions}
    warnings = [line(f) for f in inspection.findings if f.severity == "warning"]
    warnings += [warning for one in asked.values() for warning in one.warnings]
    warnings += [*said, *_tasks_that_were_trained_on(study, found, dataset), *_labels_beyond_the_fraction(study, found)]
    if study.compat:
        warnings.append(f'compat = "{study.compat}": fine-tuning and probe are published recipes, not those of kladi')
    device = every.device_of(study.config)
    return Context(study, folder, dataset, data_digest(dataset), found, asked, tuple(warnings), device)


def _met_before(found: tuple[Arm, ...], dataset: Dataset) -> tuple[Bool[np.ndarray, " n"], list[str]]:
    """Rows of patients that foreign weights have seen, which no fold may hold; and what is known of each method."""
    met = np.zeros(len(dataset), dtype=bool)
    said: list[str] = []
    for arm in found:
        weights = Path(arm.config.init.weights)
        if arm.kind == "embedded" and not arm.control_of:
            said.append(f"{arm.name}: which patients its encoder has seen is unknown")
        if not arm.config.init.weights or arm.shuffled:
            continue
        seen = seen_rows(weights if weights.is_dir() else weights.parent, dataset)
        if seen is None:
            said.append(f"{arm.name}: which patients its weights have seen is unknown")
        elif seen.any():
            met |= seen
            count = len(np.unique(dataset.group[seen]))
            said.append(f"{arm.name}: {count:,} patients that its weights were trained on are in no fold of any method")
    return met, said


def _tasks_that_were_trained_on(study: Study, found: tuple[Arm, ...], dataset: Dataset) -> list[str]:
    """A task that asks for what a pretraining was told is no transfer."""
    told = () if dataset.label_sets is None else dataset.label_sets.attributes
    methods = [arm.name for arm in found if arm.config.objective.name == "metadata" and not arm.shuffled]
    return [
        f"{question.name}: {question.column} was told to the pretraining of {', '.join(methods)}; that is no transfer"
        for question in study.questions
        if question.column in told and methods
    ]


def data_digest(dataset: Dataset) -> str:
    """Over all that cells and shuffles read: what a training reads, and order, patients and sites of the rows.

    Cells keep positions of rows, and shuffles deal over patients and sites: with any of these changed, what was kept
    is of other data.
    """
    said = hashlib.sha256(run_folder.digest(dataset).encode())
    said.update(dataset.row_id.astype("<u8").tobytes() + dataset.group.astype("<i8").tobytes())
    said.update(json.dumps([dataset.columns.get(name) for name in every.SITES]).encode())
    return said.hexdigest()


def _labels_beyond_the_fraction(study: Study, found: tuple[Arm, ...]) -> list[str]:
    """Few-label numbers of an encoder that has seen all labels are not those of few labels."""
    if min(study.label_fractions) == 1:
        return []
    return [
        f"few labels: {arm.name} was pretrained with every label; the share is of its probe's labels alone"
        for arm in found
        if arm.reads_labels
    ]


def cells(context: Context) -> list[Cell]:
    """Every cell of the study; those that train on one fold stand next to each other, as many begin at one place."""
    study = context.study
    found: list[Cell] = []
    for name, asked in context.asked.items():
        if study.frozen:
            found += [
                Cell(arm.name, seed, name, "frozen", fraction)
                for arm in context.arms
                for seed in context.seeds(arm)
                for fraction in study.label_fractions
            ]
        found += [
            Cell(arm.name, part.repeat % study.seeds if arm.drawn else 0, name, regime, 1.0, part.fold, part.repeat)
            for regime in study.trained
            for part in asked.parts
            if asked.shift or not study.trained_folds or part.fold < study.trained_folds
            for arm in context.arms
            if arm.kind not in {"embedded", "histogram", "shuffled_labels"}  # nothing to train there
        ]
    return found


def digest(cell: Cell, context: Context) -> str:
    """Over everything that decides what the cell holds."""
    arm, asked, study = context.arm(cell.arm), context.asked[cell.question], context.study
    said: list[Any] = [
        __version__,
        asdict(cell),
        _source(arm, context).digest(cell.seed, context.data_digest),
        asked.digest,
        study.seed,
        study.seeds,
        study.frozen if cell.regime == "frozen" else _recipe(study, arm),
    ]
    if not arm.classify.plain:
        said.append(asdict(arm.classify))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def done(cell: Cell, context: Context) -> Measured | None:
    """What was measured before, None where that is not there."""
    return record.read(context.folder / "cells" / cell.file, digest(cell, context))


def prepared(arm: Arm, seed: int, context: Context) -> Embeddings:
    """The arm's embeddings, pretrained and embedded where that was not done before."""
    folder, before = context.run_of(arm, seed), context.before(arm, seed)
    return every.prepare(arm, seed, context.dataset, folder, context.device, before)


def _encoder(arm: Arm, seed: int, context: Context) -> Encoder:
    return every.encoder_of(arm, seed, context.dataset, context.run_of(arm, seed), context.before(arm, seed))


def network_of(arm: Arm, context: Context) -> dict[str, Any]:
    """What makes the arm's features: "encoder" in words, "parameters" that they go through, and their "width"."""
    arm = _source(arm, context)
    grey = arm.kind == "histogram"
    width = Method(arm.name, prepared(arm, 0, context).features, grey=grey).width
    if arm.kind == "embedded":
        return {"encoder": "embeddings from a file", "parameters": None, "width": width}
    return {**network(None if grey else every.fresh(arm.config, 0)), "width": width}


def run(cell: Cell, context: Context) -> None:
    """Measure a cell and keep it."""
    measured = _frozen(cell, context) if cell.regime == "frozen" else _trained(cell, context)
    record.write(context.folder / "cells" / cell.file, measured, digest(cell, context))


def _source(arm: Arm, context: Context) -> Arm:
    """The arm whose encoder is read: shuffled labels are asked of the reference."""
    return context.arm(arm.control_of) if arm.kind == "shuffled_labels" else arm


def _frozen(cell: Cell, context: Context) -> Measured:
    arm, asked, study = context.arm(cell.arm), context.asked[cell.question], context.study
    source = _source(arm, context)
    embedded = prepared(source, cell.seed, context)
    space, own = spaces.named("sphere"), None
    if source.kind == "pretrained":
        run = context.run_of(source, cell.seed)
        space = space_of(run)
        own = every.in_true_names(own_answers(run, embedded.z), source, cell.seed, context.dataset)
    own = None if arm.kind == "shuffled_labels" else own  # it was trained on the true ones
    grey = arm.kind == "histogram"
    method = Method(arm.name, embedded.features, embedded.z, space, grey, arm.control_of, own)
    parts = context.parts(cell)
    ask_each, regimes = [(asked.task, parts)], list(study.frozen)
    if arm.kind == "shuffled_labels":  # other targets in every fold, so every fold is measured by itself
        ask_each = [(_retargeted(asked, part, study.seed), (part,)) for part in parts]
        # Dealt labels say something of classifiers only.
        regimes = [regime for regime in regimes if regime not in {"representation", "retrieval"}]
    out = Measured()
    for task, chosen in ask_each:
        one = measure(
            method,
            task,
            chosen,
            seed=cell.seed,
            label_fraction=cell.fraction,
            regimes=regimes,
            criterion=arm.classify,
        )
        out.rows += one.rows
        out.answers += one.answers if cell.fraction == 1 else []
        out.means += one.means if cell.fraction == 1 else []
        out.warnings += [f"seed {cell.seed}, {warning}" for warning in one.warnings]
    return out


def _retargeted(asked: Asked, part: Part, seed: int) -> Task:
    task = asked.task
    return Task(task.name, task.taxonomy, shuffled_labels(asked, part, seed), task.group)


def _recipe(study: Study, arm: Arm) -> list[object]:
    """What decides how all layers, or a published probe, are trained."""
    if study.compat:
        return [study.compat, asdict(_published(study, arm))]
    return [asdict(study.finetune), asdict(study.config.augment)]


def _published(study: Study, arm: Arm) -> Published:
    """In the released scripts SimCLR alone has a head."""
    recipe = COMPAT[study.compat]
    return replace(recipe, headless=recipe.headless and arm.config.objective.name != "simclr")


def _trained(cell: Cell, context: Context) -> Measured:
    arm, asked, study = context.arm(cell.arm), context.asked[cell.question], context.study
    part = next(p for p in asked.parts if (p.fold, p.repeat) == (cell.fold, cell.repeat))
    wall, cpu, scale = time.perf_counter(), time.process_time(), None
    seed = study.seed + cell.repeat
    data, task, device, name = context.dataset, asked.task, context.device, arm.name
    if study.compat:
        regime: Regime = "probe" if cell.regime == "probe" else "finetune"
        how, recipe = study.config.intensity, _published(study, arm)
        encoder = _encoder(arm, cell.seed, context)
        answers = published(encoder, data, task, part, how, regime, recipe, method=name, seed=seed, device=device)
    else:
        start, config, how = _begun(cell, part, context), study.config, arm.classify
        wall, cpu = time.perf_counter(), time.process_time()  # the start is shared, so it is nobody's
        recipe, tuned = study.finetune, None
        if start is not None:
            tuned = fine_tune(
                start, data, task, part, config, recipe, criterion=how, method=name, seed=seed, device=device
            )
        answers, scale = (None, None) if tuned is None else (tuned.answers, tuned.scale)
    out = Measured()
    keep = Keeper(out, arm.name, asked.task, cell.seed)
    if answers is None:
        why = cannot(part, task) or "its training diverged: no look at the validation rows was finite"
        keep.unable(cell.regime, (part,), why)
    else:
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        keep.answers([(part, answers)], seconds)
        if scale is not None:
            keep.values(cell.regime, [(part, Value(SCALE, scale, part.rows(VAL)), None)], seconds)
    return out


def _begun(cell: Cell, part: Part, context: Context) -> Start | None:
    """Where the fine-tuning of this cell begins; methods that differ in their loss alone share it."""
    arm, asked = context.arm(cell.arm), context.asked[cell.question]
    key = (arm.digest(cell.seed, context.data_digest), asked.digest, cell.fold, cell.repeat)
    if key not in _BEGUN:
        _BEGUN.clear()
        encoder = _encoder(arm, cell.seed, context)
        intensity, device = context.study.config.intensity, context.device
        _BEGUN[key] = begin(encoder, context.dataset, asked.task, part, intensity, device)
    return _BEGUN[key]

"""`kladi compare`: pretrain what is missing, measure what is missing, and put all of it into one results.json.

    compare(Path("study.toml"), Path("S"))

A killed study goes on with the same command: finished runs and cells are read again, an unfinished run is resumed.
Cells fan out over processes through joblib: loky here, or whatever backend the caller has set (Ray, Dask).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch

from kladi.data.dataset import TRAIN, Dataset
from kladi.data.embeddings import Embeddings
from kladi.errors import RunStopped, UserError
from kladi.evaluate import comparisons, diagnostics
from kladi.evaluate.answers import SCALE
from kladi.evaluate.measure import Measured
from kladi.evaluate.record import account, atlas, results
from kladi.evaluate.splits import TEST, find_leaks, refuse_leaks
from kladi.evaluate.splits import TRAIN as TRAINED
from kladi.learn import lock, run_folder, signals
from kladi.sections import WITHOUT_LABELS
from kladi.study import arms as every
from kladi.study import cells, design
from kladi.study.arms import Arm
from kladi.study.cells import Context

Say = Callable[[str], None]
DECIDING = ("head", "probe", "finetune")
"""Regimes whose primary metric is in the family that Holm's correction is made over."""


def compare(path: Path, out: Path, *, workers: int = 1, say: Say | None = None, force_unlock: bool = False) -> Path:
    """Run what is missing of a study and write its results.

    Args:
        path: study.toml.
        out: folder of the study; made where missing, readable by its owner alone.
        workers: processes that train and measure side by side, each with its share of the cores. Another number may
            change the last bits of a training, as another number of threads does.
        say: told what is being done.
        force_unlock: take over a lock whose machine is gone.

    Returns:
        The path of results.json.

    Raises:
        UserError: a mistake in the study or its data, a leak, or a folder in use.
        RunStopped: an outside cause; everything finished so far is kept.
    """
    started, say = datetime.now(UTC), say or _silent
    if workers < 1:
        raise UserError(f"--workers {workers}: takes 1 or more")
    out = out.absolute()
    design.read(path)  # a mistake in the file leaves no folder behind
    run_folder.make(out)
    try:
        with lock.held(out, force_unlock):
            return _measured(path.absolute(), out, workers, started, say)
    except (KeyboardInterrupt, SystemExit):
        say("stopped    what is finished is kept; the same command goes on")
        raise
    except OSError as error:
        raise RunStopped(f"{out}: cannot be read or written ({error.strerror or error})") from error


def _measured(path: Path, out: Path, workers: int, started: datetime, say: Say) -> Path:
    """Everything between the lock and results.json."""
    context = cells.context(path, out)
    _refuse_leaks(context)
    every.require_buildable(context.arms, context.dataset)
    every.require_judges(context.arms, {name: asked.task for name, asked in context.asked.items()})
    for name, asked in context.asked.items():
        asked.write(out / "splits" / f"{name}.json", context.dataset.row_id)
    encoders = _encoders(context)
    missing = [pair for pair in encoders if not _is_prepared(context, *pair)]
    lines, tasks = len(context.arms), len(context.asked)
    say(f"study      {lines} methods and controls on {tasks} tasks; reference {context.study.reference}")
    say(f"encoders   {len(encoders)}, of which {len(encoders) - len(missing)} are there")
    fan = _Fan(context, path, workers, say)
    for wave in range(1 + max((_wave(arm) for arm, _ in missing), default=0)):
        fan.out(_prepare, [(arm.name, seed) for arm, seed in missing if _wave(arm) == wave], "encoder    {} seed {}")
    every_cell = cells.cells(context)
    todo = [cell for cell in every_cell if cells.done(cell, context) is None]
    say(f"cells      {len(every_cell):,}, of which {len(every_cell) - len(todo):,} are there")
    fan.out(cells.run, [(cell,) for cell in todo], "measure    {}")
    say("compare    every method with its reference")
    content = _assembled(context, started)
    say("map        at most 2,000 images a method")
    atlas.write_panels(_mapped(context), out, seed=context.study.seed)
    return results.write(content, out)


# --- what is run -----------------------------------------------------------------------------------------------------


def _encoders(context: Context) -> list[tuple[Arm, int]]:
    """The longest first, so that no process is left alone with it at the end."""
    pairs = [(a, seed) for a in context.arms if a.kind != "shuffled_labels" for seed in context.seeds(a)]
    return sorted(pairs, key=lambda pair: pair[0].kind != "pretrained")


def _wave(arm: Arm) -> int:
    """How many pretrainings come before this arm's own."""
    return 0 if arm.after is None else 1 + _wave(arm.after)


def _is_prepared(context: Context, arm: Arm, seed: int) -> bool:
    return (context.run_of(arm, seed) / "embeddings.npz").is_file()


def _prepare(name: str, seed: int, context: Context) -> None:
    """One encoder and its embeddings."""
    cells.prepared(context.arm(name), seed, context)


@dataclass(frozen=True)
class _Fan:
    """Does orders here, or in as many processes as there are workers."""

    context: Context
    path: Path
    workers: int
    say: Say

    def out(self, work: Callable[..., None], orders: Sequence[tuple[Any, ...]], name: str) -> None:
        """`work(*order, context)` for every order, each said when it is done, with what is left by the pace so far."""
        begin = time.monotonic()
        for count, number in enumerate(self._done(work, orders), start=1):
            left = (time.monotonic() - begin) / count * (len(orders) - count)
            self.say(f"{name.format(*orders[number])}  ({count:,} of {len(orders):,}{_left(left)})")

    def _done(self, work: Callable[..., None], orders: Sequence[tuple[Any, ...]]) -> Iterator[int]:
        """The number of each order, when it is done."""
        if self.workers == 1:
            for number, order in enumerate(orders):
                work(*order, self.context)
                yield number
        elif orders:
            where = (self.path, self.context.folder, self.context.stamp)
            engine = joblib.parallel.get_active_backend()[0]
            # Workers of Ray or Dask are looked after by their engine; those of this machine must not outlive us.
            local = type(engine).__name__ == "LokyBackend"
            watched: dict[str, Any] = {"initializer": signals.end_with, "initargs": (os.getpid(),)} if local else {}
            parallel = joblib.Parallel(
                n_jobs=self.workers, return_as="generator_unordered", pre_dispatch=self.workers, **watched
            )
            call = joblib.delayed(_in_worker)
            yield from parallel(call(work, n, order, where, self.workers) for n, order in enumerate(orders))


def _in_worker(
    work: Callable[..., None], number: int, order: tuple[Any, ...], where: tuple[Path, Path, str], workers: int
) -> int:
    """The work with its share of the cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    work(*order, cells.held(*where))
    return number


def _left(seconds: float) -> str:
    if seconds < 1:
        return ""
    return f", about {seconds:.0f} s left" if seconds < 90 else f", about {seconds / 60:.0f} min left"


def _refuse_leaks(context: Context) -> None:
    """A patient or picture in two parts of a fold, or one that a pretraining has seen: every one is listed."""
    data = context.dataset
    pretrained = any(arm.kind == "pretrained" for arm in context.arms)
    seen = np.isin(data.group, data.group[data.split == TRAIN]) if pretrained else np.zeros(len(data), dtype=bool)
    for asked in context.asked.values():
        leaks = find_leaks(
            asked.splits,
            data.row_id,
            data.group,
            data.store.pixel_digest,
            data.manifest_row,
            seen if pretrained else None,
        )
        refuse_leaks(leaks, allow=context.study.config.data.allow_leak)


# --- what is said ----------------------------------------------------------------------------------------------------


def _assembled(context: Context, started: datetime) -> dict[str, Any]:
    """results.json: every row, and the comparisons of every question."""
    study = context.study
    found: dict[str, list[Measured]] = {name: [] for name in context.asked}
    for cell in cells.cells(context):
        measured = cells.done(cell, context)
        if measured is None:
            raise RunStopped(f"{cell}: its file is gone or damaged; the same command measures it again")
        found[cell.question].append(measured)
    compared: list[dict[str, Any]] = []
    intervals: list[dict[str, Any]] = []
    for name, asked in context.asked.items():
        drawn = comparisons.draw(found[name], asked.task, asked.parts, draws=study.bootstrap, seed=study.seed)
        compared += comparisons.compare(drawn, _pairs(context), asked.task, asked.parts, tested=asked.shift is None)
        intervals += comparisons.intervals(drawn, asked.task, asked.parts)
    settled = comparisons.settle(
        compared, primary=study.primary, regimes=DECIDING, reference=study.reference, margin=study.margin
    )
    everything = [one for parts in found.values() for one in parts]
    said = [f"{name}: {warning}" for name, parts in found.items() for one in parts for warning in one.warnings]
    return results.assemble(
        [row for one in everything for row in one.rows],
        study=_study(context),
        provenance=account.provenance(started, context.device),
        data=_data(context, [*said, *rates_at_an_end(study.finetune.scales, everything)]),
        splits=_splits(context),
        methods=[_method(arm, context) for arm in context.arms],
        comparisons=settled,
        diagnostics=[d.to_dict() for d in diagnostics.before_training(context.dataset, study.config.intensity)],
        figures={"intervals": intervals, "lower_is_better": sorted(comparisons.LOWER_IS_BETTER)},
    )


def _pairs(context: Context) -> list[tuple[str, str]]:
    """Every arm against the reference; a method of another reference also against its own controls."""
    reference = context.study.reference
    pairs = [(arm.name, reference) for arm in context.arms if arm.name != reference]
    return pairs + [
        (arm.control_of, arm.name) for arm in context.arms if arm.control_of and arm.control_of != reference
    ]


def _mapped(context: Context) -> list[tuple[str, Embeddings]]:
    """The first seed of every encoder."""
    arms = [arm for arm in context.arms if arm.kind in {"pretrained", "given", "random", "embedded"}]
    return [(arm.name, cells.prepared(arm, 0, context)) for arm in arms]


def _study(context: Context) -> dict[str, Any]:
    study = context.study
    return {
        "name": study.name,
        "digest": study.digest,
        "command": "kladi compare study.toml --out S",
        "primary_metric": study.primary,
        "reference": study.reference,
        "family": [
            f"{study.primary}, {regime}, {task}, {arm.name} against {study.reference}"
            for regime in DECIDING
            if regime in study.regimes
            for task, asked in context.asked.items()
            if asked.shift is None
            for arm in context.arms
            if arm.name != study.reference
        ],
        "margin": study.margin,
        "pretrain": "held-out, leaks allowed" if study.config.data.allow_leak else "held-out",
        "regimes": list(study.regimes),
        "tasks": list(context.asked),
        "seeds": study.seeds,
        "compat": study.compat or None,
    }


def _data(context: Context, said: list[str]) -> dict[str, Any]:
    data = context.dataset
    labels: dict[str, list[int]] = {}
    for name, asked in context.asked.items():
        task = asked.task
        for node in np.unique(task.target[task.target >= 0]):
            rows = np.flatnonzero(task.target == node)
            labels[f"{name}: {task.taxonomy.names[node]}"] = [len(rows), task.patients(rows)]
    return {
        "digest": context.data_digest,
        "taxonomy_digest": data.taxonomy.digest if data.taxonomy is not None else None,
        "images": len(data),
        "patients": len(np.unique(data.group)) if data.has_patients else None,
        "labels": labels,
        "excluded": {},
        "warnings": list(dict.fromkeys([*context.warnings, *said])),
    }


def rates_at_an_end(scales: tuple[float, ...], measured: list[Measured]) -> list[str]:
    """Methods whose best learning rate on a task may lie beyond those that were tried."""
    if len(set(scales)) < 3:
        return []
    chosen: dict[tuple[str, str], list[float | None]] = {}
    for row in (row for one in measured for row in one.rows if row.metric == SCALE):
        chosen.setdefault((row.dataset, row.method), []).append(row.value)
    said = []
    for (task, method), found in chosen.items():
        for word, end in (("least", min(scales)), ("greatest", max(scales))):
            there = found.count(end)
            if there > len(found) / 2:
                many = f"{there} of {len(found)} fine-tunes chose the {word} learning rate"
                said.append(f"{task}: {many} of {method}; let finetune.scales reach further")
    return said


def _splits(context: Context) -> dict[str, Any]:
    parts = [
        {
            "task": name,
            "fold": part.fold,
            "repeat": part.repeat,
            "part": word,
            "place": asked.shift.places[part.fold] if asked.shift else None,
            "images": len(part.rows(number)),
            "patients": asked.task.patients(part.rows(number)),
        }
        for name, asked in context.asked.items()
        for part in asked.parts
        for number, word in ((TRAINED, "train"), (TEST, "test"))
    ]
    return {
        "digest": {name: asked.digest if asked.shift else asked.splits.digest for name, asked in context.asked.items()},
        "shift": {
            name: {"column": asked.shift.column, "places": list(asked.shift.places)}
            for name, asked in context.asked.items()
            if asked.shift
        },
        "kind": "folds",
        "folds": context.study.folds,
        "repeats": context.study.repeats,
        "trained_folds": context.study.trained_folds or context.study.folds,
        "group": "patient" if context.dataset.has_patients else None,
        "parts": parts,
    }


def _method(arm: Arm, context: Context) -> dict[str, Any]:
    data, config = context.dataset, arm.config
    trained = arm.kind == "pretrained"
    return {
        "method": arm.name,
        "objective": config.objective.name if trained else None,
        "init": arm.kind,
        "shuffled": arm.shuffled or None,
        **cells.network_of(arm, context),
        "epochs": config.train.epochs if trained else 0,
        "epochs_before": every.epochs_before(arm) if trained else 0,
        "images_seen": every.images_seen(arm, data),
        "labels_in_pretraining": _labels_read(arm, data),
        "seeds": len(context.seeds(arm)),
        "config_digest": run_folder.config_digest(config),
        "control_of": arm.control_of or None,
    }


def _labels_read(arm: Arm, data: Dataset) -> int | None:
    """Labels of the study that its pretraining read; None where that was elsewhere, on other rows."""
    elsewhere = arm.kind in {"given", "embedded"} and arm.after is None
    if elsewhere or not arm.lineage.known or arm.lineage.objectives - WITHOUT_LABELS:
        return None
    return int(((data.split == TRAIN) & (data.target >= 0)).sum()) if arm.reads_labels else 0


def _silent(text: str) -> None:
    """Nobody listens."""

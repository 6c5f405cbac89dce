"""Embeddings and splits -> rows of results: every regime of every method, under the same folds."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
from jaxtyping import Float32, Int, UInt64

from kladi.evaluate import baselines
from kladi.evaluate.answers import PRIMARY, Answers, RowMean, Task, Value, resampled, values
from kladi.evaluate.bootstrap import Metric
from kladi.evaluate.metrics import weighted
from kladi.evaluate.readouts import regimes as readouts
from kladi.evaluate.readouts.criteria import Criterion
from kladi.evaluate.readouts.probe import LAMBDAS
from kladi.evaluate.readouts.regimes import Answered, Found, OwnAnswers, Part, ProbeNotes, View
from kladi.evaluate.readouts.tree_probe import LAMBDAS as TREE_LAMBDAS
from kladi.evaluate.readouts.tree_probe import tree_probe
from kladi.evaluate.record.results import Row
from kladi.evaluate.splits import TEST, TRAIN, Splits
from kladi.losses import geometry as spaces

T = TypeVar("T")
Seconds = tuple[float, float]
REGIMES = ("head", "probe", "knn", "prototype", "retrieval", "representation")
"""All that reads embeddings."""


@dataclass(frozen=True)
class Method:
    """A representation to be measured.

    features: float32[n, F], what the probe, the votes and the retrieval read.
    z: float32[n, D], what the prototypes read, in `space`; None: the features, on the sphere.
    grey: the features are `baselines.grey_features`, still to be fitted on the training rows of each fold.
    control_of: the method whose control this is, "" for none.
    own: answers of the classifier that was trained with the encoder, None where there is none.
    """

    name: str
    features: Float32[np.ndarray, "n F"]
    z: Float32[np.ndarray, "n D"] | None = None
    space: spaces.Geometry = field(default_factory=lambda: spaces.named("sphere"))
    grey: bool = False
    control_of: str = ""
    own: OwnAnswers | None = None

    @property
    def width(self) -> int:
        """Dimensions that a probe sees."""
        return baselines.BINS + baselines.COMPONENTS if self.grey else self.features.shape[1]


@dataclass(frozen=True)
class Resample:
    """A metric of one fold as a function of row weights, for the patient bootstrap. rows: the test rows."""

    method: str
    regime: str
    metric: str
    fold: int
    repeat: int
    rows: Int[np.ndarray, " m"]
    of: Metric


@dataclass
class Measured:
    """Everything that was measured of a method: rows, what they were computed from, and what else must be said."""

    rows: list[Row] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)
    means: list[RowMean] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def resamples(measured: Measured, task: Task) -> Iterator[Resample]:
    """Every metric that gets an interval, fold by fold."""
    for a in measured.answers:
        for name, metric in resampled(a, task).items():
            yield Resample(a.method, a.regime, name, a.fold, a.repeat, a.rows, metric)
    for m in measured.means:
        yield Resample(m.method, m.regime, m.metric, m.fold, m.repeat, m.rows, weighted.mean(m.values, m.counted))


def parts_of(splits: Splits, row_id: UInt64[np.ndarray, " n"]) -> tuple[Part, ...]:
    """Every fold of every repeat."""
    return tuple(
        Part(fold, repeat, splits.part(row_id, fold, repeat))
        for repeat in range(splits.repeats)
        for fold in range(splits.folds)
    )


def measure(
    method: Method,
    task: Task,
    parts: tuple[Part, ...],
    *,
    ks: tuple[int, ...] = (1, 5, 10, 20, 50, 100, 200),
    seed: int = 0,
    config_digest: str = "",
    lambdas: tuple[float, ...] = LAMBDAS,
    label_fraction: float = 1.0,
    regimes: Collection[str] = REGIMES,
    criterion: Criterion | None = None,
) -> Measured:
    """The regimes of one method under the given folds.

    Args:
        method: the representation.
        task: the labels and their tree.
        parts: of `parts_of`, at least one; the same for every method.
        ks: numbers of neighbours to choose from on validation rows, those up to half the training rows.
        seed: kept in the rows.
        config_digest: kept in the rows.
        lambdas: penalties to choose from on validation rows.
        label_fraction: kept in the rows; the folds themselves say who is trained on.
        regimes: of `REGIMES`.
        criterion: by what loss the probe is trained; None: cross-entropy, by its own solver.

    A fold in which a regime cannot be run, say with one class to train on, gives a row with a reason, never an error.
    """
    out, notes = Measured(), ProbeNotes()
    keep = Keeper(out, method.name, task, seed, config_digest, label_fraction)
    view = _view(method, task, parts)
    if "head" in regimes and label_fraction == 1:  # a method without a classifier of its own has no row
        keep.answers(*_timed(readouts.head, view))
        out.warnings += readouts.head_notes(view)
    probe: Callable[[View], Iterator[Answered]] = partial(readouts.probe, lambdas=lambdas, notes=notes)
    if criterion is not None and not criterion.plain:
        probe, lambdas = partial(tree_probe, criterion=criterion, notes=notes, seed=seed), TREE_LAMBDAS
    for regime, run in (
        ("probe", probe),
        ("knn", partial(readouts.knn, ks=ks)),
        ("prototype", readouts.prototype),
    ):
        if regime in regimes:
            keep.unable(regime, parts)
            keep.answers(*_timed(run, view))
    if "retrieval" in regimes:
        keep.values("retrieval", *_timed(readouts.retrieval, view))
    if "prototype" in regimes and task.has_levels:
        keep.values("prototype", *_timed(readouts.violations, view))
    if "representation" in regimes:
        keep.values("representation", *_timed(readouts.health, view))
    out.warnings += notes.warnings(method.name, len(lambdas))
    return out


def _view(method: Method, task: Task, parts: tuple[Part, ...]) -> View:
    """All folds read the same features, unless these are fitted on the training rows of each fold."""
    if method.grey:
        fitted = tuple(baselines.fit_grey(method.features, part.of == TRAIN) for part in parts)
        return View(method.name, task, parts, fitted, fitted, method.space)
    points = method.features if method.z is None else method.z
    return View(method.name, task, parts, (method.features,), (points,), method.space, method.own)


class Keeper:
    """Turns what was found into rows of `out`, each with its n, its patients and its share of the time."""

    def __init__(
        self, out: Measured, method: str, task: Task, seed: int, config_digest: str = "", label_fraction: float = 1.0
    ) -> None:
        self.out, self.method, self.task = out, method, task
        self.seed, self.config_digest, self.label_fraction = seed, config_digest, label_fraction

    def unable(self, regime: str, parts: tuple[Part, ...], otherwise: str = "") -> None:
        """A row with a reason for each fold in which no classifier can be trained or tested.

        Args:
            otherwise: the reason where the fold itself is none.
        """
        for part in parts:
            reason = readouts.cannot(part, self.task) or otherwise
            if reason:
                self._row(regime, part, Value(PRIMARY, float("nan"), part.rows(TEST), reason), (0.0, 0.0))

    def answers(self, found: list[Answered], seconds: Seconds) -> None:
        """Answers and every metric that follows from them."""
        for part, answered in found:
            self.out.answers.append(answered)
            for value in values(answered, self.task):
                self._row(answered.regime, part, value, seconds)

    def values(self, regime: str, found: list[Found], seconds: Seconds) -> None:
        """Numbers that come without answers."""
        for part, value, rows in found:
            self._row(regime, part, value, seconds)
            if rows is not None:
                self.out.means.append(rows)

    def _row(self, regime: str, part: Part, value: Value, seconds: Seconds) -> None:
        self.out.rows.append(
            Row(
                method=self.method,
                regime=regime,
                dataset=self.task.name,
                metric=value.metric,
                value=value.value,
                n=len(value.rows),
                n_patients=self.task.patients(value.rows),
                fold=part.fold,
                repeat=part.repeat,
                seed=self.seed,
                label_fraction=self.label_fraction,
                reason=value.reason,
                config_digest=self.config_digest,
                wall_seconds=seconds[0],
                cpu_seconds=seconds[1],
            )
        )


def _timed(run: Callable[[View], Iterator[T]], view: View) -> tuple[list[T], Seconds]:
    """Everything that `run` yields, and the wall and CPU seconds of one fold."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = list(run(view))
    folds = len(view.parts)
    return found, ((time.perf_counter() - wall) / folds, (time.process_time() - cpu) / folds)

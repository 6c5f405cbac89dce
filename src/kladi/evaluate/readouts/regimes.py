"""How a representation is asked: linear probe, votes of neighbours, retrieval, prototypes.

Each regime takes a `View` (the folds, and what a method shows in them) and yields what it found, fold by fold. Whatever
is fitted is fitted on training rows, whatever is chosen is chosen on validation rows, and test rows are read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float32, Int

from kladi.evaluate import metrics
from kladi.evaluate.answers import Answers, RowMean, Task, Value, said
from kladi.evaluate.readouts import neighbours
from kladi.evaluate.readouts.probe import choose, fit_probes
from kladi.evaluate.splits import TEST, TRAIN, VAL
from kladi.losses import geometry as spaces

RECALLS = (1, 5, 10)
HEALTH_ROWS = 2000
"""Rows for the numbers of the representation itself, which cost a singular value decomposition."""


@dataclass(frozen=True)
class Part:
    """One fold of one repeat: which part each row is in."""

    fold: int
    repeat: int
    of: Int[np.ndarray, " n"]

    def rows(self, part: int) -> Int[np.ndarray, " m"]:
        return np.flatnonzero(self.of == part)


@dataclass(frozen=True)
class OwnAnswers:
    """What the classifier says that was trained with the encoder: log probabilities float[n, A] of `names`, nodes."""

    log_p: Float[np.ndarray, "n A"]
    names: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """What one method shows in every fold.

    features: float32[n, F] of each fold, what the probe, the votes and the retrieval read; one matrix for all folds, or
        as many as folds where they were fitted on training rows.
    points: the same for what the prototypes read, in `space`.
    own: answers that need nothing fitted; None where the method has none.
    """

    method: str
    task: Task
    parts: tuple[Part, ...]
    features: tuple[Float32[np.ndarray, "n F"], ...]
    points: tuple[Float32[np.ndarray, "n D"], ...]
    space: spaces.Geometry
    own: OwnAnswers | None = None

    def target(self, rows: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
        return self.task.target[rows]

    def able(self) -> Iterator[tuple[Part, np.ndarray, np.ndarray]]:
        """The folds in which a classifier can be trained and tested, with their features and points."""
        return (shown for shown in self.shown() if not cannot(shown[0], self.task))

    def shown(self) -> Iterator[tuple[Part, np.ndarray, np.ndarray]]:
        """Every fold with its features and points."""
        for i, part in enumerate(self.parts):
            yield part, self.features[i % len(self.features)], self.points[i % len(self.points)]


@dataclass
class ProbeNotes:
    """What must be said of the probes: which penalty each fold chose, and how many were not solved."""

    penalties: list[int] = field(default_factory=list)
    unsolved: int = 0

    def warnings(self, method: str, grid: int) -> list[str]:
        """In words: over 20 % at an end of the grid of penalties; any problem short of the tolerance."""
        found = []
        ends = int(np.isin(self.penalties, (0, grid - 1)).sum())
        if ends > 0.2 * len(self.penalties):
            found.append(f"{method}: {ends} of {len(self.penalties)} probes chose a penalty at an end of the grid")
        if self.unsolved:
            found.append(f"{method}: {self.unsolved} probes did not reach the tolerance")
        return found


Answered = tuple[Part, Answers]
Found = tuple[Part, Value, RowMean | None]


def cannot(part: Part, task: Task) -> str:
    """Why no classifier can be trained or tested in this fold; empty where one can."""
    if len(np.unique(task.target[part.rows(TRAIN)])) < 2:
        return "fewer than two classes to train on"
    return "" if len(part.rows(TEST)) else "no test rows"


def probe(view: View, lambdas: tuple[float, ...], notes: ProbeNotes) -> Iterator[Answered]:
    """Linear probes of all folds and penalties at once; the penalty of each fold is the best on its validation rows."""
    shown = list(view.able())
    if not shown:
        return
    train = np.stack([part.of == TRAIN for part, *_ in shown])
    matrices = view.features[0] if len(view.features) == 1 else [features for _, features, _ in shown]
    probes = fit_probes(matrices, view.task.target, train, lambdas=lambdas)
    notes.unsolved += int((~probes.converged).sum())
    for m, (part, features, _) in enumerate(shown):
        numbers = range(m * len(lambdas), (m + 1) * len(lambdas))
        val, test = part.rows(VAL), part.rows(TEST)
        scores = np.array([[_score(probes.predict(features[val], p), view.target(val)) for p in numbers]])
        best = int(choose(scores, probes.lambdas)[0])
        notes.penalties.append(best)
        log_p = probes.log_probabilities(features[test], numbers[best])
        pred = probes.classes[log_p.argmax(axis=1)]
        yield part, Answers(view.method, "probe", part.fold, part.repeat, test, pred, log_p, probes.classes)


def knn(view: View, ks: tuple[int, ...]) -> Iterator[Answered]:
    """Votes of the nearest training rows; k is the best on validation rows, of equals the larger."""
    for part, features, _ in view.able():
        train, val, test = part.rows(TRAIN), part.rows(VAL), part.rows(TEST)
        gallery, target = features[train], view.target(train)
        classes = np.unique(target)
        fitting = tuple(sorted(k for k in ks if k <= len(train) / 2)) or (1,)
        best = fitting[-1]
        if len(val) and len(fitting) > 1:
            _, winners = neighbours.knn_scores(features[val], gallery, target, classes, fitting)
            scores = [_score(winners[i], view.target(val)) for i in range(len(fitting))]
            best = fitting[len(scores) - 1 - int(np.argmax(scores[::-1]))]
        votes, winners = neighbours.knn_scores(features[test], gallery, target, classes, (best,))
        yield part, Answers(view.method, "knn", part.fold, part.repeat, test, winners[0], votes[0], classes)


def prototype(view: View) -> Iterator[Answered]:
    """Nearest class mean of the training rows, in the geometry of the run."""
    for part, _, points in view.able():
        train, test = part.rows(TRAIN), part.rows(TEST)
        distance, classes = neighbours.nearest_prototype(
            points[test], points[train], view.target(train), space=view.space
        )
        pred = classes[distance.argmin(axis=1)]
        yield part, Answers(view.method, "prototype", part.fold, part.repeat, test, pred, None, classes)


def head(view: View) -> Iterator[Answered]:
    """The answers of the classifier that was trained with the encoder, on the test rows; nothing is fitted.

    Its labels count as the classes of the task that they are, or are below; probabilities are summed and normalised
    over these. Rows whose label has other classes below it are left out, for every method: such a label is a part of
    an answer, and some classifiers cannot give it.
    """
    if view.own is None:
        return
    known, scored = _known_answers(view), _answerable(view.task)
    if len({node for _, node in known}) < 2:
        return
    classes, place = np.unique([node for _, node in known], return_inverse=True)
    log_p = view.own.log_p[:, [column for column, _ in known]].astype(np.float64)
    summed = np.full((len(log_p), len(classes)), -np.inf)
    for column, c in enumerate(place):
        summed[:, c] = np.logaddexp(summed[:, c], log_p[:, column])
    summed -= np.logaddexp.reduce(summed, axis=1, keepdims=True)
    for part in view.parts:
        test = part.rows(TEST)
        test = test[np.isin(view.target(test), scored)]
        if len(test):
            pred = classes[summed[test].argmax(axis=1)]
            yield part, Answers(view.method, "head", part.fold, part.repeat, test, pred, summed[test], classes)


def head_notes(view: View) -> list[str]:
    """What must be said of a classifier's own answers: labels that the task lacks, classes that it lacks, rows that
    are left out."""
    if view.own is None:
        return []
    task, names = view.task, view.task.taxonomy.names
    known, scored = _known_answers(view), _answerable(task)
    said = []
    strangers = len(view.own.names) - len(known)
    if strangers:
        said.append(f"{strangers} of its {len(view.own.names)} labels are none of the task's, and are no answers")
    reached = {node for _, node in known}
    missing = [f'"{names[c]}"' for c in scored.tolist() if c not in reached]
    if missing:
        said.append(f"it knows no label of {', '.join(missing)}, whose images count as errors")
    left_out = int(((task.target >= 0) & ~np.isin(task.target, scored)).sum())
    if left_out:
        said.append(f"{left_out:,} images whose label has other classes below it are left out")
    if len(reached) < 2:
        said.append("it has fewer than two answers here, so it is not asked")
    return [f"{view.method}, its own classifier on {task.name}: {sentence}" for sentence in said]


def _known_answers(view: View) -> list[tuple[int, int]]:
    """(column, node) of the labels that the task knows: the class at or above each."""
    tax, scored = view.task.taxonomy, set(_answerable(view.task).tolist())
    found = []
    for column, name in enumerate(view.own.names if view.own else ()):
        node = view.task.node_of(name)
        if node >= 0:
            found.append((column, next((int(v) for v in tax.ancestors(node)[::-1] if int(v) in scored), node)))
    return found


def _answerable(task: Task) -> Int[np.ndarray, " C"]:
    """The classes without another class below them."""
    classes = np.unique(task.target[task.target >= 0])
    above = {int(v) for c in classes for v in task.taxonomy.ancestors(int(c))[:-1]}
    return np.array([c for c in classes if int(c) not in above], dtype=np.int64)


def retrieval(view: View) -> Iterator[Found]:
    """Queries are the test rows, the gallery the training rows; a query without a match in it is left out."""
    for part, features, _ in view.shown():
        train, test = part.rows(TRAIN), part.rows(TEST)
        found = neighbours.retrieve(features[test], view.target(test), features[train], view.target(train))
        there = found.matched
        reason = "" if there.any() else f"none of {len(test)} queries has a match in the gallery"
        hits = {f"recall_at_{k}": (found.rank < k).astype(np.float64) for k in RECALLS}
        for name, hit in {**hits, "mean_average_precision": found.average_precision}.items():
            value = float(hit[there].mean()) if there.any() else float("nan")
            rows = RowMean(view.method, "retrieval", name, part.fold, part.repeat, test, hit, there)
            yield part, Value(name, value, test[there], reason), rows
        if view.task.has_levels and len(train):
            yield from _tree_distances(view, part, view.target(train)[found.nearest])


def _tree_distances(view: View, part: Part, nearest: Int[np.ndarray, "q k"]) -> Iterator[Found]:
    """How far on the tree the labels of the first k are from the query's, over the largest distance there is."""
    test, tax = part.rows(TEST), view.task.taxonomy
    true = np.broadcast_to(view.target(test)[:, None], nearest.shape)
    far = metrics.tree_distance(nearest.ravel(), true.ravel(), tax).reshape(nearest.shape) / max(tax.diameter, 1)
    everyone = np.ones(len(test), dtype=bool)
    for k in RECALLS:
        name, mean = f"tree_distance_at_{k}", far[:, :k].mean(axis=1)
        value = float(mean.mean()) if len(test) else float("nan")
        rows = RowMean(view.method, "retrieval", name, part.fold, part.repeat, test, mean, everyone)
        yield part, Value(name, value, test, "" if len(test) else "no test rows"), rows


def violations(view: View) -> Iterator[Found]:
    """Parent violation rate, over all rows and at each depth, against prototypes of the training rows."""
    tax, space = view.task.taxonomy, view.space
    curvature, clip = (space.number, space.clip) if isinstance(space, spaces.PoincareBall) else (0.1, 2.3)
    depth = tax.depth
    for part, _, points in view.shown():
        train, test = part.rows(TRAIN), part.rows(TEST)
        true = view.target(test)
        known = metrics.node_prototypes(points[train], view.target(train), tax, space.name, curvature, clip)
        levels = {"parent_violation_rate": depth[true] - 1}
        levels |= {f"violation_rate_{level}": np.full(len(true), level) for level in range(1, int(depth.max()) + 1)}
        for name, level in levels.items():
            violated, counted = metrics.violations(points[test], true, tax, level, space.name, known, curvature, clip)
            value = float(violated[counted].mean()) if counted.any() else float("nan")
            reason = "" if counted.any() else "no row has a prototype of its own and a rival at this depth"
            rows = None
            if name == "parent_violation_rate":
                hits = violated.astype(np.float64)
                rows = RowMean(view.method, "prototype", name, part.fold, part.repeat, test, hits, counted)
            yield part, Value(name, value, test[counted], reason), rows


def health(view: View) -> Iterator[Found]:
    """Numbers of the representation itself, on the rows that are tested in one repeat (2,000 at most)."""
    tested = np.any([part.of == TEST for part in view.parts if part.repeat == view.parts[0].repeat], axis=0)
    rows = np.flatnonzero(tested)[:HEALTH_ROWS]
    features = view.features[0][rows]
    found = metrics.representation_health(features) if len(rows) else {}
    found["uniformity"] = said(lambda: metrics.uniformity(features))[0]
    for name, value in found.items():
        yield view.parts[0], Value(name, value, rows, "" if np.isfinite(value) else "too few rows"), None


def _score(pred: Int[np.ndarray, " m"], true: Int[np.ndarray, " m"]) -> float:
    """The primary metric; nan without rows."""
    return said(lambda: metrics.balanced_accuracy(pred, true))[0]

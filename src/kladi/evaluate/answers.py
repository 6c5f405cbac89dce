"""What a probe, a vote or a prototype answered on the test rows of one fold, and every number that follows from it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from kladi.evaluate import metrics
from kladi.evaluate.bootstrap import Metric
from kladi.evaluate.metrics import weighted
from kladi.structure.taxonomy import Taxonomy

T = TypeVar("T")

PRIMARY = "balanced_accuracy"
SCALE = "learning_rate_scale"
"""A row of a fine-tune: which of the recipe's scales validation rows chose. It says nothing of the answers."""
LOWER_IS_BETTER = frozenset(
    {
        "calibration_error",
        "hierarchical_distance_at_1",
        "hierarchical_distance_at_5",
        "least_cost_distance",
        "mistake_severity",
        "parent_violation_rate",
        "tree_distance_at_1",
        "tree_distance_at_5",
        "tree_distance_at_10",
    }
)
MOST_BINS, ROWS_A_BIN = 15, 20
"""Of a calibration error: in bins of a row or two each it would measure nothing but that answers are right or wrong."""
PROBABILISTIC = frozenset({"head", "probe", "finetune"})
"""Regimes whose scores are logarithms of probabilities."""
MOST_AUC_CLASSES = 12
"""With more classes the AUC gets no interval: resampling ranks is the one thing here that costs minutes."""


@dataclass(frozen=True)
class Task:
    """What is asked of a representation.

    name: "label", or the metadata column that stands in for it.
    taxonomy: the tree of the answers.
    target: int64[n], the node that each row is scored as; -1: the row is out.
    group: int64[n], patients.
    meant: name of a label in the data -> the node here that it counts as; None: nodes have the names of labels.
    """

    name: str
    taxonomy: Taxonomy
    target: Int[np.ndarray, " n"]
    group: Int[np.ndarray, " n"]
    meant: Mapping[str, int] | None = None

    def node_of(self, label: str) -> int:
        """The node that an answer in the labels of the data counts as, -1 where the task does not know it."""
        if self.meant is not None:
            return self.meant.get(label, -1)
        return int(self.taxonomy.index(label)) if label in self.taxonomy else -1

    @property
    def has_levels(self) -> bool:
        """Whether tree metrics say more than accuracy: a tree (no DAG) with more than one level."""
        return self.taxonomy.is_tree and int(self.taxonomy.depth.max(initial=0)) > 1

    def patients(self, rows: Int[np.ndarray, " m"]) -> int:
        return len(np.unique(self.group[rows]))


@dataclass(frozen=True)
class Answers:
    """Answers of one method in one regime on the test rows of one fold.

    rows: int64[m], positions of the test rows.
    pred: int64[m], node ids.
    scores: float64[m, C], higher for more likely, comparable across rows; None where there are none.
    classes: int64[C], the nodes of its columns.
    """

    method: str
    regime: str
    fold: int
    repeat: int
    rows: Int[np.ndarray, " m"]
    pred: Int[np.ndarray, " m"]
    scores: Float[np.ndarray, "m C"] | None
    classes: Int[np.ndarray, " C"]


@dataclass(frozen=True)
class RowMean:
    """A metric that is a mean over test rows of one fold, row by row: what retrieval and prototypes' violations leave.

    rows: int64[m], positions of the test rows. values: float64[m]. counted: bool[m], the rows that enter the mean.
    """

    method: str
    regime: str
    metric: str
    fold: int
    repeat: int
    rows: Int[np.ndarray, " m"]
    values: Float[np.ndarray, " m"]
    counted: Bool[np.ndarray, " m"]


@dataclass(frozen=True)
class Value:
    """A number with what entered it: `rows` are positions. nan has a reason."""

    metric: str
    value: float
    rows: Int[np.ndarray, " m"]
    reason: str = ""


def values(answers: Answers, task: Task) -> Iterator[Value]:
    """Every metric of the answers: flat ones, then those of the tree where there is one."""
    true, pred, tax = task.target[answers.rows], answers.pred, task.taxonomy
    everyone = np.ones(len(true), dtype=bool)

    def one(name: str, compute: Callable[[], float], entered: Bool[np.ndarray, " m"] = everyone) -> Value:
        value, reason = said(compute)
        return Value(name, value, answers.rows[entered], reason)

    yield one("accuracy", lambda: metrics.accuracy(pred, true))
    yield one("balanced_accuracy", lambda: metrics.balanced_accuracy(pred, true))
    yield one("macro_f1", lambda: metrics.macro_f1(pred, true))
    if answers.scores is not None:
        scores, codes = answers.scores, column_of(true, answers.classes)
        yield one("auc", lambda: metrics.macro_roc_auc(scores, codes))
    if int(tax.depth.max(initial=0)) > 1:
        yield one("hierarchical_f1", lambda: metrics.hierarchical_f1(pred, true, tax))
        yield one("hierarchical_f1_macro", lambda: metrics.hierarchical_f1(pred, true, tax, average="macro"))
    if task.has_levels:
        yield one("tree_accuracy", lambda: metrics.tree_accuracy(pred, true, tax))
        yield one("mistake_severity", lambda: metrics.mistake_severity(pred, true, tax), pred != true)
        found, reason = said(lambda: metrics.level_accuracy(pred, true, tax))
        for level, value in enumerate(found, start=1):
            why = reason if math.isnan(value) else ""
            yield Value(f"level_accuracy_{level}", float(value), answers.rows[tax.depth[true] >= level], why)
    yield from _calibration(answers, task)
    yield from _distances(answers, task)


def _distances(answers: Answers, task: Task) -> Iterator[Value]:
    """How far from the truth the likeliest classes lie, and the answer of least expected cost."""
    if answers.scores is None or answers.regime not in PROBABILISTIC or not task.has_levels or not len(answers.rows):
        return
    true, tax, classes = task.target[answers.rows], task.taxonomy, answers.classes
    ranked = classes[np.argsort(-answers.scores, axis=1, kind="stable")]
    for k in (1, 5):
        if k <= min(len(classes), len(tax.leaves)):
            value, reason = said(lambda k=k: metrics.hierarchical_distance_at_k(ranked, true, tax, k))
            yield Value(f"hierarchical_distance_at_{k}", value, answers.rows, reason)
    cheapest = metrics.least_cost(answers.scores, classes, tax)
    distance = metrics.lca_height(cheapest, true, tax).astype(np.float64)
    yield Value("least_cost_distance", float(distance.mean()), answers.rows)
    yield Value("least_cost_accuracy", metrics.accuracy(cheapest, true), answers.rows)


def _calibration(answers: Answers, task: Task) -> Iterator[Value]:
    """Whether probabilities mean what they say: of the likeliest class, and of the likeliest node of each depth."""
    if answers.scores is None or answers.regime not in PROBABILISTIC:
        return
    true, tax, log_p = task.target[answers.rows], task.taxonomy, answers.scores
    confidence = np.minimum(np.exp(log_p.max(axis=1, initial=-math.inf)), 1)
    bins = max(1, min(MOST_BINS, len(true) // ROWS_A_BIN))
    value, reason = said(lambda: metrics.expected_calibration_error(confidence, answers.pred == true, bins))
    yield Value("calibration_error", value, answers.rows, reason)
    if task.has_levels:
        found, reason = said(lambda: metrics.level_calibration_error(log_p, answers.classes, true, tax, bins))
        for level, value in enumerate(found, start=1):
            why = reason if math.isnan(value) else ""
            yield Value(f"calibration_error_{level}", float(value), answers.rows[tax.depth[true] >= level], why)


def resampled(answers: Answers, task: Task) -> dict[str, Metric]:
    """The same metrics, those that get an interval, as functions of row weights for the patient bootstrap."""
    true, pred, tax = task.target[answers.rows], answers.pred, task.taxonomy
    found = {
        "accuracy": weighted.mean((pred == true).astype(np.float64)),
        "balanced_accuracy": weighted.balanced_accuracy(pred, true),
        "macro_f1": weighted.macro_f1(pred, true),
    }
    if answers.scores is not None and len(answers.classes) <= MOST_AUC_CLASSES:
        found["auc"] = weighted.macro_auc(answers.scores, true, answers.classes)
    if int(tax.depth.max(initial=0)) > 1 and len(true):
        shared, size_pred, size_true = _overlaps(pred, true, tax)
        found["hierarchical_f1"] = weighted.hierarchical_f1(shared, size_pred, size_true)
        found["hierarchical_f1_macro"] = weighted.hierarchical_f1(shared, size_pred, size_true, true)
    if task.has_levels and len(true):
        d, D = metrics.tree_distance(pred, true, tax).astype(np.float64), float(tax.diameter)
        found["tree_accuracy"] = weighted.mean(np.maximum(0.0, 1 - d / D) if D else (d == 0).astype(np.float64))
        height = metrics.lca_height(pred, true, tax).astype(np.float64)
        found["mistake_severity"] = weighted.mean(height, pred != true)
        if answers.scores is not None and answers.regime in PROBABILISTIC:
            found["hierarchical_distance_at_1"] = weighted.mean(height)
            cheapest = metrics.least_cost(answers.scores, answers.classes, tax)
            distance = metrics.lca_height(cheapest, true, tax).astype(np.float64)
            found["least_cost_distance"] = weighted.mean(distance)
    return found


def said(compute: Callable[[], T]) -> tuple[T, str]:
    """A metric's value, and in its own words why it is undefined, where it is."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", metrics.UndefinedMetric)
        value = compute()
    reasons = [str(w.message) for w in heard if issubclass(w.category, metrics.UndefinedMetric)]
    return value, "; ".join(reasons)


def column_of(target: Int[np.ndarray, " m"], classes: Int[np.ndarray, " C"]) -> Int[np.ndarray, " m"]:
    """Column of each target among ascending `classes`, -1 where it has none."""
    place = np.minimum(np.searchsorted(classes, target), len(classes) - 1)
    return np.where(classes[place] == target, place, -1)


def _overlaps(pred: np.ndarray, true: np.ndarray, tax: Taxonomy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """#(A(p) & A(t)), #A(p), #A(t) of each row, float64[n]; each pair of nodes is looked up once."""
    pairs, inverse = np.unique(np.stack([pred, true], axis=1), axis=0, return_inverse=True)
    above = {int(node): frozenset(tax.ancestors(int(node)).tolist()) for node in np.unique(pairs)}
    sizes = [(len(above[p] & above[t]), len(above[p]), len(above[t])) for p, t in pairs.tolist()]
    shared, size_pred, size_true = np.array(sizes, dtype=np.float64)[inverse.reshape(-1)].T
    return shared, size_pred, size_true

"""The metrics again, with a weight a row and many weightings at once: what the patient bootstrap needs.

Most metrics are a function of sums over rows, so `weights @ row_terms` computes all draws in one product. Every
function returns `Metric`: weights float64[B, n] -> values float64[B], nan where undefined. With weights of one they
equal `metrics.py`, which is the reference; a test holds them together.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from kladi.evaluate.bootstrap import Metric


def mean(values: Float[np.ndarray, " n"], present: Bool[np.ndarray, " n"] | None = None) -> Metric:
    """Weighted mean of `values` over the rows that are `present`: accuracy, tree accuracy, recall at k, severity."""
    there = np.ones(len(values)) if present is None else present.astype(np.float64)
    terms = np.stack([np.where(there > 0, values, 0.0), there], axis=1)

    def metric(weights: np.ndarray) -> np.ndarray:
        total, count = (weights @ terms).T
        return _ratio(total, count)

    return metric


def balanced_accuracy(pred: Int[np.ndarray, " n"], true: Int[np.ndarray, " n"]) -> Metric:
    """Mean recall over the classes present."""
    is_true = _one_hot(true, np.unique(true))
    hit = is_true * (pred == true)[:, None]

    def metric(weights: np.ndarray) -> np.ndarray:
        return _mean_of_defined(_ratio(weights @ hit, weights @ is_true))

    return metric


def macro_f1(pred: Int[np.ndarray, " n"], true: Int[np.ndarray, " n"]) -> Metric:
    """Mean of 2TP / (2TP + FP + FN) over the classes in either."""
    classes = np.union1d(pred, true)
    is_true, is_pred = _one_hot(true, classes), _one_hot(pred, classes)

    def metric(weights: np.ndarray) -> np.ndarray:
        return _mean_of_defined(_ratio(2 * (weights @ (is_true * is_pred)), weights @ (is_true + is_pred)))

    return metric


def hierarchical_f1(
    shared: Float[np.ndarray, " n"],
    pred_size: Float[np.ndarray, " n"],
    true_size: Float[np.ndarray, " n"],
    true: Int[np.ndarray, " n"] | None = None,
) -> Metric:
    """F1 of summed ancestor sets; with `true`, inside each true node and then averaged (macro).

    2PR/(P+R) with P = shared/pred and R = shared/true is 2 shared / (pred + true), 0 where nothing is shared.
    """
    apart = np.ones((len(shared), 1)) if true is None else _one_hot(true, np.unique(true))
    both, sizes = 2 * shared[:, None] * apart, (pred_size + true_size)[:, None] * apart

    def metric(weights: np.ndarray) -> np.ndarray:
        return _mean_of_defined(_ratio(weights @ both, weights @ sizes))

    return metric


def auc(score: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> Metric:
    """Share of (positive, negative) pairs in order, ties one half; nan without a positive or a negative."""
    order = np.argsort(score, kind="stable")
    ranked = score[order]  # compared, not subtracted: a log-probability may be -inf
    starts = np.flatnonzero(np.r_[True, ranked[1:] > ranked[:-1]]) if len(score) else np.zeros(0, dtype=int)

    def metric(weights: np.ndarray) -> np.ndarray:
        if not len(score):
            return np.full(len(weights), np.nan)
        sorted_weights = weights[:, order]
        plus = np.add.reduceat(sorted_weights * positive[order], starts, axis=1)
        minus = np.add.reduceat(sorted_weights * ~positive[order], starts, axis=1)
        below = np.cumsum(minus, axis=1) - minus / 2
        return _ratio((plus * below).sum(axis=1), plus.sum(axis=1) * minus.sum(axis=1))

    return metric


def macro_auc(scores: Float[np.ndarray, "n C"], true: Int[np.ndarray, " n"], classes: Int[np.ndarray, " C"]) -> Metric:
    """Mean one-versus-rest AUC over the classes where it is defined."""
    each = [auc(scores[:, c], true == node) for c, node in enumerate(classes)]

    def metric(weights: np.ndarray) -> np.ndarray:
        return _mean_of_defined(np.stack([one(weights) for one in each], axis=1))

    return metric


def _one_hot(values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return (values[:, None] == classes).astype(np.float64)


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.where(under > 0, over / np.where(under > 0, under, 1.0), np.nan)


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of the entries that are not nan; nan where there is none."""
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    return _ratio(np.where(known, values, 0.0).sum(axis=-1), count)

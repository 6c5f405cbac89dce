"""Metrics that know no tree: class ids, scores and probabilities in, one float out; undefined is nan, never zero.

Classes are any int64 ids. Undefined values warn once with `UndefinedMetric`, one line that says why, and come back as
nan, so that a table shows a gap instead of a number that was never measured.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import rankdata
from torch import Tensor

Ids = Int[np.ndarray | Tensor, " n"]
Scores = Float[np.ndarray | Tensor, " n"]
Flags = Bool[np.ndarray | Tensor, " n"]
Matrix = Float[np.ndarray | Tensor, "n C"]


class UndefinedMetric(UserWarning):
    """A metric has no value here; it came back as nan."""


def undefined(why: str) -> float:
    """nan, with a warning of one line that says why."""
    warnings.warn(why, UndefinedMetric, stacklevel=3)
    return math.nan


def as_array(values: np.ndarray | Tensor) -> np.ndarray:
    """The same numbers as a NumPy array, whichever of the two they came in."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def as_float64(values: np.ndarray | Tensor, name: str) -> np.ndarray:
    """As float64; ValueError naming the argument where a value is nan."""
    array = as_array(values).astype(np.float64)
    if np.isnan(array).any():
        raise ValueError(f"{name} holds {int(np.isnan(array).sum())} nan; a score that is not known cannot be ranked")
    return array


# --- right or wrong ------------------------------------------------------------------------------------------------


def accuracy(pred: Ids, true: Ids) -> float:
    """Share of `pred = true`. An inner node predicted for a leaf is wrong. nan for no rows."""
    p, t = as_array(pred), as_array(true)
    return float(np.mean(p == t)) if len(t) else undefined("accuracy of no rows")


def class_recalls(pred: Ids, true: Ids) -> tuple[Int[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """The classes that occur in `true`, ascending, and the recall of each."""
    p, t = as_array(pred), as_array(true)
    classes, inverse, count = np.unique(t, return_inverse=True, return_counts=True)
    return classes, np.bincount(inverse, weights=p == t, minlength=len(classes)) / count


def balanced_accuracy(pred: Ids, true: Ids) -> float:
    """Mean recall over the classes that occur in `true`; one that does not occur leaves the mean. nan for no rows."""
    recalls = class_recalls(pred, true)[1]
    return float(recalls.mean()) if len(recalls) else undefined("balanced accuracy of no rows")


def macro_f1(pred: Ids, true: Ids) -> float:
    """Mean over classes that occur in `true` or `pred` of 2TP / (2TP + FP + FN). nan for no rows."""
    p, t = as_array(pred), as_array(true)
    if not len(t):
        return undefined("macro F1 of no rows")
    classes, inverse = np.unique(np.concatenate([p, t]), return_inverse=True)
    p, t = inverse[: len(p)], inverse[len(p) :]
    hits = np.bincount(t[p == t], minlength=len(classes))
    total = np.bincount(p, minlength=len(classes)) + np.bincount(t, minlength=len(classes))  # 2TP + FP + FN
    return float(np.mean(2 * hits / total))


# --- ranking -------------------------------------------------------------------------------------------------------


def roc_auc(score: Scores, positive: Flags) -> float:
    """Area under the ROC curve of one class: `(R+ - n+ (n+ + 1) / 2) / (n+ n-)`, R+ the midranks of the positives.

    The chance that a positive scores above a negative, ties counting half. nan where a class is absent or alone.
    Raises ValueError for a nan score.

    >>> roc_auc(np.array([0.9, 0.8, 0.1]), np.array([True, False, False]))
    1.0
    """
    s, y = as_float64(score, "score"), as_array(positive)
    n_positive = int(y.sum())
    n_negative = len(y) - n_positive
    if not n_positive or not n_negative:
        return undefined(f"AUC of {n_positive} positive and {n_negative} negative rows")
    return float((rankdata(s)[y].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def roc_auc_per_class(score: Matrix, true: Ids) -> Float[np.ndarray, " C"]:
    """One-versus-rest AUC of each column c against `true = c`; nan, without a warning, where it is undefined.

    Args:
        score: higher for more likely. One class against the rest ranks across samples, so give log-probabilities:
            raw logits carry an offset of their own in each row.
        true: column index of each row's class.
    """
    s, t = as_float64(score, "score"), as_array(true)
    areas = np.full(s.shape[1], math.nan)
    for c in range(s.shape[1]):
        positive = t == c
        if 0 < positive.sum() < len(t):
            areas[c] = roc_auc(s[:, c], positive)
    return areas


def macro_roc_auc(score: Matrix, true: Ids) -> float:
    """Mean of `roc_auc_per_class` over the classes where it is defined; warns of the others; nan if none is."""
    areas = roc_auc_per_class(score, true)
    known = ~np.isnan(areas)
    if not known.all():
        absent = ", ".join(str(c) for c in np.flatnonzero(~known)[:20])
        undefined(f"AUC is defined for {known.sum()} of {len(areas)} classes; absent or alone: {absent}")
    return float(areas[known].mean()) if known.any() else math.nan


def average_precision(score: Scores, positive: Flags) -> float:
    """`sum_n (R_n - R_{n-1}) P_n` over the distinct thresholds, from the highest down. No interpolation.

    A constant scorer gets the prevalence, so print that beside it. nan without a positive. ValueError for a nan score.
    """
    s, y = as_float64(score, "score"), as_array(positive)
    if not y.any():
        return undefined("average precision without a positive row")
    order = np.argsort(-s, kind="stable")
    s, hits = s[order], np.cumsum(y[order])
    last = np.append(np.flatnonzero(s[1:] != s[:-1]), len(s) - 1)  # equal scores enter together
    precision, recall = hits[last] / (last + 1), hits[last] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


# --- calibration ---------------------------------------------------------------------------------------------------


def _bin_gaps(confidence: Scores, correct: Flags, bins: int, binning: str) -> tuple[np.ndarray, np.ndarray]:
    """Share of rows and |accuracy - confidence| of each bin; empty bins have no share and no gap."""
    p, right = as_float64(confidence, "confidence"), as_array(correct)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}; 15 is the default")
    if binning not in {"auto", "width", "mass"}:
        raise ValueError(f'binning must be "auto", "width" or "mass", not {binning!r}')
    if len(p) and (p.min() < 0 or p.max() > 1 + 1e-6):
        raise ValueError(f"confidence must lie in [0, 1]; it runs from {p.min():.6g} to {p.max():.6g}")
    if binning == "width" or (binning == "auto" and len(p) >= 500):
        inner = np.linspace(0, 1, bins + 1)[1:-1]
    else:
        inner = np.unique(np.quantile(p, np.linspace(0, 1, bins + 1)[1:-1])) if len(p) else np.empty(0)
    # (lo, hi]: a value on an edge falls below it. The 1e-12 keeps 0.6 below the edge that rounding made of 3/5.
    index = np.searchsorted(inner + 1e-12, p, side="left")
    count = np.bincount(index, minlength=bins)
    gap = np.abs(np.bincount(index, weights=right - p, minlength=bins)) / np.maximum(count, 1)
    return count / max(len(p), 1), gap


def expected_calibration_error(confidence: Scores, correct: Flags, bins: int = 15, binning: str = "auto") -> float:
    """`sum_b (n_b / n) |accuracy_b - confidence_b|` over bins (lo, hi] of the top probability. nan for no rows.

    Args:
        confidence: probability of the predicted class.
        correct: whether that prediction was right.
        bins: how many.
        binning: "width" (equal widths of [0, 1]), "mass" (equal counts; ties stay together), or "auto": mass below
            500 rows, where most bins of equal width would be all but empty.
    """
    share, gap = _bin_gaps(confidence, correct, bins, binning)
    return float(share @ gap) if share.any() else undefined("calibration error of no rows")


def maximum_calibration_error(confidence: Scores, correct: Flags, bins: int = 15, binning: str = "auto") -> float:
    """The largest |accuracy - confidence| of a bin that is not empty; arguments of `expected_calibration_error`."""
    share, gap = _bin_gaps(confidence, correct, bins, binning)
    return float(gap[share > 0].max()) if share.any() else undefined("calibration error of no rows")


def negative_log_likelihood(log_probability: Matrix, true: Ids) -> float:
    """Mean of `-log p(true)`; infinite where the truth was given no probability. nan for no rows."""
    q, t = as_float64(log_probability, "log_probability"), as_array(true)
    return float(-np.mean(q[np.arange(len(t)), t])) if len(t) else undefined("log-likelihood of no rows")


def brier_score(probability: Matrix, true: Ids) -> float:
    """Mean of `sum_c (p_c - y_c)^2`: 0 at best, 2 at worst. nan for no rows."""
    p, t = as_float64(probability, "probability"), as_array(true)
    if not len(t):
        return undefined("Brier score of no rows")
    one_hot = np.arange(p.shape[1]) == t[:, None]
    return float(np.mean(((p - one_hot) ** 2).sum(1)))


def fit_temperature(logits: Matrix, true: Ids) -> float:
    """The T > 0 that makes `softmax(logits / T)` most likely; fit it on validation rows, then divide test logits by it.

    Searched in [e^-5, e^5], where the likelihood has one peak. nan for no rows.
    """
    z, t = as_float64(logits, "logits"), as_array(true)
    if not len(t):
        return undefined("temperature of no rows")

    def loss(log_temperature: float) -> float:
        return float(-np.mean(log_softmax(z / np.exp(log_temperature), axis=1)[np.arange(len(t)), t]))

    return float(np.exp(minimize_scalar(loss, bounds=(-5.0, 5.0), method="bounded", options={"xatol": 1e-8}).x))

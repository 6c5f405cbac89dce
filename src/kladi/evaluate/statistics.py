"""Is the difference real? Paired tests over folds, exact where it can be, and intervals by patient.

Ask first what a number must survive: another seed on the same folds says least, another split more, another patient is
what a reader assumes. The corrected resampled t answers for another split, the patient bootstrap (`bootstrap.py`) for
another patient; the verdict needs both. Everything here is a pure function of numbers, float64, deterministic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

EXACT_PAIRS = 50
FEWEST_PAIRS = 6
"""Below six nonzero pairs no exact two-sided p can reach .05, so the word "significant" is unavailable."""

VERDICTS = ("better", "worse", "leans better", "leans worse", "equal within margin", "cannot tell")


@dataclass(frozen=True)
class TTest:
    """Corrected resampled t: `statistic` and `p` are nan where undefined (no spread, but a mean that is not zero)."""

    mean: float
    sd: float
    statistic: float
    p: float
    degrees: int
    interval: tuple[float, float]


@dataclass(frozen=True)
class Wilcoxon:
    """Signed-rank test of `n` nonzero pairs; `least_p` is the least p that n pairs can reach at all."""

    n: int
    zeros: int
    plus: float
    minus: float
    p: float
    least_p: float
    exact: bool

    @property
    def conclusive(self) -> bool:
        """Whether the word "significant" is available: six nonzero pairs or more."""
        return self.n >= FEWEST_PAIRS


def corrected_resampled_t(
    differences: Float[np.ndarray, " J"], *, rho: float = 1 / 3, confidence: float = 0.95
) -> TTest:
    """Two-sided t test of paired fold differences whose training sets overlap.

    `t = mean / sqrt((1/J + rho) s^2)`, s the sample standard deviation, J - 1 degrees of freedom.
    Repeats cannot buy significance: the standard error never falls below sqrt(rho) s.

    Args:
        differences: one a fold and repeat, float64[J].
        rho: test size over training size; 1/3 for a 60/20/20 split.
        confidence: of the interval around the mean.

    Source: Nadeau and Bengio, Inference for the generalization error, Machine Learning 52 (2003).
    Edges: s = 0 gives p = 1 where the mean is zero too, else nan (undefined). One difference: nan.

    Raises:
        ValueError: no difference, one that is not finite, or rho <= 0.
    """
    d = _finite(differences)
    if not rho > 0:
        raise ValueError(f"rho = {rho} is not positive; it is the test size over the training size")
    mean, degrees = float(d.mean()), len(d) - 1
    sd = float(d.std(ddof=1)) if degrees else math.nan
    # All equal numbers can show a spread of rounding errors; that is no spread.
    if sd <= 1e-14 * float(np.abs(d).max()):
        sd = 0.0
    if not sd > 0:
        same = sd == 0 and mean == 0
        return TTest(mean, sd, 0.0 if same else math.nan, 1.0 if same else math.nan, degrees, (mean, mean))
    error = math.sqrt((1 / len(d) + rho) * sd**2)
    half = float(stats.t.ppf(0.5 + confidence / 2, degrees)) * error
    p = float(2 * stats.t.sf(abs(mean / error), degrees))
    return TTest(mean, sd, mean / error, p, degrees, (mean - half, mean + half))


def wilcoxon(differences: Float[np.ndarray, " n"]) -> Wilcoxon:
    """Two-sided Wilcoxon signed-rank test, exact with ties up to 50 nonzero pairs.

    W+ = sum of the midranks of |d| over the positive d. The exact null distribution comes from dynamic programming over
    the *observed* ranks (doubled, so that midranks are whole): each sign is a fair coin.
    p = min(1, 2 min(P(W <= w), P(W >= w))). Above 50 pairs: normal, variance sum(rank^2)/4, which is the usual tie
    correction, with a continuity correction of a half.

    Edges: zeros are dropped and counted; no nonzero pair gives p = 1. The least p of n pairs is 2^(1-n).

    Raises:
        ValueError: no difference, or one that is not finite.
    """
    d = _finite(differences)
    nonzero = d[d != 0]
    n, zeros = len(nonzero), int((d == 0).sum())
    if n == 0:
        return Wilcoxon(0, zeros, 0.0, 0.0, 1.0, 1.0, True)
    ranks = stats.rankdata(np.abs(nonzero))
    plus, minus = float(ranks[nonzero > 0].sum()), float(ranks[nonzero < 0].sum())
    least = 2.0 ** (1 - n)
    if n <= EXACT_PAIRS:
        doubled = np.rint(2 * ranks).astype(np.int64)
        probability = _signed_rank_null(doubled)
        smaller = round(2 * min(plus, minus))
        # The null is symmetric, so the lower tail of the smaller sum is either tail.
        p = min(1.0, 2 * float(probability[: smaller + 1].sum()))
        return Wilcoxon(n, zeros, plus, minus, max(p, least), least, True)
    spread = math.sqrt(float((ranks**2).sum()) / 4)
    z = max(0.0, abs(plus - ranks.sum() / 2) - 0.5) / spread
    return Wilcoxon(n, zeros, plus, minus, float(2 * stats.norm.sf(z)), least, False)


def _signed_rank_null(doubled_ranks: np.ndarray) -> np.ndarray:
    """P(2 W+ = w) for w = 0..sum of the doubled ranks, when every sign is a fair coin."""
    probability = np.zeros(int(doubled_ranks.sum()) + 1)
    probability[0] = 1.0
    for rank in doubled_ranks:
        shifted = np.zeros_like(probability)
        shifted[rank:] = probability[: len(probability) - rank]
        probability = (probability + shifted) / 2
    return probability


def holm(p: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Holm-adjusted p values: running maximum of (m - i) p_(i), at most 1, in the order given.

    A nan (an undefined test) stays nan and still counts in m: a test that was planned was paid for.

    Raises:
        ValueError: a p outside 0..1.
    """
    values = np.asarray(p, dtype=np.float64)
    if ((values < 0) | (values > 1)).any():
        raise ValueError("a p value lies between 0 and 1")
    order = np.argsort(values, kind="stable")  # nan sorts last
    factor = len(values) - np.arange(len(values))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factor))
    return adjusted


def hodges_lehmann(differences: Float[np.ndarray, " n"]) -> float:
    """Median of the Walsh averages (d_i + d_j)/2, i <= j: the shift that the signed-rank test estimates.

    Zeros count, as they are differences like any other.
    """
    d = _finite(differences)
    i, j = np.triu_indices(len(d))
    return float(np.median((d[i] + d[j]) / 2))


def rank_biserial(differences: Float[np.ndarray, " n"]) -> float:
    """(W+ - W-)/(W+ + W-): 1 if every nonzero difference is positive, -1 if negative; 0 where all are zero."""
    test = wilcoxon(differences)
    total = test.plus + test.minus
    return (test.plus - test.minus) / total if total else 0.0


def verdict(
    difference: float, *, interval: tuple[float, float] | None, holm_p: float | None, margin: float = 0.01
) -> str:
    """One of `VERDICTS`, the only words that a report uses for a comparison.

    better, worse: Holm p < .05 and the interval excludes 0. Else *equal within margin*: the whole interval lies
    inside +-margin, which was declared beforehand. Else leans better, leans worse: the interval alone excludes 0.
    Else cannot tell. Equality goes before leaning, because an effect below the margin was declared not to matter.

    Args:
        difference: method minus reference, higher is better.
        interval: of the difference, by patient; None where there is none: nothing can be told.
        holm_p: adjusted p of the corrected t; None or nan where there is no such test (one official split).
    """
    if interval is None or not all(map(math.isfinite, (*interval, difference))):
        return "cannot tell"
    low, high = interval
    excludes_zero = low > 0 or high < 0
    word = "better" if low > 0 else "worse"
    if excludes_zero and holm_p is not None and holm_p < 0.05:
        return word
    if -margin <= low and high <= margin:
        return "equal within margin"
    return f"leans {word}" if excludes_zero else "cannot tell"


def repeat_means(values: Float[np.ndarray, "repeats folds"]) -> Float[np.ndarray, " repeats"]:
    """Mean over the folds of each repeat, the pairs of the Wilcoxon test; a repeat without a defined fold is nan."""
    defined: Bool[np.ndarray, "repeats folds"] = np.isfinite(values)
    count = defined.sum(axis=1)
    total = np.where(defined, values, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _finite(differences: np.ndarray) -> np.ndarray:
    d = np.asarray(differences, dtype=np.float64)
    if not len(d):
        raise ValueError("no differences to test")
    if not np.isfinite(d).all():
        raise ValueError("a difference is not finite; leave the pair out, and count it")
    return d

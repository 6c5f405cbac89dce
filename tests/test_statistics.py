"""Worked values of the evaluation sheet, exact tests against enumeration, and simulations of what a test is worth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from kladi.evaluate import statistics
from kladi.evaluate.bootstrap import PatientDraws, draw_means, patient_draws, percentile_interval
from kladi.evaluate.metrics import weighted
from kladi.evaluate.statistics import (
    VERDICTS,
    corrected_resampled_t,
    hodges_lehmann,
    holm,
    rank_biserial,
    repeat_means,
    verdict,
    wilcoxon,
)

WORKED = np.array([0.021, 0.013, -0.004, 0.018, 0.009, 0.011, 0, 0.015, 0.006, -0.002])


# --- corrected resampled t ---------------------------------------------------------------------------------------


def test_worked_corrected_t():
    test = corrected_resampled_t(WORKED)
    assert test.mean == pytest.approx(0.0087, abs=1e-9)
    assert test.sd == pytest.approx(0.008564, abs=1e-6)
    assert test.statistic == pytest.approx(1.5432, abs=5e-5)
    assert test.p == pytest.approx(0.157, abs=5e-4)
    assert test.interval == pytest.approx((-0.0041, 0.0215), abs=5e-5)
    quarter = corrected_resampled_t(WORKED, rho=0.25)
    assert (quarter.statistic, quarter.p) == pytest.approx((1.7171, 0.120), abs=5e-4)


def test_corrected_t_from_its_definition_and_its_limit():
    d, J, rho = WORKED, len(WORKED), 1 / 3
    s2 = sum((x - sum(d) / J) ** 2 for x in d) / (J - 1)
    t = (sum(d) / J) / math.sqrt((1 / J + rho) * s2)
    assert corrected_resampled_t(d).statistic == pytest.approx(t, rel=1e-12)
    # rho to zero is the plain paired t.
    plain = stats.ttest_1samp(d, 0)
    near = corrected_resampled_t(d, rho=1e-12)
    assert (near.statistic, near.p) == pytest.approx((plain.statistic, plain.pvalue), rel=1e-6)
    assert near.p == pytest.approx(0.0106, abs=5e-5)


def test_repeats_cannot_buy_significance():
    few, many = corrected_resampled_t(WORKED), corrected_resampled_t(np.tile(WORKED, 100))
    floor = math.sqrt(1 / 3) * many.sd
    assert many.mean / many.statistic >= floor
    assert many.statistic < 1.3 * few.statistic


def test_no_spread_is_one_or_undefined():
    assert corrected_resampled_t(np.zeros(5)).p == 1
    constant = corrected_resampled_t(np.full(7, 0.1))
    assert math.isnan(constant.p)
    assert constant.mean == pytest.approx(0.1)
    assert math.isnan(corrected_resampled_t(np.array([0.3])).p)


@pytest.mark.parametrize("bad", [np.array([]), np.array([0.1, np.nan])])
def test_tests_refuse_nothing_and_nan(bad):
    for test in (corrected_resampled_t, wilcoxon, hodges_lehmann):
        with pytest.raises(ValueError, match="difference"):
            test(bad)


def test_rho_must_be_positive():
    with pytest.raises(ValueError, match="rho"):
        corrected_resampled_t(WORKED, rho=0.0)


# --- Wilcoxon ----------------------------------------------------------------------------------------------------


def test_worked_wilcoxon_and_effects():
    test = wilcoxon(WORKED)
    assert (test.n, test.zeros, test.plus) == (9, 1, 42)
    assert test.p == pytest.approx(0.01953, abs=5e-6)
    assert test.least_p == pytest.approx(0.00390625, abs=1e-12)
    assert rank_biserial(WORKED) == pytest.approx(0.866667, abs=1e-6)
    assert hodges_lehmann(WORKED) == pytest.approx(0.009, abs=1e-9)


def enumerated(d):
    """Exact p over all sign patterns of the observed midranks."""
    d = d[d != 0]
    ranks = stats.rankdata(np.abs(d))
    sums = np.array(
        [sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in itertools.product([0, 1], repeat=len(d))]
    )
    observed = ranks[d > 0].sum()
    return min(1.0, 2 * min((sums <= observed + 1e-9).mean(), (sums >= observed - 1e-9).mean()))


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
@settings(max_examples=60)
def test_wilcoxon_equals_enumeration_with_ties_and_zeros(values):
    d = np.array(values, dtype=float)
    test = wilcoxon(d)
    if not d.any():
        assert test.p == 1
        return
    assert test.p == pytest.approx(enumerated(d), abs=1e-12)
    assert test.p == pytest.approx(wilcoxon(-d).p, abs=1e-12)
    assert test.p >= test.least_p
    assert rank_biserial(-d) == pytest.approx(-rank_biserial(d))


@pytest.mark.parametrize("n", [12, 50, 51, 200])
def test_wilcoxon_equals_scipy_without_ties(n):
    d = np.random.default_rng(n).normal(0.3, 1, n)
    method = "exact" if n <= 50 else "asymptotic"
    theirs = stats.wilcoxon(d, method=method, correction=True)
    assert wilcoxon(d).p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert wilcoxon(d).exact == (n <= 50)


def test_normal_form_corrects_for_ties():
    d = np.random.default_rng(0).integers(-5, 7, 90).astype(float)
    theirs = stats.wilcoxon(d, method="asymptotic", correction=True, zero_method="wilcox")
    assert wilcoxon(d).p == pytest.approx(theirs.pvalue, rel=1e-9)


@pytest.mark.parametrize(
    ("n", "least"), [(3, 0.25), (4, 0.125), (5, 0.0625), (6, 0.03125), (7, 0.015625), (8, 0.0078125), (10, 0.001953125)]
)
def test_the_least_p_is_reached_and_under_six_pairs_nothing_is_significant(n, least):
    test = wilcoxon(np.arange(1.0, n + 1))
    assert test.p == least == test.least_p
    assert test.conclusive == (n >= 6)


def test_all_zero_differences():
    test = wilcoxon(np.zeros(8))
    assert (test.p, test.n, test.zeros) == (1.0, 0, 8)
    assert not test.conclusive
    assert rank_biserial(np.zeros(8)) == 0


# --- Holm, verdicts ----------------------------------------------------------------------------------------------


def test_worked_holm():
    np.testing.assert_allclose(holm(np.array([0.012, 0.03, 0.004, 0.2])), [0.036, 0.06, 0.016, 0.2], atol=1e-12)
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03])), [0.03, 0.06, 0.06], atol=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_helps_keeps_order_and_stays_between_p_and_bonferroni(p):
    p = np.array(p)
    adjusted = holm(p)
    assert (adjusted >= p - 1e-15).all()
    assert (adjusted <= np.minimum(1, len(p) * p) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_holm_counts_undefined_tests_and_refuses_what_is_no_p():
    np.testing.assert_allclose(holm(np.array([np.nan, 0.01])), [np.nan, 0.02])
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm(np.array([1.2]))


@pytest.mark.parametrize(
    ("difference", "interval", "p", "word"),
    [
        (0.05, (0.02, 0.08), 0.01, "better"),
        (-0.05, (-0.08, -0.02), 0.01, "worse"),
        (0.05, (0.02, 0.08), 0.2, "leans better"),
        (-0.05, (-0.08, -0.02), 0.05, "leans worse"),
        (0.05, (0.02, 0.08), None, "leans better"),
        (0.05, (0.02, 0.08), math.nan, "leans better"),
        (0.05, (-0.02, 0.12), 0.01, "cannot tell"),
        (0.001, (-0.009, 0.01), 0.9, "equal within margin"),
        (0.005, (0.001, 0.009), 0.9, "equal within margin"),
        (0.005, (0.001, 0.009), 0.001, "better"),
        (0.05, None, 0.001, "cannot tell"),
        (math.nan, (math.nan, math.nan), 0.001, "cannot tell"),
        (0.0, (0.0, 0.0), 1.0, "equal within margin"),
    ],
)
def test_verdicts(difference, interval, p, word):
    assert verdict(difference, interval=interval, holm_p=p) == word
    assert word in VERDICTS


def test_the_margin_is_declared():
    assert verdict(0.0, interval=(-0.02, 0.02), holm_p=1.0, margin=0.03) == "equal within margin"
    assert verdict(0.0, interval=(-0.02, 0.02), holm_p=1.0, margin=0.01) == "cannot tell"


def test_repeat_means_leave_undefined_folds_out():
    values = np.array([[1.0, 3.0], [np.nan, 5.0], [np.nan, np.nan]])
    np.testing.assert_array_equal(repeat_means(values), [2, 5, np.nan])


# --- weighted metrics --------------------------------------------------------------------------------------------


@pytest.fixture
def answers():
    rng = np.random.default_rng(5)
    true = rng.integers(0, 4, 60)
    pred = np.where(rng.random(60) < 0.5, true, rng.integers(0, 4, 60))
    return true, pred, np.round(rng.normal(size=(60, 4)) + (true[:, None] == np.arange(4)), 1)


def test_integer_weights_are_repetitions(answers):
    """A metric under weights 0, 1, 2, ... is the metric of the rows repeated so often: scikit-learn is the oracle."""
    true, pred, scores = answers
    count = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), 5)
    metrics = {
        "mean": (weighted.mean((true == pred).astype(float)), lambda i: (true[i] == pred[i]).mean()),
        "balanced": (
            weighted.balanced_accuracy(pred, true),
            lambda i: recall_score(true[i], pred[i], average="macro", labels=np.unique(true[i]), zero_division=0),
        ),
        "f1": (
            weighted.macro_f1(pred, true),
            lambda i: f1_score(true[i], pred[i], average="macro", labels=np.union1d(true[i], pred[i])),
        ),
        "auc": (weighted.auc(scores[:, 1], true == 1), lambda i: roc_auc_score(true[i] == 1, scores[i, 1])),
        "macro auc": (
            weighted.macro_auc(scores, true, np.arange(4)),
            lambda i: np.mean([roc_auc_score(true[i] == c, scores[i, c]) for c in range(4)]),
        ),
    }
    for name, (metric, oracle) in metrics.items():
        values = metric(count.astype(float))
        for b in range(5):
            assert values[b] == pytest.approx(oracle(np.repeat(np.arange(60), count[b])), abs=1e-12), name


def test_weighted_undefined_is_nan(answers):
    true, pred, scores = answers
    nothing, one = np.zeros((1, 60)), np.zeros((1, 60))
    one[0, np.flatnonzero(true == 2)[0]] = 1
    assert np.isnan(weighted.balanced_accuracy(pred, true)(nothing)).all()
    assert np.isnan(weighted.mean(np.ones(60), true == 1)(one)).all()
    assert np.isnan(weighted.auc(scores[:, 2], true == 2)(one)).all()
    assert np.isnan(weighted.macro_f1(pred, true)(nothing)).all()


# --- patient bootstrap -------------------------------------------------------------------------------------------


def test_all_images_of_a_patient_are_drawn_together_within_their_stratum():
    group = np.array([3, 3, 8, 8, 8, 5, 1, 1])
    stratum = np.array([0, 0, 0, 0, 0, 0, 7, 7])
    draws = patient_draws(group, stratum, draws=400, seed=1)
    weights = draws.of(np.arange(8))
    np.testing.assert_array_equal(weights[:, 0], weights[:, 1])
    np.testing.assert_array_equal(weights[:, 2], weights[:, 4])
    np.testing.assert_array_equal(weights[:, [0, 2, 5]].sum(axis=1), 3)
    assert (weights[:, 6] == 1).all()  # alone in its stratum
    assert weights[:, 0].std() > 0.5
    np.testing.assert_array_equal(weights, patient_draws(group, stratum, draws=400, seed=1).of(np.arange(8)))
    assert (weights != patient_draws(group, stratum, draws=400, seed=2).of(np.arange(8))).any()


def test_one_draw_serves_all_folds_and_repeats():
    """Repeating the same folds must not narrow the interval: they are the same patients again."""
    rng = np.random.default_rng(0)
    correct = (rng.random(100) < 0.7).astype(float)
    draws = patient_draws(np.arange(100), np.zeros(100, dtype=int), draws=500)
    rows = [np.arange(0, 50), np.arange(50, 100)]
    once = draw_means([weighted.mean(correct[r]) for r in rows], rows, draws)
    often = draw_means([weighted.mean(correct[r]) for r in rows * 10], rows * 10, draws)
    np.testing.assert_allclose(once, often, atol=1e-12)
    interval = percentile_interval(once)
    assert interval.low < correct.mean() < interval.high


def test_too_many_undefined_draws_give_no_interval_but_a_reason():
    values = np.r_[np.linspace(0, 1, 94), np.full(6, np.nan)]
    assert percentile_interval(values).ends is None
    assert "6%" in percentile_interval(values).reason
    known = percentile_interval(np.r_[np.linspace(0, 1, 96), np.full(4, np.nan)])
    assert known.ends == pytest.approx((0.025, 0.975))
    assert percentile_interval(np.array([])).ends is None


def test_no_patients_no_crash():
    draws = patient_draws(np.zeros(0, dtype=int), np.zeros(0, dtype=int), draws=10)
    assert isinstance(draws, PatientDraws)
    values = draw_means([weighted.mean(np.zeros(0))], [np.zeros(0, dtype=int)], draws)
    assert np.isnan(values).all()


@pytest.mark.slow
def test_patient_interval_covers_and_image_interval_does_not():
    """80 patients x 3 correlated images, 150 simulations: by patient at least 88 %, by image under it."""
    rng = np.random.default_rng(11)
    hit = {"patient": 0, "image": 0}
    x = np.linspace(-8, 8, 20001)
    truth = np.trapezoid(stats.norm.pdf(x) / (1 + np.exp(-(0.8 + 3 * x))), x)  # E sigmoid(N(0.8, 3))
    for s in range(150):
        ability = rng.normal(0.8, 3, 80)
        correct = (rng.random((80, 3)) < 1 / (1 + np.exp(-ability[:, None]))).astype(float).reshape(-1)
        groups = {"patient": np.repeat(np.arange(80), 3), "image": np.arange(240)}
        for kind, group in groups.items():
            draws = patient_draws(group, np.zeros(240, dtype=int), draws=500, seed=s)
            interval = percentile_interval(draw_means([weighted.mean(correct)], [np.arange(240)], draws))
            hit[kind] += interval.low <= truth <= interval.high
    assert hit["patient"] / 150 >= 0.88
    assert hit["image"] / 150 < 0.88


@pytest.mark.slow
def test_two_equal_feature_sets_fool_the_plain_t_but_not_the_corrected_one():
    """The table of the sheet at 200 patients, K = 5, R = 10, a ridge classifier on two sets of equal worth.

    The patient bootstrap is liberal, the more so the weaker the signal: it does not see that training would differ.
    """
    rng = np.random.default_rng(3)
    n, K, R, width, sims = 200, 5, 10, 20, 100
    declared = {"plain": 0, "corrected": 0, "bootstrap": 0}
    for s in range(sims):
        y = rng.integers(0, 2, n)
        sets = [y[:, None] * 0.8 + rng.normal(size=(n, width)) for _ in range(2)]
        differences, metrics, rows = [], ([], []), []
        for _ in range(R):
            fold = rng.permutation(n) % K
            for k in range(K):
                train, test = np.flatnonzero(~np.isin(fold, (k, (k + 1) % K))), np.flatnonzero(fold == k)
                right = []
                for i, x in enumerate(sets):
                    X = np.c_[np.ones(len(train)), x[train]]
                    w = np.linalg.solve(X.T @ X + 10 * np.eye(width + 1), X.T @ (2 * y[train] - 1.0))
                    right.append(((np.c_[np.ones(len(test)), x[test]] @ w > 0) == (y[test] == 1)).astype(float))
                    metrics[i].append(weighted.mean(right[i]))
                rows.append(test)
                differences.append(right[0].mean() - right[1].mean())
        d = np.array(differences)
        declared["plain"] += stats.ttest_1samp(d, 0).pvalue < 0.05
        declared["corrected"] += corrected_resampled_t(d).p < 0.05
        draws = patient_draws(np.arange(n), y, draws=300, seed=s)
        values = draw_means(metrics[0], rows, draws) - draw_means(metrics[1], rows, draws)
        interval = percentile_interval(values)
        declared["bootstrap"] += not interval.low <= 0 <= interval.high
    assert declared["plain"] / sims >= 0.3
    assert declared["corrected"] / sims <= 0.06
    assert declared["bootstrap"] / sims <= 0.10


def test_module_has_six_verdicts_and_no_others():
    assert len(statistics.VERDICTS) == 6

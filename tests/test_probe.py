"""The batched linear probe against scikit-learn, one problem at a time, and what it may and may not read."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from kladi.evaluate.readouts import logistic, probe
from kladi.evaluate.readouts.probe import LAMBDAS, choose, fit_probes

FEW = (1.0, 1e-2, 1e-4)


def problem(seed=0, n=240, width=9, classes=4, overlap=1.0):
    """Overlapping Gaussian classes with unequal scales and offsets, and two overlapping training masks."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n) * 3 + 2  # ids are no 0..C-1
    centre = rng.normal(size=(classes, width))
    x = centre[y // 3] + overlap * 2 * rng.normal(size=(n, width))
    x = x * np.geomspace(0.01, 100, width) + np.linspace(-50, 50, width)
    fold = np.arange(n) % 5
    return x, y, np.stack([(fold != k) & (fold != (k + 1) % 5) for k in range(2)])


def objective(x, y, weights, coefficients, intercept, penalty):
    """J as the sheet states it, row by row. Binary: one column, the logit of the second class."""
    classes = np.unique(y)
    total = 0.0
    for row, label, weight in zip(x, y, weights, strict=True):
        logits = coefficients @ row + intercept
        logits = np.array([0.0, logits[0]]) if len(logits) == 1 else logits
        top = logits.max()
        total += weight * (top + np.log(np.exp(logits - top).sum()) - logits[list(classes).index(label)])
    return total / weights.sum() + penalty / 2 * (coefficients**2).sum()


def oracle(x, y, weights, penalty):
    """scikit-learn on standardised rows: coefficients, intercept, the standardised rows."""
    mean, sd = x.mean(0), x.std(0)
    sd[sd < 1e-12] = 1
    rows = (x - mean) / sd
    model = LogisticRegression(C=1 / (penalty * weights.sum()), tol=1e-10, max_iter=20_000)
    return model.fit(rows, y, sample_weight=weights), rows


def assert_matches_oracle(x, y, mask, probes, p, weights=None):
    weights = np.ones(int(mask.sum())) if weights is None else weights[mask]
    penalty = float(probes.lambdas[p % len(probes.lambdas)])
    model, rows = oracle(x[mask], y[mask], weights, penalty)
    best = objective(rows, y[mask], weights, model.coef_, model.intercept_, penalty)
    assert probes.objective[p] == pytest.approx(best, rel=1e-6)
    ours = np.exp(probes.log_probabilities(x, p))
    mean, sd = x[mask].mean(0), x[mask].std(0)
    sd[sd < 1e-12] = 1
    theirs = model.predict_proba((x - mean) / sd)
    columns = np.searchsorted(probes.classes, model.classes_)
    np.testing.assert_allclose(ours[:, columns], theirs, atol=1e-3)


@pytest.mark.parametrize("classes", [2, 4])
def test_every_problem_of_the_batch_equals_scikit_learn(classes):
    x, y, train = problem(classes=classes)
    probes = fit_probes(x, y, train, lambdas=FEW)
    assert probes.converged.all()
    for p in range(len(train) * len(FEW)):
        assert_matches_oracle(x, y, train[p // len(FEW)], probes, p)


@pytest.mark.parametrize("classes", [2, 4])
def test_wide_embeddings_of_few_rows_equal_scikit_learn(classes):
    """More than twice as many columns as training rows: the principal axes of each fold's own rows."""
    x, y, train = problem(n=60, classes=classes)
    wide = x @ np.random.default_rng(3).normal(size=(9, 90)) + np.random.default_rng(4).normal(size=(60, 90))
    wide[:, 5] = 7
    assert wide.shape[1] > 2 * train.sum(1).max()
    probes = fit_probes(wide, y, train, lambdas=FEW)
    assert probes.converged.all()
    for p in range(len(train) * len(FEW)):
        assert_matches_oracle(wide, y, train[p // len(FEW)], probes, p)
    assert (probes.weight[:, 5] == 0).all()
    canary = wide.copy()
    canary[~train.any(0)] = 1e300
    np.testing.assert_array_equal(fit_probes(canary, y, train, lambdas=FEW).weight, probes.weight)


def test_a_matrix_a_mask_equals_each_problem_alone():
    x, y, train = problem()
    other = x + np.random.default_rng(0).normal(size=x.shape)
    both = fit_probes([x, other], y, train, lambdas=FEW)
    for m, matrix in enumerate((x, other)):
        for k in range(len(FEW)):
            assert_matches_oracle(matrix, y, train[m], both, m * len(FEW) + k)
    with pytest.raises(ValueError, match="2 matrices for 1"):
        fit_probes([x, other], y, train[:1], lambdas=FEW)


def test_default_penalties_run_from_ten_down_to_1e_minus_5():
    assert LAMBDAS[0] == 10
    assert LAMBDAS[-1] == pytest.approx(1e-5)
    assert len(LAMBDAS) == 13


def test_binary_means_the_same_penalty_as_one_logit_column():
    """Two softmax columns at C would be scikit-learn's binary fit at 2C: its coefficients differ visibly."""
    x, y, train = problem(classes=2)
    probes = fit_probes(x, y, train[:1], lambdas=(0.1,))
    wrong, _ = oracle(x[train[0]], y[train[0]], np.ones(int(train[0].sum())), 0.05)
    sd = x[train[0]].std(0)
    difference = (probes.weight[0, :, 1] - probes.weight[0, :, 0]) * sd
    assert np.abs(difference - wrong.coef_[0]).max() > 1e-2
    assert_matches_oracle(x, y, train[0], probes, 0)


def test_a_mask_with_two_of_three_classes_is_a_binary_problem():
    x, y, train = problem(classes=3)
    train[1] &= y != y.max()
    probes = fit_probes(x, y, train, lambdas=FEW)
    for p in range(3, 6):
        assert_matches_oracle(x, y, train[1], probes, p)
    assert np.isneginf(probes.intercept[3:, 2]).all()
    assert not (probes.predict(x, 3) == y.max()).any()
    assert not np.isnan(probes.log_probabilities(x, 3)).any()


def test_balanced_weights_and_row_weights():
    x, y, train = problem(classes=3)
    train[0] &= (y != y.min()) | (np.arange(len(y)) % 7 == 0)  # a rare class
    row_weight = np.random.default_rng(1).uniform(0.1, 3, len(y))
    balanced = np.zeros(len(y))
    counts = {c: int((y[train[0]] == c).sum()) for c in np.unique(y)}
    for i in np.flatnonzero(train[0]):
        balanced[i] = train[0].sum() / (3 * counts[y[i]])
    for given, flag, expected in (
        (None, True, balanced),
        (row_weight, False, row_weight),
        (row_weight, True, row_weight * balanced),
    ):
        probes = fit_probes(x, y, train[:1], lambdas=(0.01,), balanced=flag, row_weight=given)
        assert_matches_oracle(x, y, train[0], probes, 0, expected)


def test_balanced_counts_only_classes_of_the_mask():
    x, y, train = problem(classes=3)
    train[0] &= y != y.max()
    train[0] &= (y != y.min()) | (np.arange(len(y)) % 3 == 0)
    mask = train[0]
    weights = np.zeros(len(y))
    for c in np.unique(y[mask]):
        weights[mask & (y == c)] = mask.sum() / (2 * (mask & (y == c)).sum())
    probes = fit_probes(x, y, train, lambdas=(0.01,), balanced=True)
    assert_matches_oracle(x, y, mask, probes, 0, weights)


def test_constant_column_changes_nothing_and_breaks_nothing():
    x, y, train = problem()
    wide = np.concatenate([x, np.full((len(x), 1), 1e6)], axis=1)
    a, b = fit_probes(x, y, train, lambdas=FEW), fit_probes(wide, y, train, lambdas=FEW)
    assert b.converged.all()
    np.testing.assert_allclose(b.objective, a.objective, rtol=1e-6)
    assert (b.weight[:, -1] == 0).all()


def test_one_class_in_training_is_refused_by_its_number():
    x, y, train = problem()
    train[1] = y == y[0]
    with pytest.raises(ValueError, match="mask 1"):
        fit_probes(x, y, train)
    with pytest.raises(ValueError, match="not finite"):
        fit_probes(np.where(x == x[0, 0], np.inf, x), y, train[:1])
    with pytest.raises(ValueError, match="positive"):
        fit_probes(x, y, train[:1], lambdas=(0.1, 0.0))


def test_the_batch_equals_each_problem_alone_in_any_order():
    """Up to the tolerance: the preconditioner sees all masks, so the way there differs, the place does not."""
    x, y, train = problem()
    together = fit_probes(x, y, train, lambdas=FEW)
    swapped = fit_probes(x, y, train[::-1], lambdas=FEW[::-1])
    for m in range(2):
        for k, penalty in enumerate(FEW):
            alone = fit_probes(x, y, train[m : m + 1], lambdas=(penalty,))
            p, q = m * 3 + k, (1 - m) * 3 + (2 - k)
            assert together.objective[p] == pytest.approx(alone.objective[0], rel=1e-7)
            assert together.objective[p] == pytest.approx(swapped.objective[q], rel=1e-7)
            np.testing.assert_allclose(
                together.log_probabilities(x, p), alone.log_probabilities(x, 0), atol=1e-3, rtol=1e-3
            )


@pytest.mark.parametrize("own", [False, True])
def test_chunks_change_nothing(monkeypatch, own):
    x, y, train = problem()
    given = [x, x] if own else x
    whole = fit_probes(given, y, train, lambdas=FEW)
    monkeypatch.setattr(probe, "CHUNK_BYTES", 1)
    chunked = fit_probes(given, y, train, lambdas=FEW)
    np.testing.assert_allclose(chunked.objective, whole.objective, rtol=1e-9)
    np.testing.assert_array_equal(chunked.predict(x, 4), whole.predict(x, 4))


def test_huge_values_in_test_rows_change_no_coefficient():
    """The scaler, the weights and the preconditioner read training rows only. Bitwise: the same numbers are added."""
    x, y, train = problem()
    canary = x.copy()
    canary[~train[0]] = 1e300
    clean = fit_probes(x, y, train[:1], lambdas=FEW)
    spoilt = fit_probes(canary, y, train[:1], lambdas=FEW)
    np.testing.assert_array_equal(clean.weight, spoilt.weight)
    np.testing.assert_array_equal(clean.intercept, spoilt.intercept)


def test_a_row_huge_in_one_mask_leaves_the_other_problem_alone():
    x, y, train = problem()
    canary = x.copy()
    other = np.flatnonzero(train[1] & ~train[0])
    canary[other] = 1e200
    clean = fit_probes(x, y, train[:1], lambdas=FEW)
    spoilt = fit_probes(canary, y, train, lambdas=FEW, max_steps=300)
    np.testing.assert_allclose(spoilt.objective[:3], clean.objective, rtol=1e-6)


def test_exact_blocks_change_the_way_and_not_the_optimum(monkeypatch):
    """The weak end of the path is reached with the Hessian's blocks, and without them, at more cost."""
    x, y, train = problem()
    path = (1e-2, 1e-3, 1e-4)
    # Every penalty is taken for costly, so that blocks are met whatever the size of the problem.
    monkeypatch.setattr(logistic.Batch, "solve", _costly(logistic.Batch.solve))
    with_blocks = fit_probes(x, y, train, lambdas=path)
    monkeypatch.setattr(logistic, "BLOCK_BYTES", 0)
    without = fit_probes(x, y, train, lambdas=path)
    assert with_blocks.converged.all()
    assert without.converged.all()
    np.testing.assert_allclose(with_blocks.objective, without.objective, rtol=1e-6)
    assert with_blocks.steps.sum() < without.steps.sum()


def test_exact_blocks_survive_a_row_that_is_huge_in_another_mask(monkeypatch):
    x, y, train = problem()
    canary = x.copy()
    canary[np.flatnonzero(train[1] & ~train[0])] = 1e200
    clean = fit_probes(x, y, train[:1], lambdas=FEW)
    monkeypatch.setattr(logistic.Batch, "solve", _costly(logistic.Batch.solve))
    spoilt = fit_probes(canary, y, train, lambdas=FEW, max_steps=300)
    np.testing.assert_allclose(spoilt.objective[:3], clean.objective, rtol=1e-6)


def _costly(solve):
    return lambda self, penalty, tolerance, most, costly: solve(self, penalty, tolerance, most, costly=True)


def test_labels_outside_the_masks_are_not_read():
    x, y, train = problem()
    hidden = y.copy()
    hidden[~train[0]] = 999
    a, b = fit_probes(x, y, train[:1], lambdas=FEW), fit_probes(x, hidden, train[:1], lambdas=FEW)
    np.testing.assert_array_equal(a.weight, b.weight)


def test_too_few_steps_are_owned_up_to():
    x, y, train = problem()
    probes = fit_probes(x, y, train, lambdas=(1e-5,), max_steps=2)
    assert not probes.converged.any()
    assert (probes.steps == 2).all()


def test_separable_classes_and_huge_offsets_converge():
    x, y, train = problem(overlap=0.01)
    probes = fit_probes(x + 1e4, y, train)
    assert probes.converged.all()
    assert (probes.predict(x + 1e4, 12) == y).all()


def test_choose_takes_the_best_and_of_equals_the_larger_penalty():
    lambdas = np.array([10.0, 1.0, 0.1])
    scores = np.array([[0.5, 0.7, 0.7], [np.nan, 0.1, 0.2], [np.nan, np.nan, np.nan]])
    np.testing.assert_array_equal(choose(scores, lambdas), [1, 2, 0])
    np.testing.assert_array_equal(choose(scores[:, ::-1], lambdas[::-1]), [1, 0, 2])

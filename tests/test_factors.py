"""Exact on exact covariances, the stated objective's minimum on others, and the same from rows as from a matrix."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from kladi.models.factors import covariance, fitting
from kladi.models.factors.covariance import Dense, Rows, leading, nearest_semidefinite, places
from kladi.models.factors.peeling import aligned, peeled, stacked, unstacked
from kladi.structure.lattice import Lattice
from reference_factors import contrast, loadings, sample


def population(modalities, rank, noise=0.3, seed=0):
    rng = np.random.default_rng(seed)
    lattice = Lattice.of(modalities, rank)
    sizes = tuple(int(lattice.of_modality(m).sum()) + 4 + m for m in range(modalities))
    w = loadings(sizes, lattice, rng)
    return w, sizes, lattice, Dense(w @ w.T + noise * np.eye(sum(sizes)), sizes)


def blocks(w, sizes, lattice):
    """Every identifiable block, (structure, m, k) -> W_S^(m) W_S^(k)^T."""
    found = unstacked(w, sizes, lattice)
    return {(s, m, k): found[s, m] @ found[s, k].T for s in lattice.structures for m in s for k in s}


def farthest(w, other, sizes, lattice):
    one, two = blocks(w, sizes, lattice), blocks(other, sizes, lattice)
    return max(np.abs(one[key] - two[key]).max() for key in one)


@pytest.mark.parametrize(("modalities", "rank"), [(1, 3), (2, 3), (3, 2), (4, 2), (5, 1)])
@pytest.mark.parametrize("refine", [False, True])
def test_every_block_is_recovered_from_an_exact_covariance(modalities, rank, refine):
    w, sizes, lattice, exact = population(modalities, rank)
    found = fitting.fit(exact, lattice, refine=refine)
    assert farthest(w, found.weights, sizes, lattice) < 1e-10
    np.testing.assert_allclose(found.noise, 0.3, atol=1e-10)


def test_a_lattice_with_gaps_and_unequal_ranks_is_recovered():
    rng = np.random.default_rng(3)
    lattice = Lattice.of(4, {"0+1+2+3": 1, "0+2": 3, "1+2+3": 2, "3": 2, "0": 1})
    sizes = (9, 8, 11, 10)
    w = loadings(sizes, lattice, rng)
    noise = np.repeat([0.1, 0.4, 0.2, 0.3], sizes)
    found = fitting.fit(Dense(w @ w.T + np.diag(noise), sizes), lattice, noise="per_modality")
    assert farthest(w, found.weights, sizes, lattice) < 1e-10
    np.testing.assert_allclose(found.noise, noise, atol=1e-9)


def test_without_alignment_only_the_diagonal_blocks_are_right():
    w, sizes, lattice, _ = population(3, 3)
    signal = w @ w.T
    before = peeled(signal, sizes, lattice)
    off = stacked(before, sizes, lattice)
    for place in places(sizes):
        np.testing.assert_allclose((off @ off.T)[place, place], signal[place, place], atol=1e-10)
    assert np.linalg.norm(off @ off.T - signal) > 0.3 * np.linalg.norm(signal)
    after = stacked(aligned(before, signal, sizes, lattice), sizes, lattice)
    np.testing.assert_allclose(after @ after.T, signal, atol=1e-10)


def test_linear_contrast_is_half_the_explained_variance():
    """-1/2 tr(V S V^T) with the unbiased covariance, by its definition over pairs."""
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(12, 5)) + 3, rng.normal(size=(4, 5))
    assert contrast(v, x) == pytest.approx(-0.5 * np.trace(v @ np.cov(x.T) @ v.T), rel=1e-12)


GROUPS = {"global": lambda m, i: 0, "per_modality": lambda m, i: m, "per_feature": lambda m, i: (m, i)}


@pytest.mark.parametrize("noise", GROUPS)
def test_the_fit_is_at_the_top_of_the_likelihood(noise):
    """Against the likelihood as it is written down, by numerical slopes."""
    rng = np.random.default_rng(0)
    w, sizes, lattice, _ = population(3, 2, seed=1)
    tables, _ = sample(w, sizes, 0.5, 300, rng)
    data = Rows.of(tables, np.ones((300, 3), dtype=bool)).written_out()
    found = fitting.fit(data, lattice, noise=noise)
    assert found.converged
    free = fitting.mask(sizes, lattice)
    group = [GROUPS[noise](m, i) for m, size in enumerate(sizes) for i in range(size)]
    names = sorted(set(group))
    own = np.array([names.index(one) for one in group])

    def value(x):
        whole = np.zeros_like(w)
        whole[free] = x[: free.sum()]
        sigma = whole @ whole.T + np.diag(np.exp(x[free.sum() :])[own])
        return 0.5 * (np.linalg.slogdet(sigma)[1] + np.trace(np.linalg.solve(sigma, data.matrix)))

    def at(fitted):
        logarithm = [np.log(fitted.noise[own == k].mean()) for k in range(len(names))]
        return np.concatenate([fitted.weights[free], logarithm])

    best = at(found)
    assert np.abs(approx_fprime(best, value, 1e-6)).max() < 1e-2  # of a sum over 300 entries near 1
    assert value(best) < value(at(fitting.fit(data, lattice, noise=noise, refine=False)))
    assert all(value(best) < value(best + 1e-3 * rng.normal(size=len(best))) for _ in range(20))


def test_each_feature_may_have_its_own_noise():
    """Exact covariances give exact loadings and noise; where features differ, one noise for all of them does not."""
    w, sizes, lattice, _ = population(3, 2)
    noise = np.random.default_rng(5).uniform(0.05, 1.5, sum(sizes))
    data = Dense(w @ w.T + np.diag(noise), sizes)
    found = fitting.fit(data, lattice, noise="per_feature")
    np.testing.assert_allclose(found.noise, noise, rtol=1e-3)
    assert farthest(w, found.weights, sizes, lattice) < 1e-2
    assert farthest(w, fitting.fit(data, lattice).weights, sizes, lattice) > 0.05


def test_no_noise_vanishes():
    """A factor that is one feature alone would take all of its variance."""
    rng = np.random.default_rng(0)
    w, sizes, lattice, _ = population(2, 1, seed=2)
    tables, z = sample(w, sizes, 0.5, 60, rng)
    tables[0][:, 0] = z[:, 0]
    data = Rows.of(tables, np.ones((60, 2), dtype=bool)).written_out()
    found = fitting.fit(data, lattice, noise="per_feature")
    assert np.isfinite(found.weights).all()
    assert (found.noise >= 0.999 * fitting.HEYWOOD * data.diagonal()).all()


def test_loadings_have_one_rotation():
    w, sizes, lattice, exact = population(3, 3)
    found = fitting.fit(exact, lattice).weights
    turned = w.copy()
    for _, columns in lattice.columns():
        turned[:, columns] = w[:, columns] @ np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    np.testing.assert_allclose(fitting.canonical(turned, sizes, lattice), found, atol=1e-8)
    for _, columns in lattice.columns():
        inner = found[:, columns].T @ found[:, columns]
        np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-9)
        assert (np.diff(np.diag(inner)) <= 1e-9).all()


def test_errors_halve_when_patients_quadruple():
    w, sizes, lattice, _ = population(3, 2, noise=0.1)
    errors = []
    for n in (1_000, 4_000, 16_000):
        found = []
        for seed in range(4):
            tables, _ = sample(w, sizes, 0.1, n, np.random.default_rng(seed))
            data = Rows.of(tables, np.ones((n, 3), dtype=bool)).written_out()
            fitted = fitting.fit(data, lattice).weights
            found.append(np.linalg.norm(fitted @ fitted.T - w @ w.T))
        errors.append(np.mean(found))
    slope = np.polyfit(np.log([1_000, 4_000, 16_000]), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.12)


def test_correlated_factors_bias_it():
    """An assumption of the model: with factors that go together blocks are wrong however many patients there are."""
    w, sizes, lattice, _ = population(3, 2)
    mixed = 0.7 * np.eye(lattice.width) + 0.3
    correlated = Dense(w @ mixed @ w.T + 0.1 * np.eye(sum(sizes)), sizes)
    found = fitting.fit(correlated, lattice).weights
    assert farthest(w, found, sizes, lattice) > 0.05


def test_more_factors_than_features_are_refused():
    with pytest.raises(ValueError, match="modality 1 has 3 features for 4 factors"):
        fitting.fit(Dense(np.eye(11), (8, 3)), Lattice.of(2, 2))


# --- covariance ----------------------------------------------------------------------------------------------------


@pytest.fixture
def incomplete():
    rng = np.random.default_rng(0)
    w, sizes, _, _ = population(3, 2)
    tables, _ = sample(w, sizes, 0.2, 60, rng)
    present = rng.random((60, 3)) < 0.8
    return [x + m for m, x in enumerate(tables)], present


def naive(tables, present):
    """Block by block over the patients that have both, about each modality's own mean."""
    means = [x[present[:, m]].mean(axis=0) for m, x in enumerate(tables)]
    rows = []
    for m, x in enumerate(tables):
        row = []
        for k, y in enumerate(tables):
            both = present[:, m] & present[:, k]
            row.append((x[both] - means[m]).T @ (y[both] - means[k]) / (both.sum() - 1))
        rows.append(row)
    return np.block(rows)


@pytest.mark.parametrize("complete", [True, False])
def test_rows_and_matrix_say_the_same(incomplete, complete):
    tables, present = incomplete
    present = np.ones_like(present) if complete else present
    rows, matrix = Rows.of(tables, present), naive(tables, present)
    if complete:
        np.testing.assert_allclose(matrix, np.cov(np.concatenate(tables, axis=1).T), atol=1e-12)
    rng = np.random.default_rng(1)
    w = rng.normal(size=(len(matrix), 5))
    np.testing.assert_allclose(rows.times(w), matrix @ w, atol=1e-10)
    np.testing.assert_allclose(rows.written_out().matrix, matrix, atol=1e-10)
    dense = Dense(matrix, rows.sizes)
    for m, place in enumerate(places(rows.sizes)):
        np.testing.assert_allclose(rows.within(m, w[place]), dense.within(m, w[place]), atol=1e-10)
    np.testing.assert_allclose(rows.diagonal(), dense.diagonal())
    bases = [np.linalg.qr(rng.normal(size=(size, 4)))[0] for size in rows.sizes]
    np.testing.assert_allclose(rows.projected(bases).matrix, dense.projected(bases).matrix, atol=1e-10)


def test_single_precision_tables_stay_so(incomplete):
    tables, present = incomplete
    rows = Rows.of([x.astype(np.float32) for x in tables], present)
    assert all(x.dtype == np.float32 for x in rows.tables)
    np.testing.assert_allclose(rows.written_out().matrix, naive(tables, present), atol=1e-4)


def test_leading_directions_are_those_of_the_matrix(incomplete):
    tables, _ = incomplete
    rows = Rows.of(tables, np.ones((60, 3), dtype=bool))
    values, vectors = leading(rows, 4, 3, 1)
    want, axes = leading(rows.written_out(), 4, 3, 1)
    np.testing.assert_allclose(values[:4], want[:4], rtol=1e-5)
    np.testing.assert_allclose(np.abs((vectors * axes).sum(axis=0))[:4], 1, atol=1e-3)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(7), atol=1e-12)
    assert len(leading(rows, 10**6, 1, 0)[0]) == rows.sizes[0]


def test_the_fit_from_rows_is_that_from_the_matrix(incomplete, monkeypatch):
    tables, _ = incomplete
    rows = Rows.of(tables, np.ones((60, 3), dtype=bool))
    monkeypatch.setattr(covariance, "SETTLED", 1e-12)
    lattice = Lattice.of(3, 2)
    one, two = fitting.fit(rows, lattice), fitting.fit(rows.written_out(), lattice)
    np.testing.assert_allclose(one.noise, two.noise, rtol=1e-6)
    np.testing.assert_allclose(one.weights @ one.weights.T, two.weights @ two.weights.T, atol=1e-3)


def test_what_does_not_fit_together_is_made_to():
    matrix = np.array([[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]])
    near = nearest_semidefinite(matrix)
    assert np.linalg.eigvalsh(near)[0] > -1e-12
    assert np.linalg.norm(near - matrix) == pytest.approx(-np.linalg.eigvalsh(matrix)[0])
    assert nearest_semidefinite(np.eye(3)) is not None

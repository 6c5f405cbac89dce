"""The estimator: what scikit-learn asks of one, factors of patients who lack a modality, ranks from data."""

import numpy as np
import pytest
from scipy.sparse import issparse
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

import kladi
from kladi import HierarchicalFactorModel, Lattice
from kladi.models.factors import covariance, estimator, ranks
from reference_factors import loadings, sample

SIZES = (14, 16, 18)


@pytest.fixture(scope="module")
def drawn():
    """800 patients of three modalities, two factors a structure: tables, true factors, W, lattice."""
    rng = np.random.default_rng(0)
    lattice = Lattice.of(3, 2)
    w = loadings(SIZES, lattice, rng)
    tables, z = sample(w, SIZES, 0.1, 800, rng)
    return [x + 5 for x in tables], z, w, lattice


@pytest.fixture(scope="module")
def model(drawn):
    return HierarchicalFactorModel(ranks=2).fit(drawn[0])


def test_the_contract(drawn, model):
    tables, _, w, lattice = drawn
    assert model.lattice.structures == lattice.structures
    assert model.ranks_ == dict.fromkeys(lattice.structures, 2)
    assert model.noise_variance_ == pytest.approx(0.1, rel=0.05)
    assert model.loadings_[0, 1][1].shape == (16, 2)
    assert model.transform(tables).shape == (800, 14)
    columns = dict(lattice.columns())[0, 2]
    true = w[:14, columns] @ w[30:, columns].T
    assert np.linalg.norm(model.gram((0, 2), 0, 2) - true) < 0.25 * np.linalg.norm(true)
    np.testing.assert_allclose(model.gram("0+2", 2, 0), model.gram((0, 2), 0, 2).T)
    shares = {m: sum(of[m] for of in model.explained_.values() if m in of) for m in range(3)}
    for m, share in shares.items():
        noise = 0.1 * SIZES[m] / tables[m].var(axis=0, ddof=1).sum()
        assert share + noise == pytest.approx(1, abs=0.02)
    assert list(model.get_feature_names_out()[:3]) == ["0+1+2 factor 0", "0+1+2 factor 1", "0+1 factor 0"]
    assert kladi.HierarchicalFactorModel is HierarchicalFactorModel


class OfOneTable(HierarchicalFactorModel):
    """Two modalities made of one table, since scikit-learn's own checks know no lists of tables."""

    def fit(self, X, y=None):
        super().fit(halves(X), y)
        self.n_features_in_ = np.asarray(X).shape[1]
        return self

    def transform(self, X, method="posterior"):
        return super().transform(halves(X), method)


def halves(X):
    if issparse(X):
        return [X, X]
    X = np.asarray(X)
    if X.ndim != 2 or X.dtype.kind in "cO" or not X.shape[1]:
        return [X, X]
    mixed = np.cos(np.arange(X.shape[1] * (X.shape[1] + 4))).reshape(X.shape[1], -1)
    return [X @ mixed, X @ mixed[:, ::-1] + 1]


NOT_HERE = {
    "check_do_not_raise_errors_in_init_or_set_params": "types are checked at run time in these tests",
    "check_n_features_in_after_fitting": "the message is of a modality, not of X",
}


@parametrize_with_checks([OfOneTable(ranks=1)], expected_failed_checks=lambda _: NOT_HERE)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_what_scikit_learn_asks(drawn, model):
    tables = drawn[0]
    again = clone(model)
    assert again.get_params() == {"ranks": 2, "refine": True, "noise": "global", "scale": False, "seed": 0}
    with pytest.raises(NotFittedError):
        _ = again.lattice
    with pytest.raises(NotFittedError):
        again.transform(tables)
    before = [x.copy() for x in tables]
    assert again.fit(tables) is again
    assert all(np.array_equal(x, y) for x, y in zip(tables, before, strict=True))
    np.testing.assert_array_equal(again.weights_, model.weights_)
    np.testing.assert_allclose(again.fit_transform(tables), again.transform(tables))
    assert repr(HierarchicalFactorModel(ranks=3)) == "HierarchicalFactorModel(ranks=3)"
    assert again.set_params(ranks=1).ranks == 1


def test_factors_are_those_that_made_the_data(drawn, model):
    tables, z, _, lattice = drawn
    found = model.transform(tables)
    for _, columns in lattice.columns():
        own, _, _ = np.linalg.svd(z[:, columns] - z[:, columns].mean(axis=0), full_matrices=False)
        mine, _, _ = np.linalg.svd(found[:, columns] - found[:, columns].mean(axis=0), full_matrices=False)
        assert np.linalg.svd(own.T @ mine, compute_uv=False).min() > 0.85


def test_the_posterior_is_the_conditional_expectation(drawn, model):
    """Naive: W_P^T (W_P W_P^T + noise I)^-1 (x_P - mean_P), P what is there."""
    tables = drawn[0]
    some = [tables[0][:5].copy(), None, tables[2][:5].copy()]
    some[0][1] = np.nan
    some[2][2] = np.nan
    some[0][3] = some[2][3] = np.nan
    found = model.transform(some)
    for i in range(5):
        there = [m for m in (0, 2) if not np.isnan(some[m][i]).any()]
        if not there:
            assert (found[i] == 0).all()
            continue
        rows = np.concatenate([np.arange(sum(SIZES))[place] for place in (covariance.places(SIZES)[m] for m in there)])
        w, x = model.weights_[rows], np.concatenate([some[m][i] - model.means_[m] for m in there])
        want = w.T @ np.linalg.solve(w @ w.T + model.noise_variance_ * np.eye(len(w)), x)
        np.testing.assert_allclose(found[i], want, atol=1e-9)
    whole, pinv = model.transform(tables), model.transform(tables, method="pinv")
    x = np.concatenate([t - mean for t, mean in zip(tables, model.means_, strict=True)], axis=1)
    np.testing.assert_allclose(pinv, x @ np.linalg.pinv(model.weights_).T, atol=1e-9)
    assert (whole**2).sum() < (pinv**2).sum()


def test_missing_patients_cost_precision_not_truth(drawn):
    tables, _, w, _ = drawn
    rng = np.random.default_rng(1)
    holes = [x.copy() for x in tables]
    for x in holes:
        x[rng.random(len(x)) < 0.2] = np.nan
    found = HierarchicalFactorModel(ranks=2).fit(holes)
    assert found.pairs_[0, 0] == (~np.isnan(holes[0][:, 0])).sum()
    assert found.pairs_[0, 1] == (~np.isnan(holes[0][:, 0]) & ~np.isnan(holes[1][:, 0])).sum()
    error = np.linalg.norm(found.weights_ @ found.weights_.T - w @ w.T) / np.linalg.norm(w @ w.T)
    assert error < 0.25
    assert np.isfinite(found.transform(holes)).all()


def test_an_exact_covariance_and_rows_of_single_precision(drawn):
    tables, _, w, lattice = drawn
    exact = HierarchicalFactorModel(ranks=2).fit_covariance(w @ w.T + 0.3 * np.eye(len(w)), SIZES)
    for structure, columns in lattice.columns():
        for m in structure:
            rows = covariance.places(SIZES)[m]
            np.testing.assert_allclose(exact.gram(structure, m, m), w[rows, columns] @ w[rows, columns].T, atol=1e-10)
    one = HierarchicalFactorModel(ranks=2).fit(tables)
    two = HierarchicalFactorModel(ranks=2).fit([x.astype(np.float32) for x in tables])
    np.testing.assert_allclose(one.weights_ @ one.weights_.T, two.weights_ @ two.weights_.T, atol=1e-3)


def test_many_features_are_never_written_out(drawn, monkeypatch):
    tables = drawn[0]
    want = HierarchicalFactorModel(ranks=2).fit(tables).weights_
    monkeypatch.setattr(estimator, "DENSE", 10)
    monkeypatch.setattr(covariance.Rows, "written_out", None)
    found = HierarchicalFactorModel(ranks=2).fit(tables).weights_
    np.testing.assert_allclose(found @ found.T, want @ want.T, atol=1e-3)


def test_scale_and_noise_of_each_modality(drawn):
    tables = [x * factor for x, factor in zip(drawn[0], (1.0, 10.0, 0.1), strict=True)]
    scaled = HierarchicalFactorModel(ranks=2, scale=True).fit(tables)
    same = HierarchicalFactorModel(ranks=2, scale=True).fit(drawn[0])
    np.testing.assert_allclose(scaled.weights_, same.weights_, atol=1e-6)
    np.testing.assert_allclose(scaled.transform(tables), same.transform(drawn[0]), atol=1e-6)
    apart = HierarchicalFactorModel(ranks=2, noise="per_modality").fit(tables)
    np.testing.assert_allclose(apart.noise_variance_, [0.1, 10, 0.001], rtol=0.1)
    each = HierarchicalFactorModel(ranks=2, noise="per_feature").fit(tables)
    np.testing.assert_allclose(each.noise_variance_, [0.1, 10, 0.001], rtol=0.1)
    assert [part.shape for part in each.noise_] == [(14,), (16,), (18,)]
    np.testing.assert_allclose(each.noise_[1], 10, rtol=0.3)


@pytest.mark.slow
def test_ranks_from_data():
    sizes, lattice = (40, 50, 60), Lattice.of(3, {"0+1+2": 2, "0+1": 1, "1": 3, "2": 2})
    for seed in range(4):
        rng = np.random.default_rng(seed)
        tables, _ = sample(loadings(sizes, lattice, rng), sizes, 0.1, 600, rng)
        found = HierarchicalFactorModel(ranks="auto").fit(tables)
        assert found.lattice == lattice
        assert HierarchicalFactorModel(ranks="auto").fit(tables).lattice == lattice  # the same twice
    shuffled = [tables[0], rng.permutation(tables[1]), rng.permutation(tables[2])]
    assert all(len(s) == 1 for s in HierarchicalFactorModel().fit(shuffled).lattice.structures)


def test_the_noise_beside_factors_is_found():
    """Exact where the matrix is; the variance itself beside no factor; never nothing."""
    rng = np.random.default_rng(0)
    loading, noise = rng.normal(size=(12, 2)), rng.uniform(0.2, 2, 12)
    exact = loading @ loading.T + np.diag(noise)
    np.testing.assert_allclose(ranks.uniqueness(exact, 2), noise, rtol=1e-2)
    np.testing.assert_array_equal(ranks.uniqueness(exact, 0), np.diag(exact))
    assert (ranks.uniqueness(loading @ loading.T, 2) >= ranks.LEAST_NOISE).all()


@pytest.mark.parametrize(("n", "d", "rank", "noise"), [(1000, 6, 2, 0.5), (500, 6, 1, 0.3), (1000, 30, 3, 0.1)])
def test_strong_factors_of_few_or_many_columns_are_counted(n, d, rank, noise):
    found = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, d)) + noise * rng.normal(size=(n, d))
        found.append(ranks.factors(x, rng)[0])
    assert sum(one == rank for one in found) >= 6


def test_a_column_that_is_constant_but_for_rounding_says_nothing(drawn):
    tables = drawn[0]
    flat = np.full((800, 1), 14285.714285714286) + np.linspace(0, 1e-12, 800)[:, None]
    with_it = HierarchicalFactorModel(ranks=2, scale=True).fit([np.hstack([tables[0], flat]), *tables[1:]])
    without = HierarchicalFactorModel(ranks=2, scale=True).fit(tables)
    assert with_it.explained_[0, 1, 2][0] == pytest.approx(without.explained_[0, 1, 2][0], rel=0.05)


def test_many_features_with_missing_patients_fit_together(drawn, monkeypatch):
    holes = [x.copy() for x in drawn[0]]
    for m, x in enumerate(holes):
        x[m * 250 : m * 250 + 240] = np.nan
    want = HierarchicalFactorModel(ranks=2).fit(holes)
    monkeypatch.setattr(estimator, "DENSE", 10)
    found = HierarchicalFactorModel(ranks=2).fit(holes)
    gram, true = found.weights_ @ found.weights_.T, want.weights_ @ want.weights_.T
    assert np.linalg.norm(gram - true) < 0.1 * np.linalg.norm(true)
    for m in range(3):
        assert sum(of.get(m, 0) for of in found.explained_.values()) < 1


def test_noise_has_no_factors():
    """Of forty matrices one in a hundred may seem to."""
    rng = np.random.default_rng(0)
    assert sum(ranks.factors(rng.normal(size=(300, 20)), rng)[0] for _ in range(40)) <= 2
    with pytest.raises(ValueError, match="no factor stands out of the noise"):
        HierarchicalFactorModel().fit([np.zeros((20, 3)), np.ones((20, 4))])


def test_ranks_from_their_sums():
    """In population the numbers are sums over the lattice, and the inversion gives it back."""
    rng = np.random.default_rng(0)
    for modalities in (1, 2, 3, 4):
        for _ in range(5):
            given = {s: int(rng.integers(0, 3)) for s in ranks.all_structures(modalities)}
            given[(0,)] += 1
            lattice = Lattice.of(modalities, given)
            most = [int(lattice.of_modality(m).sum()) for m in range(modalities)]
            found = {(a, b): int(lattice.meeting(a, b).sum()) for a, b in ranks.disjoint(modalities)}
            assert ranks.inverted(modalities, most, found) == lattice


def test_common_factors_are_counted():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(500, 3))
    one, two = (np.concatenate([z, rng.normal(size=(500, 4))], axis=1) + rng.normal(size=(500, 7)) for _ in range(2))
    assert ranks.common(one, two) == 3
    assert ranks.common(one, rng.normal(size=(500, 5))) == 0
    assert ranks.common(one[:10], two[:10]) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t[0], "come as a list of tables"),
        (lambda t: [t[0], t[1][:-1], t[2]], r"have \[799, 800\] rows"),
        (lambda t: [t[0], None, t[2]], "modality 1 is None; to learn, somebody must have it"),
        (
            lambda t: [np.where(np.arange(14) == 3, np.nan, t[0]), *t[1:]],
            r"modality 0, row 0: values are missing.*800 such",
        ),
        (lambda t: [t[0], np.where(t[1] > 7, np.inf, t[1]), t[2]], "modality 1, row .*: values are infinite"),
        (lambda t: [t[0].ravel()[:800], *t[1:]], r"modality 0 has shape \(800,\)"),
        (lambda t: [t[0] * np.nan, *t[1:]], "0 patients have both modality 0 and modality 0"),
    ],
)
def test_tables_that_do_not_fit_are_named(drawn, change, said):
    with pytest.raises(ValueError, match=said):
        HierarchicalFactorModel(ranks=1).fit(change(drawn[0]))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"ranks": "many"}, 'ranks = "many"; it takes a number'),
        ({"ranks": {"0+7": 1}}, '"0[+]7" is no structure of 3 modalities'),
        ({"ranks": 9}, "modality 0 has 14 features for 36 factors"),
        ({"ranks": 1, "noise": "none"}, 'noise = "none"; it takes'),
    ],
)
def test_impossible_parameters_are_named(drawn, params, said):
    with pytest.raises(ValueError, match=said):
        HierarchicalFactorModel(**params).fit(drawn[0])


def test_mistakes_after_the_fit_are_named(drawn, model):
    tables = drawn[0]
    for call, said in (
        (lambda: model.gram("0+5", 0, 0), "no structure"),
        (lambda: model.gram("0+1", 0, 2), "modality 2 takes no part in structure 0[+]1"),
        (lambda: model.transform(tables[:2]), "2 modalities; the model knows 3"),
        (lambda: model.transform([tables[0][:, :3], *tables[1:]]), "modality 0 has 3 columns; the model is one of 14"),
        (lambda: model.transform(tables, method="mean"), 'method = "mean"'),
        (lambda: HierarchicalFactorModel().fit_covariance(np.eye(6), (3, 3)), "numbers are needed for a covariance"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_few_patients_have_few_factors():
    """Thirty strong factors among 60 patients cannot be told from their own noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 30)) @ rng.normal(size=(30, 200)) + 0.1 * rng.normal(size=(60, 200))
    assert 1 <= ranks.factors(x, rng)[0] <= 60 / ranks.ROWS_A_FACTOR

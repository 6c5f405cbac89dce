"""An outcome finds the structures that made it and no others; its penalty is chosen without the tested rows."""

import numpy as np
import pytest
from scipy.optimize import minimize

from kladi import HierarchicalFactorModel, Lattice
from kladi.models.factors import outcome
from reference_factors import loadings, sample

SIZES = (20, 24, 28)


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    lattice = Lattice.of(3, 2)
    tables, z = sample(loadings(SIZES, lattice, rng), SIZES, 0.1, 1200, rng)
    beta = np.zeros(lattice.width)
    for structure in ((0, 1), (2,)):
        beta[dict(lattice.columns())[structure]] = rng.normal(size=2)
    y = 3 + z @ beta + 0.3 * rng.normal(size=1200)
    model = HierarchicalFactorModel(ranks=2).fit(tables)
    return model, tables, model.transform(tables), y, beta


def test_the_structures_that_made_it_are_found(drawn):
    model, _, scores, y, beta = drawn
    found = outcome.fit(scores, y, model.lattice)
    true = {s: np.linalg.norm(beta[place]) for s, place in model.lattice.columns()}
    for structure, strength in found.strength.items():
        assert strength == pytest.approx(true[structure], abs=0.15), structure
    assert sum(strength > 0.1 for strength in found.strength.values()) == 2
    assert found.mean == pytest.approx(3, abs=0.15)
    tested = outcome.nested(scores, y, model.lattice)
    assert len(tested) == 5
    assert np.mean([r for _, r in tested]) > 0.75
    nothing = outcome.nested(scores, np.random.default_rng(1).normal(size=1200), model.lattice)
    assert np.mean([r for _, r in nothing]) < 0.01


def test_shrunken_scores_bias_nothing(drawn):
    """With many patients least squares on posterior scores is the corrected least squares on unshrunken ones."""
    model, tables, scores, y, _ = drawn
    plain = outcome._path(scores, y, model.lattice)[-1]
    assert plain.penalty == 0
    raw = model.transform(tables, method="pinv")
    raw, t = raw - raw.mean(axis=0), y - y.mean()
    c = np.linalg.pinv(model.weights_)
    corrected = np.linalg.solve(raw.T @ raw / len(y) - model.noise_variance_ * c @ c.T, raw.T @ t / len(y))
    np.testing.assert_allclose(plain.beta, corrected, atol=0.05)


def test_a_missing_modality_does_not_bias_it(drawn):
    model, tables, _, y, beta = drawn
    holes = [x.copy() for x in tables]
    holes[0][::3] = np.nan
    found = outcome.fit(model.transform(holes), y, model.lattice)
    true = {s: np.linalg.norm(beta[place]) for s, place in model.lattice.columns()}
    assert found.strength[0, 1] == pytest.approx(true[0, 1], rel=0.15)
    assert found.strength[2,] == pytest.approx(true[2,], rel=0.15)


@pytest.mark.parametrize("penalty", [0.0, 0.05, 0.3, 5.0])
def test_the_group_lasso_is_at_its_minimum(penalty):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 7))
    h, g = x.T @ x / 50, rng.normal(size=7)
    groups = [(slice(0, 2), 2**0.5), (slice(2, 3), 1.0), (slice(3, 7), 2.0)]

    def objective(beta):
        return 0.5 * beta @ h @ beta - g @ beta + penalty * sum(w * np.linalg.norm(beta[s]) for s, w in groups)

    found = outcome.group_lasso(h, g, penalty, groups, np.zeros(7))
    best = min(
        minimize(objective, rng.normal(size=7), method="Nelder-Mead", options={"maxiter": 20_000, "fatol": 1e-13}).fun
        for _ in range(3)
    )
    assert objective(found) <= best + 1e-6
    if penalty == 5:
        assert (found == 0).all()


def test_few_patients_are_refused(drawn):
    model, _, scores, y, _ = drawn
    with pytest.raises(ValueError, match="9 patients have an outcome; 5 folds need 10"):
        outcome.fit(scores[:9], y[:9], model.lattice)

"""By what loss a classifier is trained: classes as leaves, variants, the solver against the plain probe, a study."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from kladi.errors import UserError
from kladi.evaluate.answers import Task
from kladi.evaluate.measure import Method, measure
from kladi.evaluate.readouts import criteria, tree_probe
from kladi.evaluate.readouts.criteria import Criterion, judge, judges
from kladi.evaluate.readouts.probe import fit_probes
from kladi.evaluate.readouts.regimes import Part
from kladi.evaluate.splits import TEST, TRAIN, VAL
from kladi.structure.taxonomy import Taxonomy

TAX = Taxonomy.from_paths(["A/a", "A/b/x", "A/b/y", "B/c", "C"])
CLASSES = np.sort(TAX.index(["A/a", "A/b", "A/b/x", "B/c"]))  # one of them is above another


def rows(n, columns, seed=0):
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("loss", sorted(criteria.LOSSES))
def test_every_loss_answers_with_the_same_classes(loss):
    found = judge(loss, {}, TAX, CLASSES)
    z = rows(6, found.columns)
    log_p = found.log_p(z)
    assert log_p.shape == (6, 4)
    total = log_p.exp().sum(1)
    assert (total < 1 + 1e-12).all()
    assert torch.allclose(total, torch.ones_like(total)) == (loss in {"cross_entropy", "hxe", "soft_labels"})
    assert found.rows(z, torch.tensor([0, 1, 2, 3, 0, 1])).shape == (6,)
    weight, bias = found.widened(rows(4, 5), rows(1, 4)[0])
    assert weight.shape == (found.columns, 5)
    assert torch.equal(weight[found.column], rows(4, 5))
    assert torch.equal(bias[found.column], rows(1, 4)[0])


@pytest.mark.parametrize("loss", sorted(criteria.LOSSES))
def test_every_loss_learns_every_class(loss):
    """Also the one that another class is below: a leaf of its own."""
    found = judge(loss, {}, TAX, CLASSES)
    z = torch.zeros(4, found.columns, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        found.rows(z, torch.arange(4)).sum().backward()
        optimizer.step()
    assert found.log_p(z).argmax(1).tolist() == [0, 1, 2, 3]


def test_hce_and_plain_cross_entropy():
    z, code = rows(5, judge("hce", {}, TAX, CLASSES).columns), torch.tensor([0, 1, 2, 3, 1])
    nway, flat = judge("hce", {}, TAX, CLASSES), judge("cross_entropy", {}, TAX, CLASSES)
    want = functional.cross_entropy(z, nway.node[code], reduction="none")
    assert torch.allclose(nway.rows(z, code), want, atol=1e-12)
    z = rows(5, 4)
    assert torch.allclose(flat.rows(z, code), functional.cross_entropy(z, code, reduction="none"))


def test_hace_is_anchored_where_leaves_lie_at_several_depths():
    assert judge("hace", {}, TAX, CLASSES).loss.weighting == "anchored"
    assert judge("hace", {"weighting": "geometric"}, TAX, CLASSES).loss.weighting == "geometric"
    flat = Taxonomy.from_paths(["A/a", "B/b"])
    assert judge("hace", {}, flat, flat.leaves).loss.weighting == "geometric"


def test_shuffled_classes_stand_at_each_others_leaves():
    plain = next(judges(Criterion("hace"), TAX, CLASSES))
    drawn = [next(judges(Criterion("hace", shuffled=True), TAX, CLASSES, seed)) for seed in range(5)]
    assert all(sorted(d.node.tolist()) == sorted(plain.node.tolist()) for d in drawn)
    assert len({tuple(d.node.tolist()) for d in drawn}) > 1
    again = next(judges(Criterion("hace", shuffled=True), TAX, CLASSES, 3))
    assert again.node.tolist() == drawn[3].node.tolist()


def test_variants_are_all_combinations():
    found = criteria.read({"loss": "hace", "retain": [0.2, 0.7], "label_smoothing": [0.0, 0.1]}, "w")
    assert len(found.variants()) == 4
    assert len(list(judges(found, TAX, CLASSES))) == 4
    assert not found.plain
    assert found.reads_tree
    assert Criterion().plain
    assert not criteria.read({"loss": "cross_entropy", "label_smoothing": 0.1}, "w").plain


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"loss": "hase"}, r'w.loss = "hase" is not one of .*closest: "hace"'),
        ({}, "w.loss"),
        ({"loss": "hace", "retan": 0.5}, r'w.retan is no argument of hace; closest: "retain"'),
        ({"loss": "hace", "retain": 2.0}, "retain must be in"),
        ({"loss": "hace", "retain": []}, "empty list"),
        ({"loss": "hxe", "alpha": "much"}, 'w.alpha = "much" is no number'),
        ({"loss": "cross_entropy", "label_smoothing": 1.5}, "label_smoothing"),
    ],
)
def test_mistakes_are_named(table, said):
    with pytest.raises(UserError, match=said):
        criteria.read(table, "w")


# --- the solver -------------------------------------------------------------------------------------------------------


def cohort(n=240, F=6, seed=0):
    rng = np.random.default_rng(seed)
    target = CLASSES[rng.integers(0, 4, n)]
    centres = {c: rng.normal(size=F) for c in CLASSES.tolist()}
    x = np.stack([centres[t] for t in target.tolist()]) + 0.8 * rng.normal(size=(n, F))
    fold = rng.integers(0, 5, n)
    parts = tuple(Part(k, 0, np.where(fold == k, TEST, np.where(fold == (k + 1) % 5, VAL, TRAIN))) for k in range(2))
    return x.astype(np.float32), Task("t", TAX, target, np.arange(n)), parts


@pytest.mark.parametrize(("tolerance", "near"), [(tree_probe.TOLERANCE, 2e-2), (1e-6, 1e-3)])
def test_the_solver_finds_the_optimum_of_the_plain_probe(monkeypatch, tolerance, near):
    monkeypatch.setattr(tree_probe, "TOLERANCE", tolerance)
    x, task, parts = cohort()
    train = np.stack([part.of == TRAIN for part in parts])
    lambdas = (1e-1, 1e-3)
    exact = fit_probes(x, task.target, train, lambdas=lambdas)
    code = np.searchsorted(CLASSES, task.target)
    flat = judge("cross_entropy", {}, TAX, CLASSES)
    for m, mask in enumerate(train):
        for place, solved, weight, bias in tree_probe._solved(flat, x[mask], code[mask], lambdas):
            assert solved
            ours = torch.softmax(torch.from_numpy(x) @ weight + bias, 1).numpy()
            np.testing.assert_allclose(ours, np.exp(exact.log_probabilities(x, 2 * m + place)), atol=near)


def test_folds_do_not_know_of_each_other():
    x, task, parts = cohort()
    both = {a.fold: a for _, a in tree_probe.tree_probe(_view(x, task, parts), Criterion("hace"))}
    alone = {a.fold: a for _, a in tree_probe.tree_probe(_view(x, task, parts[1:]), Criterion("hace"))}
    np.testing.assert_array_equal(both[1].scores, alone[1].scores)


def _view(x, task, parts):
    from kladi.evaluate.measure import _view as view

    return view(Method("m", x), task, parts)


@pytest.mark.parametrize("loss", ["hace", "hxe", "soft_labels", "hce"])
def test_probes_of_every_loss_are_about_as_right(loss):
    x, task, parts = cohort()
    flat = measure(Method("m", x), task, parts, regimes=["probe"])
    tree = measure(Method("m", x), task, parts, regimes=["probe"], criterion=Criterion(loss))
    right = [np.mean([r.value for r in found.rows if r.metric == "balanced_accuracy"]) for found in (flat, tree)]
    assert right[0] > 0.7
    assert right[1] > right[0] - 0.1


def test_a_shuffled_tree_is_drawn_in_each_repeat():
    x, task, parts = cohort()
    again = tuple(Part(part.fold, 1, part.of) for part in parts)
    found = {
        (a.repeat, a.fold): a.scores
        for _, a in tree_probe.tree_probe(_view(x, task, (*parts, *again)), Criterion("hace", shuffled=True))
    }
    assert set(found) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert not np.allclose(found[0, 0], found[1, 0], atol=1e-2)  # the same rows under another draw


def test_test_labels_change_nothing():
    x, task, parts = cohort()
    target = task.target.copy()
    target[parts[0].rows(TEST)] = CLASSES[0]
    other = Task("t", TAX, target, task.group)
    one = measure(Method("m", x), task, parts[:1], regimes=["probe"], criterion=Criterion("hace"))
    two = measure(Method("m", x), other, parts[:1], regimes=["probe"], criterion=Criterion("hace"))
    np.testing.assert_array_equal(one.answers[0].scores, two.answers[0].scores)


def test_features_fitted_in_each_fold():
    """The grey control fits its features on the training rows of each fold."""
    x, task, parts = cohort(F=80)
    grey = np.abs(x)
    found = measure(Method("g", grey, grey=True), task, parts, regimes=["probe"], criterion=Criterion("hxe"))
    assert {a.fold for a in found.answers} == {0, 1}

"""Metrics: worked examples, naive loops, other people's libraries, the identities, and what is undefined."""

import doctest
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn import metrics as sk

import reference
from kladi.evaluate import metrics
from kladi.evaluate.metrics import UndefinedMetric, flat, hierarchical
from kladi.structure.taxonomy import Taxonomy

EXAMPLE = ["US/breast/benign", "US/breast/malignant", "US/thyroid", "MR/brain", "MR/knee"]
SHORT = dict(zip(["be", "ma", "th", "br", "kn"], EXAMPLE, strict=True)) | {"breast": "US/breast"}
TRUE = ["be", "be", "ma", "ma", "th", "th", "br", "kn", "ma", "kn"]
PRED = ["be", "ma", "ma", "th", "th", "br", "kn", "be", "breast", "kn"]


def node_ids(tax: Taxonomy, words) -> np.ndarray:
    return np.asarray(tax.index([SHORT.get(w, w) for w in words]))


@pytest.fixture(scope="module")
def example():
    tax = Taxonomy.from_paths(EXAMPLE)
    return tax, node_ids(tax, PRED), node_ids(tax, TRUE)


def random_paths(seed: int, uniform: int = 0) -> list[str]:
    """Ragged by default; the same few words under many parents. Tops `d` and `e` make leaves meet at the root."""
    rng = np.random.default_rng(seed)
    depths = [uniform or int(rng.integers(1, 5)) for _ in range(rng.integers(4, 10))]
    paths = {"/".join(rng.choice(list("abc"), depth)) for depth in depths}
    return sorted(paths | {"d" + "/a" * ((uniform or 2) - 1), "e" + "/a" * ((uniform or 1) - 1)})


def random_case(seed: int, uniform: int = 0, inner: bool = False, n: int = 30):
    paths = random_paths(seed, uniform)
    parents = reference.parents_from_paths(paths)
    tax = Taxonomy.from_paths(paths)
    rng = np.random.default_rng(1000 + seed)
    names = sorted(parents) if inner else sorted(reference.leaves(parents))
    pred, true = rng.choice(names, n).tolist(), rng.choice(names, n).tolist()
    return parents, tax, pred, true, np.asarray(tax.index(pred)), np.asarray(tax.index(true))


def random_rows(n: int, D: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, D))


# --- worked examples --------------------------------------------------------------------------------------------------


def test_worked_example(example):
    tax, pred, true = example
    got = {
        "accuracy": metrics.accuracy(pred, true),
        "balanced": metrics.balanced_accuracy(pred, true),
        "hP": metrics.hierarchical_precision(pred, true, tax),
        "hR": metrics.hierarchical_recall(pred, true, tax),
        "hF1": metrics.hierarchical_f1(pred, true, tax),
        "hP macro": metrics.hierarchical_precision(pred, true, tax, average="macro"),
        "hR macro": metrics.hierarchical_recall(pred, true, tax, average="macro"),
        "hF1 macro": metrics.hierarchical_f1(pred, true, tax, average="macro"),
        "hF1 samples": metrics.hierarchical_f1(pred, true, tax, average="samples"),
        "tree": metrics.tree_accuracy(pred, true, tax),
        "severity": metrics.mistake_severity(pred, true, tax),
        "mean H": metrics.lca_height(pred, true, tax).mean(),
    }
    want = [0.4, 0.366667, 2 / 3, 0.64, 32 / 49, 0.618095, 0.6, 0.605556, 0.636667, 0.66, 11 / 6, 1.1]
    assert got == pytest.approx(dict(zip(got, want, strict=True)), abs=1e-6)
    assert metrics.tree_distance(pred, true, tax).tolist() == [0, 2, 0, 3, 0, 4, 2, 5, 1, 0]
    assert metrics.lca_height(pred, true, tax).tolist() == [0, 1, 0, 2, 0, 3, 1, 3, 1, 0]
    assert metrics.level_accuracy(pred, true, tax) == pytest.approx([0.8, 0.6, 0.4])


def test_worked_ranking(example):
    tax = example[0]
    true = node_ids(tax, ["be", "be", "ma", "ma"])
    rows = ["be th br ma kn", "ma be th kn br", "ma br be th kn", "th ma be br kn"]
    ranked = np.stack([node_ids(tax, row.split()) for row in rows])
    got = [metrics.hierarchical_distance_at_k(ranked, true, tax, k) for k in (1, 2, 3, 5)]
    assert got == pytest.approx([0.75, 1.0, 1.25, 1.8])


def test_second_worked_example():
    tax = Taxonomy.from_paths(["B/x", "B/y", "M/u/p", "M/u/q", "M/v"])
    true = np.asarray(tax.index(["B/x", "B/x", "M/u/p", "M/v"]))
    pred = np.asarray(tax.index(["B/x", "B/y", "M/u/q", "M/u/p"]))
    assert metrics.hierarchical_precision(pred, true, tax) == pytest.approx(0.6)
    assert metrics.hierarchical_recall(pred, true, tax) == pytest.approx(2 / 3)
    assert metrics.hierarchical_f1(pred, true, tax) == pytest.approx(0.631579, abs=1e-6)
    assert metrics.hierarchical_f1(pred, true, tax, "macro") == pytest.approx(0.605556, abs=1e-6)
    assert metrics.hierarchical_f1(pred, true, tax, "samples") == pytest.approx(0.641667, abs=1e-6)
    assert metrics.tree_accuracy(pred, true, tax) == pytest.approx(0.65)
    assert metrics.mistake_severity(pred, true, tax) == pytest.approx(4 / 3)


def test_worked_flat():
    score, label = np.array([0.9, 0.8, 0.8, 0.4, 0.4, 0.1]), np.array([1, 1, 0, 1, 0, 0], bool)
    assert metrics.roc_auc(score, label) == pytest.approx(7 / 9)
    assert metrics.average_precision(score, label) == pytest.approx(0.755556, abs=1e-6)
    hits = np.array([1, 0, 1, 0, 0], bool)
    assert metrics.average_precision(-np.arange(5.0), hits) == pytest.approx(0.833333, abs=1e-6)
    three = np.log(np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.2, 0.2]]))
    true = np.array([0, 1, 0])
    assert metrics.roc_auc_per_class(three, true) == pytest.approx([1, 1, math.nan], nan_ok=True)
    with pytest.warns(UndefinedMetric, match="2 of 3 classes; absent or alone: 2"):
        assert metrics.macro_roc_auc(three, true) == 1


def test_worked_calibration():
    confidence = np.array([0.95, 0.9, 0.85, 0.7, 0.65, 0.6, 0.55, 0.45])
    correct = np.array([1, 1, 0, 1, 1, 0, 1, 0], bool)
    assert metrics.expected_calibration_error(confidence, correct, 5, "width") == pytest.approx(0.24375)
    assert metrics.maximum_calibration_error(confidence, correct, 5, "width") == pytest.approx(0.325)


def test_worked_violation():
    """Parent prototypes at 0 and 90 degrees; children of the first at 10, 40, 50, of the second at 80, 44."""
    tax = Taxonomy.from_paths(["a/x", "b/y"])
    angle = np.deg2rad([10, 40, 50, 80, 44])
    z = np.stack([np.cos(angle), np.sin(angle)], 1)
    true = np.asarray(tax.index(["a/x"] * 3 + ["b/y"] * 2))
    points, seen = np.zeros((4, 2)), np.zeros(4, bool)
    points[np.asarray(tax.index(["a", "b"]))] = [[1, 0], [0, 1]]
    seen[np.asarray(tax.index(["a", "b"]))] = True
    assert metrics.parent_violation_rate(z, true, tax, prototypes=(points, seen)) == pytest.approx(2 / 5)
    with pytest.warns(UndefinedMetric, match="depth 2"):
        rates = metrics.level_violation_rates(z, true, tax, prototypes=(points, seen))
    assert rates == pytest.approx([2 / 5, math.nan], nan_ok=True)


def test_worked_violation_of_the_label_tree_sheet():
    tax = Taxonomy.from_paths(["A/x", "A/y", "B/z"])
    true = np.asarray(tax.index(["A/x", "A/y", "B/z"]))
    prototypes = metrics.node_prototypes(np.array([[1, 0], [0.6, 0.8], [-0.6, 0.8]]), true, tax)
    assert prototypes[0][tax.index(["A"])[0]] == pytest.approx([0.894427, 0.447214], abs=1e-6)
    rows = np.array([[0.8, 0.6], [0, 1], [0.6, 0.8]])
    assert metrics.parent_violation_rate(rows, true, tax, prototypes=prototypes) == pytest.approx(2 / 3)
    assert metrics.level_violation_rates(rows, true, tax, prototypes=prototypes) == pytest.approx([2 / 3, 2 / 3])
    ball = metrics.node_prototypes(np.array([[1, 0], [0.6, 0.8], [-0.6, 0.8]]), true, tax, "poincare")
    assert ball[0][tax.index(["A"])[0]] == pytest.approx([0.759008, 0.379504], abs=1e-6)


def test_worked_shape():
    assert metrics.effective_rank(np.diag([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)
    cross = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert metrics.uniformity(cross) == pytest.approx(-4.396349, abs=1e-6)
    wide, narrow = random_rows(600, 128), random_rows(600, 16)
    assert metrics.uniformity(wide) == pytest.approx(-3.94, abs=0.02)
    assert metrics.uniformity(narrow) == pytest.approx(-3.51, abs=0.04)
    assert metrics.per_dimension_std(wide).mean() == pytest.approx(0.999, abs=0.003)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (wide, narrow)]
    assert metrics.effective_rank(unit[0]) == pytest.approx(124, abs=1.5)
    assert metrics.effective_rank(unit[1]) == pytest.approx(15.95, abs=0.05)


# --- against naive loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_tree_metrics_against_loops(seed):
    parents, tax, pred, true, p, t = random_case(seed, inner=seed % 2 == 0)
    for average, naive in [
        ("micro", reference.hierarchical_prf(parents, pred, true)),
        ("macro", reference.hierarchical_prf_macro(parents, pred, true)),
    ]:
        got = [
            f(p, t, tax, average)
            for f in (metrics.hierarchical_precision, metrics.hierarchical_recall, metrics.hierarchical_f1)
        ]
        assert got == pytest.approx(naive, abs=1e-12)
    pairs = list(zip(pred, true, strict=True))
    assert metrics.tree_distance(p, t, tax).tolist() == [reference.edges_between(parents, a, b) for a, b in pairs]
    assert metrics.lca_height(p, t, tax).tolist() == [reference.lca_height(parents, a, b) for a, b in pairs]
    assert metrics.tree_accuracy(p, t, tax) == pytest.approx(reference.tree_accuracy(parents, pred, true))
    assert metrics.mistake_severity(p, t, tax) == pytest.approx(reference.mistake_severity(parents, pred, true))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetric)
        levels = metrics.level_accuracy(p, t, tax)
    assert levels == pytest.approx(reference.level_accuracy(parents, pred, true), nan_ok=True)


def test_the_answer_root():
    """-1 shares nothing: precision 0/0 is 0, wrong at every level, as far as the true node is deep."""
    tax = Taxonomy.from_paths(EXAMPLE)
    parents = reference.parents_from_paths(EXAMPLE)
    true = ["US/breast/benign", "MR/brain"]
    t, root = np.asarray(tax.index(true)), np.array([-1, -1])
    assert metrics.hierarchical_precision(root, t, tax) == metrics.hierarchical_f1(root, t, tax) == 0
    assert metrics.tree_distance(root, t, tax).tolist() == [3, 2]
    assert metrics.lca_height(root, t, tax).tolist() == [3, 3]
    assert metrics.level_accuracy(root, t, tax).tolist() == [0, 0, 0]
    half = np.array([t[0], -1])
    assert metrics.hierarchical_f1(half, t, tax) == pytest.approx(
        reference.hierarchical_prf(parents, [true[0], None], true)[2]
    )
    with pytest.raises(IndexError, match="-1"):
        metrics.tree_accuracy(t, root, tax)


@pytest.mark.parametrize("geometry", ["sphere", "poincare"])
@pytest.mark.parametrize("seed", range(6))
def test_violations_against_loops(seed, geometry):
    parents, tax, _, true, _, t = random_case(seed, inner=True, n=40)
    fit, z = random_rows(40, 3, seed), random_rows(40, 3, seed + 50)
    seen_by = t % 3 != 0 if seed % 2 else np.ones(len(t), bool)  # some nodes get no prototype
    points, seen = metrics.node_prototypes(fit[seen_by], t[seen_by], tax, geometry)
    embedded = [reference.embed(torch.from_numpy(row), geometry) for row in fit]
    naive = {}
    for node in parents:
        below = [
            x
            for x, y, keep in zip(embedded, true, seen_by, strict=True)
            if keep and node in reference.ancestors(parents, y)
        ]
        if below:
            naive[node] = reference.mean(below, geometry)
    assert {tax.names[v] for v in np.flatnonzero(seen)} == set(naive)
    for node, point in naive.items():
        assert points[tax.index([node])[0]] == pytest.approx(point.numpy(), abs=1e-12)

    x = torch.stack([reference.embed(torch.from_numpy(row), geometry) for row in z])

    def distance(a, b):
        return reference.distance(a, b, geometry)

    def rate(level):
        flags = reference.violations(parents, x, true, naive, level, distance)
        kept = [f for f in flags if f is not None]
        return sum(kept) / len(kept) if kept else math.nan

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetric)
        parent = metrics.parent_violation_rate(z, t, tax, geometry, (points, seen))
        levels = metrics.level_violation_rates(z, t, tax, geometry, (points, seen))
    assert parent == pytest.approx(rate(lambda n: len(reference.ancestors(parents, n)) - 1), nan_ok=True)
    deepest = reference.height(parents, None)
    naive_levels = [
        rate(lambda n, depth=depth: depth if len(reference.ancestors(parents, n)) >= depth else 0)
        for depth in range(1, deepest + 1)
    ]
    assert levels == pytest.approx(naive_levels, nan_ok=True)


def test_triplets_against_loops():
    tax = Taxonomy.from_paths(["a/x", "a/y", "b/x", "b/y/z", "c"])
    rng = np.random.default_rng(0)
    t = rng.choice(np.asarray(tax.leaves), 25)
    z = random_rows(25, 2)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    parent = [tax.parents[v][0] if tax.parents[v] else None for v in t]
    bad = []
    for i, s, o in itertools.permutations(range(25), 3):
        if None not in (parent[i], parent[s], parent[o]) and parent[s] == parent[i] != parent[o]:
            bad.append(np.linalg.norm(unit[i] - unit[s]) >= np.linalg.norm(unit[i] - unit[o]))
    assert metrics.triplet_violation_rate(z, t, tax) == pytest.approx(np.mean(bad))
    assert metrics.triplet_violation_rate(np.ones((25, 2)), t, tax) == 1  # a tie counts here


@pytest.mark.parametrize("groups", [None, "patients"])
def test_retrieval_against_loops(groups):
    z, rng = random_rows(30, 3), np.random.default_rng(1)
    true = np.append(rng.integers(0, 4, 29), 9)  # the last has no mate
    patient = None if groups is None else [f"p{v}" for v in rng.integers(0, 8, 30)]
    for k in (1, 2, 5, 29):
        got = metrics.retrieval_recall_at_k(z, true, k, groups=patient)
        assert got == pytest.approx(reference.recall_at_k(torch.from_numpy(z), true.tolist(), k, patient))
    assert metrics.retrieval_ranks(z, true, patient)[-1] == 0


def test_retrieval_lets_no_patient_find_itself():
    z = np.array([[1, 0], [1, 0.01], [0, 1], [0.5, 0.5], [1, 0.5]])
    true = np.array([0, 0, 1, 1, 0])
    alone = np.array([0, 0, 1, 2, 3])
    assert metrics.retrieval_ranks(z, true)[0] == 1
    assert metrics.retrieval_ranks(z, true, alone)[0] == 1  # row 4 is next, row 1 is barred
    assert metrics.retrieval_ranks(z[:4], true[:4], alone[:4])[0] == 0


def test_a_collapsed_encoder_is_never_lucky():
    true = np.array([0, 0, 0, 1, 1, 1])
    z = np.random.default_rng(0).normal(size=8)[None].repeat(6, 0)
    z = z * np.random.default_rng(1).uniform(0.1, 3, size=(6, 1))  # equal up to rounding
    assert metrics.retrieval_ranks(z, true).tolist() == [4] * 6
    tax = Taxonomy.from_paths(["a/x", "b/y"])
    assert metrics.parent_violation_rate(z, np.asarray(tax.leaves)[true], tax) == 0


# --- against other people's libraries ---------------------------------------------------------------------------------


def test_scikit_learn_agrees():
    rng = np.random.default_rng(0)
    for _ in range(20):
        true, pred = rng.integers(0, 5, 40), rng.integers(0, 6, 40)
        assert metrics.accuracy(pred, true) == pytest.approx(sk.accuracy_score(true, pred))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert metrics.balanced_accuracy(pred, true) == pytest.approx(sk.balanced_accuracy_score(true, pred))
        assert metrics.macro_f1(pred, true) == pytest.approx(sk.f1_score(true, pred, average="macro"))
        score = rng.normal(size=(40, 5)).round(1)  # ties
        positive = true == 0
        assert metrics.roc_auc(score[:, 0], positive) == pytest.approx(sk.roc_auc_score(positive, score[:, 0]))
        assert metrics.average_precision(score[:, 0], positive) == pytest.approx(
            sk.average_precision_score(positive, score[:, 0])
        )
        log_p = log_softmax(score, axis=1)
        assert metrics.macro_roc_auc(log_p, true) == pytest.approx(
            sk.roc_auc_score(true, np.exp(log_p), multi_class="ovr")
        )
        assert metrics.negative_log_likelihood(log_p, true) == pytest.approx(sk.log_loss(true, np.exp(log_p)))
        assert metrics.brier_score(np.exp(log_p), true) == pytest.approx(
            np.mean(((np.exp(log_p) - np.eye(5)[true]) ** 2).sum(1))
        )


@pytest.mark.parametrize("seed", range(5))
def test_hiclass_agrees(seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hiclass = pytest.importorskip("hiclass.metrics")
    warnings.filterwarnings("ignore", "F-score is ill-defined")  # a row that shares nothing
    _, tax, pred, true, p, t = random_case(seed)

    def levels(names):
        paths = [["/".join(n.split("/")[: k + 1]) for k in range(n.count("/") + 1)] for n in names]
        deepest = max(name.count("/") + 1 for name in tax.names)
        return np.array([path + [""] * (deepest - len(path)) for path in paths])

    for ours, theirs in [
        (metrics.hierarchical_precision, hiclass.precision),
        (metrics.hierarchical_recall, hiclass.recall),
        (metrics.hierarchical_f1, hiclass.f1),
    ]:
        assert ours(p, t, tax) == pytest.approx(theirs(levels(true), levels(pred)))
        assert ours(p, t, tax, "samples") == pytest.approx(theirs(levels(true), levels(pred), average="macro"))


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_identities_on_ragged_trees(seed):
    _, tax, _, _, p, t = random_case(seed)
    ranked = np.stack([np.random.default_rng(seed * 99 + i).permutation(np.asarray(tax.leaves)) for i in range(len(t))])
    top = ranked[:, 0]
    severity = metrics.mistake_severity(top, t, tax)
    assert metrics.hierarchical_distance_at_k(ranked, t, tax, 1) == pytest.approx(
        (1 - metrics.accuracy(top, t)) * severity
    )
    depth = np.asarray(tax.depth)
    both = (depth[p] + depth[t]).sum()
    assert 1 - metrics.hierarchical_f1(p, t, tax) == pytest.approx(metrics.tree_distance(p, t, tax).sum() / both)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetric)
        levels = metrics.level_accuracy(p, t, tax)
    rows = np.array([(depth[t] >= here).sum() for here in range(1, len(levels) + 1)])
    assert metrics.hierarchical_recall(p, t, tax) == pytest.approx(np.nansum(levels * rows) / depth[t].sum())
    every = len(tax.leaves)
    other = ranked[:, np.random.default_rng(seed).permutation(every)]
    assert metrics.hierarchical_distance_at_k(ranked, t, tax, every) == pytest.approx(
        metrics.hierarchical_distance_at_k(other, t, tax, every)
    )
    swapped = ranked[:, [1, 0, *range(2, every)]]
    assert metrics.hierarchical_distance_at_k(swapped, t, tax, 2) == pytest.approx(
        metrics.hierarchical_distance_at_k(ranked, t, tax, 2)
    )


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_uniform_trees_have_one_number(seed, depth):
    _, tax, _, _, p, t = random_case(seed, uniform=depth)
    assert tax.diameter == 2 * depth
    one = metrics.hierarchical_f1(p, t, tax)
    for other in (
        metrics.hierarchical_precision(p, t, tax),
        metrics.hierarchical_recall(p, t, tax),
        metrics.tree_accuracy(p, t, tax),
        metrics.level_accuracy(p, t, tax).mean(),
    ):
        assert other == pytest.approx(one)
    if depth == 1:
        assert one == pytest.approx(metrics.accuracy(p, t))
        assert metrics.mistake_severity(p, t, tax) == 1


def test_the_one_number_is_two_elsewhere():
    """Ragged, or all leaves under one top node: F1 and tree accuracy part."""
    for paths in (["a/x", "a/y/z/u/v", "b"], ["top/a/x", "top/a/y", "top/b/x", "top/b/y"]):
        tax = Taxonomy.from_paths(paths)
        rng = np.random.default_rng(0)
        p, t = rng.choice(np.asarray(tax.leaves), (2, 200))
        assert abs(metrics.hierarchical_f1(p, t, tax) - metrics.tree_accuracy(p, t, tax)) > 0.02


def test_one_top_node_over_all_flatters():
    """.635 became .726 on one uniform tree: every prediction shares the top node."""
    rng = np.random.default_rng(0)
    paths = ["a/x", "a/y", "b/x", "b/y"]
    pred, true = rng.choice(paths, (2, 100))
    plain, topped = Taxonomy.from_paths(paths), Taxonomy.from_paths([f"top/{p}" for p in paths])
    with_top = metrics.hierarchical_f1(
        topped.index([f"top/{p}" for p in pred]), topped.index([f"top/{p}" for p in true]), topped
    )
    assert with_top > metrics.hierarchical_f1(plain.index(pred.tolist()), plain.index(true.tolist()), plain) + 0.1


def test_perfect_prediction(example):
    tax, _, true = example
    for average in ("micro", "macro", "samples"):
        assert metrics.hierarchical_f1(true, true, tax, average) == 1
    assert metrics.tree_accuracy(true, true, tax) == 1
    assert metrics.level_accuracy(true, true, tax).tolist() == [1, 1, 1]


def test_violation_rate_is_the_error_of_the_nearest_parent():
    tax = Taxonomy.from_paths(["a/x", "a/y", "b/x", "c/z"])
    t = np.random.default_rng(0).choice(np.asarray(tax.leaves), 60)
    z = random_rows(60, 4)
    points, _seen = prototypes = metrics.node_prototypes(z, t, tax)
    tops = np.flatnonzero(np.asarray(tax.depth) == 1)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    nearest = tops[np.argmax(unit @ points[tops].T, axis=1)]
    parent = np.array([tax.parents[v][0] for v in t])
    assert metrics.parent_violation_rate(z, t, tax, prototypes=prototypes) == pytest.approx(np.mean(nearest != parent))
    assert metrics.parent_violation_rate(z, t, tax) == metrics.parent_violation_rate(z, t, tax, prototypes=prototypes)


@pytest.mark.parametrize("geometry", ["sphere", "poincare"])
def test_violation_rate_is_invariant_to_rotation(geometry):
    _, tax, _, _, _, t = random_case(3, n=60)
    fit, z = random_rows(60, 4, 1), random_rows(60, 4, 2)
    Q = np.linalg.qr(random_rows(4, 4, 3))[0]

    def rate(Q):
        return metrics.level_violation_rates(
            z @ Q, t, tax, geometry, metrics.node_prototypes(fit @ Q, t, tax, geometry)
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetric)
        assert rate(Q) == pytest.approx(rate(np.eye(4)), nan_ok=True)


def test_prototypes_on_the_sphere_ignore_length_and_count_each_row_once():
    tax = Taxonomy.from_paths(["a/x", "a/y"])
    x, y = tax.index(["a/x", "a/y"])
    z = np.array([[5.0, 0], [0, 0.1], [0, 7]])
    points, seen = metrics.node_prototypes(z, np.array([x, y, y]), tax)
    assert seen.all()
    assert points[tax.index(["a"])[0]] == pytest.approx(np.array([1, 2]) / math.sqrt(5))
    points, seen = metrics.node_prototypes(np.array([[1.0, 0], [-1, 0]]), np.array([x, y]), tax)
    assert not seen[tax.index(["a"])[0]]  # opposites have no middle
    assert (points[~seen] == 0).all()


def test_auc_identities():
    rng = np.random.default_rng(0)
    score, label = rng.normal(size=50).round(1), rng.random(50) < 0.4
    area = metrics.roc_auc(score, label)
    assert metrics.roc_auc(-score, label) == pytest.approx(1 - area)
    assert metrics.roc_auc(np.exp(3 * score), label) == pytest.approx(area)
    assert metrics.roc_auc(np.zeros(50), label) == 0.5
    assert metrics.average_precision(np.zeros(50), label) == pytest.approx(label.mean())
    true = rng.integers(0, 3, 50)
    assert metrics.balanced_accuracy(np.zeros(50, int), true) == pytest.approx(1 / 3)


def test_recall_never_falls_with_k():
    z, true = random_rows(40, 3), np.random.default_rng(0).integers(0, 5, 40)
    values = [metrics.retrieval_recall_at_k(z, true, k) for k in range(1, 40)]
    assert values == sorted(values)
    assert values[-1] == 1


def test_effective_rank_identities():
    assert metrics.effective_rank(np.eye(7)) == pytest.approx(7)
    z = random_rows(30, 6)
    Q = np.linalg.qr(random_rows(6, 6, 1))[0]
    assert metrics.effective_rank(5 * z @ Q) == pytest.approx(metrics.effective_rank(z))
    assert metrics.effective_rank(np.zeros((4, 3))) == 0
    constant = np.full((9, 3), 0.1)
    assert metrics.effective_rank(constant) == pytest.approx(1)
    assert metrics.effective_rank(constant, centred=True) == 0


def test_alignment_and_uniformity_limits():
    z = random_rows(10, 4)
    assert metrics.alignment(z, z) == 0
    assert metrics.alignment(z, -3 * z) == pytest.approx(4)
    assert metrics.uniformity(np.ones((5, 3))) == pytest.approx(0, abs=1e-12)


def test_health_and_its_alarm():
    healthy = metrics.representation_health(random_rows(512, 32))
    assert not metrics.has_collapsed(healthy)
    assert healthy["dead_share"] == healthy["zero_rows"] == 0
    point = metrics.representation_health(np.ones((512, 32)))
    assert point["std_mean"] == pytest.approx(0, abs=1e-9)
    assert metrics.has_collapsed(point)
    line = metrics.representation_health(random_rows(512, 1) * np.ones((1, 32)) + 0.0)
    assert line["effective_rank_centred"] == pytest.approx(1)
    assert metrics.has_collapsed(line)
    assert metrics.representation_health(np.zeros((5, 3)))["zero_rows"] == 5
    dead = random_rows(64, 4) * np.array([1, 1, 0, 1])
    assert metrics.representation_health(dead)["dead_share"] == 0.25


def test_names_and_order_do_not_matter(example):
    tax, p, t = example
    swap = {name: "/".join(part[::-1] + "_" for part in name.split("/")) for name in tax.names}
    renamed = Taxonomy.from_paths(sorted(swap.values(), reverse=True))

    def move(ids):
        return np.asarray(renamed.index([swap[tax.names[i]] for i in ids]))

    order = np.random.default_rng(0).permutation(len(t))
    for f in (
        metrics.hierarchical_f1,
        metrics.tree_accuracy,
        metrics.mistake_severity,
        lambda p, t, tax: metrics.hierarchical_f1(p, t, tax, "macro"),
        lambda p, t, tax: metrics.level_accuracy(p, t, tax).sum(),
    ):
        assert f(move(p), move(t), renamed) == pytest.approx(f(p, t, tax))
        assert f(p[order], t[order], tax) == pytest.approx(f(p, t, tax))


# --- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_of_a_calibrated_and_of_a_boastful_model():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 20000)
    correct = rng.random(20000) < p
    assert metrics.expected_calibration_error(p, correct) < 0.02
    assert metrics.expected_calibration_error(np.ones(20000), correct) == pytest.approx(1 - correct.mean())
    few = slice(0, 300)
    order = rng.permutation(300)
    auto = metrics.expected_calibration_error(p[few], correct[few])
    assert auto == metrics.expected_calibration_error(p[few], correct[few], binning="mass")
    assert auto == pytest.approx(metrics.expected_calibration_error(p[few][order], correct[few][order]))
    assert auto <= metrics.maximum_calibration_error(p[few], correct[few])
    tied = np.full(10, 0.7)  # equal confidences share a bin
    assert metrics.expected_calibration_error(tied, np.arange(10) < 7) == pytest.approx(0)


def test_edges_of_bins_belong_below():
    for bins in range(1, 21):
        edges = np.arange(1, bins + 1) / bins
        for edge in edges:
            confidence, right = np.array([edge, edge - 0.2 / bins]), np.array([True, False])
            gap = abs(0.5 - confidence.mean())
            assert metrics.expected_calibration_error(confidence, right, bins, "width") == pytest.approx(gap)


def test_temperature_is_found():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20000, 4)) * 2
    p = np.exp(log_softmax(logits, axis=1))
    true = (p.cumsum(1) < rng.random((20000, 1))).sum(1)
    assert metrics.fit_temperature(3 * logits, true) == pytest.approx(3, rel=0.05)
    T = metrics.fit_temperature(3 * logits, true)
    best = metrics.negative_log_likelihood(log_softmax(3 * logits / T, axis=1), true)
    for other in (0.9 * T, 1.1 * T):
        assert best < metrics.negative_log_likelihood(log_softmax(3 * logits / other, axis=1), true)


# --- DAG and label sets -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dag():
    edges = [("top1", None), ("top2", None), ("m", "top1"), ("m", "top2"), ("n", "top2"), ("leaf", "m"), ("twig", "n")]
    parents: dict[str, list[str]] = {}
    for child, parent in edges:
        parents.setdefault(child, []).extend([parent] if parent else [])
    return Taxonomy.from_edges(edges), parents


def test_hierarchical_f1_accepts_a_dag(dag):
    tax, parents = dag
    rng = np.random.default_rng(0)
    pred, true = rng.choice(sorted(parents), (2, 40)).tolist()
    p, t = np.asarray(tax.index(pred)), np.asarray(tax.index(true))
    naive = reference.hierarchical_prf(parents, pred, true)
    assert metrics.hierarchical_f1(p, t, tax) == pytest.approx(naive[2])
    assert metrics.hierarchical_f1(p, t, tax, "macro") == pytest.approx(
        reference.hierarchical_prf_macro(parents, pred, true)[2]
    )
    root = np.full(40, -1)
    assert metrics.hierarchical_f1(root, t, tax) == 0


@pytest.mark.parametrize("name", ["tree_accuracy", "mistake_severity", "level_accuracy", "tree_distance", "lca_height"])
def test_tree_metrics_refuse_a_dag(dag, name):
    tax, _ = dag
    ids = np.asarray(tax.leaves)
    with pytest.raises(ValueError, match=r"m.*top1.*top2"):
        getattr(metrics, name)(ids, ids, tax)


def test_violation_rates_and_ranked_metrics_refuse_a_dag(dag):
    tax, _ = dag
    ids = np.asarray(tax.leaves)
    z = random_rows(len(ids), 2)
    for call in (
        lambda: metrics.parent_violation_rate(z, ids, tax),
        lambda: metrics.level_violation_rates(z, ids, tax),
        lambda: metrics.triplet_violation_rate(z, ids, tax),
        lambda: metrics.hierarchical_distance_at_k(ids[:, None], ids, tax, 1),
    ):
        with pytest.raises(ValueError, match=r"m.*top1.*top2"):
            call()
    assert metrics.node_prototypes(z, ids, tax)[1].all()  # every node is above a leaf


def test_label_sets(dag):
    tax, parents = dag
    rng = np.random.default_rng(0)
    P, T = rng.random((2, 20, len(tax.names))) < 0.3

    def closed(row):
        return set().union(*[reference.ancestors(parents, tax.names[v]) for v in np.flatnonzero(row)])

    shared = sum(len(closed(p) & closed(t)) for p, t in zip(P, T, strict=True))
    precision, recall = shared / sum(len(closed(p)) for p in P), shared / sum(len(closed(t)) for t in T)
    assert metrics.hierarchical_precision(P, T, tax) == pytest.approx(precision)
    assert metrics.hierarchical_f1(P, T, tax) == pytest.approx(2 * precision * recall / (precision + recall))
    ids = np.asarray(tax.leaves)
    one_hot = np.eye(len(tax.names), dtype=bool)[ids]
    assert metrics.hierarchical_f1(one_hot, one_hot[::-1].copy(), tax) == pytest.approx(
        metrics.hierarchical_f1(ids, ids[::-1].copy(), tax)
    )
    with pytest.raises(ValueError, match="macro"):
        metrics.hierarchical_f1(P, T, tax, "macro")
    with pytest.raises(ValueError, match="both"):
        metrics.hierarchical_f1(ids, one_hot, tax)
    with pytest.raises(ValueError, match="columns"):
        metrics.hierarchical_f1(P[:, :2], T[:, :2], tax)


# --- what is undefined, what is refused -------------------------------------------------------------------------------


NONE = np.empty(0, dtype=np.int64)


@pytest.mark.parametrize(
    "call",
    [
        lambda tax: metrics.accuracy(NONE, NONE),
        lambda tax: metrics.balanced_accuracy(NONE, NONE),
        lambda tax: metrics.macro_f1(NONE, NONE),
        lambda tax: metrics.roc_auc(np.ones(2), np.ones(2, bool)),
        lambda tax: metrics.macro_roc_auc(np.zeros((2, 2)), np.zeros(2, int)),
        lambda tax: metrics.average_precision(np.ones(2), np.zeros(2, bool)),
        lambda tax: metrics.expected_calibration_error(np.empty(0), np.empty(0, bool)),
        lambda tax: metrics.maximum_calibration_error(np.empty(0), np.empty(0, bool)),
        lambda tax: metrics.negative_log_likelihood(np.empty((0, 2)), NONE),
        lambda tax: metrics.brier_score(np.empty((0, 2)), NONE),
        lambda tax: metrics.fit_temperature(np.empty((0, 2)), NONE),
        lambda tax: metrics.hierarchical_f1(NONE, NONE, tax),
        lambda tax: metrics.hierarchical_precision(NONE, NONE, tax, "macro"),
        lambda tax: metrics.tree_accuracy(NONE, NONE, tax),
        lambda tax: metrics.mistake_severity(tax.leaves, tax.leaves, tax),
        lambda tax: metrics.hierarchical_distance_at_k(np.empty((0, 5), int), NONE, tax, 1),
        lambda tax: metrics.level_accuracy(NONE, NONE, tax)[0],
        lambda tax: metrics.parent_violation_rate(np.ones((1, 2)), tax.index(["US"]), tax),
        lambda tax: metrics.triplet_violation_rate(np.ones((1, 2)), tax.leaves[:1], tax),
        lambda tax: metrics.retrieval_recall_at_k(np.ones((2, 2)), np.arange(2), 1),
        lambda tax: metrics.per_dimension_std(np.empty((0, 2)))[0],
        lambda tax: metrics.effective_rank(np.empty((0, 2))),
        lambda tax: metrics.alignment(np.empty((0, 2)), np.empty((0, 2))),
        lambda tax: metrics.uniformity(np.ones((1, 2))),
    ],
)
def test_undefined_is_nan_and_says_so_in_one_line(example, call):
    with pytest.warns(UndefinedMetric) as record:
        value = call(example[0])
    assert math.isnan(value)
    assert len(record) == 1
    assert "\n" not in str(record[0].message)


@pytest.mark.parametrize(
    ("call", "kind", "word"),
    [
        (lambda tax: metrics.hierarchical_f1(np.array([99]), np.array([0]), tax), IndexError, "pred holds 99"),
        (lambda tax: metrics.tree_accuracy(np.array([0]), np.array([-1]), tax), IndexError, "true holds -1"),
        (lambda tax: metrics.node_prototypes(np.ones((1, 2)), np.array([99]), tax), IndexError, "99"),
        (lambda tax: metrics.hierarchical_f1(tax.leaves, tax.leaves, tax, "weighted"), ValueError, "weighted"),
        (
            lambda tax: metrics.hierarchical_distance_at_k(tax.leaves[None], tax.leaves[:1], tax, 6),
            ValueError,
            "k is 6",
        ),
        (
            lambda tax: metrics.hierarchical_distance_at_k(tax.leaves[None], tax.leaves[:1], tax, 0),
            ValueError,
            "k is 0",
        ),
        (
            lambda tax: metrics.hierarchical_distance_at_k(tax.leaves[[[0, 1, 0]]], tax.leaves[:1], tax, 1),
            ValueError,
            "repeats an id in row 0",
        ),
        (lambda tax: metrics.roc_auc(np.array([math.nan, 1]), np.array([True, False])), ValueError, "nan"),
        (lambda tax: metrics.expected_calibration_error(np.ones(2), np.ones(2, bool), 0), ValueError, "bins"),
        (lambda tax: metrics.expected_calibration_error(np.ones(2), np.ones(2, bool), binning="x"), ValueError, "'x'"),
        (lambda tax: metrics.expected_calibration_error(2 * np.ones(2), np.ones(2, bool)), ValueError, r"\[0, 1\]"),
        (lambda tax: metrics.retrieval_recall_at_k(np.ones((2, 2)), np.zeros(2, int), 0), ValueError, "k"),
        (
            lambda tax: metrics.parent_violation_rate(
                np.ones((1, 2)), tax.leaves[:1], tax, prototypes=(np.ones((2, 2)), np.ones(2, bool))
            ),
            ValueError,
            "2 nodes",
        ),
        (lambda tax: metrics.node_prototypes(np.ones((1, 2)), tax.leaves[:1], tax, "torus"), ValueError, "torus"),
    ],
)
def test_refusals_name_the_mistake(example, call, kind, word):
    with pytest.raises(kind, match=word):
        call(example[0])


def test_tensors_and_arrays_give_the_same(example):
    tax, p, t = example
    P, T = torch.from_numpy(p), torch.from_numpy(t)
    assert metrics.hierarchical_f1(P, T, tax) == metrics.hierarchical_f1(p, t, tax)
    z = random_rows(len(t), 3)
    for f in (metrics.parent_violation_rate, metrics.level_violation_rates):
        assert np.array_equal(f(torch.from_numpy(z), T, tax), f(z, t, tax))
    assert metrics.retrieval_recall_at_k(torch.from_numpy(z), T, 2) == metrics.retrieval_recall_at_k(z, t, 2)
    assert isinstance(metrics.uniformity(torch.from_numpy(z).requires_grad_()), float)


def test_one_leaf_in_all():
    tax = Taxonomy.from_paths(["a/b/c"])
    leaf, top = np.asarray(tax.index(["a/b/c"])), np.asarray(tax.index(["a"]))
    assert metrics.tree_accuracy(leaf, leaf, tax) == 1
    assert metrics.tree_accuracy(top, leaf, tax) == 0


def test_tree_accuracy_is_never_negative():
    tax = Taxonomy.from_paths(["a/b/c/d/e", "a/b/c/d/f"])
    top, leaf = np.asarray(tax.index(["a"])), np.asarray(tax.index(["a/b/c/d/e"]))
    assert metrics.tree_accuracy(top, leaf, tax) == 0  # four edges away, the diameter is two


@pytest.mark.parametrize("module", [hierarchical, flat], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0

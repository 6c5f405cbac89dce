"""Structure diagnostics: the worked example, brute force, and data where the truth is known."""

import itertools
import math

import numpy as np
import pytest

from kladi import toy
from kladi.data.dataset import TRAIN
from kladi.evaluate import diagnostics
from kladi.structure.taxonomy import Taxonomy

TREE = Taxonomy.from_paths(["US/breast/benign", "US/breast/malignant", "US/thyroid", "MR/brain", "MR/knee"])
ORDER = TREE.index(["MR/brain", "MR/knee", "US/thyroid", "US/breast/benign", "US/breast/malignant"])
PAIRS = [1.0, 2.2, 2.6, 2.4, 2.0, 2.5, 2.7, 1.6, 1.4, 0.6]


def worked():
    F = np.zeros((5, 5))
    F[np.triu_indices(5, 1)] = PAIRS
    return F + F.T, TREE.distance(ORDER, ORDER).astype(float)


def test_the_worked_example():
    F, T = worked()
    r, p = diagnostics.mantel(F, T)
    assert r == pytest.approx(0.977692, abs=1e-6)
    assert p == pytest.approx(1 / 30)
    assert diagnostics.distance_correlation(F, T) == pytest.approx(0.995812, abs=1e-6)


@pytest.mark.parametrize(
    ("paths", "distinct"),
    [
        (["a/1", "a/2", "a/3", "b/1", "b/2"], 10),
        ([f"{t}/{i}" for t in "ab" for i in range(4)], 35),
        (["a/1", "a/2", "b/1", "b/2"], 3),
        (["a/1", "a/2", "b/1", "b/2", "c/1", "c/2"], 15),
        (["US/breast/benign", "US/breast/malignant", "US/thyroid", "MR/brain", "MR/knee"], 30),
        (["a/b/1", "a/b/2", "c/1", "c/2"], 3),  # distances know no root
        (["a/b/1", "a/b/2", "a/3", "c/1", "c/2"], 30),
        (["a", "a/1", "b"], 6),
    ],
)
def test_distinct_relabellings_by_hand_and_by_brute_force(paths, distinct):
    tree = Taxonomy.from_paths(paths)
    leaves = np.array(tree.index(paths))
    T = tree.distance(leaves, leaves)
    k = len(paths)
    assert math.factorial(k) // diagnostics.automorphisms(tree, leaves) == distinct
    seen = {T[np.ix_(order, order)].tobytes() for order in itertools.permutations(range(k))}
    assert len(seen) == distinct


def test_inner_nodes_that_are_labels_count():
    tree = Taxonomy.from_paths(["a/1", "a/2", "b"])
    used = np.array(tree.index(["a", "a/1", "a/2"]))
    T = tree.distance(used, used)
    seen = {T[np.ix_(order, order)].tobytes() for order in itertools.permutations(range(3))}
    assert math.factorial(3) // diagnostics.automorphisms(tree, used) == len(seen)


def test_a_constant_matrix_has_no_correlation():
    F, _ = worked()
    assert all(math.isnan(value) for value in diagnostics.mantel(F, np.ones((5, 5)) - np.eye(5)))


def test_draws_agree_with_all_relabellings(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 3))
    F = np.linalg.norm(x[:, None] - x[None], axis=-1)
    y = x + rng.normal(size=(7, 3))
    T = np.linalg.norm(y[:, None] - y[None], axis=-1)
    exact = diagnostics.mantel(F, T)
    monkeypatch.setattr(diagnostics, "ENUMERATED", 2)
    drawn = diagnostics.mantel(F, T)
    assert drawn[0] == exact[0]
    assert drawn[1] == pytest.approx(exact[1], abs=0.02)


def test_a_tree_in_the_features_is_present_and_noise_is_not():
    rng = np.random.default_rng(0)
    tree = toy.taxonomy()
    place = rng.normal(size=(len(tree), 20))
    target = np.tile(tree.leaves, 10)
    centre = np.stack([place[tree.ancestors(int(node))].sum(axis=0) for node in target])
    found = diagnostics.tree_against_features(centre + 0.1 * rng.normal(size=centre.shape), target, tree)
    assert (found.verdict, found.p < 0.01) == ("present", True)
    noise = diagnostics.tree_against_features(rng.normal(size=(80, 20)), target, tree)
    assert noise.verdict == "absent"
    small = Taxonomy.from_paths(["a/1", "a/2", "b/1", "b/2"])
    few = diagnostics.tree_against_features(rng.normal(size=(40, 3)), np.tile(small.leaves, 10), small)
    assert (few.verdict, few.p) == ("cannot tell", None)
    assert few.least_p == pytest.approx(1 / 3)


def test_shared_information():
    assert diagnostics.shared_information(["a", "a", "b", "b"], ["x", "x", "y", "y"]) == pytest.approx(1)
    assert diagnostics.shared_information(["a", "a", "b", "b"], ["x", "y", "x", "y"]) == pytest.approx(0, abs=1e-12)
    assert diagnostics.shared_information(["a", "", "b"], ["x", "y", "y"]) == pytest.approx(1)
    assert math.isnan(diagnostics.shared_information(["a"], ["x"]))


def test_an_attribute_is_in_the_pixels_or_not():
    rng = np.random.default_rng(0)
    group, row_id = np.arange(120) // 2, np.arange(120, dtype=np.uint64)
    code = rng.integers(0, 3, size=60)[group]
    values = [["us", "mr", "xr"][c] for c in code]
    seen = np.eye(3)[code] + 0.1 * rng.normal(size=(120, 3))
    arguments = ("modality", values, seen.astype(np.float32), row_id, group)
    assert diagnostics.metadata_against_pixels(*arguments).verdict == "present"
    blind = rng.normal(size=(120, 3)).astype(np.float32)
    assert diagnostics.metadata_against_pixels("modality", values, blind, row_id, group).verdict == "absent"
    one = diagnostics.metadata_against_pixels("modality", ["us"] * 120, seen.astype(np.float32), row_id, group)
    assert one.verdict == "cannot tell"


def test_of_a_data_set_everything_it_has_columns_for():
    data = toy.dataset(n=96, size=16)
    rows = np.flatnonzero(data.split == TRAIN)
    features = np.random.default_rng(0).normal(size=(len(rows), 8)).astype(np.float32)
    found = diagnostics.of_dataset(data, features, rows)
    assert [d.name for d in found] == ["tree against features", "anatomy from pixels", "modality from pixels"]
    assert all(d.verdict in {"present", "weak", "absent", "cannot tell"} for d in found)
    assert all(diagnostics.sentence(d).startswith(d.verdict) for d in found)

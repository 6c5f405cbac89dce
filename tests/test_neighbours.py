"""kNN, retrieval and prototypes against loops that say what is meant, and against every kind of tie."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from kladi.evaluate import metrics
from kladi.evaluate.readouts.neighbours import knn_scores, nearest_prototype, purity, retrieve, unit
from kladi.losses import geometry


def cosine(a, b):
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def clouds(seed=0, n=80, g=60, width=5, classes=3):
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(classes, width))
    y, t = rng.integers(0, classes, n) * 10, rng.integers(0, classes, g) * 10
    return (
        (centre[y // 10] + rng.normal(size=(n, width))).astype(np.float32),
        y,
        (centre[t // 10] + rng.normal(size=(g, width))).astype(np.float32),
        t,
    )


def test_knn_equals_a_loop():
    query, _, gallery, target = clouds()
    classes = np.array([0, 10, 20, 99])
    ks = (1, 4, 15)
    scores, winners = knn_scores(query, gallery, target, classes, ks)
    for q in range(len(query)):
        near = sorted(range(len(gallery)), key=lambda i: -cosine(query[q].astype(float), gallery[i].astype(float)))
        for i, k in enumerate(ks):
            vote = dict.fromkeys(classes, 0.0)
            for j in near[:k]:
                vote[target[j]] += math.exp(cosine(query[q].astype(float), gallery[j].astype(float)) / 0.07)
            assert winners[i, q] == max(vote, key=vote.get)
            expected = np.array([vote[c] for c in classes]) / sum(vote.values())
            np.testing.assert_allclose(scores[i, q], expected, atol=1e-6)


def test_knn_equal_votes_go_to_the_class_of_the_nearest():
    gallery = np.array([[1, 0.2], [1, -0.2], [1, 0.1], [1, -0.1]], dtype=np.float32)
    query = np.array([[1, 0.0]], dtype=np.float32)
    # Both classes hold one near and one far row, mirrored: equal votes. Equally near rows count by class.
    _, winners = knn_scores(query, gallery, np.array([7, 3, 3, 7]), np.array([3, 7]), (2, 4))
    np.testing.assert_array_equal(winners[:, 0], [3, 3])
    # Now class 7 alone is nearest, and a tie of whole votes cannot be built in favour of 3.
    _, winners = knn_scores(query, gallery[[2, 0]], np.array([7, 3]), np.array([3, 7]), (1, 2))
    np.testing.assert_array_equal(winners[:, 0], [7, 7])


@given(st.integers(0, 50))
@settings(max_examples=20)
def test_row_order_never_matters_even_in_a_collapsed_encoder(seed):
    rng = np.random.default_rng(seed)
    query, y, gallery, target = clouds(seed, n=12, g=20)
    gallery[rng.integers(0, 20, 8)] = gallery[0]
    order = rng.permutation(20)
    classes = np.array([0, 10, 20])
    a, b = (knn_scores(query, gallery[o], target[o], classes, (1, 5)) for o in (np.arange(20), order))
    np.testing.assert_array_equal(a[1], b[1])
    first, second = (retrieve(query, y, gallery[o], target[o]) for o in (np.arange(20), order))
    np.testing.assert_array_equal(first.rank, second.rank)
    np.testing.assert_allclose(first.average_precision, second.average_precision, atol=1e-12)


def test_knn_refuses_more_neighbours_than_rows():
    query, _, gallery, target = clouds()
    with pytest.raises(ValueError, match="60 rows"):
        knn_scores(query, gallery, target, np.unique(target), (61,))


def test_average_precision_worked_and_against_scikit_learn():
    """Hits 1 0 1 0 0 give .833333."""
    angle = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    gallery = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    query = np.array([[1.0, 0.0]], dtype=np.float32)
    found = retrieve(query, np.array([1]), gallery, np.array([1, 0, 1, 0, 0]))
    assert found.average_precision[0] == pytest.approx(0.833333, abs=1e-6)
    query, y, gallery, target = clouds(3)
    found = retrieve(query, y, gallery, target)
    for q in range(len(query)):
        theirs = average_precision_score(target == y[q], unit(gallery) @ unit(query)[q])
        assert found.average_precision[q] == pytest.approx(theirs, abs=1e-9)


def test_rank_of_the_first_match_equals_the_metric_of_api():
    query, y, _, _ = clouds(4, n=40)
    ranks = metrics.retrieval_ranks(query, y)
    for q in range(40):
        others = np.arange(40) != q
        found = retrieve(query[q : q + 1], y[q : q + 1], query[others], y[others])
        assert found.rank[0] + 1 == ranks[q]


def test_a_collapsed_encoder_gains_nothing():
    """Everything equal: non-matches stand first, so R@k is 0 until k exceeds them, and AP is the worst there is."""
    same = np.ones((10, 4), dtype=np.float32)
    target = np.array([1] * 3 + [0] * 7)
    found = retrieve(same[:2], np.array([1, 0]), same, target)
    np.testing.assert_array_equal(found.rank, [7, 3])
    assert found.average_precision[0] == pytest.approx(np.mean([1 / 8, 2 / 9, 3 / 10]))


def test_a_query_without_a_match_is_named_not_scored():
    query, _, gallery, target = clouds(n=3)
    found = retrieve(query, np.array([0, 55, 10]), gallery, target)
    np.testing.assert_array_equal(found.matched, [True, False, True])


def test_zero_vectors_have_no_direction_and_break_nothing():
    query, y, gallery, target = clouds(n=4)
    query[0], gallery[3] = 0, 0
    scores, _ = knn_scores(query, gallery, target, np.array([0, 10, 20]), (5,))
    assert np.isfinite(scores).all()
    assert np.isfinite(retrieve(query, y, gallery, target).average_precision).all()


@pytest.mark.parametrize("space", [geometry.named("sphere"), geometry.named("poincare", 0.5, 1.5)])
def test_prototypes_equal_the_node_prototypes_of_metrics(space, flat_tree):
    """On a flat tree a node's prototype is its class's; distances by the geometry itself."""
    query, _, gallery, target = clouds()
    codes = target // 10
    distance, classes = nearest_prototype(query, gallery, codes, space=space)
    np.testing.assert_array_equal(classes, [0, 1, 2])
    extra = {} if space.name == "sphere" else {"curvature": 0.5, "clip": 1.5}
    points, seen = metrics.node_prototypes(gallery, codes, flat_tree, space.name, **extra)
    assert seen.all()
    import torch

    x = space.embed(torch.from_numpy(query.astype(np.float64)))
    expected = space.distances(x, torch.from_numpy(points), exact=True).numpy()
    np.testing.assert_allclose(distance, expected, atol=1e-9)


@pytest.fixture
def flat_tree():
    from kladi.structure.taxonomy import Taxonomy

    return Taxonomy.from_paths(["a", "b", "c"])


def test_sphere_prototype_by_hand():
    gallery = np.array([[2.0, 0], [0, 5.0], [-1, 0]], dtype=np.float32)
    distance, classes = nearest_prototype(np.array([[3.0, 3.0]], dtype=np.float32), gallery, np.array([4, 4, 9]))
    np.testing.assert_array_equal(classes, [4, 9])
    np.testing.assert_allclose(distance[0], [0, math.sqrt(2 + math.sqrt(2))], atol=1e-7)


def test_a_class_whose_rows_cancel_is_never_nearest():
    gallery = np.array([[1.0, 0], [-1.0, 0], [0, -1.0]], dtype=np.float32)
    distance, _ = nearest_prototype(np.array([[0, 1.0]], dtype=np.float32), gallery, np.array([0, 0, 1]))
    assert distance[0, 0] == math.inf
    assert distance[0, 1] == pytest.approx(2)


def test_purity_by_hand_and_its_edges():
    points = np.array([[0.0, 0], [1, 0], [2, 0], [10, 0], [11, 0], [12, 0]])
    assert purity(points, np.array([0, 0, 0, 1, 1, 1]), k=2) == 1
    # Neighbours of 0: 1, 2; of 1: 0, 2; of 2: 1, 0; alternating labels agree in 1 + 0 + 1 of 6, twice.
    assert purity(points, np.array([0, 1, 0, 1, 0, 1]), k=2) == pytest.approx(4 / 12)
    assert purity(points, np.array([0, 0, 0, -1, 1, -1]), k=2) == pytest.approx(6 / 8)
    assert math.isnan(purity(points, np.array([0, 1, 0, -1, -1, -1]), k=3))


def test_blocks_change_nothing(monkeypatch):
    from kladi.evaluate.readouts import neighbours

    query, y, gallery, target = clouds()
    whole = retrieve(query, y, gallery, target), purity(gallery, target, k=4)
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    parts = retrieve(query, y, gallery, target), purity(gallery, target, k=4)
    np.testing.assert_array_equal(whole[0].rank, parts[0].rank)
    assert whole[1] == pytest.approx(parts[1])

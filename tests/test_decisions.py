"""Answers from probabilities: the chain above a half, monotone stopping, least cost, the distance identity."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kladi.evaluate import metrics
from kladi.losses import node_log_probs
from kladi.losses.subtree_sums import Subtrees, all_log_probs
from kladi.structure.taxonomy import Taxonomy

TAX = Taxonomy.from_paths(["A/a", "A/b", "B/c", "B/d", "B/e"])
RAGGED = Taxonomy.from_paths(["A/a", "A/M/m1", "A/M/m2", "B"])


def test_worked_stops():
    """On the N-way logits of the sheet's example; columns are all nodes, inner mass included."""
    z = torch.tensor([[0.2, -0.1, 1, 0.5, -0.3, 0.8, 0]], dtype=torch.float64)
    P = all_log_probs(z, Subtrees(TAX)).exp()[0].numpy()
    log_q = torch.log_softmax(z, 1).numpy()
    nodes = np.arange(7)
    np.testing.assert_allclose(metrics.node_probabilities(log_q, nodes, TAX)[0], P, atol=1e-12)
    for threshold, name in ((0.25, "A/a"), (0.3, "A"), (0.5, "A"), (0.54, None)):
        want = -1 if name is None else int(TAX.index(name))
        assert metrics.stop_at(log_q, nodes, TAX, threshold).tolist() == [want]


def test_worked_costs():
    p = np.array([[0.326193, 0.197846, 0.088898, 0.267064, 0.120000]])
    assert metrics.least_cost(np.log(p), TAX.leaves, TAX).tolist() == [int(TAX.index("A/a"))]
    heights = np.array([[0, 1, 2, 2, 2], [1, 0, 2, 2, 2], [2, 2, 0, 1, 1], [2, 2, 1, 0, 1], [2, 2, 1, 1, 0]])
    assert (heights @ p[0]).tolist() == pytest.approx([1.149769, 1.278116, 1.435141, 1.256975, 1.404039], abs=1e-5)
    unsure = np.log([[0.36, 0.02, 0.21, 0.21, 0.20]])  # the likeliest leaf stands alone, three siblings outweigh it
    assert metrics.least_cost(unsure, TAX.leaves, TAX).tolist() == [int(TAX.index("B/c"))]


@given(st.integers(0, 2**31))
def test_a_higher_threshold_never_answers_deeper_and_above_a_half_it_is_one_chain(seed):
    rng = np.random.default_rng(seed)
    log_p = node_log_probs(torch.from_numpy(2 * rng.normal(size=(20, 4))), RAGGED).numpy()[:, RAGGED.leaves]
    P = metrics.node_probabilities(log_p, RAGGED.leaves, RAGGED)
    before = None
    for threshold in (0.05, 0.3, 0.51, 0.7, 0.9, 0.99):
        at = metrics.stop_at(log_p, RAGGED.leaves, RAGGED, threshold)
        depth = np.where(at < 0, 0, RAGGED.depth[at])
        if threshold > 0.5:
            sure = [[v for v in range(len(RAGGED)) if row[v] >= threshold] for row in P]
            assert [max(s, key=lambda v: RAGGED.depth[v], default=-1) for s in sure] == at.tolist()
        assert before is None or (depth <= before).all()
        before = depth


def test_a_curve_from_certain_answers():
    log_p = np.log(np.full((4, 4), 0.01) + 0.96 * np.eye(4))
    low, high = (
        metrics.stopped_at(metrics.stop_at(log_p, RAGGED.leaves, RAGGED, threshold), RAGGED.leaves, RAGGED, threshold)
        for threshold in (0.5, 0.999)
    )
    assert (low.precision, low.recall, low.answered) == (1.0, 1.0, 1.0)
    assert low.depth == pytest.approx(RAGGED.depth[RAGGED.leaves].mean())
    assert (high.precision, high.recall, high.depth, high.answered) == (0.0, 0.0, 0.0, 0.0)


@given(st.integers(0, 2**31))
def test_distance_at_one_is_the_share_of_errors_times_their_severity(seed):
    rng = np.random.default_rng(seed)
    true = rng.choice(RAGGED.leaves, 30)
    ranked = np.stack([rng.permutation(RAGGED.leaves) for _ in range(30)])
    wrong = 1 - metrics.accuracy(ranked[:, 0], true)
    severity = metrics.mistake_severity(ranked[:, 0], true, RAGGED) if wrong else 0.0
    assert metrics.hierarchical_distance_at_k(ranked, true, RAGGED, 1) == pytest.approx(wrong * severity, abs=1e-12)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\]"):
        metrics.stop_at(np.zeros((1, 5)), TAX.leaves, TAX, 0.0)
    dag = Taxonomy.from_edges([("a", None), ("b", None), ("c", "a"), ("c", "b")])
    with pytest.raises(ValueError, match="needs a tree"):
        metrics.stop_at(np.zeros((1, 1)), dag.leaves, dag, 0.6)
    assert math.isclose(metrics.node_probabilities(np.zeros((1, 1)), dag.leaves, dag)[0, 0], 1)

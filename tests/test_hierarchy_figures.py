"""What the tree says of answers: below each parent, by level, round the root."""

import itertools
import math

import numpy as np
import pytest

from kladi.evaluate import metrics
from kladi.evaluate.answers import Answers, Task, values
from kladi.evaluate.record import figures
from kladi.structure.taxonomy import Taxonomy

TAX = Taxonomy.from_paths(["A/x/p", "A/x/q", "A/y", "B/z", "B/w", "C"])


def node(*names):
    return TAX.index(list(names))


def answers(seed=0, n=60):
    rng = np.random.default_rng(seed)
    classes = np.sort(np.array(TAX.leaves))
    true = rng.choice(classes, n)
    log_p = np.log(rng.dirichlet(np.ones(len(classes)), n))
    found = Answers("m", "probe", 0, 0, np.arange(n), classes[log_p.argmax(1)], log_p, classes)
    return found, Task("t", TAX, true, np.arange(n))


def test_below_each_parent_by_hand():
    true, pred = node("A/x/p", "A/x/p", "A/x/q", "A/y", "B/z", "C"), node("A/x/p", "A/x/q", "B/z", "A/y", "B/w", "C")
    share, rows, children = metrics.accuracy_below(pred, true, TAX)
    a, x, b = node("A", "A/x", "B")
    assert (rows[a], children[a], share[a]) == (4, 2, 0.75)  # one of A went to B
    assert (rows[x], children[x]) == (3, 2)
    assert share[x] == pytest.approx(1 / 3)
    assert (rows[b], children[b], share[b]) == (1, 1, 0.0)
    assert math.isnan(share[node("C")[0]])


@pytest.mark.parametrize("seed", range(3))
def test_calibration_by_level_against_a_loop(seed):
    found, task = answers(seed)
    true, names = task.target[found.rows], TAX.names
    got = metrics.level_calibration_error(found.scores, found.classes, true, TAX)
    for level in range(1, 4):
        confidence, right = [], []
        for i, t in enumerate(true):
            path = names[t].split("/")
            if len(path) < level:
                continue
            mass = {}
            for c, p in zip(found.classes, np.exp(found.scores[i]), strict=True):
                above = "/".join(names[c].split("/")[:level])
                mass[above] = mass.get(above, 0) + p
            best = max(mass, key=mass.get)
            confidence.append(mass[best])
            right.append(best == "/".join(path[:level]))
        want = metrics.expected_calibration_error(np.array(confidence), np.array(right))
        assert got[level - 1] == pytest.approx(want, abs=1e-12)


def test_certain_and_right_is_calibrated_at_every_level():
    leaves = np.sort(np.array(TAX.leaves))
    with np.errstate(divide="ignore"):
        log_p = np.log(np.eye(len(leaves)))
    assert metrics.level_calibration_error(log_p, leaves, leaves, TAX) == pytest.approx([0, 0, 0])
    turned = np.roll(leaves, 1)  # certain and wrong
    assert metrics.level_calibration_error(log_p, leaves, turned, TAX)[2] == pytest.approx(1)


def test_a_level_that_no_row_reaches_is_undefined_and_said():
    leaves = np.sort(np.array(TAX.leaves))
    log_p = np.log(np.full((2, len(leaves)), 1 / len(leaves)))
    with pytest.warns(metrics.UndefinedMetric, match="2, 3"):
        found = metrics.level_calibration_error(log_p, leaves, node("C", "C"), TAX)
    assert np.isnan(found[1:]).all()
    assert not np.isnan(found[0])


def test_probabilities_are_judged_and_votes_are_not():
    found, task = answers()
    names = {value.metric for value in values(found, task)}
    assert {"calibration_error", "calibration_error_1", "calibration_error_3"} <= names
    votes = Answers("m", "knn", 0, 0, found.rows, found.pred, found.scores, found.classes)
    assert not any(value.metric.startswith("calibration") for value in values(votes, task))


def test_the_tree_of_the_page_adds_up():
    found, task = answers()
    drawn = {one["node"]: one for one in figures.tree([found], task, "m")}
    for name, one in drawn.items():
        children = [other["images"] for other in drawn.values() if other["parent"] == name]
        assert sum(children) in (0, one["images"])
    tops = [one for one in drawn.values() if not one["parent"]]
    assert sum(one["images"] for one in tops) == 60
    assert sum(one["images"] * one["right"] for one in tops) / 60 == pytest.approx(
        metrics.level_accuracy(found.pred, task.target, TAX)[0]
    )


def test_parents_of_the_page():
    found, task = answers()
    rows = figures.parents([found], task, ["m", "absent"])
    assert [row["node"] for row in rows] == ["A", "A/x", "B"]
    assert all(set(row["accuracy"]) == {"m"} for row in rows)
    flat = Taxonomy.from_paths(["a", "b"])
    assert figures.parents([found], Task("t", flat, np.zeros(60, dtype=np.int64), np.arange(60)), ["m"]) == []


def test_tree_distance_of_neighbours():
    from kladi.evaluate.measure import parts_of  # noqa: F401  the regimes read its parts
    from kladi.evaluate.readouts import regimes
    from kladi.evaluate.splits import TEST, TRAIN
    from kladi.losses.geometry import Sphere

    target = node("A/x/p", "A/x/q", "B/z", "A/x/p")
    features = np.array([[1, 0], [0.9, 0.1], [0, 1], [1, 0.01]], dtype=np.float32)
    part = regimes.Part(0, 0, np.array([TRAIN, TRAIN, TRAIN, TEST]))
    view = regimes.View("m", Task("t", TAX, target, np.arange(4)), (part,), (features,), (features,), Sphere())
    found = {value.metric: value.value for _, value, _ in regimes.retrieval(view)}
    far = [0, 2, 5]  # edges from A/x/p to itself, its sibling, another top's leaf
    assert TAX.diameter == 5
    assert found["tree_distance_at_1"] == 0
    assert found["tree_distance_at_5"] == pytest.approx(sum(far) / 3 / 5)
    assert list(itertools.accumulate(far))[-1] == 7


def test_the_ball_is_drawn_where_it_has_two_dimensions():
    from kladi import toy
    from kladi.data.dataset import TRAIN
    from kladi.evaluate.embed import describe
    from kladi.losses.geometry import PoincareBall, Sphere
    from kladi.report.figures import all_figures

    data = toy.dataset(n=60, size=16)
    z = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    z[0] = 1e6  # longer than the clip
    shown = describe(data, z, z)
    found = figures.ball(shown, PoincareBall(1.0, 2.3))
    unseen = (data.split != TRAIN) & (data.target >= 0)
    points = np.array(found["points"])
    assert len(points) == len(found["top"]) == unseen.sum()
    assert (np.linalg.norm(points, axis=1) < 1).all()
    at = {node["node"]: node["at"] for node in found["nodes"]}
    assert all(node["parent"] in at or not node["parent"] for node in found["nodes"])
    assert "ball" in all_figures({"figures": {"ball": found}}, None)
    assert figures.ball(shown, Sphere()) == {}
    wide = np.zeros((60, 3), dtype=np.float32)
    assert figures.ball(describe(data, wide, wide), PoincareBall()) == {}

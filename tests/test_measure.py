"""Embeddings + splits -> rows: what must come out where the truth is known, and where there is nothing to find."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kladi.evaluate import comparisons, metrics
from kladi.evaluate.answers import Answers, Task, resampled, values
from kladi.evaluate.baselines import BINS
from kladi.evaluate.measure import Method, measure, parts_of, resamples
from kladi.evaluate.readouts.regimes import Part
from kladi.evaluate.record import figures, results
from kladi.evaluate.splits import TEST, TRAIN, VAL, make_splits, manifest_splits
from kladi.losses import geometry
from kladi.structure.taxonomy import Taxonomy

TREE = Taxonomy.from_paths(["US/breast/benign", "US/breast/malignant", "US/thyroid", "MR/brain", "MR/knee"])
LEAVES = TREE.leaves
QUICK = (1.0, 1e-2)


def cohort(n=150, noise=0.6, seed=0, images=2):
    """Clusters along the tree: siblings near each other, `images` a patient."""
    rng = np.random.default_rng(seed)
    place = rng.normal(size=(len(TREE.names), 12))
    group = np.arange(n) // images
    target = LEAVES[group % len(LEAVES)]
    centre = np.stack([place[TREE.ancestors(int(node))].sum(axis=0) for node in target])
    features = (centre + noise * rng.normal(size=(n, 12)) * 3).astype(np.float32)
    row_id = rng.permutation(10**6)[:n].astype(np.uint64)
    return features, Task("label", TREE, target, group), row_id


def folds(task, row_id, repeats=2, k=5, seed=0):
    return parts_of(make_splits(row_id, task.target, task.group, folds=k, repeats=repeats, seed=seed), row_id)


def table(measured):
    found = {}
    for row in measured.rows:
        found.setdefault((row.regime, row.metric), []).append(row)
    return found


@pytest.fixture(scope="module")
def found():
    features, task, row_id = cohort()
    parts = folds(task, row_id)
    return measure(Method("encoder", features), task, parts, ks=(1, 5, 10), lambdas=QUICK), task, parts


def test_every_regime_and_metric_with_its_n_and_patients(found):
    rows = table(found[0])
    flat = {"accuracy", "balanced_accuracy", "macro_f1"}
    tree = {"hierarchical_f1", "hierarchical_f1_macro", "tree_accuracy", "mistake_severity"}
    levels = {f"level_accuracy_{level}" for level in (1, 2, 3)}
    for regime in ("probe", "knn", "prototype"):
        there = {metric for r, metric in rows if r == regime}
        calibration = {"calibration_error", *(f"calibration_error_{level}" for level in (1, 2, 3))}
        distances = {f"hierarchical_distance_at_{k}" for k in (1, 5)} | {"least_cost_distance", "least_cost_accuracy"}
        extra = {
            "probe": {"auc", *calibration, *distances},
            "knn": {"auc"},
            "prototype": {"parent_violation_rate", *(f"violation_rate_{level}" for level in (1, 2, 3))},
        }
        assert there == flat | tree | levels | extra[regime]
    assert {m for r, m in rows if r == "retrieval"} == {
        "recall_at_1",
        "recall_at_5",
        "recall_at_10",
        "mean_average_precision",
        "tree_distance_at_1",
        "tree_distance_at_5",
        "tree_distance_at_10",
    }
    assert {m for r, m in rows if r == "representation"} >= {"effective_rank", "std_mean", "uniformity"}
    for (regime, metric), some in rows.items():
        assert len(some) == (1 if regime == "representation" else 10)
        for row in some:
            assert row.value is None or math.isnan(row.value) or row.n > 0
            assert row.n_patients <= row.n
            if metric == "accuracy":
                assert (row.n, row.n_patients) == (30, 15)
            if metric == "level_accuracy_3":
                assert row.n == 12  # only two of five leaves are that deep
            if metric == "mistake_severity":
                right = next(r for r in rows[regime, "accuracy"] if (r.fold, r.repeat) == (row.fold, row.repeat))
                assert row.n == round((1 - right.value) * 30)


def test_rows_are_what_the_metrics_say_of_the_answers(found):
    measured, task, _ = found
    rows = {(r.regime, r.metric, r.fold, r.repeat): r.value for r in measured.rows}
    for answers in measured.answers:
        true = task.target[answers.rows]
        key = answers.regime, answers.fold, answers.repeat
        assert rows[key[0], "hierarchical_f1", key[1], key[2]] == metrics.hierarchical_f1(answers.pred, true, TREE)
        assert rows[key[0], "balanced_accuracy", key[1], key[2]] == metrics.balanced_accuracy(answers.pred, true)
    # hd@1 = (1 - accuracy) * severity, an identity that only holds if both saw the same rows.
    for answers in measured.answers:
        key = answers.regime, answers.fold, answers.repeat
        accuracy = rows[key[0], "accuracy", key[1], key[2]]
        if accuracy < 1:
            mean_height = metrics.lca_height(answers.pred, task.target[answers.rows], TREE).mean()
            severity = rows[key[0], "mistake_severity", key[1], key[2]]
            assert (1 - accuracy) * severity == pytest.approx(mean_height)
            if answers.regime == "probe":
                assert rows["probe", "hierarchical_distance_at_1", key[1], key[2]] == pytest.approx(mean_height)


def test_weights_of_one_give_every_value(found):
    """The bootstrap's form of a metric and the metric itself are two ways to one number."""
    measured = found[0]
    rows = {(r.regime, r.metric, r.fold, r.repeat): r.value for r in measured.rows}
    seen = set()
    for one in resamples(found[0], found[1]):
        value = one.of(np.ones((1, len(one.rows))))[0]
        expected = rows[one.regime, one.metric, one.fold, one.repeat]
        assert value == pytest.approx(expected, nan_ok=True), (one.regime, one.metric)
        seen.add((one.regime, one.metric))
    assert len(seen) == 3 * 7 + 2 + 2 + 7 + 1  # flat, tree; auc; distances of the probe; retrieval; parent violation


def test_structure_is_found_where_it_is(found):
    rows = table(found[0])
    assert np.mean([r.value for r in rows["probe", "balanced_accuracy"]]) > 0.5
    assert np.mean([r.value for r in rows["probe", "auc"]]) > 0.8


def test_the_same_seed_gives_the_same_results(found):
    features, task, row_id = cohort()
    again = measure(Method("encoder", features), task, folds(task, row_id), ks=(1, 5, 10), lambdas=QUICK)
    a, b = results.assemble(found[0].rows), results.assemble(again.rows)
    assert a["digest"] == b["digest"]


def test_the_order_of_the_rows_does_not_matter(found):
    features, task, row_id = cohort()
    order = np.random.default_rng(5).permutation(len(row_id))
    shuffled = Task("label", TREE, task.target[order], task.group[order])
    parts = folds(shuffled, row_id[order])
    again = measure(Method("encoder", features[order]), shuffled, parts, ks=(1, 5, 10), lambdas=QUICK)
    first = {(r.regime, r.metric, r.fold, r.repeat): r.value for r in found[0].rows}
    for row in again.rows:
        if row.regime != "representation":
            assert row.value == pytest.approx(
                first[row.regime, row.metric, row.fold, row.repeat], abs=1e-6, nan_ok=True
            )


@pytest.mark.slow
def test_shuffled_labels_give_chance():
    """Over seeds the mean sits at chance: 1/C and .5. A leak from test to train would lift it."""
    balanced, area, matches = [], [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        features, task, row_id = cohort(n=100, seed=seed, images=1)
        target = task.target.copy()
        patients = rng.permutation(task.group.max() + 1)
        target = LEAVES[patients[task.group] % len(LEAVES)]
        shuffled = Task("label", TREE, target, task.group)
        rows = table(
            measure(Method("x", features), shuffled, folds(shuffled, row_id, repeats=1), ks=(1, 5), lambdas=(1.0, 0.1))
        )
        balanced += [r.value for r in rows["probe", "balanced_accuracy"] + rows["knn", "balanced_accuracy"]]
        area += [r.value for r in rows["probe", "auc"]]
        matches += [r.value for r in rows["prototype", "accuracy"]]
    assert np.mean(balanced) == pytest.approx(0.2, abs=0.03)
    assert np.mean(area) == pytest.approx(0.5, abs=0.03)
    assert np.mean(matches) == pytest.approx(0.2, abs=0.04)


def test_test_rows_choose_and_fit_nothing():
    """Change features and labels of the test rows of one fold: what was fitted and chosen stays, bit for bit."""
    features, task, row_id = cohort(n=80)
    part = folds(task, row_id, repeats=1)[0]
    test = part.rows(TEST)
    spoilt = features.copy()
    spoilt[test] = 1e3
    for method in (Method("m", features), Method("m", spoilt)):
        measured = measure(method, task, (part,), ks=(1, 5), lambdas=QUICK)
        yield_scores = {a.regime: a for a in measured.answers}
        if method.features is features:
            first = yield_scores
    # All test rows are now one and the same: one answer for all, by models that did not change.
    for regime, answers in yield_scores.items():
        assert len(np.unique(answers.pred)) == 1, regime
    hidden = task.target.copy()
    hidden[test] = np.roll(hidden[test], 1)
    relabelled = measure(
        Method("m", features), Task("label", TREE, hidden, task.group), (part,), ks=(1, 5), lambdas=QUICK
    )
    for answers in relabelled.answers:
        np.testing.assert_array_equal(answers.pred, first[answers.regime].pred)


def test_a_class_absent_from_training_is_wrong_and_not_skipped():
    features, task, row_id = cohort(n=80)
    part = folds(task, row_id, repeats=1)[0]
    lost = int(LEAVES[0])
    of = np.where((task.target == lost) & (part.of != TEST), -1, part.of)
    measured = measure(Method("m", features), task, (Part(0, 0, of),), ks=(1, 5), lambdas=QUICK)
    rows = table(measured)
    for answers in measured.answers:
        assert not (answers.pred == lost).any()
        assert lost not in answers.classes
    missing = int((task.target[part.rows(TEST)] == lost).sum())
    assert missing > 0
    for regime in ("probe", "knn", "prototype"):
        assert rows[regime, "accuracy"][0].n == len(part.rows(TEST))
        assert rows[regime, "balanced_accuracy"][0].value <= 1 - 1 / 5
    # A query without a match in the gallery leaves the mean, and n says so.
    assert rows["retrieval", "recall_at_1"][0].n == len(part.rows(TEST)) - missing


def test_a_class_absent_from_test_gives_values_and_a_reason_for_the_rest():
    features, task, row_id = cohort(n=80)
    part = folds(task, row_id, repeats=1)[0]
    of = np.where((task.target == LEAVES[1]) & (part.of == TEST), -1, part.of)
    rows = table(measure(Method("m", features), task, (Part(0, 0, of),), ks=(1, 5), lambdas=QUICK))
    area = rows["probe", "auc"][0]
    assert area.value is not None
    assert "4 of 5 classes" in area.reason


def test_one_class_empty_parts_and_one_patient_are_rows_with_a_reason():
    features, task, _ = cohort(n=40)
    one = np.where(np.arange(40) < 30, TRAIN, TEST)
    cases = {
        "one class": (np.where(task.target == task.target[0], one, -1), "two classes"),
        "no test": (np.full(40, TRAIN), "no test rows"),
        "no val": (one, ""),
        "nothing": (np.full(40, -1), "two classes"),
        "one test row": (np.where(np.arange(40) == 39, TEST, np.where(np.arange(40) < 30, TRAIN, VAL)), ""),
    }
    for name, (of, reason) in cases.items():
        rows = table(measure(Method("m", features), task, (Part(0, 0, of),), ks=(1, 5), lambdas=QUICK))
        row = rows["probe", "balanced_accuracy"][0].to_dict()
        if reason:
            assert row["value"] is None, name
            assert reason in row["reason"], name
        else:
            assert row["value"] is not None, name
        results.assemble([r for some in rows.values() for r in some])


def test_on_a_flat_tree_only_flat_metrics():
    flat = Taxonomy.from_paths(["a", "b", "c"])
    features, _, row_id = cohort(n=60)
    group = np.arange(60) // 2
    task = Task("modality", flat, (group % 3).astype(np.int64), group)
    rows = table(measure(Method("m", features), task, folds(task, row_id, repeats=1), ks=(1,), lambdas=QUICK))
    assert {m for r, m in rows if r == "probe"} == {
        "accuracy",
        "balanced_accuracy",
        "macro_f1",
        "auc",
        "calibration_error",
    }
    assert {m for r, m in rows if r == "prototype"} == {"accuracy", "balanced_accuracy", "macro_f1"}


def test_on_a_dag_hierarchical_f1_but_nothing_that_needs_a_tree():
    dag = Taxonomy.from_edges([("a", None), ("b", None), ("c", "a"), ("c", "b"), ("d", "a"), ("e", "b")])
    features, _, row_id = cohort(n=60)
    group = np.arange(60) // 2
    task = Task("label", dag, dag.leaves[group % 3], group)
    rows = table(measure(Method("m", features), task, folds(task, row_id, repeats=1), ks=(1,), lambdas=QUICK))
    there = {m for r, m in rows if r == "probe"}
    assert {"hierarchical_f1", "hierarchical_f1_macro"} <= there
    assert not there & {"tree_accuracy", "mistake_severity", "level_accuracy_1"}


def test_prototypes_use_the_heads_space_and_the_rest_the_features():
    features, task, row_id = cohort(n=80)
    z = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
    parts = folds(task, row_id, repeats=1)
    ball = geometry.named("poincare", 0.5, 1.0)
    a = table(measure(Method("m", features, z, ball), task, parts, ks=(1,), lambdas=QUICK))
    b = table(measure(Method("m", features), task, parts, ks=(1,), lambdas=QUICK))
    for key in [("probe", "accuracy"), ("retrieval", "recall_at_1")]:
        assert [r.value for r in a[key]] == [r.value for r in b[key]]
    assert [r.value for r in a["prototype", "accuracy"]] != [r.value for r in b["prototype", "accuracy"]]


def test_violation_rate_equals_the_metric_with_training_prototypes():
    features, task, row_id = cohort(n=80)
    part = folds(task, row_id, repeats=1)[0]
    rows = table(measure(Method("m", features), task, (part,), ks=(1,), lambdas=QUICK))
    train, test = part.rows(TRAIN), part.rows(TEST)
    known = metrics.node_prototypes(features[train], task.target[train], TREE)
    expected = metrics.parent_violation_rate(features[test], task.target[test], TREE, prototypes=known)
    assert rows["prototype", "parent_violation_rate"][0].value == pytest.approx(expected)
    levels = metrics.level_violation_rates(features[test], task.target[test], TREE, prototypes=known)
    for level in (1, 2, 3):
        assert rows["prototype", f"violation_rate_{level}"][0].value == pytest.approx(levels[level - 1])


def test_grey_levels_are_fitted_on_each_folds_training_rows():
    _, task, row_id = cohort(n=60)
    rng = np.random.default_rng(0)
    grey = np.abs(rng.normal(size=(60, BINS + 100))).astype(np.float32)
    parts = folds(task, row_id, repeats=1)
    whole = measure(Method("g", grey, grey=True), task, parts, ks=(1,), lambdas=QUICK)
    alone = measure(Method("g", grey, grey=True), task, parts[2:3], ks=(1,), lambdas=QUICK)
    third = next(a for a in whole.answers if a.fold == 2 and a.regime == "knn")
    np.testing.assert_array_equal(third.pred, alone.answers[1].pred)
    assert len(whole.answers) == 15


def test_penalties_at_the_end_of_the_grid_are_said():
    features, task, row_id = cohort(n=60)
    measured = measure(Method("m", features), task, folds(task, row_id, repeats=1), ks=(1,), lambdas=(10.0, 9.0))
    assert any("end of the grid" in warning for warning in measured.warnings)


# --- answers ---------------------------------------------------------------------------------------------------------

WORKED_TRUE = ["US/breast/benign"] * 2 + ["US/breast/malignant"] * 2 + ["US/thyroid"] * 2 + ["MR/brain", "MR/knee"]
WORKED_TRUE += ["US/breast/malignant", "MR/knee"]
WORKED_PRED = ["US/breast/benign"] + ["US/breast/malignant"] * 2 + ["US/thyroid"] * 2 + ["MR/brain", "MR/knee"]
WORKED_PRED += ["US/breast/benign", "US/breast", "MR/knee"]


def worked():
    true, pred = TREE.index(WORKED_TRUE), TREE.index(WORKED_PRED)
    task = Task("label", TREE, true, np.arange(10))
    return Answers("m", "probe", 0, 0, np.arange(10), pred, None, LEAVES), task


def test_worked_example_of_the_sheet():
    answers, task = worked()
    found = {v.metric: v for v in values(answers, task)}
    expected = {
        "accuracy": 0.4,
        "balanced_accuracy": 0.366667,
        "hierarchical_f1": 0.653061,
        "hierarchical_f1_macro": 0.605556,
        "tree_accuracy": 0.66,
        "mistake_severity": 1.833333,
        "level_accuracy_1": 0.8,
        "level_accuracy_2": 0.6,
        "level_accuracy_3": 0.4,
    }
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-6), name
    assert len(found["mistake_severity"].rows) == 6
    weighted = resampled(answers, task)
    for name in expected.keys() & weighted.keys():
        assert weighted[name](np.ones((1, 10)))[0] == pytest.approx(expected[name], abs=1e-6), name


def test_confusion_in_tree_order_and_severity_by_height():
    answers, task = worked()
    found = figures.confusion([answers], task, "m")
    assert found["nodes"] == [
        "MR/brain",
        "MR/knee",
        "US/breast",
        "US/breast/benign",
        "US/breast/malignant",
        "US/thyroid",
    ]
    assert found["depths"] == [2, 2, 2, 3, 3, 2]
    counts = np.array(found["counts"])
    assert counts.sum() == 10
    assert counts[found["nodes"].index("US/breast/malignant")].tolist() == [0, 0, 1, 0, 1, 1]
    # H of the ten rows: 0 1 0 2 0 3 1 3 1 0.
    assert figures.severity([answers], task, ["m"]) == {"heights": [1, 2, 3], "counts": {"m": [3, 1, 2]}}


def test_tree_order_is_depth_first_on_any_depth():
    chain = Taxonomy.from_paths(["/".join(f"n{i}" for i in range(2000))])
    np.testing.assert_array_equal(figures.tree_order(chain), np.arange(2000))
    dag = Taxonomy.from_edges([("a", None), ("b", None), ("c", "a"), ("c", "b"), ("d", "b")])
    assert [dag.names[i] for i in figures.tree_order(dag)] == ["a", "c", "b", "d"]


def test_levels_are_means_over_folds(found):
    measured, _, _ = found
    levels = figures.by_depth(measured.rows, "level_accuracy_", "probe", ["encoder", "other"])
    rows = table(measured)
    assert list(levels) == ["encoder"]
    assert levels["encoder"] == pytest.approx(
        [np.mean([r.value for r in rows["probe", f"level_accuracy_{level}"]]) for level in (1, 2, 3)]
    )


# --- comparisons -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared():
    features, task, row_id = cohort(n=150)
    parts = folds(task, row_id)
    noise = np.random.default_rng(1).normal(size=features.shape).astype(np.float32)
    methods = [Method("encoder", features), Method("noise", noise, control_of="encoder")]
    measured = [measure(m, task, parts, ks=(5,), lambdas=QUICK) for m in methods]
    return measured, task, parts


def test_a_real_difference_is_found_and_said(compared):
    measured, task, parts = compared
    drawn = comparisons.draw(measured, task, parts, draws=300, seed=0)
    found = comparisons.settle(comparisons.compare(drawn, [("encoder", "noise")], task, parts))
    primary = next(c for c in found if c["regime"] == "probe" and c["metric"] == "balanced_accuracy")
    assert primary["verdict"] == "better"
    assert primary["holm_p"] == primary["corrected_t_p"] < 0.05
    assert primary["interval"][0] > 0
    assert primary["pairs"] == 2
    assert primary["least_p"] == 0.5
    keys = {"method", "reference", "dataset", "regime", "metric", "pairs", "zero_pairs", "difference", "interval"}
    keys |= {"interval_kind", "corrected_t_p", "wilcoxon_p", "least_p", "holm_p", "rank_biserial", "verdict"}
    assert keys <= set(primary)
    # Secondary metrics are exploratory: no adjusted p, and at most a leaning.
    for c in found:
        if c is not primary:
            assert c["holm_p"] is None
            assert c["verdict"] not in {"better", "worse"}
    severity = next(c for c in found if c["metric"] == "parent_violation_rate")
    assert severity["difference"] < 0
    assert severity["verdict"] == "leans better"  # lower is better


def test_the_difference_is_the_mean_over_folds(compared):
    measured, task, parts = compared
    drawn = comparisons.draw(measured, task, parts, draws=50, seed=0)
    found = comparisons.settle(comparisons.compare(drawn, [("encoder", "noise")], task, parts))
    mine, theirs = (table(m)["knn", "accuracy"] for m in measured)
    expected = np.mean([a.value for a in mine]) - np.mean([b.value for b in theirs])
    c = next(c for c in found if c["regime"] == "knn" and c["metric"] == "accuracy")
    assert c["difference"] == pytest.approx(expected)


def test_a_method_against_itself_is_equal(compared):
    measured, task, parts = compared
    drawn = comparisons.draw(measured[:1], task, parts, draws=50, seed=0)
    for c in comparisons.settle(comparisons.compare(drawn, [("encoder", "encoder")], task, parts)):
        assert c["difference"] == 0
        assert c["interval"] == [0, 0]
        assert c["verdict"] == "equal within margin"
        if c["wilcoxon_p"] is not None:
            assert c["wilcoxon_p"] == 1
            assert c["corrected_t_p"] == 1


def test_one_official_split_has_an_interval_and_no_t():
    features, task, row_id = cohort(n=150)
    split = np.where(task.group % 5 == 0, TEST, np.where(task.group % 5 == 1, VAL, TRAIN))
    target = LEAVES[(task.group // 5) % 5]
    task = Task("label", TREE, target, task.group)
    parts = parts_of(manifest_splits(row_id, target, task.group, split), row_id)
    noise = np.random.default_rng(1).normal(size=features.shape).astype(np.float32)
    two = [measure(Method(n, f), task, parts, ks=(5,), lambdas=QUICK) for n, f in (("a", features), ("b", noise))]
    drawn = comparisons.draw(two, task, parts, draws=100, seed=0)
    for c in comparisons.settle(comparisons.compare(drawn, [("a", "b")], task, parts)):
        assert c["corrected_t_p"] is c["wilcoxon_p"] is c["holm_p"] is None
        assert c["verdict"] not in {"better", "worse"}
    for entry in comparisons.intervals(drawn, task, parts):
        assert entry["sd_repeats"] is None


def test_intervals_hold_every_method_and_metric(compared):
    measured, task, parts = compared
    drawn = comparisons.draw(measured, task, parts, draws=100, seed=0)
    found = comparisons.intervals(drawn, task, parts)
    assert len(found) == len(drawn)
    for entry in found:
        if entry["interval"]:
            assert entry["interval"][0] <= entry["value"] + 0.05
            assert entry["interval"][1] >= entry["value"] - 0.05
        assert entry["n_patients"] == 75
    results.assemble([], figures={"intervals": found})

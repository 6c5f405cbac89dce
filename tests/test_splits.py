"""Splits: by patient, stratified, the same for any order of the manifest; and no leak gets through unnamed."""

from __future__ import annotations

import dataclasses
import json
import stat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kladi.errors import UserError
from kladi.evaluate.splits import (
    TEST,
    TRAIN,
    UNUSED,
    VAL,
    Splits,
    find_leaks,
    make_splits,
    manifest_splits,
    refuse_leaks,
    scored_classes,
)
from kladi.structure.taxonomy import Taxonomy


@st.composite
def cohorts(draw):
    """Patients with 1 to 4 images, mostly of one class; every class has at least three patients."""
    classes = draw(st.integers(2, 5))
    patients = [c for c in range(classes) for _ in range(draw(st.integers(3, 9)))]
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    images = rng.integers(1, 5, len(patients))
    group = np.repeat(np.arange(len(patients)), images)
    target = np.repeat(patients, images)
    target[rng.random(len(target)) < draw(st.sampled_from([0.0, 0.1]))] = -1
    row_id = rng.permutation(2**20)[: len(group)].astype(np.uint64) * np.uint64(2**44)
    return row_id, target.astype(np.int64), rng.permutation(1000)[group], draw(st.integers(0, 5))


def rare(target, group):
    return min(len(np.unique(group[target == c])) for c in np.unique(target[target >= 0])) < 3


@given(cohorts())
@settings(max_examples=40)
def test_folds_are_disjoint_complete_grouped_and_blind_to_order(cohort):
    row_id, target, group, seed = cohort
    if rare(target, group) or len(np.unique(target[target >= 0])) < 2:
        return
    splits = make_splits(row_id, target, group, folds=5, repeats=2, seed=seed)
    assert 3 <= splits.folds <= 5
    for repeat in range(2):
        tested, validated = np.zeros(len(row_id), int), np.zeros(len(row_id), int)
        for fold in range(splits.folds):
            part = splits.part(row_id, fold, repeat)
            np.testing.assert_array_equal(part == UNUSED, target < 0)
            tested += part == TEST
            validated += part == VAL
            for g in np.unique(group):
                assert len(np.unique(part[(group == g) & (target >= 0)])) <= 1
            assert (part == TRAIN).any()
            assert (part == VAL).any()
        np.testing.assert_array_equal(tested, target >= 0)  # once a repeat
        if splits.folds > 3:
            np.testing.assert_array_equal(validated, target >= 0)
    # The same cohort, its rows shuffled and its patients numbered otherwise.
    order = np.random.default_rng(seed).permutation(len(row_id))
    again = make_splits(row_id[order], target[order], (group[order] * 7919) % 65_537, folds=5, repeats=2, seed=seed)
    assert again.digest == splits.digest
    np.testing.assert_array_equal(again.part(row_id, 1, 1), splits.part(row_id, 1, 1))


@given(cohorts())
@settings(max_examples=25)
def test_every_class_is_in_every_fold_where_one_patient_has_one_class(cohort):
    row_id, target, group, seed = cohort
    if (target < 0).any():
        return
    splits = make_splits(row_id, target, group, seed=seed)
    assert splits.missing == ()
    for fold in range(splits.folds):
        part = splits.part(row_id, fold, 0)
        for what in (TEST, TRAIN):
            np.testing.assert_array_equal(np.unique(target[part == what]), np.unique(target))


def simple(patients=20, images=2, classes=2):
    group = np.repeat(np.arange(patients), images)
    return np.arange(len(group), dtype=np.uint64) + np.uint64(2**63), group % classes, group


def test_sixty_twenty_twenty_and_the_next_fold_validates():
    row_id, target, group = simple()
    splits = make_splits(row_id, target, group, folds=5, repeats=3)
    for repeat in range(3):
        for fold in range(5):
            part = splits.part(row_id, fold, repeat)
            assert [(part == p).mean() for p in (TRAIN, VAL, TEST)] == [0.6, 0.2, 0.2]
            following = splits.part(row_id, (fold + 1) % 5, repeat)
            np.testing.assert_array_equal(part == VAL, following == TEST)
    assert (splits.fold[:, 0] != splits.fold[:, 1]).any()


def test_with_three_folds_a_quarter_of_the_training_patients_validates():
    row_id, target, group = simple(patients=24, images=1)
    splits = make_splits(row_id, target, group, folds=3)
    for fold in range(3):
        part = splits.part(row_id, fold, 0)
        assert (part == TEST).sum() == 8
        assert (part == VAL).sum() == 4
        assert set(target[part == VAL]) == {0, 1}


def test_k_falls_to_the_patients_of_the_rarest_class_and_under_three_is_refused():
    row_id, target, group = simple(patients=20, images=1)
    target[:] = 0
    target[:4] = 1
    assert make_splits(row_id, target, group).folds == 4
    target[2:4] = 0
    with pytest.raises(UserError, match="2 patients"):
        make_splits(row_id, target, group)
    with pytest.raises(UserError, match="two classes"):
        make_splits(row_id, np.zeros_like(target), group)
    with pytest.raises(UserError, match="there is 0"):
        make_splits(row_id, np.full_like(target, -1), group)


def test_a_class_that_cannot_be_everywhere_is_named():
    """All patients of class 1 also hold class 2 rows, and one of them holds almost all: some fold lacks one."""
    row_id, _, _ = simple(patients=12, images=1)
    group = np.array([0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8])
    target = np.array([1, 2, 1, 2, 1, 2, 0, 0, 0, 0, 0, 0])
    splits = make_splits(row_id, target, group, names={0: "a", 1: "b", 2: "c"})
    assert splits.folds == 3
    for sentence in splits.missing:
        assert sentence.split(": no ")[1] in {"a", "b", "c"}


def test_seeds_and_repeats_differ_and_the_digest_knows():
    row_id, target, group = simple()
    a, b = make_splits(row_id, target, group, seed=0), make_splits(row_id, target, group, seed=1)
    assert a.digest != b.digest
    assert (a.fold != b.fold).any()
    assert a.digest == make_splits(row_id, target, group, seed=0).digest


# --- the file ------------------------------------------------------------------------------------------------------


def test_written_once_read_by_all(tmp_path):
    row_id, target, group = simple()
    splits = make_splits(row_id, target, group)
    splits.write(tmp_path / "splits.json")
    again = Splits.read(tmp_path / "splits.json")
    assert again.digest == splits.digest
    assert stat.S_IMODE((tmp_path / "splits.json").stat().st_mode) == 0o600
    for fold in range(5):
        np.testing.assert_array_equal(again.part(row_id, fold, 1), splits.part(row_id, fold, 1))
    content = json.loads((tmp_path / "splits.json").read_text())
    assert set(content) >= {"digest", "kind", "seed", "fold"}
    assert len(content["fold"][f"{2**63:016x}"]) == 2


def test_a_changed_or_foreign_file_is_refused(tmp_path):
    row_id, target, group = simple()
    path = tmp_path / "splits.json"
    make_splits(row_id, target, group).write(path)
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match="digest"):
        Splits.read(path)
    for text in ("[]", "{", '{"fold": {"xyz": [0]}}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"not a splits\.json"):
            Splits.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        Splits.read(tmp_path / "none.json")


def test_rows_that_were_never_split_are_unused():
    row_id, target, group = simple()
    splits = make_splits(row_id, target, group)
    part = splits.part(np.array([5, 2**64 - 1], dtype=np.uint64), 0, 0)
    np.testing.assert_array_equal(part, [UNUSED, UNUSED])


# --- the manifest's own split --------------------------------------------------------------------------------------


def test_a_manifest_split_is_kept_as_it_is():
    row_id, target, group = simple()
    split = np.array([TRAIN] * 20 + [VAL] * 8 + [TEST] * 10 + [3, 3])
    splits = manifest_splits(row_id, target, group, split)
    expected = np.where(split == 3, UNUSED, split)
    np.testing.assert_array_equal(splits.part(row_id, 0, 0), expected)
    assert (splits.folds, splits.repeats, splits.kind) == (1, 1, "manifest")


def test_without_val_a_quarter_of_the_training_patients_validates():
    row_id, target, group = simple()
    split = np.array([TRAIN] * 32 + [TEST] * 8)
    part = manifest_splits(row_id, target, group, split).part(row_id, 0, 0)
    assert (part == VAL).sum() == 8
    assert not set(group[part == VAL]) & set(group[part == TRAIN])
    assert set(target[part == VAL]) == {0, 1}
    np.testing.assert_array_equal(part == TEST, split == TEST)


def test_the_only_patient_of_a_class_never_leaves_training():
    row_id, target, group = simple(patients=12, images=1)
    split = np.array([TRAIN] * 9 + [TEST] * 3)
    target[0] = 5
    for seed in range(20):
        part = manifest_splits(row_id, target, group, split, seed=seed).part(row_id, 0, 0)
        assert part[0] == TRAIN


def test_a_manifest_split_without_a_part_is_refused():
    row_id, target, group = simple()
    with pytest.raises(UserError, match='no labelled row "test"'):
        manifest_splits(row_id, target, group, np.full(40, TRAIN))
    with pytest.raises(UserError, match="two classes"):
        manifest_splits(row_id, target, group, np.where(target == 0, TRAIN, TEST))


# --- rare classes --------------------------------------------------------------------------------------------------


@pytest.fixture
def tree():
    return Taxonomy.from_paths(["US/breast/benign", "US/breast/malignant", "US/thyroid", "MR/brain", "XA"])


def test_rare_leaves_are_scored_at_their_parent_or_dropped_by_name(tree):
    names = ["US/breast/benign"] * 5 + ["US/breast/malignant"] * 2 + ["US/thyroid"] * 4 + ["MR/brain"] * 2 + ["XA"] * 2
    target, group = tree.index(names), np.arange(len(names))
    classes = scored_classes(target, group, tree)
    scored = [tree.names[t] if t >= 0 else "" for t in classes.target]
    # US/breast has 2 patients of its own then, too few, so they go on to US; which has 2: dropped there.
    assert scored == ["US/breast/benign"] * 5 + [""] * 2 + ["US/thyroid"] * 4 + [""] * 4
    dropped = {tree.names[node] for node in classes.dropped}
    assert {"US/breast/malignant", "MR/brain", "XA"} <= dropped


def test_two_rare_siblings_make_one_parent(tree):
    names = ["US/breast/benign"] * 2 + ["US/breast/malignant"] * 2 + ["US/thyroid"] * 3
    target, group = tree.index(names), np.array([0, 1, 2, 3, 4, 5, 6])
    classes = scored_classes(target, group, tree)
    assert [tree.names[t] for t in classes.target] == ["US/breast"] * 4 + ["US/thyroid"] * 3
    assert {tree.names[a]: tree.names[b] for a, b in classes.merged.items()} == {
        "US/breast/benign": "US/breast",
        "US/breast/malignant": "US/breast",
    }
    assert classes.dropped == ()


def test_patients_count_not_images(tree):
    target = tree.index(["US/breast/benign"] * 30 + ["US/thyroid"] * 3)
    group = np.r_[np.zeros(30, int), 1, 2, 3]
    assert set(scored_classes(target, group, tree).target) == {-1, int(tree.index("US/thyroid"))}


def test_on_a_dag_a_rare_class_is_dropped():
    dag = Taxonomy.from_edges([("a", None), ("b", None), ("c", "a"), ("c", "b"), ("d", "a")])
    target = dag.index(["c"] * 2 + ["d"] * 4)
    classes = scored_classes(target, np.arange(6), dag)
    assert classes.dropped == (int(dag.index("c")),)
    assert list(classes.target[:2]) == [-1, -1]


# --- leaks ---------------------------------------------------------------------------------------------------------


def planted():
    row_id, target, group = simple(patients=20, images=1)
    split = np.array([TRAIN] * 10 + [VAL] * 4 + [TEST] * 6)
    pixels = np.arange(20, dtype=np.uint64)
    return row_id, target, group, split, pixels, np.arange(1, 21)


def test_a_clean_split_has_no_leak():
    row_id, target, group, split, pixels, rows = planted()
    splits = manifest_splits(row_id, target, group, split)
    assert find_leaks(splits, row_id, group, pixels, rows) == []
    assert find_leaks(splits, row_id, group, pixels, rows, split == TRAIN) == []
    refuse_leaks([], allow=False)


def test_each_kind_of_leak_is_found_and_all_are_listed_at_once():
    row_id, target, group, split, pixels, rows = planted()
    group[19] = group[0]
    pixels[12] = pixels[3]
    pretrained = split == TRAIN
    pretrained[15] = True
    splits = manifest_splits(row_id, target, group, split)
    leaks = find_leaks(splits, row_id, group, pixels, rows, pretrained)
    assert len(leaks) == 3
    assert any("patient" in text and "rows 1, 20" in text for text in leaks)
    assert any("same pixels" in text and "rows 4, 13" in text for text in leaks)
    assert any("row 16" in text and "pretrained" in text for text in leaks)
    with pytest.raises(UserError, match=r"--data\.allow_leak") as caught:
        refuse_leaks(leaks, allow=False)
    assert all(text in str(caught.value) for text in leaks)
    refuse_leaks(leaks, allow=True)


def test_many_leaks_are_counted():
    with pytest.raises(UserError, match="and 5 more"):
        refuse_leaks([f"leak {i}" for i in range(25)], allow=False)


def test_made_folds_never_leak_a_patient():
    row_id, target, group = simple()
    splits = make_splits(row_id, target, group)
    assert find_leaks(splits, row_id, group, np.arange(40, dtype=np.uint64), np.arange(40)) == []
    # A duplicate across patients is seen, whatever fold it fell into.
    pixels = np.arange(40, dtype=np.uint64)
    pixels[39] = pixels[0]
    assert find_leaks(splits, row_id, group, pixels, np.arange(40))


def test_splits_are_values():
    row_id, target, group = simple()
    splits = make_splits(row_id, target, group)
    with pytest.raises(dataclasses.FrozenInstanceError):
        splits.seed = 3

"""Rows, pixels and labels joined: which patients are held out."""

import numpy as np
import polars as pl
import pytest

from kladi.data import load
from kladi.data.dataset import HELD_OUT, TRAIN


def splits(group, target, share=0.3, seed=0):
    row_id = np.arange(len(group), dtype=np.uint64) * 7919 + 1
    nothing = pl.Series("split", [None] * len(group), dtype=pl.String)
    return load._splits(nothing, np.asarray(group), np.asarray(target), row_id, share, seed)


@pytest.mark.parametrize("seed", range(5))
def test_every_label_keeps_its_share_on_both_sides(seed):
    group = np.repeat(np.arange(130), 2)
    target = np.where(group < 100, 0, np.where(group < 120, 1, 2))  # 100, 20 and 10 patients of two images
    found = splits(group, target, seed=seed)
    for label, held in ((0, 30), (1, 6), (2, 3)):
        assert len(np.unique(group[(target == label) & (found == HELD_OUT)])) == held
    assert not set(group[found == HELD_OUT]) & set(group[found == TRAIN])


def test_a_patient_of_two_labels_is_on_one_side_and_the_draw_depends_on_the_seed():
    group, target = np.repeat(np.arange(40), 2), np.tile([0, 1], 40)
    found = splits(group, target)
    assert not set(group[found == HELD_OUT]) & set(group[found == TRAIN])
    assert (found != splits(group, target, seed=1)).any()


def test_nobody_is_held_out_where_nobody_should_be():
    assert (splits(np.arange(20), np.full(20, -1), share=0.0) == TRAIN).all()

"""Rows, pixels and labels joined: which patients are held out."""

import numpy as np
import polars as pl
import pytest
from PIL import Image

from kladi import config as settings
from kladi.data import load
from kladi.data.dataset import HELD_OUT, TRAIN
from kladi.errors import UserError
from kladi.learn import run_folder


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


def test_a_root_is_taken_from_the_tree_and_kept_out_of_the_run(tmp_path):
    folder = tmp_path / "scans"
    for number, label in enumerate(["a", "b"] * 4):
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 20 * number + 10).save(folder / label / f"{number}.png")
    (tmp_path / "tree.csv").write_text("child,parent\nall,\na,all\nb,all\n")
    config = settings.override(
        settings.Config(),
        {"data.taxonomy": str(tmp_path / "tree.csv"), "data.root": "all", "data.store": str(tmp_path / "store")},
    )
    dataset, inspection = load.load(folder, config)
    assert dataset.taxonomy.names == ("a", "b")
    assert not any("one top node" in f.message for f in inspection.findings)
    assert run_folder.portable(config).data.root == ""
    with pytest.raises(UserError, match="needs a label tree"):
        load.load(folder, settings.override(settings.Config(), {"data.root": "all"}))

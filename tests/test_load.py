"""Rows, pixels and labels joined: which patients are held out."""

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from kladi import config as settings
from kladi.data import load, summary
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


def metadata_of(tmp_path, **changes):
    """Four pictures with an anatomy each, and the settings to read them."""
    cells = ["lung", "heart", "chest", "flipper"] * 3
    for number in range(len(cells)):
        Image.new("L", (16, 16), 20 * number + 10).save(tmp_path / f"{number}.png")
    rows = [f"{number}.png,{cell}" for number, cell in enumerate(cells)]
    (tmp_path / "m.csv").write_text("path,anatomy\n" + "\n".join(rows) + "\n")
    (tmp_path / "parts.csv").write_text("child,parent\nchest,\nlung,chest\nheart,chest\n")
    values = {"data.metadata": "anatomy", "data.store": str(tmp_path / "store"), "data.held_out": "0"}
    return settings.override(settings.Config(), {**values, **changes})


def test_a_tree_of_the_values_makes_kin_similar_and_travels_with_the_run(tmp_path):
    config = metadata_of(tmp_path, **{"data.metadata_trees.anatomy": str(tmp_path / "parts.csv")})
    dataset, _ = load.load(tmp_path / "m.csv", config)
    ids, table, _ = dataset.label_sets.similarity()
    lung, heart, chest, flipper = ids[:4]
    assert table[lung, chest] == 0.5
    assert table[lung, heart] == pytest.approx(1 / 3)
    assert table[lung, flipper] == 0
    run = tmp_path / "run"
    run.mkdir()
    run_folder.begin(run, config, dataset, {}, torch.device("cpu"))
    assert str(tmp_path) not in (run / "config.toml").read_text()
    again = settings.override(run_folder.read_config(run), {"data.store": str(tmp_path / "store")})
    (tmp_path / "parts.csv").unlink()
    assert load.load(tmp_path / "m.csv", again)[0].label_sets == dataset.label_sets


def test_unmapped_values(tmp_path):
    known = load.load(tmp_path / "m.csv", metadata_of(tmp_path, **{"data.unmapped": "unknown"}))[0].label_sets.known
    assert known[:4, 0].tolist() == [True, True, True, False]
    with pytest.raises(UserError, match='column "anatomy", row 4: a value is no known value'):
        load.load(tmp_path / "m.csv", metadata_of(tmp_path, **{"data.unmapped": "error"}))


@pytest.mark.parametrize(
    ("key", "file", "said"),
    [
        ("data.metadata_trees.anatom", "parts.csv", 'no column; closest: "anatomy"'),
        ("data.metadata_trees.anatomy", "nowhere.csv", "nowhere.csv"),
    ],
)
def test_trees_that_cannot_be_used(tmp_path, key, file, said):
    config = metadata_of(tmp_path, **{key: str(tmp_path / file)})
    with pytest.raises(UserError, match=said) as error:
        load.load(tmp_path / "m.csv", config)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match="name its columns with --data"):
        load.load(tmp_path / "m.csv", settings.override(config, {"data.metadata": ""}))


def test_check_says_what_the_metadata_know_and_whom_they_draw_together(tmp_path):
    config = metadata_of(tmp_path)
    dataset, _ = load.load(tmp_path / "m.csv", config)
    said = list(summary.metadata_lines(dataset, config.train.batch))
    assert said[0] == ("metadata", "anatomy: 100% known; chest 3, heart 3, lung 3, 1 more; 3 rows no synonym fits")
    # 12 rows in 4 kinds: an anchor meets the 2 others of its kind in both views, and its own other view.
    assert said[1][1].startswith("threshold 1: an anchor has 5 positives (22%) in a batch of 12")

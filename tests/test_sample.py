"""A few images of each label: which, and that nothing else has a say in it."""

from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from kladi import config as settings
from kladi.data import load
from kladi.data.rows import manifest, sample


def rows(sizes, split=None):
    """A manifest of folders of so many files each."""
    path = [f"{label}/{number}.png" for label, size in sizes.items() for number in range(size)]
    label = [name or None for name, size in sizes.items() for _ in range(size)]
    table = pl.DataFrame(
        {"row": range(1, len(path) + 1), "path": path, "frame": -1, "label": label, "patient": None, "split": split},
        schema_overrides={"row": pl.Int64, "split": pl.String, "patient": pl.String},
    )
    return manifest.Manifest(Path(), table)


def drawn(sizes, most=10, seed=0, **options):
    return set(sample.at_most(rows(sizes, **options), most, seed).table["path"])


def of(paths, label):
    return {path for path in paths if path.startswith(f"{label}/")}


def test_each_label_keeps_so_many_and_a_small_one_all():
    found = drawn({"a": 40, "b": 10, "c": 3})
    assert [len(of(found, label)) for label in "abc"] == [10, 10, 3]


def test_the_seed_decides_and_other_labels_do_not():
    found = drawn({"a": 40, "b": 30})
    assert found == drawn({"a": 40, "b": 30})
    assert of(found, "a") == of(drawn({"new": 9, "a": 40, "other": 50}), "a")
    assert of(found, "a") != of(drawn({"a": 40, "b": 30}, seed=1), "a")
    assert {p[1:] for p in of(found, "a")} != {p[1:] for p in of(drawn({"b": 40}), "b")}  # each label its own lot


def test_every_file_has_its_chance():
    times = {f"a/{number}.png": 0 for number in range(20)}
    for seed in range(200):
        for path in drawn({"a": 20}, most=5, seed=seed):
            times[path] += 1
    assert min(times.values()) > 25  # 50 expected, standard deviation 6.1
    assert max(times.values()) < 75


def test_the_order_of_the_rows_has_no_say():
    whole = rows({"a": 40})
    turned = manifest.Manifest(Path(), whole.table.reverse())
    assert set(sample.at_most(turned, 5, 0).table["path"]) == set(sample.at_most(whole, 5, 0).table["path"])


def test_rows_of_a_test_and_rows_without_a_label_stay():
    assert len(drawn({"a": 20}, most=5, split="test")) == 20
    assert len(drawn({"": 20}, most=5)) == 20


def test_frames_of_a_file_stay_together():
    whole = rows({"a": 20})
    double = manifest.Manifest(Path(), pl.concat([whole.table, whole.table.with_columns(frame=pl.lit(1))]))
    kept = sample.at_most(double, 5, 0).table
    assert kept.height == 10
    assert kept["row"].n_unique() == 5


@pytest.mark.parametrize("most", [0, 20])
def test_nothing_is_said_where_nothing_is_left_out(most):
    assert sample.at_most(rows({"a": 20}), most, 0).findings == ()


def test_a_folder_is_sampled_before_anything_is_decoded_and_says_so(tmp_path):
    for number in range(30):
        (tmp_path / "set" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 8 * number).save(tmp_path / "set" / "ab"[number % 2] / f"{number}.png")
    config = settings.override(
        settings.Config(), {"data.most_per_label": "4", "data.store": str(tmp_path / "store"), "data.held_out": "0"}
    )
    dataset, inspection = load.load(tmp_path / "set", config)
    assert len(dataset.store) == 8
    (said,) = (f.message for f in inspection.findings if f.code == "M20")
    assert said == "22 images beyond 4 of their label, drawn by lot with seed 0; --data.most_per_label 0 keeps all"

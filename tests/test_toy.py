"""The generated images: deterministic, labelled as drawn, learnable, and the same on disk as in memory."""

import csv

import numpy as np
import pytest
from PIL import Image

from kladi import toy
from kladi.data.dataset import HELD_OUT, TRAIN
from kladi.structure.taxonomy import Taxonomy


def test_the_same_arguments_give_the_same_bits():
    one, two, other = toy.pictures(20, 16, 3), toy.pictures(20, 16, 3), toy.pictures(20, 16, 4)
    assert np.array_equal(one.pixels, two.pixels)
    assert (one.label, one.patient, one.anatomy) == (two.label, two.patient, two.anatomy)
    assert not np.array_equal(one.pixels, other.pixels)


def test_a_data_set_is_joined_and_split_by_patient():
    data = toy.dataset(n=50, size=16)
    assert len(data) == len(data.store) == 50
    assert data.store.images.shape == (50, 1, 19, 19)  # 16 * 8/7, rounded up
    assert set(np.unique(data.split)) == {TRAIN, HELD_OUT}
    assert not set(data.group[data.split == TRAIN]) & set(data.group[data.split == HELD_OUT])
    assert len(np.unique(data.row_id)) == 50
    assert np.array_equal(data.store.gather(np.array([3, 1])), data.store.images[[3, 1]])
    names = [data.taxonomy.names[node] for node in data.target]
    assert names == list(toy.pictures(50, 16).label)


def test_labels_may_be_missing():
    data = toy.dataset(n=40, size=16, labelled=0.5)
    assert (data.target >= 0).sum() == 20
    assert (toy.dataset(n=8, size=16, labelled=0.0).target == -1).all()


def test_three_channels():
    assert toy.dataset(n=4, size=16, channels=3).store.images.shape == (4, 3, 19, 19)


def test_the_tree_has_three_levels():
    tree = toy.taxonomy()
    assert len(tree.names) == 2 + 4 + 8
    assert {tree.names[leaf] for leaf in tree.leaves} == set(toy.LEAVES)
    assert tree == Taxonomy.from_paths(toy.LEAVES)


def test_anatomy_is_sometimes_unknown_and_modality_never():
    sets = toy.dataset(n=60, size=16).label_sets
    known = dict(zip(sets.attributes, sets.known.mean(axis=0), strict=True))
    assert known["modality"] == 1
    assert 0.6 < known["anatomy"] < 0.95


def test_files_say_what_memory_says(tmp_path):
    manifest = toy.write(tmp_path / "toy", n=12, size=16, seed=2, labelled=0.8)
    shown = toy.pictures(12, 16, 2, 0.8)
    with manifest.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == list(shown.label)
    assert [row["patient_id"] for row in rows] == list(shown.patient)
    assert [row["anatomy"] for row in rows] == list(shown.anatomy)
    for row, picture in zip(rows, shown.pixels, strict=True):
        assert np.array_equal(np.asarray(Image.open(manifest.parent / row["path"])), picture)
    assert Taxonomy.read(manifest.parent / "tree.csv") == toy.taxonomy()


@pytest.mark.parametrize(
    ("names", "level"),
    [(["plain", "striped"], 2), (["round/disc", "round/ring", "angular/box", "angular/cross"], None)],
)
def test_the_label_is_in_the_picture(names, level):
    """Even the plainest reading of the pixels, folded and smoothed, tells the textures and the shapes above chance."""
    shown = toy.pictures(600, 16, 0)
    x = shown.pixels.astype(float) / 255
    x = np.where((np.array(shown.modality) == "xr")[:, None, None], 1 - x, x)
    rows = np.abs(np.fft.rfft2(x)).reshape(len(x), -1)  # blind to where the shape lies
    y = np.array([names.index(la.split("/")[level] if level else la.rsplit("/", 1)[0]) for la in shown.label])
    train = np.arange(600) < 450
    mean = rows[train].mean(axis=0)
    a = np.c_[np.log1p(rows) - np.log1p(mean), np.ones(len(rows))]
    weight = np.linalg.solve(a[train].T @ a[train] + np.eye(a.shape[1]), a[train].T @ np.eye(len(names))[y[train]])
    accuracy = ((a @ weight).argmax(1) == y)[~train].mean()
    assert accuracy > 1.4 / len(names)

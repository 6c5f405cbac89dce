"""The map: a fixed sample, colours that are known, thumbnails of nothing that carries a name."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kladi import toy
from kladi.data.dataset import TEST, TRAIN
from kladi.evaluate.embed import describe
from kladi.evaluate.record import atlas


@pytest.fixture(scope="module")
def data():
    made = toy.dataset(n=60, size=16)
    return dataclasses.replace(made, columns={**made.columns, "modality": ("mr", "ct", "xr") * 20})


@pytest.fixture(scope="module")
def embeddings(data):
    place = np.random.default_rng(0).normal(size=(len(data.taxonomy.names), 8))
    noise = np.random.default_rng(1).normal(size=(60, 8))
    return describe(data, (place[data.target] * 3 + noise).astype(np.float32))


def test_the_map_as_a_file(data, embeddings, tmp_path):
    drawn = atlas.write(embeddings, data, tmp_path, kind="pca")
    for name in ("map.json", "thumbnails.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    content = json.loads((tmp_path / "map.json").read_text())
    assert set(content) == {"kind", "points", "columns", "purity", "thumbnail"}
    assert content["kind"] == "pca"
    assert np.array(content["points"]).shape == (60, 2)
    assert list(content["columns"]) == sorted(content["columns"])
    expected = {"label, level 1", "label, level 2", "label, level 3", "modality", "anatomy", "split"}
    assert set(content["columns"]) == expected
    assert set(content["purity"]) == expected - {"split"}
    assert content["purity"]["label, level 3"]["n"] == (data.split != TRAIN).sum()
    for values in content["columns"].values():
        assert len(values) == 60
    for place, row in enumerate(drawn.rows):
        label = data.taxonomy.names[data.target[row]]
        assert content["columns"]["label, level 3"][place] == label
        assert content["columns"]["label, level 1"][place] == label.split("/")[0]
        assert content["columns"]["modality"][place] == data.columns["modality"][row]
    assert content["purity"]["label, level 3"]["k"] == 10
    assert content["purity"]["label, level 1"]["value"] >= content["purity"]["label, level 3"]["value"]
    thumbnails = json.loads((tmp_path / "thumbnails.json").read_text())
    assert content["thumbnail"] == list(range(60))
    assert len(thumbnails) == 60


def test_the_sample_is_fixed_and_blind_to_the_order_of_rows(embeddings):
    first = atlas.draw(embeddings, most=20, kind="pca")
    assert len(first.rows) == 20
    np.testing.assert_array_equal(first.rows, atlas.draw(embeddings, most=20, kind="pca").rows)
    order = np.random.default_rng(0).permutation(60)
    moved = dataclasses.replace(
        embeddings,
        features=embeddings.features[order],
        row_id=embeddings.row_id[order],
        target=embeddings.target[order],
        split=embeddings.split[order],
        columns={k: tuple(v[i] for i in order) for k, v in embeddings.columns.items()},
    )
    again = atlas.draw(moved, most=20, kind="pca")
    assert set(moved.row_id[again.rows]) == set(embeddings.row_id[first.rows])
    np.testing.assert_allclose(again.points, first.points, atol=1e-6)
    other = atlas.draw(embeddings, seed=1, most=20, kind="pca")
    assert set(other.rows) != set(first.rows)


def test_purity_is_of_the_full_space(embeddings):
    """Two classes that differ along the last axis only, which two components cannot show."""
    wide = np.zeros((60, 8), dtype=np.float32)
    rng = np.random.default_rng(0)
    wide[:, :2] = rng.normal(size=(60, 2)) * 0.1 + 1
    wide[:, 7] = np.where(np.arange(60) < 30, 0.5, -0.5)
    half = dataclasses.replace(
        embeddings, features=wide, columns={"site": ("a",) * 30 + ("b",) * 30}, taxonomy=None, target=np.full(60, -1)
    )
    half.split[:] = TEST
    found = atlas.draw(half, kind="pca").purity["site"]
    assert found == atlas.Purity(1.0, 29 / 59, 60)


def test_purity_is_of_images_that_were_not_trained_on(embeddings):
    """Training rows in two tight clouds that follow their site, the others anywhere."""
    rng, site = np.random.default_rng(1), np.arange(60) % 2
    trained = np.arange(60) < 30
    features = np.where(trained[:, None], np.eye(8)[site] * 9, rng.normal(size=(60, 8))).astype(np.float32)
    marked = dataclasses.replace(
        embeddings,
        features=features,
        split=np.where(trained, TRAIN, TEST),
        columns={"site": tuple("ab"[s] for s in site)},
    )
    found = atlas.draw(marked, kind="pca").purity["site"]
    assert found.n == 30
    assert found.value == pytest.approx(found.chance, abs=0.12)
    everything = dataclasses.replace(marked, split=np.full(60, TEST))
    assert atlas.draw(everything, kind="pca").purity["site"].value > 0.7
    nobody = dataclasses.replace(marked, split=np.full(60, TRAIN))
    assert math.isnan(atlas.draw(nobody, kind="pca").purity["site"].value)


def test_pca_keeps_the_greatest_spread_and_repeats(embeddings):
    drawn = atlas.draw(embeddings, kind="pca")
    vectors = embeddings.features[drawn.rows].astype(float)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
    np.testing.assert_allclose(np.var(drawn.points, axis=0, ddof=1), values[:2], rtol=1e-9)


def test_few_rows_get_pca(embeddings):
    assert atlas.draw(embeddings).kind == "pca"


def test_one_row_and_no_row(embeddings):
    for n in (0, 1, 2):
        arrays = ("features", "row_id", "pixel_digest", "manifest_row", "target", "group", "split")
        few = dataclasses.replace(embeddings, columns={}, **{a: getattr(embeddings, a)[:n] for a in arrays})
        drawn = atlas.draw(few)
        assert drawn.points.shape == (n, 2)
        assert np.isfinite(drawn.points).all()


def test_columns_without_contrast_are_left_out_and_unknown_is_empty(embeddings):
    plain = dataclasses.replace(
        embeddings,
        columns={"site": ("a",) * 60, "view": ("", "ap") * 30},
        target=np.where(np.arange(60) < 50, embeddings.target, -1),
    )
    columns = atlas.draw(plain, kind="pca").columns
    assert "site" not in columns
    assert set(columns["view"]) == {"", "ap"}
    assert columns["label, level 1"].count("") == 10
    named = dataclasses.replace(plain, split=np.full(60, TEST))
    assert set(atlas.draw(named, kind="pca").columns["split"]) == {"test"}


# --- thumbnails ----------------------------------------------------------------------------------------------------


class SixteenBits(toy.ArrayStore):
    def gather(self, index):
        return self.images[index]


def decoded(uri):
    assert uri.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_thumbnails_are_small_grey_and_without_margin(data):
    store = dataclasses.replace(data.store, extent=np.tile(np.array([[2, 0, 10, 19]], dtype=np.int32), (60, 1)))
    shown = [decoded(uri) for uri in atlas.thumbnails(store, np.arange(3))]
    assert [image.size for image in shown] == [(19, 10)] * 3
    assert {image.mode for image in shown} == {"L"}
    np.testing.assert_array_equal(np.asarray(shown[1]), data.store.images[1, 0, 2:12])


def test_large_and_sixteen_bit_images_are_brought_down(data):
    side = 120
    ramp = np.linspace(0, 65535, side * side).astype(np.uint16).reshape(1, 1, side, side)
    fields = {field.name: getattr(data.store, field.name) for field in dataclasses.fields(data.store)}
    fields |= {"images": np.repeat(ramp, 60, axis=0), "extent": np.full((60, 4), (0, 0, side, side), dtype=np.int32)}
    store = SixteenBits(**fields)
    image = decoded(atlas.thumbnails(store, np.array([0]))[0])
    assert max(image.size) == 48
    assert image.mode == "L"
    assert np.asarray(image)[-1, -1] > 240
    assert np.asarray(image)[0, 0] < 15


def test_colour_stays_colour():
    made = toy.dataset(n=6, size=16, channels=3)
    assert decoded(atlas.thumbnails(made.store, np.array([2]))[0]).mode == "RGB"


@pytest.mark.parametrize(
    ("columns", "hidden"),
    [
        ({"modality": ("US", "mr", " us |mr") * 20}, {0, 2}),
        ({"modality": ("OT", "ct", "ultrasound") * 20}, {0, 2}),
        ({"burnt_in": ("yes", "no", "") * 20}, {0}),
        ({"BurnedInAnnotation": ("YES", "NO", "?") * 20}, {0, 2}),
        ({"modality": ("mr", "ct", "ct") * 20}, set()),
    ],
)
def test_what_may_carry_text_is_never_shown(embeddings, columns, hidden):
    marked = dataclasses.replace(embeddings, columns=columns)
    visible = atlas.shown(marked, np.arange(60))
    assert {i % 3 for i in np.flatnonzero(~visible)} == hidden
    assert visible.sum() == 60 - 20 * len(hidden)


def test_a_label_that_begins_with_ultrasound_hides_its_images(embeddings, data, tmp_path):
    from kladi.structure.taxonomy import Taxonomy

    tree = Taxonomy.from_paths(["US/breast/benign", "US/breast/malignant", "MR/brain"])
    target = tree.leaves[np.arange(60) % 3]
    mixed = dataclasses.replace(embeddings, taxonomy=tree, target=target, columns={})
    visible = atlas.shown(mixed, np.arange(60))
    np.testing.assert_array_equal(visible, [tree.names[t].startswith("MR") for t in target])
    drawn = atlas.write(mixed, data, tmp_path, kind="pca")
    content = json.loads((tmp_path / "map.json").read_text())
    thumbnails = json.loads((tmp_path / "thumbnails.json").read_text())
    assert len(thumbnails) == 20
    for place, row in zip(content["thumbnail"], drawn.rows, strict=True):
        assert (place is None) == (not visible[row])
        if place is not None:
            grey = np.asarray(decoded(thumbnails[place]))
            np.testing.assert_array_equal(grey, data.store.images[row, 0])
    # A folder of an earlier map must not keep what is now hidden.
    none = dataclasses.replace(mixed, columns={"modality": ("us",) * 60})
    atlas.write(none, data, tmp_path, kind="pca")
    assert not (tmp_path / "thumbnails.json").exists()
    assert set(json.loads((tmp_path / "map.json").read_text())["thumbnail"]) == {None}


@pytest.mark.slow
def test_umap_repeats_and_keeps_clusters_together():
    """In a process where umap's dependency compiles nothing: that takes a minute, and sixty rows do without."""
    if find_spec("umap") is None:
        pytest.skip("umap-learn is not installed")
    script, plain = Path(__file__).parent / "umap_twice.py", {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, env=plain)
    assert json.loads(done.stdout) == {"kind": "umap", "repeats": True, "together": True}

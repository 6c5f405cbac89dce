"""Embeddings: the right image through the right pipeline, once; written without pickle, for the owner's eyes."""

from __future__ import annotations

import stat

import numpy as np
import pytest
import torch
from torch import nn

from kladi import config, toy
from kladi.data.embeddings import Embeddings
from kladi.data.views import augment
from kladi.errors import UserError
from kladi.evaluate.baselines import BINS, fit_grey, grey_features
from kladi.evaluate.embed import embed

INTENSITY = config.Intensity(size=16)


class Means(nn.Module):
    """A network whose features are known: mean and spread of the image, and whether it is in training mode."""

    def __init__(self, intensity=INTENSITY):
        super().__init__()
        self.intensity = intensity
        self.batches = []

    def forward(self, image):
        self.batches.append(len(image))
        flat = image.flatten(1)
        return torch.stack([flat.mean(1), flat.std(1), torch.full((len(flat),), float(self.training))], dim=1)


@pytest.fixture(scope="module")
def data():
    return toy.dataset(n=20, size=16)


def test_every_image_once_in_order_in_evaluation_mode(data):
    encoder = Means().train()
    found = embed(encoder, data, batch=8, device="cpu")
    assert encoder.batches == [8, 8, 4]
    assert encoder.training  # as it was before
    expected = augment.plain(data.store.gather(np.arange(20)), data.store.extent, INTENSITY)
    np.testing.assert_allclose(found.features[:, 0], expected.flatten(1).mean(1), rtol=1e-5)
    assert (found.features[:, 2] == 0).all()
    assert found.features.dtype == np.float32
    assert found.z is None
    np.testing.assert_array_equal(found.row_id, data.row_id)
    np.testing.assert_array_equal(found.target, data.target)
    assert found.taxonomy == data.taxonomy


def test_the_batch_size_does_not_matter(data):
    a, b = (embed(Means(), data, batch=size, device="cpu").features for size in (3, 20))
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_head_makes_z_from_the_features(data):
    head = nn.Linear(3, 2)
    found = embed(Means(), data, head=head, device="cpu")
    expected = head(torch.from_numpy(found.features)).detach().numpy()
    np.testing.assert_allclose(found.z, expected, rtol=1e-5)


def test_the_pipeline_is_the_encoders_own_and_must_be_known(data):
    encoder = Means(intensity=None)
    with pytest.raises(UserError, match="intensity"):
        embed(encoder, data, device="cpu")
    given = embed(encoder, data, intensity=INTENSITY, device="cpu").features
    np.testing.assert_array_equal(given, embed(Means(), data, device="cpu").features)


def test_a_network_that_gives_nan_is_named_with_the_rows(data):
    class Broken(Means):
        def forward(self, image):
            out = super().forward(image)
            out[3] = float("nan")
            return out

    with pytest.raises(UserError, match=r"1 images \(rows 4\)"):
        embed(Broken(), data, device="cpu")


def test_progress_reaches_the_end(data):
    heard = []
    embed(Means(), data, batch=8, device="cpu", progress=lambda done, of: heard.append((done, of)))
    assert heard == [(8, 20), (16, 20), (20, 20)]


def test_written_and_read_without_loss(data, tmp_path):
    found = embed(Means(), data, head=nn.Linear(3, 2), device="cpu")
    path = tmp_path / "embeddings.npz"
    found.write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = Embeddings.read(path)
    for name in ("features", "z", "row_id", "pixel_digest", "manifest_row", "target", "group", "split"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
        assert getattr(again, name).dtype == getattr(found, name).dtype
    assert again.columns == found.columns
    assert again.taxonomy == found.taxonomy
    assert again.has_patients is True
    before = path.read_bytes()
    found.write(path)
    assert path.read_bytes() == before  # no clock in the file


def test_without_labels_head_and_columns(data, tmp_path):
    bare = Embeddings(
        features=np.zeros((2, 3), dtype=np.float32),
        z=None,
        row_id=np.array([1, 2], dtype=np.uint64),
        pixel_digest=np.array([1, 2], dtype=np.uint64),
        manifest_row=np.array([1, 2]),
        target=np.array([-1, -1]),
        group=np.array([0, 1]),
        split=np.array([0, 0]),
    )
    bare.write(tmp_path / "e.npz")
    again = Embeddings.read(tmp_path / "e.npz")
    assert again.z is None
    assert again.taxonomy is None
    assert again.columns == {}


def test_hostile_text_in_columns_survives_as_text(data, tmp_path):
    import dataclasses

    found = embed(Means(), data, device="cpu")
    evil = tuple(["<script>", "=1+1", "", "a/../b", "\u202eabc"] * 4)
    dataclasses.replace(found, columns={"../x": evil, "features": evil}).write(tmp_path / "e.npz")
    again = Embeddings.read(tmp_path / "e.npz")
    assert again.columns == {"../x": evil, "features": evil}
    assert [p.name for p in tmp_path.iterdir()] == ["e.npz"]


def test_python_objects_are_never_loaded(tmp_path):
    ran = tmp_path / "ran"

    class Canary:
        def __reduce__(self):
            return (ran.write_text, ("x",))

    np.savez(tmp_path / "e.npz", about=np.array([Canary()], dtype=object))
    with pytest.raises(UserError, match="damaged"):
        Embeddings.read(tmp_path / "e.npz")
    assert not ran.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b"<html>"])
def test_damaged_files_are_one_line(tmp_path, content):
    (tmp_path / "e.npz").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        Embeddings.read(tmp_path / "e.npz")
    with pytest.raises(UserError, match="kladi embed"):
        Embeddings.read(tmp_path / "none.npz")


def test_no_image_at_all():
    empty = toy.dataset(n=8, size=16)
    import dataclasses

    nothing = np.zeros(0, dtype=np.int64)
    store = dataclasses.replace(
        empty.store,
        images=empty.store.images[:0],
        extent=empty.store.extent[:0],
        row_id=empty.row_id[:0],
        pixel_digest=empty.row_id[:0],
        source=nothing,
    )
    none = dataclasses.replace(
        empty,
        store=store,
        row_id=empty.row_id[:0],
        manifest_row=nothing,
        group=nothing,
        split=nothing,
        target=nothing,
        columns={},
    )
    assert len(embed(Means(), none, device="cpu")) == 0


# --- grey levels ---------------------------------------------------------------------------------------------------


def test_the_histogram_is_of_the_image_and_not_of_the_zeros_around_it(data):
    import dataclasses

    images = np.full((2, 1, 19, 19), 0, dtype=np.uint8)
    images[0, 0, 4:14] = 255
    images[1, 0, :, :] = 100
    extent = np.array([[4, 0, 10, 19], [0, 0, 19, 19]], dtype=np.int32)
    store = dataclasses.replace(
        data.store,
        images=images,
        extent=extent,
        row_id=data.row_id[:2],
        pixel_digest=data.row_id[:2],
        source=np.arange(2),
    )
    two = dataclasses.replace(
        data,
        store=store,
        row_id=data.row_id[:2],
        manifest_row=np.arange(2),
        group=np.arange(2),
        split=np.zeros(2, dtype=np.int64),
        target=np.zeros(2, dtype=np.int64),
        columns={},
    )
    found = grey_features(two, INTENSITY)
    assert found.shape == (2, BINS + 1024)
    assert found[0, BINS - 1] == 1
    assert found[1, int(100 / 255 * BINS)] == 1
    np.testing.assert_allclose((found[:, :BINS] ** 2).sum(1), 1, rtol=1e-6)
    assert found[:, BINS:].min() >= 0
    assert found[:, BINS:].max() <= 1


def test_colour_becomes_grey():
    grey = grey_features(toy.dataset(n=6, size=16, channels=1), INTENSITY)
    colour = grey_features(toy.dataset(n=6, size=16, channels=3), config.Intensity(size=16, channels=3))
    # Equal channels are the same grey, but for a value on the edge of a bin.
    np.testing.assert_allclose(grey[:, BINS:], colour[:, BINS:], atol=1e-5)
    assert np.abs(grey[:, :BINS] - colour[:, :BINS]).mean() < 0.01


def test_components_are_fitted_on_training_rows_alone(data):
    found = grey_features(data, INTENSITY)
    train = np.arange(20) < 12
    canary = found.copy()
    canary[~train] = 1e6
    a, b = fit_grey(found, train), fit_grey(canary, train)
    np.testing.assert_array_equal(a[train], b[train])
    assert a.shape == (20, 2 * BINS)
    assert (a[:, BINS + 11 :] == 0).all()  # twelve rows span eleven directions
    scores = a[train, BINS : BINS + 11]
    assert np.linalg.norm(scores, axis=1).mean() == pytest.approx(1, rel=1e-5)
    # Principal components: uncorrelated, in falling order, and all of the distances of the training rows.
    covariance = scores.T @ scores
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-5
    assert (np.diff(np.diag(covariance)) <= 1e-6).all()
    pixels = found[train, BINS:]
    from scipy.spatial.distance import pdist

    ratio = pdist(scores) / pdist(pixels)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_constant_images_have_no_component(data):
    flat = np.tile(grey_features(data, INTENSITY)[:1], (6, 1))
    assert (fit_grey(flat, np.ones(6, dtype=bool))[:, BINS:] == 0).all()

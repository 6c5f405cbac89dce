"""Where a diagram looks: the thing in front of its ground, cut out, and the range of its own grey levels."""

import nibabel
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kladi import config as settings
from kladi import toy
from kladi.data import summary
from kladi.data.load import load
from kladi.data.pixels import masks as masks_of_files
from kladi.data.pixels.frame import Unreadable
from kladi.data.pixels.masks import Mask, MaskFile
from kladi.data.views import kept_strengths, whole
from kladi.data.views.calibration import Strengths
from kladi.data.views.partners import partners
from kladi.data.views.region import Looks, Region, foregrounds, otsu
from kladi.errors import UserError
from kladi.evaluate.embed import embed
from kladi.learn import run_folder
from kladi.models import backbones, fused
from kladi.structure.topology import BANDS, diagram


def disc(size=48, centre=(20, 26), radius=12, inside=0.8, ground=0.2):
    row, column = np.mgrid[:size, :size]
    image = np.full((size, size), ground)
    image[np.hypot(row - centre[0], column - centre[1]) <= radius] = inside
    return image


def tensor(*images):
    return torch.from_numpy(np.stack(images)[:, None])


def test_otsu_parts_two_levels_between_them():
    assert 0.2 <= otsu(disc()) < 0.8
    rng = np.random.default_rng(0)
    noisy = disc() + rng.normal(0, 0.05, (48, 48))
    t = otsu(noisy)
    assert 0.35 < t < 0.65
    assert otsu(np.full((4, 4), 0.3)) == 0.3


def test_otsu_is_the_best_of_all_thresholds():
    grey = np.random.default_rng(1).integers(0, 20, (12, 12)) / 19

    def between(t):
        a, b = grey[grey <= t], grey[grey > t]
        return len(a) * len(b) * (a.mean() - b.mean()) ** 2 if len(a) and len(b) else 0.0

    best = max(between(t) for t in np.unique(grey))
    assert between(otsu(grey)) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize(("inside", "ground"), [(0.8, 0.2), (0.1, 0.7)], ids=["bright", "dark"])
def test_the_front_is_what_reaches_the_border_less(inside, ground):
    image = disc(inside=inside, ground=ground)
    (front,) = foregrounds(tensor(image))
    np.testing.assert_array_equal(front, image == inside)


def test_the_largest_piece_is_taken_and_its_holes_are_filled():
    image = disc()
    ring = disc(centre=(20, 26), radius=6, inside=0.2, ground=0)
    image[ring == 0.2] = 0.2
    image[2:5, 2:5] = 0.8
    (front,) = foregrounds(tensor(image))
    np.testing.assert_array_equal(front, disc() == 0.8)


def test_next_to_nothing_and_next_to_everything_are_no_region():
    mask = np.zeros((40, 40), dtype=bool)
    assert Region.of(mask) is None
    mask[3, 4] = True
    assert Region.of(mask) is None
    assert Region.of(np.ones((40, 40), dtype=bool)) is None
    mask[:20] = True
    assert Region.of(mask).box == (0, 20, 0, 40)


def test_a_region_is_normalised_by_its_own_range_and_dark_outside():
    image = disc(ground=1.0, inside=0.4)  # bright outside: no part of it
    image[18:22, 24:28] = 0.6
    looks = Looks.of(tensor(image), 32, [image < 0.9])
    assert looks.low[0] == pytest.approx(0.4)
    v = looks.v(tensor(image))[0]
    assert v.shape == (32, 32)
    assert v[0, 0] == 0
    assert v.max() == pytest.approx(1)
    brighter = looks.v(tensor(image + 0.05))[0]
    assert brighter[16, 16] == 1  # clipped in the range of the unchanged image
    assert brighter[8, 16] == pytest.approx(0.25)


def test_what_is_outside_changes_no_diagram():
    image = disc(inside=0.5)
    image[18:22, 24:28] = 0.9
    other = image.copy()
    other[image == 0.2] = np.random.default_rng(0).random((image == 0.2).sum())
    masks = [image > 0.3]
    one, two = (Looks.of(tensor(x), 24, masks) for x in (image, other))
    a, b = one.v(tensor(image))[0], two.v(tensor(other))[0]
    assert a[0, 0] == 0
    np.testing.assert_array_equal(a, b)


def test_a_thin_line_is_a_region_too():
    mask = np.zeros((224, 224), dtype=bool)
    mask[50:150, 50:150] = True
    mask[53:147, 53:147] = False
    image = np.random.default_rng(0).random((224, 224))
    for side in (8, 16, 32, 56):
        v = Looks.of(tensor(image), side, [mask]).v(tensor(image))[0]
        assert np.isfinite(v).all()


def test_without_masks_it_is_everywhere():
    image = disc(size=24)
    looks = Looks.of(tensor(image, image), 24)
    np.testing.assert_allclose(looks.v(tensor(image, image))[1], (image - 0.2) / 0.6, atol=1e-12)
    mixed = Looks.of(tensor(image, image), 24, [np.zeros((24, 24), dtype=bool), image > 0.5])
    np.testing.assert_array_equal(mixed.v(tensor(image, image))[0], looks.v(tensor(image, image))[0])
    assert mixed.regions[0] is None
    assert diagram(mixed.v(tensor(image, image))[1]).span >= 0


# --- masks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def masked(tmp_path):
    """A ward of which the first eight images have a mask: their middle."""
    manifest = toy.write(tmp_path / "toy", n=24, size=16)
    (tmp_path / "toy" / "masks").mkdir()
    middle = np.zeros((16, 16), dtype=np.uint8)
    middle[4:12, 4:12] = 1
    table = pl.read_csv(manifest)
    names = [f"masks/{i}.png" if i < 8 else None for i in range(len(table))]
    for name in names[:8]:
        Image.fromarray(middle).save(manifest.parent / name)
    table.with_columns(mask=pl.Series(names)).write_csv(manifest)
    return manifest


def masked_config(manifest, **changes):
    values = {"data.store": str(manifest.parent / "store"), "intensity.size": 16, "topology.region": "mask", **changes}
    return settings.override(settings.Config(), values)


def test_masks_are_laid_over_their_images(masked):
    config = masked_config(masked)
    data, inspection = load(masked, config)
    (warned,) = [f for f in inspection.findings if "none is named" in f.message]
    assert len(warned.rows) == 16
    rows = np.arange(len(data))
    found = whole.masks(data, rows, whole.pictures(data, rows, config.intensity), "mask")
    for row, mask in zip(rows, found, strict=True):
        assert mask.shape == (16, 16)
        assert (data.masks[row] is None) == (not mask.any())
        if mask.any():
            assert mask[5:11, 5:11].all()
            assert not mask[:3].any()
    assert whole.masks(data, rows, whole.pictures(data, rows, config.intensity), "whole") == []
    said = dict(summary.lines(inspection, config, 1.0))
    assert said["masks"] == "8 of 24 images"
    assert "mask" not in said.get("unused", "")
    unread, _ = load(masked, settings.override(config, {"topology.region": "whole"}))
    with pytest.raises(UserError, match="was read without its masks"):
        whole.masks(unread, rows, whole.pictures(data, rows, config.intensity), "mask")


def test_another_mask_is_other_data(masked):
    data, _ = load(masked, masked_config(masked))
    before, rows = run_folder.digest(data), np.arange(len(data))
    seen = whole.pictures(data, rows, masked_config(masked).intensity)
    found = whole.masks(data, rows, seen, "mask")
    moved = np.zeros((16, 16), dtype=np.uint8)
    moved[2:12, 4:12] = 1
    Image.fromarray(moved).save(masked.parent / "masks/3.png")
    (masked.parent / "masks/4.png").unlink()
    assert all(map(np.array_equal, whole.masks(data, rows, seen, "mask"), found))  # a run goes on with what it read
    Image.fromarray(moved).save(masked.parent / "masks/4.png")
    assert run_folder.digest(load(masked, masked_config(masked))[0]) != before


def test_masks_that_say_as_little_as_none_are_counted(masked):
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(masked.parent / "masks/2.png")
    Image.fromarray(np.full((16, 16), 255, dtype=np.uint8)).save(masked.parent / "masks/5.png")
    _, inspection = load(masked, masked_config(masked))
    (warned,) = [f for f in inspection.findings if "covers under 1% or over 95% of the image" in f.message]
    assert warned.rows == (3, 6)


@pytest.mark.parametrize("cell", ["../outside.png", "file:///OUTSIDE", "/OUTSIDE", "link.png", "a\0b.png"])
def test_m7_a_mask_that_is_refused_is_not_opened(masked, cell, monkeypatch):
    outside = masked.parent.parent / "outside.png"
    Image.fromarray(np.ones((16, 16), dtype=np.uint8)).save(outside)
    (masked.parent / "link.png").symlink_to(outside)
    opened = []
    monkeypatch.setattr(masks_of_files, "read_bytes", lambda path: opened.append(str(path)) or b"")
    table = pl.read_csv(masked)
    mask = [cell.replace("/OUTSIDE", str(outside)), *[None] * (len(table) - 1)]
    table.with_columns(mask=pl.Series(mask)).write_csv(masked)
    with pytest.raises(UserError, match=r"^\S* ?mask: .*: row 1$"):  # one fault, one line
        load(masked, masked_config(masked))
    assert opened == []


def test_m11_a_name_of_a_mask_shows_no_control_character(masked):
    name = "masks/\x1b[31mred.png"
    (masked.parent / name).write_bytes(b"no picture")
    table = pl.read_csv(masked)
    table.with_columns(mask=pl.Series([name, *[None] * (len(table) - 1)])).write_csv(masked)
    with pytest.raises(UserError) as caught:
        load(masked, masked_config(masked))
    assert "\x1b" not in str(caught.value)
    assert "31mred.png" in str(caught.value)


def test_regions_that_are_none_are_counted(masked, monkeypatch):
    every_other = pl.Series(["masks/0.png" if i % 2 else None for i in range(24)])
    pl.read_csv(masked).with_columns(mask=every_other).write_csv(masked)
    config = masked_config(masked, **{"topology.on": True})
    data, _ = load(masked, config)
    monkeypatch.setattr(kept_strengths, "calibrate", lambda *given: Strengths({band: {} for band in BANDS}, 0, {}))
    said = []
    with pytest.raises(UserError):  # no operation is usable
        kept_strengths.strengths_of(data, config, 16, lambda what, text: said.append(text))
    rows = kept_strengths._sample(data, config)
    without = sum(data.masks[row] is None for row in rows)
    assert 0 < without < len(rows)
    assert said[0].startswith(f"{without} of {len(rows)} sampled regions are under 1% or over 95% of the image")


def test_an_encoder_with_masks_reads_them_in_evaluation(masked):
    config = masked_config(masked, **{"topology.on": True, "encoder.name": "test_efficientnet"})
    data, _ = load(masked, config)
    encoder = fused.fused(backbones.build(config.encoder, config.intensity), config.topology).eval()
    rows = np.arange(len(data))
    image, points, mask = fused.reader(encoder, data, config.intensity, torch.device("cpu"))(rows)
    plain_points, _ = encoder.tokens(image)
    has = np.array([mask is not None for mask in data.masks])
    same = [torch.equal(a, b) for a, b in zip(points, plain_points, strict=True)]
    assert not any(np.array(same)[has])
    assert all(np.array(same)[~has])
    assert mask.any()
    np.testing.assert_allclose(embed(encoder, data).features, encoder(image, points, mask).detach().numpy(), atol=1e-5)


def test_masks_in_your_own_code_are_those_of_the_files(masked):
    config = masked_config(masked, **{"topology.on": True, "encoder.name": "test_efficientnet"})
    data, _ = load(masked, config)
    encoder = fused.fused(backbones.build(config.encoder, config.intensity), config.topology).eval()
    rows = np.flatnonzero([mask is not None for mask in data.masks])
    image, *wanted = fused.reader(encoder, data, config.intensity, torch.device("cpu"))(rows)
    names = pl.read_csv(masked)["mask"].to_list()
    files = [np.asarray(Image.open(masked.parent / names[number - 1])) for number in data.manifest_row[rows]]
    for masks in (files, [255 * (mask > 0).astype(np.uint8) for mask in files], [mask > 0 for mask in files]):
        assert all(torch.equal(a, b) for a, b in zip(encoder.tokens(image, masks), wanted, strict=True))
    shown = whole.masks(data, rows, image, "mask")  # of the square that preprocess gives
    assert all(torch.equal(a, b) for a, b in zip(encoder.tokens(image, shown), wanted, strict=True))
    with pytest.raises(ValueError, match=f"2 masks for {len(rows)} images"):
        encoder.tokens(image, files[:2])


def test_masks_that_cannot_be_are_named(masked):
    config = masked_config(masked)
    table = pl.read_csv(masked)
    first = masked.parent / table["mask"][0]
    Image.fromarray(np.ones((16, 9), dtype=np.uint8)).save(first)
    with pytest.raises(UserError, match=r"the mask 0.png is 9 x 16, its image has other proportions: row 1"):
        load(masked, config)
    first.write_text("no picture")
    with pytest.raises(UserError, match=r"the mask 0.png .*: row 1"):
        load(masked, config)
    first.unlink()
    with pytest.raises(UserError, match="mask: file missing: row 1"):
        load(masked, config)
    table.with_columns(mask=pl.lit("../toy/masks/1.png")).write_csv(masked)
    with pytest.raises(UserError, match="mask: the path leaves the folder"):
        load(masked, config)
    table.drop("mask").write_csv(masked)
    with pytest.raises(UserError, match=r'--topology.region mask needs a column "mask"'):
        load(masked, config)


def test_a_mask_of_a_volume_is_that_of_the_frame(tmp_path):
    """However small a part of the volume it is."""
    volume = np.zeros((40, 40, 30), dtype=np.uint8)
    volume[10:20, 10:20, 7] = 3
    path = tmp_path / "lesion.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
    extent = np.array([0, 0, 40, 40])
    assert MaskFile(path, 7).read(extent, 40).sum() == 100
    assert not MaskFile(path, 8).read(extent, 40).any()
    with pytest.raises(Unreadable, match=r"the mask lesion.nii.gz frame 30 does not exist"):
        MaskFile(path, 30).read(extent, 40)
    flat = tmp_path / "flat.png"
    Image.fromarray(volume[:, :, 7]).save(flat)
    assert MaskFile(flat, 7).read(extent, 40).sum() == 100
    two = tmp_path / "two.nii.gz"  # labels without a ground
    nibabel.save(nibabel.Nifti1Image(1 + (volume > 0).astype(np.int16), np.eye(4)), two)
    assert MaskFile(two, 7).read(extent, 40).all()


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_mask_is_packed_without_loss(side, seed):
    inside = np.random.default_rng(seed).random((side, side)) < 0.5
    np.testing.assert_array_equal(Mask.of(inside).square(), inside)


# --- partners ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=0, max_size=40))
def test_partners_are_of_another_patient_of_the_same_split(rows):
    split = np.array([part for part, _ in rows], dtype=np.int64)
    group = np.array([patient for _, patient in rows], dtype=np.int64)
    row_id = np.arange(len(rows), dtype=np.uint64) * 7919
    most = {part: (np.bincount(group[split == part]).max(), (split == part).sum()) for part in np.unique(split)}
    if any(2 * mine > every for mine, every in most.values()):
        with pytest.raises(UserError, match=r"one patient has \d+ of the \d+ images of (train|val|test), more than"):
            partners(split, group, row_id)
        return
    of = partners(split, group, row_id)
    assert sorted(of) == list(range(len(rows)))
    assert (split[of] == split).all()
    assert (of != np.arange(len(rows))).all()
    assert (group[of] != group).all()


def test_partners_hang_on_the_rows_alone():
    rng = np.random.default_rng(0)
    group, row_id = rng.integers(0, 9, 30), rng.integers(0, 2**60, 30).astype(np.uint64)
    split, order = np.zeros(30, dtype=np.int64), rng.permutation(30)
    of = partners(split, group, row_id)
    renamed = rng.permutation(9)[group]
    other = partners(split[order], renamed[order], row_id[order])
    np.testing.assert_array_equal(row_id[order][other], row_id[of][order])


def test_looks_have_one_mark_where_they_are_equal():
    """Of pixels, grey levels, box and mask: each by itself makes another."""
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:6, 2:6] = True
    hole = mask.copy()
    hole[3, 3] = False
    regions = (None, Region.of(mask), Region.of(np.roll(mask, 1, axis=0)), Region.of(hole), Region.of(mask))
    looks = Looks(8, np.zeros(5), np.array([1.0, 1.0, 1.0, 1.0, 0.5]), regions)
    pixels = np.full(5, 7, dtype=np.uint64)
    marks = looks.marks(pixels)
    assert len(set(marks.tolist())) == 5
    assert (looks.some([1, 2]).marks(pixels[1:3]) == marks[1:3]).all()
    assert not (looks.marks(pixels + np.uint64(1)) == marks).any()


def test_a_flat_region_has_no_topology():
    """What resampling rounds is no structure: the diagram is empty, not one of noise over the whole range."""
    mask = disc(inside=1.0, ground=0.0) > 0.5
    noise = 1e-7 * np.random.default_rng(0).normal(size=(48, 48))
    for image, where in ((disc(inside=0.7), [mask]), (0.3 + noise, [])):
        looks = Looks.of(tensor(image), 20, where)
        found = diagram(looks.v(tensor(image))[0])
        assert len(found.h0) == len(found.h1) == 0
    step = disc(inside=0.3 + 1 / 65535, ground=0.3)
    assert Looks.of(tensor(step), 48).v(tensor(step)).max() == pytest.approx(1)

"""Operations move no pixel and no diagram farther than they say; strengths are found where they must lie."""

import numpy as np
import pytest
import torch

from kladi.data.views import bounded, calibration
from kladi.data.views.bounded import OPERATIONS, Draw, changed, turned
from kladi.data.views.calibration import Original, Range, Strengths, calibrate, moved, require_enough
from kladi.data.views.region import Looks, shrunk
from kladi.errors import UserError
from kladi.structure.topology import BANDS, diagram, relative_bottleneck


def pictures(count=6, size=24, channels=1, seed=0):
    """Bright rings and discs on grey, away from black and white, and a little grain."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:size, :size]
    images = np.full((count, channels, size, size), 0.3)
    for image in images:
        for _ in range(3):
            centre, radius = rng.uniform(5, size - 5, 2), rng.uniform(2, 6)
            far = np.hypot(row - centre[0], column - centre[1])
            image[:, (far <= radius) & (far >= radius - 2)] = rng.uniform(0.45, 0.7)
    images += rng.uniform(-0.01, 0.01, images.shape)
    return torch.from_numpy(images.astype(np.float32))


def draws(count, seed=0):
    rng = np.random.default_rng(seed)
    return Draw(rng.random(count) < 0.5, rng.integers(0, 2**63, count).astype(np.uint64), seed)


def original_of(x, row_id, side):
    return Original.of(x, row_id, Looks.of(x, side))


def calibrated(x, row_id, side):
    return calibrate(x, row_id, Looks.of(x, side))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_pixel_moves_farther_than_the_amount(name, channels):
    x = pictures(channels=channels)
    amount = np.array([0.0, 0.01, 0.05, 0.1, 0.2, 5.0])
    y = changed(x.clone(), name, amount, draws(6))
    most = (y - x).abs().amax(dim=(1, 2, 3)).numpy()
    assert torch.equal(y[0], x[0])
    assert ((y >= 0) & (y <= 1)).all()
    assert (most[1:] > 0).all()
    if name == "noise":
        assert (y[3] - x[3]).std().item() == pytest.approx(0.1, rel=0.1)
    else:
        assert (most <= amount + 1e-6).all()
        assert most[1] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "noise"])
def test_the_diagram_moves_by_no_more_than_the_strength(name):
    x = pictures()
    original = original_of(x, draws(6).row_id, 24)
    for strength in (0.05, 0.2):
        assert (moved(original, name, strength, 0) <= strength + 0.01).all()


def test_brightness_moves_a_diagram_by_exactly_its_strength():
    """Unclipped: neither by white and black nor by the range of the original image."""
    x = pictures()
    original = original_of(x, draws(6).row_id, 24)
    looks = Looks(24, original.looks.low - 0.3, original.looks.high + 0.3, original.looks.regions)
    wide = Original.of(x, original.row_id, looks)
    y = changed(x.clone(), "brightness", 0.08 * wide.unit, draws(6))
    after = [diagram(v) for v in looks.v(y)]
    found = [relative_bottleneck(a, b, exact=True) for a, b in zip(wide.diagrams, after, strict=True)]
    np.testing.assert_allclose(found, 0.08, atol=1e-5)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_image_is_changed_alike_in_any_batch(name):
    x, amount, draw = pictures(5), np.full(5, 0.07), draws(5)
    whole = changed(x.clone(), name, amount, draw)
    for i in range(5):
        one = Draw(draw.up[i : i + 1], draw.row_id[i : i + 1], draw.seed)
        assert torch.equal(changed(x[i : i + 1].clone(), name, amount[i : i + 1], one)[0], whole[i])


def test_the_eight_turns_are_different_and_keep_the_diagram():
    x = pictures(1).expand(8, -1, -1, -1)
    found = turned(x, np.arange(8))
    assert torch.equal(found[0], x[0])
    assert len({image.numpy().tobytes() for image in found}) == 8
    assert len({diagram(image[0].double().numpy()).digest for image in found}) == 1


def test_contrast_keeps_the_mean_and_moves_the_farthest_pixel():
    x, amount = pictures(4), np.full(4, 0.03)
    for name, sign in (("contrast up", 1), ("contrast down", -1)):
        y = changed(x.clone(), name, amount, draws(4))
        np.testing.assert_allclose(y.mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3)), atol=1e-6)
        spread = (y.flatten(1).std(dim=1) - x.flatten(1).std(dim=1)) * sign
        assert (spread > 0).all()
    flat = changed(x.clone(), "contrast down", np.full(4, 9.0), draws(4))
    assert flat.flatten(1).std(dim=1).max() < 1e-6


def test_dilation_and_erosion_are_extremes_over_a_cross():
    x = pictures(1)
    big = np.full(1, 9.0)
    image = np.pad(x[0, 0].numpy(), 1, mode="edge")
    cross = np.stack([image[1:-1, 1:-1], image[:-2, 1:-1], image[2:, 1:-1], image[1:-1, :-2], image[1:-1, 2:]])
    np.testing.assert_allclose(changed(x.clone(), "dilation", big, draws(1))[0, 0], cross.max(axis=0), atol=1e-6)
    np.testing.assert_allclose(changed(x.clone(), "erosion", big, draws(1))[0, 0], cross.min(axis=0), atol=1e-6)


def test_grey_is_normalised_by_the_original_and_clipped():
    x = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1).repeat(2, 1, 2, 2)
    looks = Looks(2, np.array([0.3, 0.4]), np.array([0.5, 0.4]), (None, None))
    np.testing.assert_allclose(looks.v(x)[0], 0.5, atol=1e-6)
    assert not looks.v(x)[1].any()
    assert looks.v(x + 0.5)[0].max() == 1


# --- calibration ---------------------------------------------------------------------------------------------------


def test_ranges_are_where_the_distances_lie(monkeypatch):
    """Distances made up: 2.5 times the strength, so that one strength of the grid is strong."""
    monkeypatch.setattr(calibration, "moved", lambda original, name, u, seed: np.full(10, 2.5 * u))
    found = calibrated(pictures(), draws(6).row_id, 24)
    assert found.skipped == 0
    for name in OPERATIONS:
        weak, strong = found.ranges["weak"][name], found.ranges["strong"][name]
        assert (weak.low, weak.high) == (0.02, 0.0512)  # of the grid, 2.5 u in [0.05, 0.15)
        assert weak.share == 1
        assert weak.n == 10
        assert BANDS["strong"][0] <= 2.5 * strong.low < 2.5 * 0.0819  # a run of one, looked at more closely
        assert 2.5 * 0.0819 < 2.5 * strong.high <= BANDS["strong"][1]


def test_an_operation_that_never_mostly_hits_is_left_out(monkeypatch):
    def half(original, name, u, seed):
        return np.array([0.1, 0.9]) if name == "blur" else np.full(2, u)

    monkeypatch.setattr(calibration, "moved", half)
    found = calibrated(pictures(), draws(6).row_id, 24)
    assert "blur" not in found.ranges["weak"]
    assert "noise" in found.ranges["weak"]
    require_enough(found)


def test_a_second_sample_finds_the_same_shares(monkeypatch):
    monkeypatch.setattr(calibration, "OPERATIONS", {name: OPERATIONS[name] for name in ("brightness", "gamma")})
    first = calibrated(pictures(10, 16, seed=1), draws(10, 1).row_id, 16)
    second = original_of(pictures(10, 16, seed=2), draws(10, 2).row_id, 16)
    for band, operations in first.ranges.items():
        assert set(operations) == {"brightness", "gamma"}
        for name, chosen in operations.items():
            inside = [calibration._share(moved(second, name, u, 5), band) for u in (chosen.low, chosen.high)]
            assert np.mean(inside) > chosen.share - 0.3, (band, name)


def test_blank_images_are_counted_and_a_set_of_them_refused():
    x = torch.cat([pictures(3), torch.full((2, 1, 24, 24), 0.5)])
    small = {"noise": OPERATIONS["noise"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "OPERATIONS", small)
        assert calibrated(x, draws(5).row_id, 24).skipped == 2
    with pytest.raises(UserError, match="none of 2 images has a component or a hole"):
        calibrated(x[3:], draws(2).row_id, 24)


def test_one_operation_is_not_enough():
    one = Range(0.05, 0.1, 0.9, 0.08, 10)
    with pytest.raises(UserError, match=r"1 of 8 operations move .* by 15% to 25% of their span \(strong views\)"):
        require_enough(Strengths({"weak": {"noise": one, "blur": one}, "strong": {"noise": one}}, 0))


def test_random_operations_are_measured_in_several_draws():
    original = original_of(pictures(4), draws(4).row_id, 24)
    assert len(moved(original, "noise", 0.1, 0)) == 4 * calibration.DRAWS
    assert len(moved(original, "blur", 0.1, 0)) == 4
    assert set(OPERATIONS) > bounded.RANDOM


def test_strengths_are_measured_as_they_are_used():
    """At the size of the image, then reduced: means over areas halve what noise does to a diagram."""
    x, row_id = pictures(4, 24), draws(4).row_id
    small = original_of(shrunk(x, 12), row_id, 12)
    large = original_of(x, row_id, 12)
    np.testing.assert_allclose(large.looks.low, small.looks.low, atol=1e-7)
    assert np.median(moved(large, "noise", 0.1, 0)) < 0.8 * np.median(moved(small, "noise", 0.1, 0))

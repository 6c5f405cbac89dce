"""Views: exact identities, known answers of the geometry, distributions within bounds, and bits that depend on nothing
but (seed, epoch, row, view)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kladi import config
from kladi.data.views import augment, resample
from kladi.errors import UserError

OFF = config.Augment(
    crop=(1.0, 1.0), rotation=0.0, brightness=0.0, contrast=0.0, gamma=0.0, saturation=0.0, hue=0.0, blur=0.0, noise=0.0
)
EVERYTHING = config.Augment(
    flip_horizontal=0.5, flip_vertical=0.5, rotation=30.0, brightness=0.4, contrast=0.4, gamma=0.4, blur=0.5, noise=0.05
)
COLOUR = dataclasses.replace(EVERYTHING, saturation=0.4, hue=0.1)
UNIT = {"mean": (0.0,), "std": (1.0,)}


def intensity(size: int, channels: int = 1, **more: tuple[float, ...]) -> config.Intensity:
    return config.Intensity(size=size, channels=channels, **{**UNIT, **more})


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 2**64, count, dtype=np.uint64)


def squares(count: int, side: int, channels: int = 1, dtype: type = np.uint8) -> tuple[np.ndarray, np.ndarray]:
    """Random images of random shapes, centred on zeros, with their extents."""
    rng = np.random.default_rng(3)
    images = np.zeros((count, channels, side, side), dtype=dtype)
    extent = np.empty((count, 4), dtype=np.int32)
    for i in range(count):
        short = int(rng.integers(side // 2, side + 1))
        height, width = (side, short) if i % 2 else (short, side)
        top, left = (side - height) // 2, (side - width) // 2
        full = np.iinfo(dtype).max
        images[i, :, top : top + height, left : left + width] = rng.integers(1, full, (channels, height, width))
        extent[i] = top, left, height, width
    return images, extent


def full(count: int, side: int) -> np.ndarray:
    return np.tile(np.array([0, 0, side, side], dtype=np.int32), (count, 1))


def changed(count: int, **values: float | bool) -> augment.Parameters:
    """Parameters that change one thing, the same for all images."""
    base = augment.unchanged(count)
    kinds = {name: getattr(base, name).dtype for name in values}
    return dataclasses.replace(base, **{k: np.full(count, v, dtype=kinds[k]) for k, v in values.items()})


# --- identities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_zero_strengths_are_exactly_the_plain_view(channels: int, dtype: type) -> None:
    images, extent = squares(9, 37, channels, dtype)
    to = intensity(32, channels, mean=(0.4,), std=(0.2,))
    drawn = augment.draw(OFF, 5, 2, rows(9), 1)
    assert torch.equal(augment.apply(images, extent, drawn, to), augment.plain(images, extent, to))


@pytest.mark.parametrize("key", ["rotation", "brightness", "contrast", "gamma", "saturation", "hue", "blur", "noise"])
def test_each_strength_alone_is_an_identity_at_zero_and_none_above(key: str) -> None:
    images, extent = squares(64, 32, 3)
    to = intensity(28, 3)
    plain = augment.plain(images, extent, to)
    some = augment.draw(dataclasses.replace(OFF, **{key: 0.3}), 0, 0, rows(64), 0)
    view = augment.apply(images, extent, some, to)
    assert not torch.equal(view, plain)
    none = augment.draw(dataclasses.replace(OFF, **{key: 0.0}), 0, 0, rows(64), 0)
    assert torch.equal(augment.apply(images, extent, none, to), plain)


def test_images_that_are_not_blurred_or_noisy_keep_their_bits() -> None:
    images, extent = squares(40, 32)
    some = augment.draw(dataclasses.replace(OFF, blur=0.5), 0, 0, rows(40), 0)
    view, plain = augment.apply(images, extent, some, intensity(28)), augment.plain(images, extent, intensity(28))
    same = (view == plain).flatten(1).all(dim=1).numpy()
    assert same[some.sigma == 0].all()
    assert not same[some.sigma * 28 > 0.3].any()  # less than that moves nothing to the next pixel
    assert 0 < (some.sigma == 0).sum() < 40


def test_an_image_of_the_views_own_size_passes_through() -> None:
    images, _ = squares(5, 32)
    view = augment.plain(images, full(5, 32), intensity(32))
    assert torch.allclose(view, torch.from_numpy(images).float() / 255, atol=1e-5)


def test_normalisation_is_by_mean_and_std_a_channel() -> None:
    images, _ = squares(4, 16, 3)
    raw = augment.plain(images, full(4, 16), intensity(16, 3))
    by_channel = augment.plain(images, full(4, 16), intensity(16, 3, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0)))
    mean, std = torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    assert torch.allclose(by_channel, (raw - mean) / std, atol=1e-6)


# --- geometry ---------------------------------------------------------------------------------------------------


def test_flips_are_mirrors() -> None:
    images, _ = squares(3, 24)
    still = torch.from_numpy(images).float() / 255
    across = augment.apply(images, full(3, 24), changed(3, flip_horizontal=True), intensity(24))
    down = augment.apply(images, full(3, 24), changed(3, flip_vertical=True), intensity(24))
    assert torch.allclose(across, still.flip(3), atol=1e-5)
    assert torch.allclose(down, still.flip(2), atol=1e-5)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_counter_clockwise(quarters: int) -> None:
    images, _ = squares(3, 24)
    turned = augment.apply(images, full(3, 24), changed(3, angle=quarters * np.pi / 2), intensity(24))
    assert torch.allclose(turned, torch.rot90(torch.from_numpy(images).float() / 255, quarters, (2, 3)), atol=1e-4)


def test_rotation_leaves_zeros_outside_and_does_not_shear_a_stretched_crop() -> None:
    images = np.full((1, 1, 64, 64), 255, dtype=np.uint8)
    turned = augment.apply(images, full(1, 64), changed(1, angle=np.pi / 4), intensity(64))
    assert turned[0, 0, 0, 0] == 0
    assert abs(float(turned.mean()) - 2 * (np.sqrt(2) - 1)) < 0.01  # area of the octagon that both squares share
    transform = resample.affine(
        np.array([[8.0, 4.0, 40.0, 20.0]]), np.array([0.7]), np.zeros(1, bool), np.zeros(1, bool), 10
    )[0]
    right, down = transform[:, 0], transform[:, 1]
    assert np.allclose([np.linalg.norm(right), np.linalg.norm(down), right @ down], [4.0, 2.0, 0.0])
    assert np.allclose(transform[:, 2], [28.0, 14.0])


def test_a_crop_shows_its_window() -> None:
    """A linear ramp resampled is the ramp at the sampled places, which tells where they were."""
    side, size = 40, 16
    ramp = np.arange(side, dtype=np.uint16) * 100
    images = np.stack([np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side))])[:, None]
    p = dataclasses.replace(changed(2, area=0.3, shape=0.8, across=0.25, down=0.5), window=True, ratio=(0.75, 4 / 3))
    left, top, width, height = resample.crop(full(2, side), p.area, p.ratio, p.shape, p.across, p.down)[0]
    seen = augment.apply(images, full(2, side), p, intensity(size)) * 65535 / 100
    place = (torch.arange(size) + 0.5) / size
    assert torch.allclose(seen[0, 0, 5], (left + place * width - 0.5).float(), atol=1e-3)
    assert torch.allclose(seen[1, 0, :, 5], (top + place * height - 0.5).float(), atol=1e-3)


@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.floats(0.001, 1.0),
    st.floats(0.2, 5.0),
    st.floats(1.0, 4.0),
    st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3),
)
@settings(max_examples=300)
def test_a_crop_lies_inside_the_image_and_keeps_its_ratio(
    height: int, width: int, area: float, least: float, span: float, u: tuple[float, float, float]
) -> None:
    extent = np.array([[3, 5, height, width]])
    ratio = (least, least * span)
    one = [np.array([value]) for value in (area, *u)]
    left, top, wide, high = resample.crop(extent, one[0], ratio, *one[1:])[0]
    slack = 1e-9 * max(height, width)
    assert 5 - slack <= left <= left + wide <= 5 + width + slack
    assert 3 - slack <= top <= top + high <= 3 + height + slack
    assert ratio[0] * (1 - 1e-9) <= wide / high <= ratio[1] * (1 + 1e-9)
    share = wide * high / (width * height)
    fits = area * width / height <= ratio[1] and width / (area * height) >= ratio[0]
    assert share <= area * (1 + 1e-9)
    if fits:
        assert share == pytest.approx(area, rel=1e-9)
    else:
        assert wide == pytest.approx(width) or high == pytest.approx(height)


def test_crops_of_a_white_image_are_white() -> None:
    side = 74
    images = np.full((200, 1, side, side), 255, dtype=np.uint8)
    drawn = augment.draw(dataclasses.replace(OFF, crop=(0.1, 0.9)), 0, 0, rows(200), 0)
    view = augment.apply(images, full(200, side), drawn, intensity(64))
    inner = view[:, :, 1:-1, 1:-1]  # the outermost pixels may blend with the zeros beyond the image's edge
    assert torch.allclose(inner, torch.ones(()), atol=1e-5)
    assert view.min() > 0.5


def test_the_plain_view_keeps_the_aspect_and_pads_with_zeros() -> None:
    images = np.zeros((1, 1, 64, 64), dtype=np.uint8)
    images[:, :, 16:48] = 255
    view = augment.plain(images, np.array([[16, 0, 32, 64]]), intensity(32))[0, 0]
    assert torch.allclose(view[8:24], torch.ones(()), atol=1e-5)
    assert torch.equal(view[:8], torch.zeros(8, 32))
    assert torch.equal(view[24:], torch.zeros(8, 32))
    elsewhere = np.roll(images, 8, axis=2)  # not centred in its square: found by its extent
    assert torch.allclose(augment.plain(elsewhere, np.array([[24, 0, 32, 64]]), intensity(32))[0, 0], view, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (2, 37)])
def test_extreme_extents_give_finite_views(shape: tuple[int, int]) -> None:
    height, width = shape
    top, left = (37 - height) // 2, (37 - width) // 2
    images = np.zeros((50, 1, 37, 37), dtype=np.uint8)
    images[:, :, top : top + height, left : left + width] = 200
    extent = np.tile(np.array([top, left, height, width]), (50, 1))
    for view in (
        augment.apply(images, extent, augment.draw(EVERYTHING, 0, 0, rows(50), 0), intensity(32)),
        augment.plain(images, extent, intensity(32)),
    ):
        assert torch.isfinite(view).all()
        assert view.flatten(1).amax(dim=1).min() > 0.1, "each view shows the image"


def test_reduction_is_antialiased() -> None:
    """One-pixel stripes reduced by 4 are grey; plain bilinear sampling would show stripes or nothing."""
    stripes = np.zeros((1, 1, 256, 256), dtype=np.uint8)
    stripes[..., ::2] = 255
    view = augment.plain(stripes, full(1, 256), intensity(64))
    assert torch.allclose(view[..., 1:-1, 1:-1], torch.full((), 0.5), atol=0.01)
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 255, (4, 1, 24, 24)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, 150, mode="bicubic").clamp(0, 255).to(torch.uint8).numpy()
    view = augment.plain(smooth, full(4, 150), intensity(64))
    exact = torch.nn.functional.interpolate(torch.from_numpy(smooth) / 255, 64, mode="bilinear", antialias=True)
    assert float((view - exact).square().mean().sqrt()) < 0.02


def test_reduction_is_chosen_image_by_image() -> None:
    images, _ = squares(4, 128)
    p = dataclasses.replace(changed(4, shape=0.5), window=True, ratio=(1.0, 1.0), area=np.array([0.05, 1.0, 0.05, 1.0]))
    together = augment.apply(images, full(4, 128), p, intensity(32))
    for i in range(4):
        one = augment.apply(images[i : i + 1], full(1, 128), p.of(slice(i, i + 1)), intensity(32))
        assert torch.equal(one[0], together[i])


# --- light, colour, blur, noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_contrast_and_gamma_against_their_formulas(channels: int) -> None:
    images, _ = squares(6, 20, channels)
    raw = augment.plain(images, full(6, 20), intensity(20, channels))
    to = intensity(20, channels)
    weight = torch.tensor([0.299, 0.587, 0.114])[:, None, None] if channels == 3 else torch.ones(1, 1, 1)
    mean = (raw * weight).sum(dim=1).mean(dim=(1, 2))[:, None, None, None]
    for f, c, g in ((1.3, 1.0, 1.0), (1.0, 1.4, 1.0), (1.0, 0.0, 1.0), (0.7, 0.6, 0.8), (0.0, 1.0, 1.2)):
        view = augment.apply(images, full(6, 20), changed(6, brightness=f, contrast=c, gamma=g), to)
        expected = ((raw * f - mean * f) * c + mean * f).clamp(0, 1) ** g
        assert torch.allclose(view, expected, atol=2e-4), (f, c, g)  # the mean is of values rounded to 1/255


def test_brightness_and_gamma_leave_black_black() -> None:
    images = np.zeros((3, 1, 16, 16), dtype=np.uint8)
    view = augment.apply(images, full(3, 16), changed(3, brightness=1.4, gamma=0.7), intensity(16))
    assert torch.equal(view, torch.zeros_like(view))


def test_grey_never_gets_colour() -> None:
    grey, extent = squares(30, 37)
    without_noise = augment.draw(dataclasses.replace(COLOUR, noise=0.0), 0, 0, rows(30), 0)
    view = augment.apply(np.repeat(grey, 3, axis=1), extent, without_noise, intensity(32, 3))
    assert torch.equal(view[:, 0], view[:, 1])
    assert torch.equal(view[:, 0], view[:, 2])


def test_colour_on_one_channel_is_refused() -> None:
    images, extent = squares(2, 16)
    with pytest.raises(ValueError, match="3 channels, not 1"):
        augment.apply(images, extent, changed(2, hue=0.1), intensity(16))
    with pytest.raises(UserError, match=r"--augment.hue 0.1: 1 channel has no colour; give 0"):
        augment.check(config.Augment(hue=0.1), 1)


def test_hue_turns_the_colour_and_keeps_the_luminance() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(100, 150, (4, 3, 16, 16)).astype(np.uint8)  # far from the borders of the colour cube
    weight = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    raw = augment.plain(images, full(4, 16), intensity(16, 3))
    view = augment.apply(images, full(4, 16), changed(4, hue=0.25), intensity(16, 3))
    assert torch.allclose((view * weight).sum(1), (raw * weight).sum(1), atol=1e-5)
    assert not torch.allclose(view, raw, atol=0.01)
    once = changed(4, hue=0.5)
    half = augment.apply(images, full(4, 16), once, intensity(16, 3))
    luminance = (raw * weight).sum(1, keepdim=True)
    assert torch.allclose(half - luminance, luminance - raw, atol=2e-3)  # half a turn: the complementary colour


def test_saturation_scales_the_distance_from_grey() -> None:
    images, _ = squares(4, 16, 3)
    weight = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    raw = augment.plain(images, full(4, 16), intensity(16, 3))
    luminance = (raw * weight).sum(1, keepdim=True)
    for factor in (0.0, 0.5, 1.6):
        view = augment.apply(images, full(4, 16), changed(4, saturation=factor), intensity(16, 3))
        assert torch.allclose(view, (luminance + factor * (raw - luminance)).clamp(0, 1), atol=5e-3)


def test_blur_is_the_gaussian_and_keeps_constants() -> None:
    size = 41
    dot = np.zeros((2, 1, size, size), dtype=np.uint16)
    dot[:, :, 20, 20] = 65535
    sigma = np.array([0.8, 2.5])
    p = dataclasses.replace(augment.unchanged(2), sigma=sigma / size)
    view = augment.apply(dot, full(2, size), p, intensity(size))
    offset = np.arange(size) - 20
    for i in range(2):
        kernel = np.exp(-0.5 * (offset / sigma[i]) ** 2) * (np.abs(offset) <= np.ceil(3 * sigma[i]))
        kernel /= kernel.sum()
        assert np.allclose(view[i, 0].numpy(), np.outer(kernel, kernel), atol=1e-5)
    flat = augment.apply(np.full_like(dot, 30000), full(2, size), p, intensity(size))
    assert torch.allclose(flat, torch.full((), 30000 / 65535), atol=1e-5)


def test_noise_has_its_strength_and_differs_by_row_epoch_and_view() -> None:
    images = np.full((8, 1, 64, 64), 128, dtype=np.uint8)
    noisy = dataclasses.replace(OFF, noise=0.05)
    to = intensity(64)

    def view(epoch: int, which: int) -> torch.Tensor:
        return augment.apply(images, full(8, 64), augment.draw(noisy, 0, epoch, rows(8), which), to) - 128 / 255

    first = view(0, 0)
    assert abs(float(first.std()) - 0.05) < 0.001
    assert abs(float(first.mean())) < 0.001
    for other in (view(1, 0), view(0, 1), first.roll(1, dims=0)):
        assert abs(float(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1])) < 0.03


def test_views_stay_in_the_unit_range() -> None:
    for channels, strengths in ((1, EVERYTHING), (3, COLOUR)):
        images, extent = squares(60, 37, channels)
        view = augment.apply(images, extent, augment.draw(strengths, 0, 0, rows(60), 0), intensity(32, channels))
        assert view.dtype == torch.float32
        assert view.min() >= 0
        assert view.max() <= 1
        assert view.max() > 0.9


def test_sixteen_bits_keep_their_precision() -> None:
    """Two images that are the same in 8 bits stay apart by the right amount."""
    images = np.full((2, 1, 32, 32), 30000, dtype=np.uint16)
    images[1] += 3
    view = augment.plain(images, full(2, 32), intensity(28))
    difference = float((view[1] - view[0])[0, 14, 14])
    assert difference == pytest.approx(3 / 65535, rel=0.02)
    assert float(view[0, 0, 14, 14]) == pytest.approx(30000 / 65535, abs=1e-6)
    low = np.random.default_rng(0).integers(0, 256, (5, 1, 37, 37), dtype=np.uint8)
    drawn = augment.draw(EVERYTHING, 0, 0, rows(5), 0)
    wide = augment.apply(low.astype(np.uint16) * 257, full(5, 37), drawn, intensity(32))
    assert torch.allclose(augment.apply(low, full(5, 37), drawn, intensity(32)), wide, atol=1e-4)


# --- what is drawn ------------------------------------------------------------------------------------------------


def test_distributions() -> None:
    n = 20_000
    strengths = dataclasses.replace(COLOUR, crop=(0.3, 0.8), flip_horizontal=0.5, flip_vertical=0.1, blur=0.2)
    p = augment.draw(strengths, 0, 0, np.arange(n, dtype=np.uint64), 0)
    lowest, highest = augment.SIGMA_RANGE
    blurred = p.sigma[p.sigma > 0]
    uniforms = {
        "area": (p.area, 0.3, 0.8),
        "shape": (p.shape, 0, 1),
        "across": (p.across, 0, 1),
        "down": (p.down, 0, 1),
        "angle": (p.angle, -np.radians(30), np.radians(30)),
        "brightness": (p.brightness, 0.6, 1.4),
        "contrast": (p.contrast, 0.6, 1.4),
        "log gamma": (np.log(p.gamma), -0.4, 0.4),
        "saturation": (p.saturation, 0.6, 1.4),
        "hue": (p.hue, -0.1, 0.1),
        "sigma": (blurred, lowest, highest),
    }
    for name, (values, least, most) in uniforms.items():
        unit = np.sort((values - least) / (most - least))
        assert unit[0] >= -1e-9, name
        assert unit[-1] <= 1 + 1e-9, name
        distance = np.abs(unit - (np.arange(len(unit)) + 0.5) / len(unit)).max()
        assert distance < 2.2 / np.sqrt(len(unit)), name  # Kolmogorov; p < 1e-4
    columns = np.stack([values for name, (values, _, _) in uniforms.items() if name != "sigma"])
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(n)
    for values, chance in ((p.flip_horizontal, 0.5), (p.flip_vertical, 0.1), (p.sigma > 0, 0.2)):
        assert abs(values.mean() - chance) < 4 * np.sqrt(chance * (1 - chance) / n)
    assert np.array_equal(p.noise, np.full(n, 0.05))


def test_flips_hue_and_noise_are_off_by_default() -> None:
    p = augment.draw(config.Augment(), 0, 0, rows(1000), 0)
    assert not p.flip_horizontal.any()
    assert not p.flip_vertical.any()
    assert np.array_equal(p.hue, np.zeros(1000))
    assert np.array_equal(p.saturation, np.ones(1000))
    assert np.array_equal(p.noise, np.zeros(1000))


def test_the_same_counter_replays_and_any_other_differs() -> None:
    images, extent = squares(6, 37)

    def view(seed: int, epoch: int, which: int) -> torch.Tensor:
        return augment.apply(images, extent, augment.draw(EVERYTHING, seed, epoch, rows(6), which), intensity(32))

    first = view(0, 0, 0)
    assert torch.equal(first, view(0, 0, 0))
    for other in (view(1, 0, 0), view(0, 1, 0), view(0, 0, 1)):
        assert not (first == other).flatten(1).all(dim=1).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": (0.0, 1.0)}, "--augment.crop 0,1: takes least,most with 0 < least <= most <= 1"),
        ({"crop": (0.9, 0.3)}, "--augment.crop 0.9,0.3"),
        ({"ratio": (2.0, 1.0)}, "--augment.ratio 2,1"),
        ({"blur": 1.5}, "--augment.blur 1.5: takes 0 to 1"),
        ({"rotation": -1.0}, "--augment.rotation -1.0: takes 0 to 180"),
        ({"noise": float("nan")}, "--augment.noise nan: takes 0 to 1"),
    ],
)
def test_impossible_strengths_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as refused:
        augment.draw(dataclasses.replace(config.Augment(), **change), 0, 0, rows(1), 0)
    assert str(refused.value).startswith(message)


def test_channels_that_do_not_fit_are_refused() -> None:
    images, extent = squares(2, 16, 3)
    with pytest.raises(ValueError, match=r"images have 3 channels, intensity.channels is 1"):
        augment.plain(images, extent, intensity(16))
    with pytest.raises(ValueError, match=r"intensity.std has 2 values for 3 channels; give 1 or all"):
        augment.plain(images, extent, intensity(16, 3, std=(1.0, 1.0)))


# --- bits depend on the sample alone ------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "channels"), [(64, 1), (30, 1), (33, 3), (224, 1)])
def test_bits_do_not_depend_on_the_batch(size: int, channels: int) -> None:
    count = 24 if size < 200 else 6
    images, extent = squares(count, -(-size * 8 // 7), channels)
    strengths = COLOUR if channels == 3 else EVERYTHING
    to = intensity(size, channels, mean=(0.5,), std=(0.25,))

    def views(index: np.ndarray) -> torch.Tensor:
        return augment.apply(images[index], extent[index], augment.draw(strengths, 0, 0, rows(count)[index], 0), to)

    together = views(np.arange(count))
    for index in (*np.arange(count)[:, None], *np.array_split(np.random.default_rng(0).permutation(count), 3)):
        assert torch.equal(views(index), together[torch.from_numpy(index)])


@pytest.mark.parametrize(
    ("size", "channels", "count", "dtype"),
    [(64, 1, 50, np.uint8), (64, 1, 11, np.uint16), (30, 3, 41, np.uint8), (224, 3, 2, np.uint16)],
)
def test_bits_do_not_depend_on_the_number_of_threads(size: int, channels: int, count: int, dtype: type) -> None:
    images, extent = squares(count, -(-size * 8 // 7), channels, dtype)
    drawn = augment.draw(COLOUR if channels == 3 else EVERYTHING, 0, 0, rows(count), 0)
    before = torch.get_num_threads()
    try:
        views = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            views.append(augment.apply(images, extent, drawn, intensity(size, channels)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(views[0], view) for view in views[1:])


def test_bits_do_not_depend_on_how_many_images_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    images, extent = squares(23, 37)
    drawn = augment.draw(EVERYTHING, 0, 0, rows(23), 0)
    views = []
    for cached in (1, 3 * 32 * 32, 1 << 30):
        monkeypatch.setattr(augment, "CACHED", cached)
        views.append(augment.apply(images, extent, drawn, intensity(32)))
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])


def test_elementwise_exponentials_are_the_same_wherever_an_element_stands() -> None:
    """What `augment.power` rests on, and what `torch.pow` does not give on every processor."""
    x = torch.rand(1031, generator=torch.Generator().manual_seed(0))
    for function in (torch.log, torch.exp):
        whole = function(x)
        for start in range(17):
            for length in (1, 2, 3, 5, 7, 15, 16, 17, 33, 1000):
                part = x[start : start + length].clone()
                assert torch.equal(function(part), whole[start : start + length])


def test_inputs_are_left_as_they_were() -> None:
    images, extent = squares(5, 37)
    kept = images.copy()
    images.flags.writeable = False
    augment.apply(images, extent, augment.draw(EVERYTHING, 0, 0, rows(5), 0), intensity(32))
    augment.apply(torch.from_numpy(kept), extent, augment.draw(EVERYTHING, 0, 0, rows(5), 0), intensity(32))
    assert np.array_equal(images, kept)


def test_an_empty_batch_gives_an_empty_view() -> None:
    images, extent = squares(2, 37)
    drawn = augment.draw(EVERYTHING, 0, 0, rows(0), 0)
    assert augment.apply(images[:0], extent[:0], drawn, intensity(32)).shape == (0, 1, 32, 32)

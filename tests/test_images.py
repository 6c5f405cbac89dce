"""One test per row I1-I16 of the fault list, and the rules of the intensity pipeline: values, not only shapes."""

import hashlib
import io
import struct
import sys
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy.special import expit

from kladi.config import Data, Intensity
from kladi.data.pixels import arrays, decode, images, intensity, signature
from kladi.data.pixels.frame import Limits, Unreadable

GREY = Intensity(size=56, channels=1)
COLOUR = Intensity(size=56, channels=3)


def picture(height=24, width=32, channels=None, dtype=np.uint8, seed=0):
    shape = (height, width) if channels is None else (height, width, channels)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def bytes_of(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tiff_of(array, **options):
    out = io.BytesIO()
    tifffile.imwrite(out, array, **options)
    return out.getvalue()


def decoded(data, pipeline=GREY, name="", frame=-1, limits=None):
    opened = decode.open_bytes(data, pipeline, limits or Limits(), name=name)
    return decode.read_frame(opened, frame, pipeline)


def fault(data, pipeline=GREY, name="", frame=-1, limits=None):
    with pytest.raises(Unreadable) as caught:
        decoded(data, pipeline, name, frame, limits)
    return caught.value


def npy_of(array, **options):
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def npz_of(**named):
    out = io.BytesIO()
    np.savez_compressed(out, **named)
    return out.getvalue()


def png_of(header, packed):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


# The fault list -------------------------------------------------------------------------------------------------------


def test_i1_empty_file():
    assert (fault(b"").code, fault(b"").reason) == ("I1", "empty file")


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("PNG", bytes_of(Image.fromarray(picture()))),
        ("JPEG", bytes_of(Image.fromarray(picture(64, 64)), "JPEG")),
        ("TIFF", bytes_of(Image.fromarray(picture()), "TIFF")),
        ("TIFF", bytes_of(Image.fromarray(picture()), "TIFF", compression="tiff_lzw")),
        ("TIFF", tiff_of(picture(24, 32, 3, np.uint16))),
        ("GIF", bytes_of(Image.fromarray(picture()), "GIF")),
        ("BMP", bytes_of(Image.fromarray(picture()), "BMP")),
        ("WebP", bytes_of(Image.fromarray(picture()), "WEBP", lossless=True)),
    ],
    ids=["png", "jpeg", "tiff", "tiff-lzw", "tiff-rgb16", "gif", "bmp", "webp"],
)
def test_i2_a_cut_file_is_left_out_or_whole_never_filled(kind, data):
    """At whatever byte it is cut: left out, or (only the last bytes missing) the very same pixels."""
    whole = decoded(data).pixels
    for end in sorted({*range(9, len(data), max(1, len(data) // 60)), *range(len(data) - 20, len(data))}):
        try:
            cut = decoded(data[:end])
        except Unreadable:
            continue
        np.testing.assert_array_equal(cut.pixels, whole)
        assert end > 0.9 * len(data)


def test_i2_the_reason_tells_the_bytes():
    data = bytes_of(Image.fromarray(picture()))
    half = len(data) // 2
    assert fault(data[:half]).reason == f"truncated PNG ({half:,} of at least {len(data) - 12:,} bytes)"
    assert fault(data[:-4]).reason == f"truncated PNG ({len(data) - 4:,} of {len(data):,} bytes)"
    jpeg = bytes_of(Image.fromarray(picture(64, 64)), "JPEG")
    assert fault(jpeg[: len(jpeg) // 2]).reason == f"truncated JPEG ({len(jpeg) // 2:,} bytes)"


def test_i3_content_decides_and_a_wrong_suffix_is_noted():
    pixels = picture()
    found = decoded(bytes_of(Image.fromarray(pixels)), name="a.jpg")
    np.testing.assert_array_equal(found.pixels[0], pixels)
    assert found.notes == (("I3", "content is PNG, the suffix says JPEG"),)
    assert decoded(bytes_of(Image.fromarray(pixels)), name="a.PNG").notes == ()
    assert decoded(bytes_of(Image.fromarray(pixels)), name="no_suffix").notes == ()


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"<!DOCTYPE html><p>secret patient Meyer</p>", "HTML"),
        (b"\xef\xbb\xbf  <html>secret", "HTML"),
        (b'<?xml version="1.0"?><secret/>', "XML"),
        (b"%PDF-1.7 secret", "PDF"),
        (b"\x80\x04\x95secret", "Python pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid secret", "Git LFS pointer"),
        (b'{"secret": 1}', "JSON"),
        (b"a secret letter, as text", "text"),
        (b"\x7fELFsecret", "program (ELF)"),
        (b"\x01\x02\x03secret\x00\xff", "unknown"),
    ],
)
def test_i3_what_is_no_image_is_named_by_type_not_by_content(data, named):
    found = fault(data, name="scan.png")
    assert found.reason == f"no image: content is {named}"
    assert "secret" not in found.reason


def test_i4_a_bomb_is_seen_in_the_header():
    """50,000 x 50,000 pixels of nothing are 300 kB on disk; refused without memory for them."""
    row = zlib.compress(b"\0" * (50_000 // 8 + 1))
    found = fault(png_of(struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0), row))
    assert found.code == "I4"
    assert "max_pixels" in found.reason
    small = bytes_of(Image.fromarray(picture()))
    found = fault(small, limits=Limits(max_pixels=24 * 32 - 1))
    assert found.reason == "32 x 24 pixels are more than --data.max_pixels 767"
    assert decoded(small, limits=Limits(max_pixels=24 * 32)).pixels.shape == (1, 24, 32)


def test_i4_array_headers_are_believed_only_within_bounds():
    huge = npy_of(np.zeros((8, 8), np.uint8)).replace(b"(8, 8)", b"(99999999, 99999999)"[:6].ljust(6))
    assert isinstance(fault(huge), Unreadable)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)})
    found = fault(header.getvalue())
    assert found.code == "I4"
    assert "1000000" in found.reason


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 7)])
def test_i5_too_small(size):
    found = fault(bytes_of(Image.fromarray(picture(*size))))
    assert (found.code, found.reason) == ("I5", f"{size[1]} x {size[0]} pixels; the shorter side must have 8")


def test_i5_elongated_but_large_enough():
    found = decoded(bytes_of(Image.fromarray(picture(8, 900))))
    square, extent = intensity.fit(found.pixels, 64)
    assert extent.tolist() == [31, 0, 1, 64]
    assert not square[0, :31].any()
    assert not square[0, 32:].any()


def modes():
    grey, rgb = picture(), picture(channels=3, seed=1)
    alpha = picture(seed=2)
    paletted = Image.fromarray(rgb).quantize(16)
    cmyk = Image.fromarray(rgb).convert("CMYK")
    sixteen = picture(dtype=np.uint16, seed=3)
    floats = np.linspace(0, 1, 24 * 32, dtype=np.float32).reshape(24, 32)
    return {
        "1": (bytes_of(Image.fromarray(grey > 127)), (grey > 127) * 255, None),
        "L": (bytes_of(Image.fromarray(grey)), grey, None),
        "LA": (bytes_of(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])), grey, None),
        "P": (bytes_of(paletted), None, np.asarray(paletted.convert("RGB"))),
        "P with transparency": (bytes_of(paletted, transparency=3), None, np.asarray(paletted.convert("RGB"))),
        "RGB": (bytes_of(Image.fromarray(rgb)), None, rgb),
        "RGBA": (bytes_of(Image.fromarray(np.dstack([rgb, alpha]))), None, rgb),
        "CMYK": (bytes_of(cmyk, "TIFF"), None, np.asarray(cmyk.convert("RGB"))),
        "I;16": (bytes_of(Image.fromarray(sixteen)), sixteen, None),
        "I;16B": (tiff_of(sixteen, byteorder=">"), sixteen, None),
        "F in [0, 1]": (tiff_of(floats), np.rint(floats.astype(float) * 65535), None),
        "LA, 16 bits": (tiff_of(np.dstack([sixteen, sixteen]), extrasamples=["unassalpha"]), sixteen, None),
        "RGB, 16 bits": (
            tiff_of(picture(24, 32, 3, np.uint16), photometric="rgb"),
            None,
            picture(24, 32, 3, np.uint16),
        ),
    }


@pytest.mark.parametrize("mode", modes())
def test_i6_each_mode_by_its_rule(mode):
    data, grey, rgb = modes()[mode]
    found = decoded(data, COLOUR)
    if rgb is None:
        assert not found.colour
        for channel in found.pixels:
            np.testing.assert_array_equal(channel, grey)
        np.testing.assert_array_equal(decoded(data).pixels[0], grey)
    else:
        assert found.colour
        np.testing.assert_array_equal(found.pixels.transpose(1, 2, 0), rgb)
        mixed = rgb.astype(np.float64) @ [0.299, 0.587, 0.114]
        assert np.abs(decoded(data).pixels[0] - mixed).max() <= 0.51 * (1 if rgb.dtype == np.uint8 else 2)


def test_i6_integers_without_a_range_go_by_percentiles():
    values = np.arange(24 * 32, dtype=np.int32).reshape(24, 32) - 300
    found = decoded(tiff_of(values))
    low, high = np.percentile(values, [0.5, 99.5])
    np.testing.assert_array_equal(found.pixels[0], np.rint(np.clip((values - low) / (high - low), 0, 1) * 65535))
    assert found.window == "percentile"
    fixed = decoded(tiff_of(values), replace(GREY, window="fixed", center=0.0, width=200.0))
    np.testing.assert_array_equal(fixed.pixels[0], np.rint(np.clip(values / 200 + 0.5, 0, 1) * 65535))
    assert fixed.window == "fixed"


def test_i6_white_is_zero_and_twelve_bits():
    sixteen = picture(dtype=np.uint16)
    inverted = decoded(tiff_of(sixteen, photometric="miniswhite"))
    np.testing.assert_array_equal(inverted.pixels[0], 65535 - sixteen)
    eight = picture()
    np.testing.assert_array_equal(decoded(tiff_of(eight, photometric="miniswhite")).pixels[0], 255 - eight)


def test_i6_another_mode_is_left_out():
    lab = Image.fromarray(picture(channels=3)).convert("LAB")
    assert fault(bytes_of(lab, "TIFF")).reason == "pixel mode LAB has no rule"


def test_i7_sixteen_bits_keep_their_full_range():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for data in (bytes_of(Image.fromarray(values)), tiff_of(values), npy_of(values), npy_of(values.astype(">u2"))):
        found = decoded(data)
        assert found.pixels.dtype == np.uint16
        np.testing.assert_array_equal(found.pixels[0], values)
    real = values / 65535
    assert np.abs(decoded(npy_of(real)).pixels[0] / 65535 - real).max() < 1 / 65535


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_i7_png_of_several_channels_keeps_sixteen_bits(kind, channels):
    """Pillow writes no such file, so it is put together here, each row with another filter."""
    pixels = picture(24, 32, channels, np.uint16)
    raw = pixels.astype(">u2").view(np.uint8).reshape(24, -1)
    rows, before = [], np.zeros_like(raw[0])
    for number, row in enumerate(raw):
        left = np.concatenate([np.zeros(2 * channels, np.uint8), row[: -2 * channels]])
        rows.append(bytes([number % 3]) + [row, row - left, row - before][number % 3].tobytes())
        before = row
    header = struct.pack(">IIBBBBB", 32, 24, 16, kind, 0, 0, 0)
    found = decoded(png_of(header, zlib.compress(b"".join(rows))), COLOUR)
    expected = pixels[..., :3] if channels > 2 else np.dstack([pixels[..., 0]] * 3)
    np.testing.assert_array_equal(found.pixels.transpose(1, 2, 0), expected)


@pytest.mark.parametrize("kind", ["tiff", "npy", "npz", "nifti"])
def test_i8_nan_and_infinity(kind):
    values = np.linspace(-3, 9, 24 * 32).reshape(24, 32).astype(np.float32)
    values[3, 4], values[5, 6], values[7, 8] = np.nan, np.inf, -np.inf
    data = {
        "tiff": lambda: tiff_of(values),
        "npy": lambda: npy_of(values),
        "npz": lambda: npz_of(image=values),
        "nifti": lambda: nibabel.Nifti1Image(values.T[:, ::-1], np.eye(4)).to_bytes(),
    }[kind]()
    found = fault(data)
    assert found.code == "I8"
    assert found.reason.startswith("3 pixels are NaN or infinite")
    kept = decoded(data, limits=Limits.of(Data(nonfinite="zero"))).pixels[0]
    finite = np.isfinite(values)
    assert not kept[~finite].any()
    low, high = np.percentile(values[finite], [0.5, 99.5])
    expected = np.clip((values[finite].astype(np.float64) - low) / (high - low), 0, 1)
    assert np.abs(kept[finite] / 65535 - expected).max() < 1e-5


@pytest.mark.parametrize("value", [-4.0, 0.5, 1e30])
def test_i9_a_constant_image_divides_nothing_by_zero(value):
    found = decoded(npy_of(np.full((16, 16), value)))
    assert found.blank
    expected = round(0.5 * 65535) if value == 0.5 else 0
    assert (found.pixels == expected).all()
    view = images.preprocess(np.full((16, 16), value), GREY)
    assert torch.isfinite(view).all()


def test_i9_blank_is_told_from_a_nearly_blank_image():
    blank = np.full((16, 16, 3), [10, 20, 30], np.uint8)
    assert decoded(bytes_of(Image.fromarray(blank)), COLOUR).blank
    blank[3, 3, 1] += 1
    assert not decoded(bytes_of(Image.fromarray(blank)), COLOUR).blank


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_i10_orientation_is_applied_once(kind, orientation):
    """The stored picture is turned such that turning it back gives the upright one."""
    upright = np.zeros((48, 32), np.uint8)
    upright[:24, :16], upright[:24, 16:], upright[24:, :16] = 80, 160, 240
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.T,
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].T,
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if kind == "JPEG" else {}
    stored = Image.fromarray(np.ascontiguousarray(undo(upright)))
    found = decoded(bytes_of(stored, kind, exif=exif, **options))
    assert found.pixels.shape == (1, 48, 32)
    assert np.abs(found.pixels[0].astype(int) - upright).max() <= (3 if kind == "JPEG" else 0)
    assert [code for code, _ in found.notes] == ([] if orientation == 1 else ["I10"])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_i10_sixteen_bit_colour_tiff_is_turned_as_pillow_turns_eight_bits(orientation):
    pixels = picture(20, 12, 3)
    eight = decoded(tiff_of(pixels, photometric="rgb", extratags=[(274, "H", 1, orientation, True)]), COLOUR)
    wide = decoded(
        tiff_of(pixels.astype(np.uint16) * 257, photometric="rgb", extratags=[(274, "H", 1, orientation, True)]), COLOUR
    )
    np.testing.assert_array_equal(wide.pixels, eight.pixels.astype(np.uint16) * 257)


def test_i11_pages():
    pages = [picture(seed=s) for s in range(3)]
    for kind in ("TIFF", "GIF"):
        first, *rest = [Image.fromarray(page) for page in pages]
        data = bytes_of(first, kind, save_all=True, append_images=rest)
        found = decoded(data)
        np.testing.assert_array_equal(found.pixels[0], pages[0])
        assert found.notes == (("I11", 'frame 1 of 3 is read; a column "frame" in a row of its own names another'),)
        for index, page in enumerate(pages):
            np.testing.assert_array_equal(decoded(data, frame=index).pixels[0], page)
        assert fault(data, frame=3).reason == "frame 3 does not exist: the file has 3"


def test_i11_frames_are_counted(tmp_path):
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, np.stack([picture(seed=s) for s in range(5)]), photometric="minisblack")
    assert images.count_frames(path) == 5


class Canary:
    def __reduce__(self):
        return (sys.exit, ("the pickle was run",))


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_i12_pickled_objects_are_never_run(kind):
    objects = np.array([Canary()], dtype=object)
    data = npy_of(objects, allow_pickle=True) if kind == "npy" else npz_of(image=objects)
    found = fault(data)
    assert (found.code, found.reason) == ("I12", "holds Python objects, which are never unpickled")


def test_i13_corrupt_npz_and_nifti():
    good = npz_of(image=picture())
    middle = len(good) // 2
    for data in (good[:middle], good[:80] + b"\xff" * 40 + good[120:], b"PK\x03\x04" + b"\0" * 60):
        assert isinstance(fault(data), Unreadable)
    volume = nibabel.Nifti1Image(picture(16, 16, 8), np.eye(4)).to_bytes()
    found = fault(volume[:900])
    assert found.reason.startswith("truncated NIfTI (900 of ")
    packed = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = packed.compress(volume) + packed.flush()
    assert decoded(packed).pixels.shape == (1, 16, 16)
    assert fault(packed[:-20]).code == "I13"


def test_i13_a_gzip_bomb_stops_at_its_bound():
    packed = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join([packed.compress(bytes(1 << 20)) for _ in range(64)]) + packed.flush()
    found = fault(bomb)
    assert found.code == "D10"
    assert "200 times" in found.reason


def test_i15_long_and_foreign_names(tmp_path):
    folder = tmp_path
    while len(str(folder)) < 260:
        folder = folder / "ein-recht-langer-Ordnername-für-Übergrößen"
    folder.mkdir(parents=True)
    for name in ("médical-изображение-画像-😀.png", "scan " + "x" * 60 + ".png"):
        path = folder / name
        Image.fromarray(picture()).save(path)
        assert len(str(path)) > 300 or "画像" in name
        np.testing.assert_array_equal(images.decode(path).pixels[0], picture())


def test_i16_equal_channels_count_as_grey():
    grey = picture()
    found = decoded(bytes_of(Image.fromarray(np.dstack([grey] * 3))), COLOUR)
    assert not found.colour
    np.testing.assert_array_equal(found.pixels[2], grey)
    np.testing.assert_array_equal(decoded(bytes_of(Image.fromarray(np.dstack([grey] * 3)))).pixels[0], grey)


def test_missing_file_folder_and_nul_byte(tmp_path):
    for path, reason in ((tmp_path / "no.png", "is missing"), (tmp_path, "is no regular file")):
        with pytest.raises(Unreadable, match=reason):
            images.decode(path)
    with pytest.raises(Unreadable, match="cannot be read"):
        images.decode(str(tmp_path / "a\0b.png"))


@pytest.mark.skipif(not hasattr(__import__("os"), "mkfifo"), reason="needs a named pipe")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(Unreadable, match="no regular file"):
        images.decode(tmp_path / "pipe.png")


# Arrays and volumes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "frames", "colour"),
    [
        ((16, 24), 1, False),
        ((16, 24, 1), 1, False),
        ((1, 16, 24), 1, False),
        ((16, 24, 3), 1, True),
        ((16, 24, 4), 1, True),
        ((3, 16, 24), 1, True),
        ((5, 16, 24), 5, False),
        ((5, 16, 24, 1), 5, False),
        ((5, 16, 24, 3), 5, True),
    ],
)
def test_shapes_of_arrays(shape, frames, colour):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    opened = decode.open_bytes(npy_of(array), COLOUR, Limits())
    assert opened.frames == frames
    found = decode.read_frame(opened, frames - 1, COLOUR)
    assert (found.pixels.shape, found.colour) == ((3, 16, 24), colour)


@pytest.mark.parametrize("shape", [(16,), (2, 3, 4, 5, 6), (0, 16, 16)])
def test_shapes_that_are_no_picture(shape):
    assert "no picture" in fault(npy_of(np.zeros(shape, np.uint8))).reason


def test_npz_keys():
    pixels = picture()
    for named in ({"arr_0": pixels}, {"image": pixels, "label": np.zeros(3)}, {"anything": pixels}):
        np.testing.assert_array_equal(decoded(npz_of(**named)).pixels[0], pixels)
    assert "none named image" in fault(npz_of(one=pixels, two=pixels)).reason
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("letter.txt", "no arrays here")
    assert fault(out.getvalue()).code == "I3"


def test_bool_arrays():
    mask = picture() > 100
    np.testing.assert_array_equal(decoded(npy_of(mask)).pixels[0], mask * np.uint8(255))


def test_nifti_slices_lie_as_a_radiologist_sees_them():
    """One bright voxel right, front and top of the head: left on the picture, in the upper half, in the last slice."""
    volume = np.zeros((20, 24, 10), np.int16)
    volume[18, 22, 9] = 100
    for affine in (np.diag([1, 1, 1, 1.0]), np.diag([-1, -1, 1, 1.0])):
        flipped = volume if affine[0, 0] > 0 else volume[::-1, ::-1]
        data = nibabel.Nifti1Image(flipped, affine).to_bytes()
        opened = decode.open_bytes(data, replace(GREY, low=0.0, high=100.0), Limits())
        assert (opened.frames, opened.default) == (10, 5)
        last = opened.read(9).pixels
        assert last.shape == (24, 20)
        assert np.argwhere(last == 65535).tolist() == [[1, 1]]
        assert not opened.read(8).pixels.any()


def test_nifti_percentiles_are_those_of_the_volume():
    volume = np.random.default_rng(0).normal(size=(16, 16, 6)).astype(np.float32)
    volume[..., 2] *= 0.1
    data = nibabel.Nifti1Image(volume, np.eye(4)).to_bytes()
    low, high = np.percentile(volume, [0.5, 99.5])
    found = decoded(data, frame=2).pixels[0]
    expected = np.clip((volume[::-1, ::-1, 2].T - low) / (high - low), 0, 1)
    assert np.abs(found / 65535 - expected).max() < 2e-5


def test_nifti_slope_and_intercept():
    values = np.arange(16 * 16 * 2, dtype=np.int16).reshape(16, 16, 2)
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.header.set_slope_inter(2.0, -100.0)
    fixed = replace(GREY, window="fixed", center=0.0, width=200.0)
    found = decoded(image.to_bytes(), fixed, frame=0).pixels[0]
    real = 2.0 * values[::-1, ::-1, 0].T - 100.0
    np.testing.assert_array_equal(found, np.rint(np.clip(real / 200 + 0.5, 0, 1) * 65535))


def test_inflate_within_its_bounds():
    data = bytes(range(256)) * 40
    packed = zlib.compress(data, wbits=-15)
    assert arrays.inflate(packed, Limits(), -15) == data
    with pytest.raises(Unreadable, match="unpack to more than 1,000"):
        arrays.inflate(packed, Limits(max_inflated=1000), -15)


# The arithmetic -------------------------------------------------------------------------------------------------------


def test_linear_window_as_the_standard_writes_it():
    """C.11.2.1.2.1, example 1: c = 2048, w = 4096 over 0..4095 is the identity."""
    x = np.arange(4096, dtype=np.float64)
    np.testing.assert_allclose(intensity.linear(x, 2048.0, 4096.0) * 4095, x, atol=1e-9)
    x = np.arange(-5, 6, dtype=np.float64)
    np.testing.assert_array_equal(intensity.linear(x, 0.0, 1.0), (x > -0.5).astype(float))  # example 2: a step
    with pytest.raises(ValueError, match="width >= 1"):
        intensity.linear(x, 0.0, 0.5)


@given(
    x=hnp.arrays(np.float64, 7, elements=st.floats(-3000, 3000)),
    center=st.floats(-500, 500),
    width=st.floats(1.5, 4000),
)
def test_windows_against_their_naive_statements(x, center, width):
    for value, fast in zip(x, intensity.linear(x, center, width), strict=True):
        if value <= center - 0.5 - (width - 1) / 2:
            naive = 0.0
        elif value > center - 0.5 + (width - 1) / 2:
            naive = 1.0
        else:
            naive = (value - (center - 0.5)) / (width - 1) + 0.5
        assert fast == pytest.approx(naive, abs=1e-9)
    for value, fast in zip(x, intensity.linear_exact(x, center, width), strict=True):
        assert fast == pytest.approx(min(max((value - center) / width + 0.5, 0), 1), abs=1e-12)
    for value, fast in zip(x, intensity.sigmoid(x, center, width), strict=True):
        assert fast == pytest.approx(expit(4 * (value - center) / width), abs=1e-12)


def test_sigmoid_far_away_is_quiet():
    x = np.array([-1e300, 1e300])
    np.testing.assert_allclose(intensity.sigmoid(x, 0.0, 1e-3), [0, 1], atol=1e-300)
    for function in (intensity.sigmoid, intensity.linear_exact):
        with pytest.raises(ValueError, match="width > 0"):
            function(x, 0.0, 0.0)


def test_luminance_is_one_rule_at_both_depths():
    rgb = picture(64, 64, 3)
    narrow = intensity.luminance(rgb)
    r, g, b = (rgb[..., c].astype(np.int64) for c in range(3))
    np.testing.assert_array_equal(narrow, (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16)
    wide = intensity.luminance(picture(64, 64, 3, np.uint16))
    exact = picture(64, 64, 3, np.uint16).astype(np.float64) @ [0.299, 0.587, 0.114]
    assert np.abs(wide - exact).max() <= 1.5
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(intensity.luminance(np.dstack([every] * 3)), every)


def test_widening_changes_no_number():
    v = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(v / np.float32(255), intensity.widen(v) / np.float32(65535))


@settings(max_examples=40)
@given(
    pixels=hnp.arrays(
        st.sampled_from([np.uint8, np.uint16]),
        st.tuples(st.sampled_from([1, 3]), st.integers(8, 90), st.integers(8, 90)),
    ),
    side=st.integers(9, 80),
)
def test_fit_keeps_aspect_range_and_centre(pixels, side):
    square, (top, left, height, width) = intensity.fit(pixels, side)
    assert square.shape == (len(pixels), side, side)
    assert square.dtype == pixels.dtype
    assert max(height, width) == side
    assert abs(height / width - pixels.shape[1] / pixels.shape[2]) <= 1.0 * max(height, width) / min(height, width) ** 2
    inside = square[:, top : top + height, left : left + width]
    assert inside.min() >= pixels.min()
    assert inside.max() <= pixels.max()
    assert int(square.sum()) == int(inside.sum())  # zeros around
    assert abs((side - height) - 2 * top) <= 1
    assert abs((side - width) - 2 * left) <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_fit_is_antialiased(dtype):
    """One bright column in eight, reduced by eight, is an even grey: no column is lost, none is doubled."""
    high = np.iinfo(dtype).max
    pixels = np.zeros((1, 256, 256), dtype)
    pixels[..., ::8] = high
    square, _ = intensity.fit(pixels, 32)
    inner = square[0, 4:-4, 4:-4].astype(np.float64) / high
    assert inner.std() < 0.01
    assert abs(inner.mean() - 1 / 8) < 0.01


def test_fit_leaves_an_image_of_the_right_size_alone():
    pixels = picture(64, 40, dtype=np.uint16)[None]
    square, extent = intensity.fit(pixels, 64)
    assert extent.tolist() == [0, 12, 64, 40]
    np.testing.assert_array_equal(square[0, :, 12:52], pixels[0])


def test_store_side():
    assert [intensity.store_side(s) for s in (7, 56, 64, 224)] == [8, 64, 74, 256]


def test_a_large_jpeg_is_decoded_small_with_little_difference():
    y, x = np.mgrid[:1000, :1500] / 100
    smooth = np.stack([np.sin(x * (1 + c / 3)) * np.cos(y) * 100 + 128 for c in range(3)], axis=-1)
    smooth = (smooth + np.random.default_rng(0).normal(0, 6, smooth.shape)).astype(np.uint8)
    data = bytes_of(Image.fromarray(smooth), "JPEG", quality=95)
    fast = decoded(data, COLOUR)
    assert fast.pixels.shape == (3, 250, 375)
    full = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
    difference = intensity.fit(fast.pixels, 64)[0].astype(int) - intensity.fit(full, 64)[0]
    assert np.abs(difference).max() <= 4
    assert np.abs(difference).mean() < 0.6
    small = decoded(bytes_of(Image.fromarray(smooth[:300, :380]), "JPEG"), COLOUR)
    assert small.pixels.shape == (3, 300, 380)


# What the encoder sees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", [GREY, COLOUR, replace(COLOUR, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_preprocess_is_decode_fit_plain(tmp_path, pipeline, dtype):
    from kladi.data.views.augment import plain

    pixels = picture(40, 24, None if dtype == np.uint16 else 3, dtype)
    path = tmp_path / "a.png"
    path.write_bytes(bytes_of(Image.fromarray(pixels)))
    found = images.decode(path, -1, pipeline)
    square, extent = images.fit(found.pixels, images.store_side(pipeline.size))
    expected = plain(square[None], extent[None], pipeline)[0]
    view = images.preprocess(path, pipeline)
    assert view.dtype == torch.float32
    assert view.shape == (pipeline.channels, 56, 56)
    assert torch.equal(view, expected)
    assert torch.equal(images.preprocess(pixels, pipeline), expected)  # an array of the same values is the same image


def test_preprocess_of_a_plane_is_its_own_value():
    """A constant 8-bit picture of 51/255 = 0.2 with mean 0.5 and std 0.25: (0.2 - 0.5)/0.25 inside."""
    view = images.preprocess(np.full((30, 30), 51, np.uint8), GREY)
    torch.testing.assert_close(view[:, 4:-4, 4:-4], torch.full((1, 48, 48), -1.2))


def test_preprocess_a_frame_of_a_stack():
    stack = np.stack([picture(seed=s) for s in range(5)])
    assert torch.equal(images.preprocess(stack, GREY, frame=3), images.preprocess(stack[3], GREY))
    assert torch.equal(images.preprocess(stack, GREY), images.preprocess(stack[2], GREY))


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.zeros((16, 16), complex), np.full((16, 16), np.nan)])
def test_preprocess_refuses_what_is_no_picture(bad):
    with pytest.raises(Unreadable):
        images.preprocess(bad, GREY)


def test_readable_formats_are_recognised_by_their_suffix():
    assert signature.promised("a/b.NII.GZ") == "NIfTI"
    assert signature.promised(Path("x.tiff")) == "TIFF"
    assert signature.promised("x.csv") is None


@pytest.mark.mosaic
def test_every_image_of_the_mosaic_decodes():
    import os

    root = Path(os.environ.get("KLADI_MOSAIC") or Path(__file__).parents[2] / "shared" / "data" / "mosaic")
    if not (root / "manifest.csv").exists():
        pytest.skip("the mosaic is not on this machine")
    files = sorted((root / "images").rglob("*.*"))[::40]
    digest = hashlib.sha256()
    for path in files:
        found = images.decode(path, -1, GREY)
        with Image.open(path) as image:
            assert found.pixels.shape[1:] == (image.height, image.width)
            if image.mode == "L":
                np.testing.assert_array_equal(found.pixels[0], np.asarray(image))
        digest.update(found.pixels.tobytes())
    assert len(files) > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["png", "jpeg", "tiff", "tiff-lzw", "gif", "bmp", "webp", "jp2", "npy", "npz", "nifti"]
)
def test_flipped_bytes_give_an_image_or_a_reason(kind):
    """I2, I13: 300 random damages of each format; nothing but `Unreadable` may come out."""
    volume = nibabel.Nifti1Image(picture(16, 16, 4), np.eye(4)).to_bytes()
    image = Image.fromarray(picture(40, 40, 3))
    good = {
        "png": lambda: bytes_of(image),
        "jpeg": lambda: bytes_of(image, "JPEG"),
        "tiff": lambda: bytes_of(image, "TIFF"),
        "tiff-lzw": lambda: bytes_of(image, "TIFF", compression="tiff_lzw"),
        "gif": lambda: bytes_of(image.quantize(16), "GIF"),
        "bmp": lambda: bytes_of(image, "BMP"),
        "webp": lambda: bytes_of(image, "WEBP"),
        "jp2": lambda: bytes_of(image, "JPEG2000"),
        "npy": lambda: npy_of(picture(40, 40)),
        "npz": lambda: npz_of(image=picture(40, 40)),
        "nifti": lambda: volume,
    }[kind]()
    rng = np.random.default_rng(1)
    outcomes = set()
    for _ in range(300):
        data = bytearray(good)
        for at in rng.integers(0, min(len(data), 2000), rng.integers(1, 6)):
            data[at] = rng.integers(0, 256)
        try:
            outcomes.add(decoded(bytes(data), limits=Limits(max_pixels=10**6, max_bytes=10**7)).pixels.dtype)
        except Unreadable:
            outcomes.add("left out")
    assert "left out" in outcomes

"""NPY, NPZ and NIfTI -> `Frame`s. Sizes are checked in the header before memory is asked for; no pickle is read."""

from __future__ import annotations

import io
import zipfile
import zlib
from typing import Any

import numpy as np

from kladi import config as settings
from kladi.data.pixels.frame import Frame, Limits, Opened, Unreadable, check_size
from kladi.data.pixels.intensity import from_any_range, percentile_bounds
from kladi.data.pixels.raster import check_finite
from kladi.data.pixels.signature import kind_of

PICTURE_KEYS = ("image", "images", "img", "data", "x", "arr_0", "array", "pixels")
"""Names under which an .npz with several arrays may keep its picture, best first."""

MEDMNIST_KEYS = ("train_images", "val_images", "test_images")
"""The three parts of a MedMNIST file, which are one stack in this order."""


def open_array(data: bytes, kind: str, intensity: settings.Intensity, limits: Limits) -> Opened:
    """Read an array file; `kind` is "NPY", "NPZ", "NIfTI" or "gzip" (a compressed NIfTI).

    Raises:
        Unreadable: damaged, too large, of no known shape, or holding Python objects.
    """
    if kind == "gzip":
        data, kind = inflate(data, limits, 31), "NIfTI"
        if kind_of(data[:512]) != "NIfTI":
            raise Unreadable("no image: content is gzip", "I3")
    if kind == "NIfTI":
        return _open_nifti(data, intensity, limits)
    array = _read_npy(io.BytesIO(data), limits) if kind == "NPY" else _read_npz(data, limits)
    return open_stack(array, kind, intensity, limits)


def inflate(data: bytes, limits: Limits, wbits: int) -> bytes:
    """A deflated stream unpacked within `limits.max_inflated` bytes and `limits.max_ratio` times its size.

    Args:
        data: the stream.
        limits: the bounds.
        wbits: as for `zlib`: -15 raw, 31 gzip.

    Raises:
        Unreadable: D10 over a bound; I13 damaged or cut off.
    """
    bound = min(limits.max_inflated, limits.max_ratio * max(len(data), 1024))
    machine = zlib.decompressobj(wbits)
    try:
        out = machine.decompress(data, bound)
        if machine.unconsumed_tail:
            raise Unreadable(
                f"{len(data):,} bytes unpack to more than {bound:,} ({limits.max_ratio} times, at most "
                f"{limits.max_inflated:,})",
                "D10",
            )
        out += machine.flush()
    except zlib.error as error:
        raise Unreadable(f"damaged compression ({len(data):,} bytes)", "I13") from error
    if not machine.eof:
        raise Unreadable(f"truncated compression ({len(data):,} bytes)", "I13")
    return out


# NumPy ---------------------------------------------------------------------------------------------------------------


def _read_npy(file: Any, limits: Limits) -> np.ndarray:
    """One .npy stream, after a look at its header."""
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise Unreadable(f"NPY version {version[0]}.{version[1]} is not read", "I13")
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise Unreadable("holds Python objects, which are never unpickled", "I12")
    count = 1
    for side in shape:  # Python integers: the product cannot wrap
        count *= side
    if count * dtype.itemsize > limits.max_bytes:
        raise Unreadable(f"array {shape} of {dtype} is more than {limits.max_bytes:,} bytes", "I4")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _read_npz(data: bytes, limits: Limits) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
        if not names:
            raise Unreadable("a ZIP archive without arrays", "I3")
        if set(MEDMNIST_KEYS) <= set(names):
            parts = [_member(archive, key, limits) for key in MEDMNIST_KEYS]
            if len({part.shape[1:] for part in parts}) > 1:
                raise Unreadable("parts of different sizes", "I13")
            return np.concatenate(parts)
        known = [key for key in PICTURE_KEYS if key in names]
        if len(names) > 1 and not known:
            raise Unreadable(f"{len(names)} arrays and none named {', '.join(PICTURE_KEYS)}", "I13")
        return _member(archive, known[0] if known else names[0], limits)


def _member(archive: zipfile.ZipFile, name: str, limits: Limits) -> np.ndarray:
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > limits.max_bytes + 65536:
        raise Unreadable(f"array of {info.file_size:,} bytes is more than {limits.max_bytes:,}", "I4")
    # The header of the archive may lie about the size; this read does not go beyond it.
    with archive.open(info) as member:
        return _read_npy(io.BytesIO(member.read(info.file_size)), limits)


def open_stack(array: np.ndarray, kind: str, intensity: settings.Intensity, limits: Limits) -> Opened:
    """An array as one picture, or as a stack of them along the first axis.

    [H, W] grey · [H, W, 3 or 4] colour, alpha dropped · [3, H, W] colour, channels first · [1, H, W], [H, W, 1] grey ·
    any other [D, H, W], and [D, H, W, 1, 3 or 4], a stack, whose middle picture stands for the whole.

    Raises:
        Unreadable: another shape, or values that are no real numbers.
    """
    if array.dtype.hasobject or array.dtype.kind not in "biuf":
        raise Unreadable(f"values of type {array.dtype} are no pixels", "I13")
    stack = _as_stack(array)
    check_size(stack.shape[2], stack.shape[1], limits)
    return Opened(kind, len(stack), len(stack) // 2, lambda i: _plain_frame(stack[i], intensity, limits))


def _as_stack(array: np.ndarray) -> np.ndarray:
    """[D, H, W] or [D, H, W, 3]."""
    colour_last = array.ndim >= 3 and array.shape[-1] in (3, 4) and min(array.shape[-3:-1]) > 4
    if array.ndim == 2:
        return array[None]
    if array.ndim == 3 and colour_last:
        return array[None, ..., :3]
    if array.ndim == 3 and array.shape[-1] == 1:
        return array[None, ..., 0]
    if array.ndim == 3 and array.shape[0] == 3:
        return np.moveaxis(array, 0, -1)[None]
    if array.ndim == 3 and array.shape[0]:
        return array
    if array.ndim == 4 and colour_last and array.shape[0]:
        return array[..., :3]
    if array.ndim == 4 and array.shape[-1] == 1 and array.shape[0]:
        return array[..., 0]
    raise Unreadable(f"an array of shape {array.shape} is no picture and no stack of pictures", "I13")


def _plain_frame(pixels: np.ndarray, intensity: settings.Intensity, limits: Limits) -> Frame:
    """uint8, uint16 and bool have a full range; everything else is brought to one."""
    if pixels.dtype == np.bool_:
        return Frame(pixels.astype(np.uint8) * np.uint8(255))
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:
        return Frame(np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder("="), copy=False)))
    pixels = check_finite(pixels, limits)
    integers, rule = from_any_range(pixels, intensity, zero_nonfinite=limits.nonfinite == "zero")
    return Frame(integers, window=rule)


# NIfTI ---------------------------------------------------------------------------------------------------------------


def _open_nifti(data: bytes, intensity: settings.Intensity, limits: Limits) -> Opened:
    """A volume as axial slices from the feet up, in the radiological view (patient's right on the left, front on top).

    Values are scaled by the header's slope and intercept. A NIfTI has no full range whatever its type: percentiles are
    those of the whole volume, so that slices of one volume compare.
    """
    import nibabel

    maker = nibabel.Nifti2Image if int.from_bytes(data[:4], "little") in (540, 0x1C020000) else nibabel.Nifti1Image
    image: Any = maker.from_bytes(data)
    shape, dtype = image.shape, image.get_data_dtype()
    if dtype.fields is not None or dtype.kind not in "iuf":
        raise Unreadable(f"NIfTI values of type {dtype} are not read", "I13")
    if not 2 <= len(shape) <= 4 or min(shape) < 1:
        raise Unreadable(f"a NIfTI of shape {tuple(shape)} is no volume", "I13")
    count = int(np.prod(shape, dtype=object))
    if count * max(dtype.itemsize, 4) > limits.max_bytes:
        raise Unreadable(f"volume {tuple(shape)} of {dtype} is more than {limits.max_bytes:,} bytes", "I4")
    if image.dataobj.offset + count * dtype.itemsize > len(data):
        needed = int(image.dataobj.offset) + count * dtype.itemsize
        raise Unreadable(f"truncated NIfTI ({len(data):,} of {needed:,} bytes)", "I13")
    volume = _upright(image)
    check_size(volume.shape[2], volume.shape[1], limits)
    volume = check_finite(volume, limits)
    zero = limits.nonfinite == "zero"
    finite = np.isfinite(volume) if zero else None
    bounds = percentile_bounds(volume, finite, float(intensity.low), float(intensity.high))

    def read(index: int) -> Frame:
        integers, rule = from_any_range(volume[index], intensity, bounds=bounds, zero_nonfinite=zero)
        return Frame(integers, window=rule)

    return Opened("NIfTI", len(volume), len(volume) // 2, read)


def _upright(image: Any) -> np.ndarray:
    """[slices, rows, columns], float32: RAS+ axes, x and y reversed, z (then time) first."""
    import nibabel

    if len(image.shape) == 2:
        return np.asarray(image.dataobj, dtype=np.float32).T[None, ::-1]
    canonical: Any = nibabel.as_closest_canonical(image)
    values = np.asarray(canonical.dataobj, dtype=np.float32)
    values = values[::-1, ::-1]
    if values.ndim == 3:
        return values.transpose(2, 1, 0)
    return values.transpose(3, 2, 1, 0).reshape(-1, values.shape[1], values.shape[0])


__all__ = ["inflate", "open_array", "open_stack"]

"""Named tensors in safetensors files: looked at before they are read, written so that a crash leaves old or new.

A safetensors file is 8 bytes of header length, a JSON header (name -> dtype, shape, place), and raw numbers: it can
hold no code. The header is checked here first, because everything after it trusts what it promises.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kladi.errors import UserError

MAX_HEADER = 10 * 2**20
"""Bytes of header that are read; more is no encoder."""
MAX_TENSORS = 50_000
_BYTES = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"], 1),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 2),
    **dict.fromkeys(["U32", "I32", "F32"], 4),
    **dict.fromkeys(["U64", "I64", "F64"], 8),
}
_NAMES = {
    "torch.bool": "BOOL",
    "torch.uint8": "U8",
    "torch.int8": "I8",
    "torch.int16": "I16",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int32": "I32",
    "torch.float32": "F32",
    "torch.int64": "I64",
    "torch.float64": "F64",
}


@dataclass(frozen=True)
class Promise:
    """What a header says of one tensor. `dtype` in safetensors' words: F32, I64, ..."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Promise:
        return cls(_NAMES.get(str(tensor.dtype), str(tensor.dtype)), tuple(tensor.shape))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def header(path: Path) -> dict[str, Promise]:
    """Name -> dtype and shape of each tensor, without reading any; refuses whatever does not add up.

    Raises:
        UserError: the file cannot be read, is no safetensors file, is cut short, has more than 10 MB of header or
            50,000 tensors, or its tensors overlap, leave gaps or differ in size from their shapes.
    """
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if 2 <= length <= MAX_HEADER and 8 + length > size:
                raise UserError(f"{path}: cut short ({size:,} bytes; its header alone promises {8 + length:,})")
            if not 2 <= length <= MAX_HEADER:
                raise UserError(f"{path}: no safetensors file; kladi reads safetensors and opens no .pt, .pth or .pkl")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: no safetensors file; kladi reads safetensors and opens no .pt, .pth or .pkl"
        ) from error
    if not isinstance(entries, dict):
        raise UserError(f"{path}: its header is no table of tensors")
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise UserError(f"{path}: {len(entries):,} tensors, more than {MAX_TENSORS:,}")
    return _checked(path, entries, size - 8 - length)


def read(path: Path, expected: Mapping[str, Promise] | None = None) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU.

    Args:
        path: a safetensors file.
        expected: names, dtypes and shapes that must be there, and no others; compared before any number is read.

    Raises:
        UserError: as `header`, or the file holds something else than expected (names the first difference).
    """
    found = header(path)
    if expected is not None:
        differences = compare(found, expected)
        if differences:
            more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
            raise UserError(f"{path}: {differences[0]}{more}")
    try:
        return load(Path(path).read_bytes())
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def compare(found: Mapping[str, Promise], expected: Mapping[str, Promise]) -> list[str]:
    """Every difference between two tables of tensors, one line each."""
    lines = [f"lacks {name}" for name in expected if name not in found]
    lines += [f"has {name}, which this model has not" for name in found if name not in expected]
    lines += [
        f"{name} is {found[name]}, this model builds {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    return lines


def promises(tensors: Mapping[str, Tensor]) -> dict[str, Promise]:
    """The table that `read` compares a file with."""
    return {name: Promise.of(tensor) for name, tensor in tensors.items()}


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file in memory; the same tensors give the same bytes."""
    plain = {name: tensors[name].detach().to("cpu").contiguous() for name in sorted(tensors)}
    return save(plain, dict(metadata) if metadata else None)


def from_bytes(content: bytes) -> dict[str, Tensor]:
    """What `to_bytes` was given."""
    return load(content)


def write(path: Path, content: bytes | str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of one. Readable by its owner only.

    Raises:
        OSError: as the file system says; the old file is then intact and nothing of the new one remains.
    """
    raw = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write_new(temporary, raw)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_new(path: Path, raw: bytes) -> None:
    """Create a file (mode 0600) and push its bytes to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Push a folder's list of names to the disk; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checked(path: Path, entries: dict[str, Any], data_size: int) -> dict[str, Promise]:
    """Each entry well formed, and all of them side by side fill the file: no gap, no overlap, no surprise."""
    table: dict[str, Promise] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end))
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path}: the header's entry for {name[:80]!r} is malformed") from error
        if not whole or dtype not in _BYTES:
            raise UserError(f"{path}: the header's entry for {name[:80]!r} is malformed")
        size = _BYTES[dtype]
        for side in shape:
            size *= side
        if end - begin != size:
            raise UserError(f"{path}: {name[:80]!r} takes {end - begin:,} bytes, its shape {list(shape)} {size:,}")
        table[name] = Promise(dtype, shape)
        places.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(places):
        if begin != reached:
            raise UserError(f"{path}: {name[:80]!r} overlaps another tensor or leaves a gap before it")
        reached = end
    if reached != data_size:
        raise UserError(f"{path}: {data_size:,} bytes of numbers, its header promises {reached:,}")
    return table

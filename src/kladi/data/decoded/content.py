"""Which images these are, by the bytes of their files: row ids, and the name of the store that holds them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata

import numpy as np
from jaxtyping import UInt64

from kladi import config as settings
from kladi.data.pixels.frame import Limits, Unreadable
from kladi.data.pixels.open_file import open_file

FORMAT = 1
"""Of the store; a change of what is stored, or how, is another number."""


@dataclass(frozen=True)
class Content:
    """SHA-256 of a file's bytes, and over them and the frame; or why the file cannot be read."""

    digest: bytes
    with_frame: bytes
    fault: Unreadable | None = None


def read_contents(names: Sequence[str], frames: Sequence[int], workers: int | None) -> list[Content]:
    """Each file is read once, whatever number of its frames is asked for."""
    where: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        where.setdefault(name, []).append(position)

    def one(name: str) -> list[tuple[int, Content]]:
        digest = hashlib.sha256()
        try:
            with open_file(name) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except Unreadable as fault:
            return [(position, Content(b"", b"", fault)) for position in where[name]]
        except OSError as error:
            fault = Unreadable(f"cannot be read ({error.strerror or type(error).__name__})", "I14")
            return [(position, Content(b"", b"", fault)) for position in where[name]]
        found = []
        for position in where[name]:
            framed = digest.copy()
            framed.update(int(frames[position]).to_bytes(8, "little", signed=True))
            found.append((position, Content(digest.digest(), framed.digest())))
        return found

    contents = [Content(b"", b"")] * len(names)
    with ThreadPoolExecutor(min(8, workers or cores())) as pool:
        for found in pool.map(one, where):
            for position, content in found:
                contents[position] = content
    return contents


def row_ids(contents: Sequence[Content], names: Sequence[str]) -> UInt64[np.ndarray, " n"]:
    """First 64 bits of the digest; the second, third, ... path with the same content gets those of (digest, 1), ..."""
    row_id = np.array([int.from_bytes(c.with_frame[:8], "big") for c in contents], dtype=np.uint64)
    taken: set[int] = set()
    for position in sorted(range(len(names)), key=lambda p: (names[p], p)):
        value, rank = int(row_id[position]), 0
        while value in taken:
            rank += 1
            again = hashlib.sha256(contents[position].with_frame + rank.to_bytes(8, "little"))
            value = int.from_bytes(again.digest()[:8], "big")
        taken.add(value)
        row_id[position] = value
    return row_id


def store_key(
    contents: Sequence[Content],
    row_id: UInt64[np.ndarray, " n"],
    intensity: settings.Intensity,
    limits: Limits,
    *,
    drop_blank: bool,
) -> str:
    """Name of the folder: files in order, pipeline, limits, and the decoders that would do the work.

    The decoders are part of it so that a store is made again after `pip install "kladi[dicom]"`.
    """
    told = {
        "format": FORMAT,
        "pipeline": pipeline_digest(intensity),
        "limits": dataclasses.asdict(limits),
        "drop_blank": drop_blank,
        "decoders": _decoders(),
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for content in contents:
        digest.update(content.with_frame or b"missing")
    digest.update(row_id.astype("<u8").tobytes())
    return digest.hexdigest()[:32]


def pipeline_digest(intensity: settings.Intensity) -> str:
    """Of what decides the stored pixels; `mean` and `std` are applied later and do not count."""
    told = {key: value for key, value in dataclasses.asdict(intensity).items() if key not in {"mean", "std"}}
    return hashlib.sha256(json.dumps([FORMAT, told], sort_keys=True).encode()).hexdigest()


def _decoders() -> dict[str, str]:
    names = (
        "pillow",
        "tifffile",
        "nibabel",
        "pydicom",
        "pyjpegls",
        "pylibjpeg",
        "pylibjpeg-openjpeg",
        "python-gdcm",
    )
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

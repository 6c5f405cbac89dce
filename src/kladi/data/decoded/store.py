"""Pixels decoded once: a memory-mapped square for each image, keyed by the content of the files and the pipeline.

A store is a folder `<key>/` that appears whole or not at all: it is built as `.tmp-...` beside its place, `meta.json`
is written last, then the folder is renamed. It holds pixels, digests and numbers; no path, no patient, no label.
Nothing is ever written beside the data.

    pixels.bin   n x C x S x S, uint8 or uint16, row after row
    rows.npz     extent, row_id, pixel_digest, source
    meta.json    shape, dtype, digests, what was left out (by position in the list of files) and what was noticed

Rows come in the order of the input list; those that were left out are absent. If any image has 16 bits, all are stored
with 16 (v -> 257 v is exact).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt8, UInt16, UInt64

from kladi import config as settings
from kladi.data.decoded.building import decode_into
from kladi.data.decoded.content import FORMAT, read_contents, row_ids, store_key
from kladi.data.findings import Finding
from kladi.data.pixels.frame import Limits
from kladi.errors import RunStopped

TRIES = 3
"""Times a read of the store is tried before the run stops."""


@dataclass(frozen=True)
class Store:
    """Decoded images, read-only.

    images: [n, C, S, S], memory-mapped; uint8 (0..255) or uint16 (0..65535) for [0, 1]; aspect kept, the longer side
        fills S = ceil(size * 8/7), centred on zeros.
    extent: (top, left, height, width) of each image inside its square.
    row_id: first 64 bits of SHA-256 over file bytes and frame (little-endian int64); made unique among equal content in
        the order of the paths.
    pixel_digest: 64 bits over the decoded pixels: equal for copies of one picture. A constant image has one of its own,
        because blank images are no copies of each other.
    source: position in the list that the store was built from.
    digest: of pipeline and row ids: the same wherever and whenever the same images are decoded.
    facts: counts, e.g. {"format": {"DICOM": 12}, "bits": {"16-bit": 12}, "window": {"file window": 12},
        "channels": {"grey": 10, "colour": 2}}.
    folder: where it lies.
    """

    images: UInt8[np.ndarray, "n C S S"] | UInt16[np.ndarray, "n C S S"]
    extent: Int32[np.ndarray, "n 4"]
    row_id: UInt64[np.ndarray, " n"]
    pixel_digest: UInt64[np.ndarray, " n"]
    source: Int64[np.ndarray, " n"]
    digest: str
    folder: Path
    facts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.row_id)

    def gather(self, index: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b C S S"] | UInt16[np.ndarray, "b C S S"]:
        """Copies of the squares `index`, in that order.

        Read through the file, not through the map: an error of the disk is then an exception, not a signal that kills
        the process, and the pages do not count as memory of the run.

        Raises:
            IndexError: a position outside the store.
            RunStopped: the store cannot be read, after `TRIES` tries; never another image instead.
        """
        outside = index[(index < 0) | (index >= len(self))]
        if len(outside):
            raise IndexError(f"row {int(outside[0])} of a store of {len(self)}")
        out = np.empty((len(index), *self.images.shape[1:]), dtype=self.images.dtype)
        why: OSError | None = None
        for _ in range(TRIES):
            try:
                self._read(index, out)
            except OSError as error:
                why = error
            else:
                return out
        raise RunStopped(f"the store of decoded images cannot be read ({why and (why.strerror or why)})") from why

    def _read(self, index: Int[np.ndarray, " b"], out: np.ndarray) -> None:
        stride = out[0].nbytes if len(out) else 0
        with (self.folder / "pixels.bin").open("rb", buffering=0) as file:
            for position, row in enumerate(index.tolist()):
                file.seek(row * stride)
                if file.readinto(out[position].data.cast("B")) != stride:
                    raise OSError("it is shorter than it was")

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """The store in `folder`.

        Raises:
            RunStopped: no store, half a store, or one that does not match its own account.
        """
        folder = Path(folder)
        try:
            return _opened(folder, _meta(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunStopped(f"no whole store of decoded images ({type(error).__name__})") from error


def build(
    paths: Sequence[str | Path],
    frames: Sequence[int],
    intensity: settings.Intensity,
    folder: str | Path,
    *,
    rows: Sequence[int] | None = None,
    config: settings.Data | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Store, list[Finding]]:
    """Decode every image once, or open the store that holds them already.

    Args:
        paths: image files.
        frames: frame of each, -1 for the whole file.
        intensity: the pipeline.
        folder: holds one sub-folder a store; made where missing, readable by its owner alone.
        rows: number of each image in the findings; default 1, 2, ...
        config: limits and `drop_blank`; default `config.Data()`.
        workers: decoder processes; default one a core.
        progress: called with (done, of).

    Returns:
        The store (possibly empty), and what was left out, skipped or noticed, one finding a kind.

    Raises:
        RunStopped: no space, no right to write, or no decoder process can be started.
    """
    config = config or settings.Data()
    rows = list(range(1, len(paths) + 1)) if rows is None else list(rows)
    names = [str(path) for path in paths]
    contents = read_contents(names, frames, workers)
    row_id = row_ids(contents, names)
    limits = Limits.of(config)
    key = store_key(contents, row_id, intensity, limits, drop_blank=config.drop_blank)
    folder = Path(folder)
    place = folder / key
    found = _whole(place)
    if found is None:
        try:
            _make_folder(folder)
            _sweep(folder)
            if place.exists() and _whole(place) is None:
                shutil.rmtree(place)  # not all of it is there; it can be made again
            decode_into(names, frames, contents, row_id, intensity, limits, config, place, workers, progress)
        except OSError as error:
            raise RunStopped(f"the store of decoded images cannot be written ({error.strerror or error})") from error
        found = Store.open(place), _meta(place)["findings"]
    return found[0], [_finding(one, rows) for one in found[1]]


def _whole(place: Path) -> tuple[Store, list[dict[str, Any]]] | None:
    """The store at `place` and what was found while it was made; None where there is none, or not all of it."""
    try:
        return Store.open(place), _meta(place)["findings"]
    except (RunStopped, OSError, ValueError, KeyError):
        return None


def _meta(place: Path) -> dict[str, Any]:
    return json.loads((place / "meta.json").read_text(encoding="utf-8"))


def _opened(folder: Path, meta: dict[str, Any]) -> Store:
    if meta["format"] != FORMAT:
        raise ValueError("another format")
    table = (folder / "rows.npz").read_bytes()
    if hashlib.sha256(table).hexdigest() != meta["rows"]:
        raise ValueError("rows.npz does not match")
    shape, dtype = tuple(meta["shape"]), np.dtype(meta["dtype"])
    if (folder / "pixels.bin").stat().st_size != np.prod(shape, dtype=np.int64) * dtype.itemsize:
        raise ValueError("pixels.bin has another size")
    images: np.ndarray = np.zeros(shape, dtype=dtype)
    if images.size:  # an empty file cannot be mapped
        images = np.memmap(folder / "pixels.bin", mode="r", dtype=dtype, shape=shape)
    with np.load(folder / "rows.npz", allow_pickle=False) as rows:
        return Store(
            images=images,
            extent=rows["extent"],
            row_id=rows["row_id"],
            pixel_digest=rows["pixel_digest"],
            source=rows["source"],
            digest=meta["digest"],
            folder=folder,
            facts=meta["facts"],
        )


def _finding(told: dict[str, Any], rows: Sequence[int]) -> Finding:
    return Finding(told["code"], told["severity"], told["text"], tuple(rows[p] for p in told["positions"]))


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what processes of this machine left half-built when they died."""
    for left in folder.glob(f".tmp-{platform.node()}-*-*"):
        pid = left.name.rsplit("-", 2)[1]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    if sys.platform == "win32":
        return True  # os.kill ends a process there; better to leave a folder behind
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

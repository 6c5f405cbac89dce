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

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt8, UInt16, UInt64

from kladi import config as settings
from kladi.data.decode import open_file
from kladi.data.decoder import Answer, Job, decode_all
from kladi.data.findings import Finding, counted
from kladi.data.frame import Limits, Unreadable
from kladi.data.intensity import store_side, widen
from kladi.errors import RunStopped

FORMAT = 1
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
    facts: counts of what was noticed, e.g. {"window": {"file window": 12}, "channels": {"grey": 10, "colour": 2}}.
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
    contents = _digests(names, frames, workers)
    row_id = _row_ids(contents, names)
    limits = Limits.of(config)
    key = _key(contents, row_id, intensity, limits, drop_blank=config.drop_blank)
    folder = Path(folder)
    place = folder / key
    found = _whole(place)
    if found is None:
        try:
            _make_folder(folder)
            _sweep(folder)
            shutil.rmtree(place, ignore_errors=True)  # what lies there is not whole; it can be made again
            _decode(names, frames, contents, row_id, intensity, limits, config, place, workers, progress)
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


# Content -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Content:
    """SHA-256 of a file's bytes, and over them and the frame; or why the file cannot be read."""

    digest: bytes
    with_frame: bytes
    fault: Unreadable | None = None


def _digests(names: Sequence[str], frames: Sequence[int], workers: int | None) -> list[_Content]:
    """Each file is read once, whatever number of its frames is asked for."""
    where: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        where.setdefault(name, []).append(position)

    def one(name: str) -> list[tuple[int, _Content]]:
        digest = hashlib.sha256()
        try:
            with open_file(name) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except Unreadable as fault:
            return [(position, _Content(b"", b"", fault)) for position in where[name]]
        except OSError as error:
            fault = Unreadable(f"cannot be read ({error.strerror or type(error).__name__})", "I14")
            return [(position, _Content(b"", b"", fault)) for position in where[name]]
        found = []
        for position in where[name]:
            framed = digest.copy()
            framed.update(int(frames[position]).to_bytes(8, "little", signed=True))
            found.append((position, _Content(digest.digest(), framed.digest())))
        return found

    contents = [_Content(b"", b"")] * len(names)
    with ThreadPoolExecutor(min(8, workers or _cores())) as pool:
        for found in pool.map(one, where):
            for position, content in found:
                contents[position] = content
    return contents


def _row_ids(contents: Sequence[_Content], names: Sequence[str]) -> UInt64[np.ndarray, " n"]:
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


def _key(
    contents: Sequence[_Content],
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
        "pylibjpeg-openjpeg",
        "pylibjpeg-rle",
        "python-gdcm",
    )
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


# Building ------------------------------------------------------------------------------------------------------------


def _decode(
    names: Sequence[str],
    frames: Sequence[int],
    contents: Sequence[_Content],
    row_id: UInt64[np.ndarray, " n"],
    intensity: settings.Intensity,
    limits: Limits,
    config: settings.Data,
    place: Path,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Decode into `.tmp-...`, then rename it to `place`."""
    side, n = store_side(intensity.size), len(names)
    building = Path(tempfile.mkdtemp(prefix=f".tmp-{platform.node()}-{os.getpid()}-", dir=place.parent))
    pixels = None
    try:
        needed = n * intensity.channels * side * side
        free = shutil.disk_usage(building).free
        if needed > free:
            raise RunStopped(f"the store of decoded images needs {needed:,} bytes; {free:,} are free (--data.store)")
        pixels = _Pixels(building, n, intensity.channels, side)
        notes = _Notes()
        table = _Rows(n)
        for position, content in enumerate(contents):
            if content.fault is not None:
                notes.add(content.fault.code, "left out", content.fault.reason, position)
        jobs = [Job(p, names[p], int(frames[p])) for p in range(n) if contents[p].fault is None]
        done = n - len(jobs)
        order = sorted(jobs, key=lambda job: job.path) if len(set(names)) < n else jobs
        for answer in decode_all(order, intensity, limits, workers=min(workers or _cores(), max(1, len(jobs)))):
            done += 1
            if progress is not None:
                progress(done, n)
            if _keep(answer, notes, drop_blank=config.drop_blank):
                table.take(answer, row_id)
                pixels.write(answer.key, answer.square)
        kept = np.flatnonzero(table.kept)
        dtype = pixels.finish(kept)
        _write_private(
            building / "rows.npz",
            lambda file: np.savez(
                file,
                extent=table.extent[kept],
                row_id=row_id[kept],
                pixel_digest=table.pixel_digest[kept],
                source=kept.astype(np.int64),
            ),
        )
        identity = hashlib.sha256(pipeline_digest(intensity).encode() + row_id[kept].astype("<u8").tobytes())
        meta = {
            "format": FORMAT,
            "shape": [len(kept), intensity.channels, side, side],
            "dtype": dtype.name,
            "digest": identity.hexdigest(),
            "rows": hashlib.sha256((building / "rows.npz").read_bytes()).hexdigest(),
            "facts": table.facts(),
            "findings": notes.told(table.mixed(intensity.channels)),
        }
        _write_private(building / "meta.json", lambda file: file.write(json.dumps(meta).encode()))
        _sync(building)
        try:
            building.rename(place)
        except OSError:
            if not (place / "meta.json").exists():  # else another process was faster, with the same content
                raise
    finally:
        if pixels is not None:
            pixels.file.close()
        shutil.rmtree(building, ignore_errors=True)


def _keep(answer: Answer, notes: _Notes, *, drop_blank: bool) -> bool:
    """Note what there is to say of an answer; whether its image goes into the store."""
    if answer.fault is not None:
        notes.add(answer.fault.code, "skipped" if answer.fault.skip else "left out", answer.fault.reason, answer.key)
        return False
    if answer.blank and drop_blank:
        notes.add("I9", "left out", "blank (every pixel has the same value)", answer.key)
        return False
    if answer.blank:
        notes.add(
            "I9", "warning", "blank (every pixel has the same value); --data.drop_blank leaves it out", answer.key
        )
    for code, text in answer.notes:
        notes.add(code, "warning", text, answer.key)
    return True


class _Notes:
    """What was said of which images: one entry a sentence, so that 400 files without a codec are one line."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, str], list[int]] = {}

    def add(self, code: str, severity: str, text: str, position: int) -> None:
        self.found.setdefault((code, severity, text), []).append(position)

    def told(self, more: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        order = ("left out", "skipped", "warning")
        entries = [
            {"code": code, "severity": severity, "text": text, "positions": sorted(positions)}
            for (code, severity, text), positions in self.found.items()
        ]
        return sorted(entries, key=lambda e: (order.index(e["severity"]), e["positions"][0])) + list(more)


class _Rows:
    """What is known of each image but its pixels, by position in the input."""

    def __init__(self, n: int) -> None:
        self.kept = np.zeros(n, dtype=bool)
        self.extent = np.zeros((n, 4), dtype=np.int32)
        self.pixel_digest = np.zeros(n, dtype=np.uint64)
        self.colour = np.zeros(n, dtype=bool)
        self.windows: Counter[str] = Counter()

    def take(self, answer: Answer, row_id: UInt64[np.ndarray, " n"]) -> None:
        position = answer.key
        self.kept[position] = True
        self.extent[position] = answer.extent
        self.pixel_digest[position] = row_id[position] if answer.blank else answer.pixel_digest
        self.colour[position] = answer.colour
        self.windows[answer.window] += 1

    def facts(self) -> dict[str, dict[str, int]]:
        colour = int(self.colour.sum())
        counts = {"colour": colour, "grey": int(self.kept.sum()) - colour}
        return {"window": dict(sorted(self.windows.items())), "channels": counts}

    def mixed(self, channels: int) -> list[dict[str, Any]]:
        colour, grey = np.flatnonzero(self.colour), int(self.kept.sum() - self.colour.sum())
        if not len(colour) or (not grey and channels == 3):
            return []
        done = "colour becomes luminance" if channels == 1 else "grey is repeated"
        text = f"{counted(len(colour), 'image')} colour, {grey:,} grey; --intensity.channels {channels}: {done}"
        return [{"code": "I16", "severity": "warning", "text": text, "positions": colour.tolist()}]


class _Pixels:
    """The pixel file while it grows: 8 bits a value until the first image that needs 16."""

    def __init__(self, folder: Path, n: int, channels: int, side: int) -> None:
        self.folder, self.n = folder, n
        self.values = channels * side * side
        self.dtype: np.dtype[Any] = np.dtype(np.uint8)
        self.written: list[int] = []
        self.file = _open_private(folder / "pixels.bin")

    def write(self, position: int, square: np.ndarray | None) -> None:
        if square is None:
            return
        if square.dtype == np.uint16 and self.dtype == np.uint8:
            self._widen()
        self.file.seek(position * self.values * self.dtype.itemsize)
        self.file.write((square if self.dtype == np.uint8 else widen(square)).tobytes())
        self.written.append(position)

    def _widen(self) -> None:
        wide = _open_private(self.folder / "wide.bin")
        for position in sorted(self.written):
            row = np.frombuffer(self._row(position), dtype=np.uint8)
            wide.seek(position * self.values * 2)
            wide.write(widen(row).tobytes())
        self.file.close()
        wide.close()
        (self.folder / "wide.bin").replace(self.folder / "pixels.bin")
        self.file, self.dtype = (self.folder / "pixels.bin").open("r+b"), np.dtype(np.uint16)

    def _row(self, position: int) -> bytes:
        size = self.values * self.dtype.itemsize
        self.file.seek(position * size)
        return self.file.read(size)

    def finish(self, kept: Int64[np.ndarray, " k"]) -> np.dtype[Any]:
        """Move the rows together over the gaps of what was left out, and write everything to the disk."""
        size = self.values * self.dtype.itemsize
        for to, position in enumerate(kept.tolist()):
            if to != position:  # to < position: nothing that is still needed is overwritten
                row = self._row(position)
                self.file.seek(to * size)
                self.file.write(row)
        self.file.truncate(len(kept) * size)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.dtype


# Folder --------------------------------------------------------------------------------------------------------------


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


def _open_private(path: Path) -> BinaryIO:
    """A new file that its owner alone can read."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600), "w+b")


def _write_private(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    with _open_private(path) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

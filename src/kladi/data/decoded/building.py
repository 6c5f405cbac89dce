"""Decoding into a store that is not there yet: the pixel file while it grows, the rows, and what was said of them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64, UInt64

from kladi import config as settings
from kladi.data.decoded.content import FORMAT, Content, cores, pipeline_digest
from kladi.data.decoded.decoder import Answer, Job, decode_all
from kladi.data.findings import counted
from kladi.data.pixels.frame import Limits
from kladi.data.pixels.intensity import store_side, widen
from kladi.errors import RunStopped

JOBS_A_CHILD = 16
"""A further child is worth its start from so many images on."""


def decode_into(
    names: Sequence[str],
    frames: Sequence[int],
    contents: Sequence[Content],
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
        children = min(workers or cores(), 1 + len(jobs) // JOBS_A_CHILD)
        for answer in decode_all(order, intensity, limits, workers=children):
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
        self.kinds: Counter[str] = Counter()
        self.bits: Counter[str] = Counter()

    def take(self, answer: Answer, row_id: UInt64[np.ndarray, " n"]) -> None:
        position = answer.key
        self.kept[position] = True
        self.extent[position] = answer.extent
        self.pixel_digest[position] = row_id[position] if answer.blank else answer.pixel_digest
        self.colour[position] = answer.colour
        self.windows[answer.window] += 1
        self.kinds[answer.kind] += 1
        if answer.square is not None:
            self.bits[f"{8 * answer.square.dtype.itemsize}-bit"] += 1

    def facts(self) -> dict[str, dict[str, int]]:
        colour = int(self.colour.sum())
        found = {"format": self.kinds, "bits": self.bits, "window": self.windows}
        counts = {"colour": colour, "grey": int(self.kept.sum()) - colour}
        return {**{name: dict(sorted(counter.items())) for name, counter in found.items()}, "channels": counts}

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

"""The state of a run on disk: safetensors and JSON, whole or not there, and enough of it to go on to the same bits.

    checkpoints/step-00012000/
        model.safetensors   the encoder, plain timm keys
        train.safetensors   projector, prototypes, optimiser moments: every other tensor, by name
        state.json          step, epoch, seed, digests of configuration and data, collapse monitor
        manifest.json       written last: SHA-256 and size of the three; without it the folder does not exist for us
    checkpoints/latest.json

A save goes into `checkpoints/.tmp-<pid>-<step>`, every file is pushed to the disk, `manifest.json` comes last, then the
folder is renamed to its final name, read back and verified; only then are older ones deleted. A process that is killed
at any instant leaves the old checkpoint or the new one, and at most a `.tmp-` folder that the next start removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from kladi.errors import RunStopped, UserError
from kladi.learn import lock
from kladi.models import weights
from kladi.models.weights import Promise

FORMAT, VERSION = "kladi-checkpoint", 1
KEEP = 2
FILES = ("model.safetensors", "train.safetensors", "state.json")
MAX_JSON = 10 * 2**20
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Snapshot:
    """All that a run is at one step.

    model: the encoder's tensors, timm's names. train: every other tensor. state: plain values, with "step".
    """

    model: Mapping[str, Tensor]
    train: Mapping[str, Tensor]
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def size(self) -> int:
        """Bytes on disk, a little too many."""
        tensors = [*self.model.values(), *self.train.values()]
        return sum(t.numel() * t.element_size() for t in tensors) + 300 * len(tensors) + 2**16


@dataclass(frozen=True)
class Found:
    """The newest intact checkpoint of a run, and what had to be passed over to get there, one sentence each."""

    folder: Path
    state: Mapping[str, Any]
    notices: tuple[str, ...] = field(default=())


def save(run: Path, snapshot: Snapshot, keep: int = KEEP) -> Path:
    """Write a checkpoint, verify it, then delete all but the newest `keep`.

    Raises:
        RunStopped: the disk refuses or does not give back what was written; the older checkpoints are then intact.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{snapshot.step:08d}"
    temporary = folder / f".tmp-{os.getpid()}-{snapshot.step}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        _write_folder(temporary, snapshot)
        if final.exists():
            raise RunStopped(f"{final.name} exists already; a checkpoint is never written over")
        temporary.rename(final)
        weights.sync_folder(folder)
        verify(final)
        _name_latest(final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunStopped(_no_space(run, snapshot, error)) from error
    except Broken as error:
        _remove(final)
        raise RunStopped(f"the disk did not keep the checkpoint of step {snapshot.step:,} ({error})") from error
    _forget_old(run, keep)
    return final


def exist(run: Path) -> bool:
    """Whether any checkpoint was ever written, intact or not."""
    return bool(_folders(run))


def newest(run: Path) -> Found | None:
    """The newest checkpoint whose files are all there and as they were written; None where none was ever written.

    Raises:
        UserError: there are checkpoints, and none of them is intact (each is named with its fault), or the newest was
            written by a newer kladi.
    """
    faults: list[str] = []
    for folder in reversed(_folders(run)):
        try:
            verify(folder)
            return Found(folder, read_state(folder), tuple(faults))
        except Broken as error:
            faults.append(f"{folder.name} is not intact ({error})")
    if faults:
        raise UserError(f"{run}: no checkpoint can be used: {'; '.join(faults)}; start anew in another folder")
    return None


def last_good(run: Path) -> str:
    """`last good checkpoint step-00000100`, to end a message with."""
    try:
        found = newest(run)
    except UserError:
        found = None
    return f"last good checkpoint {found.folder.name}" if found else "no checkpoint was written before"


def read(folder: Path, model: Mapping[str, Promise], train: Mapping[str, Promise] | None = None) -> Snapshot:
    """A checkpoint's tensors, after its headers were compared with what this configuration builds.

    Args:
        folder: one that `newest` named.
        model: names, dtypes and shapes of the encoder.
        train: those of everything else; None reads what there is (an optimiser that has not stepped has no moments).

    Raises:
        UserError: another architecture (the first difference is named), or damaged.
    """
    try:
        return Snapshot(
            weights.read(folder / "model.safetensors", model),
            weights.read(folder / "train.safetensors", train),
            read_state(folder),
        )
    except UserError as error:
        raise UserError(
            f"--resume: this configuration builds another model than the checkpoint holds: {error}"
        ) from error


def headers(folder: Path) -> dict[str, Promise]:
    """The table of `train.safetensors`."""
    return weights.header(folder / "train.safetensors")


class Broken(Exception):
    """A checkpoint folder that does not exist for us; the text says why."""


def verify(folder: Path) -> None:
    """Size and SHA-256 of each file against `manifest.json`.

    Raises:
        Broken: anything is missing or differs.
        UserError: a newer kladi wrote it.
    """
    listed = _json(folder / "manifest.json")
    if listed.get("format") != FORMAT:
        raise Broken("manifest.json is not one of kladi's")
    if not isinstance(listed.get("version"), int) or listed["version"] > VERSION:
        raise UserError(
            f"{folder.name} is of version {listed.get('version')}; this kladi reads up to {VERSION}: "
            "pip install --upgrade kladi"
        )
    files = listed.get("files")
    if not isinstance(files, dict) or set(files) != set(FILES) or not all(isinstance(f, dict) for f in files.values()):
        raise Broken("manifest.json does not list the three files")
    for name in FILES:
        size, digest = _measured(folder / name)
        if size != files[name].get("size"):
            raise Broken(f"{name} has {size:,} bytes instead of {files[name].get('size')}")
        if digest != files[name].get("sha256"):
            raise Broken(f"{name} has changed since it was written")


def read_state(folder: Path) -> dict[str, Any]:
    """state.json.

    Raises:
        Broken: it is damaged.
    """
    state = _json(folder / "state.json")
    if state.get("step") != _step(folder):
        raise Broken("state.json is of another step than its folder's name")
    return state


def settle(run: Path, chosen: Path, keep: int = KEEP) -> None:
    """Bring the folder to the state that an undisturbed save of `chosen` leaves: a process may have died just before.

    Broken checkpoints after it are removed, so that their names are free again. Only for the holder of the run's lock.
    """
    for later in _folders(run):
        if _step(later) > _step(chosen):
            _remove(later)
    _name_latest(chosen)
    _forget_old(run, keep)


def clean(run: Path) -> list[str]:
    """Remove what dead processes left half done; returns its names. Only the holder of the run's lock may call this."""
    folder = run / "checkpoints"
    removed = []
    for left in sorted([*folder.glob(".tmp-*"), *run.glob(".tmp-*")]):
        pid = left.name.split("-")[1]
        if not pid.isdigit() or int(pid) == os.getpid() or not lock.alive(int(pid)):
            _remove(left)
            removed.append(left.name)
    return removed


def check_space(run: Path, snapshot: Snapshot, keep: int = KEEP) -> None:
    """Room for the checkpoints that will lie beside each other, and for the encoder, before the first step is made.

    Raises:
        RunStopped: with the bytes needed and the bytes there are, or because the folder cannot be written.
    """
    needed = snapshot.size() * (keep + 2)
    try:
        free = shutil.disk_usage(run).free
        probe = run / f".tmp-{os.getpid()}-probe"  # a killed process leaves nothing that `clean` does not know
        weights.write(probe, b"probe")
        probe.unlink()
    except OSError as error:
        raise RunStopped(f"the folder cannot be written ({error.strerror})") from error
    if free < needed:
        raise RunStopped(f"checkpoints need {needed:,} bytes, {free:,} are free; nothing was trained")


def _write_folder(folder: Path, snapshot: Snapshot) -> None:
    folder.mkdir(mode=0o700)
    contents: dict[str, Callable[[], bytes]] = {
        "model.safetensors": lambda: weights.to_bytes(snapshot.model, {"format": "pt"}),
        "train.safetensors": lambda: weights.to_bytes(snapshot.train),
        "state.json": lambda: (json.dumps(snapshot.state, indent=1, sort_keys=True) + "\n").encode(),
    }
    files = {}
    for name, content in contents.items():
        raw = content()
        weights.write_new(folder / name, raw)
        files[name] = {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
    listed = json.dumps({"format": FORMAT, "version": VERSION, "files": files}, indent=1, sort_keys=True)
    weights.write_new(folder / "manifest.json", listed.encode())
    weights.sync_folder(folder)


def _name_latest(folder: Path) -> None:
    latest = json.dumps({"checkpoint": folder.name, "step": _step(folder)})
    weights.write(folder.parent / "latest.json", latest + "\n")


def _forget_old(run: Path, keep: int) -> None:
    for old in _folders(run)[:-keep]:
        _remove(old)


def _folders(run: Path) -> list[Path]:
    """Folders that bear a checkpoint's name, oldest step first."""
    folder = run / "checkpoints"
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _remove(path: Path) -> None:
    """Delete a folder under a name that is no checkpoint's, so that half a deletion is never taken for one."""
    if path.is_dir() and not path.is_symlink():
        doomed = path.with_name(f".tmp-{os.getpid()}-old-{path.name}") if not path.name.startswith(".tmp-") else path
        if doomed != path:
            path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _measured(path: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise Broken(f"{path.name} cannot be read ({error.strerror})") from error
    return size, digest.hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON:
            raise Broken(f"{path.name} is too large")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Broken(f"{path.name} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise Broken(f"{path.name} is damaged") from error
    if not isinstance(content, dict):
        raise Broken(f"{path.name} is no table")
    return content


def _no_space(run: Path, snapshot: Snapshot, error: OSError) -> str:
    try:
        free = f"{shutil.disk_usage(run).free:,} are free"
    except OSError:
        free = "the folder cannot be asked for its space"
    return (
        f"the checkpoint of step {snapshot.step:,} could not be written ({error.strerror or error}); "
        f"it needs {snapshot.size():,} bytes, {free}; {last_good(run)}"
    )

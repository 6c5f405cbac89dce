"""One process a run folder: `RUN/lock`, created exclusively, with the holder's process id and host in it."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kladi.errors import RunStopped, UserError


@contextmanager
def held(run: Path, force: bool = False) -> Generator[None]:
    """Hold the lock of a run folder for the length of a `with` block.

    A lock whose process is dead on this host is taken over; one of another host only by `force`, because nobody here
    can tell whether that host still works.

    Raises:
        UserError: another process holds it (names process and host).
        RunStopped: the folder cannot be written.
    """
    path = run / "lock"
    mine = json.dumps(_myself())
    for _ in range(10):
        try:
            _create(path, mine)
            break
        except FileExistsError:
            _displace(path, force)
        except OSError as error:
            raise RunStopped(f"{run} cannot be written ({error.strerror})") from error
    else:
        raise UserError(f"{run}: other processes keep taking its lock")
    try:
        yield
    finally:
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """Whether a process of this number exists on this host."""
    if sys.platform == "win32":
        return True  # os.kill ends a process there; a stale lock is then removed by hand
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return not _is_zombie(pid)


def _create(path: Path, content: str) -> None:
    """Create the lock with its content in one step, so that no killed process leaves an empty one.

    Raises:
        FileExistsError: it is there already.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-lock")
    temporary.write_text(content, encoding="utf-8")
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    finally:
        temporary.unlink(missing_ok=True)


def _displace(path: Path, force: bool) -> None:
    """Remove a lock whose holder is gone; refuse where it is not."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, which kladi never makes; remove it")
    content = _read(path)
    if content is None:
        return  # the holder has just left
    try:
        holder: dict[str, Any] = json.loads(content)
        pid, host = int(holder["pid"]), str(holder["host"])
        gone = _gone(holder, pid, host)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        if not force:
            raise UserError(f"{path} is damaged; if no other process works there: --force-unlock") from error
    else:
        if not gone and not force:
            raise UserError(
                f"{path.parent} is in use by process {pid} on {host}"
                + ("" if host == platform.node() else "; if that machine is gone: --force-unlock")
            )
    # Rename first: of two processes that both saw the same dead holder, one wins, and a lock that was meanwhile taken
    # by a living process is put back.
    aside = path.with_name(f".tmp-{os.getpid()}-lock")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != content:
        aside.rename(path)
        return
    aside.unlink(missing_ok=True)


def _gone(holder: dict[str, Any], pid: int, host: str) -> bool:
    """Dead on this host: no such process, or the machine was started again since, or the number went to another."""
    if host != platform.node():
        return False
    me = _myself()
    if holder.get("boot") != me["boot"] or not alive(pid):
        return True
    return holder.get("started") != _started(pid)


def _myself() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "host": platform.node(), "boot": _boot(), "started": _started(pid)}


def _boot() -> str:
    """Changes whenever the machine starts; "" where the system does not tell."""
    return (_read(Path("/proc/sys/kernel/random/boot_id")) or "").strip()


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; "" where the system does not tell. Tells apart reused numbers."""
    stat = _read(Path(f"/proc/{pid}/stat"))
    return stat.rpartition(")")[2].split()[19] if stat else ""


def _is_zombie(pid: int) -> bool:
    stat = _read(Path(f"/proc/{pid}/stat"))
    return bool(stat) and stat.rpartition(")")[2].split()[0] == "Z"


def _read(path: Path) -> str | None:
    """The text of a file, None where there is none; what is no UTF-8 is replaced, and then is no lock of ours."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError:
        return ""

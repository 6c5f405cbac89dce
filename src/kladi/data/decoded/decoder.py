"""Decoding in child processes: a decoder that crashes, or runs wild on a hostile file, takes that one file with it.

Each child answers over its own pipe, in order, one frame after another, so the file that killed it is known: it is the
first one without an answer. Questions and answers are one JSON line each, an answer followed by the pixels as bytes.
Plain subprocesses instead of `multiprocessing`, because that runs the user's script again in each child (a script
without a main guard would start itself for ever), sends pickles, and cannot say which file broke the pool.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kladi import config as settings
from kladi.data.pixels import decode
from kladi.data.pixels.frame import Limits, Opened, Unreadable
from kladi.data.pixels.intensity import fit, store_side
from kladi.errors import RunStopped

PATIENCE = 60.0
"""Seconds without an answer after which a decoder is taken for hung, and its file left out."""
AHEAD = 4
"""Frames that a child is told of before it has answered: it never waits for the parent."""
_START = (
    "import sys; sys.path[:0] = {path!r}; sys.path += {rest!r}; from kladi.data.decoded.decoder import serve; serve()"
)
"""path: where this package lies. rest: the parent's path, at the end, lest a script's folder shadow a library."""


@dataclass(frozen=True)
class Job:
    """One frame of one file. `key` comes back with the answer; jobs of one file should follow each other."""

    key: int
    path: str
    frame: int


@dataclass(frozen=True)
class Answer:
    """What became of a job: `square` [C, S, S] and what goes with it, or `fault`."""

    key: int
    fault: Unreadable | None = None
    square: np.ndarray | None = None
    extent: tuple[int, int, int, int] = (0, 0, 0, 0)
    pixel_digest: int = 0
    colour: bool = False
    blank: bool = False
    window: str = ""
    kind: str = ""
    notes: tuple[tuple[str, str], ...] = ()


def decode_all(
    jobs: Iterable[Job], intensity: settings.Intensity, limits: Limits, *, workers: int, patience: float = PATIENCE
) -> Iterator[Answer]:
    """An `Answer` for every job, in the order in which they come, from `workers` child processes.

    A child that dies is replaced. The job it died on gets a second child to itself, as the death may have another cause
    (the kernel needing memory); dying again, or no answer within `patience` seconds, leaves it out.

    Raises:
        RunStopped: no child can be started at all.
    """
    answers: queue.Queue[Answer | BaseException | None] = queue.Queue(maxsize=64)
    lock, stop = threading.Lock(), threading.Event()
    files = itertools.groupby(jobs, key=lambda job: job.path)

    def next_file() -> list[Job]:
        """All frames of one file go to one child, which opens it once."""
        with lock:
            return [] if stop.is_set() else list(next(files, ("", []))[1])

    lanes = [_Lane(next_file, answers, intensity, limits, patience, stop) for _ in range(max(1, workers))]
    for lane in lanes:
        lane.thread.start()
    open_lanes, looked = len(lanes), time.monotonic()
    try:
        while open_lanes:
            if time.monotonic() - looked > 1.0:
                looked = time.monotonic()
                for lane in lanes:
                    lane.end_if_hung()
            try:
                answer = answers.get(timeout=1.0)
            except queue.Empty:
                continue
            if answer is None:
                open_lanes -= 1
            elif isinstance(answer, BaseException):
                raise answer
            else:
                yield answer
    finally:
        stop.set()
        for lane in lanes:
            lane.kill()
        while any(lane.thread.is_alive() for lane in lanes):  # a lane may wait for room in the queue
            with contextlib.suppress(queue.Empty):
                answers.get(timeout=0.01)


class _Lane:
    """One child and the thread that talks to it."""

    def __init__(
        self,
        next_file: Callable[[], list[Job]],
        answers: queue.Queue[Answer | BaseException | None],
        intensity: settings.Intensity,
        limits: Limits,
        patience: float,
        stop: threading.Event,
    ):
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.next_file, self.answers, self.stop = next_file, answers, stop
        self.hello = json.dumps({"intensity": dataclasses.asdict(intensity), "limits": dataclasses.asdict(limits)})
        self.patience = patience
        self.child: subprocess.Popen[bytes] | None = None
        self.waiting_since: float | None = None
        self.hung = False

    def run(self) -> None:
        try:
            self._talk()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that consumes the answers
            self.answers.put(error)
        finally:
            self.kill()
            self.answers.put(None)

    def _talk(self) -> None:
        told: deque[Job] = deque()  # jobs that the child knows of, oldest first
        untold: deque[Job] = deque()
        second_try: Job | None = None
        while not self.stop.is_set():
            while second_try is None and len(told) < AHEAD:
                if not untold:
                    untold.extend(self.next_file())
                if not untold:
                    break
                told.append(untold.popleft())
                self._send(told[-1])
            if not told:
                return
            try:
                answer = self._receive(told[0])
            except (OSError, EOFError, ValueError):
                if self.stop.is_set():
                    return
                how, hung = self._bury()
                if hung or second_try is told[0]:
                    self.answers.put(Answer(told.popleft().key, fault=Unreadable(how, "D15")))
                    second_try = None
                else:
                    second_try = told[0]
                for job in told:
                    self._send(job)
                continue
            if told.popleft() is second_try:
                second_try = None
            self.answers.put(answer)

    def _bury(self) -> tuple[str, bool]:
        """How the child ended, in words, and whether we ended it for being hung; the next `_send` starts another."""
        child, hung = self.child, self.hung
        code: int | None = None
        if child is not None and not hung:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(timeout=5.0)
        self.kill()
        self.child, self.hung = None, False
        if hung:
            return f"the decoder gave no answer in {self.patience:.0f} s and was ended", True
        how = "without an answer" if code is None else f"signal {-code}" if code < 0 else f"exit {code}"
        return f"the decoder died on it ({how})", False

    def _send(self, job: Job) -> None:
        child = self.child or self._start()
        line = json.dumps([job.path, job.frame]).encode("ascii") + b"\n"
        with contextlib.suppress(OSError):  # a dead child is noticed, with its file, when its answer is read
            _pipe(child.stdin).write(line)
            _pipe(child.stdin).flush()

    def _start(self) -> subprocess.Popen[bytes]:
        code = _START.format(path=[str(Path(__file__).parents[3])], rest=[p for p in sys.path if p])
        # One thread a child: the children are the parallelism.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        child = subprocess.Popen(  # noqa: S603 - our own interpreter, no shell
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **threads},
        )
        self.child = child
        try:
            _pipe(child.stdin).write(self.hello.encode("ascii") + b"\n")
            _pipe(child.stdin).flush()
            ready = _pipe(child.stdout).readline()
        except OSError:
            ready = b""
        if ready != b"ready\n":
            child.kill()
            why = _pipe(child.stderr).read().decode("utf-8", "replace").strip().splitlines()
            self.kill()
            raise RunStopped(f"a decoder process cannot be started: {why[-1] if why else f'exit {child.returncode}'}")
        return child

    def _receive(self, job: Job) -> Answer:
        child = self.child or self._start()
        self.waiting_since = time.monotonic()
        try:
            line = _pipe(child.stdout).readline()
            if not line.endswith(b"\n"):
                raise EOFError
            told = json.loads(line)
            if "reason" in told:
                return Answer(job.key, fault=Unreadable(told["reason"], told["code"], skip=told["skip"]))
            shape, dtype = tuple(told.pop("shape")), np.dtype(told.pop("dtype"))
            raw = _pipe(child.stdout).read(int(np.prod(shape)) * dtype.itemsize)
            if len(raw) != np.prod(shape) * dtype.itemsize:
                raise EOFError
        finally:
            self.waiting_since = None
        notes = tuple((code, text) for code, text in told.pop("notes"))
        extent = tuple(told.pop("extent"))
        square = np.frombuffer(raw, dtype=dtype).reshape(shape)
        return Answer(job.key, square=square, extent=extent, notes=notes, **told)

    def end_if_hung(self) -> None:
        since, child = self.waiting_since, self.child
        if since is not None and child is not None and time.monotonic() - since > self.patience:
            self.hung = True
            child.kill()

    def kill(self) -> None:
        child = self.child
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _pipe(pipe: Any) -> BinaryIO:
    return pipe


def serve() -> None:
    """A child's life: read the pipeline, say ready, then answer jobs until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; it ends us by closing the pipe
    asked = sys.stdin.buffer
    # Decoders written in C print to descriptor 1 and 2, sometimes bits of the file: keep both away from the answers.
    answers = os.fdopen(os.dup(1), "wb")
    hello = json.loads(asked.readline())
    intensity = _intensity(hello["intensity"])
    limits = Limits(**hello["limits"])
    answers.write(b"ready\n")
    answers.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    open_path, opened = "", None
    for line in asked:
        path, frame = json.loads(line)
        if path != open_path:
            opened = _open(path, intensity, limits)
            open_path = path
        told, pixels = _answer(opened, frame, intensity)
        answers.write(json.dumps(told).encode("ascii") + b"\n")
        if pixels is not None:
            answers.write(pixels.tobytes())
        answers.flush()


def _intensity(values: dict[str, Any]) -> settings.Intensity:
    """JSON knows no tuples."""
    mean, std = tuple(values.pop("mean")), tuple(values.pop("std"))
    return settings.Intensity(**values, mean=mean, std=std)


def _open(path: str, intensity: settings.Intensity, limits: Limits) -> Opened | Unreadable:
    try:
        return decode.open_bytes(decode.read_bytes(path), intensity, limits, name=path)
    except Unreadable as fault:
        return fault


def _answer(
    opened: Opened | Unreadable | None, frame: int, intensity: settings.Intensity
) -> tuple[dict[str, Any], np.ndarray | None]:
    try:
        if opened is None or isinstance(opened, Unreadable):
            raise opened or Unreadable("no file")
        image = decode.read_frame(opened, frame, intensity)
        square, extent = fit(image.pixels, store_side(intensity.size))
    except Unreadable as fault:
        return {"reason": fault.reason, "code": fault.code, "skip": fault.skip}, None
    told = {
        "shape": square.shape,
        "dtype": square.dtype.str,
        "extent": extent.tolist(),
        "pixel_digest": digest_of(image.pixels),
        "colour": image.colour,
        "blank": image.blank,
        "window": image.window,
        "kind": image.kind,
        "notes": image.notes,
    }
    return told, square


def digest_of(pixels: np.ndarray) -> int:
    """64 bits of SHA-256 over decoded pixels and their shape: equal for copies of a picture in different files."""
    digest = hashlib.sha256(repr((pixels.shape, pixels.dtype.str)).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return int.from_bytes(digest.digest()[:8], "big")

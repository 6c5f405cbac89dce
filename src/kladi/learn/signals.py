"""What the outside asks of a running loop: TERM and INT stop it after saving, USR1 saves and lets it go on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


class Requests:
    """Read by the loop after each step.

    stop: number of the signal that asked to stop, or None. save: whether a checkpoint was asked for.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False

    def receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The handler. It only takes note: a step in progress is finished first. A second INT stops at once."""
        if number == getattr(signal, "SIGUSR1", None):
            self.save = True
        elif number == signal.SIGINT and self.stop == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self.stop = number

    def leave(self) -> None:
        """End the process's work as the signal asks: KeyboardInterrupt for INT (exit 130), SystemExit 143 for TERM."""
        if self.stop == signal.SIGINT:
            raise KeyboardInterrupt
        if self.stop is not None:
            raise SystemExit(128 + self.stop)


@contextmanager
def heard() -> Generator[Requests]:
    """Take note of signals for the length of a `with` block. Outside the main thread nothing is heard."""
    requests = Requests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    names = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), requests.receive) for name in names}
    try:
        yield requests
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


@contextmanager
def at_once() -> Generator[None]:
    """INT and TERM end the process without a word: for a wait in which no Python runs and nothing could be heard."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with(parent: int) -> None:
    """End this process soon after its parent was killed: it would go on holding the lock of a run, or wait for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="kladi-watch", daemon=True).start()

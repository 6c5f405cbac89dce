"""`metrics.jsonl`: one JSON object a line, one line a step; cut back to the saved step when a run is resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from kladi.models import weights


class Journal:
    """Appends lines to a file; a line is on its way to the disk when `write` returns, and there after `sync`.

    Opening it cuts the file back to the lines of `step` and before: what was written after the checkpoint that a run
    goes on from will be written again. Half a line at the end (a killed process) is dropped, and so are lines marked
    "at_stop", which an uninterrupted run would not have. `lost` counts the steps up to `step` that have no line.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        kept = [line for line in read(path) if line["step"] <= step and not line.get("at_stop")]
        weights.write(path, "".join(_text(line) for line in kept))
        self.path = path
        self.lost = step - len({line["step"] for line in kept if "loss" in line})
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; it has a "step"."""
        self._file.write(_text(line))
        self._file.flush()

    def epoch(self, number: int) -> list[dict[str, Any]]:
        """The lines of single steps of an epoch."""
        return [line for line in read(self.path) if line.get("epoch") == number and "loss" in line]

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; damaged ones (half written by a killed process) are left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"

"""What one cell measured, as a file: numbers, answers and row means, whole or not there, and never a pickle."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kladi.data.private_files import write_private
from kladi.evaluate.answers import Answers, RowMean
from kladi.evaluate.measure import Measured
from kladi.evaluate.record.results import Row

FORMAT, VERSION = "kladi-cell", 1


def write(path: Path, measured: Measured, digest: str) -> None:
    """Keep a cell under the digest of everything that it depends on."""
    arrays: dict[str, Any] = {}
    for number, answers in enumerate(measured.answers):
        for name in ("rows", "pred", "classes", "scores"):
            value = getattr(answers, name)
            if value is not None:
                arrays[f"answers/{number}/{name}"] = value
    for number, mean in enumerate(measured.means):
        for name in ("rows", "values", "counted"):
            arrays[f"means/{number}/{name}"] = getattr(mean, name)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "digest": digest,
        "rows": [row.to_dict() for row in measured.rows],
        "answers": [_named(a, ("method", "regime", "fold", "repeat")) for a in measured.answers],
        "means": [_named(m, ("method", "regime", "metric", "fold", "repeat")) for m in measured.means],
        "warnings": measured.warnings,
    }
    arrays["about"] = np.array(json.dumps(about, ensure_ascii=False))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_private(path, buffer.getvalue())


def read(path: Path, digest: str) -> Measured | None:
    """The cell, or None where there is none, it is damaged, or it was measured under another digest."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays["about"]))
        if (about["format"], about["version"], about["digest"]) != (FORMAT, VERSION, digest):
            return None
        return Measured(
            rows=[Row(**row) for row in about["rows"]],
            answers=[
                Answers(**named, **_arrays(arrays, f"answers/{i}/", ("rows", "pred", "classes", "scores")))
                for i, named in enumerate(about["answers"])
            ],
            means=[
                RowMean(**named, **_arrays(arrays, f"means/{i}/", ("rows", "values", "counted")))
                for i, named in enumerate(about["means"])
            ],
            warnings=list(about["warnings"]),
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None  # half a file of a killed process is a cell that was never measured


def _arrays(arrays: Mapping[str, Any], prefix: str, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: arrays.get(prefix + name) for name in names}


def _named(value: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}

"""results.json: the one file from which tables, figures and reports are made, and its twin results.csv.

Sorted keys, no NaN (null with a reason), floats by repr, a digest over everything but the clock. It never holds pixels,
paths or raw ids.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kladi.data.private_files import write_private
from kladi.errors import UserError

FORMAT, VERSION = "kladi-results", 1
SECTIONS = {
    "study": dict,
    "provenance": dict,
    "data": dict,
    "splits": dict,
    "methods": list,
    "rows": list,
    "comparisons": list,
    "monitors": list,
    "diagnostics": list,
    "figures": dict,
}
TIME_FIELDS = frozenset(
    {"digest", "started", "finished", "wall_seconds", "cpu_seconds", "images_per_second", "peak_memory", "cost"}
)
"""Left out of the digest: the same seed on a busier machine is the same result."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Row:
    """One number, with everything that says what it is a number of. `value` None needs a `reason`.

    n: items that entered the value; n_patients: their patients.
    """

    method: str
    regime: str
    dataset: str
    metric: str
    value: float | None
    n: int
    n_patients: int
    fold: int = 0
    repeat: int = 0
    seed: int = 0
    label_fraction: float = 1.0
    shift: str = ""
    reason: str = ""
    config_digest: str = ""
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As results.json holds it: nan and infinity become null, and null always says why."""
        content = dataclasses.asdict(self)
        if self.value is None or not math.isfinite(self.value):
            content["value"] = None
            content["reason"] = self.reason or "undefined"
        else:
            content["value"] = float(self.value)
        return content


KEY = ("method", "regime", "dataset", "fold", "repeat", "seed", "label_fraction", "shift", "metric")
COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def assemble(rows: Sequence[Row], **sections: Any) -> dict[str, Any]:
    """A whole results dictionary: `rows` and the sections of evaluation, missing ones empty, with its digest.

    Raises:
        ValueError: an unknown section, a key that occurs twice among the rows, or a number that is not finite.
        TypeError: a section of the wrong kind.
    """
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "rows": [row.to_dict() for row in rows]}
    for name, value in sections.items():
        if name not in SECTIONS or name == "rows":
            raise ValueError(f"results have no section {name!r}")
        content[name] = value
    for name, kind in SECTIONS.items():
        content.setdefault(name, kind())
        if not isinstance(content[name], kind):
            raise TypeError(f"section {name!r} of the results is a {kind.__name__}")
    content["rows"].sort(key=_key)
    keys = [_key(row) for row in content["rows"]]
    twice = {key for key, following in itertools.pairwise(keys) if key == following}
    if twice:
        raise ValueError(f"a row occurs twice: {sorted(twice)[0]}")
    plain = json.loads(_dumps(content))
    plain["digest"] = digest(plain)
    return plain


def digest(results: Mapping[str, Any]) -> str:
    """SHA-256 of everything but the time fields and the digest itself."""
    return hashlib.sha256(_dumps(_timeless(results)).encode()).hexdigest()


def write(results: Mapping[str, Any], folder: Path) -> Path:
    """`results.json` and `results.csv` in `folder`, mode 0600; returns the path of the first.

    Raises:
        ValueError: a number that is not finite.
    """
    path = folder / "results.json"
    write_private(path, (_dumps(results, indent=1) + "\n").encode())
    write_private(folder / "results.csv", to_csv(results["rows"]).encode())
    return path


def read(path: Path) -> dict[str, Any]:
    """The results in a folder or file.

    Raises:
        UserError: no such file, no results of this version, or a digest that does not match the content.
    """
    file = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); kladi evaluate writes it") from error
    except ValueError as error:
        raise UserError(f"{file}: not a JSON file") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{file}: not results that kladi wrote")
    if content.get("version") != VERSION:
        raise UserError(f"{file}: version {content.get('version')} of the results; this kladi reads version {VERSION}")
    if content.get("digest") != digest(content):
        raise UserError(f"{file}: its content does not match its digest; somebody changed it")
    return content


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV. A text that a spreadsheet would run as a formula gets a leading quote."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_cell(row[name]) for name in COLUMNS])
    return out.getvalue()


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    return repr(value)


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _timeless(item) for key, item in value.items() if key not in TIME_FIELDS}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_timeless(item) for item in value]
    return value


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False, indent=indent)

"""One metadata column: cell texts -> sets of values, once per distinct cell."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from kladi.errors import UserError, suggestion
from kladi.structure.synonyms import RUNGS, UNKNOWN, Synonyms, normal
from kladi.structure.taxonomy import Taxonomy

_INDICATOR = {"1": "1", "1.0": "1", "0": "", "0.0": "", "-1": None, "-1.0": None}
"""Cells of an indicator column: has it, has it not (known, and empty), uncertain (unknown)."""


@dataclass(frozen=True)
class Reading:
    """What became of the cells of one column.

    cell: int64[n], which of the distinct cells each row holds.
    values: for each distinct cell its values; empty: known, and none of them.
    known: for each distinct cell, whether it says anything.
    rung: for each distinct cell, where it landed (`synonyms.RUNGS`).
    unmapped: for each distinct cell the text that no synonym fits, "" where there is none.
    phantom: for each distinct cell, whether it speaks of a phantom, which is no patient.
    """

    cell: Int64[np.ndarray, " n"]
    values: tuple[frozenset[str], ...]
    known: tuple[bool, ...]
    rung: tuple[str, ...]
    unmapped: tuple[str, ...]
    phantom: tuple[bool, ...]


@dataclass(frozen=True)
class _Meaning:
    values: frozenset[str]
    known: bool
    rung: str
    unmapped: str = ""


def read(
    name: str,
    cells: Iterable[object],
    *,
    synonyms: Synonyms,
    taxonomy: Taxonomy | None = None,
    unmapped: str = "own",
    loose: bool = False,
    rungs: Sequence[str | None] | None = None,
) -> Reading:
    """Read a column; case, Unicode form and blanks at the ends do not matter. Several values: `a|b` or a JSON list.

    A column of nothing but 1, 0, -1 and blanks is an indicator: 1 is a value, 0 is known and empty, the rest unknown.

    Args:
        synonyms: its table for a column of this name is used; without one the words are the values.
        taxonomy: a value that is a node (by name, or by the last part of its path if that is unique) stands for itself
            and its ancestors.
        unmapped: a value that is neither: "own" (becomes a value itself), "unknown", or "error".
        loose: rung 4 of the ladder.
        rungs: for each row where it landed before it came here (DICOM tags); a row of rung "conflict" is unknown.

    Raises:
        UserError: an unmapped value under "error", or an unknown rung.
    """
    texts, cell = _distinct(cells, rungs)
    has_values = {text for text, _ in texts if normal(text) not in UNKNOWN}
    reader = _Reader(name, synonyms, taxonomy, unmapped, loose)
    is_indicator = bool(has_values) and has_values <= _INDICATOR.keys()
    read_one = _indicator if is_indicator else reader.read
    meanings: list[_Meaning] = []
    for number, (text, given) in enumerate(texts):
        if given == "conflict":
            meanings.append(_Meaning(frozenset(), False, "conflict"))
            continue
        meaning = read_one(text)
        if meaning.unmapped and unmapped == "error":
            rows = np.flatnonzero(cell == number)
            shown = f'"{meaning.unmapped}"' if len(rows) >= 5 else "a value"  # a rare text may be somebody's name
            near = suggestion(meaning.unmapped, reader.vocabulary())
            raise UserError(f'column "{name}", row {rows[0] + 1}: {shown} is no known value{near}')
        meanings.append(_Meaning(meaning.values, meaning.known, given or meaning.rung, meaning.unmapped))
    return Reading(
        cell,
        tuple(m.values for m in meanings),
        tuple(m.known for m in meanings),
        tuple(m.rung for m in meanings),
        tuple(m.unmapped for m in meanings),
        tuple("phantom" in normal(text) for text, _ in texts),
    )


def _distinct(
    cells: Iterable[object], rungs: Sequence[str | None] | None
) -> tuple[list[tuple[str, str]], Int64[np.ndarray, " n"]]:
    """The distinct (text, given rung), and which one each row holds."""
    places: dict[tuple[str, str], int] = {}
    at: list[int] = []
    for row, value in enumerate(cells):
        given = (rungs[row] or "") if rungs is not None else ""
        if given and given not in RUNGS:
            raise UserError(f'rung "{given}" is none of {", ".join(RUNGS)}')
        at.append(places.setdefault(("" if value is None else str(value), given), len(places)))
    return list(places), np.array(at, dtype=np.int64)


def _indicator(text: str) -> _Meaning:
    value = _INDICATOR.get(normal(text))
    if value is None:
        return _Meaning(frozenset(), False, "unknown")
    return _Meaning(frozenset({value} - {""}), True, "own")


class _Reader:
    """Cell text -> meaning, for one column."""

    def __init__(self, name: str, synonyms: Synonyms, taxonomy: Taxonomy | None, unmapped: str, loose: bool) -> None:
        self.synonyms, self.unmapped, self.loose = synonyms, unmapped, loose
        self.attribute = synonyms.attribute(name)
        self.closures = {} if taxonomy is None else _closures(taxonomy)
        self.has_terms = self.attribute is not None or taxonomy is not None

    def vocabulary(self) -> set[str]:
        """The values that a cell may mean."""
        terms = self.synonyms.terms.get(self.attribute or "", {})
        return {value for values in terms.values() for value in values} | set(self.closures)

    def read(self, text: str) -> _Meaning:
        parts = [self._part(part) for part in _split(text)]
        values = frozenset[str]().union(*[part.values for part in parts])
        rung = max((part.rung for part in parts), key=RUNGS.index, default="unknown")
        first = next((part.unmapped for part in parts if part.unmapped), "")
        return _Meaning(values, bool(values), rung, first)

    def _part(self, text: str) -> _Meaning:
        term = normal(text)
        if term in UNKNOWN:
            return _Meaning(frozenset(), False, "unknown")
        if term in self.closures:
            return _Meaning(self.closures[term], True, "exact")
        if not self.has_terms:
            return _Meaning(frozenset({term}), True, "own")
        values, rung = frozenset[str](), "unmapped"
        if self.attribute is not None:
            values, rung = self.synonyms.look_up(self.attribute, term, loose=self.loose)
        if rung != "unmapped":
            closed = frozenset[str]().union(*[self.closures.get(value, frozenset({value})) for value in values])
            return _Meaning(closed, bool(closed), rung)
        own = frozenset({term}) if self.unmapped == "own" else frozenset[str]()
        return _Meaning(own, bool(own), "unmapped", term)


def _split(text: str) -> list[str]:
    """The values of a cell: `a|b`, or a JSON list, or the text itself."""
    if text.lstrip().startswith("["):
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError):
            return [text]
        return ["" if item is None else str(item) for item in listed]
    return text.split("|")


def _closures(taxonomy: Taxonomy) -> Mapping[str, frozenset[str]]:
    """Normal node name, or its last part where only one node ends so -> normal names of the node and its ancestors."""
    names = [normal(name) for name in taxonomy.names]
    closures: dict[str, frozenset[str]] = {}
    for node, name in enumerate(names):
        closures[name] = frozenset({name}).union(*[closures[names[p]] for p in taxonomy.parents[node]])
    last: dict[str, list[str]] = {}
    for name in names:
        last.setdefault(name.rpartition("/")[2], []).append(name)
    short = {part: closures[whole[0]] for part, whole in last.items() if len(whole) == 1}
    return {**short, **closures}

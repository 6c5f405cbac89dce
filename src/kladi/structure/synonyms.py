"""From what a cell says to canonical values: the shipped synonyms, the user's laid over them, and the ladder.

The ladder: (1) the exact term; (2) its compact form, letters and digits only; (3) a compound, all of whose parts map;
(4) loose: whole words, where all words that map agree; else unmapped.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from kladi.config import read_toml
from kladi.errors import UserError

RUNGS = ("exact", "compact", "compound", "loose", "own", "unknown", "unmapped", "conflict")
"""Where a cell landed. own: the column has no synonyms, its words are its values; unknown: the cell says that nothing
is known, or says nothing; unmapped: no synonym fits; conflict: two sources contradict each other."""

UNKNOWN = frozenset({"", "unknown", "unk", "undefined", "n/a", "na", "nan", "null", "?"})
"""Cells that say nothing, whatever the attribute. The word `none` is a value: someone looked."""

_PARTS = re.compile(r"[/_\-+&,()]| and | to ")
_WORDS = re.compile(r"[^\W_]+")


def normal(text: str) -> str:
    """Unicode NFKC, case folded, blanks trimmed and single: what terms are compared by."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def compact(text: str) -> str:
    """The letters and digits of a normal text: `chest abdomen`, `chest/abdomen` and `chestabdomen` are one."""
    return "".join(_WORDS.findall(normal(text)))


@dataclass(frozen=True)
class Synonyms:
    """The resolved map.

    terms: attribute -> normal term -> canonical values (none: the term says that nothing is known).
    part_of: attribute -> part -> whole.
    columns: compact column name -> attribute.
    """

    terms: Mapping[str, Mapping[str, frozenset[str]]] = field(default_factory=dict)
    part_of: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)

    def attribute(self, column: str) -> str | None:
        """The attribute whose terms serve a column of this name; None where there is none."""
        return self.columns.get(compact(column))

    def look_up(self, attribute: str, text: str, *, loose: bool = False) -> tuple[frozenset[str], str]:
        """Canonical values of a term and the rung it landed on (one of `RUNGS`); no values where nothing is known.

        Args:
            loose: also try single words (rung 4). Right for DICOM tags; a column was written with more care.
        """
        terms, compacts = self.terms.get(attribute, {}), self._compacts.get(attribute, {})
        term = normal(text)
        if term in UNKNOWN:
            return frozenset(), "unknown"
        found, rung = terms.get(term), "exact"
        if found is None:
            found, rung = compacts.get(compact(term)), "compact"
        if found is None:
            found, rung = _compound(term, terms, compacts), "compound"
        if found is None and loose:
            found, rung = _loose(term, terms), "loose"
        if found is None:
            return frozenset(), "unmapped"
        return (found, rung) if found else (found, "unknown")

    @cached_property
    def _compacts(self) -> dict[str, dict[str, frozenset[str]]]:
        return {
            name: {compact(term): values for term, values in terms.items() if compact(term)}
            for name, terms in self.terms.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries of the form of the TOML file, to be kept with a run; `overlay` reads them again."""
        tables: dict[str, Any] = {"columns": {}, "part_of": {}}
        for column, attribute in sorted(self.columns.items()):
            tables["columns"].setdefault(attribute, []).append(column)
        for attribute, terms in sorted(self.terms.items()):
            tables[attribute] = {}
            for term, values in sorted(terms.items()):
                tables[attribute].setdefault("|".join(sorted(values)), []).append(term)
        for attribute, parts in sorted(self.part_of.items()):
            tables["part_of"][attribute] = {}
            for part, whole in sorted(parts.items()):
                tables["part_of"][attribute].setdefault(whole, []).append(part)
        return tables


def _compound(
    term: str, terms: Mapping[str, frozenset[str]], compacts: Mapping[str, frozenset[str]]
) -> frozenset[str] | None:
    parts = [part.strip() for part in _PARTS.split(term) if part.strip()]
    found = [terms.get(part) or compacts.get(compact(part)) for part in parts]
    known = [values for values in found if values]
    return frozenset().union(*known) if len(parts) > 1 and len(known) == len(parts) else None


def _loose(term: str, terms: Mapping[str, frozenset[str]]) -> frozenset[str] | None:
    """Values of the words that map, if they agree. A word for "unknown" maps too, so `chest phantom` is nothing."""
    found = {terms[word] for word in _WORDS.findall(term) if word in terms}
    return found.pop() if len(found) == 1 else None


@lru_cache(maxsize=1)
def shipped() -> Synonyms:
    """The synonyms that come with the library."""
    text = resources.files("kladi.structure").joinpath("synonyms.toml").read_text(encoding="utf-8")
    return overlay(tomllib.loads(text), Synonyms())


def read(path: str | Path, base: Synonyms | None = None) -> Synonyms:
    """The shipped synonyms (or `base`) with those of a TOML file laid over them.

    Raises:
        UserError: the file cannot be read, is no TOML, or has another form; file and key are named.
    """
    tables = read_toml(path)
    try:
        return overlay(tables, base)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def overlay(tables: Mapping[str, Any], base: Synonyms | None = None) -> Synonyms:
    """`base` (the shipped synonyms) with tables `{attribute: {canonical: [variant, ...]}}` laid over it.

    Raises:
        UserError: a table of another form, or one variant under two canonical values.
    """
    base = shipped() if base is None else base
    terms = {attribute: dict(known) for attribute, known in base.terms.items()}
    part_of = {attribute: dict(parts) for attribute, parts in base.part_of.items()}
    columns = dict(base.columns)
    for attribute, table in tables.items():
        if attribute == "part_of":
            for name, wholes in _table(table, "part_of").items():
                for whole, parts in _lists(wholes, f"part_of.{name}").items():
                    part_of.setdefault(name, {}).update(dict.fromkeys(parts, whole))
        elif attribute == "columns":
            for name, names in _lists(table, "columns").items():
                columns.update(dict.fromkeys(map(compact, names), name))
        else:
            columns.setdefault(compact(attribute), attribute)
            terms.setdefault(attribute, {}).update(_terms(_lists(table, attribute), attribute))
    return Synonyms(terms, part_of, columns)


def _terms(table: Mapping[str, Sequence[str]], attribute: str) -> dict[str, frozenset[str]]:
    terms: dict[str, frozenset[str]] = {}
    meant = {text: frozenset(normal(value) for value in text.split("|") if value.strip()) for text in table}
    for canonical, variants in table.items():
        for variant in variants:
            if terms.setdefault(normal(variant), meant[canonical]) != meant[canonical]:
                raise UserError(f'{attribute}: "{variant}" stands under two values')
    for canonical, values in meant.items():  # a canonical value means itself, where no list says otherwise
        if len(values) == 1:
            terms.setdefault(normal(canonical), values)
    return terms


def _table(table: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: expected a table of canonical = [variants]")
    return table


def _lists(table: Any, where: str) -> dict[str, list[str]]:
    for key, words in _table(table, where).items():
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f'{where}: "{key}" must be a list of texts')
    return dict(table)

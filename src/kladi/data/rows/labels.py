"""The cells of the label column -> the text that becomes a node of the tree, each spelling decided once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import polars as pl

from kladi import config as settings
from kladi.data.findings import Finding, counted, listed, quoted
from kladi.errors import UserError
from kladi.structure.synonyms import UNKNOWN
from kladi.structure.taxonomy import Taxonomy

Knows = Callable[[str], bool]


def clean(label: pl.Series, row: pl.Series, data: settings.Data) -> tuple[pl.Series, list[Finding]]:
    """Labels as the tree spells them; null where there is none.

    Args:
        label: cells, trimmed, null where blank.
        row: manifest row of each, for the findings.
        data: `taxonomy` (a token such as "unknown" that is a node of it is a label) and `fold_case`.

    Text stays text: "0", "01", "None" are labels. A token that says "unknown" is none, with a warning. Blanks round a
    slash are trimmed. A label with an empty part (`a//b`) is an error. Several labels in a cell stay as they are.
    """
    tree = _once(data)
    counts = dict(label.drop_nulls().value_counts().iter_rows())
    unknown = [text for text in counts if text.casefold() in UNKNOWN and not tree(text)]
    given = {text: _without_blanks(text, tree) for text in counts if text not in set(unknown)}
    broken = [text for text, new in given.items() if any(not _is_whole(part) for part in parts(new)) and not tree(new)]
    meant = {text: new for text, new in given.items() if text not in set(broken)}
    if data.fold_case:
        meant = _folded(meant, counts, file_tree(data))
    found = []
    if unknown:
        rows = _rows(label, row, unknown)
        names = listed([quoted(text) for text in sorted(unknown)])
        found.append(
            Finding("M9", "warning", f"{counted(len(rows), 'row')} labelled {names}: taken as unlabelled", rows)
        )
    if broken:
        names = listed([quoted(text) for text in sorted(broken)])
        message = f"a label with an empty part between its slashes: {names}"
        found.append(Finding("M9", "error", message, _rows(label, row, broken)))
    old, new = list(counts), [meant.get(text) for text in counts]
    return label.replace_strict(old, new, default=None, return_dtype=pl.String), found


def parts(text: str) -> list[str]:
    """The labels of one cell: several are joined by "|" or written as a JSON list.

    >>> parts("a|b"), parts('["a", "b"]'), parts("a/b")
    (['a', 'b'], ['a', 'b'], ['a/b'])
    """
    if text.startswith("[") and text.endswith("]"):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):  # no JSON; a number of thousands of digits; a nesting bomb
            values = None
        if isinstance(values, list) and all(isinstance(value, str | int | float) for value in values):
            return [str(value).strip() for value in values]
    return [part.strip() for part in text.split("|")]


def prefixes(label: str) -> list[str]:
    """`a/b/c` -> a, a/b, a/b/c: the nodes that a label names."""
    names = label.split("/")
    return ["/".join(names[: depth + 1]) for depth in range(len(names))]


def file_tree(data: settings.Data) -> Taxonomy | None:
    """The label tree of the file that the settings name, None where they name none.

    Raises:
        UserError: the file is no label tree, has no such root, or a root is named without a file.
    """
    if not data.taxonomy:
        if data.root:
            raise UserError(f'--data.root "{data.root}" needs a label tree: --taxonomy FILE')
        return None
    return Taxonomy.read(Path(data.taxonomy), root=data.root or None)


def _once(data: settings.Data) -> Knows:
    """Whether a text is a node of the file's tree; the file is read when the first text is asked for."""

    @cache
    def tree() -> Taxonomy | None:
        return file_tree(data)

    def knows(text: str) -> bool:
        known = tree()
        return known is not None and text in known

    return knows


def _without_blanks(text: str, tree: Knows) -> str:
    trimmed = "/".join(part.strip() for part in text.split("/"))
    return text if trimmed == text or tree(text) else trimmed


def _is_whole(label: str) -> bool:
    return all(label.split("/"))


def _folded(meant: Mapping[str, str], counts: Mapping[str, int], tree: Taxonomy | None) -> dict[str, str]:
    """Labels that differ in case alone get one spelling: the tree's, else at each node the most frequent one."""
    spelt: dict[str, Counter[str]] = {}
    for text, label in meant.items():
        for node in prefixes(label):
            spelt.setdefault(node.casefold(), Counter())[node.rpartition("/")[2]] += counts[text]
    # Ties go to the spelling that sorts first, so that the order of the rows cannot matter.
    best = {node: min(names, key=lambda name: (-names[name], name)) for node, names in spelt.items()}
    nodes = {node.casefold(): node for node in reversed(tree.names)} if tree is not None else {}
    folded = {}
    for text, label in meant.items():
        usual = "/".join(best[node.casefold()] for node in prefixes(label))
        folded[text] = nodes.get(label.casefold(), usual)
    return folded


def _rows(label: pl.Series, row: pl.Series, texts: list[str]) -> tuple[int, ...]:
    return tuple(row.filter(label.is_in(texts)).to_list())

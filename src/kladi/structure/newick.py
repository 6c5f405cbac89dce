"""Newick, the bracket form of trees: `((benign,malignant)breast,brain);`"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kladi.errors import UserError
from kladi.structure import canonical
from kladi.structure.canonical import Drawing


def read(text: str) -> Drawing:
    """Labels as given; lengths and [comments] are skipped; an unnamed root is implicit.

    Raises:
        UserError: an unnamed leaf or inner node, a name twice, brackets that do not match, a second tree.
    """
    pairs: list[tuple[str, str | None]] = []
    outer: list[list[str]] = []  # nodes gathered so far in each bracket that is open around this one
    group: list[str] = []  # nodes gathered so far in this bracket
    below: list[str] | None = None  # what the bracket just closed held
    name, ended = "", False
    for at, mark, is_name in _marks(text):
        if ended:
            raise UserError(f"character {at}: a second tree; a taxonomy file holds one")
        if is_name:
            if name:
                raise UserError(f'character {at}: the name "{mark}" follows the name "{name}"')
            name = mark
            continue
        if mark == "(":
            if name or below is not None:
                raise UserError(f"character {at}: a bracket opens after a name or a closed bracket")
            outer.append(group)
            group = []
            continue
        if mark in ",)" and not outer:
            raise UserError(f'character {at}: "{mark}" outside all brackets')
        if mark == ";" and outer:
            raise UserError(f"character {at}: the tree ends while {len(outer)} brackets are open")
        if name:
            pairs += [(child, name) for child in below or []]
            group.append(name)
        elif mark == ";" and below:
            group = below
        else:
            raise UserError(f"character {at}: {'an inner' if below else 'an end'} node without a name")
        below, name, ended = None, "", mark == ";"
        if mark == ")":
            below, group = group, outer.pop()
    if not ended:
        raise UserError('the tree does not end with ";"')
    pairs += [(top, None) for top in group]
    seen: set[str] = set()
    for child, _ in pairs:
        if child in seen:
            raise UserError(f'the name "{child}" occurs twice')
        seen.add(child)
    return canonical.from_pairs(pairs)


def _marks(text: str) -> Iterator[tuple[int, str, bool]]:
    """(position from 1, text, whether it is a name); comments, blanks and lengths (after a colon) are left out."""
    at, is_length = 0, False
    while at < len(text):
        start, letter = at, text[at]
        if letter.isspace():
            at += 1
        elif letter == "[":
            at = text.find("]", at) + 1
            if at == 0:
                raise UserError(f"character {start + 1}: a comment is not closed")
        elif letter in "(),;:":
            at += 1
            is_length = letter == ":"
            if not is_length:
                yield start + 1, letter, False
        elif letter == "'":
            name, at = _quoted(text, at)
            yield start + 1, name, True
        else:
            while at < len(text) and text[at] not in "()[],;:'":
                at += 1
            if not is_length:
                yield start + 1, text[start:at].strip(), True


def _quoted(text: str, start: int) -> tuple[str, int]:
    """The name in the quotes that begin at `start` (a doubled quote stands for one), and where reading goes on."""
    at = start + 1
    parts: list[str] = []
    while True:
        end = text.find("'", at)
        if end < 0:
            raise UserError(f"character {start + 1}: a quote is not closed")
        parts.append(text[at:end])
        if text[end + 1 : end + 2] != "'":
            return "'".join(parts), end + 1
        at = end + 2


def text(nodes: list[dict[str, Any]]) -> str:
    """The tree of the nodes that `Taxonomy.to_dict` gives, under an unnamed root.

    Raises:
        UserError: a node with several parents.
    """
    children: dict[str, list[str]] = {node["name"]: [] for node in nodes}
    tops: list[str] = []
    for node in nodes:
        if len(node["parents"]) > 1:
            raise UserError(
                f'"{node["name"]}" has {len(node["parents"])} parents, which Newick cannot say; write a .json'
            )
        (children[node["parents"][0]] if node["parents"] else tops).append(node["name"])
    pieces: list[str] = []
    waiting: list[tuple[str, list[str]]] = [
        ("", tops[::-1])
    ]  # (text to write once the nodes are written, nodes to write)
    pieces.append("(")
    while waiting:
        closing, nodes_left = waiting[-1]
        if not nodes_left:
            pieces.append(")" + closing)
            waiting.pop()
            continue
        name = nodes_left.pop()
        if pieces[-1] != "(":
            pieces.append(",")
        if children[name]:
            pieces.append("(")
            waiting.append((_label(name), children[name][::-1]))
        else:
            pieces.append(_label(name))
    return "".join(pieces) + ";\n"


def _label(name: str) -> str:
    plain = not any(letter in "()[],;:'" or letter.isspace() for letter in name)
    return name if plain else "'" + name.replace("'", "''") + "'"

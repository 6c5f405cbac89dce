"""From pairs or paths to nodes in canonical order, and every fault of a drawing named on the way.

Nothing here recurses, so a chain of 50,000 nodes is as good as a bush.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kladi.errors import UserError, suggestion


@dataclass
class Drawing:
    """Who is below whom, as read, before it is a `Taxonomy`.

    parents: node -> its parents, in the order they were given; empty for a top node.
    titles: node -> text for display.
    findings: sentences for the reader, each about something that was repaired or assumed.
    """

    parents: dict[str, list[str]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


def clean(name: str) -> str:
    """Blanks at the ends removed, Unicode NFC: two spellings that look alike are one node.

    Raises:
        UserError: half a character (a lone surrogate), which no file could hold afterwards.
    """
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise UserError(f"the node name {name!a} holds half a character (a lone surrogate)")
    return unicodedata.normalize("NFC", name).strip()


def from_pairs(
    pairs: Iterable[tuple[str, str | None]],
    *,
    titles: Mapping[str, str] | None = None,
    places: Sequence[str] | None = None,
    findings: Iterable[str] = (),
) -> Drawing:
    """(child, parent) pairs, ids as given; the parent of a top node is None or blank.

    Args:
        titles: node -> text for display.
        places: what to call each pair in a message; "pair 1", "pair 2", ... if not given.
        findings: what the caller has found already.

    Raises:
        UserError: an empty child, a node that is its own parent, a pair that occurs twice, a node that is both a top
            node and a child.
    """
    drawing = Drawing({}, {clean(node): text for node, text in (titles or {}).items()}, list(findings))
    first_said: dict[tuple[str, str], str] = {}
    mended: list[str] = []
    for number, (given, given_parent) in enumerate(pairs):
        place = places[number] if places else f"pair {number + 1}"
        child, parent = clean(given), clean(given_parent or "")
        mended += [old for old, new in ((given, child), (given_parent or "", parent)) if old != new]
        if not child:
            raise UserError(f"{place}: the child is empty")
        if child == parent:
            raise UserError(f'{place}: "{child}" is its own parent ({child} > {child})')
        if (child, parent) in first_said:
            what = f'"{child}" below "{parent}"' if parent else f'top node "{child}"'
            raise UserError(f"{place}: {what} occurs twice, first in {first_said[child, parent]}")
        first_said[child, parent] = place
        above = drawing.parents.setdefault(child, [])
        if parent:
            above.append(parent)
        if above and (child, "") in first_said:
            raise UserError(
                f'{place}: "{child}" is a top node in {first_said[child, ""]} and below "{above[0]}" '
                f"in {first_said[child, above[0]]}"
            )
    _say_mended(drawing, mended)
    _add_unknown_parents(drawing)
    return drawing


def from_paths(paths: Iterable[str], *, findings: Iterable[str] = ()) -> Drawing:
    """Slash paths: `a/b/c` gives the nodes `a`, `a/b` and `a/b/c`. Repeated paths are one node.

    Raises:
        UserError: a path is empty or has an empty part.
    """
    drawing = Drawing(findings=list(findings))
    mended: list[str] = []
    nodes: dict[str, str] = {}  # a path or its beginning, as written -> its node
    for path in paths:
        new: list[tuple[str, str]] = []  # upwards, as far as nothing is known: (beginning, its last part)
        beginning: str | None = path
        while beginning is not None and beginning not in nodes:
            above, slash, part = beginning.rpartition("/")
            new.append((beginning, part))
            beginning = above if slash else None
        node = nodes[beginning] if beginning is not None else ""
        for beginning, part in reversed(new):
            name = clean(part)
            if not name:
                raise UserError(f'path "{path}" has an empty part' if path.strip() else "a path is empty")
            above, node = node, f"{node}/{name}" if node else name
            nodes[beginning] = node
            drawing.parents.setdefault(node, [above] if above else [])
        if node != path:
            mended.append(path)
    _say_mended(drawing, mended)
    return drawing


def ordered(drawing: Drawing) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Names by (depth, name) and the ids of each one's parents; what was odd is added to the findings.

    Depth is the longest way from the root. It is found by peeling off nodes all of whose parents are placed; what can
    not be peeled off stands on a cycle or below one.

    Raises:
        UserError: a cycle, printed as a > b > a (each below the next), or no node at all.
    """
    parents = drawing.parents
    if not parents:
        raise UserError("a taxonomy needs at least one node")
    children: dict[str, list[str]] = {name: [] for name in parents}
    waiting = {name: len(above) for name, above in parents.items()}
    for name, above in parents.items():
        for p in above:
            children[p].append(name)
    depth = {name: 1 for name, left in waiting.items() if left == 0}
    ready = list(depth)
    while ready:
        name = ready.pop()
        for child in children[name]:
            depth[child] = max(depth.get(child, 0), depth[name] + 1)
            waiting[child] -= 1
            if waiting[child] == 0:
                ready.append(child)
    stuck = {name for name, left in waiting.items() if left > 0}
    if stuck:
        raise UserError(f"the taxonomy has a cycle: {_cycle(parents, stuck)}")
    _say_odd(drawing)
    names = tuple(sorted(parents, key=lambda name: (depth[name], name)))
    ids = {name: node for node, name in enumerate(names)}
    return names, tuple(tuple(sorted(ids[p] for p in parents[name])) for name in names)


def under(drawing: Drawing, root: str) -> Drawing:
    """What is below `root`, which becomes the implicit root; names stay as they are, the rest is left out and said.

    Raises:
        UserError: `root` is no node (names the closest), or nothing is below it.
    """
    root = clean(root)
    if root not in drawing.parents:
        raise UserError(f'root "{root}" is no node of the taxonomy{suggestion(root, drawing.parents)}')
    children: dict[str, list[str]] = {name: [] for name in drawing.parents}
    for name, above in drawing.parents.items():
        for p in above:
            children[p].append(name)
    kept: dict[str, None] = {}
    front = [root]
    while front:
        for child in children[front.pop()]:
            if child not in kept and child != root:
                kept[child] = None
                front.append(child)
    if not kept:
        raise UserError(f'nothing is below root "{root}"')
    outside = len(drawing.parents) - len(kept) - 1
    findings = [*drawing.findings]
    if outside:
        findings.append(f'{outside} nodes that are not below root "{root}" are left out')
    parents = {name: [p for p in above if p in kept] for name, above in drawing.parents.items() if name in kept}
    return Drawing(parents, drawing.titles, findings)


def _cycle(parents: Mapping[str, Sequence[str]], stuck: set[str]) -> str:
    """Every stuck node has a stuck parent, so the way up must come round."""
    way: dict[str, int] = {}
    node = min(stuck)
    while node not in way:
        way[node] = len(way)
        node = min(p for p in parents[node] if p in stuck)
    circle = [*list(way)[way[node] :], node]
    if len(circle) > 12:
        circle = [*circle[:6], f"... {len(circle) - 11} more ...", *circle[-5:]]
    return " > ".join(circle)


def _add_unknown_parents(drawing: Drawing) -> None:
    missing = [p for above in drawing.parents.values() for p in above if p not in drawing.parents]
    for name in missing:
        drawing.parents[name] = []
    if missing:
        nodes = sorted(set(missing))
        what = "1 parent is" if len(nodes) == 1 else f"{len(nodes)} parents are"
        top = "a top node" if len(nodes) == 1 else "top nodes"
        drawing.findings.append(f"{what} nowhere a child and taken as {top}: {_some(nodes)}")


def _say_mended(drawing: Drawing, mended: Sequence[str]) -> None:
    if mended:
        drawing.findings.append(f"blanks trimmed or letters composed (NFC) in {_some(sorted(set(mended)))}")


def _say_odd(drawing: Drawing) -> None:
    tops = [name for name, above in drawing.parents.items() if not above]
    if len(tops) == 1 and len(drawing.parents) > 1:
        drawing.findings.append(
            f'one top node, "{tops[0]}", is over all: level 1 separates nothing; root="{tops[0]}" '
            "(--data.root, for a taxonomy file) makes it the root"
        )
    folded: dict[str, list[str]] = {}
    for name in drawing.parents:
        folded.setdefault(name.casefold(), []).append(name)
    twins = sorted(" and ".join(f'"{n}"' for n in sorted(names)) for names in folded.values() if len(names) > 1)
    if twins:
        more = f" and {len(twins) - 3} more" if len(twins) > 3 else ""
        drawing.findings.append(f"nodes that differ in case only: {'; '.join(twins[:3])}{more}")


def _some(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(f'"{name}"' for name in names[:count]) + more

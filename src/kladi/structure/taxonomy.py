"""A label tree (or DAG) as one frozen value: nodes in canonical order, each a set of ancestors.

A label *is* the set of its ancestors-or-self (a row of `closure`). Depth of the lowest common ancestor, tree distance
and overlap all follow from it. The root is implicit: it has depth 0 and is no node.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy.typing import ArrayLike
from scipy import sparse

from kladi.errors import UserError, closest

DENSE_NODES = 20_000
"""Above so many nodes the dense `closure` (400 MB there) is refused."""
TABLE_ENTRIES = 2**26
"""Above so many entries the `ancestor_table` (512 MB there) is refused."""
_FORMAT = "kladi-taxonomy"


class UnknownNode(UserError, KeyError):
    """A label that is no node of the taxonomy; `str(error)` names it and its three closest nodes."""

    def __str__(self) -> str:  # KeyError alone would print the repr of its argument
        return str(self.args[0])


@dataclass(frozen=True, eq=False)
class Taxonomy:
    """Label tree or DAG. Build it with `from_paths`, `from_edges` or `read`; equal and hashed by content.

    names: N node names, parents before children, ordered by (depth, name).
    parents: for each node the ids of its parents, ascending; empty for a top node.
    titles: node name -> text for display, where the file had one. No part of equality.
    findings: what a reader of the file should know (a parent that is nowhere a child, one top over all, ...). No part
        of equality.
    """

    names: tuple[str, ...]
    parents: tuple[tuple[int, ...], ...]
    titles: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.names) != len(self.parents):
            raise ValueError(f"{len(self.names)} names but {len(self.parents)} entries of parents")
        if any(p >= node or p < 0 for node, above in enumerate(self.parents) for p in above):
            raise ValueError("parents must come before their children; build a Taxonomy with from_edges or from_paths")

    # --- making one ------------------------------------------------------------------------------------------------

    @classmethod
    def from_paths(cls, paths: Iterable[str], separator: str = "/") -> Taxonomy:
        """The tree of slash paths: `a/b/c` gives the nodes `a`, `a/b` and `a/b/c`. Repeated paths are one node.

        >>> Taxonomy.from_paths(["US/breast", "MR/brain"]).names
        ('MR', 'US', 'MR/brain', 'US/breast')

        Raises:
            UserError: a path is empty or has an empty part.
        """
        parents: dict[str, list[str]] = {}
        findings = _Findings()
        for path in dict.fromkeys(paths):
            parts = [_clean(part, findings) for part in path.split(separator)]
            if not all(parts):
                raise UserError(f'path "{path}" has an empty part')
            names = ["/".join(parts[: level + 1]) for level in range(len(parts))]
            for level in range(len(parts) - 1, -1, -1):  # upwards: what is above a known node is known
                if names[level] in parents:
                    break
                parents[names[level]] = [names[level - 1]] if level else []
        return _canonical(parents, {}, findings)

    @classmethod
    def from_edges(
        cls, edges: Iterable[tuple[str, str | None]], *, titles: Mapping[str, str] | None = None
    ) -> Taxonomy:
        """The tree or DAG of (child, parent) pairs, ids as given; the parent of a top node is None or "".

        A parent that is nowhere a child is a top node itself, and a finding says so.

        Raises:
            UserError: a cycle (printed as a > b > a, each below the next), a node that is its own parent, a pair that
                occurs twice, a node that is both a top and a child, an empty child.
        """
        return _from_edges(list(edges), titles or {}, "pair", 1)

    @property
    def digest(self) -> str:
        """SHA-256 of names and parents, hexadecimal; the same for any order of the input."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        content = json.dumps([_FORMAT, 1, self.names, self.parents], ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Taxonomy):
            return NotImplemented
        return self.names == other.names and self.parents == other.parents

    def __hash__(self) -> int:
        return int(self.digest[:15], 16)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        kind = "tree" if self.is_tree else "DAG"
        deepest = int(self.depth.max(initial=0))
        return f"Taxonomy({kind}, {len(self)} nodes, {len(self.leaves)} leaves, depth {deepest}, {self.digest[:12]})"

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists for JSON; `from_dict` gives an equal taxonomy."""
        nodes = []
        for name, above in zip(self.names, self.parents, strict=True):
            node: dict[str, Any] = {"name": name, "parents": [self.names[p] for p in above]}
            if name in self.titles:
                node["title"] = self.titles[name]
            nodes.append(node)
        return {"format": _FORMAT, "version": 1, "nodes": nodes}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Taxonomy:
        """The inverse of `to_dict`.

        Raises:
            UserError: the content is no such dictionary, or of a later version.
        """
        if content.get("format") != _FORMAT or content.get("version") != 1:
            raise UserError(f'not a taxonomy of format "{_FORMAT}", version 1: {content.get("format")!r}')
        edges: list[tuple[str, str | None]] = []
        for node in content["nodes"]:
            edges += [(node["name"], parent) for parent in node["parents"]] or [(node["name"], None)]
        return cls.from_edges(edges, titles={n["name"]: n["title"] for n in content["nodes"] if "title" in n})

    # --- what is where ---------------------------------------------------------------------------------------------

    def index(self, names: str | Iterable[str]) -> Int64[np.ndarray, "*shape"]:
        """Node ids of `names`, int64 of the same length.

        Raises:
            UnknownNode: (a KeyError) a name that is no node, with its three closest.
        """
        if isinstance(names, str):
            return np.asarray(self._id(names), dtype=np.int64)
        return np.array([self._id(name) for name in names], dtype=np.int64)

    def _id(self, name: str) -> int:
        try:
            return self._ids[name]
        except KeyError:
            near = ", ".join(f'"{n}"' for n in self.closest(name))
            raise UnknownNode(f'"{name}" is no node of the taxonomy' + (f"; closest: {near}" if near else "")) from None

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: node for node, name in enumerate(self.names)}

    def __contains__(self, name: str) -> bool:
        return name in self._ids

    def closest(self, name: str, count: int = 3) -> list[str]:
        """The `count` node names most like `name`, best first."""
        options: Sequence[str] = self.names
        if len(options) > 500:  # edit similarity to all of 50,000 names would take seconds: shared triples first
            wanted = set(_triples(name))
            shared = Counter({option: len(wanted & set(_triples(option))) for option in options})
            options = [option for option, _ in shared.most_common(100)]
        return closest(name, options, count)

    @cached_property
    def depth(self) -> Int64[np.ndarray, " N"]:
        """int64[N]: edges from the implicit root, 1 for a top node; on a DAG the longest way."""
        depth = [0] * len(self)
        for node, above in enumerate(self.parents):
            depth[node] = 1 + max((depth[p] for p in above), default=0)
        return _frozen(np.array(depth, dtype=np.int64))

    @cached_property
    def height(self) -> Int64[np.ndarray, " N"]:
        """int64[N]: edges of the longest way down to a leaf, 0 for a leaf."""
        height = [0] * len(self)
        for node in range(len(self) - 1, -1, -1):
            for p in self.parents[node]:
                height[p] = max(height[p], height[node] + 1)
        return _frozen(np.array(height, dtype=np.int64))

    @cached_property
    def leaves(self) -> Int64[np.ndarray, " L"]:
        """int64[L]: the nodes without children, ascending."""
        return _frozen(np.flatnonzero(self.height == 0))

    def ancestors(self, node: int) -> Int64[np.ndarray, " k"]:
        """The node and all nodes above it, int64, ascending (so the node itself is last)."""
        above = self._ancestors(_node_ids([node], len(self)))
        return above.indices.astype(np.int64)

    def _ancestors(self, nodes: np.ndarray) -> sparse.csr_array:
        """Rows of the closure of the given nodes, int64 [len(nodes), N], sparse."""
        rows, front = np.arange(len(nodes)), nodes.astype(np.int64)
        found_rows, found_nodes = [rows], [front]
        starts, counts, flat = self._parent_lists
        while len(front):
            fan = counts[front]
            step = np.repeat(starts[front] - np.cumsum(fan) + fan, fan) + np.arange(fan.sum())
            rows, front = np.repeat(rows, fan), flat[step]
            if not self.is_tree:  # two ways may meet again
                pairs = np.unique(np.stack([rows, front]), axis=1)
                rows, front = pairs[0], pairs[1]
            found_rows.append(rows)
            found_nodes.append(front)
        at = (np.concatenate(found_rows), np.concatenate(found_nodes))
        closed = sparse.csr_array((np.ones(len(at[0]), np.int64), at), shape=(len(nodes), len(self)))
        closed.sum_duplicates()
        closed.data[:] = 1
        return closed

    @cached_property
    def _parent_lists(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts = np.array([len(above) for above in self.parents], dtype=np.int64)
        flat = np.array([p for above in self.parents for p in above], dtype=np.int64)
        return np.cumsum(counts) - counts, counts, flat

    @cached_property
    def closure(self) -> Bool[np.ndarray, "N N"]:
        """bool[N, N]: closure[i, j] where j is i or an ancestor of i.

        Raises:
            UserError: more than 20,000 nodes; `ancestors`, `overlap` and `lca_depth` need no such table.
        """
        if len(self) > DENSE_NODES:
            raise UserError(
                f"the closure of {len(self):,} nodes would take {len(self) ** 2 / 1e9:.1f} GB; use ancestors(node), "
                f"overlap(a, b) or lca_depth(a, b) (closure serves up to {DENSE_NODES:,} nodes)"
            )
        closed = np.eye(len(self), dtype=np.bool_)
        for node, above in enumerate(self.parents):
            for p in above:
                closed[node] |= closed[p]
        return _frozen(closed)

    def overlap(self, a: ArrayLike, b: ArrayLike) -> Float64[np.ndarray, "a b"]:
        """Shared share of two labels, r = |A & B| / max(|A|, |B|) over their ancestors-or-self; tree or DAG.

        1 only for equal labels, 0 where only the root is shared. On a tree it is lca_depth / larger depth.

        Args:
            a, b: node ids.

        Returns:
            float64[len(a), len(b)].

        Raises:
            IndexError: an id that is no node.
        """
        first, second = _node_ids(a, len(self)), _node_ids(b, len(self))
        if self.is_tree:
            shared, sizes = self._lca_depth(first, second), self.depth
            largest = np.maximum(sizes[first][:, None], sizes[second][None, :])
        else:
            left, right = self._ancestors(first), self._ancestors(second)
            shared = (left @ right.T).toarray()
            largest = np.maximum(left.sum(axis=1)[:, None], right.sum(axis=1)[None, :])
        return shared / largest

    # --- trees only ------------------------------------------------------------------------------------------------

    @cached_property
    def is_tree(self) -> bool:
        """No node has more than one parent."""
        return all(len(above) <= 1 for above in self.parents)

    def require_tree(self) -> None:
        """Do nothing on a tree.

        Raises:
            UserError: (a ValueError) naming a node with several parents, and the parents.
        """
        for node, above in enumerate(self.parents):
            if len(above) > 1:
                names = ", ".join(f'"{self.names[p]}"' for p in above)
                raise UserError(f'this needs a tree, but node "{self.names[node]}" has {len(above)} parents: {names}')

    @cached_property
    def ancestor_table(self) -> Int64[np.ndarray, "N depth"]:
        """int64[N, max depth]: column l - 1 holds the ancestor-or-self at depth l, -1 where there is none. Tree only.

        Raises:
            UserError: not a tree, or the table would take more than half a gigabyte.
        """
        self.require_tree()
        deepest = int(self.depth.max(initial=0))
        if len(self) * deepest > TABLE_ENTRIES:
            size = len(self) * deepest * 8 / 1e9
            raise UserError(
                f"the ancestor table of {len(self):,} nodes at depth {deepest:,} would take {size:.1f} GB; "
                "use ancestors(node), overlap(a, b) or lca_depth(a, b)"
            )
        table = np.full((len(self), deepest), -1, dtype=np.int64)
        for node, above in enumerate(self.parents):  # parents come first, so their rows are complete
            if above:
                table[node] = table[above[0]]
            table[node, self.depth[node] - 1] = node
        return _frozen(table)

    def lca_depth(self, a: ArrayLike, b: ArrayLike) -> Int64[np.ndarray, "a b"]:
        """Depth of the lowest common ancestor-or-self, int64[len(a), len(b)]; 0 where only the root is shared.

        Raises:
            UserError: not a tree.
            IndexError: an id that is no node.
        """
        self.require_tree()
        return self._lca_depth(_node_ids(a, len(self)), _node_ids(b, len(self)))

    def distance(self, a: ArrayLike, b: ArrayLike) -> Int64[np.ndarray, "a b"]:
        """Edges between two nodes, int64[len(a), len(b)]: depth(a) + depth(b) - 2 lca_depth(a, b). Tree only."""
        first, second = _node_ids(a, len(self)), _node_ids(b, len(self))
        return self.depth[first][:, None] + self.depth[second][None, :] - 2 * self.lca_depth(first, second)

    def _lca_depth(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Between two nodes of a depth-first walk, the walk goes up exactly to their lowest common ancestor.

        So its depth is the least `depth - 1` of the nodes after the first, up to the second. `_walk` holds the least of
        every run of 1, 2, 4, ... nodes, and two overlapping runs cover any range: no table of all pairs is needed.
        """
        place, least = self._walk
        at, to = place[a][:, None], place[b][None, :]
        first, last = np.minimum(at, to) + 1, np.maximum(at, to)
        length = last - first + 1
        power = np.log2(np.maximum(length, 1)).astype(np.int64)
        first = np.minimum(first, len(self) - 1)  # equal nodes: an empty range, answered below
        shared = np.minimum(least[power, first], least[power, last - (1 << power) + 1])
        return np.where(length > 0, shared, self.depth[a][:, None])

    @cached_property
    def _walk(self) -> tuple[np.ndarray, np.ndarray]:
        children: list[list[int]] = [[] for _ in self.names]
        stack: list[int] = []
        for node in range(len(self) - 1, -1, -1):
            (children[self.parents[node][0]] if self.parents[node] else stack).append(node)
        order = []
        while stack:
            order.append(node := stack.pop())
            stack.extend(children[node])
        place = np.empty(len(self), dtype=np.int64)
        place[order] = np.arange(len(self))
        runs = [self.depth[order].astype(np.int32) - 1]
        while 2 ** len(runs) <= len(self):
            before, half = runs[-1], 2 ** (len(runs) - 1)
            longer = before.copy()
            longer[: len(self) - half] = np.minimum(before[:-half], before[half:])
            runs.append(longer)
        return place, np.stack(runs).astype(np.int64)

    @cached_property
    def diameter(self) -> int:
        """Edges between the two leaves farthest apart, by way of the implicit root where need be; 0 for one leaf."""
        self.require_tree()
        longest = [0] * (len(self) + 1)  # the way down of the deepest leaf met so far; the last entry is the root
        widest = 0
        for node in range(len(self) - 1, -1, -1):
            up = self.parents[node][0] if self.parents[node] else len(self)
            down = longest[node] + 1
            if longest[up]:
                widest = max(widest, longest[up] + down)
            longest[up] = max(longest[up], down)
        return widest


# --- building ------------------------------------------------------------------------------------------------------


class _Findings:
    """Collects sentences, and counts of small repairs that become one sentence each."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.trimmed: dict[str, None] = {}

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def all(self) -> tuple[str, ...]:
        said = list(self.sentences)
        if self.trimmed:
            first = next(iter(self.trimmed))
            said.append(f"{len(self.trimmed)} names trimmed or brought to Unicode NFC, e.g. {first!r}")
        return tuple(said)


def _clean(name: str, findings: _Findings) -> str:
    cleaned = unicodedata.normalize("NFC", name).strip()
    if cleaned != name:
        findings.trimmed[name] = None
    return cleaned


def _from_edges(
    edges: Sequence[tuple[str, str | None]], titles: Mapping[str, str], unit: str, first: int, said: Sequence[str] = ()
) -> Taxonomy:
    """`from_edges`, where the i-th edge is called `unit` first + i in messages."""
    findings = _Findings()
    for sentence in said:
        findings.say(sentence)
    parents: dict[str, list[str]] = {}
    seen: dict[tuple[str, str], int] = {}
    tops: dict[str, int] = {}
    for number, (given_child, given_parent) in enumerate(edges, start=first):
        child, parent = _clean(given_child, findings), _clean(given_parent or "", findings)
        if not child:
            raise UserError(f"{unit} {number}: the child is empty")
        if child == parent:
            raise UserError(f'{unit} {number}: "{child}" is its own parent ({child} > {child})')
        if (child, parent) in seen:
            raise UserError(
                f'{unit} {number}: "{child}" below "{parent}" was said in {unit} {seen[child, parent]} already'
                if parent
                else f'{unit} {number}: top node "{child}" was said in {unit} {seen[child, ""]} already'
            )
        seen[child, parent] = number
        above = parents.setdefault(child, [])
        if parent:
            above.append(parent)
        else:
            tops[child] = number
        if child in tops and above:
            raise UserError(
                f'{unit} {number}: "{child}" has the parent "{above[0]}", and is a top node by {unit} {tops[child]}'
            )
    missing = dict.fromkeys(p for above in parents.values() for p in above if p not in parents)
    for name in missing:
        parents[name] = []
    if missing and tops:
        shown = ", ".join(f'"{n}"' for n in list(missing)[:5]) + (
            f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        )
        findings.say(f"{len(missing)} parents are nowhere a child and taken as top nodes: {shown}")
    return _canonical(parents, titles, findings)


def _canonical(parents: Mapping[str, Sequence[str]], titles: Mapping[str, str], findings: _Findings) -> Taxonomy:
    """Nodes by (depth, name); refuses cycles. Depth is found by peeling off nodes whose parents are all placed."""
    children: dict[str, list[str]] = {name: [] for name in parents}
    waiting = {}
    for name, above in parents.items():
        waiting[name] = len(above)
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
    names = tuple(sorted(parents, key=lambda name: (depth[name], name)))
    ids = {name: node for node, name in enumerate(names)}
    above = tuple(tuple(sorted(ids[p] for p in parents[name])) for name in names)
    return Taxonomy(names, above, {n: titles[n] for n in names if n in titles}, findings.all())


def _cycle(parents: Mapping[str, Sequence[str]], stuck: set[str]) -> str:
    """Every stuck node has a stuck parent, so walking up must come round."""
    way: dict[str, int] = {}
    node = min(stuck)
    while node not in way:
        way[node] = len(way)
        node = min(p for p in parents[node] if p in stuck)
    round_ = [*list(way)[way[node] :], node]
    if len(round_) > 12:
        round_ = [*round_[:6], f"... {len(round_) - 11} more ...", *round_[-5:]]
    return " > ".join(round_)


def _triples(text: str) -> list[str]:
    padded = f"  {text.casefold()} "
    return [padded[i : i + 3] for i in range(len(padded) - 2)]


def _node_ids(ids: ArrayLike, count: int) -> np.ndarray:
    array = np.atleast_1d(np.asarray(ids))
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise IndexError(f"node ids must be whole numbers in one dimension, not {array.dtype} of shape {array.shape}")
    bad = array[(array < 0) | (array >= count)]
    if len(bad):
        raise IndexError(f"{bad[0]} is no node id of a taxonomy of {count} nodes")
    return array.astype(np.int64)


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array

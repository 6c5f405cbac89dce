"""A label tree (or DAG) as one frozen value: nodes in canonical order, each a set of ancestors.

A label *is* the set of its ancestors-or-self (a row of `closure`). Depth of the lowest common ancestor, tree distance
and overlap all follow from it. The root is implicit: it has depth 0 and is no node.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy.typing import ArrayLike

from kladi.errors import UserError, closest
from kladi.structure import canonical, lowest_ancestor, taxonomy_files

DENSE_NODES = 20_000
"""Above so many nodes the dense `closure` (400 MB there) is refused."""
TABLE_ENTRIES = 2**26
"""Above so many entries the `ancestor_table` (512 MB there) is refused."""


class UnknownNode(UserError, KeyError):
    """A label that is no node of the taxonomy; `str(error)` names it and its three closest nodes."""

    # KeyError alone would print the repr of its message.
    __str__ = Exception.__str__  # pyrefly: ignore[missing-override-decorator]


@dataclass(frozen=True, eq=False, repr=False)
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
        if not self.names or len(self.names) != len(self.parents):
            raise ValueError(
                f"{len(self.names)} names and {len(self.parents)} entries of parents; each needs at least 1"
            )
        if any(not 0 <= p < node for node, above in enumerate(self.parents) for p in above):
            raise ValueError("parents must come before their children; build a Taxonomy with from_edges or from_paths")

    # --- making one ------------------------------------------------------------------------------------------------

    @classmethod
    def from_paths(cls, paths: Iterable[str]) -> Taxonomy:
        """The tree of slash paths: `a/b/c` gives the nodes `a`, `a/b` and `a/b/c`. Repeated paths are one node.

        >>> Taxonomy.from_paths(["US/breast", "MR/brain"]).names
        ('MR', 'US', 'MR/brain', 'US/breast')

        Raises:
            UserError: a path is empty or has an empty part, or there is none.
        """
        return cls._of(canonical.from_paths(paths))

    @classmethod
    def from_edges(
        cls, edges: Iterable[tuple[str, str | None]], *, titles: Mapping[str, str] | None = None
    ) -> Taxonomy:
        """The tree or DAG of (child, parent) pairs, ids as given; the parent of a top node is None or "".

        A parent that is nowhere a child is a top node itself, and a finding says so.

        >>> Taxonomy.from_edges([("cat", "animal"), ("dog", "animal"), ("animal", None)]).names
        ('animal', 'cat', 'dog')

        Raises:
            UserError: a cycle (printed as a > b > a, each below the next), a node that is its own parent, a pair that
                occurs twice, a node that is both a top node and a child, an empty child.
        """
        return cls._of(canonical.from_pairs(edges, titles=titles))

    @classmethod
    def read(cls, path: str | Path, *, root: str | None = None) -> Taxonomy:
        """The taxonomy in a file; its suffix says which form it has.

        .csv, .tsv: child,parent, or one column a level, or one column of slash paths (`taxonomy_tables` says how they
            are told apart). .json: dicts of dicts, leaves as lists or null, or what `write` wrote. .nwk: Newick. .obo:
            the is_a relations of an ontology. What was assumed or repaired stands in `findings`.

        Args:
            root: this node becomes the implicit root, and what is not below it is left out.

        Raises:
            UserError: the file cannot be read, or is no taxonomy; file and place are named.
        """
        return cls._of(taxonomy_files.read(Path(path)), root=root, where=str(path))

    def write(self, path: str | Path) -> None:
        """Write a file that `read` turns into an equal taxonomy: .json, .csv, .tsv, or .nwk (a tree, without titles).

        Raises:
            UserError: another suffix, or a DAG into .nwk.
        """
        taxonomy_files.write(Path(path), self.to_dict())

    @classmethod
    def _of(cls, drawing: canonical.Drawing, *, root: str | None = None, where: str = "") -> Taxonomy:
        try:
            drawing = canonical.under(drawing, root) if root is not None else drawing
            names, parents = canonical.ordered(drawing)
        except UserError as error:
            raise (UserError(f"{where}: {error}") if where else error) from None
        titles = {name: drawing.titles[name] for name in names if name in drawing.titles}
        return cls(names, parents, titles, tuple(drawing.findings))

    @property
    def digest(self) -> str:
        """SHA-256 of names and parents, hexadecimal; the same for any order of the input."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        content = json.dumps(
            [taxonomy_files.FORMAT, 1, self.names, self.parents], ensure_ascii=False, separators=(",", ":")
        )
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
        return {"format": taxonomy_files.FORMAT, "version": 1, "nodes": nodes}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Taxonomy:
        """The inverse of `to_dict`.

        Raises:
            UserError: the content is no such dictionary, or of a later version.
        """
        return cls._of(taxonomy_files.from_dict(content))

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
            text = name.casefold()
            starts = range(0, max(len(text) - 2, 1), max(len(text) // 50, 1))
            triples = {text[i : i + 3] for i in starts}
            shared = {option: sum(t in option.casefold() for t in triples) for option in options}
            options = sorted(options, key=lambda option: (-shared[option], abs(len(option) - len(name))))[:50]
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

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For each node the ids of its children, ascending."""
        below: list[list[int]] = [[] for _ in self.names]
        for node, above in enumerate(self.parents):
            for p in above:
                below[p].append(node)
        return tuple(tuple(nodes) for nodes in below)

    def ancestors(self, node: SupportsIndex) -> Int64[np.ndarray, " k"]:
        """The node and all nodes above it, int64, ascending (so the node itself is last)."""
        waiting = _node_ids([operator.index(node)], len(self)).tolist()
        found = set(waiting)
        while waiting:
            new = [p for p in self.parents[waiting.pop()] if p not in found]
            found.update(new)
            waiting += new
        return np.array(sorted(found), dtype=np.int64)

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
            shared, size = self._lca_depth(first, second), self.depth
            return shared / np.maximum(size[first][:, None], size[second][None, :])
        nodes, place = np.unique(np.concatenate([first, second]), return_inverse=True)
        rows, columns = place[: len(first)], place[len(first) :]
        closures = self._closures(nodes).astype(np.float32)  # counts are exact in float32 up to 16 million
        shared, size = (closures @ closures.T).astype(np.float64), closures.sum(axis=1)
        return shared[np.ix_(rows, columns)] / np.maximum(size[rows][:, None], size[columns][None, :])

    def _closures(self, nodes: np.ndarray) -> np.ndarray:
        """Rows of the closure of the given nodes, bool; columns only of what is above one of them."""
        below: dict[int, np.ndarray] = {node: nodes == node for node in nodes.tolist()}
        for node in range(int(nodes.max(initial=-1)), -1, -1):
            if node in below:
                for p in self.parents[node]:
                    below[p] = below[p] | below[node] if p in below else below[node]
        return np.stack(list(below.values()), axis=1) if below else np.zeros((0, 0), np.bool_)

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

    def projected(self, parent: str) -> Taxonomy:
        """A tree: each node keeps one of its parents and forgets the others.

        parent="first" keeps the first in canonical order (the one nearest the root, ties by name); "longest" keeps the
        deepest (ties by name), so that depths stay. A tree stays what it is.
        """
        if parent not in ("first", "longest"):
            raise ValueError(f'parent="{parent}" is neither "first" nor "longest"')
        edges: list[tuple[str, str | None]] = []
        for name, above in zip(self.names, self.parents, strict=True):
            keep = above[0] if above else -1
            if parent == "longest":
                keep = max(above, key=lambda p: (self.depth[p], -p), default=-1)
            edges.append((name, self.names[keep] if above else None))
        return Taxonomy.from_edges(edges, titles=self.titles)

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
        return lowest_ancestor.lca_depth(self._walk, self.depth, a, b)

    @cached_property
    def _walk(self) -> lowest_ancestor.Walk:
        return lowest_ancestor.walk(self.parents, self.depth)

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


# --- small things -------------------------------------------------------------------------------------------------


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

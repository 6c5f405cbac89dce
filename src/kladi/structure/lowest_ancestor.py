"""Depth of the lowest common ancestor of any two nodes of a tree, without a table of all pairs.

Between two nodes of a depth-first walk, the walk goes up exactly to their lowest common ancestor. So its depth is the
least `depth - 1` of the nodes after the first, up to the second. `least` holds that for every run of 1, 2, 4, ...
nodes; two overlapping runs cover any stretch. N nodes take N log2 N numbers, and a pair two look-ups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64


@dataclass(frozen=True)
class Walk:
    """A depth-first walk over a tree.

    place: position of each node in the walk.
    least: row k holds, at position i, the least `depth - 1` of the nodes at i, ..., i + 2^k - 1.
    """

    place: Int64[np.ndarray, " N"]
    least: Int32[np.ndarray, "runs N"]


def walk(parents: Sequence[Sequence[int]], depth: Int64[np.ndarray, " N"]) -> Walk:
    """Walk the tree whose node i has the one parent `parents[i][0]`, or none; parents come before their children."""
    count = len(parents)
    children: list[list[int]] = [[] for _ in parents]
    waiting: list[int] = []
    for node in range(count - 1, -1, -1):
        (children[parents[node][0]] if parents[node] else waiting).append(node)
    order: list[int] = []
    while waiting:
        node = waiting.pop()
        order.append(node)
        waiting += children[node]
    place = np.empty(count, dtype=np.int64)
    place[order] = np.arange(count)
    runs = [(depth[order] - 1).astype(np.int32)]
    while 2 ** len(runs) <= count:
        half = 2 ** (len(runs) - 1)
        longer = runs[-1].copy()  # the last entries, where no whole run fits, are never read
        longer[:-half] = np.minimum(runs[-1][:-half], runs[-1][half:])
        runs.append(longer)
    return Walk(place, np.stack(runs))


def lca_depth(
    tree: Walk, depth: Int64[np.ndarray, " N"], a: Int64[np.ndarray, " a"], b: Int64[np.ndarray, " b"]
) -> Int64[np.ndarray, "a b"]:
    """int64[len(a), len(b)]: depth of the lowest common ancestor-or-self of nodes a[i] and b[j]; 0 for the root."""
    at, to = tree.place[a][:, None], tree.place[b][None, :]
    first, last = np.minimum(at, to) + 1, np.maximum(at, to)
    length = last - first + 1
    run = np.frexp(np.maximum(length, 1))[1] - 1  # floor of log2, exactly
    first = np.minimum(first, len(depth) - 1)  # an empty stretch (a[i] = b[j]) may begin past the end; answered below
    shared = np.minimum(tree.least[run, first], tree.least[run, last - (1 << run) + 1])
    return np.where(length > 0, shared, depth[a][:, None])

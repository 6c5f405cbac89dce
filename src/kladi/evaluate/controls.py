"""Structure, shuffled: the twin against which every gain is read."""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import Int

from kladi.structure.taxonomy import Taxonomy


def shuffled_leaves(
    taxonomy: Taxonomy, labels: Int[np.ndarray, " k"], seed: int
) -> tuple[Int[np.ndarray, " n_nodes"], float]:
    """Permute the leaves among the leaf positions of the same tree: equal shape, another meaning.

    Args:
        taxonomy: the true tree.
        labels: the node ids that occur in the data; only leaves among them move, inner nodes keep their place.
        seed: of the draw.

    Returns:
        `place` int64[N], the node that each is to be trained as (`target = place[target]`), and the share of sibling
        pairs that are still siblings. The draw is never the identity, and keeps no more sibling pairs than expected.

    Raises:
        ValueError: fewer than two leaves occur, or every arrangement is the true one.
    """
    leaves = np.intersect1d(labels, taxonomy.leaves)
    generator = np.random.default_rng([seed, 0x73687566])  # a stream of its own: "shuf"
    draws = [generator.permutation(leaves) for _ in range(200)]
    kept = [_siblings_kept(taxonomy, leaves, drawn) for drawn in draws]
    expected = float(np.mean(kept))
    for drawn, share in zip(draws, kept, strict=True):
        if not np.array_equal(drawn, leaves) and share <= expected and share < 1:
            place = np.arange(len(taxonomy.names))
            place[leaves] = drawn
            return place, share
    raise ValueError(f"{len(leaves)} leaves cannot be arranged otherwise on this tree")


def _siblings_kept(taxonomy: Taxonomy, before: Int[np.ndarray, " k"], after: Int[np.ndarray, " k"]) -> float:
    """Share of the pairs with a common parent that have one after the move too; 0 where there is no such pair."""
    parent = {node: taxonomy.parents[node] for node in before.tolist()}
    pairs = [(i, j) for i, j in itertools.combinations(range(len(before)), 2) if parent[before[i]] == parent[before[j]]]
    if not pairs:
        return 0.0
    return float(np.mean([parent[after[i]] == parent[after[j]] for i, j in pairs]))

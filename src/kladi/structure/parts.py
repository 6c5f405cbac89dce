"""Parts of a taxonomy for a classifier: what is at or above given labels, and each label as a leaf of its own."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from kladi.structure.taxonomy import Taxonomy

OWN = " (itself)"
"""Ends the name of the leaf that an inner label gets."""


def above(tax: Taxonomy, labels: Int[np.ndarray, " C"]) -> tuple[Taxonomy, Int[np.ndarray, " N"]]:
    """The nodes at or above the labels, as a taxonomy, and the place of each node of `tax` there, -1 where it is gone.

    >>> tax = Taxonomy.from_paths(["A/a", "A/b", "B"])
    >>> above(tax, tax.index(["A/a"]))[0].names
    ('A', 'A/a')
    """
    kept = np.unique(np.concatenate([tax.ancestors(int(label)) for label in np.unique(labels)]))
    edges: list[tuple[str, str | None]] = []
    for node in kept.tolist():
        edges += [(tax.names[node], tax.names[p]) for p in tax.parents[node]] or [(tax.names[node], None)]
    names = {tax.names[node] for node in kept.tolist()}
    part = Taxonomy.from_edges(edges, titles={name: title for name, title in tax.titles.items() if name in names})
    place = np.full(len(tax), -1, dtype=np.int64)
    place[kept] = part.index([tax.names[node] for node in kept.tolist()])
    return part, place


def with_leaves(tax: Taxonomy, labels: Int[np.ndarray, " C"]) -> tuple[Taxonomy, Int[np.ndarray, " C"]]:
    """The nodes at or above the labels, where each label is a leaf: one that others are below gets a leaf of its own.

    Returns:
        The taxonomy, and the leaf of each label.

    >>> tax = Taxonomy.from_paths(["A/a", "A/b"])
    >>> with_leaves(tax, tax.index(["A", "A/a"]))[0].names
    ('A', 'A (itself)', 'A/a')
    """
    part, place = above(tax, labels)
    inner = [label for label in labels.tolist() if part.children[place[label]]]
    if not inner:
        return part, place[labels]
    edges: list[tuple[str, str | None]] = []
    for name, parents in zip(part.names, part.parents, strict=True):
        edges += [(name, part.names[p]) for p in parents] or [(name, None)]
    edges += [(tax.names[label] + OWN, tax.names[label]) for label in inner]
    whole = Taxonomy.from_edges(edges, titles=part.titles)
    names = [tax.names[label] + (OWN if label in set(inner) else "") for label in labels.tolist()]
    return whole, whole.index(names)

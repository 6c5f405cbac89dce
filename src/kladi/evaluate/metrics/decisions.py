"""From probabilities to an answer: the likeliest class, the cheapest one, or a node above where nothing is sure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from kladi.evaluate.metrics.flat import Ids, as_array, as_float64
from kladi.evaluate.metrics.hierarchical import hierarchical_precision, hierarchical_recall, lca_height
from kladi.structure.taxonomy import Taxonomy

ROOT = -1
"""The answer "none of all": nothing is sure enough."""
SAFE = 1e-9
"""A node whose probability misses the threshold by rounding alone passes it."""
Scores = Float[np.ndarray | Tensor, "n C"]
Classes = Int[np.ndarray | Tensor, " C"]


def node_probabilities(log_p: Scores, classes: Classes, tax: Taxonomy) -> Float[np.ndarray, "n N"]:
    """P of every node: of all classes at or below it. Normalised over the classes. Tree or DAG."""
    columns = np.asarray(as_array(classes))
    p = np.exp(as_float64(log_p, "log_p"))
    p = p / p.sum(axis=1, keepdims=True)
    P = np.zeros((len(p), len(tax)))
    for column, node in enumerate(columns.tolist()):
        P[:, tax.ancestors(node)] += p[:, column, None]
    return P


def stop_at(log_p: Scores, classes: Classes, tax: Taxonomy, threshold: float) -> Int[np.ndarray, " n"]:
    """Go down from the root to the likeliest child while its probability is at least the threshold; the node reached.

    Ties go to the first child in canonical order. -1 where no top node qualifies. Above one half, the nodes that
    qualify form one chain, and the answer is the deepest of them; a higher threshold never answers deeper.

    Args:
        log_p: log-probabilities of the classes, one row an image.
        classes: the node of each column.
        threshold: in (0, 1].
    """
    tax.require_tree()
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], not {threshold}")
    P = node_probabilities(log_p, classes, tax)
    at = np.full(len(P), ROOT, dtype=np.int64)
    tops = np.array([v for v, above in enumerate(tax.parents) if not above], dtype=np.int64)
    walking = {ROOT: np.arange(len(P))}
    while walking:
        node, rows = walking.popitem()
        children = tops if node == ROOT else np.array(tax.children[node], dtype=np.int64)
        if not len(children) or not len(rows):
            continue
        best = P[np.ix_(rows, children)].argmax(axis=1)
        for k, child in enumerate(children.tolist()):
            going = rows[(best == k) & (P[rows, child] >= threshold - SAFE)]
            at[going] = child
            if len(going):
                walking[child] = going
    return at


def least_cost(log_p: Scores, classes: Classes, tax: Taxonomy) -> Int[np.ndarray, " n"]:
    """The class of least expected cost, `argmin_k sum_c H(k, c) p_c` with H of `lca_height`: milder mistakes without
    any training (Karthik et al., ICLR 2021). Ties go to the first column. Needs a tree."""
    columns = np.asarray(as_array(classes))
    p = np.exp(as_float64(log_p, "log_p"))
    answers, truths = np.broadcast_arrays(columns[:, None], columns)
    cost = lca_height(truths, answers, tax)
    return columns[(p @ cost).argmin(axis=1)]


@dataclass(frozen=True)
class Stop:
    """What stopping at a threshold costs and gives: precision and recall of `hierarchical_f1`, the mean depth of the
    answers, and the share of rows that got one at all."""

    threshold: float
    precision: float
    recall: float
    depth: float
    answered: float


def stopped_at(at: Ids, true: Ids, tax: Taxonomy, threshold: float) -> Stop:
    """The answers of `stop_at` against the truth."""
    nodes = np.asarray(as_array(at))
    return Stop(
        threshold=threshold,
        precision=hierarchical_precision(nodes, true, tax),
        recall=hierarchical_recall(nodes, true, tax),
        depth=float(np.where(nodes == ROOT, 0, tax.depth[nodes]).mean()),
        answered=float((nodes != ROOT).mean()),
    )

"""Metrics that know the tree: how far an answer is from the truth, and where on the tree it went wrong.

Notation: A(v) = v and its ancestors without the implicit root; depth = #A(v); d = tree distance in edges; H(a, b) = 0
if a = b, else the longest way down from their lowest common ancestor to a leaf. The answer "root" (none of all) is -1.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kladi.evaluate.metrics.flat import Ids, as_array, as_float64, expected_calibration_error, undefined
from kladi.structure.taxonomy import Taxonomy

Labels = Int[np.ndarray | Tensor, " n"] | Bool[np.ndarray | Tensor, "n N"]
"""One node id a row, or a set of nodes a row as a bool matrix."""


def _ids(values: np.ndarray | Tensor, tax: Taxonomy, name: str) -> np.ndarray:
    """As int64. IndexError for what is no node; -1, the answer "root", is allowed in predictions."""
    ids = as_array(values).astype(np.int64)
    bad = ids[(ids < (-1 if name == "pred" else 0)) | (ids >= len(tax.names))]
    if len(bad):
        raise IndexError(f"{name} holds {bad[0]}, which is no node id of a taxonomy of {len(tax.names)} nodes")
    return ids


def _depth(ids: np.ndarray, tax: Taxonomy) -> np.ndarray:
    return np.append(np.asarray(tax.depth), 0)[ids]  # id -1 reads the appended zero


def _paths(ids: np.ndarray, tax: Taxonomy) -> np.ndarray:
    """int64[..., max depth]: the ancestor-or-self at each depth, -1 where there is none. Trees only."""
    paths = np.asarray(tax.ancestor_table)[ids]
    paths[ids < 0] = -1
    return paths


def _lca_depth(pred: np.ndarray, true: np.ndarray, tax: Taxonomy) -> np.ndarray:
    """Depth of the lowest common ancestor, entry by entry; 0 where only the root is shared."""
    true_path = _paths(true, tax)
    return ((_paths(pred, tax) == true_path) & (true_path >= 0)).sum(-1)


# --- sets of ancestors: trees, DAGs and label sets -----------------------------------------------------------------


def _overlaps(pred: np.ndarray | Tensor, true: np.ndarray | Tensor, tax: Taxonomy) -> np.ndarray:
    """int64[3, n]: #(A(p) & A(t)), #A(p), #A(t)."""
    p, t = as_array(pred), as_array(true)
    if p.ndim != t.ndim:
        raise ValueError("pred and true must both be node ids, or both sets of nodes as bool[n, N]")
    if p.ndim == 2:
        P, T = _closed(p, tax), _closed(t, tax)
        return np.stack([(P & T).sum(1), P.sum(1), T.sum(1)])
    p, t = _ids(p, tax, "pred"), _ids(t, tax, "true")
    if tax.is_tree:
        return np.stack([_lca_depth(p, t, tax), _depth(p, tax), _depth(t, tax)])
    pairs, inverse = np.unique(np.stack([p, t], 1), axis=0, return_inverse=True)
    nodes = {int(v): set(tax.ancestors(int(v))) if v >= 0 else set() for v in np.unique(pairs)}
    sizes = [(len(nodes[a] & nodes[b]), len(nodes[a]), len(nodes[b])) for a, b in pairs.tolist()]
    return np.array(sizes, dtype=np.int64).reshape(-1, 3)[inverse.reshape(-1)].T


def _closed(sets: np.ndarray, tax: Taxonomy) -> np.ndarray:
    """The same sets with every ancestor added, children before parents: names are in topological order."""
    if sets.shape[1] != len(tax.names):
        raise ValueError(f"sets have {sets.shape[1]} columns, the taxonomy {len(tax.names)} nodes")
    closed = sets.copy()
    for node in range(len(tax.names) - 1, -1, -1):
        for parent in tax.parents[node]:
            closed[:, parent] |= closed[:, node]
    return closed


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)


def _precision_recall_f1(pred: Labels, true: Labels, tax: Taxonomy, average: str) -> np.ndarray:
    counts = _overlaps(pred, true, tax)
    if average == "micro":
        counts = counts.sum(1, keepdims=True)
    elif average == "macro":
        if as_array(true).ndim == 2:
            raise ValueError('average="macro" groups rows by their one true node; for label sets take "micro"')
        group = np.unique(as_array(true), return_inverse=True)[1]
        counts = np.stack([np.bincount(group, weights=row) for row in counts])
    elif average != "samples":
        raise ValueError(f'average must be "micro", "macro" or "samples", not {average!r}')
    if not len(as_array(true)):
        undefined("hierarchical precision and recall of no rows")
        return np.full(3, math.nan)
    shared, size_pred, size_true = counts
    precision, recall = _share(shared, size_pred), _share(shared, size_true)
    both = precision + recall
    f1 = 2 * precision * recall / np.where(both > 0, both, 1)
    return np.stack([precision, recall, f1]).mean(1)


def hierarchical_precision(pred: Labels, true: Labels, tax: Taxonomy, average: str = "micro") -> float:
    """`hP = sum #(A(p) & A(t)) / sum #A(p)`; see `hierarchical_f1` for the arguments."""
    return float(_precision_recall_f1(pred, true, tax, average)[0])


def hierarchical_recall(pred: Labels, true: Labels, tax: Taxonomy, average: str = "micro") -> float:
    """`hR = sum #(A(p) & A(t)) / sum #A(t)`; see `hierarchical_f1` for the arguments."""
    return float(_precision_recall_f1(pred, true, tax, average)[1])


def hierarchical_f1(pred: Labels, true: Labels, tax: Taxonomy, average: str = "micro") -> float:
    """F1 over sets of ancestors-or-self: `2 hP hR / (hP + hR)`, 0 where nothing is shared.

        hP = sum #(A(p) & A(t)) / sum #A(p)          hR = sum #(A(p) & A(t)) / sum #A(t)

    Args:
        pred: int64[n] node ids, -1 for the answer "root"; or bool[n, N] sets of nodes, A = union of the closures.
        true: int64[n] node ids, or bool[n, N].
        tax: tree or DAG.
        average: "micro" sums over all rows. "macro" sums within the rows of each distinct true node, then takes the
            plain mean. "samples" is the mean over rows (what hiclass calls macro).

    On a tree whose leaves share one depth and meet only at the root, micro F1 of leaf predictions *is* `tree_accuracy`
    and the mean of `level_accuracy`: one number there, not three findings. nan for no rows. IndexError: a foreign id.

    >>> tax = Taxonomy.from_paths(["US/breast/benign", "US/breast/malignant", "MR/brain"])
    >>> true = tax.index(["US/breast/benign", "MR/brain"])
    >>> pred = tax.index(["US/breast/malignant", "MR/brain"])
    >>> round(hierarchical_f1(pred, true, tax), 3)
    0.8
    """
    return float(_precision_recall_f1(pred, true, tax, average)[2])


# --- distances and heights: trees only -----------------------------------------------------------------------------


def tree_distance(pred: Ids, true: Ids, tax: Taxonomy) -> Int[np.ndarray, " n"]:
    """Edges between prediction and truth, row by row; the root is a node of the way."""
    tax.require_tree()
    p, t = _ids(pred, tax, "pred"), _ids(true, tax, "true")
    return _depth(p, tax) + _depth(t, tax) - 2 * _lca_depth(p, t, tax)


def tree_accuracy(pred: Ids, true: Ids, tax: Taxonomy) -> float:
    """`mean max(0, 1 - d(p, t) / D)`, D the largest distance between two leaves; [p = t] where there is one leaf.

    The clip acts only on an inner node predicted above a long chain. Needs a tree. nan for no rows.
    """
    distance = tree_distance(pred, true, tax)
    if not len(distance):
        return undefined("tree accuracy of no rows")
    D = int(tax.diameter)
    return float(np.mean(np.maximum(0, 1 - distance / D) if D else distance == 0))


def lca_height(
    pred: Int[np.ndarray | Tensor, "*n"], true: Int[np.ndarray | Tensor, "*n"], tax: Taxonomy
) -> Int[np.ndarray, "*n"]:
    """H entry by entry: 0 where equal, else the longest way down from the lowest common ancestor to a leaf, in edges.

    The implicit root's height is the greatest depth. Needs a tree.
    """
    tax.require_tree()
    p, t = _ids(pred, tax, "pred"), _ids(true, tax, "true")
    shared = _lca_depth(p, t, tax)
    lca = np.take_along_axis(_paths(t, tax), np.maximum(shared, 1)[..., None] - 1, -1)[..., 0]
    below_root = int(np.max(tax.depth, initial=0))
    return np.where(p == t, 0, np.where(shared > 0, np.asarray(tax.height)[lca], below_root))


def mistake_severity(pred: Ids, true: Ids, tax: Taxonomy) -> float:
    """Mean H over the rows that are wrong: how bad is a mistake when there is one. nan when there is none.

    It improves when easy mistakes appear, so read it beside the accuracy. Needs a tree.
    """
    heights = lca_height(pred, true, tax)
    wrong = heights[as_array(pred) != as_array(true)]
    return float(wrong.mean()) if len(wrong) else undefined("mistake severity: no row is wrong")


def hierarchical_distance_at_k(ranked: Int[np.ndarray | Tensor, "n m"], true: Ids, tax: Taxonomy, k: int) -> float:
    """Mean over rows of the mean H of the first `k` ranked leaves; the order inside the first k does not matter.

    Args:
        ranked: leaf ids, best first, at least k a row and none twice.
        k: 1 to the number of leaves. `hd@1 = (1 - accuracy) * mistake_severity`.

    Raises ValueError for a k that is out of range or an id repeated in a row. Needs a tree. nan for no rows.
    """
    order, leaves = as_array(ranked), len(tax.leaves)
    if not 1 <= k <= min(leaves, order.shape[1]):
        raise ValueError(f"k is {k}, but there are {leaves} leaves and {order.shape[1]} ranked a row")
    repeated = np.flatnonzero((np.diff(np.sort(order, 1), axis=1) == 0).any(1))
    if len(repeated):
        raise ValueError(f"ranked repeats an id in row {repeated[0]}")
    if not len(order):
        return undefined("hierarchical distance of no rows")
    first = np.ascontiguousarray(order[:, :k])
    return float(lca_height(first, np.broadcast_to(as_array(true)[:, None], first.shape), tax).mean())


def level_accuracy(pred: Ids, true: Ids, tax: Taxonomy) -> Float[np.ndarray, " depth"]:
    """At each depth l = 1 .. max depth: of the rows at least that deep, the share whose ancestor there is right.

    A prediction shallower than l is wrong. nan, with one warning naming the depths, where no row is deep enough. Needs
    a tree.
    """
    tax.require_tree()
    p, t = _paths(_ids(pred, tax, "pred"), tax), _paths(_ids(true, tax, "true"), tax)
    reach, right = (t >= 0).sum(0), ((p == t) & (t >= 0)).sum(0)
    if (reach == 0).any():
        depths = ", ".join(str(d + 1) for d in np.flatnonzero(reach == 0)[:20])
        undefined(f"level accuracy: no true node is as deep as {depths}")
    return np.where(reach > 0, right / np.maximum(reach, 1), math.nan)


def accuracy_below(
    pred: Ids, true: Ids, tax: Taxonomy
) -> tuple[Float[np.ndarray, " N"], Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """For each node: of the rows truly below it, the share whose answer goes down the same child.

    Returns:
        The share, nan where no row is below the node; the rows below it; the children of it that occur among them.
        With one child there is nothing to choose. Needs a tree.
    """
    tax.require_tree()
    p, t = _paths(_ids(pred, tax, "pred"), tax), _paths(_ids(true, tax, "true"), tax)
    N = len(tax.names)
    right, rows, children = np.zeros(N), np.zeros(N, dtype=np.int64), np.zeros(N, dtype=np.int64)
    for level in range(t.shape[1] - 1):
        below = t[:, level + 1] >= 0
        np.add.at(rows, t[below, level], 1)
        np.add.at(right, t[below, level], (p[below, level + 1] == t[below, level + 1]).astype(np.float64))
        met = np.unique(t[below, level + 1])
        np.add.at(children, np.asarray(tax.ancestor_table)[met, level], 1)
    return np.where(rows > 0, right / np.maximum(rows, 1), math.nan), rows, children


def level_calibration_error(
    log_probability: Float[np.ndarray | Tensor, "n C"],
    classes: Int[np.ndarray | Tensor, " C"],
    true: Ids,
    tax: Taxonomy,
    bins: int = 15,
) -> Float[np.ndarray, " depth"]:
    """At each depth: the expected calibration error of the likeliest node there, among the rows at least that deep.

    A node has the probability of all classes at or below it; a class above that depth stands for itself. nan, with one
    warning, where no row is deep enough. Needs a tree.

    Args:
        classes: the node of each column.
        bins: as in `expected_calibration_error`.
    """
    tax.require_tree()
    columns = np.asarray(as_array(classes))
    t, paths = _paths(_ids(true, tax, "true"), tax), _paths(_ids(columns, tax, "classes"), tax)
    probability = np.exp(as_float64(log_probability, "log_probability"))
    found = np.full(t.shape[1], math.nan)
    for level in range(t.shape[1]):
        reach = t[:, level] >= 0
        if not reach.any():
            continue
        nodes, column = np.unique(np.where(paths[:, level] < 0, columns, paths[:, level]), return_inverse=True)
        summed = probability[reach] @ np.eye(len(nodes))[column]
        right = nodes[summed.argmax(axis=1)] == t[reach, level]
        found[level] = expected_calibration_error(np.minimum(summed.max(axis=1), 1), right, bins)
    if np.isnan(found).any():
        depths = ", ".join(str(d + 1) for d in np.flatnonzero(np.isnan(found))[:20])
        undefined(f"calibration by level: no true node is as deep as {depths}")
    return found

"""Metrics of the embedding itself: does the tree show in its distances, and has it collapsed?

`z` holds embeddings as the network gave them, float[n, D]: each function puts them into the geometry it measures in.
All arithmetic is float64. Where a value decides by a comparison of distances, two that differ by less than 1e-9 are
equal: otherwise an encoder that maps every image to one point would be judged by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.special import entr
from torch import Tensor

from kladi.evaluate.metrics.flat import Ids, as_array, undefined
from kladi.losses import geometry as spaces
from kladi.structure.taxonomy import Taxonomy

TIE = 1e-9
"""Distances and cosines closer than this are equal."""
_CHUNK = 1 << 22
"""Entries of a distance matrix that are held at once."""

Embeddings = Float[np.ndarray | Tensor, "n D"]
Prototypes = tuple[Float[np.ndarray | Tensor, "N D"], Bool[np.ndarray | Tensor, " N"]]


def _float64(z: np.ndarray | Tensor) -> Tensor:
    return torch.as_tensor(z).detach().to("cpu", torch.float64)


def _node_ids(true: np.ndarray | Tensor, tax: Taxonomy) -> np.ndarray:
    ids = as_array(true).astype(np.int64)
    bad = ids[(ids < 0) | (ids >= len(tax.names))]
    if len(bad):
        raise IndexError(f"true holds {bad[0]}, which is no node id of a taxonomy of {len(tax.names)} nodes")
    return ids


def _slices(rows: int, width: int) -> list[slice]:
    size = max(1, _CHUNK // max(width, 1))
    return [slice(start, start + size) for start in range(0, rows, size)]


# --- the tree in the distances -------------------------------------------------------------------------------------


def node_prototypes(
    z: Embeddings,
    true: Ids,
    tax: Taxonomy,
    geometry: str = "sphere",
    curvature: float = 0.1,
    clip: float = 2.3,
) -> tuple[Float[np.ndarray, "N D"], Bool[np.ndarray, " N"]]:
    """The mean of all rows at or below each node, in the geometry's own sense, each row counting once.

    Args:
        z: training embeddings; prototypes of the rows that are then measured flatter the model.
        true: node id of each row, a leaf or an inner node.
        tax: tree or DAG.
        geometry, curvature, clip: as in the losses.

    Returns:
        points float64[N, D] on the sphere or in the ball, zero where there is none; seen bool[N].

    Raises IndexError for a node id outside the taxonomy.
    """
    space = spaces.named(geometry, curvature, clip)
    ids, x = _node_ids(true, tax), space.embed(_float64(z))
    row_numerator, row_denominator = space.moments(x)
    own = torch.from_numpy(ids)
    own_numerator = torch.zeros(len(tax.names), x.shape[1], dtype=torch.float64).index_add_(0, own, row_numerator)
    own_denominator = torch.zeros(len(tax.names), dtype=torch.float64).index_add_(0, own, row_denominator)
    numerator, denominator = torch.zeros_like(own_numerator), torch.zeros_like(own_denominator)
    for node in np.unique(ids):
        above = _lineage(tax, int(node))
        numerator[above] += own_numerator[node]
        denominator[above] += own_denominator[node]
    points, seen = space.mean(numerator, denominator)
    return torch.where(seen[:, None], points, 0).numpy(), seen.numpy()


def _lineage(tax: Taxonomy, node: int) -> Tensor:
    """The node and all above it."""
    found = {node}
    front = [node]
    while front:
        front = [p for v in front for p in tax.parents[v] if p not in found]
        found.update(front)
    return torch.tensor(sorted(found))


def violations(
    z: Embeddings,
    true: Ids,
    tax: Taxonomy,
    level: Int[np.ndarray, " n"],
    geometry: str = "sphere",
    prototypes: Prototypes | None = None,
    curvature: float = 0.1,
    clip: float = 2.3,
) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """For each row: is another node of depth `level` strictly nearer than the row's own ancestor of that depth?

    Args:
        level: the depth at which each row is tested; below 1 or below the row's own node: the row is left out.
        prototypes: what `node_prototypes` returned for the training rows; None builds them from `z` itself, which is
            optimistic and meant for training logs.
        z, true, tax, geometry, curvature, clip: as in `node_prototypes`; the taxonomy must be a tree.

    Returns:
        violated bool[n], false where left out; counted bool[n], false where the row was left out: no node of its own at
        that depth, none with a prototype, or no rival with one.
    """
    tax.require_tree()
    space = spaces.named(geometry, curvature, clip)
    ids = _node_ids(true, tax)
    if prototypes is None:
        prototypes = node_prototypes(z, true, tax, geometry, curvature, clip)
    points, seen = _float64(prototypes[0]), as_array(prototypes[1])
    if len(points) != len(tax.names):
        raise ValueError(f"prototypes are of {len(points)} nodes, the taxonomy has {len(tax.names)}")
    x, depth = space.embed(_float64(z)), np.asarray(tax.depth)
    violated, counted = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
    for here in np.unique(level[(level >= 1) & (level <= depth[ids])]):
        rows = np.flatnonzero((level == here) & (depth[ids] >= here))
        own = np.asarray(tax.ancestor_table)[ids[rows], here - 1]
        nodes = np.flatnonzero(seen & (depth == here))
        usable = seen[own] & (len(nodes) > 1)
        rows, own = rows[usable], own[usable]
        counted[rows] = True
        column = torch.from_numpy(np.searchsorted(nodes, own))
        for part in _slices(len(rows), len(nodes)):
            d = space.distances(x[rows[part]], points[nodes], exact=True)
            near = d.gather(1, column[part, None])
            rival = d.scatter(1, column[part, None], math.inf).amin(1, keepdim=True)
            violated[rows[part]] = (rival < near - TIE).squeeze(1).numpy()
    return violated, counted


def parent_violation_rate(
    z: Embeddings,
    true: Ids,
    tax: Taxonomy,
    geometry: str = "sphere",
    prototypes: Prototypes | None = None,
    curvature: float = 0.1,
    clip: float = 2.3,
) -> float:
    """Share of rows for which another node of their parent's depth has a prototype strictly nearer than the parent's.

        mean over rows [ min over nodes q != parent, depth(q) = depth(parent), of d(z, mu_q) < d(z, mu_parent) ]

    A tie is no violation. Left out: rows at depth 1, whose parent is the root, rows whose parent has no prototype, and
    rows whose parent has no rival with one; `violations` says which. Invariant to isometries of the geometry. Other
    readings of the name exist, by triplets (`triplet_violation_rate`) or against leaves of other parents: never mix.

    Args:
        z: embeddings float[n, D], not normalised.
        true: int64[n] node ids.
        tax: a tree; ValueError naming the node with several parents otherwise.
        geometry, curvature, clip: "sphere" or "poincare", as in the losses.
        prototypes: (points float[N, D], seen bool[N]) of `node_prototypes` on training rows. None builds them from
            these rows: optimistic.

    Returns:
        The share, or nan with a warning if no row is left.
    """
    ids = _node_ids(true, tax)
    level = np.asarray(tax.depth)[ids] - 1
    violated, counted = violations(z, true, tax, level, geometry, prototypes, curvature, clip)
    if not counted.any():
        return undefined("parent violation rate: no row has a parent with a prototype and a rival")
    return float(violated[counted].mean())


def level_violation_rates(
    z: Embeddings,
    true: Ids,
    tax: Taxonomy,
    geometry: str = "sphere",
    prototypes: Prototypes | None = None,
    curvature: float = 0.1,
    clip: float = 2.3,
) -> Float[np.ndarray, " depth"]:
    """The violation rate at each depth l = 1 .. max depth against the row's ancestor there, over rows at least as deep.

    Arguments as in `parent_violation_rate`. nan, with one warning naming the depths, where no row is left.
    """
    ids = _node_ids(true, tax)
    if prototypes is None:
        prototypes = node_prototypes(z, true, tax, geometry, curvature, clip)
    rates = np.full(int(np.max(tax.depth, initial=0)), math.nan)
    for depth in range(1, len(rates) + 1):
        level = np.full(len(ids), depth)
        violated, counted = violations(z, true, tax, level, geometry, prototypes, curvature, clip)
        if counted.any():
            rates[depth - 1] = violated[counted].mean()
    if np.isnan(rates).any():
        depths = ", ".join(str(d + 1) for d in np.flatnonzero(np.isnan(rates))[:20])
        undefined(f"violation rate: no row has a prototype of its own and a rival at depth {depths}")
    return rates


def triplet_violation_rate(
    z: Embeddings, true: Ids, tax: Taxonomy, geometry: str = "sphere", curvature: float = 0.1, clip: float = 2.3
) -> float:
    """Share of triplets (anchor, one of its parent, one of another parent) with d(anchor, same) >= d(anchor, other).

    The other reading of "parent violation"; a tie counts here. Over rows at depth 2 and more of a tree, self excluded.
    Costs n^2 log n. nan where there is no triplet.
    """
    tax.require_tree()
    ids = _node_ids(true, tax)
    parent = np.array([tax.parents[v][0] if tax.parents[v] else -1 for v in ids], dtype=np.int64)
    rows = np.flatnonzero(parent >= 0)
    parent = parent[rows]
    space = spaces.named(geometry, curvature, clip)
    x = space.embed(_float64(z))[torch.from_numpy(rows)]
    bad = total = 0
    for part in _slices(len(rows), len(rows)):
        d = space.distances(x[part], x, exact=True).numpy()
        for i, distance in zip(range(len(rows))[part], d, strict=True):
            same = parent == parent[i]
            others = np.sort(distance[~same])
            same[i] = False
            bad += int(np.searchsorted(others, distance[same] + TIE, side="right").sum())
            total += int(same.sum()) * len(others)
    return bad / total if total else undefined("triplet violation rate: no triplet of two parents")


# --- neighbours ----------------------------------------------------------------------------------------------------


def retrieval_ranks(
    z: Embeddings, true: Ids, groups: Sequence[Hashable] | np.ndarray | None = None
) -> Int[np.ndarray, " n"]:
    """Rank, from 1, of each row's nearest row with the same label among all others by cosine; 0 where there is none.

    Equally similar rows with another label rank first, so that a collapsed encoder cannot be lucky. `groups`: rows of
    the query's own group (patient) are no neighbours.
    """
    x = spaces.normalise(_float64(z))
    label = torch.from_numpy(np.unique(as_array(true), return_inverse=True)[1])
    group = None if groups is None else torch.from_numpy(np.unique(np.asarray(groups), return_inverse=True)[1])
    ranks = torch.zeros(len(label), dtype=torch.int64)
    for part in _slices(len(label), len(label)):
        index = torch.arange(len(label))[part]
        cosine = x[part] @ x.T
        if group is not None:
            cosine.masked_fill_(group[part, None] == group, -math.inf)
        cosine[torch.arange(len(index)), index] = -math.inf
        mate = label[part, None] == label
        best = cosine.masked_fill(~mate, -math.inf).amax(1, keepdim=True)
        ahead = (cosine.masked_fill(mate, -math.inf) >= best - TIE).sum(1)
        ranks[part] = torch.where(best.squeeze(1).isfinite(), ahead + 1, 0)
    return ranks.numpy()


def retrieval_recall_at_k(
    z: Embeddings, true: Ids, k: int, groups: Sequence[Hashable] | np.ndarray | None = None
) -> float:
    """Share of rows that have a row of the same label among their `k` nearest others by cosine.

    Queries without any mate are left out (`retrieval_ranks` shows them as 0); with `groups`, a row of the query's own
    group never counts, neither as a mate nor as a neighbour. nan if no query is left. ValueError unless k >= 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    ranks = retrieval_ranks(z, true, groups)
    ranks = ranks[ranks > 0]
    return float(np.mean(ranks <= k)) if len(ranks) else undefined("recall at k: no row has a mate")


# --- the shape of the cloud ----------------------------------------------------------------------------------------


def per_dimension_std(z: Embeddings) -> Float[np.ndarray, " D"]:
    """`sqrt(D) std_j(z / ||z||)` of each dimension j: 1 for directions spread evenly, 0 for a collapsed one.

    The std divides by n. A zero row stays zero. nan for no rows.
    """
    x = spaces.normalise(_float64(z)).numpy()
    if not len(x):
        undefined("standard deviation of no rows")
        return np.full(x.shape[1], math.nan)
    return math.sqrt(x.shape[1]) * x.std(0)


def effective_rank(z: Embeddings, centred: bool = False) -> float:
    """RankMe: `exp(-sum_k p_k log p_k)`, p the singular values over their sum; the number of dimensions really used.

    Between 1 and min(n, D); 0 for a zero matrix. Raw, a constant nonzero row gives 1; centred, 0. nan for no rows.
    """
    x = _float64(z).numpy()
    if not x.size:
        return undefined("effective rank of no rows")
    scale = np.abs(x).max()
    if centred:
        x = x - x.mean(0)
    sigma = np.linalg.svd(x, compute_uv=False)
    # Equal rows leave rounding dust after centring, and dust has full rank.
    sigma = np.where(sigma > max(x.shape) * np.finfo(np.float64).eps * scale, sigma, 0)
    return float(np.exp(entr(sigma / sigma.sum()).sum())) if sigma.any() else 0.0


def alignment(first: Embeddings, second: Embeddings) -> float:
    """Mean squared distance of the unit vectors of two views of the same rows: 0 to 4. nan for no rows."""
    x, y = spaces.normalise(_float64(first)), spaces.normalise(_float64(second))
    return float(((x - y) ** 2).sum(1).mean()) if len(x) else undefined("alignment of no rows")


def uniformity(z: Embeddings) -> float:
    """`log mean over i < j of exp(-2 ||x_i - x_j||^2)` of unit vectors: 0 when all are equal, near -4 when spread out.

    nan for fewer than two rows.
    """
    x = spaces.normalise(_float64(z))
    n = len(x)
    if n < 2:
        return undefined("uniformity of fewer than two rows")
    square = (x * x).sum(1)
    total = 0.0
    for part in _slices(n, n):
        distance = (square[part, None] + square - 2 * x[part] @ x.T).clamp_min(0)
        total += float(torch.exp(-2 * distance).triu(1 + part.start).sum())
    return math.log(total / (n * (n - 1) / 2))


def representation_health(z: Embeddings) -> dict[str, float]:
    """The numbers that show a collapse, in one dict.

    `std_mean`, `std_min`, `dead_share` (dimensions with `per_dimension_std` < 1e-4), `zero_rows` (a count),
    `effective_rank` and `effective_rank_centred`, and each of these as a share of min(n - 1, D).
    """
    x, std = _float64(z), per_dimension_std(z)
    most = max(min(len(x) - 1, x.shape[1]), 1)
    raw, centred = effective_rank(z), effective_rank(z, centred=True)
    return {
        "std_mean": float(std.mean()),
        "std_min": float(std.min()),
        "dead_share": float(np.mean(std < 1e-4)),
        "zero_rows": float((x.norm(dim=1) <= spaces.NULL_NORM).sum()),
        "effective_rank": raw,
        "effective_rank_share": raw / most,
        "effective_rank_centred": centred,
        "effective_rank_centred_share": centred / most,
    }


def has_collapsed(health: Mapping[str, float]) -> bool:
    """Centred effective rank below 2, or mean std below 0.05. Raise the alarm when two evaluations in a row say so."""
    return health["effective_rank_centred"] < 2 or health["std_mean"] < 0.05

"""Bottleneck distance between two sets of points (birth, death), by bisection over bipartite matchings.

A radius r suffices if and only if some matching of points at most r apart (sup norm) covers every point whose
persistence exceeds 2r, of either set; the others may go to the diagonal. By the theorem of Mendelsohn and Dulmage it is
enough that one matching covers those of the first set, and another those of the second. They are few, so that two small
matchings decide where the usual flow over all points and their projections is large.

Source: Efrat, Itai, Katz, Geometry helps in bottleneck matching, Algorithmica 2001; Mendelsohn, Dulmage, 1958.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from jaxtyping import Float64, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import KDTree

Points = Float64[np.ndarray, "_ 2"]
"""(birth, death) of any number of points."""
NEAREST = 8
"""Neighbours that a point is matched among at first: all of them are a million edges for a noisy image."""


def persistence(points: Points) -> Float64[np.ndarray, " _"]:
    """death - birth of each point."""
    return points[:, 1] - points[:, 0]


def within(a: Points, b: Points, radius: float) -> bool:
    """Whether the bottleneck distance is at most `radius`."""
    return _covered(a, b, radius) and _covered(b, a, radius)


def bottleneck(a: Points, b: Points, tolerance: float) -> float:
    """The bottleneck distance d, as a number in [d, d + tolerance]."""
    low = least(a, b)
    if within(a, b, low):  # which is so for most pairs of real images
        return low
    high = max(float(persistence(points).max()) / 2 for points in (a, b) if len(points))
    while high - low > tolerance:
        middle = (low + high) / 2
        if middle in (low, high):  # neighbours among floating-point numbers
            break
        if within(a, b, middle):
            high = middle
        else:
            low = middle
    return high


def least(a: Points, b: Points) -> float:
    """A lower bound: each point moves to its nearest neighbour, or to the diagonal if that is nearer."""
    return max(_farthest(a, b), _farthest(b, a))


def _farthest(a: Points, b: Points) -> float:
    if not len(a):
        return 0.0
    half = persistence(a) / 2
    nearest = KDTree(b).query(a, p=np.inf)[0] if len(b) else half
    return float(np.minimum(nearest, half).max())


def _covered(a: Points, b: Points, radius: float) -> bool:
    """Whether some matching covers every point of `a` that is too far from the diagonal.

    The nearest few neighbours of each point match almost all. From every point that is left one looks for an augmenting
    path among all neighbours: where there is none, the reason is a crowd in one place, and the search ends there.
    """
    far = a[persistence(a) > 2 * radius]
    if not len(far):
        return True
    if not len(b):
        return False
    tree = KDTree(b)
    partner = _among_nearest(far, tree, radius)
    owner = np.full(len(b), -1)
    owner[partner[partner >= 0]] = np.flatnonzero(partner >= 0)
    return all(_augmented(int(point), far, tree, radius, owner) for point in np.flatnonzero(partner < 0))


def _among_nearest(far: Points, tree: KDTree, radius: float) -> Int[np.ndarray, " k"]:
    """A greatest matching of each point with one of its nearest neighbours within the radius; -1 where it has none."""
    few = min(NEAREST, tree.n)
    # The bound is exclusive.
    _, near = tree.query(far, k=[*range(1, few + 1)], p=np.inf, distance_upper_bound=np.nextafter(radius, np.inf))
    there = near < tree.n
    starts = np.concatenate([[0], np.cumsum(there.sum(axis=1))]).astype(np.int32)
    edges = near[there].astype(np.int32)
    graph = csr_array((np.ones(len(edges), dtype=np.int8), edges, starts), shape=(len(far), tree.n))
    return maximum_bipartite_matching(graph, perm_type="column")


def _augmented(point: int, far: Points, tree: KDTree, radius: float, owner: Int[np.ndarray, " m"]) -> bool:
    """Match one more point, others moving to other neighbours where that helps; whether it could be.

    `owner` holds the point that each neighbour is matched with, -1 for none, and is changed.
    """
    reached = np.zeros(tree.n, dtype=bool)
    queue, held = deque([point]), {point: -1}
    before = {point: -1}  # for whom a point gives its neighbour up
    while queue:
        at = queue.popleft()
        near = np.array(tree.query_ball_point(far[at], radius, p=np.inf), dtype=np.int64)
        free = near[owner[near] < 0]
        if len(free):
            neighbour = int(free[0])
            while at >= 0:
                owner[neighbour], neighbour, at = at, held[at], before[at]
            return True
        near = near[~reached[near]]
        reached[near] = True
        for neighbour in near.tolist():
            other = int(owner[neighbour])
            held[other], before[other] = neighbour, at
            queue.append(other)
    return False

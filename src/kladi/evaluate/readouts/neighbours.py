"""What the nearest neighbours know: kNN, retrieval and the nearest class prototype, from training rows only.

Similarities are cosines in float64, rounded to nine decimals: embeddings come in float32, so what lies below is
rounding, and equal rows must tie exactly. Every tie is then broken by a written rule, never by position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from kladi.losses import geometry as spaces

BLOCK = 512
"""Query rows handled at a time, so that memory stays at BLOCK x gallery."""
DECIMALS = 9
TEMPERATURE = 0.07


NEAREST = 10
"""Gallery rows of a query that are named."""


@dataclass(frozen=True)
class Retrieval:
    """For each query the rank (0-based) of its first match and its average precision, both only where `matched`.

    nearest: int64[q, k], the gallery rows that come first, k = 10 or the gallery.
    """

    rank: Int[np.ndarray, " q"]
    average_precision: Float[np.ndarray, " q"]
    matched: Bool[np.ndarray, " q"]
    nearest: Int[np.ndarray, "q k"]


def unit(x: Float[np.ndarray, "n F"]) -> Float[np.ndarray, "n F"]:
    """Rows of length one in float64; a zero row stays zero, so its cosine with anything is zero."""
    rows = np.asarray(x, dtype=np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1.0)


def knn_scores(
    query: Float[np.ndarray, "q F"],
    gallery: Float[np.ndarray, "g F"],
    target: Int[np.ndarray, " g"],
    classes: Int[np.ndarray, " C"],
    neighbours: tuple[int, ...],
    *,
    temperature: float = TEMPERATURE,
) -> tuple[Float[np.ndarray, "K q C"], Int[np.ndarray, "K q"]]:
    """Votes of the k nearest gallery rows and the class that wins, for each k.

    `score_c = sum over the k nearest of exp(s / 0.07) [y = c]`, divided by their sum over c; s the cosine.

    Args:
        query, gallery: embeddings, any length.
        target: class of each gallery row.
        classes: int64[C], the columns of the scores.
        neighbours: the k's, each at most g.

    Returns:
        Scores float64[K, q, C] and predictions int64[K, q]. Equal scores: the class of the nearest row among those
        that are tied. Equally near rows count in the order of their class, so row order never matters.

    Raises:
        ValueError: a k below 1 or above the gallery.
    """
    if not neighbours or min(neighbours) < 1 or max(neighbours) > len(gallery):
        raise ValueError(f"neighbours {neighbours} do not fit a gallery of {len(gallery)} rows")
    # Rows sorted by class: a stable sort by similarity then breaks ties by class instead of by position.
    order = np.argsort(target, kind="stable")
    rows, code = unit(gallery[order]), np.searchsorted(classes, target[order])
    scores = np.zeros((len(neighbours), len(query), len(classes)))
    winners = np.zeros((len(neighbours), len(query)), dtype=np.int64)
    for start in range(0, len(query), BLOCK):
        similarity = _cosines(query[start : start + BLOCK], rows)
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, : max(neighbours)]
        votes = np.exp((np.take_along_axis(similarity, nearest, axis=1) - 1) / temperature)
        near_code = code[nearest]
        line = np.arange(len(similarity))[:, None]
        for i, k in enumerate(neighbours):
            score = np.zeros((len(similarity), len(classes)))
            np.add.at(score, (line, near_code[:, :k]), votes[:, :k])
            best = score.max(axis=1, keepdims=True)
            tied = score >= best * (1 - 1e-12)
            first = np.take_along_axis(tied, near_code[:, :k], axis=1).argmax(axis=1)
            winners[i, start : start + BLOCK] = near_code[line[:, 0], first]
            scores[i, start : start + BLOCK] = score / score.sum(axis=1, keepdims=True)
    return scores, classes[winners]


def retrieve(
    query: Float[np.ndarray, "q F"],
    query_target: Int[np.ndarray, " q"],
    gallery: Float[np.ndarray, "g F"],
    target: Int[np.ndarray, " g"],
) -> Retrieval:
    """Rank of the first match and average precision of every query against the whole gallery.

    `AP = (1/R) sum_r P(r) rel(r)` over the ranks r of the R matches. Equally similar rows: non-matches first, so that
    an encoder that maps everything to one point gains nothing. A query without any match is not `matched`.
    """
    rows = unit(gallery)
    rank = np.zeros(len(query), dtype=np.int64)
    precision = np.zeros(len(query))
    matched = np.isin(query_target, target)
    nearest = np.zeros((len(query), min(NEAREST, len(target))), dtype=np.int64)
    for start in range(0, len(query), BLOCK):
        part = slice(start, start + BLOCK)
        similarity = _cosines(query[part], rows)
        match = query_target[part, None] == target
        order = np.lexsort((match, -similarity), axis=1)
        nearest[part] = order[:, : nearest.shape[1]]
        relevant = np.take_along_axis(match, order, axis=1)
        rank[part] = relevant.argmax(axis=1) if len(target) else 0
        hits = np.cumsum(relevant, axis=1)
        at = hits / np.arange(1, len(target) + 1)
        precision[part] = (at * relevant).sum(axis=1) / np.maximum(match.sum(axis=1), 1)
    return Retrieval(rank, precision, matched, nearest)


def nearest_prototype(
    query: Float[np.ndarray, "q D"],
    gallery: Float[np.ndarray, "g D"],
    target: Int[np.ndarray, " g"],
    *,
    space: spaces.Geometry | None = None,
) -> tuple[Float[np.ndarray, "q C"], Int[np.ndarray, " C"]]:
    """Distance of each query to the mean of each class of the gallery, in the run's own geometry.

    Args:
        query, gallery: embeddings as the network gives them; the geometry embeds them.
        target: class of each gallery row.
        space: where distances and means are taken; None: the sphere.

    Returns:
        float64[q, C] and the C classes that have a prototype, least first. A class without a training row has none; one
        whose rows cancel out has no mean, and is infinitely far.
    """
    space = space or spaces.named("sphere")
    classes, code = np.unique(target, return_inverse=True)
    points = space.embed(torch.from_numpy(np.asarray(gallery, dtype=np.float64)))
    over, under = space.moments(points)
    index = torch.from_numpy(code)
    numerator = points.new_zeros(len(classes), points.shape[1]).index_add_(0, index, over)
    denominator = points.new_zeros(len(classes)).index_add_(0, index, under)
    means, defined = space.mean(numerator, denominator)
    embedded = space.embed(torch.from_numpy(np.asarray(query, dtype=np.float64)))
    distance = space.distances(embedded, means, exact=True)
    return torch.where(defined, distance, math.inf).numpy(), classes


def purity(points: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], *, k: int = 10) -> float:
    """Mean share of the k nearest other points (Euclidean) with the same label: what the eye guesses from a map.

    Rows with label -1 are unknown: they neither ask nor answer. nan with fewer than k + 1 known rows.
    """
    known = labels >= 0
    rows, marks = np.asarray(points, dtype=np.float64)[known], labels[known]
    if len(rows) <= k:
        return math.nan
    lengths, total = (rows**2).sum(axis=1), 0.0
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        square = lengths - 2 * block @ rows.T  # up to the query's own length, which changes no order
        square[np.arange(len(block)), np.arange(start, start + len(block))] = math.inf
        nearest = np.argpartition(square, k - 1, axis=1)[:, :k]
        total += float((marks[nearest] == marks[start : start + len(block), None]).mean(axis=1).sum())
    return total / len(rows)


def _cosines(query: np.ndarray, unit_rows: np.ndarray) -> np.ndarray:
    return np.round(unit(query) @ unit_rows.T, DECIMALS)

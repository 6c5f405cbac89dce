"""Covariance of all modalities together, from matrices of patients or as it is: what the estimator asks of data.

It is asked for products with few columns and for small projections, so that d x d numbers need never exist.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

DENSE = 2_000
"""Features of all modalities up to which the covariance is written out."""
CHUNK = 1_024
"""Rows that are summed up at a time."""
PASSES, SETTLED = 40, 1e-7
"""Of the subspace iteration: products at most, and the relative change of an eigenvalue at which it ends."""


@dataclass(frozen=True)
class Dense:
    """Written out.

    matrix: symmetric [d, d], modalities one after another. sizes: features of each modality; d is their sum.
    """

    matrix: Float64[np.ndarray, "d d"]
    sizes: tuple[int, ...]
    precision: ClassVar[float] = float(np.finfo(np.float64).eps)

    def times(self, w: Float64[np.ndarray, "d c"]) -> Float64[np.ndarray, "d c"]:
        """S W."""
        return self.matrix @ w

    def within(self, modality: int, w: Float64[np.ndarray, "d_m c"]) -> Float64[np.ndarray, "d_m c"]:
        """S_mm W."""
        place = places(self.sizes)[modality]
        return self.matrix[place, place] @ w

    def diagonal(self) -> Float64[np.ndarray, " d"]:
        """Variance of each feature."""
        return np.diag(self.matrix).copy()

    def projected(self, bases: Sequence[Float64[np.ndarray, "_ _"]]) -> Dense:
        """Q^T S Q with the bases as diagonal blocks of Q."""
        q = block_diagonal(bases)
        return Dense(q.T @ self.matrix @ q, tuple(basis.shape[1] for basis in bases))


@dataclass(frozen=True)
class Rows:
    """Of matrices in which patients are rows; a modality may lack some of them.

    A block is the unbiased covariance of the patients that have both of its modalities, about each modality's own mean.

    tables: float[n_m, d_m], of the patients that have the modality. patients: int64[n_m], who they are. means: [d_m].
    """

    tables: tuple[Float[np.ndarray, "_ _"], ...]
    patients: tuple[Int[np.ndarray, " _"], ...]
    means: tuple[Float64[np.ndarray, " _"], ...]

    @classmethod
    def of(cls, tables: Sequence[Float[np.ndarray, "n _"]], present: Bool[np.ndarray, "n M"]) -> Rows:
        """present: bool[n, M]; a table is not copied where all have it."""
        kept = [x if present[:, m].all() else x[present[:, m]] for m, x in enumerate(tables)]
        who = tuple(np.flatnonzero(present[:, m]) for m in range(len(tables)))
        return cls(tuple(kept), who, tuple(mean(x) for x in kept))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(x.shape[1] for x in self.tables)

    @property
    def complete(self) -> bool:
        """Whether every patient has every modality."""
        return all(len(who) == self._all for who in self.patients)

    @property
    def precision(self) -> float:
        """Of its products, relative."""
        return max(float(np.finfo(x.dtype).eps) for x in self.tables)

    def times(self, w: Float64[np.ndarray, "d c"]) -> Float64[np.ndarray, "d c"]:
        """S W."""
        parts = [w[place] for place in places(self.sizes)]
        scores = [self._scores(k, part) for k, part in enumerate(parts)]
        out = []
        for m in range(len(self.tables)):
            total = np.zeros((len(self.patients[m]), w.shape[1]))
            for k, score in enumerate(scores):
                mine, theirs = self._shared(m, k)
                total[mine] += score[theirs] / (len(mine) - 1)
            # Where all are there the scores sum to zero, and the mean has no say; elsewhere it has.
            found = self._transposed(m, total)
            out.append(found - np.outer(self.means[m], total.sum(axis=0)))
        return np.concatenate(out)

    def within(self, modality: int, w: Float64[np.ndarray, "d_m c"]) -> Float64[np.ndarray, "d_m c"]:
        score = self._scores(modality, w)
        found = self._transposed(modality, score) - np.outer(self.means[modality], score.sum(axis=0))
        return found / (len(score) - 1)

    def diagonal(self) -> Float64[np.ndarray, " d"]:
        return self._diagonal

    @functools.cached_property
    def _diagonal(self) -> Float64[np.ndarray, " d"]:
        every = zip(self.tables, self.means, strict=True)
        return np.concatenate([squares(x, mean) / (len(x) - 1) for x, mean in every])

    def projected(self, bases: Sequence[Float64[np.ndarray, "_ _"]]) -> Dense:
        scores = [self._scores(m, basis) for m, basis in enumerate(bases)]
        rows = []
        for m, left in enumerate(scores):
            row = []
            for k, right in enumerate(scores):
                mine, theirs = self._shared(m, k)
                row.append(left[mine].T @ right[theirs] / (len(mine) - 1))
            rows.append(row)
        return Dense(np.block(rows), tuple(basis.shape[1] for basis in bases))

    def written_out(self) -> Dense:
        """All of it."""
        return self.projected([np.eye(size) for size in self.sizes])

    def _shared(self, m: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of both tables that are the same patients."""
        if m == k or len(self.patients[m]) == len(self.patients[k]) == self._all:
            every = np.arange(len(self.patients[m]))
            return every, every
        _, mine, theirs = np.intersect1d(self.patients[m], self.patients[k], assume_unique=True, return_indices=True)
        return mine, theirs

    @functools.cached_property
    def _all(self) -> int:
        return 1 + max(int(who[-1]) if len(who) else -1 for who in self.patients)

    def _scores(self, m: int, w: np.ndarray) -> Float64[np.ndarray, "n_m c"]:
        """(x - mean) W without a centred copy of x."""
        x = self.tables[m]
        return (x @ w.astype(x.dtype)).astype(np.float64) - self.means[m] @ w

    def _transposed(self, m: int, score: np.ndarray) -> Float64[np.ndarray, "d_m c"]:
        x = self.tables[m]
        return (x.T @ score.astype(x.dtype)).astype(np.float64)


Covariance = Dense | Rows


def leading(
    covariance: Covariance, rank: int, spare: int, modality: int
) -> tuple[Float64[np.ndarray, " k"], Float64[np.ndarray, "d_m k"]]:
    """The largest eigenvalues of a modality's block, falling, and their vectors: `rank` of them, and `spare` more that
    need not be exact.

    Exact where the matrix is written out; else by subspace iteration with Rayleigh-Ritz values until the first settle.
    """
    size = covariance.sizes[modality]
    rank, width = min(rank, size), min(rank + spare, size)
    if isinstance(covariance, Dense):
        place = places(covariance.sizes)[modality]
        values, vectors = np.linalg.eigh(covariance.matrix[place, place])
        return values[::-1][:width], vectors[:, ::-1][:, :width]
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(size, width)))[0]
    values, turns = np.full(width, np.inf), np.eye(width)
    for _ in range(PASSES):
        image = covariance.within(modality, basis)
        small, turns = np.linalg.eigh((basis.T @ image + image.T @ basis) / 2)
        before, values = values, small[::-1]
        if np.abs(values[:rank] - before[:rank]).max(initial=0.0) <= SETTLED * np.abs(values).max():
            break
        basis = np.linalg.qr(image)[0]
    return values, (basis @ turns)[:, ::-1]


def mean(x: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, " d"]:
    """Of each column, in double precision, without a copy of x in it."""
    total = np.zeros(x.shape[1])
    for start in range(0, len(x), CHUNK):
        total += x[start : start + CHUNK].sum(axis=0)
    return total / len(x)


def squares(x: Float[np.ndarray, "n d"], about: Float64[np.ndarray, " d"]) -> Float64[np.ndarray, " d"]:
    """Sum of squares of each column about a number."""
    total = np.zeros(x.shape[1])
    for start in range(0, len(x), CHUNK):
        part = x[start : start + CHUNK] - about.astype(x.dtype)
        total += np.einsum("ij,ij->j", part, part)
    return total


def places(sizes: Sequence[int]) -> list[slice]:
    """Where each modality's features stand."""
    ends = np.cumsum((0, *sizes))
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]


def block_diagonal(parts: Sequence[np.ndarray]) -> Float64[np.ndarray, "d k"]:
    """Matrices as diagonal blocks of one."""
    out = np.zeros((sum(p.shape[0] for p in parts), sum(p.shape[1] for p in parts)))
    top = left = 0
    for part in parts:
        out[top : top + part.shape[0], left : left + part.shape[1]] = part
        top, left = top + part.shape[0], left + part.shape[1]
    return out


def nearest_semidefinite(matrix: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    """The nearest matrix without negative eigenvalues; blocks from different patients need not fit together."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    if values[0] >= 0:
        return matrix
    return (vectors * np.maximum(values, 0.0)) @ vectors.T

"""A first estimate of every loading from covariances alone, exact where they are exact.

    x^(m) = sum_{S: m in S} W_S^(m) z_S + e^(m),   Cov(z) = I,   signal Sigma = W W^T

For a structure S, m in S and C the other modalities, the factors of m that do not reach C are those of structures T
with m in T, T inside S. Their part of Sigma_mm is what a regression on C leaves:

    G_S^(m) = Sigma_mm - Sigma_mC (Sigma_CC)^+ Sigma_Cm = sum_{T: m in T, T in S} W_T^(m) W_T^(m)^T
    W_S^(m) W_S^(m)^T = G_S^(m) - sum_{T: m in T, T inside S, T != S} W_T^(m) W_T^(m)^T

with the pseudo-inverse cut at its rank, the number of factors that reach C. So each block is found up to a
rotation, the smallest structures first; `aligned` then makes the rotations of one structure's modalities agree.

Source: the peeling for three modalities is that of Li, Yu, Zhou, Hierarchical contrastive learning for multimodal data,
2026; the form for any number of them and the alignment are ours.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from kladi.models.factors.covariance import places
from kladi.structure.lattice import Lattice, Structure

Loadings = dict[tuple[Structure, int], Float64[np.ndarray, "_ _"]]
"""(structure, modality) -> W_S^(m); a row a feature, a column a factor."""


def peeled(signal: Float64[np.ndarray, "d d"], sizes: tuple[int, ...], lattice: Lattice) -> Loadings:
    """Loadings from the signal part of a covariance, each modality's by itself: right in every diagonal block of W W^T.

    Args:
        signal: covariance less its noise, modalities one after another.
        sizes: features of each modality.
        lattice: structures and ranks.

    Exact for an exact signal if for every structure the loadings of the other modalities have full column rank in the
    factors that reach them; then no modality has more factors than features.
    """
    where, every = places(sizes), range(lattice.modalities)
    found: Loadings = {}
    for structure in reversed(lattice.structures):
        others = [m for m in every if m not in structure]
        outside = _pseudo_inverse(_block(signal, others, others, where), int(lattice.meeting(others).sum()))
        for m in structure:
            own = signal[where[m], where[m]]
            if others:
                across = _block(signal, [m], others, where)
                own = own - across @ outside @ across.T
            smaller = [w for (t, k), w in found.items() if k == m and set(t) < set(structure)]
            rest = own - sum((w @ w.T for w in smaller), start=np.zeros_like(own))
            found[structure, m] = _leading(rest, lattice.rank(structure))
    return found


def aligned(
    loadings: Loadings, signal: Float64[np.ndarray, "d d"], sizes: tuple[int, ...], lattice: Lattice
) -> Loadings:
    """The same with the rotations of each structure's modalities made to agree with those of its first one.

    Of modalities m < k, with L the loadings of all structures T that hold both, side by side:

        (L_m)^+ Sigma_mk (L_k^+)^T   has in its diagonal block T the rotation from W_T^(m) to W_T^(k)

    whose nearest orthogonal matrix turns W_T^(k).
    """
    where, out = places(sizes), dict(loadings)
    for structure in lattice.structures:
        first = structure[0]
        for m in structure[1:]:
            both = [t for t in lattice.structures if first in t and m in t]
            left, right = (np.concatenate([loadings[t, k] for t in both], axis=1) for k in (first, m))
            turns = np.linalg.pinv(left) @ signal[where[first], where[m]] @ np.linalg.pinv(right).T
            start = sum(lattice.rank(t) for t in both[: both.index(structure)])
            own = slice(start, start + lattice.rank(structure))
            u, _, v = np.linalg.svd(turns[own, own])
            out[structure, m] = loadings[structure, m] @ (u @ v).T
    return out


def stacked(loadings: Loadings, sizes: tuple[int, ...], lattice: Lattice) -> Float64[np.ndarray, "d R"]:
    """W: a row a feature, a column a factor; zero where a modality takes no part."""
    whole, where = np.zeros((sum(sizes), lattice.width)), places(sizes)
    for structure, columns in lattice.columns():
        for m in structure:
            whole[where[m], columns] = loadings[structure, m]
    return whole


def unstacked(whole: Float64[np.ndarray, "d R"], sizes: tuple[int, ...], lattice: Lattice) -> Loadings:
    """The inverse of `stacked`."""
    where = places(sizes)
    return {(s, m): whole[where[m], columns] for s, columns in lattice.columns() for m in s}


def _block(matrix: np.ndarray, rows: list[int], columns: list[int], where: list[slice]) -> np.ndarray:
    if not rows or not columns:
        return np.zeros((0, 0))
    return np.block([[matrix[where[i], where[j]] for j in columns] for i in rows])


def _leading(matrix: np.ndarray, rank: int) -> np.ndarray:
    """U sqrt(s) of the largest eigenvalues, none of them below 0."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    some = np.argsort(-values, kind="stable")[:rank]
    return vectors[:, some] * np.sqrt(np.maximum(values[some], 0.0))


def _pseudo_inverse(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Of a symmetric matrix, by its largest eigenvalues."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    some = np.argsort(-values, kind="stable")[:rank]
    some = some[values[some] > 0]
    return (vectors[:, some] / values[some]) @ vectors[:, some].T

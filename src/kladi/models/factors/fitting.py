"""Covariance and lattice -> loadings and noise: reduce, peel, align, and climb the likelihood to its top.

Source: Li, Yu, Zhou, Hierarchical contrastive learning for multimodal data, 2026, for the model and the peeling; they
refine by squared error of the covariance, the linear case of the contrastive objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int

from kladi.models.factors.covariance import Covariance, Dense, block_diagonal, leading, nearest_semidefinite, places
from kladi.models.factors.likelihood import likeliest
from kladi.models.factors.peeling import aligned, peeled, stacked
from kladi.structure.lattice import Lattice

Noise = Literal["global", "per_modality", "per_feature"]
SPARE = 8
"""Directions of each modality that are kept beyond its factors while the first estimate is made."""
LEAST, HEYWOOD = 1e-9, 5e-3
"""Share of a feature's variance that is noise at least; the second where each feature has its own, which else may
vanish with a factor that is that feature alone."""


@dataclass(frozen=True)
class Fitted:
    """weights: W. noise: variance of each feature's. steps: of the search, 0 without one. converged: whether it came to
    its end."""

    weights: Float64[np.ndarray, "d R"]
    noise: Float64[np.ndarray, " d"]
    steps: int
    converged: bool


def fit(covariance: Covariance, lattice: Lattice, *, noise: Noise = "global", refine: bool = True) -> Fitted:
    """Loadings for a lattice.

    Raises:
        ValueError: a modality has as many factors as features, or more; its noise could not be told.
    """
    sizes = covariance.sizes
    for m, size in enumerate(sizes):
        factors = int(lattice.of_modality(m).sum())
        if factors >= size:
            raise ValueError(f"modality {m} has {size} features for {factors} factors; it needs more than factors")
    own = [leading(covariance, int(lattice.of_modality(m).sum()), SPARE, m) for m in range(len(sizes))]
    bases = [vectors for _, vectors in own]
    small = covariance.projected(bases)
    whole_fit = isinstance(covariance, Dense) or covariance.complete
    if not whole_fit:  # blocks from different patients need not fit together: made to, where all that matters is seen
        small = Dense(nearest_semidefinite(small.matrix), small.sizes)
    variance = noise_of(covariance, small, lattice, "global" if noise == "global" else "per_modality")
    signal = small.matrix - np.diag(np.repeat(variance, small.sizes))
    first = stacked(aligned(peeled(signal, small.sizes, lattice), signal, small.sizes, lattice), small.sizes, lattice)
    diagonal = covariance.diagonal()
    least = np.maximum((HEYWOOD if noise == "per_feature" else LEAST) * diagonal, 1e-300)
    told = np.maximum(np.repeat(variance, sizes), least)
    if not refine:
        found = block_diagonal(bases) @ first
        return Fitted(canonical(found, sizes, lattice), _apart(found, diagonal, told, least, noise), 0, True)
    # In few coordinates first, where a step costs next to nothing; what is left to gain outside them is little.
    spread = np.maximum(np.repeat(variance, small.sizes), LEAST * np.trace(small.matrix) / len(small.matrix))
    near = likeliest(small, first, spread, mask(small.sizes, lattice), spread)
    found = block_diagonal(bases) @ near.weights
    told = _apart(found, diagonal, told, least, noise)
    if not whole_fit:
        return Fitted(canonical(found, sizes, lattice), told, near.steps, near.converged)
    whole = likeliest(covariance, found, told, mask(sizes, lattice), least, _groups(sizes, noise))
    return Fitted(canonical(whole.weights, sizes, lattice), whole.noise, whole.steps, whole.converged)


def _apart(
    w: Float64[np.ndarray, "d R"],
    diagonal: Float64[np.ndarray, " d"],
    told: Float64[np.ndarray, " d"],
    least: Float64[np.ndarray, " d"],
    noise: Noise,
) -> Float64[np.ndarray, " d"]:
    """Noise of each feature: what loadings leave of its variance where each has its own, else what was told."""
    return np.maximum(diagonal - np.square(w).sum(axis=1), least) if noise == "per_feature" else told


def _groups(sizes: tuple[int, ...], noise: Noise) -> Int[np.ndarray, " d"]:
    """Features that share a noise have one number."""
    if noise == "per_feature":
        return np.arange(sum(sizes))
    return np.repeat(np.arange(len(sizes)) * (noise == "per_modality"), sizes)


def noise_of(covariance: Covariance, small: Dense, lattice: Lattice, noise: Noise) -> Float64[np.ndarray, " M"]:
    """Mean of the eigenvalues that no factor explains: of the whole covariance, or of each modality's block.

    Args:
        small: the covariance of the leading directions of each modality, which hold those of the whole.
    """
    sizes, diagonal = covariance.sizes, covariance.diagonal()
    variance = [float(diagonal[place].sum()) for place in places(sizes)]
    if noise == "per_modality":
        blocks = [small.matrix[place, place] for place in places(small.sizes)]
        count = [int(lattice.of_modality(m).sum()) for m in range(len(sizes))]
    else:
        blocks, count, sizes, variance = [small.matrix], [lattice.width], (sum(sizes),), [sum(variance)]
    found = []
    for block, rank, size, total in zip(blocks, count, sizes, variance, strict=True):
        explained = np.linalg.eigvalsh(block)[::-1][:rank].sum()
        found.append(max(float(total - explained) / max(size - rank, 1), 0.0))
    return np.array(found if noise == "per_modality" else found * lattice.modalities)


def mask(sizes: tuple[int, ...], lattice: Lattice) -> Bool[np.ndarray, "d R"]:
    """Entries of W that may differ from zero."""
    return np.concatenate(
        [np.broadcast_to(lattice.of_modality(m), (size, lattice.width)) for m, size in enumerate(sizes)]
    )


def canonical(w: Float64[np.ndarray, "d R"], sizes: tuple[int, ...], lattice: Lattice) -> Float64[np.ndarray, "d R"]:
    """The same loadings in the one rotation of each block that is always the same: columns orthogonal over all of its
    modalities, the longest first, the largest entry of each positive."""
    out = np.zeros_like(w)
    for structure, columns in lattice.columns():
        rows = np.concatenate([np.arange(p.start, p.stop) for p in (places(sizes)[m] for m in structure)])
        left, lengths, _ = np.linalg.svd(w[rows, columns], full_matrices=False)
        turned = left * lengths
        signs = np.sign(turned[np.abs(turned).argmax(axis=0), np.arange(turned.shape[1])])
        out[rows, columns] = turned * np.where(signs == 0, 1.0, signs)
    return out

"""Covariance and lattice -> noise and loadings: reduce, peel, align, refine.

    min_W  1/4 || W W^T - (S - D) ||_F^2,   W zero where a modality takes no part,   D the noise

is the linear case of the structure-aware contrastive objective: with encoders V = W^T its contrast part is
-1/2 tr(V S V^T) and its penalty 1/4 || V V^T ||_F^2.

Source: Li, Yu, Zhou, Hierarchical contrastive learning for multimodal data, 2026; here the refinement runs to
convergence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64
from scipy.optimize import minimize

from kladi.models.factors.covariance import Covariance, Dense, block_diagonal, leading, nearest_semidefinite, places
from kladi.models.factors.peeling import aligned, peeled, stacked
from kladi.structure.lattice import Lattice

Noise = Literal["global", "per_modality"]
SPARE = 8
"""Directions of each modality that are kept beyond its factors while the first estimate is made."""
STEPS, TOLERANCE = 1_000, 1e-8


@dataclass(frozen=True)
class Fitted:
    """weights: W. noise: variance of a feature of each modality. steps: of the refinement, 0 without one. converged:
    whether it came to its end."""

    weights: Float64[np.ndarray, "d R"]
    noise: Float64[np.ndarray, " M"]
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
    variance = noise_of(covariance, small, lattice, noise)
    signal = small.matrix - np.diag(np.repeat(variance, small.sizes))
    first = stacked(aligned(peeled(signal, small.sizes, lattice), signal, small.sizes, lattice), small.sizes, lattice)
    if not refine:
        return Fitted(canonical(block_diagonal(bases) @ first, sizes, lattice), variance, 0, True)
    # In few coordinates first, where a step costs next to nothing; what is left to gain outside them is little.
    near, steps, converged = refined(small, first, variance, lattice)
    found = block_diagonal(bases) @ near
    if whole_fit:
        found, steps, converged = refined(covariance, found, variance, lattice)
    return Fitted(canonical(found, sizes, lattice), variance, steps, converged)


def noise_of(covariance: Covariance, small: Dense, lattice: Lattice, noise: Noise) -> Float64[np.ndarray, " M"]:
    """Mean of the eigenvalues that no factor explains: of the whole covariance, or of each modality's block.

    Args:
        small: the covariance of the leading directions of each modality, which hold those of the whole.
    """
    sizes, variance = covariance.sizes, [covariance.variance(m) for m in range(len(covariance.sizes))]
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


def refined(
    covariance: Covariance, start: Float64[np.ndarray, "d R"], noise: Float64[np.ndarray, " M"], lattice: Lattice
) -> tuple[Float64[np.ndarray, "d R"], int, bool]:
    """The minimum of the objective from a start, by L-BFGS on the free entries; steps, and whether it converged."""
    free = mask(covariance.sizes, lattice)
    diagonal = np.repeat(noise, covariance.sizes)[:, None]
    # In units of the signal, so that tolerances mean the same for any data.
    scale = max(float(np.linalg.norm(start.T @ start)), 1e-300)

    def objective(entries: np.ndarray) -> tuple[float, np.ndarray]:
        w = np.zeros_like(start)
        w[free] = entries * scale**0.5
        image = covariance.times(w) - diagonal * w
        inner = w.T @ w
        value = 0.25 * float((inner * inner).sum()) - 0.5 * float((w * image).sum())
        return value / scale**2, (w @ inner - image)[free] / scale**1.5

    least = covariance.precision  # a line search below it would only follow rounding
    found = minimize(
        objective,
        start[free] / scale**0.5,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": STEPS, "ftol": max(1e-3 * TOLERANCE, least), "gtol": max(TOLERANCE, least), "maxcor": 20},
    )
    w = np.zeros_like(start)
    w[free] = found.x * scale**0.5
    return w, int(found.nit), bool(found.success)


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

"""Loadings drawn as in the simulations of the method, and its equations as loops."""

import numpy as np

from kladi.structure.lattice import Lattice


def loadings(sizes, lattice: Lattice, rng) -> np.ndarray:
    """W: orthonormal times U(.5, 1.5) lengths times a rotation, for every structure and modality in it."""
    w, ends = np.zeros((sum(sizes), lattice.width)), np.cumsum((0, *sizes))
    for structure, columns in lattice.columns():
        r = columns.stop - columns.start
        for m in structure:
            q1, _ = np.linalg.qr(rng.normal(size=(sizes[m], r)))
            q2, _ = np.linalg.qr(rng.normal(size=(r, r)))
            w[ends[m] : ends[m + 1], columns] = q1 * np.sort(rng.uniform(0.5, 1.5, r))[::-1] @ q2
    return w


def sample(w, sizes, noise, n, rng, correlation=0.0):
    """n patients: tables x = z W^T + e, and z. noise: variance of every feature, or one a feature."""
    width = w.shape[1]
    z = np.sqrt(1 - correlation) * rng.normal(size=(n, width)) + np.sqrt(correlation) * rng.normal(size=(n, 1))
    x = z @ w.T + rng.normal(size=(n, len(w))) * np.sqrt(noise)
    return np.split(x, np.cumsum(sizes)[:-1], axis=1), z


def contrast(v, x):
    """The contrast part of the objective over a batch: -1/(2n) sum_i <Vx_i, Vx_i> + 1/(2n(n-1)) sum_ij <Vx_i, Vx_j>."""
    n, h = len(x), x @ v.T
    same = sum(h[i] @ h[i] for i in range(n))
    other = sum(h[i] @ h[j] for i in range(n) for j in range(n) if i != j)
    return -same / (2 * n) + other / (2 * n * (n - 1))

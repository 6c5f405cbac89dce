"""The loadings and the noise under which a covariance is likeliest, from a start.

    1/2 log det Sigma + 1/2 tr(Sigma^-1 S),   Sigma = W W^T + D,   W zero where a modality takes no part, D diagonal

W is seen through U = D^-1 W alone, so that only products S U and R x R systems are needed. With A = I + W^T U,
B = A^-1, C = U^T S U

    log det Sigma = log det D + log det A,             tr(Sigma^-1 S) = tr(D^-1 S) - tr(B C)
    Sigma^-1 W = U B,                                  slope in W = U B - D^-1 S U B + U B C B
    slope in D = 1/2 diag(Sigma^-1 - Sigma^-1 S Sigma^-1)

Normal data make it the maximum of the likelihood; of others it still is right with many patients. Squared error of the
covariance, 1/4 || W W^T + D - S ||_F^2, would do too, but it weighs features of much noise as much as those of little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int
from scipy.optimize import minimize

from kladi.models.factors.covariance import Covariance

STEPS, TOLERANCE, SLOPE = 1_000, 1e-11, 1e-9
"""Of L-BFGS: steps at most, and the change of the objective, and slope, each for one feature, at which it ends."""


@dataclass(frozen=True)
class Likeliest:
    """weights: W. noise: diagonal of D. steps: of the search. converged: whether it came to its end."""

    weights: Float64[np.ndarray, "d R"]
    noise: Float64[np.ndarray, " d"]
    steps: int
    converged: bool


def likeliest(
    covariance: Covariance,
    start: Float64[np.ndarray, "d R"],
    noise: Float64[np.ndarray, " d"],
    free: Bool[np.ndarray, "d R"],
    least: Float64[np.ndarray, " d"],
    groups: Int[np.ndarray, " d"] | None = None,
) -> Likeliest:
    """The minimum that L-BFGS reaches from a start.

    Args:
        start, noise: where it begins. free: entries of W that may differ from zero.
        least: below which no noise falls.
        groups: features of one number share one noise, the mean of their starts; None: the noise stays as it is.
    """
    # Loadings in units of their noise: one step then suits all features.
    unit = np.broadcast_to(np.sqrt(noise)[:, None], free.shape)[free]
    entries = int(free.sum())
    own = np.zeros(len(noise), dtype=np.int64) if groups is None else groups
    count = np.bincount(own)
    floor = np.zeros(len(count))
    np.maximum.at(floor, own, least)
    diagonal = covariance.diagonal()

    def unpacked(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        w = np.zeros_like(start)
        w[free] = unit * x[:entries]
        return w, noise if groups is None else np.exp(x[entries:])[own]

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        w, psi = unpacked(x)
        u = w / psi[:, None]
        su = covariance.times(u)
        a = np.eye(w.shape[1]) + w.T @ u
        b, c = np.linalg.inv(a), u.T @ su
        ub = u @ b
        value = np.log(psi).sum() + np.linalg.slogdet(a)[1] + (diagonal / psi).sum() - (b * c).sum()
        sub, ubcb = (su @ b) / psi[:, None], ub @ c @ b
        slope = unit * (ub - sub + ubcb)[free]
        if groups is not None:
            inverse = 1 / psi - (ub * u).sum(axis=1)
            seen = diagonal / psi**2 - 2 * (sub * u).sum(axis=1) + (ubcb * u).sum(axis=1)
            slope = np.concatenate([slope, np.bincount(own, 0.5 * (inverse - seen) * psi)])
        return 0.5 * float(value) / len(psi), slope / len(psi)

    x = start[free] / unit
    bounds: list[tuple[float | None, float | None]] = [(None, None)] * entries
    if groups is not None:
        logarithm = np.log(np.maximum(np.bincount(own, noise) / count, floor))
        x = np.concatenate([x, logarithm])
        bounds += [(float(np.log(low)), None) for low in floor]
    finest = covariance.precision  # a line search below it would only follow rounding
    options = {"maxiter": STEPS, "ftol": max(TOLERANCE, finest), "gtol": max(SLOPE, finest), "maxcor": 20}
    found = minimize(objective, x, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    w, psi = unpacked(found.x)
    return Likeliest(w, psi, int(found.nit), bool(found.success))

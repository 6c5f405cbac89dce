"""Which structures speak for an outcome: least squares on factors, with groups that may be left out whole.

    y = mean + sum_S beta_S^T z_S + error;   E[y | x] = mean + beta^T E[z | x]

so that a regression on the expected factors, posterior scores, finds beta itself: the noise of the scores is accounted
for, whichever modalities a patient lacks. With H = E[zz^T], g = E[zy] of centred scores and outcome, beta minimises

    1/2 beta^T H beta - g^T beta + penalty sum_S sqrt(r_S) ||beta_S||

which chooses the groups; their beta is that without the penalty, which would shrink it.

Source: corrected least squares and group lasso on factors are those of Li, Yu, Zhou, Hierarchical contrastive learning
for multimodal data, 2026, there with a correction of H for the noise of unshrunken scores; the weights sqrt(r_S) are
those of Yuan and Lin, 2006.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int

from kladi.structure.lattice import Lattice, Structure

PENALTIES = (*(10.0 ** (-k / 3) for k in range(13)), 0.0)
"""Tried, as shares of the least penalty that leaves everything out."""
SWEEPS, TOLERANCE = 300, 1e-6
"""Of the group lasso, which chooses groups and no numbers."""


@dataclass(frozen=True)
class Outcome:
    """beta: of every factor. mean, centre: of the outcome, and of the scores. penalty: share that was chosen."""

    beta: Float64[np.ndarray, " R"]
    mean: float
    centre: Float64[np.ndarray, " R"]
    penalty: float
    lattice: Lattice

    def predict(self, scores: Float64[np.ndarray, "n R"]) -> Float64[np.ndarray, " n"]:
        """The expected outcome."""
        return self.mean + (scores - self.centre) @ self.beta

    @property
    def strength(self) -> dict[Structure, float]:
        """||beta_S||, which no rotation within a structure changes; 0 where it was left out."""
        return {s: float(np.linalg.norm(self.beta[place])) for s, place in self.lattice.columns()}


def fit(
    scores: Float64[np.ndarray, "n R"], y: Float64[np.ndarray, " n"], lattice: Lattice, *, folds: int = 5, seed: int = 0
) -> Outcome:
    """Groups are chosen by the lasso, their beta by least squares without it; the penalty by cross-validation among
    these rows alone: the largest that does no worse than the best, by one standard error of the folds' difference.

    Raises:
        ValueError: fewer rows than folds.
    """
    if len(y) < 2 * folds:
        raise ValueError(f"{len(y)} patients have an outcome; {folds} folds need {2 * folds}")
    errors = np.zeros((folds, len(PENALTIES)))
    for fold, test in enumerate(_folds(len(y), folds, seed)):
        train = np.setdiff1d(np.arange(len(y)), test)
        for i, found in enumerate(_path(scores[train], y[train], lattice)):
            errors[fold, i] = float(np.square(y[test] - found.predict(scores[test])).mean())
    worse = errors - errors[:, [int(errors.mean(axis=0).argmin())]]
    no_worse = worse.mean(axis=0) <= worse.std(axis=0, ddof=1) / np.sqrt(folds)
    return _path(scores, y, lattice)[int(np.argmax(no_worse))]


def nested(
    scores: Float64[np.ndarray, "n R"], y: Float64[np.ndarray, " n"], lattice: Lattice, *, folds: int = 5, seed: int = 0
) -> list[tuple[Outcome, float]]:
    """A fit for each outer fold, its penalty chosen inside, and its share of the variance of rows that it never saw:
    1 - sum (y - prediction)^2 / sum (y - training mean)^2."""
    out = []
    for test in _folds(len(y), folds, seed + 1):
        train = np.setdiff1d(np.arange(len(y)), test)
        found = fit(scores[train], y[train], lattice, folds=folds, seed=seed)
        rest = np.square(y[test] - found.predict(scores[test])).sum()
        whole = np.square(y[test] - y[train].mean()).sum()
        out.append((found, float(1 - rest / whole) if whole > 0 else 0.0))
    return out


def _folds(n: int, folds: int, seed: int) -> list[Int[np.ndarray, " m"]]:
    return np.array_split(np.random.default_rng([seed, 0x6F7574]).permutation(n), folds)


def _path(x: np.ndarray, y: np.ndarray, lattice: Lattice) -> list[Outcome]:
    """One fit a penalty, from the largest to none, each from where the one before ended; what the lasso keeps is fitted
    again without it."""
    mean, centre = float(y.mean()), x.mean(axis=0)
    z, t = x - centre, y - mean
    h, g = z.T @ z / len(z), z.T @ t / len(z)
    groups = [(place, np.sqrt(place.stop - place.start)) for _, place in lattice.columns()]
    most = max(float(np.linalg.norm(g[place])) / weight for place, weight in groups)
    beta = np.zeros(len(g))
    out: list[Outcome] = []
    for share in PENALTIES:
        beta = group_lasso(h, g, share * most, groups, beta)
        kept = np.flatnonzero(beta)
        free = np.zeros_like(beta)
        free[kept] = np.linalg.lstsq(h[np.ix_(kept, kept)], g[kept], rcond=1e-10)[0]
        out.append(Outcome(free, mean, centre, share, lattice))
    return out


def group_lasso(
    h: Float64[np.ndarray, "R R"],
    g: Float64[np.ndarray, " R"],
    penalty: float,
    groups: list[tuple[slice, float]],
    start: Float64[np.ndarray, " R"],
) -> Float64[np.ndarray, " R"]:
    """The minimiser, by cyclic block steps of 1 / (largest eigenvalue of the block) and group soft thresholds."""
    beta = start.copy()
    if penalty == 0:
        return np.linalg.lstsq(h, g, rcond=1e-10)[0]
    steps = [max(float(np.linalg.eigvalsh(h[place, place])[-1]), 1e-8) for place, _ in groups]
    for _ in range(SWEEPS):
        moved = 0.0
        for (place, weight), length in zip(groups, steps, strict=True):
            target = beta[place] - (h[place] @ beta - g[place]) / length
            size, limit = float(np.linalg.norm(target)), penalty * weight / length
            new = target * (1 - limit / size) if size > limit else np.zeros_like(target)
            moved = max(moved, float(np.abs(new - beta[place]).max()))
            beta[place] = new
        if moved <= TOLERANCE * max(float(np.abs(beta).max()), 1e-12):
            break
    return beta

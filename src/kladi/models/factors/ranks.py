"""How many factors, and shared by whom: a lattice from data alone.

1. Factors of each modality, R_m: singular values that exceed those of the same matrix with random signs, at most one
   for `ROWS_A_FACTOR` patients.
2. For every two disjoint sets A, B of modalities: how many canonical correlations between their leading scores are
   there? In population, the sum of r_T over structures T that meet both.
3. The non-negative integers r_T that fit all these numbers best, with no modality over its R_m; what is left of R_m is
   private.

Where the signal is weak and patients are few no rule is safe: look at the stability over resamples.

Source: Hong, Sheng, Dobriban, Selecting the number of components in PCA via random signflips, 2020; Bartlett, The
general canonical correlation distribution, 1947. The inversion is ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse.linalg import svds
from scipy.stats import chi2

from kladi.structure.lattice import Lattice, Structure, all_structures

FLIPS, DEVIATIONS = 20, 3.5
"""Draws of signs, and how far above their mean a singular value must lie."""
ROUNDS, STEPS, LEAST_NOISE = 5, 200, 1e-4
"""Of the search for the noise: rounds, steps in each, and the least share of a column's variance that is noise."""
SPARE_SCORES = 3
ROWS_A_FACTOR = 10
"""More factors than one for so many patients are not told: of 92 patients 40 would be, each of them its own noise."""
LEVEL = 1e-3
"""Of each test of a canonical correlation."""
MOST_ROWS = 20_000
"""Patients that ranks are told from, drawn by lot from more."""
Sets = tuple[Structure, Structure]


def lattice_of(tables: Sequence[Float[np.ndarray, "n _"]], present: Bool[np.ndarray, "n M"], seed: int = 0) -> Lattice:
    """The lattice that these tables speak for.

    Args:
        tables: a row a patient; rows that are not there are not read.
        present: whether a patient has a modality.
        seed: of signs, and of the patients where there are too many.

    Raises:
        ValueError: no factor stands out of the noise in any modality.
    """
    rng = np.random.default_rng([seed, 0x72616E6B])
    if len(present) > MOST_ROWS:
        some = np.sort(rng.permutation(len(present))[:MOST_ROWS])
        tables, present = [x[some] for x in tables], present[some]
    count = len(tables)
    most: list[int] = []
    scores: list[Float64[np.ndarray, "n k"]] = []
    for m, table in enumerate(tables):
        x = table[present[:, m]].astype(np.float64)
        rank, left = factors(x, rng)
        most.append(rank)
        width = min(rank + SPARE_SCORES if rank else 0, max(1, len(x) // (4 * count)), left.shape[1])
        score = np.zeros((len(present), width))
        score[present[:, m]] = left[:, :width]
        scores.append(score)
    if not any(most):
        raise ValueError("no factor stands out of the noise in any modality; give the ranks yourself")
    found: dict[Sets, int] = {}
    for a, b in disjoint(count):
        both = present[:, [*a, *b]].all(axis=1)
        left, right = (np.concatenate([scores[m][both] for m in side], axis=1) for side in (a, b))
        found[a, b] = common(left, right)
    return inverted(count, most, found)


def factors(x: Float64[np.ndarray, "n d"], rng: np.random.Generator) -> tuple[int, Float64[np.ndarray, "n k"]]:
    """Number of singular values that signs cannot explain, and the left singular vectors of the scaled matrix.

    Columns are scaled to unit variance, then to the noise that maximum likelihood finds beside as many factors, until
    their number stays; what was found is taken out, and the rest looked at again, until nothing stands out.
    """
    centred = x - x.mean(axis=0)
    deviation = centred.std(axis=0)
    scaled = centred[:, deviation > 0] / deviation[deviation > 0]
    rank, left, _, _ = _standing_out(scaled, rng)
    for _ in range(ROUNDS):
        before = rank
        whitened = scaled / np.sqrt(uniqueness(scaled.T @ scaled / max(len(x), 1), rank))
        rank, left, _, _ = _standing_out(whitened, rng)
        if rank == before:
            break
    return rank, left


def uniqueness(correlation: Float64[np.ndarray, "d d"], rank: int) -> Float64[np.ndarray, " d"]:
    """Noise of each column beside `rank` factors, by maximum likelihood: with S scaled to unit noise, the factors are
    its eigenvectors above 1, and what they leave of each column is its noise again. None falls below `LEAST_NOISE`.

    Source: Barber, Bayesian Reasoning and Machine Learning, 2012, algorithm 21.1.
    """
    psi = np.maximum(np.diag(correlation).copy(), LEAST_NOISE)
    if not rank:
        return psi
    for _ in range(STEPS):
        root = np.sqrt(psi)
        values, vectors = np.linalg.eigh(correlation / np.outer(root, root))
        loadings = root[:, None] * vectors[:, -rank:] * np.sqrt(np.maximum(values[-rank:] - 1, 0.0))
        new = np.maximum(np.diag(correlation) - np.square(loadings).sum(axis=1), LEAST_NOISE)
        if np.abs(new - psi).max() < 1e-4:
            return new
        psi = new
    return psi


def _standing_out(x: np.ndarray, rng: np.random.Generator) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """How many of the singular values, and the decomposition."""
    if min(x.shape) < 2:
        return 0, np.zeros((len(x), 0)), np.zeros(0), np.zeros((0, x.shape[1]))
    left, values, right = np.linalg.svd(x, full_matrices=False)
    # More factors than this leave noise and factors of d columns no difference (Ledermann's bound).
    n, d = x.shape
    most = min(n - 1, -(-n // ROWS_A_FACTOR), int(np.floor((2 * d + 1 - np.sqrt(8 * d + 1)) / 2)))
    rank = 0
    while rank < most:
        rest = _noise(x, left, values, right, rank)
        drawn = [_largest(rest * rng.choice([-1.0, 1.0], size=x.shape), rng) for _ in range(FLIPS)]
        limit = _edge(x.shape, rank) * (np.mean(drawn) + DEVIATIONS * np.std(drawn, ddof=1))
        more = int((values[rank:] > limit).sum())
        if not more:
            break
        rank += more
    return max(0, min(rank, most)), left, values, right


def _noise(x: np.ndarray, left: np.ndarray, values: np.ndarray, right: np.ndarray, rank: int) -> np.ndarray:
    """What the first factors leave, each column at the length that its noise had: a column that lies in what was taken
    out has lost as much of its noise."""
    rest = x - (left[:, :rank] * values[:rank]) @ right[:rank]
    return rest / np.sqrt(np.maximum(1 - np.square(right[:rank]).sum(axis=0), 0.05))


def _edge(shape: tuple[int, ...], rank: int) -> float:
    """The largest singular value of noise in n - rank by d - rank directions, over that in n by d."""
    n, d = shape
    fewer = np.sqrt(n - rank) + np.sqrt(d - rank)
    return float(np.sqrt(n / (n - rank)) * fewer / (np.sqrt(n) + np.sqrt(d)))


def _largest(x: np.ndarray, rng: np.random.Generator) -> float:
    """The largest singular value, to a thousandth."""
    start = rng.normal(size=min(x.shape))
    return float(svds(x, k=1, tol=1e-3, v0=start, return_singular_vectors=False)[0])


def disjoint(modalities: int) -> list[Sets]:
    """Every unordered pair of disjoint sets."""
    every = all_structures(modalities)
    return [(a, b) for a, b in itertools.combinations(every, 2) if not set(a) & set(b)]


def common(left: Float64[np.ndarray, "n p"], right: Float64[np.ndarray, "n q"]) -> int:
    """Number of canonical correlations that are not zero, by Bartlett's tests one after another."""
    n, p, q = len(left), left.shape[1], right.shape[1]
    if not p or not q or n <= p + q + 1:
        return 0
    one, two = (np.linalg.qr(x - x.mean(axis=0))[0] for x in (left, right))
    rho = np.clip(np.linalg.svd(one.T @ two, compute_uv=False), 0, 1 - 1e-12)
    rest = -np.log1p(-(rho**2))[::-1].cumsum()[::-1]  # of the k-th and all that are smaller
    for k in range(len(rho)):
        statistic = (n - 1 - (p + q + 1) / 2) * rest[k]
        if chi2.sf(statistic, (p - k) * (q - k)) > LEVEL:
            return k
    return len(rho)


def inverted(modalities: int, most: Sequence[int], found: dict[Sets, int]) -> Lattice:
    """The ranks that fit best: least sum of |sum_{T meets A and B} r_T - found_AB| with sum_{T: m in T} r_T <= R_m.

    Of several that fit alike the one with fewest shared factors: one factor of three is not called three of two.
    """
    shared = [s for s in all_structures(modalities) if len(s) > 1]
    k, j = len(shared), len(found)
    if not k:
        return Lattice.of(modalities, {(m,): most[m] for m in range(modalities)})
    meets = np.array([[bool(set(t) & set(a)) and bool(set(t) & set(b)) for t in shared] for a, b in found], dtype=float)
    value = np.array(list(found.values()), dtype=float)
    misfit = np.eye(j)
    of_modality = np.array([[m in t for t in shared] for m in range(modalities)], dtype=float)
    within = [
        LinearConstraint(np.hstack([meets, misfit]), lb=value),  # sum + misfit >= found
        LinearConstraint(np.hstack([meets, -misfit]), ub=value),  # sum - misfit <= found
        LinearConstraint(np.hstack([of_modality, np.zeros((modalities, j))]), ub=np.array(most, dtype=float)),
    ]
    cost = np.concatenate([np.full(k, 1e-3), np.ones(j)])
    whole = np.concatenate([np.ones(k), np.zeros(j)])
    solved = milp(cost, constraints=within, integrality=whole, bounds=Bounds(0, np.inf))
    ranks: dict[Structure, int] = {s: round(float(r)) for s, r in zip(shared, solved.x[:k], strict=True)}
    for m in range(modalities):
        ranks[m,] = most[m] - sum(r for s, r in ranks.items() if m in s and len(s) > 1)
    return Lattice.of(modalities, ranks)

"""Are the factors found that made the data? Simulated patients, ours beside peers, 20 replications, as Markdown.

    python bench/factor_simulation.py [--replications 20] [--only "low noise"]

Loadings are orthonormal columns times lengths from U(.5, 1.5) times a rotation, three factors a structure; factors and
noise are Gaussian; replication r draws with seed 20 + r, the same for every method. Every method is given the same
number of factors, but "auto". Errors are of what is identifiable: `block` is the mean over structures S and pairs of
modalities m, k in S of ||W_S^(m) W_S^(k)^T - estimate|| / ||W_S^(m) W_S^(k)^T||; `gram` the same of all of W W^T;
`angle` the mean squared sine between the spans of W_S^(m). No loading is turned towards the truth. `F1` is of the
structures that are said to be there, `exact` the share of replications in which the whole lattice is right, ranks too.

PCA knows no structure: it has only `gram`. SLIDE (Gaynanova, Li, Biometrics 2019) is our own few lines of its
alternation given the structure, 1,000 rounds; "shrunk" subtracts the noise from the squared length of its loadings.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kladi import HierarchicalFactorModel, Lattice
from kladi.models.factors.fitting import mask
from kladi.models.factors.peeling import unstacked

ROUNDS = 1_000
FULL = Lattice.of(3, 3)


@dataclass(frozen=True)
class Setting:
    """sizes: features. noise: variance. patients. correlation: between all factors. uneven: whether the noise differs
    between features, from a fifth to nine fifths. missing: share of patients who lack each modality."""

    sizes: tuple[int, ...]
    noise: float
    patients: int
    correlation: float = 0.0
    uneven: bool = False
    missing: float = 0.0
    lattice: Lattice = FULL


SETTINGS = {
    "low noise, 500": Setting((60, 80, 100), 0.1, 500),
    "low noise, 2,000": Setting((60, 80, 100), 0.1, 2_000),
    "high noise, 1,000": Setting((40, 50, 60), 1.0, 1_000),
    "high noise, 4,000": Setting((40, 50, 60), 1.0, 4_000),
    "some structures, 1,000": Setting(
        (60, 80, 100), 0.5, 1_000, lattice=Lattice.of(3, {"0+1+2": 2, "0+2": 3, "1": 4, "2": 1})
    ),
    "four modalities, 2,000": Setting((60, 60, 60, 60), 0.1, 2_000, lattice=Lattice.of(4, 1)),
    "factors correlated .1, 2,000": Setting((60, 80, 100), 0.1, 2_000, correlation=0.1),
    "factors correlated .3, 2,000": Setting((60, 80, 100), 0.1, 2_000, correlation=0.3),
    "uneven noise, 2,000": Setting((60, 80, 100), 0.5, 2_000, uneven=True),
    "a fifth missing, 2,000": Setting((60, 80, 100), 0.1, 2_000, missing=0.2),
}


@dataclass(frozen=True)
class Found:
    """weights: W in the columns of a lattice; lattice None where the method knows none."""

    weights: np.ndarray
    lattice: Lattice | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=20)
    parser.add_argument("--only", default="", help="settings whose name holds this")
    options = parser.parse_args()
    for name, setting in SETTINGS.items():
        if options.only in name:
            print(f"\n### {name}\n\n{table(setting, options.replications)}", flush=True)


METHODS: dict[str, Callable[[list[np.ndarray], Setting], Found]] = {
    "PCA": lambda x, s: Found(principal(x, s.lattice.width), None),
    "peeling alone": lambda x, s: ours(x, s, refine=False),
    "kladi": lambda x, s: ours(x, s),
    "kladi, noise a modality": lambda x, s: ours(x, s, noise="per_modality"),
    "kladi, auto": lambda x, _: automatic(x),
    "SLIDE, structure given": lambda x, s: slide(x, s, shrunk=False),
    "SLIDE, shrunk": lambda x, s: slide(x, s, shrunk=True),
}


def table(setting: Setting, replications: int) -> str:
    """A line a method: mean and sd over replications."""
    lines = ["| method | F1 | exact | block | angle | gram | CPU s |", "|---" * 7 + "|"]
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for replication in range(replications):
        tables, weights = drawn(setting, np.random.default_rng(20 + replication))
        for name, method in METHODS.items():
            if setting.missing and name.startswith(("PCA", "SLIDE")):
                continue  # they need every patient in every table
            start = time.process_time()
            try:
                found = method(tables, setting)
            except ValueError as error:
                measured[name].append({"failed": 1.0})
                print(f"{name}, replication {replication}: {error}")
                continue
            measured[name].append({"seconds": time.process_time() - start, **errors(found, weights, setting)})
    for name, some in measured.items():
        cells = [spread([one[key] for one in some if key in one]) for key in ("f1", "exact", "block", "angle", "gram")]
        seconds = [one["seconds"] for one in some if "seconds" in one]
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.mean(seconds):.2f} |" if seconds else f"| {name} |")
    return "\n".join([*lines, f"\nn = {replications} replications."])


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def drawn(setting: Setting, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Tables of patients, and W."""
    sizes, lattice = setting.sizes, setting.lattice
    ends = np.cumsum((0, *sizes))
    w = np.zeros((ends[-1], lattice.width))
    for structure, columns in lattice.columns():
        r = columns.stop - columns.start
        for m in structure:
            left = np.linalg.qr(rng.normal(size=(sizes[m], r)))[0]
            turn = np.linalg.qr(rng.normal(size=(r, r)))[0]
            w[ends[m] : ends[m + 1], columns] = left * np.sort(rng.uniform(0.5, 1.5, r))[::-1] @ turn
    rho = setting.correlation
    z = np.sqrt(1 - rho) * rng.normal(size=(setting.patients, lattice.width))
    z += np.sqrt(rho) * rng.normal(size=(setting.patients, 1))
    level = np.sqrt(setting.noise * (rng.uniform(0.2, 1.8, ends[-1]) if setting.uneven else np.ones(ends[-1])))
    x = z @ w.T + level * rng.normal(size=(setting.patients, ends[-1]))
    tables = np.split(x, ends[1:-1], axis=1)
    for one in tables:
        one[rng.random(len(one)) < setting.missing] = np.nan
    return tables, w


def errors(found: Found, w: np.ndarray, setting: Setting) -> dict[str, float]:
    """Of one replication."""
    out = {"gram": float(np.linalg.norm(found.weights @ found.weights.T - w @ w.T) / np.linalg.norm(w @ w.T))}
    if found.lattice is None:
        return out
    said, true = set(found.lattice.structures), set(setting.lattice.structures)
    out["f1"] = 2 * len(said & true) / (len(said) + len(true))
    out["exact"] = float(found.lattice == setting.lattice)
    mine, theirs = (unstacked(x, setting.sizes, of) for x, of in ((found.weights, found.lattice), (w, setting.lattice)))
    blocks, angles = [], []
    for structure in setting.lattice.structures:
        for m, k in itertools.combinations_with_replacement(structure, 2):
            right = theirs[structure, m] @ theirs[structure, k].T
            there = structure in said
            guess = mine[structure, m] @ mine[structure, k].T if there else np.zeros_like(right)
            blocks.append(np.linalg.norm(guess - right) / np.linalg.norm(right))
            if m == k:
                angles.append(sine(theirs[structure, m], mine[structure, m]) if there else 1.0)
    return {**out, "block": float(np.mean(blocks)), "angle": float(np.mean(angles))}


def sine(true: np.ndarray, found: np.ndarray) -> float:
    """Mean squared sine of the principal angles, over the true directions."""
    a, b = np.linalg.qr(true)[0], np.linalg.qr(found)[0]
    return float(1 - np.square(np.linalg.svd(a.T @ b, compute_uv=False)).sum() / a.shape[1])


# --- methods ---------------------------------------------------------------------------------------------------------


def ours(tables: list[np.ndarray], setting: Setting, *, refine: bool = True, noise: str = "global") -> Found:
    ranks = dict(zip(setting.lattice.structures, setting.lattice.ranks, strict=True))
    model = HierarchicalFactorModel(ranks=ranks, refine=refine, noise=noise).fit(tables)
    return Found(model.weights_, model.lattice)


def automatic(tables: list[np.ndarray]) -> Found:
    model = HierarchicalFactorModel(ranks="auto").fit(tables)
    return Found(model.weights_, model.lattice)


def principal(tables: list[np.ndarray], rank: int) -> np.ndarray:
    """Leading principal axes of all features, of the length of their standard deviation."""
    x = np.concatenate(tables, axis=1)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    return vectors[:, -rank:] * np.sqrt(values[-rank:])


def slide(tables: list[np.ndarray], setting: Setting, *, shrunk: bool) -> Found:
    """min || X - U V^T || with U^T U = I and V zero where a modality takes no part, in turns: V = X^T U where it is
    free, U the polar factor of X V; loadings V / sqrt(n)."""
    x = np.concatenate([table - table.mean(axis=0) for table in tables], axis=1)
    lattice = setting.lattice
    free = mask(setting.sizes, lattice)
    u = np.linalg.svd(x, full_matrices=False)[0][:, : lattice.width]
    before = np.inf
    for _ in range(ROUNDS):
        v = (x.T @ u) * free
        left, lengths, right = np.linalg.svd(x @ v, full_matrices=False)
        u = left @ right
        loss = -float(lengths.sum())
        if abs(before - loss) <= 1e-10 * abs(loss):
            break
        before = loss
    w = v / np.sqrt(len(x))
    if shrunk:
        rest = x - u @ v.T
        noise = float(np.square(rest).sum() / (x.shape[0] * (x.shape[1] - lattice.width)))
        for _, columns in lattice.columns():
            rows = np.flatnonzero(free[:, columns.start])
            left, lengths, right = np.linalg.svd(w[rows, columns], full_matrices=False)
            w[rows, columns] = left * np.sqrt(np.maximum(lengths**2 - noise, 0)) @ right
    return Found(w, lattice)


if __name__ == "__main__":
    main()

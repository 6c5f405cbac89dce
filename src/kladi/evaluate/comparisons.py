"""Methods against their references: difference, interval by patient, tests over folds, and one of six words."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kladi.evaluate import statistics
from kladi.evaluate.answers import LOWER_IS_BETTER, PRIMARY, Task
from kladi.evaluate.bootstrap import PatientDraws, draw_means, patient_draws, percentile_interval
from kladi.evaluate.measure import Measured, Resample, resamples
from kladi.evaluate.readouts.regimes import Part
from kladi.evaluate.splits import TEST, TRAIN

MARGIN = 0.01
PRIMARY_REGIME = "probe"


@dataclass(frozen=True)
class Drawn:
    """One metric of one method in one regime: its value, and its value under every draw of patients."""

    value: float
    draws: Float[np.ndarray, " draws"]
    folds: dict[tuple[int, int], float]
    rows: Int[np.ndarray, " m"]


Key = tuple[str, str, str]
"""(method, regime, metric)."""


def draw(
    measured: Sequence[Measured], task: Task, parts: tuple[Part, ...], *, draws: int, seed: int
) -> dict[Key, Drawn]:
    """Every resampled metric under the same draws of the tested patients, stratified by leaf.

    The value is the mean over the folds of all repeats in which it is defined.
    """
    tested = np.flatnonzero(np.any([part.of == TEST for part in parts], axis=0)) if parts else np.zeros(0, np.int64)
    patients = patient_draws(task.group[tested], task.target[tested], draws=draws, seed=seed)
    grouped: dict[Key, list[Resample]] = defaultdict(list)
    for one in measured:
        for resample in resamples(one, task):
            grouped[resample.method, resample.regime, resample.metric].append(resample)
    return {key: _drawn(found, tested, patients) for key, found in grouped.items()}


def intervals(drawn: dict[Key, Drawn], task: Task, parts: tuple[Part, ...]) -> list[dict[str, Any]]:
    """For each method, regime and metric the mean, its spread over repeats, and its 95 % interval by patient."""
    out = []
    for (method, regime, metric), found in sorted(drawn.items()):
        interval = percentile_interval(found.draws)
        means = statistics.repeat_means(_by_repeat(found, parts))
        known = means[np.isfinite(means)]
        out.append(
            {
                "method": method,
                "regime": regime,
                "dataset": task.name,
                "metric": metric,
                "value": _plain(found.value),
                "sd_repeats": _plain(float(known.std(ddof=1))) if len(known) > 1 else None,
                "interval": list(interval.ends) if interval.ends else None,
                "interval_kind": _kind(found) if interval.ends else interval.reason,
                "n": len(found.rows),
                "n_patients": task.patients(found.rows),
            }
        )
    return out


def compare(
    drawn: dict[Key, Drawn],
    pairs: list[tuple[str, str]],
    task: Task,
    parts: tuple[Part, ...],
    *,
    tested: bool = True,
) -> list[dict[str, Any]]:
    """One comparison for each (method, reference), regime and metric that both have; `settle` gives the verdicts.

    Over one official split there is no test: an interval alone. Nor where the folds are a few places, the same ones in
    every repeat (`tested=False`): repeats would count as places there.
    """
    out = []
    for method, reference in pairs:
        for (name, regime, metric), found in sorted(drawn.items()):
            other = drawn.get((reference, regime, metric))
            if name == method and other is not None:
                names = method, reference, regime, metric
                out.append(_comparison(found, other, names, task, parts, tested and len(parts) > 1))
    return out


def settle(
    found: list[dict[str, Any]],
    *,
    primary: str = PRIMARY,
    regimes: Sequence[str] = (PRIMARY_REGIME,),
    reference: str | None = None,
    margin: float = MARGIN,
) -> list[dict[str, Any]]:
    """Holm's correction over the family, and the verdict of every comparison.

    The family is the primary metric in `regimes` against `reference` (None: against every reference), over all methods
    and data sets in `found`. Everything else is exploratory: an interval, no adjusted p, and at most a "leans".
    """
    out = [dict(comparison) for comparison in found]
    primaries = [c for c in out if c["regime"] in regimes and c["metric"] == primary]
    family = [c for c in primaries if reference in {None, c["reference"]}]
    p = np.array([c["corrected_t_p"] if c["corrected_t_p"] is not None else math.nan for c in family])
    for comparison, adjusted in zip(family, statistics.holm(p), strict=True):
        comparison["holm_p"] = _plain(float(adjusted))
    for comparison in out:
        sign = -1.0 if comparison["metric"] in LOWER_IS_BETTER else 1.0
        ends = comparison["interval"]
        difference = comparison["difference"]
        comparison["verdict"] = statistics.verdict(
            sign * difference if difference is not None else math.nan,
            interval=tuple(sorted(sign * end for end in ends)) if ends else None,
            holm_p=comparison["holm_p"],
            margin=margin,
        )
    return out


def _comparison(
    found: Drawn, other: Drawn, names: tuple[str, str, str, str], task: Task, parts: tuple[Part, ...], tested: bool
) -> dict[str, Any]:
    interval = percentile_interval(found.draws - other.draws)
    both = [key for key in found.folds if math.isfinite(found.folds[key] - other.folds.get(key, math.nan))]
    differences = np.array([found.folds[key] - other.folds[key] for key in both])
    by_repeat = statistics.repeat_means(_by_repeat(found, parts) - _by_repeat(other, parts))
    by_repeat = by_repeat[np.isfinite(by_repeat)]
    folded = tested and len(differences) > 0
    tests = statistics.wilcoxon(by_repeat) if folded and len(by_repeat) else None
    t = statistics.corrected_resampled_t(differences, rho=_rho(parts)) if folded else None
    method, reference, regime, metric = names
    return {
        "method": method,
        "reference": reference,
        "dataset": task.name,
        "regime": regime,
        "metric": metric,
        "pairs": len(by_repeat) if tests else 0,
        "zero_pairs": tests.zeros if tests else 0,
        "difference": _plain(float(differences.mean())) if len(differences) else None,
        "hodges_lehmann": _plain(statistics.hodges_lehmann(by_repeat)) if tests else None,
        "interval": list(interval.ends) if interval.ends else None,
        "interval_kind": _kind(found) if interval.ends else interval.reason,
        "corrected_t_p": _plain(t.p) if t else None,
        "wilcoxon_p": tests.p if tests else None,
        "least_p": tests.least_p if tests else None,
        "holm_p": None,
        "rank_biserial": statistics.rank_biserial(by_repeat) if tests else None,
        "verdict": "cannot tell",
    }


def _drawn(found: list[Resample], tested: np.ndarray, patients: PatientDraws) -> Drawn:
    places = [np.searchsorted(tested, one.rows) for one in found]
    folds = {(one.repeat, one.fold): float(one.of(np.ones((1, len(one.rows))))[0]) for one in found}
    known = [value for value in folds.values() if math.isfinite(value)]
    return Drawn(
        value=float(np.mean(known)) if known else math.nan,
        draws=draw_means([one.of for one in found], places, patients),
        folds=folds,
        rows=np.unique(np.concatenate([one.rows for one in found])),
    )


def _by_repeat(found: Drawn, parts: tuple[Part, ...]) -> Float[np.ndarray, "R K"]:
    """Values by repeat and fold; nan where a fold has none."""
    table = np.full((max(p.repeat for p in parts) + 1, max(p.fold for p in parts) + 1), math.nan)
    for (repeat, fold), value in found.folds.items():
        table[repeat, fold] = value
    return table


def _rho(parts: tuple[Part, ...]) -> float:
    """Test over training size, averaged over the folds."""
    return float(np.mean([len(part.rows(TEST)) / max(len(part.rows(TRAIN)), 1) for part in parts]))


def _kind(found: Drawn) -> str:
    return f"patient bootstrap, {len(found.draws)} draws, 95 %"


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""Intervals by patient: what the numbers would be, had other patients of the same kind come to the clinic.

Patients are drawn with replacement, all images of a patient together, and each metric is computed again with every row
weighted by how often its patient was drawn. One draw serves all methods, folds and repeats: a patient is in one test
fold of each repeat, and drawing afresh in each repeat would average the uncertainty away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

Metric = Callable[[np.ndarray], np.ndarray]
"""weights float64[B, n] -> values float64[B], nan where undefined; weights of one give the metric itself."""

BLOCK_ENTRIES = 1 << 22
"""Weights held at once: draws x rows."""
MOST_UNDEFINED = 0.05
"""Above this share of undefined draws there is no interval."""


@dataclass(frozen=True)
class Interval:
    """A percentile interval, or why there is none."""

    low: float
    high: float
    reason: str = ""

    @property
    def ends(self) -> tuple[float, float] | None:
        return None if self.reason else (self.low, self.high)


@dataclass(frozen=True)
class PatientDraws:
    """How often each patient was drawn: `counts` int32[draws, G]; `patient_of` int64[n], the patient of each row."""

    counts: Int[np.ndarray, "draws G"]
    patient_of: Int[np.ndarray, " n"]

    def of(self, rows: Int[np.ndarray, " m"], part: slice = slice(None)) -> Float[np.ndarray, "b m"]:
        """Weights of some rows, in some of the draws: a row counts as often as its patient was drawn."""
        return self.counts[part][:, self.patient_of[rows]].astype(np.float64)


def patient_draws(
    group: Int[np.ndarray, " n"], stratum: Int[np.ndarray, " n"], *, draws: int = 2000, seed: int = 0
) -> PatientDraws:
    """Draw the patients of each stratum with replacement, as many as there are.

    Args:
        group: patient of each row.
        stratum: of each row, usually its leaf; a patient with several goes with the most frequent, ties to the least.
        draws: how many.
        seed: of the generator; the same seed and rows give the same draws.

    Edges: a stratum of a single patient never varies; the interval is then too narrow, which no resampling can mend.
    """
    patients, patient_of = np.unique(group, return_inverse=True)
    strata, stratum_of = np.unique(stratum, return_inverse=True)
    together = np.zeros((len(patients), len(strata)), dtype=np.int64)
    np.add.at(together, (patient_of, stratum_of), 1)
    home = together.argmax(axis=1) if len(strata) else np.zeros(0, dtype=np.int64)
    generator = np.random.default_rng([seed, 0x626F6F74])  # "boot": apart from every other stream of this seed
    counts = np.zeros((draws, len(patients)), dtype=np.int32)
    for s in range(len(strata)):
        members = np.flatnonzero(home == s)
        if len(members):
            counts[:, members] = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), draws)
    return PatientDraws(counts, patient_of.astype(np.int64))


def draw_means(
    metrics: Sequence[Metric], rows: Sequence[Int[np.ndarray, " _"]], draws: PatientDraws
) -> Float[np.ndarray, " draws"]:
    """The metric of every fold under each draw, then the mean over the folds; nan where no fold defines it.

    Args:
        metrics: one a fold (of every repeat), over that fold's test rows.
        rows: for each of them, which rows of `draws` its rows are.

    A fold that lacks, say, every positive in a draw leaves the mean of that draw; the draw is undefined only if all do.
    """
    size = len(draws.counts)
    total, defined = np.zeros(size), np.zeros(size)
    for metric, index in zip(metrics, rows, strict=True):
        step = max(1, BLOCK_ENTRIES // max(len(index), 1))
        for part in (slice(start, start + step) for start in range(0, size, step)):
            values = metric(draws.of(index, part))
            known = np.isfinite(values)
            total[part] += np.where(known, values, 0.0)
            defined[part] += known
    return np.where(defined > 0, total / np.maximum(defined, 1), np.nan)


def percentile_interval(values: Float[np.ndarray, " draws"], *, confidence: float = 0.95) -> Interval:
    """The middle `confidence` of the draws in which the value is defined; none if over 5 % of them are not.

    Leaving undefined draws out is the same as drawing them again, as draws are independent.
    """
    known = values[np.isfinite(values)]
    undefined = 1 - len(known) / len(values) if len(values) else 1.0
    if undefined > MOST_UNDEFINED:
        return Interval(math.nan, math.nan, f"undefined in {undefined:.0%} of the draws")
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))

"""What a table of metadata knows, and what a contrastive loss would see of it: the coverage report, as a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int, Int64
from scipy.special import gammaln

from kladi.structure import cells, labelset

FEWEST_PATIENTS = 5
"""A text of the user's own that fewer patients have is never shown: it may be a name."""
MOST_CLASSES = 20_000
"""Above so many distinct label sets the expected positives are not computed."""


@dataclass(frozen=True)
class AttributeCoverage:
    """One attribute.

    known: share of rows of which it is known.
    values: (value, rows), most frequent first. A value of the user's own that fewer than 5 patients have is left out.
    hidden: how many values were left out.
    rungs: rung -> share of rows (`synonyms.RUNGS`).
    conflicts: rows of which two sources contradict each other.
    unmapped: (text, patients) of what no synonym fits, most frequent first; at least 5 patients.
    unmapped_rows: rows with a text that no synonym fits, shown or not.
    """

    name: str
    known: float
    values: tuple[tuple[str, int], ...]
    hidden: int
    rungs: Mapping[str, float]
    conflicts: int
    unmapped: tuple[tuple[str, int], ...]
    unmapped_rows: int


@dataclass(frozen=True)
class Coverage:
    """All attributes together.

    rows: n.
    attributes: one entry an attribute.
    distinct: U, how many different label sets there are.
    nothing_known: rows of which no attribute is known.
    together: int64[G, G], rows of which both attributes are known.
    threshold: the similarity from which on a pair is positive.
    expected_positives: of an anchor, on average, in a batch of the asked size; None if no batch size was given, it does
        not fit, or there are too many label sets.
    positive_share: the same over all other views of the batch.
    own_view_only: share of anchors whose only positives are views of their own image.
    findings: what to think about before training.
    """

    rows: int
    attributes: tuple[AttributeCoverage, ...]
    distinct: int
    nothing_known: int
    together: Int64[np.ndarray, "G G"]
    threshold: float
    expected_positives: float | None
    positive_share: float | None
    own_view_only: float | None
    findings: tuple[str, ...]


def of(
    sets: labelset.LabelSets,
    group: Int[np.ndarray, " n"] | None = None,
    *,
    batch: int | None = None,
    views: int = 2,
    threshold: float | None = None,
) -> Coverage:
    """The coverage report of label sets.

    Args:
        group: the patient of each row; each row its own patient if not given.
        batch: images a step, drawn without replacement.
        views: views of an image.
        threshold: similarity from which on a pair is positive; `smallest_useful_threshold` if not given.
    """
    patients = np.arange(len(sets)) if group is None else group
    at = sets.smallest_useful_threshold if threshold is None else threshold
    attributes = tuple(_attribute(sets, g, patients) for g in range(len(sets.attributes)))
    known = sets.class_known.astype(np.int64)
    together = known.T @ (known * sets.counts[:, None])
    expected = share = alone = None
    if batch is not None and 2 <= batch <= len(sets) and len(sets.sets) <= MOST_CLASSES:
        matches = _matches(sets, at)
        anchors = sets.counts / len(sets)
        expected = float(anchors @ expected_positives(matches, len(sets), batch, views))
        share = expected / (views * batch - 1)
        alone = float(anchors @ _none_drawn(matches, len(sets), batch))
    return Coverage(
        rows=len(sets),
        attributes=attributes,
        distinct=len(sets.sets),
        nothing_known=int(sets.counts[~sets.class_known.any(axis=1)].sum()),
        together=together,
        threshold=at,
        expected_positives=expected,
        positive_share=share,
        own_view_only=alone,
        findings=tuple(_findings(sets, attributes, at, share)),
    )


def expected_positives(
    matches: Int64[np.ndarray, " U"], rows: int, batch: int, views: int
) -> Float64[np.ndarray, " U"]:
    """E|P(u)| = (V - 1) + V (N - 1)/(n - 1) m_u: positives of an anchor of class u, with m_u its matches in the data.

    Args:
        matches: int64[U], other rows that are similar enough to a row of class u: sum over v with w_uv >= threshold of
            (c_v - [u = v]), c_v the rows of class v.
        rows: n.
        batch: N of the n images, drawn without replacement.
        views: V of each. Views of one image are always positives.
    """
    return (views - 1) + views * (batch - 1) / max(rows - 1, 1) * matches.astype(np.float64)


def _none_drawn(matches: Int64[np.ndarray, " U"], rows: int, batch: int) -> Float64[np.ndarray, " U"]:
    """Chance that none of a row's matches is among the other N - 1 images: (n-1-m choose N-1) / (n-1 choose N-1)."""
    others, drawn = rows - 1, batch - 1
    left = np.maximum(others - matches, drawn).astype(np.float64)
    log_chance = gammaln(left + 1) - gammaln(left - drawn + 1) - gammaln(others + 1) + gammaln(others - drawn + 1)
    return np.where(others - matches >= drawn, np.exp(log_chance), 0.0)


def _matches(sets: labelset.LabelSets, threshold: float) -> Int64[np.ndarray, " U"]:
    every = np.arange(len(sets.sets))
    matches = np.zeros(len(every), dtype=np.int64)
    for start in range(0, len(every), 512):
        some = every[start : start + 512]
        table, _ = sets.table(some, every)
        similar = table >= threshold - 1e-9
        matches[some] = similar @ sets.counts - similar[np.arange(len(some)), some]
    return matches


def _attribute(sets: labelset.LabelSets, g: int, patients: Int[np.ndarray, " n"]) -> AttributeCoverage:
    name = sets.attributes[g]
    reading = sets.readings[name]
    rows = np.bincount(reading.cell, minlength=len(reading.values)).tolist()
    value_rows, rungs = Counter[str](), Counter[str]()
    for cell, values in enumerate(reading.values):
        rungs[reading.rung[cell]] += rows[cell]
        for value in values:
            value_rows[value] += rows[cell]
    held = _patients_of_own_words(reading, patients)
    frequent = [item for item in sorted(value_rows.items(), key=lambda item: (-item[1], item[0])) if item[1]]
    shown = [(value, count) for value, count in frequent if held.get(value, FEWEST_PATIENTS) >= FEWEST_PATIENTS]
    unmapped = {text for text in reading.unmapped if text}
    return AttributeCoverage(
        name=name,
        known=float(sets.counts @ sets.class_known[:, g]) / max(len(sets), 1),
        values=tuple(shown),
        hidden=len(frequent) - len(shown),
        rungs={rung: count / len(sets) for rung, count in sorted(rungs.items()) if count},
        conflicts=rungs["conflict"],
        unmapped=tuple(
            (text, count)
            for text, count in sorted(held.items(), key=lambda item: (-item[1], item[0]))
            if text in unmapped and count >= FEWEST_PATIENTS
        ),
        unmapped_rows=sum(rows[cell] for cell, text in enumerate(reading.unmapped) if text),
    )


def _patients_of_own_words(reading: cells.Reading, patients: Int[np.ndarray, " n"]) -> dict[str, int]:
    """Value or unmapped text that is the user's own word -> how many patients have it."""
    words = [
        {text} if text else (values if rung == "own" else set())
        for values, rung, text in zip(reading.values, reading.rung, reading.unmapped, strict=True)
    ]
    rows = np.flatnonzero(np.array([bool(found) for found in words], dtype=np.bool_)[reading.cell])
    who: dict[str, set[int]] = {}
    if len(rows):
        pairs = np.unique(np.stack([reading.cell[rows], patients[rows].astype(np.int64)]), axis=1)
        for cell, patient in zip(*pairs.tolist(), strict=True):
            for word in words[cell]:
                who.setdefault(word, set()).add(patient)
    return {word: len(found) for word, found in who.items()}


def _findings(
    sets: labelset.LabelSets, attributes: tuple[AttributeCoverage, ...], threshold: float, share: float | None
) -> list[str]:
    found: list[str] = []
    for g, attribute in enumerate(attributes):
        mine = np.flatnonzero(sets.class_known[:, g])
        kinds = Counter[tuple[int, ...]]()
        for u in mine.tolist():
            kinds[tuple(k for k in sets.sets[u] if sets.label_attribute[k] == g)] += int(sets.counts[u])
        rows = sum(kinds.values())
        if not rows:
            found.append(f'"{attribute.name}" is known of no row')
        elif len(kinds) == 1 and rows > 1:
            found.append(f'"{attribute.name}" is the same in every row that has it: it lifts every similarity')
        elif len(kinds) == rows:
            found.append(f'"{attribute.name}" is different in every row: the loss becomes plain view contrast (SimCLR)')
        if attribute.conflicts:
            found.append(
                f'"{attribute.name}": two sources contradict each other in {attribute.conflicts} rows (unknown)'
            )
        reading = sets.readings[attribute.name]
        phantoms = int(np.array(reading.phantom, dtype=np.bool_)[reading.cell].sum())
        if phantoms:
            found.append(f'"{attribute.name}": {phantoms} rows are of a phantom')
    any_shared = sets.smallest_useful_threshold
    if threshold > any_shared + 1e-9:
        found.append(
            f"threshold {threshold:.4g} may ask for more than one shared label; from {any_shared:.4g} downwards any "
            "shared label makes a positive pair"
        )
    if share is not None and share > 0.6:
        found.append(
            f"{share:.0%} of a batch would be positives of an average anchor; over 60 % little is left to tell"
        )
    return found

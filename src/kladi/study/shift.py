"""A task under a shift: each place (site, stain, magnification) is tested by what was trained on all the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from kladi.errors import UserError
from kladi.evaluate.answers import Task
from kladi.evaluate.readouts.regimes import Part
from kladi.evaluate.splits import TEST, TRAIN, UNUSED, VAL, quarter

MOST_PLACES = 50
"""More values than that name images or patients, not places."""


@dataclass(frozen=True)
class Shift:
    """column: what it goes along. places: its values, in the order of the folds."""

    column: str
    places: tuple[str, ...]


def shifted(
    task: Task, column: str, values: list[str], parts: tuple[Part, ...], seed: int
) -> tuple[Shift, tuple[Part, ...], list[str]]:
    """Folds of which each tests one place and trains on the others, and what must be said of them.

    Args:
        task: rows with a target are asked.
        column: the name of the column. values: its cells, "" where unknown; such rows are not used.
        parts: folds by patient.
        seed: of the draw of validation patients.

    Raises:
        UserError: fewer than two places or more than fifty, or a place none of whose classes is anywhere else.
    """
    asked = [value for value, target in zip(values, task.target.tolist(), strict=True) if target >= 0]
    counts = Counter(value for value in asked if value)
    if not 2 <= len(counts) <= MOST_PLACES:
        raise UserError(
            f'task {task.name}: shift = "{column}" has {len(counts):,} value{"s" * (len(counts) != 1)} here; '
            f"it takes 2 to {MOST_PLACES}"
        )
    places = sorted(counts)
    number = {value: k for k, value in enumerate(places)}
    place = np.array([number.get(value, -1) for value in values], dtype=np.int64)
    found = fold_places(parts, place, task.group, task.target, seed)
    said = _lacking(task, column, places, found)
    blank = asked.count("")
    if blank:
        said.append(f'{task.name}: {blank:,} images without a "{column}" are left out')
    return Shift(column, tuple(places)), found, said


def fold_places(
    parts: tuple[Part, ...],
    place: Int[np.ndarray, " n"],
    group: Int[np.ndarray, " n"],
    target: Int[np.ndarray, " n"],
    seed: int = 0,
) -> tuple[Part, ...]:
    """A fold a place, in every repeat.

    Rows of the place are tested if their patient is nowhere else, or, where patients are in several places (one
    specimen at four magnifications), in one of the given folds, another one in each repeat. Of the patients that are
    not tested a quarter validates and the rest trains, with their rows of the other places.
    """
    places, folds = int(place.max()) + 1, 1 + max(part.fold for part in parts)
    at = np.zeros((int(group.max()) + 1, places), dtype=bool)
    at[group[place >= 0], place[place >= 0]] = True
    elsewhere = (at.sum(axis=1) > 1)[group]
    by_fold = {(part.fold, part.repeat): part.of for part in parts}
    out = []
    for repeat in sorted({part.repeat for part in parts}):
        for number in range(places):
            of = by_fold[(number + repeat) % folds, repeat]
            tested = (place == number) & (of != UNUSED) & (~elsewhere | (of == TEST))
            free = (of != UNUSED) & (place >= 0) & (place != number) & ~np.isin(group, group[tested])
            drawn = np.where(tested, TEST, np.where(free, TRAIN, UNUSED))
            rows = np.flatnonzero(free)
            if len(rows):
                drawn[rows[quarter(target[rows], group[rows], f"{seed}/{repeat}/{number}")]] = VAL
            out.append(Part(number, repeat, drawn))
    return tuple(out)


def _lacking(task: Task, column: str, places: list[str], parts: tuple[Part, ...]) -> list[str]:
    """Classes that are tested at a place and trained nowhere else."""
    said = []
    for part in parts:
        if part.repeat:
            continue
        where = f'task {task.name}: shift = "{column}": '
        tested, trained = (set(task.target[part.rows(of)].tolist()) for of in (TEST, TRAIN))
        if not len(part.rows(VAL)):
            raise UserError(
                f'{where}too few patients are elsewhere than at "{places[part.fold]}" to train and validate'
            )
        if not tested & trained:
            raise UserError(
                f'{where}no class of "{places[part.fold]}" is anywhere else, so nothing can be learnt for it'
            )
        names = ", ".join(f'"{task.taxonomy.names[c]}"' for c in sorted(tested - trained))
        if names:
            said.append(f'{task.name}: at "{places[part.fold]}" {names} is tested, and no other {column} trains it')
    return said

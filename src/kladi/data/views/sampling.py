"""Batches in which every label has mates and siblings: what a loss on a label tree needs to say anything.

In a shuffled batch of many rare labels most anchors have no positive, and hardly any pair is kin. Here rows come in
units of `per_label` rows of one label, and units in pairs of sibling labels.
"""

from __future__ import annotations

from collections import defaultdict, deque
from itertools import islice

import numpy as np
from jaxtyping import Int, Int64, UInt64

from kladi.data.views import philox

AHEAD = 64
"""Units looked at for one that a batch's end does not cut in two."""


def with_mates(
    seed: int,
    epoch: int,
    row_id: UInt64[np.ndarray, " n"],
    target: Int[np.ndarray, " n"],
    parent: Int[np.ndarray, " N"],
    per_label: int,
    batch: int,
) -> Int64[np.ndarray, "steps batch"]:
    """Positions of the rows of each step of an epoch; each row at most once, and the last n mod batch wait.

    1. The rows of a label, in the epoch's order, are cut into units of `per_label`; of what is left over at the end a
       single row joins the unit before it, so that it has mates. A row without a label is a unit of its own.
    2. The units of one parent's labels take turns by label; each two in a row are a pair, siblings where there are any.
    3. Pairs are shuffled, and put into a batch one after the other. The unit that a batch's end cuts goes on in the
       next one; where that would leave a row alone, another unit comes first.

    Like `philox.epoch_order` a function of seed, epoch and row ids: their order does not matter.

    Args:
        target: node of each row, -1 where it has none.
        parent: a parent of each node, -1 for a top node.
    """
    order = philox.epoch_order(seed, epoch, row_id)
    units = _units(order, target, per_label)
    blocks = _paired(units, target, parent)
    key = philox.uniform(seed, "blocks", row_id[[block[0][0] for block in blocks]], epoch, 0, 0)
    shuffled = [blocks[i] for i in np.lexsort((row_id[[block[0][0] for block in blocks]], key))]
    filled = _filled([unit for block in shuffled for unit in block], target, batch)
    return filled[: len(filled) // batch * batch].reshape(-1, batch)


def _units(order: Int64[np.ndarray, " n"], target: np.ndarray, per_label: int) -> list[list[int]]:
    """Rows of one label that stay together, labels in the order of their first row."""
    of_label: dict[int, list[int]] = defaultdict(list)
    units: list[list[int]] = []
    for row in order.tolist():
        if target[row] < 0:
            units.append([row])
        else:
            of_label[int(target[row])].append(row)
    for rows in of_label.values():
        cut = [rows[i : i + per_label] for i in range(0, len(rows), per_label)]
        if len(cut) > 1 and len(cut[-1]) == 1 < per_label:
            last = cut.pop()
            cut[-1] += last
        units += cut
    return units


def _paired(units: list[list[int]], target: np.ndarray, parent: np.ndarray) -> list[list[list[int]]]:
    """Two units of sibling labels each, or one alone."""
    families: dict[int, dict[int, deque[list[int]]]] = defaultdict(lambda: defaultdict(deque))
    blocks: list[list[list[int]]] = []
    for unit in units:
        label = int(target[unit[0]])
        if label < 0:
            blocks.append([unit])
        else:
            families[int(parent[label])][label].append(unit)
    for labels in families.values():
        turns = []
        while labels:
            # The label with most units left goes first, so that few pairs are of one label.
            for label in sorted(labels, key=lambda one: -len(labels[one]))[:2]:
                turns.append(labels[label].popleft())
                if not labels[label]:
                    del labels[label]
        blocks += [turns[i : i + 2] for i in range(0, len(turns), 2)]
    return blocks


def _filled(units: list[list[int]], target: np.ndarray, batch: int) -> Int64[np.ndarray, " n"]:
    """All rows in a line. Where cutting it every `batch` rows would leave a row alone, a later unit comes first."""
    waiting = deque(units)
    line: list[int] = []
    while waiting:
        begun = len(line) % batch
        present = {int(target[row]) for row in line[len(line) - begun :]}
        fits = (
            i for i, unit in enumerate(islice(waiting, AHEAD)) if not _cut_off(unit, target, batch - begun, present)
        )
        place = next(fits, 0)
        line += waiting[place]
        del waiting[place]
    return np.array(line, dtype=np.int64)


def _cut_off(unit: list[int], target: np.ndarray, room: int, present: set[int]) -> bool:
    """Whether the border of a batch, `room` rows on, would part a row of this unit from all others of its label."""
    before, after = min(room, len(unit)), max(0, len(unit) - room)
    return (len(unit) > 1 == before and int(target[unit[0]]) not in present) or after == 1

"""Metadata columns as label sets, and how much two sets share. Unknown is not negative.

A row has a set of labels (attribute, value). Rows with the same set and the same knowledge are one *class*; everything
is kept and computed per class, so a million rows cost what their few hundred classes cost.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

from kladi.errors import UserError, suggestion
from kladi.structure import cells
from kladi.structure.synonyms import Synonyms, overlay, shipped
from kladi.structure.taxonomy import Taxonomy

TABLE_CLASSES = 4096
"""Above so many classes one table of all of them is refused; build one per batch with `table`."""


@dataclass(frozen=True, eq=False, repr=False)
class LabelSets:
    """Label sets of n rows. Build it with `from_columns`; equal and hashed by content.

    attributes: G names, sorted.
    labels: K pairs (attribute, value), sorted.
    class_id: int64[n], the class of each row.
    sets: for each of the U classes its labels, as ids into `labels`, ascending. The classes are in canonical order.
    class_known: bool[U, G], whether the attribute is known in the class. Known and without a label: known to be empty.
    weight: float64[G], how much an attribute counts; 0: not compared.
    readings: attribute -> what became of its cells, for `coverage`. No part of equality.
    """

    attributes: tuple[str, ...]
    labels: tuple[tuple[str, str], ...]
    class_id: Int64[np.ndarray, " n"]
    sets: tuple[tuple[int, ...], ...]
    class_known: Bool[np.ndarray, "U G"]
    weight: Float64[np.ndarray, " G"]
    readings: Mapping[str, cells.Reading] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for array in (self.class_id, self.class_known, self.weight):
            array.flags.writeable = False

    @classmethod
    def from_columns(
        cls,
        columns: Mapping[str, Iterable[object]],
        *,
        weights: Mapping[str, float | int] | None = None,
        synonyms: Synonyms | Mapping[str, Mapping[str, Sequence[str]]] | None = None,
        taxonomies: Mapping[str, Taxonomy] | None = None,
        unmapped: str = "own",
        loose: Iterable[str] = (),
        rungs: Mapping[str, Sequence[str | None]] | None = None,
    ) -> LabelSets:
        """Label sets of the rows of a table, one attribute a column.

        A cell is text or None. Case, Unicode form and blanks at the ends do not matter. Empty cells, `unknown`, `n/a`,
        `?` and the like are unknown; the word `none` is a value. Several values: `a|b` or a JSON list. A column of
        nothing but 1, 0, -1 and blanks is an indicator: 0 is known and empty, -1 and blank are unknown.

        Args:
            columns: name -> n cells.
            weights: name -> how much the attribute counts, default 1.
            synonyms: a resolved map (`synonyms.read`), or {attribute: {canonical: [variants]}} to lay over the shipped
                one, which is used if nothing is given.
            taxonomies: name -> taxonomy of its values; a value then stands for itself and its ancestors, so that a
                lung shares half of what it is with a chest.
            unmapped: a value that no synonym and no node fits becomes its own label, is unknown, or is an error.
            loose: attributes for which single words may decide (rung 4 of the ladder; for DICOM tags).
            rungs: name -> for each row where it landed before it came here; "conflict" makes the row unknown.

        Raises:
            UserError: no column, columns of different length, a weight that is no positive number or of no column, a
                taxonomy or rungs of no column, an unmapped value under "error".
        """
        if not columns:
            raise UserError("label sets need at least one column")
        if unmapped not in ("own", "unknown", "error"):
            raise UserError(f'unmapped="{unmapped}" is none of own, unknown, error')
        if not isinstance(synonyms, Synonyms):
            synonyms = overlay(synonyms) if synonyms else shipped()
        for what, given in (("weight", weights), ("taxonomy", taxonomies), ("rungs", rungs)):
            for name in given or {}:
                if name not in columns:
                    raise UserError(f'{what} of "{name}", which is no column{suggestion(name, columns)}')
        attributes, loose_names = tuple(sorted(columns)), set(loose)
        readings = {
            name: cells.read(
                name,
                columns[name],
                synonyms=synonyms,
                taxonomy=(taxonomies or {}).get(name),
                unmapped=unmapped,
                loose=name in loose_names,
                rungs=(rungs or {}).get(name),
            )
            for name in attributes
        }
        lengths = {name: len(reading.cell) for name, reading in readings.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"columns of different length: {', '.join(f'{n} {k}' for n, k in lengths.items())}")
        return _assemble(readings, np.array([_weight(name, weights) for name in attributes]))

    def __len__(self) -> int:
        return len(self.class_id)

    def __repr__(self) -> str:
        return f"LabelSets({len(self)} rows, {len(self.sets)} distinct sets of {', '.join(self.attributes)})"

    @property
    def values(self) -> Bool[np.ndarray, "n K"]:
        """bool[n, K]: which labels each row has. Large: the loss and the report work on classes instead.

        Raises:
            UserError: it would take more than a gigabyte.
        """
        if len(self) * len(self.labels) > 2**30:
            raise UserError(f"{len(self):,} rows of {len(self.labels):,} labels are too many for one table")
        values = np.zeros((len(self.sets), len(self.labels)), dtype=np.bool_)
        for u, members in enumerate(self.sets):
            values[u, list(members)] = True
        return values[self.class_id]

    @property
    def known(self) -> Bool[np.ndarray, "n G"]:
        """bool[n, G]: which attributes are known of each row."""
        return self.class_known[self.class_id]

    @cached_property
    def label_attribute(self) -> Int64[np.ndarray, " K"]:
        """int64[K]: the attribute (0..G-1) of each label."""
        place = {name: g for g, name in enumerate(self.attributes)}
        return np.array([place[name] for name, _ in self.labels], dtype=np.int64)

    @cached_property
    def counts(self) -> Int64[np.ndarray, " U"]:
        """int64[U]: rows of each class."""
        return np.bincount(self.class_id, minlength=len(self.sets)).astype(np.int64)

    def take(self, rows: Int[np.ndarray, " m"]) -> LabelSets:
        """The label sets of some rows, in that order; a permutation gives the shuffled control."""
        used, class_id = np.unique(self.class_id[rows], return_inverse=True)
        readings = {
            name: dataclasses.replace(reading, cell=reading.cell[rows]) for name, reading in self.readings.items()
        }
        sets = tuple(self.sets[u] for u in used)
        known = self.class_known[used]
        return LabelSets(
            self.attributes, self.labels, class_id.astype(np.int64), sets, known, self.weight.copy(), readings
        )

    def weighted(self, weights: Mapping[str, float | int]) -> LabelSets:
        """The same sets and classes under other attribute weights; 0 leaves an attribute out of the similarity.

        Attributes that are not named keep their weight.

        Raises:
            UserError: a name that is no attribute, a weight below 0 or not finite, or nothing left to compare.
        """
        given = dict(zip(self.attributes, self.weight.tolist(), strict=True))
        for name, weight in weights.items():
            if name not in given:
                raise UserError(f'weight of "{name}", which is no attribute{suggestion(name, given)}')
            if not 0 <= weight < math.inf:
                raise UserError(f'weight {weight:g} of "{name}" is not a number from 0 on')
            given[name] = float(weight)
        if not any(given.values()):
            raise UserError("every attribute has weight 0: nothing is left to compare")
        return dataclasses.replace(self, weight=np.array(list(given.values())))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content, hexadecimal; the same for any order of columns and any spelling of the cells."""
        content = json.dumps(
            ["kladi-labelsets", 1, self.attributes, self.labels, self.sets, self.class_known.tolist()],
            ensure_ascii=False,
        )
        summed = hashlib.sha256(content.encode("utf-8", "surrogatepass"))
        summed.update(self.weight.astype("<f8").tobytes() + self.class_id.astype("<i8").tobytes())
        return summed.hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, LabelSets) else NotImplemented

    def __hash__(self) -> int:
        return int(self.digest[:15], 16)

    # --- similarity ------------------------------------------------------------------------------------------------

    def similarity(
        self, *, coverage_discount: bool = True, unknown_pairs: str = "keep"
    ) -> tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, "U U"], Bool[np.ndarray, "U U"]]:
        """What each row is, and how much any two kinds of row share: the target and the table of the loss.

        With K the attributes known of both a and p, S the labels and omega the weights:

            w = kappa * sum_K omega |S_a & S_p| / sum_K omega |S_a | S_p|,   kappa = sum_K omega / sum omega

        and 0 where nothing is known of both, or all that is known is empty. kappa discounts for what could not be
        compared; without it (US, ?) would equal (US, thyroid). Everything known: the Jaccard index.

        Args:
            coverage_discount: False leaves kappa out.
            unknown_pairs: "drop" marks pairs of which no attribute is known of both, to be taken out of the loss.

        Returns:
            class_id int64[n]; table float64[U, U], symmetric, in [0, 1]; comparable bool[U, U], all True under "keep".
            The diagonal is below 1 where something is unknown: two rows alike in all that is known need not be alike.

        Raises:
            UserError: more than 4,096 classes; `table` gives the part that a batch needs.
        """
        if len(self.sets) > TABLE_CLASSES:
            raise UserError(
                f"{len(self.sets):,} distinct label sets are too many for one table (up to {TABLE_CLASSES:,}); "
                "table(classes, classes) gives the part that a batch needs"
            )
        every = np.arange(len(self.sets))
        table = np.zeros((len(every), len(every)))
        comparable = np.ones(table.shape, dtype=np.bool_)
        for start in range(0, len(every), 512):  # a block at a time: the parts of one are as large as the whole
            some = every[start : start + 512]
            table[some], comparable[some] = self.table(
                some, every, coverage_discount=coverage_discount, unknown_pairs=unknown_pairs
            )
        return self.class_id.copy(), table, comparable

    def table(
        self,
        a: Int[np.ndarray, " a"],
        b: Int[np.ndarray, " b"],
        *,
        coverage_discount: bool = True,
        unknown_pairs: str = "keep",
    ) -> tuple[Float64[np.ndarray, "a b"], Bool[np.ndarray, "a b"]]:
        """`similarity` between some classes and some others. Same arguments and meaning."""
        if unknown_pairs not in ("keep", "drop"):
            raise UserError(f'unknown_pairs="{unknown_pairs}" is neither "keep" nor "drop"')
        left, right = self._multi_hot(a, b)
        known_a, known_b = self.class_known[a].astype(np.float64), self.class_known[b].astype(np.float64)
        shape = (len(a), len(b))
        shared, united, compared = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for g, omega in enumerate(self.weight):  # counts are whole numbers, so the table is symmetric to the last bit
            A, B = left[g], right[g]
            common = A @ B.T
            sizes = np.outer(A.sum(axis=1), known_b[:, g]) + np.outer(known_a[:, g], B.sum(axis=1))
            shared += omega * common
            united += omega * (sizes - common)
            compared += omega * np.outer(known_a[:, g], known_b[:, g])
        table = np.divide(shared, united, out=np.zeros(shape), where=united > 0)
        if coverage_discount:
            table *= compared / sum(self.weight)
        return table, (compared > 0 if unknown_pairs == "drop" else np.ones(shape, dtype=np.bool_))

    def _multi_hot(self, *groups: Int[np.ndarray, " _"]) -> tuple[list[np.ndarray], ...]:
        """For each group of classes and each attribute float64[classes, labels in use]."""
        used = sorted({k for classes in groups for u in classes.tolist() for k in self.sets[u]})
        place = {k: i for i, k in enumerate(used)}
        parts = []
        for classes in groups:
            hot = np.zeros((len(classes), len(used)))
            for i, u in enumerate(classes.tolist()):
                hot[i, [place[k] for k in self.sets[u]]] = 1.0
            parts.append([hot[:, self.label_attribute[used] == g] for g in range(len(self.attributes))])
        return tuple(parts)

    @cached_property
    def smallest_useful_threshold(self) -> float:
        """A threshold under which two rows that share any label are positives; smaller ones say the same.

        m attributes of equal weight with one value each: 1/(2m - 1); any weights: x/(2 - x), x the smallest weight over
        their sum. In general the least similarity that one shared label of attribute g can have, over all g and all
        sets K of attributes known of both, with b_h the most labels that attribute h ever has:

            kappa omega_g / (2 sum_K omega_h b_h - omega_g)

        For one g the worst K adds attributes in the order of b, largest first, so prefixes of that order are enough.
        1.0 if there is no label at all.
        """
        most = np.zeros(len(self.attributes), dtype=np.int64)
        for members in self.sets:
            most = np.maximum(most, np.bincount(self.label_attribute[list(members)], minlength=len(most)))
        omega = self.weight / self.weight.sum()
        least = 1.0
        for g in np.flatnonzero((most > 0) & (omega > 0)):
            known, size = omega[g], omega[g] * most[g]
            least = min(least, known * omega[g] / (2 * size - omega[g]))
            others = set(np.flatnonzero(omega > 0).tolist()) - {int(g)}
            for h in sorted(others, key=lambda h: -most[h]):
                known, size = known + omega[h], size + omega[h] * most[h]
                least = min(least, known * omega[g] / (2 * size - omega[g]))
        return float(least)


def _weight(name: str, weights: Mapping[str, float | int] | None) -> float:
    weight = float((weights or {}).get(name, 1.0))
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f'weight {weight:g} of "{name}" is not above 0; leave the column out instead')
    return weight


def _assemble(readings: Mapping[str, cells.Reading], weight: Float64[np.ndarray, " G"]) -> LabelSets:
    """Rows with the same sets and the same knowledge become one class, in an order that depends on content alone."""
    labels = sorted({(name, value) for name, r in readings.items() for values in r.values for value in values})
    place: dict[Any, int] = {label: k for k, label in enumerate(labels)}
    rows = len(next(iter(readings.values())).cell)
    class_id = np.zeros(rows, dtype=np.int64)
    classes: list[tuple[tuple[int, ...], tuple[bool, ...]]] = [((), ())]
    for name, reading in readings.items():
        meanings = [
            (tuple(sorted(place[name, value] for value in values)), (known,))
            for values, known in zip(reading.values, reading.known, strict=True)
        ]
        distinct = sorted(set(meanings))
        rank = {meaning: code for code, meaning in enumerate(distinct)}
        codes = np.array([rank[meaning] for meaning in meanings], dtype=np.int64)[reading.cell]
        pairs, class_id = np.unique(class_id * len(distinct) + codes, return_inverse=True)
        before, now = np.divmod(pairs, max(len(distinct), 1))
        classes = [
            (classes[u][0] + distinct[c][0], classes[u][1] + distinct[c][1])
            for u, c in zip(before.tolist(), now.tolist(), strict=True)
        ]
    known = np.array([known for _, known in classes], dtype=np.bool_).reshape(len(classes), len(readings))
    sets = tuple(members for members, _ in classes)
    return LabelSets(tuple(readings), tuple(labels), class_id.astype(np.int64), sets, known, weight, readings)

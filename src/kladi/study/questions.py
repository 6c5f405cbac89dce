"""A question of a study -> the `Task` that a data set can answer: which rows, which classes, in which folds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt64

from kladi.data.dataset import Dataset
from kladi.data.private_files import write_private
from kladi.data.views import philox
from kladi.errors import UserError, suggestion
from kladi.evaluate.answers import MOST_AUC_CLASSES, Task
from kladi.evaluate.measure import parts_of
from kladi.evaluate.readouts.regimes import Part
from kladi.evaluate.splits import TEST, TRAIN, UNUSED, VAL, Splits, make_splits, scored_classes
from kladi.structure.synonyms import UNKNOWN, normal
from kladi.structure.taxonomy import Taxonomy
from kladi.study.design import Question, Study
from kladi.study.shift import Shift, shifted


@dataclass(frozen=True)
class Asked:
    """A task and its folds: fold k of repeat r is the same for every method.

    warnings: classes that were merged or dropped, and folds that lack one.
    digest: SHA-256 of the rows, their targets and their folds.
    shift: the places that the folds are; None where the folds are of patients.
    """

    task: Task
    splits: Splits
    parts: tuple[Part, ...]
    warnings: tuple[str, ...]
    digest: str
    shift: Shift | None = None

    def write(self, path: Path, row_id: UInt64[np.ndarray, " n"]) -> None:
        """The folds of patients as `Splits.write` has them; of a shift the parts themselves, of each row and fold."""
        if self.shift is None:
            self.splits.write(path)
            return
        parts = {
            f"{row:016x}": [int(part.of[k]) for part in self.parts]
            for k, row in enumerate(row_id.tolist())
            if any(part.of[k] != UNUSED for part in self.parts)
        }
        folds = [[part.repeat, self.shift.places[part.fold]] for part in self.parts]
        names = {"train": TRAIN, "val": VAL, "test": TEST, "unused": UNUSED}
        said = {"kind": "shift", "column": self.shift.column, "digest": self.digest, "parts": names}
        write_private(path, json.dumps({**said, "folds": folds, "of": parts}).encode())


def ask(question: Question, dataset: Dataset, unseen: Bool[np.ndarray, " n"], study: Study) -> Asked:
    """The task on the rows that no encoder was pretrained on, split by patient.

    Raises:
        UserError: a node or column that is not there (names the closest), or too few patients for folds.
    """
    taxonomy, of_row = _target(question, dataset)
    target = np.where(unseen, of_row, -1)
    scored = scored_classes(target, dataset.group, taxonomy)
    names = taxonomy.names
    warnings = [
        f"{question.name}: {names[a]} has too few patients, scored at {names[b]}" for a, b in scored.merged.items()
    ]
    warnings += [f"{question.name}: {names[node]} has too few patients, not scored" for node in scored.dropped]
    task = Task(question.name, taxonomy, scored.target, dataset.group, _meant(dataset, of_row))
    classes = len(np.unique(scored.target[scored.target >= 0]))
    if study.primary == "auc" and classes > MOST_AUC_CLASSES:
        raise UserError(
            f'task {question.name}: primary = "auc" has no interval with {classes} classes; '
            f'primary = "balanced_accuracy" has (auc: up to {MOST_AUC_CLASSES})'
        )
    try:
        splits = make_splits(
            dataset.row_id,
            task.target,
            task.group,
            folds=study.folds,
            repeats=study.repeats,
            seed=study.seed,
            names=dict(enumerate(names)),
        )
    except UserError as error:
        raise UserError(f"task {question.name}: {error}") from None
    if splits.folds < study.folds:
        warnings.append(f"{question.name}: {splits.folds} folds, as the rarest class has no more patients")
    parts, shift = parts_of(splits, dataset.row_id), None
    if question.shift:
        values = _values(question.name, question.shift, dataset)
        task = replace(task, target=np.where([bool(value) for value in values], task.target, -1))
        shift, parts, lacking = shifted(task, question.shift, values, parts, study.seed)
        warnings += lacking
    else:
        warnings += [f"{question.name}: {lack}" for lack in splits.missing]
    order = np.argsort(dataset.row_id)
    said = hashlib.sha256(f"{splits.digest} {taxonomy.digest}".encode())
    said.update(task.target[order].astype("<i8").tobytes())
    for part in parts if shift else ():
        said.update(part.of[order].astype("<i8").tobytes())
    return Asked(task, splits, parts, tuple(warnings), said.hexdigest(), shift)


def fewer_labels(part: Part, asked: Asked, dataset: Dataset, fraction: float, seed: int) -> Part:
    """The fold with a share of its training patients: stratified, one a class at least, the less in the more.

    A repeat is another draw. Validation and test stay as they are.
    """
    if fraction >= 1:
        return part
    rows = part.rows(TRAIN)
    group, target = dataset.group[rows], asked.task.target[rows]
    patients, first = np.unique(group, return_index=True)
    least = np.full(int(patients.max()) + 1, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(least, group, dataset.row_id[rows])
    # Keyed by the patient's least row id and the repeat: the same draw for every fraction, so that they are nested.
    drawn = philox.uniform(seed, "labels", least[patients], part.repeat, 0, 0)
    kept: list[int] = []
    stratum = target[first]
    for label in np.unique(stratum):
        of_label = patients[stratum == label][np.argsort(drawn[stratum == label], kind="stable")]
        kept += of_label[: max(1, round(fraction * len(of_label)))].tolist()
    of = part.of.copy()
    of[rows[~np.isin(group, kept)]] = UNUSED
    return Part(part.fold, part.repeat, of)


def shuffled_labels(asked: Asked, part: Part, seed: int) -> Int[np.ndarray, " n"]:
    """Targets with those of the fold's training rows permuted over patients; validation and test keep the truth."""
    rows = part.rows(TRAIN)
    target = asked.task.target.copy()
    target[rows] = over_patients(
        target[rows], asked.task.group[rows], np.random.default_rng([seed, part.repeat, part.fold])
    )
    return target


def over_patients(
    values: Int[np.ndarray, " m"], group: Int[np.ndarray, " m"], generator: np.random.Generator
) -> Int[np.ndarray, " m"]:
    """The values dealt out anew over patients: each keeps its count, and a patient's images stay mostly alike.

    Rows in the order of their patients receive the values in the order of the permuted patients.
    """
    patients = np.unique(group)
    place = np.empty(int(patients.max()) + 1, dtype=np.int64)
    place[patients] = np.arange(len(patients))
    receiving = np.argsort(place[group], kind="stable")
    place[patients] = generator.permutation(len(patients))
    giving = np.argsort(place[group], kind="stable")
    dealt = np.empty_like(values)
    dealt[receiving] = values[giving]
    return dealt


def _meant(dataset: Dataset, of_row: Int[np.ndarray, " n"]) -> dict[str, int] | None:
    """What each label of the data counts as in the task, from the rows that carry it."""
    if dataset.taxonomy is None:
        return None
    pairs = np.unique(np.stack([dataset.target, of_row], axis=1)[(dataset.target >= 0) & (of_row >= 0)], axis=0)
    return {dataset.taxonomy.names[label]: int(node) for label, node in pairs.tolist()}


def _target(question: Question, dataset: Dataset) -> tuple[Taxonomy, Int[np.ndarray, " n"]]:
    if question.column:
        return _of_column(question, dataset)
    tree = dataset.taxonomy
    if tree is None:
        raise UserError(f"task {question.name}: the data have no labels")
    if question.classes:
        return _of_classes(question, tree, dataset.target)
    return (tree, dataset.target) if not question.below else _below(question, tree, dataset.target)


def _of_column(question: Question, dataset: Dataset) -> tuple[Taxonomy, Int[np.ndarray, " n"]]:
    values = _values(question.name, question.column, dataset)
    flat = Taxonomy.from_edges([(value, None) for value in sorted({v for v in values if v})])
    place = {name: node for node, name in enumerate(flat.names)}
    return flat, np.array([place.get(value, -1) for value in values], dtype=np.int64)


def _values(task: str, column: str, dataset: Dataset) -> list[str]:
    """The cells of a column as metadata are read: case and blanks do not matter, and "unknown" is no value."""
    if column not in dataset.columns:
        raise UserError(f'task {task}: no column "{column}"' + suggestion(column, dataset.columns))
    return ["" if (term := normal(cell)) in UNKNOWN else term for cell in dataset.columns[column]]


def _of_classes(
    question: Question, tree: Taxonomy, label: Int[np.ndarray, " n"]
) -> tuple[Taxonomy, Int[np.ndarray, " n"]]:
    flat = Taxonomy.from_edges([(name, None) for name in question.classes])
    of_node = np.full(len(tree), -1, dtype=np.int64)
    for name, nodes in question.classes.items():
        below = np.isin(np.arange(len(tree)), _descendants(tree, [_node(question, tree, node) for node in nodes]))
        twice = below & (of_node >= 0)
        if twice.any():
            node = tree.names[int(np.flatnonzero(twice)[0])]
            raise UserError(f'task {question.name}: "{node}" is in two classes')
        of_node[below] = int(flat.index(name))
    return flat, np.where(label >= 0, of_node[np.maximum(label, 0)], -1)


def _below(question: Question, tree: Taxonomy, label: Int[np.ndarray, " n"]) -> tuple[Taxonomy, Int[np.ndarray, " n"]]:
    top = _node(question, tree, question.below)
    kept = _descendants(tree, [top])
    kept = kept[kept != top]
    if not len(kept):
        raise UserError(f'task {question.name}: nothing is below "{question.below}"')
    inside = set(kept.tolist())
    edges: list[tuple[str, str | None]] = []
    for node in kept.tolist():
        above = [tree.names[p] for p in tree.parents[node] if p in inside]
        edges += [(tree.names[node], name) for name in above] or [(tree.names[node], None)]
    part = Taxonomy.from_edges(edges)
    of_node = np.full(len(tree), -1, dtype=np.int64)
    of_node[kept] = part.index([tree.names[node] for node in kept.tolist()])
    return part, np.where(label >= 0, of_node[np.maximum(label, 0)], -1)


def _descendants(tree: Taxonomy, tops: list[int]) -> Int[np.ndarray, " m"]:
    """The nodes themselves and all below them; parents come before their children in the order of nodes."""
    found = np.zeros(len(tree), dtype=bool)
    found[tops] = True
    for node, above in enumerate(tree.parents):
        found[node] |= any(found[p] for p in above)
    return np.flatnonzero(found)


def _node(question: Question, tree: Taxonomy, name: str) -> int:
    if name not in tree:
        near = tree.closest(name)
        raise UserError(f'task {question.name}: "{name}" is no node' + (f'; closest: "{near[0]}"' if near else ""))
    return int(tree.index(name))

"""A question of a study -> the `Task` that a data set can answer: which rows, which classes, in which folds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from kladi.data.dataset import Dataset
from kladi.data.views import philox
from kladi.errors import UserError, suggestion
from kladi.evaluate.answers import MOST_AUC_CLASSES, Task
from kladi.evaluate.measure import parts_of
from kladi.evaluate.readouts.regimes import Part
from kladi.evaluate.splits import TEST, TRAIN, UNUSED, VAL, Splits, make_splits, scored_classes
from kladi.structure.synonyms import UNKNOWN, normal
from kladi.structure.taxonomy import Taxonomy
from kladi.study.design import Question, Study


@dataclass(frozen=True)
class Asked:
    """A task and its folds: fold k of repeat r is the same for every method.

    warnings: classes that were merged or dropped, and folds that lack one.
    digest: SHA-256 of the rows, their targets and their folds.
    """

    task: Task
    splits: Splits
    parts: tuple[Part, ...]
    warnings: tuple[str, ...]
    digest: str


def ask(question: Question, dataset: Dataset, unseen: Bool[np.ndarray, " n"], study: Study) -> Asked:
    """The task on the rows that no encoder was pretrained on, split by patient.

    Raises:
        UserError: a node or column that is not there (names the closest), or too few patients for folds.
    """
    taxonomy, target = _target(question, dataset)
    target = np.where(unseen, target, -1)
    scored = scored_classes(target, dataset.group, taxonomy)
    names = taxonomy.names
    warnings = [
        f"{question.name}: {names[a]} has too few patients, scored at {names[b]}" for a, b in scored.merged.items()
    ]
    warnings += [f"{question.name}: {names[node]} has too few patients, not scored" for node in scored.dropped]
    task = Task(question.name, taxonomy, scored.target, dataset.group)
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
    warnings += [f"{question.name}: {lack}" for lack in splits.missing]
    parts = parts_of(splits, dataset.row_id)
    order = np.argsort(dataset.row_id)
    said = hashlib.sha256(f"{splits.digest} {taxonomy.digest}".encode())
    said.update(task.target[order].astype("<i8").tobytes())
    if question.shift:
        parts = shifted(parts, _place(question, dataset, task), task.group)
        for part in parts:
            said.update(part.of[order].astype("<i8").tobytes())
    return Asked(task, splits, parts, tuple(warnings), said.hexdigest())


def shifted(parts: tuple[Part, ...], place: Int[np.ndarray, " n"], group: Int[np.ndarray, " n"]) -> tuple[Part, ...]:
    """Folds of which each tests one place and trains on the others: a fold a place, in every repeat.

    Rows of the place are tested if their patient is nowhere else, or, where patients are in several places (one
    specimen at four magnifications), in that fold of the given ones. Of the patients that are not tested, those of
    another fold validate and the rest trains, with their rows of the other places.

    Args:
        parts: folds by patient.
        place: number of the place of each row, -1 where it is unknown; such rows are not used.
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
            validates = free & (of == VAL)
            out.append(Part(number, repeat, np.select([tested, validates, free], [TEST, VAL, TRAIN], UNUSED)))
    return tuple(out)


def _place(question: Question, dataset: Dataset, task: Task) -> Int[np.ndarray, " n"]:
    """The number of each row's value of the column, among those of rows that the task asks of."""
    values = _values(question.name, question.shift, dataset)
    known = sorted({value for value, target in zip(values, task.target, strict=True) if value and target >= 0})
    if len(known) < 2:
        raise UserError(f'task {question.name}: shift = "{question.shift}" has {len(known)} value here; it takes two')
    number = {value: k for k, value in enumerate(known)}
    return np.array([number.get(value, -1) for value in values], dtype=np.int64)


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

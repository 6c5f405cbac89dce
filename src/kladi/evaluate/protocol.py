"""What is asked, and of whom: the task and the splits of an evaluation, chosen by written rules and said in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from kladi import config as settings
from kladi.data.dataset import HELD_OUT, TEST, TRAIN, VAL
from kladi.data.embeddings import Embeddings
from kladi.errors import UserError
from kladi.evaluate.answers import Task
from kladi.evaluate.pretraining import Pretraining
from kladi.evaluate.splits import (
    FEWEST_PATIENTS,
    Splits,
    find_leaks,
    make_splits,
    manifest_splits,
    refuse_leaks,
    scored_classes,
)
from kladi.structure.taxonomy import Taxonomy


@dataclass(frozen=True)
class Protocol:
    """Task and splits of one evaluation.

    task: what is asked, with the classes that are scored; None where nothing can be asked.
    splits: None where there is none.
    reason: why there is no task or no split, "" otherwise.
    pretrain: "disjoint", "held-out", "transductive", or a stamp that says what is not known or was allowed.
    excluded: reason -> rows that are not measured.
    warnings: in words.
    """

    task: Task | None
    splits: Splits | None
    reason: str
    pretrain: str
    excluded: dict[str, int]
    warnings: tuple[str, ...]


def choose(embeddings: Embeddings, pretraining: Pretraining, config: settings.Config) -> Protocol:
    """Task, classes and splits, and the check for leaks.

    The labels are the task; without any, the first metadata column with two values of three patients or more. A
    manifest's own test rows are tested on; else the folds lie inside the patients that pretraining has not seen.

    Raises:
        UserError: a leak, every one listed; fewer than three patients to make folds of; or an encoder that has seen
            every labelled patient together with what is asked.
    """
    excluded: dict[str, int] = {}
    task = _task(embeddings)
    if task is None:
        reason = "no labels, and no metadata column with two values of three patients each"
        return Protocol(None, None, reason, _word(pretraining), excluded, ())
    unlabelled = int((task.target < 0).sum())
    if unlabelled:
        excluded["unlabelled"] = unlabelled
    by_manifest = config.evaluate.use_split and bool(((embeddings.split == TEST) & (task.target >= 0)).any())
    target, pretrain = task.target, "disjoint"
    if not by_manifest:
        target, pretrain = _held_back(embeddings, pretraining, task)
        away = int(((task.target >= 0) & (target < 0)).sum())
        if away:
            excluded["used in pretraining"] = away
        patients = len(np.unique(embeddings.group[target >= 0]))
        if patients < FEWEST_PATIENTS:
            raise UserError(f"evaluate needs three patients with a {task.name} at least; there are {patients}")
    scored = scored_classes(target, embeddings.group, task.taxonomy)
    names, few = task.taxonomy.names, f"fewer than {FEWEST_PATIENTS} patients"
    warnings = [f"{names[node]}: {few}, scored at {names[up]}" for node, up in scored.merged.items()]
    warnings += [f"{names[node]}: {few} that pretraining has not seen, not scored" for node in scored.dropped]
    dropped = int(((target >= 0) & (scored.target < 0)).sum())
    if dropped:
        excluded[f"class of {few}"] = dropped
    task = Task(task.name, task.taxonomy, scored.target, embeddings.group)
    classes = np.unique(scored.target[scored.target >= 0])
    if len(classes) < 2:
        only = f'one class only, "{names[classes[0]]}"' if len(classes) else "no class of three patients"
        return Protocol(task, None, only, pretrain, excluded, tuple(warnings))
    splits = _splits(embeddings, task, config, by_manifest=by_manifest)
    warnings += list(splits.missing)
    pretrain, leaks = _check(embeddings, pretraining, task, splits, pretrain)
    if by_manifest and pretraining.seen is not None and (pretraining.seen & _carved(embeddings, splits)).any():
        warnings.append(
            "the split has no validation rows: penalties are chosen on training rows that the encoder knows"
        )
    refuse_leaks(leaks, allow=config.data.allow_leak)
    if leaks:
        pretrain = f"LEAK ALLOWED ({len(leaks)})"
        warnings += leaks[:20]
    if not pretraining.before.known:
        warnings.append("the encoder began with weights from a file, which may have seen these images or their labels")
    if not embeddings.has_patients:
        warnings.append("no patient id: split by image, so that images of one patient may stand on both sides")
    return Protocol(task, splits, "", pretrain, excluded, tuple(warnings))


def _task(embeddings: Embeddings) -> Task | None:
    """The labels, or a metadata column in their place."""
    if embeddings.taxonomy is not None and (embeddings.target >= 0).any():
        return Task("label", embeddings.taxonomy, embeddings.target, embeddings.group)
    for name, values in embeddings.columns.items():
        texts = sorted({value for value in values if value})
        enough = [
            text for text in texts if len(np.unique(embeddings.group[[v == text for v in values]])) >= FEWEST_PATIENTS
        ]
        if len(enough) >= 2:
            flat = Taxonomy.from_edges([(text, None) for text in texts])
            place = {text: int(flat.index(text)) for text in texts}
            target = np.array([place.get(value, -1) for value in values], dtype=np.int64)
            return Task(name, flat, target, embeddings.group)
    return None


def _held_back(embeddings: Embeddings, pretraining: Pretraining, task: Task) -> tuple[Int[np.ndarray, " n"], str]:
    """Targets of the rows that folds may be made of, -1 elsewhere; and the word for it."""
    held_out = embeddings.split == HELD_OUT
    if pretraining.seen is None:
        rows = held_out if held_out.any() else np.ones(len(embeddings), dtype=bool)
        return np.where(rows, task.target, -1), "pretraining data unknown"
    unseen = ~pretraining.seen
    rest = np.where(unseen, task.target, -1)
    enough = len(np.unique(embeddings.group[rest >= 0])) >= FEWEST_PATIENTS and len(np.unique(rest[rest >= 0])) >= 2
    if enough:
        return rest, "held-out" if pretraining.seen.any() else "disjoint"
    if pretraining.label_free_for(task.name):
        return task.target, "transductive"
    raise UserError(
        "the encoder was pretrained with the labels of nearly all patients here, so that none is left to test it on; "
        "give data that it has not seen, or pretrain with a column split"
    )


def _splits(embeddings: Embeddings, task: Task, config: settings.Config, *, by_manifest: bool) -> Splits:
    if by_manifest:
        return manifest_splits(embeddings.row_id, task.target, task.group, embeddings.split, seed=config.evaluate.seed)
    return make_splits(
        embeddings.row_id,
        task.target,
        task.group,
        folds=config.evaluate.folds,
        repeats=config.evaluate.repeats,
        seed=config.evaluate.seed,
        names=dict(enumerate(task.taxonomy.names)),
    )


def _check(
    embeddings: Embeddings, pretraining: Pretraining, task: Task, splits: Splits, pretrain: str
) -> tuple[str, list[str]]:
    """The word for where the encoder has looked, and every leak."""
    seen = pretraining.seen
    if seen is None:
        pretrain, seen_with_labels = "pretraining data unknown", None
    else:
        seen_with_labels = None if pretraining.label_free_for(task.name) else seen & ~_carved(embeddings, splits)
        tested = np.isin(embeddings.row_id, splits.row_id)
        if splits.kind == "manifest":
            tested &= splits.part(embeddings.row_id, 0, 0) != TRAIN
        if (seen & tested).any() and seen_with_labels is None:
            pretrain = "transductive"
    leaks = find_leaks(
        splits,
        embeddings.row_id,
        embeddings.group,
        embeddings.pixel_digest,
        embeddings.manifest_row,
        seen_with_labels,
    )
    return pretrain, leaks


def _carved(embeddings: Embeddings, splits: Splits) -> Bool[np.ndarray, " n"]:
    """Validation rows that the manifest calls training rows, because it has none of its own to validate with."""
    if splits.kind != "manifest":
        return np.zeros(len(embeddings), dtype=bool)
    return (splits.part(embeddings.row_id, 0, 0) == VAL) & (embeddings.split == TRAIN)


def _word(pretraining: Pretraining) -> str:
    if pretraining.seen is None:
        return "pretraining data unknown"
    return "held-out" if (~pretraining.seen).any() else "transductive"

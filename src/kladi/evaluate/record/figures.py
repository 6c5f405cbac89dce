"""What the report draws, computed from the answers: confusion in the order of the tree, severity, levels."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from kladi.data.dataset import TRAIN
from kladi.data.embeddings import Embeddings
from kladi.evaluate import metrics
from kladi.evaluate.answers import Answers, Task
from kladi.evaluate.record.results import Row
from kladi.losses import geometry as spaces
from kladi.structure.taxonomy import Taxonomy

REGIME = "probe"
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
MOST_IN_BALL = 2000


def tree_order(taxonomy: Taxonomy) -> Int[np.ndarray, " N"]:
    """Node ids depth-first, a node before what is below it, siblings by name; on a DAG at the first place reached."""
    below: dict[int, list[int]] = defaultdict(list)
    tops: list[int] = []
    for node, above in enumerate(taxonomy.parents):
        for parent in above:
            below[parent].append(node)
        if not above:
            tops.append(node)
    order: dict[int, None] = {}
    waiting = sorted(tops, key=taxonomy.names.__getitem__, reverse=True)
    while waiting:
        node = waiting.pop()
        if node not in order:
            order[node] = None
            waiting += sorted(below[node], key=taxonomy.names.__getitem__, reverse=True)
    return np.array(list(order), dtype=np.int64)


def confusion(answers: Sequence[Answers], task: Task, method: str) -> dict[str, Any]:
    """Counts of truth (rows) against answer (columns) of the probe's first repeat, where each row is tested once.

    Nodes that are neither truth nor answer anywhere are left out. Empty where the probe gave no answer.
    """
    true, pred = _first_repeat(answers, task, method)
    if not len(true):
        return {}
    order = tree_order(task.taxonomy)
    order = order[np.isin(order, np.union1d(true, pred))]
    place = np.empty(len(task.taxonomy.names), dtype=np.int64)
    place[order] = np.arange(len(order))
    counts = np.zeros((len(order), len(order)), dtype=np.int64)
    np.add.at(counts, (place[true], place[pred]), 1)
    return {
        "regime": REGIME,
        "nodes": [task.taxonomy.names[node] for node in order],
        "depths": task.taxonomy.depth[order].tolist(),
        "counts": counts.tolist(),
    }


def severity(answers: Sequence[Answers], task: Task, methods: Sequence[str]) -> dict[str, Any]:
    """Errors of the probe's first repeat by the height of the lowest common ancestor. Empty without a tree."""
    if not task.has_levels:
        return {}
    heights = range(1, int(task.taxonomy.depth.max()) + 1)
    counts = {}
    for method in methods:
        true, pred = _first_repeat(answers, task, method)
        if len(true):
            found = metrics.lca_height(pred, true, task.taxonomy)
            counts[method] = [int((found == height).sum()) for height in heights]
    return {"heights": list(heights), "counts": counts} if counts else {}


def stopping(answers: Sequence[Answers], task: Task, methods: Sequence[str]) -> list[dict[str, Any]]:
    """What a method gives up and gains by answering with an inner node where the leaf is not sure: hierarchical
    precision, recall, depth of the answers and share of answered rows at each threshold, over the first repeat.

    Of the probe, and of the classifier that was trained with the encoder. Empty without a tree.
    """
    if not task.has_levels:
        return []
    found = []
    for regime in ("head", REGIME):
        for method in methods:
            mine = [a for a in answers if (a.method, a.regime, a.repeat) == (method, regime, 0)]
            at = {threshold: [_stopped(a, task, threshold) for a in mine] for threshold in THRESHOLDS}
            true = np.concatenate([task.target[a.rows] for a in mine]) if mine else np.zeros(0, dtype=np.int64)
            for threshold, parts in at.items():
                if len(true):
                    stop = metrics.stopped_at(np.concatenate(parts), true, task.taxonomy, threshold)
                    found.append({"method": method, "regime": regime, "n": len(true), **dataclasses.asdict(stop)})
    return found


def _stopped(answers: Answers, task: Task, threshold: float) -> np.ndarray:
    scores = answers.scores if answers.scores is not None else np.zeros((len(answers.rows), len(answers.classes)))
    return metrics.stop_at(scores, answers.classes, task.taxonomy, threshold)


def tree(answers: Sequence[Answers], task: Task, method: str) -> list[dict[str, Any]]:
    """Every node with an image at or below it: its parent, its images, and the share whose answer is there too.

    Of the probe's first repeat, nodes in the order of the tree. Empty without a tree.
    """
    true, pred = _first_repeat(answers, task, method)
    if not task.has_levels or not len(true):
        return []
    table, names = np.asarray(task.taxonomy.ancestor_table), task.taxonomy.names
    paths, answered = table[true], table[pred]
    found = []
    for node in tree_order(task.taxonomy):
        level = int(task.taxonomy.depth[node]) - 1
        below = paths[:, level] == node
        if below.any():
            above = task.taxonomy.parents[node]
            found.append(
                {
                    "node": names[node],
                    "parent": names[above[0]] if above else "",
                    "images": int(below.sum()),
                    "right": float((answered[below, level] == node).mean()),
                }
            )
    return found


def ball(embeddings: Embeddings, space: spaces.Geometry) -> dict[str, Any]:
    """The ball itself, scaled to radius one, where the head has two dimensions: images, and the tree of prototypes.

    Images that were not trained on, 2,000 at most; prototypes are their means, in the geometry. Empty otherwise.
    """
    tax, z = embeddings.taxonomy, embeddings.z
    if not isinstance(space, spaces.PoincareBall) or z is None or z.shape[1] != 2 or tax is None or not tax.is_tree:
        return {}
    rows = np.flatnonzero((embeddings.split != TRAIN) & (embeddings.target >= 0))
    rows = rows[np.argsort(embeddings.row_id[rows])][:MOST_IN_BALL]
    if not len(rows):
        return {}
    target = embeddings.target[rows]
    nodes, seen = metrics.node_prototypes(z[rows], target, tax, space.name, space.number, space.clip)
    radius = space.number**0.5
    points = space.embed(torch.from_numpy(z[rows]).double()).numpy() * radius
    tops = [tax.names[int(tax.ancestor_table[node, 0])] for node in target]
    return {
        "points": points.round(4).tolist(),
        "top": tops,
        "nodes": [
            {
                "node": tax.names[v],
                "parent": tax.names[tax.parents[v][0]] if tax.parents[v] else "",
                "at": (np.asarray(nodes[v], dtype=np.float64) * radius).round(4).tolist(),
            }
            for v in tree_order(tax)
            if seen[v]
        ],
    }


def parents(answers: Sequence[Answers], task: Task, methods: Sequence[str]) -> list[dict[str, Any]]:
    """For each node with a choice below it: images, children, and each method's share that goes down the right one.

    Of the probe's first repeat, nodes in the order of the tree. Empty without a tree.
    """
    if not task.has_levels:
        return []
    found = {}
    for method in methods:
        true, pred = _first_repeat(answers, task, method)
        if len(true):
            found[method] = metrics.accuracy_below(pred, true, task.taxonomy)
    if not found:
        return []
    _, rows, children = next(iter(found.values()))
    return [
        {
            "node": task.taxonomy.names[node],
            "images": int(rows[node]),
            "children": int(children[node]),
            "accuracy": {method: float(share[node]) for method, (share, _, _) in found.items()},
        }
        for node in tree_order(task.taxonomy)
        if children[node] > 1
    ]


def by_depth(rows: Sequence[Row], prefix: str, regime: str, methods: Sequence[str]) -> dict[str, list[float | None]]:
    """Mean over the folds of `prefix`1, `prefix`2, ... for each method; None where no fold defines it."""
    found: dict[str, dict[int, list[float]]] = {method: {} for method in methods}
    for row in rows:
        if row.regime == regime and row.metric.startswith(prefix) and row.method in found:
            level = found[row.method].setdefault(int(row.metric.removeprefix(prefix)), [])
            if row.value is not None and math.isfinite(row.value):
                level.append(row.value)
    return {
        method: [float(np.mean(v)) if (v := levels[level]) else None for level in sorted(levels)]
        for method, levels in found.items()
        if levels
    }


def _first_repeat(answers: Sequence[Answers], task: Task, method: str) -> tuple[np.ndarray, np.ndarray]:
    mine = [a for a in answers if a.method == method and a.regime == REGIME and a.repeat == 0]
    if not mine:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    return task.target[np.concatenate([a.rows for a in mine])], np.concatenate([a.pred for a in mine])

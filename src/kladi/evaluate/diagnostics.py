"""Is the structure there at all? What a tree and metadata say about the images, before anything is trained.

Features are whatever is at hand: an encoder's, or grey levels. Each line ends in a verdict: present, weak, absent, or
cannot tell. `kladi plan` chooses by it, and a study confronts it with what was gained.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kladi import config as settings
from kladi.data.dataset import TRAIN as DATA_TRAIN
from kladi.data.dataset import Dataset
from kladi.data.views import philox
from kladi.errors import UserError
from kladi.evaluate import baselines, metrics
from kladi.evaluate.answers import said
from kladi.evaluate.readouts.probe import fit_probes
from kladi.evaluate.splits import TEST, TRAIN, make_splits
from kladi.structure.taxonomy import Taxonomy

ENUMERATED = 8
"""Up to so many leaves every relabelling is tried."""
DRAWS = 9_999
FEWEST = 20
"""With fewer distinct relabellings the least p is above .05, so that none is given."""
MOST_ROWS, FEWEST_ROWS = 2000, 20
"""Training rows that are looked at before a training."""
ALPHA, STRONG, WEAK_TAG = 0.05, 0.5, 0.1


@dataclass(frozen=True)
class Diagnostic:
    """One line: what was asked, the number, its p value where there is one, and the verdict.

    name: e.g. "tree against features". statistic: what `value` is. null: what p was computed against.
    """

    name: str
    statistic: str
    value: float | None
    p: float | None
    least_p: float | None
    null: str
    verdict: str
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# --- the tree ------------------------------------------------------------------------------------------------------


def tree_against_features(
    features: Float[np.ndarray, "n F"], target: Int[np.ndarray, " n"], taxonomy: Taxonomy, *, seed: int = 0
) -> Diagnostic:
    """Whether classes that are near in the tree are near in the features (a Mantel test over relabellings of leaves).

        F_ab = distance of the class means of a and b,   T_ab = distance in the tree
        r = Pearson correlation over the pairs,   p = share of the relabellings with an r as large, identity included

    Labels are permuted over classes and not over images: that would only test whether classes differ.

    Args:
        features: of the training rows.
        target: node of each, -1 where unlabelled.
        taxonomy: a tree.
        seed: of the draws, where there are too many relabellings to try.
    """
    name = "tree against features"
    classes = np.unique(target[target >= 0])
    if not taxonomy.is_tree or len(classes) < 3:
        why = "not a tree" if not taxonomy.is_tree else f"{len(classes)} classes"
        return Diagnostic(name, "Mantel r", None, None, None, "", "cannot tell", why)
    means = np.stack([features[target == c].astype(np.float64).mean(axis=0) for c in classes])
    F = np.linalg.norm(means[:, None] - means[None], axis=-1)
    T = taxonomy.distance(classes, classes).astype(np.float64)
    r, p = mantel(F, T, seed=seed)
    distinct = math.factorial(len(classes)) // automorphisms(taxonomy, classes)
    note = f"{len(classes)} classes, {_count(distinct)} distinct relabellings, dCor {distance_correlation(F, T):.2f}"
    if distinct < FEWEST or not math.isfinite(r):
        return Diagnostic(name, "Mantel r", _finite(r), None, 1 / distinct, "relabelled leaves", "cannot tell", note)
    verdict = "absent" if p >= ALPHA or r <= 0 else "present" if r >= STRONG else "weak"
    return Diagnostic(name, "Mantel r", r, p, max(1 / distinct, 1 / (DRAWS + 1)), "relabelled leaves", verdict, note)


def mantel(F: Float[np.ndarray, "k k"], T: Float[np.ndarray, "k k"], *, seed: int = 0) -> tuple[float, float]:
    """Correlation of two distance matrices over their pairs, and its p value over permutations of the items of T.

    All permutations up to 8 items, else 9,999 draws and p = (1 + hits) / 10,000. (nan, nan) where either is constant.
    """
    k = len(F)
    above = np.triu_indices(k, 1)
    f = F[above] - F[above].mean()
    t = T[above] - T[above].mean()
    scale = math.sqrt(float(f @ f) * float(t @ t))
    if scale <= 1e-300:
        return math.nan, math.nan
    r = float(f @ t) / scale
    rng = np.random.default_rng([seed, 0x4D616E74])
    orders: Sequence[Any] = (
        list(itertools.permutations(range(k))) if k <= ENUMERATED else [rng.permutation(k) for _ in range(DRAWS)]
    )
    hits = 0
    for block in _batched(orders, 2000):
        order = np.array(block)
        moved = T[order[:, above[0]], order[:, above[1]]]
        # Slack, so that a relabelling that changes nothing counts however its sum is rounded.
        hits += int(((moved - T[above].mean()) @ f / scale >= r - 1e-12).sum())
    p = hits / len(orders) if k <= ENUMERATED else (1 + hits) / (len(orders) + 1)
    return r, p


def automorphisms(taxonomy: Taxonomy, classes: Int[np.ndarray, " k"]) -> int:
    """Permutations of the classes that leave every tree distance as it is: k! over them is the distinct relabellings.

    Distances know no root, so the part of the tree that joins the classes is looked at from its centre, which every
    such permutation keeps. Two branches are alike where their shapes and the places of the classes are; m alike ones
    below one node can be exchanged in m! ways.
    """
    taxonomy.require_tree()
    marked = set(classes.tolist())
    near = _joining(taxonomy, marked)
    centre = _centre(near)
    if len(centre) == 2:  # the middle of an edge: put a node there
        a, b = centre
        near[a].remove(b)
        near[b].remove(a)
        near[-1] = {a, b}
        near[a].add(-1)
        near[b].add(-1)
    order = [centre[0] if len(centre) == 1 else -1]
    above: dict[int, int] = {}
    for node in order:  # grows while it is walked: breadth first
        below = sorted(near[node] - {above.get(node)})
        above.update(dict.fromkeys(below, node))
        order += below
    shape: dict[int, str] = {}
    ways: dict[int, int] = {}
    for node in reversed(order):
        below = [n for n in near[node] if above.get(n) == node]
        kinds = Counter(shape[n] for n in below)
        shape[node] = f"({'x' if node in marked else ''}{''.join(sorted(shape[n] for n in below))})"
        ways[node] = math.prod(ways[n] for n in below) * math.prod(math.factorial(m) for m in kinds.values())
    return ways[order[0]]


def _joining(taxonomy: Taxonomy, marked: set[int]) -> dict[int, set[int]]:
    """Neighbours of each node in the smallest part of the tree that joins the marked ones; the root is node N."""
    root = len(taxonomy)
    near: dict[int, set[int]] = {node: set() for node in range(root + 1)}
    for node, above in enumerate(taxonomy.parents):
        parent = above[0] if above else root
        near[node].add(parent)
        near[parent].add(node)
    ends = [node for node, others in near.items() if len(others) <= 1 and node not in marked]
    while ends:
        node = ends.pop()
        for other in near.pop(node):
            near[other].discard(node)
            if len(near[other]) <= 1 and other not in marked:
                ends.append(other)
    return near


def _centre(near: dict[int, set[int]]) -> list[int]:
    """The one or two nodes in the middle of the longest way, found by taking off the ends again and again."""
    degree = {node: len(others) for node, others in near.items()}
    ends = [node for node, d in degree.items() if d <= 1]
    left = len(near)
    while left > 2:
        left -= len(ends)
        following = []
        for node in ends:
            for other in near[node]:
                degree[other] -= 1
                if degree[other] == 1:
                    following.append(other)
        ends = following
    return sorted(ends)


def distance_correlation(F: Float[np.ndarray, "k k"], T: Float[np.ndarray, "k k"]) -> float:
    """dCor of two distance matrices: sqrt(dCov^2 / sqrt(dVar_F dVar_T)), doubly centred; nan where one is constant."""
    A, B = (D - D.mean(axis=0) - D.mean(axis=1)[:, None] + D.mean() for D in (F, T))
    scale = math.sqrt(float((A * A).mean()) * float((B * B).mean()))
    return math.sqrt(max(0.0, float((A * B).mean())) / scale) if scale > 1e-300 else math.nan


# --- metadata ------------------------------------------------------------------------------------------------------


def metadata_against_pixels(
    name: str,
    values: Sequence[str],
    features: Float[np.ndarray, "n F"],
    row_id: np.ndarray,
    group: Int[np.ndarray, " n"],
    *,
    seed: int = 0,
) -> Diagnostic:
    """Whether an attribute can be read off the images: balanced accuracy of a probe, over folds by patient.

    Near chance the attribute says nothing about the pixels. Rows where it is unknown ("") are left out.
    """
    title, statistic = f"{name} from pixels", "balanced accuracy"
    known = sorted({value for value in values if value})
    place = {value: code for code, value in enumerate(known)}
    target = np.array([place.get(value, -1) for value in values], dtype=np.int64)
    enough = [c for c in range(len(known)) if len(np.unique(group[target == c])) >= 3]
    target = np.where(np.isin(target, enough), target, -1)
    if len(enough) < 2:
        return Diagnostic(title, statistic, None, None, None, "", "cannot tell", "fewer than two values of 3 patients")
    try:
        splits = make_splits(row_id, target, group, folds=3, repeats=1, seed=seed)
    except UserError as error:
        return Diagnostic(title, statistic, None, None, None, "", "cannot tell", str(error))
    scores = []
    for fold in range(splits.folds):
        part = splits.part(row_id, fold, 0)
        train, test = part == TRAIN, part == TEST
        if len(np.unique(target[train])) < 2 or not test.any():
            continue
        probes = fit_probes(features, target, train[None], lambdas=(0.01,))
        pred = probes.predict(features[test], 0)
        scores.append(said(lambda p=pred, t=test: metrics.balanced_accuracy(p, target[t]))[0])
    if not scores:
        return Diagnostic(title, statistic, None, None, None, "", "cannot tell", "no fold has two values to train on")
    value, chance = float(np.mean(scores)), 1 / len(enough)
    above = (value - chance) / (1 - chance)
    verdict = "absent" if above < WEAK_TAG else "present" if above >= STRONG else "weak"
    return Diagnostic(title, statistic, value, None, None, f"chance {chance:.2f}", verdict, f"{len(enough)} values")


def shared_information(first: Sequence[str], second: Sequence[str]) -> float:
    """Normalised mutual information of two columns, 2 I / (H1 + H2), over the rows that know both; nan where H is 0."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a and b]
    if not pairs:
        return math.nan
    h = [_entropy(Counter(column)) for column in zip(*pairs, strict=True)]
    joint = _entropy(Counter(pairs))
    return 2 * (sum(h) - joint) / sum(h) if sum(h) > 1e-12 else math.nan


# --- a data set ----------------------------------------------------------------------------------------------------


def before_training(
    dataset: Dataset, intensity: settings.Intensity | None = None, grey: Float[np.ndarray, "n G"] | None = None
) -> tuple[Diagnostic, ...]:
    """What tree and metadata say about grey levels, over the training rows, `MOST_ROWS` of them at most.

    Args:
        intensity: that the data set was decoded by; None: the default one, with the channels that are stored.
        grey: `baselines.grey_features` of all rows, where they were made before.
    """
    train = np.flatnonzero(dataset.split == DATA_TRAIN)
    chosen = np.sort(train[philox.epoch_order(0, 0, dataset.row_id[train])][:MOST_ROWS])
    if len(chosen) < FEWEST_ROWS:
        return ()
    if grey is None:
        pipeline = intensity or settings.Intensity(channels=dataset.store.images.shape[1])
        grey = baselines.grey_features(dataset, pipeline, rows=chosen)
    else:
        grey = grey[chosen]
    fitted = baselines.fit_grey(grey, np.ones(len(chosen), dtype=bool))
    return of_dataset(dataset, fitted, chosen)


def of_dataset(
    dataset: Dataset, features: Float[np.ndarray, "m F"], rows: Int[np.ndarray, " m"], *, seed: int = 0
) -> tuple[Diagnostic, ...]:
    """Every diagnostic that a data set has the columns for, over some rows (the training rows).

    Args:
        features: of these rows.
        rows: positions in the data set.
    """
    found: list[Diagnostic] = []
    tree, target = dataset.taxonomy, dataset.target[rows]
    if tree is not None and (target >= 0).any() and int(tree.depth.max(initial=0)) > 1:
        found.append(tree_against_features(features, target, tree, seed=seed))
    site = next((dataset.columns[name] for name in ("site", "source") if name in dataset.columns), None)
    for name in dataset.label_sets.attributes if dataset.label_sets is not None else ():
        values = [dataset.columns[name][i] for i in rows] if name in dataset.columns else []
        if values:
            one = metadata_against_pixels(name, values, features, dataset.row_id[rows], dataset.group[rows], seed=seed)
            found.append(one)
        if values and site is not None:
            nmi = shared_information(values, [site[i] for i in rows])
            verdict = (
                "cannot tell"
                if math.isnan(nmi)
                else "present"
                if nmi >= STRONG
                else "weak"
                if nmi >= WEAK_TAG
                else "absent"
            )
            note = "a shortcut by site is likely" if verdict == "present" else ""
            found.append(
                Diagnostic(
                    f"{name} and site", "normalised mutual information", _finite(nmi), None, None, "", verdict, note
                )
            )
    return tuple(found)


def sentence(d: Diagnostic) -> str:
    """`present: Mantel r .52, p .003 (36 classes, ...)`."""
    if d.value is None:
        return f"{d.verdict}: {d.note}" if d.note else d.verdict
    p = "" if d.p is None else f", p {d.p:.4f}".rstrip("0")
    null = f", {d.null}" if d.null.startswith("chance") else ""
    return f"{d.verdict}: {d.statistic} {d.value:.2f}{p}{null}" + (f" ({d.note})" if d.note else "")


def _entropy(counts: Counter[Any]) -> float:
    p = np.array(list(counts.values()), dtype=np.float64)
    p /= p.sum()
    return float(-(p * np.log(p)).sum())


def _batched(orders: Sequence[Any], size: int) -> Any:
    return (orders[i : i + size] for i in range(0, len(orders), size))


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**6 else "over a million"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

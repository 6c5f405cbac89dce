"""Objectives by name: `PRESETS` builds them from the facts of a data set.

The keyword arguments of a preset's function are the schema of `objective.args`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kladi.errors import UserError, suggestion
from kladi.learn import plugin
from kladi.learn.arguments import fitting
from kladi.learn.classifier import LinearClassifier, TreeClassifier
from kladi.learn.facts import Facts
from kladi.learn.multimodal import multimodal
from kladi.learn.objectives import LABEL, METADATA, Answers, Supervised, Term
from kladi.learn.unlabelled import barlow_twins, byol, dino, moco_v3, simclr
from kladi.losses import (
    HierarchicalCrossEntropy,
    HierarchyAwareCrossEntropy,
    HierarchyWeightedContrastiveLoss,
    HiMulConLoss,
    LevelAwareMarginLoss,
    MultiLabelContrastiveLoss,
    NTXentLoss,
    SoftLabelCrossEntropy,
    SupConLoss,
)
from kladi.losses.geometry import LearnedCurvature
from kladi.losses.tree_cross_entropy import RowLoss, proper_weighting
from kladi.structure.labelset import TABLE_CLASSES, LabelSets
from kladi.structure.parts import above
from kladi.structure.taxonomy import Taxonomy


def supcon(
    facts: Facts, encoder: nn.Module, projector: nn.Module, *, temperature: float = 0.1, views: float = 0.0
) -> Supervised:
    """Images of one label attract each other (SupCon); the tree is not used.

    `views` is the weight of an NT-Xent term over all rows, which unlabelled rows feed; 0 leaves it out.
    """
    _require_labels(facts, "supcon")
    terms = {"supcon": Term(SupConLoss(temperature=temperature), LABEL)}
    return Supervised(encoder, projector, {**terms, **_view_term(views)})


def cross_entropy(
    facts: Facts, encoder: nn.Module, projector: nn.Module, *, label_smoothing: float = 0.0
) -> Supervised:
    """Each label is a class (cross-entropy of a linear classifier on the projection); the tree is not used."""
    tax = _require_labels(facts, "cross_entropy")
    loss = LinearClassifier(facts.labels.tolist(), _dim(projector), label_smoothing)
    names = [tax.names[label] for label in facts.labels]
    return Supervised(encoder, projector, {"cross_entropy": Term(loss, LABEL)}, Answers(names, names))


def tree_cross_entropy(
    facts: Facts,
    encoder: nn.Module,
    projector: nn.Module,
    *,
    retain: float = 0.7,
    label_smoothing: float = 0.0,
    soft_beta: float | None = None,
    weighting: str | None = None,
) -> Supervised:
    """A classifier over all nodes of the tree, whose target leaves a share with the ancestors (HACE).

    A label that others are below is a partial one: it asks for its whole subtree.

    Args:
        retain, label_smoothing, soft_beta: of `HierarchyAwareCrossEntropy`.
        weighting: unless given "anchored" where leaves lie at several depths, which keeps the loss proper there; else
            "geometric".
    """
    part, place = _part(facts, "tree_cross_entropy")
    if soft_beta is not None:
        _require_leaves(facts, part, place, "tree_cross_entropy with soft_beta")
    loss = HierarchyAwareCrossEntropy(
        part,
        retain=retain,
        label_smoothing=label_smoothing,
        soft_beta=soft_beta,
        weighting=weighting or proper_weighting(part),
    )
    return _over_tree("tree_cross_entropy", loss, part, place, part.names, encoder, projector)


def hxe(
    facts: Facts, encoder: nn.Module, projector: nn.Module, *, alpha: float = 0.1, normalise: bool = False
) -> Supervised:
    """A classifier over the leaves, charged for each step down the tree (HXE, a peer)."""
    part, place = _part(facts, "hxe")
    _require_tree(part, "hxe")
    loss = HierarchicalCrossEntropy(part, alpha=alpha, normalise=normalise)
    return _over_tree("hxe", loss, part, place, _leaf_names(part), encoder, projector)


def soft_labels(facts: Facts, encoder: nn.Module, projector: nn.Module, *, beta: float = 10.0) -> Supervised:
    """A classifier over the leaves, against labels that are soft by distance in the tree (a peer)."""
    part, place = _part(facts, "soft_labels")
    _require_tree(part, "soft_labels")
    _require_leaves(facts, part, place, "soft_labels")
    loss = SoftLabelCrossEntropy(part, beta=beta)
    return _over_tree("soft_labels", loss, part, place, _leaf_names(part), encoder, projector)


def metadata(
    facts: Facts,
    encoder: nn.Module,
    projector: nn.Module,
    *,
    temperature: float = 0.07,
    threshold: float | None = None,
    weights: dict[str, float] | None = None,
    normalise: str = "count",
    coverage_discount: bool = True,
    unknown_pairs: str = "keep",
    instance: float = 0.0,
    instance_temperature: float = 0.1,
) -> Supervised:
    """Images attract each other by how much of their metadata they share.

    Args:
        temperature, threshold, normalise: of the multi-label loss; no threshold: "shares any attribute".
        weights: attribute -> how much it counts, 1 unless given; 0 leaves it out.
        coverage_discount: a pair of which little is known counts less.
        unknown_pairs: "keep" or "drop" pairs in the denominator of which nothing can be compared.
        instance: lambda in (1 - lambda) metadata + lambda NT-Xent; 0 leaves NT-Xent out, 1 is SimCLR.
        instance_temperature: of the NT-Xent term.
    """
    sets = facts.label_sets
    if sets is None:
        raise UserError("--objective.name metadata needs metadata: name its columns with --data.metadata a,b")
    if not 0 <= instance <= 1:
        raise UserError(f"--objective.args.instance {instance} is not between 0 and 1")
    if unknown_pairs not in ("keep", "drop"):
        raise UserError(f'--objective.args.unknown_pairs "{unknown_pairs}" is neither keep nor drop')
    if weights:
        sets = sets.weighted(weights)
    loss = MultiLabelContrastiveLoss(
        temperature=temperature,
        threshold=sets.smallest_useful_threshold if threshold is None else threshold,
        normalise=normalise,
        **_similarity(sets, coverage_discount=coverage_discount, unknown_pairs=unknown_pairs),
    )
    terms = {"metadata": Term(loss, METADATA, 1 - instance)}
    if instance:
        terms["ntxent"] = Term(NTXentLoss(temperature=instance_temperature), weight=instance)
    return Supervised(encoder, projector, terms)


def label_tree(
    facts: Facts,
    encoder: nn.Module,
    projector: nn.Module,
    *,
    temperature: float | None = None,
    alpha: float = 0.5,
    beta: float = 0.5,
    mode: str = "mass",
    positives: str = "leaf",
    geometry: str = "sphere",
    curvature: float = 0.1,
    learn_curvature: bool = False,
    clip: float = 2.3,
    margin: float = 0.3,
    decay: float = 0.7,
    pull: float = 0.1,
    momentum: float = 0.95,
    level_weights: list[float] | None = None,
    hwc: float = 1.0,
    lam: float = 0.5,
    views: float = 0.0,
) -> Supervised:
    """Kin classes are pushed apart less, and each image stays near its ancestors' prototypes: HWC + 0.5 LAM.

    Args:
        temperature: 0.1, and 0.2 in the ball, unless given.
        alpha, beta, mode, positives: of `HierarchyWeightedContrastiveLoss`, whose own mode is "scale": as that, few
            and alike images may stay in one place.
        margin, decay, pull, momentum, level_weights: of `LevelAwareMarginLoss`.
        geometry, curvature, clip: of both.
        learn_curvature: `curvature` is where it begins, and one parameter of both.
        hwc, lam: weights of the two; 0 leaves one out.
        views: weight of an NT-Xent term over all rows, which unlabelled rows feed; 0 leaves it out.
    """
    tax = _require_labels(facts, "label_tree")
    tau = temperature if temperature is not None else (0.2 if geometry == "poincare" else 0.1)
    bend = LearnedCurvature(curvature, clip) if learn_curvature else curvature
    space: dict[str, Any] = {"geometry": geometry, "curvature": bend, "clip": clip}
    terms = {}
    if hwc:
        loss = HierarchyWeightedContrastiveLoss(
            tax, temperature=tau, alpha=alpha, beta=beta, mode=mode, positives=positives, **space
        )
        terms["hwc"] = Term(loss, LABEL, hwc)
    if lam:
        shape: dict[str, Any] = {"margin": margin, "decay": decay, "pull": pull, "momentum": momentum}
        loss = LevelAwareMarginLoss(tax, _dim(projector), level_weights=level_weights, **shape, **space)
        terms["lam"] = Term(loss, LABEL, lam)
    if not terms:
        raise ValueError("hwc and lam are both 0; give one of them a weight")
    return Supervised(encoder, projector, {**terms, **_view_term(views)})


def himulcon(
    facts: Facts,
    encoder: nn.Module,
    projector: nn.Module,
    *,
    temperature: float = 0.1,
    constraint: bool = True,
    deduplicate: bool = True,
) -> Supervised:
    """SupCon at every level of the tree, each no easier than the finer one (HiMulCon, a peer)."""
    tax = _require_labels(facts, "himulcon")
    loss = HiMulConLoss(tax, temperature=temperature, constraint=constraint, deduplicate=deduplicate)
    return Supervised(encoder, projector, {"himulcon": Term(loss, LABEL)})


def auto(facts: Facts, encoder: nn.Module, projector: nn.Module) -> Supervised:
    """What the data can carry: multimodal, label_tree, supcon (flat labels), metadata, simclr."""
    return PRESETS[choose(facts)](facts, encoder, projector)


def choose(facts: Facts) -> str:
    """Tables beside the images: multimodal. Else, most training rows labelled, two classes or more: label_tree where
    they have a tree, supcon where they are flat. Else metadata where there is any, else simclr."""
    if facts.tables:
        return "multimodal"
    tax = facts.taxonomy
    if tax is not None and facts.labelled >= 0.5 * len(facts.target) and facts.classes > 1:
        deep = tax.is_tree and int(tax.depth[facts.target[facts.target >= 0]].max()) > 1
        return "label_tree" if deep else "supcon"
    return "metadata" if facts.label_sets is not None else "simclr"


def resolved(name: str, facts: Facts) -> str:
    """The name that "auto" stands for; of a user's own loss the file's name without its folders."""
    return choose(facts) if name == "auto" else name.replace("\\", "/").rpartition("/")[2]


Preset = Callable[..., Supervised]
PRESETS: dict[str, Preset] = {
    "auto": auto,
    "barlow_twins": barlow_twins,
    "byol": byol,
    "cross_entropy": cross_entropy,
    "dino": dino,
    "himulcon": himulcon,
    "hxe": hxe,
    "label_tree": label_tree,
    "metadata": metadata,
    "moco_v3": moco_v3,
    "multimodal": multimodal,
    "simclr": simclr,
    "soft_labels": soft_labels,
    "supcon": supcon,
    "tree_cross_entropy": tree_cross_entropy,
}


def build(name: str, args: Mapping[str, Any], facts: Facts, encoder: nn.Module, projector: nn.Module) -> Supervised:
    """The objective of a configuration: a preset by name, or `my_file:MyLoss`.

    Raises:
        UserError: no such preset, no such argument (names the closest), a value that the loss refuses, or data that
            lacks what the objective reads.
    """
    if ":" in name:
        loss, target = plugin.loss(name, args, {"tax": facts.taxonomy, "dim": _dim(projector)})
        if target == LABEL:
            _require_labels(facts, name)
        return Supervised(encoder, projector, {plugin.term_name(name): Term(loss, target)})
    given = arguments(name, args)
    try:
        return PRESETS[name](facts, encoder, projector, **given)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"--objective.args for {name}: {error}") from error


def arguments(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a preset as its signature wants them.

    Raises:
        UserError: no such preset, no such argument, or a value of another kind; the closest word is named.
    """
    if name not in PRESETS:
        raise UserError(f'--objective.name "{name}" is no objective' + suggestion(name, PRESETS))
    return fitting(PRESETS[name], args, name)


def _require_labels(facts: Facts, name: str) -> Taxonomy:
    """Supervision needs labels of two classes at least."""
    if facts.taxonomy is None or not facts.labelled:
        raise UserError(
            f"--objective.name {name} needs labels, and no training image has one; --objective.name "
            f"{'metadata' if facts.label_sets is not None else 'simclr'} needs none"
        )
    if facts.classes < 2:
        only = facts.taxonomy.names[int(facts.target[facts.target >= 0][0])]
        raise UserError(f'--objective.name {name} needs two labels at least; all training images are "{only}"')
    return facts.taxonomy


def _part(facts: Facts, name: str) -> tuple[Taxonomy, Int[np.ndarray, " N"]]:
    """The nodes at or above the labels, with two leaves at least."""
    part, place = above(_require_labels(facts, name), facts.labels)
    if len(part.leaves) < 2:
        only = part.names[part.leaves[0]]
        raise UserError(f'--objective.name {name}: all labels lie on one way down to "{only}", so nothing can be told')
    return part, place


def _require_tree(part: Taxonomy, name: str) -> None:
    try:
        part.require_tree()
    except UserError as error:
        raise UserError(f"--objective.name {name}: {error}; tree_cross_entropy takes a DAG") from None


def _require_leaves(facts: Facts, part: Taxonomy, place: Int[np.ndarray, " N"], name: str) -> None:
    inner = [part.names[place[label]] for label in facts.labels.tolist() if part.children[place[label]]]
    if inner:
        raise UserError(
            f'--objective.name {name} needs labels at leaves, and "{inner[0]}" has others below it; --objective.name '
            "hxe and tree_cross_entropy take it"
        )


def _over_tree(
    name: str,
    loss: RowLoss,
    part: Taxonomy,
    place: Int[np.ndarray, " N"],
    columns: Sequence[str],
    encoder: nn.Module,
    projector: nn.Module,
) -> Supervised:
    classifier = TreeClassifier(loss, torch.from_numpy(place), _dim(projector))
    return Supervised(encoder, projector, {name: Term(classifier, LABEL)}, Answers(columns, _leaf_names(part)))


def _leaf_names(tax: Taxonomy) -> list[str]:
    return [tax.names[leaf] for leaf in tax.leaves]


def _view_term(weight: float) -> dict[str, Term]:
    return {"ntxent": Term(NTXentLoss(temperature=0.1), weight=weight)} if weight else {}


def _similarity(sets: LabelSets, **rules: Any) -> dict[str, Any]:
    """How much classes share, as the multi-label loss takes it: one table, or of very many the part a batch needs."""
    drop = rules["unknown_pairs"] == "drop"
    if len(sets.sets) <= TABLE_CLASSES:
        _, table, comparable = sets.similarity(**rules)
        return {
            "similarity": torch.from_numpy(table),
            "comparable": torch.from_numpy(comparable) if drop else None,
        }

    def part(ids: Int[Tensor, " u"]) -> tuple[Float[Tensor, "u u"], Bool[Tensor, "u u"] | None]:
        some = ids.cpu().numpy()
        table, comparable = sets.table(some, some, **rules)
        return torch.from_numpy(table).to(ids.device), torch.from_numpy(comparable).to(ids.device) if drop else None

    return {"similarity": part}


def _dim(projector: nn.Module) -> int:
    """Width D of the embeddings."""
    dim: Any = projector.dim
    return int(dim)

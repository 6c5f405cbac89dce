"""By what loss a classifier is trained on a task: a name and arguments, and what they make of logits.

    Criterion("hace", {"retain": (0.2, 0.7)})        # two variants; validation rows choose

Every class of the task is a leaf here: a class that others are below gets a leaf of its own beside them. So all losses
answer with the same classes, and inner nodes are there for what is shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from kladi.errors import UserError, suggestion
from kladi.evaluate.controls import shuffled_leaves
from kladi.losses import HierarchicalCrossEntropy, HierarchyAwareCrossEntropy, SoftLabelCrossEntropy
from kladi.losses.tree_cross_entropy import RowLoss, proper_weighting
from kladi.structure.parts import with_leaves
from kladi.structure.taxonomy import Taxonomy

LOSSES: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("label_smoothing",),
    "hace": ("retain", "label_smoothing", "soft_beta", "weighting"),
    "hce": ("label_smoothing",),
    "hxe": ("alpha",),
    "soft_labels": ("beta",),
}
"""Losses and their arguments; "hce" is "hace" that retains all."""


@dataclass(frozen=True)
class Criterion:
    """A loss by name, with values to try for its arguments.

    shuffled: whether the classes stand at each other's leaves: a control, with a draw for each seed.
    """

    loss: str = "cross_entropy"
    args: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    shuffled: bool = False

    @property
    def plain(self) -> bool:
        """Cross-entropy over the classes, which needs no tree and has a solver of its own."""
        return self.loss == "cross_entropy" and not self.args

    @property
    def reads_tree(self) -> bool:
        return self.loss != "cross_entropy"

    def variants(self) -> list[dict[str, Any]]:
        """Every combination of the values."""
        return [dict(zip(self.args, values, strict=True)) for values in itertools.product(*self.args.values())]


def read(table: Mapping[str, Any], where: str) -> Criterion:
    """The criterion of a table of TOML: `loss`, and a value or a list of values for each of its arguments.

    Raises:
        UserError: no such loss or argument, with the closest.
    """
    loss = str(table.get("loss", ""))
    if loss not in LOSSES:
        raise UserError(f'{where}.loss = "{loss}" is not one of {", ".join(LOSSES)}' + suggestion(loss, LOSSES))
    args = {}
    for key, value in table.items():
        if key == "loss":
            continue
        if key not in LOSSES[loss]:
            raise UserError(f"{where}.{key} is no argument of {loss}" + suggestion(key, LOSSES[loss]))
        args[key] = tuple(value) if isinstance(value, list) else (value,)
        if not args[key]:
            raise UserError(f"{where}.{key} is an empty list")
        for one in args[key]:
            if key == "weighting" and not isinstance(one, str):
                raise UserError(f"{where}.{key} = {one} is no text")
            if key != "weighting" and (isinstance(one, bool) or not isinstance(one, int | float)):
                raise UserError(f'{where}.{key} = "{one}" is no number')
    found = Criterion(loss, args)
    try:
        for variant in found.variants():
            judge(loss, variant, Taxonomy.from_paths(["a/b", "a/c", "d/e"]), np.array([2, 3, 4]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error
    return found


class _Flat(RowLoss):
    """Cross-entropy over the classes; PyTorch's label smoothing."""

    def __init__(self, classes: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}; 0 switches it off")
        self.columns = self.nodes = classes
        self.label_smoothing = label_smoothing

    @override
    def rows(self, z: Float[Tensor, "B C"], target: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The loss of each row; nothing is checked."""
        return functional.cross_entropy(z, target, reduction="none", label_smoothing=self.label_smoothing)


@dataclass(frozen=True, eq=False)
class Judge:
    """A loss on the C classes of a task.

    loss: takes `loss.columns` logits a row.
    node: int64[C], the loss's target of each class. column: int64[C], the logit of each class.
    below: float64[columns, C], which classes are at or below a column's node.
    """

    loss: RowLoss
    node: Int[Tensor, " C"]
    column: Int[Tensor, " C"]
    below: Float[Tensor, "columns C"]

    @property
    def columns(self) -> int:
        return self.loss.columns

    def to(self, device: torch.device | str) -> Judge:
        """The same on another device."""
        return Judge(self.loss.to(device), self.node.to(device), self.column.to(device), self.below)

    def rows(self, logits: Float[Tensor, "B columns"], code: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The loss of each row; `code` counts the classes."""
        return self.loss.rows(logits, self.node[code])

    def log_p(self, logits: Float[Tensor, "B columns"]) -> Float[Tensor, "B C"]:
        """log softmax over all columns, at the classes: what is missing from 1 lies on inner nodes."""
        return functional.log_softmax(logits, dim=1)[:, self.column]

    def widened(
        self, weight: Float[Tensor, "C F"], bias: Float[Tensor, " C"]
    ) -> tuple[Float[Tensor, "columns F"], Float[Tensor, " columns"]]:
        """A head over the classes as one over the columns: an inner node begins at the mean of the classes below it."""
        share = (self.below / self.below.sum(1, keepdim=True).clamp_min(1)).to(weight)
        return share @ weight, share @ bias


def judge(
    loss: str, args: Mapping[str, Any], tax: Taxonomy, classes: Int[np.ndarray, " C"], shuffle: int | None = None
) -> Judge:
    """The judge of a loss by name. shuffle: a draw of which class stands at which leaf; None: each at its own."""
    if loss == "cross_entropy":
        each = torch.arange(len(classes))
        return Judge(_Flat(len(classes), **args), each, each, torch.eye(len(classes), dtype=torch.float64))
    part, leaf = with_leaves(tax, classes)
    if shuffle is not None:
        leaf = _dealt(part, leaf, shuffle)
    if loss in {"hace", "hce"}:
        usual: dict[str, Any] = {"retain": 1.0} if loss == "hce" else {"weighting": proper_weighting(part)}
        made: RowLoss = HierarchyAwareCrossEntropy(part, **{**usual, **args})
        columns, column = np.arange(len(part)), leaf
    else:
        made = (HierarchicalCrossEntropy if loss == "hxe" else SoftLabelCrossEntropy)(part, **args)
        columns, column = np.asarray(part.leaves), np.searchsorted(part.leaves, leaf)
    paths = [set(part.ancestors(int(node)).tolist()) for node in leaf]
    below = np.array([[float(node in path) for path in paths] for node in columns.tolist()])
    return Judge(made, torch.from_numpy(leaf), torch.from_numpy(column), torch.from_numpy(below))


def _dealt(tax: Taxonomy, leaf: Int[np.ndarray, " C"], seed: int) -> Int[np.ndarray, " C"]:
    """The leaves at other classes; where all arrangements are one tree, as on a flat one, any will do."""
    try:
        return shuffled_leaves(tax, leaf, seed)[0][leaf]
    except ValueError:
        return np.random.default_rng(seed).permutation(leaf)


def judges(criterion: Criterion, tax: Taxonomy, classes: Int[np.ndarray, " C"], seed: int = 0) -> Iterator[Judge]:
    """A judge for each variant; the leaves of a shuffled one are drawn by the seed."""
    for variant in criterion.variants():
        yield judge(criterion.loss, variant, tax, classes, seed if criterion.shuffled else None)

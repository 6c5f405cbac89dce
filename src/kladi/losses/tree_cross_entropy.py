"""Cross-entropies that know a label tree: HACE over all nodes, and its peers HXE and soft labels over the leaves.

All but soft labels are one formula, a weighted sum of log-probabilities along the path from the target to the top:

    L = mean over the batch of  - sum_v t_v log P_v        P_v = sum of softmax(z) over v and what is below it

HACE takes a softmax over all nodes and a target t that leaves a share with the ancestors; with `retain=1` it is the
hierarchical cross-entropy of its predecessor (HCE). HXE takes a softmax over the leaves and weights each step of the
path, which is the same sum with t_v = lambda(v) - lambda(next node down).

Source: Chan, D'Ascenzo, Cultrera di Montesano, arXiv 2605.06274, after their released code (MIT); HXE and soft labels:
Bertinetto et al., CVPR 2020, from the formulas.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import override

from kladi.losses.geometry import at_least_float32
from kladi.losses.label_tree import lineage_of, require
from kladi.losses.subtree_sums import Subtrees, all_log_probs, path_log_probs
from kladi.structure.taxonomy import Taxonomy

WEIGHTINGS = ("geometric", "anchored", "uniform", "exponential")

# --- what stands on a path --------------------------------------------------------------------------------------------


def path_shares(tax: Taxonomy, retain: float = 0.7, weighting: str = "geometric") -> Float[np.ndarray, "N K"]:
    """T: how much of a target's mass each of its ancestors-or-self gets; a row sums to 1. Columns as in `lineage_of`.

    With d = retain, h = steps up from the target at depth L, m = the greatest leaf depth:

        geometric     d (1-d)^h, the top takes the rest. On a DAG T_v = d e_v + (1-d) mean over parents of T
        anchored      a proper ancestor at depth l: d (1-d)^(m-l), at the top (1-d)^(m-1); the target takes the rest.
                      Depends on no target, so that shallow leaves of a ragged tree lose nothing to deep ones
        uniform       1 / L
        exponential   proportional to exp(-h)
    """
    lineage = lineage_of(tax)
    if not tax.is_tree:
        if weighting != "geometric":
            tax.require_tree()
        return _shares_on_a_dag(tax, lineage, retain)
    depth = np.asarray(tax.depth)[:, None]
    level = np.arange(1, lineage.shape[1] + 1)
    h, present = depth - level, lineage >= 0
    if weighting == "uniform":
        share = 1.0 / depth + 0.0 * level
    elif weighting == "exponential":
        share = np.where(present, np.exp(-np.abs(h)), 0)
        share = share / share.sum(1, keepdims=True)
    elif weighting == "geometric":
        share = np.where(level == 1, (1 - retain) ** np.abs(h), retain * (1 - retain) ** np.abs(h))
    else:
        m = int(tax.depth[tax.leaves].max())
        by_level = np.where(level == 1, (1 - retain) ** (m - 1.0), retain * (1 - retain) ** (m - level.astype(float)))
        above = np.where(h > 0, by_level, 0)
        share = np.where(h == 0, 1 - above.sum(1, keepdims=True), above)
    return np.where(present, share, 0.0)


def proper_weighting(tax: Taxonomy) -> str:
    """ "anchored" on a tree whose leaves lie at several depths, else "geometric", which is the same or all there is."""
    return "anchored" if tax.is_tree and len(np.unique(tax.depth[tax.leaves])) > 1 else "geometric"


def _shares_on_a_dag(tax: Taxonomy, lineage: Int[np.ndarray, "N K"], retain: float) -> Float[np.ndarray, "N K"]:
    of: list[dict[int, float]] = []
    for node, parents in enumerate(tax.parents):
        mine = {node: retain if parents else 1.0}
        for parent in parents:
            for above, share in of[parent].items():
                mine[above] = mine.get(above, 0.0) + (1 - retain) / len(parents) * share
        of.append(mine)
    return np.array(
        [[of[v].get(int(a), 0.0) if a >= 0 else 0.0 for a in row] for v, row in enumerate(lineage)], dtype=np.float64
    )


def step_weights(tax: Taxonomy, alpha: float, normalise: bool = False) -> Float[np.ndarray, "N K"]:
    """HXE's sum over steps as one over nodes: lambda(v) - lambda(next node down), lambda(v) = exp(-alpha depth(v))."""
    lineage, level = lineage_of(tax), np.arange(1, int(tax.depth.max()) + 1)
    weight = np.exp(-alpha * level)
    weight = np.where(level < tax.depth[:, None], weight - np.exp(-alpha * (level + 1)), weight)
    scale = 1 + np.exp(-alpha * tax.depth).sum() if normalise else 1.0
    return np.where(lineage >= 0, weight, 0.0) / scale


# --- the losses -------------------------------------------------------------------------------------------------------


class RowLoss(nn.Module, ABC):
    """Mean over the batch of what `rows` says; `columns` logits a row, targets among `nodes` ids."""

    columns: int
    nodes: int

    @override
    def forward(self, logits: Float[Tensor, "B columns"], target: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """The mean over the batch."""
        if logits.ndim != 2 or logits.shape[1] != self.columns:
            raise ValueError(f"logits must be [batch, {self.columns}], not of shape {tuple(logits.shape)}")
        if target.dtype.is_floating_point or target.dtype == torch.bool:
            raise ValueError(f"target must hold int64 node ids, not {target.dtype}")
        if target.shape != logits.shape[:1]:
            raise ValueError(f"target has shape {tuple(target.shape)}, but there are {len(logits)} rows of logits")
        wrong = target[(target < 0) | (target >= self.nodes)]
        if len(wrong):
            raise IndexError(f"target {int(wrong[0])} is no node id of a taxonomy of {self.nodes} nodes")
        with torch.autocast(logits.device.type, enabled=False):
            z = at_least_float32(logits)
            return self.rows(z, target).mean() if len(z) else z.sum()

    @abstractmethod
    def rows(self, z: Float[Tensor, "B columns"], target: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The loss of each row; nothing is checked."""


class _PathLoss(RowLoss):
    """What HACE and HXE share: who is below whom, the ancestors of each node, and a weight for each of them."""

    lineage: Tensor

    def __init__(self, tax: Taxonomy, weight: Float[np.ndarray, "N K"]) -> None:
        super().__init__()
        self.below, self.nodes = Subtrees(tax), len(tax)
        self.register_buffer("lineage", torch.from_numpy(lineage_of(tax)), persistent=False)
        # No buffer: `.half()` would take digits from it that `.double()` cannot give back.
        self._exact = self._cast = torch.from_numpy(weight)

    def weight(self, like: Tensor) -> Float[Tensor, "N K"]:
        """The weights in the dtype and on the device of the logits."""
        if (self._cast.dtype, self._cast.device) != (like.dtype, like.device):
            self._cast = self._exact.to(like.dtype).to(like.device)
        return self._cast


class HierarchyAwareCrossEntropy(_PathLoss):
    """Cross-entropy over all nodes of a label tree or DAG (HACE).

        L = mean over the batch of  - sum_v t_v log P_v,      P_v = sum over descendants-or-self of softmax(logits)

    t spreads the target's mass over its ancestors by `path_shares`, after horizontal smoothing over the leaves. Its
    gradient is dL/dz_j = q_j (1 - sum_{v above-or-at j} t_v / P_v): relatives of the truth are pushed down less.

    Args:
        tax: tree or DAG. Leaves and inner nodes may be targets.
        retain: d in (0, 1], the share that stays at each step up. 1 is plain cross-entropy over N nodes, and HCE.
        label_smoothing: eps in [0, 1), spread evenly over the other leaves (of an inner target: the leaves outside it).
            PyTorch's e, which counts the true class too, is eps = e (n - 1) / n.
        soft_beta: instead of eps, leaf mass exp(-beta D) / sum with D as in `SoftLabelCrossEntropy`; leaf targets only.
        weighting: of `path_shares`. "geometric" is the released one; where leaves lie at several depths it draws mass
            to the deeper of them, and "anchored" does not. All but "geometric" need a tree.
        log_epsilon: log(P + log_epsilon) as released (1e-6), whose gradient vanishes below it; for reproduction only.

    Shape: logits float[B, N] in the order of `tax.names`, target int64[B] node ids -> scalar; float32 or better, also
    under autocast. B = 0: a zero that keeps its graph.

    Raises ValueError at construction for arguments out of range and for soft targets or a weighting on a DAG;
    IndexError for a target that is no node.

    >>> tax = Taxonomy.from_paths(["A/a", "A/b", "B/c", "B/d", "B/e"])
    >>> logits = torch.tensor([[0.2, -0.1, 1.0, 0.5, -0.3, 0.8, 0.0]])
    >>> round(HierarchyAwareCrossEntropy(tax)(logits, torch.tensor([2])).item(), 5)
    1.13131
    """

    def __init__(
        self,
        tax: Taxonomy,
        retain: float = 0.7,
        label_smoothing: float = 0.0,
        soft_beta: float | None = None,
        weighting: str = "geometric",
        log_epsilon: float = 0.0,
    ) -> None:
        require("retain", retain, 0 < retain <= 1, "in (0, 1]; 0.7 is the default, 1 leaves all with the target")
        require("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "in [0, 1); 0 switches it off")
        require("weighting", weighting, weighting in WEIGHTINGS, " or ".join(f'"{name}"' for name in WEIGHTINGS))
        require("log_epsilon", log_epsilon, 0 <= log_epsilon < 1, "in [0, 1); 0 switches it off")
        if soft_beta is not None and label_smoothing:
            raise ValueError("label_smoothing and soft_beta are two ways to smooth; give one")
        super().__init__(tax, path_shares(tax, retain, weighting))
        self.columns = self.nodes
        self.retain, self.weighting = retain, weighting
        self.label_smoothing, self.log_epsilon = label_smoothing, log_epsilon
        self.soft = None if soft_beta is None else SoftLabelCrossEntropy(tax, soft_beta)

    @override
    def rows(self, z: Float[Tensor, "B N"], target: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The loss of each row; nothing is checked."""
        smooth = self.label_smoothing if len(self.below.leaves) > 1 else 0.0
        of_leaves = not smooth or bool(torch.isin(target, self.below.leaves).all())
        if self.soft is None and not self.log_epsilon and of_leaves:
            return self._along_paths(z, target, smooth)
        log_p = all_log_probs(z, self.below)
        if self.log_epsilon:
            log_p = torch.log(log_p.exp() + self.log_epsilon)
        return -(self.targets(z, target) * log_p).sum(1)

    def _along_paths(self, z: Float[Tensor, "B N"], target: Int[Tensor, " B"], smooth: float) -> Float[Tensor, " B"]:
        """Where t is the target's path, and of every leaf's path the same small share."""
        other = smooth / max(len(self.below.leaves) - 1, 1)
        mass = other * self._upwards(z.new_ones(1, len(self.below.leaves)))[0] if smooth else None
        log_p, everywhere = path_log_probs(z, self.lineage[target], self.below, mass)
        return -((1 - smooth - other) * (self.weight(z)[target] * log_p).sum(1) + everywhere)

    def targets(self, like: Tensor, target: Int[Tensor, " B"]) -> Float[Tensor, "B N"]:
        """t of every node, in the dtype of the logits: smoothed over leaves, then spread upwards."""
        if self.soft is not None:
            return self._upwards(self.soft.leaf_mass(like, target))
        inside = self._leaves_inside(target)
        outside = inside.shape[1] - inside.sum(1, keepdim=True)
        eps = self.label_smoothing * (outside > 0).to(like)
        own = torch.zeros(len(target), self.nodes, dtype=like.dtype, device=like.device)
        own.scatter_add_(1, self.lineage[target].clamp_min(0), self.weight(like)[target])
        return (1 - eps) * own + eps * self._upwards((~inside).to(like) / outside.clamp_min(1))

    def _leaves_inside(self, target: Int[Tensor, " B"]) -> Bool[Tensor, "B n"]:
        """Which leaves are at or below each target."""
        above = self.lineage[self.below.leaves]
        inside = torch.zeros(len(target), len(above), dtype=torch.bool, device=target.device)
        for column in above.unbind(1):
            inside |= column == target[:, None]
        return inside

    def _upwards(self, mass: Float[Tensor, "B n"]) -> Float[Tensor, "B N"]:
        """Mass of leaves, spread over their ancestors."""
        leaves = self.below.leaves
        t = mass.new_zeros(len(mass), self.nodes)
        for above, share in zip(self.lineage[leaves].unbind(1), self.weight(mass)[leaves].unbind(1), strict=True):
            t.index_add_(1, above.clamp_min(0), mass * share)
        return t

    @override
    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return (
            f"{self.nodes} nodes, retain={self.retain}, label_smoothing={self.label_smoothing}, "
            f"weighting={self.weighting!r}"
        )


class HierarchicalCrossEntropy(_PathLoss):
    """Cross-entropy of each step down the path, weighted by depth (HXE, a peer).

        L = - sum over v on the path of y of  lambda(v) [ log p(v) - log p(parent of v) ]

    with lambda(v) = exp(-alpha depth(v)) and p(v) the softmax mass of the leaves at or below v; 1 above the top nodes,
    whose depth is 1.

    Args:
        tax: a tree. Leaves and inner nodes may be targets.
        alpha: in [0, 20]. 0 telescopes to cross-entropy.
        normalise: divide by 1 + the sum of lambda over all nodes, as the authors do; it only scales the loss.

    Shape: logits float[B, n] in the order of `tax.leaves`, target int64[B] node ids -> scalar; B = 0: a zero.
    """

    def __init__(self, tax: Taxonomy, alpha: float = 0.1, normalise: bool = False) -> None:
        tax.require_tree()
        require("alpha", alpha, 0 <= alpha <= 20, "between 0, which is plain cross-entropy, and 20")
        super().__init__(tax, step_weights(tax, alpha, normalise))
        self.columns = len(self.below.leaves)
        self.alpha, self.normalise = alpha, normalise

    @override
    def rows(self, z: Float[Tensor, "B n"], target: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The loss of each row; nothing is checked."""
        log_p, _ = path_log_probs(self.below.spread(z), self.lineage[target], self.below)
        return -(self.weight(z)[target] * log_p).sum(1)

    @override
    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"{self.columns} leaves, alpha={self.alpha}, normalise={self.normalise}"


class SoftLabelCrossEntropy(RowLoss):
    """Cross-entropy against labels that are soft by distance in the tree (a peer).

        L = - sum_c s_y(c) log p_c,      s_y(c) = exp(-beta D(y, c)) / sum_c' exp(-beta D(y, c'))

    Args:
        tax: a tree.
        beta: >= 0. 0 is uniform, infinity cross-entropy.
        distance: "height": D = height of the lowest common ancestor over that of the root. "depth": 1 - its depth over
            the greatest of a leaf. 0 for y itself. They agree where all leaves lie equally deep.

    Shape: logits float[B, n] in the order of `tax.leaves`, target int64[B] ids of leaves -> scalar; B = 0: a zero.
    Raises ValueError for a target that is no leaf, naming it.
    """

    above: Tensor
    level: Tensor
    leaves: Tensor
    column: Tensor

    def __init__(self, tax: Taxonomy, beta: float = 10.0, distance: str = "height") -> None:
        super().__init__()
        tax.require_tree()
        require("beta", beta, 0 <= beta < math.inf, "0 or more; 0 is uniform, a large one plain cross-entropy")
        require("distance", distance, distance in {"height", "depth"}, '"height" or "depth"')
        self.beta, self.distance, self.names = beta, distance, tax.names
        self.columns, self.nodes = len(tax.leaves), len(tax)
        deepest = int(tax.depth[tax.leaves].max())
        self.deepest = deepest
        # Whole numbers, in units of 1 / deepest: nothing that a cast could harm.
        level = np.array(tax.height) if distance == "height" else deepest - np.asarray(tax.depth)
        level = np.where(tax.height == 0, 0, level)
        column = np.full(len(tax), -1, dtype=np.int64)
        column[tax.leaves] = np.arange(len(tax.leaves))
        for name, values in (("above", lineage_of(tax)), ("level", level), ("leaves", tax.leaves), ("column", column)):
            self.register_buffer(name, torch.from_numpy(np.array(values, dtype=np.int64)), persistent=False)

    def leaf_mass(self, like: Tensor, target: Int[Tensor, " B"]) -> Float[Tensor, "B n"]:
        """s_y of each target, in the dtype of the logits."""
        if bool((self.column[target] < 0).any()):
            inner = int(target[self.column[target] < 0][0])
            raise ValueError(f'target {inner} is "{self.names[inner]}", which is no leaf; soft labels need leaves')
        apart = torch.full((len(target), len(self.leaves)), self.deepest, dtype=torch.int64, device=target.device)
        for own, others in zip(self.above[target].unbind(1), self.above[self.leaves].unbind(1), strict=True):
            shared = (own[:, None] == others) & (others >= 0)
            apart = torch.where(shared, self.level[others.clamp_min(0)], apart)
        return torch.softmax(-self.beta / self.deepest * apart.to(like), dim=1)

    @override
    def rows(self, z: Float[Tensor, "B n"], target: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The loss of each row; refuses a target that is no leaf, and nothing else."""
        return -(self.leaf_mass(z, target) * torch.log_softmax(z, dim=1)).sum(1)

    @override
    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"{self.columns} leaves, beta={self.beta}, distance={self.distance!r}"

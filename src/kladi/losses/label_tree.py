"""Two losses that let a label tree shape the embedding, alone or together.

Hierarchy-weighted contrast rescales pairs *inside* the softmax by the ancestors they share, so that kin classes are
pushed apart less. The level-aware margin pulls a sample to the prototype of each of its ancestors and keeps the other
nodes of that level a margin away.

Independent implementation of the objectives as described in the abstract and the public reviews of A. E. Khan, arXiv
2511.03771 (2025); no formula and no code of that paper was available, so every equation below is this project's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import override

from kladi.losses import geometry as spaces
from kladi.losses.contrast import OwnView, PairTables, contrast
from kladi.losses.contrast_ball import contrast_in_ball
from kladi.losses.geometry import Geometry, PoincareBall
from kladi.structure.taxonomy import Taxonomy

# --- pairs ---------------------------------------------------------------------------------------------------------


def pair_tables(
    overlap: Float[Tensor, "U U"],
    *,
    temperature: float = 0.1,
    alpha: float = 0.5,
    beta: float = 0.5,
    mode: str = "scale",
    positives: str = "leaf",
    geometry: str = "sphere",
) -> PairTables:
    """What a pair of classes means to the contrast: weight W, logit scale A = a / temperature, log-bias B.

        logit = A s + B;   s = cosine on the sphere, minus the distance in the ball;   r = overlap

                              positive pair                negative pair
        sphere,   "scale"     a = 1 + alpha                a = 1 - beta r
        poincare, "scale"     a = 1 + alpha                a = 1 / (1 - beta r)
        either,   "mass"      a = 1, B = -log(1 + alpha)   a = 1, B = log(1 - beta r)

    The rule differs by geometry because s differs in sign. A larger beta must not increase the push on a kin negative,
    and a larger alpha must not weaken the pull on a positive. In the ball s is negative, so a factor below one would
    move a kin negative's logit *up*: it divides instead.

    Args:
        overlap: r of each pair of classes, symmetric, 1 only for a class with itself.
        positives: "leaf": W = [r = 1]; "graded": W = r; "view": W = 0, and the pairs that are two views of one sample
            are positive by `own_view`.
    """
    weight = {"leaf": (overlap == 1).to(overlap.dtype), "graded": overlap, "view": torch.zeros_like(overlap)}[positives]
    positive = weight > 0
    softened = 1 - beta * overlap
    if mode == "mass":
        bias = torch.where(positive, torch.full_like(overlap, -math.log1p(alpha)), softened.log())
        return PairTables(weight=weight, scale=torch.full_like(overlap, 1 / temperature), bias=bias, positive=None)
    factor = softened if geometry == "sphere" else 1 / softened
    scale = torch.where(positive, torch.full_like(overlap, 1 + alpha), factor) / temperature
    return PairTables(weight=weight, scale=scale, bias=None, positive=None)


def own_view(*, temperature: float, alpha: float, mode: str) -> OwnView:
    """Two views of one sample as the positive pair of `pair_tables`; overrides whatever their class says."""
    if mode == "mass":
        return OwnView(weight=1.0, scale=1 / temperature, bias=-math.log1p(alpha))
    return OwnView(weight=1.0, scale=(1 + alpha) / temperature, bias=0.0)


def overlap_of(lineage: Int[Tensor, "U K"], dtype: torch.dtype) -> Float[Tensor, "U U"]:
    """`r(a, b) = #(A(a) & A(b)) / max(#A(a), #A(b))` from padded sets of ancestors-or-self, -1 where absent.

    On a tree: depth of the lowest common ancestor over the deeper depth. Works on a DAG. Costs U times the number of
    distinct ancestors, never the square of the taxonomy.
    """
    nodes, column = torch.unique(lineage, return_inverse=True)
    member = torch.zeros(len(lineage), len(nodes), dtype=dtype, device=lineage.device).scatter_(1, column, 1.0)
    member = member * (nodes >= 0)
    size = member.sum(1)
    return (member @ member.T) / torch.maximum(size[:, None], size)


def _lineage(tax: Taxonomy) -> Int[np.ndarray, "N K"]:
    """Each node's ancestors-or-self, padded with -1."""
    if tax.is_tree:
        return np.array(tax.ancestor_table, dtype=np.int64)
    sets = [sorted(int(a) for a in tax.ancestors(v)) for v in range(len(tax.names))]
    table = np.full((len(sets), max(map(len, sets), default=1)), -1, dtype=np.int64)
    for node, found in enumerate(sets):
        table[node, : len(found)] = found
    return table


def _labels(z: Tensor, target: Tensor, nodes: int) -> tuple[Int[Tensor, " U"], Int[Tensor, " B"]]:
    """The distinct targets and, for each sample, which of them it has; refuses a target that is none."""
    if z.ndim != 3:
        raise ValueError(f"z must be [views, batch, dimensions], not of shape {tuple(z.shape)}")
    if target.dtype.is_floating_point or target.dtype == torch.bool:
        raise ValueError(f"target must hold int64 node ids, not {target.dtype}")
    if target.shape != z.shape[1:2]:
        raise ValueError(f"target has shape {tuple(target.shape)}, but z has {z.shape[1]} samples")
    labels, classes = torch.unique(target, return_inverse=True)
    for label in (labels[:1].tolist() + labels[-1:].tolist()) if len(labels) else []:
        if not 0 <= label < nodes:
            raise IndexError(f"target {label} is no node id of a taxonomy of {nodes} nodes")
    return labels, classes


class HierarchyWeightedContrastiveLoss(nn.Module):
    """Supervised contrast in which kin classes are pushed apart less (HWC).

        loss = mean over rows i with a positive of  - sum_j q_ij log p_ij
        log p_ik = l_ik - logsumexp_{m != i} l_im      l_ik = A_ik s_ik + B_ik      q_ij = W_ij / sum_m W_im

    with W, A and B of `pair_tables`, r(a, b) = depth of the lowest common ancestor over the deeper of the two depths
    (on a DAG: shared ancestors over the larger set), and s the cosine, or minus the hyperbolic distance.

    Args:
        tax: tree or DAG of labels. Leaves and inner nodes may be targets; an inner node is a class of its own.
        temperature: > 0. 0.1 suits the sphere, 0.2 the ball.
        alpha: >= 0, sharpens positives. With `positives="leaf"` it is one constant and uses no tree at all: **all
            hierarchy is in beta**. On the sphere it is an inverse temperature of the positives alone.
        beta: in [-1, 0.95], softens kin negatives; below 0 hardens them, for the control experiment.
        mode: "scale" multiplies logits, "mass" lets a kin negative count 1 - beta r times in the softmax.
        positives: "leaf": same target. "view": other views of the same sample; with beta = 0 no label is read.
            "graded": every kin, weighted by r; then no negative is kin and beta has no effect.
        geometry: "sphere" or "poincare", with `curvature` and `clip` of the ball.

    Reductions: alpha = beta = 0 on the sphere is SupCon ("leaf") and NT-Xent ("view", two views); a tree of depth 1 has
    no kin negatives, so beta does nothing there.

    Shape: z float[V, B, D] un-normalised, target int64[B] node ids -> scalar. Arithmetic is float32 or better. After a
    forward, `idle` is the share of rows without a positive, `kin` the share of pairs that are kin negatives (0: beta
    did nothing in this batch). No positive at all: a zero that keeps its graph. A zero row: a point at the origin.

    Raises ValueError at construction for arguments out of range; IndexError for a target outside the taxonomy.
    """

    def __init__(
        self,
        tax: Taxonomy,
        temperature: float = 0.1,
        alpha: float = 0.5,
        beta: float = 0.5,
        mode: str = "scale",
        positives: str = "leaf",
        geometry: str = "sphere",
        curvature: float = 0.1,
        clip: float = 2.3,
    ) -> None:
        super().__init__()
        _require("temperature", temperature, 0 < temperature < math.inf, "a positive number; 0.1 is the default")
        _require("alpha", alpha, 0 <= alpha < math.inf, "0 or more; 0 switches it off")
        _require("beta", beta, -1 <= beta <= 0.95, "between -1 and 0.95; 0 switches it off")
        _require("mode", mode, mode in {"scale", "mass"}, '"scale" or "mass"')
        _require("positives", positives, positives in {"leaf", "view", "graded"}, '"leaf", "view" or "graded"')
        self.space = spaces.named(geometry, curvature, clip)
        self.temperature, self.alpha, self.beta, self.mode, self.positives = temperature, alpha, beta, mode, positives
        self.register_buffer("lineage", torch.from_numpy(_lineage(tax)), persistent=False)
        self.idle: Tensor | None = None
        self.kin: Tensor | None = None

    lineage: Tensor

    @override
    def forward(self, z: Float[Tensor, "V B D"], target: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """The loss of `V` views of `B` samples whose node ids are `target`."""
        labels, classes = _labels(z, target, len(self.lineage))
        with torch.autocast(z.device.type, enabled=False):
            x = self.space.embed(spaces.at_least_float32(z.flatten(0, 1)))
            overlap = overlap_of(self.lineage[labels], x.dtype)
            tables = pair_tables(
                overlap,
                temperature=self.temperature,
                alpha=self.alpha,
                beta=self.beta,
                mode=self.mode,
                positives=self.positives,
                geometry=self.space.name,
            )
            own = None
            if self.positives == "view":
                own = own_view(temperature=self.temperature, alpha=self.alpha, mode=self.mode)
            of_row = classes.repeat(len(z))
            if isinstance(self.space, PoincareBall):
                loss, self.idle = contrast_in_ball(x, of_row, tables, self.space, views=len(z), own=own)
            else:
                loss, self.idle = contrast(x, of_row, tables, views=len(z), own=own)
            self.kin = _kin_share(overlap, classes)
        return loss

    @override
    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return (
            f"temperature={self.temperature}, alpha={self.alpha}, beta={self.beta}, mode={self.mode!r}, "
            f"positives={self.positives!r}, geometry={self.space.name!r}"
        )


def _kin_share(overlap: Float[Tensor, "U U"], classes: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    """Share of pairs of samples with different labels that share a node below the root."""
    count = torch.bincount(classes, minlength=len(overlap)).to(overlap.dtype)
    kin = ((overlap > 0) & (overlap < 1)).to(overlap.dtype)
    return count @ kin @ count / max(len(classes) * (len(classes) - 1), 1)


def _require(name: str, value: object, holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {words}, not {value!r}")


# --- prototypes ----------------------------------------------------------------------------------------------------


def level_aware_margin(
    x: Float[Tensor, "n D"],
    paths: Int[Tensor, "n depth"],
    prototypes: Float[Tensor, "N D"],
    seen: Bool[Tensor, " N"],
    first_node: Sequence[int],
    *,
    margins: Sequence[float],
    level_weights: Sequence[float],
    pull: float,
    space: Geometry,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The margin loss for given prototypes, and the share of rows that were compared at no level.

        h_il = max(0, d(x_i, mu_u) - min_{v != u, v seen, depth l} d(x_i, mu_v) + m_l),     u = ancestor of i at depth l
        loss = sum_(i,l) w_l (h_il + pull d(x_i, mu_u)^2) / sum_(i,l) w_l

    over the pairs (i, l) whose own node is seen and has a rival. d is scaled to a diameter of 2 in either geometry.

    Args:
        x: points of the geometry.
        paths: node id of each row's ancestor at each depth, -1 below the target.
        prototypes, seen: point of each node, and whether it has been seen.
        first_node: id of the first node of each depth, and N at the end; nodes are ordered by depth.
        margins, level_weights: m_l and w_l of each depth.
    """
    to_two = 2 / space.diameter
    total, weight = x.sum() * 0, torch.zeros((), dtype=x.dtype, device=x.device)
    idle = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for level, (start, stop) in enumerate(itertools.pairwise(first_node)):
        own = paths[:, level]
        column = (own - start).clamp_min(0)
        rival, has_rival = _nearest_rival(x.detach(), prototypes[start:stop], seen[start:stop], column, space)
        counts = (own >= 0) & seen[own.clamp_min(0)] & has_rival
        near = to_two * space.distance(x, prototypes[start + column])
        far = to_two * space.distance(x, prototypes[start + rival])
        term = (near - far + margins[level]).clamp_min(0) + pull * near**2
        total = total + level_weights[level] * torch.where(counts, term, 0).sum()
        weight = weight + level_weights[level] * counts.sum()
        idle &= ~counts
    return total / torch.where(weight > 0, weight, 1), idle.sum().to(x.dtype) / max(len(x), 1)


def _nearest_rival(
    x: Float[Tensor, "n D"],
    nodes: Float[Tensor, "m D"],
    seen: Bool[Tensor, " m"],
    own: Int[Tensor, " n"],
    space: Geometry,
) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
    """Index of the nearest seen node other than the row's own, and whether there is one.

    Only the search sees all nodes, in slices and without a graph: the gradient needs no more than the one that won.
    """
    winner = torch.zeros_like(own)
    for part in torch.arange(len(x), device=x.device).split(max(1, (1 << 24) // max(len(nodes), 1))):
        d = space.distances(x[part], nodes).masked_fill(~seen, math.inf)
        winner[part] = d.scatter(1, own[part, None], math.inf).argmin(1)
    others = seen.sum() - seen[own].to(torch.int64)
    return winner, others > 0


class LevelAwareMarginLoss(nn.Module):
    """Each sample near the prototypes of its ancestors, a margin farther from every other node of their level (LAM).

    The equation is that of `level_aware_margin` with m_l = margin decay^(l-1): coarse margins exceed fine ones, because
    siblings live inside their parent's cell. Prototypes follow the rows at or below their node; no gradient reaches
    them. In one call: the loss with the prototypes as they were, then, in training only, the update of every node that
    has a row:

        m = mean of its rows;   n += 1;   rho = min(momentum, 1 - 1 / n);   mu = step(mu, m, 1 - rho)

    So the first call returns exactly 0, rare nodes start as running means, and `momentum` binds once 1 - 1/n passes it
    (from the 20th update at 0.95). Nodes without a row do not move. On the sphere a node whose rows cancel
    (||mean|| < 1e-6) is skipped.

    Args:
        tax: a tree.
        dim: D of the embeddings.
        margin: m_1 in [0, 2), on a space of diameter 2. K points on the sphere are at most sqrt(2K / (K - 1)) apart.
        decay: in (0, 1], from one level to the next.
        pull: >= 0, weight of the squared distance to the own prototype.
        momentum: in [0, 1).
        geometry, curvature, clip: "sphere", or "poincare" with its curvature and clip.
        level_weights: one weight for each depth, from 1 down; all 1 by default.

    Shape: z float[V, B, D] un-normalised, target int64[B] node ids, leaves or inner nodes -> scalar. Buffers, kept in
    the state dict: `prototypes` float32[N, D], `seen` int64[N] (updates of each node). Nothing to compare with: a zero
    that keeps its graph; a level with one seen node is skipped, its pull too. After a forward, `idle` is the share of
    rows that were compared at no level. Several processes: gather the rows first, as all losses here expect.

    Raises ValueError at construction for arguments out of range and for a DAG, naming the node with several parents;
    IndexError for a target outside the taxonomy.
    """

    def __init__(
        self,
        tax: Taxonomy,
        dim: int,
        margin: float = 0.3,
        decay: float = 0.7,
        pull: float = 0.1,
        momentum: float = 0.95,
        geometry: str = "sphere",
        curvature: float = 0.1,
        clip: float = 2.3,
        level_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        tax.require_tree()
        _require("dim", dim, dim >= 1, "the number of dimensions of z")
        _require("margin", margin, 0 <= margin < 2, "in [0, 2): the space is 2 wide; 0.3 is the default")
        _require("decay", decay, 0 < decay <= 1, "in (0, 1]; 1 gives all levels one margin")
        _require("pull", pull, 0 <= pull < math.inf, "0 or more; 0 switches it off")
        _require("momentum", momentum, 0 <= momentum < 1, "in [0, 1); 0.95 is the default")
        depths = int(np.max(tax.depth, initial=0))
        weights = (1.0,) * depths if level_weights is None else tuple(float(w) for w in level_weights)
        _require("level_weights", level_weights, len(weights) == depths, f"{depths} numbers, one a depth of the tree")
        _require("level_weights", level_weights, all(0 <= w < math.inf for w in weights), "0 or more each")
        self.space = spaces.named(geometry, curvature, clip)
        self.margin, self.decay, self.pull, self.momentum = margin, decay, pull, momentum
        self.level_weights = weights
        self._margins = tuple(margin * decay**level for level in range(depths))
        # Nodes are ordered by depth, so a level is a slice.
        self._first_node = tuple(int(i) for i in np.searchsorted(np.asarray(tax.depth), np.arange(1, depths + 2)))
        self.register_buffer("ancestors", torch.from_numpy(_lineage(tax)), persistent=False)
        self.register_buffer("prototypes", torch.zeros(len(tax.names), dim))
        self.register_buffer("seen", torch.zeros(len(tax.names), dtype=torch.int64))
        self.idle: Tensor | None = None

    ancestors: Tensor
    prototypes: Tensor
    seen: Tensor

    @override
    def forward(self, z: Float[Tensor, "V B D"], target: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """The loss with the prototypes as they are; in training, they then follow the rows."""
        _labels(z, target, len(self.ancestors))
        if z.shape[-1] != self.prototypes.shape[1]:
            raise ValueError(f"z has {z.shape[-1]} dimensions, the prototypes {self.prototypes.shape[1]}; mend dim")
        with torch.autocast(z.device.type, enabled=False):
            x = self.space.embed(spaces.at_least_float32(z.flatten(0, 1)))
            paths = self.ancestors[target].repeat(len(z), 1)
            # A clone: the update below would otherwise change tensors that backward still needs.
            prototypes, seen = self.prototypes.clone().to(x.dtype), self.seen > 0
            loss, self.idle = level_aware_margin(
                x,
                paths,
                prototypes,
                seen,
                self._first_node,
                margins=self._margins,
                level_weights=self.level_weights,
                pull=self.pull,
                space=self.space,
            )
            if self.training:
                self._follow(x.detach(), paths, prototypes)
        return loss

    @torch.no_grad()
    def _follow(self, x: Float[Tensor, "n D"], paths: Int[Tensor, "n depth"], prototypes: Float[Tensor, "N D"]) -> None:
        """Move the prototype of every node that has a row towards the mean of its rows."""
        nodes = len(prototypes)
        row_numerator, row_denominator = self.space.moments(x)
        numerator = torch.zeros(nodes + 1, x.shape[1], dtype=x.dtype, device=x.device)  # the last collects the absent
        denominator = torch.zeros(nodes + 1, dtype=x.dtype, device=x.device)
        for own in torch.where(paths < 0, nodes, paths).unbind(1):
            numerator.index_add_(0, own, row_numerator)
            denominator.index_add_(0, own, row_denominator)
        middle, moves = self.space.mean(numerator[:-1], denominator[:-1])
        updates = self.seen + moves.to(torch.int64)
        t = (1 - (1 - 1 / updates.clamp_min(1).to(x.dtype)).clamp_max(self.momentum))[:, None]
        moved = torch.where(updates[:, None] == 1, middle, self.space.step(prototypes, middle, t))
        self.prototypes.copy_(torch.where(moves[:, None], moved, prototypes))
        self.seen.copy_(updates)

    @override
    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return (
            f"{self.prototypes.shape[0]} nodes, dim={self.prototypes.shape[1]}, margin={self.margin}, "
            f"decay={self.decay}, pull={self.pull}, momentum={self.momentum}, geometry={self.space.name!r}"
        )

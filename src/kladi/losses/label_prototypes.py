"""Prototypes of a label tree: a sample near each of its ancestors, and a margin farther from the rest of that level.

Independent implementation of the objective as described in the abstract and the public reviews of A. E. Khan, arXiv
2511.03771 (2025); no formula and no code of that paper was available, so every equation here is this project's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from kladi.losses import geometry as spaces
from kladi.losses.geometry import Geometry, LearnedCurvature, LossInSpace, PoincareBall
from kladi.losses.label_tree import clipped_share, distinct_labels, lineage_of, require
from kladi.structure.taxonomy import Taxonomy


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


class LevelAwareMarginLoss(LossInSpace):
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
    the state dict: `prototypes` float32[N, D] (as shares of the ball's radius where a curvature is learned), `seen`
    int64[N] (updates of each node). Nothing to compare with: a zero that keeps its graph; a level with one seen node is
    skipped, its pull too. After a forward, `idle` is the share of rows that were compared at no level, `clipped` the
    share that met the clip of the ball. Several processes: gather the rows first, as all losses here expect.

    Raises ValueError at construction for arguments out of range and for a DAG, naming the node with several parents;
    IndexError for a target outside the taxonomy.

    >>> tax = Taxonomy.from_paths(["A/x", "A/y", "B/z"])
    >>> target = torch.from_numpy(tax.index(["A/x", "A/y", "B/z"]))
    >>> loss = LevelAwareMarginLoss(tax, dim=2)
    >>> loss(torch.tensor([[[1.0, 0.0], [0.6, 0.8], [-0.6, 0.8]]]), target).item()
    0.0
    >>> round(loss(torch.tensor([[[0.8, 0.6], [0.0, 1.0], [0.6, 0.8]]]), target).item(), 5)
    0.73682
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
        curvature: float | LearnedCurvature = 0.1,
        clip: float = 2.3,
        level_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(geometry, curvature, clip)
        tax.require_tree()
        require("dim", dim, dim >= 1, "the number of dimensions of z")
        require("margin", margin, 0 <= margin < 2, "in [0, 2): the space is 2 wide; 0.3 is the default")
        require("decay", decay, 0 < decay <= 1, "in (0, 1]; 1 gives all levels one margin")
        require("pull", pull, 0 <= pull < math.inf, "0 or more; 0 switches it off")
        require("momentum", momentum, 0 <= momentum < 1, "in [0, 1); 0.95 is the default")
        depths = int(np.max(tax.depth, initial=0))
        weights = (1.0,) * depths if level_weights is None else tuple(float(w) for w in level_weights)
        require("level_weights", level_weights, len(weights) == depths, f"{depths} numbers, one a depth of the tree")
        require("level_weights", level_weights, all(0 <= w < math.inf for w in weights), "0 or more each")
        self.margin, self.decay, self.pull, self.momentum = margin, decay, pull, momentum
        self.level_weights = weights
        self._margins = tuple(margin * decay**level for level in range(depths))
        # Nodes are ordered by depth, so a level is a slice.
        self._first_node = tuple(int(i) for i in np.searchsorted(np.asarray(tax.depth), np.arange(1, depths + 2)))
        self.register_buffer("ancestors", torch.from_numpy(lineage_of(tax)), persistent=False)
        self.register_buffer("prototypes", torch.zeros(len(tax.names), dim))
        self.register_buffer("seen", torch.zeros(len(tax.names), dtype=torch.int64))
        self.idle: Tensor | None = None
        self.clipped: Tensor | None = None

    ancestors: Tensor
    prototypes: Tensor
    seen: Tensor

    @override
    def forward(self, z: Float[Tensor, "V B D"], target: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """The loss with the prototypes as they are; in training, they then follow the rows."""
        distinct_labels(z, target, len(self.ancestors))
        if z.shape[-1] != self.prototypes.shape[1]:
            raise ValueError(f"z has {z.shape[-1]} dimensions, the prototypes {self.prototypes.shape[1]}; mend dim")
        with torch.autocast(z.device.type, enabled=False):
            space = self.space
            x = space.embed(spaces.at_least_float32(z.flatten(0, 1)))
            self.clipped = clipped_share(z, space)
            paths = self.ancestors[target].repeat(len(z), 1)
            # Backward keeps only the rows it looked up, which are copies: the update below may write in place.
            rim = self._rim(space)
            prototypes, seen = self.prototypes.to(x.dtype) * rim, self.seen > 0
            loss, self.idle = level_aware_margin(
                x,
                paths,
                prototypes,
                seen,
                self._first_node,
                margins=self._margins,
                level_weights=self.level_weights,
                pull=self.pull,
                space=space,
            )
            if self.training:
                self._follow(x.detach(), paths, prototypes, space)
                self.prototypes /= rim
        return loss

    def _rim(self, space: Geometry) -> Tensor | float:
        """What prototypes are kept as shares of, so that they move along with a rim that a learned curvature moves."""
        if self.learned is None or not isinstance(space, PoincareBall):
            return 1.0
        return torch.as_tensor(space.curvature).detach() ** -0.5

    @torch.no_grad()
    def _follow(
        self, x: Float[Tensor, "n D"], paths: Int[Tensor, "n depth"], prototypes: Float[Tensor, "N D"], space: Geometry
    ) -> None:
        """Move the prototype of every node that has a row towards the mean of its rows."""
        nodes = len(prototypes)
        row_numerator, row_denominator = space.moments(x)
        numerator = torch.zeros(nodes + 1, x.shape[1], dtype=x.dtype, device=x.device)  # the last collects the absent
        denominator = torch.zeros(nodes + 1, dtype=x.dtype, device=x.device)
        for own in torch.where(paths < 0, nodes, paths).unbind(1):
            numerator.index_add_(0, own, row_numerator)
            denominator.index_add_(0, own, row_denominator)
        middle, moves = space.mean(numerator[:-1], denominator[:-1])
        updates = self.seen + moves.to(torch.int64)
        t = (1 - (1 - 1 / updates.clamp_min(1).to(x.dtype)).clamp_max(self.momentum))[:, None]
        moved = torch.where(updates[:, None] == 1, middle, space.step(prototypes, middle, t))
        self.prototypes.copy_(torch.where(moves[:, None], moved, prototypes))
        self.seen.copy_(updates)

    @override
    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return (
            f"{self.prototypes.shape[0]} nodes, dim={self.prototypes.shape[1]}, margin={self.margin}, "
            f"decay={self.decay}, pull={self.pull}, momentum={self.momentum}, geometry={self.space.name!r}"
        )

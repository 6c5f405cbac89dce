"""Hierarchy-weighted contrast: a label tree rescales pairs *inside* the softmax, so that kin are pushed apart less.

Independent implementation of the objectives as described in the abstract and the public reviews of A. E. Khan, arXiv
2511.03771 (2025); no formula and no code of that paper was available, so every equation here is this project's own.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from kladi.losses import geometry as spaces
from kladi.losses.contrast import OwnView, PairTables, contrast
from kladi.losses.contrast_ball import contrast_in_ball
from kladi.losses.geometry import Geometry, LearnedCurvature, LossInSpace, PoincareBall
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
            are positive by `own_view`. W has one dimension where it is zero off its diagonal.
    """
    if positives == "graded":
        weight, positive = overlap, overlap > 0
    else:
        weight = torch.full_like(overlap.diagonal(), float(positives == "leaf"))
        positive = torch.diag(weight > 0)
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


def lineage_of(tax: Taxonomy) -> Int[np.ndarray, "N K"]:
    """Each node's ancestors-or-self, padded with -1."""
    if tax.is_tree:
        return np.array(tax.ancestor_table, dtype=np.int64)
    sets = [sorted(int(a) for a in tax.ancestors(v)) for v in range(len(tax.names))]
    table = np.full((len(sets), max(map(len, sets), default=1)), -1, dtype=np.int64)
    for node, found in enumerate(sets):
        table[node, : len(found)] = found
    return table


def distinct_labels(z: Tensor, target: Tensor, nodes: int) -> tuple[Int[Tensor, " U"], Int[Tensor, " B"]]:
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


class HierarchyWeightedContrastiveLoss(LossInSpace):
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
        geometry: "sphere" or "poincare", with `curvature` and `clip` of the ball. A `LearnedCurvature` is trained too.

    Reductions: alpha = beta = 0 on the sphere is SupCon ("leaf") and NT-Xent ("view", two views); a tree of depth 1 has
    no kin negatives, so beta does nothing there.

    Shape: z float[V, B, D] un-normalised, target int64[B] node ids -> scalar. Arithmetic is float32 or better. After a
    forward, `idle` is the share of rows without a positive, `kin` the share of pairs that are kin (0: beta did nothing
    in this batch), `clipped` the share of rows that met the clip of the ball (None on the sphere). No positive at all:
    a zero that keeps its graph. A zero row: a point at the origin.

    Raises ValueError at construction for arguments out of range; IndexError for a target outside the taxonomy.

    >>> tax = Taxonomy.from_paths(["A/x", "A/y", "B/z"])
    >>> z = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [-0.6, 0.8]]])
    >>> target = torch.from_numpy(tax.index(["A/x", "A/x", "A/y", "B/z"]))
    >>> round(HierarchyWeightedContrastiveLoss(tax, temperature=0.5)(z, target).item(), 5)
    0.30561
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
        curvature: float | LearnedCurvature = 0.1,
        clip: float = 2.3,
    ) -> None:
        super().__init__(geometry, curvature, clip)
        require("temperature", temperature, 0 < temperature < math.inf, "a positive number; 0.1 is the default")
        require("alpha", alpha, 0 <= alpha < math.inf, "0 or more; 0 switches it off")
        require("beta", beta, -1 <= beta <= 0.95, "between -1 and 0.95; 0 switches it off")
        require("mode", mode, mode in {"scale", "mass"}, '"scale" or "mass"')
        require("positives", positives, positives in {"leaf", "view", "graded"}, '"leaf", "view" or "graded"')
        self.temperature, self.alpha, self.beta, self.mode, self.positives = temperature, alpha, beta, mode, positives
        self.register_buffer("lineage", torch.from_numpy(lineage_of(tax)), persistent=False)
        self.idle: Tensor | None = None
        self.kin: Tensor | None = None
        self.clipped: Tensor | None = None

    lineage: Tensor

    @override
    def forward(self, z: Float[Tensor, "V B D"], target: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """The loss of `V` views of `B` samples whose node ids are `target`."""
        labels, classes = distinct_labels(z, target, len(self.lineage))
        with torch.autocast(z.device.type, enabled=False):
            space = self.space
            x = space.embed(spaces.at_least_float32(z.flatten(0, 1)))
            overlap = overlap_of(self.lineage[labels], x.dtype)
            tables = pair_tables(
                overlap,
                temperature=self.temperature,
                alpha=self.alpha,
                beta=self.beta,
                mode=self.mode,
                positives=self.positives,
                geometry=space.name,
            )
            own = None
            if self.positives == "view":
                own = own_view(temperature=self.temperature, alpha=self.alpha, mode=self.mode)
            of_row = classes.repeat(len(z))
            self.clipped = clipped_share(z, space)
            if isinstance(space, PoincareBall):
                loss, self.idle = contrast_in_ball(x, of_row, tables, space, views=len(z), own=own)
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


def clipped_share(z: Float[Tensor, "V B D"], space: Geometry) -> Float[Tensor, ""] | None:
    """Share of rows that are longer than the clip of the ball and so feel no radial gradient; None on the sphere."""
    if not isinstance(space, PoincareBall):
        return None
    return (z.detach().norm(dim=-1) > space.clip).float().mean()


def _kin_share(overlap: Float[Tensor, "U U"], classes: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    """Share of pairs of samples with different labels that share a node below the root."""
    count = torch.bincount(classes, minlength=len(overlap)).to(overlap.dtype)
    kin = ((overlap > 0) & (overlap < 1)).to(overlap.dtype)
    return count @ kin @ count / max(len(classes) * (len(classes) - 1), 1)


def require(name: str, value: object, holds: bool, words: str) -> None:
    """ValueError that names the argument, its value and what it must be, unless the condition holds."""
    if not holds:
        raise ValueError(f"{name} must be {words}, not {value!r}")

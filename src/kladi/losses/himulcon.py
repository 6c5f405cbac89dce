"""HiMulCon: supervised contrast on every level of a tree, each level no easier than the finer one. A peer.

Source: Zhang et al., "Use All The Labels: A Hierarchical Multi-Label Contrastive Learning Framework", CVPR 2022. Paper
and released code disagree on which level weighs most and which bounds which; the code is followed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from kladi.losses.contrast import PairTables, contrast
from kladi.losses.label_tree import distinct_labels, require
from kladi.losses.views import unit_rows
from kladi.structure.taxonomy import Taxonomy


class HiMulConLoss(nn.Module):
    """SupCon at each depth of a tree, from fine to coarse (HiMulCon).

        loss = (1 / (L + 1)) sum_t 2^(1/t) l'_t        t = 1..L, the labels of depth L + 1 - t
        l_t  = SupCon over the rows R_t,  l'_t = max(l_t, l'_{t-1}),  R_{t+1} = the first sample of each label in R_t

    A label above that depth stands for itself. The finest level has weight 2.

    Args:
        tax: a tree.
        temperature: > 0.
        constraint: False leaves the maximum out.
        deduplicate: False keeps all rows at every level. True is the released code's way; the value then depends on the
            order of the samples.

    Shape: z float[V, B, D] un-normalised, target int64[B] node ids -> scalar. After a forward, `idle` is the share of
    rows without a positive at the finest level. No positive at any level: a zero that keeps its graph.

    Raises ValueError at construction for an impossible temperature or a DAG; IndexError for a target outside the tree.

    >>> tax = Taxonomy.from_paths(["A/x", "A/y", "B/z"])
    >>> z = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [-0.6, 0.8]]])
    >>> target = torch.from_numpy(tax.index(["A/x", "A/x", "A/y", "B/z"]))
    >>> round(HiMulConLoss(tax, temperature=0.5)(z, target).item(), 5)
    0.85138
    """

    def __init__(
        self, tax: Taxonomy, temperature: float = 0.1, constraint: bool = True, deduplicate: bool = True
    ) -> None:
        super().__init__()
        tax.require_tree()
        require("temperature", temperature, 0 < temperature < math.inf, "a positive number; 0.1 is the default")
        self.temperature, self.constraint, self.deduplicate = temperature, constraint, deduplicate
        table = np.array(tax.ancestor_table, dtype=np.int64)
        self.register_buffer(
            "label_at", torch.from_numpy(np.where(table < 0, np.arange(len(table))[:, None], table)), persistent=False
        )
        self.idle: Tensor | None = None

    label_at: Tensor
    """int64[N, L]: what each node counts as at each depth."""

    @override
    def forward(self, z: Float[Tensor, "V B D"], target: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """The loss of `V` views of `B` samples whose node ids are `target`."""
        distinct_labels(z, target, len(self.label_at))
        x = unit_rows(z).unflatten(0, z.shape[:2])
        tables_scale = x.new_tensor(1 / self.temperature)
        kept = torch.arange(len(target), device=z.device)
        depth = self.label_at.shape[1]
        total, finer = x.sum() * 0, None
        for t in range(1, depth + 1):
            labels, classes = torch.unique(self.label_at[target[kept], depth - t], return_inverse=True)
            tables = PairTables(weight=x.new_ones(len(labels)), scale=tables_scale)
            level, idle = contrast(x[:, kept].flatten(0, 1), classes.repeat(len(z)), tables)
            if finer is None:
                self.idle = idle
            elif self.constraint:
                level = torch.maximum(level, finer)
            total, finer = total + 2 ** (1 / t) * level, level
            if self.deduplicate:
                kept = kept[_first_of_each(classes, len(labels))]
        return total / (depth + 1)

    @override
    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"temperature={self.temperature}, constraint={self.constraint}, deduplicate={self.deduplicate}"


def _first_of_each(classes: Int[Tensor, " n"], count: int) -> Int[Tensor, " U"]:
    """Position of the first row of each class, ascending."""
    position = torch.arange(len(classes), device=classes.device)
    first = torch.full((count,), len(classes), device=classes.device).scatter_reduce(0, classes, position, "amin")
    return first.sort().values

"""Logits -> log-probabilities of nodes: a node has what the softmax gives to it and to everything below it.

    log P_v = logsumexp_{u in sub(v)} z_u - logsumexp_all z,        sub(v) = v and its descendants

A column a node (`z[B, N]`, in the order of `tax.names`), or a column a leaf (`tax.leaves`), which is the same with
inner logits of minus infinity. On a tree the sums go up level by level, in time and memory of B N; on a DAG, where
subtrees overlap, they go over the pairs (v, u in sub(v)) of the closure. Nothing is ever N x N.

Two ways to the same numbers. `log_sums` takes one maximum a segment, so that logits of any size do, and gives all
nodes. `path_log_probs` gives those of a few nodes a row, which is what a loss asks: plain sums of exponentials under
one maximum a row, in less time; where a sum that was asked for is too small to have kept its digits, `log_sums`.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import override

from kladi.losses.geometry import at_least_float32
from kladi.structure.taxonomy import Taxonomy

PAIRS = 1 << 24
"""Entries of the closure times rows that are held at once on a DAG."""


class Subtrees(nn.Module):
    """Who is below whom, as index tensors that follow `.to(device)`; no parameter, nothing in the state dict.

    leaves: int64[n]. inner: int64[N - n]. tops: int64[T]. above: int64[N], on a tree the place of a node's parent in
        the level above.
    upper, lower: on a DAG the pairs (v, u in sub(v)), empty on a tree.
    """

    leaves: Tensor
    inner: Tensor
    tops: Tensor
    above: Tensor
    upper: Tensor
    lower: Tensor

    def __init__(self, tax: Taxonomy) -> None:
        super().__init__()
        depth = np.asarray(tax.depth)
        # Nodes are ordered by depth, so a level is a slice.
        first = np.searchsorted(depth, np.arange(1, int(depth.max()) + 2)).tolist()
        self.nodes, self.is_tree = len(tax), tax.is_tree
        self.levels = [slice(start, stop) for start, stop in itertools.pairwise(first)]
        above = np.array([p[0] if p else 0 for p in tax.parents], dtype=np.int64)
        above[depth > 1] -= np.array(first)[depth[depth > 1] - 2]
        pairs: list[tuple[int, int]] = []
        if not tax.is_tree:
            pairs = sorted((int(a), v) for v in range(len(tax)) for a in tax.ancestors(v))
        closed = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        tops = [v for v, parents in enumerate(tax.parents) if not parents]
        for name, values in (
            ("leaves", np.array(tax.leaves)),
            ("inner", np.flatnonzero(tax.height)),
            ("tops", np.array(tops)),
            ("above", above),
            ("upper", closed[:, 0]),
            ("lower", closed[:, 1]),
        ):
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)), persistent=False)

    def spread(self, leaf_logits: Float[Tensor, "B n"]) -> Float[Tensor, "B N"]:
        """Leaf logits among the nodes, minus infinity elsewhere."""
        z = leaf_logits.new_full((len(leaf_logits), self.nodes), -torch.inf)
        return z.index_copy(1, self.leaves, leaf_logits)

    def up(self) -> list[tuple[slice, slice, Tensor]]:
        """The levels from the deepest: (level, the one above it, places of parents there)."""
        steps = [(low, high, self.above[low]) for high, low in itertools.pairwise(self.levels)]
        return steps[::-1]


def node_log_probs(leaf_logits: Float[Tensor, "*B n"], tax: Taxonomy) -> Float[Tensor, "*B N"]:
    """log P of every node of any flat classifier: of logits in the order of `tax.leaves`; float32 or better.

    >>> tax = Taxonomy.from_paths(["A/a", "A/b", "B"])
    >>> node_log_probs(torch.zeros(1, 3), tax).exp()  # A, B, A/a, A/b: B is the first leaf
    tensor([[0.6667, 0.3333, 0.3333, 0.3333]])
    """
    below = Subtrees(tax).to(leaf_logits.device)
    if leaf_logits.shape[-1] != len(below.leaves):
        raise ValueError(f"{leaf_logits.shape[-1]} logits for {len(below.leaves)} leaves")
    flat = at_least_float32(leaf_logits.reshape(-1, leaf_logits.shape[-1]))
    return all_log_probs(below.spread(flat), below).reshape(*leaf_logits.shape[:-1], below.nodes)


def all_log_probs(z: Float[Tensor, "B N"], below: Subtrees) -> Float[Tensor, "B N"]:
    """log P of every node."""
    return log_sums(z, below) - torch.logsumexp(z, dim=1, keepdim=True)


def log_sums(z: Float[Tensor, "B N"], below: Subtrees) -> Float[Tensor, "B N"]:
    """`logsumexp_{u in sub(v)} z_u` of every node, with a maximum for each segment."""
    return (_TreeSums if below.is_tree else _GraphSums).apply(z, below)


def path_log_probs(
    z: Float[Tensor, "B N"],
    paths: Int[Tensor, "B K"],
    below: Subtrees,
    mass: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, "B K"], Float[Tensor, " B"]]:
    """log P of a few nodes a row, and `sum_v mass_v log P_v` over all nodes (0 without a mass).

    paths: rows of `lineage_of`, on a tree one column a depth; where they say -1, the result is 0.
    """
    absent, asked = paths < 0, paths.clamp_min(0)
    found = _sums(z.detach(), asked, absent, below, mass) if below.is_tree and len(z) else None
    if found is not None:
        log_p, everywhere = _PathLogProbs.apply(z, asked, absent, below, mass, found)
    else:
        all_nodes = all_log_probs(z, below)
        log_p = all_nodes.gather(1, asked)
        everywhere = all_nodes @ mass if mass is not None else z.new_zeros(len(z))
    return log_p.masked_fill(absent, 0), everywhere


# --- one maximum a segment --------------------------------------------------------------------------------------------


def _lowest(x: Tensor) -> float:
    """Stands for the maximum of a segment that holds minus infinity alone, from which it cannot be subtracted."""
    return torch.finfo(x.dtype).min


class _TreeSums(torch.autograd.Function):
    """A_v = log(exp z_v + sum over children c of exp A_c), from the deepest level up; nodes are rows here."""

    @staticmethod
    @override
    def forward(ctx: Any, z: Tensor, below: Subtrees) -> Tensor:  # pyrefly: ignore[bad-override]
        A = z.clone().T.contiguous()
        for low, high, parent in below.up():
            children, own = A[low], A[high]
            most = own.scatter_reduce(0, parent[:, None].expand_as(children), children, "amax").clamp_min_(_lowest(A))
            total = (own - most).exp_().index_add_(0, parent, (children - most[parent]).exp_())
            own.copy_(most + total.log_())
        ctx.below = below
        ctx.save_for_backward(z, A)
        return A.T

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        """Down again: what a parent gets reaches a child by its share exp(A_child - A_parent)."""
        z, A = ctx.saved_tensors
        H = gradients[0].clone().T.contiguous()
        safe = A.clamp_min(_lowest(A))
        for low, high, parent in reversed(ctx.below.up()):
            H[low] += H[high][parent] * (A[low] - safe[high][parent]).exp_()
        return (H * (z.T - safe).exp_()).T, None


class _GraphSums(torch.autograd.Function):
    """The same over the pairs of the closure, some rows at a time."""

    @staticmethod
    @override
    def forward(ctx: Any, z: Tensor, below: Subtrees) -> Tensor:  # pyrefly: ignore[bad-override]
        rows = max(1, PAIRS // max(len(below.upper), 1))
        A = torch.cat([_closed(part.T, below).T for part in z.split(rows)]) if len(z) else z.clone()
        ctx.below, ctx.rows = below, rows
        ctx.save_for_backward(z, A)
        return A

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        z, A = ctx.saved_tensors
        upper, lower = ctx.below.upper, ctx.below.lower
        parts = []
        for g, x, a in zip(gradients[0].split(ctx.rows), z.split(ctx.rows), A.split(ctx.rows), strict=True):
            share = (x.T[lower] - a.T.clamp_min(_lowest(a))[upper]).exp_()
            parts.append(torch.zeros_like(x.T).index_add_(0, lower, g.T[upper] * share).T)
        return (torch.cat(parts) if parts else torch.zeros_like(z)), None


def _closed(x: Tensor, below: Subtrees) -> Tensor:
    members = x[below.lower]
    index = below.upper[:, None].expand_as(members)
    most = torch.full_like(x, -torch.inf).scatter_reduce(0, index, members, "amax").clamp_min_(_lowest(x))
    return most + torch.zeros_like(x).index_add_(0, below.upper, (members - most[below.upper]).exp_()).log_()


# --- one maximum a row -----------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """e = exp(z - max) as [N, B]; its sums over the subtrees asked for as [K, B], over all nodes as [B], and over every
    subtree as [N, B] where there is a mass."""

    e: Tensor
    sums: Tensor
    total: Tensor
    every: Tensor | None


def _sums(z: Tensor, asked: Tensor, absent: Tensor, below: Subtrees, mass: Tensor | None) -> _Found | None:
    """None where a sum that counts is too small to have kept its digits."""
    S = (z - z.amax(1, keepdim=True)).exp_().T.contiguous()
    e = S.clone() if mass is not None else S
    inner = S.index_select(0, below.inner)
    for low, high, parent in below.up():
        S[high].index_add_(0, parent, S[low])
    sums, total = S.gather(0, asked.T).masked_fill_(absent.T, 1), S[below.tops].sum(0)
    finite = torch.finfo(z.dtype)
    counts = sums if mass is None else S
    if not bool((counts > below.nodes * finite.tiny / finite.eps).all()):
        return None
    if mass is None:  # the leaves are untouched, so that this is e again
        S.index_copy_(0, below.inner, inner)
    return _Found(e, sums, total, None if mass is None else S)


class _PathLogProbs(torch.autograd.Function):
    """log(sum / total), and dL/dz_j = e_j (sum over asked v above-or-at j of g_v / S_v - sum of g / total)."""

    @staticmethod
    @override
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, z: Tensor, asked: Tensor, absent: Tensor, below: Subtrees, mass: Tensor | None, found: _Found
    ) -> tuple[Tensor, Tensor]:
        ctx.below = below
        ctx.save_for_backward(asked, absent, mass, *found)
        everywhere = z.new_zeros(len(z))
        if mass is not None and found.every is not None:
            everywhere = mass @ found.every.log() - mass.sum() * found.total.log()
        return (found.sums / found.total).log_().T, everywhere

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """From the tops down: a node inherits what its parent collected, the total's share included."""
        asked, absent, mass, e, sums, total, every = ctx.saved_tensors
        g, g_everywhere = gradients[0].T.masked_fill(absent.T, 0), gradients[1]
        collected = g.sum(0) if mass is None else g.sum(0) + g_everywhere * mass.sum()
        H, own = torch.empty_like(e), g / sums
        levels, row = ctx.below.levels, torch.arange(len(total), device=e.device)
        for depth, low in enumerate(levels):
            if depth == 0:
                H[low] = -collected / total
            else:
                torch.index_select(H[levels[depth - 1]], 0, ctx.below.above[low], out=H[low])
            if mass is not None:
                H[low].addcdiv_(mass[low, None] * g_everywhere, every[low])
            # An absent node stands as node 0 with a gradient of 0.
            H.view(-1).index_add_(0, asked[:, depth] * len(total) + row, own[depth])
        return H.mul_(e).T, None, None, None, None, None

"""The pair kernel of `contrast.py` for the Poincaré ball, where alikeness is minus the distance.

Same tables, same loss, same memory: symmetric tiles, recomputed in backward, never n x n. Two things differ. A distance
is no product, so positives cannot be summed by class beforehand and are gathered in the tile pass. And a logit has no
useful bound, so each row keeps a running maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from kladi.losses.contrast import OwnView, PairTables
from kladi.losses.geometry import PoincareBall, squared_distances

TILE = 512
"""Rows of a tile: a dozen matrices of this size squared are alive at once."""


def contrast_in_ball(
    points: Float[Tensor, "n D"],
    classes: Int[Tensor, " n"],
    tables: PairTables,
    ball: PoincareBall,
    *,
    views: int = 1,
    own: OwnView | None = None,
    tile: int = TILE,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean over rows with a positive of `logsumexp_{m != i} l_im - sum_j q_ij l_ij`, l_ik = -A_ik d(x_i, x_k) + B_ik.

    q_ij = W_ij / sum_m W_im. W, A and B are looked up in `tables` by class, and are those of `own` where two rows are
    views of one sample; rows are view-major (row = view * batch + sample).

    Args:
        points: in the ball, float32 or float64.
        classes: row of the (symmetric) tables that each point belongs to.
        tile: rows of a tile; the value does not depend on it.

    Returns:
        the loss, a zero that keeps its graph if no row has a positive; the share of rows without one, detached.
    """
    pairs = _Pairs(classes, tables, own, len(classes) // views, tile)
    logsumexp, attracted, weight = _Sums.apply(points, pairs, ball)
    anchor = weight > 0
    count = anchor.sum()
    per_row = torch.where(anchor, logsumexp - attracted / torch.where(anchor, weight, 1), 0)
    idle = 1 - count.to(points.dtype) / max(len(classes), 1)
    return per_row.sum() / count.clamp_min(1), idle


class _Pairs:
    """Weights, scales and biases of one tile of pairs at a time."""

    def __init__(self, classes: Tensor, tables: PairTables, own: OwnView | None, batch: int, tile: int) -> None:
        self.classes, self.tables, self.own, self.tile = classes, tables, own, tile
        self.sample = torch.arange(len(classes), device=classes.device) % max(batch, 1)

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Tiles on and above the diagonal; each serves its mirror image."""
        starts = range(0, len(self.classes), self.tile)
        for start in starts:
            for other in starts[start // self.tile :]:
                yield slice(start, start + self.tile), slice(other, other + self.tile)

    def read(self, row: slice, column: slice) -> tuple[Tensor, Tensor, Tensor]:
        """W, A, B of a tile. A row with itself: weight 0, bias -inf, that is, no pair."""
        first, second = self.classes[row, None], self.classes[None, column]
        table = self.tables.weight
        # A table of one dimension is zero off its diagonal.
        weight = table[first, second] if table.ndim == 2 else torch.where(first == second, table[first], 0)
        scale = self.tables.scale[first, second]
        bias = torch.zeros_like(scale) if self.tables.bias is None else self.tables.bias[first, second]
        if self.own is not None:
            same = self.sample[row, None] == self.sample[column]
            weight = weight.masked_fill(same, self.own.weight)
            if self.own.scale is not None:
                scale = scale.masked_fill(same, self.own.scale)
                bias = bias.masked_fill(same, self.own.bias)
        if row == column:
            weight, bias = weight.fill_diagonal_(0), bias.fill_diagonal_(-math.inf)
        return weight, scale, bias


class _Sums(torch.autograd.Function):
    """Of each row: logsumexp of its logits, sum of W times its logits, sum of W."""

    @staticmethod
    @override
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, x: Tensor, pairs: _Pairs, ball: PoincareBall
    ) -> tuple[Tensor, Tensor, Tensor]:
        peak, mass = torch.full_like(x[:, 0], -math.inf), torch.zeros_like(x[:, 0])
        attracted, total = torch.zeros_like(mass), torch.zeros_like(mass)
        for row, column in pairs.tiles():
            weight, scale, bias = pairs.read(row, column)
            logit = bias - scale * ball.distances(x[row], x[column])
            wanted = torch.where(weight > 0, weight * logit, 0)
            for part, along in [(row, 1), (column, 0)] if row != column else [(row, 1)]:
                high = torch.maximum(peak[part], logit.amax(along))
                shift = torch.where(high > -math.inf, high, 0)  # a row with no pair yet: exp(-inf - 0) = 0
                mass[part] *= torch.exp(peak[part] - shift)
                mass[part] += torch.exp(logit - shift.unsqueeze(along)).sum(along)
                peak[part] = high
                attracted[part] += wanted.sum(along)
                total[part] += weight.sum(along)
        logsumexp = torch.where(mass > 0, peak + mass.log(), 0)
        ctx.save_for_backward(x, logsumexp)
        ctx.pairs, ctx.ball = pairs, ball
        ctx.mark_non_differentiable(total)
        return logsumexp, attracted, total

    @staticmethod
    @override
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor, None, None]:
        """Sum over k of dL/ds_ik ds_ik/dx_i, each pair in both its roles; with g = (1 - c ||x||^2)^(-1/2):

        u = ||x_i - x_k|| g_i g_k
        ds/dx_i = -2 / sqrt(1 + c u^2)  u  [ (x_i - x_k) / ||x_i - x_k||^2 + c g_i^2 x_i ]
        """
        x, logsumexp = ctx.saved_tensors
        by_sum, by_attraction, _ = grad_outputs
        c = ctx.ball.curvature
        gamma = ctx.ball.gamma(x).squeeze(-1)
        least = torch.finfo(x.dtype).eps ** 2
        gradient = torch.zeros_like(x)
        for row, column in ctx.pairs.tiles():
            weight, scale, bias = ctx.pairs.read(row, column)
            square = squared_distances(x[row], x[column])
            factor = gamma[row, None] * gamma[column]
            u = square.sqrt() * factor
            logit = bias - scale * ctx.ball.from_chord(u)
            G = by_sum[row, None] * torch.exp(logit - logsumexp[row, None])
            G += by_sum[column] * torch.exp(logit - logsumexp[column])
            G += (by_attraction[row, None] + by_attraction[column]) * weight
            G *= -2 * scale / torch.sqrt(1 + c * u * u)
            # Where the points (all but) meet the distance has a kink: no direction there.
            along = torch.where(square > least, G * factor / square.sqrt(), 0)
            radial = G * u
            gradient[row] += x[row] * (along.sum(1) + c * gamma[row] ** 2 * radial.sum(1))[:, None]
            gradient[row] -= along @ x[column]
            if row != column:
                gradient[column] += x[column] * (along.sum(0) + c * gamma[column] ** 2 * radial.sum(0))[:, None]
                gradient[column] -= along.T @ x[row]
        return gradient, None, None

"""The one kernel behind every pairwise loss: tables between label classes in, a scalar out, never an n x n matrix.

A loss author says, for each pair of *classes*, how positive it is (W), how its similarity becomes a logit (A, with the
temperature in it; B added), and what an anchor's sum is divided by. For unit rows x and s_ik = x_i . x_k the loss is

    l_ik = A s_ik + B                                   (A, B, W at the classes of i and k)
    L_i  = ( m_i logsumexp_{k != i} l_ik - sum_{j != i} W_ij l_ij ) / d_i,       m_i = sum_{j != i} W_ij
    loss = mean of L_i over anchors, the rows with d_i > 0

Two facts make it cheap. The positive sum needs no pair, because sum_j W_ij A_ij s_ij = x_i . sum_u (W A)[y_i, u] Z_u
with Z_u the sum of the rows of class u. And the log-sum-exp is symmetric in its pairs: one tile of similarities serves
the rows of i and those of k. So all of it costs half a product forward and one and a half backward, against three for a
dense matrix, in O(n D + tile^2) memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

TILE = 2048
"""Rows of a tile, the fastest of 512, 1,024 and 2,048 on two cores; bench/kernel.py measures it (16 MB in float32)."""
BOUND = 60.0
"""exp of logits within this bound cannot overflow in float32, nor can a sum of 2^32 of them: no shift is needed."""
SEGMENTS = 48
"""Classes in a tile up to which multiplying class by class is cheaper than gathering a table the size of the tile."""


@dataclass(frozen=True)
class PairTables:
    """What pairs of U label classes mean to the loss; every table is symmetric.

    weight: W >= 0, [U, U], or [U] for a table that is zero off its diagonal.
    scale: A, [U, U], or [] where it is the same for all pairs.
    bias: B, [U, U], or None for zero. -inf takes the pair out of the denominator (its weight must be 0).
    positive: 0 or 1, like `weight`; the divisor of an anchor is its sum over pairs. None: the divisor is sum W.
    """

    weight: Float[Tensor, "..."]
    scale: Float[Tensor, "..."]
    bias: Float[Tensor, "U U"] | None = None
    positive: Float[Tensor, "..."] | None = None


@dataclass(frozen=True)
class OwnView:
    """What a pair of two views of one sample means, whatever its class says. Always counts as one positive.

    scale None: the logit stays that of the tables, and only the weight is overridden, which costs no tile.
    """

    weight: float = 1.0
    scale: float | None = None
    bias: float = 0.0


def contrast(
    points: Float[Tensor, "n D"],
    classes: Int[Tensor, " n"],
    tables: PairTables,
    *,
    views: int = 1,
    own: OwnView | None = None,
    keys: Float[Tensor, "m D"] | None = None,
    key_classes: Int[Tensor, " m"] | None = None,
    tile: int = TILE,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The loss of the module's docstring, and the share of rows that are no anchor.

    Args:
        points: unit rows, view-major: row = view * (n / views) + sample. A zero row is a point without direction.
        classes: the row of the tables that each point belongs to.
        tables: W, A, B and what counts as positive.
        views: views of each sample; only `own` asks.
        own: overrides the tables for two views of one sample.
        keys, key_classes: where given, anchors are paired with these instead of with each other: a queue. Gradients
            reach keys that ask for them. Not together with `own`.
        tile: rows of a tile; the value does not depend on it.

    Returns:
        The loss, in float64 for float64 points and float32 otherwise, also under autocast; a zero that keeps its graph
        where there is no anchor. The share of rows without a positive, without gradient.
    """
    if own is not None and keys is not None:
        raise ValueError("own views are pairs of rows; they have no meaning where keys stand apart from rows")
    with torch.autocast(points.device.type, enabled=False):
        x = points if points.dtype == torch.float64 else points.float()
        y = None if keys is None else keys.to(x.dtype)
        tables = _cast(tables, x)
        apart = views if own is not None else 1
        mass, divisor, attraction = _positives(x, classes, tables, 0 if y is not None else apart, y, key_classes)
        masked_views, own_logits = 1, None
        if own is not None and views > 1:
            own_logits = _own_logits(x, classes, tables, own, views)
            mass = mass + own.weight * (views - 1)
            divisor = divisor + (own.weight if tables.positive is None else 1) * (views - 1)
            attraction = attraction + own.weight * own_logits.sum(1)
            masked_views = 1 if own.scale is None and tables.bias is None else views
        logsumexp = pair_logsumexp(
            x, classes, tables.scale, tables.bias, views=masked_views, keys=y, key_classes=key_classes, tile=tile
        )
        if own_logits is not None and masked_views > 1:
            logsumexp = torch.logaddexp(logsumexp, torch.logsumexp(own_logits, dim=1))
        anchor = divisor > 0
        idle = 1 - anchor.to(x.dtype).mean() if len(x) else x.new_ones(())
        zero = x.sum() * 0
        if not bool(anchor.any()):
            return zero, idle
        rows = (mass * torch.where(anchor, logsumexp, 0) - attraction) / torch.where(anchor, divisor, 1)
        return torch.where(anchor, rows, 0).sum() / anchor.sum(), idle


def pair_logsumexp(
    rows: Float[Tensor, "n D"],
    classes: Int[Tensor, " n"],
    scale: Float[Tensor, "..."],
    bias: Float[Tensor, "U U"] | None = None,
    *,
    views: int = 1,
    keys: Float[Tensor, "m D"] | None = None,
    key_classes: Int[Tensor, " m"] | None = None,
    tile: int = TILE,
) -> Float[Tensor, " n"]:
    """log sum_k exp(A s_ik + B) for each row i, over the other rows k (or over the keys), streamed in tiles.

    `views` > 1 also leaves out the other views of the same sample. Rows without a pair get -inf. Forward keeps no tile
    (unless a single one holds everything), backward makes them anew.
    """
    if keys is not None:
        if key_classes is None:
            raise ValueError("keys need key_classes")
        pairs = _Pairs(classes, key_classes, scale, bias, views=0, tile=tile)
        return _LogSumExp.apply(rows, keys, pairs)
    if views == 1 and (scale.ndim == 2 or bias is not None):
        # Rows of one class side by side: a table then acts on whole stripes of a tile.
        order = torch.argsort(classes)
        pairs = _Pairs(classes[order], classes[order], scale, bias, views=1, tile=tile)
        return _LogSumExp.apply(rows[order], None, pairs)[torch.argsort(order)]
    return _LogSumExp.apply(rows, None, _Pairs(classes, classes, scale, bias, views=views, tile=tile))


# --- positives: sums over classes, in plain autograd ---------------------------------------------------------------


def _positives(
    x: Tensor,
    classes: Tensor,
    tables: PairTables,
    views: int,
    keys: Tensor | None,
    key_classes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """m_i, d_i and sum_j W_ij l_ij of each row over the pairs that the tables speak of, from sums over classes.

    views: how many rows of its own a row does not meet: 0 of keys that stand apart, 1 (itself), or all its views.

    Nothing is subtracted that is not a whole number: a row's own class is counted apart from all others, without the
    row. So a weight of 1e-9 counts beside one of 1, and a row without a positive has exactly zero of them.
    """
    others, of = (x, classes) if keys is None or key_classes is None else (keys, key_classes)
    count = torch.bincount(of, minlength=len(tables.weight)).to(x.dtype)
    sums = x.new_zeros(len(count), x.shape[1]).index_add(0, of, others)
    fellows = count[classes] - views
    beside = sums[classes]
    if views:
        beside = beside - x.unflatten(0, (views, -1)).sum(0).repeat(views, 1)
        beside = torch.where(fellows[:, None] > 0, beside, 0)

    def counted(table: Tensor) -> Tensor:
        among = _diagonal(table)[classes] * fellows
        return among if table.ndim == 1 else among + (_off_diagonal(table) @ count)[classes]

    mass = counted(tables.weight)
    divisor = mass if tables.positive is None else counted(tables.positive)
    pull = _scaled(tables.weight, tables.scale)
    towards = _diagonal(pull)[classes, None] * beside
    if pull.ndim == 2:
        towards = towards + (_off_diagonal(pull) @ sums)[classes]
    attraction = (x * towards).sum(1)
    if tables.bias is not None:
        finite = tables.bias.masked_fill(tables.bias == -math.inf, 0)
        attraction = attraction + counted(_scaled(tables.weight, finite))
    return mass, divisor, attraction


def _own_logits(x: Tensor, classes: Tensor, tables: PairTables, own: OwnView, views: int) -> Float[Tensor, "n others"]:
    """Logits of each row with the other views of its sample."""
    stacked = x.unflatten(0, (views, -1))
    cosine = torch.stack([(stacked * stacked.roll(shift, 0)).sum(-1).flatten() for shift in range(1, views)], dim=1)
    if own.scale is not None:
        return own.scale * cosine + own.bias
    scale = tables.scale if tables.scale.ndim == 0 else _diagonal(tables.scale)[classes][:, None]
    return scale * cosine  # a bias of the tables does not reach own views: they are always compared


def _cast(tables: PairTables, like: Tensor) -> PairTables:
    """The tables in the dtype and on the device of the points; a scale that is one number becomes one."""

    def cast(table: Tensor | None) -> Tensor | None:
        return None if table is None else table.to(like)

    scale = tables.scale.to(like)
    if scale.ndim == 2 and scale.numel() and bool((scale == scale[0, 0]).all()):
        scale = scale[0, 0]
    return PairTables(tables.weight.to(like), scale, cast(tables.bias), cast(tables.positive))


def _scaled(weight: Tensor, table: Tensor) -> Tensor:
    """weight * table, entry by entry; the diagonal of the table where the weight is a diagonal."""
    return weight * (_diagonal(table) if weight.ndim == 1 and table.ndim == 2 else table)


def _diagonal(table: Tensor) -> Tensor:
    return table.diagonal() if table.ndim == 2 else table


def _off_diagonal(table: Tensor) -> Tensor:
    return table - torch.diag(table.diagonal())


# --- denominators: symmetric tiles -----------------------------------------------------------------------------------


class _Pairs:
    """The pairs of rows and keys, tile by tile: which there are, and what their logits are.

    views: 0 where keys stand apart; 1: a row is no pair with itself; more: nor with other views of its sample.
    """

    def __init__(
        self, classes: Tensor, key_classes: Tensor, scale: Tensor, bias: Tensor | None, *, views: int, tile: int
    ) -> None:
        self.classes, self.key_classes, self.scale, self.bias = classes, key_classes, scale, bias
        self.views, self.tile = views, tile
        self.symmetric = views > 0
        greatest = float(scale.abs().max()) if scale.numel() else 0.0
        # A finite bias multiplies after the exponential; -inf becomes an exact zero there.
        self.factor = None if bias is None else bias.exp()
        self.bounded = greatest + _greatest(bias) <= BOUND

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Row and key ranges; only those on and above the diagonal where a tile serves both."""
        for i in range(0, len(self.classes), self.tile):
            for j in range(i if self.symmetric else 0, len(self.key_classes), self.tile):
                yield (
                    slice(i, min(i + self.tile, len(self.classes))),
                    slice(j, min(j + self.tile, len(self.key_classes))),
                )

    @property
    def single(self) -> bool:
        return max(len(self.classes), len(self.key_classes)) <= self.tile

    def multiply(self, tile: Tensor, table: Tensor, i: slice, j: slice) -> None:
        """tile *= table[classes of rows, classes of keys], in place."""
        if table.ndim == 0:
            tile.mul_(table)
            return
        found, place = torch.unique(self.classes[i], return_inverse=True)
        columns = table[found[:, None], self.key_classes[j]]
        segments, counts = torch.unique_consecutive(place, return_counts=True)
        if len(segments) > SEGMENTS:
            tile.mul_(columns[place])
            return
        start = 0
        for row, count in zip(segments.tolist(), counts.tolist(), strict=True):
            tile[start : start + count].mul_(columns[row])
            start += count

    def erase(self, tile: Tensor, i: slice, j: slice, value: float) -> None:
        """Write `value` where a row meets itself, or another view of its sample: on a few diagonals of the tile."""
        samples = len(self.classes) // max(self.views, 1)
        for shift in range(-(self.views - 1), self.views):
            offset = i.start + shift * samples - j.start
            if -tile.shape[0] < offset < tile.shape[1]:
                tile.diagonal(offset).fill_(value)

    def exponentials(self, rows: Tensor, keys: Tensor, i: slice, j: slice) -> Tensor:
        """exp(A s + B) of a tile, zero where there is no pair. Only for bounded logits."""
        tile = rows[i] @ keys[j].T
        self.multiply(tile, self.scale, i, j)
        tile.exp_()
        if self.factor is not None:
            self.multiply(tile, self.factor, i, j)
        self.erase(tile, i, j, 0.0)
        return tile

    def logits(self, rows: Tensor, keys: Tensor, i: slice, j: slice) -> Tensor:
        """A s + B of a tile, -inf where there is no pair."""
        tile = rows[i] @ keys[j].T
        self.multiply(tile, self.scale, i, j)
        if self.bias is not None:
            tile.add_(self.bias[self.classes[i][:, None], self.key_classes[j]])
        self.erase(tile, i, j, -math.inf)
        return tile


class _LogSumExp(torch.autograd.Function):
    """Forward sums tiles; backward makes them anew: dL/dx_i = sum_k A_ik (g_i p_ik + g_k p_ki) x_k."""

    @staticmethod
    @override
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, rows: Tensor, keys: Tensor | None, pairs: _Pairs
    ) -> Tensor:
        other = rows if keys is None else keys
        total, kept = (_bounded if pairs.bounded else _online)(rows, other, pairs)
        ctx.pairs, ctx.apart = pairs, keys is not None
        ctx.save_for_backward(rows, other, total, *([kept] if kept is not None else []))
        return total

    @staticmethod
    @once_differentiable
    @override
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, None]:
        rows, keys, total, *kept = ctx.saved_tensors
        pairs: _Pairs = ctx.pairs
        to_rows = torch.zeros_like(rows)
        to_keys = to_rows if pairs.symmetric else torch.zeros_like(keys)
        alone = total == -math.inf  # a row without a pair: nothing to push, and exp(inf) must not be met
        for i, j in pairs.tiles():
            if pairs.bounded:
                tile = kept[0].clone() if kept else pairs.exponentials(rows, keys, i, j)
                each = torch.where(alone, 0, gradient * torch.exp(-total))
                tile.mul_(each[i, None] + each[j] if pairs.symmetric else each[i, None])
            else:
                tile = _shares(
                    pairs.logits(rows, keys, i, j), gradient, torch.where(alone, 0, total), i, j, pairs.symmetric
                )
            if pairs.scale.ndim:
                pairs.multiply(tile, pairs.scale, i, j)
            to_rows[i].addmm_(tile, keys[j])
            if i != j or not pairs.symmetric:
                to_keys[j].addmm_(tile.T, rows[i])
        if not pairs.scale.ndim:
            to_rows.mul_(pairs.scale)
            if not pairs.symmetric:
                to_keys.mul_(pairs.scale)
        return to_rows, (to_keys if ctx.apart else None), None


def _bounded(rows: Tensor, keys: Tensor, pairs: _Pairs) -> tuple[Tensor, Tensor | None]:
    """log of the sums of exponentials that cannot overflow; the tile itself where there is but one."""
    sums = rows.new_zeros(len(rows))
    tile = None
    for i, j in pairs.tiles():
        tile = pairs.exponentials(rows, keys, i, j)
        sums[i] += tile.sum(1)
        if pairs.symmetric and i != j:
            sums[j] += tile.sum(0)
    return sums.log(), tile if pairs.single else None


def _online(rows: Tensor, keys: Tensor, pairs: _Pairs) -> tuple[Tensor, None]:
    """The same for logits of any size: log-sum-exps of tiles, joined."""
    total = torch.full((len(rows),), -math.inf, dtype=rows.dtype, device=rows.device)
    for i, j in pairs.tiles():
        tile = pairs.logits(rows, keys, i, j)
        total[i] = torch.logaddexp(total[i], torch.logsumexp(tile, dim=1))
        if pairs.symmetric and i != j:
            total[j] = torch.logaddexp(total[j], torch.logsumexp(tile, dim=0))
    return total, None


def _shares(logits: Tensor, gradient: Tensor, total: Tensor, i: slice, j: slice, symmetric: bool) -> Tensor:
    """g_i p_ik + g_k p_ki of a tile of logits."""
    shares = gradient[i, None] * torch.exp(logits - total[i, None])
    return shares.add_(gradient[j] * torch.exp(logits - total[j])) if symmetric else shares


def _greatest(bias: Tensor | None) -> float:
    """The greatest size of a finite bias."""
    if bias is None:
        return 0.0
    finite = bias[bias > -math.inf]
    return float(finite.abs().max()) if finite.numel() else 0.0

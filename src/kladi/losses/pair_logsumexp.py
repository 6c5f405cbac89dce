"""log-sum-exps over all pairs of rows, streamed in symmetric tiles: the denominator of every pairwise loss.

One tile of similarities serves the rows of i and those of k, and is made anew in backward instead of being kept.
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

TILE = 1024
"""Rows of a tile, which has twice as many keys (8 MB in float32). Measured on two cores, CPU ms for a tree of
30 classes with tiles of 512, 1,024, 2,048 rows: 105, 93, 82 at n = 2,048, where the last two are one kept tile, and
280, 266, 335 at n = 4,096, where the last is. So all pairs are one tile up to twice this, and streamed beyond."""
BOUND = 50.0
"""exp of logits within this bound cannot overflow in float32, nor can a sum of 2^32 of them: no shift is needed."""
SEGMENTS = 256
"""Runs of one class in a tile up to which it is met run by run; beyond, a table the size of the tile is gathered.
Measured with 2,048 and 6,144 rows: runs win at 100 to 600 classes, gathering from about 1,000 in a tile."""


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
        return _LogSumExp.apply(rows, keys, _Pairs(classes, key_classes, scale, bias, views=0, tile=tile))
    if scale.ndim == 2 or bias is not None:
        order = by_class(classes, views)
        pairs = _Pairs(classes[order], classes[order], scale, bias, views=views, tile=tile)
        return _LogSumExp.apply(rows.index_select(0, order), None, pairs)[torch.argsort(order)]
    return _LogSumExp.apply(rows, None, _Pairs(classes, classes, scale, bias, views=views, tile=tile))


def by_class(classes: Int[Tensor, " n"], views: int) -> Int[Tensor, " n"]:
    """An order in which samples of one class are side by side, in all views alike.

    A row of a table then serves a whole stripe of a tile.
    """
    samples = len(classes) // views
    order = torch.argsort(classes[:samples])
    return torch.cat([order + view * samples for view in range(views)])


Stripe = tuple[slice, Any, Any]
"""Rows of a tile; the scales and the biases of their pairs with its keys, or None where there is no such table."""


class _Pairs:
    """The pairs of rows and keys, tile by tile: which there are, and what their logits are.

    views: 0 where keys stand apart; 1: a row is no pair with itself; more: nor with other views of its sample.

    Tiles are written into room that the caller brings: fresh memory costs more than a pass of arithmetic over it.
    """

    def __init__(
        self, classes: Tensor, key_classes: Tensor, scale: Tensor, bias: Tensor | None, *, views: int, tile: int
    ) -> None:
        self.classes, self.key_classes, self.bias = classes, key_classes, bias
        self.views, self.symmetric = views, views > 0
        # Twice as wide as high: few calls, and the squares on the diagonal, computed in full though half would do,
        # stay small. Up to 2 x TILE rows, all pairs are one tile, kept for backward: no more room than tiles need.
        self.single = max(len(classes), len(key_classes)) <= 2 * tile
        self.height, self.width = (2 * tile, 2 * tile) if self.single else (tile, 2 * tile)
        # One scale for all pairs rides along with the products; a table of them takes a pass over each tile.
        self.number = 1.0 if scale.ndim else float(scale)
        self.scale = scale if scale.ndim else None
        greatest = float(scale.abs().max()) if scale.numel() else 0.0
        self.bounded = greatest + _greatest(bias) <= BOUND

    def tiles(self) -> Iterator[tuple[slice, slice, slice]]:
        """Ranges of rows, of keys, and of those keys that the tile serves as rows too.

        Where keys are the rows, a strip of tiles begins at the diagonal: what is left of it was served by the strips
        above, and its first square serves its rows from both sides already.
        """
        n, m = len(self.classes), len(self.key_classes)
        for i in range(0, n, self.height):
            for j in range(i if self.symmetric else 0, m, self.width):
                rows, keys = slice(i, min(i + self.height, n)), slice(j, min(j + self.width, m))
                yield rows, keys, slice(rows.stop if self.symmetric and i == j else j, keys.stop)

    def room(self, like: Tensor) -> Tensor:
        """Memory for one tile."""
        return like.new_empty(min(self.height, len(self.classes)) * min(self.width, len(self.key_classes)))

    def stripes(self, i: slice, j: slice) -> list[Stripe]:
        """What the tables say of a tile: for each run of rows of one class, one row of scales and one of biases.

        Where runs are short, one stripe holds all rows, and tables gathered to the size of the tile. No tables: none.
        """
        if self.scale is None and self.bias is None:
            return []
        found, place = torch.unique(self.classes[i], return_inverse=True)
        scale, bias = (
            None if table is None else table.index_select(0, found).index_select(1, self.key_classes[j])
            for table in (self.scale, self.bias)
        )
        run, counts = torch.unique_consecutive(place, return_counts=True)
        parts: list[tuple[slice, Any]]
        if len(run) > SEGMENTS:
            parts = [(slice(0, len(place)), place)]
        else:
            ends = counts.cumsum(0).tolist()
            parts = [(slice(end - n, end), r) for r, n, end in zip(run.tolist(), counts.tolist(), ends, strict=True)]
        return [(part, None if scale is None else scale[r], None if bias is None else bias[r]) for part, r in parts]

    def logits(self, rows: Tensor, keys: Tensor, i: slice, j: slice, stripes: list[Stripe], room: Tensor) -> Tensor:
        """A s + B of a tile, -inf where there is no pair."""
        tile = _tile(room, i, j)
        torch.addmm(tile, rows[i], keys[j].T, beta=0, alpha=self.number, out=tile)
        for part, scale, bias in stripes:
            if scale is not None:
                tile[part].mul_(scale)
            if bias is not None:
                tile[part].add_(bias)
        self.erase(tile, i, j)
        return tile

    def erase(self, tile: Tensor, i: slice, j: slice, value: float = -math.inf) -> None:
        """-inf, or the value, where a row meets itself or another view of its sample: a few diagonals of the tile."""
        samples = len(self.classes) // max(self.views, 1)
        for shift in range(-(self.views - 1), self.views):
            offset = i.start + shift * samples - j.start
            if -tile.shape[0] < offset < tile.shape[1]:
                tile.diagonal(offset).fill_(value)

    def weights(self, each: Tensor, i: slice, j: slice, stripes: list[Stripe], room: Tensor) -> Tensor:
        """A_ik (e_i + e_k) of a tile, or A_ik e_i where keys stand apart; a lone number A is left to the products."""
        tile = _tile(room, i, j)
        mine, theirs = each[i, None], each[j] if self.symmetric else each.new_zeros(tile.shape[1])
        if self.scale is None:
            return torch.add(mine, theirs, out=tile)
        for part, scale, _ in stripes:
            torch.addcmul(scale * theirs, mine[part], scale, out=tile[part])
        return tile


class _LogSumExp(torch.autograd.Function):
    """Forward sums tiles; backward makes them anew: dL/dx_i = sum_k A_ik (g_i p_ik + g_k p_ki) x_k.

    With t the log-sum-exps and p_ik = exp(l_ik - t_i), bounded logits need one exponential a pair:
    exp(l_ik) (g_i exp(-t_i) + g_k exp(-t_k)).
    """

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
        each = torch.where(alone, 0, gradient * torch.exp(-total))
        total = torch.where(alone, 0, total)
        one, two = rows.new_empty(0) if kept else pairs.room(rows), pairs.room(rows)
        with torch.autocast(rows.device.type, enabled=False):  # backward may be called where autocast is on
            for i, j, beyond in pairs.tiles():
                stripes = pairs.stripes(i, j)
                if not pairs.bounded:
                    push = _shares(pairs.logits(rows, keys, i, j, stripes, one), gradient, total, i, j, pairs, two)
                    for part, scale, _ in stripes:
                        if scale is not None:
                            push[part].mul_(scale)
                else:
                    push = pairs.weights(each, i, j, stripes, two)
                    push.mul_(kept[0] if kept else pairs.logits(rows, keys, i, j, stripes, one).exp_())
                to_rows[i].addmm_(push, keys[j], alpha=pairs.number)
                to_keys[beyond].addmm_(push[:, beyond.start - j.start :].T, rows[i], alpha=pairs.number)
        return to_rows, (to_keys if ctx.apart else None), None


def _bounded(rows: Tensor, keys: Tensor, pairs: _Pairs) -> tuple[Tensor, Tensor | None]:
    """log of the sums of exponentials that cannot overflow; the tile itself where there is but one."""
    sums, room, tile = rows.new_zeros(len(rows)), pairs.room(rows), None
    ones = rows.new_ones(pairs.width)  # a product with ones is the fastest sum
    for i, j, beyond in pairs.tiles():
        tile = pairs.logits(rows, keys, i, j, pairs.stripes(i, j), room).exp_()
        sums[i].addmv_(tile, ones[: tile.shape[1]])
        if pairs.symmetric:
            sums[beyond].addmv_(tile[:, beyond.start - j.start :].T, ones[: len(tile)])
    return sums.log(), tile if pairs.single else None


def _online(rows: Tensor, keys: Tensor, pairs: _Pairs) -> tuple[Tensor, None]:
    """The same for logits of any size: log-sum-exps of tiles, joined."""
    total, room = torch.full_like(rows[:, 0], -math.inf), pairs.room(rows)
    for i, j, beyond in pairs.tiles():
        tile = pairs.logits(rows, keys, i, j, pairs.stripes(i, j), room)
        total[i] = torch.logaddexp(total[i], torch.logsumexp(tile, dim=1))
        if pairs.symmetric:
            below = tile[:, beyond.start - j.start :]
            total[beyond] = torch.logaddexp(total[beyond], torch.logsumexp(below, dim=0))
    return total, None


def _shares(logits: Tensor, gradient: Tensor, total: Tensor, i: slice, j: slice, pairs: _Pairs, room: Tensor) -> Tensor:
    """g_i p_ik + g_k p_ki of a tile of logits, which it overwrites; g_i p_ik where keys stand apart."""
    shares = torch.sub(logits, total[i, None], out=_tile(room, i, j)).exp_().mul_(gradient[i, None])
    return shares.add_(logits.sub_(total[j]).exp_().mul_(gradient[j])) if pairs.symmetric else shares


def _tile(room: Tensor, i: slice, j: slice) -> Tensor:
    """The room for a tile, in the shape of this one."""
    height, width = i.stop - i.start, j.stop - j.start
    return room[: height * width].view(height, width)


def _greatest(bias: Tensor | None) -> float:
    """The greatest size of a finite bias."""
    if bias is None:
        return 0.0
    finite = bias[bias > -math.inf]
    return float(finite.abs().max()) if finite.numel() else 0.0

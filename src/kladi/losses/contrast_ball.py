"""The pair kernel of `contrast.py` for the Poincaré ball, where alikeness is minus the distance.

Same tables, same loss, same memory: symmetric tiles, recomputed in backward, never n x n. With y = sqrt(2c) g x,
w = sqrt(2c) g, p = w ||x||^2 and g = 1 / (1 - c ||x||^2), a tile of distances is one product:

    q_ik = cosh(sqrt(c) d_ik) - 1 = p_i w_k + w_i p_k - 2 y_i . y_k
    t_ik = sqrt(c) d_ik = log(1 + q + sinh t),     sinh t = sqrt(q (q + 2)) = dq / dt

(not from the cosh itself, whose 1 would swallow the digits of near pairs). Two things differ from the sphere. A
distance is no product, so positives are summed from the tiles, by class. And logits reach far below zero: they are
raised by one number for all pairs, so that one exponential a pair will do. Where it does not, which the sums tell, each
row keeps a running log-sum-exp.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from kladi.losses.contrast import OwnView, PairTables, _cast, _counted, _diagonal, _scaled
from kladi.losses.geometry import PoincareBall
from kladi.losses.pair_logsumexp import _greatest, _Pairs, _shares, _tile, by_class

TILE = 128
"""Rows of a tile, which has eight times as many keys (0.5 MB in float32): a few of them fit the cache of a core."""
KEPT = 16
"""Up to this many times TILE rows, tiles are kept for backward: two halves of a square of them."""
RUNS = 16
"""Runs of one class in a tile up to which it is met run by run; beyond, tables are gathered to the size of the tile."""
FLAT = 0.01
"""Curvature below which log1p, of twice the time, is due: the rounding of 1 + s is divided by a small sqrt(c)."""
FAR = 1e18
"""A chord that stands for none: its square is still a float32, and what is divided by its sinh is gone."""


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
        classes: row of the (symmetric) tables that each point belongs to; views of one sample belong to one.
        tile: rows of a tile; the value does not depend on it.

    Returns:
        the loss, a zero that keeps its graph if no row has a positive; the share of rows without one, detached.
    """
    tables = _cast(tables, points)
    views = 1 if own is None else views  # without a rule for views of one sample, a pair of them is like any other
    count = torch.bincount(classes, minlength=len(tables.weight)).to(points.dtype)
    mass = _counted(tables.weight, count, views) + (own.weight * (views - 1) if own is not None else 0)
    anchor = mass > 0
    anchors = (anchor * count).sum()
    idle = 1 - anchors / max(len(points), 1)
    if not bool(anchors > 0):
        return points.sum() * 0, idle
    order = by_class(classes, views)
    x, of_row = points.index_select(0, order), classes[order]
    share = torch.where(anchor, 1 / mass, 0) / anchors  # of a row of each class in the mean
    curvature = torch.as_tensor(ball.curvature, dtype=x.dtype, device=x.device)
    pairs = _BallPairs(x.detach(), of_row, tables, share, float(curvature.detach()), views=views, tile=tile)
    logsumexp, pulled = _Sums.apply(x, curvature, pairs)
    loss = pulled
    if tables.bias is not None:
        finite = tables.bias.masked_fill(tables.bias == -math.inf, 0)
        loss = loss - (share * count * _counted(_scaled(tables.weight, finite), count, views)).sum()
    if own is not None and views > 1:
        own_logits = _own_logits(x, of_row, tables, ball, own, views)
        logsumexp = torch.logaddexp(logsumexp, torch.logsumexp(own_logits, dim=1))
        loss = loss - own.weight * (share[of_row] * own_logits.sum(1)).sum()
    return loss + ((share * mass)[of_row] * torch.where(anchor[of_row], logsumexp, 0)).sum(), idle


def _own_logits(
    x: Tensor, classes: Tensor, tables: PairTables, ball: PoincareBall, own: OwnView, views: int
) -> Float[Tensor, "n others"]:
    """Logits of each row with the other views of its sample."""
    view = x.unflatten(0, (views, -1)).unbind()
    apart = {(a, b): ball.distance(view[a], view[b]) for a, b in itertools.combinations(range(views), 2)}
    others = [[apart[min(a, b), max(a, b)] for b in range(views) if a != b] for a in range(views)]
    distance = torch.cat([torch.stack(of_view, dim=1) for of_view in others])
    if own.scale is not None:
        return own.bias - own.scale * distance
    scale = tables.scale if tables.scale.ndim == 0 else _diagonal(tables.scale)[classes][:, None]
    logits = -scale * distance
    return logits if tables.bias is None else logits + _diagonal(tables.bias)[classes][:, None]


# --- tiles of pairs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lift:
    """Points on the hyperboloid X0^2 - |X|^2 = 1: G = X0 Y0 - X . Y is the cosh of sqrt(c) d, and X = sqrt(2) y.

    left, right: [n, D + 4], whose products are q = G - 1. y: [n, D]. first: X0. least: what q is at least. near: up to
    which q is rounding alone, whatever the rows, so that there is no direction from one to the other.
    """

    left: Tensor
    right: Tensor
    y: Tensor
    w: Tensor
    first: Tensor
    least: float
    near: float

    @staticmethod
    def of(x: Tensor, curvature: float) -> _Lift:
        """Lift points of the ball."""
        g = 1 / (1 - curvature * x.square().sum(1, keepdim=True))
        w = math.sqrt(2 * curvature) * g
        y = w * x
        # p of y as it was rounded, in two parts, so that near pairs lose no more digits than the product costs them.
        exact = y.double().square().sum(1, keepdim=True) / w
        p = exact.to(x)
        rest = (exact - p).to(x)
        # Sums that begin with the half of a product, and take the squares then, never get as long as the squares.
        first, last = y.tensor_split(2, dim=1)
        left = torch.cat([-2 * first, p, w, rest, w, -2 * last], 1)
        right = torch.cat([first, w, p, w, rest, last], 1)
        eps = torch.finfo(x.dtype).eps
        least = 2 * curvature * eps**2
        return _Lift(left, right, y, w, (2 * g - 1).squeeze(1), least, max(least, eps * float(p.min() * w.min())))

    def lower(self, x: Tensor, V: Tensor, first: Tensor, curvature: float) -> Tensor:
        """dL/dx from V = sum_k H_ik y_k and sum_k H_ik Y0_k, with H = dL/dG; by the chain rule."""
        inner = math.sqrt(2 * curvature) * (x * V).sum(1, keepdim=True)
        return 2 * self.w * (self.w * (first[:, None] - inner) * x - V)


class _Stripe(NamedTuple):
    """Rows of a tile that share one row of each table, or, where those were gathered to its size, all of its rows.

    scale: -A / sqrt(c), or None where it is one number. raised: B, raised like all logits. pull: as in `_BallPairs`.
    """

    part: slice
    scale: Any
    raised: Tensor
    pull: Any


class _Tile(NamedTuple):
    """Rows i, keys j, how many of those are rows too, what the tables say, and where positives are of one class only.

    blocks: their rows, keys and pull.
    """

    i: slice
    j: slice
    square: int
    stripes: list[_Stripe]
    blocks: list[tuple[slice, slice, float]]


class _BallPairs(_Pairs):
    """The pairs of rows, tile by tile: their distances, and what the tables say of them.

    pull: C_uv = share_u W_uv A_uv / sqrt(c) + the same of (v, u): C t is what the positives of a pair, in both its
    roles, add to the loss. None where there are none but own views.
    """

    def __init__(
        self, x: Tensor, classes: Tensor, tables: PairTables, share: Tensor, curvature: float, *, views: int, tile: int
    ) -> None:
        root = math.sqrt(curvature)
        super().__init__(classes, classes, tables.scale / -root, tables.bias, views=views, tile=tile)
        self.curvature, self.lift, self.kept = curvature, _Lift.of(x, curvature), len(x) <= KEPT * tile
        self.height = tile if x.device.type == "cpu" else 8 * tile  # a GPU waits for calls more than for memory
        self.width = 8 * self.height
        pull = _scaled(tables.weight, tables.scale) / root * (share if tables.weight.ndim == 1 else share[:, None])
        pull = pull + (pull if pull.ndim == 1 else pull.T)
        if views > 1 and pull.ndim == 1:  # a class is no longer one run of rows
            pull = torch.diag(pull)
        self.pull = pull if pull.ndim == 2 and bool((pull != 0).any()) else None
        run, counts = torch.unique_consecutive(classes, return_counts=True)
        ends = counts.cumsum(0)
        self.run, self.starts, self.ends = run, (ends - counts).tolist(), ends.tolist()
        self.pulls = pull[run].tolist() if pull.ndim == 1 else [0.0] * len(run)
        # Logits are at most B: raised by no more than `most`, sums of their exponentials do not overflow. Nor are they
        # raised more than they may need, which would cost those near zero their last digits.
        finite, bias = torch.finfo(x.dtype), _greatest(tables.bias)
        most = math.log(finite.max) - 4 - math.log(len(x)) - bias
        reach = 2 * math.acosh(max(float(self.lift.first.max()), 1))  # no two points are farther apart
        lowest = -float(tables.scale.abs().max()) / root * reach - bias
        self.rise = min(most, max(-60 - lowest, 0.0))
        self.raised = x.new_tensor(self.rise)
        # A raised sum of at least this has lost nothing to numbers that are too small to be held.
        self.least_sum = len(x) * finite.tiny / finite.eps
        # exp is several times slower where it underflows. What it gives here is nothing beside a sum that is accepted.
        floor, cut = math.log(finite.tiny) + 2, tables.bias is not None and bool((tables.bias == -math.inf).any())
        self.floor = None if cut or lowest + self.rise > floor else floor

    def all_tiles(self) -> Iterator[_Tile]:
        """The tiles on and above the diagonal."""
        for i, j, beyond in self.tiles():
            # Runs of one class that have rows in the tile, and which rows.
            runs = range(bisect.bisect_right(self.ends, i.start), bisect.bisect_left(self.starts, i.stop))
            parts = [self.part(run, i) for run in runs]
            blocks = [(rows, self.part(run, j), self.pulls[run]) for run, rows in zip(runs, parts, strict=True)]
            blocks = [block for block in blocks if block[2] and block[1].start < block[1].stop]
            yield _Tile(i, j, beyond.start - j.start, self.read(i, j, parts, runs), blocks)

    def part(self, run: int, of: slice) -> slice:
        """Which of some rows are of a run."""
        start, stop = max(self.starts[run], of.start), min(self.ends[run], of.stop)
        return slice(start - of.start, max(start, stop) - of.start)

    def read(self, i: slice, j: slice, parts: list[slice], runs: range) -> list[_Stripe]:
        """The tables for a tile, run by run of its rows."""
        if len(runs) > RUNS or (self.scale is None and self.bias is None and self.pull is None):
            parts, rows = [slice(0, i.stop - i.start)], self.classes[i]
        else:
            rows = self.run[runs.start : runs.stop]

        def gathered(table: Tensor | None) -> list[Any]:
            if table is None:
                return [None] * len(parts)
            found = table.index_select(0, rows).index_select(1, self.classes[j])
            return [found] if len(runs) > RUNS else list(found.unbind())

        bias = [self.raised if b is None else b + self.rise for b in gathered(self.bias)]
        return [_Stripe(*s) for s in zip(parts, gathered(self.scale), bias, gathered(self.pull), strict=True)]

    def paired(self) -> Tensor:
        """Whether each row has a pair at all."""
        if self.bias is None:
            return torch.full_like(self.classes, len(self.classes) > self.views, dtype=torch.bool)
        count = torch.bincount(self.classes, minlength=len(self.bias)).to(self.bias)
        return (_counted((self.bias > -math.inf).to(count), count, self.views) > 0)[self.classes]

    def angles(self, i: slice, j: slice, one: Tensor, two: Tensor, apart: bool) -> tuple[Tensor, Tensor]:
        """t = sqrt(c) d and sinh(t) / sqrt(2) of a tile.

        apart: points that (all but) meet count as far from each other, for there the distance has no gradient. Without
        it, a row is at distance zero of those that it is no pair with.
        """
        q = torch.mm(self.lift.left[i], self.lift.right[j].T, out=_tile(one, i, j))
        q = torch.threshold_(q, self.lift.near, FAR) if apart else q.clamp_min_(self.lift.least)
        sinh = torch.addcmul(q, q, q, value=0.5, out=_tile(two, i, j)).sqrt_()
        t = q.add_(sinh, alpha=math.sqrt(2))
        t = t.log1p_() if self.curvature < FLAT else t.add_(1).log_()
        if not apart:
            self.erase(t, i, j, 0.0)
        return t, sinh

    def raise_logits(self, t: Tensor, stripes: list[_Stripe]) -> Tensor:
        """-A d + B, raised, in the place of t."""
        for s in stripes:
            part = t[s.part]
            if s.scale is None:
                torch.add(s.raised, part, alpha=self.number, out=part)
            else:
                torch.addcmul(s.raised, part, s.scale, out=part)
        return t

    def exponentials(self, t: Tensor, stripes: list[_Stripe]) -> Tensor:
        """exp of the raised logits, in the place of t."""
        logits = self.raise_logits(t, stripes)
        return (logits if self.floor is None else logits.clamp_min_(self.floor)).exp_()

    def weigh(self, each: Tensor, tile: _Tile, room: Tensor) -> Tensor:
        """-A (each_i + each_k) / sqrt(c) of a tile."""
        weights, mine, theirs = _tile(room, tile.i, tile.j), each[tile.i, None], each[tile.j]
        if self.scale is None:
            return torch.add(self.number * mine, self.number * theirs, out=weights)
        for s in tile.stripes:
            torch.addcmul(s.scale * theirs, mine[s.part], s.scale, out=weights[s.part])
        return weights

    def slopes(self, push: Tensor, sinh: Tensor, pull: float, tile: _Tile) -> Tensor:
        """H_ik = (push + pull C) / sinh of a tile, in the place of the push; 0 where there is no pair."""
        for rows, keys, of_class in tile.blocks:
            push[rows, keys].add_(pull * of_class)
        for s in tile.stripes:
            if s.pull is not None:
                push[s.part].add_(pull * s.pull)
        push.div_(sinh)
        self.erase(push, tile.i, tile.j, 0.0)
        return push


# --- sums over pairs -------------------------------------------------------------------------------------------------


class _Sums(torch.autograd.Function):
    """The log-sum-exp of each row over its pairs, -inf where there is none; and the sum of C t over all pairs."""

    @staticmethod
    @override
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, x: Tensor, curvature: Tensor, pairs: _BallPairs
    ) -> tuple[Tensor, Tensor]:
        # What is kept has no distances, and a learned curvature asks for them.
        keep = pairs.kept and ctx.needs_input_grad[0] and not curvature.requires_grad
        found = _sums(pairs, raised=True, keep=keep)
        ctx.pairs, ctx.raised = pairs, bool(found)
        total, pulled, *kept = found or _sums(pairs, raised=False)
        ctx.save_for_backward(x, total, pulled, *kept)
        return total - pairs.rise, pulled

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor | None, None]:  # pyrefly: ignore[bad-override]
        """H_ik = dL/dt_ik / sinh t_ik, and from there two products a tile as on the sphere.

        d(x, y) is sqrt(c) d in the ball of curvature -1, of sqrt(c) x and sqrt(c) y, over sqrt(c). Hence, points held,
        2c dL/dc = sum_i x_i . dL/dx_i - sum over pairs of t dL/dt.
        """
        x, total, pulled, *kept = ctx.saved_tensors
        by_sum, pull, learned = gradients[0], float(gradients[1]), ctx.needs_input_grad[1]
        turned = pull * pulled  # the sum over pairs of t dL/dt
        pairs: _BallPairs = ctx.pairs
        lift, V, first = pairs.lift, torch.zeros_like(x), torch.zeros_like(x[:, 0])
        alone = total == -math.inf  # a row without a pair: nothing to push, and exp(inf) must not be met
        each, total = torch.where(alone, 0, by_sum * torch.exp(-total)), torch.where(alone, 0, total)
        one, two, three = (pairs.room(x) for _ in range(3))
        with torch.autocast(x.device.type, enabled=False):  # backward may be called where autocast is on
            for step, tile in enumerate(pairs.all_tiles()):
                i, j = tile.i, tile.j
                t, sinh = kept[2 * step : 2 * step + 2] if kept else pairs.angles(i, j, one, two, apart=True)
                held = torch.where(sinh < FAR / 2, t, 0) if learned else None
                if ctx.raised:
                    push = pairs.weigh(each, tile, three).mul_(t if kept else pairs.exponentials(t, tile.stripes))
                else:
                    push = _shares(pairs.raise_logits(t, tile.stripes), by_sum, total, i, j, pairs, three)
                    for s in tile.stripes:
                        push[s.part].mul_(pairs.number if s.scale is None else s.scale)
                if held is not None:
                    pairs.erase(push, i, j, 0.0)
                    turning = held.mul_(push).sum(0)
                    turned = turned + turning.sum() - 0.5 * turning[: tile.square].sum()
                H, beyond = pairs.slopes(push, sinh, pull, tile), slice(j.start + tile.square, j.stop)
                V[i].addmm_(H, lift.y[j])
                V[beyond].addmm_(H[:, tile.square :].T, lift.y[i])
                first[i].addmv_(H, lift.first[j])
                first[beyond].addmv_(H[:, tile.square :].T, lift.first[i])
            half = math.sqrt(0.5)  # sinh came without its sqrt(2)
            of_x = lift.lower(x, half * V, half * first, pairs.curvature)
            of_curvature = ((x * of_x).sum() - turned) / (2 * pairs.curvature) if learned else None
            return of_x, of_curvature, None


def _sums(pairs: _BallPairs, raised: bool, keep: bool = False) -> list[Tensor]:
    """Raised log-sum-exps, the sum of C t, and what is kept of each tile for backward: its exponentials and its sinh.

    raised: one exponential a pair; nothing at all where a sum overflows, or is too small to have kept all its digits.
    Otherwise, for logits of any size, log-sum-exps of tiles, joined.
    """
    kept: list[Tensor] = []
    pulled: list[Tensor] = []
    like = pairs.lift.first
    total, ones = torch.full_like(like, 0 if raised else -math.inf), like.new_ones(pairs.width)
    paired, one, two = pairs.paired(), pairs.room(like), pairs.room(like)
    for tile in pairs.all_tiles():
        i, j, beyond = tile.i, tile.j, slice(tile.j.start + tile.square, tile.j.stop)
        if keep:
            one, two = pairs.room(like), pairs.room(like)
        t, sinh = pairs.angles(i, j, one, two, apart=False)
        pulled += _pulled(t, tile)
        if not raised:
            logits = pairs.raise_logits(t, tile.stripes)
            pairs.erase(logits, i, j)
            total[i] = torch.logaddexp(total[i], torch.logsumexp(logits, dim=1))
            total[beyond] = torch.logaddexp(total[beyond], torch.logsumexp(logits[:, tile.square :], dim=0))
            continue
        e = pairs.exponentials(t, tile.stripes)
        pairs.erase(e, i, j, 0.0)
        total[i].addmv_(e, ones[: e.shape[1]])  # a product with ones is the fastest sum
        total[beyond].addmv_(e[:, tile.square :].T, ones[: len(e)])
        held = (total[i] > pairs.least_sum) & (total[i] < math.inf)
        if j.stop == len(like) and not bool((held | ~paired[i]).all()):  # the last tile of these rows
            return []
        if keep:
            kept += [e, torch.threshold_(sinh, 1.001 * math.sqrt(pairs.lift.near), FAR)]
    return [total.log() if raised else total, torch.stack(pulled).sum() if pulled else like.new_zeros(()), *kept]


def _pulled(t: Tensor, tile: _Tile) -> list[Tensor]:
    """Sums of C t over parts of the pairs that a tile serves; those of its square are met from both sides."""
    sums: list[Tensor] = []
    square, ones = tile.square, t.new_ones(len(t))
    for rows, keys, pull in tile.blocks:
        middle = min(max(square, keys.start), keys.stop)
        if keys.start < middle:
            sums.append(0.5 * pull * t[rows, keys.start : middle].sum())
        if middle < keys.stop:
            sums.append(pull * t[rows, middle : keys.stop].sum())
    for s in tile.stripes:
        if s.pull is not None:
            of_keys = ones[s.part] @ t[s.part] * s.pull if s.pull.ndim == 1 else (s.pull * t[s.part]).sum(0)
            sums.append(of_keys.sum() - 0.5 * of_keys[:square].sum())
    return sums

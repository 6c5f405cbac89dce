"""The pair kernel of `contrast.py` for the Poincaré ball, where alikeness is minus the distance.

Same tables, same loss, same memory: symmetric tiles, recomputed in backward, never n x n. With y = sqrt(2c) g x,
w = sqrt(2c) g, p = w ||x||^2 and g = 1 / (1 - c ||x||^2), a tile of distances is one product of width D + 2:

    q_ik = cosh(sqrt(c) d_ik) - 1 = p_i w_k + w_i p_k - 2 y_i . y_k
    t_ik = sqrt(c) d_ik = log(1 + q + sinh t),     sinh t = sqrt(q (q + 2)) = dq / dt

(q from squared distances, and not from the cosh, whose 1 would swallow the digits of near pairs). Two things differ
from the sphere. A distance is no product, so the positives are summed from the tiles, by class. And logits reach far
below zero: they are raised by one number for all pairs, so that one exponential a pair will do. Where that fails, which
the sums tell, each row keeps a running log-sum-exp instead.
"""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from kladi.losses.contrast import OwnView, PairTables, _cast, _counted, _diagonal, _scaled
from kladi.losses.geometry import PoincareBall
from kladi.losses.pair_logsumexp import _greatest, _Pairs, _shares, _tile

TILE = 128
"""Rows of a tile, which has eight times as many keys (0.5 MB in float32): a few of them fit the cache of a core."""
KEPT = 16
"""Up to this many times TILE rows, tiles are kept for backward: two halves of a square of them."""
RUNS = 16
"""Runs of one class in a tile up to which it is met run by run; beyond, tables are gathered to the size of the tile."""
FLAT = 0.01
"""Curvature below which sqrt(c) d = log(1 + s) needs log1p, which takes three times as long: the rounding of 1 + s is
then divided by a small sqrt(c)."""
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
    order = _by_class(classes, views)
    x, of_row = points.index_select(0, order), classes[order]
    share = torch.where(anchor, 1 / mass, 0) / anchors  # of a row of each class in the mean
    pairs = _BallPairs(of_row, tables, share, ball.curvature, _reach(x, ball.curvature), views=views, tile=tile)
    logsumexp, pulled = _Sums.apply(x, pairs)
    loss = pulled.to(x.dtype)
    if tables.bias is not None:
        finite = tables.bias.masked_fill(tables.bias == -math.inf, 0)
        loss = loss - (share * count * _counted(_scaled(tables.weight, finite), count, views)).sum()
    if own is not None and views > 1:
        own_logits = _own_logits(x, of_row, tables, ball, own, views)
        logsumexp = torch.logaddexp(logsumexp, torch.logsumexp(own_logits, dim=1))
        loss = loss - own.weight * (share[of_row] * own_logits.sum(1)).sum()
    return loss + ((share * mass)[of_row] * torch.where(anchor[of_row], logsumexp, 0)).sum(), idle


def _by_class(classes: Tensor, views: int) -> Int[Tensor, " n"]:
    """An order of rows with those of one class side by side, in all views alike."""
    samples = len(classes) // views
    order = torch.argsort(classes[:samples])
    return torch.cat([order + view * samples for view in range(views)])


def _reach(x: Tensor, curvature: float) -> float:
    """The most that sqrt(c) d can be: twice that of the row farthest from the origin."""
    share = math.sqrt(curvature) * float(x.detach().norm(dim=1).max())
    return 4 * math.atanh(min(share, 1 - torch.finfo(x.dtype).eps))


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


@dataclass(frozen=True)
class _Stripe:
    """Rows of a tile that share one row of each table, or, where those were gathered to its size, all of its rows.

    scale: -A / sqrt(c), or None where it is one number. raised: B, raised like all logits. pull: as in `_BallPairs`.
    """

    part: slice
    scale: Tensor | None
    raised: Tensor
    pull: Tensor | None


class _BallPairs(_Pairs):
    """The pairs of rows, tile by tile: their distances, and what the tables say of them.

    pull: C_uv = share_u W_uv A_uv / sqrt(c) + the same of (v, u): C t is what the positives of a pair, in both its
    roles, add to the loss. None where there are none but own views.
    """

    def __init__(
        self,
        classes: Tensor,
        tables: PairTables,
        share: Tensor,
        curvature: float,
        reach: float,
        *,
        views: int,
        tile: int,
    ) -> None:
        root = math.sqrt(curvature)
        super().__init__(classes, classes, tables.scale / -root, tables.bias, views=views, tile=tile)
        self.curvature = curvature
        if classes.device.type != "cpu":
            tile *= 8  # a GPU waits for calls more than for memory
        self.height, self.width, self.kept = tile, 8 * tile, len(classes) <= KEPT * tile
        pull = _scaled(tables.weight, tables.scale) / root * (share if tables.weight.ndim == 1 else share[:, None])
        pull = pull + (pull if pull.ndim == 1 else pull.T)
        if views > 1 and pull.ndim == 1:  # a class is no longer one run of rows
            pull = torch.diag(pull)
        self.pull = pull if bool((pull != 0).any()) else None
        run, counts = torch.unique_consecutive(classes, return_counts=True)
        ends = counts.cumsum(0)
        self.run, self.starts, self.ends = run, (ends - counts).tolist(), ends.tolist()
        self.pulls = pull[run].tolist() if self.pull is not None and pull.ndim == 1 else []
        # Logits are at most B: raised by no more than `most`, sums of their exponentials do not overflow. Nor are they
        # raised more than they may need, which would cost those near zero their last digits.
        finite, bias = torch.finfo(share.dtype), _greatest(tables.bias)
        most = math.log(finite.max) - 4 - math.log(len(classes)) - bias
        lowest = -float(tables.scale.abs().max()) / root * reach - bias
        self.rise = min(most, max(-60 - lowest, 0.0))
        # exp is several times slower where it underflows. What it gives here is nothing beside a sum that is accepted.
        floor, cut = math.log(finite.tiny) + 2, tables.bias is not None and bool((tables.bias == -math.inf).any())
        self.floor = None if cut or lowest + self.rise > floor else floor
        self.raised = share.new_tensor(self.rise)
        # A raised sum of at least this has lost nothing to numbers that are too small to be held.
        self.least_sum = len(classes) * finite.tiny / finite.eps

    def runs(self, i: slice) -> range:
        """Which runs of one class have rows in a tile."""
        return range(bisect.bisect_right(self.ends, i.start), bisect.bisect_left(self.starts, i.stop))

    def part(self, run: int, of: slice) -> slice:
        """Which of some rows are of a run."""
        start, stop = max(self.starts[run], of.start), min(self.ends[run], of.stop)
        return slice(start - of.start, max(start, stop) - of.start)

    @override
    def stripes(self, i: slice, j: slice) -> list[_Stripe]:  # pyrefly: ignore[bad-override]
        """What the tables say of a tile, run by run of its rows."""
        pull = None if self.pulls else self.pull
        if self.scale is None and self.bias is None and pull is None:
            return [_Stripe(slice(0, i.stop - i.start), None, self.raised, None)]
        runs = self.runs(i)
        if len(runs) > RUNS:
            parts, rows = [slice(0, i.stop - i.start)], self.classes[i]
        else:
            parts, rows = [self.part(r, i) for r in runs], self.run[runs.start : runs.stop]

        def gathered(table: Tensor | None) -> list[Any]:
            if table is None:
                return [None] * len(parts)
            found = table.index_select(0, rows).index_select(1, self.classes[j])
            return [found] if len(runs) > RUNS else list(found.unbind())

        bias = [self.raised if b is None else b + self.rise for b in gathered(self.bias)]
        return [_Stripe(*s) for s in zip(parts, gathered(self.scale), bias, gathered(pull), strict=True)]

    def blocks(self, i: slice, j: slice) -> list[tuple[slice, slice, float]]:
        """Where a tile has positives, and the pull of them, for a table that is zero off its diagonal."""
        places = [(self.part(r, i), self.part(r, j), self.pulls[r]) for r in (self.runs(i) if self.pulls else ())]
        return [(rows, keys, pull) for rows, keys, pull in places if pull and keys.start < keys.stop]

    def paired(self) -> Tensor:
        """Whether each row has a pair at all."""
        count = torch.bincount(self.classes, minlength=0 if self.bias is None else len(self.bias)).to(self.raised)
        met = torch.ones_like(count[:, None]) * (count > 0) if self.bias is None else self.bias > -math.inf
        return (_counted(met.to(count), count, self.views) > 0)[self.classes]

    def angles(self, lift: _Lift, i: slice, j: slice, one: Tensor, two: Tensor, apart: bool) -> tuple[Tensor, Tensor]:
        """t = sqrt(c) d and sinh(t) / sqrt(2) of a tile.

        apart: points that (all but) meet count as far from each other, for there the distance has no gradient.
        """
        q = torch.mm(lift.left[i], lift.right[j].T, out=_tile(one, i, j))
        q = torch.threshold_(q, lift.near, FAR) if apart else q.clamp_min_(lift.least)
        sinh = torch.addcmul(q, q, q, value=0.5, out=_tile(two, i, j)).sqrt_()
        t = q.add_(sinh, alpha=math.sqrt(2))
        return (t.log1p_() if self.curvature < FLAT else t.add_(1).log_()), sinh

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

    def pulled(self, t: Tensor, i: slice, j: slice, beyond: slice, stripes: list[_Stripe]) -> list[Tensor]:
        """Sums of C t over parts of the pairs that a tile serves; those of its square are met from both sides."""
        square, ones, sums = beyond.start - j.start, t.new_ones(len(t)), []
        for rows, keys, pull in self.blocks(i, j):
            middle = min(max(square, keys.start), keys.stop)
            if keys.start < middle:
                sums.append(0.5 * pull * t[rows, keys.start : middle].sum())
            if middle < keys.stop:
                sums.append(pull * t[rows, middle : keys.stop].sum())
        for s in stripes:
            if s.pull is not None:
                of_keys = ones[s.part] @ t[s.part] * s.pull if s.pull.ndim == 1 else (s.pull * t[s.part]).sum(0)
                sums.append(of_keys.sum() - 0.5 * of_keys[:square].sum())
        return sums

    def slopes(
        self,
        e: Tensor,
        sinh: Tensor,
        each: Tensor | None,
        pull: float,
        i: slice,
        j: slice,
        stripes: list[_Stripe],
        room: Tensor,
    ) -> Tensor:
        """H_ik = (pull C - A e_ik (each_i + each_k) / sqrt(c)) / sinh of a tile; `each` None: it is in e already."""
        H = _tile(room, i, j)
        if each is None:
            for s in stripes:
                torch.mul(e[s.part], self.number if s.scale is None else s.scale, out=H[s.part])
        else:
            self.weigh(each, i, j, stripes, H).mul_(e)
        for rows, keys, of_class in self.blocks(i, j):
            H[rows, keys].add_(pull * of_class)
        for s in stripes:
            if s.pull is not None:
                H[s.part].add_(pull * s.pull)
        H.div_(sinh)
        self.erase(H, i, j, 0.0)
        return H

    def weigh(self, each: Tensor, i: slice, j: slice, stripes: list[_Stripe], H: Tensor) -> Tensor:
        """-A (each_i + each_k) / sqrt(c) of a tile."""
        if self.scale is None:
            each = self.number * each
            return torch.add(each[i, None], each[j], out=H)
        for s in stripes:
            torch.addcmul(s.scale * each[j], each[i][s.part, None], s.scale, out=H[s.part])
        return H


class _Sums(torch.autograd.Function):
    """The log-sum-exp of each row over its pairs, -inf where there is none; and the sum of C t over all pairs."""

    @staticmethod
    @override
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, x: Tensor, pairs: _BallPairs
    ) -> tuple[Tensor, Tensor]:
        lift, keep = _Lift.of(x, pairs.curvature), pairs.kept and ctx.needs_input_grad[0]
        found = _raised(lift, pairs, keep)
        ctx.raised = found is not None
        total, pulled, kept = found or _online(lift, pairs)
        ctx.pairs = pairs
        ctx.save_for_backward(x, total, *kept)
        return total - pairs.rise, pulled

    @staticmethod
    @once_differentiable
    @override
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *gradients: Any
    ) -> tuple[Tensor, None]:
        """H_ik = dL/dt_ik / sinh t_ik, and from there two products a tile as on the sphere."""
        x, total, *kept = ctx.saved_tensors
        by_sum, by_pull = gradients
        pairs: _BallPairs = ctx.pairs
        with torch.autocast(x.device.type, enabled=False):  # backward may be called where autocast is on
            lift = _Lift.of(x, pairs.curvature)
            alone = total == -math.inf
            total = torch.where(alone, 0, total)
            each = torch.where(alone, 0, by_sum * torch.exp(-total)) if ctx.raised else None
            pull = float(by_pull)
            V, first = torch.zeros_like(x), torch.zeros_like(x[:, 0])
            one, two, three = (pairs.room(x) for _ in range(3))
            for step, (i, j, beyond) in enumerate(pairs.tiles()):
                stripes = pairs.stripes(i, j)
                if kept:
                    e, sinh = kept[2 * step : 2 * step + 2]
                else:
                    t, sinh = pairs.angles(lift, i, j, one, two, apart=True)
                    if ctx.raised:
                        e = pairs.exponentials(t, stripes)
                    else:
                        e = _shares(pairs.raise_logits(t, stripes), by_sum, total, i, j, pairs, three)
                H = pairs.slopes(e, sinh, each, pull, i, j, stripes, three)
                below = H[:, beyond.start - j.start :].T
                V[i].addmm_(H, lift.y[j])
                V[beyond].addmm_(below, lift.y[i])
                first[i].addmv_(H, lift.first[j])
                first[beyond].addmv_(below, lift.first[i])
            half = math.sqrt(0.5)
            return lift.lower(x, half * V, half * first, pairs.curvature), None


Found = tuple[Tensor, Tensor, list[Tensor]]
"""Raised log-sum-exps, the pulled sum, and the tiles kept for backward: of each, its exponentials and its sinh."""


def _raised(lift: _Lift, pairs: _BallPairs, keep: bool) -> Found | None:
    """One exponential a pair; None where a row's sum overflows, or is too small to have kept all its digits."""
    like, kept, pulled = lift.first, [], []
    sums, ones, paired = torch.zeros_like(like), like.new_ones(max(pairs.width, pairs.height)), pairs.paired()
    one, two = pairs.room(like), pairs.room(like)
    for i, j, beyond in pairs.tiles():
        if keep:
            one, two = pairs.room(like), pairs.room(like)
        stripes = pairs.stripes(i, j)
        t, sinh = pairs.angles(lift, i, j, one, two, apart=False)
        pairs.erase(t, i, j, 0.0)
        pulled += pairs.pulled(t, i, j, beyond, stripes)
        e = pairs.exponentials(t, stripes)
        pairs.erase(e, i, j, 0.0)
        sums[i].addmv_(e, ones[: e.shape[1]])
        sums[beyond].addmv_(e[:, beyond.start - j.start :].T, ones[: len(e)])
        if keep:
            kept += [e, torch.threshold_(sinh, 1.001 * math.sqrt(lift.near), FAR)]
        if j.stop == len(like) and not bool(((sums[i] > pairs.least_sum) & (sums[i] < math.inf) | ~paired[i]).all()):
            return None
    return sums.log(), _total(pulled, like), kept


def _online(lift: _Lift, pairs: _BallPairs) -> Found:
    """The same for logits of any size: log-sum-exps of tiles, joined."""
    like, pulled = lift.first, []
    total, one, two = torch.full_like(like, -math.inf), pairs.room(like), pairs.room(like)
    for i, j, beyond in pairs.tiles():
        stripes = pairs.stripes(i, j)
        t, _ = pairs.angles(lift, i, j, one, two, apart=False)
        pairs.erase(t, i, j, 0.0)
        pulled += pairs.pulled(t, i, j, beyond, stripes)
        logits = pairs.raise_logits(t, stripes)
        pairs.erase(logits, i, j)
        total[i] = torch.logaddexp(total[i], torch.logsumexp(logits, dim=1))
        below = logits[:, beyond.start - j.start :]
        total[beyond] = torch.logaddexp(total[beyond], torch.logsumexp(below, dim=0))
    return total, _total(pulled, like), []


def _total(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(parts).sum() if parts else like.new_zeros(())

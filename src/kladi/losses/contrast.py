"""The one kernel behind every pairwise loss: tables between label classes in, a scalar out, never an n x n matrix.

A loss author says, for each pair of *classes*, how positive it is (W), how its similarity becomes a logit (A, with the
temperature in it; B added), and what an anchor's sum is divided by. For unit rows x and s_ik = x_i . x_k the loss is

    l_ik = A s_ik + B                                   (A, B, W at the classes of i and k)
    L_i  = ( m_i logsumexp_{k != i} l_ik - sum_{j != i} W_ij l_ij ) / d_i,       m_i = sum_{j != i} W_ij
    loss = mean of L_i over anchors, the rows with d_i > 0

Two facts make it cheap. The positives need no pair: with Z_u the sum of the rows of class u, the W A s of all pairs
between u and v sum to (W A)_uv Z_u . Z_v, and m and d are the same for all rows of a class. And the log-sum-exp
(`pair_logsumexp.py`) is symmetric in its pairs: one tile of similarities serves the rows of i and those of k. So all
of it costs half a product forward and one and a half backward, against three for a dense matrix, in O(n D + tile^2)
memory.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kladi.losses.pair_logsumexp import TILE, pair_logsumexp


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
        classes: the row of the tables that each point belongs to; views of one sample belong to one.
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
    if keys is not None and key_classes is None:
        raise ValueError("keys need key_classes")
    with torch.autocast(points.device.type, enabled=False):
        x = points if points.dtype == torch.float64 else points.float()
        y = None if keys is None else keys.to(x.dtype)
        tables = _cast(tables, x)
        excluded = 0 if y is not None else views if own is not None else 1
        count = torch.bincount(classes, minlength=len(tables.weight)).to(x.dtype)
        met = count if key_classes is None else torch.bincount(key_classes, minlength=len(count)).to(x.dtype)
        mass = _counted(tables.weight, met, excluded)
        divisor = mass if tables.positive is None else _counted(tables.positive, met, excluded)
        own_views_apart = False
        if own is not None:
            mass = mass + own.weight * (views - 1)
            divisor = divisor + (own.weight if tables.positive is None else 1) * (views - 1)
            own_views_apart = views > 1 and not (own.scale is None and tables.bias is None)

        anchor = divisor[classes] > 0
        idle = 1 - anchor.to(x.dtype).mean() if len(x) else x.new_ones(())
        if not bool(anchor.any()):
            return x.sum() * 0, idle
        masked_views = views if own_views_apart else 1
        logsumexp = pair_logsumexp(
            x, classes, tables.scale, tables.bias, views=masked_views, keys=y, key_classes=key_classes, tile=tile
        )
        # After the tiles, so that backward is through with all this before it needs room for tiles.
        share = torch.where(divisor > 0, 1 / divisor, 0) / anchor.sum()  # of a row of each class in the mean
        attraction = _attraction(x, classes, tables, share, count, met, excluded, y, key_classes)
        if own is not None and views > 1:
            own_logits = _own_logits(x, classes, tables, own, views)
            attraction = attraction + own.weight * (share[classes] * own_logits.sum(1)).sum()
            if own_views_apart:
                logsumexp = torch.logaddexp(logsumexp, torch.logsumexp(own_logits, dim=1))
        return ((share * mass)[classes] * torch.where(anchor, logsumexp, 0)).sum() - attraction, idle


# --- positives: sums over classes, in plain autograd ---------------------------------------------------------------


def _counted(table: Tensor, met: Tensor, excluded: int) -> Float[Tensor, " U"]:
    """Sum of a table over the pairs of a row of each class, of which `met` rows are there.

    excluded: how many rows of its own class a row does not meet: 0 of keys that stand apart, 1 (itself), or its views.

    Nothing is subtracted that is not a whole number, so that no weight is lost beside a greater one, and a row without
    a positive has exactly none of it.
    """
    among = _diagonal(table) * (met - excluded).clamp_min(0)
    return among if table.ndim == 1 else among + _off_diagonal(table) @ met


def _attraction(
    x: Tensor,
    classes: Tensor,
    tables: PairTables,
    share: Tensor,
    count: Tensor,
    met: Tensor,
    excluded: int,
    keys: Tensor | None,
    key_classes: Tensor | None,
) -> Float[Tensor, ""]:
    """sum_i share_i sum_j W_ij l_ij over the pairs that the tables speak of, from sums over classes.

    count, met: rows of each class among the anchors, and among those they meet.
    """
    sums = x.new_zeros(len(share), x.shape[1]).index_add(0, classes, x)
    pull = _scaled(tables.weight, tables.scale)
    if keys is not None and key_classes is not None:
        others = torch.zeros_like(sums).index_add(0, key_classes, keys)
        pulled = pull @ others if pull.ndim == 2 else pull[:, None] * others
        total = (share[:, None] * sums * pulled).sum()
    else:
        samples = x if excluded == 1 else x.unflatten(0, (excluded, -1)).sum(0)
        alone = x.new_zeros(len(share)).index_add(0, classes[: len(samples)], samples.square().sum(1))
        among = torch.where(met > excluded, sums.square().sum(1) - alone, 0)
        total = (share * _diagonal(pull) * among).sum()
        if pull.ndim == 2:
            total = total + (share[:, None] * sums * (_off_diagonal(pull) @ sums)).sum()
    if tables.bias is not None:
        finite = tables.bias.masked_fill(tables.bias == -math.inf, 0)
        total = total + (share * count * _counted(_scaled(tables.weight, finite), met, excluded)).sum()
    return total


def _own_logits(x: Tensor, classes: Tensor, tables: PairTables, own: OwnView, views: int) -> Float[Tensor, "n others"]:
    """Logits of each row with the other views of its sample."""
    view = x.unflatten(0, (views, -1)).unbind()
    cosine = {(a, b): (view[a] * view[b]).sum(-1) for a, b in itertools.combinations(range(views), 2)}
    others = [[cosine[min(a, b), max(a, b)] for b in range(views) if a != b] for a in range(views)]
    logits = torch.cat([torch.stack(of_view, dim=1) for of_view in others])
    if own.scale is not None:
        return own.scale * logits + own.bias
    scale = tables.scale if tables.scale.ndim == 0 else _diagonal(tables.scale)[classes][:, None]
    return scale * logits  # a bias of the tables does not reach own views: they are always compared


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

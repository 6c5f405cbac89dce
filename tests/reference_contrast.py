"""The pair kernel once more, in float64: a double loop, and the same sums as dense n x n arithmetic.

Both take what `kladi.losses.contrast.contrast` takes and share no line with it. Autograd through `dense` gives
reference gradients; `loops` is for a handful of rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kladi.losses.contrast import OwnView, PairTables


def entry(table: Tensor | None, u: int, v: int, otherwise: float) -> float:
    if table is None:
        return otherwise
    if table.ndim == 0:
        return float(table)
    if table.ndim == 1:
        return float(table[u]) if u == v else 0.0
    return float(table[u, v])


def loops(
    points: Tensor,
    classes: Tensor,
    tables: PairTables,
    *,
    views: int = 1,
    own: OwnView | None = None,
    keys: Tensor | None = None,
    key_classes: Tensor | None = None,
) -> tuple[float, float]:
    """(loss, idle), pair by pair, as the docstring of `contrast` words it."""
    x = points.double().tolist()
    y = x if keys is None else keys.double().tolist()
    of_row = classes.tolist()
    of_key = of_row if key_classes is None else key_classes.tolist()
    samples = len(x) // views
    values = []
    for i in range(len(x)):
        logits, weights, counts = [], [], []
        for k in range(len(y)):
            if keys is None and i == k:
                continue
            cosine = sum(a * b for a, b in zip(x[i], y[k], strict=True))
            u, v = of_row[i], of_key[k]
            weight = entry(tables.weight, u, v, 0)
            scale = entry(tables.scale, u, v, 1)
            bias = entry(tables.bias, u, v, 0)
            positive = weight if tables.positive is None else entry(tables.positive, u, v, 0)
            if own is not None and i % samples == k % samples:
                weight = own.weight
                positive = own.weight if tables.positive is None else 1
                bias = 0
                if own.scale is not None:
                    scale, bias = own.scale, own.bias
            logits.append(scale * cosine + bias)
            weights.append(weight)
            counts.append(positive)
        if sum(counts) > 0:
            top = max(logits)
            log_sum = top + math.log(sum(math.exp(value - top) for value in logits))
            terms = (w * (log_sum - value) for w, value in zip(weights, logits, strict=True) if w > 0)
            values.append(sum(terms) / sum(counts))
    return (
        sum(values) / len(values) if values else 0.0,
        1 - len(values) / len(x) if x else 1.0,
    )


def dense(
    points: Tensor,
    classes: Tensor,
    tables: PairTables,
    *,
    views: int = 1,
    own: OwnView | None = None,
    keys: Tensor | None = None,
    key_classes: Tensor | None = None,
) -> Tensor:
    """The loss, with n x m matrices of everything."""
    y, of_key = (points, classes) if keys is None else (keys, key_classes)

    def spread(table: Tensor) -> Tensor:
        full = {0: lambda t: t.expand(len(points), len(y)), 1: torch.diag, 2: lambda t: t}[table.ndim](table)
        return full if table.ndim == 0 else full[classes[:, None], of_key[None, :]]

    weight, scale = spread(tables.weight), spread(tables.scale)
    bias = torch.zeros_like(weight) if tables.bias is None else spread(tables.bias)
    positive = weight if tables.positive is None else spread(tables.positive)
    if own is not None:
        sample = torch.arange(len(points)) % (len(points) // views)
        same = sample[:, None] == sample
        positive = torch.where(
            same, torch.ones_like(positive) * (1 if tables.positive is not None else own.weight), positive
        )
        weight = torch.where(same, torch.full_like(weight, own.weight), weight)
        bias = torch.where(same, torch.full_like(bias, 0.0 if own.scale is None else own.bias), bias)
        if own.scale is not None:
            scale = torch.where(same, torch.full_like(scale, own.scale), scale)
    pair = torch.ones_like(weight, dtype=torch.bool)
    if keys is None:
        pair.fill_diagonal_(False)
    weight, positive = weight * pair, positive * pair
    logits = scale * (points @ y.T) + bias
    log_sum = torch.logsumexp(logits.masked_fill(~pair, -math.inf), 1)
    anchor = positive.sum(1) > 0
    if not anchor.any():
        return points.sum() * 0
    terms = torch.where(weight > 0, weight * (log_sum[:, None] - logits), 0)
    return (terms.sum(1)[anchor] / positive.sum(1)[anchor]).mean()

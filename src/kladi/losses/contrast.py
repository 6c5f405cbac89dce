"""The pair kernel, dense and simple for now: weights, scales and biases between label classes -> one scalar."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class PairTables:
    """One entry a pair of label classes. logit = scale * similarity + bias; weight says how positive the pair is."""

    weight: Float[Tensor, "U U"]
    scale: Float[Tensor, "U U"]
    bias: Float[Tensor, "U U"] | None = None
    positive: Float[Tensor, "U U"] | None = None


@dataclass(frozen=True)
class OwnView:
    """Overrides the tables for pairs that are two views of one sample."""

    scale: float
    weight: float = 1.0
    bias: float = 0.0


def contrast(
    points: Float[Tensor, "n D"],
    classes: Int[Tensor, " n"],
    tables: PairTables,
    *,
    views: int = 1,
    own: OwnView | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean over anchors of (m lse - sum W logit) / divisor, and the share of rows that are no anchor."""
    n = len(points)
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    with torch.autocast(points.device.type, enabled=False):
        x = points.to(dtype)
        pair = (classes[:, None], classes[None, :])
        weight, scale = tables.weight.to(dtype)[pair], tables.scale.to(dtype)[pair]
        bias = torch.zeros_like(scale) if tables.bias is None else tables.bias.to(dtype)[pair]
        count = weight if tables.positive is None else tables.positive.to(dtype)[pair]
        sample = torch.arange(n, device=x.device) % max(n // max(views, 1), 1)
        same = sample[:, None] == sample[None, :]
        if own is not None:
            weight = torch.where(same, own.weight, weight)
            scale = torch.where(same, own.scale, scale)
            bias = torch.where(same, own.bias, bias)
            count = torch.where(same, 1.0 if tables.positive is not None else own.weight, count)
        other = ~torch.eye(n, dtype=torch.bool, device=x.device)
        weight, count = weight * other, count * other
        logits = scale * (x @ x.T) + bias
        masked = logits.masked_fill(~other, -math.inf)
        divisor, mass = count.sum(1), weight.sum(1)
        anchor = divisor > 0
        idle = (~anchor).to(dtype).mean() if n else x.new_ones(())
        if not bool(anchor.any()):
            return x.sum() * 0.0, idle.detach()
        positive = (weight * logits.masked_fill(weight == 0, 0.0)).sum(1)
        losses = (mass * torch.logsumexp(masked, dim=1).masked_fill(~anchor, 0.0) - positive) / divisor.clamp_min(1e-300)
        return losses[anchor].mean(), idle.detach()

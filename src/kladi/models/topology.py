"""Persistence diagrams to vectors, and their fusion with what an image encoder sees.

A diagram comes as tokens float[B, k, 2], the k0 most persistent points (birth, death) of H0 and then the k1 of H1, with
a mask bool[B, k] that says which are points. What the mask calls none has exactly no effect and no gradient.

Source: Meng et al., TopoCL, CVPR 2026, whose encoder and five experts these are; its text leaves widths open, and the
masks are ours.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override


@dataclass(frozen=True)
class Sizes:
    """Of a topology encoder. point: hidden widths of the point network. width: of a token. hidden: of the head.
    k0, k1: tokens of H0 and of H1."""

    width: int
    point: tuple[int, int, int]
    hidden: int
    k0: int
    k1: int


SIZES = {
    "paper": Sizes(width=384, point=(64, 128, 256), hidden=512, k0=48, k1=96),
    "small": Sizes(width=96, point=(64, 96, 96), hidden=256, k0=24, k1=48),
}
"""The paper's goes with a ResNet-50 at 224 pixels; beside a ResNet-18 at 64 it would cost as much as the image."""
EXPERTS = ("visual", "topology", "concat", "gated", "cross")
"""In the order of every gate, log and figure."""


class TopologyEncoder(nn.Module):
    """A diagram's points, attending within and across dimensions, to one vector.

        h = point network(birth, death, one-hot dimension),   h' = h + residual Attention(h) within H0 and within H1
        x = [Attention(h0' to h1'); Attention(h1' to h0')]
        out = head(max and mean over the points of h0', h1' and x)

    An empty set pools to zero, and attention to an empty set is zero.

    Args:
        sizes: see `SIZES`.
        out: length of the vector.
        heads: of each attention.
        residual: share of the attention within a dimension.
        dropout: of attention weights.
    """

    def __init__(
        self, sizes: Sizes, *, out: int = 256, heads: int = 4, residual: float = 0.5, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.k0, self.residual = sizes.k0, residual
        widths = (4, *sizes.point, sizes.width)
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        self.point = nn.Sequential(*[m for layer in layers[:-1] for m in (layer, nn.ReLU())], layers[-1])
        self.within0, self.within1, self.from0, self.from1 = (
            MaskedAttention(sizes.width, heads, dropout) for _ in range(4)
        )
        self.head = three_layers(6 * sizes.width, sizes.hidden, out)

    @override
    def forward(self, tokens: Float[Tensor, "B k 2"], mask: Bool[Tensor, "B k"]) -> Float[Tensor, "B out"]:
        h0, h1, m0, m1 = self._points(tokens, mask)
        h0 = h0 + self.residual * self.within0(h0, h0, m0)
        h1 = h1 + self.residual * self.within1(h1, h1, m1)
        x = torch.cat([self.from0(h0, h1, m1), self.from1(h1, h0, m0)], dim=1)
        pooled = [part for values, which in ((h0, m0), (h1, m1), (x, mask)) for part in _pooled(values, which)]
        return self.head(torch.cat(pooled, dim=1))

    @torch.no_grad()
    def attended(self, tokens: Float[Tensor, "B k 2"], mask: Bool[Tensor, "B k"]) -> Float[Tensor, "B k"]:
        """Share of the attention within its dimension that each point receives, mean over points that ask and heads:
        the points of a dimension share one, what the mask calls none has zero."""
        h0, h1, m0, m1 = self._points(tokens, mask)
        return torch.cat([self.within0.shares(h0, m0), self.within1.shares(h1, m1)], dim=1)

    def _points(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each point by itself: of H0 [B, k0, w], of H1 [B, k1, w], and their masks."""
        k0 = self.k0
        kind = functional.one_hot((torch.arange(mask.shape[1], device=mask.device) >= k0).long(), 2).to(tokens.dtype)
        points = torch.cat([tokens, kind.expand(len(tokens), -1, -1)], dim=2)
        with torch.autocast(tokens.device.type, enabled=False):  # bfloat16 has 1/256 for births next to 1
            h = self.point(points.where(mask[..., None], 0.0))
        return h[:, :k0], h[:, k0:], mask[:, :k0], mask[:, k0:]


class MaskedAttention(nn.Module):
    """Scaled dot-product attention to the keys that the mask keeps; zero where it keeps none."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    @override
    def forward(
        self, query: Float[Tensor, "B q w"], keys: Float[Tensor, "B k w"], mask: Bool[Tensor, "B k"]
    ) -> Float[Tensor, "B q w"]:
        q, k, v = self._heads(self.query, query), self._heads(self.key, keys), self._heads(self.value, keys)
        dropout, any_key = self.dropout if self.training else 0.0, mask.any(dim=1)[:, None, None]
        kept = mask[:, None, None] | ~any_key[..., None]  # a softmax over nothing is no number on some devices
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=kept, dropout_p=dropout)
        return self.out(found.transpose(1, 2).flatten(2)).where(any_key, 0.0)

    def shares(self, points: Float[Tensor, "B k w"], mask: Bool[Tensor, "B k"]) -> Float[Tensor, "B k"]:
        """Of points that attend to each other: the weight that each receives, mean over those that ask and heads."""
        q, k = self._heads(self.query, points), self._heads(self.key, points)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask[:, None, None], -torch.inf)
        weight = torch.softmax(scores.where(mask.any(dim=1)[:, None, None, None], 0.0), dim=-1).mean(dim=1)
        asked = mask.to(weight.dtype) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.einsum("bq,bqk->bk", asked, weight).where(mask, 0.0)

    def _heads(self, layer: nn.Linear, x: Float[Tensor, "B n w"]) -> Float[Tensor, "B heads n d"]:
        return layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)


def _pooled(values: Float[Tensor, "B k w"], mask: Bool[Tensor, "B k"]) -> tuple[Tensor, Tensor]:
    """Maximum and mean over the points, [B, w] each; zero of none."""
    some, which = mask.any(dim=1, keepdim=True), mask[..., None]
    most = values.where(which, torch.finfo(values.dtype).min).amax(dim=1).where(some, 0.0)
    mean = values.where(which, 0.0).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return most, mean


class MixtureOfExperts(nn.Module):
    """Five dense experts on the embedding f of an image and t of its diagram, weighted by a gate.

        visual    MLP(f)
        topology  MLP(t)
        concat    MLP([f; t])
        gated     MLP(g f + (1 - g) t),   g = sigmoid(Linear([f; t]))
        cross     MLP([LN(f + U t); LN(t + W f)])
        h = sum_i gate_i expert_i,        gate = softmax(MLP([f; t]) / temperature)

    "cross" is two-way attention: over a single key it is this linear map. After a forward, `gate` holds the batch's
    gates, without their graph.

    Args:
        embed: length of f and t.
        out: length of h.
        temperature: of the gate.
        dropout: behind each expert.
    """

    def __init__(self, embed: int = 256, out: int = 512, *, temperature: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.temperature = temperature
        widths = dict(zip(EXPERTS, (embed, embed, 2 * embed, embed, 2 * embed), strict=True))
        self.experts = nn.ModuleDict({name: _expert(width, out, dropout) for name, width in widths.items()})
        self.mix = nn.Linear(2 * embed, embed)
        self.to_visual, self.to_topology = nn.Linear(embed, embed), nn.Linear(embed, embed)
        self.norm_visual, self.norm_topology = nn.LayerNorm(embed), nn.LayerNorm(embed)
        self.score = three_layers(2 * embed, embed, len(EXPERTS))
        self.gate: Tensor | None = None

    @override
    def forward(self, f: Float[Tensor, "B E"], t: Float[Tensor, "B E"]) -> Float[Tensor, "B out"]:
        both = torch.cat([f, t], dim=1)
        g = torch.sigmoid(self.mix(both))
        crossed = [self.norm_visual(f + self.to_visual(t)), self.norm_topology(t + self.to_topology(f))]
        seen = (f, t, both, g * f + (1 - g) * t, torch.cat(crossed, dim=1))
        said = torch.stack([self.experts[name](x) for name, x in zip(EXPERTS, seen, strict=True)], dim=1)
        gate = torch.softmax(self.score(both) / self.temperature, dim=1)
        self.gate = gate.detach()
        return (gate[..., None] * said).sum(dim=1)


def three_layers(width: int, hidden: int, out: int) -> nn.Sequential:
    """Linear layers with layer normalisation and GELU between."""
    return nn.Sequential(
        *(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU()),
        *(nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.GELU()),
        nn.Linear(hidden, out),
    )


def _expert(width: int, out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out), nn.LayerNorm(out), nn.GELU(), nn.Dropout(dropout))

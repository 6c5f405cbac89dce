"""Supervised contrast: images of one label attract (SupCon), or attract by how much of their label sets they share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import override

from kladi.losses.contrast import OwnView, PairTables, contrast
from kladi.losses.views import check_temperature, unit_rows

Lookup = Callable[[Int[Tensor, " u"]], tuple[Float[Tensor, "u u"], Bool[Tensor, "u u"] | None]]
"""Class ids -> how much they share, and which of them can be compared (None: all)."""

SLACK = 1e-9
"""A similarity this little below the threshold reaches it: 1/3 against 0.3333... must not depend on rounding."""


class SupConLoss(nn.Module):
    """Rows of one label attract, in all views (SupCon).

        L_i = -(1 / |P(i)|) sum_{j in P(i)} log( exp(s_ij / T) / sum_{k != i} exp(s_ik / T) )

    with P(i) the other rows of i's label; averaged over the rows that have a positive, while the others only repel.

    Args:
        temperature: T > 0.

    Shape: z float[V, B, D] un-normalised, target int64[B] of any label ids -> scalar. float64 in, float64 out;
    otherwise float32, also under autocast. After a forward, `idle` is the share of rows without a positive; where that
    is all of them the loss is a zero that keeps its graph.

    Source: Khosla et al., NeurIPS 2020, eq. 2 (L_out), with all rows as anchors.

    Raises ValueError at construction for an impossible temperature, and for a target that holds no ids.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature
        self.idle: Tensor | None = None

    @override
    def forward(self, z: Float[Tensor, "V B D"], target: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """The loss of V views of B images whose labels are `target`."""
        rows = unit_rows(z)
        _check_ids(target, z)
        labels, classes = torch.unique(target, return_inverse=True)
        tables = PairTables(weight=rows.new_ones(len(labels)), scale=rows.new_tensor(1 / self.temperature))
        loss, self.idle = contrast(rows, classes.repeat(len(z)), tables)
        return loss

    @override
    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"temperature={self.temperature}"


class MultiLabelContrastiveLoss(nn.Module):
    """Rows attract in proportion to the overlap of their label sets, once it reaches a threshold.

        P(a) = {p != a : w_ap >= threshold}
        L_a  = -(1 / |P(a)|) sum_{p in P(a)} w_ap [ s_ap / T - log sum_{k != a} exp(s_ak / T) ]

    averaged over rows with a positive. w is the Jaccard index of the two sets, or the given `similarity`; w = 1 for two
    views of one image, whatever is known of it, so that an unlabelled row is an NT-Xent anchor.

    Args:
        temperature: T > 0.
        threshold: in (0, 1]. Compared with a slack of 1e-9, so that 1/3 is 0.333...
        similarity: None: the target is bool[B, K], and w the Jaccard index of its rows (two empty sets: 0). Otherwise
            float[U, U], symmetric, in [0, 1], and the target is int64[B], a row of it for each image; both come from
            `LabelSets.similarity()`. It is kept in float64 and cast to what a batch needs. Where U x U is too large to
            keep: a function from the distinct ids of a batch to their part of the table and of `comparable`.
        normalise: "count" divides by |P(a)|, so that anchors whose positives are mostly partial count less; "weight"
            divides by sum of w.
        comparable: bool[U, U]; where False the pair leaves the denominator too (own views never do).

    Shape: z float[V, B, D] un-normalised -> scalar. float64 in, float64 out; otherwise float32, also under autocast.
    After a forward, `idle` is the share of rows without a positive.

    Source: Takaya and Inamori, arXiv 2508.18613, eq. 2 and 3 (their released code has a further factor T / 0.07, which
    is 1 at the default); Zaigrajew and Zieba, 2022.

    Raises ValueError at construction for impossible arguments, and for a target of the wrong kind; IndexError for a
    class id that is no row of `similarity`.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        threshold: float = 0.3,
        similarity: Float[Tensor, "U U"] | Lookup | None = None,
        normalise: str = "count",
        comparable: Bool[Tensor, "U U"] | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        table, lookup = (similarity, None) if isinstance(similarity, Tensor) else (None, similarity)
        if not 0 < threshold <= 1:
            least = _least_useful(table)
            raise ValueError(
                f"threshold must be in (0, 1], not {threshold!r}: at 0 every pair counts; {least} means any overlap"
            )
        if normalise not in {"count", "weight"}:
            raise ValueError(f'normalise must be "count" or "weight", not {normalise!r}')
        if table is not None:
            _check_similarity(table)
        if comparable is not None and (table is None or comparable.shape != table.shape):
            raise ValueError("comparable must have the shape of similarity")
        self.temperature, self.threshold, self.normalise = temperature, threshold, normalise
        self.lookup = lookup
        self.register_buffer("similarity", None if table is None else table.double(), persistent=False)
        self.register_buffer("comparable", comparable, persistent=False)
        self.idle: Tensor | None = None

    similarity: Tensor | None
    comparable: Tensor | None

    @override
    def forward(self, z: Float[Tensor, "V B D"], target: Int[Tensor, " B"] | Bool[Tensor, "B K"]) -> Float[Tensor, ""]:
        """The loss of V views of B images with these label sets, or these classes of `similarity`."""
        rows = unit_rows(z)
        table, comparable, classes = self._table(z, target)
        reaches = table >= self.threshold - SLACK
        bias = None
        if comparable is not None:
            bias = torch.zeros_like(table).masked_fill(~comparable, -torch.inf)
            reaches = reaches & comparable
        tables = PairTables(
            weight=torch.where(reaches, table, 0),
            scale=rows.new_tensor(1 / self.temperature),
            bias=bias,
            positive=reaches.to(table.dtype) if self.normalise == "count" else None,
        )
        loss, self.idle = contrast(rows, classes.repeat(len(z)), tables, views=len(z), own=OwnView(weight=1.0))
        return loss

    def _table(self, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Similarity (float64) and comparability of the classes in the batch, and the class of each image."""
        similarity, lookup = self.similarity, self.lookup
        if similarity is not None:
            ids, classes = _distinct(target, z)
            return *self._part(similarity, ids), classes
        if lookup is not None:
            ids, classes = _distinct(target, z)
            return *lookup(ids), classes
        if target.dtype != torch.bool or target.ndim != 2:
            raise ValueError("without a similarity table the target is bool[B, K], one row of labels an image")
        if len(target) != z.shape[1]:
            raise ValueError(f"target has {len(target)} rows, but z has {z.shape[1]} images")
        sets, classes = torch.unique(target, dim=0, return_inverse=True)
        return jaccard(sets), None, classes

    def _part(self, similarity: Tensor, ids: Int[Tensor, " u"]) -> tuple[Tensor, Tensor | None]:
        """Similarity and comparability of some classes."""
        for wrong in ids[(ids < 0) | (ids >= len(similarity))].tolist():
            raise IndexError(f"target {wrong} is no row of a similarity table of {len(similarity)} classes")
        comparable = None if self.comparable is None else self.comparable[ids][:, ids]
        return similarity[ids][:, ids], comparable

    @override
    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"temperature={self.temperature}, threshold={self.threshold}, normalise={self.normalise!r}"


def jaccard(sets: Bool[Tensor, "U K"]) -> Float[Tensor, "U U"]:
    """|a & b| / |a | b| of each pair of rows, in float64; 0 for two empty sets.

    >>> jaccard(torch.tensor([[True, True], [True, False]]))[0, 1].item()
    0.5
    """
    member = sets.double()
    shared = member @ member.T
    size = member.sum(1)
    union = size[:, None] + size - shared
    return torch.where(union > 0, shared / union.clamp_min(1), 0)


def _distinct(target: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct class ids of a batch, and which of them each image has."""
    _check_ids(target, z)
    ids, classes = torch.unique(target, return_inverse=True)
    return ids, classes


def _check_ids(target: Tensor, z: Tensor) -> None:
    if target.dtype.is_floating_point or target.dtype == torch.bool or target.ndim != 1:
        raise ValueError(f"target must be int64[B], one id an image, not {target.dtype} of shape {tuple(target.shape)}")
    if len(target) != z.shape[1]:
        raise ValueError(f"target has {len(target)} entries, but z has {z.shape[1]} images")


def _check_similarity(table: Tensor) -> None:
    if table.ndim != 2 or table.shape[0] != table.shape[1]:
        raise ValueError(f"similarity must be square, not of shape {tuple(table.shape)}")
    if not bool(((table >= 0) & (table <= 1 + SLACK)).all()):
        raise ValueError("similarity must lie in [0, 1]")
    if not torch.allclose(table, table.T, rtol=0, atol=SLACK):
        raise ValueError("similarity must be symmetric")


def _least_useful(table: Tensor | None) -> str:
    """The smallest similarity above zero, which makes any overlap count."""
    above = None if table is None else table[table > 0]
    return "the smallest similarity above 0" if above is None or not above.numel() else f"{float(above.min()):.4g}"

"""Losses that read no label: what two views of one image have in common."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import override

from kladi.losses.contrast import OwnView, PairTables, contrast


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is no positive number.

    Raises:
        ValueError: naming the value and the usual one.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, not {temperature!r}; 0.1 is the usual one")


def unit_rows(z: Float[Tensor, "V B D"]) -> Float[Tensor, "n D"]:
    """The rows of all views, view-major, as unit vectors in float32 or better; a zero row stays zero."""
    if z.ndim != 3:
        raise ValueError(f"z must be [views, batch, dimensions], not of shape {tuple(z.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        rows = z.flatten(0, 1)
        return normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=1, eps=1e-12)


class NTXentLoss(nn.Module):
    """Views of one image attract, all other rows repel (NT-Xent, the loss of SimCLR).

        L_i = -(1 / (V - 1)) sum_{j view of i} log( exp(s_ij / T) / sum_{k != i} exp(s_ik / T) ),   s = cosine

    Args:
        temperature: T > 0.

    Shape: z float[V, B, D] un-normalised -> scalar. float64 in, float64 out; otherwise float32, also under autocast.
    After a forward, `idle` is the share of rows without a positive (1 with a single view, which gives a zero that keeps
    its graph).

    Source: Chen et al., SimCLR, ICML 2020, eq. 1; for V > 2 the mean over positives of each anchor.

    Raises ValueError at construction for an impossible temperature.

    >>> import torch
    >>> z = torch.tensor([[[1.0, 0.0], [0.6, 0.8]], [[0.8, 0.6], [-0.6, 0.8]]])
    >>> round(NTXentLoss(temperature=0.5)(z).item(), 6)
    0.991946
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature
        self.idle: Tensor | None = None

    @override
    def forward(self, z: Float[Tensor, "V B D"]) -> Float[Tensor, ""]:
        """The loss of V views of B images."""
        rows = unit_rows(z)
        one_class = torch.zeros(len(rows), dtype=torch.int64, device=z.device)
        tables = PairTables(weight=rows.new_zeros(1), scale=rows.new_tensor(1 / self.temperature))
        loss, self.idle = contrast(rows, one_class, tables, views=len(z), own=OwnView(weight=1.0))
        return loss

    @override
    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"temperature={self.temperature}"

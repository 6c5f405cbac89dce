"""Losses that read no label: what two views of one image have in common.

NT-Xent and Barlow Twins compare views with each other, z float[V, B, D]. MoCo v3, BYOL and DINO let one view predict
what a slowly moving copy of the network says of another: p and t float[V, B, D], t without gradient. All are means over
the ordered pairs (u, v) of different views and over the batch, so that a sum over both directions, as some originals
have it, is twice as much; only clipping notices.
"""

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


class MoCoV3Loss(nn.Module):
    """A prediction finds its own image among the targets of another view; no queue, no repulsion within a view.

        L_ui,v = -2 T log( exp(p_ui . t_vi / T) / sum_j exp(p_ui . t_vj / T) ),   rows normalised

    Args:
        temperature: T > 0.

    Shape: p, t float[V, B, D], V > 1 -> scalar. Source: Chen et al., MoCo v3, ICCV 2021, eq. 1 and algorithm 1.

    >>> import torch
    >>> p = torch.ones(2, 8, 4)
    >>> round(MoCoV3Loss(temperature=0.2)(p, p).item(), 5)
    0.83178
    """

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    @override
    def forward(self, p: Float[Tensor, "V B D"], t: Float[Tensor, "V B D"]) -> Float[Tensor, ""]:
        """The loss of V views of B images."""
        p, t = _unit(p), _unit(t.detach())
        with torch.autocast(p.device.type, enabled=False):
            logits = torch.stack([p[u] @ t[v].T for u, v in _pairs(p, t)]) / self.temperature
        own = logits.diagonal(dim1=1, dim2=2)
        return 2 * self.temperature * _mean(logits.logsumexp(dim=2) - own)

    @override
    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"temperature={self.temperature}"


class BYOLLoss(nn.Module):
    """A prediction points where the target of another view does; nothing repels.

        L_ui,v = 2 - 2 p_ui . t_vi,   rows normalised

    Shape: p, t float[V, B, D], V > 1 -> scalar in [0, 4]. Source: Grill et al., BYOL, NeurIPS 2020, eq. 2.

    >>> import torch
    >>> p = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> BYOLLoss()(p, p).item()
    2.0
    """

    def __init__(self) -> None:
        super().__init__()

    @override
    def forward(self, p: Float[Tensor, "V B D"], t: Float[Tensor, "V B D"]) -> Float[Tensor, ""]:
        """The loss of V views of B images."""
        p, t = _unit(p), _unit(t.detach())
        return _mean(torch.stack([2 - 2 * (p[u] * t[v]).sum(dim=1) for u, v in _pairs(p, t)]))


class BarlowTwinsLoss(nn.Module):
    """Each dimension agrees between views and is uncorrelated with every other.

        L = sum_k (1 - C_kk)^2 + weight sum_{k != l} C_kl^2,   C = Z_u^T Z_v / B

    with the columns of Z standardised over the batch (biased variance plus 1e-5).

    Args:
        weight: lambda >= 0, of the off-diagonal.

    Shape: z float[V, B, D], V > 1 -> scalar. Source: Zbontar et al., Barlow Twins, ICML 2021, eq. 1 and 2.

    >>> import torch
    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> round(BarlowTwinsLoss()(torch.stack([z, -z])).item(), 3)
    8.0
    """

    def __init__(self, weight: float = 0.005) -> None:
        super().__init__()
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight must be 0 or more, not {weight!r}; 0.005 is the usual one")
        self.weight = weight

    @override
    def forward(self, z: Float[Tensor, "V B D"]) -> Float[Tensor, ""]:
        """The loss of V views of B images."""
        z = _precise(z)
        centred = z - z.mean(dim=1, keepdim=True)
        unit = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        with torch.autocast(z.device.type, enabled=False):
            # C(v, u) is the transpose of C(u, v), which has the same loss.
            terms = [self._of(unit[u].T @ unit[v] / max(1, z.shape[1])) for u, v in _pairs(z) if u < v]
        return torch.stack(terms).mean()

    def _of(self, correlation: Float[Tensor, "D D"]) -> Float[Tensor, ""]:
        diagonal = correlation.diagonal()
        apart = correlation - torch.diag(diagonal)  # a difference of sums of squares would cancel
        return (1 - diagonal).square().sum() + self.weight * apart.square().sum()

    @override
    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"weight={self.weight}"


class DINOLoss(nn.Module):
    """A student's distribution over prototypes follows the sharpened, centred one of a teacher on another view.

        L_ui,v = -sum_k softmax((t_vi - c) / T_t)_k log softmax(p_ui / T_s)_k

    The centre c begins at 0; a forward in training mode reads it, then moves it: c <- m c + (1 - m) mean of t over all
    teacher views and rows. In evaluation mode it stays.

    Args:
        dim: K, prototypes.
        student, teacher: temperatures T_s, T_t > 0.
        momentum: m in [0, 1] of the centre.

    Shape: p, t float[V, B, K], V > 1 -> scalar. Source: Caron et al., DINO, ICCV 2021, eq. 2 and 4.
    """

    centre: Tensor

    def __init__(self, dim: int, student: float = 0.1, teacher: float = 0.04, momentum: float = 0.9) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be 1 or more, not {dim!r}")
        check_temperature(student)
        check_temperature(teacher)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie between 0 and 1, not {momentum!r}; 0.9 is the usual one")
        self.student, self.teacher, self.momentum = student, teacher, momentum
        self.register_buffer("centre", torch.zeros(dim))

    @override
    def forward(self, p: Float[Tensor, "V B K"], t: Float[Tensor, "V B K"]) -> Float[Tensor, ""]:
        """The loss of V views of B images."""
        p, t = _precise(p), _precise(t.detach())
        wanted = torch.softmax((t - self.centre) / self.teacher, dim=2)
        said = torch.log_softmax(p / self.student, dim=2)
        loss = _mean(torch.stack([-(wanted[v] * said[u]).sum(dim=1) for u, v in _pairs(p, t)]))
        if self.training and t.shape[1]:
            self.centre.lerp_(t.mean(dim=(0, 1)).to(self.centre.dtype), 1 - self.momentum)
        return loss

    @override
    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"student={self.student}, teacher={self.teacher}, momentum={self.momentum}"


def _precise(z: Float[Tensor, "V B D"]) -> Float[Tensor, "V B D"]:
    """float32 or better, also under autocast: its products would be taken in half precision."""
    return z if z.dtype == torch.float64 else z.float()


def _unit(z: Float[Tensor, "V B D"]) -> Float[Tensor, "V B D"]:
    """Rows of length one, in float32 or better; a zero row stays zero."""
    return normalize(_precise(z), dim=2, eps=1e-12)


def _mean(terms: Float[Tensor, "P B"]) -> Float[Tensor, ""]:
    """Over pairs and batch; zero, with its graph, of an empty batch."""
    return terms.sum() / max(1, terms.numel())


def _pairs(z: Float[Tensor, "V B D"], t: Float[Tensor, "V B D"] | None = None) -> list[tuple[int, int]]:
    """Ordered pairs of different views; predictions and targets have one shape."""
    if t is not None and t.shape != z.shape:
        raise ValueError(f"predictions {tuple(z.shape)} and targets {tuple(t.shape)} differ in shape")
    if len(z) < 2:
        raise ValueError(f"the loss compares two views of an image at least, not {len(z)}")
    return [(u, v) for u in range(len(z)) for v in range(len(z)) if u != v]

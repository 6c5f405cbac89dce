"""The matrix of a batch of logistic regressions, seen through each problem's own standardisation.

A design has `rows` n and `width` D, and answers four questions of the solver. Vectors are [K, P, D + 1]: logit column,
problem, coordinate, the last of which is the bias; `masks` int64[P], ascending, is the training mask of each problem.

product(direction, masks) -> [n, K, P]             how the logits change for a unit step
pullback(residual [n, K, P], masks)                the transpose of that
precondition(vector, bend, penalty, masks)         (bend x correlation + penalty)^-1; bend [K, P, 1], penalty [P, 1]
factors(bend [n, K, P], penalty [P], masks)         Cholesky factors [K, P, D + 1, D + 1] of X~^T bend X~ + penalty
raw(point, masks) -> [K, P, F], [K, P]             weights and intercepts for rows as they were given
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor


class Shared:
    """One matrix for all masks, never standardised in memory: x~ V = X (V/sd) - mu . (V/sd).

    The preconditioner is the correlation of all training rows: masks overlap so much that one basis serves all. It
    changes how fast a problem is solved, never its solution.
    """

    def __init__(self, x: Tensor, train: np.ndarray) -> None:
        self.x = x
        self.rows, self.width = x.shape
        # One mask's rows are gathered at a time.
        scalers = [scaler(x[torch.from_numpy(mask).to(x.device)]) for mask in train]
        self.mu, self.sd = (torch.stack(parts) for parts in zip(*scalers, strict=True))
        mu, sd = scaler(x)
        self.standardised = (x - mu) / sd
        spectrum, self.axes = torch.linalg.eigh(self.standardised.T @ self.standardised / len(x))
        self.spectrum = spectrum.clamp(min=0)

    def product(self, direction: Tensor, masks: Tensor) -> Tensor:
        scaled = direction[..., :-1] / self.sd[masks]
        shift = direction[..., -1] - (scaled * self.mu[masks]).sum(dim=-1)
        return (self.x @ scaled.flatten(0, 1).T).view(self.rows, *shift.shape).add_(shift)

    def pullback(self, residual: Tensor, masks: Tensor) -> Tensor:
        total = residual.sum(dim=0)[..., None]
        product = (residual.flatten(1).T @ self.x).view(*total.shape[:2], -1)
        return torch.cat([(product - self.mu[masks] * total) / self.sd[masks], total], dim=-1)

    def precondition(self, vector: Tensor, bend: Tensor, penalty: Tensor, masks: Tensor) -> Tensor:  # noqa: ARG002
        rotated = (vector[..., :-1] @ self.axes) / (bend * self.spectrum + penalty)
        return torch.cat([rotated @ self.axes.T, vector[..., -1:] / bend], dim=-1)

    def factors(self, bend: Tensor, penalty: Tensor, masks: Tensor) -> Tensor:  # noqa: ARG002 - one basis serves all
        return torch.stack([_factors(self.standardised, bend[:, :, p], penalty[p]) for p in range(len(penalty))], dim=1)

    def raw(self, point: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        scaled = point[..., :-1] / self.sd[masks]
        return scaled, point[..., -1] - (scaled * self.mu[masks]).sum(dim=-1)


class Own:
    """A matrix a mask: its standardised training rows in their principal axes, x~ W = Q S.

    The penalty does not feel the rotation, and nothing outside the span of the training rows can lower J: the optimum
    is the same, with at most as many coordinates as rows. For embeddings wider than a fold has rows, and for features
    that are themselves fitted on the training rows. The correlation is then diagonal: the preconditioner is exact.
    """

    def __init__(self, x: list[Tensor], train: np.ndarray) -> None:
        self.rows = train.shape[1]
        found = []
        for rows, mask in zip(x, torch.from_numpy(train).to(x[0].device), strict=True):
            mu, sd = scaler(rows[mask])
            _, size, axes = torch.linalg.svd((rows[mask] - mu) / sd, full_matrices=False)
            kept = int((size > 1e-10 * size.max().clamp(min=1e-300)).sum())
            turned = torch.zeros(self.rows, kept, dtype=rows.dtype, device=rows.device)
            turned[mask] = ((rows[mask] - mu) / sd) @ axes[:kept].T
            found.append((turned, size[:kept].square() / mask.sum(), axes[:kept] / sd, mu))
        self.width = max(turned.shape[1] for turned, *_ in found)
        self.x = torch.stack([_padded(turned, 1, self.width) for turned, *_ in found])
        self.spectrum = torch.stack([_padded(spectrum, 0, self.width) for _, spectrum, *_ in found])
        self.back = torch.stack([_padded(back, 0, self.width) for _, _, back, _ in found])
        self.mu = torch.stack([mu for *_, mu in found])

    def product(self, direction: Tensor, masks: Tensor) -> Tensor:
        out = torch.empty(self.rows, *direction.shape[:2], dtype=direction.dtype, device=direction.device)
        for mask, some in _runs(masks):
            part = direction[:, some, :-1]
            out[:, :, some] = (self.x[mask] @ part.flatten(0, 1).T).view(self.rows, *part.shape[:2])
        return out.add_(direction[..., -1])

    def pullback(self, residual: Tensor, masks: Tensor) -> Tensor:
        out = torch.empty(*residual.shape[1:], self.width + 1, dtype=residual.dtype, device=residual.device)
        out[..., -1] = residual.sum(dim=0)
        for mask, some in _runs(masks):
            part = residual[:, :, some]
            out[:, some, :-1] = (part.flatten(1).T @ self.x[mask]).view(*part.shape[1:], -1)
        return out

    def precondition(self, vector: Tensor, bend: Tensor, penalty: Tensor, masks: Tensor) -> Tensor:
        inner = vector[..., :-1] / (bend * self.spectrum[masks] + penalty)
        return torch.cat([inner, vector[..., -1:] / bend], dim=-1)

    def factors(self, bend: Tensor, penalty: Tensor, masks: Tensor) -> Tensor:
        found = [_factors(self.x[mask], bend[:, :, p], penalty[p]) for p, mask in enumerate(masks.tolist())]
        return torch.stack(found, dim=1)

    def raw(self, point: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        scaled = torch.cat([point[:, some, :-1] @ self.back[mask] for mask, some in _runs(masks)], dim=1)
        return scaled, point[..., -1] - (scaled * self.mu[masks]).sum(dim=-1)


Design = Shared | Own


def scaler(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column; infinity for the latter where the column is constant.

    A constant column is zero once centred, so its optimal weight is zero, and dividing by infinity makes it exactly
    that. Constant is judged relative to the mean as well, as the rounding of a large constant is no spread.
    """
    centre = rows.mean(dim=0)
    spread = (rows - centre).square().mean(dim=0).sqrt()
    return centre, torch.where(spread < 1e-12 * centre.abs().clamp(min=1), math.inf, spread)


def _factors(x: Tensor, bend: Tensor, penalty: Tensor) -> Tensor:
    """Cholesky factors of [x, 1]^T diag(bend_k) [x, 1] + penalty, one a column k of `bend` [n, K]; the bias is free."""
    rows = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    blocks = torch.stack([(rows * column[:, None]).T @ rows for column in bend.T])
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    diagonal[:, :-1] += penalty
    # A preconditioner must be definite, even for a class that no row is near to.
    diagonal += 1e-12 + 1e-9 * diagonal.amax(dim=1, keepdim=True)
    return torch.linalg.cholesky(blocks)


def _runs(masks: Tensor) -> list[tuple[int, slice]]:
    """Each mask that occurs, with the problems that it has: they stand together."""
    found: list[tuple[int, slice]] = []
    start = 0
    for mask, some in itertools.groupby(masks.tolist()):
        stop = start + len(list(some))
        found.append((int(mask), slice(start, stop)))
        start = stop
    return found


def _padded(values: Tensor, dim: int, width: int) -> Tensor:
    """Zeros at the end of one dimension, up to `width`."""
    shape = list(values.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([values, values.new_zeros(shape)], dim=dim)

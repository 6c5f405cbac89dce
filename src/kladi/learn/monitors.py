"""Does the embedding still spread? Effective rank and standard deviation on fixed rows, and the alarm of a collapse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kladi import config as settings
from kladi.data.dataset import TRAIN, Dataset
from kladi.data.views import philox
from kladi.models.fused import Fused, reader
from kladi.models.topology import EXPERTS

ROWS = 512
LEAST_RANK, LEAST_STD = 2.0, 0.05
IN_A_ROW = 2
"""So many evaluations in a row below a limit raise the alarm."""


@dataclass(frozen=True)
class Spread:
    """How a cloud of embeddings fills its space.

    rank: exp(-sum p log p) of the singular values of the centred embeddings: the number of dimensions really used.
    std: mean over dimensions j of sqrt(D) std_j(z / ||z||); 1 for directions spread evenly, 0 for a collapsed encoder.
    """

    rank: float
    std: float

    @property
    def collapsed(self) -> bool:
        return not (self.rank >= LEAST_RANK and self.std >= LEAST_STD)


def fixed_rows(dataset: Dataset, seed: int) -> Int[np.ndarray, " m"]:
    """The training rows that every look of a run is at, at most 512; the same, in the same order, however the data are
    ordered."""
    rows = np.flatnonzero(dataset.split == TRAIN)
    drawn = philox.uniform(seed, "monitor", dataset.row_id[rows], 0, 0, 0)
    return rows[np.argsort(drawn, kind="stable")[:ROWS]]


def spread(z: Float[Tensor, "n D"]) -> Spread:
    """Both numbers, in float64; zeros for fewer than two rows or embeddings that are not finite."""
    x = z.double().cpu()
    if len(x) < 2 or not bool(torch.isfinite(x).all()):
        return Spread(0.0, 0.0)
    centred = x - x.mean(0)
    sigma = torch.linalg.svdvals(centred)
    # Equal rows leave rounding dust after centring, and dust has full rank.
    sigma = sigma[sigma > max(x.shape) * torch.finfo(torch.float64).eps * x.abs().max()]
    p = sigma / sigma.sum()
    rank = float(torch.exp(-(p * p.log()).sum())) if len(sigma) else 0.0
    unit = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    std = math.sqrt(x.shape[1]) * float(unit.std(0, correction=0).mean())
    return Spread(rank, std)


@torch.no_grad()
def embeddings(
    encoder: nn.Module,
    projector: nn.Module,
    dataset: Dataset,
    rows: Int[np.ndarray, " m"],
    intensity: settings.Intensity,
    device: torch.device,
    batch: int = 128,
) -> tuple[Float[Tensor, "m D"], dict[str, float]]:
    """z of whole, unaugmented images in evaluation mode, and what `leaning` says of these; the modules' own modes are
    restored."""
    modules = (encoder, projector)
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    read = reader(encoder, dataset, intensity, device)
    parts: list[Tensor] = []
    gates: list[Tensor] = []
    for start in range(0, len(rows), batch):
        parts.append(projector(encoder(*read(rows[start : start + batch]))).float().cpu())
        if isinstance(encoder, Fused) and encoder.mixture.gate is not None:
            gates.append(encoder.mixture.gate.float().cpu())
    for module, was_training in zip(modules, training, strict=True):
        module.train(was_training)
    return torch.cat(parts), leaning(torch.cat(gates)) if gates else {}


def leaning(gates: Float[Tensor, "m E"]) -> dict[str, float]:
    """How much a mixture leans on each of its experts: the mean gate, and the entropy of that mean in nats."""
    mean = gates.double().mean(dim=0)
    entropy = float(-torch.special.xlogy(mean, mean).sum())
    return {**{f"gate {name}": float(x) for name, x in zip(EXPERTS, mean, strict=True)}, "gate entropy": entropy}

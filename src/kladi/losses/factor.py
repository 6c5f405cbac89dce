"""The structure-aware contrast of several modalities: what share a factor agree, patient by patient.

h_mS(x) in R^(r_S) is what modality m says of the factors of structure S, zero where m takes no part. Over a batch

    phi_ij = sum_S sum_{m, k in S} < h_mS(x_i), h_kS(x_j) >
    contrast = -1/(2n) sum_i phi_ii + 1/(2n(n-1)) sum_{i != j} phi_ij  =  -1/2 sum_S sum_{m, k in S} tr Cov(h_mS, h_kS)

which a penalty on the covariance of what one modality says keeps from growing and its factors from saying the same:

    penalty = 1/4 sum_m || Cov(h_m) ||_F^2,    h_m all its blocks side by side

Where a modality is looked at twice (two views of an image), h'_kS of the second look takes the place of h_kS: a factor
is what both looks agree on. Of one modality with one structure that is the spectral contrastive loss of HaoChen et al.,
Provable guarantees for self-supervised deep learning with spectral contrastive loss, 2021, centred and halved.

Linear encoders with the penalty 1/4 || V V^T ||_F^2 of their weights in its place are the factor model itself. Of one
modality with one structure the loss is 1/4 || Cov(h) - I ||_F^2 up to a constant.

Source: Li, Yu, Zhou, Hierarchical contrastive learning for multimodal data, 2026, for the contrast; the published
penalty is not squared and rewards factors that oppose each other: this one is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from kladi.structure.lattice import Lattice, Structure


class StructureContrastLoss(nn.Module):
    """-1/2 sum_S sum_{m, k in S} tr Cov(h_mS, h'_kS) + weight/8 sum_m (|| Cov(h_m) ||_F^2 + || Cov(h'_m) ||_F^2)

    Covariances are unbiased, each over the patients that have both modalities, about the means of these. A pair that
    fewer than two patients have is left out; after a forward, `pairs` is int64[M, M], how many had both.

    Args:
        lattice: structures and ranks.
        weight: of the penalty, above 0.

    Shape: h a list of M, float[B, R_m] each, the blocks of modality m's structures side by side in the order of
    `lattice.structures`; present bool[B, M], None where all are; again, h' of a second look at the same patients, None
    where there was one look, h' = h. -> scalar. float64 in, float64 out; otherwise float32,
    also under autocast. What a patient's missing modality holds is not read, and has no gradient.

    Raises ValueError at construction for an impossible weight, and for blocks of other widths than the lattice's.
    """

    def __init__(self, lattice: Lattice, *, weight: float = 1.0) -> None:
        super().__init__()
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight must be a positive number, not {weight!r}; 1 is the usual one")
        self.lattice, self.weight = lattice, weight
        self.pairs: Tensor | None = None
        self._blocks = [blocks(lattice, m) for m in range(lattice.modalities)]

    @override
    def forward(
        self,
        h: Sequence[Float[Tensor, "B _"]],
        present: Bool[Tensor, "B M"] | None = None,
        again: Sequence[Float[Tensor, "B _"]] | None = None,
    ) -> Float[Tensor, ""]:
        self._require(h)
        if again is not None:
            self._require(again)
        if present is None:
            present = torch.ones(len(h[0]), len(h), dtype=torch.bool, device=h[0].device)
        self.pairs = present.long().T @ present.long()
        with torch.autocast(h[0].device.type, enabled=False):
            said = [_exact(part) for part in h]
            second = said if again is None else [_exact(part) for part in again]
            kept = [part[present[:, m]] for m, part in enumerate(said)]
            total = sum((part.sum() * 0 for part in kept), start=said[0].new_zeros(()))  # a graph whatever is missing
            for m, mine in enumerate(said):
                for k, theirs in enumerate(second):
                    both = present[:, m] & present[:, k]
                    if int(both.sum()) > 1:
                        total = total + self._pair(m, k, mine[both], theirs[both])
        return total

    def _pair(self, m: int, k: int, mine: Tensor, theirs: Tensor) -> Tensor:
        """What two modalities add, of patients that have both."""
        one, two = mine - mine.mean(dim=0), theirs - theirs.mean(dim=0)
        shared = [(self._blocks[m][s], self._blocks[k][s]) for s in self._blocks[m] if s in self._blocks[k]]
        agreed = [(one[:, a] * two[:, b]).sum() for a, b in shared]
        contrast = -0.5 * torch.stack(agreed).sum() / (len(one) - 1) if agreed else one.sum() * 0
        if m != k:
            return contrast
        looks = [look.T @ look / (len(look) - 1) for look in (one, two)]
        return contrast + 0.125 * self.weight * sum((c.square().sum() for c in looks), start=one.new_zeros(()))

    def _require(self, h: Sequence[Tensor]) -> None:
        widths = [int(self.lattice.of_modality(m).sum()) for m in range(self.lattice.modalities)]
        found = [part.shape[1] for part in h]
        if found != widths:
            raise ValueError(f"modalities say {found} factors; the lattice has {widths} for them")

    @override
    def extra_repr(self) -> str:
        return f"{self.lattice}, weight={self.weight}"


def _exact(part: Tensor) -> Tensor:
    return part if part.dtype == torch.float64 else part.float()


def blocks(lattice: Lattice, modality: int) -> dict[Structure, slice]:
    """Where each structure of a modality stands in what that modality says."""
    out: dict[Structure, slice] = {}
    start = 0
    for structure, rank in zip(lattice.structures, lattice.ranks, strict=True):
        if modality in structure:
            out[structure] = slice(start, start + rank)
            start += rank
    return out

"""A modality's own small network for each structure that it takes part in: what it says of the factors they share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from kladi.structure.lattice import Lattice, Structure, spelt

HIDDEN = (256, 128)


class FactorEncoder(nn.Module):
    """features of each modality -> what it says of its factors; and the factors of a patient, from whatever is there.

        h_mS = MLP_mS(features_m),   z_S = mean of h_mS over the modalities of S that are there

    One network a (modality, structure): two structures of one modality never share an output.

    Args:
        sizes: features of each modality.
        lattice: structures and ranks.
        hidden: widths of the layers between, of each modality; none: a linear map, e.g. of features that come from a
            network of their own. None: 256 and 128 for every one.

    Source: Li, Yu, Zhou, Hierarchical contrastive learning for multimodal data, 2026; there one network serves all
    structures of a size.
    """

    def __init__(
        self, sizes: Sequence[int], lattice: Lattice, *, hidden: Sequence[Sequence[int]] | None = None
    ) -> None:
        super().__init__()
        if len(sizes) != lattice.modalities:
            raise ValueError(f"{len(sizes)} modalities have sizes; the lattice has {lattice.modalities}")
        self.lattice = lattice
        widths = [HIDDEN] * len(sizes) if hidden is None else hidden
        if len(widths) != len(sizes):
            raise ValueError(f"{len(sizes)} modalities, and layers of {len(widths)}")
        self.networks = nn.ModuleDict(
            {
                _key(m, structure): _network(size, widths[m], rank)
                for m, size in enumerate(sizes)
                for structure, rank in zip(lattice.structures, lattice.ranks, strict=True)
                if m in structure
            }
        )

    @override
    def forward(self, features: Sequence[Float[Tensor, "B _"]]) -> list[Float[Tensor, "B _"]]:
        """Of each modality its blocks side by side, as `StructureContrastLoss` reads them; of one that takes part in
        nothing no column."""
        own = [[s for s in self.lattice.structures if m in s] for m in range(len(features))]
        return [
            torch.cat([x.new_zeros(len(x), 0), *(self.networks[_key(m, s)](x) for s in structures)], dim=1)
            for m, (structures, x) in enumerate(zip(own, features, strict=True))
        ]

    def factors(
        self, features: Sequence[Float[Tensor, "B _"]], present: Bool[Tensor, "B M"] | None = None
    ) -> Float[Tensor, "B R"]:
        """z, blocks in the order of the lattice; zero where no modality of a structure is there."""
        said = self(features)
        if present is None:
            present = torch.ones(len(said[0]), len(said), dtype=torch.bool, device=said[0].device)
        out: list[Tensor] = []
        starts = [0] * len(said)
        for structure, rank in zip(self.lattice.structures, self.lattice.ranks, strict=True):
            total = said[0].new_zeros(len(said[0]), rank)
            for m in structure:
                block = said[m][:, starts[m] : starts[m] + rank]
                total = total + block.where(present[:, m, None], 0.0)
                starts[m] += rank
            out.append(total / present[:, list(structure)].sum(dim=1, keepdim=True).clamp(min=1))
        return torch.cat(out, dim=1)


def _key(modality: int, structure: Structure) -> str:
    return f"{modality} of {spelt(structure)}"


def _network(size: int, hidden: Sequence[int], out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(size, width), nn.ReLU()]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, out))

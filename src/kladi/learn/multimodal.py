"""An image and tables of the same patient: what do all of them, some, or one of them say? One objective, any may be
missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from kladi.data.views.batch import Batch
from kladi.errors import UserError, suggestion
from kladi.learn import ranks as processes
from kladi.learn.facts import Facts
from kladi.learn.objectives import Supervised, Term
from kladi.losses.factor import StructureContrastLoss
from kladi.models.factors.encoder import HIDDEN, FactorEncoder
from kladi.models.heads import Projector
from kladi.structure.lattice import Lattice

IMAGE, TERM = "image", "factors"


class Multimodal(Supervised):
    """The structure-aware contrast of an image and the tables beside it.

        h_0S = U_S projector(encoder(view)),   h_mS = MLP_mS(table m),   loss = StructureContrastLoss(h, h')

    h and h' are of the two views; a table has one look. An image without a row in any table still counts by what its
    own two views agree on. Rows of several processes are gathered first: covariances are over the whole batch.

    Args:
        encoder: called with `view.inputs` -> [B, F].
        projector: [n, F] -> [n, D].
        lattice: structures of image (0) and tables (1, 2, ...), with their ranks.
        sizes: columns of each table.
        weight: of the penalty.
    """

    least = 2  # images in a batch: covariances need two

    def __init__(
        self, encoder: nn.Module, projector: Projector, lattice: Lattice, sizes: Sequence[int], *, weight: float = 1.0
    ) -> None:
        super().__init__(encoder, projector, {TERM: Term(StructureContrastLoss(lattice, weight=weight))})
        self.factors = FactorEncoder((projector.dim, *sizes), lattice, hidden=((), *[HIDDEN] * len(sizes)))

    @override
    def terms(self, embedded: Float[Tensor, "V B D"], batch: Batch) -> dict[str, Tensor]:
        """The one term, of the embedded batch; where several processes train, of all their batches."""
        z = processes.rows_of_all(embedded.transpose(0, 1)).transpose(0, 1)
        present = self._present(batch, z.shape[1])
        tables = [
            processes.rows_of_all(table).masked_fill(~there[:, None], 0.0)  # a gradient of 0 times NaN would be NaN
            for table, there in zip(batch.tables, present.T[1:], strict=True)
        ]
        self.idle = {TERM: float((~present[:, 1:].any(dim=1)).float().mean())}
        looks = [self.factors([view, *tables]) for view in z]
        return {TERM: self.losses[TERM](looks[0], present, looks[-1])}

    def _present(self, batch: Batch, images: int) -> Bool[Tensor, "B M"]:
        """The image always is there."""
        there = torch.ones(images, 1, dtype=torch.bool, device=batch.row.device)
        return there if batch.in_table is None else torch.cat([there, processes.rows_of_all(batch.in_table)], dim=1)

    @override
    def others(self, images: int, views: int) -> int:
        """Those that it is uncorrelated with."""
        return images - 1


def multimodal(
    facts: Facts,
    encoder: nn.Module,
    projector: Projector,
    *,
    ranks: int | dict[str, int] = 32,
    weight: float = 1.0,
) -> Supervised:
    """An image and the tables beside it say the same where they share a factor (needs --data.tables or .covariates).

    Source: Li, Yu, Zhou, Hierarchical contrastive learning for multimodal data, 2026; the second view is ours.

    Args:
        ranks: factors of every set of modalities, or of each that there is: {"image+clinic": 16, "image": 32}.
        weight: of the penalty on the covariance of what a modality says.
    """
    if not facts.tables:
        raise UserError(
            "--objective.name multimodal needs a table: --data.tables FILE, or columns of the manifest: "
            "--data.covariates age,sex"
        )
    names = (IMAGE, *facts.tables)
    lattice = Lattice.of(len(names), ranks if isinstance(ranks, int) else _numbered(ranks, names))
    if not lattice.of_modality(0).any():
        raise ValueError("ranks leave the image out; nothing would train it")
    return Multimodal(encoder, projector, lattice, tuple(facts.tables.values()), weight=weight)


def _numbered(ranks: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """`image+clinic` as `0+1`."""
    out: dict[str, int] = {}
    for text, rank in ranks.items():
        parts = [part.strip() for part in text.split("+")]
        unknown = [part for part in parts if part not in names]
        if unknown:
            raise ValueError(f'ranks: "{unknown[0]}" is no modality{suggestion(unknown[0], names)}')
        out["+".join(str(names.index(part)) for part in parts)] = rank
    return out

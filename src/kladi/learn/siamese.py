"""Four self-supervised methods as one module: predictor? x moving target? x criterion. It reads no label.

| method | after the projector | predictor | target | criterion |
|---|---|---|---|---|
| MoCo v3 | | yes | moving | finds its image in the other view |
| BYOL | | yes | moving | points where the other view does |
| DINO | prototypes | | moving | same distribution over prototypes |
| Barlow Twins | | | itself | correlation of dimensions |

SimCLR needs none of it: `Supervised` with one term that has no target. Its two views share one pass, and so their batch
statistics, as in its own code; here each view passes alone, as in that of these four.
"""

from __future__ import annotations

import copy
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from kladi.data.views.batch import Batch, View
from kladi.learn import ranks
from kladi.learn.objectives import Progress, Supervised, Term
from kladi.losses import MoCoV3Loss
from kladi.models.heads import Prototypes

STATISTICS = (nn.modules.batchnorm._BatchNorm,)
"""Layers of the target that work as in training, with its batches' own statistics; all others, dropout too, rest."""


class Siamese(Supervised):
    """Views of one image through one network, and a criterion on what comes out of each.

        z = projector(encoder(view)),   p = predictor(last(z)),   t = the moving copy's last(projector(encoder(view)))
        with a target: criterion(p, t), without: criterion(p)

    The copy follows after each step k of K: target <- m target + (1 - m) online, m = 1 - (1 - m_0)(1 + cos(pi k/K))/2.
    Its batch normalisation has its own statistics, its dropout is off, no gradient enters it.

    Rows of several processes are gathered behind the encoder: the heads, which normalise over the batch, see all of it.

    Args:
        encoder: called with `view.inputs` -> [B, F].
        projector: [n, F] -> [n, D].
        criterion: of z or p float[V, B, D], and of t where there is a target.
        name: of the term.
        predictor: of the online side alone; None: none.
        last: behind the projector on both sides; None: nothing.
        momentum: m_0; None: no target.
    """

    least = 2  # images in a batch: one alone has no batch statistics

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        criterion: nn.Module,
        *,
        name: str,
        predictor: nn.Module | None = None,
        last: nn.Module | None = None,
        momentum: float | None = None,
    ) -> None:
        super().__init__(encoder, projector, {name: Term(criterion)})
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie between 0 and 1, not {momentum!r}; 0.99 is the usual one")
        self.predictor = predictor or nn.Identity()
        self.last = last or nn.Identity()
        self.momentum = momentum
        self.target: nn.ModuleDict | None = None
        if momentum is not None:
            parts = {"encoder": encoder, "projector": projector, "last": self.last}
            self.target = nn.ModuleDict(copy.deepcopy(parts)).requires_grad_(False)
        self._follow = 0.0  # share of the online weights that the target takes over after this step
        self.train(self.training)

    @override
    def train(self, mode: bool = True) -> Siamese:
        super().train(mode)
        if self.target is not None:
            self.target.eval()
            for module in self.target.modules():
                if isinstance(module, STATISTICS):
                    module.train(mode)
        return self

    @override
    def embed(self, views: tuple[View, ...]) -> Float[Tensor, "V B F"]:
        """Features of each view, in a pass of its own; the heads come behind the gathering of all processes' rows."""
        return torch.stack([self.encoder(*view.inputs) for view in views])

    @override
    def terms(self, embedded: Float[Tensor, "V B F"], batch: Batch) -> dict[str, Tensor]:
        """The one term, of the embedded batch; where several processes train, of all their batches."""
        ((name, criterion),) = self.losses.items()
        self.idle = {name: 0.0}
        features = ranks.rows_of_all(embedded.transpose(0, 1)).transpose(0, 1)
        p = torch.stack([self.predictor(self.last(self.projector(view))) for view in features])
        return {name: criterion(p) if self.target is None else criterion(p, self._targets(self.target, batch))}

    @torch.no_grad()
    def _targets(self, target: nn.ModuleDict, batch: Batch) -> Float[Tensor, "V B D"]:
        features = torch.stack([target["encoder"](*view.inputs) for view in batch.views], dim=1)
        gathered = ranks.rows_of_all(features).transpose(0, 1)
        return torch.stack([target["last"](target["projector"](view)) for view in gathered])

    @override
    def others(self, images: int, views: int) -> int:
        """Those of another view's images, where the criterion tells images apart; else none."""
        (criterion,) = self.losses.values()
        return images - 1 if isinstance(criterion, MoCoV3Loss) else 0

    @override
    def before_step(self, progress: Progress) -> None:
        if self.momentum is not None:
            k = progress.step / progress.steps
            self._follow = (1 - self.momentum) * (1 + math.cos(math.pi * k)) / 2
        if isinstance(self.last, Prototypes):
            self.last.frozen = progress.epoch == 0

    @override
    @torch.no_grad()
    def after_step(self) -> None:
        if self.target is not None:
            online = nn.ModuleDict({"encoder": self.encoder, "projector": self.projector, "last": self.last})
            for mine, theirs in zip(self.target.parameters(), online.parameters(), strict=True):
                mine.lerp_(theirs, self._follow)

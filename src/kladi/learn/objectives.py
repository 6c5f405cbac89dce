"""What a step minimises: `objective(batch) -> {term: scalar}`, total = sum of weight x term.

`Supervised` shares one forward pass among named terms, each of which sees only the rows that have its target.
`siamese.py` has the methods with a predictor or a moving target; `presets.py` builds all of them by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from kladi.data.views.batch import Batch, View, joined
from kladi.learn import ranks
from kladi.losses.geometry import LearnedCurvature

LABEL, METADATA = "label", "metadata"
"""Names of targets in a batch: node ids, and label-set class ids."""


@dataclass(frozen=True)
class Term:
    """One summand: `weight * loss(z)` where `target` is empty, else `weight * loss(z, batch.target[target])`."""

    loss: nn.Module
    target: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Progress:
    """Where a training stands before a step. step: steps taken. steps: of the whole schedule. epoch: from 0."""

    step: int
    steps: int
    epoch: int


@dataclass(frozen=True)
class Answers:
    """What a classifier that is trained along can say: the node of each of its columns, and those that may be the
    answer."""

    columns: Sequence[str]
    nodes: Sequence[str]


class Supervised(nn.Module):
    """Terms that share one encoder, one projector and one forward pass.

    A term with a target sees only the rows that have it; where none has, it is a zero that keeps its graph. A term
    without a target sees every row. After a forward, `idle` holds for each term the share of rows (of those that it
    saw) without a positive.

    Args:
        encoder: called with `view.inputs`, [n, C, H, W] and what else the views carry -> [n, F].
        projector: [n, F] -> [n, D].
        terms: name -> `Term`.
        answers: of the one term that is a classifier; None where there is none.
    """

    least = 1  # images in a batch

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, terms: Mapping[str, Term], answers: Answers | None = None
    ) -> None:
        super().__init__()
        if not terms:
            raise ValueError("an objective needs at least one term")
        self.encoder, self.projector = encoder, projector
        self.losses = nn.ModuleDict({name: term.loss for name, term in terms.items()})
        self.targets = {name: term.target for name, term in terms.items()}
        self.weights = {name: term.weight for name, term in terms.items()}
        self.answers = answers
        self.idle: dict[str, float] = {}

    @override
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Each term, unweighted."""
        return self.terms(self.embed(batch.views), batch)

    def embed(self, views: tuple[View, ...]) -> Float[Tensor, "V B D"]:
        """What the losses see of these views: rows of the encoder and the projector."""
        return project(self.encoder, self.projector, views)

    def terms(self, embedded: Float[Tensor, "V B D"], batch: Batch) -> dict[str, Tensor]:
        """Each term, unweighted, of the embedded batch; where several processes train, of all their batches."""
        z = ranks.rows_of_all(embedded.transpose(0, 1)).transpose(0, 1)
        terms: dict[str, Tensor] = {}
        self.idle = {}
        for name, loss in self.losses.items():
            terms[name], self.idle[name] = self._term(loss, z, batch, self.targets[name])
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """The scalar to minimise."""
        return sum((self.weights[name] * term for name, term in terms.items()), start=next(iter(terms.values())) * 0)

    def others(self, images: int, views: int) -> int:
        """Embeddings of a batch that each is compared with."""
        return views * images - 1

    def learned(self) -> dict[str, float]:
        """Arguments that training has changed, as they are now: a learned curvature."""
        found = next((module for module in self.modules() if isinstance(module, LearnedCurvature)), None)
        return {} if found is None else {"curvature": found().number}

    def before_step(self, progress: Progress) -> None:
        """What hangs on where the training stands: nothing here."""

    def after_step(self) -> None:
        """What follows the parameters once the optimiser has moved them: nothing here."""

    def _term(self, loss: nn.Module, z: Float[Tensor, "V B D"], batch: Batch, target: str) -> tuple[Tensor, float]:
        if not target:
            return loss(z), _idle_share(loss)
        present: Bool[Tensor, " B"] = ranks.rows_of_all(batch.present[target])
        if not bool(present.any()):
            return z.float().sum() * 0, 1.0
        return loss(z[:, present], ranks.rows_of_all(batch.target[target])[present]), _idle_share(loss)


def project(encoder: nn.Module, projector: nn.Module, views: tuple[View, ...]) -> Float[Tensor, "V B D"]:
    """Embeddings of all views; views of one size share one pass, and so their batch statistics."""
    if len({view.image.shape for view in views}) > 1:
        return torch.stack([projector(encoder(*view.inputs)) for view in views])
    return projector(encoder(*joined(views).inputs)).unflatten(0, (len(views), -1))


def _idle_share(loss: nn.Module) -> float:
    idle: Any = getattr(loss, "idle", None)
    return 0.0 if idle is None else float(idle)

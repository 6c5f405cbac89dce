"""The gradient of a step whose batch is too large to embed at once: the loss sees all of it, the encoder parts of it.

A contrastive loss is a function of all embeddings together, so that gradients of parts do not add up. They do once the
gradient of the loss in each embedding is known: embed all without a graph, take the loss and its gradient in the
embeddings, then embed each part again, with a graph, and push its share of that gradient through.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021 (GradCache).
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from kladi.data.views.batch import Batch
from kladi.learn.objectives import Supervised


def backward(objective: Supervised, batch: Batch, fabric: Fabric, seed: int, chunk: int = 0) -> dict[str, Tensor]:
    """The terms of a step; the gradient of their total is added to that of the parameters.

    Args:
        seed: of whatever is random inside the encoder, in this process and this step.
        chunk: images embedded at a time, in all their views; 0: the whole batch, in one pass. The result is the same
            but for batch statistics, which are then those of a part, and for the random numbers.
    """
    if not 0 < chunk < len(batch.row):
        torch.manual_seed(seed)
        with fabric.autocast():
            terms = objective(batch)
        fabric.backward(objective.total(terms))
        return terms
    parts = [slice(start, start + chunk) for start in range(0, len(batch.row), chunk)]

    def embedded(number: int) -> Tensor:
        torch.manual_seed(seed + (number << 32))  # dropout falls alike both times
        views = tuple(view.changed(lambda tensor: tensor[parts[number]]) for view in batch.views)
        with fabric.autocast():
            return objective.embed(views)

    with torch.no_grad(), _statistics_at_rest(objective):
        z = torch.cat([embedded(number) for number in range(len(parts))], dim=1)
    z.requires_grad_()
    with fabric.autocast():
        terms = objective.terms(z, batch)
    fabric.backward(objective.total(terms))
    if z.grad is not None:
        for number, part in enumerate(parts):
            fabric.backward(embedded(number), gradient=z.grad[:, part])
    return {name: term.detach() for name, term in terms.items()}


@contextlib.contextmanager
def _statistics_at_rest(module: nn.Module) -> Generator[None]:
    """Batch normalisation as in training, with running statistics that stay: each image counts once, not twice."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True

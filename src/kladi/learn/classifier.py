"""Plain supervision: which of C classes an image is of. Head and criterion in one: both are dropped afterwards."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override


class LinearClassifier(nn.Module):
    """Cross-entropy of a linear classifier on the embeddings; the classifier is learnt, and dropped after pretraining.

        L = mean over rows of -log softmax(W z + b)[y]

    Args:
        classes: the ids that a target may be, C >= 2 distinct integers; column c stands for the c-th in order.
        dim: D of the embeddings.

    Shape: z float[V, B, D], target int64[B] -> scalar. The rows are not normalised. float64 in a float64 module;
    float32 also under autocast. No rows: a zero that keeps its graph.

    Raises:
        ValueError: fewer than two classes, or one twice.
        IndexError: a target that is no class, named.

    >>> loss = LinearClassifier([3, 7], dim=2)
    >>> _ = torch.nn.init.zeros_(loss.classifier.weight), torch.nn.init.zeros_(loss.classifier.bias)
    >>> round(loss(torch.ones(1, 4, 2), torch.tensor([3, 7, 7, 3])).item(), 6)
    0.693147
    """

    classes: Tensor

    def __init__(self, classes: list[int] | Int[Tensor, " C"], dim: int) -> None:
        super().__init__()
        ids = torch.as_tensor(classes, dtype=torch.int64).sort().values
        if len(ids) < 2 or len(ids.unique()) < len(ids):
            raise ValueError(f"classes must be two or more distinct ids, not {ids.tolist()}")
        self.register_buffer("classes", ids, persistent=False)
        self.classifier = nn.Linear(dim, len(ids))

    @override
    def forward(self, z: Float[Tensor, "V B D"], target: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """The loss of V views of B images."""
        column = torch.searchsorted(self.classes, target).clamp(max=len(self.classes) - 1)
        foreign = self.classes[column] != target
        if bool(foreign.any()):
            raise IndexError(f"target {int(target[foreign][0])} is none of the {len(self.classes)} classes")
        with torch.autocast(z.device.type, enabled=False):
            logits = self.classifier(z.flatten(0, 1).to(self.classifier.weight.dtype))
            if not len(logits):
                return logits.sum()
            return functional.cross_entropy(logits, column.repeat(len(z)))

    @override
    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"classes={len(self.classes)}, dim={self.classifier.in_features}"

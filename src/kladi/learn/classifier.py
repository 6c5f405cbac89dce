"""Supervision by classes: a linear classifier on the embeddings and its criterion in one. It is kept beside the
projector, so that its own answers can be asked for, and is no part of the encoder."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from kladi.losses.tree_cross_entropy import RowLoss


class LinearClassifier(nn.Module):
    """Cross-entropy of a linear classifier on the embeddings.

        L = mean over rows of -log softmax(W z + b)[y]

    Args:
        classes: the ids that a target may be, C >= 2 distinct integers; column c stands for the c-th in order.
        dim: D of the embeddings.
        label_smoothing: PyTorch's: this share of the target is spread over all classes.

    Shape: z float[V, B, D], target int64[B] -> scalar. The rows are not normalised. float64 in a float64 module;
    float32 also under autocast. No rows: a zero that keeps its graph.

    Raises:
        ValueError: fewer than two classes, or one twice; a smoothing outside [0, 1).
        IndexError: a target that is no class, named.

    >>> loss = LinearClassifier([3, 7], dim=2)
    >>> _ = torch.nn.init.zeros_(loss.classifier.weight), torch.nn.init.zeros_(loss.classifier.bias)
    >>> round(loss(torch.ones(1, 4, 2), torch.tensor([3, 7, 7, 3])).item(), 6)
    0.693147
    """

    classes: Tensor

    def __init__(self, classes: list[int] | Int[Tensor, " C"], dim: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        ids = torch.as_tensor(classes, dtype=torch.int64).sort().values
        if len(ids) < 2 or len(ids.unique()) < len(ids):
            raise ValueError(f"classes must be two or more distinct ids, not {ids.tolist()}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}; 0 switches it off")
        self.label_smoothing = label_smoothing
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
            return functional.cross_entropy(logits, column.repeat(len(z)), label_smoothing=self.label_smoothing)

    @override
    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"classes={len(self.classes)}, dim={self.classifier.in_features}"


class TreeClassifier(nn.Module):
    """A cross-entropy that knows a tree, of a linear classifier on the embeddings.

    Args:
        loss: of the tree, with one column a node or one a leaf.
        place: int64[N], the node of the loss's tree that each target stands for, -1 where it has none.
        dim: D of the embeddings.

    Shape: z float[V, B, D], target int64[B] -> scalar. Raises IndexError for a target without a place, named.
    """

    place: Tensor

    def __init__(self, loss: RowLoss, place: Int[Tensor, " N"], dim: int) -> None:
        super().__init__()
        self.loss = loss
        self.register_buffer("place", place, persistent=False)
        self.classifier = nn.Linear(dim, loss.columns)

    @override
    def forward(self, z: Float[Tensor, "V B D"], target: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """The loss of V views of B images."""
        foreign = (target < 0) | (target >= len(self.place))
        foreign |= self.place[target.clamp(0, len(self.place) - 1)] < 0
        if bool(foreign.any()):
            raise IndexError(f"target {int(target[foreign][0])} was no label in training")
        with torch.autocast(z.device.type, enabled=False):
            logits = self.classifier(z.flatten(0, 1).to(self.classifier.weight.dtype))
            return self.loss(logits, self.place[target].repeat(len(z)))

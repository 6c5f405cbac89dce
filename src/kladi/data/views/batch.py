"""The frozen values that travel from the data to the loss: `View` and `Batch`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class View:
    """One augmented look at each image of a batch.

    image: float[B, C, H, W], normalised as the encoder expects it.
    """

    image: Float[Tensor, "B C H W"]

    def to(self, device: torch.device) -> View:
        return View(self.image.to(device, non_blocking=True))


@dataclass(frozen=True)
class Batch:
    """What one step sees.

    views: V views of the same B images.
    target: name -> int64[B], e.g. "label" (node id of the taxonomy) and "metadata" (label-set class id).
    present: name -> bool[B], False where the row has no such target (its target entry is then 0 and must not be read).
    row: int64[B], position in the data set.
    """

    views: tuple[View, ...]
    target: Mapping[str, Int[Tensor, " B"]]
    present: Mapping[str, Bool[Tensor, " B"]]
    row: Int[Tensor, " B"]

    def to(self, device: torch.device) -> Batch:
        return Batch(
            tuple(view.to(device) for view in self.views),
            {name: value.to(device) for name, value in self.target.items()},
            {name: value.to(device) for name, value in self.present.items()},
            self.row.to(device),
        )

"""The frozen values that travel from the data to the loss: `View`, with `Diagrams` where topology is seen, `Batch`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kladi.structure.topology import Diagram


@dataclass(frozen=True)
class Diagrams:
    """The most persistent points of each image's persistence diagram, H0 first.

    points: float[B, k, 2], (birth, death). mask: bool[B, k], False where there is no such point: what `points` holds
    there must not be read.
    """

    points: Float[Tensor, "B k 2"]
    mask: Bool[Tensor, "B k"]

    @classmethod
    def of(cls, diagrams: Sequence[Diagram], k0: int, k1: int) -> Diagrams:
        """The k0 most persistent points of H0 and the k1 of H1 of each, float32."""
        found, k = [one.tokens(k0, k1) for one in diagrams], k0 + k1
        points = np.array([points for points, _ in found], dtype=np.float32).reshape(-1, k, 2)
        mask = np.array([mask for _, mask in found], dtype=bool).reshape(-1, k)
        return cls(torch.from_numpy(points), torch.from_numpy(mask))


@dataclass(frozen=True)
class View:
    """One augmented look at each image of a batch.

    image: float[B, C, H, W], normalised as the encoder expects it.
    diagram: of the same pixels, where the encoder looks at topology.
    """

    image: Float[Tensor, "B C H W"]
    diagram: Diagrams | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the encoder is called with: `encoder(*view.inputs)`."""
        return (self.image,) if self.diagram is None else (self.image, self.diagram.points, self.diagram.mask)

    def changed(self, change: Callable[[Tensor], Tensor]) -> View:
        """Every tensor of it changed in one way: some of the rows, another device."""
        diagram = self.diagram and Diagrams(change(self.diagram.points), change(self.diagram.mask))
        return View(change(self.image), diagram)

    def to(self, device: torch.device) -> View:
        return self.changed(lambda tensor: tensor.to(device, non_blocking=True))


def joined(views: Sequence[View]) -> View:
    """Views one after another, as one of all their rows."""
    diagrams = [view.diagram for view in views if view.diagram is not None]
    image = torch.cat([view.image for view in views])
    if not diagrams:
        return View(image)
    return View(image, Diagrams(torch.cat([d.points for d in diagrams]), torch.cat([d.mask for d in diagrams])))


@dataclass(frozen=True)
class Batch:
    """What one step sees.

    views: V views of the same B images.
    target: name -> int64[B], e.g. "label" (node id of the taxonomy) and "metadata" (label-set class id).
    present: name -> bool[B], False where the row has no such target (its target entry is then 0 and must not be read).
    row: int64[B], position in the data set.
    tables: float[B, d] of each modality beside the images; in_table: bool[B, tables], False where a row is not in it
        (what the table holds there must not be read). None where there are no tables.
    """

    views: tuple[View, ...]
    target: Mapping[str, Int[Tensor, " B"]]
    present: Mapping[str, Bool[Tensor, " B"]]
    row: Int[Tensor, " B"]
    tables: tuple[Float[Tensor, "B _"], ...] = ()
    in_table: Bool[Tensor, "B T"] | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch(
            tuple(view.to(device) for view in self.views),
            {name: value.to(device) for name, value in self.target.items()},
            {name: value.to(device) for name, value in self.present.items()},
            self.row.to(device),
            tuple(table.to(device) for table in self.tables),
            None if self.in_table is None else self.in_table.to(device),
        )

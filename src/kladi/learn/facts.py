"""What a preset may know of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from kladi.data.dataset import TRAIN, Dataset
from kladi.structure.labelset import LabelSets
from kladi.structure.taxonomy import Taxonomy


@dataclass(frozen=True)
class Facts:
    """Of the training rows, and nothing of the others.

    taxonomy: of the labels, or None. target: node id of each training row, -1 where unlabelled. label_sets: or None.
    tables: beside the images, and the columns of each.
    """

    taxonomy: Taxonomy | None
    target: Int[np.ndarray, " n"]
    label_sets: LabelSets | None
    tables: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: Dataset) -> Facts:
        tables = {one.name: len(one.features) for one in dataset.modalities}
        return cls(dataset.taxonomy, dataset.target[dataset.split == TRAIN], dataset.label_sets, tables)

    @property
    def labelled(self) -> int:
        return int((self.target >= 0).sum())

    @property
    def labels(self) -> Int[np.ndarray, " C"]:
        """The labels that occur."""
        return np.unique(self.target[self.target >= 0])

    @property
    def classes(self) -> int:
        return len(self.labels)

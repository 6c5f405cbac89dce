"""Manifest, pixels and structure joined once, at the border: from here on a row is an integer and a label is an id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, UInt64

from kladi.data.decoded.store import Store
from kladi.data.modalities import Modality
from kladi.data.pixels.masks import Mask
from kladi.structure.labelset import LabelSets
from kladi.structure.taxonomy import Taxonomy

TRAIN, VAL, TEST, HELD_OUT = 0, 1, 2, 3
PARTS = ("train", "val", "test", "held out")


@dataclass(frozen=True)
class Dataset:
    """What training and evaluation read; all arrays have one entry an image, in the order of the store.

    store: the decoded pixels.
    row_id: 64 bits of the content's digest (unique; ties broken by path).
    manifest_row: 1-based row of the manifest, to name an image to the user.
    group: patients as 0..G-1 (a row without an id is its own group).
    split: TRAIN, VAL, TEST as the manifest says; where it says nothing, TRAIN for about 70 % of the patients and
        HELD_OUT for the rest. Pretraining reads TRAIN rows only; the folds of the evaluation lie inside HELD_OUT.
    taxonomy: None where no row has a label.
    target: node id, -1 where unlabelled.
    label_sets: the metadata; None where no column was asked for.
    columns: the metadata (and site, source, ...) as text for reports, "" where unknown.
    has_patients: whether `group` comes from patient ids.
    masks: of each row, None where it has none; empty where they were not asked for.
    modalities: tables beside the images, those that were asked for.
    """

    store: Store
    row_id: UInt64[np.ndarray, " n"]
    manifest_row: Int[np.ndarray, " n"]
    group: Int[np.ndarray, " n"]
    split: Int[np.ndarray, " n"]
    taxonomy: Taxonomy | None
    target: Int[np.ndarray, " n"]
    label_sets: LabelSets | None
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    has_patients: bool = False
    masks: tuple[Mask | None, ...] = ()
    modalities: tuple[Modality, ...] = ()

    def __len__(self) -> int:
        return len(self.row_id)

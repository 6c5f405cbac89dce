"""Another patient's image for every image: the control that says whether it was this image's own topology."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, Int64, UInt64

from kladi.data.dataset import PARTS
from kladi.data.views import philox
from kladi.errors import UserError


def partners(
    split: Int[np.ndarray, " n"], group: Int[np.ndarray, " n"], row_id: UInt64[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """A permutation of the rows that leaves each in its split and maps none to an image of its own patient, fixed by
    the rows alone.

    Patients stand in a row in random order, and every image is mapped as far along as the largest of them has images.

    Raises:
        UserError: one patient has more than half of the images of a split: then there is none.
    """
    drawn = philox.uniform(0, "partners", row_id, 0, 0, 0)
    first = np.full(int(group.max(initial=-1)) + 1, np.inf)
    np.minimum.at(first, group, drawn)  # a patient's place, whatever its number
    out = np.arange(len(row_id))
    for part in np.unique(split):
        rows = np.flatnonzero(split == part)
        order = rows[np.lexsort((drawn[rows], first[group[rows]]))]
        largest = int(np.bincount(group[rows]).max())
        if 2 * largest > len(rows):
            what = f"one patient has {largest:,} of the {len(rows):,} images of {PARTS[int(part)]}"
            raise UserError(f"--topology.diagrams another: {what}, more than the others have to give")
        out[order] = np.roll(order, -largest)
    return out

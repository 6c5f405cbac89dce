"""One mask file -> which pixels of the stored square of its image it covers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from kladi import config as settings
from kladi.data.pixels.decode import open_bytes, read_bytes, read_frame
from kladi.data.pixels.frame import Limits, Unreadable
from kladi.data.pixels.intensity import fit

WHOLE_RANGE = settings.Intensity(channels=3, low=0.0, high=100.0)
"""No percentiles: a lesion may be a thousandth of its volume."""


@dataclass(frozen=True)
class MaskFile:
    """Where the mask of a row is.

    path: any format that images have; every value but the least is inside.
    frame: the row's own, which is read of a file that has several; -1: the one that stands for the whole file.
    limits: those of the images.
    """

    path: Path
    frame: int = -1
    limits: Limits = field(default_factory=Limits)

    def read(self, extent: Int[np.ndarray, " 4"], side: int) -> Bool[np.ndarray, "side side"]:
        """Where the mask is not zero, laid over the stored square of its image.

        Args:
            extent: top, left, height and width of the image in the square.
            side: of the square.

        Raises:
            Unreadable: it cannot be read, or has another shape than its image.
        """
        try:
            opened = open_bytes(read_bytes(self.path), WHOLE_RANGE, self.limits, name=str(self.path))
            pixels = read_frame(opened, self.frame if opened.frames > 1 else -1, WHOLE_RANGE).pixels.max(axis=0)
        except Unreadable as error:
            raise Unreadable(f"the mask {self.path.name} {error}", error.code) from error
        square, found = fit(np.where(pixels > 0, 255, 0).astype(np.uint8)[None], side)
        if np.abs(found[2:] - extent[2:]).max() > 1:
            shape = f"{pixels.shape[1]} x {pixels.shape[0]}"
            raise Unreadable(f"the mask {self.path.name} is {shape}, its image has another shape", "I5")
        return square[0] > 127

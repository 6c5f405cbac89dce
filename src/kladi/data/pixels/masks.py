"""One mask file -> which pixels of the stored square of its image it covers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from kladi import config as settings
from kladi.data.pixels.decode import decode
from kladi.data.pixels.frame import Unreadable
from kladi.data.pixels.intensity import fit
from kladi.errors import UserError


def read(path: Path, extent: Int[np.ndarray, " 4"], side: int, row: int) -> Bool[np.ndarray, "side side"]:
    """Where a mask is not zero, laid over the stored square of its image.

    Args:
        path: any format that images have; every value but the least is inside.
        extent: top, left, height and width of the image in the square.
        side: of the square.
        row: of the manifest, to name it.

    Raises:
        UserError: it cannot be read, or has another shape than its image.
    """
    try:
        pixels = decode(path, intensity=settings.Intensity(channels=3)).pixels.max(axis=0)
    except Unreadable as error:
        raise UserError(f"row {row:,}: the mask {path.name} {error}") from error
    square, found = fit(np.where(pixels > 0, 255, 0).astype(np.uint8)[None], side)
    if np.abs(found[2:] - extent[2:]).max() > 1:
        shape = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise UserError(f"row {row:,}: the mask {path.name} is {shape}, its image has another shape")
    return square[0] > 127

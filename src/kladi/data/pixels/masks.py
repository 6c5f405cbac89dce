"""One mask file -> which pixels of the stored square of its image it covers."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from kladi import config as settings
from kladi.data.findings import visible
from kladi.data.pixels.decode import open_bytes, read_bytes, read_frame
from kladi.data.pixels.frame import Limits, Unreadable
from kladi.data.pixels.intensity import fit

ABOVE_ZERO = settings.Intensity(channels=3, window="fixed", center=0.5, width=1.0)
"""0 and less become 0 whatever the type of the file, and no percentile has a say: a lesion may be a thousandth."""


@dataclass(frozen=True)
class Mask:
    """bool[side, side], packed: a few hundred bytes, so that those of all images fit into memory."""

    packed: bytes
    side: int

    @classmethod
    def of(cls, inside: Bool[np.ndarray, "side side"]) -> Mask:
        return cls(zlib.compress(np.packbits(inside).tobytes(), 1), len(inside))

    @property
    def bits(self) -> bytes:
        """Eight pixels a byte, in rows."""
        return zlib.decompress(self.packed)

    def square(self) -> Bool[np.ndarray, "side side"]:
        bits = np.unpackbits(np.frombuffer(self.bits, dtype=np.uint8), count=self.side**2)
        return bits.reshape(self.side, self.side).astype(bool)


@dataclass(frozen=True)
class MaskFile:
    """Where the mask of a row is.

    path: any format that images have; what is above zero is inside.
    frame: the row's own, which is read of a file that has several; -1: the one that stands for the whole file.
    limits: those of the images.
    """

    path: Path
    frame: int = -1
    limits: Limits = field(default_factory=Limits)

    def read(self, extent: Int[np.ndarray, " 4"], side: int) -> Bool[np.ndarray, "side side"]:
        """Where the mask is above zero, laid over the stored square of its image.

        Args:
            extent: top, left, height and width of the image in the square.
            side: of the square.

        Raises:
            Unreadable: it cannot be read, or has other proportions than its image.
        """
        name = visible(self.path.name)
        try:
            opened = open_bytes(read_bytes(self.path), ABOVE_ZERO, self.limits, name=str(self.path))
            pixels = read_frame(opened, self.frame if opened.frames > 1 else -1, ABOVE_ZERO).pixels.max(axis=0)
        except Unreadable as error:
            raise Unreadable(f"the mask {name} {error}", error.code) from error
        square, found = fit(np.where(pixels > 0, 255, 0).astype(np.uint8)[None], side)
        if np.abs(found[2:] - extent[2:]).max() > 1:
            shape = f"{pixels.shape[1]} x {pixels.shape[0]}"
            raise Unreadable(f"the mask {name} is {shape}, its image has other proportions", "I5")
        return square[0] > 127

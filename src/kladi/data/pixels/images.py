"""The one written intensity pipeline: file -> [0, 1] as integers -> square -> normalised tensor.

Every image that an encoder of this package has ever seen went through these steps, and `preprocess` replays them with
the `config.Intensity` that is kept beside the encoder's weights.

1. **Format.** By content. A suffix that says otherwise is a warning. What is no image is left out, its type named.
2. **Bounds.** From the header, before anything is allocated: shorter side at least 8 pixels, width x height at most
   `data.max_pixels`, all frames of a file at most 1 GiB, a deflated stream at most 512 MiB and 200 times its size.
   A file whose end is missing is left out; nothing is ever filled with grey.
3. **Stored values to [0, 1]**, kept as uint8 (/255) or uint16 (/65535):

   | values | rule |
   |---|---|
   | 1 bit, bool | 0 and 1 |
   | 8 bits (L, RGB, NPY uint8) | v / 255 |
   | 16 bits (I;16, big-endian too, NPY uint16) | v / 65535: the full range, whatever part of it is used |
   | TIFF of 9 to 15 bits | v / (2^bits - 1) |
   | palette (P, PA) | expanded to RGB |
   | alpha (LA, PA, RGBA) | dropped, not blended |
   | CMYK | to RGB |
   | TIFF "white is zero" | inverted |
   | 16-bit colour, grey with alpha | 16 bits are kept |
   | floats that all lie in [0, 1] | as they are |
   | other floats, signed and 32-bit integers | percentiles; `window = "fixed"`: (v - center)/width + 1/2 |
   | NIfTI, whatever its type | after slope and intercept, the same, percentiles of the whole volume |
   | DICOM | modality step, VOI, MONOCHROME1: see `dicom` |

   NaN and infinity leave an image out; `data.nonfinite = "zero"` keeps it, with zeros there. A constant image between
   equal percentiles is 0. Other modes (LAB, HSV, ...) are left out. Colour profiles and gamma are not applied.
4. **Upright.** EXIF or TIFF orientation is applied once.
5. **Frame.** -1 is the first page or frame, of a volume or an array stack the middle one.
6. **Channels.** Three channels that agree everywhere count as grey. `channels = 1`: colour becomes 0.299 R + 0.587 G +
   0.114 B; `channels = 3`: grey is repeated.
7. **Size.** Longer side to S = ceil(size x 8/7), aspect kept, bilinear with antialiasing, centred on zeros. That square
   is what the store keeps. A JPEG of more than six times S may be decoded at 1/2, 1/4 or 1/8 first, never below three
   times S.
8. **Encoder's view.** `augment.plain`: the image part of the square to `size`, zeros around, then (x - mean) / std.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float32
from torch import Tensor

from kladi import config as settings
from kladi.data.pixels.arrays import open_stack
from kladi.data.pixels.decode import Decoded, count_frames, decode, read_frame
from kladi.data.pixels.frame import Limits, Unreadable
from kladi.data.pixels.intensity import fit, store_side


def preprocess(
    image: str | Path | np.ndarray, intensity: settings.Intensity, *, frame: int = -1, limits: Limits | None = None
) -> Float32[Tensor, "C size size"]:
    """What the encoder sees of an image: steps 1 to 8, the same bits as training's evaluation view.

    Args:
        image: a file, or an array [H, W] or [H, W, 3] (a stack [D, H, W] too: `frame` chooses).
        intensity: the pipeline that is kept with the encoder.
        frame: page, slice or frame, from 0; -1: the default.
        limits: bounds; default `Limits()`.

    Raises:
        Unreadable: no image; the reason says why.
    """
    from kladi.data.views.augment import plain

    if not isinstance(image, str | Path | np.ndarray):  # what a palette means a Pillow image alone knows
        raise TypeError(f"a {type(image).__name__} is no image: give a path, or an array [H, W] or [H, W, 3]")
    limits = limits or Limits()
    if isinstance(image, np.ndarray):
        decoded = read_frame(open_stack(image, "array", intensity, limits), frame, intensity)
    else:
        decoded = decode(image, frame, intensity, limits)
    square, extent = fit(decoded.pixels, store_side(intensity.size))
    return plain(square[None], extent[None], intensity)[0]


__all__ = ["Decoded", "Limits", "Unreadable", "count_frames", "decode", "fit", "preprocess", "store_side"]

"""Whole, unaugmented images of a data set, and where in each of them its diagram is made."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Shaped
from torch import Tensor

from kladi import config as settings
from kladi.data.dataset import Dataset
from kladi.data.pixels.intensity import fit, store_side
from kladi.data.views import augment
from kladi.data.views.region import foregrounds
from kladi.errors import UserError

CPU = torch.device("cpu")


def images(
    dataset: Dataset, rows: Int[np.ndarray, " b"], intensity: settings.Intensity, device: torch.device = CPU
) -> Float32[Tensor, "b C S S"]:
    """As an encoder of this pipeline sees them in evaluation."""
    pixels = torch.as_tensor(dataset.store.gather(rows)).to(device, non_blocking=True)
    return augment.plain(pixels, dataset.store.extent[rows], intensity)


def pictures(
    dataset: Dataset, rows: Int[np.ndarray, " b"], intensity: settings.Intensity
) -> Float32[Tensor, "b C S S"]:
    """The same in [0, 1], before normalisation, on the CPU."""
    return images(dataset, rows, dataclasses.replace(intensity, mean=(0.0,), std=(1.0,))).clamp_(0, 1)


def masks(
    dataset: Dataset, rows: Int[np.ndarray, " b"], seen: Float[Tensor, "b C S S"], region: str
) -> list[Bool[np.ndarray, "S S"]]:
    """Where the diagrams of these rows look, in the words of `topology.region`; none: everywhere.

    Args:
        seen: the images of the rows, whose grey levels tell the foreground.

    Raises:
        UserError: masks that were not read with the data.
    """
    if region == "foreground":
        return foregrounds(seen)
    return [_mask(dataset, int(row), seen.shape[-1]) for row in rows] if region == "mask" else []


def _mask(dataset: Dataset, row: int, size: int) -> Bool[np.ndarray, "S S"]:
    """Nothing where the row has no mask, which is everything."""
    if not dataset.masks:
        raise UserError('topology.region = "mask": this data set was read without its masks; set it for the data too')
    mask = dataset.masks[row]
    if mask is None:
        return np.zeros((size, size), dtype=bool)
    return _seen(mask.square(), dataset.store.extent[row], size)


def laid(mask: Shaped[np.ndarray, "..."], size: int) -> Bool[np.ndarray, "S S"]:
    """A mask in the pixels of its image over the square that an encoder sees of it; over such a square, as it is."""
    if mask.ndim != 2 or not mask.size:
        raise ValueError(f"a mask of shape {mask.shape}; it takes [H, W]")
    inside = mask > 0
    if inside.shape == (size, size):
        return inside
    square, extent = fit((inside * np.uint8(255))[None], store_side(size))
    return _seen(square[0] > 127, extent, size)


def _seen(inside: Bool[np.ndarray, "s s"], extent: Int[np.ndarray, " 4"], size: int) -> Bool[np.ndarray, "S S"]:
    """What is inside in a stored square, in the square that an encoder sees."""
    bare = settings.Intensity(size=size, channels=1, mean=(0.0,), std=(1.0,))
    return augment.plain((inside * np.uint8(255))[None, None], extent[None], bare)[0, 0].numpy() > 0.5

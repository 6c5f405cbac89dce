"""The two controls that every pretraining must beat: an untrained network, and grey levels without any network."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int

from kladi import config as settings
from kladi.data.dataset import Dataset
from kladi.data.views import augment

BINS = 64
SIDE = 32
COMPONENTS = 64
LUMINANCE = (0.299, 0.587, 0.114)


def grey_features(
    dataset: Dataset, intensity: settings.Intensity, *, rows: Int[np.ndarray, " m"] | None = None, batch: int = 512
) -> Float32[np.ndarray, "m G"]:
    """64 histogram bins and 32 x 32 grey pixels of each image, G = 64 + 1024; made comparable by `GreyScale`.

    The histogram is of the image's own area, not of the zeros around it, and is given by square roots, so that every
    histogram has length one. The pixels are those of the evaluation view, in [0, 1]. `rows`: of these only, None: all.
    """
    small = dataclasses.replace(intensity, size=SIDE, mean=(0.0,), std=(1.0,))
    rows = np.arange(len(dataset)) if rows is None else rows
    out = np.zeros((len(rows), BINS + SIDE * SIDE), dtype=np.float32)
    for start in range(0, len(rows), batch):
        place = np.arange(start, min(start + batch, len(rows)))
        index = rows[place]
        stored, extent = dataset.store.gather(index), dataset.store.extent[index]
        for one, image, (top, left, height, width) in zip(place, stored, extent, strict=True):
            inside = _grey(image[:, top : top + height, left : left + width] / np.iinfo(image.dtype).max)
            level = np.minimum((inside * BINS).astype(np.int64), BINS - 1)
            out[one, :BINS] = np.sqrt(np.bincount(level.ravel(), minlength=BINS) / max(level.size, 1))
        view = augment.plain(torch.as_tensor(stored), extent, small).numpy()
        out[place, BINS:] = _grey(view.swapaxes(0, 1)).reshape(len(index), -1)
    return out


def fit_grey(features: Float[np.ndarray, "n G"], train: Bool[np.ndarray, " n"]) -> Float32[np.ndarray, "n 128"]:
    """Histogram and the first 64 principal components of the pixels, fitted on training rows: float32[n, 128].

    The components are scaled to a mean training length of one, so that neither half of the vector drowns the other.
    Where the training rows span fewer directions, the rest is zero.
    """
    pixels = features[:, BINS:].astype(np.float64)
    rows = pixels[train]
    centre = rows.mean(axis=0)
    # The smaller of the two products has the same nonzero spectrum; at most 1024 x 1024 either way.
    _, values, axes = np.linalg.svd(_compact(rows - centre), full_matrices=False)
    kept = axes[: min(COMPONENTS, int((values > 1e-9 * max(values.max(initial=0.0), 1e-300)).sum()))]
    scores = (pixels - centre) @ kept.T
    length = np.linalg.norm(scores[train], axis=1).mean() if len(kept) else 1.0
    scores /= length if length > 0 else 1.0
    nothing = np.zeros((len(scores), COMPONENTS - scores.shape[1]))
    return np.concatenate([features[:, :BINS], scores, nothing], axis=1).astype(np.float32)


def _compact(rows: np.ndarray) -> np.ndarray:
    """A matrix with the same right singular vectors and no more rows than columns."""
    return np.asarray(np.linalg.qr(rows, mode="r")) if rows.shape[0] > rows.shape[1] else rows


def _grey(image: np.ndarray) -> np.ndarray:
    """Channels first; colour becomes luminance."""
    if len(image) == 1:
        return image[0]
    return np.tensordot(np.array(LUMINANCE), image[:3], axes=1)

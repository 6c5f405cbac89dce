"""Encoder -> `Embeddings`, once: everything that is measured afterwards reads this value, and needs no pixels.

Evaluation mode, no augmentation, float32, the intensity pipeline that the encoder was trained with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import nn

from kladi import config as settings
from kladi.data.dataset import Dataset
from kladi.data.embeddings import Embeddings
from kladi.errors import UserError
from kladi.models import fused


def embed(
    encoder: nn.Module,
    dataset: Dataset,
    *,
    head: nn.Module | None = None,
    intensity: settings.Intensity | None = None,
    batch: int = 256,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Embeddings:
    """Run every image of the data set through the encoder, once. One that was trained with the diagrams of other images
    is given those of the same others.

    Args:
        encoder: float[B, C, H, W] -> [B, F]; put into evaluation mode for the while, and left on `device`.
        dataset: decoded by the encoder's own intensity pipeline.
        head: [B, F] -> [B, D], what pretraining optimised; None where there is none.
        intensity: of the images; None: the encoder's own (`encoder.intensity`).
        batch: images at a time.
        device: "auto" is the first accelerator, else the CPU.
        progress: called with (done, of) after each batch.

    Raises:
        UserError: the encoder carries no intensity pipeline and none is given, or an embedding is not finite.
    """
    pipeline: Any = intensity or getattr(encoder, "intensity", None)
    if pipeline is None:
        raise UserError("this encoder carries no intensity pipeline; give embed(..., intensity=) that of its training")
    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    n = len(dataset)
    features: list[np.ndarray] = []
    outputs: list[np.ndarray] = []
    modules = [encoder] + ([head] if head is not None else [])
    training = [module.training for module in modules]
    for module in modules:
        module.to(place).eval()
    read = fused.reader(encoder, dataset, pipeline, place)
    try:
        with torch.inference_mode():
            for start in range(0, n, batch):
                index = np.arange(start, min(start + batch, n))
                found = encoder(*read(index)).float()
                features.append(found.cpu().numpy())
                if head is not None:
                    outputs.append(head(found).float().cpu().numpy())
                if progress is not None:
                    progress(int(index[-1]) + 1, n)
    finally:
        for module, was_training in zip(modules, training, strict=True):
            module.train(was_training)
    return describe(dataset, _stacked(features, dataset), z=_stacked(outputs, dataset) if head is not None else None)


def describe(
    dataset: Dataset, features: Float32[np.ndarray, "n F"], z: Float32[np.ndarray, "n D"] | None = None
) -> Embeddings:
    """Features of a data set, however they were made, joined with what the data set knows of each row."""
    return Embeddings(
        features=features,
        z=z,
        row_id=dataset.row_id,
        pixel_digest=dataset.store.pixel_digest,
        manifest_row=dataset.manifest_row,
        target=dataset.target,
        group=dataset.group,
        split=dataset.split,
        columns=dict(dataset.columns),
        taxonomy=dataset.taxonomy,
        has_patients=dataset.has_patients,
    )


def _stacked(parts: list[np.ndarray], dataset: Dataset) -> Float32[np.ndarray, "n F"]:
    if not parts:
        return np.zeros((0, 0), dtype=np.float32)
    whole = np.concatenate(parts)
    bad = np.flatnonzero(~np.isfinite(whole).all(axis=1))
    if len(bad):
        rows = ", ".join(f"{int(r):,}" for r in dataset.manifest_row[bad[:5]])
        raise UserError(
            f"the encoder gives NaN or infinity for {len(bad)} images (rows {rows}); its weights are damaged"
        )
    return whole

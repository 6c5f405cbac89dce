"""Encoder -> `Embeddings`, once: everything that is measured afterwards reads this value, and needs no pixels.

Evaluation mode, no augmentation, float32, the intensity pipeline that the encoder was trained with.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int, UInt64
from torch import nn

from kladi import config as settings
from kladi.data.dataset import Dataset
from kladi.errors import UserError
from kladi.evaluate.record.files import write_private
from kladi.models import fused
from kladi.structure.taxonomy import Taxonomy

FORMAT, VERSION = "kladi-embeddings", 1
_COLUMN = "column/"


@dataclass(frozen=True)
class Embeddings:
    """What an encoder makes of a data set, an entry an image, and what is known of each image. No pixels, no ids.

    features: float32[n, F] of the encoder.
    z: float32[n, D] of the head that pretraining optimised, not normalised; None where there is none.
    row_id: uint64[n], 64 bits of the content's digest.
    pixel_digest: uint64[n], of the decoded pixels; equal for copies of one picture.
    manifest_row: int64[n], 1-based row of the manifest.
    target: int64[n], node id, -1 where unlabelled.
    group: int64[n], patients as 0..G-1.
    split: int64[n], as in `Dataset`.
    columns: metadata as text, "" where unknown.
    taxonomy: None where no row has a label.
    has_patients: whether `group` comes from patient ids.
    """

    features: Float32[np.ndarray, "n F"]
    z: Float32[np.ndarray, "n D"] | None
    row_id: UInt64[np.ndarray, " n"]
    pixel_digest: UInt64[np.ndarray, " n"]
    manifest_row: Int[np.ndarray, " n"]
    target: Int[np.ndarray, " n"]
    group: Int[np.ndarray, " n"]
    split: Int[np.ndarray, " n"]
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    taxonomy: Taxonomy | None = None
    has_patients: bool = False

    def __len__(self) -> int:
        return len(self.row_id)

    def write(self, path: Path) -> None:
        """`embeddings.npz`, readable by its owner alone; arrays and plain text, no pickle."""
        arrays: dict[str, Any] = {
            "features": self.features,
            "row_id": self.row_id,
            "pixel_digest": self.pixel_digest,
            "manifest_row": self.manifest_row,
            "target": self.target,
            "group": self.group,
            "split": self.split,
        }
        if self.z is not None:
            arrays["z"] = self.z
        for name, values in self.columns.items():
            arrays[_COLUMN + name] = np.array(values, dtype=np.str_)
        about = {
            "format": FORMAT,
            "version": VERSION,
            "has_patients": self.has_patients,
            "columns": list(self.columns),
            "taxonomy": self.taxonomy.to_dict() if self.taxonomy is not None else None,
        }
        arrays["about"] = np.array(json.dumps(about, ensure_ascii=False))
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_private(path, buffer.getvalue())

    @classmethod
    def read(cls, path: Path) -> Embeddings:
        """The inverse of `write`.

        Raises:
            UserError: no such file, damaged, or not embeddings of this version; Python objects in it are never loaded.
        """
        try:
            with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(str(arrays["about"]))
            if about["format"] != FORMAT or about["version"] != VERSION:
                raise UserError(f"{path}: embeddings of version {about['version']}; this kladi reads version {VERSION}")
            return cls(
                features=arrays["features"],
                z=arrays.get("z"),
                row_id=arrays["row_id"],
                pixel_digest=arrays["pixel_digest"],
                manifest_row=arrays["manifest_row"],
                target=arrays["target"],
                group=arrays["group"],
                split=arrays["split"],
                columns={name: tuple(map(str, arrays[_COLUMN + name])) for name in about["columns"]},
                taxonomy=Taxonomy.from_dict(about["taxonomy"]) if about["taxonomy"] else None,
                has_patients=bool(about["has_patients"]),
            )
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file; kladi embed writes it") from error
        except UserError:
            raise
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: damaged, or not embeddings that kladi wrote") from error


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

"""`Embeddings`: what an encoder makes of a data set, as a value and as a file."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, UInt64

from kladi.data.private_files import write_private
from kladi.errors import UserError
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

    def places(self, row_id: UInt64[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
        """Where images of these contents stand; -1 where they do not."""
        if not len(self):
            return np.full(len(row_id), -1)
        order = np.argsort(self.row_id, kind="stable")
        near = order[np.minimum(np.searchsorted(self.row_id[order], row_id), len(order) - 1)]
        return np.where(self.row_id[near] == row_id, near, -1)

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

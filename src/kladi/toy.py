"""Generated images with a known label tree and known metadata, so that structure can be tested where truth is known.

A picture is one shape with a texture on a noisy ground. Its label is a path in the tree family / shape / texture. Its
metadata are independent of the label: `modality` decides the kind of noise and the polarity, `anatomy` the direction in
which the ground brightens. A patient has several pictures, all with the patient's own brightness.

    round   / disc, ring  / plain, striped
    angular / box, cross  / plain, striped
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int, UInt8
from PIL import Image
from typing_extensions import override

from kladi.data.dataset import HELD_OUT, TRAIN, Dataset
from kladi.data.decoded.store import Store
from kladi.data.pixels.intensity import fit, store_side
from kladi.structure.labelset import LabelSets
from kladi.structure.taxonomy import Taxonomy

FAMILIES = {"round": ("disc", "ring"), "angular": ("box", "cross")}
TEXTURES = ("plain", "striped")
LEAVES = tuple(f"{family}/{shape}/{t}" for family, shapes in FAMILIES.items() for shape in shapes for t in TEXTURES)
MODALITIES = ("us", "mr", "xr")
ANATOMIES = ("chest", "head")
UNKNOWN_SHARE = 0.2
"""Share of the pictures whose anatomy nobody wrote down."""
HELD_OUT_SHARE = 0.3


@dataclass(frozen=True)
class Pictures:
    """What a manifest would say of `n` pictures, and their pixels; "" where a label or an anatomy is unknown."""

    pixels: UInt8[np.ndarray, "n size size"]
    label: tuple[str, ...]
    patient: tuple[str, ...]
    modality: tuple[str, ...]
    anatomy: tuple[str, ...]


@dataclass(frozen=True)
class ArrayStore(Store):
    """A store whose pixels lie in memory."""

    @override
    def gather(self, index: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b C S S"]:
        return self.images[index]


def pictures(n: int, size: int = 32, seed: int = 0, labelled: float = 1.0, images_per_patient: int = 3) -> Pictures:
    """`n` pictures of `size` x `size` pixels, leaves in turn; the same arguments give the same bits.

    Args:
        n: how many.
        size: side, pixels.
        seed: of everything.
        labelled: share that has a label; the others' is "".
        images_per_patient: of each patient, the last one may have fewer.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    leaf = np.arange(n) % len(LEAVES)
    patient = order // images_per_patient
    brightness = rng.uniform(0.8, 1.0, n)[patient]
    modality = rng.integers(len(MODALITIES), size=n)
    anatomy = rng.integers(len(ANATOMIES), size=n)
    unknown = rng.random(n) < UNKNOWN_SHARE
    known_label = rng.permutation(n) < round(labelled * n)
    pixels = np.stack(
        [
            _drawn(LEAVES[leaf[i]], MODALITIES[modality[i]], ANATOMIES[anatomy[i]], brightness[i], size, rng)
            for i in range(n)
        ]
    )
    return Pictures(
        pixels=np.rint(255 * pixels).astype(np.uint8),
        label=tuple(LEAVES[leaf[i]] if known_label[i] else "" for i in range(n)),
        patient=tuple(f"p{number:04d}" for number in patient),
        modality=tuple(MODALITIES[m] for m in modality),
        anatomy=tuple("" if unknown[i] else ANATOMIES[a] for i, a in enumerate(anatomy)),
    )


def dataset(n: int = 64, size: int = 32, seed: int = 0, labelled: float = 1.0, channels: int = 1) -> Dataset:
    """Pictures as a data set in memory: tree, metadata, patients, 30 % of the patients held out.

    `size` is that of the views (`intensity.size`); the store keeps 8/7 of it, as for files.
    """
    shown = pictures(n, size, seed, labelled)
    side = store_side(size)
    squares = np.stack([fit(np.repeat(picture[None], channels, axis=0), side)[0] for picture in shown.pixels])
    tree = taxonomy()
    target = np.full(n, -1, dtype=np.int64)
    known = np.array([bool(label) for label in shown.label])
    if known.any():
        target[known] = tree.index([label for label in shown.label if label])
    group = np.unique(shown.patient, return_inverse=True)[1].astype(np.int64)
    columns = {"modality": shown.modality, "anatomy": shown.anatomy}
    return Dataset(
        store=_in_memory(squares),
        row_id=_row_id(squares),
        manifest_row=np.arange(1, n + 1),
        group=group,
        split=np.where(group >= round((1 - HELD_OUT_SHARE) * (group.max() + 1)), HELD_OUT, TRAIN).astype(np.int64),
        taxonomy=tree,
        target=target,
        label_sets=LabelSets.from_columns({name: [cell or None for cell in cells] for name, cells in columns.items()}),
        columns=columns,
        has_patients=True,
    )


def write(folder: str | Path, n: int = 64, size: int = 32, seed: int = 0, labelled: float = 1.0) -> Path:
    """Pictures as files: `images/*.png`, `tree.csv` (child, parent) and `manifest.csv`, whose path is returned."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    shown = pictures(n, size, seed, labelled)
    rows = []
    for i, picture in enumerate(shown.pixels):
        name = f"images/{i:05d}.png"
        Image.fromarray(picture).save(folder / name)
        rows.append((name, shown.label[i], shown.patient[i], shown.modality[i], shown.anatomy[i]))
    _write_csv(folder / "tree.csv", ("child", "parent"), edges())
    _write_csv(folder / "manifest.csv", ("path", "label", "patient_id", "modality", "anatomy"), rows)
    return folder / "manifest.csv"


def taxonomy() -> Taxonomy:
    """The tree of the labels: 2 families, 4 shapes, 8 leaves."""
    return Taxonomy.from_edges([(child, parent or None) for child, parent in edges()])


def edges() -> list[tuple[str, str]]:
    """(child, parent) of every node, "" above the families; a node's name is its whole path."""
    paths = {leaf.rsplit("/", up)[0] for leaf in LEAVES for up in range(3)}
    return [(path, path.rpartition("/")[0]) for path in sorted(paths, key=lambda path: (path.count("/"), path))]


def _drawn(
    leaf: str, modality: str, anatomy: str, brightness: float, size: int, rng: np.random.Generator
) -> Float64[np.ndarray, "size size"]:
    """One picture in [0, 1]."""
    _, shape, texture = leaf.split("/")
    center = rng.uniform(-0.15, 0.15, 2)
    radius = rng.uniform(0.5, 0.7)
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    y, x = axis[:, None] - center[0], axis[None, :] - center[1]
    distance = np.hypot(x, y)
    inside = {
        "disc": distance < radius,
        "ring": (distance < radius) & (distance > 0.5 * radius),
        "box": np.maximum(abs(x), abs(y)) < 0.85 * radius,
        "cross": (np.minimum(abs(x), abs(y)) < 0.3 * radius) & (np.maximum(abs(x), abs(y)) < radius),
    }[shape]
    stripes = np.floor(np.arange(size) * 8 / size)[:, None] % 2 if texture == "striped" else 0.0
    ground = 0.15 + 0.1 * (y if anatomy == "chest" else x)
    picture = brightness * np.where(inside, 0.85 - 0.45 * stripes, ground)
    noise = rng.normal(size=(size, size))
    picture = picture * (1 + 0.15 * noise) if modality == "us" else picture + 0.05 * noise
    picture = np.clip(picture, 0, 1)
    return 1 - picture if modality == "xr" else picture


def _in_memory(squares: UInt8[np.ndarray, "n C S S"]) -> ArrayStore:
    n, side = len(squares), squares.shape[-1]
    row_id = _row_id(squares)
    return ArrayStore(
        images=squares,
        extent=np.tile(np.array([0, 0, side, side], dtype=np.int32), (n, 1)),
        row_id=row_id,
        pixel_digest=row_id,
        source=np.arange(n),
        digest=hashlib.sha256(squares.tobytes()).hexdigest(),
        folder=Path(os.devnull) / "store",  # nothing can be kept beside it
    )


def _row_id(squares: UInt8[np.ndarray, "n C S S"]) -> np.ndarray:
    return np.array([int.from_bytes(hashlib.sha256(s.tobytes()).digest()[:8], "big") for s in squares], dtype=np.uint64)


def _write_csv(path: Path, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)

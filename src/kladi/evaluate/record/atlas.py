"""A map of the representation: at most 2,000 images in the plane, coloured by what is known of them, with thumbnails.

`map.json` and `thumbnails.json` lie beside results.json; the report draws them and needs nothing else. A map is a
picture, never evidence: the purity beside it is computed in the full space, where the eye cannot look.
"""

from __future__ import annotations

import base64
import io
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from kladi.data.dataset import HELD_OUT, TEST, TRAIN, VAL, Dataset
from kladi.data.decoded.store import Store
from kladi.data.embeddings import Embeddings
from kladi.data.private_files import write_private
from kladi.evaluate.readouts.neighbours import purity, unit

MOST_POINTS = 2000
THUMBNAIL = 48
"""Longest side of a thumbnail, pixels: enough to tell a chest from a foot, too little to read a name."""
NEIGHBOURS = 10
FEWEST_UMAP = 500
"""With fewer points there is little to unfold, and compiling UMAP takes longer than everything else."""
SPLIT_NAMES = {TRAIN: "train", VAL: "val", TEST: "test", HELD_OUT: "held out"}
HIDDEN_MODALITIES = frozenset({"us", "ivus", "ultrasound", "sc", "secondary capture", "ot"})
"""Kinds of image that carry text in their pixels, often a name: never shown."""
BURNT_IN_COLUMNS = ("burnt_in", "burned_in_annotation", "BurnedInAnnotation")


@dataclass(frozen=True)
class Atlas:
    """Points and what colours them.

    rows: positions in the data set. columns: text of each point, "" unknown. purity: of each column but the split.
    """

    kind: str
    rows: Int[np.ndarray, " n"]
    points: Float[np.ndarray, "n 2"]
    columns: dict[str, tuple[str, ...]]
    purity: dict[str, Purity]


@dataclass(frozen=True)
class Purity:
    """Share of the NEIGHBOURS nearest images that agree, among `n` images that the encoder was not trained on.

    chance: what it is where every image has random neighbours. value and chance are nan with too few images.
    """

    value: float
    chance: float
    n: int


def draw(embeddings: Embeddings, *, seed: int = 0, most: int = MOST_POINTS, kind: str = "auto") -> Atlas:
    """The plane of a fixed sample of the embeddings.

    Args:
        embeddings: features are compared by cosine.
        seed: of the sample and the layout. The sample does not depend on the order of the rows.
        most: points at most; UMAP above some thousands takes minutes.
        kind: "umap", "pca", or "auto": UMAP where umap-learn is installed and there are enough rows for it.
    """
    rows = _sample(embeddings, most, seed)
    vectors = unit(embeddings.features[rows])
    if kind == "auto":
        kind = "umap" if find_spec("umap") is not None and len(rows) >= FEWEST_UMAP else "pca"
    points = _umap(vectors, seed) if kind == "umap" else _pca(vectors)
    columns = _columns(embeddings, rows)
    # An encoder puts what it was trained on where its labels are: that would say nothing about other patients.
    unseen = embeddings.split[rows] != TRAIN
    agreement = {
        name: _agreement(vectors[unseen], _codes(values)[unseen]) for name, values in columns.items() if name != "split"
    }
    return Atlas(kind, rows, points, columns, agreement)


def shown(embeddings: Embeddings, rows: Int[np.ndarray, " m"]) -> Bool[np.ndarray, " m"]:
    """Which rows may be shown as thumbnails: no ultrasound, no secondary capture, nothing marked as burnt in.

    A row is what its column `modality` or the top of its label says, whichever hides it.
    """
    visible = np.ones(len(rows), dtype=bool)
    modality = embeddings.columns.get("modality")
    if modality is not None:
        visible &= np.array([not _parts(modality[r]) & HIDDEN_MODALITIES for r in rows], dtype=bool)
    for name in BURNT_IN_COLUMNS:
        marked = embeddings.columns.get(name)
        if marked is not None:
            visible &= np.array([marked[r].strip().casefold() in {"", "no", "false", "0"} for r in rows], dtype=bool)
    if embeddings.taxonomy is not None:
        tops = top_names(embeddings)
        visible &= np.array([not _parts(tops[r]) & HIDDEN_MODALITIES for r in rows], dtype=bool)
    return visible


def thumbnails(store: Store, rows: Int[np.ndarray, " m"]) -> list[str]:
    """PNG data URIs of the stored images, without the zeros around them, at most 48 pixels a side, 8 bits."""
    out = []
    for start in range(0, len(rows), 256):
        index = rows[start : start + 256]
        for image, (top, left, height, width) in zip(store.gather(index), store.extent[index], strict=True):
            inside = image[:, top : top + height, left : left + width]
            grey = (inside.astype(np.float64) * (255 / np.iinfo(image.dtype).max)).round().astype(np.uint8)
            picture = Image.fromarray(grey[0] if len(grey) == 1 else grey[:3].transpose(1, 2, 0))
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG", optimize=True)
            out.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"))
    return out


def write(embeddings: Embeddings, dataset: Dataset, folder: Path, *, seed: int = 0, kind: str = "auto") -> Atlas:
    """`map.json` and, where any image may be shown, `thumbnails.json`, both readable by their owner alone."""
    atlas = draw(embeddings, seed=seed, kind=kind)
    visible = shown(embeddings, atlas.rows)
    places = np.where(visible, np.cumsum(visible) - 1, -1)
    content: dict[str, Any] = {
        "kind": atlas.kind,
        "points": _rounded(atlas),
        "columns": {name: list(values) for name, values in atlas.columns.items()},
        "purity": _purities(atlas),
        "thumbnail": [int(place) if place >= 0 else None for place in places],
    }
    write_private(folder / "map.json", json.dumps(content, sort_keys=True, allow_nan=False).encode())
    pictures = folder / "thumbnails.json"
    if visible.any():
        write_private(pictures, json.dumps(thumbnails(dataset.store, atlas.rows[visible])).encode())
    else:
        pictures.unlink(missing_ok=True)  # of an earlier evaluation into the same folder
    return atlas


def write_panels(
    methods: Sequence[tuple[str, Embeddings]], folder: Path, *, seed: int = 0, kind: str = "auto", colour: str = ""
) -> None:
    """`map.json` of several methods: the same images in one panel each, with what colours them all.

    Args:
        methods: name and embeddings of the same rows, at least one.
        folder: beside results.json.
        seed: of the sample and the layouts.
        kind: as in `draw`.
        colour: the column that colours; "": modality and anatomy together, else the first column there is.
    """
    drawn = [(name, draw(embeddings, seed=seed, kind=kind)) for name, embeddings in methods]
    first = drawn[0][1]
    columns = dict(first.columns)
    if not colour and {"modality", "anatomy"} <= columns.keys():
        colour = "modality, anatomy"
        pairs = zip(columns["modality"], columns["anatomy"], strict=True)
        columns[colour] = tuple(f"{a}, {b}" if a and b else "" for a, b in pairs)
    colour = colour or next(iter(columns))
    content = {
        "kind": first.kind,
        "columns": {colour: list(columns[colour])},
        "colour": colour,
        "panels": [{"method": name, "points": _rounded(atlas), "purity": _purities(atlas)} for name, atlas in drawn],
    }
    write_private(folder / "map.json", json.dumps(content, sort_keys=True, allow_nan=False).encode())


def _sample(embeddings: Embeddings, most: int, seed: int) -> np.ndarray:
    """Positions of the sampled rows, drawn among the row ids and not among the positions."""
    by_id = np.argsort(embeddings.row_id, kind="stable")
    if len(by_id) > most:
        by_id = by_id[np.random.default_rng([seed, 0x6D6170]).permutation(len(by_id))[:most]]
    return by_id


def _columns(embeddings: Embeddings, rows: np.ndarray) -> dict[str, tuple[str, ...]]:
    """Each level of the tree (with what is above it, as whole names), then metadata, then the split."""
    found: dict[str, tuple[str, ...]] = {}
    tax = embeddings.taxonomy
    target = embeddings.target[rows]
    if tax is not None and tax.is_tree:
        table = tax.ancestor_table
        for level in range(table.shape[1]):
            nodes = np.where(target >= 0, table[target, level], -1)
            found[f"label, level {level + 1}" if table.shape[1] > 1 else "label"] = _names(tax.names, nodes)
    elif tax is not None:
        found["label"] = _names(tax.names, target)
    for name, values in embeddings.columns.items():
        if name not in BURNT_IN_COLUMNS:
            found[name] = tuple(values[r] for r in rows)
    found["split"] = tuple(SPLIT_NAMES.get(int(s), "") for s in embeddings.split[rows])
    return {name: values for name, values in found.items() if len(set(values)) > 1 or name == "split"}


def _rounded(atlas: Atlas) -> list[list[float]]:
    return [[round(float(x), 4), round(float(y), 4)] for x, y in atlas.points]


def _purities(atlas: Atlas) -> dict[str, dict[str, Any]]:
    return {
        name: {"k": NEIGHBOURS, "value": _or_none(p.value), "chance": _or_none(p.chance), "n": p.n}
        for name, p in atlas.purity.items()
    }


def _agreement(vectors: Float[np.ndarray, "m F"], codes: Int[np.ndarray, " m"]) -> Purity:
    known = codes[codes >= 0]
    n, counts = len(known), np.bincount(known) if len(known) else np.zeros(1)
    chance = float((counts * (counts - 1)).sum() / (n * (n - 1))) if n > NEIGHBOURS else math.nan
    return Purity(purity(vectors, codes, k=NEIGHBOURS), chance, n)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _names(names: tuple[str, ...], nodes: Int[np.ndarray, " n"]) -> tuple[str, ...]:
    return tuple(names[node] if node >= 0 else "" for node in nodes)


def _codes(values: tuple[str, ...]) -> np.ndarray:
    """Integers for texts, -1 for unknown."""
    codes = np.unique(np.array(values), return_inverse=True)[1]
    return np.where(np.array(values) == "", -1, codes)


def top_names(embeddings: Embeddings) -> list[str]:
    """Name of the top node above each row's label, "" without a label."""
    tax = embeddings.taxonomy
    if tax is None:
        return [""] * len(embeddings)
    tops = [min(tax.ancestors(node).tolist()) for node in range(len(tax.names))]
    return [tax.names[tops[node]] if node >= 0 else "" for node in embeddings.target]


def parted_names(embeddings: Embeddings, rows: Int[np.ndarray, " n"]) -> list[str]:
    """Of each row the node above its label on the first level on which the labelled rows differ, "" without one."""
    tax, target = embeddings.taxonomy, embeddings.target[rows]
    if tax is None or not tax.is_tree:
        return np.array(top_names(embeddings))[rows].tolist()
    table = tax.ancestor_table
    known = table[target[target >= 0]]
    parting = np.flatnonzero([len(np.unique(level)) > 1 for level in known.T])
    level = int(parting[0]) if len(parting) else 0
    nodes = [int(table[node, level]) if node >= 0 else -1 for node in target]
    return [tax.names[node] if node >= 0 else "" for node in nodes]


def _parts(text: str) -> set[str]:
    return {part.strip().casefold() for part in text.split("|")}


def _pca(vectors: np.ndarray) -> np.ndarray:
    """The first two principal components; each axis points where its largest entry is positive, so that it repeats."""
    if not len(vectors):
        return np.zeros((0, 2))
    centred = vectors - vectors.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    points = centred @ axes.T
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))


def _umap(vectors: np.ndarray, seed: int) -> np.ndarray:
    """UMAP, cosine, 15 neighbours, one thread: the only way in which it repeats."""
    with warnings.catch_warnings():
        # Its own dependencies warn of their future at import; nothing that a user could act on.
        warnings.filterwarnings("ignore", category=ImportWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="n_jobs value", category=UserWarning)
        import umap

        layout = umap.UMAP(n_neighbors=min(15, len(vectors) - 1), metric="cosine", random_state=seed, n_jobs=1)
        return np.asarray(layout.fit_transform(vectors.astype(np.float32)), dtype=np.float64)

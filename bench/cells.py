"""Blood cells of the mosaic with two tables beside the images: shapes from masks, and counts by hand.

    python bench/cells.py MANIFEST OUT

Writes OUT/manifest.csv (the images below SM/blood), OUT/shapes.csv (of those with a mask: areas, roundness and colour
of nucleus and cytoplasm) and OUT/counts.csv (of those that were counted: red cells, white cells, platelets). No image
is in both tables.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image
from scipy import ndimage

CYTOPLASM, NUCLEUS = 128, 255
LEAST_PIECE = 20
"""Pixels of a piece of nucleus that counts as one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    write(options.manifest, options.out)


def write(manifest: Path, out: Path) -> Path:
    """The three files; the manifest's path is returned."""
    root = manifest.absolute().parent
    out.mkdir(parents=True, exist_ok=True)
    table = pl.read_csv(manifest, infer_schema_length=0).filter(pl.col("label").str.starts_with("SM/blood"))
    absolute = pl.concat_str(pl.lit(f"{root}/"), pl.col("path"))
    masked = table.filter(pl.col("mask").is_not_null())
    shapes = [
        {"path": str(root / path), **shape(root / path, root / mask)}
        for path, mask in masked.select("path", "mask").iter_rows()
    ]
    pl.DataFrame(shapes).write_csv(out / "shapes.csv")
    counted = pl.read_csv(root / "bccd_counts.csv")
    counted.with_columns(path=absolute).write_csv(out / "counts.csv")
    table.with_columns(path=absolute).drop("mask").write_csv(out / "manifest.csv")
    return out / "manifest.csv"


def shape(image: Path, mask: Path) -> dict[str, float]:
    """Of one cell."""
    with Image.open(mask) as opened:
        parts = np.asarray(opened)
    with Image.open(image) as opened:
        pixels = np.asarray(opened.convert("RGB"), dtype=float) / 255
    nucleus, cell = parts == NUCLEUS, parts > 0
    pieces, _ = ndimage.label(nucleus)
    sizes = np.bincount(pieces.ravel())[1:]
    found = {
        "cell": float(cell.mean()),
        "nucleus share": float(nucleus.sum() / max(cell.sum(), 1)),
        "nucleus roundness": roundness(nucleus),
        "cell roundness": roundness(cell),
        "pieces": float((sizes >= LEAST_PIECE).sum()),
        "holes": float(ndimage.binary_fill_holes(nucleus).sum() - nucleus.sum()),
    }
    for name, part in (("nucleus", nucleus), ("cytoplasm", parts == CYTOPLASM)):
        if part.any():
            for colour, value in zip(("red", "green", "blue"), pixels[part].mean(axis=0), strict=True):
                found[f"{name} {colour}"] = float(value)
    return found


def roundness(part: np.ndarray) -> float:
    """4 pi area / perimeter^2, of the pixel edges between in and out: less than 1 even of a disc, least of arms."""
    padded = np.pad(part, 1).astype(int)
    edges = np.abs(np.diff(padded, axis=0)).sum() + np.abs(np.diff(padded, axis=1)).sum()
    return float(4 * np.pi * part.sum() / max(edges, 1) ** 2)


if __name__ == "__main__":
    main()

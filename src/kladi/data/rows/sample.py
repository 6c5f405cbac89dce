"""A few images of each label instead of all of them, by lot: how a large set becomes a small one with every class."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl

from kladi.data.findings import Finding, counted
from kladi.data.rows.manifest import Manifest
from kladi.data.views import philox


def at_most(manifest: Manifest, most: int, seed: int) -> Manifest:
    """The manifest with at most so many training files of each label.

    The files of a label, sorted by path, are drawn by the counter generator keyed by (seed, label): the same seed gives
    the same files, and another label more or less changes none of them. Rows of val and test and rows without a label
    all stay.

    Args:
        most: files of a label; 0 keeps all.
    """
    table = manifest.table
    if not most:
        return manifest
    eligible = table.filter(pl.col("label").is_not_null() & (pl.col("split").fill_null("train") == "train"))
    left: list[int] = []
    for (label,), files in eligible.unique("row").sort("path", "row").group_by("label", maintain_order=True):
        drawn = philox.uniform(seed, f"sample\0{label}", np.arange(files.height, dtype=np.uint64), 0, 0, 0)
        beyond = np.argsort(drawn, kind="stable")[most:]
        left += files["row"].gather(beyond).to_list()
    if not left:
        return manifest
    what = f"{counted(len(left), 'image')} beyond {most:,} of their label, drawn by lot with seed {seed}"
    finding = Finding("M20", "skipped", f"{what}; --data.most_per_label 0 keeps all")
    kept = table.filter(~pl.col("row").is_in(left))
    return dataclasses.replace(manifest, table=kept, findings=(*manifest.findings, finding))

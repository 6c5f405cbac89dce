"""Column `mask` of a manifest -> which part of each image its diagram is made of, read once and kept in memory.

All masks are read before anything is trained, and never again: a file that changes or vanishes while a run is on can
neither stop it nor reach a diagram that other runs share.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import polars as pl

from kladi import config as settings
from kladi.data.decoded.store import Store
from kladi.data.findings import Finding
from kladi.data.pixels.frame import Limits, Unreadable
from kladi.data.pixels.masks import Mask, MaskFile
from kladi.data.rows.manifest import Manifest
from kladi.data.rows.paths import BLANK, FAULTS, FOLDER, OK, locate
from kladi.data.views.region import LEAST_AREA, MOST_AREA, Region
from kladi.errors import UserError, suggestion

COLUMN = "mask"
"""Names a file a row; rows may leave it blank."""


def read(
    rows: Manifest, pixels: Store | None, data: settings.Data
) -> tuple[tuple[Mask | None, ...], tuple[Finding, ...]]:
    """One mask an image of the store, None where the row has none; and what is wrong, an error for whatever is named
    and cannot be used.

    Args:
        pixels: None where no image could be read: then the paths alone are looked at.

    Raises:
        UserError: there is no column of masks.
    """
    if COLUMN not in rows.table.columns:
        known = suggestion(COLUMN, rows.table.columns)
        raise UserError(f'--topology.region mask needs a column "{COLUMN}" that names a file a row{known}')
    table = rows.table if pixels is None else rows.table[pixels.source.tolist()]
    located = locate(rows.root, table[COLUMN], allow_outside=data.allow_outside)
    named = [
        Finding(code, "warning" if state == BLANK else "error", f"mask: {_words(state, what)}", some)
        for state, (code, _, what) in FAULTS.items()
        if (some := tuple(table["row"].filter(located.state == state).to_list()))
    ]
    if pixels is None:
        return (), tuple(named)
    limits, side = Limits.of(data), pixels.images.shape[-1]

    def one(position: int) -> Mask | Unreadable | None:
        if located.state[position] != OK:  # said already; what is refused is not opened either
            return None
        file = MaskFile(rows.root / located.path[position], table["frame"][position], limits)
        try:
            return Mask.of(file.read(pixels.extent[position], side))
        except Unreadable as error:
            return error

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(one, range(len(table))))
    return tuple(m if isinstance(m, Mask) else None for m in found), (*named, *_faults(found, table["row"]))


def _words(state: int, what: str) -> str:
    return {BLANK: "none is named; the whole image is looked at", FOLDER: "a folder, no file"}.get(state, what)


def _faults(found: list[Mask | Unreadable | None], row: pl.Series) -> list[Finding]:
    """Masks that cannot be read, and how many say as little as none."""
    each = list(zip(found, row.to_list(), strict=True))
    faults = [Finding(m.code, "error", str(m), (number,)) for m, number in each if isinstance(m, Unreadable)]
    idle = tuple(number for m, number in each if isinstance(m, Mask) and Region.of(m.square()) is None)
    if idle:
        share = f"under {LEAST_AREA:.0%} or over {MOST_AREA:.0%} of the image"
        faults.append(Finding("I9", "warning", f"mask: covers {share}; the whole of it is looked at", idle))
    return faults

"""PALETTE COLOR: stored indices -> RGB, by plain or segmented tables (PS3.3 C.7.6.3.1.5 and C.7.9.2)."""

from __future__ import annotations

import numpy as np
import pydicom
from jaxtyping import UInt8, UInt16

from kladi.data.pixels.dicom_header import words
from kladi.data.pixels.frame import Unreadable

COLOURS = ("Red", "Green", "Blue")
LONGEST = 65536
"""Entries that a descriptor can name."""


def apply_palette(
    values: np.ndarray, dataset: pydicom.Dataset, *, signed: bool, big_endian: bool
) -> UInt8[np.ndarray, "H W 3"] | UInt16[np.ndarray, "H W 3"]:
    """Each index through the three tables; an index below or beyond a table takes its first or last entry.

    uint8 where the tables have 8 bits (or claim 16 and hold nothing above 255, as some writers do), else uint16.

    Raises:
        Unreadable: D8 where a table is missing or damaged.
    """
    channels: list[np.ndarray] = []
    wide = False
    for colour in COLOURS:
        descriptor = words(dataset, f"{colour}PaletteColorLookupTableDescriptor", big_endian=big_endian)
        if len(descriptor) != 3:
            raise Unreadable("a palette without its descriptor", "D8")
        count, first, bits = int(descriptor[0]) or LONGEST, int(descriptor[1]), int(descriptor[2])
        if signed and first >= 32768:
            first -= 65536
        table = _table(dataset, colour, count, bits, big_endian=big_endian)
        wide |= bits > 8 and int(table.max()) > 255
        channels.append(table[np.clip(values.astype(np.int64) - first, 0, count - 1)])
    return np.stack(channels, axis=-1).astype(np.uint16 if wide else np.uint8)


def _table(dataset: pydicom.Dataset, colour: str, count: int, bits: int, *, big_endian: bool) -> np.ndarray:
    data = words(dataset, f"{colour}PaletteColorLookupTableData", big_endian=big_endian)
    if not len(data):
        data = words(dataset, f"Segmented{colour}PaletteColorLookupTableData", big_endian=big_endian)
        data = expand_segments(data if bits > 8 else _bytes(data, big_endian=big_endian), count)
    elif bits <= 8 and len(data) < count:  # two entries a word
        data = _bytes(data, big_endian=big_endian)
    if len(data) < count:
        raise Unreadable(f"a palette of {len(data)} entries instead of {count}", "D8")
    return data[:count] & np.uint16(0xFF) if bits <= 8 else data[:count]


def _bytes(data: UInt16[np.ndarray, " n"], *, big_endian: bool) -> UInt16[np.ndarray, " m"]:
    return data.astype(">u2" if big_endian else "<u2").view(np.uint8).astype(np.uint16)


def expand_segments(data: UInt16[np.ndarray, " n"], count: int) -> UInt16[np.ndarray, " m"]:
    """A segmented table: (0, n, v1 .. vn) values, (1, n, v) n steps in a line to v. At most `count` entries are made.

    Raises:
        Unreadable: D8 for indirect segments, which no rule of ours covers, and for damage.
    """
    out: list[np.ndarray] = []
    made, at = 0, 0
    while at < len(data) and made < count:
        kind, length = int(data[at]), int(data[at + 1]) if at + 1 < len(data) else 0
        if kind == 0 and at + 2 + length <= len(data):
            part = data[at + 2 : at + 2 + length].astype(np.float64)
            at += 2 + length
        elif kind == 1 and out and at + 2 < len(data):
            start, end = float(out[-1][-1]), float(data[at + 2])
            part = start + (end - start) * np.arange(1, length + 1) / max(length, 1)
            at += 3
        else:
            raise Unreadable("a segmented palette with damaged or indirect segments", "D8")
        if not len(part):
            raise Unreadable("a segmented palette with an empty segment", "D8")
        out.append(part)
        made += len(part)
    return np.rint(np.concatenate(out or [np.zeros(0)])[:count]).astype(np.uint16)

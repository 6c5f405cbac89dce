"""Diagrams of views made once: a file of them beside the decoded images, shared by all runs that draw the same views.

A record is what the encoder reads of one draw of one row: the most persistent points, births and deaths in 16 bits, at
most 1/131,070 off. Its checksum is over the points and over the row's mark, which says what the diagram was made of:
half a record, and one of another region or other grey levels, counts as none and is made again. What is read
is the same whether a record was there or not, so that neither a crash nor another run can change a bit.
"""

from __future__ import annotations

import contextlib
import os
import stat
import zlib
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt32

from kladi.data.views.batch import Diagrams
from kladi.structure.topology import Diagram

FINEST = 65535


class KeptDiagrams:
    """A file of `rows` records a draw, written as they are made; the parts that nobody asked for take no room.

    Args:
        file: what it is called says what it was made of; where it cannot be written, diagrams are made each time.
        rows: of the data set.
        k0, k1: points of H0 and of H1 that are kept.
    """

    def __init__(self, file: Path, rows: int, k0: int, k1: int) -> None:
        self.file, self.rows, self.k0, self.k1 = file, rows, k0, k1
        self._record = np.dtype([("sum", "<u4"), ("count", "<u2", 2), ("points", "<u2", (k0 + k1, 2))])

    def __call__(
        self,
        draw: int,
        rows: Int[np.ndarray, " b"],
        mark: UInt32[np.ndarray, " b"],
        make: Callable[[Int64[np.ndarray, " m"]], Sequence[Diagram]],
    ) -> Diagrams:
        """Those of one draw of these rows.

        Args:
            draw: from 0 on.
            mark: of each row, what its diagram is made of.
            make: positions in `rows` -> their diagrams; asked for what is not there.
        """
        records = self._read(draw, rows)
        sums = np.array([self._sum(one, int(of)) for one, of in zip(records, mark, strict=True)], dtype=np.uint32)
        absent = np.flatnonzero((records["sum"] != sums) | (sums == 0))  # a blank record has the sum 0
        if len(absent):
            found = Diagrams.of(make(absent), self.k0, self.k1)
            there = found.mask.numpy()
            records["count"][absent] = np.stack([there[:, : self.k0].sum(1), there[:, self.k0 :].sum(1)], axis=1)
            records["points"][absent] = np.rint(found.points.numpy() * FINEST)
            for position in absent:
                records["sum"][position] = self._sum(records[position], int(mark[position]))
            self._write(draw, rows[absent], records[absent])
        place, (n0, n1) = np.arange(self.k0 + self.k1), records["count"].T.astype(np.int64)
        mask = (place < n0[:, None]) | ((place >= self.k0) & (place < self.k0 + n1[:, None]))
        points = records["points"].astype(np.float32) / np.float32(FINEST)
        return Diagrams(torch.from_numpy(points), torch.from_numpy(mask))

    def _sum(self, record: np.void, mark: int) -> int:
        return zlib.crc32(record["points"].tobytes(), zlib.crc32(record["count"].tobytes(), mark))

    def _offset(self, draw: int, row: int) -> int:
        return (draw * self.rows + row) * self._record.itemsize

    def _read(self, draw: int, rows: Int[np.ndarray, " b"]) -> np.ndarray:
        records = np.zeros(len(rows), dtype=self._record)
        with contextlib.suppress(OSError), _opened(self.file, os.O_RDONLY) as file:
            for position, row in enumerate(rows.tolist()):
                file.seek(self._offset(draw, row))
                said = file.read(self._record.itemsize)
                if len(said) == self._record.itemsize:
                    records[position] = np.frombuffer(said, dtype=self._record)[0]
        return records

    def _write(self, draw: int, rows: Int[np.ndarray, " m"], records: np.ndarray) -> None:
        """A folder that cannot be written, or is full, costs time and nothing else."""
        with (
            contextlib.suppress(OSError),
            _opened(self.file, os.O_RDWR | os.O_CREAT) as file,
        ):
            for row, record in zip(rows.tolist(), records, strict=True):
                file.seek(self._offset(draw, row))
                file.write(record.tobytes())


def _opened(path: Path, how: int) -> FileIO:
    """Unbuffered; a pipe of that name would be waited for without end.

    Raises:
        OSError: it is no regular file, or cannot be opened.
    """
    number = os.open(path, how | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o600)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(f"{path.name} is no regular file")
    return FileIO(number, "r+b" if how & os.O_RDWR else "rb")

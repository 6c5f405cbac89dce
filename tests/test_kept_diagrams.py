"""Diagrams kept in a file: what is read is what was made, or it is made again."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kladi.data.views.batch import Diagrams
from kladi.data.views.kept_diagrams import KeptDiagrams
from kladi.structure.topology import Diagram, diagram

ROWS, K0, K1 = 20, 3, 5
MARKS = np.arange(1000, 1000 + ROWS, dtype=np.uint32)


def made(row, draw=0):
    """Some row's diagram; that of every fourth is empty."""
    rng = np.random.default_rng([row, draw])
    return Diagram.empty() if row % 4 == 0 else diagram(rng.random((row % 5 + 3, 6)))


class Asked:
    """Makes diagrams of rows and remembers how many."""

    def __init__(self, rows, draw=0):
        self.rows, self.draw, self.count = rows, draw, 0

    def __call__(self, absent):
        self.count += len(absent)
        return [made(int(row), self.draw) for row in self.rows[absent]]


def ask(kept, rows, draw=0, marks=MARKS):
    asked = Asked(rows, draw)
    return kept(draw, rows, marks[rows], asked), asked.count


def assert_right(found, rows, draw=0):
    wanted = Diagrams.of([made(int(row), draw) for row in rows], K0, K1)
    assert (found.mask == wanted.mask).all()
    assert (found.points - wanted.points).abs().max() <= 1 / 131070 + 1e-7
    assert (found.points[~found.mask] == 0).all()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "diagrams.bin"


def test_each_is_made_once_whoever_asks(file):
    first, second = (KeptDiagrams(file, ROWS, K0, K1) for _ in range(2))
    rows = np.array([7, 2, 19, 0])
    found, count = ask(first, rows)
    assert count == 4
    assert_right(found, rows)
    more = np.array([0, 5, 19, 7, 2, 4])
    again, count = ask(second, more)
    assert count == 2
    assert_right(again, more)
    assert (again.points[[3, 4, 2, 0]] == found.points).all()
    other, count = ask(second, rows, draw=3)
    assert count == 4
    assert_right(other, rows, draw=3)
    assert ask(first, rows)[1] == 0
    assert file.stat().st_mode & 0o777 == 0o600


def test_it_is_the_same_before_and_after_it_is_kept(file):
    rows = np.arange(ROWS)
    before, _ = ask(KeptDiagrams(file, ROWS, K0, K1), rows)
    after, count = ask(KeptDiagrams(file, ROWS, K0, K1), rows)
    assert count == 0
    assert (before.points == after.points).all()
    assert (before.mask == after.mask).all()


def test_another_region_is_another_diagram(file):
    kept, rows = KeptDiagrams(file, ROWS, K0, K1), np.arange(ROWS)
    ask(kept, rows)
    marks = MARKS.copy()
    marks[6] += 1
    assert ask(kept, rows, marks=marks)[1] == 1
    assert ask(kept, rows, marks=marks)[1] == 0
    assert ask(kept, rows)[1] == 1


@pytest.mark.parametrize("place", ["sum", "count", "point"])
def test_a_damaged_record_is_made_again(file, place):
    kept, rows = KeptDiagrams(file, ROWS, K0, K1), np.arange(ROWS)
    ask(kept, rows)
    content, size = bytearray(file.read_bytes()), 8 + 4 * (K0 + K1)
    content[9 * size + {"sum": 0, "count": 4, "point": 30}[place]] ^= 1
    file.write_bytes(content)
    found, count = ask(kept, rows)
    assert count == 1
    assert_right(found, rows)


def test_half_a_file_is_half_of_the_diagrams(file):
    kept, rows = KeptDiagrams(file, ROWS, K0, K1), np.arange(ROWS)
    ask(kept, rows)
    whole = file.read_bytes()
    file.write_bytes(whole[: 10 * (8 + 4 * (K0 + K1)) + 5])
    found, count = ask(kept, rows)
    assert count == ROWS - 10
    assert_right(found, rows)
    assert file.read_bytes() == whole


def test_where_nothing_can_be_written_they_are_made_each_time(tmp_path):
    rows = np.arange(ROWS)
    for file in (tmp_path / "nowhere" / "x.bin", tmp_path):
        kept = KeptDiagrams(file, ROWS, K0, K1)
        for _ in range(2):
            found, count = ask(kept, rows)
            assert count == ROWS
            assert_right(found, rows)


def test_threads_may_ask_at_once(file):
    kept = KeptDiagrams(file, ROWS, K0, K1)
    parts = [np.random.default_rng(i).permutation(ROWS)[:12] for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        for rows, (found, _) in zip(parts, pool.map(lambda rows: ask(kept, rows), parts), strict=True):
            assert_right(found, rows)


def test_of_no_rows_there_are_none(file):
    found, count = ask(KeptDiagrams(file, ROWS, K0, K1), np.zeros(0, dtype=int))
    assert (found.points.shape, count) == ((0, K0 + K1, 2), 0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_of_that_name_is_not_waited_for(file):
    os.mkfifo(file)
    rows = np.arange(4)
    found, count = ask(KeptDiagrams(file, ROWS, K0, K1), rows)
    assert count == 4
    assert_right(found, rows)

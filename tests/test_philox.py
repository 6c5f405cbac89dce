"""Philox 4x32-10: published answers, independence of everything but the arguments, and distributions within bounds."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kladi.data.views import philox

ROWS = np.random.default_rng(0).integers(0, 2**64, 2000, dtype=np.uint64)


def naive(counter: list[int], key: tuple[int, int]) -> list[int]:
    """The ten rounds on Python integers, as the paper writes them."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second % 2**32, (first >> 32) ^ c[3] ^ k[1], first % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    numbers = [int(word, 16) for word in counter.split()]
    low, high = (int(word, 16) for word in key.split())
    drawn = philox.philox(np.array(numbers, dtype=np.uint32), (low, high))
    assert [f"{int(word):08x}" for word in drawn] == answer.split()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4), st.tuples(*[st.integers(0, 2**32 - 1)] * 2))
@settings(max_examples=50)
def test_equals_the_naive_rounds(counter: list[int], key: tuple[int, int]) -> None:
    assert philox.philox(np.array([counter], dtype=np.uint32), key)[0].tolist() == naive(counter, key)


def test_words_put_row_epoch_view_and_draw_into_the_counter() -> None:
    row, epoch, view, draw = 0xFEDCBA9876543210, 7, 3, 11
    digest = hashlib.sha256(b"kladi\x00-5\x00augment").digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    drawn = philox.words(-5, "augment", np.array([row], dtype=np.uint64), epoch, view, draw)
    assert drawn[0].tolist() == naive([0x76543210, 0xFEDCBA98, epoch, view * 2**16 + draw], key)


def test_an_array_of_draws_equals_its_single_draws() -> None:
    together = philox.uniform(0, "a", ROWS, 2, 1, np.array([0, 5, 65535]))
    assert together.shape == (len(ROWS), 3)
    for column, draw in enumerate((0, 5, 65535)):
        assert np.array_equal(together[:, column], philox.uniform(0, "a", ROWS, 2, 1, draw))


def test_a_row_does_not_care_about_its_company() -> None:
    for function in (philox.words, philox.uniform, philox.normal):
        together = function(1, "a", ROWS, 3, 0, 4)
        for size in (1, 2, 3, 7, 64):
            alone = np.concatenate([function(1, "a", ROWS[i : i + size], 3, 0, 4) for i in range(0, 210, size)])
            assert np.array_equal(alone[:210], together[:210])
    noise = philox.normals(1, "noise", ROWS[:40], 3, 0, 4099)
    assert np.array_equal(noise[17], philox.normals(1, "noise", ROWS[17:18], 3, 0, 4099)[0])
    assert np.array_equal(noise[:, :100], philox.normals(1, "noise", ROWS[:40], 3, 0, 100))


def test_each_argument_changes_the_draw() -> None:
    base = {"seed": 0, "stream": "a", "rows": ROWS, "epoch": 0, "view": 0, "draw": 0}
    changes = [{"seed": 1}, {"stream": "b"}, {"rows": ROWS ^ np.uint64(1)}, {"epoch": 1}, {"view": 1}, {"draw": 1}]
    drawn = philox.uniform(**base)
    for change in changes:
        other = philox.uniform(**{**base, **change})
        assert not np.any(other == drawn)
        assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.1  # four standard errors are 0.09


@pytest.mark.parametrize(
    ("epoch", "view", "draw", "name"),
    [(-1, 0, 0, "epoch"), (2**32, 0, 0, "epoch"), (0, 65536, 0, "view"), (0, 0, 65536, "draw"), (0, 0, -1, "draw")],
)
def test_numbers_outside_the_counter_are_refused(epoch: int, view: int, draw: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        philox.words(0, "a", ROWS, epoch, view, draw)


def test_no_rows_draw_nothing() -> None:
    none = np.empty(0, dtype=np.uint64)
    assert philox.uniform(0, "a", none, 0, 0, np.arange(3)).shape == (0, 3)
    assert philox.normals(0, "a", none, 0, 0, 5).shape == (0, 5)
    assert philox.epoch_order(0, 0, none).shape == (0,)


def test_uniforms_are_uniform() -> None:
    drawn = philox.uniform(0, "a", np.arange(100_000, dtype=np.uint64), 0, 0, 0)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.bincount((drawn * 64).astype(int), minlength=64)
    expected = len(drawn) / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 25 < chi_square < 115  # 63 degrees of freedom; each tail below 1e-4
    assert drawn[drawn * 2**53 % 2 == 1].size > 40_000, "the last of the 53 bits is used"


@pytest.mark.parametrize("kind", ["box_muller", "table"])
def test_normals_are_normal(kind: str) -> None:
    rows = np.arange(500, dtype=np.uint64)
    if kind == "table":
        drawn = philox.normals(0, "a", rows, 0, 0, 400)
    else:
        drawn = philox.normal(0, "a", rows, 0, 0, np.arange(400))
    n = drawn.size
    z = np.sort(drawn.ravel().astype(np.float64))
    assert abs(z.mean()) < 4 / np.sqrt(n)
    assert abs((z**2).mean() - 1) < 4 * np.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 4 * np.sqrt(96 / n)
    quantiles = [-1.959964, -0.674490, 0.0, 0.674490, 1.959964]
    shares = np.searchsorted(z, quantiles) / n
    assert np.abs(shares - [0.025, 0.25, 0.5, 0.75, 0.975]).max() < 4 * 0.5 / np.sqrt(n)
    neighbours = np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(n)


def test_noise_of_large_images_goes_on_in_further_streams() -> None:
    count = 65536 * 8 + 24
    drawn = philox.normals(0, "a", ROWS[:1], 0, 0, count)
    assert np.array_equal(drawn[0, 65536 * 8 :], philox.normals(0, "a/1", ROWS[:1], 0, 0, 24)[0])
    assert not np.array_equal(drawn[0, 65536 * 8 :], drawn[0, :24])


def test_epoch_order_is_a_permutation_that_changes_with_seed_and_epoch() -> None:
    order = philox.epoch_order(0, 0, ROWS)
    assert np.array_equal(np.sort(order), np.arange(len(ROWS)))
    for seed, epoch in ((0, 1), (1, 0)):
        other = philox.epoch_order(seed, epoch, ROWS)
        assert np.mean(other == order) < 0.01
    position = np.argsort(order)
    assert abs(np.corrcoef(position, np.arange(len(ROWS)))[0, 1]) < 0.1


def test_epoch_order_moves_no_row_when_others_come_go_or_are_listed_otherwise() -> None:
    order = ROWS[philox.epoch_order(3, 5, ROWS)]
    shuffled = np.random.default_rng(1).permutation(ROWS)
    assert np.array_equal(shuffled[philox.epoch_order(3, 5, shuffled)], order)
    kept = ROWS[::3]
    assert np.array_equal(kept[philox.epoch_order(3, 5, kept)], order[np.isin(order, kept)])


def test_equal_words_are_ordered_by_row_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox, "words", lambda *_: np.zeros((len(ROWS), 4), dtype=np.uint32))
    assert np.array_equal(ROWS[philox.epoch_order(0, 0, ROWS)], np.sort(ROWS))

"""Batches with mates: nothing twice, nobody alone who need not be, siblings beside each other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from kladi.data.views import philox
from kladi.data.views.loader import Loader
from kladi.data.views.sampling import with_mates

PARENT = np.array([-1, -1, 0, 0, 0, 1, 1])  # two tops; three leaves below the first, two below the second


def ids(n):
    return np.arange(n, dtype=np.uint64) * np.uint64(7919) + np.uint64(3)


def sampled(target, per_label=4, batch=16, seed=0, epoch=0):
    target = np.asarray(target)
    return with_mates(seed, epoch, ids(len(target)), target, PARENT, per_label, batch)


def alone(steps, target):
    """Rows in a batch without another of their label."""
    return sum(int((np.bincount(t[t >= 0]) == 1).sum()) for t in (np.asarray(target)[s] for s in steps))


@settings(max_examples=100)
@given(st.lists(st.integers(-1, 6), min_size=1, max_size=90), st.integers(1, 5), st.integers(1, 20), st.integers(0, 3))
def test_no_row_twice_and_only_the_rest_waits(target, per_label, batch, epoch):
    steps = sampled(target, per_label, batch, epoch=epoch)
    assert steps.shape == (len(target) // batch, batch)
    assert len(np.unique(steps)) == steps.size
    assert set(steps.ravel().tolist()) <= set(range(len(target)))


def test_nobody_is_alone_who_has_mates():
    rng = np.random.default_rng(0)
    target = rng.choice([2, 3, 4, 5, 6], 400, p=[0.6, 0.2, 0.1, 0.06, 0.04])
    for epoch in range(5):
        assert alone(sampled(target, epoch=epoch), target) == 0
    shuffled = philox.epoch_order(0, 0, ids(400))[:400].reshape(-1, 16)
    assert alone(shuffled, target) > 10  # or this would be nothing


def test_every_batch_holds_siblings():
    target = np.repeat([2, 3, 4, 5, 6], 40)
    for batch in sampled(target, per_label=2, batch=8):
        labels = np.unique(target[batch])
        assert (np.bincount(PARENT[labels], minlength=2) > 1).any()


def test_rows_without_a_label_and_only_ones_fill_up():
    target = np.array([2] * 20 + [5] + [-1] * 19)
    steps = sampled(target, per_label=4, batch=8)
    assert alone(steps, target) <= 1  # the only one of its label
    assert set(steps.ravel()) == set(range(40))


def test_the_order_of_the_rows_has_no_say_and_epochs_differ():
    rng = np.random.default_rng(1)
    target, row_id = rng.integers(-1, 7, 100), ids(100)
    turn = rng.permutation(100)
    first = with_mates(0, 1, row_id, target, PARENT, 3, 10)
    turned = with_mates(0, 1, row_id[turn], target[turn], PARENT, 3, 10)
    np.testing.assert_array_equal(row_id[first], row_id[turn][turned])
    assert (first != with_mates(0, 2, row_id, target, PARENT, 3, 10)).any()
    assert (first != with_mates(1, 1, row_id, target, PARENT, 3, 10)).any()


def test_all_rows_have_their_turn():
    target = np.repeat([2, 3, 5], 11)  # 33 rows, batches of 8: one waits each epoch
    seen = {int(row) for epoch in range(12) for row in sampled(target, batch=8, epoch=epoch).ravel()}
    assert seen == set(range(33))


@pytest.mark.parametrize("per_label", [0, 3])
def test_the_loader_asks_for_it(per_label):
    dataset = tiny.data(n=60)
    loader = Loader(dataset, tiny.settings(train__per_label=per_label), 2, torch.device("cpu"))
    order = loader.order(0)
    assert order.shape == (loader.steps, 8)
    assert set(order.ravel()) <= set(loader.rows)
    assert len(np.unique(order)) == order.size
    lonely = alone(order, dataset.target)
    assert (lonely <= 2) if per_label else (lonely > 2)


def test_a_hundred_thousand_rows_take_a_few_seconds():
    import time

    rng = np.random.default_rng(0)
    target = rng.integers(0, 1000, 100_000)
    parent = np.full(1000, -1)
    start = time.process_time()
    with_mates(0, 0, ids(100_000), target, parent, 4, 256)
    assert time.process_time() - start < 10

"""Batches: their order, their bits whatever the threads, what they carry, and how they end."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from kladi import config
from kladi.data.dataset import HELD_OUT, TRAIN, Dataset
from kladi.data.decoded.store import Store
from kladi.data.views import augment, loader, philox
from kladi.data.views.batch import Batch
from kladi.data.views.loader import Loader
from kladi.errors import RunStopped, UserError
from kladi.structure.labelset import LabelSets

CPU = torch.device("cpu")
SIZE, SIDE = 16, 19


@dataclasses.dataclass(frozen=True)
class Memory(Store):
    """A store in memory that notes who asked for what, and fails or waits when told to."""

    asked: list[tuple[tuple[int, ...], str, int]] = dataclasses.field(default_factory=list)
    broken: dict[int, Exception] = dataclasses.field(default_factory=dict)

    def gather(self, index: np.ndarray) -> np.ndarray:
        self.asked.append((tuple(index.tolist()), threading.current_thread().name, torch.get_num_threads()))
        for row in index.tolist():
            if row in self.broken:
                raise self.broken[row]
        return self.images[index]


def dataset(count: int = 50, channels: int = 1, metadata: bool = True) -> Dataset:
    rng = np.random.default_rng(0)
    row_id = rng.integers(0, 2**64, count, dtype=np.uint64)
    store = Memory(
        images=rng.integers(0, 256, (count, channels, SIDE, SIDE), dtype=np.uint8),
        extent=np.tile(np.array([0, 0, SIDE, SIDE], dtype=np.int32), (count, 1)),
        row_id=row_id,
        pixel_digest=row_id,
        source=np.arange(count),
        digest="",
        folder=Path(),
    )
    modality = [["us", "mr", None][i % 3] for i in range(count)]
    return Dataset(
        store=store,
        row_id=row_id,
        manifest_row=np.arange(count) + 101,
        group=np.arange(count),
        split=np.where(np.arange(count) % 5 == 4, HELD_OUT, TRAIN),
        taxonomy=None,
        target=np.where(np.arange(count) % 4 == 0, -1, np.arange(count) % 7),
        label_sets=LabelSets.from_columns({"modality": modality}) if metadata else None,
    )


def settings(batch: int = 8, workers: int = 0, seed: int = 3, size: int = SIZE, **strengths: float) -> config.Config:
    return config.Config(
        intensity=config.Intensity(size=size),
        augment=config.Augment(noise=0.02, **strengths),
        train=config.Train(batch=batch, workers=workers, seed=seed),
    )


def same(a: Batch, b: Batch) -> bool:
    names = a.target.keys()
    return (
        torch.equal(a.row, b.row)
        and all(torch.equal(x.image, y.image) for x, y in zip(a.views, b.views, strict=True))
        and names == b.target.keys()
        and all(torch.equal(a.target[n], b.target[n]) and torch.equal(a.present[n], b.present[n]) for n in names)
    )


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("kladi-loader")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert threads() == []
    assert torch.get_num_threads() == before


# --- order ------------------------------------------------------------------------------------------------------


def test_an_epoch_visits_training_rows_once_in_the_counters_order() -> None:
    data = dataset()
    made = Loader(data, settings(), 1, CPU)
    train = np.flatnonzero(data.split == TRAIN)
    assert len(train) == 40
    assert made.steps == 5
    seen = torch.cat([batch.row for batch in made.epoch(4)]).numpy()
    assert np.array_equal(seen, train[philox.epoch_order(3, 4, data.row_id[train])])
    assert set(seen.tolist()) == set(train.tolist())
    assert not np.array_equal(seen, torch.cat([batch.row for batch in made.epoch(5)]).numpy())


def test_rows_that_fill_no_batch_wait_unless_there_are_no_others() -> None:
    data = dataset()
    assert [len(b.row) for b in Loader(data, settings(batch=16), 1, CPU).epoch(0)] == [16, 16]
    assert [len(b.row) for b in Loader(data, settings(batch=40), 1, CPU).epoch(0)] == [40]
    assert [len(b.row) for b in Loader(data, settings(batch=41), 1, CPU).epoch(0)] == [40]
    few = Loader(data, settings(), 1, CPU, rows=np.array([7, 2, 9]))
    assert [sorted(b.row.tolist()) for b in few.epoch(0)] == [[2, 7, 9]]


@pytest.mark.parametrize("workers", [0, 1, 2, 8])
def test_any_number_of_workers_gives_the_same_bits_in_the_same_order(workers: int) -> None:
    data = dataset()
    expected = list(Loader(data, settings(workers=0), 2, CPU).epoch(1))
    made = list(Loader(data, settings(workers=workers), 2, CPU).epoch(1))
    assert len(made) == 5
    assert all(same(a, b) for a, b in zip(expected, made, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_may_be_entered_at_any_step(workers: int) -> None:
    made = Loader(dataset(), settings(workers=workers), 2, CPU)
    whole = list(made.epoch(2))
    for start in range(6):
        rest = list(made.epoch(2, start))
        assert len(rest) == 5 - start
        assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_a_view_does_not_depend_on_the_batch_it_is_in() -> None:
    data = dataset()

    def images(batch: int) -> dict[int, torch.Tensor]:
        made = Loader(data, settings(batch=batch), 2, CPU)
        return {int(r): b.views[1].image[i] for b in made.epoch(0) for i, r in enumerate(b.row)}

    small, large = images(5), images(20)
    assert len(small) == 40
    assert all(torch.equal(small[row], large[row]) for row in large)


def test_processes_share_each_batch_in_order() -> None:
    data = dataset()
    whole = list(Loader(data, settings(batch=10), 2, CPU).epoch(0))
    shares = [list(Loader(data, settings(batch=10), 2, CPU, rank=rank, world=3).epoch(0)) for rank in range(3)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert [len(part.row) for part in parts] == [4, 3, 3]
        assert torch.equal(torch.cat([part.row for part in parts]), batch.row)
        assert torch.equal(torch.cat([part.views[1].image for part in parts]), batch.views[1].image)


# --- what a batch carries -----------------------------------------------------------------------------------------


def test_views_are_those_of_the_counter() -> None:
    data, choices = dataset(), settings()
    batch = next(Loader(data, choices, 2, CPU).epoch(6))
    rows = batch.row.numpy()
    for number, view in enumerate(batch.views):
        drawn = augment.draw(choices.augment, 3, 6, data.row_id[rows], number)
        expected = augment.apply(data.store.images[rows], data.store.extent[rows], drawn, choices.intensity)
        assert torch.equal(view.image, expected)
    assert not torch.equal(batch.views[0].image, batch.views[1].image)


def test_targets_and_what_is_missing() -> None:
    data = dataset()
    assert data.label_sets is not None
    classes = data.label_sets.similarity()[0]
    for batch in Loader(data, settings(), 1, CPU).epoch(0):
        rows = batch.row.numpy()
        assert set(batch.target) == set(batch.present) == {"label", "metadata"}
        assert batch.target["label"].dtype == batch.target["metadata"].dtype == torch.int64
        assert batch.present["label"].tolist() == (data.target[rows] >= 0).tolist()
        assert batch.target["label"].tolist() == np.maximum(data.target[rows], 0).tolist()
        assert batch.target["metadata"].tolist() == classes[rows].tolist()
        assert batch.present["metadata"].all(), "a row that knows nothing is a class of its own kind"
    assert set(next(Loader(dataset(metadata=False), settings(), 1, CPU).epoch(0)).target) == {"label"}


# --- threads, errors, ends ----------------------------------------------------------------------------------------


def test_workers_use_one_thread_each_and_leave_the_others_to_the_step() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        data = dataset()
        for _ in Loader(data, settings(workers=2), 1, CPU).epoch(0):
            assert torch.get_num_threads() == 2
        later: list[int] = []
        other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert later == [2], "threads that are started later are not bound by the workers' setting"
    finally:
        torch.set_num_threads(before)
    names = {name for _, name, _ in data.store.asked}
    assert all(name.startswith("kladi-loader") for name in names)
    assert {count for _, _, count in data.store.asked} == {1}


def test_no_more_is_prepared_than_is_asked_for() -> None:
    data = dataset()
    batches = Loader(data, settings(batch=2, workers=2), 1, CPU).epoch(0)
    next(batches)
    time.sleep(0.1)
    assert 1 <= len(data.store.asked) <= 2 + loader.AHEAD
    batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_names_the_step_and_the_rows_of_the_manifest(workers: int) -> None:
    data = dataset()
    made = Loader(data, settings(workers=workers), 1, CPU)
    rows = made.order(0)[2]
    data.store.broken[int(rows[3])] = OSError("the disk is gone")
    with pytest.raises(RunStopped) as stopped:
        list(made.epoch(0))
    numbers = ", ".join(str(row + 101) for row in sorted(rows.tolist()))
    assert str(stopped.value) == (
        "step 2 of epoch 0 could not be prepared (OSError: the disk is gone); its images are those of manifest rows "
        + numbers
    )
    assert isinstance(stopped.value.__cause__, OSError)


@pytest.mark.parametrize("error", [RunStopped("the store is gone"), UserError("--data.store: no")])
def test_errors_that_are_worded_already_pass_unchanged(error: Exception) -> None:
    data = dataset()
    data.store.broken.update(dict.fromkeys(range(50), error))
    with pytest.raises(type(error)) as raised:
        list(Loader(data, settings(workers=1), 1, CPU).epoch(0))
    assert raised.value is error


def test_a_failure_is_raised_before_slower_batches_that_come_earlier() -> None:
    slow: Future[Batch] = Future()
    failed: Future[Batch] = Future()
    failed.set_exception(RunStopped("second"))
    with pytest.raises(RunStopped, match="second"):
        loader._next(deque([slow, failed]))
    later: Future[Batch] = Future()
    threading.Timer(0.05, lambda: later.set_exception(RunStopped("third"))).start()
    with pytest.raises(RunStopped, match="third"):
        loader._next(deque([slow, later]))


def test_an_iterator_that_is_closed_or_dropped_stops_its_threads() -> None:
    made = Loader(dataset(), settings(batch=2, workers=3), 1, CPU)
    batches = made.epoch(0)
    next(batches)
    assert len(threads()) == 3
    batches.close()
    assert threads() == []
    for _ in made.epoch(0):
        break
    assert threads() == []


def test_an_interrupt_in_the_loop_leaves_no_thread() -> None:
    def loop() -> None:
        for _ in Loader(dataset(), settings(batch=2, workers=2), 1, CPU).epoch(0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert threads() == []


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (settings(hue=0.1), "--augment.hue"),
        (settings(batch=0), "--train.batch 0: takes 1 or more"),
        (settings(workers=-1), "--train.workers -1: takes 0 or more"),
        (settings(blur=2.0), "--augment.blur 2.0"),
    ],
)
def test_impossible_choices_are_refused_before_any_batch(choices: config.Config, message: str) -> None:
    with pytest.raises(UserError) as refused:
        Loader(dataset(), choices, 2, CPU)
    assert str(refused.value).startswith(message)


def test_no_rows_are_refused() -> None:
    with pytest.raises(UserError, match="no rows to train on"):
        Loader(dataset(), settings(), 2, CPU, rows=np.empty(0, dtype=np.int64))

"""Batches of training views in an order fixed by (seed, epoch), prepared ahead by threads that cannot change a bit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Barrier
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64

from kladi import config as settings
from kladi.data.dataset import TRAIN, Dataset
from kladi.data.views import augment, philox
from kladi.data.views.batch import Batch, View
from kladi.data.views.bounded_pair import BoundedPair
from kladi.data.views.sampling import with_mates
from kladi.errors import RunStopped, UserError

AHEAD = 1
"""Batches asked for beyond one a worker; each is `views` times its images in float32."""
NAMED_ROWS = 20
"""Rows that an error names at most."""


class Loader:
    """The training batches of any epoch, from any step on.

    An epoch visits the training rows in the order of `philox.epoch_order` (`sampling.with_mates` where
    `train.per_label` asks for it and there is a tree); each `config.train.batch` of them is a step.
    The rows left at the end wait for another epoch, unless they are all there are. Views are drawn from (seed, epoch,
    row id, view), so neither `train.workers`, nor where an epoch is entered, nor the rest of a batch changes them.

    Args:
        dataset: what to read.
        config: `train.batch`, `train.seed`, `train.workers` (0: prepared in line), `augment`, `intensity`.
        views: views of each image.
        device: where batches are prepared and end up.
        rows: positions in the data set; None: those that the split calls TRAIN.
        rank, world: of several processes; each gets its consecutive share of every batch.

    Raises:
        UserError: no rows; augmentation that the images cannot have.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: settings.Config,
        views: int,
        device: torch.device,
        *,
        rows: Int[np.ndarray, " m"] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        augment.check(config.augment, config.intensity.channels)
        for key, least in (("batch", 1), ("workers", 0)):
            if getattr(config.train, key) < least:
                raise UserError(f"--train.{key} {getattr(config.train, key)}: takes {least} or more")
        self.dataset, self.config, self.views, self.device = dataset, config, views, device
        self.rows = np.flatnonzero(dataset.split == TRAIN) if rows is None else rows.astype(np.int64)
        self.rank, self.world = rank, world
        self.bounded: BoundedPair | None = None
        """Where views come from in the place of augmentation."""
        if len(self.rows) == 0:
            raise UserError("no rows to train on: the split calls none of them train")
        if min(config.train.batch, len(self.rows)) < world:
            raise UserError(f"--train.batch {config.train.batch} leaves some of {world} processes without an image")
        self._classes = {"label": dataset.target.astype(np.int64)}
        if dataset.label_sets is not None:
            self._classes["metadata"] = dataset.label_sets.class_id.copy()

    @property
    def batch(self) -> int:
        """Images a step, of all processes."""
        return min(self.config.train.batch, len(self.rows))

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return max(1, len(self.rows) // self.config.train.batch)

    def order(self, epoch: int) -> Int64[np.ndarray, "steps batch"]:
        """Positions in the data set, a row a step, of that epoch."""
        batch = self.batch
        seed, ids, tree = self.config.train.seed, self.dataset.row_id[self.rows], self.dataset.taxonomy
        if self.config.train.per_label and tree is not None:
            parent = np.array([above[0] if above else -1 for above in tree.parents], dtype=np.int64)
            target = self.dataset.target[self.rows]
            return self.rows[with_mates(seed, epoch, ids, target, parent, self.config.train.per_label, batch)]
        order = self.rows[philox.epoch_order(seed, epoch, ids)]
        return order[: self.steps * batch].reshape(self.steps, batch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on, in order.

        With workers, `train.workers + AHEAD` batches are prepared ahead. An error in a worker is raised at the next
        request, even before sound batches that come earlier. Closing the iterator, or dropping it, stops the threads.

        Raises:
            UserError, RunStopped: as they come from the data.
            RunStopped: anything else that fails while a batch is prepared; it names the step and its rows.
        """
        order = self.order(epoch)
        if self.config.train.workers == 0:
            for step in range(start, len(order)):
                yield self._named(epoch, step, order[step])
            return
        waiting = iter(range(start, len(order)))
        ready: deque[Future[Batch]] = deque()
        with _workers(self.config.train.workers) as submit:
            while True:
                while len(ready) < self.config.train.workers + AHEAD and (step := next(waiting, None)) is not None:
                    ready.append(submit(self._named, epoch, step, order[step]))
                if not ready:
                    return
                yield _next(ready)

    def prepare(self, epoch: int, rows: Int[np.ndarray, " all"]) -> Batch:
        """The batch of these rows in that epoch, of this process' share of them; a pure function of both."""
        share = np.array_split(rows, self.world)[self.rank]
        device = self.device
        views = self._augmented(share, epoch) if self.bounded is None else self.bounded.views(share, epoch, device)
        classes = {name: torch.from_numpy(ids[share]).to(device) for name, ids in self._classes.items()}
        return Batch(
            views=views,
            target={name: ids.clamp(min=0) for name, ids in classes.items()},
            present={name: ids >= 0 for name, ids in classes.items()},
            row=torch.from_numpy(share).to(device),
            tables=tuple(torch.from_numpy(one.values[share]).to(device) for one in self.dataset.modalities),
            in_table=self._in_table(share),
        )

    def _in_table(self, share: Int[np.ndarray, " b"]) -> Bool[torch.Tensor, "b T"] | None:
        present = [one.present[share] for one in self.dataset.modalities]
        return torch.from_numpy(np.stack(present, axis=1)).to(self.device) if present else None

    def _augmented(self, share: Int[np.ndarray, " b"], epoch: int) -> tuple[View, ...]:
        data, config = self.dataset, self.config
        pixels = torch.from_numpy(data.store.gather(share)).to(self.device, non_blocking=True)
        extent, row_id = data.store.extent[share], data.row_id[share]
        views = []
        for view in range(self.views):
            drawn = augment.draw(config.augment, config.train.seed, epoch, row_id, view)
            views.append(View(augment.apply(pixels, extent, drawn, config.intensity)))
        return tuple(views)

    def _named(self, epoch: int, step: int, rows: np.ndarray) -> Batch:
        try:
            return self.prepare(epoch, rows)
        except (UserError, RunStopped):
            raise
        except Exception as error:
            numbers = [str(row) for row in np.sort(self.dataset.manifest_row[rows])]
            more = f" and {len(numbers) - NAMED_ROWS} more" if len(numbers) > NAMED_ROWS else ""
            raise RunStopped(
                f"step {step} of epoch {epoch} could not be prepared ({type(error).__name__}: {error}); its images are "
                f"those of manifest rows {', '.join(numbers[:NAMED_ROWS])}{more}"
            ) from error


def _next(ready: deque[Future[Batch]]) -> Batch:
    """The first batch, as soon as it is there; sooner, the error of whichever has failed."""
    while True:
        for future in ready:
            if future.done() and future.exception() is not None:
                future.result()
        if ready[0].done():
            return ready.popleft().result()
        wait([future for future in ready if not future.done()], return_when=FIRST_COMPLETED)


@contextmanager
def _workers(count: int) -> Generator[Callable[..., Future[Any]]]:
    """`count` threads; what waits is dropped and what runs is finished when the block is left, however it is left.

    A worker runs its tensor operations on one thread: it stands beside the training step, which has the others.
    """
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(count, thread_name_prefix="kladi-loader")
    barrier = Barrier(count + 1)  # no worker can take a second start, so each of them gets its own
    try:
        for _ in range(count):
            executor.submit(_start, barrier)
        barrier.wait()
        # The setting is each thread's own, but threads that come later take the last one that was set anywhere.
        torch.set_num_threads(threads)
        yield executor.submit
    finally:
        barrier.abort()  # for workers that an interrupt left waiting there
        executor.shutdown(wait=True, cancel_futures=True)


def _start(barrier: Barrier) -> None:
    torch.get_num_threads()  # a thread's first use of torch would set it again
    torch.set_num_threads(1)
    barrier.wait()

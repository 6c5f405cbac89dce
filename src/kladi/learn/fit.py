"""The loop. `fit` reads from top to bottom: build, open the run folder, go through the epochs, export the encoder.

A run is a function of (data, configuration): the order of rows, the views, the learning rate and the random numbers
inside the model all follow from the seed and the step, so that a run that was killed goes on to the same bits.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from lightning_fabric import Fabric
from torch import Tensor

from kladi import config as settings
from kladi.data.dataset import Dataset
from kladi.data.views.batch import Batch
from kladi.errors import RunStopped, UserError
from kladi.learn import (
    checkpoint,
    diagnosis,
    gradient_cache,
    lineage,
    lock,
    monitors,
    presets,
    ranks,
    run_folder,
    signals,
    training,
)
from kladi.learn.console import Lines
from kladi.learn.facts import Facts
from kladi.learn.journal import Journal
from kladi.learn.log import Log
from kladi.learn.objectives import Progress
from kladi.learn.training import Training, learning_rate, seed_of
from kladi.models.fused import Fused

SAVE_SECONDS = 60.0
"""Without `train.checkpoint_steps`, the end of an epoch saves only if the last save is so long ago."""
LOOK_STEPS = 50
"""Looks at the fixed rows are at least so many steps apart, at ends of epochs."""
_LOST = re.compile(r"gloo|nccl|socket|connection|peer|store|timed out", re.IGNORECASE)
"""How the words of a failed exchange between processes sound."""
FIRST_LOOK = 20
"""Before so many steps batch statistics have not settled, and what evaluation mode shows means nothing."""


def fit(
    dataset: Dataset,
    config: settings.Config,
    run: str | Path,
    resume: bool = False,
    progress: Lines | None = None,
    *,
    force_unlock: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Train an encoder and leave it in a run folder.

    Args:
        dataset: its TRAIN rows are trained on.
        config: all of it but `evaluate`.
        run: a new or empty folder; with `resume`, one that a run stopped in.
        resume: go on from the newest intact checkpoint, to the same bits.
        progress: what a person sees; None: lines on stderr. `console.Silent()` shows nothing.
        force_unlock: take over a lock whose machine is gone.
        notes: further entries for data.json, e.g. rows that were left out, by id and reason. No paths.

    Raises:
        UserError: a mistake in configuration or data, a folder that is not empty or in use, or a resume with another
            configuration, other data or only damaged checkpoints.
        RunStopped: disk, memory, a number that is not finite, or a collapse under `train.stop_on_collapse`; the message
            names the last good checkpoint.
        KeyboardInterrupt, SystemExit: INT and TERM, after saving.
    """
    run = Path(run)
    if resume and not run.is_dir():
        raise UserError(f"--resume: there is no {run}; leave --resume out to begin there")
    progress = progress or Lines()
    with _repeatable(config.train) as fabric:
        torch.manual_seed(seed_of(config.train.seed, "init"))
        goes_on = resume and checkpoint.exist(run)  # a run that was stopped before its first checkpoint begins again
        # Nothing is written before all of this stands.
        t = training.assemble(dataset, config, fabric, progress.say, before=run if goes_on else None)
        if ranks.follows(config.train):
            with signals.heard() as requests, _worded(run, config):
                _follow(t, run, goes_on, requests)
            return
        run_folder.make(run)
        with lock.held(run, force_unlock), signals.heard() as requests, _worded(run, config):
            checkpoint.clean(run)
            found = None
            if resume:
                found = _found(t, run)
            else:
                run_folder.require_empty(run)
            if found is None:
                checkpoint.check_space(run, training.snapshot(t))
            with Log(run, progress, config.train.tensorboard) as log:
                if t.fabric.world_size > 1:
                    log.say("waiting", f"for {t.fabric.world_size - 1} other processes")
                _join(t)
                log.data(dataset, t.objective)
                name = presets.resolved(config.objective.name, Facts.of(dataset))
                log.say("loss", f"{name} = {_formula(t.objective.weights)}")
                log.say("batch", _batch(t))
                if t.loader.bounded is not None:
                    seen = t.encoder.sight if isinstance(t.encoder, Fused) else "no diagrams"
                    log.say("topology", f"{seen}; {t.loader.bounded}")
                if t.match is not None:
                    log.say("weights", str(t.match))
                if found is None:
                    if resume and run_folder.begun(run):
                        log.say("notice", "stopped before its first checkpoint; starting at step 0")
                    training.keep_strengths(t, run)
                    if config.init.weights:
                        lineage.write(run, lineage.behind(config.init.weights))
                    run_folder.begin(run, config, dataset, notes or {}, fabric.device)
                else:
                    _go_on(t, run, found, log)
                with Journal(run / "metrics.jsonl", t.step) as journal:
                    if journal.lost:
                        log.say("notice", f"metrics.jsonl has lost {journal.lost:,} of the {t.step:,} steps before")
                    _train(t, run, journal, log, requests)
                training.export(t, run)
                log.done(t)


def _train(t: Training, run: Path, journal: Journal, log: Log, requests: signals.Requests) -> None:
    """Every step from where the training is to its last."""
    rows = monitors.fixed_rows(t.dataset, t.config.train.seed)
    saved, saved_at, collapsed = t.step, time.monotonic(), ""
    log.start(t, [] if t.at_epoch_end else journal.epoch(t.epoch))
    with contextlib.closing(_batches(t)) as batches:
        for batch, waited in batches:
            line = _step(t, batch, run, waited)
            journal.write(line)
            log.step(line)
            if t.at_epoch_end:
                collapsed = _end_epoch(t, rows, journal, log)
            stop, save = ranks.agreed(bool(requests.stop or collapsed), requests.save, device=t.fabric.device)
            if stop or t.step == t.last or save or _due(t, time.monotonic() - saved_at):
                journal.sync()
                checkpoint.save(run, training.snapshot(t))
                saved, saved_at, requests.save = t.step, time.monotonic(), False
            if collapsed:
                raise RunStopped(collapsed)
            if stop and t.step < t.last:
                log.say("saved", f"step {saved:,} (verified); go on with the same command and --resume")
                requests.stop = requests.stop or signal.SIGTERM  # another process may have been asked
                requests.leave()
    if not t.at_epoch_end:
        journal.write({**_look(t, rows), "at_stop": True})


def _follow(t: Training, run: Path, goes_on: bool, requests: signals.Requests) -> None:
    """Every step beside the process that leads: it writes and shows, this one only lends its device."""
    _join(t)
    found = checkpoint.newest(run) if goes_on else None
    if found is not None:
        training.restore(t, found.folder)
    with contextlib.closing(_batches(t)) as batches:
        for batch, waited in batches:
            _step(t, batch, run, waited)
            stop, _ = ranks.agreed(bool(requests.stop), requests.save, device=t.fabric.device)
            if stop:
                return


def _join(t: Training) -> None:
    """Start the other processes of this machine, unless they were started with us, and wait for all of them."""
    if t.fabric.world_size > 1:
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # its banner is no line of ours
        with signals.at_once():
            t.fabric.launch()


def _step(t: Training, batch: Batch, run: Path, waited: float) -> dict[str, Any]:
    """One step, and its line of the journal."""
    start, train, epoch = time.monotonic(), t.config.train, t.epoch
    rate = learning_rate(t.step, t.steps, train.lr, train.warmup)
    for group in t.optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    t.objective.before_step(Progress(t.step, t.steps, epoch - 1))
    terms = gradient_cache.backward(t.objective, batch, t.fabric, _noise(t), train.chunk)
    loss = t.objective.total(terms)
    ranks.mean_gradients(t.objective.parameters())
    norm = t.fabric.clip_gradients(t.objective, t.optimizer, max_norm=train.clip or math.inf, error_if_nonfinite=False)
    if norm is None or not diagnosis.is_finite(terms, norm):
        raise _not_finite(t, batch, terms, norm, run)
    t.optimizer.step()
    t.optimizer.zero_grad()
    t.objective.after_step()
    t.step += 1
    return {
        "step": t.step,
        "epoch": epoch,
        "loss": loss.item(),
        **{name: term.item() for name, term in terms.items()},
        "idle": dict(t.objective.idle),
        "lr": rate,
        "grad_norm": norm.item(),
        "images": len(batch.row) * ranks.world(),
        "seconds": waited + time.monotonic() - start,
        "waited": waited,
    }


def _noise(t: Training) -> int:
    """Seed of whatever is random inside the model in this step, another one in each process."""
    return seed_of(t.config.train.seed, "step", t.step) + t.fabric.global_rank


def _batches(t: Training) -> Generator[tuple[Batch, float]]:
    """The batches of all epochs from the training's step to its last, each with the seconds that were waited for it."""
    while t.step < t.last:
        ahead: Any = t.loader.epoch(t.epoch - 1, t.step % t.loader.steps)
        with contextlib.closing(ahead) as batches:  # which ends the loader's threads
            while True:
                start = time.monotonic()
                batch = next(batches, None)
                if batch is None:
                    break
                yield batch, time.monotonic() - start
                if t.step >= t.last:
                    return


def _end_epoch(t: Training, rows: Int[np.ndarray, " m"], journal: Journal, log: Log) -> str:
    """A row of the table; now and then a look at the fixed rows. Returns why the run must stop, "" if it need not."""
    epoch, alarm = t.step // t.loader.steps, ""
    every = -(-LOOK_STEPS // t.loader.steps)
    first = epoch == 1 and t.step >= FIRST_LOOK
    if first or epoch % every == 0 or epoch == t.config.train.epochs:
        journal.write(_look(t, rows))
        if t.low == monitors.IN_A_ROW:
            alarm = log.alarm(t, epoch)
    log.epoch(t)
    return alarm if t.config.train.stop_on_collapse else ""


def _look(t: Training, rows: Int[np.ndarray, " m"]) -> dict[str, Any]:
    """How the embedding fills its space now, as a line of the journal."""
    z, leaning = monitors.embeddings(
        t.encoder, t.objective.projector, t.dataset, rows, t.config.intensity, t.fabric.device
    )
    t.spread = monitors.spread(z)
    t.low = t.low + 1 if t.spread.collapsed else 0
    epoch = -(-t.step // t.loader.steps)
    alarm = t.low >= monitors.IN_A_ROW
    found = {"std": t.spread.std, "rank": t.spread.rank, **leaning, **t.objective.learned()}
    return {"step": t.step, "epoch": epoch, **found, "alarm": alarm}


def _due(t: Training, since: float) -> bool:
    """Whether to save after this step, `since` seconds after the last save."""
    every = t.config.train.checkpoint_steps
    return t.step % every == 0 if every else t.at_epoch_end and since >= SAVE_SECONDS


def _not_finite(t: Training, batch: Batch, terms: Mapping[str, Tensor], norm: Tensor | None, run: Path) -> RunStopped:
    """Find out what went wrong in a step that must not be taken, keep that, and word it."""
    torch.manual_seed(_noise(t))
    with t.fabric.autocast():
        found = diagnosis.examine(
            t.objective, batch, t.dataset, terms, torch.tensor(math.nan) if norm is None else norm
        )
    lr = learning_rate(t.step, t.steps, t.config.train.lr, t.config.train.warmup)
    file = diagnosis.write(run, t.step + 1, {"epoch": t.epoch, "lr": lr, **found})
    return RunStopped(f"step {t.step + 1:,}: {diagnosis.sentence(found)}; details in {file.name}")


# --- around the loop ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _repeatable(train: settings.Train) -> Generator[Fabric]:
    """Device and precision; torch's generators, switches and processes are the caller's own again afterwards."""
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by the first CUDA call
    fabric = training.device(train)
    alone = ranks.world() == 1
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    devices = [fabric.device.index or 0] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if train.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        try:
            yield fabric
        finally:
            torch.use_deterministic_algorithms(before[0])
            torch.backends.cudnn.benchmark = before[1]
            if alone:
                ranks.leave()


def _found(t: Training, run: Path) -> checkpoint.Found | None:
    """The checkpoint to go on from; None where the run was stopped before its first."""
    folder = run / "checkpoints"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--resume: {folder} is a file; {run} is no run of kladi's")
    if not run_folder.begun(run):
        if folder.is_dir():
            raise UserError(f"--resume: {run} has checkpoints but no config.toml; it is no run of kladi's")
        run_folder.require_nothing_foreign(run)
        return None
    run_folder.require_same(run, t.config, t.dataset)
    found = checkpoint.newest(run)
    if found is None and (run / "model.safetensors").is_file():
        raise UserError(f"--resume: {run} is finished, but holds no checkpoint any more; another --out starts anew")
    return found


def _go_on(t: Training, run: Path, found: checkpoint.Found, log: Log) -> None:
    """Put the checkpoint's state into the training, and say whatever is not as it was."""
    for notice in found.notices:
        log.say("notice", f"{notice}; going on from {found.folder.name}")
    difference = run_folder.not_the_same_bits(run, t.fabric.device)
    if difference:
        log.say("notice", difference)
    training.restore(t, found.folder)
    checkpoint.settle(run, found.folder)
    run_folder.write_config(run, t.config)
    log.say("resume", f"from step {t.step:,} of {t.steps:,}")


@contextlib.contextmanager
def _worded(run: Path, config: settings.Config) -> Generator[None]:
    """An outside cause becomes RunStopped, with the checkpoint that remains; a fault of ours stays what it is."""
    try:
        yield
    except UserError:
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            half = max(1, config.train.batch // 2)
            text = f"out of memory with --train.batch {config.train.batch}; --train.batch {half} needs about half"
        elif isinstance(error, OSError):
            text = f"cannot be read or written ({error.strerror or error})"
        elif math.prod(ranks.counted(config.train)) > 1 and _LOST.search(text):
            text = "another process of this run was lost; the same command with --resume goes on"
        elif not isinstance(error, RunStopped):
            raise
        kept = "" if "last good checkpoint" in text else f"; {checkpoint.last_good(run)}"
        raise RunStopped(f"{run}: {text}{kept}") from error


def _batch(t: Training) -> str:
    """`256 images in 2 views, 64 at a time, by 4 processes; 511 others for each anchor`."""
    images, world, chunk = t.loader.batch, t.fabric.world_size, t.config.train.chunk
    at_a_time = f", {chunk} at a time" if 0 < chunk < images // world else ""
    processes = f", by {world} processes" if world > 1 else ""
    others = t.objective.others(images, training.VIEWS)
    compared = f"; {others:,} others for each anchor" if others else ""
    return f"{images:,} images in {training.VIEWS} views{at_a_time}{processes}{compared}"


def _formula(parts: Mapping[str, float]) -> str:
    """`hwc + 0.5 lam`."""
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in parts.items())

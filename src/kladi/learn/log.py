"""What is told of a run: to a person through `console`, to `log.txt` without any path, and to TensorBoard if asked."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kladi.data.dataset import TRAIN, Dataset
from kladi.data.findings import counted
from kladi.errors import RunStopped
from kladi.learn import monitors, presets
from kladi.learn.console import WIDTH, Lines, Row, body, head, printable, spelt
from kladi.learn.facts import Facts
from kladi.learn.multimodal import Multimodal
from kladi.learn.objectives import Supervised
from kladi.learn.training import Training

IDLE_LIMIT = 0.5
"""An epoch in which more of the anchors had no positive is worth a warning."""


class Log:
    """Collects the lines of an epoch, and words what there is to say. What it is told names rows, never paths."""

    def __init__(self, run: Path, shown: Lines, tensorboard: bool = False) -> None:
        self.shown = shown
        private = os.open(run / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._file = os.fdopen(private, "a", encoding="utf-8")
        self._board = _board(run) if tensorboard else None
        self._lines: list[Mapping[str, Any]] = []
        self._warned = False
        self._start, self._first_step = time.monotonic(), 0

    def say(self, name: str, text: str) -> None:
        """A line for person and file."""
        self.shown.say(name, text)
        self._keep(f"{name:<{WIDTH}}{text}")

    def data(self, dataset: Dataset, objective: Supervised) -> None:
        """How much is trained on, and what the rows without a label are good for."""
        train = dataset.split == TRAIN
        patients = f", {len(np.unique(dataset.group[train])):,} patients" if dataset.has_patients else ""
        held = dataset.group[~train]
        held_out = f"{len(np.unique(held)):,} patients" if dataset.has_patients else f"{len(held):,} images"
        self.say("data", f"{int(train.sum()):,} images{patients}; {held_out} held out")
        for one in dataset.modalities:
            known = int((one.present & (dataset.split == TRAIN)).sum())
            said = f"{one.name}: {counted(len(one.features), 'column')}, {known:,} of {int(train.sum()):,} images"
            self.say("table", said if isinstance(objective, Multimodal) else f"{said}; only multimodal reads it")
        if "label" in objective.targets.values():
            known = int((dataset.target[train] >= 0).sum())
            free = [name for name, target in objective.targets.items() if target != "label"]
            rest = int(train.sum()) - known
            use = f"{rest:,} without one feed {', '.join(free) if free else 'no term'}" if rest else "all of them"
            self.say("labels", f"{known:,} images; {use}")

    def start(self, t: Training, earlier: Iterable[Mapping[str, Any]]) -> None:
        """The table begins; `earlier` are the lines of an epoch that is gone on with."""
        terms = tuple(t.objective.losses)
        self._lines = list(earlier)
        self._start, self._first_step = time.monotonic(), t.step
        self.shown.start(terms, t.step, t.last)
        self._keep(head(terms))

    def step(self, line: Mapping[str, Any]) -> None:
        """After every step, its line of the journal."""
        self._lines.append(line)
        self.shown.step(line["step"])
        if self._board is not None:
            for name in ("loss", *line["idle"], "lr", "grad_norm"):
                self._board.add_scalar(name, line[name], line["step"])

    def epoch(self, t: Training) -> None:
        """After every epoch: a row of the table with its means."""
        lines = self._lines
        self._lines = []
        terms = {name: _mean(line[name] for line in lines) for name in t.objective.losses}
        idle = {name: _mean(line["idle"][name] for line in lines) for name in t.objective.losses}
        pace = (time.monotonic() - self._start) / max(1, t.step - self._first_step)
        row = Row(
            epoch=lines[-1]["epoch"],
            step=t.step,
            loss=_mean(line["loss"] for line in lines),
            terms=terms,
            idle=next(iter(idle.values())),
            std=t.spread.std if t.spread else None,
            rank=t.spread.rank if t.spread else None,
            lr=lines[-1]["lr"],
            images_per_second=lines[-1]["images"] / pace,
            left=pace * (t.last - t.step),
        )
        self.shown.epoch(row, t.config.train.epochs)
        self._keep(body(row))
        if row.idle > IDLE_LIMIT and not self._warned:
            self._warned = True
            self.say(
                "warning",
                f"{row.idle:.0%} of the anchors of epoch {row.epoch} had no positive; a larger --train.batch helps",
            )
        if self._board is not None and t.spread is not None:
            self._board.add_scalar("std", t.spread.std, t.step)
            self._board.add_scalar("rank", t.spread.rank, t.step)

    def alarm(self, t: Training, epoch: int) -> str:
        """The embedding has collapsed; the sentence is returned too."""
        spread = t.spread or monitors.Spread(0.0, 0.0)
        text = f"the embedding has collapsed at epoch {epoch}: effective rank {spread.rank:.1f}, std {spread.std:.2f}"
        text += _remedy(t)
        self.say("ALARM", text)
        return text

    def done(self, t: Training) -> None:
        """After the last step."""
        seconds = time.monotonic() - self._start
        state = "too short to look for collapse"
        if t.spread is not None:
            alarm = "collapsed" if t.low >= monitors.IN_A_ROW else "collapsed at the last look" if t.low else "no alarm"
            state = f"effective rank {t.spread.rank:.0f} of {t.config.encoder.projector[1]}, {alarm}"
        state += "".join(f"; {name} {value:.3g}, learned" for name, value in t.objective.learned().items())
        what, why = ("done", "") if t.last == t.steps else ("stopped", " by --train.max_steps")
        self.say(what, f"step {t.step:,}{why}, {spelt(seconds)}; {state}")

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shown.end()
        if isinstance(error, RunStopped):
            self._keep(f"{'stopped':<{WIDTH}}{error}")
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _keep(self, text: str) -> None:
        self._file.write(printable(text) + "\n")
        self._file.flush()


def _remedy(t: Training) -> str:
    """Where one is known: HWC's scale leaves unlike labels so little to gain that few images stay where they began."""
    objective = t.config.objective
    tree = presets.resolved(objective.name, Facts.of(t.dataset)) == "label_tree"
    scaled = tree and objective.args.get("mode") == "scale"
    return "; --objective.args.mode mass pushes unlike labels apart from the start" if scaled else ""


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _board(run: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"))

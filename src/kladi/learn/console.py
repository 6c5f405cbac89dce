"""What a person sees of a run, on stderr: a line an epoch, and on a terminal a bar below it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typing_extensions import override

WIDTH = 11
SHOWN_EPOCHS = 50
"""Of more epochs than that, only so many have a line, evenly spread; the first and the last always do."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    idle: share of anchors without a positive. std, rank: of the last look at the fixed rows, None before the first.
    left: seconds to go.
    """

    epoch: int
    step: int
    loss: float
    terms: Mapping[str, float]
    idle: float
    std: float | None
    rank: float | None
    lr: float
    images_per_second: float
    left: float


@dataclass
class Lines:
    """The default `progress` of `fit`. Plain text: names of the user's never become markup or control sequences."""

    console: Console = field(
        default_factory=lambda: Console(file=sys.stderr, markup=False, highlight=False, soft_wrap=True)
    )
    _bar: Progress | None = None
    _task: TaskID | None = None

    def say(self, name: str, text: str) -> None:
        """A line such as `data       8,702 images`."""
        self._out(f"{name:<{WIDTH}}{text}")

    def start(self, terms: tuple[str, ...], step: int, steps: int) -> None:
        """The head of the table; on a terminal also the bar."""
        self._out(head(terms))
        if self.console.is_terminal:
            columns = (TextColumn("           step {task.completed:,.0f} of {task.total:,.0f}"), BarColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=steps, completed=step)

    def step(self, step: int) -> None:
        """Called after every step."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def epoch(self, row: Row, epochs: int) -> None:
        """Called after every epoch, and where a run stops within one."""
        every = -(-epochs // SHOWN_EPOCHS)
        if row.epoch == 1 or row.epoch % every == 0 or row.epoch == epochs:
            self._out(body(row))

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _out(self, text: str) -> None:
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


class Silent(Lines):
    """A `progress` that shows nothing."""

    @override
    def start(self, terms: tuple[str, ...], step: int, steps: int) -> None:
        """Nothing."""

    @override
    def _out(self, text: str) -> None:
        """Nothing."""


def head(terms: tuple[str, ...]) -> str:
    """The table's first line."""
    names = "".join(f"{name[:8]:>9}" for name in terms)
    return f" epoch    step     loss{names}  no positive  std   rank       lr  images/s   left"


def body(row: Row) -> str:
    """A line of the table.

    >>> body(Row(50, 1650, 4.338, {"hwc": 4.18}, 0.0, 0.9, 52.7, 2.6e-4, 301.0, 4200))
    '    50   1,650    4.338    4.180        0.0 %  .90   52.7  2.6e-04       301 70 min'
    """
    terms = "".join(f"{value:>9.3f}" for value in row.terms.values())
    std = "   -" if row.std is None else f"{row.std:>4.2f}".replace("0.", " .", 1)
    rank = "     -" if row.rank is None else f"{row.rank:>6.1f}"
    return (
        f"{row.epoch:>6} {row.step:>7,} {row.loss:>8.3f}{terms} {100 * row.idle:>10.1f} % {std} {rank}"
        f"  {row.lr:.1e}  {row.images_per_second:>8,.0f} {duration(row.left):>6}"
    )


def duration(seconds: float) -> str:
    """In six letters, with its unit.

    >>> duration(42), duration(5640), duration(9000)
    ('42 s', '94 min', '2.5 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def spelt(seconds: float) -> str:
    """With its units, as no neighbour says what they are.

    >>> spelt(5640), spelt(96), spelt(42)
    ('1 h 34 min', '1 min 36 s', '42 s')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def printable(text: str) -> str:
    """Control characters shown as escapes, so that no name can move the cursor."""
    return "".join(c if c.isprintable() or c == " " else ascii(c)[1:-1] for c in text)

"""The pair of views that topology is trained on: one whose diagram moves a little, one whose diagram moves more.

A view is one operation of `bounded`, drawn among those that calibration found usable, at a strength drawn from its
range, then one of the flips and turns that `augment` allows; these change no diagram. Diagrams are those of the pixels
that the encoder sees, normalised by the range of the unchanged image.

Each image has `topology.draws` weak and as many strong views, turned afresh in every epoch: their diagrams are made
once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int, Int64
from torch import Tensor

from kladi import config as settings
from kladi.data.dataset import Dataset
from kladi.data.views import bounded, philox
from kladi.data.views.batch import Diagrams, View
from kladi.data.views.calibration import Original, Strengths
from kladi.data.views.kept_diagrams import KeptDiagrams
from kladi.data.views.kept_strengths import looked_at
from kladi.data.views.partners import partners
from kladi.data.views.region import Looks, Region
from kladi.data.views.whole import masks, pictures
from kladi.structure.topology import BANDS, Diagram, diagrams

STREAM = "bounded"
OPERATION, STRENGTH, UP, ACROSS, DOWN, TURN = range(6)
"""Number of each draw. A new one goes to the end."""


class BoundedPair:
    """The views of any rows in any epoch; a pure function of (seed, epoch, row), whoever asks.

    Args:
        dataset: whose images are read.
        config: `intensity`, `augment` (which flips are allowed), `train.seed`.
        strengths: from `strengths_of`.
        side: of the square that diagrams are made of.
        tokens: points of H0 and H1 that a view's diagram keeps; None: views without diagrams.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: settings.Config,
        strengths: Strengths,
        side: int,
        tokens: tuple[int, int] | None,
    ) -> None:
        self.dataset, self.config, self.strengths, self.side, self.tokens = dataset, config, strengths, side, tokens
        self._unit = np.full(len(dataset), np.nan)  # of each row once it was met: what a strength of 1 is
        self._low, self._high = np.zeros(len(dataset)), np.zeros(len(dataset))
        self._mark = np.zeros(len(dataset), dtype=np.uint32)
        self._kept = None if tokens is None else KeptDiagrams(self._file(tokens), len(dataset), *tokens)
        self._partner: Int64[np.ndarray, " n"] | None = None
        if config.topology.diagrams == "another":
            self._partner = partners(dataset.split, dataset.group, dataset.row_id)

    def views(self, rows: Int[np.ndarray, " b"], epoch: int, device: torch.device) -> tuple[View, ...]:
        """The weak view and the strong one."""
        x = self._met(rows)
        views = []
        for number in range(len(BANDS)):
            seen = self._changed(x, rows, epoch, number)
            found = self._diagrams(x, seen, rows, epoch, number)
            turned = bounded.turned(seen, self._turns(self._uniform(rows, epoch, number)))
            views.append(View(_normalised(turned, self.config.intensity), found).to(device))
        return tuple(views)

    def __str__(self) -> str:
        """`weak views by 8 operations, strong views by 5 operations`."""
        ways = ", ".join(f"{band} views by {len(found)} operations" for band, found in self.strengths.ranges.items())
        few = f"; {self.strengths.skipped} images had next to no topology" if self.strengths.skipped else ""
        return f"{ways}{few}"

    def _met(self, rows: Int[np.ndarray, " b"]) -> Float32[Tensor, "b C S S"]:
        """The unchanged images, each looked at when it is first met."""
        x = pictures(self.dataset, rows, self.config.intensity)
        new = np.flatnonzero(np.isnan(self._unit[rows]))
        if len(new):
            some, index = x[torch.from_numpy(new)], rows[new]
            looks = Looks.of(some, self.side, masks(self.dataset, index, some, self.config.topology.region))
            self._low[index], self._high[index] = looks.low, looks.high
            self._mark[index] = looks.marks(self.dataset.store.pixel_digest[index])
            self._unit[index] = Original.of(some, self.dataset.row_id[index], looks).unit  # last: it says who was met
        return x

    def _diagrams(
        self, x: Tensor, seen: Tensor, rows: Int[np.ndarray, " b"], epoch: int, number: int
    ) -> Diagrams | None:
        """Of one view before it is turned; those of the partners' views where these are given."""
        if self._kept is None or self.tokens is None:
            return None
        if self.config.topology.diagrams == "none":
            return Diagrams.of([Diagram.empty()] * len(rows), *self.tokens)
        of = rows
        if self._partner is not None:
            of = self._partner[rows]
            self._met(of[np.isnan(self._unit[of])])

        def make(absent: Int64[np.ndarray, " m"]) -> list[Diagram]:
            some, index = of[absent], torch.from_numpy(absent)
            own = self._partner is None
            before = x[index] if own else self._met(some)
            after = seen[index] if own else self._changed(before, some, epoch, number)
            return diagrams(self._looks(some, before).v(after))

        draw = number * self.config.topology.draws + self._draw(epoch, number)
        return self._kept(draw, of, self._mark[of], make)

    def _draw(self, epoch: int, number: int) -> int:
        """Which of its draws a view shows in an epoch: each in turn, and in time each weak one with each strong one."""
        draws = self.config.topology.draws
        return (epoch + number * (epoch // draws)) % draws

    def _looks(self, rows: Int[np.ndarray, " b"], x: Tensor) -> Looks:
        """At rows that were met; regions are found again, since those of a million images would fill the memory."""
        where = masks(self.dataset, rows, x, self.config.topology.region)
        regions = tuple(Region.of(mask) for mask in where) or (None,) * len(rows)
        return Looks(self.side, self._low[rows], self._high[rows], regions)

    def _uniform(self, rows: Int[np.ndarray, " b"], epoch: int, number: int) -> Float64[np.ndarray, "draws b"]:
        row_id = self.dataset.row_id[rows]
        return philox.uniform(self.config.train.seed, STREAM, row_id, epoch, number, np.arange(TURN + 1)).T

    def _changed(self, x: Tensor, rows: Int[np.ndarray, " b"], epoch: int, number: int) -> Float32[Tensor, "b C S S"]:
        """View number `number` of unchanged images, before it is turned."""
        row_id, ranges = self.dataset.row_id[rows], self.strengths.ranges[list(BANDS)[number]]
        draw = self._draw(epoch, number)
        u, names = self._uniform(rows, draw, number), sorted(ranges)
        pick = np.floor(u[OPERATION] * len(names)).astype(int)
        out = torch.empty_like(x)
        for k, name in enumerate(names):
            some = np.flatnonzero(pick == k)
            if len(some):
                strength = ranges[name].low + (ranges[name].high - ranges[name].low) * u[STRENGTH][some]
                drawn = bounded.Draw(u[UP][some] < 0.5, row_id[some], self.config.train.seed, draw, number)
                index = torch.from_numpy(some)
                out[index] = bounded.changed(x[index], name, strength * self._unit[rows[some]], drawn)
        return out

    def _turns(self, u: Float64[np.ndarray, "draws b"]) -> Int[np.ndarray, " b"]:
        """Of the eight those that the settings allow: quarter turns only where an image has no left and no up."""
        across, down = self.config.augment.flip_horizontal > 0, self.config.augment.flip_vertical > 0
        if across and down:
            return np.floor(u[TURN] * bounded.TURNS).astype(np.int64)
        mirror = bounded.TURNS // 2  # left to right; with half a turn, top to bottom
        return np.where(u[ACROSS] < 0.5, mirror * across + (mirror + 2) * down, 0).astype(np.int64)

    def _file(self, tokens: tuple[int, int]) -> Path:
        """Beside the store; its name says all that a diagram hangs on but for the row's own mark."""
        ranges = {
            name: {n: [r.low, r.high] for n, r in sorted(of.items())} for name, of in self.strengths.ranges.items()
        }
        drawn = ranges, self.config.topology.draws, tokens, Diagram.construction
        said = looked_at(self.dataset, self.config, self.side, *drawn)
        return self.dataset.store.folder.parent / f"diagrams-{hashlib.sha256(said.encode()).hexdigest()[:16]}.bin"


def _normalised(x: Float32[Tensor, "b C S S"], intensity: settings.Intensity) -> Float32[Tensor, "b C S S"]:
    mean, std = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (intensity.mean, intensity.std))
    return (x - mean) / std

"""What a run began with: the finished runs before it, one after the other, and the rows that these were trained on.

A run that begins with another one's weights has seen what that one saw: an evaluation must neither test on those rows
nor on others of their patients that it has, nor call the encoder free of labels that an earlier stage read. Kept as
`before.json`, which names no file, and `before.safetensors`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt64

from kladi.errors import UserError
from kladi.learn import journal, run_folder
from kladi.models import backbones, fused, weights

FACTS, ROWS = "before.json", "before.safetensors"


@dataclass(frozen=True)
class Stage:
    """One run of those before. objective: "" where the weights came from a file that says nothing of itself.

    topology: what its encoder saw of diagrams, in words. epochs, images_seen: None where unknown.
    """

    objective: str
    topology: str = ""
    epochs: int | None = None
    images_seen: int | None = None


@dataclass(frozen=True)
class Lineage:
    """stages: the first one first. row_id: of all rows that any of them was trained on."""

    stages: tuple[Stage, ...] = ()
    row_id: UInt64[np.ndarray, " n"] = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.uint64))

    @property
    def known(self) -> bool:
        """Whether every stage says what it was."""
        return all(stage.objective for stage in self.stages)

    @property
    def objectives(self) -> set[str]:
        """Those that are known."""
        return {stage.objective for stage in self.stages if stage.objective}

    @property
    def epochs(self) -> int | None:
        """Of all stages; None where that of one is unknown."""
        return total(stage.epochs for stage in self.stages)

    @property
    def images_seen(self) -> int | None:
        """As `epochs`."""
        return total(stage.images_seen for stage in self.stages)


def total(numbers: Iterable[int | None]) -> int | None:
    """None where one of them is not known."""
    known = list(numbers)
    return None if None in known else sum(number for number in known if number is not None)


def behind(source: str | Path) -> Lineage:
    """What a run inherits that begins with these weights: a finished run and all before it, or a file, which does not
    say what it saw unless it lies in the folder of its run."""
    run = Path(source)
    run = run.parent if run.name == "model.safetensors" else run
    if not (run / "rows.safetensors").is_file():  # other libraries, and exports, have a config.json too
        return Lineage((Stage(""),))
    before, described = of_run(run), backbones.read_description(run)["kladi"]
    sight, epochs = fused.description(run), described.get("epochs")
    stage = Stage(
        str((described.get("objective") or {}).get("name", "")),
        "" if sight is None else str(sight),
        round(epochs) if isinstance(epochs, int | float) else None,
        images_seen(run),
    )
    own = run_folder.read_rows(run)
    return Lineage((*before.stages, stage), np.union1d(before.row_id, own.row_id[own.trained]))


def images_seen(run: Path) -> int | None:
    """Images that a run's own steps looked at, each view of one counted once; None where it kept no journal."""
    lines = journal.read(run / "metrics.jsonl")
    return sum(int(line["images"]) for line in lines if isinstance(line.get("images"), int)) or None


def write(run: Path, lineage: Lineage) -> None:
    """Both files; none for a run that began with random weights."""
    if lineage.stages:
        rows = torch.from_numpy(lineage.row_id.view(np.int64))
        weights.write(run / ROWS, weights.to_bytes({"row_id": rows}))
        text = json.dumps([dataclasses.asdict(stage) for stage in lineage.stages], indent=1)
        weights.write(run / FACTS, text + "\n")


def of_run(run: Path) -> Lineage:
    """What `write` left there; empty where it wrote nothing.

    Raises:
        UserError: damaged, or lost.
    """
    if not (run / FACTS).is_file():
        finished = (run / "config.json").is_file() and (run / "model.safetensors").is_file()
        if finished and backbones.read_description(run)["kladi"].get("before"):
            raise UserError(f"{run}/{FACTS} is missing; what this run began with is not known any more")
        return Lineage()
    try:
        stages = tuple(Stage(**one) for one in json.loads((run / FACTS).read_text(encoding="utf-8")))
        return Lineage(stages, weights.read(run / ROWS)["row_id"].numpy().view(np.uint64))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{run}/{FACTS} is damaged; what this run began with is not known any more") from error

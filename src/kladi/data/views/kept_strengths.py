"""The strengths of bounded views, measured once for a data set and its settings, and kept beside the decoded images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from kladi import __version__
from kladi import config as settings
from kladi.data.dataset import TRAIN, Dataset
from kladi.data.private_files import write_private
from kladi.data.views import bounded, philox
from kladi.data.views.calibration import GRID, Range, Reach, Strengths, calibrate, require_enough
from kladi.data.views.region import LEAST_AREA, MOST_AREA, Looks, Region
from kladi.data.views.whole import masks, pictures
from kladi.errors import UserError
from kladi.structure.topology import BANDS


def strengths_of(
    dataset: Dataset, config: settings.Config, side: int, say: Callable[[str, str], None] | None = None
) -> Strengths:
    """The calibrated strengths for this data set and these settings; kept beside the store, measured once.

    Args:
        say: told where they are measured, which takes a minute or two.

    Raises:
        UserError: too few operations are usable.
    """
    rows = _sample(dataset, config)
    said = looked_at(dataset, config, side, GRID, BANDS)
    x = pictures(dataset, rows, config.intensity)
    where = masks(dataset, rows, x, config.topology.region)
    without = sum(Region.of(mask) is None for mask in where)
    if without and say is not None:
        share = f"under {LEAST_AREA:.0%} or over {MOST_AREA:.0%} of the image"
        say("notice", f"{without} of {len(where)} sampled regions are {share}: there the whole of it is looked at")
    drawn = b"".join(mask.tobytes() for mask in where)
    shown = dataset.row_id[rows].tobytes() + dataset.store.pixel_digest[rows].tobytes()
    key = hashlib.sha256(said.encode() + shown + drawn).hexdigest()[:16]
    file = dataset.store.folder.parent / f"strengths-{key}.json"
    found = _read(file)
    if found is None:
        if say is not None:
            say("topology", f"measuring how far {len(bounded.OPERATIONS)} operations move {len(rows)} diagrams, once")
        looks = Looks.of(x, side, where)
        found = calibrate(x, dataset.row_id[rows], looks, config.train.seed)
        kept = _kept(file, written(found))
        if not kept and say is not None:
            say("notice", f"{file.name} cannot be kept beside the decoded images; the next run measures again")
    require_enough(found)
    return found


def looked_at(dataset: Dataset, config: settings.Config, side: int, *more: object) -> str:
    """What every look at the topology of these images hangs on, in words."""
    known = [__version__, dataset.store.digest, side, config.topology.region, config.train.seed]
    return json.dumps([*known, sorted(bounded.OPERATIONS), dataclasses.asdict(config.intensity), *more])


def written(strengths: Strengths) -> str:
    """The table as JSON, with the checksum of the rest of it."""
    ranges = {band: {n: dataclasses.asdict(r) for n, r in some.items()} for band, some in strengths.ranges.items()}
    reaches = {name: [dataclasses.asdict(one) for one in some] for name, some in strengths.reaches.items()}
    table = {"ranges": ranges, "skipped": strengths.skipped, "reaches": reaches}
    return json.dumps({**table, "sha256": _checksum(table)}, indent=1) + "\n"


def _checksum(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def read_strengths(file: Path) -> Strengths:
    """The table that a run has kept.

    Raises:
        UserError: it is not there, or damaged, or too few operations are usable.
    """
    found = _read(file)
    if found is None:
        raise UserError(f"{file}: missing or damaged; start anew in another folder")
    require_enough(found)  # a band without an operation would show no image at all
    return found


def _kept(file: Path, text: str) -> bool:
    """Write it, where that is possible; other runs share the folder."""
    try:
        write_private(file, text.encode())
    except OSError:
        return False
    return True


def _read(file: Path) -> Strengths | None:
    """What was measured before; None where it is not there, or is no such table."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("sha256") != _checksum(content):
            return None
        ranges = {band: {n: Range(**r) for n, r in content["ranges"][band].items()} for band in BANDS}
        skipped = int(content["skipped"])
        reaches = {
            name: tuple(Reach(float(one["strength"]), tuple(map(float, one["quantiles"]))) for one in some)
            for name, some in content["reaches"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    every = [r for some in ranges.values() for r in some.values()]
    names = {name for some in ranges.values() for name in some}
    good = all(isinstance(r.low, float) and isinstance(r.high, float) and 0 < r.low <= r.high < 10 for r in every)
    return Strengths(ranges, skipped, reaches) if good and names <= bounded.OPERATIONS.keys() else None


def _sample(dataset: Dataset, config: settings.Config) -> Int[np.ndarray, " m"]:
    """Training rows, one a patient, by lot."""
    rows = np.flatnonzero(dataset.split == TRAIN)
    order = rows[philox.epoch_order(config.train.seed, 0, dataset.row_id[rows])]
    _, first = np.unique(dataset.group[order], return_index=True)
    return order[np.sort(first)][: config.topology.calibration]

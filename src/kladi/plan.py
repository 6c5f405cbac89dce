"""Fingerprint of a data set -> an editable plan with a reason for each choice -> a smoke run that proves it.

The rules are few and fixed, and each is one line below: a user who disagrees changes the key, and the change survives
when the plan is made again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kladi import config as settings
from kladi.data.dataset import TRAIN, Dataset
from kladi.errors import UserError
from kladi.evaluate import diagnostics
from kladi.evaluate.diagnostics import Diagnostic
from kladi.learn.console import Silent
from kladi.learn.fit import fit

CPU_MINUTES = 30
"""Length of a pretraining that the plan aims for where there is no accelerator."""
SMOKE_STEPS = 20
MIRRORED = {"laterality", "view"}
"""Metadata that a left-right flip would make a lie."""
UNORIENTED = {"sm", "gm", "xc", "dms", "microscopy", "dermatoscopy", "histology"}
"""Modalities whose images have no up and no left: specimens and skin."""
SIGNATURE = "# chosen by kladi: "


@dataclass(frozen=True)
class Fingerprint:
    """What the plan rests on, and nothing else."""

    images: int
    train_images: int
    patients: int
    held_out_patients: int
    colour_share: float
    labelled_share: float
    leaves: int
    depth: int
    metadata: tuple[str, ...]
    tables: tuple[str, ...]
    modalities: tuple[str, ...]
    cores: int
    accelerator_gb: float
    structure: tuple[Diagnostic, ...] = ()


@dataclass(frozen=True)
class Smoke:
    """Twenty steps of the planned run."""

    first_loss: float
    last_loss: float
    std: float
    seconds_a_step: float


def fingerprint(dataset: Dataset, intensity: settings.Intensity | None = None) -> Fingerprint:
    """The facts of a joined data set and of this machine.

    Args:
        intensity: that the data set was decoded by; None: the default one.
    """
    train = dataset.split == TRAIN
    labelled = dataset.target[train] >= 0
    tree = dataset.taxonomy
    used = np.unique(dataset.target[dataset.target >= 0])
    modalities = {value.casefold() for value in dataset.columns.get("modality", ()) if value}
    gpu = torch.cuda.is_available()
    return Fingerprint(
        images=len(dataset),
        train_images=int(train.sum()),
        patients=len(np.unique(dataset.group)),
        held_out_patients=len(np.unique(dataset.group[~train])),
        colour_share=_colour_share(dataset),
        labelled_share=float(labelled.mean()) if len(labelled) else 0.0,
        leaves=len(used),
        depth=0 if tree is None or not len(used) else int(tree.depth[used].max()),
        metadata=() if dataset.label_sets is None else tuple(dataset.label_sets.attributes),
        tables=tuple(one.name for one in dataset.modalities),
        modalities=tuple(sorted(modalities)),
        cores=os.cpu_count() or 1,
        accelerator_gb=torch.cuda.get_device_properties(0).total_memory / 2**30 if gpu else 0.0,
        structure=diagnostics.before_training(dataset, intensity),
    )


def choose(facts: Fingerprint, given: Mapping[str, Any]) -> tuple[settings.Config, dict[str, str]]:
    """The plan and the reason of each key in it; keys in `given` are the user's and stay.

    Raises:
        UserError: a key of `given` does not exist or has an impossible value.
    """
    chosen: dict[str, tuple[Any, str]] = {}
    gpu = facts.accelerator_gb > 0
    chosen["intensity.size"] = (224, f"{facts.accelerator_gb:.0f} GB accelerator") if gpu else (64, "no accelerator")
    colour = facts.colour_share >= 0.1
    chosen["intensity.channels"] = (3 if colour else 1, f"{facts.colour_share:.0%} of the images have colour")
    chosen["encoder.name"] = ("resnet50", "accelerator") if gpu else ("resnet18", "no accelerator")
    chosen.update(_augmentation(facts, colour))
    chosen["objective.name"] = _objective(facts)
    least = max(8, min(256, 2 ** int(np.log2(max(facts.train_images // 4, 8)))))
    chosen["train.batch"] = (least, f"{facts.train_images} training images; {2 * least - 1} others for each anchor")
    if gpu:
        chosen["train.precision"] = ("bf16-mixed", "accelerator")
        chosen["train.epochs"] = (200, "accelerator")
    plan = settings.override(settings.Config(), {key: value for key, (value, _) in chosen.items()})
    reasons = {key: reason for key, (_, reason) in chosen.items()} | dict.fromkeys(given, "yours")
    return settings.override(plan, given), reasons


def smoke(dataset: Dataset, config: settings.Config, steps: int = SMOKE_STEPS) -> Smoke:
    """Train `steps` steps in a folder that is thrown away: memory, finiteness, speed, no collapse.

    Raises:
        RunStopped: what would also have stopped the real run, hours later.
    """
    alone = {"train.devices": 1, "train.nodes": 1}
    length = {"train.max_steps": steps, "train.epochs": max(config.train.epochs, steps)}
    short = settings.override(config, {**alone, **length})
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        fit(dataset, short, run, progress=Silent())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    monitors = [line["std"] for line in lines if line.get("std") is not None]
    # The first step pays for warm-up (allocation, code paths), so it does not speak for the rest.
    seconds = [line["seconds"] for line in losses[1:]] or [losses[0]["seconds"]]
    # The fastest step: the others waited for whatever else this machine was doing.
    return Smoke(losses[0]["loss"], losses[-1]["loss"], monitors[-1] if monitors else float("nan"), min(seconds))


def epochs_for(facts: Fingerprint, config: settings.Config, seconds_a_step: float) -> tuple[int, str]:
    """As many epochs as fit the time a laptop is given, 10 to 200."""
    steps = max(1, facts.train_images // config.train.batch)
    fitting = int(CPU_MINUTES * 60 / max(steps * seconds_a_step, 1e-9))
    epochs = min(200, max(10, fitting))
    minutes = epochs * steps * seconds_a_step / 60
    return epochs, f"{steps} steps an epoch at {seconds_a_step:.2g} s: about {minutes:.0f} min"


def write(config: settings.Config, reasons: Mapping[str, str], path: Path) -> None:
    """The plan as TOML. Its last line remembers what was chosen, so that the next plan knows what a person changed."""
    flat = {k: v for k, v in _flat(config).items() if reasons.get(k) not in {None, "yours"}}
    text = settings.to_toml(config, reasons)
    path.write_text(f"{text}\n{SIGNATURE}{json.dumps(flat, sort_keys=True)}\n", encoding="utf-8")


def changed_by_hand(path: Path) -> dict[str, Any]:
    """Keys of an earlier plan that hold something else than what kladi chose for them."""
    now = _flat(settings.read(path))
    lines = path.read_text(encoding="utf-8").splitlines()
    signed = [line.removeprefix(SIGNATURE) for line in lines if line.startswith(SIGNATURE)]
    try:
        chosen = json.loads(signed[-1]) if signed else {}
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: the last line, which remembers what was chosen, is damaged; delete that line"
        ) from error
    default = _flat(settings.Config())
    return {key: value for key, value in now.items() if value != chosen.get(key, default[key])}


def _flat(config: settings.Config) -> dict[str, Any]:
    return {f"{s}.{k}": v for s, table in settings.to_dict(config).items() for k, v in table.items()}


def _augmentation(facts: Fingerprint, colour: bool) -> dict[str, tuple[Any, str]]:
    """Flips only where the image has no left and no up; hue and saturation only where there is colour."""
    chosen: dict[str, tuple[Any, str]] = {}
    unoriented = bool(facts.modalities) and set(facts.modalities) <= UNORIENTED
    if MIRRORED & set(facts.metadata):
        why = f"off: {', '.join(sorted(MIRRORED & set(facts.metadata)))} is a label"
    else:
        why = "specimens have no left and no up" if unoriented else "off: left and right mean something in these images"
    flips = 0.5 if unoriented and not MIRRORED & set(facts.metadata) else 0.0
    chosen["augment.flip_horizontal"] = (flips, why)
    chosen["augment.flip_vertical"] = (flips, why)
    chosen["augment.hue"] = (0.02, "colour, but colour is a finding") if colour else (0.0, "one channel")
    chosen["augment.saturation"] = (0.1, "colour") if colour else (0.0, "one channel")
    return chosen


def _objective(facts: Fingerprint) -> tuple[str, str]:
    """Tables beside the images -> multimodal; tree present -> label_tree; flat labels -> supcon; metadata -> metadata;
    neither -> simclr."""
    if facts.tables:
        return "multimodal", f"beside the images {', '.join(facts.tables)}; a study says whether it beats the rest"
    if facts.labelled_share >= 0.5 and facts.leaves > 1:
        share = f"{facts.labelled_share:.0%} labelled, {facts.leaves} labels"
        tree = next((d for d in facts.structure if d.name == "tree against features"), None)
        if facts.depth > 1 and tree is not None and tree.verdict == "absent":
            return "supcon", f"{share}; the tree says nothing about the grey levels ({diagnostics.sentence(tree)})"
        if facts.depth > 1:
            return "label_tree", f"tree of depth {facts.depth}, {share}; a study says whether it beats supcon"
        return "supcon", f"flat labels, {share}"
    if facts.metadata:
        return "metadata", f"no labels to speak of; metadata {', '.join(facts.metadata)}"
    return "simclr", "neither labels nor metadata"


def _colour_share(dataset: Dataset) -> float:
    """Share of the files that hold colour, as the decoder counted them."""
    counts = dataset.store.facts.get("channels", {})
    return counts.get("colour", 0) / max(sum(counts.values()), 1)

"""What a run is made of, before its first step and after its last: built from a configuration, saved, exported."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from timm.layers import convert_sync_batchnorm
from torch.optim import SGD, AdamW, Optimizer

from kladi import config as settings
from kladi.data.dataset import Dataset
from kladi.data.views.bounded_pair import BoundedPair
from kladi.data.views.kept_strengths import read_strengths, strengths_of, written
from kladi.data.views.loader import Loader
from kladi.data.views.partners import partners
from kladi.errors import UserError, suggestion
from kladi.learn import checkpoint, lineage, monitors, objectives, presets, ranks, run_folder, state
from kladi.learn.facts import Facts
from kladi.models import backbones, weights
from kladi.models.backbones import Match
from kladi.models.fused import Fused, fused, load_weights, side_of
from kladi.models.heads import Projector
from kladi.structure.topology import diagram

VIEWS = 2
PRECISIONS = ("32-true", "bf16-mixed")
STRENGTHS = "strengths.json"
"""In a run with topology: how strong its views are, as they were measured before the first step."""
MOVING_COPY = "target."
"""Of the state: what a checkpoint keeps and a finished run does not."""


@dataclass
class Training:
    """A run in memory. Only the tensors and the last three fields change.

    match: what `init.weights` and the encoder had in common; None where nothing was read.
    step: steps taken. low: looks at the fixed rows in a row that found a collapse. spread: what the last look found.
    """

    config: settings.Config
    dataset: Dataset
    fabric: Fabric
    encoder: backbones.Encoder
    objective: objectives.Supervised
    optimizer: Optimizer
    loader: Loader
    data_digest: str
    match: Match | None = None
    step: int = 0
    low: int = 0
    spread: monitors.Spread | None = None

    @property
    def steps(self) -> int:
        """Of the whole schedule."""
        return self.loader.steps * self.config.train.epochs

    @property
    def last(self) -> int:
        """The step that this process stops after."""
        return min(self.steps, self.config.train.max_steps or self.steps)

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next step is in, from 1."""
        return 1 + self.step // self.loader.steps

    @property
    def at_epoch_end(self) -> bool:
        return self.step % self.loader.steps == 0


def assemble(
    dataset: Dataset,
    config: settings.Config,
    fabric: Fabric,
    say: Callable[[str, str], None] | None = None,
    *,
    before: Path | None = None,
) -> Training:
    """Encoder, projector, objective, optimiser and loader; fresh weights from torch's current generator.

    Args:
        say: told of what takes a while.
        before: the run that goes on: its checkpoint takes the place of `init.weights`, and its strengths are used.

    Raises:
        UserError: whatever is wrong with the configuration, or with the data for this objective.
    """
    encoder, objective, match = begun(dataset, config, read=before is None)
    objective.to(fabric.device)
    if fabric.device.type == "cuda" and fabric.world_size > 1:
        objective = convert_sync_batchnorm(objective)  # torch has none for the CPU: there each process has its own
    loader = Loader(dataset, config, VIEWS, fabric.device, rank=fabric.global_rank, world=fabric.world_size)
    _require_images(objective.least, loader, config)
    loader.bounded = _bounded(dataset, config, encoder, say, before)
    optimizer = optimizer_of(objective, config.train, config.topology.scale)
    digest = run_folder.digest(dataset)
    return Training(config, dataset, fabric, encoder, objective, optimizer, loader, digest, match)


def _require_images(least: int, loader: Loader, config: settings.Config) -> None:
    """Refuse parts of a batch that are too small for batch statistics: those of a process, and those of a chunk."""
    train, share = config.train, loader.batch // loader.world
    name = config.objective.name
    if share < least:
        raise UserError(f"--train.batch {loader.batch}: {name} takes {least} or more images a process")
    rest = share % train.chunk if 0 < train.chunk < share else least
    if 0 < min(train.chunk or least, rest or least) < least:
        raise UserError(
            f"--train.chunk {train.chunk} leaves {min(rest or train.chunk, train.chunk)} of {share} images by itself; "
            f"{name} takes {least} or more at a time"
        )


def begun(
    dataset: Dataset, config: settings.Config, *, read: bool = True
) -> tuple[backbones.Encoder, objectives.Supervised, Match | None]:
    """Encoder and objective before the first step, and what the encoder had in common with `init.weights`, where these
    are read.

    Raises:
        UserError: as `assemble`, for all that needs neither a device nor a batch.
    """
    check(config.train)
    settings.require_topology(config)
    encoder = built_encoder(config)
    # Before the objective is built: what follows the encoder begins as its copy.
    match = load_weights(encoder, config.init.weights) if read and config.init.weights else None
    projector = Projector(encoder.width, *config.encoder.projector)
    facts = Facts.of(dataset)
    return encoder, presets.build(config.objective.name, config.objective.args, facts, encoder, projector), match


def built_encoder(config: settings.Config) -> backbones.Encoder:
    """A fresh encoder, with a diagram encoder round it where topology is fused."""
    encoder = backbones.build(config.encoder, config.intensity)
    return fused(encoder, config.topology) if config.topology.on and config.topology.sees != "image" else encoder


def _bounded(
    dataset: Dataset,
    config: settings.Config,
    encoder: backbones.Encoder,
    say: Callable[[str, str], None] | None,
    before: Path | None,
) -> BoundedPair | None:
    """Where views come from if topology is on."""
    if not config.topology.on:
        return None
    diagram(np.zeros((1, 1)))  # whether the package is there, before anything is measured
    if config.topology.diagrams == "another":
        partners(dataset.split, dataset.group, dataset.row_id)  # whether there are any, before minutes are spent
    side = side_of(config.topology, config.intensity.size)
    tokens = encoder.sight.tokens if isinstance(encoder, Fused) else None
    strengths = read_strengths(before / STRENGTHS) if before else strengths_of(dataset, config, side, say)
    return BoundedPair(dataset, config, strengths, side, tokens)


def check(train: settings.Train) -> None:
    """Refuse settings that no loop could follow.

    Raises:
        UserError: names the key and what it takes.
    """
    wrong = [
        ("epochs", train.epochs >= 1, "1 or more"),
        ("lr", 0 < train.lr < math.inf, "a number above 0"),
        ("weight_decay", 0 <= train.weight_decay < math.inf, "0 or more"),
        ("momentum", 0 <= train.momentum < 1, "0 or more and below 1"),
        ("warmup", 0 <= train.warmup < 1, "0 or more and below 1"),
        ("clip", train.clip >= 0, "0 (off) or more"),
        ("checkpoint_steps", train.checkpoint_steps >= 0, "0 (at the end of an epoch) or more"),
        ("max_steps", train.max_steps >= 0, "0 (no limit) or more"),
    ]
    for key, good, words in wrong:
        if not good:
            raise UserError(f"--train.{key} {getattr(train, key)}: takes {words}")
    if train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError('--train.tensorboard needs a package: pip install "kladi[tensorboard]"')


def optimizer_of(objective: torch.nn.Module, train: settings.Train, topology_scale: float = 1.0) -> Optimizer:
    """AdamW or SGD, without weight decay on biases and normalisations, which are vectors.

    A group's `scale` is its factor on the learning rate: that of the image encoder, of the diagram encoder, or 1.
    """
    scales = {"encoder.model.": train.encoder_scale, "encoder.topology.": topology_scale}
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            scale = next((scale for prefix, scale in scales.items() if name.startswith(prefix)), 1.0)
            groups.setdefault((scale, train.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    said = [{"params": some, "scale": scale, "weight_decay": decay} for (scale, decay), some in groups.items()]
    if train.optimizer == "sgd":
        return SGD(said, lr=train.lr, momentum=train.momentum)
    return AdamW(said, lr=train.lr)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over `warmup * steps` steps to `peak`, then half a cosine to zero; a pure function of the step.

    >>> [round(learning_rate(step, 10, 1.0, 0.2), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def seed_of(seed: int, what: str, step: int = 0) -> int:
    """63 bits for torch's generators, so that dropout and stochastic depth depend on seed and step alone."""
    return int.from_bytes(hashlib.sha256(f"kladi\0{seed}\0{what}\0{step}".encode()).digest()[:8], "little") >> 1


def device(train: settings.Train) -> Fabric:
    """The device and precision that a configuration asks for.

    Raises:
        UserError: this machine has no such device, or the precision is not one of `PRECISIONS`.
    """
    if train.precision not in PRECISIONS:
        raise UserError(
            f'--train.precision "{train.precision}" is not one of {", ".join(PRECISIONS)}'
            + suggestion(train.precision, PRECISIONS)
        )
    wanted = train.device if train.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = wanted.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in there or not (index or "0").isdigit():
        raise UserError(f'--train.device "{train.device}" is no device' + suggestion(kind, ["auto", *there]))
    if int(index or 0) >= there[kind]:
        raise UserError(
            f'--train.device "{train.device}": this machine has {there[kind]} of that kind; closest: "auto"'
        )
    precision: Any = train.precision
    devices, nodes = ranks.counted(train)
    if devices * nodes == 1:
        return Fabric(accelerator=kind, devices=1 if kind == "cpu" else [int(index or 0)], precision=precision)
    if kind == "mps" or index:
        raise UserError(f'--train.device "{train.device}" is one device, not {devices}; closest: "{kind}"')
    if devices > there[kind] and kind != "cpu":
        raise UserError(f"--train.devices {devices}: this machine has {there[kind]}")
    if nodes == 1 and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the processes of one machine need no network
    return Fabric(accelerator=kind, devices=devices, num_nodes=nodes, strategy="ddp", precision=precision)


def keep_strengths(t: Training, run: Path) -> None:
    """Into the run folder, for its whole life."""
    if t.loader.bounded is not None:
        weights.write(run / STRENGTHS, written(t.loader.bounded.strengths))


def snapshot(t: Training) -> checkpoint.Snapshot:
    """All that a checkpoint keeps, as it is now."""
    facts = {
        "step": t.step,
        "epoch": t.step // t.loader.steps,
        "seed": t.config.train.seed,
        "low": t.low,
        "spread": dataclasses.astuple(t.spread) if t.spread else None,
        "config_digest": run_folder.config_digest(t.config),
        "data_digest": t.data_digest,
        "world_size": t.fabric.world_size,
        "best": None,
    }
    return state.capture(t.objective, t.optimizer, facts)


def restore(t: Training, folder: Path) -> None:
    """Put a checkpoint's state into the training.

    Raises:
        UserError: it is of another model.
    """
    facts = state.restore(t.objective, t.optimizer, folder)
    try:
        t.step, t.low = int(facts["step"]), int(facts["low"])
        t.spread = monitors.Spread(*map(float, facts["spread"])) if facts["spread"] else None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--resume: {folder.name}/state.json is damaged; start anew in another folder") from error
    if not 0 <= t.step <= t.steps:
        raise UserError(f"--resume: {folder.name} is of step {t.step:,}, this run has {t.steps:,}")


def export(t: Training, run: Path) -> None:
    """The encoder with timm's plain keys, its description, and the head, so that z can be computed again."""
    head = {n: v for n, v in state.head_tensors(t.objective).items() if not n.startswith(MOVING_COPY)}
    weights.write(run / "head.safetensors", weights.to_bytes(head))
    objective = t.config.objective
    facts = {
        "objective": {
            "name": presets.resolved(objective.name, Facts.of(t.dataset)),
            "args": {**objective.args, **t.objective.learned()},
            "weights": t.objective.weights,
            **({"answers": dataclasses.asdict(t.objective.answers)} if t.objective.answers else {}),
        },
        "projector_form": t.objective.projector.form,
        **({"topology": t.encoder.description()} if isinstance(t.encoder, Fused) else {}),
        "taxonomy_digest": None if t.dataset.taxonomy is None else t.dataset.taxonomy.digest,
        "data_digest": t.data_digest,
        "seed": t.config.train.seed,
        "steps": t.step,
        "epochs": t.step / t.loader.steps,
        "before": [dataclasses.asdict(stage) for stage in lineage.of_run(run).stages],
        "environment": run_folder.environment(t.fabric.device),
    }
    backbones.export(t.encoder, run, facts)

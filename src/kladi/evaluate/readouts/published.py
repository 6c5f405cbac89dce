"""Fine-tuning and frozen probe as the metadata paper has them, and as its released scripts have them.

They are here to be compared with, not to be recommended: ten epochs whatever the size of the task, one learning rate
whatever the encoder, and a head that starts anywhere. `finetune.py` and `probe.py` are what a study uses by itself.

Source: Takaya and Inamori, arXiv 2508.18613, and the scripts that belong to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import nn
from torch.nn import functional

from kladi import config as settings
from kladi.data.dataset import Dataset
from kladi.data.views import philox, whole
from kladi.evaluate.answers import Answers, Task, column_of
from kladi.evaluate.readouts.finetune import Classifier, log_probabilities
from kladi.evaluate.readouts.regimes import Part, cannot
from kladi.evaluate.splits import TEST, TRAIN, VAL
from kladi.learn.training import seed_of
from kladi.models.backbones import Encoder

Regime = Literal["probe", "finetune"]


@dataclass(frozen=True)
class Published:
    """Adam on whole images without augmentation, the rate divided by ten after `drop` epochs.

    lr, probe_lr: of fine-tuning and of the probe. best: answer by the epoch of least validation loss, else by the last.
    adapting: batch statistics of a frozen encoder go on moving. headless: fine-tuning has no head; the first outputs of
    the encoder are the classes, and all others are classes that no image has.
    """

    lr: float = 1e-4
    probe_lr: float = 1e-4
    best: bool = True
    adapting: bool = False
    headless: bool = False
    epochs: int = 10
    drop: int = 5
    batch: int = 32


COMPAT = {"paper": Published(), "released": Published(probe_lr=1e-3, best=False, adapting=True, headless=True)}
"""What the paper says, and what the scripts do."""


def published(
    encoder: Encoder,
    dataset: Dataset,
    task: Task,
    part: Part,
    intensity: settings.Intensity,
    regime: Regime,
    recipe: Published,
    *,
    method: str = "encoder",
    seed: int = 0,
    device: str = "cpu",
) -> Answers | None:
    """Train on the training rows of one fold by that recipe, and answer its test rows.

    Args:
        encoder: left as it is.
        dataset: decoded by the encoder's intensity pipeline.
        regime: "finetune" trains all layers, "probe" the head alone.
        seed: of the head and of the order.

    Returns:
        None where the fold has fewer than two classes to train on, or no test row, or where training diverged.
    """
    if cannot(part, task):
        return None
    rows = part.rows(TRAIN)
    classes = np.unique(task.target[rows])
    frozen = regime == "probe"
    devices = [torch.device(device).index or 0] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_of(seed, "published head"))
        headless = recipe.headless and not frozen
        head = _identity(encoder.width) if headless else nn.Linear(encoder.width, len(classes))
        model = Classifier(copy.deepcopy(encoder), head).to(device)
        _train(model, dataset, task, part, intensity, frozen, recipe, classes, seed)
    test = part.rows(TEST)
    scores = log_probabilities(model, dataset, test, intensity).numpy().astype(np.float64)[:, : len(classes)]
    if not np.isfinite(scores).all():
        return None
    pred = classes[scores.argmax(axis=1)]
    return Answers(method, regime, part.fold, part.repeat, test, pred, scores, classes)


def _train(
    model: Classifier,
    dataset: Dataset,
    task: Task,
    part: Part,
    intensity: settings.Intensity,
    frozen: bool,
    recipe: Published,
    classes: Int[np.ndarray, " C"],
    seed: int,
) -> None:
    """Ten epochs; the model ends as the recipe answers."""
    device = next(model.encoder.parameters()).device
    code = torch.from_numpy(column_of(task.target, classes)).to(device)
    for p in model.encoder.parameters():
        p.requires_grad_(not frozen)
    for p in model.head.parameters():
        p.requires_grad_(not isinstance(model.head, _Identity))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=recipe.probe_lr if frozen else recipe.lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, recipe.drop, 0.1)
    least, best = math.inf, None
    for epoch in range(recipe.epochs):
        for index in _batches(dataset, part.rows(TRAIN), recipe.batch, seed, epoch):
            model.train()
            model.encoder.train(not frozen or recipe.adapting)
            loss = functional.cross_entropy(model(whole.images(dataset, index, intensity, device)), code[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if recipe.best:
            found = _loss(model, dataset, task, part.rows(VAL), intensity, classes)
            if best is None or found < least:
                least, best = found, {name: value.detach().clone() for name, value in model.state_dict().items()}
    if best is not None:
        model.load_state_dict(best)


def _batches(
    dataset: Dataset, rows: Int[np.ndarray, " m"], size: int, seed: int, epoch: int
) -> Iterator[Int[np.ndarray, " b"]]:
    """The rows in the order of the epoch. A last batch of a single image has no batch statistics and is left out."""
    order = rows[philox.epoch_order(seed, epoch, dataset.row_id[rows])]
    parts = (order[start : start + size] for start in range(0, len(order), size))
    return (index for index in parts if len(index) > 1)


def _loss(
    model: Classifier,
    dataset: Dataset,
    task: Task,
    val: Int[np.ndarray, " m"],
    intensity: settings.Intensity,
    classes: Int[np.ndarray, " C"],
) -> float:
    """Mean cross-entropy of the validation rows whose class was trained on."""
    column = column_of(task.target[val], classes)
    known = np.flatnonzero(column >= 0)
    if not len(known):
        return math.inf
    log_p = log_probabilities(model, dataset, val[known], intensity)
    return float(-log_p[np.arange(len(known)), column[known]].mean())


class _Identity(nn.Linear):
    """A head that passes features on as logits."""


def _identity(width: int) -> _Identity:
    head = _Identity(width, width, bias=False)
    nn.init.eye_(head.weight)
    return head

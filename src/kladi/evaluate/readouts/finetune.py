"""Fine-tuning: all layers of an encoder are trained on the task, from the head that a linear probe has found.

Every method gets the same recipe and the same grid of learning rates, an untrained encoder too. Validation rows choose
the scale of the learning rates and the step; test rows are read once, at the end.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from kladi import config as settings
from kladi.data.dataset import Dataset
from kladi.data.views import whole
from kladi.data.views.batch import Batch
from kladi.data.views.loader import Loader
from kladi.evaluate import metrics
from kladi.evaluate.answers import Answers, Task, column_of, said
from kladi.evaluate.readouts.criteria import Criterion, Judge, judges
from kladi.evaluate.readouts.probe import Probes, choose, fit_probes
from kladi.evaluate.readouts.regimes import Part, cannot
from kladi.evaluate.splits import TEST, TRAIN, VAL
from kladi.learn.training import learning_rate, seed_of
from kladi.models.backbones import Encoder

CROP = (0.8, 1.0)
BATCH = 256
"""Rows at a time where nothing is learnt."""


@dataclass(frozen=True)
class Recipe:
    """How all layers are trained, the same for every method.

    steps: at least, and at least `epochs` passes over the training rows. batch: images a step.
    encoder_lr, head_lr: peak learning rates, both times each of `scales`; the scale that is best on validation rows.
    weight_decay: on weight matrices. warmup: share of the steps. clip: greatest gradient norm.
    looks: times that validation rows are looked at, evenly spaced; the best state is kept.
    """

    steps: int = 1000
    epochs: int = 30
    batch: int = 32
    encoder_lr: float = 1e-4
    head_lr: float = 1e-3
    scales: tuple[float, ...] = (0.3, 1.0, 3.0)
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0
    looks: int = 20


class Classifier(nn.Module):
    """An encoder and a linear head: images -> logits."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    @override
    def forward(self, image: Float32[Tensor, "B C H W"]) -> Float32[Tensor, "B classes"]:
        return self.head(self.encoder(image))


@dataclass
class _Best:
    """The best state so far, copied: a reference would go on changing under the optimiser; and whose it is."""

    score: tuple[float, float] = (-math.inf, -math.inf)
    state: dict[str, Tensor] | None = None
    judge: Judge | None = None
    scale: float = math.nan


@dataclass(frozen=True)
class _Fold:
    """What one training is about."""

    dataset: Dataset
    task: Task
    part: Part
    config: settings.Config
    recipe: Recipe
    judge: Judge
    classes: Int[np.ndarray, " C"]
    scale: float


@dataclass(frozen=True)
class Tuned:
    """What a fine-tuned classifier answers, and which of the recipe's scales was the best on validation rows; None
    where these could not tell."""

    answers: Answers
    scale: float | None


@dataclass(frozen=True)
class Start:
    """Where fine-tuning begins: an encoder with the batch statistics of a fold's training rows, and their probe.

    encoder: a copy, which fine-tuning leaves as it is. probes, problem: the fold's probes and the one that was chosen.
    """

    encoder: Encoder
    probes: Probes
    problem: int


def fine_tune(
    start: Start,
    dataset: Dataset,
    task: Task,
    part: Part,
    config: settings.Config,
    recipe: Recipe | None = None,
    *,
    criterion: Criterion | None = None,
    method: str = "encoder",
    seed: int = 0,
    device: str = "cpu",
) -> Tuned | None:
    """Train a copy of the start's encoder on the training rows of one fold, and answer its test rows.

        AdamW on encoder and head, linear warm-up, cosine to zero, gradients clipped; crops of 80 to 100 % and the flips
        that `config.augment` allows; batch statistics are learnt.

    Args:
        start: of this fold, from `begin`; every criterion can begin there.
        dataset: decoded by the encoder's intensity pipeline.
        task: targets of its rows.
        part: the fold.
        config: `augment` flips and `intensity`.
        recipe: None: the default one.
        criterion: what is minimised; None: cross-entropy. Each variant is tried at each scale.
        seed: of the order, the views and whatever is random inside the encoder.

    Returns:
        The answers, and the scale that was best; None where training diverged.
    """
    recipe = recipe or Recipe()
    classes, best = start.probes.classes, _Best()
    every = [j.to(device) for j in judges(criterion or Criterion(), task.taxonomy, classes, seed)]
    models = [Classifier(start.encoder, _head(start, judge)).to(device) for judge in every]
    devices = [torch.device(device).index or 0] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for (judge, model), scale in itertools.product(zip(every, models, strict=True), recipe.scales):
            fold = _Fold(dataset, task, part, config, recipe, judge, classes, scale)
            _train(copy.deepcopy(model), fold, seed, best)
    if best.state is None or best.judge is None:
        return None
    model = copy.deepcopy(models[every.index(best.judge)])
    model.load_state_dict(best.state)
    test = part.rows(TEST)
    scale = best.scale if math.isfinite(best.score[0]) else None
    scores = log_probabilities(model, dataset, test, config.intensity, best.judge).numpy().astype(np.float64)
    pred = classes[scores.argmax(axis=1)]
    return Tuned(Answers(method, "finetune", part.fold, part.repeat, test, pred, scores, classes), scale)


def begin(
    encoder: Encoder, dataset: Dataset, task: Task, part: Part, intensity: settings.Intensity, device: str = "cpu"
) -> Start | None:
    """Settle a copy of the encoder on the training rows of one fold, and probe what it then shows.

    The running statistics of batch normalisation become those of the training rows, and the head will be the linear
    probe of the features after that. Without it an untrained network, whose running statistics mean nothing, would
    start from a head for features that vanish with the first step.

    Returns:
        None where the fold has fewer than two classes to train on, or no test row.
    """
    if cannot(part, task):
        return None
    own = copy.deepcopy(encoder).to(device)
    _settle_statistics(own, dataset, part.rows(TRAIN), intensity)
    features = np.zeros((len(dataset), own.width), dtype=np.float32)
    rows = np.concatenate([part.rows(TRAIN), part.rows(VAL)])
    with torch.no_grad():
        for index in blocks(rows):
            features[index] = own(whole.images(dataset, index, intensity, torch.device(device))).float().cpu().numpy()
    return Start(own, *_probe(features, task, part))


@torch.no_grad()
def _settle_statistics(
    encoder: Encoder, dataset: Dataset, rows: Int[np.ndarray, " m"], intensity: settings.Intensity
) -> None:
    """Running statistics of batch normalisation := their mean over the batches of these rows, unaugmented."""
    encoder.eval()
    layers = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not layers or len(rows) < 2:
        return
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the batches
        layer.train()
    device = next(encoder.parameters()).device
    for index in blocks(rows):
        if len(index) > 1:
            encoder(whole.images(dataset, index, intensity, device))
    for layer, momentum in zip(layers, before, strict=True):
        layer.momentum = momentum
    encoder.eval()


def blocks(rows: Int[np.ndarray, " m"]) -> Iterator[Int[np.ndarray, " b"]]:
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def _probe(features: Float32[np.ndarray, "n F"], task: Task, part: Part) -> tuple[Probes, int]:
    """The fold's probe, its penalty chosen on validation rows."""
    probes = fit_probes(features, task.target, (part.of == TRAIN)[None])
    val = part.rows(VAL)
    scores = [
        said(lambda p=p: metrics.balanced_accuracy(probes.predict(features[val], p), task.target[val]))[0]
        for p in range(len(probes.lambdas))
    ]
    return probes, int(choose(np.array([scores]), probes.lambdas)[0])


def _head(start: Start, judge: Judge) -> nn.Linear:
    """The probe as a linear layer on raw features, with the columns that the judge reads."""
    probes, chosen = start.probes, start.problem
    found = torch.from_numpy(probes.weight[chosen].T), torch.from_numpy(probes.intercept[chosen])
    weight, bias = judge.widened(*found)
    head = nn.Linear(weight.shape[1], len(bias))
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head


def _train(model: Classifier, fold: _Fold, seed: int, best: _Best) -> None:
    """One run at one scale of the learning rates; what beats `best` on validation rows is copied into it."""
    device, recipe = next(model.parameters()).device, fold.recipe
    loader = Loader(fold.dataset, _views(fold.config, recipe, seed), 1, device, rows=fold.part.rows(TRAIN))
    steps = max(recipe.steps, recipe.epochs * loader.steps)
    optimizer = torch.optim.AdamW(_groups(model, recipe, fold.scale))
    peaks = [group["lr"] for group in optimizer.param_groups]
    code = torch.from_numpy(column_of(fold.task.target, fold.classes)).to(device)
    look = max(1, steps // recipe.looks)
    model.train()
    for step, batch in enumerate(_batches(loader, steps)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = learning_rate(step, steps, peak, recipe.warmup)
        torch.manual_seed(seed_of(seed, "finetune", step))  # dropout and stochastic depth repeat
        loss = fold.judge.rows(model(batch.views[0].image), code[batch.row]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        if (step + 1) % look == 0 or step + 1 == steps:
            _keep(model, fold, best)


def _batches(loader: Loader, steps: int) -> Iterator[Batch]:
    """The batches of as many epochs as it takes."""
    epochs = (loader.epoch(number) for number in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), steps)


def _keep(model: Classifier, fold: _Fold, best: _Best) -> None:
    """Higher balanced accuracy wins; of equals, which few validation rows give often, the likelier truth."""
    val, classes = fold.part.rows(VAL), fold.classes
    log_p = log_probabilities(model, fold.dataset, val, fold.config.intensity, fold.judge)
    model.train()
    if not bool(torch.isfinite(log_p).all()):
        return
    true = fold.task.target[val]
    score = said(lambda: metrics.balanced_accuracy(classes[log_p.argmax(dim=1).numpy()], true))[0]
    column = column_of(true, classes)
    known = np.flatnonzero(column >= 0)
    loss = float(-log_p[known, column[known]].mean()) if len(known) else math.inf
    found = (score if math.isfinite(score) else -math.inf, -loss)
    if best.state is None or found > best.score:
        best.score, best.judge, best.scale = found, fold.judge, fold.scale
        best.state = {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def log_probabilities(
    model: Classifier,
    dataset: Dataset,
    rows: Int[np.ndarray, " m"],
    intensity: settings.Intensity,
    judge: Judge | None = None,
) -> Float32[Tensor, "m C"]:
    """log softmax of whole, unaugmented images at the judge's classes (None: at all columns), in evaluation mode, on
    the CPU."""
    device = next(model.parameters()).device
    model.eval()
    parts = [torch.zeros(0, model.head.out_features if judge is None else len(judge.column))]
    for index in blocks(rows):
        logits = model(whole.images(dataset, index, intensity, device)).float()
        log_p = functional.log_softmax(logits, dim=1) if judge is None else judge.log_p(logits)
        parts.append(log_p.cpu())
    return torch.cat(parts)


def _views(config: settings.Config, recipe: Recipe, seed: int) -> settings.Config:
    """Crops and allowed flips, and nothing else."""
    off = dict.fromkeys(("rotation", "brightness", "contrast", "gamma", "saturation", "hue", "blur", "noise"), 0.0)
    changed = {f"augment.{name}": value for name, value in off.items()}
    return settings.override(
        config,
        {**changed, "augment.crop": CROP, "train.batch": recipe.batch, "train.seed": seed, "train.workers": 0},
    )


def _groups(model: Classifier, recipe: Recipe, scale: float) -> list[dict[str, Any]]:
    """Encoder and head have their own learning rates; biases and normalisations, which are vectors, do not decay."""
    groups: list[dict[str, Any]] = []
    for module, lr in ((model.encoder, recipe.encoder_lr), (model.head, recipe.head_lr)):
        for decay, chosen in (
            (recipe.weight_decay, [p for p in module.parameters() if p.ndim > 1]),
            (0.0, [p for p in module.parameters() if p.ndim <= 1]),
        ):
            groups.append({"params": chosen, "lr": lr * scale, "weight_decay": decay})
    return groups

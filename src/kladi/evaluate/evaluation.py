"""The evaluation of one encoder, from images to results.json: embed, split, measure, compare with controls, map.

    evaluate("runs/a", dataset, config, Path("runs/a/eval"))

writes results.json, results.csv, splits.json, embeddings.npz, predictions.npz, map.json and thumbnails.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kladi import config as settings
from kladi.data.dataset import Dataset
from kladi.data.embeddings import Embeddings
from kladi.data.findings import Finding
from kladi.data.private_files import write_private
from kladi.errors import UserError, suggestion
from kladi.evaluate import baselines, comparisons, diagnostics, pretraining, protocol
from kladi.evaluate.answers import LOWER_IS_BETTER, PRIMARY, Task
from kladi.evaluate.embed import embed
from kladi.evaluate.measure import Measured, Method, measure, parts_of
from kladi.evaluate.pretraining import Pretraining
from kladi.evaluate.protocol import Protocol
from kladi.evaluate.readouts.regimes import Part
from kladi.evaluate.record import account, atlas, figures, results, shapes
from kladi.evaluate.record.account import Subject
from kladi.evaluate.record.results import Row
from kladi.models import backbones, fused, heads

CONTROLS = ("random_encoder", "histogram")
PACKAGES = ("numpy", "scipy", "scikit-learn", "torch", "timm", "umap-learn")
Say = Callable[[str], None]


@dataclass
class _Cost:
    """Seconds by stage; left out of the digest."""

    seconds: dict[str, float] = field(default_factory=dict)

    def stage(self, name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = run()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return found


def evaluate(
    source: str | Path | nn.Module,
    dataset: Dataset,
    config: settings.Config,
    out: str | Path,
    *,
    controls: Sequence[str] = CONTROLS,
    findings: Sequence[Finding] = (),
    map_kind: str = "auto",
    say: Say | None = None,
) -> Path:
    """Measure what an encoder's representation is worth on a data set, beside the controls it must beat.

    Args:
        source: a run folder, or any module float[B, C, H, W] -> [B, F].
        dataset: decoded by the encoder's own intensity pipeline.
        config: `evaluate` (folds, repeats, seed, ...), `data.allow_leak`, `train.device`; for a plain module also
            `intensity`, and `encoder` for the untrained control.
        out: folder of the results; made where missing, readable by its owner alone.
        controls: of "random_encoder" and "histogram". A claim without its controls is none: leave them in.
        findings: of reading the data; warnings and what was left out are kept in the results.
        map_kind: "auto", "umap" or "pca".
        say: told what is being done.

    Returns:
        The path of results.json.

    Raises:
        UserError: no finished run, an unknown control, a leak (every one listed), or too few patients for folds.
    """
    started, out, say = datetime.now(UTC), Path(out), say or _silent
    for control in controls:
        if control not in CONTROLS:
            raise UserError(f'control "{control}": one of {", ".join(CONTROLS)}' + suggestion(control, CONTROLS))
    encoder, cost = _source(source, dataset, config), _Cost()
    device = _device(config.train.device)
    say(f"embed      {len(dataset):,} images on {device}")
    own = cost.stage("embed", lambda: _embedded(encoder.module, encoder.head, encoder, dataset, device))
    plan = protocol.choose(own, encoder.about, config)
    own.write(out / "embeddings.npz")
    digest = _digest({"evaluate": dataclasses.asdict(config.evaluate), "controls": list(controls)})
    said = None if isinstance(source, nn.Module) else pretraining.own_answers(Path(source), own.z)
    methods = [Method(encoder.name, own.features, own.z, encoder.about.space, own=said)]
    methods += [_control(name, encoder, dataset, config, device, cost) for name in controls]
    parts: tuple[Part, ...] = ()
    if plan.splits is not None:
        plan.splits.write(out / "splits.json")
        parts = parts_of(plan.splits, own.row_id)
    measured = []
    for method in methods:
        say(f"measure    {method.name}, {method.width} dimensions, {_folds(parts, config)}")
        measured.append(cost.stage("measure", lambda m=method: _measure(m, plan, parts, config, digest)))
    drawn: dict[comparisons.Key, comparisons.Drawn] = {}
    if plan.task is not None and parts:
        say(f"compare    {config.evaluate.bootstrap:,} draws of patients")
        drawn = cost.stage("bootstrap", lambda: _drawn(measured, plan, parts, config))
    _write_predictions(out / "predictions.npz", measured, own)
    say("map        at most 2,000 images")
    drawn_map = cost.stage("map", lambda: atlas.write(own, dataset, out, seed=config.evaluate.seed, kind=map_kind))
    visible = atlas.shown(own, drawn_map.rows)
    rows = [row for one in measured for row in one.rows]
    content = results.assemble(
        rows,
        study=account.study(encoder, config, digest, controls, plan),
        provenance=account.provenance(started, device),
        data=account.data(dataset, plan, measured, findings),
        splits=account.splits(plan, parts, own),
        methods=[account.method(method, encoder, dataset, digest) for method in methods],
        comparisons=_comparisons(drawn, methods, plan, parts),
        monitors=[{"method": encoder.name, **entry} for entry in encoder.about.monitors],
        diagnostics=[d.to_dict() for d in diagnostics.before_training(dataset, encoder.intensity, _grey(methods))],
        figures={
            **_figures(measured, methods, plan, parts, drawn, encoder, cost),
            "ball": figures.ball(own, encoder.about.space),
            "shapes": shapes.of(encoder.module, dataset, own, drawn_map.rows, visible),
        },
    )
    return results.write(content, out)


# --- what is measured ----------------------------------------------------------------------------------------------


def _source(source: str | Path | nn.Module, dataset: Dataset, config: settings.Config) -> Subject:
    if isinstance(source, nn.Module):
        intensity: Any = getattr(source, "intensity", None) or config.intensity
        architecture: Any = getattr(source, "architecture", None)
        return Subject("encoder", source, None, intensity, Pretraining(), architecture, "given")
    run = Path(source)
    module = fused.load(run)
    about = pretraining.of_run(run, dataset)
    name = about.objective.partition(":")[2] or about.objective or "encoder"
    return Subject(name, module, heads.load(run), module.intensity, about, module.architecture, "pretrained")


def _control(
    name: str, encoder: Subject, dataset: Dataset, config: settings.Config, device: str, cost: _Cost
) -> Method:
    """An untrained network of the same architecture, or grey levels without a network."""
    if name == "histogram":
        features = cost.stage("embed", lambda: baselines.grey_features(dataset, encoder.intensity))
        return Method(name, features, grey=True, control_of=encoder.name)
    architecture = encoder.architecture or config.encoder
    module = random_encoder(architecture, encoder.intensity, seed=config.evaluate.seed, like=encoder.module)
    embedded = cost.stage("embed", lambda: _embedded(module, None, encoder, dataset, device))
    return Method(name, embedded.features, control_of=encoder.name)


def random_encoder(
    architecture: settings.Encoder, intensity: settings.Intensity, *, seed: int = 0, like: nn.Module | None = None
) -> backbones.Encoder:
    """The same architecture with the random weights that training would start from, fused as `like` is."""
    with backbones.drawn_apart(seed):
        plain = backbones.build(architecture, intensity)
        whole = fused.around(plain, like.sight) if isinstance(like, fused.Fused) else plain
        return whole.eval()


def _embedded(module: nn.Module, head: nn.Module | None, encoder: Subject, dataset: Dataset, device: str) -> Embeddings:
    return embed(module, dataset, head=head, intensity=encoder.intensity, device=device)


def _measure(method: Method, plan: Protocol, parts: tuple[Part, ...], config: settings.Config, digest: str) -> Measured:
    if plan.task is not None and parts:
        settled = config.evaluate
        return measure(method, plan.task, parts, ks=settled.neighbours, seed=settled.seed, config_digest=digest)
    nothing = Row(
        method=method.name,
        regime="probe",
        dataset=plan.task.name if plan.task else "none",
        metric=PRIMARY,
        value=None,
        n=0,
        n_patients=0,
        seed=config.evaluate.seed,
        reason=plan.reason,
        config_digest=digest,
    )
    return Measured(rows=[nothing])


def _drawn(
    measured: list[Measured], plan: Protocol, parts: tuple[Part, ...], config: settings.Config
) -> dict[comparisons.Key, comparisons.Drawn]:
    if plan.task is None:
        return {}
    settled = config.evaluate
    return comparisons.draw(measured, plan.task, parts, draws=settled.bootstrap, seed=settled.seed)


def _comparisons(
    drawn: dict[comparisons.Key, comparisons.Drawn], methods: list[Method], plan: Protocol, parts: tuple[Part, ...]
) -> list[dict[str, Any]]:
    """The encoder against each of its controls."""
    if plan.task is None or not parts:
        return []
    pairs = [(method.control_of, method.name) for method in methods if method.control_of]
    return comparisons.settle(comparisons.compare(drawn, pairs, plan.task, parts))


def _grey(methods: Sequence[Method]) -> np.ndarray | None:
    """Grey levels of all rows, where a control has made them."""
    return next((method.features for method in methods if method.grey), None)


def _write_predictions(path: Path, measured: list[Measured], own: Embeddings) -> None:
    """Answers and scores of every fold, so that intervals and confusion can be computed again without a model."""
    arrays: dict[str, Any] = {"row_id": own.row_id}
    index = []
    for number, answers in enumerate(a for one in measured for a in one.answers):
        index.append(
            {"method": answers.method, "regime": answers.regime, "fold": answers.fold, "repeat": answers.repeat}
        )
        arrays[f"{number}/rows"], arrays[f"{number}/answer"] = answers.rows, answers.pred
        arrays[f"{number}/classes"] = answers.classes
        if answers.scores is not None:
            arrays[f"{number}/scores"] = answers.scores.astype(np.float32)
    arrays["about"] = np.array(json.dumps({"format": "kladi-predictions", "version": 1, "answers": index}))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_private(path, buffer.getvalue())


def _figures(
    measured: list[Measured],
    methods: list[Method],
    plan: Protocol,
    parts: tuple[Part, ...],
    drawn: dict[comparisons.Key, comparisons.Drawn],
    encoder: Subject,
    cost: _Cost,
) -> dict[str, Any]:
    names = [method.name for method in methods]
    rows = [row for one in measured for row in one.rows]
    answers = [a for one in measured for a in one.answers]
    task: Task | None = plan.task
    return {
        "confusion": figures.confusion(answers, task, encoder.name) if task else {},
        "severity": figures.severity(answers, task, names) if task else {},
        "levels": figures.by_depth(rows, "level_accuracy_", figures.REGIME, names),
        "calibration": figures.by_depth(rows, "calibration_error_", figures.REGIME, names),
        "stopping": figures.stopping(answers, task, names) if task else [],
        "tree": figures.tree(answers, task, encoder.name) if task else [],
        "parents": figures.parents(answers, task, names) if task else [],
        "violations": figures.by_depth(rows, "violation_rate_", "prototype", names),
        "intervals": comparisons.intervals(drawn, task, parts) if task and parts else [],
        "lower_is_better": sorted(LOWER_IS_BETTER),
        "curves": list(encoder.about.curves),
        "cost": {
            **{f"{name}_seconds": round(seconds, 3) for name, seconds in cost.seconds.items()},
            "peak_memory_bytes": account.peak_memory(),
        },
    }


def _folds(parts: tuple[Part, ...], config: settings.Config) -> str:
    """`5 folds x 2 repeats`, and why there are fewer than asked for."""
    if len(parts) < 2:
        return "the manifest's split" if parts else "nothing to measure on"
    folds, repeats = (len({getattr(part, name) for part in parts}) for name in ("fold", "repeat"))
    fewer = f" ({config.evaluate.folds} asked; the rarest class has {folds} patients)"
    return f"{folds} folds x {repeats} repeats{fewer if folds < config.evaluate.folds else ''}"


def _device(wanted: str) -> str:
    """The device of the configuration where this machine has it, else whatever there is: only speed depends on it."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    kind = wanted.partition(":")[0]
    return wanted if kind == "cpu" or kind == there else there


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _silent(text: str) -> None:
    """Nobody listens."""

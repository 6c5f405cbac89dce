"""One function a verb: each prints what a user reads and returns its exit code. Torch is imported where it is used."""

from __future__ import annotations

import fnmatch
import inspect
import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kladi import config as settings
from kladi import printed
from kladi.data.findings import counted
from kladi.errors import UserError, suggestion

MOST_RANK = 1_000
"""Factors of a set of tables."""


def check(data: Path, config: settings.Config, out: Path | None) -> int:
    """Print everything that was found; 1 where there is an error."""
    from kladi.data import load, summary

    start = time.perf_counter()
    inspection = load.inspect(data, config)
    printed.head("check", str(data), summary.described(inspection))
    for name, text in summary.lines(inspection, config, time.perf_counter() - start, **_pair_rules(config)):
        printed.line(name, text)
    for name, text in summary.finding_lines(inspection.findings, inspection.manifest):
        printed.line(name, text)
    if out:
        summary.write_csv(inspection.findings, out)
        printed.line("wrote", str(out))
    errors = len(inspection.errors())
    warnings = sum(f.severity == "warning" for f in inspection.findings)
    verdict = "not ready" if errors else "ready"
    printed.line(f"{verdict}:", f"{counted(errors, 'error')}, {counted(warnings, 'warning')}", width=0)
    if not errors:
        printed.line("next", f"kladi plan {shlex.quote(str(data))}{_asked(config)} --out plan.toml")
    return 1 if errors else 0


def _asked(config: settings.Config) -> str:
    """What somebody asked for, as it is typed: ` --data.allow_outside true`."""
    usual, given = settings.to_dict(settings.Config()), settings.to_dict(config)
    keys = {f"{s}.{k}": v for s, table in given.items() for k, v in table.items() if v != usual[s][k]}
    flat: dict[str, Any] = {}
    for key, value in keys.items():
        flat |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
    return "".join(f" --{key} {shlex.quote(_typed(value))}" for key, value in flat.items())


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_typed, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def plan(data: Path, out: Path, earlier: Path | None, given: Mapping[str, Any], smoke: bool) -> int:
    """Write the plan, each key with its reason."""
    from kladi import plan as planning
    from kladi.data import load, summary
    from kladi.evaluate import diagnostics

    earlier = earlier or (out if out.is_file() else None)  # what a person wrote is never overwritten
    kept = planning.changed_by_hand(earlier) if earlier else {}
    given = {**kept, **given}
    dataset, inspection = load.load(data, settings.override(settings.Config(), given))
    facts = planning.fingerprint(dataset, settings.override(settings.Config(), given).intensity)
    config, reasons = planning.choose(facts, given)
    printed.head(
        "plan", f"{facts.images:,} images, {facts.patients:,} patients, {facts.leaves} labels", f"{facts.cores} cores"
    )
    printed.warnings(inspection)
    for d in facts.structure:
        printed.line(d.name, diagnostics.sentence(d), width=26)
    if config.topology.on:
        _strengths(data, config, out)
    proof = None
    if smoke:
        printed.message(f"smoke      {planning.SMOKE_STEPS} steps of the planned run")
        dataset, _ = load.load(data, config)
        proof = planning.smoke(dataset, config)
        if "train.epochs" not in given and "train.epochs" not in reasons:
            epochs, why = planning.epochs_for(facts, config, proof.seconds_a_step)
            config = settings.override(config, {"train.epochs": epochs})
            reasons["train.epochs"] = why
    for key, reason in reasons.items():
        section, name = key.split(".", 1)
        value = printed.shown(getattr(getattr(config, section), name.split(".")[0]))
        printed.line(key, f"{value:<24} {reason}", width=26)
    for name, text in summary.metadata_lines(dataset, config.train.batch, **_pair_rules(config)):
        printed.line(name, text, width=26)
    if facts.held_out_patients:
        printed.line("held out", f"{facts.held_out_patients:,} patients, never seen in pretraining", width=26)
    if proof is not None:
        printed.line(
            "smoke",
            f"{planning.SMOKE_STEPS} steps: loss {proof.first_loss:.2f} -> {proof.last_loss:.2f}, finite, "
            f"{proof.seconds_a_step:.2g} s a step",
            width=26,
        )
    planning.write(config, reasons, out)
    printed.line("wrote", f"{out}; next: kladi pretrain {data} --config {out} --out runs/a", width=0)
    return 0


def _strengths(data: Path, config: settings.Config, out: Path) -> None:
    """How strong the views of a run with topology would be, in lines and on a page."""
    import json

    from kladi.data import load
    from kladi.data.views.kept_strengths import strengths_of, written
    from kladi.models.fused import side_of
    from kladi.report import page, strengths

    dataset, _ = load.load(data, config)
    side = side_of(config.topology, config.intensity.size)
    measured = strengths_of(dataset, config, side, lambda what, text: printed.message(f"{what:<11}{text}"))
    found = json.loads(written(measured))
    for name, weak, strong in strengths.lines(found):
        printed.line(name, f"weak {weak}; strong {strong}", width=26)
    path = out.with_suffix(".strengths.html")
    region = {"whole": "Whole images", "foreground": "Foregrounds of images", "mask": "Images inside their masks"}
    what = f"{region[config.topology.region]}, diagrams at {side} px, seed {config.train.seed}"
    page.write_strengths(found, path, what)  # no path: a page is kept, and a name may be one of a person
    printed.line("wrote", str(path))


def pretrain(data: Path, config: settings.Config, out: Path, *, resume: bool, force_unlock: bool, dry_run: bool) -> int:
    """Train, or say what training would do."""
    from kladi.data import load, summary
    from kladi.data.dataset import TRAIN
    from kladi.learn import ranks, run_folder, signals, training
    from kladi.learn.fit import fit

    follows = ranks.follows(config.train)
    if follows and ranks.started_here():
        signals.end_with(os.getppid())
    _require_topology(config)
    dataset, inspection = load.load(data, config)
    if follows:  # the process that leads the run says all there is to say
        fit(dataset, config, out, resume=resume)
        return 0
    printed.head("pretrain", str(out), f"seed {config.train.seed}, no network")
    printed.warnings(inspection)
    if dry_run:
        if out.is_dir() and not resume:
            run_folder.require_empty(out)
        encoder, _, match = training.begun(dataset, config)
        trained = int((dataset.split == TRAIN).sum())
        printed.line("would", f"train {encoder.title} on {counted(trained, 'image')} with {config.objective.name}")
        if match is not None:
            printed.line("from", f"{config.init.weights}: {match}")
        printed.line("and", f"write {out}")
        return 0
    fit(dataset, config, out, resume=resume, force_unlock=force_unlock, notes=summary.notes(inspection))
    printed.line("wrote", f"{out}/model.safetensors, metrics.jsonl")
    if config.topology.sees != "diagram":
        from kladi.models import backbones

        printed.line("in timm", backbones.in_timm(config.encoder, config.intensity, f"{out}/model.safetensors"))
        if config.topology.on and config.topology.sees == "both":
            printed.message("notice     that is the image encoder alone; with its diagram encoder: kladi.load")
    printed.line("next", f"kladi evaluate {out} {data} --out {out}/eval")
    return 0


def _require_topology(config: settings.Config) -> None:
    """Whoever asks for some topology means it."""
    usual = settings.Config().topology
    asked = [f"topology.{key}" for key, value in vars(config.topology).items() if value != getattr(usual, key)]
    settings.require_topology(config, asked)


def embed(run: Path, data: Path, out: Path, overrides: Mapping[str, str]) -> int:
    """Write embeddings.npz."""
    from kladi.data import load
    from kladi.evaluate.embed import embed as embedded
    from kladi.models import heads
    from kladi.models.fused import load as load_encoder

    encoder = load_encoder(run)
    dataset, inspection = load.load(data, _run_config(run, overrides))
    printed.head("embed", str(run), counted(len(dataset), "image"))
    printed.warnings(inspection)
    out.mkdir(parents=True, exist_ok=True)
    embedded(encoder, dataset, head=heads.load(run)).write(out / "embeddings.npz")
    printed.line("wrote", f"{out}/embeddings.npz")
    return 0


def evaluate(run: Path, data: Path, out: Path, overrides: Mapping[str, str]) -> int:
    """Measure, and draw the report."""
    from kladi.data import load
    from kladi.evaluate.evaluation import evaluate as measured
    from kladi.report import page

    config = _run_config(run, overrides)
    dataset, inspection = load.load(data, config)
    printed.head(
        "evaluate",
        str(run),
        f"{counted(len(dataset), 'image')}, split by patient" if dataset.has_patients else "no patient ids",
    )
    printed.warnings(inspection)
    measured(run, dataset, config, out, findings=inspection.findings, say=printed.message)
    written = page.write(out, None)
    printed.line("wrote", f"{out}/results.json, {written}")
    return 0


def export(run: Path, out: Path, kind: str) -> int:
    """Write the encoder for somebody who has no kladi."""
    from kladi.export import TOLERANCE
    from kladi.export import export as exported
    from kladi.models import backbones

    line = exported(run, out, kind)
    described = backbones.read_description(run)["kladi"]
    if "topology" in described:
        printed.message("notice     the image encoder alone; its diagram encoder and their mixture need kladi")
    if kind == "torchvision" and described["intensity"]["channels"] == 1:
        printed.message("notice     torchvision takes three channels: feed it the grey image three times")
    printed.line("compared", f"the features of two images are those of the run, to {TOLERANCE:g}")
    printed.line("wrote", str(out))
    printed.line("in Python", line)
    return 0


def compare(path: Path, out: Path, *, workers: int, force_unlock: bool) -> int:
    """Run what is missing of a study, and draw its report."""
    from kladi.report import page
    from kladi.study.compare import compare as compared

    printed.head("compare", str(path), "no network")
    compared(path, out, workers=workers, say=printed.message, force_unlock=force_unlock)
    printed.line("wrote", f"{out}/results.json, {page.write(out, None)}")
    return 0


def factors(
    paths: list[Path],
    out: Path,
    ranks: str,
    key: str,
    leave_out: list[str],
    levels: list[str],
    outcome: str,
    resamples: int,
    seed: int,
) -> int:
    """factors.json, factors.csv and report.html of tables of the same patients."""
    import json

    from kladi.data import patient_tables
    from kladi.data.findings import line
    from kladi.evaluate.factors import analyse
    from kladi.report import page

    chosen = _ranks(ranks)
    for name, number in (("resamples", resamples), ("seed", seed)):
        if number < 0:
            raise UserError(f"--{name} {number}: takes 0 or more")
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"--out {out}: {there} is a file; name a folder")
    again = [path for i, path in enumerate(paths) if path.resolve() in [other.resolve() for other in paths[:i]]]
    if again:
        raise UserError(f"{again[0]} is named twice; each table is a modality of its own")
    given = [_embedded(path) if path.suffix.lower() == ".npz" else path for path in paths]
    tables = patient_tables.read(given, key=key, leave_out=leave_out, levels=levels, outcome=outcome)
    printed.head("factors", counted(len(tables.rows), "patient"), counted(len(paths), "table"))
    for finding in tables.findings:
        printed.message(f"{finding.severity:<11}{line(finding)}")
    file = analyse(tables, out, ranks=chosen, resamples=resamples, seed=seed, say=printed.message)
    content = json.loads(file.read_text(encoding="utf-8"))
    for structure in content["structures"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in structure["explained"].items())
        printed.line("+".join(structure["tables"]), f"{counted(structure['rank'], 'factor')}: {shares}", width=26)
    if content["outcome"]:
        found = content["outcome"]
        share, spread = found["explained"]["mean"], found["explained"]["sd"]
        printed.line(
            outcome, f"factors foretell {share:.0%} of it (sd {spread:.0%} over {found['folds']} folds)", width=26
        )
    page.write_factors(content, out / "report.html")
    printed.line("wrote", f"{file}, {out}/factors.csv, {out}/report.html")
    return 0


def _embedded(path: Path) -> Any:
    """The features of `kladi embed` as a table, a row a row of its manifest."""
    import numpy as np

    from kladi.data.embeddings import Embeddings
    from kladi.data.patient_tables import Table

    found = Embeddings.read(path)
    features = found.features.astype(np.float64)
    bad = found.manifest_row[~np.isfinite(features).all(axis=1)]
    if len(bad):
        raise UserError(f"{path}: {len(bad):,} rows hold NaN or infinity, the first is row {int(bad.min()):,}")
    varied = features.std(axis=0) > 0
    rows, first = np.unique(found.manifest_row, return_index=True)  # of a file of several frames the first
    names = tuple(f"feature {i}" for i in np.flatnonzero(varied))
    return Table(path.stem, [str(row) for row in rows], rows.tolist(), names, features[first][:, varied])


def _ranks(text: str) -> int | dict[str, int] | str:
    """`auto`, a number, or `0+1+2=3,0+1=2`."""
    if text == "auto":
        return text
    try:
        if "=" not in text:
            numbers: dict[str, int] = {"": int(text)}
        else:
            pairs = [part.split("=") for part in text.split(",") if part]
            numbers = {name.strip(): int(number) for name, number in pairs}
            if len(numbers) < len(pairs):
                raise ValueError
        if max(numbers.values(), default=0) > MOST_RANK:
            raise ValueError
        return numbers.get("", numbers)
    except ValueError:
        takes = f"auto, a number up to {MOST_RANK}, or 0+1=2,0=1 (tables by their number, each set once)"
        raise UserError(f"--ranks {text}: takes {takes}") from None


def report(path: Path, out: Path | None) -> int:
    """Draw the page again."""
    from kladi.report import page

    printed.line("wrote", str(page.write(path, out)))
    return 0


def list_names(what: str, pattern: str) -> int:
    """Print the names of a kind, one a line; keys with their defaults and meanings."""
    kinds = ("objectives", "backbones", "metrics", "keys")
    if what not in kinds:
        said = f'list "{what}"' if what else "list"
        raise UserError(f"{said}: one of {', '.join(kinds)}" + suggestion(what, kinds))
    meanings = settings.meanings() if what == "keys" else {}
    for name in _names(what):
        if fnmatch.fnmatch(name, pattern):
            default, meaning = meanings.get(name, ("", ""))
            printed.line(name, f"{default:<22} {meaning}" if meaning else "", width=26 if meaning else 0)
    return 0


def _names(what: str) -> list[str]:
    if what == "keys":
        return settings.keys()
    if what == "objectives":
        from kladi.learn.presets import PRESETS

        return sorted(PRESETS)
    if what == "backbones":
        import timm

        return timm.list_models()
    from kladi.evaluate import metrics

    return sorted(name for name in dir(metrics) if inspect.isfunction(getattr(metrics, name)))


def _pair_rules(config: settings.Config) -> dict[str, Any]:
    """What the arguments of the metadata objective say of pairs: weights and threshold."""
    if config.objective.name != "metadata":
        return {}
    from kladi.learn import presets

    args = presets.arguments("metadata", config.objective.args)
    return {key: args[key] for key in ("weights", "threshold") if key in args}


def _run_config(run: Path, overrides: Mapping[str, str]) -> settings.Config:
    """The settings of the run's training, with the user's on top; the intensity pipeline stays the run's."""
    file = run / "config.toml"
    if not file.is_file():
        raise UserError(f"{run} is not a run: it holds no config.toml")
    carried = {"intensity": "its intensity pipeline", "topology": "what it sees of topology"}
    for key in overrides:
        what = carried.get(key.partition(".")[0])
        if what is not None:
            raise UserError(f"--{key} cannot change after training: the encoder carries {what}")
    from kladi.learn import run_folder

    return settings.override(run_folder.read_config(run), overrides)  # with the run's own copy of its taxonomy

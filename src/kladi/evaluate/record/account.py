"""What results.json says about an evaluation beside its numbers: study, methods, data, splits, provenance."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import nn

from kladi import __version__
from kladi import config as settings
from kladi.data.dataset import Dataset
from kladi.data.embeddings import Embeddings
from kladi.data.findings import Finding, line
from kladi.evaluate import comparisons
from kladi.evaluate.answers import PRIMARY
from kladi.evaluate.measure import Measured, Method
from kladi.evaluate.pretraining import Pretraining
from kladi.evaluate.protocol import Protocol
from kladi.evaluate.readouts.regimes import Part
from kladi.evaluate.splits import TEST, TRAIN, VAL
from kladi.learn import run_folder
from kladi.learn.lineage import total
from kladi.models.backbones import Encoder

PACKAGES = ("numpy", "scipy", "scikit-learn", "torch", "timm", "umap-learn")


@dataclass(frozen=True)
class Subject:
    """The encoder that is evaluated, and what is known of it.

    init: "pretrained" from a run folder, or "given" as a module.
    """

    name: str
    module: nn.Module
    head: nn.Module | None
    intensity: settings.Intensity
    about: Pretraining
    architecture: settings.Encoder | None
    init: str


def study(
    encoder: Subject, config: settings.Config, digest: str, controls: Sequence[str], plan: Protocol
) -> dict[str, Any]:
    """What was asked, fixed before anything was measured. The command is given without paths: they carry names."""
    return {
        "name": f"evaluation of {encoder.name}",
        "digest": digest,
        "command": "kladi evaluate RUN DATA --out OUT",
        "primary_metric": PRIMARY,
        "reference": controls[0] if controls else None,
        "family": [f"{PRIMARY}, {comparisons.PRIMARY_REGIME}, {encoder.name} against {name}" for name in controls],
        "margin": comparisons.MARGIN,
        "pretrain": plan.pretrain,
        "protocol": settings.to_dict(config)["evaluate"],
    }


def network(module: nn.Module | None) -> dict[str, Any]:
    """What makes the features, and how many parameters they go through; without a network it is grey levels."""
    if module is None:
        return {"encoder": "64-bin grey histogram and 64 principal components of 32 x 32 pixels", "parameters": 0}
    title, used = (module.title, module.reads_with) if isinstance(module, Encoder) else (type(module).__name__, module)
    return {"encoder": title, "parameters": sum(p.numel() for p in used.parameters())}


def method(of: Method, encoder: Subject, dataset: Dataset, digest: str) -> dict[str, Any]:
    """One entry of "methods": null is unknown, 0 is none."""
    about, own = encoder.about, not of.control_of
    drawn = of.name == "random_encoder"
    trained = own and encoder.init == "pretrained"
    labels: int | None = 0
    if own and (about.seen is None or not about.before.known):
        labels = None
    elif own and about.seen is not None and about.supervised:
        labels = int((about.seen & (dataset.target >= 0)).sum())
    return {
        "method": of.name,
        "objective": about.objective or None if own else None,
        "init": encoder.init if own else "random" if drawn else "none",
        **network(encoder.module if own or drawn else None),
        "width": of.width,
        "images_seen": total([about.images_seen, about.before.images_seen]) if trained else None if own else 0,
        "epochs": about.epochs if trained else None if own else 0,
        "epochs_before": about.before.epochs if trained else 0,
        "seed": about.seed if trained else None,
        "labels_in_pretraining": labels,
        "config_digest": digest,
        "control_of": of.control_of or None,
    }


def data(dataset: Dataset, plan: Protocol, measured: list[Measured], findings: Sequence[Finding]) -> dict[str, Any]:
    """What was evaluated on: counts, what was left out by reason, and every warning. No path, no id."""
    excluded = dict(plan.excluded)
    said = list(plan.warnings)
    for finding in findings:
        if finding.severity in {"left out", "skipped"}:
            key = f"{finding.code} {finding.severity}"
            excluded[key] = excluded.get(key, 0) + max(len(finding.rows), 1)
        elif finding.severity == "warning":
            said.append(line(finding))
    said += [warning for one in measured for warning in one.warnings]
    sites = {site for site in dataset.columns.get("site", ()) if site}
    return {
        "digest": run_folder.digest(dataset),
        "taxonomy_digest": dataset.taxonomy.digest if dataset.taxonomy is not None else None,
        "images": len(dataset),
        "patients": len(np.unique(dataset.group)) if dataset.has_patients else None,
        "sites": len(sites) or None,
        "labels": _labels(dataset),
        "excluded": excluded,
        "warnings": said,
    }


def _labels(dataset: Dataset) -> dict[str, list[int]]:
    """Images and patients at or below each node of the tree that has any."""
    tax = dataset.taxonomy
    if tax is None:
        return {}
    found: dict[str, list[int]] = {}
    below: dict[int, list[np.ndarray]] = {}
    for node in np.unique(dataset.target[dataset.target >= 0]):
        rows = np.flatnonzero(dataset.target == node)
        for above in tax.ancestors(int(node)).tolist():
            below.setdefault(above, []).append(rows)
    for node in sorted(below):
        rows = np.concatenate(below[node])
        found[tax.names[node]] = [len(rows), len(np.unique(dataset.group[rows]))]
    return found


def splits(plan: Protocol, parts: tuple[Part, ...], own: Embeddings) -> dict[str, Any]:
    """Images and patients of every part of every fold."""
    if plan.splits is None:
        return {}
    names = {TRAIN: "train", VAL: "val", TEST: "test"}
    return {
        "digest": plan.splits.digest,
        "kind": plan.splits.kind,
        "folds": plan.splits.folds,
        "repeats": plan.splits.repeats,
        "group": "patient" if own.has_patients else "image, no patient id",
        "parts": [
            {
                "fold": part.fold,
                "repeat": part.repeat,
                "part": name,
                "images": len(part.rows(code)),
                "patients": len(np.unique(own.group[part.rows(code)])),
            }
            for part in parts
            for code, name in names.items()
        ],
    }


def provenance(started: datetime, device: str) -> dict[str, Any]:
    """Versions and machine; no name of host or person."""
    environment = run_folder.environment(torch.device(device))
    return {
        "kladi": __version__,
        "python": environment["python"],
        "platform": environment["platform"],
        "device": environment["device"],
        "threads": environment["threads"],
        "precision": "float32 embeddings, float64 measurements",
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def peak_memory() -> int | None:
    """Bytes, None on systems that do not say; the unit of the call is kilobytes on Linux and bytes on macOS."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)

"""A results file as `kladi evaluate` writes it, small and made by hand, for the tests of the report."""

from __future__ import annotations

import math
from typing import Any

NODES = ["CT/chest", "CT/head", "US/breast/benign", "US/breast/malignant"]
THUMBNAIL = "data:image/png;base64,"
THUMBNAIL += "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGOoBwAAggCBd81ytgAAAABJRU5ErkJggg=="


def example(prefix: str = "") -> dict[str, Any]:
    """Three methods, one split; `prefix` goes before every name that a stranger could have chosen."""
    methods = [f"{prefix}label_tree", "random_encoder", "histogram"]
    nodes = [prefix + node for node in NODES]
    rows = []
    for m, method in enumerate(methods):
        for fold in range(3):
            shared = {
                "method": method, "dataset": "data", "fold": fold, "repeat": 0, "seed": 0, "label_fraction": 1.0,
                "shift": None, "reason": None, "n": 40 + fold, "n_patients": 20, "config_digest": "c0",
                "wall_seconds": 0.1, "cpu_seconds": 0.1,
            }  # fmt: skip
            for metric, value in (("balanced_accuracy", 0.8), ("hierarchical_f1", 0.85), ("mistake_severity", 1.4)):
                rows.append({**shared, "regime": "probe", "metric": metric, "value": value - 0.1 * m + 0.01 * fold})
            rows.append({**shared, "regime": "retrieval", "metric": "recall_at_5", "value": 0.9 - 0.2 * m})
            rows.append(
                {**shared, "regime": "probe", "metric": "auc", "value": None, "reason": f"{prefix}one class is absent"}
            )
    return {
        "format": "kladi-results",
        "version": 1,
        "digest": "d" * 64,
        "study": {
            "name": f"{prefix}ward", "digest": "e" * 64, "command": f"kladi evaluate {prefix}runs/a", "margin": 0.01,
            "primary_metric": "balanced_accuracy", "reference": "random_encoder", "family": [], "pretrain": "disjoint",
        },
        "provenance": {"kladi": "0.1.0", "python": "3.11", "packages": {"torch": "2"}, "threads": 2},
        "data": {
            "digest": "f" * 64, "taxonomy_digest": "a" * 64, "images": 120, "patients": 60, "sites": 0,
            "labels": {node: [30, 15] for node in nodes}, "excluded": {f"{prefix}empty file": 2},
            "warnings": [f"{prefix}14 images occur twice"],
        },
        "splits": {
            "digest": "b" * 64, "kind": "folds", "folds": 3, "repeats": 1, "group": "patient",
            "parts": [
                {"fold": 0, "repeat": 0, "part": part, "images": 40, "patients": 20}
                for part in ("train", "val", "test")
            ],
        },
        "methods": [
            {
                "method": method, "objective": "label_tree", "init": "scratch", "encoder": "resnet18", "width": 512,
                "parameters": 11_000_000, "images_seen": 12_000, "epochs": 100, "labels_in_pretraining": 80,
                "config_digest": "c0", "control_of": methods[0] if m else None,
            }
            for m, method in enumerate(methods)
        ],
        "rows": rows,
        "comparisons": [
            {
                "method": methods[0], "reference": "random_encoder", "dataset": "data", "regime": "probe",
                "metric": "balanced_accuracy", "pairs": 3, "zero_pairs": 0, "difference": 0.1, "interval": [0.02, 0.18],
                "interval_kind": "patient bootstrap", "corrected_t_p": 0.04, "wilcoxon_p": 0.25, "least_p": 0.25,
                "holm_p": 0.08, "rank_biserial": 1.0, "verdict": "leans better",
            }
        ],
        "monitors": [
            {"method": methods[0], "step": s, "metric": metric, "value": value}
            for s in range(0, 100, 10)
            for metric, value in (("std", 0.9 - s / 1000), ("effective_rank", 30.0 + s / 10))
        ],
        "diagnostics": [
            {
                "name": f"{prefix}tree", "statistic": "Mantel r", "value": 0.4, "p": 0.0001, "least_p": 0.0001,
                "null": "relabelled leaves", "verdict": "weak", "note": f"{prefix}36 classes",
            }
        ],
        "figures": {
            "confusion": {
                "regime": "probe", "nodes": nodes, "depths": [2, 2, 3, 3],
                "counts": [[20, 5, 1, 0], [4, 22, 0, 0], [0, 1, 18, 9], [0, 0, 7, 21]],
            },
            "severity": {"heights": [1, 2, 3], "counts": {methods[0]: [25, 2, 1], "random_encoder": [30, 20, 12]}},
            "levels": {methods[0]: [0.95, 0.9, 0.8], "random_encoder": [0.7, 0.6, 0.4]},
            "curves": [
                {"step": s, "epoch": s // 10, "loss": 5 * math.exp(-s / 40), "lr": 1e-3,
                 "hwc": 4 * math.exp(-s / 40), "grad_norm": 1.0, "idle": 0.02} for s in range(100)
            ],
            "cost": {},
            "shapes": {
                "persistence": {"attended": 0.04, "all": 0.02, "points": 900, "n": 40},
                "experts": {
                    "names": ["visual", "topology", "concat", "gated", "cross"],
                    "groups": {"CT": [0.2, 0.2, 0.2, 0.2, 0.2], "all": [0.4, 0.1, 0.2, 0.2, 0.1]},
                    "n": {"CT": 12, "all": 40},
                },
                "images": [
                    {"label": nodes[i % 4], "thumbnail": i - 1 if i else None, "h0": [[0.1, 0.5, 0.7], [0.2, 0.3, 0.3]],
                     "h1": [[0.4, 0.9, 1.0]] if i else []} for i in range(4)
                ],
            },
        },
    }  # fmt: skip


def example_map(prefix: str = "") -> dict[str, Any]:
    """Forty points in two columns."""
    n = 40
    return {
        "kind": "umap",
        "points": [[math.cos(i), math.sin(i) + (i % 2)] for i in range(n)],
        "columns": {
            f"{prefix}modality": [f"{prefix}CT" if i % 2 else "US" for i in range(n)],
            "level 2": ["" if i % 5 == 0 else NODES[i % 4] for i in range(n)],
        },
        "purity": {"modality": {"k": 10, "value": 0.93, "chance": 0.5, "n": 40}},
        "thumbnail": [0 if i % 3 else None for i in range(n)],
    }


def study_example(prefix: str = "") -> dict[str, Any]:
    """Two tasks, a method, its reference and a control, two label fractions."""
    base = example(prefix)
    tasks, names = [f"{prefix}breast", "brain"], [f"{prefix}metadata", f"{prefix}metadata, shuffled", "simclr"]
    rows, intervals, comparisons = [], [], []
    for t, task in enumerate(tasks):
        for m, method in enumerate(names):
            value = 0.8 - 0.1 * m + 0.02 * t
            rows += [
                {
                    "method": method, "regime": "probe", "dataset": task, "metric": "auc",
                    "value": value * (0.8 + 0.2 * fraction) + 0.01 * fold, "n": 40, "n_patients": 20,
                    "fold": fold, "repeat": 0, "seed": 0, "label_fraction": fraction, "shift": "",
                    "reason": "", "config_digest": "c", "wall_seconds": 0.1, "cpu_seconds": 0.1,
                }
                for fraction in (0.1, 1.0)
                for fold in range(3)
            ]  # fmt: skip
            intervals.append(
                {
                    "method": method, "regime": "probe", "dataset": task, "metric": "auc", "value": value,
                    "sd_repeats": 0.01, "interval": [value - 0.05, value + 0.05], "interval_kind": "patient bootstrap",
                    "n": 120, "n_patients": 60,
                }
            )  # fmt: skip
            if m:
                comparisons.append(
                    {
                        **base["comparisons"][0], "method": method, "reference": names[0], "dataset": task,
                        "metric": "auc", "difference": -0.1 * m, "interval": [-0.1 * m - 0.05, -0.1 * m + 0.02],
                        "verdict": "cannot tell",
                    }
                )  # fmt: skip
    return {
        **base,
        "study": {
            **base["study"], "primary_metric": "auc", "reference": names[0], "tasks": tasks, "regimes": ["probe"],
            "seeds": 3, "name": f"{prefix}study",
        },
        "methods": [
            {**base["methods"][0], "method": name, "control_of": names[0] if m == 1 else None}
            for m, name in enumerate(names)
        ],
        "rows": rows,
        "comparisons": comparisons,
        "monitors": [],
        "figures": {"intervals": intervals},
    }  # fmt: skip


def study_map(prefix: str = "") -> dict[str, Any]:
    """Three panels of forty points."""
    n = 40
    return {
        "kind": "pca",
        "colour": f"{prefix}modality",
        "columns": {f"{prefix}modality": ["" if i % 5 == 0 else f"{prefix}{i % 3}" for i in range(n)]},
        "panels": [
            {
                "method": name,
                "points": [[math.cos(i + k), math.sin(i)] for i in range(n)],
                "purity": {f"{prefix}modality": {"k": 10, "value": 0.9, "chance": 0.4, "n": 32}},
            }
            for k, name in enumerate([f"{prefix}metadata", f"{prefix}metadata, shuffled", "simclr"])
        ],
    }

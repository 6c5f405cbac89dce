"""The label-tree study on a mosaic of public images: pretraining at equal budget, several seeds, shuffled-tree control.

    python bench/mosaic_label_tree.py MANIFEST TAXONOMY --out OUT [--seeds 3] [--arms a,b] [section.key=value ...]

Arms: SimCLR, SupCon, label_tree (HWC + 0.5 LAM), and label_tree on a tree whose leaves are shuffled (another draw for
each seed; evaluation is on the true tree). The manifest's own split is used: pretraining and the probe read train,
every choice is made on val, test is read once. A finished run is not trained again, so a killed study goes on.

Leaves OUT/results.json with OUT/report.html, and prints the table of docs/results as Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from kladi import config as settings
from kladi.data.dataset import TRAIN, Dataset
from kladi.data.load import load
from kladi.evaluate import comparisons, statistics
from kladi.evaluate.answers import LOWER_IS_BETTER, Task
from kladi.evaluate.baselines import grey_features
from kladi.evaluate.controls import shuffled_leaves
from kladi.evaluate.embed import embed
from kladi.evaluate.evaluation import random_encoder
from kladi.evaluate.measure import Measured, Method, measure, parts_of
from kladi.evaluate.pretraining import of_run
from kladi.evaluate.readouts.regimes import Part
from kladi.evaluate.record import account, atlas, figures, results
from kladi.evaluate.splits import manifest_splits, scored_classes
from kladi.learn.fit import fit
from kladi.models import backbones, heads
from kladi.report import page

ARMS = {
    "simclr": {"objective.name": "simclr"},
    "supcon": {"objective.name": "supcon"},
    "label_tree": {"objective.name": "label_tree"},
    "shuffled_tree": {"objective.name": "label_tree"},
}
CONTROLS = ("random_encoder", "histogram")
PAIRS = [("label_tree", other) for other in ("simclr", "supcon", "shuffled_tree", *CONTROLS)]
PAIRS += [("shuffled_tree", "supcon")]
SHOWN = (
    ("probe", "balanced_accuracy", "balanced accuracy"),
    ("probe", "hierarchical_f1", "HF1 micro"),
    ("probe", "mistake_severity", "severity"),
    ("prototype", "parent_violation_rate", "parent violations"),
    ("retrieval", "recall_at_5", "R@5"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("taxonomy", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_intermixed_args()
    shared = {"data.taxonomy": str(options.taxonomy), **dict(o.split("=", 1) for o in options.overrides)}
    base = settings.override(settings.Config(), shared)
    dataset, _ = load(options.manifest, base)
    arms = options.arms.split(",")
    for seed in range(options.seeds):
        for arm in arms:
            train(dataset, base, arm, seed, options.out / f"{arm}-{seed}")
    content = evaluate(dataset, base, arms, options.seeds, options.out)
    results.write(content, options.out)
    page.write(options.out)
    print(markdown(content, arms))
    return 0


def train(dataset: Dataset, base: settings.Config, arm: str, seed: int, run: Path) -> None:
    """One run, unless it is finished; a run that was killed goes on."""
    if (run / "model.safetensors").is_file():
        return
    config = settings.override(base, {**ARMS[arm], "train.seed": seed})
    start = time.process_time()
    seen = shuffled(dataset, seed, run) if arm == "shuffled_tree" else dataset
    fit(seen, config, run, resume=(run / "config.toml").is_file())
    print(f"{arm} seed {seed}: {time.process_time() - start:.0f} CPU s", file=sys.stderr, flush=True)


def shuffled(dataset: Dataset, seed: int, run: Path) -> Dataset:
    """The data set with leaves moved to other leaf positions; the loss sees it, the evaluation never does."""
    if dataset.taxonomy is None:
        raise SystemExit("the manifest has no labels")
    used = np.unique(dataset.target[(dataset.target >= 0) & (dataset.split == TRAIN)])
    place, kept = shuffled_leaves(dataset.taxonomy, used, seed)
    run.parent.mkdir(parents=True, exist_ok=True)
    (run.parent / f"{run.name}.shuffle.json").write_text(json.dumps({"seed": seed, "sibling_pairs_kept": kept}))
    target = np.where(dataset.target >= 0, place[np.maximum(dataset.target, 0)], -1)
    return dataclasses.replace(dataset, target=target)


def evaluate(dataset: Dataset, base: settings.Config, arms: list[str], seeds: int, out: Path) -> dict[str, Any]:
    """All arms and seeds under one split, as one results file; a seed is one repeat of the pretraining."""
    if dataset.taxonomy is None:
        raise SystemExit("the manifest has no labels")
    scored = scored_classes(dataset.target, dataset.group, dataset.taxonomy)
    task = Task("label", dataset.taxonomy, scored.target, dataset.group)
    splits = manifest_splits(dataset.row_id, task.target, task.group, dataset.split, seed=0)
    (one,) = parts_of(splits, dataset.row_id)
    parts = tuple(Part(0, seed, one.of) for seed in range(seeds))
    measured, facts, own = [], [], None
    for arm in [*arms, *CONTROLS]:
        for seed in range(seeds if arm in arms else 1):
            method, fact, embedded = representation(arm, seed, dataset, base, out)
            own = embedded if arm == "label_tree" and seed == 0 else own
            measured.append(measure(method, task, (parts[seed],), seed=seed))
            if seed == 0:
                facts.append({**fact, "labels_in_pretraining": None if arm in CONTROLS else labels_read(arm, dataset)})
            print(f"measured {arm} {seed}", file=sys.stderr, flush=True)
    drawn = comparisons.draw(measured, task, parts, draws=base.evaluate.bootstrap, seed=0)
    if own is not None:
        atlas.write(own, dataset, out, seed=0, kind="pca")
    names = [*arms, *CONTROLS]
    rows = [row for m in measured for row in m.rows]
    answers = [a for m in measured for a in m.answers]
    return results.assemble(
        rows,
        study={
            "name": "label tree on the mosaic",
            "command": "python bench/mosaic_label_tree.py MANIFEST TAXONOMY --out OUT " + " ".join(overrides(base)),
            "primary_metric": "balanced_accuracy",
            "reference": "shuffled_tree",
            "margin": comparisons.MARGIN,
            "pretrain": "disjoint",
        },
        provenance=account.provenance(started(), "cpu"),
        data=data_of(dataset, task, measured),
        splits={"digest": splits.digest, "kind": splits.kind, "folds": 1, "repeats": seeds, "group": "patient"},
        methods=facts,
        comparisons=compared(drawn, [p for p in PAIRS if set(p) <= set(names)], task, parts),
        figures={
            "confusion": figures.confusion(answers, task, "label_tree"),
            "severity": figures.severity(answers, task, names),
            "levels": figures.by_depth(rows, "level_accuracy_", figures.REGIME, names),
            "violations": figures.by_depth(rows, "violation_rate_", "prototype", names),
            "curves": list(of_run(out / f"{arms[-1]}-0", dataset).curves) if (out / f"{arms[-1]}-0").is_dir() else [],
        },
    )


def representation(
    arm: str, seed: int, dataset: Dataset, base: settings.Config, out: Path
) -> tuple[Method, dict[str, Any], Any]:
    """Features of one arm and seed, what is known of it, and its embeddings."""
    if arm == "histogram":
        return (
            Method(arm, grey_features(dataset, base.intensity), grey=True, control_of="label_tree"),
            {"method": arm, "control_of": "label_tree"},
            None,
        )
    if arm == "random_encoder":
        module, head, about = random_encoder(base.encoder, base.intensity, seed=seed), None, None
    else:
        run = out / f"{arm}-{seed}"
        module, head, about = backbones.load(run), heads.load(run), of_run(run, dataset)
    embedded = embed(module, dataset, head=head, intensity=base.intensity, device="cpu")
    fact = {
        "method": arm,
        "objective": arm,
        "encoder": base.encoder.name,
        "width": embedded.features.shape[1],
        "parameters": sum(p.numel() for p in module.parameters()),
        "epochs": about.epochs if about else 0,
        "images_seen": about.images_seen if about else 0,
        "control_of": "label_tree" if arm in {"shuffled_tree", *CONTROLS} else None,
    }
    return Method(arm, embedded.features, embedded.z), fact, embedded


def compared(
    drawn: dict[comparisons.Key, comparisons.Drawn], pairs: list[tuple[str, str]], task: Task, parts: tuple[Part, ...]
) -> list[dict[str, Any]]:
    """Differences with intervals by patient. One split, so no test over folds: seeds on it are training noise."""
    found = comparisons.settle(comparisons.compare(drawn, pairs, task, parts))
    for c in found:
        c.update(corrected_t_p=None, holm_p=None, wilcoxon_p=None, least_p=None, rank_biserial=None)
        sign, ends = (-1.0 if c["metric"] in LOWER_IS_BETTER else 1.0), c["interval"]
        c["verdict"] = statistics.verdict(
            sign * c["difference"],
            interval=tuple(sorted(sign * end for end in ends)) if ends else None,
            holm_p=None,
            margin=comparisons.MARGIN,
        )
    return found


def data_of(dataset: Dataset, task: Task, measured: list[Measured]) -> dict[str, Any]:
    nodes, counts = np.unique(dataset.target[dataset.target >= 0], return_counts=True)
    labels = {
        task.taxonomy.names[node]: [int(count), task.patients(np.flatnonzero(dataset.target == node))]
        for node, count in zip(nodes, counts, strict=True)
    }
    return {
        "taxonomy_digest": task.taxonomy.digest,
        "images": len(dataset),
        "patients": len(np.unique(dataset.group)),
        "labels": labels,
        "excluded": {},
        "warnings": sorted({w for m in measured for w in m.warnings}),
    }


def labels_read(arm: str, dataset: Dataset) -> int:
    return 0 if arm == "simclr" else int(((dataset.split == TRAIN) & (dataset.target >= 0)).sum())


def overrides(config: settings.Config) -> list[str]:
    default, now = settings.to_dict(settings.Config()), settings.to_dict(config)
    changed = [(f"{s}.{k}", v) for s, table in now.items() for k, v in table.items() if v != default[s][k]]
    return [f"{key}={json.dumps(value)}" for key, value in changed if not key.startswith("data.")]


def started() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)


def markdown(content: dict[str, Any], arms: list[str]) -> str:
    """The table of arms, then the differences, as docs/results holds them."""
    lines = ["| arm | " + " | ".join(name for _, _, name in SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for arm in [*arms, *CONTROLS]:
        cells = []
        for regime, metric, _ in SHOWN:
            values = [
                r["value"]
                for r in content["rows"]
                if (r["method"], r["regime"], r["metric"]) == (arm, regime, metric) and r["value"] is not None
            ]
            sd = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{sd} ({len(values)})" if values else "undefined")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += ["", "| difference | metric | mean | 95 % by patient | verdict |", "|---|---|---|---|---|"]
    for c in content["comparisons"]:
        name = next((n for r, m, n in SHOWN if (r, m) == (c["regime"], c["metric"])), None)
        if name and c["interval"]:
            low, high = c["interval"]
            lines.append(
                f"| {c['method']} - {c['reference']} | {name} | {c['difference']:+.3f} | [{low:+.3f}, {high:+.3f}] | "
                f"{c['verdict']} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

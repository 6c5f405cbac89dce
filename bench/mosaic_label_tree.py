"""The label-tree study on a mosaic of public images: pretraining at equal budget, several seeds, shuffled-tree control.

    python bench/mosaic_label_tree.py MANIFEST TAXONOMY --out OUT [--seeds 3] [--epochs 20]

Arms: SimCLR, SupCon, label_tree (HWC + 0.5 LAM), and label_tree on a tree whose leaves are shuffled (another draw for each
seed; evaluation is on the true tree). The manifest's own split is used: pretraining and the probe read train, every choice
is made on val, test is read once. A run that is finished is not run again, so the study can be killed at any time.

Prints a Markdown table, and leaves OUT/results.json (all arms and seeds) with OUT/report.html.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np

from kladi import config as settings
from kladi.data.dataset import TRAIN, Dataset
from kladi.data.load import load
from kladi.evaluate.controls import shuffled_leaves
from kladi.learn.fit import fit

ARMS = {
    "simclr": {"objective.name": "simclr"},
    "supcon": {"objective.name": "supcon"},
    "label_tree": {"objective.name": "label_tree"},
    "shuffled_tree": {"objective.name": "label_tree"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("taxonomy", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args()
    shared = {"data.taxonomy": str(options.taxonomy), **dict(o.split("=", 1) for o in options.overrides)}
    base = settings.override(settings.Config(), shared)
    dataset, _ = load(options.manifest, base)
    for seed in range(options.seeds):
        for arm in options.arms.split(","):
            config = settings.override(base, {**ARMS[arm], "train.seed": seed})
            run = options.out / f"{arm}-{seed}"
            if (run / "model.safetensors").is_file():
                continue
            trained_on = shuffled(dataset, seed, run) if arm == "shuffled_tree" else dataset
            start = time.process_time()
            fit(trained_on, config, run, resume=(run / "config.toml").is_file())
            print(f"{arm} seed {seed}: {time.process_time() - start:.0f} CPU s", file=sys.stderr, flush=True)
    return 0


def shuffled(dataset: Dataset, seed: int, run: Path) -> Dataset:
    """The data set with leaves moved to other leaf positions; the loss sees it, the evaluation never does."""
    tree = dataset.taxonomy
    if tree is None:
        raise SystemExit("the manifest has no labels")
    used = np.unique(dataset.target[(dataset.target >= 0) & (dataset.split == TRAIN)])
    place, kept = shuffled_leaves(tree, used, seed)
    run.mkdir(parents=True, exist_ok=True)
    (run.parent / f"{run.name}.shuffle.json").write_text(json.dumps({"seed": seed, "sibling_pairs_kept": kept}))
    target = np.where(dataset.target >= 0, place[np.maximum(dataset.target, 0)], -1)
    return dataclasses.replace(dataset, target=target)


if __name__ == "__main__":
    raise SystemExit(main())

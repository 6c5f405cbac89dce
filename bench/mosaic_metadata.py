"""The metadata study on a mosaic of public images: five initialisations, four tasks, fine-tuned and probed.

    python bench/mosaic_metadata.py MANIFEST TAXONOMY --weights lite0.safetensors --out OUT [--workers 2]

Writes OUT/study.toml and runs `kladi compare` on it: pretraining reads the manifest's training patients, all folds lie
among the others. A study that was killed goes on with the same command. Prints the tables of docs/results as Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kladi.evaluate.record import results
from kladi.report import page
from kladi.study.compare import compare

STUDY = """
name = "metadata on the mosaic"
data = "{manifest}"
taxonomy = "{taxonomy}"
reference = "metadata"
primary = "auc"
regimes = ["probe", "finetune"]
folds = 5
repeats = 3
seeds = 3
controls = ["shuffled_metadata", "shuffled_labels", "histogram", "equal_budget"]

[settings]
data.metadata = ["modality", "anatomy"]
intensity = {{ size = 32, channels = 3, mean = [0.5], std = [0.5] }}
augment = {{ hue = 0.02, saturation = 0.1 }}
encoder.args = {{ channels = [16, 32, 64, 128] }}
train.epochs = 12
train.workers = 0

[finetune]
steps = 100
epochs = 0
scales = [3.0]
looks = 10

[methods.metadata]
objective.name = "metadata"
[methods.simclr]
objective.name = "simclr"
[methods.classes]
objective.name = "cross_entropy"
[methods.imagenet]
objective.name = "none"
encoder = {{ name = "tf_efficientnet_lite0", args = {{}} }}
init.weights = "{weights}"
[methods.scratch]
objective.name = "none"

[tasks]
breast = {{ classes = {{ benign = ["US/breast/neoplasm/benign"], malignant = ["US/breast/neoplasm/malignant"] }} }}
brain = {{ below = "MR/brain/neoplasm" }}
skin = {{ below = "XC/skin/neoplasm" }}
chest = {{ below = "DX/chest" }}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("taxonomy", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    paths = {name: str(getattr(options, name).absolute()) for name in ("manifest", "taxonomy", "weights")}
    study = options.out / "study.toml"
    study.write_text(STUDY.format(**paths), encoding="utf-8")
    compare(study, options.out, workers=options.workers, say=lambda text: print(text, file=sys.stderr, flush=True))
    page.write(options.out)
    print(markdown(results.read(options.out)))
    return 0


def markdown(content: Mapping[str, Any]) -> str:
    """A table a regime (methods down, tasks across), then the differences to the reference."""
    study, lines = content["study"], []
    found = {
        (i["method"], i["dataset"], i["regime"]): i
        for i in content["figures"]["intervals"]
        if i["metric"] == study["primary_metric"]
    }
    for regime in study["regimes"]:
        lines += [f"### {regime}", "", "| method | " + " | ".join(study["tasks"]) + " |"]
        lines.append("|---" * (len(study["tasks"]) + 1) + "|")
        for method in content["methods"]:
            cells = []
            for task in study["tasks"]:
                i = found.get((method["method"], task, regime))
                sd = f" ± {i['sd_repeats']:.3f}" if i and i["sd_repeats"] is not None else ""
                cells.append(f"{i['value']:.3f}{sd}" if i and i["value"] is not None else "")
            if any(cells):
                lines.append(f"| {method['method']} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "| against the reference | task, regime | difference | 95 % by patient | p after Holm | verdict |",
        "|---" * 6 + "|",
    ]
    for c in content["comparisons"]:
        if c["metric"] == study["primary_metric"] and c["reference"] == study["reference"] and c["interval"]:
            low, high = c["interval"]
            p = "" if c["holm_p"] is None else f"{c['holm_p']:.3f}"
            lines.append(
                f"| {c['method']} | {c['dataset']}, {c['regime']} | {c['difference']:+.3f} | "
                f"[{low:+.3f}, {high:+.3f}] | {p} | {c['verdict']} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

"""A study of docs/results on a mosaic of public images: `studies/NAME.toml` filled in, run, and printed as Markdown.

    python bench/mosaic.py STUDY MANIFEST TAXONOMY --out OUT [--weights lite0.safetensors] [--workers 2]

STUDY is one of bench/studies; the weights are for those that say WEIGHTS, `--objective` for those that say OBJECTIVE.
Writes OUT/study.toml and runs `kladi compare` on it: pretraining reads the manifest's training patients, all folds lie
among the others. A study that was killed goes on with the same command. A study with a line `# HELD a b` pretrains on
no image of the sources a and b: OUT/manifest.csv calls them test. One that says CELLS reads what bench/cells.py makes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

import cells
from kladi.evaluate.record import results
from kladi.report import page
from kladi.report.wording import p_value
from kladi.study.compare import compare

STUDIES = Path(__file__).parent / "studies"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=sorted(path.stem for path in STUDIES.glob("*.toml")))
    parser.add_argument("manifest", type=Path)
    parser.add_argument("taxonomy", type=Path)
    parser.add_argument("--weights", type=Path, default=Path())
    parser.add_argument("--objective", default="simclr")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--reference", default="", help="compare with this method, not with the study's own")
    parser.add_argument("--metrics", default="", help="further ones to print, with commas; the primary one is always")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    text = (STUDIES / f"{options.study}.toml").read_text(encoding="utf-8")
    held = re.search(r"^# HELD (.+)$", text, re.MULTILINE)
    if held:
        options.manifest = held_out(options.manifest, held[1].split(), options.out)
    if "CELLS" in text:
        text = text.replace("CELLS", str(cells.write(options.manifest, options.out / "cells").absolute().parent))
    text = text.replace("OBJECTIVE", options.objective)
    for name in ("manifest", "taxonomy", "weights"):
        text = text.replace(f'"{name.upper()}"', f'"{getattr(options, name).absolute()}"')
    if options.reference:
        text = re.sub(r'^reference = ".*"$', f'reference = "{options.reference}"', text, flags=re.MULTILINE)
    study = options.out / "study.toml"
    study.write_text(text, encoding="utf-8")
    compare(study, options.out, workers=options.workers, say=lambda text: print(text, file=sys.stderr, flush=True))
    page.write(options.out)
    content = results.read(options.out)
    for metric in dict.fromkeys([content["study"]["primary_metric"], *filter(None, options.metrics.split(","))]):
        print(f"## {metric}\n\n{tables(content, metric)}\n{differences(content, metric)}\n")
    return 0


def held_out(manifest: Path, sources: list[str], out: Path) -> Path:
    """The manifest with some sources in no pretraining."""
    table = pl.read_csv(manifest, infer_schema_length=0)
    split = pl.when(pl.col("source").is_in(sources)).then(pl.lit("test")).otherwise(pl.col("split"))
    path = pl.concat_str(pl.lit(f"{manifest.absolute().parent}/"), pl.col("path"))
    table.with_columns(path=path, split=split).write_csv(out / "manifest.csv")
    return out / "manifest.csv"


def tables(content: Mapping[str, Any], metric: str) -> str:
    """A table a regime that has the metric: methods down, tasks across, mean and spread over repeats."""
    study, lines = content["study"], []
    found = {
        (i["method"], i["dataset"], i["regime"]): i for i in content["figures"]["intervals"] if i["metric"] == metric
    }
    for regime in (r for r in study["regimes"] if any(key[2] == r for key in found)):
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
    return "\n".join(lines)


def differences(content: Mapping[str, Any], metric: str) -> str:
    """Every method against the reference."""
    study = content["study"]
    lines = [
        "| against the reference | task, regime | difference | 95 % by patient | p after Holm | verdict |",
        "|---" * 6 + "|",
    ]
    for c in content["comparisons"]:
        if c["metric"] == metric and c["reference"] == study["reference"] and c["interval"]:
            low, high = c["interval"]
            lines.append(
                f"| {c['method']} | {c['dataset']}, {c['regime']} | {c['difference']:+.3f} | "
                f"[{low:+.3f}, {high:+.3f}] | {p_value(c['holm_p'])} | {c['verdict']} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

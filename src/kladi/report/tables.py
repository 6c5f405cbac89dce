"""Results -> what the tables of the page say. Plain rows of text; a number never without its n and spread."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from kladi.report.figures import ALARM_RANK, ALARM_STD
from kladi.report.wording import LOWER_IS_BETTER, count, number, p_value, signed, thousands, unit, words

Results = Mapping[str, Any]

METRIC_ORDER = (
    "balanced_accuracy",
    "accuracy",
    "macro_f1",
    "auc",
    "hierarchical_f1",
    "hierarchical_f1_macro",
    "tree_accuracy",
    "mistake_severity",
    "hierarchical_distance_at_1",
    "least_cost_distance",
    "parent_violation_rate",
)
REGIMES = {
    "head": "The classifier trained with the encoder",
    "probe": "Linear probe on frozen features",
    "knn": "Nearest neighbours (cosine)",
    "retrieval": "Retrieval",
    "prototype": "Nearest prototype",
    "finetune": "Fine-tuning",
    "representation": "The representation itself",
}


def summary(results: Results) -> list[str]:
    """What was done, in sentences."""
    study, data = results.get("study", {}), results.get("data", {})
    methods = results.get("methods", [])
    lines = []
    if study.get("tasks"):
        controls = sum(bool(m.get("control_of")) for m in methods)
        lines.append(
            f"{count(len(methods) - controls, 'method')} and {count(controls, 'control')} on "
            f"{count(len(study['tasks']), 'task')} ({', '.join(study['tasks'])}); "
            f"{count(study.get('seeds'), 'pretraining seed')}."
        )
    elif methods:
        main = methods[0]
        objective = main.get("objective") or "no objective"
        lines.append(
            f"Encoder: {main.get('encoder', '')}; pretrained with {objective}, {count(main.get('epochs'), 'epoch')}"
            f"{_before(main)}."
        )
    patients = data.get("patients")
    by = f" of {count(patients, 'patient')}" if patients else ", no patient ids"
    lines.append(f"{count(data.get('images'), 'image')}{by}; {_scored(results)}.")
    splits = results.get("splits", {})
    if splits:
        lines.append(f"Split: {splits.get('kind', 'unknown')}, by {splits.get('group') or 'image (no patient ids)'}.")
        for task, shift in (splits.get("shift") or {}).items():
            places = shift["places"]
            lines.append(
                f"Task {task} is under a shift of {shift['column']}: each of {len(places)} places "
                f"({', '.join(map(str, places))}) is tested by what was trained on the others. So few places are no "
                f"sample: intervals are of {unit(results)}s, and there is no test."
            )
    if study.get("pretrain"):
        lines.append(f"{unit(results).title()}s of the evaluation, seen from pretraining: {study['pretrain']}.")
    return lines + _collapse(results) + _verdict(results)


def _collapse(results: Results) -> list[str]:
    """Whether the last look of training found the embedding in one place."""
    last = {str(entry["metric"]): entry.get("value") for entry in results.get("monitors", [])}
    std, rank = last.get("std"), last.get("rank")
    if std is None or rank is None or (std >= ALARM_STD and rank >= ALARM_RANK):
        return []
    return [f"At the end of training the embedding had collapsed: std {std:.2f}, effective rank {rank:.1f}."]


def _before(method: Mapping[str, Any]) -> str:
    """What its weights had seen before its own training, in words; "" where they were random."""
    epochs = method.get("epochs_before", 0)
    return f", after {count(epochs, 'epoch')} of what it began with" if epochs != 0 else ""


def _scored(results: Results) -> str:
    """How many images a probe was scored on: the sum over the folds of a repeat, since each image is tested once."""
    rows = [r for r in results.get("rows", []) if r["regime"] == "probe" and r.get("n") and r.get("value") is not None]
    tested: dict[tuple[Any, ...], int] = {}
    for row in rows:
        key = (row["method"], row.get("repeat"), row.get("dataset"), row.get("fold"))
        tested[key] = max(tested.get(key, 0), row["n"])
    first = next(iter(tested), None)
    if first is None:
        return "none scored by a probe"
    return f"{sum(n for key, n in tested.items() if key[:2] == first[:2]):,} scored as test images"


def _decides(comparison: Mapping[str, Any], results: Results) -> bool:
    """Whether it is the primary metric of the probe; everything else explores."""
    primary = results.get("study", {}).get("primary_metric") or "balanced_accuracy"
    return comparison.get("metric") == primary and comparison.get("regime") in {"head", "probe", "finetune"}


def _verdict(results: Results) -> list[str]:
    """Whether pretraining beat its controls, in the words of the statistics."""
    decisive = [c for c in results.get("comparisons", []) if _decides(c, results)]
    if not decisive:
        return []
    if results.get("study", {}).get("tasks"):
        return [_verdicts(decisive, str(results["study"].get("reference")))]
    said = []
    several = len({c.get("method") for c in decisive}) > 1
    for c in decisive:
        interval = c.get("interval")
        between = f" [{signed(interval[0])}, {signed(interval[1])}]" if interval else ""
        who = f"{c.get('method')} - " if several else ""
        said.append(f"{who}{c.get('reference')} {signed(c.get('difference'))}{between}, {c.get('verdict')}")
    better = all(str(c.get("verdict")) in {"better", "leans better"} for c in decisive)
    lead = "Against its controls" if better else "Not shown to beat every control, so it has bought nothing yet"
    return [f"{lead} ({words(str(decisive[0].get('metric')))}, {decisive[0].get('regime')}): {'; '.join(said)}."]


def _verdicts(decisive: list[Mapping[str, Any]], reference: str) -> str:
    """`Beside topology, in balanced accuracy, of 7 comparisons: cannot tell 4, leans better 3.`"""
    counts = Counter(str(c.get("verdict")) for c in decisive)
    said = ", ".join(f"{verdict} {n}" for verdict, n in counts.most_common())
    what = words(str(decisive[0].get("metric")))
    return f"Beside {reference}, in {what}, of {count(len(decisive), 'comparison')}: {said}."


def headline(results: Results) -> list[dict[str, str]]:
    """The primary metric of each method, as large for one that lost as for one that won; a study has its table."""
    if results.get("study", {}).get("tasks"):
        return []
    primary = results.get("study", {}).get("primary_metric") or "balanced_accuracy"
    cells = _cells(results)
    regimes_there = list(dict.fromkeys(key[1] for key in cells if key[2] == primary))
    if not regimes_there:
        return []
    regime = "probe" if "probe" in regimes_there else regimes_there[0]
    found = [
        (method, cells[method, regime, primary]) for method in _methods(results) if (method, regime, primary) in cells
    ]
    return [
        {
            "method": method,
            "value": number(mean(rows)),
            "note": _spread_note(rows),
            "metric": f"{words(primary)}, {regime}",
        }
        for method, rows in found
    ]


def regimes(results: Results) -> list[dict[str, Any]]:
    """One table a task and regime: a row a method, a column a metric."""
    every = list(dict.fromkeys(str(row.get("dataset") or "") for row in results.get("rows", [])))
    return [one for task in every for one in _regimes_of(task, results, named=len(every) > 1)]


def _regimes_of(task: str, results: Results, *, named: bool) -> list[dict[str, Any]]:
    cells = _cells(results, task)
    names = list(dict.fromkeys(key[1] for key in cells))
    out = []
    for regime in sorted(names, key=lambda r: list(REGIMES).index(r) if r in REGIMES else 99):
        drawn = (
            "level_accuracy_",
            "violation_rate_",
            "calibration_error_",  # figures of their own show these, depth by depth
            "learning_rate_scale",  # that of answers.SCALE: how it was trained, not how well it answers
        )
        metrics = _ordered({key[2] for key in cells if key[1] == regime and not key[2].startswith(drawn)})
        rows = []
        for method in _methods(results):
            row = [_cell(cells.get((method, regime, metric), [])) for metric in metrics]
            if any(cell["value"] != "" for cell in row):
                rows.append({"method": method, "control_of": _control_of(results, method), "cells": row})
        if regime != "representation":  # there more is not better
            _mark_best(rows, metrics)
        title, basis = REGIMES.get(regime, regime), _said_once(rows)
        title = f"{task}: {title[0].lower()}{title[1:]}" if named else title
        out.append({"name": title, "basis": basis, "metrics": [words(m) for m in metrics], "rows": rows})
    return out


def _said_once(rows: list[dict[str, Any]]) -> str:
    """What most values of a table rest on, said once below it; what rests on something else says so itself."""
    cells = [cell for row in rows for cell in row["cells"] if cell["raw"] is not None]
    if not cells:
        return ""
    most = Counter(cell["basis"] for cell in cells).most_common(1)[0][0]
    for cell in cells:
        if cell["basis"] != most:
            cell["note"] = ", ".join(part for part in (cell["note"], cell["basis"]) if part)
    return most


def comparisons(results: Results) -> list[dict[str, Any]]:
    """Difference to the reference, interval, p values and the verdict word; those in a Holm family decide."""
    out = []
    for c in results.get("comparisons", []):
        interval = c.get("interval")
        tasks = [str(c.get("dataset"))] if results.get("study", {}).get("tasks") else []
        out.append(
            {
                "method": str(c.get("method")),
                "reference": str(c.get("reference")),
                "what": ", ".join([*tasks[:1], words(str(c.get("metric"))), str(c.get("regime"))]),
                "difference": signed(c.get("difference")),
                "interval": f"[{signed(interval[0])}, {signed(interval[1])}]" if interval else "none",
                "kind": str(c.get("interval_kind") or "").replace("patient", unit(results)),
                "corrected": p_value(c.get("corrected_t_p")),
                "holm": p_value(c.get("holm_p")),
                "wilcoxon": p_value(c.get("wilcoxon_p"))
                + (f" (least {p_value(c['least_p'])})" if c.get("least_p") else ""),
                "verdict": str(c.get("verdict") or ""),
                "decides": _decides(c, results),
            }
        )
    return out


def parents(results: Results) -> list[dict[str, Any]]:
    """For each node with a choice below it how often each method goes down the right child."""
    found = (results.get("figures") or {}).get("parents") or []
    return [
        {
            "node": str(one["node"]),
            "images": thousands(one["images"]),
            "children": thousands(one["children"]),
            "methods": list(one["accuracy"]),
            "accuracy": [number(value) for value in one["accuracy"].values()],
        }
        for one in found
    ]


def mean(rows: Iterable[Mapping[str, Any]]) -> float | None:
    values = [row["value"] for row in rows if row.get("value") is not None]
    return sum(values) / len(values) if values else None


def spread(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Standard deviation over folds, repeats and seeds; None where there is one value."""
    values = [row["value"] for row in rows if row.get("value") is not None]
    if len(values) < 2:
        return None
    centre = sum(values) / len(values)
    return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1))


def _cells(results: Results, task: str | None = None) -> dict[tuple[str, str, str], list[Mapping[str, Any]]]:
    cells: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    unknown: dict[str, None] = {"n_patients": None} if unit(results) == "image" else {}
    for row in results.get("rows", []):
        if row.get("label_fraction", 1.0) == 1.0 and task in {None, str(row.get("dataset") or "")}:
            cells[row["method"], row["regime"], row["metric"]].append({**row, **unknown})
    return cells


def _methods(results: Results) -> list[str]:
    listed = [m["method"] for m in results.get("methods", [])]
    return list(dict.fromkeys([*listed, *(row["method"] for row in results.get("rows", []))]))


def _control_of(results: Results, method: str) -> str:
    return next((m.get("control_of") or "" for m in results.get("methods", []) if m["method"] == method), "")


def _ordered(metrics: set[str]) -> list[str]:
    """Known ones first; the rest by name, numbers in it by size: recall at 1, 5, 10."""

    def key(metric: str) -> tuple[int, list[tuple[int, str]]]:
        parts = [(int(part), "") if part.isdigit() else (0, part) for part in metric.split("_")]
        return METRIC_ORDER.index(metric) if metric in METRIC_ORDER else 99, parts

    return sorted(metrics, key=key)


def _cell(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    value = mean(rows)
    if not rows:
        return {"value": "", "note": "", "basis": "", "raw": None, "best": False}
    if value is None:
        reason = str(rows[0].get("reason") or "")
        return {"value": "undefined", "note": reason, "basis": "", "raw": None, "best": False}
    sd = spread(rows)
    note = "" if sd is None else f"sd {sd:.3f}"
    return {"value": number(value), "note": note, "basis": _basis(rows), "raw": value, "best": False}


def _mark_best(rows: list[dict[str, Any]], metrics: list[str]) -> None:
    for column, metric in enumerate(metrics):
        values = [row["cells"][column]["raw"] for row in rows]
        known = [v for v in values if v is not None]
        if len(known) < 2:
            continue
        best = min(known) if metric in LOWER_IS_BETTER else max(known)
        for row, value in zip(rows, values, strict=True):
            row["cells"][column]["best"] = value == best


def _spread_note(rows: list[Mapping[str, Any]]) -> str:
    sd = spread(rows)
    return ", ".join([*([] if sd is None else [f"sd {sd:.3f}"]), _basis(rows)])


def _basis(rows: list[Mapping[str, Any]]) -> str:
    """`10 values, n 228 to 231, 190 to 204 patients`: what a mean rests on."""
    known = [row for row in rows if row.get("value") is not None]
    items = sorted({row["n"] for row in known if row.get("n") is not None})
    patients = sorted({row["n_patients"] for row in known if row.get("n_patients") is not None})
    parts = [f"{len(known)} values" if len(known) > 1 else "one value"]
    if items:
        parts.append(f"n {_range(items)}")
    if patients:
        parts.append(f"{_range(patients)} patients")
    return ", ".join(parts)


def _range(values: list[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"

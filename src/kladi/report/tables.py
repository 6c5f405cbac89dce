"""Results -> what the tables of the page say. Plain rows of text; a number never without its n and spread."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

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
LOWER_IS_BETTER = {
    "calibration_error",
    "hierarchical_distance_at_1",
    "hierarchical_distance_at_5",
    "least_cost_distance",
    "mistake_severity",
    "parent_violation_rate",
    "tree_distance_at_1",
    "tree_distance_at_5",
    "tree_distance_at_10",
}
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
            f"{_count(len(methods) - controls, 'method')} and {_count(controls, 'control')} on "
            f"{_count(len(study['tasks']), 'task')} ({', '.join(study['tasks'])}); "
            f"{_count(study.get('seeds'), 'pretraining seed')}."
        )
    elif methods:
        main = methods[0]
        objective = main.get("objective") or "no objective"
        lines.append(
            f"An encoder {main.get('encoder', '')} pretrained with {objective}, {_count(main.get('epochs'), 'epoch')}."
        )
    patients = data.get("patients")
    by = f" of {_count(patients, 'patient')}" if patients else ", no patient ids"
    lines.append(f"{_count(data.get('images'), 'image')}{by}; {_scored(results)}.")
    splits = results.get("splits", {})
    if splits:
        lines.append(f"Split: {splits.get('kind', 'unknown')}, by {splits.get('group') or 'image (no patient ids)'}.")
        for task, shift in (splits.get("shift") or {}).items():
            places = shift["places"]
            lines.append(
                f"Task {task} is under a shift of {shift['column']}: each of {len(places)} places "
                f"({', '.join(map(str, places))}) is tested by what was trained on the others. So few places are no "
                "sample: intervals are of patients, and there is no test."
            )
    if study.get("pretrain"):
        lines.append(f"Patients of the evaluation, seen from pretraining: {study['pretrain']}.")
    return lines + _verdict(results)


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
    if not decisive or results.get("study", {}).get("tasks"):  # a study says it in its table
        return []
    said = []
    several = len({c.get("method") for c in decisive}) > 1
    for c in decisive:
        interval = c.get("interval")
        between = f" [{_signed(interval[0])}, {_signed(interval[1])}]" if interval else ""
        who = f"{c.get('method')} - " if several else ""
        said.append(f"{who}{c.get('reference')} {_signed(c.get('difference'))}{between}, {c.get('verdict')}")
    better = all(str(c.get("verdict")) in {"better", "leans better"} for c in decisive)
    lead = "Against its controls" if better else "Not shown to beat every control, so it has bought nothing yet"
    return [f"{lead} ({words(str(decisive[0].get('metric')))}, {decisive[0].get('regime')}): {'; '.join(said)}."]


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
            "value": _number(mean(rows)),
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
                "difference": _signed(c.get("difference")),
                "interval": f"[{_signed(interval[0])}, {_signed(interval[1])}]" if interval else "none",
                "kind": str(c.get("interval_kind") or ""),
                "corrected": _p(c.get("corrected_t_p")),
                "holm": _p(c.get("holm_p")),
                "wilcoxon": _p(c.get("wilcoxon_p")) + (f" (least {_p(c['least_p'])})" if c.get("least_p") else ""),
                "verdict": str(c.get("verdict") or ""),
                "decides": _decides(c, results),
            }
        )
    return out


def data_facts(results: Results) -> list[tuple[str, str]]:
    """The data in one line a fact."""
    data = results.get("data", {})
    facts = [("images", _thousands(data.get("images"))), ("patients", _thousands(data.get("patients")))]
    if data.get("sites"):
        facts.append(("sites", _thousands(data["sites"])))
    facts += [
        (
            ", ".join(str(part[key]) for key in ("task", "part") if key in part),
            f"{_thousands(part['images'])} images of {_thousands(part['patients'])} patients",
        )
        for part in _parts(results)
    ]
    return [(name, value) for name, value in facts if value]


def labels(results: Results) -> list[tuple[str, str, str]]:
    """Each label with its images and patients, in the order of the file."""
    counts = results.get("data", {}).get("labels", {})
    return [(name, _thousands(images), _thousands(patients)) for name, (images, patients) in counts.items()]


def parents(results: Results) -> list[dict[str, Any]]:
    """For each node with a choice below it how often each method goes down the right child."""
    found = (results.get("figures") or {}).get("parents") or []
    return [
        {
            "node": str(one["node"]),
            "images": _thousands(one["images"]),
            "children": _thousands(one["children"]),
            "methods": list(one["accuracy"]),
            "accuracy": [_number(value) for value in one["accuracy"].values()],
        }
        for one in found
    ]


def purity(atlas: Mapping[str, Any] | None) -> list[tuple[str, str, str, str]]:
    """What the eye guesses from the map, as numbers: column, share, share by chance, images."""
    if not atlas:
        return []
    return [
        (name, f"{entry['value']:.2f}", f"{entry['chance']:.2f}", _thousands(entry["n"]))
        for name, entry in sorted(atlas.get("purity", {}).items())
        if entry.get("value") is not None
    ]


def diagnostics(results: Results) -> list[dict[str, str]]:
    """Whether the structure is in the images at all, a line a question."""
    return [
        {
            "name": str(d.get("name")),
            "verdict": str(d.get("verdict")),
            "statistic": str(d.get("statistic")),
            "value": "" if d.get("value") is None else f"{d['value']:.2f}",
            "p": _p(d.get("p")),
            "beside": ", ".join(text for text in (str(d.get("null") or ""), str(d.get("note") or "")) if text),
        }
        for d in results.get("diagnostics", [])
    ]


def neighbours(atlas: Mapping[str, Any] | None) -> int | None:
    """How many neighbours the purity looks at."""
    found = [atlas or {}, *(atlas or {}).get("panels", [])]
    return next((entry["k"] for one in found for entry in one.get("purity", {}).values()), None)


def provenance(results: Results) -> list[tuple[str, str]]:
    """How to get here again."""
    facts = [("command", str(results.get("study", {}).get("command") or ""))]
    for key, value in sorted(results.get("provenance", {}).items()):
        text = ", ".join(f"{k} {v}" for k, v in sorted(value.items())) if isinstance(value, dict) else str(value)
        facts.append((key, text))
    facts += [
        ("results digest", str(results.get("digest", ""))),
        ("data digest", str(results.get("data", {}).get("digest", ""))),
        ("taxonomy digest", str(results.get("data", {}).get("taxonomy_digest") or "none")),
        ("split digest", str(results.get("splits", {}).get("digest", ""))),
    ]
    return [(name, value) for name, value in facts if value]


def not_run(results: Results) -> list[str]:
    """Values that could not be computed, with the reason; each reason once, with its count."""
    reasons: dict[str, int] = defaultdict(int)
    for row in results.get("rows", []):
        if row.get("value") is None:
            reasons[
                f"{row['method']}, {row['regime']}, {words(row['metric'])}: {row.get('reason') or 'no reason given'}"
            ] += 1
    return [text + (f" ({count} times)" if count > 1 else "") for text, count in sorted(reasons.items())]


def words(metric: str) -> str:
    """`balanced_accuracy` -> `balanced accuracy`; the arrow says which way is better where lower is."""
    text = metric.replace("_", " ").replace("hierarchical f1", "hierarchical F1")
    text = "AUC" if text == "auc" else text
    return text + (" (lower is better)" if metric in LOWER_IS_BETTER else "")


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
    for row in results.get("rows", []):
        if row.get("label_fraction", 1.0) == 1.0 and task in {None, str(row.get("dataset") or "")}:
            cells[row["method"], row["regime"], row["metric"]].append(row)
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
    return {"value": _number(value), "note": note, "basis": _basis(rows), "raw": value, "best": False}


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


def _parts(results: Results) -> list[Mapping[str, Any]]:
    parts = results.get("splits", {}).get("parts", [])
    return [p for p in parts if p.get("fold") == 0 and p.get("repeat") == 0]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def _p(value: float | None) -> str:
    return "" if value is None else (f"{value:.3f}" if value >= 0.001 else "< .001")


def _thousands(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _count(value: Any, word: str) -> str:
    if not isinstance(value, int):
        return f"an unknown number of {word}s"
    return f"{value:,} {word}{'' if value == 1 else 's'}"

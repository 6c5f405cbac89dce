"""The table and figures of a study: methods down, tasks and regimes across, each difference with its verdict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from kladi.report import tables
from kladi.report.figures import COLOURS, Figure, colour_of, figure_of, plain
from kladi.report.wording import unit, words

Results = Mapping[str, Any]
DASHES = ("solid", "dash", "dot", "dashdot")
"""Of the tasks, where the colour is the method's."""


def tasks(results: Results) -> list[str]:
    """What was asked, in the order of the study."""
    there = list(dict.fromkeys(row["dataset"] for row in results.get("rows", []) if row.get("dataset")))
    return [t for t in results.get("study", {}).get("tasks", []) if t in there] or there


def is_study(results: Results) -> bool:
    """Whether methods are compared on tasks, and not one encoder with its controls."""
    return bool(results.get("study", {}).get("tasks"))


def table(results: Results) -> dict[str, Any] | None:
    """The comparison: a row a method, controls under their method; a column a task and regime, primary metric only."""
    if not is_study(results):
        return None
    primary, reference = _primary(results), results["study"].get("reference")
    found = {
        (i["method"], i["dataset"], i["regime"]): i
        for i in results.get("figures", {}).get("intervals", [])
        if i["metric"] == primary
    }
    against = {
        (c["method"], c["dataset"], c["regime"]): c
        for c in results.get("comparisons", [])
        if c["metric"] == primary and c["reference"] == reference
    }
    columns = [(t, r) for t in tasks(results) for r in _regimes(results) if any(k[1:] == (t, r) for k in found)]
    rows: list[dict[str, Any]] = []
    for method in results.get("methods", []):
        name = method["method"]
        cells = [_cell(found.get((name, *column)), against.get((name, *column)), unit(results)) for column in columns]
        rows.append({"method": name, "control_of": method.get("control_of") or "", "cells": cells})
    for place in range(len(columns)):
        known = [row["cells"][place] for row in rows if row["cells"][place]["raw"] is not None]
        for cell in known:
            cell["best"] = cell["raw"] == max(other["raw"] for other in known)
    return {
        "metric": words(primary),
        "reference": reference,
        "columns": [f"{task}, {regime}" for task, regime in columns],
        "rows": rows,
    }


def figures(results: Results) -> dict[str, Figure]:
    """Differences with their intervals, and few-label curves, by the id of their place on the page."""
    if not is_study(results):
        return {}
    drawn = {"differences": _differences(results), "few_labels": _few_labels(results)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def panels(atlas: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """One map a method, of the same images in the same colours: name, figure and purity."""
    if not atlas or not atlas.get("panels"):
        return []
    values = atlas["columns"].get(atlas.get("colour", ""), [])
    names = sorted(set(values))
    return [
        {
            "method": panel["method"],
            "purity": ", ".join(
                f"{name} {entry['value']:.2f} (chance {entry['chance']:.2f})"
                for name, entry in sorted(panel.get("purity", {}).items())
                if entry.get("value") is not None
            ),
            "figure": _panel(panel["points"], values, names),
        }
        for panel in atlas["panels"]
    ]


def key(atlas: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(name, colour) of the values that all panels are coloured by; none where colours repeat with other symbols."""
    if not atlas or not atlas.get("panels"):
        return []
    names = sorted(set(atlas["columns"].get(atlas.get("colour", ""), [])))
    return [(name or "unknown", _colour(k, name)) for k, name in enumerate(names)] if len(names) <= len(COLOURS) else []


def _colour(k: int, name: str) -> str:
    return COLOURS[k % len(COLOURS)] if name else "#b8c0c8"


def _cell(interval: Mapping[str, Any] | None, difference: Mapping[str, Any] | None, one: str) -> dict[str, Any]:
    if interval is None or interval.get("value") is None:
        return {"value": "", "note": "", "difference": "", "verdict": "", "raw": None, "best": False}
    sd = f"sd {interval['sd_repeats']:.3f}, " if interval.get("sd_repeats") is not None else ""
    note = f"{sd}{interval['n_patients']:,} {one}s"
    said = verdict = ""
    if difference is not None and difference.get("difference") is not None:
        ends = difference.get("interval")
        between = f" [{ends[0]:+.3f}, {ends[1]:+.3f}]" if ends else ""
        p = difference.get("holm_p")
        said = f"{difference['difference']:+.3f}{between}" + (f", p {_p(p)}" if p is not None else "")
        verdict = str(difference.get("verdict") or "")
    return {
        "value": f"{interval['value']:.3f}",
        "note": note,
        "difference": said,
        "verdict": verdict,
        "raw": interval["value"],
        "best": False,
    }


def _differences(results: Results) -> Figure | None:
    """A point and its interval a method, named beside it, under each task and regime; zero is the reference."""
    primary, reference = _primary(results), results["study"].get("reference")
    found = [
        c
        for c in results.get("comparisons", [])
        if c["metric"] == primary and c["reference"] == reference and c.get("interval") and c["difference"] is not None
    ]
    groups = list(dict.fromkeys(f"{c['dataset']}, {c['regime']}" for c in found))
    traces = []
    for i, group in enumerate(groups):
        own = [c for c in found if f"{c['dataset']}, {c['regime']}" == group]
        trace = {
            "type": "scatter",
            "mode": "markers",
            "name": plain(group),
            "x": [c["difference"] for c in own],
            "y": [[plain(group)] * len(own), [plain(c["method"]) for c in own]],
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [c["interval"][1] - c["difference"] for c in own],
                "arrayminus": [c["difference"] - c["interval"][0] for c in own],
                "thickness": 1.2,
            },
            "marker": {"color": COLOURS[i % len(COLOURS)], "size": 8},
        }
        traces.append(trace)
    what = f"difference to {plain(str(reference))}, {words(primary)}"
    figure = figure_of(traces, what, "", height=max(320, 20 * len(found) + 160))
    if figure is not None:
        figure["layout"]["showlegend"] = False
        figure["layout"]["xaxis"] |= {"rangemode": "normal", "zeroline": True, "zerolinecolor": "#1f2933"}
        figure["layout"]["yaxis"] |= {"automargin": True, "type": "multicategory", "range": [len(found) - 0.5, -0.5]}
    return figure


def _few_labels(results: Results) -> Figure | None:
    """Mean over folds and repeats of the probe against the share of labelled training patients; bands are one sd."""
    primary = _primary(results)
    series: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in results.get("rows", []):
        if row["metric"] == primary and row["regime"] == "probe" and row.get("value") is not None:
            series[row["method"], row["dataset"]][row["label_fraction"]].append(row["value"])
    curves = {name: points for name, points in series.items() if len(points) > 1}
    traces = []
    order, asked = [str(m["method"]) for m in results.get("methods", [])], tasks(results)
    for (method, task), points in curves.items():
        shares = sorted(points)
        means = [sum(points[s]) / len(points[s]) for s in shares]
        spread = [tables.spread([{"value": v} for v in points[s]]) or 0.0 for s in shares]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain(f"{method}, {task}"),
                "x": [100 * s for s in shares],
                "y": means,
                "error_y": {"type": "data", "array": spread, "thickness": 0.8},
                "line": {
                    "color": colour_of(method, order),
                    "width": 1.8,
                    "dash": DASHES[asked.index(task) % len(DASHES)] if task in asked else "solid",
                },
            }
        )
    figure = figure_of(traces, f"labelled training {unit(results)}s, %", words(primary), height=420)
    if figure is not None:
        figure["layout"]["xaxis"] |= {"type": "log", "rangemode": "normal"}
        figure["layout"]["yaxis"] |= {"rangemode": "normal"}
    return figure


def _panel(points: list[list[float]], values: list[str], names: list[str]) -> Figure | None:
    """A small map; unknown is grey, and a value has one colour in all panels."""
    traces = []
    for k, name in enumerate(names):
        rows = [i for i, value in enumerate(values) if value == name]
        marker = {
            "size": 4,
            "opacity": 0.8,
            "color": _colour(k, name),
            "symbol": (k // len(COLOURS)) % 8,
        }
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plain(name or "unknown"),
                "x": [points[i][0] for i in rows],
                "y": [points[i][1] for i in rows],
                "hoverinfo": "name",
                "marker": marker,
            }
        )
    figure = figure_of(traces, "", "", height=330, showlegend=False)
    if figure is not None:
        figure["layout"]["margin"] = {"l": 8, "r": 8, "t": 8, "b": 8}
        for axis in ("xaxis", "yaxis"):
            figure["layout"][axis] = {"showticklabels": False, "showgrid": False, "zeroline": False}
    return figure


def _primary(results: Results) -> str:
    return str(results.get("study", {}).get("primary_metric") or "balanced_accuracy")


def _regimes(results: Results) -> list[str]:
    return list(results.get("study", {}).get("regimes", []))


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< .001"

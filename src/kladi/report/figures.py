"""Results -> plotly figures as plain dictionaries. Colours are safe for colour-blind readers (Okabe and Ito)."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
Figure = dict[str, Any]
Points = tuple[list[Any], list[Any]]
"""x and y of a line, as JSON numbers."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#444444", "#F0E442", "#7F3C8D")
GREYS = [[0, "#f7f9fb"], [0.5, "#7fa9d0"], [1, "#0b3c68"]]
ALARM_STD, ALARM_RANK = 0.05, 2.0


def all_figures(results: Results, atlas: Mapping[str, Any] | None) -> dict[str, Figure]:
    """Every figure there is data for, by the id of its place on the page."""
    extra = results.get("figures") or {}
    order = [str(method["method"]) for method in results.get("methods", [])]
    drawn = {
        "curves": _curves(extra.get("curves") or []),
        "rate": _rate(extra.get("curves") or []),
        "monitors": _monitors(results.get("monitors") or []),
        "idle": _idle(extra.get("curves") or []),
        "levels": _levels(extra.get("levels") or {}, order),
        "calibration": _levels(extra.get("calibration") or {}, order, "calibration error"),
        "stopping": _stopping(extra.get("stopping") or [], order),
        "tree": _tree(extra.get("tree") or []),
        "ball": _ball(extra.get("ball") or {}),
        "violations": _levels(extra.get("violations") or {}, order, "share nearer to a wrong node"),
        "severity": _severity(extra.get("severity") or {}, order),
        "confusion": _confusion(extra.get("confusion") or {}),
        "map": _map(atlas),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def atlas_data(atlas: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the page's script needs to recolour the map and to show an image on hover."""
    if not atlas:
        return {}
    columns = {name: [plain(v) for v in values] for name, values in atlas.get("columns", {}).items()}
    return {"columns": columns, "thumbnail": atlas.get("thumbnail") or [], "colours": list(COLOURS)}


def plain(text: str) -> str:
    """Text that plotly shows as it is: its labels read a little HTML, so that `<` must not reach them raw."""
    return html.escape(str(text), quote=True)


def figure_of(traces: list[dict[str, Any]], x: str, y: str, **layout: Any) -> Figure | None:
    """Traces in the page's own style, with the titles of both axes; None where there is nothing to draw."""
    if not traces:
        return None
    axis = {"gridcolor": "#e6eaee", "zerolinecolor": "#c8d0d8", "linecolor": "#c8d0d8", "rangemode": "tozero"}
    return {
        "data": traces,
        "layout": {
            "margin": {"l": 64, "r": 70 if "yaxis2" in layout else 20, "t": 10, "b": 50},
            "height": 340,
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "font": {"family": "Segoe UI, Roboto, Helvetica Neue, Arial, sans-serif", "size": 13, "color": "#1f2933"},
            "hovermode": "closest",
            "legend": {"orientation": "h", "y": 1.12},
            "xaxis": {"title": {"text": x}, **axis},
            "yaxis": {"title": {"text": y}, **axis},
            **layout,
        },
    }


def _lines(series: Mapping[str, Points]) -> list[dict[str, Any]]:
    return [
        {
            "type": "scatter",
            "mode": "lines" if len(x) > 1 else "markers",
            "name": plain(name),
            "x": x,
            "y": y,
            "line": {"color": COLOURS[i % len(COLOURS)], "width": 1.8},
        }
        for i, (name, (x, y)) in enumerate(series.items())
    ]


def _over_steps(curves: list[Mapping[str, Any]], names: list[str]) -> dict[str, Points]:
    series: dict[str, Points] = {}
    for name in names:
        points = [(line["step"], line[name]) for line in curves if isinstance(line.get(name), int | float)]
        if points:
            series[name] = ([p[0] for p in points], [p[1] for p in points])
    return series


NOT_LOSSES = {"step", "epoch", "lr", "seconds", "images_per_second", "grad_norm", "std", "rank", "idle", "time"}


def _curves(curves: list[Mapping[str, Any]]) -> Figure | None:
    names = sorted({key for line in curves for key in line} - NOT_LOSSES, key=lambda n: (n != "loss", n))
    names = [n for n in names if not n.startswith(("idle", "std", "rank"))]
    return figure_of(_lines(_over_steps(curves, names)), "step", "loss")


def _rate(curves: list[Mapping[str, Any]]) -> Figure | None:
    series = _over_steps(curves, ["lr", "grad_norm"])
    traces = _lines({{"lr": "learning rate", "grad_norm": "gradient norm"}[k]: v for k, v in series.items()})
    for trace in traces[1:]:
        trace["yaxis"] = "y2"
    return figure_of(
        traces,
        "step",
        "learning rate",
        yaxis2={"overlaying": "y", "side": "right", "rangemode": "tozero", "title": {"text": "gradient norm"}},
    )


def _idle(curves: list[Mapping[str, Any]]) -> Figure | None:
    names = sorted({key for line in curves for key in line if key.startswith("idle")})
    return figure_of(_lines(_over_steps(curves, names)), "step", "share of anchors without a positive")


def _monitors(monitors: list[Mapping[str, Any]]) -> Figure | None:
    series: dict[str, Points] = defaultdict(lambda: ([], []))
    for entry in monitors:
        if entry.get("value") is not None and not str(entry["metric"]).startswith("gate "):
            series[str(entry["metric"])][0].append(entry["step"])
            series[str(entry["metric"])][1].append(entry["value"])
    ranks = {name: xy for name, xy in series.items() if "rank" in name}
    spreads = {name: xy for name, xy in series.items() if "rank" not in name}
    traces = _lines({**spreads, **ranks})
    for trace in traces[len(spreads) :]:
        trace["yaxis"] = "y2"
    alarm = [_rule(ALARM_STD, "y", "alarm: std")] if spreads else []
    if ranks:
        alarm.append(_rule(ALARM_RANK, "y2", "alarm: rank"))
    return figure_of(
        traces,
        "step",
        "standard deviation a dimension",
        yaxis2={"overlaying": "y", "side": "right", "title": {"text": "effective rank"}, "rangemode": "tozero"},
        shapes=alarm,
    )


def _rule(height: float, axis: str, name: str) -> dict[str, Any]:
    line = {"color": "#b00020", "width": 1, "dash": "dot"}
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "yref": axis,
        "y0": height,
        "y1": height,
        "line": line,
        "name": name,
    }


def colour_of(method: str, order: Sequence[str]) -> str:
    """One of its own, the same in every figure; grey for a method that is not listed."""
    return COLOURS[order.index(method) % len(COLOURS)] if method in order else "#7b8794"


def _levels(levels: Mapping[str, list[Any]], order: Sequence[str], y: str = "accuracy") -> Figure | None:
    traces = [
        {
            "type": "bar",
            "name": plain(method),
            "x": [f"depth {i + 1}" for i in range(len(values))],
            "y": values,
            "marker": {"color": colour_of(method, order)},
        }
        for method, values in levels.items()
    ]
    return figure_of(traces, "", y, barmode="group")


def _stopping(stops: Sequence[Mapping[str, Any]], order: Sequence[str]) -> Figure | None:
    """Precision against the depth of the answers, a line a method; a point is a threshold."""
    lines: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for stop in stops:
        lines[f"{stop['method']}, {stop['regime']}"].append(stop)
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": plain(name),
            "x": [s["depth"] for s in mine],
            "y": [s["precision"] for s in mine],
            "text": [f"threshold {s['threshold']:g}, {s['answered']:.0%} answered" for s in mine],
            "hovertemplate": "%{text}<br>depth %{x:.2f}, precision %{y:.3f}",
            "line": {"color": colour_of(str(mine[0]["method"]), order)},
        }
        for name, mine in lines.items()
    ]
    return figure_of(traces, "mean depth of the answers", "hierarchical precision")


def _tree(nodes: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The tree round its root, a ring a depth; the width of a node is its images, the colour the share found again."""
    if not nodes:
        return None
    trace = {
        "type": "sunburst",
        "ids": [plain(str(n["node"])) for n in nodes],
        "labels": [plain(str(n["node"]).rpartition("/")[2]) for n in nodes],
        "parents": [plain(str(n["parent"])) for n in nodes],
        "values": [n["images"] for n in nodes],
        "branchvalues": "total",
        "marker": {
            "colors": [n["right"] for n in nodes],
            "colorscale": "Cividis",
            "cmin": 0,
            "cmax": 1,
            "colorbar": {"title": {"text": "share right"}},
        },
        "hovertemplate": "%{id}<br>%{value} images, %{color:.2f} answered there<extra></extra>",
        "sort": False,
    }
    return figure_of([trace], "", "", height=460)


def _ball(ball: Mapping[str, Any]) -> Figure | None:
    """The Poincaré disc: images by their top node, prototypes as diamonds, lines from each to its parent's."""
    if not ball:
        return None
    at = {str(n["node"]): n["at"] for n in ball["nodes"]}
    x: list[Any] = []
    y: list[Any] = []
    for node in ball["nodes"]:
        (x0, y0), (x1, y1) = at.get(str(node["parent"]), (0.0, 0.0)), node["at"]
        x += [x0, x1, None]
        y += [y0, y1, None]
    edges = {
        "type": "scatter",
        "mode": "lines",
        "name": "tree",
        "x": x,
        "y": y,
        "line": {"color": "#444444", "width": 1},
    }
    tops = list(dict.fromkeys(ball["top"]))
    images = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": plain(top),
            "x": [p[0] for p, t in zip(ball["points"], ball["top"], strict=True) if t == top],
            "y": [p[1] for p, t in zip(ball["points"], ball["top"], strict=True) if t == top],
            "marker": {"color": COLOURS[i % len(COLOURS)], "size": 5, "opacity": 0.6},
        }
        for i, top in enumerate(tops)
    ]
    prototypes = {
        "type": "scatter",
        "mode": "markers",
        "name": "prototypes",
        "x": [n["at"][0] for n in ball["nodes"]],
        "y": [n["at"][1] for n in ball["nodes"]],
        "text": [plain(str(n["node"])) for n in ball["nodes"]],
        "hoverinfo": "text",
        "marker": {"color": "#1f2933", "size": 9, "symbol": "diamond"},
    }
    rim = {"type": "circle", "x0": -1, "y0": -1, "x1": 1, "y1": 1, "line": {"color": "#1f2933", "width": 1}}
    figure = figure_of([*images, edges, prototypes], "", "", height=620, shapes=[rim])
    if figure is not None:
        bare = {"range": [-1.05, 1.05], "showticklabels": False, "showgrid": False, "zeroline": False}
        figure["layout"]["xaxis"] = {**bare, "constrain": "domain"}
        figure["layout"]["yaxis"] = {**bare, "scaleanchor": "x"}
    return figure


def _severity(severity: Mapping[str, Any], order: Sequence[str]) -> Figure | None:
    counts = severity.get("counts") or {}
    traces = [
        {
            "type": "bar",
            "name": plain(method),
            "x": severity["heights"],
            "y": values,
            "marker": {"color": colour_of(method, order)},
        }
        for method, values in counts.items()
    ]
    return figure_of(traces, "height of the common ancestor", "errors", barmode="group")


def _confusion(confusion: Mapping[str, Any]) -> Figure | None:
    """Rows are the truth, in depth-first order of the tree; colour is the share of the row, the text its count."""
    names, counts = confusion.get("nodes") or [], confusion.get("counts") or []
    if not names:
        return None
    shares = [[c / max(sum(row), 1) for c in row] for row in counts]
    below = _below_all(names)
    labels = [plain(name) for name in below]
    longest = max(map(len, labels))
    trace = {
        "type": "heatmap",
        "z": shares,
        "x": labels,
        "y": labels,
        "text": [[str(c) if c else "" for c in row] for row in counts],
        "texttemplate": "%{text}",
        "hovertemplate": "truth %{y}<br>answer %{x}<br>%{text} images, share %{z:.2f}<extra></extra>",
        "colorscale": GREYS,
        "zmin": 0,
        "zmax": 1,
        "colorbar": {
            "title": {"text": "share of row"},
            "thickness": 12,
            "lenmode": "pixels",
            "len": 180,
            "tickvals": [0, 0.5, 1],
        },
    }
    figure = figure_of([trace], "answer", "truth", height=max(300, 26 * len(names) + 140) + 6 * longest)
    if figure is not None:
        figure["layout"]["yaxis"].update(
            {"type": "category", "autorange": "reversed", "automargin": True, "title": {"text": "truth", "standoff": 8}}
        )
        figure["layout"]["xaxis"].update(
            {"type": "category", "automargin": True, "tickangle": 60 if longest > 6 else 0}
        )
        figure["layout"]["shapes"] = _parent_lines(below)
    return figure


def _below_all(names: Sequence[str]) -> list[str]:
    """Names without the path that stands above all of them; of each at least its last part stays."""
    parts = [name.split("/") for name in names]
    above = 0
    while len({tuple(one[: above + 1]) for one in parts}) == 1 and all(len(one) > above + 1 for one in parts):
        above += 1
    return ["/".join(one[above:]) for one in parts]


def _parent_lines(names: list[str]) -> list[dict[str, Any]]:
    """A line wherever the top of the path changes between neighbours, unless both are such tops themselves."""
    line = {"color": "#1f2933", "width": 1}
    parts = [name.split("/") for name in names]
    breaks = [
        i for i in range(1, len(parts)) if parts[i][0] != parts[i - 1][0] and max(len(parts[i]), len(parts[i - 1])) > 1
    ]
    edge = len(names) - 0.5
    rows = [{"type": "line", "x0": -0.5, "x1": edge, "y0": i - 0.5, "y1": i - 0.5, "line": line} for i in breaks]
    columns = [{"type": "line", "y0": -0.5, "y1": edge, "x0": i - 0.5, "x1": i - 0.5, "line": line} for i in breaks]
    return rows + columns


def _map(atlas: Mapping[str, Any] | None) -> Figure | None:
    """The empty frame of the map; the page's script fills it by the chosen colour column."""
    if not atlas or not atlas.get("points"):
        return None
    x = [point[0] for point in atlas["points"]]
    y = [point[1] for point in atlas["points"]]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": x,
        "y": y,
        "marker": {"size": 6, "color": COLOURS[0], "opacity": 0.8},
    }
    figure = figure_of([trace], "", "", height=560, legend={"orientation": "v", "itemsizing": "constant"})
    if figure is not None:
        for axis in ("xaxis", "yaxis"):
            figure["layout"][axis] = {"showticklabels": False, "showgrid": False, "zeroline": False}
    return figure

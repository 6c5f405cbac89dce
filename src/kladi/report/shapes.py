"""What an encoder with topology saw: diagrams beside their images, and the experts that it leans on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kladi.report.figures import COLOURS, Figure, Results, figure_of, plain

ACROSS = 3
"""Diagrams side by side."""
PICTURE = 0.36
"""Of a panel's width, what its image takes."""
MOST_LETTERS = 36
KINDS = (("h0", "component", "circle"), ("h1", "hole", "square"))
LEAST, MOST = 4.0, 22.0
"""Size of a point without attention, and of one that has all of it, pixels."""


def figures(results: Results, thumbnails: Sequence[str]) -> dict[str, Figure]:
    """`diagrams`, `experts` and `gates`, where there is data for them."""
    seen = (results.get("figures") or {}).get("shapes") or {}
    drawn = {
        "diagrams": _diagrams(seen.get("images") or [], thumbnails),
        "experts": _experts(seen.get("experts") or {}),
        "gates": _gates(results.get("monitors") or []),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def attended(results: Results) -> str:
    """The persistence of what is looked at most beside that of all points, in words; "" where nothing is known."""
    found = ((results.get("figures") or {}).get("shapes") or {}).get("persistence") or {}
    if not found:
        return ""
    return (
        f"The tenth of each diagram's points that receives most attention has a median persistence of "
        f"{found['attended']:.3f}, all points of {found['all']:.3f} "
        f"({found['points']:,} points of {found['n']:,} images)."
    )


def sight(results: Results) -> str:
    """What the encoder was given of topology, in words; "" for one without."""
    return str(((results.get("figures") or {}).get("shapes") or {}).get("sight") or "")


def _experts(experts: Mapping[str, Any]) -> Figure | None:
    groups = dict(sorted((experts.get("groups") or {}).items(), key=lambda entry: entry[0] != "all"))
    names = [f"{plain(group)} ({experts['n'][group]:,})" for group in groups]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": plain(expert),
            "x": [gates[i] for gates in groups.values()],
            "y": names,
            "marker": {"color": COLOURS[i % len(COLOURS)]},
            "hovertemplate": "%{y}: %{x:.2f}<extra>" + plain(expert) + "</extra>",
        }
        for i, expert in enumerate(experts.get("names") or [])
    ]
    figure = figure_of(
        traces,
        "share",
        "",
        barmode="stack",
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "traceorder": "normal"},
        margin={"l": 64, "r": 20, "t": 40, "b": 50},
        height=170 + 28 * len(names),
    )
    if figure is not None:
        figure["layout"]["yaxis"].update({"autorange": "reversed", "automargin": True})
        figure["layout"]["xaxis"]["range"] = [0, 1]
    return figure


def _gates(monitors: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The mean gate of each expert over training."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in monitors:
        name = str(entry.get("metric"))
        if name.startswith("gate ") and name != "gate entropy" and entry.get("value") is not None:
            found.setdefault(name.removeprefix("gate "), []).append((entry["step"], entry["value"]))
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": plain(name),
            "x": [step for step, _ in points],
            "y": [value for _, value in points],
            "line": {"color": COLOURS[i % len(COLOURS)]},
        }
        for i, (name, points) in enumerate(found.items())
    ]
    return figure_of(traces, "step", "mean gate")


def _diagrams(images: Sequence[Mapping[str, Any]], thumbnails: Sequence[str]) -> Figure | None:
    """A panel an image: its thumbnail at the left, its diagram with the diagonal at the right."""
    figure = figure_of([trace for i, image in enumerate(images) for trace in _points(image, i)], "", "")
    if figure is None:
        return None
    rows = -(-len(images) // ACROSS)
    layout = figure["layout"]
    layout |= {
        "height": 60 + 230 * rows,
        "images": [],
        "annotations": [],
        "shapes": [],
        "margin": {"l": 10, "r": 10, "t": 30, "b": 30},
    }
    for i, image in enumerate(images):
        column, row = i % ACROSS, i // ACROSS
        left, right = column / ACROSS + 0.01, (column + 1) / ACROSS - 0.015
        bottom, top = 1 - (row + 1) / rows + 0.09 / rows, 1 - row / rows - 0.13 / rows
        middle = left + PICTURE * (right - left)
        layout |= _axes(i, (middle + 0.03, right), (bottom, top))
        ends = {"xref": f"x{_nth(i)}", "yref": f"y{_nth(i)}"}
        line = {"color": "#7b8794", "width": 1}
        layout["shapes"].append({"type": "line", "x0": 0, "y0": 0, "x1": 1, "y1": 1, "line": line, **ends})
        here = {"xref": "paper", "yref": "paper", "x": left, "y": top}
        layout["annotations"].append(
            {
                **here,
                "text": plain(_end(str(image.get("label") or "no label"))),
                "showarrow": False,
                "xanchor": "left",
                "yanchor": "bottom",
            }
        )
        place = image.get("thumbnail")
        if isinstance(place, int) and 0 <= place < len(thumbnails):
            size = {"sizex": middle - left, "sizey": top - bottom, "xanchor": "left", "yanchor": "top"}
            layout["images"].append({**here, **size, "source": thumbnails[place]})
    return figure


def _end(label: str) -> str:
    """As many of its last parts as stand above a panel; of a last part that does not, its beginning."""
    end, *above = label.split("/")[::-1]
    while above and len(end) + len(above[0]) + 1 <= MOST_LETTERS:
        end = f"{above.pop(0)}/{end}"
    end = end if len(end) <= MOST_LETTERS else end[:MOST_LETTERS] + "\u2026"
    return f"\u2026/{end}" if above else end


def _nth(i: int) -> str:
    """The first axis has no number."""
    return str(i + 1) if i else ""


def _axes(i: int, x: tuple[float, float], y: tuple[float, float]) -> dict[str, Any]:
    shared = {"range": [-0.03, 1.03], "gridcolor": "#e6eaee", "zeroline": False, "tickvals": [0, 0.5, 1]}
    small = {"size": 10}
    return {
        f"xaxis{_nth(i)}": {
            **shared,
            "domain": list(x),
            "anchor": f"y{_nth(i)}",
            "tickfont": small,
            "title": {"text": "birth", "font": small, "standoff": 2},
        },
        f"yaxis{_nth(i)}": {
            **shared,
            "domain": list(y),
            "anchor": f"x{_nth(i)}",
            "tickfont": small,
            "title": {"text": "death", "font": small, "standoff": 2},
        },
    }


def _points(image: Mapping[str, Any], i: int) -> list[dict[str, Any]]:
    traces = []
    for number, (key, name, symbol) in enumerate(KINDS):
        points = image.get(key) or []
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "legendgroup": name,
                "showlegend": i == 0,
                "xaxis": f"x{_nth(i)}",
                "yaxis": f"y{_nth(i)}",
                "x": [birth for birth, _, _ in points],
                "y": [death for _, death, _ in points],
                "text": [f"attention {share:.3f}" for _, _, share in points],
                "hovertemplate": "birth %{x:.2f}, death %{y:.2f}<br>%{text}<extra>" + name + "</extra>",
                "marker": {
                    "color": COLOURS[number],
                    "symbol": symbol,
                    "opacity": 0.75,
                    "size": [round(LEAST + (MOST - LEAST) * share**0.5, 1) for _, _, share in points],
                },
            }
        )
    return traces

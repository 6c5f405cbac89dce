"""How strong the views of a run with topology may be: a table, and how far each operation moves the diagrams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kladi.report.figures import COLOURS, Figure, figure_of, plain

ACROSS = 4
SHADES = {"weak": "#56B4E9", "strong": "#E69F00"}
LIMITS = {"weak": (0.05, 0.15), "strong": (0.15, 0.25)}
"""Relative distances of the two bands; a test holds them to `structure.topology.BANDS`."""
MOST = 0.5
"""Distance at the top of a panel."""

Table = Mapping[str, Any]
"""The content of strengths.json."""


def lines(strengths: Table) -> list[tuple[str, str, str]]:
    """Operation, and for each band its range, share and median distance in words; operations that no band takes too."""
    names = sorted({*strengths["reaches"], *(name for some in strengths["ranges"].values() for name in some)})
    weak, strong = strengths["ranges"]["weak"], strengths["ranges"]["strong"]
    return [(name, _said(weak.get(name)), _said(strong.get(name))) for name in names]


def figure(strengths: Table) -> Figure | None:
    """A panel an operation: relative distance over strength, median and two ranges of quantiles; the bands behind, and
    the strengths that training draws from in the band's colour on the axis."""
    reaches = {name: some for name, some in sorted((strengths.get("reaches") or {}).items()) if some}
    drawn = figure_of([trace for i, some in enumerate(reaches.values()) for trace in _panel(some, i)], "", "")
    if drawn is None:
        return None
    rows = -(-len(reaches) // ACROSS)
    layout = drawn["layout"]
    layout |= {"height": 80 + 220 * rows, "showlegend": False, "shapes": [], "annotations": []}
    layout["margin"] = {"l": 50, "r": 10, "t": 30, "b": 40}
    for i, (name, some) in enumerate(reaches.items()):
        column, row = i % ACROSS, i // ACROSS
        x = (column / ACROSS + 0.02, (column + 1) / ACROSS - 0.02)
        y = (1 - (row + 1) / rows + 0.11 / rows, 1 - row / rows - 0.08 / rows)
        nth = str(i + 1) if i else ""
        grid = {"gridcolor": "#eef1f4", "zeroline": False, "tickfont": {"size": 10}}
        ends = [one["strength"] for one in some]
        ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.3) if tick <= ends[-1] * 1.01]
        layout[f"xaxis{nth}"] = {**grid, "type": "log", "domain": list(x), "anchor": f"y{nth}", "tickvals": ticks}
        layout[f"yaxis{nth}"] = {**grid, "domain": list(y), "anchor": f"x{nth}", "range": [-0.02, MOST]}
        layout["shapes"] += _shades(strengths["ranges"], name, nth, ends)
        place = {"xref": "paper", "yref": "paper", "x": x[0], "y": y[1], "xanchor": "left", "yanchor": "bottom"}
        layout["annotations"].append({**place, "text": plain(name), "showarrow": False})
    return drawn


def _panel(some: list[Mapping[str, Any]], i: int) -> list[dict[str, Any]]:
    x = [one["strength"] for one in some]
    nth = str(i + 1) if i else ""
    axes = {"type": "scatter", "xaxis": f"x{nth}", "yaxis": f"y{nth}", "x": x}
    quantiles = list(zip(*(one["quantiles"] for one in some), strict=True))
    bare = {**axes, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    ranges: list[dict[str, Any]] = []
    for low, high, colour in ((0, 4, "rgba(0,114,178,0.12)"), (1, 3, "rgba(0,114,178,0.25)")):
        ranges += [
            {**bare, "y": quantiles[low]},
            {**bare, "y": quantiles[high], "fill": "tonexty", "fillcolor": colour},
        ]
    median = {
        **axes,
        "mode": "lines+markers",
        "y": quantiles[2],
        "line": {"color": COLOURS[0]},
        "marker": {"size": 5},
        "hovertemplate": "strength %{x:.3f}: median distance %{y:.3f}<extra></extra>",
    }
    return [*ranges, median]


def _shades(ranges: Table, name: str, nth: str, ends: list[float]) -> list[dict[str, Any]]:
    """Both bands over the whole panel, and the range of strengths that was found for each, on the axis."""
    found = []
    for band, (low, high) in LIMITS.items():
        here = {"type": "rect", "xref": f"x{nth}", "yref": f"y{nth}", "line": {"width": 0}, "layer": "below"}
        sides = {"x0": ends[0], "x1": ends[-1], "y0": low, "y1": high}
        found.append({**here, **sides, "fillcolor": SHADES[band], "opacity": 0.18})
        one = ranges[band].get(name)
        if one:
            sides = {"x0": one["low"] * 0.97, "x1": one["high"] * 1.03, "y0": -0.02, "y1": 0.0}
            found.append({**here, **sides, "fillcolor": SHADES[band], "opacity": 1.0})
    return found


def _said(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "not used"
    strength = f"{one['low']:.3f}" if one["low"] == one["high"] else f"{one['low']:.3f} to {one['high']:.3f}"
    return f"{strength}; {one['share']:.0%} in band, median {one['median']:.3f}, n {one['n']:,}"

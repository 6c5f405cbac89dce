"""factors.json -> figures: the lattice, what it explains of each table, and how stable it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kladi.report.figures import COLOURS, Figure, figure_of, plain

Content = Mapping[str, Any]
"""The content of factors.json."""
NOISE = "#c8d0d8"


def figures(content: Content) -> dict[str, Figure]:
    """Every figure there is data for, by the id of its place on the page."""
    drawn = {"lattice": _lattice(content), "explained": _explained(content), "stability": _stability(content)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def summary(content: Content) -> list[str]:
    """The first lines of the page."""
    tables = content["tables"]
    shared = sum(s["rank"] for s in content["structures"] if len(s["tables"]) > 1)
    private = sum(s["rank"] for s in content["structures"] if len(s["tables"]) == 1)
    ways = "told from the data" if content["ranks_from"] == "data" else "given"
    lines = [
        f"{content['patients']:,} patients, {len(tables)} tables: "
        + ", ".join(f"{t['name']} ({t['features']:,} features, {t['patients']:,} patients)" for t in tables),
        f"{shared} shared and {private} private factors; their numbers were {ways}.",
    ]
    if not content["converged"]:
        lines.append("The refinement did not come to its end: read the numbers with care.")
    return lines


def loadings(content: Content) -> list[dict[str, Any]]:
    """Each structure's factors with the features that load most, as text a table."""
    out = []
    for structure in content["structures"]:
        factors = [
            [(name, ", ".join(f"{f} {v:+.2f}" for f, v in most)) for name, most in of.items()]
            for of in structure["loadings"]
        ]
        out.append({"name": " + ".join(structure["tables"]), "factors": factors})
    return out


def stable_ranks(content: Content) -> list[tuple[str, int, str]]:
    """Structure, its rank, and the ranks that halves of the patients gave it; empty where ranks were given."""
    counts = (content.get("stability") or {}).get("ranks") or {}
    ranks = {s["structure"]: s["rank"] for s in content["structures"]}
    names = [table["name"] for table in content["tables"]]
    return [
        (
            " + ".join(names[int(m)] for m in structure.split("+")),
            ranks.get(structure, 0),
            ", ".join(f"{rank} in {count}" for rank, count in of.items()),
        )
        for structure, of in counts.items()
    ]


def _lattice(content: Content) -> Figure | None:
    """Structures by size from the top; a line wherever one holds the next, a disc as large as its rank."""
    structures = content["structures"]
    if not structures:
        return None
    sets = [frozenset(s["tables"]) for s in structures]
    by_size: dict[int, list[int]] = {}
    for i, members in enumerate(sets):
        by_size.setdefault(len(members), []).append(i)
    at = {i: ((k + 1) / (len(row) + 1), float(size)) for size, row in by_size.items() for k, i in enumerate(row)}
    x: list[float | None] = []
    y: list[float | None] = []
    for i, upper in enumerate(sets):
        for j, lower in enumerate(sets):
            between = any(lower < other < upper for other in sets)
            if lower < upper and not between:
                x += [at[i][0], at[j][0], None]
                y += [at[i][1], at[j][1], None]
    lines = {"type": "scatter", "mode": "lines", "x": x, "y": y, "line": {"color": "#9aa5b1"}, "hoverinfo": "skip"}
    most = max(s["rank"] for s in structures)
    discs = {
        "type": "scatter",
        "mode": "markers+text",
        "x": [at[i][0] for i in range(len(sets))],
        "y": [at[i][1] for i in range(len(sets))],
        "text": [f"<b>{s['rank']}</b><br>{plain(' + '.join(s['tables']))}" for s in structures],
        "textposition": "middle right",
        "hovertext": [
            "<br>".join(f"{plain(name)}: {share:.0%}" for name, share in s["explained"].items()) for s in structures
        ],
        "hoverinfo": "text",
        "marker": {
            "size": [18 + 22 * (s["rank"] / most) ** 0.5 for s in structures],
            "color": [COLOURS[(len(m) - 1) % len(COLOURS)] for m in sets],
        },
    }
    figure = figure_of([lines, discs], "", "", height=120 + 120 * len(by_size), showlegend=False)
    if figure is not None:
        bare = {"showticklabels": False, "showgrid": False, "zeroline": False}
        figure["layout"]["xaxis"] = {**bare, "range": [0, 1.15]}
        figure["layout"]["yaxis"] = {**bare, "range": [min(by_size) - 0.6, max(by_size) + 0.6]}
    return figure


def _explained(content: Content) -> Figure | None:
    """Of each table, shares of its variance by structure; the rest is noise."""
    names = [table["name"] for table in content["tables"]]
    traces = []
    for i, structure in enumerate(content["structures"]):
        shares = [structure["explained"].get(name, 0.0) for name in names]
        traces.append(_bar(" + ".join(structure["tables"]), shares, names, COLOURS[i % len(COLOURS)]))
    rest = [max(0.0, 1 - sum(s["explained"].get(name, 0.0) for s in content["structures"])) for name in names]
    traces.append(_bar("noise", rest, names, NOISE))
    figure = figure_of(traces, "share of variance", "", barmode="stack", height=180 + 32 * len(names))
    if figure is not None:
        figure["layout"]["yaxis"].update({"autorange": "reversed", "automargin": True})
        figure["layout"]["legend"] = {"orientation": "h", "y": 1.2, "traceorder": "normal"}
    return figure


def _bar(name: str, shares: list[float], tables: list[str], colour: str) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": plain(name),
        "x": shares,
        "y": [plain(table) for table in tables],
        "marker": {"color": colour},
        "hovertemplate": "%{y}: %{x:.1%}<extra>" + plain(name) + "</extra>",
    }


def _stability(content: Content) -> Figure | None:
    """Overlap of the loadings of halves with those of all, a dot a table, by structure."""
    found = (content.get("stability") or {}).get("overlap") or {}
    names = [table["name"] for table in content["tables"]]
    of = {s["structure"]: " + ".join(s["tables"]) for s in content["structures"]}
    traces = []
    for i, name in enumerate(names):
        some = {s: v[name] for s, v in found.items() if name in v}
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plain(name),
                "x": [plain(of[s]) for s in some],
                "y": [v["mean"] for v in some.values()],
                "error_y": {"type": "data", "array": [v["sd"] for v in some.values()]},
                "marker": {"color": COLOURS[i % len(COLOURS)], "size": 9},
            }
        )
    traces = [trace for trace in traces if trace["x"]]
    return figure_of(
        traces, "", "overlap", yaxis={"range": [0, 1.05], "gridcolor": "#e6eaee", "title": {"text": "overlap"}}
    )

"""results.json -> one offline HTML file: no request, no script but ours, nothing to install to read it.

Everything a page shows comes from results.json; `map.json` (two-dimensional map) and `thumbnails.json` are used where
they lie beside it. Names of labels, methods and columns are a stranger's text: they reach the page as escaped HTML or
as JSON in an inert tag, never as markup, and the content security policy lets no script run but those whose hashes it
holds.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from kladi.errors import UserError
from kladi.report import comparison, facts, figures, glossary, shapes, tables, wording
from kladi.report import factors as factors_page
from kladi.report import strengths as strengths_page

Results = Mapping[str, Any]
FORMAT, VERSION = "kladi-results", 1


def write(source: Path, out: Path | None = None) -> Path:
    """Draw the page of a results.json, or of the folder that holds one; returns where it went.

    Args:
        source: results.json or its folder.
        out: the page's path; `report.html` beside results.json where it is None.

    Raises:
        UserError: there is no results.json, or it is none of ours.
    """
    file = source / "results.json" if source.is_dir() else source
    results = read(file)
    beside = file.parent
    page = render(results, _beside(beside / "map.json", dict), _beside(beside / "thumbnails.json", list))
    target = out or beside / "report.html"
    _write_private(target, page)
    return target


def read(file: Path) -> Results:
    """A results file, after the check that it is one of ours."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: no results to report on ({error.strerror}); kladi evaluate writes them") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged, or no results file ({error})") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise UserError(f'{file}: no results file of kladi (it lacks "format": "{FORMAT}")')
    if results.get("version") != VERSION:
        version = " ".join(str(results.get("version")).split())[:40]
        raise UserError(f"{file}: format version {version}; this kladi reads version {VERSION}")
    wrong = _wrong_shape(results)
    if wrong:
        raise UserError(f"{file}: damaged ({wrong})")
    return results


def _wrong_shape(results: Results) -> str:
    """The first key that does not hold what `kladi evaluate` writes there; empty where all do."""
    for key in ("study", "data", "splits", "provenance", "figures"):
        if not isinstance(results.get(key, {}), dict):
            return f'"{key}" is no table'
    for key in ("methods", "comparisons", "rows", "monitors"):
        entries = results.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            return f'"{key}" is no list of tables'
    for number, row in enumerate(results.get("rows", [])):
        if not all(isinstance(row.get(key), str) for key in ("method", "regime", "metric")):
            return f"entry {number} of rows lacks method, regime or metric"
        if not isinstance(row.get("value"), int | float | None):
            return f"entry {number} of rows has a value that is no number"
    if not all(isinstance(method.get("method"), str) for method in results.get("methods", [])):
        return "an entry of methods has no name"
    try:
        json.dumps(results, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "text with half a character in it"
    return ""


def render(results: Results, atlas: Mapping[str, Any] | None, thumbnails: list[str] | None) -> str:
    """The page as text.

    Args:
        results: the content of results.json.
        atlas: the content of map.json, or None.
        thumbnails: data URIs, indexed by the map's `thumbnail` entries, or None.
    """
    panels = comparison.panels(atlas)
    drawn = {**figures.all_figures(results, atlas), **comparison.figures(results)}
    drawn |= shapes.figures(results, thumbnails or [])
    drawn |= {f"panel{i}": panel["figure"] for i, panel in enumerate(panels) if panel["figure"] is not None}
    data = {"figures": drawn, "thumbnails": thumbnails or [], "atlas": figures.atlas_data(atlas)}
    return _filled(
        "page.html",
        data,
        title=_title(results),
        unit=wording.unit(results),
        summary=tables.summary(results),
        headline=tables.headline(results),
        study=comparison.table(results),
        panels=panels,
        key=comparison.key(atlas),
        colour=(atlas or {}).get("colour", ""),
        regimes=tables.regimes(results),
        glossary=glossary.of(results),
        comparisons=tables.comparisons(results),
        methods=results.get("methods", []),
        data_facts=facts.data_facts(results),
        labels=facts.labels(results),
        parents=tables.parents(results),
        attended=shapes.attended(results),
        sight=shapes.sight(results),
        excluded=sorted(results.get("data", {}).get("excluded", {}).items()),
        warnings=results.get("data", {}).get("warnings", []),
        figures=drawn,
        atlas=atlas,
        has_images=bool(thumbnails),
        diagnostics=facts.diagnostics(results),
        purity=facts.purity(atlas),
        neighbours=facts.neighbours(atlas),
        provenance=facts.provenance(results),
        not_run=facts.not_run(results),
    )


def write_strengths(strengths: Mapping[str, Any], path: Path, of: str = "") -> None:
    """A page of the strengths that were measured for a data set, from the content of strengths.json.

    Args:
        of: what they were measured on, in words.
    """
    drawn = strengths_page.figure(strengths)
    data = {"figures": {} if drawn is None else {"strengths": drawn}}
    said = {"lines": strengths_page.lines(strengths), "skipped": strengths["skipped"], "of": of}
    _write_private(path, _filled("strengths.html", data, **said))


def write_factors(content: Mapping[str, Any], path: Path) -> None:
    """A page of a factor model, from the content of factors.json."""
    drawn, stability = factors_page.figures(content), content.get("stability") or {}
    halves = f"{stability['n']} of {stability['of']} halves could be fitted." if stability else ""
    html = _filled(
        "factors.html",
        {"figures": drawn},
        figures=drawn,
        summary=factors_page.summary(content),
        loadings=factors_page.loadings(content),
        ranks=factors_page.stable_ranks(content),
        halves=halves,
        outcome=content.get("outcome"),
        patterns=content["patterns"],
        findings=content["findings"],
        version=content["kladi"],
        seed=content["seed"],
    )
    _write_private(path, html)


def _filled(template: str, data: Mapping[str, Any], **values: Any) -> str:
    """A template with what every page has: style, policy, and the scripts round its data."""
    assets = files("kladi.report") / "assets"
    plotly, script = get_plotlyjs(), (assets / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (assets / name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    marker = secrets.token_hex(16)
    style = (assets / "page.css").read_text(encoding="utf-8")
    html = environment.get_template(template).render(
        marker=marker, policy=_policy(plotly, script), style=style, **values
    )
    # Scripts and data go in after rendering: 5 MB of them need no template engine. The marker is drawn anew for each
    # page, so that no stranger's text can hold it.
    for name, text in (("data", _inert(data)), ("plotly", plotly), ("script", script)):
        html = html.replace(f"{marker}-{name}", text)
    return html


def _title(results: Results) -> str:
    return str(results.get("study", {}).get("name") or "evaluation")


def _beside(file: Path, kind: type) -> Any:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({error}); delete it, and the page is drawn without it") from error
    if not isinstance(found, kind):
        raise UserError(f"{file}: damaged; delete it, and the page is drawn without it")
    return found


def _inert(value: Any) -> str:
    """JSON that can close no tag and open none, wherever it stands in HTML."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(*scripts: str) -> str:
    """Nothing loads or connects, only scripts with these hashes run. Styles are inline because plotly sets them."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    elsewhere = "style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'"
    return f"default-src 'none'; script-src {hashes}; {elsewhere}"


def _write_private(path: Path, text: str) -> None:
    """Write for the owner's eyes alone, and replace an older page only when the new one is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error

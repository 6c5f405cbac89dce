"""Files that hold a taxonomy: .csv and .tsv (see `taxonomy_tables`), .json, .nwk (Newick), .obo."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kladi.errors import UserError
from kladi.structure import canonical, newick, taxonomy_tables
from kladi.structure.canonical import Drawing

FORMAT = "kladi-taxonomy"


def read(path: Path) -> Drawing:
    """Who is below whom in a file; the suffix says which form it has.

    Raises:
        UserError: naming the file and the place in it.
    """
    readers: dict[str, Callable[[str], Drawing]] = {
        ".csv": taxonomy_tables.read,
        ".tsv": lambda text: taxonomy_tables.read(text, "\t"),
        ".json": from_json,
        ".nwk": newick.read,
        ".newick": newick.read,
        ".obo": from_obo,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: a taxonomy is {', '.join(readers)}, not {path.suffix or 'without a suffix'}")
    try:
        return reader(_text(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write what `Taxonomy.to_dict` gave: .json, .csv, .tsv or .nwk.

    Raises:
        UserError: another suffix, or several parents into .nwk.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    elif suffix in {".csv", ".tsv"}:
        text = _table(content["nodes"], "," if suffix == ".csv" else "\t")
    elif suffix == ".nwk":
        text = newick.text(content["nodes"])
    else:
        raise UserError(
            f"{path}: a taxonomy is written as .json, .csv, .tsv or .nwk, not {suffix or 'without a suffix'}"
        )
    path.write_text(text, encoding="utf-8", newline="")


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from error
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"line {line}: byte {error.start} is no {encoding.removesuffix('-sig').upper()} text"
        ) from error
    if not text.strip():
        raise UserError("the file is empty")
    return text


# --- JSON ----------------------------------------------------------------------------------------------------------


def from_json(text: str) -> Drawing:
    """Dicts of dicts, leaves as lists of names or null, node names are whole paths; or what `Taxonomy.write` wrote."""
    try:
        content = json.loads(text, object_pairs_hook=_without_twins)
    except json.JSONDecodeError as error:
        raise UserError(f"line {error.lineno}, column {error.colno}: no JSON ({error.msg})") from error
    except RecursionError as error:
        raise UserError("nested too deep for JSON; write it as child,parent in a .csv") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"no label tree ({error})") from error
    if isinstance(content, dict) and "format" in content:
        return from_dict(content)
    if not isinstance(content, (dict, list)):
        raise UserError(f"a nested taxonomy is a dict or a list, not {_kind(content)}")
    paths: dict[str, None] = {}
    for path in _nested_paths(content):
        if path in paths:
            raise UserError(f'"{path}" occurs twice')
        paths[path] = None
    return canonical.from_paths(paths)


def _nested_paths(content: Any) -> Iterator[str]:
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        above, value = waiting.pop()
        if value is None:
            continue
        if isinstance(value, dict):
            below = [*value.items()]
        elif isinstance(value, list):
            below: list[tuple[Any, Any]] = []
            for item in value:
                below += list(item.items()) if isinstance(item, dict) else [(item, None)]
        else:
            where = above.removesuffix("/")
            raise UserError(f'below "{where}" stands {_kind(value)}; expected a dict, a list of names or null')
        for name, under in below:
            if not isinstance(name, str):
                raise UserError(f'below "{above.removesuffix("/")}" stands {_kind(name)} where a name belongs')
            yield above + name
            waiting.append((f"{above}{name}/", under))


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f'the key "{twin}" occurs twice in one dict')
    return content


def _kind(value: Any) -> str:
    return f"the {type(value).__name__} {json.dumps(value, ensure_ascii=False)[:60]}"


def from_dict(content: Mapping[str, Any]) -> Drawing:
    """The inverse of `Taxonomy.to_dict`."""
    if content.get("format") != FORMAT or content.get("version") != 1:
        raise UserError(
            f'format {content.get("format")!r}, version {content.get("version")!r} is not "{FORMAT}", version 1'
        )
    pairs: list[tuple[str, str | None]] = []
    titles: dict[str, str] = {}
    for number, node in enumerate(content.get("nodes", []), start=1):
        if not isinstance(node, dict) or not isinstance(name := node.get("name"), str):
            raise UserError(f"node {number} has no name")
        above = node.get("parents", [])
        if not isinstance(above, list) or not all(isinstance(parent, str) for parent in above):
            raise UserError(f'the parents of "{name}" are not a list of names')
        pairs += [(name, parent) for parent in above] or [(name, None)]
        if isinstance(title := node.get("title"), str):
            titles[name] = title
    return canonical.from_pairs(pairs, titles=titles)


# --- OBO -----------------------------------------------------------------------------------------------------------


def from_obo(text: str) -> Drawing:
    """The is_a relations of the [Term] stanzas: node = id, `name` kept for display, obsolete terms dropped."""
    terms: dict[str, dict[str, list[str]]] = {}
    for line, stanza in _stanzas(text):
        ids = stanza.get("id", [])
        if len(ids) != 1:
            raise UserError(f"line {line}: a [Term] with {len(ids)} ids")
        if ids[0] in terms:
            raise UserError(f'line {line}: the term "{ids[0]}" occurs twice')
        terms[ids[0]] = stanza
    obsolete = {term for term, stanza in terms.items() if stanza.get("is_obsolete") == ["true"]}
    pairs: list[tuple[str, str | None]] = []
    lost = 0
    for term, stanza in terms.items():
        if term in obsolete:
            continue
        above = list(dict.fromkeys(stanza.get("is_a", [])))
        living = [parent for parent in above if parent not in obsolete]
        lost += len(above) - len(living)
        pairs += [(term, parent) for parent in living] or [(term, None)]
    findings = []
    if obsolete:
        findings.append(f"{len(obsolete)} obsolete terms are left out" + (f", and {lost} is_a to them" if lost else ""))
    titles = {term: stanza["name"][0] for term, stanza in terms.items() if "name" in stanza}
    return canonical.from_pairs(pairs, titles=titles, findings=findings)


def _stanzas(text: str) -> Iterator[tuple[int, dict[str, list[str]]]]:
    """(line of the header, tag -> its values) of each [Term]."""
    start = 0
    stanza: dict[str, list[str]] | None = None
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if line.startswith("["):
            if stanza is not None:
                yield start, stanza
            start = number
            stanza = {} if line == "[Term]" else None
        elif stanza is not None and ":" in line and not line.startswith("!"):
            tag, _, value = line.partition(":")
            if tag in {"id", "is_a", "is_obsolete"}:
                value = value.split(" !")[0].split(" {")[0]
            stanza.setdefault(tag, []).append(value.strip())
    if stanza is not None:
        yield start, stanza


# --- tables --------------------------------------------------------------------------------------------------------


def _table(nodes: list[dict[str, Any]], delimiter: str) -> str:
    has_titles = any("title" in node for node in nodes)
    out = io.StringIO()
    rows = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    rows.writerow(["child", "parent", "title"] if has_titles else ["child", "parent"])
    for node in nodes:
        for parent in node["parents"] or [""]:
            rows.writerow([node["name"], parent, node.get("title", "")] if has_titles else [node["name"], parent])
    return out.getvalue()

"""A taxonomy in a table (.csv, .tsv): child,parent, or one column a level, or one column of slash paths.

How the three are told apart, in this order; whatever was not said by a header is said in a finding:

1. A column called parent (or parent_id, is_a, broader, ...) -> child,parent. Other columns: a title for display.
2. A column called path -> slash paths. One column only -> slash paths.
3. Two columns without such names -> child,parent where a value stands in both columns, or where only the second column
   repeats (many children, one parent). The column that repeats is the parent: some lists are parent,child.
4. Otherwise one column a level, coarse to fine; a blank ends the path, and names are whole paths.

The first row is a header where it has one of these names, or where none of its values occurs again below.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kladi.errors import UserError
from kladi.structure import canonical
from kladi.structure.canonical import Drawing

CHILD = ("child", "child_id", "node", "node_id", "id", "code", "class", "term", "concept", "label", "name")
PARENT = (
    "parent",
    "parent_id",
    "parents",
    "parent_node",
    "parent_code",
    "parent_name",
    "is_a",
    "broader",
    "superclass",
)
PATH = ("path", "node_path", "label_path", "taxonomy")
ONE = (*PATH, *CHILD, "labels", "category", "diagnosis", "finding", "leaf")
TITLE = ("title", "name", "display", "display_name", "label", "description")
LEVELS = re.compile(
    r"(level|depth|tier|rank|lvl|l)_?\d+|modality|anatomy|organ|system|body_part|site|region|tissue|group|category|"
    r"(sub|super)?(class|type)|finding|diagnosis|disease|lesion|domain|kingdom|phylum|order|family|genus|species"
)


@dataclass(frozen=True)
class _Row:
    place: str
    cells: tuple[str, ...]


def read(text: str, delimiter: str = "") -> Drawing:
    """Who is below whom in a table.

    Args:
        delimiter: the one of `,`, `;` and tab that splits the first line into most columns, where not given.

    Raises:
        UserError: naming the row: cells beyond the header, a gap in a path, a row that occurs twice, what
            `canonical.from_pairs` refuses; or that the columns cannot be told apart.
    """
    delimiter = delimiter or _delimiter(text)
    findings = [] if delimiter in ",\t" else [f'columns are split at "{delimiter}"']
    rows = _rows(text, delimiter)
    header = [_word(cell) for cell in rows[0].cells]
    if any(word in PARENT for word in header):
        return _edges_by_header(rows, header, findings)
    path = next((header.index(word) for word in PATH if word in header), 0 if len(header) == 1 else None)
    if path is not None:
        return _paths(rows, path, header, findings)
    named = any(LEVELS.fullmatch(word) for word in header)
    if not named and _first_row_is_data(rows):
        findings.append("no header: the first row is a node")
        body = rows
    else:
        if not named:
            findings.append(f'the first row is taken as header: "{delimiter.join(rows[0].cells)}"')
        body = rows[1:]
    if not body:
        raise UserError("a header, but no rows")
    if len(header) == 2 and not named:
        order = _edge_order(body)
        if order is not None:
            findings.append(f"columns are read as {'child,parent' if order == (0, 1) else 'parent,child'}")
            return _edges(body, *order, None, findings)
        findings.append("columns are read as one a level")
    return _levels(body, findings)


def _delimiter(text: str) -> str:
    first = next(line for line in text.splitlines() if line.strip())
    return max(",;\t", key=lambda mark: len(next(csv.reader([first], delimiter=mark))))  # the comma wins a tie


def _rows(text: str, delimiter: str) -> list[_Row]:
    """The rows that are not blank; all as wide as the first, columns that are blank throughout dropped."""
    rows: list[_Row] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append(_Row(f"row {len(rows)} (line {reader.line_num})", tuple(cell.strip() for cell in cells)))
    except csv.Error as error:
        raise UserError(f"line {reader.line_num}: {error}") from error
    width = max((i + 1 for row in rows for i, cell in enumerate(row.cells) if cell), default=0)
    expected = max(len(rows[0].cells), 2)
    too_wide = next((row for row in rows if any(row.cells[expected:])), None)
    if too_wide is not None:
        raise UserError(f"{too_wide.place}: {len(too_wide.cells)} cells, but the first row has {len(rows[0].cells)}")
    return [_Row(row.place, (*row.cells, *[""] * width)[:width]) for row in rows]


def _word(cell: str) -> str:
    return re.sub(r"[\s\-.]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cell.strip())).casefold()


def _first_row_is_data(rows: Sequence[_Row]) -> bool:
    below = {cell for row in rows[1:] for cell in row.cells if cell}
    return len(rows) == 1 or any(cell in below for cell in rows[0].cells)


# --- child,parent --------------------------------------------------------------------------------------------------


def _edges_by_header(rows: Sequence[_Row], header: Sequence[str], findings: list[str]) -> Drawing:
    parent = next(header.index(word) for word in PARENT if word in header)
    child = next((header.index(word) for word in CHILD if word in header), None)
    if child is None:
        others = [column for column in range(len(header)) if column != parent]
        if len(others) != 1:
            raise UserError(f"which column is the child? found {', '.join(header)}; call it child")
        child = others[0]
    title = next((header.index(word) for word in TITLE if word in header and header.index(word) != child), None)
    ignored = [rows[0].cells[c] for c in range(len(header)) if c not in {parent, child, title}]
    if ignored:
        findings.append(f"columns not used: {', '.join(ignored)}")
    return _edges(rows[1:], child, parent, title, findings)


def _edges(rows: Sequence[_Row], child: int, parent: int, title: int | None, findings: list[str]) -> Drawing:
    if not rows:
        raise UserError("a header, but no rows")
    titles = {} if title is None else {row.cells[child]: row.cells[title] for row in rows if row.cells[title]}
    return canonical.from_pairs(
        [(row.cells[child], row.cells[parent]) for row in rows],
        titles=titles,
        places=[row.place for row in rows],
        findings=findings,
    )


def _edge_order(rows: Sequence[_Row]) -> tuple[int, int] | None:
    """(child, parent) columns of a table of two columns without names; None where it is one column a level."""
    columns = [[row.cells[c] for row in rows if row.cells[c]] for c in (0, 1)]
    blanks = [len(column) < len(rows) for column in columns]
    repeats = [max(Counter(column).values(), default=0) > 1 for column in columns]
    if not set(columns[0]) & set(columns[1]) and not blanks[0]:
        return (0, 1) if repeats[1] and not repeats[0] else None
    if blanks[0] != blanks[1]:
        return (0, 1) if blanks[1] else (1, 0)  # only a parent can be blank
    if repeats[0] != repeats[1]:
        return (0, 1) if repeats[1] else (1, 0)
    raise UserError("which column is the parent? neither the names nor what repeats tells; add a header child,parent")


# --- paths and levels ----------------------------------------------------------------------------------------------


def _paths(rows: Sequence[_Row], column: int, header: Sequence[str], findings: list[str]) -> Drawing:
    first = rows[0].cells[column]
    has_header = header[column] in ONE
    if not has_header and len(rows) > 1 and "/" not in first:
        # a word over a column of paths that is above none of them
        has_header = all("/" in row.cells[column] and row.cells[column].split("/")[0] != first for row in rows[1:])
        if has_header:
            findings.append(f'the first row is taken as header: "{first}"')
    ignored = [rows[0].cells[c] for c in range(len(header)) if c != column]
    if ignored:
        findings.append(f"columns not used: {', '.join(ignored)}")
    return _from_paths([(row.place, row.cells[column]) for row in rows[int(has_header) :]], findings)


def _levels(rows: Sequence[_Row], findings: list[str]) -> Drawing:
    paths = []
    for row in rows:
        parts = list(row.cells)
        while parts and not parts[-1]:
            parts.pop()
        if not all(parts):
            gap = parts.index("")
            raise UserError(f'{row.place}: column {gap + 1} is blank, but "{next(filter(None, parts[gap:]))}" follows')
        paths.append((row.place, "/".join(parts)))
    return _from_paths(paths, findings)


def _from_paths(paths: Sequence[tuple[str, str]], findings: list[str]) -> Drawing:
    if not paths:
        raise UserError("a header, but no rows")
    first: dict[str, str] = {}
    for place, path in paths:
        if not all(part.strip() for part in path.split("/")):
            raise UserError(f'{place}: path "{path}" has an empty part')
        if path in first:
            raise UserError(f'{place}: "{path}" occurs twice, first in {first[path]}')
        first[path] = place
    return canonical.from_paths(first, findings=findings)

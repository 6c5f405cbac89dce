"""A manifest's file -> columns of text: .csv and .tsv whatever their dialect, .parquet. Nothing is interpreted here.

Text is UTF-8 (with or without a byte-order mark) or UTF-16; lines end in LF, CRLF or CR; cells are separated by comma,
semicolon or tab, quoted with ", and a quoted cell may hold line ends. What cannot be read so is refused with its line:
a guess would put cells into the wrong column. Cells stay text ("01" is not 1), trimmed and in Unicode NFC.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import polars as pl

from kladi.data.findings import Finding, counted, listed, quoted
from kladi.errors import UserError

SUFFIXES = (".csv", ".tsv", ".txt", ".parquet")
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
BLANKS = " \t\r\n\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff" + "".join(
    map(chr, range(0x2000, 0x200C))
)
"""What is trimmed at the ends of a cell: Unicode white space, and the invisible U+200B and U+FEFF."""
CHUNK = 50_000
"""Records that are Python lists at any one time."""
_PARQUET_TO_ARROW = """
import sys
sys.path += sys.argv[2:]
import polars
polars.read_parquet(sys.argv[1], glob=False).write_ipc_stream(sys.stdout.buffer)
"""


@dataclass(frozen=True)
class Cells:
    """The columns of a file as text.

    row: 1-based number of each row among the data rows of the file, blank lines counted.
    columns: name -> text; blank cells are null. Names are trimmed, in NFC, and unique.
    untrimmed: name -> rows whose cell had blanks at its ends or was not in NFC.
    described: "encoding" and "dialect" of text files.
    findings: what was odd about the shape of the table.
    """

    row: pl.Series
    columns: dict[str, pl.Series]
    untrimmed: dict[str, tuple[int, ...]] = field(default_factory=dict)
    described: dict[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def read(path: Path) -> Cells:
    """All cells of a .csv, .tsv or .parquet file.

    Raises:
        UserError: the file cannot be read, has no rows, an undecodable byte or a broken quotation (with the line), or
            two columns of one name.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path} is no manifest; kladi reads .csv, .tsv and .parquet, or a folder")
    try:
        cells = _read_parquet(path) if suffix == ".parquet" else _read_text(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or type(error).__name__})") from error
    if not len(cells.row):
        raise UserError(f"{path} has no rows")
    return cells


def cleaned(column: pl.Series) -> pl.Series:
    """Text trimmed and in NFC; blank text is null."""
    text = column.str.strip_chars(BLANKS)
    if not (text.str.len_bytes() == text.str.len_chars()).all():  # only other than ASCII has a second spelling
        text = text.str.normalize("NFC")
    return text.set(text == "", None)


# --- text ----------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> Cells:
    encoding, lines = _lines(path)
    lines = _without_blank_start(lines)
    first = next(lines, None)
    if first is None:
        raise UserError(f"{path} has no rows")
    delimiter = _delimiter(first, path)
    if first.strip().lower().startswith("sep=") and len(first.strip()) == 5:  # a spreadsheet's own hint
        delimiter, first = first.strip()[4], next(lines, "")
    reader = csv.reader(_chained(first, lines), delimiter=delimiter, strict=True)
    header, records = _header(reader, path), _Records(path)
    pieces = [records.piece(chunk, len(header)) for chunk in _chunks(reader, path)]
    row = pl.concat([_numbers([]), *(piece[0] for piece in pieces)])
    columns = [_joined([piece[1][i] for piece in pieces]) for i in range(len(header))]
    described = {"encoding": encoding, "dialect": DELIMITERS.get(delimiter, quoted(delimiter))}
    return _named(path, row, header, columns, described, records.findings())


def _lines(path: Path) -> tuple[str, Iterator[str]]:
    """(name of the encoding, decoded lines with their ends)."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or _is_bare_utf16(head):
        return "UTF-16", io.StringIO(_utf16(path), newline="")
    returns_only = b"\r" in head and b"\n" not in head
    return "UTF-8", _utf8(path, returns_only=returns_only)


def _is_bare_utf16(head: bytes) -> bool:
    """UTF-16 without a mark: every other byte of a header of Latin letters is NUL."""
    return len(head) >= 8 and (not any(head[1:64:2]) or not any(head[0:64:2]))


def _utf8(path: Path, *, returns_only: bool) -> Iterator[str]:
    with path.open("rb") as file:
        lines: Iterable[bytes] = (line + b"\n" for line in file.read().split(b"\r")) if returns_only else file
        for number, line in enumerate(lines, start=1):
            try:
                yield (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f'{path} line {number}: byte 0x{line[error.start]:02x} is no UTF-8; save the file as "CSV UTF-8"'
                ) from error


def _utf16(path: Path) -> str:
    data = path.read_bytes()
    marked = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    encoding = "utf-16" if marked else "utf-16-be" if data[0] == 0 else "utf-16-le"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "replace").count("\n") + 1
        raise UserError(f"{path} line {line}: byte {error.start} of the file is no UTF-16") from error


def _without_blank_start(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if line.strip(BLANKS):
            yield line
            break
    yield from lines


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _delimiter(header: str, path: Path) -> str:
    """The separator that splits the header into most cells; a tie goes to what the suffix says."""
    order = ["\t", ",", ";"] if path.suffix.lower() == ".tsv" else [",", ";", "\t"]
    return max(order, key=lambda d: len(next(csv.reader([header], delimiter=d), [])))


def _header(reader: Iterator[list[str]], path: Path) -> list[str]:
    try:
        return next(reader, [])
    except csv.Error as error:
        raise UserError(f"{path}: the header cannot be read ({error})") from error


def _chunks(reader: Iterator[list[str]], path: Path) -> Iterator[list[list[str]]]:
    """Up to `CHUNK` records at a time."""
    line = 1
    while True:
        try:
            chunk = list(islice(reader, CHUNK))
        except csv.Error as error:
            line = getattr(reader, "line_num", line)
            unclosed = "unexpected end" in str(error) or "field larger" in str(error)
            why = "a quotation mark is opened and never closed" if unclosed else f"broken quotation ({error})"
            raise UserError(f"{path} line {line:,}: {why}") from error
        if not chunk:
            return
        yield chunk


@dataclass
class _Records:
    """Turns records into columns of one width and remembers which were too short, too long or blank."""

    path: Path
    seen: int = 0
    short: list[int] = field(default_factory=list)
    long: list[int] = field(default_factory=list)
    blank: list[int] = field(default_factory=list)

    def piece(self, records: list[list[str]], width: int) -> tuple[pl.Series, list[_Column]]:
        numbers = list(range(self.seen + 1, self.seen + len(records) + 1))
        self.seen += len(records)
        if any(len(record) != width for record in records):
            kept = [(n, self._fitted(n, record, width)) for n, record in zip(numbers, records, strict=True) if record]
            numbers, records = [n for n, _ in kept], [record for _, record in kept]
        columns = list(zip(*records, strict=True)) or [()] * width
        row = _numbers(numbers)
        return row, _clean([_text(column) for column in columns], row)

    def _fitted(self, number: int, record: list[str], width: int) -> list[str]:
        if len(record) < width:
            self.short.append(number)
            return record + [""] * (width - len(record))
        if any(cell.strip(BLANKS) for cell in record[width:]):  # a mere comma at the end shifts nothing
            self.long.append(number)
        return record[:width]

    def findings(self) -> list[Finding]:
        found = []
        if self.long:
            what = f"{counted(len(self.long), 'row')} with more cells than the header has columns"
            what = f"{what}; put a cell that holds a separator in quotation marks"
            found.append(Finding("M8", "error", what, tuple(self.long)))
        if self.short:
            what = f"{counted(len(self.short), 'row')} with fewer cells than the header has columns; the rest is blank"
            found.append(Finding("M8", "warning", what, tuple(self.short)))
        return found


def _text(values: Iterable[str | None]) -> pl.Series:
    return pl.Series(values, dtype=pl.String)


def _numbers(values: Iterable[int]) -> pl.Series:
    return pl.Series("row", values, dtype=pl.Int64)


@dataclass(frozen=True)
class _Column:
    """Clean cells, and the rows in which cleaning changed something."""

    cells: pl.Series
    changed: pl.Series


def _clean(columns: Sequence[pl.Series], row: pl.Series) -> list[_Column]:
    """One pass over the cells of all columns, of which a table may have thousands."""
    n = len(row)
    if not columns or not n:
        return [_Column(_text([]), row)] * len(columns)
    raw = pl.concat(columns)
    cells = cleaned(raw)
    differs = (raw != cells).fill_null(value=False)
    any_does = bool(differs.any())
    return [
        _Column(cells.slice(start, n), row.filter(differs.slice(start, n)) if any_does else row.clear())
        for start in range(0, n * len(columns), n)
    ]


def _joined(pieces: list[_Column]) -> _Column:
    cells = pl.concat([_text([]), *(piece.cells for piece in pieces)])
    return _Column(cells, pl.concat([_numbers([]), *(piece.changed for piece in pieces)]))


# --- parquet -------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Cells:
    with path.open("rb") as file:  # the reason of the system, where there is one
        lead = file.read(4)
    if lead != b"PAR1":
        raise UserError(f"{path} is no parquet file")
    try:
        table = pl.read_ipc_stream(io.BytesIO(_parquet_as_arrow(path)))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, subprocess.CalledProcessError) as error:
        raise UserError(f"{path} is a damaged parquet file") from error
    readable = [c for c in table.get_columns() if _is_text_like(c)]
    other = [quoted(c.name) for c in table.get_columns() if not _is_text_like(c)]
    found = [Finding("M8", "warning", f"columns of bytes or records are not read: {listed(other)}")] if other else []
    row = _numbers(range(1, table.height + 1))
    columns = _clean([_as_text(c).alias("") for c in readable], row)
    return _named(path, row, [c.name for c in readable], columns, {}, found)


def _parquet_as_arrow(path: Path) -> bytes:
    """The table of a parquet file as an arrow stream, read by a child process: on some damaged bytes the reader does
    not raise but ends its process, or asks for memory without end.

    Raises:
        subprocess.CalledProcessError: the file is damaged.
    """
    command = [sys.executable, "-P", "-c", _PARQUET_TO_ARROW, str(path), *sys.path]
    child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)  # noqa: S603 - our own code
    return child.stdout


def _is_text_like(column: pl.Series) -> bool:
    inner = getattr(column.dtype, "inner", column.dtype)
    return not (inner.is_nested() or inner in (pl.Binary, pl.Object))


def _as_text(column: pl.Series) -> pl.Series:
    """Numbers, dates and categories as they print; several values as a JSON list."""
    if column.dtype.is_nested():
        values = (
            None if value is None else json.dumps(list(value), ensure_ascii=False, default=str) for value in column
        )
        return _text(values)
    return column.cast(pl.String)


# --- names ---------------------------------------------------------------------------------------------------------


def _named(
    path: Path,
    row: pl.Series,
    header: list[str],
    columns: list[_Column],
    described: dict[str, str],
    found: list[Finding],
) -> Cells:
    """Drop blank rows, and give each column its name."""
    names = cleaned(_text(header)).to_list()
    kept: dict[str, pl.Series] = {}
    untrimmed: dict[str, tuple[int, ...]] = {}
    nameless = 0
    for name, column in zip(names, columns, strict=True):
        if name is None:
            nameless += column.cells.null_count() < len(column.cells)
            continue
        if name in kept:
            raise UserError(f"{path} has two columns {quoted(name)}; rename or remove one")
        kept[name] = column.cells
        if len(column.changed):
            untrimmed[name] = tuple(column.changed.to_list())
    if nameless:
        what = f"{counted(nameless, 'column')} without a name {'is' if nameless == 1 else 'are'} not read"
        found.append(Finding("M8", "warning", what))
    return _without_blank_rows(row, kept, untrimmed, described, found)


def _without_blank_rows(
    row: pl.Series,
    columns: dict[str, pl.Series],
    untrimmed: dict[str, tuple[int, ...]],
    described: dict[str, str],
    found: list[Finding],
) -> Cells:
    if not columns:
        return Cells(row.clear(), {}, {}, described, tuple(found))
    blank = (
        pl.DataFrame(list(columns.values()), schema=list(columns))
        .select(pl.all_horizontal(pl.all().is_null()))
        .to_series()
    )
    if blank.any():
        rows = tuple(row.filter(blank).to_list())
        found.append(
            Finding(
                "M8", "warning", f"{counted(len(rows), 'blank row')} {'is' if len(rows) == 1 else 'are'} not read", rows
            )
        )
        row, columns = row.filter(~blank), {name: column.filter(~blank) for name, column in columns.items()}
    return Cells(row, columns, untrimmed, described, tuple(found))

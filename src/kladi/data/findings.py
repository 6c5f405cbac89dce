"""What was found out about the data, one value a fault: listed all at once instead of raised one by one.

A message may be kept and printed, so it holds no path, and every text in it that came from the data went through
`quoted`: what is invisible, moves the cursor or turns the direction of writing is shown as an escape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Severity = Literal["error", "warning", "left out", "skipped"]
SHOWN = 20
"""Faults of one kind that are listed one by one; the rest is counted."""
LONGEST = 80
"""Characters of a text from the data that a message repeats."""


@dataclass(frozen=True)
class Finding:
    """One kind of fault and the rows that have it.

    code: row of the fault list, e.g. "M16".
    severity: "error" refuses the data, "left out" names rows that are not used, "skipped" files that are no images by
        design, "warning" changes nothing.
    message: what, and what mends it; no path, because findings may be kept.
    rows: 1-based manifest rows; empty where the fault has no row.
    """

    code: str
    severity: Severity
    message: str
    rows: tuple[int, ...] = ()


def line(finding: Finding, shown: int = 5) -> str:
    """The finding as one line: the message, then the first `shown` rows and the count of the rest.

    >>> line(Finding("I1", "left out", "empty file", (3, 9)))
    'empty file: rows 3, 9'
    """
    if not finding.rows:
        return finding.message
    rows = ", ".join(f"{row:,}" for row in finding.rows[:shown])
    more = len(finding.rows) - shown
    word = "row" if len(finding.rows) == 1 else "rows"
    return f"{finding.message}: {word} {rows}" + (f" and {more:,} more" if more > 0 else "")


def counted(number: int, word: str, plural: str = "") -> str:
    """`1 row`, `12,480 rows`.

    >>> counted(2, "patient"), counted(1, "entry", "entries")
    ('2 patients', '1 entry')
    """
    return f"{number:,} {word if number == 1 else plural or word + 's'}"


def listed(words: Sequence[str], shown: int = 3) -> str:
    """The first `shown` words, and the count of the rest.

    >>> listed(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    more = len(words) - shown
    return ", ".join(words[:shown]) + (f" and {more:,} more" if more > 0 else "")


def quoted(text: str) -> str:
    """A text of the data in quotation marks, harmless on a console: one line, nothing invisible, at most 80 characters.

    >>> quoted("US/breast"), quoted("a\\x1b[31mb")
    ('"US/breast"', '"a\\\\x1b[31mb"')
    """
    cut = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return f'"{visible(cut)}"'


def visible(text: str) -> str:
    """`text` with every control, format (bidi, zero width), surrogate, private and unassigned character escaped.

    Square brackets stay: the console is used with markup off, and an escape that is shown would be a wrong label.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if _is_hidden(c) else c for c in text)


def _is_hidden(character: str) -> bool:
    # Control, format, surrogate, private, unassigned; separators of lines; blanks that look like a space and are none.
    return not character.isprintable()


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that say the same, e.g. of a header that was read twice, as one; in order of first appearance."""
    place: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        key = (finding.severity, finding.message)
        before = place.get(key)
        rows = finding.rows if before is None else tuple(dict.fromkeys((*before.rows, *finding.rows)))
        place[key] = replace(before or finding, rows=rows)
    return list(place.values())

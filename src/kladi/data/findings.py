"""What was found out about the data, one value a fault: listed all at once instead of raised one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "left out", "skipped"]


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

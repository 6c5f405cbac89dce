"""What a command prints: results to stdout, messages to stderr; names of the user's never become markup."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

from kladi import __version__

WIDTH = 11
"""Columns of the first word of a line, as in `images     12,430 readable`."""


def _console() -> Console:
    return Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)


def head(verb: str, what: str, more: str) -> None:
    """The first line: version, verb, and what it is asked of."""
    _console().out(f"kladi {__version__}  {verb}  {what}  ({more})", highlight=False)


def line(name: str, text: str, width: int = WIDTH) -> None:
    """A result, headed by its name."""
    _console().out(f"{name:<{width}}{'' if len(name) < width else ' '}{text}".rstrip(), highlight=False)


def warnings(inspection: Any) -> None:
    """Warnings and left-out files on stderr, where messages go."""
    from kladi.data import summary

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    found = [f for f in inspection.findings if f.severity != "error"]
    for name, text in summary.finding_lines(found, inspection.manifest):
        console.out(f"{name:<{WIDTH}}{text}", highlight=False)


def message(text: str) -> None:
    """Progress on stderr, where messages go."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).out(text, highlight=False)


def shown(value: Any) -> str:
    """A value of the settings; a list without brackets."""
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)

"""Opening a file that anybody may have named: a regular one, or a reason in words."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from kladi.data.pixels.frame import Unreadable


def open_file(path: str | Path) -> io.BufferedReader:
    """A regular file, for reading; a pipe or a device would never end.

    Raises:
        Unreadable: missing, no regular file, or not allowed.
    """
    try:
        file = Path(_long(path))
        if not stat.S_ISREG(file.stat().st_mode):
            raise Unreadable("is no regular file", "M7")
        return file.open("rb")
    except FileNotFoundError as error:
        raise Unreadable("is missing", "M5") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        why = error.strerror if isinstance(error, OSError) else None
        raise Unreadable(f"cannot be read ({why or type(error).__name__})", "I14") from error


def _long(path: str | Path) -> str:
    """The path as the operating system takes it; Windows wants a prefix from 260 characters on."""
    text = str(path)
    if os.name == "nt" and len(text) > 240 and not text.startswith("\\\\?\\"):
        return "\\\\?\\" + str(Path(text).resolve())
    return text

"""The two ways a run ends early, and the help that goes with each.

`UserError` is a mistake in arguments, configuration, manifest or taxonomy: one line that says what, where, and the
closest valid word; the command line exits with 2. `RunStopped` is a cause outside the command line (disk, memory, a
NaN): exit 1, and the message names the last good checkpoint. Neither ever reaches a user as a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's. `str(error)` is what they read: what, where, and what mends it."""


class RunStopped(RuntimeError):
    """A run that cannot go on for a reason that is no mistake in its arguments."""


def closest(word: str, options: Iterable[str], count: int = 1) -> list[str]:
    """The `count` options most like `word`, best first; always at least one where there is any option.

    Args:
        word: what the user wrote.
        options: the words that would have been valid.
        count: how many to return at most.

    >>> closest("epoch", ["epochs", "batch"])
    ['epochs']
    """
    words = sorted(set(options))
    folded = {w.casefold(): w for w in words}
    near = difflib.get_close_matches(word.casefold(), folded, n=count, cutoff=0.0)
    return [folded[n] for n in near]


def suggestion(word: str, options: Iterable[str]) -> str:
    """`; closest: "x"`, to end a message with; empty where there is nothing to suggest."""
    near = closest(word, options)
    return f'; closest: "{near[0]}"' if near else ""

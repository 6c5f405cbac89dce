"""`objective.args` of TOML and of the command line -> the keyword arguments of a preset's function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from kladi.errors import UserError, suggestion


def fitting(preset: Callable[..., Any], args: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arguments as the signature wants them.

    Raises:
        UserError: no such argument, or a value of another kind; the closest word is named.
    """
    known = {k: p for k, p in inspect.signature(preset).parameters.items() if p.kind is p.KEYWORD_ONLY}
    given = dict(args)
    for key, value in given.items():
        if key not in known:
            near = suggestion(key, known) if known else "; it takes none"
            raise UserError(f"--objective.args.{key} is no argument of {name}{near}")
        given[key] = _fitting(value, str(known[key].annotation), f"--objective.args.{key}")
    return given


KINDS: dict[str, tuple[type, str]] = {
    "float": (float, "a number"),
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "str": (str, "text"),
    "list[float]": (list, "a list of numbers"),
    "dict[str, float]": (dict, "a table of numbers, for example { modality = 2.0 }"),
    "dict[str, int]": (dict, "a table of whole numbers, for example { name = 2 }"),
}


def _fitting(value: Any, annotation: str, what: str) -> Any:
    """A value of TOML or of the command line as the parameter wants it; whole numbers are numbers."""
    kinds = [kind for kind in annotation.split(" | ") if kind != "None"]
    for kind in kinds:
        if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        wanted, _ = KINDS[kind]
        if isinstance(value, wanted) and isinstance(value, bool) == (kind == "bool"):
            inner = kind.removesuffix("]").rpartition(", ")[2]
            return {n: _fitting(v, inner, f"{what}.{n}") for n, v in value.items()} if wanted is dict else value
    raise UserError(f'{what} = "{value}" is not {" or ".join(KINDS[kind][1] for kind in kinds)}')

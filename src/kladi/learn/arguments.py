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


def _fitting(value: Any, annotation: str, what: str) -> Any:
    """A value of TOML or of the command line as the parameter wants it; whole numbers are numbers."""
    kind = annotation.split(" | ")[0]
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    kinds: dict[str, tuple[type, str]] = {
        "float": (type(None), "a number"),
        "bool": (bool, "true or false"),
        "int": (int, "a whole number"),
        "str": (str, "text"),
        "list[float]": (list, "a list of numbers"),
        "dict[str, float]": (dict, "a table, for example { modality = 2.0 }"),
    }
    wanted, words = kinds[kind]
    if not isinstance(value, wanted) or (kind == "int" and isinstance(value, bool)):
        raise UserError(f'{what} = "{value}" is not {words}')
    if isinstance(value, dict):
        return {name: _fitting(inner, "float", f"{what}.{name}") for name, inner in value.items()}
    return value

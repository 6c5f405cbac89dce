"""Every choice of a run as frozen values: TOML in, dotted overrides on top, the resolved file written back.

A key that does not exist is an error that names the closest key. `args` of `encoder` and `objective` are passed to the
function of that name and checked against its signature there, so adding a loss needs no change here.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kladi.errors import UserError, closest, suggestion
from kladi.sections import RANGES, Augment, Config, Data, Encoder, Evaluate, Init, Intensity, Objective, Topology, Train

__all__ = [
    "Augment",
    "Config",
    "Data",
    "Encoder",
    "Evaluate",
    "Init",
    "Intensity",
    "Objective",
    "Topology",
    "Train",
    "filled",
    "from_dict",
    "keys",
    "meanings",
    "override",
    "read",
    "read_toml",
    "to_dict",
    "to_toml",
]


_BARE = re.compile(r"[A-Za-z0-9_-]+")
T = typing.TypeVar("T", bound=Any)
Ranges = Mapping[str, tuple[float | int, float | int]]
"""Key -> least and most."""


def read(path: Path) -> Config:
    """The configuration in a TOML file; keys that are absent keep their defaults.

    Raises:
        UserError: the file is missing or no TOML, or a key or value in it is impossible.
    """
    return override(Config(), _flatten(read_toml(path)), where=str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UserError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a TOML file ({error})") from error


def override(config: Config, values: Mapping[str, Any], where: str = "") -> Config:
    """`config` with dotted keys replaced, e.g. `{"train.epochs": 50}`; text is read as the key's own type.

    Raises:
        UserError: a key that does not exist (names the closest), or a value of the wrong kind.
    """
    for key, value in values.items():
        config = _replaced(config, key, value, where)
    pipeline = config.intensity
    if pipeline.low >= pipeline.high:
        raise UserError(f"intensity.low {pipeline.low:g} is not below intensity.high {pipeline.high:g}")
    for name, values_of in (("mean", pipeline.mean), ("std", pipeline.std)):
        if len(values_of) not in {1, pipeline.channels}:
            raise UserError(f"intensity.{name} has {len(values_of)} values for {pipeline.channels} channels")
    return config


def keys() -> list[str]:
    """Every dotted key that a file or an override may set."""
    return [
        f"{section.name}.{key.name}"
        for section in dataclasses.fields(Config)
        for key in dataclasses.fields(_section_type(section.name))
    ]


def meanings() -> dict[str, tuple[str, str]]:
    """Every dotted key -> its default as TOML, and what it means in one line: the text below it in `sections`."""
    found = {}
    for section in dataclasses.fields(Config):
        kind = _section_type(section.name)
        (body,) = (node.body for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef))
        said = {}
        for key, below in itertools.pairwise(body):
            if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name) and isinstance(below, ast.Expr):
                said[key.target.id] = " ".join(ast.literal_eval(below.value).split())
        default = to_dict(Config())[section.name]
        for name, value in default.items():
            found[f"{section.name}.{name}"] = (_toml_value(value), said[name])
    return found


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain dictionaries, lists and numbers; `override(Config(), flattened)` gives the same configuration."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(tables: Mapping[str, Mapping[str, Any]]) -> Config:
    """The inverse of `to_dict`."""
    return override(Config(), _flatten(tables))


def to_toml(config: Config, reasons: Mapping[str, str] | None = None) -> str:
    """The configuration as TOML, each key followed by its reason where one is given."""
    reasons = reasons or {}
    lines = []
    for section, table in to_dict(config).items():
        lines.append(f"[{section}]")
        for key, value in table.items():
            reason = reasons.get(f"{section}.{key}")
            lines.append(f"{key} = {_toml_value(value)}" + (f"  # {reason}" if reason else ""))
        lines.append("")
    return "\n".join(lines)


def _flatten(tables: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for section, table in tables.items():
        if not isinstance(table, Mapping):
            flat[section] = table
            continue
        for key, value in table.items():
            flat[f"{section}.{key}"] = value
    return flat


def _section_type(section: str) -> type:
    return typing.get_type_hints(Config)[section]


def _replaced(config: Config, key: str, value: Any, where: str) -> Config:
    section, _, rest = key.partition(".")
    name, _, argument = rest.partition(".")
    prefix = f"{where}: " if where else "--"
    sections = {f.name for f in dataclasses.fields(Config)}
    if section not in sections or name not in {f.name for f in dataclasses.fields(_section_type(section))}:
        near = closest(key, keys())[0]
        raise UserError(f"{prefix}{key} is not a key; closest: {'' if where else '--'}{near}")
    table = getattr(config, section)
    if argument:  # objective.args.alpha = 0.3
        old = getattr(table, name)
        if not isinstance(old, dict):
            raise UserError(f"{prefix}{key} is not a key; closest: {'' if where else '--'}{section}.{name}")
        inner, _, below = argument.partition(".")
        if name == "args" and below:  # objective.args.weights.modality = 2.0
            kept = old.get(inner)
            value = {**old, inner: {**(kept if isinstance(kept, dict) else {}), below: _scalar(value)}}
        else:
            value = {**old, argument: _scalar(value)}
    else:
        value = _coerced(value, typing.get_type_hints(type(table))[name], f"{prefix}{key}")
        _check_range(key, value, prefix)
    return dataclasses.replace(config, **{section: dataclasses.replace(table, **{name: value})})


def require_topology(config: Config, asked: Iterable[str] = ()) -> None:
    """Refuse settings of topology that have no say, or contradict each other.

    Args:
        asked: keys that somebody gave: without `topology.on` they would be passed over in silence.

    Raises:
        UserError: names the key, and what it takes.
    """
    topology, size = config.topology, config.intensity.size
    idle = [key for key in asked if key.startswith("topology.") and key != "topology.on"]
    if not topology.on and idle:
        raise UserError(f"--{idle[0]} has no say without --topology.on true")
    if not topology.on:
        return
    if (topology.sees, topology.diagrams) == ("diagram", "none"):
        raise UserError("--topology.diagrams none: an encoder with --topology.sees diagram would see nothing at all")
    if topology.sees == "image" and topology.diagrams != "own":
        raise UserError(f"--topology.diagrams {topology.diagrams} has no say with --topology.sees image")
    if topology.side > size:
        raise UserError(f"--topology.side {topology.side}: an image of --intensity.size {size} has no more than {size}")


def filled(section: T, table: Mapping[str, Any], prefix: str, ranges: Ranges) -> T:
    """A frozen dataclass with the keys of a table, each read as its own type and held to its range.

    Args:
        section: its values stay where the table is silent.
        table: keys are field names.
        prefix: of a key, in messages.
        ranges: field -> least and most.

    Raises:
        UserError: a key that does not exist (names the closest), or a value that is impossible.
    """
    kinds = typing.get_type_hints(type(section))
    read = {}
    for key, value in table.items():
        if key not in kinds:
            raise UserError(f"{prefix}{key} is not a key" + suggestion(key, kinds))
        read[key] = _coerced(value, kinds[key], f"{prefix}{key}")
        _check_range(key, read[key], prefix, ranges)
    return dataclasses.replace(section, **read)


def _check_range(key: str, value: Any, prefix: str, ranges: Ranges = RANGES) -> None:
    least, most = ranges.get(key, (-math.inf, math.inf))
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{prefix}{key} {number:g}: takes a finite number")
        if isinstance(number, int | float) and not least <= number <= most:
            raise UserError(f"{prefix}{key} {number:g}: takes {least:g} to {most:g}")


def _scalar(value: Any) -> Any:
    """Text of the command line as the TOML value it looks like, `1,2` as a list; what looks like none stays text."""
    if not isinstance(value, str):
        return value
    for text in (value, f"[{value}]") if "," in value else (value,):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            return tomllib.loads(f"v = {text}")["v"]
    return value


def _coerced(value: Any, kind: Any, what: str) -> Any:
    """`value` as `kind`, where it means that; otherwise a UserError that says what was expected."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in args:
            raise UserError(
                f'{what} = "{value}" is not one of {", ".join(filter(None, args))}; '
                f'closest: "{closest(str(value), args)[0]}"'
            )
        return value
    if origin is tuple:
        parts: list[Any] = [value]
        if isinstance(value, str):
            parts = [p.strip() for p in value.split(",") if p.strip()]
        elif isinstance(value, (list, tuple)):
            parts = list(value)
        if args[-1] is not Ellipsis and len(parts) != len(args):
            raise UserError(f"{what} takes {len(args)} values, not {len(parts)}")
        inner = [args[0]] * len(parts) if args[-1] is Ellipsis else list(args)
        return tuple(_coerced(part, one, what) for part, one in zip(parts, inner, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{what} is a table, not {value!r}; for example {what}.NAME VALUE")
        return dict(value)
    return _number_or_text(value, kind, what)


def _number_or_text(value: Any, kind: type | types.UnionType, what: str) -> Any:
    plain = _scalar(value) if kind is not str else value
    if kind is bool and isinstance(plain, bool):
        return plain
    if kind is int and isinstance(plain, int) and not isinstance(plain, bool):
        return plain
    if kind is float and isinstance(plain, int | float) and not isinstance(plain, bool):
        return float(plain)
    if kind is str and isinstance(plain, str):
        return plain
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise UserError(f'{what} = "{value}" is not {names.get(kind, "valid")}')  # type: ignore[arg-type]


def _toml_key(key: str) -> str:
    """Bare where TOML allows that, else quoted: names of columns hold blanks and dots."""
    return key if _BARE.fullmatch(key) else json.dumps(key, ensure_ascii=False)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)  # TOML's strings, booleans and numbers are JSON's

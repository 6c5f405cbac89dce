"""Every choice of a run as frozen values: TOML in, dotted overrides on top, the resolved file written back.

A key that does not exist is an error that names the closest key. `args` of `encoder` and `objective` are passed to the
function of that name and checked against its signature there, so adding a loss needs no change here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kladi.errors import UserError, closest


@dataclass(frozen=True)
class Data:
    """What is read and how strictly."""

    taxonomy: str = ""
    """Label tree file; empty: the slash paths of the labels are the tree."""
    root: str = ""
    """Node of the label tree file that becomes the implicit root; what is not below it is left out."""
    metadata: tuple[str, ...] = ()
    """Columns (or DICOM attributes) that become label sets."""
    synonyms: str = ""
    """TOML file laid over the shipped synonyms of metadata values."""
    frames: str = "all"
    """Frames of a multi-frame file: all, middle, first, or a number n for every n-th."""
    max_left_out: float = 0.05
    """Share of rows that may be unreadable before the run is refused."""
    held_out: float = 0.3
    """Share of patients kept from pretraining for the evaluation, where the manifest has no column split."""
    max_pixels: int = 178_956_970
    """Files whose header promises more pixels are left out before anything is allocated."""
    nonfinite: typing.Literal["leave_out", "zero"] = "leave_out"
    """What happens to an image with NaN or infinity."""
    drop_blank: bool = False
    """Leave constant images out."""
    allow_outside: bool = False
    """Accept absolute paths and paths that leave the manifest's folder."""
    allow_leak: bool = False
    """Go on although a patient is in two splits; every table is stamped."""
    fold_case: bool = False
    """Merge labels that differ only in case."""
    key: str = ""
    """File with the 32-byte key that patient ids are hashed with; empty: the user's own, made at first use."""
    store: str = ""
    """Folder of the decoded-once store; empty: inside the run."""


@dataclass(frozen=True)
class Intensity:
    """The one written intensity pipeline: file -> [0, 1] -> `size` x `size` -> normalised. Kept with the encoder."""

    size: int = 64
    """Side of the square that the encoder sees, pixels. The longer side of an image fills it; the rest is zero."""
    channels: int = 1
    """1 (grey; colour becomes luminance) or 3 (grey is repeated)."""
    window: typing.Literal["file", "percentile", "fixed"] = "file"
    """DICOM grey levels: the file's own VOI, else percentiles; always percentiles; or `center` and `width`."""
    center: float = 40.0
    width: float = 400.0
    low: float = 0.5
    """Lower percentile."""
    high: float = 99.5
    """Upper percentile."""
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    """Normalisation of the [0, 1] pixels, one value or one a channel."""


@dataclass(frozen=True)
class Augment:
    """Strengths of the training views; zero switches a transform off. Defaults are safe for grey medical images."""

    crop: tuple[float, float] = (0.3, 1.0)
    """Share of the image's area that a view shows, least and most."""
    ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """Width over height of the crop."""
    flip_horizontal: float = 0.0
    """Probability; off where left and right mean something."""
    flip_vertical: float = 0.0
    rotation: float = 10.0
    """Greatest angle, degrees."""
    brightness: float = 0.2
    contrast: float = 0.2
    gamma: float = 0.2
    saturation: float = 0.0
    hue: float = 0.0
    """Greatest shift, turns; must be 0 on one channel."""
    blur: float = 0.2
    """Probability of a Gaussian blur."""
    noise: float = 0.0
    """Standard deviation of additive noise, in units of the [0, 1] range."""


@dataclass(frozen=True)
class Encoder:
    """A timm model by name; `args` go to `timm.create_model`."""

    name: str = "resnet18"
    args: dict[str, Any] = field(default_factory=dict)
    projector: tuple[int, int] = (512, 128)
    """Hidden width and output width of the head that is dropped after pretraining."""


@dataclass(frozen=True)
class Objective:
    """A preset by name (or `my_file:MyLoss`) and its keyword arguments."""

    name: str = "auto"
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Train:
    """The loop."""

    epochs: int = 100
    batch: int = 256
    """Images a step (each seen in two views)."""
    optimizer: typing.Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    """Peak learning rate; linear warm-up, then cosine to zero."""
    weight_decay: float = 0.05
    momentum: float = 0.9
    """SGD only."""
    warmup: float = 0.05
    """Share of all steps."""
    clip: float = 1.0
    """Greatest gradient norm; 0 switches clipping off."""
    seed: int = 0
    workers: int = 1
    """Threads that prepare batches ahead; any number gives the same bits."""
    device: str = "auto"
    precision: str = "32-true"
    deterministic: bool = True
    checkpoint_steps: int = 0
    """Steps between checkpoints; 0: at the end of an epoch, at most once a minute. The end always saves."""
    max_steps: int = 0
    """Stop after this many steps; 0: after the epochs. The schedule does not change."""
    stop_on_collapse: bool = False
    tensorboard: bool = False


@dataclass(frozen=True)
class Init:
    """Where the encoder's weights come from: a local safetensors file or a run folder; empty: random."""

    weights: str = ""


@dataclass(frozen=True)
class Evaluate:
    """The measuring protocol."""

    folds: int = 5
    repeats: int = 2
    seed: int = 0
    use_split: bool = True
    """Use the manifest's own train, val and test where it has them."""
    neighbours: tuple[int, ...] = (1, 5, 10, 20, 50, 100, 200)
    bootstrap: int = 2000


@dataclass(frozen=True)
class Config:
    """The whole of it, a section a table of the TOML file."""

    data: Data = field(default_factory=Data)
    intensity: Intensity = field(default_factory=Intensity)
    augment: Augment = field(default_factory=Augment)
    encoder: Encoder = field(default_factory=Encoder)
    objective: Objective = field(default_factory=Objective)
    train: Train = field(default_factory=Train)
    init: Init = field(default_factory=Init)
    evaluate: Evaluate = field(default_factory=Evaluate)


RANGES: dict[str, tuple[float, float]] = {
    "data.max_left_out": (0, 1),
    "data.held_out": (0, 0.9),
    "data.max_pixels": (64, 2**40),
    "intensity.size": (8, 8192),
    "intensity.width": (1e-6, 1e12),
    "intensity.low": (0, 100),
    "intensity.high": (0, 100),
    "encoder.projector": (1, 2**20),
    "evaluate.folds": (3, 100),
    "evaluate.repeats": (1, 1000),
    "evaluate.bootstrap": (0, 10**6),
    "evaluate.neighbours": (1, 10**6),
}
"""Least and most of numbers that would otherwise be found impossible only after all images were read."""


def read(path: Path) -> Config:
    """The configuration in a TOML file; keys that are absent keep their defaults.

    Raises:
        UserError: the file is missing or no TOML, or a key or value in it is impossible.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a TOML file ({error})") from error
    return override(Config(), _flatten(tables), where=str(path))


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
        value = {**old, argument: _scalar(value)}
    else:
        value = _coerced(value, typing.get_type_hints(type(table))[name], f"{prefix}{key}")
        _check_range(key, value, prefix)
    return dataclasses.replace(config, **{section: dataclasses.replace(table, **{name: value})})


def _check_range(key: str, value: Any, prefix: str) -> None:
    least, most = RANGES.get(key, (-math.inf, math.inf))
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{prefix}{key} {number:g}: takes a finite number")
        if isinstance(number, int | float) and not least <= number <= most:
            raise UserError(f"{prefix}{key} {number:g}: takes {least:g} to {most:g}")


def _scalar(value: Any) -> Any:
    """Text of the command line as the TOML value it looks like; what looks like none stays text."""
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return value


def _coerced(value: Any, kind: Any, what: str) -> Any:
    """`value` as `kind`, where it means that; otherwise a UserError that says what was expected."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in args:
            raise UserError(
                f'{what} = "{value}" is not one of {", ".join(args)}; closest: "{closest(str(value), args)[0]}"'
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
            raise UserError(f"{what} is a table of keyword arguments, for example {what}.temperature 0.2")
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


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)  # TOML's strings, booleans and numbers are JSON's

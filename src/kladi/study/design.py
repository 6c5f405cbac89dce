"""study.toml -> `Study`: what is compared, on what, and by which number, fixed and hashed before anything is measured.

name = "metadata"                      # all paths are relative to this file
data = "manifest.csv"
taxonomy = "taxonomy.csv"
reference = "metadata"                 # every other method is compared with it
primary = "balanced_accuracy"
regimes = ["probe", "finetune"]
folds = 5
repeats = 10
seeds = 3                              # of pretraining; repeat r uses seed r mod 3
controls = ["shuffled_metadata", "shuffled_labels", "random_encoder", "histogram"]

[settings]                             # of every pretraining, any key of a plan
data.metadata = ["modality", "anatomy"]
train.epochs = 50

[methods.metadata]
objective.name = "metadata"
[methods.simclr]
objective.name = "simclr"
[methods.scratch]
objective.name = "none"                # not pretrained: random weights, or those of init.weights

[tasks.breast]                         # one class a node, with all that is below it ...
classes = { benign = ["US/breast/benign"], malignant = ["US/breast/malignant"] }
[tasks.brain]                          # ... or every label below a node ...
below = "MR/brain"
[tasks.device]                         # ... or the values of a column
column = "device"
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kladi import config as settings
from kladi.errors import UserError, suggestion
from kladi.evaluate.measure import REGIMES as FROZEN
from kladi.evaluate.readouts.finetune import Recipe

REGIMES = (*FROZEN, "finetune")
PRIMARIES = ("balanced_accuracy", "auc", "accuracy", "macro_f1")
NOT_PRETRAINED = "none"
PATHS = ("data.taxonomy", "data.synonyms", "data.key", "data.store", "init.weights")
"""Settings that name a file; in a study they are relative to its file."""
_NAME = re.compile(r"\w[\w +.-]{0,59}")
OF_THE_STUDY = ("data", "intensity", "evaluate")
"""Sections that all methods of a study share: other pixels or rows would be another study."""
CONTROLS = (
    "shuffled_metadata",
    "shuffled_metadata_within_site",
    "shuffled_tree",
    "shuffled_labels",
    "matched_temperature",
    "equal_budget",
    "random_encoder",
    "histogram",
)


@dataclass(frozen=True)
class Method:
    """An initialisation as the study names it: settings of its pretraining, on top of the study's own."""

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A downstream task: `classes` (name -> nodes of the tree, each with what is below it), `below` a node, or
    `column`; exactly one of them. All three empty: every label."""

    name: str
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    below: str = ""
    column: str = ""


@dataclass(frozen=True)
class Study:
    """The whole of a study. `config` holds what all methods share."""

    name: str
    data: Path
    config: settings.Config
    methods: tuple[Method, ...]
    questions: tuple[Question, ...]
    reference: str
    primary: str = "balanced_accuracy"
    regimes: tuple[str, ...] = ("probe",)
    folds: int = 5
    repeats: int = 10
    seeds: int = 3
    label_fractions: tuple[float, ...] = (1.0,)
    controls: tuple[str, ...] = ()
    margin: float = 0.01
    seed: int = 0
    bootstrap: int = 2000
    finetune: Recipe = field(default_factory=Recipe)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The regimes that read embeddings."""
        return tuple(regime for regime in self.regimes if regime in FROZEN)

    @property
    def digest(self) -> str:
        """SHA-256 over everything that was decided, without paths: they carry names."""
        content = dataclasses.asdict(self)
        content["data"] = ""
        content["config"] = _pathless(settings.to_dict(self.config))
        content["methods"] = [[m.name, {k: v for k, v in m.settings.items() if k not in PATHS}] for m in self.methods]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=list).encode()).hexdigest()


def read(path: Path) -> Study:
    """The study in a TOML file.

    Raises:
        UserError: the file is missing, no TOML, or says something impossible; the key and the closest word are named.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a TOML file ({error})") from error
    try:
        return from_tables(tables, path.parent)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def from_tables(tables: Mapping[str, Any], folder: Path) -> Study:
    """The study of TOML's tables; paths are relative to `folder`."""
    rest = dict(tables)
    top = _Reader(rest, ("data", "taxonomy", "settings", "methods", "tasks", "finetune", *_plain(Study)), "")
    base = {key: _path(key, value, folder) for key, value in _dotted(top.table("settings")).items()}
    if "taxonomy" in rest:
        base["data.taxonomy"] = str(folder / top.text("taxonomy"))
    config = settings.override(settings.Config(), base)
    methods = tuple(_method(name, table, folder, config) for name, table in top.tables("methods").items())
    questions = tuple(_question(name, table) for name, table in top.tables("tasks").items())
    study = Study(
        name=top.text("name", "study"),
        data=folder / top.text("data"),
        config=config,
        methods=methods,
        questions=questions or (Question("label"),),
        reference=top.text("reference", methods[0].name if methods else ""),
        primary=top.one_of("primary", PRIMARIES),
        regimes=top.some_of("regimes", REGIMES, ("probe",)),
        folds=top.whole("folds", 5, 3),
        repeats=top.whole("repeats", 10, 1),
        seeds=top.whole("seeds", 3, 1),
        label_fractions=top.numbers("label_fractions", (1.0,)),
        controls=top.some_of("controls", CONTROLS, ()),
        margin=top.number("margin", 0.01),
        seed=top.whole("seed", 0, 0),
        bootstrap=top.whole("bootstrap", 2000, 0),
        finetune=_fine_tuning(top.table("finetune")),
    )
    _require_sense(study)
    return study


def _require_sense(study: Study) -> None:
    names = [method.name for method in study.methods]
    for name in [*names, *(question.name for question in study.questions)]:
        if not _NAME.fullmatch(name):
            raise UserError(f"the name {name!r} becomes a file's: letters, digits, blanks and . _ + - only, at most 60")
    if not names:
        raise UserError("[methods.NAME] is missing: a study compares one method at least with its controls")
    if study.reference not in names:
        raise UserError(f'reference = "{study.reference}" is no method' + suggestion(study.reference, names))
    if any(not 0 < fraction <= 1 for fraction in study.label_fractions):
        raise UserError("label_fractions are shares of the training patients, above 0 and up to 1")
    if study.seeds > study.repeats:
        raise UserError(f"seeds = {study.seeds} needs as many repeats; there are {study.repeats}")
    if "finetune" in study.regimes and study.regimes == ("finetune",) and study.controls:
        frozen_only = [c for c in study.controls if c in {"histogram", "shuffled_labels"}]
        if frozen_only:
            raise UserError(f'control "{frozen_only[0]}" needs the regime "probe"')


def _method(name: str, table: Mapping[str, Any], folder: Path, config: settings.Config) -> Method:
    given = {key: _path(key, value, folder) for key, value in _dotted(table).items()}
    for key in given:
        section = key.partition(".")[0]
        if section in OF_THE_STUDY:
            raise UserError(f"methods.{name}: {key} is the same for all methods; put it under [settings]")
    try:
        settings.override(config, given)
    except UserError as error:
        raise UserError(f"methods.{name}: {error}") from None
    return Method(name, given)


def _question(name: str, table: Mapping[str, Any]) -> Question:
    reader = _Reader(dict(table), ("classes", "below", "column"), f"tasks.{name}.")
    given = [key for key in ("classes", "below", "column") if key in table]
    if len(given) != 1:
        raise UserError(f"tasks.{name} takes one of classes, below and column; it has {len(given)}")
    classes = {}
    for label, nodes in reader.table("classes").items():
        words = [nodes] if isinstance(nodes, str) else nodes
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise UserError(f"tasks.{name}.classes.{label} takes a list of nodes")
        classes[label] = tuple(words)
    if "classes" in table and len(classes) < 2:
        raise UserError(f"tasks.{name}.classes has {len(classes)}; a task needs two")
    return Question(name, classes, reader.text("below", ""), reader.text("column", ""))


def _fine_tuning(table: Mapping[str, Any]) -> Recipe:
    reader = _Reader(dict(table), [f.name for f in dataclasses.fields(Recipe)], "finetune.")
    default = Recipe()
    return Recipe(
        steps=reader.whole("steps", default.steps, 1),
        epochs=reader.whole("epochs", default.epochs, 0),
        batch=reader.whole("batch", default.batch, 2),
        encoder_lr=reader.number("encoder_lr", default.encoder_lr),
        head_lr=reader.number("head_lr", default.head_lr),
        scales=reader.numbers("scales", default.scales),
        weight_decay=reader.number("weight_decay", default.weight_decay),
        warmup=reader.number("warmup", default.warmup),
        clip=reader.number("clip", default.clip),
        looks=reader.whole("looks", default.looks, 1),
    )


class _Reader:
    """Typed access to a table, each key checked once; an unknown key is refused with the closest one."""

    def __init__(self, table: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
        self.content, self.prefix = table, prefix
        for key in table:
            if key not in known:
                raise UserError(f"{prefix}{key} is no key of a study{suggestion(key, known)}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.content.get(key, default)
        if value is None:
            raise UserError(f"{self.prefix}{key} is missing")
        if not isinstance(value, str):
            raise UserError(f"{self.prefix}{key} = {value} is no text")
        return value

    def one_of(self, key: str, options: Sequence[str]) -> str:
        value = self.text(key, options[0])
        if value not in options:
            raise UserError(
                f'{self.prefix}{key} = "{value}" is not one of {", ".join(options)}{suggestion(value, options)}'
            )
        return value

    def some_of(self, key: str, options: Sequence[str], default: tuple[str, ...]) -> tuple[str, ...]:
        values = self.content.get(key, list(default))
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise UserError(f"{self.prefix}{key} takes a list of {', '.join(options)}")
        for value in values:
            if value not in options:
                raise UserError(
                    f'{self.prefix}{key} has "{value}", not one of {", ".join(options)}{suggestion(value, options)}'
                )
        return tuple(dict.fromkeys(values))

    def whole(self, key: str, default: int, least: int) -> int:
        value = self.content.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{self.prefix}{key} = {value}: takes a whole number of {least} or more")
        return value

    def number(self, key: str, default: float) -> float:
        return self._number(key, self.content.get(key, default))

    def numbers(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        values = self.content.get(key, list(default))
        if not isinstance(values, list) or not values:
            raise UserError(f"{self.prefix}{key} takes a list of numbers")
        return tuple(self._number(key, value) for value in values)

    def table(self, key: str) -> Mapping[str, Any]:
        value = self.content.get(key, {})
        if not isinstance(value, Mapping):
            raise UserError(f"{self.prefix}{key} is a table: [{self.prefix}{key}]")
        return value

    def tables(self, key: str) -> Mapping[str, Mapping[str, Any]]:
        found = self.table(key)
        for name, value in found.items():
            if not isinstance(value, Mapping):
                raise UserError(f"{key}.{name} is a table: [{key}.{name}]")
        return found

    def _number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise UserError(f"{self.prefix}{key} = {value}: takes a number of 0 or more")
        return float(value)


def _dotted(table: Mapping[str, Any]) -> dict[str, Any]:
    """`{train: {epochs: 5}}` and `{"train.epochs": 5}` as {"train.epochs": 5}; tables deeper down stay tables."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and "." not in key:
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat


def _path(key: str, value: Any, folder: Path) -> Any:
    return str(folder / value) if key in PATHS and isinstance(value, str) and value else value


def _pathless(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {s: {k: v for k, v in table.items() if f"{s}.{k}" not in PATHS} for s, table in tables.items()}


def _plain(kind: type) -> list[str]:
    """Keys of a study that are plain values."""
    special = {"data", "config", "methods", "questions", "finetune"}
    return [f.name for f in dataclasses.fields(kind) if f.name not in special]

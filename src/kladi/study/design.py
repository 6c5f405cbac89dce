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
[methods.tree]                         # by what loss probe and fine-tuning train; of a list, validation rows choose
objective.name = "none"
classify = { loss = "hace", retain = [0.2, 0.5, 0.7] }
[methods.longer]                       # begins with the encoder that another method, named above it, has trained;
after = "simclr"                       # with objective.name = "none" it is that encoder, or a part of it
objective.name = "metadata"
[methods.theirs]                       # or embeddings of all these images, as `kladi embed` writes them
embeddings = "theirs/embeddings.npz"

[tasks.breast]                         # one class a node, with all that is below it ...
classes = { benign = ["US/breast/benign"], malignant = ["US/breast/malignant"] }
[tasks.brain]                          # ... or every label below a node ...
below = "MR/brain"
[tasks.device]                         # ... or the values of a column
column = "device"
[tasks.elsewhere]                      # trained on all sites but one, tested on that one; each site in turn
below = "MR/brain"
shift = "site"
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kladi import config as settings
from kladi.data.rows.columns import means
from kladi.errors import UserError, suggestion
from kladi.evaluate.measure import REGIMES as FROZEN
from kladi.evaluate.readouts import criteria
from kladi.evaluate.readouts.criteria import Criterion
from kladi.evaluate.readouts.finetune import Recipe
from kladi.learn.presets import PRESETS

Regime = Literal["head", "probe", "knn", "prototype", "retrieval", "representation", "finetune"]
Primary = Literal["balanced_accuracy", "auc", "accuracy", "macro_f1"]
Control = Literal[
    "shuffled_metadata",
    "shuffled_metadata_within_site",
    "shuffled_tables",
    "shuffled_tree",
    "shuffled_labels",
    "matched_temperature",
    "equal_budget",
    "random_encoder",
    "histogram",
]
Compat = Literal["", "paper", "released"]
NOT_PRETRAINED = "none"
FILES = ("taxonomy", "synonyms", "metadata_trees", "tables", "key", "store")
PATHS = ("init.weights", *(f"data.{name}" for name in FILES))
"""Settings that name a file; in a study they are relative to its file."""
_NAME = re.compile(r"\w[\w +.-]{0,59}")
OF_THE_STUDY = ("data", "intensity", "evaluate")
"""Sections that all methods of a study share: other pixels or rows would be another study."""
RANGES: dict[str, tuple[float, float]] = {
    "folds": (3, 100),
    "repeats": (1, 1000),
    "seeds": (1, 1000),
    "trained_folds": (0, 100),
    "label_fractions": (1e-9, 1),
    "margin": (0, 1),
    "seed": (0, 2**31),
    "bootstrap": (0, 10**6),
}
RECIPE_RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, 10**9),
    "epochs": (0, 10**6),
    "batch": (2, 10**6),
    "encoder_lr": (0, 1e6),
    "head_lr": (0, 1e6),
    "scales": (0, 1e6),
    "weight_decay": (0, 1e6),
    "warmup": (0, 1),
    "clip": (1e-12, 1e12),
    "looks": (1, 10**6),
}


@dataclass(frozen=True)
class Method:
    """An initialisation as the study names it: settings of its pretraining, on top of the study's own, and by what loss
    its classifiers are trained. embeddings: a file of `kladi embed` in the place of an encoder, "" for none. after: the
    method whose encoder of the same seed its pretraining begins with, "" for none."""

    name: str
    settings: Mapping[str, Any]
    classify: Criterion = field(default_factory=Criterion)
    embeddings: str = ""
    after: str = ""


@dataclass(frozen=True)
class Question:
    """A downstream task: `classes` (name -> nodes of the tree, each with what is below it), `below` a node, or
    `column`; exactly one of them. All three empty: every label.

    shift: a column; each of its values is tested by what was trained on the others. "": folds by patient.
    """

    name: str
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    below: str = ""
    column: str = ""
    shift: str = ""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The plain keys of the file: what is decided before anything is measured."""

    name: str = "study"
    reference: str = ""
    """The method that every other line is compared with; the first one where it is not said."""
    primary: Primary = "balanced_accuracy"
    regimes: tuple[Regime, ...] = ("probe",)
    folds: int = 5
    repeats: int = 10
    seeds: int = 3
    """Of pretraining; repeat r uses seed r mod seeds."""
    trained_folds: int = 0
    """Of each repeat, how many folds are fine-tuned, which costs most; 0: all."""
    label_fractions: tuple[float, ...] = (1.0,)
    """Shares of the labelled training patients; 1 is always among them."""
    controls: tuple[Control, ...] = ()
    controls_of: tuple[str, ...] = ()
    """Methods that shuffles and temperatures are added under; empty: all that have something to shuffle."""
    margin: float = 0.01
    compat: Compat = ""
    """Fine-tuning and probe as the metadata paper has them ("paper"), or its scripts ("released"), instead of ours."""
    seed: int = 0
    bootstrap: int = 2000


@dataclass(frozen=True, kw_only=True)
class Study(Terms):
    """The whole of a study. `config` holds what all methods share."""

    data: Path
    config: settings.Config
    methods: tuple[Method, ...]
    questions: tuple[Question, ...]
    finetune: Recipe = field(default_factory=Recipe)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The regimes that read embeddings."""
        return tuple(r for r in self.regimes if r in FROZEN and r not in self.trained)

    @property
    def trained(self) -> tuple[str, ...]:
        """The regimes that train by themselves, fold by fold; the published probe is one of them."""
        return tuple(r for r in self.regimes if r == "finetune" or (self.compat and r == "probe"))

    @property
    def digest(self) -> str:
        """SHA-256 over everything that was decided, without paths: they carry names."""
        content = dataclasses.asdict(self)
        content["data"] = ""
        content["config"] = _pathless(settings.to_dict(self.config))
        content["methods"] = [
            [m.name, {k: v for k, v in m.settings.items() if k not in PATHS}, dataclasses.asdict(m.classify)]
            for m in self.methods
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=list).encode()).hexdigest()


def read(path: Path) -> Study:
    """The study in a TOML file.

    Raises:
        UserError: the file is missing, no TOML, or says something impossible; the key and the closest word are named.
    """
    tables = settings.read_toml(path)
    try:
        return from_tables(tables, path.parent)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def from_tables(tables: Mapping[str, Any], folder: Path) -> Study:
    """The study of TOML's tables; paths are relative to `folder`."""
    parts = {key: _table(tables, key) for key in ("settings", "methods", "tasks", "finetune")}
    files = {key: _text(tables, key) for key in ("data", "taxonomy") if key in tables}
    if not files.get("data"):
        raise UserError("data is missing: the manifest or folder that the study reads")
    plain = {key: value for key, value in tables.items() if key not in parts and key not in files}
    known = [f.name for f in dataclasses.fields(Terms)]
    for key in plain:
        if key not in known:
            raise UserError(f"{key} is no key of a study{suggestion(key, [*known, *parts, 'data', 'taxonomy'])}")
    terms = settings.filled(Terms(), plain, "", RANGES)
    base = {key: _path(key, value, folder) for key, value in _dotted(parts["settings"]).items()}
    if "taxonomy" in files:
        base["data.taxonomy"] = str(folder / files["taxonomy"])
    config = settings.override(settings.Config(), base)
    methods = tuple(_method(name, _table(parts["methods"], name), folder, config) for name in parts["methods"])
    questions = tuple(_question(name, _table(parts["tasks"], name)) for name in parts["tasks"])
    decided: dict[str, Any] = {
        **vars(terms),
        "reference": terms.reference or (methods[0].name if methods else ""),
        "regimes": tuple(dict.fromkeys(terms.regimes)),
        "controls": tuple(dict.fromkeys(terms.controls)),
        # Comparisons rest on all labels, and a share that is named twice is one share.
        "label_fractions": tuple(sorted({1.0, *terms.label_fractions}, reverse=True)),
    }
    study = Study(
        **decided,
        data=folder / files["data"],
        config=config,
        methods=methods,
        questions=questions or (Question("label"),),
        finetune=settings.filled(Recipe(), parts["finetune"], "finetune.", RECIPE_RANGES),
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
    for name in study.controls_of:
        if name not in names:
            raise UserError(f'controls_of = "{name}" is no method' + suggestion(name, names))
    for number, one in enumerate(study.methods):
        if one.after and one.after not in names[:number]:
            raise UserError(
                f'methods.{one.name}: after = "{one.after}" is no method above it'
                + suggestion(one.after, names[:number])
            )
    for name in study.config.data.metadata:
        if means(name, "label"):
            raise UserError(f'data.metadata names "{name}", the label: its methods would be counted as reading none')
    if not study.regimes:
        raise UserError("regimes names nothing to measure by; probe is the usual one")
    if not study.finetune.scales:
        raise UserError("finetune.scales is empty; [1.0] trains at the learning rates as they are")
    if study.seeds > study.repeats:
        raise UserError(f"seeds = {study.seeds} needs as many repeats; there are {study.repeats}")
    embedded = next((method.name for method in study.methods if method.embeddings), None)
    if embedded and not study.frozen:
        raise UserError(f'methods.{embedded}: embeddings cannot be fine-tuned; they need a regime such as "probe"')
    if not study.frozen:
        frozen_only = [c for c in study.controls if c in {"histogram", "shuffled_labels"}]
        without = ", without compat" if study.compat else ""
        if frozen_only:
            raise UserError(f'control "{frozen_only[0]}" needs the regime "probe"{without}')
        if len(study.label_fractions) > 1:
            raise UserError(f'label_fractions needs the regime "probe"{without}')
    classifiers = {"probe", "knn", "prototype"} & set(study.frozen)
    if "shuffled_labels" in study.controls and not classifiers:
        raise UserError('control "shuffled_labels" needs a regime that classifies: probe, knn or prototype')
    trees = [method.name for method in study.methods if not method.classify.plain]
    if study.compat and trees:
        raise UserError(f'methods.{trees[0]}.classify has no say under compat = "{study.compat}", whose loss is fixed')
    if study.compat and study.finetune != Recipe():
        raise UserError(f'[finetune] has no say under compat = "{study.compat}", whose recipe is fixed')


def _method(name: str, table: Mapping[str, Any], folder: Path, config: settings.Config) -> Method:
    table = dict(table)
    classify = Criterion()
    if "classify" in table:
        if not isinstance(table["classify"], Mapping):
            raise UserError(f'methods.{name}.classify is a table: {{ loss = "hace", retain = [0.5, 0.7] }}')
        classify = criteria.read(table["classify"], f"methods.{name}.classify")
        del table["classify"]
    after = _text(table, "after")
    table.pop("after", None)
    embeddings = _text(table, "embeddings")
    if "embeddings" in table:
        if set(table) != {"embeddings"}:
            raise UserError(f"methods.{name}: embeddings are what they are; no other setting has a say")
        return Method(name, {"objective.name": NOT_PRETRAINED}, classify, str(folder / embeddings))
    given = {key: _path(key, value, folder) for key, value in _dotted(table).items()}
    for key in given:
        section = key.partition(".")[0]
        if section in OF_THE_STUDY:
            raise UserError(f"methods.{name}: {key} is the same for all methods; put it under [settings]")
    try:
        method = settings.override(config, given)
        settings.require_topology(method, given)
    except UserError as error:
        raise UserError(f"methods.{name}: {error}") from None
    if method.train.devices * method.train.nodes > 1:
        raise UserError(
            f"methods.{name}: a study trains each encoder in one process; --workers N trains N side by side"
        )
    objective = method.objective.name
    # Never "auto": controls and the table must know what a method is before the data do.
    options = [*(preset for preset in PRESETS if preset != "auto"), NOT_PRETRAINED]
    if objective == "auto":
        raise UserError(f"methods.{name}: a study names the objective, here or under [settings]; {', '.join(options)}")
    if objective not in options and ":" not in objective:
        raise UserError(
            f'methods.{name}: objective.name = "{objective}" is not one of {", ".join(options)}, nor my_file.py:MyLoss'
            + suggestion(objective, options)
        )
    if after and "init.weights" in given:
        raise UserError(f'methods.{name}: after = "{after}" goes without init.weights')
    return Method(name, given, classify, after=after)


def _question(name: str, table: Mapping[str, Any]) -> Question:
    what = {"classes", "below", "column"}
    keys = ("classes", "below", "column", "shift")
    for key in table:
        if key not in keys:
            raise UserError(f"tasks.{name}.{key} is no key of a task{suggestion(key, keys)}")
    for key, value in table.items():
        if not value:
            raise UserError(f"tasks.{name}.{key} is empty; a task without any key asks for every label")
    if len(table.keys() & what) > 1:
        raise UserError(f"tasks.{name} takes one of classes, below and column; it has {len(table.keys() & what)}")
    shift = _text(table, "shift")
    if "classes" not in table:
        return Question(name, below=_text(table, "below"), column=_text(table, "column"), shift=shift)
    classes = {}
    for label, nodes in _table(table, "classes").items():
        listed = [nodes] if isinstance(nodes, str) else nodes
        if not isinstance(listed, list) or not listed or not all(isinstance(node, str) for node in listed):
            raise UserError(f"tasks.{name}.classes.{label} takes a list of nodes")
        classes[label] = tuple(listed)
    if len(classes) < 2:
        raise UserError(f"tasks.{name}.classes has {len(classes)}; a task needs two")
    return Question(name, classes, shift=shift)


def _table(tables: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = tables.get(key, {})
    if not isinstance(value, Mapping):
        raise UserError(f"{key} is a table: [{key}]")
    return value


def _text(table: Mapping[str, Any], key: str) -> str:
    value = table.get(key, "")
    if not isinstance(value, str):
        raise UserError(f"{key} = {value} is no text")
    return value


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
    if key == "objective.name" and isinstance(value, str) and value.rpartition(":")[0]:  # somebody's own loss
        return str(folder / value)
    if not value or not (key in PATHS or key.startswith("data.metadata_trees.")):
        return value
    if isinstance(value, Mapping):
        return {name: _path(key, inner, folder) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_path(key, inner, folder) for inner in value]
    return str(folder / value) if isinstance(value, str) else value


def _pathless(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {s: {k: v for k, v in table.items() if f"{s}.{k}" not in PATHS} for s, table in tables.items()}

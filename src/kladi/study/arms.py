"""The arms of a study: its methods and the controls that stand under them, each with the settings of its pretraining.

An arm and a seed have a folder `runs/<arm>-<seed>-<digest>`: another setting or other data is another folder, so that
nothing is ever reused for what it is not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Int

from kladi import __version__
from kladi import config as settings
from kladi.data.dataset import TRAIN, Dataset
from kladi.data.embeddings import Embeddings
from kladi.errors import UserError
from kladi.evaluate import baselines
from kladi.evaluate.answers import Task
from kladi.evaluate.controls import shuffled_leaves
from kladi.evaluate.embed import describe, embed
from kladi.evaluate.readouts.criteria import Criterion, judges
from kladi.evaluate.readouts.regimes import OwnAnswers
from kladi.learn import console, run_folder, training
from kladi.learn.fit import fit
from kladi.learn.lineage import Lineage, behind, total
from kladi.models import backbones, fused, heads
from kladi.sections import WITHOUT_LABELS
from kladi.study.design import NOT_PRETRAINED, Study
from kladi.study.questions import over_patients

TEMPERATURES = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Factors of the temperature at which SupCon stands against a weighted loss."""
SITES = ("site", "source")
CLASSIFIERS = ("cross_entropy", "hxe", "soft_labels", "tree_cross_entropy")
"""Objectives that train a classifier along."""
TREES = ("himulcon", "hxe", "label_tree", "soft_labels", "tree_cross_entropy")
"""Objectives that read a tree."""


@dataclass(frozen=True)
class Arm:
    """One line of the comparison.

    config: of its pretraining, the seed apart.
    kind: "pretrained", "given" (weights from a file), "random" (none), "embedded" (embeddings from a file),
        "histogram", or "shuffled_labels" (the reference's embeddings, with training labels that mean nothing).
    shuffled: what pretraining sees dealt out anew: "metadata", "tables", "tree" or nothing.
    control_of: the method whose control it is, "" for none.
    classify: by what loss its classifiers are trained.
    embeddings: the file of an embedded arm.
    after: the arm whose encoder of the same seed its pretraining begins with, or, of a given one, which it reads.
    """

    name: str
    config: settings.Config
    kind: str
    shuffled: str = ""
    control_of: str = ""
    classify: Criterion = field(default_factory=Criterion)
    embeddings: str = ""
    after: Arm | None = None

    @property
    def drawn(self) -> bool:
        """Whether another seed is another encoder."""
        return self.kind in {"pretrained", "random", "shuffled_labels"} or self.after is not None

    @property
    def reads_labels(self) -> bool:
        """Whether its pretraining reads labels, or that before it; a user's own loss is taken to."""
        before = self.after.reads_labels if self.after is not None else bool(self.lineage.objectives - WITHOUT_LABELS)
        return before or (self.kind == "pretrained" and self.config.objective.name not in WITHOUT_LABELS)

    @property
    def lineage(self) -> Lineage:
        """What stands behind weights that its settings name."""
        named = self.config.init.weights if self.kind in {"pretrained", "given"} else ""
        return _behind(named) if named else Lineage()

    def seeded(self, seed: int) -> settings.Config:
        return settings.override(self.config, {"train.seed": seed})

    def digest(self, seed: int, data_digest: str) -> str:
        """Over everything that decides this arm's embeddings."""
        config = self.seeded(seed)
        plugin = config.objective.name.rpartition(":")[0]
        files = [content_digest(Path(file)) for file in (config.init.weights, plugin, self.embeddings) if file]
        said = [__version__, self.kind, self.shuffled, run_folder.config_digest(config), data_digest, *files]
        said += [self.after.digest(seed, data_digest)] if self.after else []
        return hashlib.sha256("\n".join([*said, str(config.train.max_steps)]).encode()).hexdigest()


@lru_cache
def _behind(source: str) -> Lineage:
    """Read once a process."""
    return behind(source)


@lru_cache
def content_digest(file: Path) -> str:
    """SHA-256 of a file, or of the encoder in a run folder; read once a process.

    Raises:
        UserError: it cannot be read.
    """
    try:
        head = file / "head.safetensors"  # of a run with topology a part of the encoder
        files = [file / "model.safetensors", *([head] if head.is_file() else [])] if file.is_dir() else [file]
        return hashlib.sha256(b"".join(one.read_bytes() for one in files)).hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def arms(study: Study) -> tuple[Arm, ...]:
    """Every method, its controls directly under it.

    Raises:
        UserError: a control that no method has a use for, or unequal budgets where `equal_budget` is asked for.
    """
    found: list[Arm] = []
    used: set[str] = set()
    for method in study.methods:
        config = settings.override(study.config, method.settings)
        for key, word in (("diagrams", "another"), ("region", "mask")):
            if study.trained and getattr(config.topology, key) == word:
                raise UserError(f'methods.{method.name}: topology.{key} = "{word}" is measured frozen, not fine-tuned')
        kind = "embedded" if method.embeddings else _kind(config, method.after)
        before = next((arm for arm in found if arm.name == method.after), None)
        if method.after and (before is None or before.kind != "pretrained"):
            raise UserError(f'methods.{method.name}: after = "{method.after}" is not pretrained here')
        arm = Arm(method.name, config, kind, "", "", method.classify, method.embeddings, before)
        found.append(arm)
        for control in study.controls:
            under = _under(arm, control, study)
            used |= {control} if under else set()
            found += under
    if "head" in study.regimes and not any(arm.config.objective.name in CLASSIFIERS for arm in found):
        raise UserError(f'regimes: "head" needs a method that trains a classifier: {", ".join(CLASSIFIERS)}')
    idle = [c for c in study.controls if c not in used | {"equal_budget"}]
    if idle:
        raise UserError(f'control "{idle[0]}" has no use: no method of this study has what it shuffles')
    names = [arm.name for arm in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f'two lines of the study are called "{min(twice)}"')
    if "equal_budget" in study.controls:
        _require_equal_budget(found)
    return tuple(found)


def require_buildable(found: Sequence[Arm], dataset: Dataset) -> None:
    """Build every encoder and objective once, and read foreign weights: a mistake in the last method costs no night.

    Raises:
        UserError: names the method.
    """
    for arm in found:
        if arm.kind == "embedded":
            _aligned(arm, dataset)
        if arm.kind not in {"pretrained", "given"} or arm.shuffled:
            continue
        config = arm.config
        try:
            if arm.kind == "pretrained":
                with backbones.drawn_apart(0):
                    training.begun(dataset, config)
            elif config.init.weights:
                fused.load_weights(fresh(config, seed=0), config.init.weights)
            else:
                fresh(config, seed=0)
        except UserError as error:
            raise UserError(f"methods.{arm.name}: {error}") from None


def require_judges(found: Sequence[Arm], tasks: Mapping[str, Task]) -> None:
    """Build every criterion on every task once.

    Raises:
        UserError: names the method and the task.
    """
    for arm in found:
        for name, task in tasks.items():
            classes = np.unique(task.target[task.target >= 0])
            try:
                list(judges(arm.classify, task.taxonomy, classes))
            except ValueError as error:
                raise UserError(f"methods.{arm.name}.classify on task {name}: {error}") from error


def prepare(arm: Arm, seed: int, dataset: Dataset, folder: Path, device: str, before: Path | None = None) -> Embeddings:
    """The arm's embeddings of all rows: pretrained, embedded and kept in `folder`, or read from there; `before` is the
    finished run that its pretraining begins with."""
    file = folder / "embeddings.npz"
    if file.is_file():
        with _mendable(folder):
            return Embeddings.read(file)
    if arm.kind == "embedded":
        embedded = _aligned(arm, dataset)
    elif arm.kind == "histogram":
        embedded = describe(dataset, baselines.grey_features(dataset, arm.config.intensity))
    else:
        encoder = encoder_of(arm, seed, dataset, folder, before)
        head = heads.load(folder) if arm.kind == "pretrained" else None
        embedded = embed(encoder, dataset, head=head, intensity=arm.config.intensity, device=device)
    embedded.write(file)
    return embedded


def _aligned(arm: Arm, dataset: Dataset) -> Embeddings:
    """Foreign embeddings in the order of the data set's rows, joined by what the images hold."""
    found = Embeddings.read(Path(arm.embeddings))
    rows_of = found.places(dataset.row_id)
    there = rows_of >= 0
    if not there.all():
        rows = ", ".join(f"{row:,}" for row in dataset.manifest_row[~there][:5])
        lacks = f"{int((~there).sum()):,} of {len(dataset):,} images (rows {rows})"
        raise UserError(f"methods.{arm.name}: {arm.embeddings} lacks {lacks}; kladi embed on this manifest writes all")
    return describe(dataset, found.features[rows_of], None if found.z is None else found.z[rows_of])


@contextlib.contextmanager
def _mendable(folder: Path) -> Generator[None]:
    """What is wrong with one run of a study never costs the study."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{folder}: {error}; delete that folder, and the same command makes it again") from None


def encoder_of(arm: Arm, seed: int, dataset: Dataset, folder: Path, before: Path | None = None) -> backbones.Encoder:
    """The encoder with which fine-tuning starts; pretraining happens here, and goes on where it was stopped."""
    if arm.kind == "pretrained":
        with _mendable(folder):
            if not (folder / "model.safetensors").is_file():
                seen, config = shuffled(arm, seed, dataset), arm.seeded(seed)
                if before is not None:
                    config = settings.override(config, {"init.weights": str(before)})
                fit(seen, config, folder, resume=folder.is_dir(), progress=console.Silent())
            return fused.load(folder)
    encoder = fresh(arm.config, seed)
    if arm.kind == "given":
        fused.load_weights(encoder, before or arm.config.init.weights)
    return encoder


def fresh(config: settings.Config, seed: int) -> backbones.Encoder:
    """The encoder with the random weights that training would start from."""
    with backbones.drawn_apart(seed):
        return training.built_encoder(config).eval()


def shuffled(arm: Arm, seed: int, dataset: Dataset) -> Dataset:
    """What pretraining sees: the data, or with metadata, tables or leaves dealt out anew among the training rows."""
    rows = np.flatnonzero(dataset.split == TRAIN)
    if not len(rows) and arm.kind == "pretrained":
        raise UserError("no rows to train on: the split calls none of them train")
    generator = np.random.default_rng([seed, 0x73687566])
    if arm.shuffled == "tree":
        place = _places(arm, seed, dataset)
        return dataclasses.replace(
            dataset, target=np.where(dataset.target >= 0, place[np.maximum(dataset.target, 0)], -1)
        )
    if arm.shuffled == "tables":
        dealt = np.arange(len(dataset))
        dealt[rows] = over_patients(rows, dataset.group[rows], generator)
        every = [dataclasses.replace(m, values=m.values[dealt], present=m.present[dealt]) for m in dataset.modalities]
        return dataclasses.replace(dataset, modalities=tuple(every))
    if arm.shuffled.startswith("metadata"):
        sets = dataset.label_sets
        if sets is None:
            raise UserError("shuffled_metadata needs metadata: settings.data.metadata")
        dealt = sets.class_id.copy()
        for part in _sites(dataset, rows) if arm.shuffled == "metadata_within_site" else [rows]:
            dealt[part] = over_patients(sets.class_id[part], dataset.group[part], generator)
        return dataclasses.replace(dataset, label_sets=dataclasses.replace(sets, class_id=dealt))
    return dataset


def _places(arm: Arm, seed: int, dataset: Dataset) -> Int[np.ndarray, " N"]:
    """The node that each node is trained as where the tree is shuffled."""
    if dataset.taxonomy is None:
        raise UserError("shuffled_tree needs labels")
    target = dataset.target[dataset.split == TRAIN]
    try:
        return shuffled_leaves(dataset.taxonomy, np.unique(target[target >= 0]), seed)[0]
    except ValueError as error:
        raise UserError(f"shuffled_tree of {arm.control_of}: {error}") from error


def in_true_names(own: OwnAnswers | None, arm: Arm, seed: int, dataset: Dataset) -> OwnAnswers | None:
    """What an encoder's own classifier says, in the names that the labels had before the tree was shuffled."""
    if own is None or arm.shuffled != "tree" or dataset.taxonomy is None:
        return own
    names = dataset.taxonomy.names
    meant = {names[place]: names[node] for node, place in enumerate(_places(arm, seed, dataset))}
    return OwnAnswers(own.log_p, tuple(meant.get(name, name) for name in own.names))


def images_seen(arm: Arm, dataset: Dataset) -> int | None:
    """Images that pretraining looks at, and that before it; each view of one counted once. None where unknown."""
    before = images_seen(arm.after, dataset) if arm.after else arm.lineage.images_seen
    if arm.kind != "pretrained" or before is None:
        return before
    batch = min(arm.config.train.batch, int((dataset.split == TRAIN).sum()))
    steps = max(1, int((dataset.split == TRAIN).sum()) // arm.config.train.batch) * arm.config.train.epochs
    return before + batch * min(steps, arm.config.train.max_steps or steps)


def epochs_before(arm: Arm) -> int | None:
    """Epochs of what its encoder began with; None where they are not known."""
    before = arm.after
    if before is None:
        return arm.lineage.epochs
    return total([epochs_before(before), before.config.train.epochs if before.kind == "pretrained" else 0])


def device_of(config: settings.Config) -> str:
    """The device that the study's settings ask for."""
    fabric = training.device(config.train)
    return str(fabric.device)


def _kind(config: settings.Config, after: str) -> str:
    if config.objective.name != NOT_PRETRAINED:
        return "pretrained"
    return "given" if config.init.weights or after else "random"


def _under(arm: Arm, control: str, study: Study) -> list[Arm]:
    """The arms that a control adds under a method."""
    objective = arm.config.objective.name
    is_reference = arm.name == study.reference
    chosen = not study.controls_of or arm.name in study.controls_of
    if chosen and control in {"shuffled_metadata", "shuffled_metadata_within_site"} and objective == "metadata":
        dealt_out = control.removeprefix("shuffled_")
        return [dataclasses.replace(arm, name=f"{arm.name}, {control}", shuffled=dealt_out, control_of=arm.name)]
    if chosen and control == "shuffled_tables" and objective == "multimodal":
        return [dataclasses.replace(arm, name=f"{arm.name}, {control}", shuffled="tables", control_of=arm.name)]
    if chosen and control == "shuffled_tree" and (arm.classify.reads_tree or objective in TREES):
        dealt = dataclasses.replace(arm.classify, shuffled=arm.classify.reads_tree)
        pretraining = "tree" if objective in TREES else ""
        named = f"{arm.name}, {control}"
        return [dataclasses.replace(arm, name=named, shuffled=pretraining, control_of=arm.name, classify=dealt)]
    if chosen and control == "matched_temperature" and objective == "label_tree":
        usual = number_of(arm, "temperature", 0.1)
        bare = dataclasses.replace(arm.config, objective=settings.Objective("supcon"))
        return [
            Arm(
                f"{arm.name}, supcon T {factor * usual:g}",
                settings.override(bare, {"objective.args": {"temperature": factor * usual}}),
                "pretrained",
                control_of=arm.name,
                classify=arm.classify,
                after=arm.after,
            )
            for factor in TEMPERATURES
        ]
    if control == "random_encoder" and is_reference:
        untrained = dataclasses.replace(arm.config, objective=settings.Objective(NOT_PRETRAINED), init=settings.Init())
        return [Arm(control, untrained, "random", control_of=arm.name, classify=arm.classify)]
    if control in {"histogram", "shuffled_labels"} and is_reference:
        return [Arm(control, arm.config, control, control_of=arm.name, classify=arm.classify)]
    return []


def number_of(arm: Arm, key: str, usual: float) -> float:
    """A number among the arguments of the arm's objective."""
    value = arm.config.objective.args.get(key, usual)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{arm.name}: objective.args.{key} = {value} is no number")
    return float(value)


def _require_equal_budget(found: list[Arm]) -> None:
    """Epochs, batch and an earlier end are the budget, since all see the same rows."""
    trained = [(arm.name, arm.config.train) for arm in found if arm.kind == "pretrained"]
    if len({(train.epochs, train.batch, train.max_steps) for _, train in trained}) > 1:
        said = "; ".join(f"{name} {train.epochs} epochs of {train.batch}" for name, train in trained)
        raise UserError(f"equal_budget: the methods differ in epochs, batch or max_steps: {said}")


def _sites(dataset: Dataset, rows: np.ndarray) -> list[np.ndarray]:
    """The rows of each site or source."""
    name = next((name for name in SITES if name in dataset.columns), None)
    if name is None:
        raise UserError(f"shuffled_metadata_within_site needs a column {' or '.join(SITES)}")
    site = np.unique(np.array(dataset.columns[name])[rows], return_inverse=True)[1]
    return [rows[site == number] for number in range(int(site.max()) + 1)]

"""Every choice of a run: its default, what it means (the text below it), and how far a number may go.

A section is a table of the TOML file, a field a key of it. `config` reads and writes them.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Data:
    """What is read and how strictly."""

    taxonomy: str = ""
    """Label tree file; empty: the slash paths of the labels are the tree."""
    root: str = ""
    """Node of the label tree file that becomes the implicit root; what is not below it is left out."""
    metadata: tuple[str, ...] = ()
    """Columns (or DICOM attributes) that become label sets."""
    keep: tuple[str, ...] = ()
    """Further columns that are kept as text; a study adds those that its tasks ask for."""
    tables: tuple[str, ...] = ()
    """Files beside the images, modalities of their own: of patients, of images (a column path), or embeddings.npz."""
    covariates: tuple[str, ...] = ()
    """Columns of the manifest that together are a modality beside the images, e.g. age,sex."""
    levels: tuple[str, ...] = ()
    """Columns of text in the tables that become a column of 0 and 1 for each value."""
    leave_out: tuple[str, ...] = ()
    """Columns of the tables that are not used."""
    synonyms: str = ""
    """TOML file laid over the shipped synonyms of metadata values."""
    metadata_trees: dict[str, Any] = field(default_factory=dict)
    """Tree file of a column's values, e.g. --data.metadata_trees.anatomy parts.csv: a lung shares half with a chest."""
    unmapped: typing.Literal["own", "unknown", "error"] = "own"
    """A metadata value that no synonym and no tree knows: a value of its own, unknown, or an error."""
    frames: str = "all"
    """Frames of a multi-frame file: all, middle, first, or a number n for every n-th."""
    max_left_out: float = 0.05
    """Share of rows that may be unreadable before the run is refused."""
    held_out: float = 0.3
    """Share of patients kept from pretraining for the evaluation, where the manifest has no column split."""
    most_per_label: int = 0
    """Images of a label that are used at most (with a column split: of its training rows), drawn by lot; 0: all."""
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
    """Folder of the decoded-once store; empty: `kladi/store` in the user's cache folder."""


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
    """Middle of the window, in the file's units; for window = "fixed"."""
    width: float = 400.0
    """Width of the window, in the file's units; for window = "fixed"."""
    low: float = 0.5
    """Lower percentile."""
    high: float = 99.5
    """Upper percentile."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from the [0, 1] pixels, one value or one a channel."""
    std: tuple[float, ...] = (0.25,)
    """What the rest is divided by, one value or one a channel."""


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
    """Probability; off where up and down mean something."""
    rotation: float = 10.0
    """Greatest angle, degrees."""
    brightness: float = 0.2
    """Greatest distance of the factor from 1."""
    contrast: float = 0.2
    """Greatest distance of the factor from 1."""
    gamma: float = 0.2
    """Greatest logarithm of the exponent."""
    saturation: float = 0.0
    """Greatest distance of the factor from 1; must be 0 on one channel."""
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
    """A timm model; `kladi list backbones` names them."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `timm.create_model`."""
    projector: tuple[int, int] = (512, 128)
    """Hidden width and output width of the head that is dropped after pretraining."""


WITH_LABELS = frozenset(
    {"cross_entropy", "himulcon", "hxe", "label_tree", "soft_labels", "supcon", "tree_cross_entropy"}
)
WITHOUT_STRUCTURE = frozenset({"barlow_twins", "byol", "dino", "moco_v3", "simclr"})
"""Objectives that read neither label nor metadata."""
WITHOUT_LABELS = WITHOUT_STRUCTURE | {"metadata", "multimodal"}
"""Objectives that read labels, and that read none; "auto" and a user's own are in neither."""


@dataclass(frozen=True)
class Objective:
    """A preset by name (or `my_file:MyLoss`) and its keyword arguments."""

    name: str = "auto"
    """A preset (`kladi list objectives`), or my_file:MyLoss; auto: what the data can carry."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the objective, e.g. --objective.args.temperature 0.2."""


@dataclass(frozen=True)
class Train:
    """The loop."""

    epochs: int = 100
    """Times that each training image is seen, in two views."""
    batch: int = 256
    """Images a step (each seen in two views)."""
    chunk: int = 0
    """Images that the encoder sees at a time; the loss still sees the whole batch. 0: all at once."""
    per_label: int = 0
    """Images of a label that come together in a batch, beside those of a sibling label; 0: plain shuffling."""
    optimizer: typing.Literal["adamw", "sgd"] = "adamw"
    """adamw or sgd."""
    lr: float = 1e-3
    """Peak learning rate; linear warm-up, then cosine to zero."""
    encoder_scale: float = 1.0
    """Factor on the learning rate of the image encoder, e.g. below 1 where it was trained before."""
    weight_decay: float = 0.05
    """On weight matrices; biases and normalisations have none."""
    momentum: float = 0.9
    """SGD only."""
    warmup: float = 0.05
    """Share of all steps."""
    clip: float = 1.0
    """Greatest gradient norm; 0 switches clipping off."""
    seed: int = 0
    """Of weights, order, views and hold-out: the run is a function of it."""
    workers: int = 1
    """Threads that prepare batches ahead; any number gives the same bits."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    devices: int = 1
    """Processes on this machine that train together, a device each. torchrun's own number where it starts them."""
    nodes: int = 1
    """Machines that train together; the same command is started on each, by torchrun or srun."""
    precision: str = "32-true"
    """32-true or bf16-mixed, Lightning Fabric's words."""
    deterministic: bool = True
    """Only algorithms that repeat to the bit."""
    checkpoint_steps: int = 0
    """Steps between checkpoints; 0: at the end of an epoch, at most once a minute. The end always saves."""
    max_steps: int = 0
    """Stop after this many steps; 0: after the epochs. The schedule does not change."""
    stop_on_collapse: bool = False
    """End the run when the collapse alarm sounds."""
    tensorboard: bool = False
    """Also write TensorBoard's event files."""


@dataclass(frozen=True)
class Init:
    """Where the encoder's weights come from: a local safetensors file or a run folder; empty: random."""

    weights: str = ""
    """A .safetensors file or a run folder."""


@dataclass(frozen=True)
class Topology:
    """The persistence diagram of each view beside its pixels: which parts are connected, which holes enclosed."""

    on: bool = False
    """Fuse diagrams into the encoder, and train on pairs of views whose change of topology is bounded."""
    sees: typing.Literal["both", "image", "diagram"] = "both"
    """What the encoder looks at: both; the image alone, a control; or the diagram alone, a first stage."""
    diagrams: typing.Literal["own", "none", "another"] = "own"
    """Whose diagrams it is given: the image's own; none (empty ones), or those of another patient's image: controls."""
    scale: float = 1.0
    """Factor on the learning rate of the diagram encoder, e.g. below 1 where it was trained before."""
    encoder: typing.Literal["auto", "paper", "small"] = "auto"
    """Size of the diagram encoder; auto: paper for 1,000 features and 128 px on, else small."""
    side: int = 0
    """Side of the square that diagrams are made of, pixels; 0: that of the image, at most 112."""
    region: typing.Literal["whole", "foreground", "mask"] = "whole"
    """Where a diagram is made: the whole image, its foreground, or inside the mask, a file that column mask names."""
    calibration: int = 128
    """Training images that the strengths of the bounded views are measured on, one a patient."""
    draws: int = 8
    """Weak and strong views of each image; flips and turns come on top. Their diagrams are made once and kept."""


@dataclass(frozen=True)
class Evaluate:
    """The measuring protocol."""

    folds: int = 5
    """Of the cross-validation by patient, where the manifest's split is not used."""
    repeats: int = 2
    """Of the folds, each with other folds."""
    seed: int = 0
    """Of folds, votes and bootstrap."""
    use_split: bool = True
    """Use the manifest's own train, val and test where it has them."""
    neighbours: tuple[int, ...] = (1, 5, 10, 20, 50, 100, 200)
    """Numbers of neighbours of the kNN vote, chosen from on validation rows."""
    bootstrap: int = 2000
    """Draws of patients behind an interval."""


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
    topology: Topology = field(default_factory=Topology)
    evaluate: Evaluate = field(default_factory=Evaluate)


RANGES: dict[str, tuple[float, float]] = {
    "data.max_left_out": (0, 1),
    "data.held_out": (0, 0.9),
    "data.most_per_label": (0, 2**40),
    "data.max_pixels": (64, 2**40),
    "intensity.size": (8, 8192),
    "intensity.width": (1e-6, 1e12),
    "intensity.low": (0, 100),
    "intensity.high": (0, 100),
    "encoder.projector": (1, 2**20),
    "train.encoder_scale": (0, 1e6),
    "topology.scale": (0, 1e6),
    "train.chunk": (0, 2**20),
    "train.per_label": (0, 2**20),
    "train.devices": (1, 4096),
    "train.nodes": (1, 4096),
    "topology.side": (0, 8192),
    "topology.calibration": (1, 10**6),
    "topology.draws": (1, 10**6),
    "evaluate.folds": (3, 100),
    "evaluate.repeats": (1, 1000),
    "evaluate.bootstrap": (0, 10**6),
    "evaluate.neighbours": (1, 10**6),
}
"""Least and most of numbers that would otherwise be found impossible only after all images were read."""

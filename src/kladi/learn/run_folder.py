"""What a run keeps beside its checkpoints, so that it explains itself, moves between machines and is never mixed up.

config.toml          every setting; paths are replaced by the copies below, because a path may carry a name
taxonomy.json        the label tree; synonyms.toml: the user's synonyms, where there were any
environment.json     versions, device, threads
data.json            digests and counts
before.json          the runs whose weights it began with; before.safetensors: the rows that those were trained on
rows.safetensors     id and fingerprint of each row, to say at a resume which rows changed
metrics.jsonl, log.txt, checkpoints/, lock
model.safetensors, config.json, head.safetensors    once training has finished
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning_fabric
import numpy as np
import safetensors
import timm
import torch
from jaxtyping import Bool, UInt64

import kladi
from kladi import config as settings
from kladi.data.dataset import HELD_OUT, TEST, TRAIN, VAL, Dataset
from kladi.errors import RunStopped, UserError
from kladi.learn import ranks
from kladi.models import weights
from kladi.structure.labelset import LabelSets
from kladi.structure.taxonomy import Taxonomy

MAY_CHANGE = {
    "train.devices",
    "train.nodes",
    "train.workers",
    "train.tensorboard",
    "train.checkpoint_steps",
    "train.max_steps",
    "train.stop_on_collapse",
    "data.store",
    "data.key",
    "init.weights",
}
"""Keys that have no say in the numbers of a resumed run; `evaluate.*` and the index of a device neither."""
BITS = ("torch", "device", "processes", "threads", "kladi", "timm")
"""Facts of the environment that decide whether a resumed run has the same bits."""


@dataclass(frozen=True)
class Rows:
    """One entry a row, sorted by id.

    fingerprint: 64 bits over decoded pixels, split, label and metadata.
    trained: whether the row was in the split that is trained on.
    """

    row_id: UInt64[np.ndarray, " n"]
    fingerprint: UInt64[np.ndarray, " n"]
    trained: Bool[np.ndarray, " n"]

    @classmethod
    def of(cls, dataset: Dataset) -> Rows:
        order = np.argsort(dataset.row_id)
        facts = [dataset.store.pixel_digest, dataset.split.astype(np.uint64), dataset.target.astype(np.uint64)]
        if dataset.label_sets is not None:
            facts.append(_class_digests(dataset.label_sets)[dataset.label_sets.class_id])
        table = np.stack(facts, axis=1)[order].astype("<u8")
        fingerprint = np.array([_short(row.tobytes()) for row in table], dtype=np.uint64)
        return cls(dataset.row_id[order], fingerprint, (dataset.split == TRAIN)[order])

    def digest(self) -> str:
        return hashlib.sha256(
            self.row_id.astype("<u8").tobytes() + self.fingerprint.astype("<u8").tobytes()
        ).hexdigest()

    def difference(self, now: Rows) -> str:
        """`3 rows added, 1 removed, 2 changed`; empty where all are equal."""
        added = int((~np.isin(now.row_id, self.row_id)).sum())
        removed = int((~np.isin(self.row_id, now.row_id)).sum())
        _, here, there = np.intersect1d(self.row_id, now.row_id, return_indices=True)
        changed = int((self.fingerprint[here] != now.fingerprint[there]).sum())
        counts = {"added": added, "removed": removed, "changed": changed}
        return ", ".join(f"{count:,} rows {what}" for what, count in counts.items() if count)


def make(run: Path) -> None:
    """The folder itself, readable by its owner only.

    Raises:
        UserError: a file of that name exists.
        RunStopped: it cannot be made.
    """
    try:
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError):  # somebody else's folder that we may write to
            run.chmod(0o700)
    except FileExistsError as error:
        raise UserError(f"{run} is a file; --out takes a folder") from error
    except OSError as error:
        raise RunStopped(f"{run} cannot be made ({error.strerror})") from error


def require_empty(run: Path) -> None:
    """A new run starts in an empty folder; call this with the lock held.

    Raises:
        UserError: it is not empty.
    """
    names = sorted(path.name for path in run.iterdir() if path.name != "lock" and not path.name.startswith(".tmp-"))
    if names:
        what = "go on with the same command and --resume, or" if (run / "config.toml").is_file() else ""
        raise UserError(f"{run} is not empty (it holds {names[0]}); {what + ' ' if what else ''}give another --out")


BEFORE_BEGIN = {
    "lock",
    "log.txt",
    "strengths.json",
    "before.json",
    "before.safetensors",
    "taxonomy.json",
    "synonyms.toml",
    "rows.safetensors",
    "environment.json",
    "data.json",
}
"""What a run may hold that was killed before its `config.toml` was written."""
BEGINNINGS = (".tmp-", "tensorboard", "metadata_tree_")
"""How further names of such files begin."""


def require_nothing_foreign(run: Path) -> None:
    """A run that never began is taken up only where the folder holds nothing but its own first files.

    Raises:
        UserError: it holds something else.
    """
    names = sorted(path.name for path in run.iterdir())
    foreign = [n for n in names if n not in BEFORE_BEGIN and not n.startswith(BEGINNINGS)]
    if foreign:
        raise UserError(f"--resume: {run} is no run of kladi's (it holds {foreign[0]}); give another --out")


def begin(run: Path, config: settings.Config, dataset: Dataset, notes: Mapping[str, Any], device: torch.device) -> None:
    """Write everything that is known before the first step; `config.toml` last, as the sign that all is there."""
    if dataset.taxonomy is not None:
        dataset.taxonomy.write(run / "taxonomy.json")
        (run / "taxonomy.json").chmod(0o600)
    if config.data.synonyms:
        weights.write(run / "synonyms.toml", Path(config.data.synonyms).read_bytes())
    for name, copy in _metadata_trees(config.data).items():
        Taxonomy.read(Path(str(config.data.metadata_trees[name]))).write(run / copy)
        (run / copy).chmod(0o600)
    rows = Rows.of(dataset)
    tensors = {
        "row_id": torch.from_numpy(rows.row_id.view(np.int64)),
        "fingerprint": torch.from_numpy(rows.fingerprint.view(np.int64)),
        "trained": torch.from_numpy(rows.trained),
    }
    weights.write(run / "rows.safetensors", weights.to_bytes(tensors))
    weights.write(run / "environment.json", _json(environment(device)))
    weights.write(run / "data.json", _json({**describe(dataset), **notes}))
    write_config(run, config)


def write_config(run: Path, config: settings.Config) -> None:
    """`config.toml`; written again at a resume, when those settings may differ that have no say in the numbers."""
    weights.write(run / "config.toml", settings.to_toml(portable(config)))


def begun(run: Path) -> bool:
    """Whether `begin` came to its end here."""
    return (run / "config.toml").is_file()


def require_same(run: Path, config: settings.Config, dataset: Dataset) -> None:
    """A resumed run has the configuration and the data that it began with.

    Raises:
        UserError: it has not; every difference is named.
    """
    before, now = _flat(settings.read(run / "config.toml")), _flat(portable(config))
    changed = [
        f"{key} was {before[key]!r}, is now {now[key]!r}"
        for key in now
        if before.get(key) != now[key] and not _may_change(key, before.get(key), now[key])
    ]
    if changed:
        raise UserError(
            "--resume: the configuration has changed: " + "; ".join(changed) + "; --out ANOTHER starts anew"
        )
    described = _read_json(run / "data.json")
    tree = None if dataset.taxonomy is None else dataset.taxonomy.digest
    if described.get("taxonomy_digest") != tree:
        raise UserError("--resume: the label tree is another one than this run began with; --out ANOTHER starts anew")
    difference = read_rows(run).difference(Rows.of(dataset))
    if difference:
        raise UserError(f"--resume: the data have changed: {difference}; --out ANOTHER starts anew")
    if described.get("digest") != digest(dataset):
        what = "metadata columns, their weights, tables or masks"
        raise UserError(f"--resume: {what} have changed; --out ANOTHER starts anew")


def not_the_same_bits(run: Path, device: torch.device) -> str:
    """What differs from the machine that the run began on, as a sentence; empty where the bits will be the same."""
    before = _read_json(run / "environment.json")
    now = environment(device)
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in BITS if before.get(key) != now[key]]
    return f"not bitwise the same from here on: {', '.join(changed)}" if changed else ""


def read_config(run: Path) -> settings.Config:
    """The configuration of a run, with its label tree and synonyms found inside the run folder.

    Raises:
        UserError: no such file, or damaged.
    """
    if not begun(run):
        raise UserError(f"{run} is not a run: it holds no config.toml")
    config = settings.read(run / "config.toml")
    trees = {f"data.metadata_trees.{name}": copy for name, copy in config.data.metadata_trees.items()}
    named = {"data.taxonomy": config.data.taxonomy, "data.synonyms": config.data.synonyms, **trees}
    config = settings.override(config, {key: str(run / name) for key, name in named.items() if name})
    # Tables beside the images were for training; they are not copied, and nothing after it reads them.
    bare = dataclasses.replace(config.data, tables=(), covariates=(), levels=(), leave_out=())
    return dataclasses.replace(config, data=bare)


def read_rows(run: Path) -> Rows:
    """The rows that the run began with."""
    tensors = {name: tensor.numpy() for name, tensor in weights.read(run / "rows.safetensors").items()}
    return Rows(tensors["row_id"].view(np.uint64), tensors["fingerprint"].view(np.uint64), tensors["trained"])


def portable(config: settings.Config) -> settings.Config:
    """The configuration without paths: files that the run copied are named as in the run folder, others not at all."""
    data = dataclasses.replace(
        config.data,
        taxonomy="taxonomy.json" if config.data.taxonomy else "",
        root="",  # the copy has it already
        synonyms="synonyms.toml" if config.data.synonyms else "",
        metadata_trees=_metadata_trees(config.data),
        key="",
        store="",
        tables=tuple(Path(table).name for table in config.data.tables),
    )
    file, colon, name = config.objective.name.rpartition(":")
    objective = dataclasses.replace(config.objective, name=f"{Path(file).name}{colon}{name}")
    return dataclasses.replace(config, data=data, objective=objective, init=settings.Init())


def _metadata_trees(data: settings.Data) -> dict[str, str]:
    """Attribute -> the copy of its tree in a run folder; an attribute's name need not be one of a file."""
    return {name: f"metadata_tree_{number}.json" for number, name in enumerate(sorted(data.metadata_trees))}


def config_digest(config: settings.Config) -> str:
    """Over every setting that must stay the same for a run to go on."""
    said = {key: value for key, value in _flat(portable(config)).items() if not _may_change(key, value, value)}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def digest(dataset: Dataset) -> str:
    """Over all that decides the numbers of a run: pixels, splits, labels, tree, metadata, tables, masks; not the order
    of the rows."""
    tree = "" if dataset.taxonomy is None else dataset.taxonomy.digest
    sets = dataset.label_sets
    metadata = "" if sets is None else json.dumps([sets.attributes, sets.weight.tolist()])
    said = [Rows.of(dataset).digest(), tree, metadata]
    if dataset.modalities:
        said.append(_tables_digest(dataset))
    if dataset.masks:
        said.append(_masks_digest(dataset))
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def _tables_digest(dataset: Dataset) -> str:
    """Over the modalities beside the images; not the order of the rows."""
    order, seen = np.argsort(dataset.row_id), hashlib.sha256()
    for one in dataset.modalities:
        seen.update(json.dumps([one.name, one.features]).encode())
        seen.update(one.values[order].astype("<f4").tobytes() + one.present[order].tobytes())
    return seen.hexdigest()


def _masks_digest(dataset: Dataset) -> str:
    """Over where each image is looked at; not the order of the rows."""
    seen = hashlib.sha256()
    for row in np.argsort(dataset.row_id):
        mask = dataset.masks[row]
        seen.update(hashlib.sha256(b"" if mask is None else mask.bits).digest())
    return seen.hexdigest()


def describe(dataset: Dataset) -> dict[str, Any]:
    """Digests and counts; no path, no id of a person."""
    splits = {"train": TRAIN, "val": VAL, "test": TEST, "held_out": HELD_OUT}
    return {
        "digest": digest(dataset),
        "taxonomy_digest": None if dataset.taxonomy is None else dataset.taxonomy.digest,
        "images": len(dataset),
        "patients": len(np.unique(dataset.group)) if dataset.has_patients else None,
        "splits": {name: int((dataset.split == number).sum()) for name, number in splits.items()},
        "labelled": int((dataset.target >= 0).sum()),
        "metadata": [] if dataset.label_sets is None else list(dataset.label_sets.attributes),
        "modalities": {one.name: len(one.features) for one in dataset.modalities},
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, without the names of either person or host."""
    return {
        "kladi": kladi.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "lightning_fabric": lightning_fabric.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": ranks.world(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def _class_digests(sets: LabelSets) -> UInt64[np.ndarray, " U"]:
    """64 bits over the names in each class of label sets: what else is in the data has no say."""
    said = [
        [[sets.labels[label] for label in members], [bool(known) for known in sets.class_known[number]]]
        for number, members in enumerate(sets.sets)
    ]
    return np.array([_short(json.dumps(one).encode()) for one in said], dtype=np.uint64)


def _short(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _may_change(key: str, before: Any, now: Any) -> bool:
    """Whether a resumed run may have another value; of a device only the index."""
    if key == "train.device":
        return str(before).partition(":")[0] == str(now).partition(":")[0]
    return key in MAY_CHANGE or key.startswith("evaluate.")


def _flat(config: settings.Config) -> dict[str, Any]:
    return {f"{s}.{k}": v for s, table in settings.to_dict(config).items() for k, v in table.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged or missing; --out ANOTHER starts anew")
    return content


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

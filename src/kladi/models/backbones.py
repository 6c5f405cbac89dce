"""Any timm encoder by name, with one or three channels, and weights from local safetensors files only.

No name reaches the network: a model is built from timm's own code with `pretrained` left off, and names that carry a
source (`hf-hub:...`) are no names here. A folder that `export` wrote is also one that timm alone can open
(`timm.create_model("local-dir:RUN", pretrained=True)`), so an encoder outlives kladi.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from kladi import config as settings
from kladi.errors import UserError, suggestion
from kladi.models import weights

FORMAT, VERSION = "kladi-encoder", 1
LEAST_MATCH = 0.9
"""Share of the encoder's tensors that a weight file must hold; with fewer, the rest would be noise."""
REFUSED = {
    "pretrained": "kladi downloads nothing; give a local file as --init.weights",
    "checkpoint_path": "give a local safetensors file as --init.weights",
    "in_chans": "set --intensity.channels",
    "num_classes": "kladi trains an encoder without a classifier",
    "features_only": "kladi trains an encoder with one feature vector an image",
    **dict.fromkeys(
        ["pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "pretrained_strict", "cache_dir"],
        "kladi downloads nothing; give a local file as --init.weights",
    ),
    **dict.fromkeys(["device", "dtype"], "set --train.device and --train.precision"),
    **dict.fromkeys(["out_indices", "feature_cls", "pruned", "pretrained_filter_fn"], "it has no meaning here"),
}
"""Arguments of `timm.create_model` that may not be given, and what to do instead."""
_TIMM_REFUSES = (RuntimeError, ValueError, AssertionError, TypeError, LookupError, ArithmeticError)
"""What timm's hundreds of models raise at a size or an argument they cannot take."""
PREFIXES = ("module.", "encoder.", "model.", "backbone.")
"""What other people's training loops put before every name."""


class Encoder(nn.Module):
    """A timm model without classifier: images -> one feature vector each.

    model: the timm model; its `state_dict` has timm's plain keys.
    width: length F of a feature vector. features: that of the timm model, where more is built round it.
    intensity: the pipeline that images must go through before the encoder sees them.
    """

    def __init__(
        self, model: nn.Module, width: int, architecture: settings.Encoder, intensity: settings.Intensity
    ) -> None:
        super().__init__()
        self.model = model
        self.width = self.features = width
        self.architecture = architecture
        self.intensity = intensity
        self.layout = _layout(model)

    @override
    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        return self.model(image.contiguous(memory_format=self.layout))

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        return self.architecture.name

    @property
    def reads_with(self) -> nn.Module:
        """What its vector goes through."""
        return self

    def preprocess(self, source: Any) -> Float[Tensor, "C S S"]:
        """One image (a path, or an array of grey levels) as this encoder expects it: the pipeline of its training."""
        from kladi.data.pixels.frame import Unreadable
        from kladi.data.pixels.images import preprocess

        try:
            return preprocess(source, self.intensity)
        except Unreadable as error:
            raise UserError(f"{source if isinstance(source, str | Path) else 'the image'} {error}") from error


def _layout(model: nn.Module) -> torch.memory_format:
    """Channels innermost where the model convolves: a CPU is up to three times as fast, and the values are the same.

    Depthwise convolutions are the exception: they are slower that way (ConvNeXt, threefold), so such a model keeps its
    channels outermost.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    depthwise = any(conv.groups > 1 and conv.groups == conv.in_channels for conv in convolutions)
    return torch.channels_last if convolutions and not depthwise else torch.contiguous_format


@dataclass(frozen=True)
class Match:
    """What a weight file and an encoder had in common, name by name.

    matched: read. missing: in the encoder only, left as they were. unexpected: in the file only, ignored.
    adapted: read after their input channels were summed or spread; these count as matched.
    beside: what became of a diagram encoder beside it, in words.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    adapted: tuple[str, ...] = ()
    beside: str = ""

    @property
    def share(self) -> float:
        return len(self.matched) / max(1, len(self.matched) + len(self.missing))

    def __str__(self) -> str:
        text = (
            f"{len(self.matched)} of {len(self.matched) + len(self.missing)} tensors matched"
            f"{_some('missing', self.missing)}{_some('unexpected', self.unexpected)}"
        )
        text += f"; input channels adapted in {self.adapted[0]}" if self.adapted else ""
        return text + (f"; {self.beside}" if self.beside else "")


@contextlib.contextmanager
def drawn_apart(seed: int | None = None) -> Generator[None]:
    """Weights that are drawn inside come from the seed, if there is one; the caller's generator notices nothing."""
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


def build(encoder: settings.Encoder, intensity: settings.Intensity) -> Encoder:
    """The encoder with random weights from torch's current generator.

    Args:
        encoder: `name`, any of `timm.list_models()`; `args`, passed to `timm.create_model`.
        intensity: `size` and `channels` of the images.

    Raises:
        UserError: an unknown name (names the closest), an argument that this model or kladi does not take, or a model
            that cannot see images of this size.
    """
    model = _created(encoder, intensity)
    blank = torch.zeros(1, intensity.channels, intensity.size, intensity.size)
    try:
        with torch.no_grad():
            features = model.eval()(blank)
    except _TIMM_REFUSES as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--encoder.name {encoder.name} cannot see images of {intensity.size} px ({reason}); set --intensity.size"
        ) from error
    if features.ndim != 2:
        raise UserError(
            f"--encoder.name {encoder.name} gives {list(features.shape[1:])} an image, not one feature vector; "
            "leave --encoder.args.global_pool out"
        )
    return Encoder(model.train(), features.shape[1], encoder, intensity)


def load_weights(encoder: Encoder, path: str | Path) -> Match:
    """Copy local weights into an encoder, by name and shape.

    A first layer that differs only in its number of input channels is adapted as timm does it: three become one by
    their sum (grey repeated three times gives the same response), one becomes three by a third each.

    Args:
        encoder: changed in place.
        path: a safetensors file with timm's keys (a classifier in it is ignored), or a run folder.

    Raises:
        UserError: no safetensors file, or fewer than 90 % of the encoder's tensors are in it (names what is missing).
    """
    file = Path(path)
    if file.is_dir():
        file = file / "model.safetensors"
    expected = weights.promises(encoder.model.state_dict())
    promised = weights.header(file)
    prefix = _prefix(promised, expected)
    found = weights.read(file)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    adapted = []
    for name in _first_layers(encoder.model):
        if name in tensors:
            fitted = _channels(tensors[name], expected[name].shape)
            if fitted is not None:
                tensors[name] = fitted
                adapted.append(name)
    good = {name: t for name, t in tensors.items() if name in expected and tuple(t.shape) == expected[name].shape}
    match = Match(
        tuple(good),
        tuple(name for name in expected if name not in good),
        tuple(name for name in tensors if name not in good),
        tuple(adapted),
    )
    if match.share < LEAST_MATCH:
        raise UserError(
            f"{file} does not fit --encoder.name {encoder.architecture.name}: {match}; "
            f"at least {LEAST_MATCH:.0%} must match"
        )
    encoder.model.load_state_dict(good, strict=False)
    return match


def load(run: str | Path) -> Encoder:
    """The timm model of a finished run, in evaluation mode; `fused.load` adds what was trained round it.

    Raises:
        UserError: the folder holds no finished encoder, or its weights do not fit its description.
    """
    run = Path(run)
    described = read_description(run)
    extra = described["kladi"]
    architecture = settings.Encoder(
        described["architecture"],
        _own_args(described.get("model_args", {})),
        tuple(extra["projector"]),
    )
    intensity = settings.from_dict({"intensity": extra["intensity"]}).intensity
    with drawn_apart():
        encoder = build(architecture, intensity)
    file = run / "model.safetensors"
    tensors = weights.read(file, weights.promises(encoder.model.state_dict()))
    encoder.model.load_state_dict(tensors)
    return encoder.eval()


def export(encoder: Encoder, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `model.safetensors` (timm's plain keys) and `config.json`.

    Args:
        encoder: what was trained.
        folder: exists.
        facts: further entries for the `kladi` table of config.json (objective, taxonomy digest, versions, ...).

    Raises:
        OSError: as the file system says.
    """
    described = json.dumps(describe(encoder, facts), indent=1, ensure_ascii=False)
    weights.write(folder / "config.json", described + "\n")
    # Last, because its presence says that a run is finished.
    weights.write(folder / "model.safetensors", weights.to_bytes(encoder.model.state_dict(), {"format": "pt"}))


def describe(encoder: Encoder, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of config.json: timm's own keys, and one table `kladi` with the rest."""
    intensity = encoder.intensity
    shape = [intensity.channels, intensity.size, intensity.size]
    own: Any = encoder.model.pretrained_cfg
    return {
        "architecture": encoder.architecture.name,
        "num_classes": 0,
        "num_features": encoder.features,
        "model_args": {**encoder.architecture.args, **_size_argument(encoder.architecture, intensity)},
        "pretrained_cfg": {
            "input_size": shape,
            "num_classes": 0,
            "mean": _per_channel(intensity.mean, intensity.channels),
            "std": _per_channel(intensity.std, intensity.channels),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "first_conv": own.get("first_conv"),
            "classifier": own.get("classifier"),
        },
        "kladi": {
            "format": FORMAT,
            "version": VERSION,
            "projector": list(encoder.architecture.projector),
            "intensity": dataclasses.asdict(intensity),
            **facts,
        },
    }


def in_three_channels(encoder: Encoder) -> dict[str, Tensor]:
    """The encoder's tensors for images of three channels; of one that sees a single channel, for three equal ones."""
    tensors: dict[str, Tensor] = dict(encoder.model.state_dict())
    for name in _first_layers(encoder.model):
        adapted = _channels(tensors[name], (tensors[name].shape[0], 3, *tensors[name].shape[2:]))
        tensors[name] = tensors[name] if adapted is None else adapted
    return tensors


def in_timm(encoder: settings.Encoder, intensity: settings.Intensity, weights: str) -> str:
    """The line of Python that opens these weights without kladi, with all that the architecture was told."""
    said = {"num_classes": 0, "in_chans": intensity.channels, **_size_argument(encoder, intensity), **encoder.args}
    named = "".join(f"{name}={value!r}, " for name, value in said.items())
    return (
        f'timm.create_model("{encoder.name}", {named}checkpoint_path={json.dumps(weights, ensure_ascii=False)}).eval()'
    )


def read_description(run: Path) -> dict[str, Any]:
    """config.json of a finished run, checked.

    Raises:
        UserError: there is none, it is no such file, or it is of a newer version.
    """
    file = run / "config.json"
    if not (file.is_file() and (run / "model.safetensors").is_file()):
        if (run / "checkpoints").is_dir():
            raise UserError(
                f"{run}: training has not finished here; go on with kladi pretrain ... --out {run} --resume"
            )
        raise UserError(f"{run} is not a finished run: it holds no config.json and model.safetensors")
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        version = described["kladi"]["version"]
        known = described["kladi"]["format"] == FORMAT and {"projector", "intensity"} <= described["kladi"].keys()
        known = known and {"architecture", "num_features"} <= described.keys()
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{file}: not the description of an encoder that kladi wrote") from error
    if not known:
        raise UserError(f"{file}: not the description of an encoder that kladi wrote")
    if version > VERSION:
        raise UserError(f"{file}: version {version}; this kladi reads up to {VERSION}: pip install --upgrade kladi")
    return described


def _created(encoder: settings.Encoder, intensity: settings.Intensity) -> nn.Module:
    names = timm.list_models()
    if encoder.name not in names:
        plain, _, tag = encoder.name.partition(".")
        if tag and plain in names:
            raise UserError(
                f'--encoder.name {encoder.name}: "{tag}" names weights to download, and kladi downloads nothing; '
                f"write {plain}, and --init.weights FILE for a local safetensors file"
            )
        raise UserError(f'--encoder.name "{encoder.name}" is no timm model' + suggestion(encoder.name, names))
    for key in encoder.args:
        if key in REFUSED:
            raise UserError(f"--encoder.args.{key} cannot be set: {REFUSED[key]}")
    if intensity.channels not in (1, 3):
        raise UserError(
            f"--intensity.channels {intensity.channels}: 1 or 3; closest: {1 if intensity.channels < 2 else 3}"
        )
    args = {**_size_argument(encoder, intensity), **encoder.args}
    try:
        return timm.create_model(encoder.name, num_classes=0, in_chans=intensity.channels, **args)
    except _TIMM_REFUSES as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        unknown = [key for key in encoder.args if f"'{key}'" in reason]
        if unknown:
            raise UserError(f"--encoder.args.{unknown[0]} is no argument of {encoder.name}") from error
        raise UserError(
            f"--encoder.name {encoder.name} with {args or 'no arguments'} cannot be built: {reason}"
        ) from error


def _size_argument(encoder: settings.Encoder, intensity: settings.Intensity) -> dict[str, Any]:
    """Transformers with position embeddings must be told the size of the image."""
    fixed = getattr(timm.get_pretrained_cfg(encoder.name), "fixed_input_size", False)
    return {"img_size": intensity.size} if fixed and "img_size" not in encoder.args else {}


def _own_args(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The user's arguments out of `model_args`: what kladi sets itself is set again."""
    bad = [key for key in stored if key in REFUSED]
    if bad:
        raise UserError(f"config.json: model_args.{bad[0]} cannot be set: {REFUSED[bad[0]]}")
    return dict(stored)


def _first_layers(model: nn.Module) -> list[str]:
    """Names of the weights that see the image's channels, as timm knows them."""
    described: Any = getattr(model, "pretrained_cfg", {})
    first = described.get("first_conv") or ()
    return [f"{layer}.weight" for layer in ((first,) if isinstance(first, str) else first)]


def _channels(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """A convolution's weight with another number of input channels, or None where that is not the only difference."""
    have, want = tuple(tensor.shape), shape
    if len(have) != 4 or len(want) != 4 or have == want or have[:1] + have[2:] != want[:1] + want[2:]:
        return None
    if (have[1], want[1]) == (3, 1):
        return tensor.sum(1, keepdim=True)
    if (have[1], want[1]) == (1, 3):
        return tensor.expand(-1, 3, -1, -1) / 3
    return None


def _prefix(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The word before every name of a file, if there is one and the model has none."""
    for prefix in PREFIXES:
        if found and all(n.startswith(prefix) for n in found) and not any(n.startswith(prefix) for n in expected):
            return prefix
    return ""


def _per_channel(values: tuple[float, ...], channels: int) -> list[float]:
    return list(values) * channels if len(values) == 1 else list(values)


def _some(word: str, names: tuple[str, ...]) -> str:
    """`, 3 missing (a, b, c)`: at most three names, closest words being of no use here."""
    if not names:
        return f", 0 {word}"
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f", {len(names)} {word} ({shown})"

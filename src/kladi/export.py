"""An encoder for somebody who has no kladi: timm, torchvision or ONNX, compared with the original before it is done.

What is written is what `encoder.preprocess` feeds: float[B, C, S, S] after the intensity pipeline of training, which
config.json spells out, -> float[B, F]. Beside it lies `example.safetensors`, two images and their features, by which
another machine can be checked.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from jaxtyping import Float
from torch import Tensor, nn

from kladi.errors import RunStopped, UserError, suggestion
from kladi.models import backbones, fused, weights
from kladi.models.backbones import Encoder

TOLERANCE = 1e-5
"""Greatest difference of a feature from the encoder's own, in float32, for features of up to 1; relative above."""
OPSET = 18
"""Of ONNX: the least that torch's exporter writes, which most runtimes read."""
_FEATURES = Callable[[Float[Tensor, "B C S S"]], Float[Tensor, "B F"]]


def export(run: str | Path, out: str | Path, kind: str) -> str:
    """Write the image encoder of a run to a new folder.

    Args:
        run: a finished run; of one with topology, what the joint stage made of its image encoder.
        out: new or empty; appears when all in it has been compared.
        kind: "timm", "torchvision" or "onnx".

    Returns:
        The line of Python that opens it.

    Raises:
        UserError: no finished run, an unknown kind, a folder that is not empty, a network that torchvision lacks, or a
            package that is not there.
        RunStopped: what was written gives other features.
    """
    if kind not in KINDS:
        raise UserError(f"--format {kind}: one of {', '.join(KINDS)}" + suggestion(kind, KINDS))
    run, out = Path(run), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there and not empty; name a new folder")
    sight = fused.description(run)
    if sight is not None and sight.sees == "diagram":
        raise UserError(f"{run} trained a diagram encoder; export the run that it began with, or the joint one")
    encoder = backbones.load(run)
    part = out.with_name(f".tmp-{os.getpid()}-{out.name}")
    part.mkdir(parents=True, mode=0o700)
    try:
        features, line = KINDS[kind](encoder, part)
        image = example(encoder)
        with torch.no_grad():
            wanted, found = encoder(image), features(image)
        _require_equal(wanted, found)
        described = backbones.read_description(run)
        described["kladi"].pop("topology", None)  # the image encoder alone goes
        weights.write(part / "config.json", json.dumps(described, indent=1, ensure_ascii=False) + "\n")
        weights.write(part / "example.safetensors", weights.to_bytes({"image": image, "features": wanted}))
        if out.is_dir():
            out.rmdir()
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return line(out)


def example(encoder: Encoder) -> Float[Tensor, "2 C S S"]:
    """Two made-up images as the encoder sees them, a ramp and noise: through the pipeline of training."""
    side = encoder.intensity.size + 5
    ramp = np.linspace(0, 255, side * side).reshape(side, side)
    noise = np.random.default_rng(0).uniform(0, 255, (side, side))
    return torch.stack([encoder.preprocess(grey.astype(np.uint8)) for grey in (ramp, noise)])


# --- the kinds: write the network into a folder; how to ask what lies there, and the line that opens it ------------


def _timm(encoder: Encoder, folder: Path) -> tuple[_FEATURES, Callable[[Path], str]]:
    file = folder / "model.safetensors"
    weights.write(file, weights.to_bytes(encoder.model.state_dict(), {"format": "pt"}))
    fresh = backbones.build(encoder.architecture, encoder.intensity).eval()
    fresh.model.load_state_dict(weights.read(file))
    return fresh, lambda out: backbones.in_timm(encoder.architecture, encoder.intensity, f"{out}/{file.name}")


def _torchvision(encoder: Encoder, folder: Path) -> tuple[_FEATURES, Callable[[Path], str]]:
    """torchvision's network of the same name, without its last linear layer.

    The two libraries name layers differently and build them in the same order, so tensors are matched by place and
    size; that each found its place is shown by the features. A network of one channel becomes one of three that are to
    be fed the same image three times.
    """
    name, file = encoder.architecture.name, folder / "model.safetensors"
    there = sorted(set(torchvision.models.list_models()) & set(timm.list_models()))
    if name not in there:
        raise UserError(f"torchvision has no {name}; --format onnx takes every encoder" + suggestion(name, there))
    network = torchvision.models.get_model(name, weights=None).eval()
    last = [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1]
    network.set_submodule(last, nn.Identity())
    given, wanted = list(backbones.in_three_channels(encoder).values()), network.state_dict()
    if [x.numel() for x in given] != [x.numel() for x in wanted.values()]:
        args = f" with {encoder.architecture.args}" if encoder.architecture.args else ""
        raise UserError(f"torchvision has no {name}{args}; --format onnx takes every encoder")
    tensors = {key: x.reshape(like.shape) for x, (key, like) in zip(given, wanted.items(), strict=True)}
    weights.write(file, weights.to_bytes(tensors))
    network.load_state_dict(weights.read(file))

    def line(out: Path) -> str:
        path = json.dumps(f"{out}/{file.name}", ensure_ascii=False)
        return (
            f'model = torchvision.models.get_model("{name}"); model.set_submodule("{last}", torch.nn.Identity()); '
            f"model.load_state_dict(safetensors.torch.load_file({path}))"
        )

    return lambda image: network(image.expand(-1, 3, -1, -1)), line


def _onnx(encoder: Encoder, folder: Path) -> tuple[_FEATURES, Callable[[Path], str]]:
    """One file with its weights; any number of images at once."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter asks for it
    except ImportError as error:
        raise UserError('--format onnx needs packages: pip install "kladi[onnx]"') from error
    file = folder / "model.onnx"
    try:
        with torch.no_grad():
            written: Any = torch.onnx.export(
                encoder.model,
                (example(encoder),),
                input_names=["image"],
                output_names=["features"],
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().partition("\n")[0]
        raise RunStopped(f"torch cannot write {encoder.architecture.name} as ONNX: {reason}") from error
    weights.write(file, written.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return (
        lambda image: torch.from_numpy(session.run(["features"], {"image": image.numpy()})[0]),
        lambda out: f"onnxruntime.InferenceSession({json.dumps(f'{out}/{file.name}', ensure_ascii=False)})",
    )


KINDS: dict[str, Callable[[Encoder, Path], tuple[_FEATURES, Callable[[Path], str]]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "onnx": _onnx,
}


def _require_equal(wanted: Float[Tensor, "B F"], found: Tensor) -> None:
    if found.shape != wanted.shape:
        raise RunStopped(f"the exported network gives {tuple(found.shape)}, the encoder {tuple(wanted.shape)}")
    apart = float(((found - wanted).abs() / wanted.abs().clamp(min=1)).max())
    if not apart <= TOLERANCE:  # also where it is no number
        raise RunStopped(f"the exported network gives other features, by up to {apart:.2g}; nothing was kept")

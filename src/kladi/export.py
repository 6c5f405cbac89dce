"""An encoder for somebody who has no kladi: timm, torchvision or ONNX, compared with the original before it is kept.

What is written answers as the encoder does: float[B, C, S, S] behind the intensity pipeline of training -> float[B, F].
Beside it lie the settings of that pipeline in config.json, and example.safetensors, by which another machine can be
checked: `source`, two grey images of 8 bits; `image`, the same behind the pipeline; `features`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from kladi.errors import RunStopped, UserError, suggestion
from kladi.learn import run_folder
from kladi.models import backbones, fused, weights
from kladi.models.backbones import Encoder

TOLERANCE = 1e-5
"""Greatest difference of a feature from the encoder's own, in float32; of the greatest feature of the image where that
is above 1."""
OPSET = 18
"""Of ONNX: the least that torch's exporter writes, which most runtimes read."""
MOST_BYTES = 2**31 - 1
"""Of an ONNX file."""
DESCRIBED = ("format", "version", "projector", "intensity")
"""Of what a run says of itself, all that goes along: no word of labels, data or the machine."""


@dataclass(frozen=True)
class Network:
    """An encoder in the words of another library.

    file, content: what is written. answers: what that content gives for images. opens: its path -> the line of Python
    that opens it. channels: of the images that it takes.
    """

    file: str
    content: bytes
    answers: Callable[[Float[Tensor, "B C S S"]], Tensor]
    opens: Callable[[str], str]
    channels: int


def export(run: str | Path, out: str | Path, kind: str) -> str:
    """Write the image encoder of a run to a new folder.

    Args:
        run: a finished run; of one with topology, what the joint stage made of its image encoder.
        out: new or empty; nothing is written before all has been compared.
        kind: "timm", "torchvision" or "onnx".

    Returns:
        The line of Python that opens it.

    Raises:
        UserError: no finished run, an unknown kind, a folder that is not empty, a network that the other library lacks,
            or a package that is not there.
        RunStopped: the other network gives other features, or it cannot be written.
    """
    if kind not in KINDS:
        raise UserError(f"--format {kind}: one of {', '.join(KINDS)}" + suggestion(kind, KINDS))
    run, out = Path(run), Path(out)
    described = backbones.read_description(run)
    sight = fused.description(run)
    if sight is not None and sight.sees == "diagram":
        raise UserError(f"{run} trained a diagram encoder; export the run that it began with, or the joint one")
    run_folder.make(out)
    try:
        run_folder.require_empty(out)
        encoder = backbones.load(run)
        with backbones.drawn_apart():
            network = KINDS[kind](encoder)
        source, image = example(encoder)
        image = image.expand(-1, network.channels, -1, -1)
        features = _compared(encoder, network, image)
    except BaseException:
        if not any(out.iterdir()):
            out.rmdir()
        raise
    described["kladi"] = {name: described["kladi"][name] for name in DESCRIBED}
    taken = described["pretrained_cfg"]
    taken["input_size"][0] = network.channels
    for name in ("mean", "std"):  # where one channel became three equal ones, so did these
        taken[name] = (taken[name] * network.channels)[: network.channels]
    shown = {"source": torch.from_numpy(source), "image": image, "features": features}
    weights.write(out / network.file, network.content)
    weights.write(out / "example.safetensors", weights.to_bytes(shown))
    weights.write(out / "config.json", json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    return network.opens(json.dumps(f"{out}/{network.file}", ensure_ascii=False))


def example(encoder: Encoder) -> tuple[UInt8[np.ndarray, "2 H W"], Float[Tensor, "2 C S S"]]:
    """Two made-up images, a ramp and noise, and what the pipeline of training makes of them."""
    side = encoder.intensity.size + 5
    ramp = np.linspace(0, 255, side * side).reshape(side, side)
    noise = np.random.default_rng(0).uniform(0, 255, (side, side))
    source = np.stack([ramp, noise]).astype(np.uint8)
    return source, torch.stack([encoder.preprocess(grey) for grey in source])


# --- the kinds -----------------------------------------------------------------------------------------------------


def _timm(encoder: Encoder) -> Network:
    content = weights.to_bytes(encoder.model.state_dict(), {"format": "pt"})
    fresh = backbones.build(encoder.architecture, encoder.intensity).eval()
    fresh.model.load_state_dict(weights.from_bytes(content))

    def opens(path: str) -> str:
        return backbones.in_timm(encoder.architecture, encoder.intensity, json.loads(path))

    return Network("model.safetensors", content, fresh, opens, encoder.intensity.channels)


def _torchvision(encoder: Encoder) -> Network:
    """torchvision's network of the same name, without its last linear layer.

    The two libraries name layers differently and build them in the same order, so tensors are matched by place and
    size; that each found its place is shown by the features. torchvision knows no network of one channel: such an
    encoder becomes one of three that are to be fed the same image three times.
    """
    name = encoder.architecture.name
    there = sorted(set(torchvision.models.list_models()) & set(timm.list_models()))
    if name not in there:
        raise UserError(f"torchvision has no {name}; try --format onnx" + suggestion(name, there))
    network = torchvision.models.get_model(name, weights=None).eval()
    last = [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1]
    network.set_submodule(last, nn.Identity())
    given, wanted = list(backbones.in_three_channels(encoder).values()), network.state_dict()
    if [x.numel() for x in given] != [x.numel() for x in wanted.values()]:
        args = f" with {encoder.architecture.args}" if encoder.architecture.args else ""
        raise UserError(f"torchvision's {name} is another network than timm's{args}; try --format onnx")
    tensors = {key: x.reshape(like.shape) for x, (key, like) in zip(given, wanted.items(), strict=True)}
    content = weights.to_bytes(tensors)
    network.load_state_dict(weights.from_bytes(content))

    def opens(path: str) -> str:
        made = f'model = torchvision.models.get_model("{name}"); model.set_submodule("{last}", torch.nn.Identity())'
        return f"{made}; model.load_state_dict(safetensors.torch.load_file({path})); model.eval()"

    return Network("model.safetensors", content, network, opens, 3)


def _onnx(encoder: Encoder) -> Network:
    """One file with its weights, for any number of images at once.

    It is asked by ONNX's own reference implementation: the usual runtime sends telemetry. What torch notes of each
    operation is left out, since that names files of this machine.
    """
    try:
        import onnx_ir.passes.common as passes
        import onnxscript  # noqa: F401  torch's exporter asks for it
        from onnx.reference import ReferenceEvaluator
    except ImportError as error:
        raise UserError('--format onnx needs packages: pip install "kladi[onnx]"') from error
    name, intensity = encoder.architecture.name, encoder.intensity
    if sum(x.numel() * x.element_size() for x in encoder.model.state_dict().values()) > MOST_BYTES:
        raise UserError(f"{name} is too large for an ONNX file, which holds 2 GiB; try --format timm")
    try:
        with torch.no_grad():
            written: Any = torch.onnx.export(
                encoder.model,
                (torch.zeros(2, intensity.channels, intensity.size, intensity.size),),
                input_names=["image"],
                output_names=["features"],
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise RunStopped(f"torch cannot write {name} as ONNX: {reason}") from error
    passes.ClearMetadataAndDocStringPass()(written.model)
    content = written.model_proto.SerializeToString()
    asked: Any = ReferenceEvaluator(content)
    return Network(
        "model.onnx",
        content,
        lambda image: torch.from_numpy(asked.run(["features"], {"image": image.numpy()})[0]),
        lambda path: f'onnx.reference.ReferenceEvaluator({path}).run(["features"], {{"image": image}})[0]',
        intensity.channels,
    )


KINDS: dict[str, Callable[[Encoder], Network]] = {"timm": _timm, "torchvision": _torchvision, "onnx": _onnx}


@torch.no_grad()
def _compared(encoder: Encoder, network: Network, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "B F"]:
    """The encoder's features, where the other network gives them too, for all images at once and for one alone."""
    wanted = encoder(image[:, : encoder.intensity.channels])
    if not bool(torch.isfinite(wanted).all()):
        raise UserError("the run's encoder gives NaN or infinity; its weights are damaged")
    for count in (len(image), 1):
        found, like = network.answers(image[:count]), wanted[:count]
        if found.shape != like.shape:
            raise RunStopped(f"the exported network gives {tuple(found.shape)}, the encoder {tuple(like.shape)}")
        apart = float(((found - like).abs() / like.abs().amax(dim=1, keepdim=True).clamp(min=1)).max())
        if not apart <= TOLERANCE:  # also where it is no number
            raise RunStopped(f"the exported network gives other features, by up to {apart:.2g}; try another --format")
    return wanted

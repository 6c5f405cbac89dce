"""An encoder round an encoder: the image and its persistence diagram to one vector. No method knows of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from kladi import config as settings
from kladi.data.views.bounded import grey, shrunk
from kladi.errors import UserError
from kladi.models import backbones, weights
from kladi.models.backbones import Encoder
from kladi.models.topology import SIZES, MixtureOfExperts, TopologyEncoder, three_layers
from kladi.structure.topology import Diagram, diagram

MOST_SIDE = 112
"""Side of the square that diagrams are made of, unless another is asked for."""
LARGE = (1000, 128)
"""Features and pixels from which on the paper's diagram encoder costs little beside the image's."""


class Fused(Encoder):
    """What an image encoder sees and what its diagram encoder sees, mixed by five experts.

    Called with an image alone, as evaluation does, it makes the diagram of that image itself; training gives it the
    diagrams that came with the views. The image encoder is taken over as it is: nothing in it is initialised again.

    Args:
        encoder: of the image, F features.
        topology: of the diagram, `embed` features.
        size: name in `SIZES`, of `topology`.
        side: of the square that diagrams are made of.
        embed, out: of the mixture.
    """

    def __init__(
        self, encoder: Encoder, topology: TopologyEncoder, size: str, side: int, *, embed: int = 256, out: int = 512
    ) -> None:
        super().__init__(encoder.model, out, encoder.architecture, encoder.intensity)
        self.features = encoder.width
        self.topology, self.size, self.side = topology, size, side
        self.visual = three_layers(encoder.width, 2 * embed, embed)
        self.mixture = MixtureOfExperts(embed, out)

    @override
    def forward(
        self,
        image: Float[Tensor, "B C H W"],
        points: Float[Tensor, "B k 2"] | None = None,
        mask: Bool[Tensor, "B k"] | None = None,
    ) -> Float[Tensor, "B F"]:
        if points is None or mask is None:
            points, mask = self.tokens(self.diagrams(image), image.device)
        return self.mixture(self.visual(super().forward(image)), self.topology(points, mask))

    def diagrams(self, image: Float[Tensor, "B C H W"]) -> list[Diagram]:
        """Of images as the encoder sees them, each normalised by its own range."""
        intensity = self.intensity
        mean, std = (torch.tensor(x, device=image.device).view(1, -1, 1, 1) for x in (intensity.mean, intensity.std))
        x = shrunk(image.detach() * std + mean, self.side)
        level = x.double().mean(dim=1).flatten(1)
        low, high = level.amin(dim=1).cpu().numpy(), level.amax(dim=1).cpu().numpy()
        return [diagram(v) for v in grey(x, low, high)]

    def tokens(self, diagrams: list[Diagram], device: torch.device) -> tuple[Tensor, Tensor]:
        """Points float32[B, k, 2] and mask bool[B, k]."""
        sizes = SIZES[self.size]
        points, mask = zip(*[one.tokens(sizes.k0, sizes.k1) for one in diagrams], strict=True)
        return torch.from_numpy(np.stack(points)).to(device), torch.from_numpy(np.stack(mask)).to(device)

    def description(self) -> dict[str, Any]:
        """What `load` needs to build it again."""
        return {"size": self.size, "side": self.side, "features": self.width}


def side_of(topology: settings.Topology, size: int) -> int:
    """Side of the square that diagrams are made of."""
    return topology.side or min(size, MOST_SIDE)


def fused(encoder: Encoder, topology: settings.Topology) -> Fused:
    """A fresh diagram encoder and mixture round an image encoder, from torch's current generator."""
    size = encoder.intensity.size
    large = encoder.width >= LARGE[0] and size >= LARGE[1]
    name = topology.encoder if topology.encoder != "auto" else ("paper" if large else "small")
    return Fused(encoder, TopologyEncoder(SIZES[name]), name, side_of(topology, size))


def load(run: str | Path) -> Encoder:
    """The encoder of a finished run, in evaluation mode: float[B, C, H, W] -> [B, F].

    >>> encoder = kladi.load("runs/a")  # doctest: +SKIP
    >>> encoder(encoder.preprocess("scan.png")[None]).shape  # doctest: +SKIP
    torch.Size([1, 512])

    Raises:
        UserError: the folder holds no finished encoder, or its weights do not fit its description.
    """
    encoder = backbones.load(run)
    described = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))["kladi"].get("topology")
    if described is None:
        return encoder
    file = Path(run) / "head.safetensors"
    with torch.random.fork_rng(devices=[]):  # as for the image encoder
        try:
            sizes = SIZES[described["size"]]
            whole = Fused(encoder, TopologyEncoder(sizes), described["size"], int(described["side"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{run}/config.json: its diagram encoder is described as {described}") from error
    prefix = "encoder."
    tensors = {n.removeprefix(prefix): t for n, t in weights.read(file).items() if n.startswith(prefix)}
    wanted = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith("model.")}
    differences = weights.compare(weights.promises(tensors), weights.promises(wanted))
    if differences:
        raise UserError(f"{file}: {differences[0]}")
    whole.load_state_dict(tensors, strict=False)
    return whole.eval()

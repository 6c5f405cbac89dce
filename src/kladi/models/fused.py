"""An encoder round an encoder: the image and its persistence diagram to one vector. No method knows of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from kladi import config as settings
from kladi.data.views.batch import Diagrams
from kladi.data.views.bounded import grey, shrunk
from kladi.errors import UserError
from kladi.models import backbones, weights
from kladi.models.backbones import Encoder, Match
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
        mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (self.intensity.mean, self.intensity.std))
        x = shrunk(image.detach().cpu().double() * std + mean, self.side)  # some devices have no float64
        level = x.mean(dim=1).flatten(1)
        return [diagram(v) for v in grey(x, level.amin(dim=1).numpy(), level.amax(dim=1).numpy())]

    def tokens(self, diagrams: list[Diagram], device: torch.device) -> tuple[Tensor, Tensor]:
        """Points [B, k, 2], in the precision of the diagram encoder, and mask bool[B, k]."""
        sizes, dtype = SIZES[self.size], next(self.topology.parameters()).dtype
        found = Diagrams.of(diagrams, sizes.k0, sizes.k1)
        return found.points.to(device, dtype), found.mask.to(device)

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
    return around(encoder, name, side_of(topology, size))


def around(encoder: Encoder, size: str, side: int) -> Fused:
    """The same by the name of its size and the side of its diagrams."""
    return Fused(encoder, TopologyEncoder(SIZES[size]), size, side)


def load(run: str | Path) -> Encoder:
    """The encoder of a finished run, in evaluation mode: float[B, C, H, W] -> [B, F].

    >>> encoder = kladi.load("runs/a")  # doctest: +SKIP
    >>> encoder(encoder.preprocess("scan.png")[None]).shape  # doctest: +SKIP
    torch.Size([1, 512])

    Raises:
        UserError: the folder holds no finished encoder, or its weights do not fit its description.
    """
    encoder = backbones.load(run)
    described = description(Path(run))
    if described is None:
        return encoder
    with torch.random.fork_rng(devices=[]):  # as for the image encoder
        whole = around(encoder, described["size"], described["side"])
    _fill(whole, Path(run))
    return whole.eval()


def load_weights(encoder: Encoder, path: str | Path) -> Match:
    """Copy local weights into an encoder, by name and shape; of a run with topology, into all of a fused one.

    Raises:
        UserError: as `backbones.load_weights`; or the run's diagram encoder is of another size.
    """
    match, run = backbones.load_weights(encoder, path), Path(path)
    if isinstance(encoder, Fused) and run.is_dir():
        described = description(run)
        if described is not None:
            if described["size"] != encoder.size:
                raise UserError(f'{run}: its diagram encoder is "{described["size"]}", not "{encoder.size}"')
            _fill(encoder, run)
    return match


def description(run: Path) -> dict[str, Any] | None:
    """What a run says of its diagram encoder; None where it has none.

    Raises:
        UserError: it cannot be built so.
    """
    if not (run / "config.json").is_file():
        return None
    found = json.loads((run / "config.json").read_text(encoding="utf-8")).get("kladi", {}).get("topology")
    if found is None:
        return None
    numbers = [found.get(key) for key in ("side", "features")] if isinstance(found, dict) else []
    if not numbers or found.get("size") not in SIZES or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise UserError(f"{run}/config.json: its diagram encoder is described as {found}; the run is damaged")
    return found


def _fill(whole: Fused, run: Path) -> None:
    """The run's weights of everything round the image encoder."""
    prefix, file = "encoder.", run / "head.safetensors"
    tensors = {n.removeprefix(prefix): t for n, t in weights.read(file).items() if n.startswith(prefix)}
    wanted = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith("model.")}
    differences = weights.compare(weights.promises(tensors), weights.promises(wanted))
    if differences:
        raise UserError(f"{file}: {differences[0]}")
    whole.load_state_dict(tensors, strict=False)

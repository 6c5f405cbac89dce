"""An encoder round an encoder: the image and its persistence diagram to one vector. No method knows of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from typing_extensions import override

from kladi import config as settings
from kladi.data.dataset import Dataset
from kladi.data.views import whole
from kladi.data.views.batch import Diagrams
from kladi.data.views.partners import partners
from kladi.data.views.region import Looks, foregrounds
from kladi.errors import UserError
from kladi.models import backbones, weights
from kladi.models.backbones import Encoder, Match
from kladi.models.topology import SIZES, MixtureOfExperts, TopologyEncoder, three_layers
from kladi.structure.topology import Diagram, diagrams

MOST_SIDE = 112
"""Side of the square that diagrams are made of, unless another is asked for."""
LARGE = (1000, 128)
"""Features and pixels from which on the paper's diagram encoder costs little beside the image's."""


EMBED, OUT = 256, 512
"""Lengths of what each of the two encoders gives, and of their mixture."""
SEEN, GIVEN, REGIONS = ("both", "diagram"), ("own", "none", "another"), ("whole", "foreground", "mask")


@dataclass(frozen=True)
class Sight:
    """What a fused encoder looks at.

    size: name in `SIZES`, of the diagram encoder. side: of the square that diagrams are made of. sees: "both" the image
    and its diagram, or the "diagram" alone. given: whose diagrams it is trained with: the image's "own", "none", or
    those of "another" image. region: of the image that its diagram is made of, "whole", "foreground" or "mask".
    """

    size: str
    side: int
    sees: str = "both"
    given: str = "own"
    region: str = "whole"

    @property
    def tokens(self) -> tuple[int, int]:
        """Points of H0 and of H1 that are kept of a diagram."""
        return SIZES[self.size].k0, SIZES[self.size].k1

    @property
    def alone(self) -> bool:
        """Whether an image alone tells what its diagram is to be."""
        return self.given == "none" or (self.given == "own" and self.region != "mask")

    @property
    def differs(self) -> str:
        """Why the diagram of an image alone is not what the encoder was trained with."""
        if self.given == "another":
            return "this encoder was trained with diagrams of other images, and is given those of the images themselves"
        return (
            "this encoder was trained on diagrams inside masks, and of an image alone it looks at the whole; "
            "encoder(image, *encoder.tokens(image, masks)) looks inside them"
        )

    def __str__(self) -> str:
        """`diagrams of the foreground at 64 px, 24 + 48 points`."""
        if self.given == "none":
            return "empty diagrams"
        whose = "of other images" if self.given == "another" else ""
        where = {"whole": "", "foreground": "of the foreground", "mask": "inside masks"}[self.region]
        said = " ".join(word for word in ("diagrams", where, whose) if word)
        return f"{said} at {self.side} px, {self.tokens[0]} + {self.tokens[1]} points"

    @property
    def width(self) -> int:
        """Of the representation."""
        return EMBED if self.sees == "diagram" else OUT


class Fused(Encoder):
    """What an image encoder sees and what its diagram encoder sees, mixed by five experts.

    Called with an image alone, as evaluation does, it makes the diagram of that image itself; training gives it the
    diagrams that came with the views. The image encoder is taken over as it is: nothing in it is initialised again.

    Args:
        encoder: of the image, F features.
        sight: what is looked at.
    """

    def __init__(self, encoder: Encoder, sight: Sight) -> None:
        super().__init__(encoder.model, sight.width, encoder.architecture, encoder.intensity)
        self.features = encoder.width
        self.sight = sight
        self.topology = TopologyEncoder(SIZES[sight.size], out=EMBED)
        self.visual = three_layers(encoder.width, 2 * EMBED, EMBED)
        self.mixture = MixtureOfExperts(EMBED, OUT)

    @override
    def forward(
        self,
        image: Float[Tensor, "B C H W"],
        points: Float[Tensor, "B k 2"] | None = None,
        mask: Bool[Tensor, "B k"] | None = None,
    ) -> Float[Tensor, "B F"]:
        if (points is None) != (mask is None):
            raise ValueError("points and mask of a diagram go together; encoder.tokens(image) gives both")
        if points is None or mask is None:
            if not self.sight.alone:
                warnings.warn(self.sight.differs, stacklevel=2)
            points, mask = self.tokens(image)
        return self.fuse(image, points, mask)

    def fuse(
        self, image: Float[Tensor, "B C H W"], points: Float[Tensor, "B k 2"], mask: Bool[Tensor, "B k"]
    ) -> Float[Tensor, "B F"]:
        """Image and diagram to one vector."""
        return self.mixture(self.visual(super().forward(image)), self.topology(points, mask))

    def tokens(
        self, image: Float[Tensor, "B C S S"], masks: Sequence[Shaped[np.ndarray, "H W"]] = ()
    ) -> tuple[Tensor, Tensor]:
        """Points [B, k, 2], in the precision of the diagram encoder, and mask bool[B, k], of these images' diagrams; no
        point where the encoder was trained without.

        Args:
            masks: one an image, above zero inside, in the pixels of its file or of the square that `preprocess` gives;
                what is next to nothing or to everything is looked at as a whole. None: where training looked.
        """
        none = self.sight.given == "none"
        of = [Diagram.empty()] * len(image) if none else self.diagrams(image, masks)
        found = Diagrams.of(of, *self.sight.tokens)
        return found.points.to(image.device, next(self.topology.parameters()).dtype), found.mask.to(image.device)

    def diagrams(
        self, image: Float[Tensor, "B C S S"], masks: Sequence[Shaped[np.ndarray, "H W"]] = ()
    ) -> list[Diagram]:
        """Of images as the encoder sees them, each normalised by its own range; without masks of the whole of each, or
        of its foreground where that was trained on."""
        if len(masks) not in (0, len(image)):
            raise ValueError(f"{len(masks)} masks for {len(image)} images; each takes one")
        mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (self.intensity.mean, self.intensity.std))
        x = image.detach().cpu() * std + mean
        own = self.sight.region == "foreground" and not len(masks)
        where = foregrounds(x) if own else [whole.laid(np.asarray(mask), x.shape[-1]) for mask in masks]
        return diagrams(Looks.of(x, self.sight.side, where).v(x))

    @property
    @override
    def title(self) -> str:
        return f"{super().title} and {self.sight.size} diagram encoder, {self.sight}"

    def description(self) -> dict[str, Any]:
        """What `load` needs to build it again."""
        return dataclasses.asdict(self.sight)


class DiagramAlone(Fused):
    """The diagram encoder alone, as the stage before the joint one trains it: its vector is the representation.

    The image encoder, its projection and the mixture are carried along untouched, so that the joint stage can begin
    with this run and finds the image encoder that this one began with.
    """

    def __init__(self, encoder: Encoder, sight: Sight) -> None:
        super().__init__(encoder, sight)
        for part in (self.model, self.visual, self.mixture):
            part.requires_grad_(False)

    @override
    def fuse(
        self, image: Float[Tensor, "B C H W"], points: Float[Tensor, "B k 2"], mask: Bool[Tensor, "B k"]
    ) -> Float[Tensor, "B F"]:
        return self.topology(points, mask)

    @property
    @override
    def title(self) -> str:
        return f"{self.sight.size} diagram encoder, {self.sight}"

    @property
    @override
    def reads_with(self) -> nn.Module:
        return self.topology


def reader(
    encoder: nn.Module, dataset: Dataset, intensity: settings.Intensity, device: torch.device
) -> Callable[[np.ndarray], tuple[Tensor, ...]]:
    """rows -> what the encoder is called with in evaluation: their images, and where it does not find their diagrams by
    itself these too, by the masks of the data set, or those of other images where it was trained with such."""
    sight = encoder.sight if isinstance(encoder, Fused) else None
    other = np.arange(len(dataset))
    if sight is not None and sight.given == "another":
        other = partners(dataset.split, dataset.group, dataset.row_id)

    def read(rows: np.ndarray) -> tuple[Tensor, ...]:
        image = whole.images(dataset, rows, intensity, device)
        if not isinstance(encoder, Fused) or encoder.sight.alone:
            return (image,)
        of = other[rows]
        shown = whole.images(dataset, of, intensity, device)
        return (image, *encoder.tokens(shown, file_masks(encoder, dataset, of, shown)))

    return read


def file_masks(
    encoder: Fused, dataset: Dataset, rows: np.ndarray, shown: Float[Tensor, "B C H W"]
) -> list[Bool[np.ndarray, "S S"]]:
    """Masks of the rows from their files; none where the images tell the region themselves."""
    return whole.masks(dataset, rows, shown, "mask") if encoder.sight.region == "mask" else []


def side_of(topology: settings.Topology, size: int) -> int:
    """Side of the square that diagrams are made of."""
    return topology.side or min(size, MOST_SIDE)


def fused(encoder: Encoder, topology: settings.Topology) -> Fused:
    """A fresh diagram encoder and mixture round an image encoder, from torch's current generator."""
    size = encoder.intensity.size
    large = encoder.width >= LARGE[0] and size >= LARGE[1]
    name = topology.encoder if topology.encoder != "auto" else ("paper" if large else "small")
    return around(encoder, Sight(name, side_of(topology, size), topology.sees, topology.diagrams, topology.region))


def around(encoder: Encoder, sight: Sight) -> Fused:
    """The same where it is known what it looks at."""
    return (DiagramAlone if sight.sees == "diagram" else Fused)(encoder, sight)


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
    with backbones.drawn_apart():
        found = around(encoder, described)
    _fill(found, Path(run))
    return found.eval()


def load_weights(encoder: Encoder, path: str | Path) -> Match:
    """Copy local weights into an encoder, by name and shape; of a run with topology, into all of a fused one.

    Raises:
        UserError: as `backbones.load_weights`; or the run's diagram encoder is of another size.
    """
    match, run = backbones.load_weights(encoder, path), Path(path)
    if not isinstance(encoder, Fused):
        return match
    described = description(run) if run.is_dir() else None
    if described is None:
        return dataclasses.replace(match, beside="diagram encoder new")
    if described.size != encoder.sight.size:
        raise UserError(f'{run}: its diagram encoder is "{described.size}", not "{encoder.sight.size}"')
    _fill(encoder, run)
    own, before = encoder.sight, described
    elsewhere = (own.side, own.region) != (before.side, before.region)
    seen = f"; it was trained on {before}, and sees {own} now" if elsewhere else ""
    return dataclasses.replace(match, beside=f"diagram encoder read{seen}")


def description(run: Path) -> Sight | None:
    """What a run with topology looks at; None for another run.

    Raises:
        UserError: it cannot be built so.
    """
    if not (run / "config.json").is_file():
        return None
    try:
        described = json.loads((run / "config.json").read_text(encoding="utf-8")).get("kladi", {})
        found = described.get("topology")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{run}/config.json cannot be read as JSON; the run is damaged") from error
    if found is None:
        return None
    with contextlib.suppress(TypeError, KeyError, AttributeError):  # no table, or other keys than a Sight's
        sight = Sight(**found)
        good = type(sight.side) is int and 0 < sight.side <= described["intensity"]["size"]
        good = good and sight.sees in SEEN and sight.given in GIVEN
        if good and sight.region in REGIONS and sight.size in SIZES:
            return sight
    raise UserError(f"{run}/config.json: its diagram encoder is described as {found}; the run is damaged")


def _fill(encoder: Fused, run: Path) -> None:
    """The run's weights of everything round the image encoder."""
    prefix, file = "encoder.", run / "head.safetensors"
    tensors = {n.removeprefix(prefix): t for n, t in weights.read(file).items() if n.startswith(prefix)}
    wanted = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("model.")}
    differences = weights.compare(weights.promises(tensors), weights.promises(wanted))
    if differences:
        raise UserError(f"{file}: {differences[0]}")
    encoder.load_state_dict(tensors, strict=False)

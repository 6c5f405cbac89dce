"""What is trained with the encoder and kept beside it: the projector, and the classifier where there is one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from kladi.errors import UserError
from kladi.models import weights


class Projector(nn.Module):
    """Features -> the embedding that a loss sees: `z = W2 relu(W1 h + b1) + b2`.

    Source: the non-linear projection of SimCLR (Chen et al., 2020, section 4.2). Without batch normalisation, as in the
    equation there: each row is then a function of itself alone, whatever batch it is in.

    Args:
        width: size F of the encoder's features.
        hidden: width of the hidden layer.
        dim: size D of the embedding.
    """

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.width, self.hidden, self.dim = width, hidden, dim
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    @override
    def forward(self, features: Float[Tensor, "B F"]) -> Float[Tensor, "B D"]:
        return self.layers(features)


@dataclass(frozen=True)
class Classifier:
    """The linear classifier that was trained on the projector's embeddings.

    weight: float32[C, D]. bias: float32[C]. columns: the node of each column. nodes: those that may be the answer.
    """

    weight: Tensor
    bias: Tensor
    columns: tuple[str, ...]
    nodes: tuple[str, ...]

    def log_probabilities(self, z: Float[Tensor, "n D"]) -> Float[Tensor, "n A"]:
        """log of the softmax over all columns, at the nodes that may be the answer."""
        place = {name: column for column, name in enumerate(self.columns)}
        log_p = torch.log_softmax(z.float() @ self.weight.T + self.bias, dim=1)
        return log_p[:, [place[name] for name in self.nodes]]


def classifier(run: str | Path) -> Classifier | None:
    """The classifier that a finished run trained along; None where its objective has none.

    Raises:
        UserError: the run's head is damaged or does not fit its description.
    """
    described = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))["kladi"]
    answers, file = (described.get("objective") or {}).get("answers"), Path(run) / "head.safetensors"
    if not answers or not file.is_file():
        return None
    damaged = UserError(f"{file}: the classifier does not fit the description in config.json; the run is damaged")
    try:
        columns, nodes = tuple(map(str, answers["columns"])), tuple(map(str, answers["nodes"]))
    except (TypeError, KeyError):
        raise damaged from None
    tensors = weights.read(file)
    found = [name for name in tensors if name.endswith(".classifier.weight")]
    weight = tensors[found[0]] if len(found) == 1 else torch.empty(0, 0)
    bias = tensors.get(found[0].removesuffix("weight") + "bias", torch.empty(0)) if found else torch.empty(0)
    if len(weight) != len(columns) or len(bias) != len(columns) or not set(nodes) <= set(columns):
        raise damaged
    return Classifier(weight, bias, columns, nodes)


def load(run: str | Path) -> Projector | None:
    """The projector of a finished run, for embeddings z; None where the run kept none.

    Raises:
        UserError: the run's head is damaged or does not fit its description.
    """
    file = Path(run) / "head.safetensors"
    if not file.is_file():
        return None
    described = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
    width, (hidden, dim) = described["num_features"], described["kladi"]["projector"]
    projector = Projector(width, hidden, dim)
    tensors = {
        name.removeprefix("projector."): tensor
        for name, tensor in weights.read(file).items()
        if name.startswith("projector.")
    }
    differences = weights.compare(weights.promises(tensors), weights.promises(projector.state_dict()))
    if differences:
        raise UserError(f"{file}: {differences[0]}")
    projector.load_state_dict(tensors)
    return projector.eval()

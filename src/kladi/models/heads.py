"""The head that is trained with the encoder and dropped after pretraining."""

from __future__ import annotations

import json
from pathlib import Path

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

"""What is trained with the encoder and kept beside it: the projector, and the classifier where there is one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from typing_extensions import override

from kladi.errors import UserError
from kladi.models import weights
from kladi.models.fused import description


class Unit(nn.Module):
    """Rows of length one."""

    @override
    def forward(self, z: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return normalize(z, dim=1, eps=1e-12)


def _plain(width: int, hidden: int, dim: int) -> nn.Sequential:
    """The non-linear projection of SimCLR (Chen et al., 2020, section 4.2), without batch normalisation, as in the
    equation there: each row is a function of itself alone, whatever batch it is in."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, dim))


def _normed(width: int, hidden: int, dim: int) -> nn.Sequential:
    """One hidden layer under batch normalisation: BYOL (Grill et al., 2020, section 3.3), and every predictor."""
    return nn.Sequential(*_hidden(width, hidden), nn.Linear(hidden, dim))


def _normed_out(width: int, hidden: int, dim: int) -> nn.Sequential:
    """And the output normalised too, without a scale of its own: MoCo v3 (Chen et al., 2021, section 4)."""
    return nn.Sequential(*_hidden(width, hidden), nn.Linear(hidden, dim, bias=False), nn.BatchNorm1d(dim, affine=False))


def _deep(width: int, hidden: int, dim: int) -> nn.Sequential:
    """Two hidden layers: Barlow Twins (Zbontar et al., 2021, section 2.2)."""
    return nn.Sequential(*_hidden(width, hidden), *_hidden(hidden, hidden), nn.Linear(hidden, dim))


def _bottleneck(width: int, hidden: int, dim: int) -> nn.Sequential:
    """Two hidden layers without normalisation, then rows of length one: DINO (Caron et al., 2021, appendix C)."""
    inner = (nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
    return nn.Sequential(*inner, nn.Linear(hidden, dim), Unit())


def _hidden(width: int, hidden: int) -> tuple[nn.Module, ...]:
    return nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()


FORMS = {
    "plain": _plain,
    "normed": _normed,
    "normed_out": _normed_out,
    "deep": _deep,
    "bottleneck": _bottleneck,
}
"""What a projector consists of; each method has that of its paper."""


class Projector(nn.Module):
    """Features [B, F] -> the embedding [B, D] that a loss sees.

    Args:
        width: size F of the encoder's features.
        hidden: width of the hidden layers.
        dim: size D of the embedding.
        form: one of `FORMS`.
    """

    def __init__(self, width: int, hidden: int, dim: int, form: str = "plain") -> None:
        super().__init__()
        self.width, self.hidden, self.dim, self.form = width, hidden, dim, form
        self.layers = FORMS[form](width, hidden, dim)

    @override
    def forward(self, features: Float[Tensor, "B F"]) -> Float[Tensor, "B D"]:
        return self.layers(features)


class Prototypes(nn.Module):
    """Cosine of each row with each of K directions: a linear layer whose weight rows have length one.

    frozen: whether no gradient reaches the directions; DINO holds them for its first epoch.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, dim), std=0.02))
        self.frozen = False

    @override
    def forward(self, z: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        weight = self.weight.detach() if self.frozen else self.weight
        return linear(z, normalize(weight, dim=1, eps=1e-12))


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
    sight = description(Path(run))
    width = sight.width if sight else described["num_features"]
    hidden, dim = described["kladi"]["projector"]
    form = described["kladi"].get("projector_form", "plain")
    if not isinstance(form, str) or form not in FORMS:
        raise UserError(f'{file}: this kladi knows no projector of the form "{form}"; pip install --upgrade kladi')
    projector = Projector(width, hidden, dim, form)
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

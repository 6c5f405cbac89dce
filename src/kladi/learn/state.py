"""A run in memory <-> named tensors of a checkpoint. Randomness is a function of the step, so none of it is saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kladi.errors import UserError
from kladi.learn import checkpoint
from kladi.learn.checkpoint import Snapshot
from kladi.models import weights
from kladi.models.weights import Promise

ENCODER, OBJECTIVE, OPTIMIZER = "encoder.model.", "objective.", "optimizer."


def encoder_tensors(objective: nn.Module) -> dict[str, Tensor]:
    """The encoder's, with timm's plain names."""
    state = objective.state_dict()
    return {name.removeprefix(ENCODER): tensor for name, tensor in state.items() if name.startswith(ENCODER)}


def head_tensors(objective: nn.Module) -> dict[str, Tensor]:
    """Everything else that was learnt: projector, and prototypes and whatever else a loss keeps."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in objective.state_dict().items():
        if not name.startswith(ENCODER):
            # What two losses share stands under both names; the file format wants each tensor's own memory.
            found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
    return found


def capture(objective: nn.Module, optimizer: Optimizer, facts: Mapping[str, Any]) -> Snapshot:
    """The state of a run, as it is now; tensors are not copied, so save before the next step.

    Args:
        objective: its encoder's tensors start with "encoder.model.".
        optimizer: its moments are named after the parameters that they belong to.
        facts: state.json; has "step".
    """
    train = {f"{OBJECTIVE}{name}": tensor for name, tensor in head_tensors(objective).items()}
    for name, parameter in objective.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            train[f"{OPTIMIZER}{name}.{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return Snapshot(encoder_tensors(objective), train, dict(facts))


def restore(objective: nn.Module, optimizer: Optimizer, folder: Path) -> dict[str, Any]:
    """Put a checkpoint's tensors back, and return its state.json.

    Names, dtypes and shapes are compared with what this configuration builds before any number is read.

    Raises:
        UserError: the checkpoint is of another model or another optimiser.
    """
    model = weights.promises(encoder_tensors(objective))
    train = weights.promises({f"{OBJECTIVE}{name}": tensor for name, tensor in head_tensors(objective).items()})
    moments = _moments(objective, optimizer, checkpoint.headers(folder))
    snapshot = checkpoint.read(folder, model, {**train, **{name: promise for name, _, _, promise in moments}})
    head = {name.removeprefix(OBJECTIVE): snapshot.train[name] for name in train}
    objective.load_state_dict({**{f"{ENCODER}{name}": t for name, t in snapshot.model.items()}, **head})
    optimizer.state.clear()
    for name, parameter, key, _ in moments:
        tensor = snapshot.train[name]
        # The step count stays on the CPU, where the optimiser keeps it.
        optimizer.state[parameter][key] = tensor if key == "step" else tensor.to(parameter.device)
    return dict(snapshot.state)


def _moments(
    objective: nn.Module, optimizer: Optimizer, found: Mapping[str, Promise]
) -> list[tuple[str, nn.Parameter, str, Promise]]:
    """The optimiser's tensors in a checkpoint: each belongs to a parameter, and is a number or has its shape."""
    parameters = dict(objective.named_parameters())
    keys = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "SGD": {"momentum_buffer"}}[type(optimizer).__name__]
    moments: list[tuple[str, nn.Parameter, str, Promise]] = []
    for name, promise in found.items():
        if not name.startswith(OPTIMIZER):
            continue
        owner, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
        if owner not in parameters or key not in keys:
            raise UserError(f"--resume: the checkpoint holds {name}, which this configuration has not")
        shape = () if key == "step" else tuple(parameters[owner].shape)
        if promise != Promise("F32", shape):
            raise UserError(f"--resume: the checkpoint's {name} is {promise}, not F32 {list(shape)}")
        moments.append((name, parameters[owner], key, promise))
    return moments

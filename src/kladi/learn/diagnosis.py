"""When a number is no number any more: which term, which layer, which images. No pixels are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kladi.data.dataset import Dataset
from kladi.data.views.batch import Batch
from kladi.models import weights

NAMED_ROWS = 20


def is_finite(terms: Mapping[str, Tensor], norm: Tensor) -> bool:
    """Whether the step may be taken."""
    return bool(
        torch.isfinite(torch.stack([*(t.detach().float() for t in terms.values()), norm.detach().float()])).all()
    )


def examine(
    objective: nn.Module, batch: Batch, dataset: Dataset, terms: Mapping[str, Tensor], norm: Tensor
) -> dict[str, Any]:
    """Terms, the first bad layer, and statistics of each image of the batch.

    Runs the batch through the objective again, with the caller's random numbers, and looks at every layer's output.
    The objective's buffers move; whoever calls this does not go on with it.

    Args:
        objective: gradients of the bad step still in place.
        batch: of the bad step.
        dataset: to name the rows.
        terms, norm: the bad step's terms and gradient norm.
    """
    bad = [name for name, term in terms.items() if not bool(torch.isfinite(term))]
    parameters = [name for name, p in objective.named_parameters() if not bool(torch.isfinite(p).all())]
    gradients = [
        name
        for name, p in objective.named_parameters()
        if p.grad is not None and not bool(torch.isfinite(p.grad).all())
    ]
    layer, embedded = _forward(objective, batch)
    images = torch.stack([view.image.flatten(1) for view in batch.views]).float()  # [V, B, pixels]
    if layer is None and gradients:
        layer = f"gradient of {gradients[-1]}"  # backward reaches the last parameter first
    return {
        "terms": {name: _number(term) for name, term in terms.items()},
        "bad_terms": bad or ["gradient"],
        "gradient_norm": _number(norm),
        "first_bad_layer": layer or "none: the second pass was finite",
        "bad_parameters": parameters[:50],
        "bad_gradients": gradients[:50],
        "rows": [_row(i, batch, dataset, images[:, i], embedded) for i in range(len(batch.row))],
    }


def write(run: Path, step: int, found: Mapping[str, Any]) -> Path:
    """`nan-step-00000123.json` in the run folder."""
    path = run / f"nan-step-{step:08d}.json"
    weights.write(path, json.dumps({"step": step, **found}, indent=1, allow_nan=False) + "\n")
    return path


def sentence(found: Mapping[str, Any]) -> str:
    """`hwc is nan; first bad layer encoder.model.conv1; rows 3, 17`."""
    rows = [row["row"] for row in found["rows"] if not row["finite"]] or [row["row"] for row in found["rows"]]
    shown = ", ".join(f"{row:,}" for row in rows[:NAMED_ROWS]) + (" ..." if len(rows) > NAMED_ROWS else "")
    return (
        f"{', '.join(found['bad_terms'])} is not finite; first bad layer {found['first_bad_layer']}; "
        f"manifest row{'s' if len(rows) > 1 else ''} {shown}"
    )


def _forward(objective: nn.Module, batch: Batch) -> tuple[str | None, Tensor | None]:
    """Name of the first layer with an output that is not finite, and what the projector gave."""
    bad: list[str] = []
    outputs: list[Tensor] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
            if isinstance(output, Tensor) and output.is_floating_point() and not bool(torch.isfinite(output).all()):
                bad.append(name)

        return hook

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ARG001
        outputs.append(output.detach())

    layers = [(name, module) for name, module in objective.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(look(name)) for name, module in layers]
    projector = objective.get_submodule("projector")
    hooks.append(projector.register_forward_hook(keep))
    try:
        with torch.no_grad():
            objective(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if any(not bool(torch.isfinite(view.image).all()) for view in batch.views):
        bad.insert(0, "the images themselves")
    return (bad[0] if bad else None), (torch.cat(outputs).float() if outputs else None)


def _row(i: int, batch: Batch, dataset: Dataset, pixels: Tensor, embedded: Tensor | None) -> dict[str, Any]:
    """Statistics of one image over its views: what tells a broken one from a sound one, and nothing to see it by."""
    position = int(batch.row[i])
    norms = [_number(z.norm()) for z in embedded[i :: len(batch.row)]] if embedded is not None else None
    return {
        "row": int(dataset.manifest_row[position]),
        "id": f"{int(dataset.row_id[position]):016x}"[:8],
        "finite": bool(torch.isfinite(pixels).all()),
        "min": _number(pixels.min()),
        "max": _number(pixels.max()),
        "mean": _number(pixels.mean()),
        "std": _number(pixels.std(correction=0)),
        "embedding_norms": norms,
    }


def _number(value: Tensor) -> float | str:
    """JSON knows no nan and no infinity."""
    number = float(value.detach())
    return number if math.isfinite(number) else str(number)

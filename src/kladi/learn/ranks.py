"""Several processes that train one encoder, a device each: their rows together, their gradients in the mean.

Each process embeds its share of a batch and then sees the embeddings of all, so that a loss is that of the whole batch
and knows nothing of processes. Without a process group every function here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from typing_extensions import override

from kladi import config as settings


def counted(train: settings.Train) -> tuple[int, int]:
    """Processes on each machine, and machines: torchrun's own numbers where it started us, else the settings'."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["GROUP_WORLD_SIZE"])
    return train.devices, train.nodes


def follows(train: settings.Train) -> bool:
    """Whether this process only lends its device to a run that another one leads, writes and shows."""
    devices, nodes = counted(train)
    if devices * nodes == 1:
        return False
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # torchrun, srun, and those that the leader starts itself
    return next((int(os.environ[name]) for name in names if name in os.environ), 0) > 0


def started_here() -> bool:
    """Whether the process that leads the run started this one; not torchrun, nor srun."""
    return "LOCAL_RANK" in os.environ and "RANK" not in os.environ and "SLURM_PROCID" not in os.environ


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def leave() -> None:
    """Part from the other processes. One that ends as a member may be aborted: gloo's threads outlive Python."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rows_of_all(x: Shaped[Tensor, "b *rest"]) -> Shaped[Tensor, "B *rest"]:
    """The rows of all processes in order of rank, however many each has; gradients come back to their own.

    The loss behind it is the same in all processes. What comes back to a process is `world` times the gradient of its
    own rows: after `mean_gradients` parameters have the gradient of the whole batch, whether they sit before this (each
    process knows a part of it) or behind (each knows all of it).
    """
    if world() == 1:
        return x
    if x.dtype == torch.bool:
        return rows_of_all(x.to(torch.uint8)).bool()
    return _Gather.apply(x) if x.requires_grad else _gathered(x)[0]


def mean_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Put the mean over processes in the place of each gradient, by one exchange for all of them."""
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def agreed(*flags: bool, device: torch.device) -> tuple[bool, ...]:
    """Each flag, raised where any process raises it: all of them take the same turn after a step."""
    if world() == 1:
        return flags
    raised = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in raised.tolist())


def _gathered(x: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes, and which of them is this one's first."""
    sizes = [torch.empty(1, dtype=torch.int64, device=x.device) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    counts = [int(size) for size in sizes]
    # Parts of one exchange must be of one size: shorter ones are filled up, and cut again.
    mine = x.new_zeros(max(counts), *x.shape[1:])
    mine[: len(x)] = x
    parts = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(parts, mine)
    whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return whole, sum(counts[: dist.get_rank()])


class _Gather(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        whole, ctx.start = _gathered(x)
        ctx.stop = ctx.start + len(x)
        return whole

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0][ctx.start : ctx.stop] * world()

"""What the pairwise losses cost: CPU time beside three bare matrix products, and memory, ours and peers'.

    python bench/kernel.py [--quick]

The floor is what any dense loss must multiply, and nothing else: Z Z^T forward, G Z and G^T Z backward, into memory
that is there already. A ratio below 1 says that the whole loss, forward and backward, is cheaper than those products;
ours can be, because a tile serves its rows and its columns. Float32, D = 128, one thread; the rows are synthetic, for
the work does not depend on them. In each round floor and losses take turns in one process; a ratio is the median over
rounds of CPU seconds. Memory is the peak above the inputs, in a process for each loss, also at 32,768 rows for ours.
Peers run where they need less than 10 GB. Linux only: the peak is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

import memory

D = 128
ROUNDS = {2048: 9, 8192: 5, 16384: 3}
ONLY_MEMORY = [32768]
MOST = 10e9
OURS = [
    "NT-Xent",
    "SupCon",
    "Jaccard",
    "tree-weighted",
    "tree-weighted, ball",
    "prototypes",
    "prototypes, ball",
    "HiMulCon",
]
PEERS = ["SupCon, dense formula", "SupCon, pytorch-metric-learning", "NT-Xent, lightly"]


def embeddings(n: int) -> Tensor:
    """Two views of n / 2 images."""
    return torch.randn(2, n // 2, D, generator=torch.Generator().manual_seed(0)).requires_grad_()


def loss_of(name: str, n: int) -> Callable[[Tensor], Tensor]:
    """z [2, n / 2, D] -> scalar."""
    B = n // 2
    g = torch.Generator().manual_seed(1)
    target = torch.randint(20, (B,), generator=g)
    if name == "NT-Xent":
        from kladi.losses import NTXentLoss

        return NTXentLoss(0.1)
    if name == "SupCon":
        from kladi.losses import SupConLoss

        module = SupConLoss(0.1)
        return lambda z: module(z, target)
    if name == "Jaccard":
        from kladi.losses import MultiLabelContrastiveLoss

        columns = [torch.randint(k, (B,), generator=g) for k in (3, 9)]  # a modality and an anatomy, as in metadata
        sets = torch.cat([torch.nn.functional.one_hot(c) for c in columns], 1).bool()
        jaccard = MultiLabelContrastiveLoss(0.07, 0.3)
        return lambda z: jaccard(z, sets)
    if name in OURS:
        from kladi.losses import HierarchyWeightedContrastiveLoss, HiMulConLoss, LevelAwareMarginLoss
        from kladi.structure.taxonomy import Taxonomy

        tax = Taxonomy.from_paths([f"{i % 4}/{i % 20}/{i}" for i in range(100)])
        leaves = torch.tensor(tax.leaves.tolist())[torch.randint(100, (B,), generator=g)]
        geometry = "poincare" if name.endswith("ball") else "sphere"
        if name.startswith("tree-weighted"):
            tree: torch.nn.Module = HierarchyWeightedContrastiveLoss(tax, geometry=geometry)
        elif name.startswith("prototypes"):
            tree = LevelAwareMarginLoss(tax, D, geometry=geometry)
        else:
            tree = HiMulConLoss(tax)
        return lambda z: tree(z, leaves)
    if name == "SupCon, dense formula":
        both = target.repeat(2)
        return lambda z: dense_supcon(normalize(z.flatten(0, 1), dim=1), both, 0.1)
    if name == "SupCon, pytorch-metric-learning":
        from pytorch_metric_learning.losses import SupConLoss as Theirs

        peer = Theirs(temperature=0.1)
        return lambda z: peer(z.flatten(0, 1), target.repeat(2))
    from lightly.loss import NTXentLoss as Lightly

    lightly = Lightly(temperature=0.1)
    return lambda z: lightly(z[0], z[1])


def dense_supcon(x: Tensor, target: Tensor, temperature: float) -> Tensor:
    """SupCon as its equation is written."""
    logits = x @ x.T / temperature
    logits = logits.masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
    log_p = logits - logits.logsumexp(1, keepdim=True)
    positive = (target[:, None] == target).fill_diagonal_(False)
    return -(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp_min(1)).mean()


# --- in a child process -----------------------------------------------------------------------------------------------


def times(n: int, names: list[str]) -> dict[str, float]:
    """CPU seconds over those of the floor, and of the floor itself under ''."""
    z = embeddings(n)
    losses = {name: loss_of(name, n) for name in names}
    flat = normalize(z.detach().flatten(0, 1), dim=1)
    square, out = flat.new_zeros(n, n), torch.empty_like(flat)

    def floor() -> None:
        torch.mm(flat, flat.T, out=square)
        torch.mm(square, flat, out=out)
        torch.mm(square.T, flat, out=out)

    def seconds(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    found: dict[str, list[float]] = {name: [] for name in ["", *names]}
    bare = 0.0
    for turn in range(ROUNDS[n] + 1):
        for name in names:
            if name in PEERS and turn != 1:  # one round tells what a factor of several is
                continue
            if name in OURS:
                bare = seconds(floor)
            loss = seconds(lambda name=name: torch.autograd.grad(losses[name](z), z))
            if turn:  # the first is a warm-up
                found[""].append(bare)
                found[name].append(loss / bare)
    return {name: statistics.median(values) for name, values in found.items()}


def peak(n: int, name: str) -> float:
    """Bytes above what the process holds once the inputs are made and a small call has loaded the code."""
    small = embeddings(256)
    torch.autograd.grad(loss_of(name, 256)(small), small)
    z, loss = embeddings(n), loss_of(name, n)
    return memory.peak(lambda: torch.autograd.grad(loss(z), z))


# --- the table --------------------------------------------------------------------------------------------------------


def child(*arguments: str) -> dict[str, float]:
    """Run this script on one job."""
    done = subprocess.run([sys.executable, __file__, "--job", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments} failed:\n{done.stderr[-2000:]}")
    print(*arguments[:2], done.stdout.splitlines()[-1], file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(sizes: list[int], only_memory: list[int]) -> None:
    held: dict[tuple[str, int], float] = {}
    ratio: dict[tuple[str, int], float] = {}
    for n in sizes:
        # A dense peer needs four times as much for twice the rows: ask before it is tried.
        names = OURS + [p for p in PEERS if 16 * held.get((p, n // 4), held.get((p, n // 2), 0) / 4) < MOST]
        for name in names:
            held[name, n] = child("peak", str(n), name)["peak"]
        for name, value in child("times", str(n), *[m for m in names if held[m, n] < MOST]).items():
            ratio[name, n] = value
    for n in only_memory:
        for name in OURS:
            held[name, n] = child("peak", str(n), name)["peak"]
    print(f"{'rows':32}" + "".join(f"{n:>21,}" for n in [*sizes, *only_memory]))
    for name in ["", *OURS, *PEERS]:
        row = f"{name or 'three products (CPU s)':32}"
        for n in [*sizes, *only_memory]:
            if not name:
                row += f"{f'{ratio[name, n]:.3f} s' if (name, n) in ratio else '':>21}"
                continue
            spent = f"{ratio[name, n]:.2f} x" if (name, n) in ratio else ("" if n in only_memory else "-")
            room = f"{held[name, n] / 1e6:,.0f} MB" if (name, n) in held else "-"
            row += f"{spent:>10}{room:>11}"
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2,048 rows only")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # with more, what is counted depends on how they wait for each other
    if arguments.job:
        kind, n, *names = arguments.job
        print(json.dumps(times(int(n), names) if kind == "times" else {"peak": peak(int(n), names[0])}))
    else:
        table([2048], []) if arguments.quick else table(sorted(ROUNDS), ONLY_MEMORY)


if __name__ == "__main__":
    main()

"""What cross-entropies on a label tree cost: CPU time and peak memory, ours, plain cross-entropy, a dense statement.

    python bench/tree_cross_entropy.py [--batch 64]

Generated trees of at most seven levels; the logits are there already, so that nothing but the losses is counted,
forward and backward. Float32, one thread. In each round all take turns in one process; a ratio is the median over
rounds of CPU seconds over those of plain cross-entropy over all nodes. Memory is the peak above the inputs, in a
process for each. The dense statement is `P = softmax(z) R^T`, `L = -sum t log P` with R and T of N x N. Linux only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import memory
from kladi.losses import HierarchicalCrossEntropy, HierarchyAwareCrossEntropy, SoftLabelCrossEntropy
from kladi.structure.taxonomy import Taxonomy

SIZES = [100, 1_000, 10_000, 50_000]
DENSE = 4_096
ROUNDS = 9
Loss = Callable[[Tensor, Tensor], Tensor]


def tree(nodes: int) -> Taxonomy:
    """Seven levels or fewer, each about five times as wide as the one above."""
    rng = np.random.default_rng(0)
    width = [max(2, round(nodes * 0.8 / 5**k)) for k in range(6, 0, -1)]
    width.append(nodes - sum(width))
    edges: list[tuple[str, str | None]] = [(f"0.{k}", None) for k in range(width[0])]
    for level in range(1, len(width)):
        above = rng.integers(0, width[level - 1], width[level])
        edges += [(f"{level}.{k}", f"{level - 1}.{parent}") for k, parent in enumerate(above)]
    return Taxonomy.from_edges(edges)


def dense(tax: Taxonomy, retain: float = 0.7) -> Loss:
    """HACE as its equations are written."""
    R = torch.from_numpy(tax.closure.T.astype(np.float32))
    T = torch.zeros(len(tax), len(tax))
    for node, parents in enumerate(tax.parents):
        T[node, node] = retain if parents else 1.0
        for parent in parents:
            T[:, node] += (1 - retain) / len(parents) * T[:, parent]
    return lambda z, y: -(T.T[y] * torch.log(torch.softmax(z, 1) @ R.T)).sum(1).mean()


def losses(tax: Taxonomy) -> dict[str, tuple[Loss, bool]]:
    """Each loss, and whether it reads all nodes or the leaves only."""
    found: dict[str, tuple[Loss, bool]] = {
        "cross-entropy, nodes": (cross_entropy, True),
        "HACE": (HierarchyAwareCrossEntropy(tax), True),
        "HACE, smoothed": (HierarchyAwareCrossEntropy(tax, label_smoothing=0.1), True),
        "HXE": (HierarchicalCrossEntropy(tax), False),
        "soft labels": (SoftLabelCrossEntropy(tax), False),
    }
    if len(tax) <= DENSE:
        found["HACE, dense"] = (dense(tax), True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ratio: dict[tuple[str, int], float] = {}
    held: dict[tuple[str, int], float] = {}
    for nodes in SIZES:
        tax = tree(nodes)
        works = {name: work(name, tax, options.batch) for name in losses(tax)}
        spent: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(ROUNDS + 1):
            for name, run in works.items():
                start = time.process_time()
                run()
                if turn:  # the first is a warm-up
                    spent[name].append(time.process_time() - start)
        for name in works:
            base = zip(spent[name], spent["cross-entropy, nodes"], strict=True)
            ratio[name, nodes] = statistics.median(mine / theirs for mine, theirs in base)
            with multiprocessing.get_context("spawn").Pool(1) as fresh:  # a process that has freed much hides a peak
                held[name, nodes] = fresh.apply(peak, (name, nodes, options.batch))
        print(f"{len(tax):,} nodes, {len(tax.leaves):,} leaves, depth {int(tax.depth.max())}")
    print(f"{'nodes':24}" + "".join(f"{n:>20,}" for n in SIZES))
    for name in dict.fromkeys(name for name, _ in ratio):
        cells = (f"{ratio[name, n]:.2f} x {held[name, n] / 1e6:,.0f} MB" if (name, n) in ratio else "-" for n in SIZES)
        print(f"{name:24}" + "".join(f"{cell:>20}" for cell in cells))


def work(name: str, tax: Taxonomy, batch: int) -> Callable[[], object]:
    """Forward and backward of a loss on random logits; plain cross-entropy takes the node's id for a column."""
    loss, every = losses(tax)[name]
    y = torch.from_numpy(np.random.default_rng(1).choice(tax.leaves, batch))
    z = torch.randn(batch, len(tax if every else tax.leaves), generator=torch.Generator().manual_seed(0))
    logits = z.requires_grad_()
    return lambda: torch.autograd.grad(loss(logits, y), logits)


def peak(name: str, nodes: int, batch: int) -> float:
    """In a process of its own: bytes above what is held once the inputs are made."""
    torch.set_num_threads(1)
    work(name, tree(100), batch)()
    return memory.peak(work(name, tree(nodes), batch))


if __name__ == "__main__":
    main()

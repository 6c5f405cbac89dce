"""What the streaming pair kernel costs, against the least that a dense one could, and against peers.

    python bench/kernel.py [--quick]

The floor is three dense products: Z Z^T, and the two products of an n x n matrix with an n x D one that its backward
needs. Nothing that holds all pairs can be faster. Times are CPU seconds of forward and backward over those of the floor,
each ratio from runs side by side, the median of them; memory is the peak of the process above what it held before, its
inputs among that. Each line is measured in a process of its own, with 2 threads that sleep while they wait (waiting is no
work, and on a busy machine it would be counted as such). Peers run where memory permits.

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DIMENSIONS = 128
TEMPERATURE = 0.1
CLASSES = (2, 3, 5)
"""Branches at each depth of the label tree: 30 leaves. The same 30 classes are (modality, anatomy) pairs, 6 x 5."""
OURS = ("SupCon", "Jaccard", "tree-weighted")
PEERS = ("dense formula", "lightly NT-Xent", "pytorch-metric-learning SupCon")
MATRICES = {"dense formula": 6, "lightly NT-Xent": 7, "pytorch-metric-learning SupCon": 12}
"""n x n float32 matrices that a peer may hold at once, rounded up: what decides whether there is memory for it."""


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="n = 2,048 and 8,192, fewer repeats, no peer above 2,048")
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "N", "REPEATS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, n, repeats = options.child
        sys.stdout.write(json.dumps(measure(what, int(n), int(repeats))))
        return 0
    began = time.monotonic()
    sizes = (2048, 8192) if options.quick else (2048, 8192, 16384)
    print(f"forward + backward, float32, D = {DIMENSIONS}, 2 threads: CPU time / floor, and peak MB above inputs\n")
    heads = [f"n = {n:,}" for n in sizes] + ([] if options.quick else ["n = 32,768"])
    print("| | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for what in OURS + PEERS:
        cells = []
        for n in sizes:
            if what in PEERS and ((options.quick and n > 2048) or not fits(what, n)):
                cells.append("-" if options.quick else "no memory")
                continue
            repeats = {2048: 15, 8192: 5, 16384: 3}[n] if what in OURS else {2048: 7, 8192: 2, 16384: 1}[n]
            cells.append(words(child(what, n, 3 if options.quick and n > 2048 else repeats)))
        if not options.quick:
            cells.append(words(child(what, 32768, 0)) if what in OURS else "-")
        print(f"| {what} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s in all")
    return 0


def child(what: str, n: int, repeats: int) -> dict[str, float]:
    """Measure in a process of its own."""
    environment = dict(os.environ, OMP_NUM_THREADS="2", MKL_NUM_THREADS="2", OMP_WAIT_POLICY="passive")
    command = [sys.executable, str(Path(__file__).resolve()), "--child", what, str(n), str(repeats)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what} at n = {n}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def words(found: dict[str, float]) -> str:
    """One cell: ratio (peak memory)."""
    ratio = f"{found['ratio']:.2f} " if "ratio" in found else ""
    return f"{ratio}({found['megabytes']:,.0f} MB)"


def fits(what: str, n: int) -> bool:
    """Whether the machine has memory for a peer's matrices now, and a quarter to spare."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return MATRICES[what] * n * n * 4 * 1.25 < free


# --- in the child -----------------------------------------------------------------------------------------------------


def measure(what: str, n: int, repeats: int) -> dict[str, float]:
    """Peak memory of one call, then the median ratio of its CPU time to that of the floor beside it."""
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    z = torch.randn(2, n // 2, DIMENSIONS).requires_grad_()
    step = stepper(what)
    step(torch.randn(2, 128, DIMENSIONS).requires_grad_())  # whatever is made once is made now
    reset_peak()
    before = peak()
    step(z)
    found = {"megabytes": (peak() - before) / 1e6}
    if repeats:
        floor(z)
        ratios = []
        for _ in range(repeats):
            least = cpu_seconds(lambda: floor(z))
            z.grad = None
            ratios.append(cpu_seconds(lambda: step(z)) / least)
        found["ratio"] = statistics.median(ratios)
    return found


def stepper(what: str):  # noqa: ANN201 - torch is imported in the child only
    """Forward and backward of one loss on float[2, B, D]; targets are the same for the same B."""
    import torch
    from torch.nn.functional import normalize

    from kladi import Taxonomy, losses

    a, b, c = CLASSES
    leaves = [f"{i}/{j}/{k}" for i in range(a) for j in range(b) for k in range(c)]
    tax = Taxonomy.from_paths(leaves)
    ours = {
        "SupCon": losses.SupConLoss(TEMPERATURE),
        "Jaccard": losses.MultiLabelContrastiveLoss(TEMPERATURE),
        "tree-weighted": losses.HierarchyWeightedContrastiveLoss(tax, TEMPERATURE),
    }

    def supcon(rows: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        rows = normalize(rows, dim=1)
        logits = rows @ rows.T / TEMPERATURE
        logits = logits.masked_fill(torch.eye(len(rows), dtype=torch.bool), -torch.inf)
        log_p = logits - torch.logsumexp(logits, dim=1, keepdim=True)
        positive = (label[:, None] == label).fill_diagonal_(False)
        return -(torch.where(positive, log_p, 0).sum(1) / positive.sum(1)).mean()

    def step(z: torch.Tensor) -> None:
        target = torch.from_numpy(tax.leaves)[torch.arange(z.shape[1]) * 7 % len(leaves)]
        place = torch.arange(z.shape[1]) * 7 % len(leaves)
        if what == "Jaccard":
            sets = torch.cat([torch.eye(a * b)[place // c], torch.eye(c)[place % c]], dim=1) > 0
            loss = ours[what](z, sets)
        elif what in ours:
            loss = ours[what](z, target)
        elif what == "dense formula":
            loss = supcon(z.flatten(0, 1), target.repeat(2))
        elif what == "lightly NT-Xent":
            from lightly.loss import NTXentLoss

            loss = NTXentLoss(temperature=TEMPERATURE)(z[0], z[1])
        else:
            from pytorch_metric_learning.losses import SupConLoss

            loss = SupConLoss(temperature=TEMPERATURE)(z.flatten(0, 1), target.repeat(2))
        loss.backward()

    return step


def floor(z) -> None:  # noqa: ANN001
    """Three dense products."""
    rows = z.detach().flatten(0, 1)
    pairs = rows @ rows.T
    _ = pairs @ rows, pairs.T @ rows


def cpu_seconds(call: Callable[[], None]) -> float:
    """CPU time of all threads of this process."""
    began = time.process_time()
    call()
    return time.process_time() - began


def reset_peak() -> None:
    """Let the peak start from what is held now; where the system does not offer that, the peak of the imports stays."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass


def peak() -> int:
    """Bytes of the process at their highest."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    raise SystemExit(main())

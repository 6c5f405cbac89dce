"""HiMulCon: the sheet's numbers, a naive statement, what it reduces to."""

import doctest
import math

import numpy as np
import pytest
import torch

from kladi.losses import HiMulConLoss, SupConLoss, himulcon
from kladi.structure.taxonomy import Taxonomy

RAGGED = ["a/x", "a/y/p", "a/y/q", "b", "c/x/p/r", "c/y"]


def naive(z, paths, tree, temperature, constraint, deduplicate):
    """Levels of slash paths from fine to coarse, pair by pair."""
    V, B, _ = z.shape
    x = torch.nn.functional.normalize(z, dim=-1)
    depth = max(path.count("/") + 1 for path in tree)
    kept, total, finer = list(range(B)), 0.0, -math.inf
    for t in range(1, depth + 1):
        label = {b: "/".join(paths[b].split("/")[: depth + 1 - t]) for b in kept}
        rows = [(v, b) for v in range(V) for b in kept]
        losses = []
        for a in rows:
            logits = {k: (x[a] @ x[k]).item() / temperature for k in rows if k != a}
            positive = [k for k in logits if label[k[1]] == label[a[1]]]
            if positive:
                log_sum = math.log(sum(math.exp(v) for v in logits.values()))
                losses.append(sum(log_sum - logits[k] for k in positive) / len(positive))
        level = sum(losses) / len(losses) if losses else 0.0
        if constraint:
            level = max(level, finer)
        total, finer = total + 2 ** (1 / t) * level, level
        if deduplicate:
            kept = [b for i, b in enumerate(kept) if label[b] not in {label[c] for c in kept[:i]}]
    return total / (depth + 1)


def drawn(paths, tax, B=9, V=2, seed=0):
    names = np.random.default_rng(seed).choice(sorted(paths), B).tolist()
    z = torch.randn(V, B, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z, names, torch.from_numpy(tax.index(names))


@pytest.mark.parametrize(
    ("constraint", "deduplicate", "value"), [(True, True, 0.851383), (False, True, 0.619015), (True, False, 0.884028)]
)
def test_worked_numbers(constraint, deduplicate, value):
    tax = Taxonomy.from_paths(["A/x", "A/y", "B/z"])
    z = torch.tensor([[[1, 0], [0.8, 0.6], [0.6, 0.8], [-0.6, 0.8]]], dtype=torch.float64)
    target = torch.from_numpy(tax.index(["A/x", "A/x", "A/y", "B/z"]))
    loss = HiMulConLoss(tax, 0.5, constraint=constraint, deduplicate=deduplicate)(z, target)
    assert loss.item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("constraint", [True, False])
@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_against_a_naive_statement(constraint, deduplicate, seed):
    tax = Taxonomy.from_paths(RAGGED)
    z, names, target = drawn([*RAGGED, "a/y", "c"], tax, seed=seed)
    loss = HiMulConLoss(tax, 0.3, constraint=constraint, deduplicate=deduplicate)(z, target)
    assert loss.item() == pytest.approx(naive(z, names, RAGGED, 0.3, constraint, deduplicate), abs=1e-12)


def test_a_flat_tree_is_supcon():
    tax = Taxonomy.from_paths(["a", "b", "c"])
    z, _, target = drawn(["a", "b", "c"], tax)
    assert HiMulConLoss(tax, 0.2)(z, target).item() == pytest.approx(SupConLoss(0.2)(z, target).item(), abs=1e-12)


def test_the_first_sample_of_each_label_goes_on():
    classes = torch.tensor([2, 0, 2, 1, 0])
    assert himulcon._first_of_each(classes, 3).tolist() == [0, 1, 3]


def test_a_dag_is_refused_and_a_temperature_of_zero():
    dag = Taxonomy.from_edges([("a", None), ("b", None), ("c", "a"), ("c", "b")])
    with pytest.raises(ValueError, match="c"):
        HiMulConLoss(dag)
    with pytest.raises(ValueError, match="temperature"):
        HiMulConLoss(Taxonomy.from_paths(["a"]), temperature=0.0)


def test_example():
    assert doctest.testmod(himulcon).failed == 0

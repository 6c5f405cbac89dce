"""NT-Xent: the worked example, its peers, and what holds for any number of views."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kladi.losses import NTXentLoss

WORKED = torch.tensor(
    [[[4, 0], [3, 1], [1, 2], [-1, 2]], [[4, 1], [2, 2], [0, 3], [-2, 1]]], dtype=torch.float64
)  # [V, B, D]


def drawn(V: int = 2, B: int = 9, D: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(V, B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(z: Tensor, temperature: float) -> float:
    """Each anchor, each of its other views, each row of the denominator."""
    V, B = z.shape[:2]
    x = normalize(z.flatten(0, 1), dim=1).tolist()
    total = 0.0
    for i in range(V * B):
        logit = [sum(a * b for a, b in zip(x[i], y, strict=True)) / temperature for y in x]
        log_sum = math.log(sum(math.exp(logit[k]) for k in range(V * B) if k != i))
        mates = [k for k in range(V * B) if k != i and k % B == i % B]
        total += sum(log_sum - logit[k] for k in mates) / len(mates)
    return total / (V * B)


@pytest.mark.parametrize(("temperature", "value"), [(0.07, 1.056500), (0.5, 1.293281), (0.10, 0.986213)])
def test_worked_example(temperature, value):
    assert NTXentLoss(temperature)(WORKED).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("V", [2, 3, 4])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 3.0])
def test_against_loops(V, temperature):
    assert NTXentLoss(temperature)(drawn(V)).item() == pytest.approx(naive(drawn(V), temperature), abs=1e-12)


@pytest.mark.parametrize("V", [2, 3])
def test_against_pytorch_metric_learning(V):
    """Its reducer means over pairs, ours over the pairs of an anchor and then over anchors: alike for equal views."""
    from pytorch_metric_learning.losses import NTXentLoss as Theirs

    z = drawn(V)
    if V == 2:  # with three, theirs leaves the other positives out of each denominator
        theirs = Theirs(temperature=0.2)(z.flatten(0, 1), torch.arange(9).repeat(V))
        assert NTXentLoss(0.2)(z).item() == pytest.approx(theirs.item(), abs=1e-10)
    else:
        from pytorch_metric_learning.losses import SupConLoss

        theirs = SupConLoss(temperature=0.2)(z.flatten(0, 1), torch.arange(9).repeat(V))
        assert NTXentLoss(0.2)(z).item() == pytest.approx(theirs.item(), abs=1e-10)


def test_value_and_gradient_of_a_cross_entropy():
    """Two views: the cross-entropy of 'which of the other rows is my mate'."""
    z = drawn(2, 40).requires_grad_()
    x = normalize(z.flatten(0, 1), dim=1)
    logits = (x @ x.T / 0.1).masked_fill(torch.eye(80, dtype=torch.bool), -math.inf)
    want = torch.nn.functional.cross_entropy(logits, torch.arange(80).roll(40))
    got = NTXentLoss(0.1)(z)
    assert got.item() == pytest.approx(want.item(), abs=1e-12)
    for a, b in zip(torch.autograd.grad(got, z), torch.autograd.grad(want, z), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
        assert b.abs().max() > 1e-4


def test_extremes():
    equal = torch.ones(2, 8, 3, dtype=torch.float64)
    assert NTXentLoss(0.1)(equal).item() == pytest.approx(math.log(15), abs=1e-10)
    apart = torch.eye(8, dtype=torch.float64).repeat(2, 1, 1)  # mates equal, all others at right angles
    assert NTXentLoss(0.1)(apart).item() == pytest.approx(math.log1p(14 * math.exp(-10)), abs=1e-12)
    assert NTXentLoss(1e-3)(apart).item() == pytest.approx(0, abs=1e-12)


def test_one_image_of_two_views_is_nothing_to_tell_apart():
    z = drawn(2, 1).requires_grad_()
    module = NTXentLoss()
    (gradient,) = torch.autograd.grad(module(z), z)
    assert module(z).item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12
    assert module.idle == 0


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.inf, math.nan])
def test_impossible_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        NTXentLoss(temperature)


def test_print_shows_the_arguments():
    assert repr(NTXentLoss(0.2)) == "NTXentLoss(temperature=0.2)"

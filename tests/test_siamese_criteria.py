"""MoCo v3, BYOL, Barlow Twins, DINO: each against loops over views and rows, its closed forms, and its peer."""

from __future__ import annotations

import doctest
import math

import jaxtyping
import pytest
import torch
from torch import Tensor

from kladi.losses import BarlowTwinsLoss, BYOLLoss, DINOLoss, MoCoV3Loss, views


def drawn(V: int = 2, B: int = 8, D: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(V, B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(row: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in row))
    return [x / length for x in row]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def pairs(V: int) -> list[tuple[int, int]]:
    return [(u, v) for u in range(V) for v in range(V) if u != v]


def moco(p: Tensor, t: Tensor, T: float) -> float:
    V, B, _ = p.shape
    total = 0.0
    for u, v in pairs(V):
        for i in range(B):
            logits = [dot(unit(p[u, i].tolist()), unit(t[v, j].tolist())) / T for j in range(B)]
            total -= 2 * T * math.log(math.exp(logits[i]) / sum(math.exp(x) for x in logits))
    return total / (len(pairs(V)) * B)


def byol(p: Tensor, t: Tensor) -> float:
    V, B, _ = p.shape
    found = [2 - 2 * dot(unit(p[u, i].tolist()), unit(t[v, i].tolist())) for u, v in pairs(V) for i in range(B)]
    return sum(found) / len(found)


def barlow(z: Tensor, weight: float) -> float:
    V, B, D = z.shape
    columns = [[[float(x) for x in z[v, :, k]] for k in range(D)] for v in range(V)]

    def standardised(column: list[float]) -> list[float]:
        mean = sum(column) / B
        variance = sum((x - mean) ** 2 for x in column) / B
        return [(x - mean) / math.sqrt(variance + 1e-5) for x in column]

    total = 0.0
    for u, v in pairs(V):
        for k in range(D):
            for m in range(D):
                c = dot(standardised(columns[u][k]), standardised(columns[v][m])) / B
                total += (1 - c) ** 2 if k == m else weight * c**2
    return total / len(pairs(V))


def dino(p: Tensor, t: Tensor, centre: Tensor, student: float, teacher: float) -> float:
    V, B, K = p.shape
    total = 0.0
    for u, v in pairs(V):
        for i in range(B):
            wanted = [math.exp((float(t[v, i, k]) - float(centre[k])) / teacher) for k in range(K)]
            said = [math.exp(float(p[u, i, k]) / student) for k in range(K)]
            total -= sum(w / sum(wanted) * math.log(s / sum(said)) for w, s in zip(wanted, said, strict=True))
    return total / (len(pairs(V)) * B)


@pytest.mark.parametrize("V", [2, 3])
def test_they_are_their_loops(V):
    p, t = drawn(V), drawn(V, seed=1)
    assert MoCoV3Loss(0.2)(p, t).item() == pytest.approx(moco(p, t, 0.2), abs=1e-12)
    assert BYOLLoss()(p, t).item() == pytest.approx(byol(p, t), abs=1e-12)
    assert BarlowTwinsLoss(0.3)(p).item() == pytest.approx(barlow(p, 0.3), abs=1e-10)
    loss = DINOLoss(5, student=0.5, teacher=0.2).double()
    loss.centre.copy_(drawn(1, 1)[0, 0])
    assert loss(p, t).item() == pytest.approx(dino(p, t, drawn(1, 1)[0, 0], 0.5, 0.2), abs=1e-12)


def test_closed_forms():
    """The sheet's, for eight images in two views."""
    equal, apart = torch.ones(2, 8, 8, dtype=torch.float64), torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
    assert MoCoV3Loss(0.2)(equal, equal).item() == pytest.approx(0.4 * math.log(8), abs=1e-12)
    assert MoCoV3Loss(0.2)(apart, apart).item() == pytest.approx(0.4 * math.log1p(7 * math.exp(-5)), abs=1e-12)
    assert MoCoV3Loss(0.2)(apart, apart).item() == pytest.approx(0.018435, abs=1e-6)
    p = drawn()
    right_angle = torch.stack([-p[..., 1], p[..., 0], *[0 * p[..., 0]] * 3], dim=-1)
    flat = torch.stack([p[..., 0], p[..., 1], *[0 * p[..., 0]] * 3], dim=-1)
    both = p[:1].expand(2, 8, 5)
    assert BYOLLoss()(both, both).item() == pytest.approx(0, abs=1e-12)
    assert BYOLLoss()(both, -3 * both).item() == pytest.approx(4, abs=1e-12)
    assert BYOLLoss()(flat[:1].expand(2, 8, 5), right_angle[:1].expand(2, 8, 5)).item() == pytest.approx(2, abs=1e-12)
    white = torch.linalg.qr(drawn(1, 32, 8)[0] - drawn(1, 32, 8)[0].mean(0)).Q * math.sqrt(32)
    white = white - white.mean(0)
    assert BarlowTwinsLoss()(torch.stack([white, white])).item() == pytest.approx(0, abs=1e-6)
    assert BarlowTwinsLoss(0.0)(torch.stack([white, -white])).item() == pytest.approx(4 * 8, abs=1e-2)
    rank_one = drawn(1, 32, 1).expand(2, 32, 8)
    assert BarlowTwinsLoss(0.005)(rank_one).item() == pytest.approx(0.005 * 8 * 7, abs=1e-4)
    loss = DINOLoss(16).double()
    assert loss(torch.zeros(2, 8, 16, dtype=torch.float64), drawn(2, 8, 16)).item() == pytest.approx(math.log(16))


def test_two_directions_are_the_originals_sum():
    """MoCo v3's and BYOL's own code adds the directions; ours is their mean."""
    p, t = drawn(), drawn(seed=1)
    one = MoCoV3Loss(0.2)(torch.stack([p[0], p[0]]), torch.stack([t[1], t[1]]))  # both pairs: view 0 against target 1
    other = MoCoV3Loss(0.2)(torch.stack([p[1], p[1]]), torch.stack([t[0], t[0]]))
    assert MoCoV3Loss(0.2)(p, t).item() == pytest.approx((one + other).item() / 2, abs=1e-12)


def test_barlow_is_the_pseudocode_of_its_paper():
    z = drawn(2, 16, 6)
    bn = torch.nn.BatchNorm1d(6, affine=False, dtype=torch.float64)
    c = bn(z[0]).T @ bn(z[1]) / 16
    off = c.flatten()[:-1].view(5, 7)[:, 1:].flatten()
    theirs = (c.diagonal() - 1).pow(2).sum() + 0.01 * off.pow(2).sum()
    assert BarlowTwinsLoss(0.01)(z).item() == pytest.approx(theirs.item(), abs=1e-12)


def test_the_centre_moves_after_it_was_read_and_only_in_training():
    loss = DINOLoss(5, momentum=0.9).double()
    p, t = drawn(), drawn(seed=1)
    first = loss(p, t).item()
    assert first == pytest.approx(dino(p, t, torch.zeros(5), 0.1, 0.04), abs=1e-12)
    torch.testing.assert_close(loss.centre, 0.1 * t.mean(dim=(0, 1)))
    second = loss(p, t).item()
    assert second == pytest.approx(dino(p, t, 0.1 * t.mean(dim=(0, 1)), 0.1, 0.04), abs=1e-12)
    torch.testing.assert_close(loss.centre, 0.19 * t.mean(dim=(0, 1)))
    loss.eval()(p, t)
    torch.testing.assert_close(loss.centre, 0.19 * t.mean(dim=(0, 1)))
    assert "centre" in loss.state_dict()


@pytest.mark.parametrize("make", [MoCoV3Loss, BYOLLoss, lambda: DINOLoss(5)])
def test_no_gradient_reaches_the_target(make):
    p, t = drawn().requires_grad_(), drawn(seed=1).requires_grad_()
    make().double()(p, t).backward()
    assert p.grad.abs().sum() > 0
    assert t.grad is None


@pytest.mark.parametrize("make", [lambda: MoCoV3Loss(0.01), BYOLLoss, lambda: DINOLoss(5, 0.01, 0.01)])
def test_extremes_are_finite(make):
    p = (1e4 * drawn()).requires_grad_()
    loss = make().double()(p, 1e4 * drawn(seed=1))
    loss.backward()
    assert loss.isfinite()
    assert p.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MoCoV3Loss(0.0), "temperature must be a positive number, not 0.0"),
        (lambda: DINOLoss(4, teacher=-1.0), "temperature must be a positive number, not -1.0"),
        (lambda: DINOLoss(4, momentum=2.0), "momentum must lie between 0 and 1, not 2.0"),
        (lambda: DINOLoss(0), "dim must be 1 or more, not 0"),
        (lambda: BarlowTwinsLoss(-0.1), "weight must be 0 or more, not -0.1"),
    ],
)
def test_impossible_arguments_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_one_view_cannot_be_compared():
    for make in (MoCoV3Loss, BYOLLoss, lambda: DINOLoss(5)):
        with pytest.raises(ValueError, match="two views of an image at least, not 1"):
            make()(drawn(1), drawn(1))
    with pytest.raises(ValueError, match="two views"):
        BarlowTwinsLoss()(drawn(1))


def test_other_shapes_are_named():
    """As a user meets it, who runs no checks of types."""
    p = drawn()
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        for make in (MoCoV3Loss, BYOLLoss, lambda: DINOLoss(5)):
            with pytest.raises(ValueError, match=r"predictions \(2, 8, 5\) and targets \(2, 1, 5\) differ"):
                make()(p, p[:, :1])
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_examples_and_words():
    assert doctest.testmod(views).failed == 0
    assert repr(MoCoV3Loss(0.2)) == "MoCoV3Loss(temperature=0.2)"
    assert repr(BarlowTwinsLoss(0.1)) == "BarlowTwinsLoss(weight=0.1)"
    assert repr(DINOLoss(3)) == "DINOLoss(student=0.1, teacher=0.04, momentum=0.9)"

"""The pair kernel of the ball against the same sums written densely."""

import math

import pytest
import torch

from kladi.losses.contrast import OwnView, PairTables
from kladi.losses.contrast_ball import KEPT, _BallPairs, _sums, contrast_in_ball
from kladi.losses.geometry import PoincareBall

BALL = PoincareBall(0.1, 2.3)


def case(n: int = 24, U: int = 4, seed: int = 0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 3, generator=g, dtype=torch.float64).to(dtype)
    classes = torch.randint(U, (n,), generator=g)

    def symmetric(low, high):
        t = low + (high - low) * torch.rand(U, U, generator=g, dtype=torch.float64)
        return ((t + t.T) / 2).to(dtype)

    weight = torch.where(symmetric(0, 1) > 0.5, symmetric(0.1, 1), 0)
    return z, classes, PairTables(weight=weight, scale=symmetric(1, 8), bias=symmetric(-1, 1), positive=None)


def dense(z, classes, tables, views=1, own=None):
    x = BALL.embed(z)
    n = len(x)
    pair = (classes[:, None], classes)
    weight = tables.weight if tables.weight.ndim == 2 else torch.diag(tables.weight)
    A = tables.scale[pair]
    W, B = weight[pair], torch.zeros_like(A) if tables.bias is None else tables.bias[pair]
    if own is not None:
        sample = torch.arange(n) % (n // views)
        same = sample[:, None] == sample
        W = torch.where(same, own.weight, W)
        if own.scale is not None:
            A, B = torch.where(same, own.scale, A), torch.where(same, own.bias, B)
    off = ~torch.eye(n, dtype=torch.bool)
    W = W * off
    logits = torch.stack([B[i] - A[i] * BALL.distance(x[i].expand_as(x), x) for i in range(n)])
    lse = torch.logsumexp(logits.masked_fill(~off, -math.inf), 1)
    has = W.sum(1) > 0
    rows = lse - torch.where(W > 0, W * logits, 0).sum(1) / W.sum(1).clamp_min(1e-300)
    return rows[has].mean(), 1 - has.double().mean()


@pytest.mark.parametrize("tile", [1, 5, 8, 23, 512])
@pytest.mark.parametrize("own", [None, OwnView(scale=3.0, weight=1.0, bias=-0.4)])
def test_dense_sums(tile, own):
    z, classes, tables = case()
    if own is not None:  # views of one sample are of one class
        classes = classes[:8].repeat(3)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    got, idle = contrast_in_ball(BALL.embed(ours), classes, tables, BALL, views=3, own=own, tile=tile)
    want, idle_dense = dense(theirs, classes, tables, 3, own)
    got.backward()
    want.backward()
    assert got.item() == pytest.approx(want.item(), abs=1e-12)
    assert idle.item() == pytest.approx(idle_dense.item())
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-11)


@pytest.mark.parametrize("tile", [2, 3, 5, 50])  # streamed, streamed, kept, one tile
@pytest.mark.parametrize("weight", ["leaf", "graded"])
@pytest.mark.parametrize("mode", ["scale", "mass", "both", "neither"])
@pytest.mark.parametrize("U", [3, 40])  # runs of one class that span tiles; more runs than are met one by one
@pytest.mark.parametrize("sharp", [1, 400])  # one exponential a pair; a running log-sum-exp
def test_every_path(tile, weight, mode, U, sharp):
    z, classes, tables = case(n=50, U=U, seed=3)
    assert (KEPT * tile >= 50) == (tile >= 5)
    one = torch.full_like(tables.scale, 2.0)
    tables = PairTables(
        weight=torch.rand(U, generator=torch.Generator().manual_seed(2)).double()
        if weight == "leaf"
        else tables.weight,
        scale=sharp * (tables.scale if mode in {"scale", "both"} else one),
        bias=tables.bias if mode in {"mass", "both"} else None,
    )
    for own in (None, OwnView(weight=0.7, scale=3.0, bias=0.2), OwnView(weight=0.7)):
        of_row = classes if own is None else classes[:25].repeat(2)
        ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
        got, _ = contrast_in_ball(BALL.embed(ours), of_row, tables, BALL, views=2, own=own, tile=tile)
        want, _ = dense(theirs, of_row, tables, 2, own)
        got.backward()
        want.backward()
        assert got.item() == pytest.approx(want.item(), rel=1e-12)
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-11 * sharp)


@pytest.mark.parametrize(("sharp", "raised"), [(1, True), (400, False)])
def test_which_sums_of_exponentials_are_met(sharp, raised):
    """That the cases above meet both kinds."""
    z, classes, tables = case(n=70, U=3, seed=3)
    x = BALL.embed(z)
    tables = PairTables(weight=tables.weight, scale=sharp * tables.scale, bias=tables.bias)
    pairs = _BallPairs(x, classes, tables, torch.ones(3).double(), BALL.curvature, views=1, tile=5)
    assert bool(_sums(pairs, raised=True)) == raised


@pytest.mark.parametrize("curvature", [1e-6, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("apart", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 0.0])
def test_near_pairs_lose_no_more_digits_than_to_squared_distances(curvature, apart):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(200, 128, generator=g, dtype=torch.float64)
    z = torch.cat([z, z + apart * torch.randn(200, 128, generator=g, dtype=torch.float64) / math.sqrt(128)])
    ball = PoincareBall(curvature, 2.3)
    x = ball.embed(z).float()
    near, far = x[:200], x[200:]
    tables = PairTables(weight=torch.ones(1), scale=torch.ones(()))
    pairs = _BallPairs(x, torch.zeros(400).long(), tables, torch.ones(1), curvature, views=1, tile=400)
    got, _ = pairs.angles(slice(0, 200), slice(200, 400), pairs.room(x), pairs.room(x), apart=False)
    want = ball.distances(near.double(), far.double(), exact=True)
    ours = (got.double() / math.sqrt(curvature) - want).abs()
    theirs = (ball.distances(near, far).double() - want).abs()
    assert ours.max() < 1.1 * theirs.max()
    assert ours[want > 1].max() < max(1e-5, 1.5 * theirs[want > 1].max())


def test_gradient_of_near_and_equal_pairs_in_float32():
    """Equal points have no direction from one to the other; those an eightieth apart have one, to two digits."""
    z, classes, tables = case(n=100, seed=5)
    single = PairTables(*(t.float() for t in (tables.weight, tables.scale, tables.bias)))
    for step in (0.0, 0.0125):
        both = torch.cat([z, z + step * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))])
        both = both.float().double()
        double_, float_ = both.clone().requires_grad_(), both.float().requires_grad_()
        contrast_in_ball(BALL.embed(double_), classes.repeat(2), tables, BALL)[0].backward()
        contrast_in_ball(BALL.embed(float_), classes.repeat(2), single, BALL)[0].backward()
        assert (float_.grad - double_.grad).norm() < 2e-2 * double_.grad.norm()


def test_what_is_no_number_stays_none():
    z, classes, tables = case()
    z[3] = math.nan
    assert contrast_in_ball(BALL.embed(z), classes, tables, BALL)[0].isnan()


def test_gradcheck_through_the_embedding_and_the_clip():
    z, classes, tables = case(n=10)
    z = (2 * z).requires_grad_()
    assert (z.norm(dim=1) > BALL.clip).any()
    assert torch.autograd.gradcheck(lambda z: contrast_in_ball(BALL.embed(z), classes, tables, BALL, tile=4)[0], z)


def test_a_pair_taken_out_of_the_denominator_leaves_no_trace():
    z, classes, tables = case(n=12, U=3)
    cut = tables.weight == 0
    assert cut.any()
    tables = PairTables(weight=tables.weight, scale=tables.scale, bias=tables.bias.masked_fill(cut, -math.inf))
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    got, _ = contrast_in_ball(BALL.embed(ours), classes, tables, BALL, tile=5)
    got.backward()
    big = PairTables(weight=tables.weight, scale=tables.scale, bias=tables.bias.clamp_min(-1e6))
    want, _ = dense(theirs, classes, big)
    want.backward()
    assert got.item() == pytest.approx(want.item(), abs=1e-10)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-10)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_nothing_to_attract(n):
    z, _, _ = case()
    z = z[:n].requires_grad_()
    tables = PairTables(weight=torch.eye(4).double(), scale=torch.ones(4, 4).double(), bias=None)
    loss, idle = contrast_in_ball(BALL.embed(z), torch.arange(n), tables, BALL)
    loss.backward()
    assert loss.item() == 0
    assert idle.item() == 1
    assert torch.equal(z.grad, torch.zeros_like(z)) if z.grad is not None else n == 0


def test_float32_is_near_float64_and_order_does_not_matter():
    z, classes, tables = case(n=200)
    single = PairTables(*(t.float() for t in (tables.weight, tables.scale, tables.bias)))
    want = contrast_in_ball(BALL.embed(z), classes, tables, BALL)[0].item()
    assert contrast_in_ball(BALL.embed(z.float()), classes, single, BALL)[0].item() == pytest.approx(want, rel=1e-5)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert contrast_in_ball(BALL.embed(z[order]), classes[order], tables, BALL)[0].item() == pytest.approx(want)


def test_sharp_logits_stay_finite():
    z, classes, tables = case()
    sharp = PairTables(weight=tables.weight, scale=1000 * tables.scale, bias=tables.bias)
    z = z.requires_grad_()
    loss, _ = contrast_in_ball(BALL.embed(z), classes, sharp, BALL, tile=7)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()

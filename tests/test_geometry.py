"""Sphere and ball: against naive formulas, against geoopt, at their limits, at their extremes."""

import doctest
import math

import pytest
import torch

import reference
from kladi.losses import geometry
from kladi.losses.geometry import PoincareBall, Sphere

BALLS = [PoincareBall(0.1, 2.3), PoincareBall(1.0, 2.3), PoincareBall(0.01, 5.0)]
ALL = [Sphere(), *BALLS]


def rows(n: int, D: int, seed: int = 0, scale: float = 1.0, dtype=torch.float64) -> torch.Tensor:
    return scale * torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def geoopt():
    """geoopt scripts functions with a deprecated facility at import; that is why it is an oracle and no dependency."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return pytest.importorskip("geoopt")


def ball_of(geoopt, space: PoincareBall):
    # A Python float would be kept in float32.
    return geoopt.PoincareBall(torch.tensor(space.curvature, dtype=torch.float64))


# --- against another statement of the same thing --------------------------------------------------------------------


@pytest.mark.parametrize("space", ALL, ids=str)
def test_naive_statement(space):
    c = getattr(space, "curvature", 0.1)
    clip = getattr(space, "clip", 2.3)
    z = torch.cat([rows(5, 3), rows(2, 3, 1, 10.0), torch.zeros(1, 3, dtype=torch.float64)])
    x = space.embed(z)
    assert torch.allclose(x, torch.stack([reference.embed(row, space.name, c, clip) for row in z]), atol=1e-14)
    d = torch.tensor([[reference.distance(a, b, space.name, c) for b in x] for a in x])
    # acosh near 1 and the gram form each cost half the digits; how many exactly, the machine's products say.
    assert torch.allclose(space.distances(x, x), d, atol=2e-7)
    assert torch.allclose(space.distances(x, x, exact=True), d, atol=1e-8)
    assert torch.allclose(space.distance(x[:4], x[4:]), torch.diagonal(d[:4, 4:]), atol=1e-8)
    num, den = space.moments(x[:5])
    middle, defined = space.mean(num.sum(0, keepdim=True), den.sum(0, keepdim=True))
    assert defined.all()
    assert torch.allclose(middle[0], reference.mean(list(x[:5]), space.name, c), atol=1e-14)
    for t in (0.0, 0.05, 0.5, 1.0):
        got = space.step(x[:1], x[1:2], torch.full((1, 1), t, dtype=torch.float64))
        assert torch.allclose(got[0], reference.step(x[0], x[1], t, space.name, c), atol=1e-13)


@pytest.mark.parametrize("space", BALLS, ids=str)
def test_geoopt_agrees(space, geoopt):
    ball = ball_of(geoopt, space)
    z = rows(6, 4)
    x = space.embed(z)
    assert torch.allclose(x, ball.expmap0(geometry.clip_norm(z, space.clip)), atol=1e-12)
    assert torch.allclose(space.distance(x[:3], x[3:]), ball.dist(x[:3], x[3:]), atol=1e-10)
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 0.1], dtype=torch.float64)
    num, den = space.moments(x)
    middle, _ = space.mean((weights[:, None] * num).sum(0, keepdim=True), (weights * den).sum()[None])
    assert torch.allclose(middle[0], ball.weighted_midpoint(x, weights, reducedim=[0]), atol=1e-10)
    for t in (0.05, 0.3, 0.95):
        got = space.step(x[:3], x[3:], torch.full((3, 1), t, dtype=torch.float64))
        assert torch.allclose(got, ball.geodesic(torch.tensor(t, dtype=torch.float64), x[:3], x[3:]), atol=1e-10)
    outside = rows(3, 4, 5, 20.0)
    assert torch.allclose(geometry.project(outside, space.curvature), ball.projx(outside), atol=1e-12)
    assert torch.equal(geometry.project(x, space.curvature), x)


def test_a_midpoint_of_two_weights_is_not_the_geodesic_step(geoopt):
    """Except at one half: a prototype that moved by weighted midpoints would lag behind."""
    space = PoincareBall(0.1, 2.3)
    x = space.embed(torch.tensor([[1.525, 0.0], [-1.525, 0.0]], dtype=torch.float64))
    assert float(space.distance(x[:1], x[1:])) == pytest.approx(6.1)
    ball = ball_of(geoopt, space)

    def apart(t: float) -> float:
        weights = torch.tensor([1 - t, t], dtype=torch.float64)
        midpoint = ball.weighted_midpoint(x, weights, reducedim=[0])[None]
        return float(space.distance(midpoint, space.step(x[:1], x[1:], torch.tensor([[t]], dtype=torch.float64))))

    assert apart(0.5) < 1e-7
    assert apart(0.05) == pytest.approx(0.17, abs=0.01)


# --- limits ---------------------------------------------------------------------------------------------------------


def test_no_curvature_is_twice_euclid():
    x, y = rows(4, 3), rows(4, 3, 1)
    flat = PoincareBall(1e-10, 100.0)
    a, b = flat.embed(x), flat.embed(y)
    assert torch.allclose(a, x, rtol=1e-8)
    assert torch.allclose(flat.distance(a, b), 2 * (x - y).norm(dim=-1), rtol=1e-7)
    num, den = flat.moments(a)
    assert torch.allclose(flat.mean(num.sum(0, True), den.sum()[None])[0][0], x.mean(0), rtol=1e-6)
    t = torch.full((4, 1), 0.3, dtype=torch.float64)
    assert torch.allclose(flat.step(a, b, t), 0.7 * x + 0.3 * y, rtol=1e-6)


@pytest.mark.parametrize("space", BALLS, ids=str)
def test_distance_from_the_centre_is_twice_the_norm(space):
    z = rows(5, 3, scale=0.5)
    z = z * (space.clip / z.norm(dim=-1, keepdim=True)).clamp_max(1)
    x = space.embed(z)
    assert torch.allclose(space.distance(x, torch.zeros_like(x)), 2 * z.norm(dim=-1), rtol=1e-9)
    far = space.embed(torch.tensor([[100.0, 0, 0], [-100.0, 0, 0]], dtype=torch.float64))
    assert float(space.distance(far[:1], far[1:])) == pytest.approx(space.diameter, rel=1e-9)


def test_the_sphere_has_diameter_two():
    x = Sphere().embed(torch.tensor([[3.0, 0], [-0.1, 0]]))
    assert float(Sphere().distance(x[:1], x[1:])) == Sphere().diameter == 2.0


@pytest.mark.parametrize("space", ALL, ids=str)
def test_step_starts_and_ends_where_it_should(space):
    x = space.embed(rows(4, 3))
    y = space.embed(rows(4, 3, 1))
    nothing, whole = torch.zeros(4, 1, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)
    assert torch.allclose(space.step(x, y, nothing), x, atol=1e-14)
    assert torch.allclose(space.step(x, y, whole), y, atol=1e-12)


@pytest.mark.parametrize("space", ALL, ids=str)
def test_distances_do_not_change_under_an_isometry(space):
    x, y = space.embed(rows(4, 3)), space.embed(rows(5, 3, 1))
    Q = torch.linalg.qr(rows(3, 3, 2)).Q
    assert torch.allclose(space.distances(x @ Q, y @ Q), space.distances(x, y), atol=1e-12)
    if isinstance(space, PoincareBall):
        shift = space.embed(rows(1, 3, 3, 0.3))

        def move(p):
            return geometry.mobius_add(shift.expand_as(p), p, space.curvature)

        assert torch.allclose(space.distances(move(x), move(y)), space.distances(x, y), atol=1e-10)


# --- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [0.0, 1e-15, 1e-6, 1.0, 1e6])
def test_every_norm_is_finite_and_keeps_inside(space, dtype, norm):
    z = (norm * torch.tensor([[0.6, 0.8], [0.6, -0.8]], dtype=dtype)).requires_grad_()
    x = space.embed(z)
    space.distances(x, x.detach().flip(0)).sum().backward()
    assert x.isfinite().all()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    radius = 1.0 if isinstance(space, Sphere) else 1 / math.sqrt(space.curvature)
    assert (x.norm(dim=-1) <= radius * (1 + 1e-6)).all()
    if norm == 0:
        assert (x == 0).all()


def test_a_zero_row_gets_no_gradient_on_the_sphere():
    z = torch.zeros(2, 3, requires_grad=True)
    (geometry.normalise(z) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.equal(z.grad, torch.zeros(2, 3))


def test_a_clipped_row_feels_no_radial_pull():
    z = torch.tensor([[30.0, 40.0]], dtype=torch.float64, requires_grad=True)
    space = PoincareBall()
    space.distance(space.embed(z), torch.tensor([[0.1, -0.2]], dtype=torch.float64)).sum().backward()
    assert float((z.grad * z.detach()).sum()) == pytest.approx(0, abs=1e-12)
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("space", ALL, ids=str)
def test_equal_points_have_a_finite_gradient(space):
    z = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    x = space.embed(z)
    (space.distances(x, x).sum() + space.distance(x[:1], x[1:]).sum()).backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("space", ALL, ids=str)
def test_gradients(space):
    z, w = rows(3, 3).requires_grad_(), rows(4, 3, 1, 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, w: space.distances(space.embed(z), space.embed(w)), (z, w))
    assert torch.autograd.gradcheck(lambda z, w: space.distance(space.embed(z), space.embed(w[:3])), (z, w))
    assert torch.autograd.gradcheck(lambda z: space.similarities(space.embed(z), space.embed(w.detach())), (z,))


def test_float32_tiles_keep_the_stated_accuracy():
    """The gram form loses digits for near pairs: in the ball the more, the nearer the rim they are."""
    for c, far_error, near_error in [(0.1, 7e-4, 5e-3), (1.0, 6e-3, 4e-2)]:
        space = PoincareBall(c, 2.3)
        base = rows(64, 128)
        z = torch.cat([base, base + 1e-3 * rows(64, 128, 1), base + 0.1 * rows(64, 128, 2), rows(64, 128, 3, 0.1)])
        exact = space.distances(space.embed(z), space.embed(z))
        error = (space.distances(space.embed(z.float()), space.embed(z.float())).double() - exact).abs()
        error.fill_diagonal_(0)
        assert error[exact > 0.2].max() < far_error
        assert error.max() < near_error


def test_opposites_have_no_middle_on_the_sphere():
    x = torch.tensor([[1.0, 0], [-1.0, 0]])
    num, den = Sphere().moments(x)
    assert not Sphere().mean(num.sum(0, True), den.sum()[None])[1].any()
    half = torch.full((1, 1), 0.5)
    assert torch.equal(Sphere().step(x[:1], x[1:], half), x[:1])
    assert not Sphere().mean(torch.zeros(1, 2), torch.zeros(1))[1].any()
    assert not PoincareBall().mean(torch.zeros(1, 2), torch.zeros(1))[1].any()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"geometry": "torus"}, "geometry"),
        ({"geometry": "poincare", "curvature": 0.0}, "curvature"),
        ({"geometry": "poincare", "curvature": -1.0}, "curvature"),
        ({"geometry": "poincare", "curvature": math.nan}, "curvature"),
        ({"geometry": "poincare", "clip": 0.0}, "clip"),
        ({"geometry": "poincare", "curvature": 1.0, "clip": 3.1}, "at most 3"),
    ],
)
def test_impossible_spaces_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        geometry.named(**arguments)


def test_named():
    assert geometry.named("sphere") == Sphere()
    assert geometry.named("poincare", 1.0, 3.0) == PoincareBall(1.0, 3.0)


def test_examples_in_docstrings():
    result = doctest.testmod(geometry)
    assert result.failed == 0
    assert result.attempted > 0

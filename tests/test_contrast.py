"""The streaming pair kernel against the same sums pair by pair, and the promises of its docstring."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kladi.losses.contrast import OwnView, PairTables, contrast
from kladi.losses.pair_logsumexp import pair_logsumexp
from peak_memory import PEAK, needs_proc
from reference_contrast import dense, loops

U, D = 4, 5
TABLES = ["one scale", "scales", "bias", "dropped", "count", "diagonal", "diagonal count", "everything"]
OWN = {"none": None, "weight": OwnView(weight=1.0), "light": OwnView(weight=0.3), "logit": OwnView(0.7, 3.0, -0.4)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(kind: str, classes: int = U, dtype: torch.dtype = torch.float64) -> PairTables:
    """Tables of a kind; symmetric, with weights of all sizes and some zero."""
    g = generator(7)

    def symmetric(low: float, high: float) -> Tensor:
        table = low + (high - low) * torch.rand(classes, classes, generator=g, dtype=torch.float64)
        return (table + table.T) / 2

    weight = symmetric(0, 1)
    weight = torch.where(weight > 0.45, weight, 0)
    weight[0, 0] = 0  # a class that is not even like itself
    scale, bias, positive = torch.tensor(4.0, dtype=torch.float64), None, None
    if kind in {"scales", "bias", "dropped", "everything"}:
        scale = symmetric(1, 6)
    if kind in {"bias", "everything"}:
        bias = symmetric(-1, 1)
    if kind in {"dropped", "everything"}:
        bias = torch.zeros_like(weight) if bias is None else bias
        bias[0, 2] = bias[2, 0] = bias[0, 0] = -math.inf
        weight = torch.where(bias == -math.inf, 0, weight)
    if kind.startswith("diagonal"):
        weight = weight.diagonal().clone()
        weight[1:] = torch.linspace(0.2, 1, classes - 1, dtype=torch.float64)
    if kind in {"count", "diagonal count", "everything"}:
        positive = (weight > 0).double()
    tables = PairTables(weight, scale, bias, positive)
    return PairTables(**{f.name: moved(getattr(tables, f.name), dtype) for f in dataclasses.fields(tables)})


def moved(table: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if table is None else table.to(dtype)


def rows(views: int = 2, samples: int = 12, width: int = D, seed: int = 0, classes: int = U) -> tuple[Tensor, Tensor]:
    """Unit rows, view-major, and classes in no order."""
    g = generator(seed)
    x = normalize(torch.randn(views * samples, width, generator=g, dtype=torch.float64), dim=1)
    return x, torch.randint(classes, (samples,), generator=g).repeat(views)


def with_gradient(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def close(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), float((a - b).abs().max())


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("views", [1, 2, 3])
def test_value_is_that_of_a_double_loop(kind, own, views):
    x, classes = rows(views)
    loss, idle = contrast(x, classes, made(kind), views=views, own=OWN[own], tile=7)
    want, want_idle = loops(x, classes, made(kind), views=views, own=OWN[own])
    assert loss.item() == pytest.approx(want, abs=1e-12)
    assert idle.item() == pytest.approx(want_idle, abs=1e-12)
    assert want > 0.1  # the case says something


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("tile", [7, 50, 2048])
def test_value_and_gradient_do_not_depend_on_the_tile(kind, own, tile):
    x, classes = rows(3, 21)
    x.requires_grad_()
    want = with_gradient(dense(x, classes, made(kind), views=3, own=OWN[own]), x)
    got = with_gradient(contrast(x, classes, made(kind), views=3, own=OWN[own], tile=tile)[0], x)
    close(got, want)
    assert want[1].abs().max() > 1e-4


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("tile", [7, 50, 2048])
def test_keys_apart_from_rows(kind, tile):
    x, classes = rows(1, 20)
    y, of_key = rows(1, 33, seed=1)
    x.requires_grad_()
    y.requires_grad_()
    want = with_gradient(dense(x, classes, made(kind), keys=y, key_classes=of_key), x, y)
    loss, idle = contrast(x, classes, made(kind), keys=y, key_classes=of_key, tile=tile)
    close(with_gradient(loss, x, y), want)
    naive, naive_idle = loops(x.detach(), classes, made(kind), keys=y.detach(), key_classes=of_key)
    assert loss.item() == pytest.approx(naive, abs=1e-12)
    assert idle.item() == pytest.approx(naive_idle, abs=1e-12)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("own", ["none", "logit"])
@pytest.mark.parametrize("tile", [4, 2048])
def test_gradcheck(kind, own, tile):
    x, classes = rows(2, 3, width=3)
    settings = {"views": 2, "own": OWN[own], "tile": tile}
    assert torch.autograd.gradcheck(lambda x: contrast(x, classes, made(kind), **settings)[0], x.requires_grad_())


def test_gradcheck_of_keys():
    x, classes = rows(1, 4, width=3)
    y, of_key = rows(1, 5, width=3, seed=1)
    x.requires_grad_()
    y.requires_grad_()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return contrast(x, classes, made("everything"), keys=y, key_classes=of_key, tile=3)[0]

    assert torch.autograd.gradcheck(loss, (x, y))


def test_a_queue_needs_no_gradient():
    x, classes = rows(1, 9)
    y, of_key = rows(1, 9, seed=1)
    loss, _ = contrast(x.requires_grad_(), classes, made("scales"), keys=y, key_classes=of_key)
    loss.backward()
    assert x.grad.abs().sum() > 0
    assert y.grad is None


def test_logsumexp_alone():
    x, classes = rows(1, 15)
    tables = made("bias")
    logits = tables.scale[classes[:, None], classes] * (x @ x.T) + tables.bias[classes[:, None], classes]
    want = logits.fill_diagonal_(-math.inf).logsumexp(1)
    got = pair_logsumexp(x, classes, tables.scale, tables.bias, tile=4)
    assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_more_classes_in_a_tile_than_segments(monkeypatch):
    """Above that number a tile is multiplied by a gathered table instead of stripe by stripe."""
    monkeypatch.setattr("kladi.losses.pair_logsumexp.SEGMENTS", 20)
    x, classes = rows(2, 130, classes=90)
    x.requires_grad_()
    tables = made("everything", classes=90)
    for own in ("none", "logit"):
        want = with_gradient(dense(x, classes, tables, views=2, own=OWN[own]), x)
        got = with_gradient(contrast(x, classes, tables, views=2, own=OWN[own], tile=128)[0], x)
        close(got, want)


@pytest.mark.parametrize("tile", [8, 2048])
@pytest.mark.parametrize("kind", ["one scale", "everything"])
def test_tiles_keep_their_precision_where_backward_is_called_under_autocast(kind, tile):
    """Torch asks for backward outside of it; who does not listen still gets the softmax in float32."""
    x, classes = rows(2, 20)
    x = x.float().requires_grad_()
    tables = made(kind, dtype=torch.float32)
    total = pair_logsumexp(x, classes, tables.scale, tables.bias, tile=tile)
    outward = torch.linspace(0, 1, len(x))
    (want,) = torch.autograd.grad(total, x, outward, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (gradient,) = torch.autograd.grad(total, x, outward)
    assert torch.equal(gradient, want)


# --- orders and names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TABLES)
def test_order_of_rows_and_names_of_classes_do_not_matter(kind):
    x, classes = rows(1, 40)
    x.requires_grad_()
    tables = made(kind)
    want = with_gradient(contrast(x, classes, tables, tile=16)[0], x)
    order = torch.randperm(len(x), generator=generator(2))
    name = torch.randperm(U, generator=generator(3))  # class u is called name[u] now

    def renamed(table: Tensor | None) -> Tensor | None:
        if table is None or table.ndim == 0:
            return table
        back = torch.argsort(name)
        return table[back] if table.ndim == 1 else table[back][:, back]

    other = PairTables(*(renamed(t) for t in (tables.weight, tables.scale, tables.bias, tables.positive)))
    moved_x = x.detach()[order].requires_grad_()
    got = with_gradient(contrast(moved_x, name[classes[order]], other, tile=16)[0], moved_x)
    close([got[0], got[1][torch.argsort(order)]], want)


def test_tables_with_rows_that_no_point_belongs_to():
    x, classes = rows(1, 20)
    wide = made("everything", classes=9)
    narrow = PairTables(*(t[:U, :U] for t in (wide.weight, wide.scale, wide.bias, wide.positive)))
    assert contrast(x, classes, wide)[0].item() == pytest.approx(contrast(x, classes, narrow)[0].item(), abs=1e-12)


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one scale", "everything", "diagonal"])
@pytest.mark.parametrize("temperature", [0.07, 0.01, 1e-3])
@pytest.mark.parametrize("tile", [16, 2048])
def test_logits_of_any_size(kind, temperature, tile):
    """Beyond what exp can hold in float32, the sums are joined in log space."""
    x, classes = rows(2, 30)
    x[5] = x[4]  # two rows alike, so that the largest logit is met
    tables = dataclasses.replace(made(kind), scale=made(kind).scale / made(kind).scale.max() / temperature)
    x.requires_grad_()
    want = with_gradient(dense(x, classes, tables, views=2, own=OWN["weight"]), x)
    close(with_gradient(contrast(x, classes, tables, views=2, own=OWN["weight"], tile=tile)[0], x), want, 1e-10)
    narrow = x.detach().float().requires_grad_()
    got = with_gradient(contrast(narrow, classes, tables, views=2, own=OWN["weight"], tile=tile)[0], narrow)
    assert got[0].dtype == torch.float32
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-5)
    assert torch.allclose(got[1].double(), want[1], rtol=1e-2 if temperature == 1e-3 else 1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["one scale", "scales", "everything", "diagonal count"])
@pytest.mark.parametrize("tile", [128, 2048])
def test_float32_is_within_a_millionth_of_float64(kind, tile):
    x, classes = rows(2, 750, width=128)
    x = x.float().double().requires_grad_()
    tables = made(kind)
    tables = dataclasses.replace(tables, scale=tables.scale / tables.scale.max() / 0.1)
    want = with_gradient(contrast(x, classes, tables, views=2, own=OWN["weight"], tile=tile)[0], x)
    narrow = x.detach().float().requires_grad_()
    got = with_gradient(contrast(narrow, classes, tables, views=2, own=OWN["weight"], tile=tile)[0], narrow)
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-6)
    assert got[1].double().norm().item() == pytest.approx(want[1].norm().item(), rel=1e-6)
    assert float((got[1] - want[1]).norm() / want[1].norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("views", [1, 2])
def test_a_tiny_weight_beside_a_great_one_counts(dtype, views):
    """One row a class: only the pairs across classes weigh, by a billionth of what the diagonal says."""
    x, _ = rows(views, 6)
    classes = torch.arange(6).repeat(views)
    weight = torch.full((6, 6), 1e-9, dtype=torch.float64).fill_diagonal_(1.0)
    tables = PairTables(weight, torch.tensor(10.0, dtype=torch.float64))
    own = None if views == 1 else OwnView(weight=0.0)
    want, _ = loops(x, classes, tables, views=views, own=own)
    got, idle = contrast(x.to(dtype), classes, tables, views=views, own=own)
    assert idle == 0
    assert got.item() == pytest.approx(want, rel=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("own", [None, OwnView(weight=0.0)])
def test_weights_that_float_cannot_hold_leave_no_crumbs(own):
    """3 x 1/3 - 1 is no weight: rows whose only kin are themselves and their unweighted views are idle, exactly."""
    views = 3 if own else 1
    x, _ = rows(views, 50)
    for value in (1 / 3, 0.1, 1e-20, 0.7):
        tables = PairTables(torch.eye(50) * value, torch.tensor(10.0))
        loss, idle = contrast(x.float(), torch.arange(50).repeat(views), tables, views=views, own=own)
        assert loss == 0
        assert idle == 1


def test_a_count_of_many_rows_is_exact():
    """No threshold that grows with the batch: the one row with a mate of weight 1e-4 is an anchor among 3,000."""
    x, _ = rows(1, 3000, width=2)
    classes = torch.arange(3000)
    weight = torch.eye(3000)
    weight[0, 1] = weight[1, 0] = 1e-4
    loss, idle = contrast(x.float(), classes, PairTables(weight, torch.tensor(2.0)), tile=512)
    assert idle.item() == pytest.approx(1 - 2 / 3000, abs=1e-6)
    lse = (2 * (x[:2] @ x.T)).scatter(1, torch.tensor([[0], [1]]), -math.inf).logsumexp(1)
    assert loss.item() == pytest.approx(float((lse - 2 * (x[0] @ x[1])).mean()), rel=1e-5)


def test_half_precision_points_are_read_in_float32():
    x, classes = rows(2, 20)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype).requires_grad_()
        loss, _ = contrast(half, classes, made("scales"), views=2)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(contrast(half.detach().float(), classes, made("scales"), views=2)[0].item())
        loss.backward()
        assert half.grad.dtype == dtype


# --- batches that are not what one hopes for --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("n", [0, 1])
def test_too_few_rows_for_a_pair(kind, n):
    x, classes = rows(1, n)
    x.requires_grad_()
    for own in (None, OwnView()):
        loss, idle = contrast(x, classes, made(kind), own=own)
        assert loss == 0
        assert idle == 1
        loss.backward()
        assert torch.equal(x.grad, torch.zeros_like(x))
        x.grad = None


def test_two_rows_leave_no_choice():
    """The mate is the whole denominator: 0, with a zero gradient; of two classes nobody has a mate."""
    x, _ = rows(1, 2)
    x.requires_grad_()
    for classes, share in ((torch.tensor([1, 1]), 0), (torch.tensor([1, 2]), 1)):
        loss, idle = contrast(x, classes, made("diagonal"))
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert idle == share
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.abs().max() < 1e-12


def test_no_positive():
    x, classes = rows(2, 9)
    x.requires_grad_()
    tables = PairTables(torch.zeros(U, U), torch.tensor(5.0))
    loss, idle = contrast(x, classes, tables, views=2)
    loss.backward()
    assert loss == 0
    assert idle == 1
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_a_row_without_any_pair_is_no_anchor_and_gets_no_nan():
    """Everything about its class is dropped."""
    x, _ = rows(1, 7)
    classes = torch.tensor([0, 1, 1, 1, 1, 1, 1])
    bias = torch.tensor([[-math.inf, -math.inf], [-math.inf, 0.0]])
    tables = PairTables(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor(5.0), bias)
    for scale in (5.0, 500.0):
        tables = dataclasses.replace(tables, scale=torch.tensor(scale))
        x = x.detach().requires_grad_()
        loss, idle = contrast(x, classes, tables, tile=3)
        loss.backward()
        want = dense(x[1:].detach(), torch.zeros(6, dtype=torch.int64), PairTables(torch.ones(1), torch.tensor(scale)))
        assert loss.item() == pytest.approx(want.item(), rel=1e-12)
        assert idle.item() == pytest.approx(1 / 7)
        assert torch.equal(x.grad[0], torch.zeros(D, dtype=torch.float64))
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("what", ["zero", "equal"])
@pytest.mark.parametrize("scale", [10.0, 1000.0])
def test_rows_that_say_nothing(what, scale):
    """All logits alike: log(n - 1), whatever they are."""
    x = torch.zeros(10, D, dtype=torch.float64)
    if what == "equal":
        x[:, 0] = 1
    x.requires_grad_()
    classes = torch.tensor([0, 1]).repeat(5)
    loss, idle = contrast(x, classes, PairTables(torch.ones(2), torch.tensor(scale)), tile=4)
    assert loss.item() == pytest.approx(math.log(9), abs=1e-10)
    assert idle == 0
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("own", OWN)
def test_a_class_for_each_sample(own):
    x, _ = rows(2, 15)
    classes = torch.arange(15).repeat(2)
    for kind in TABLES:
        tables = made(kind, classes=15)
        want, want_idle = loops(x, classes, tables, views=2, own=OWN[own])
        loss, idle = contrast(x, classes, tables, views=2, own=OWN[own], tile=8)
        assert loss.item() == pytest.approx(want, abs=1e-12)
        assert idle.item() == pytest.approx(want_idle, abs=1e-12)


def test_refusals():
    x, classes = rows(2, 5)
    with pytest.raises(ValueError, match="own views"):
        contrast(x, classes, made("scales"), views=2, own=OwnView(), keys=x, key_classes=classes)
    with pytest.raises(ValueError, match="key_classes"):
        contrast(x, classes, made("scales"), keys=x)


def test_backward_twice_over_a_kept_graph():
    """A single tile is kept from the forward; it must survive its use."""
    x, classes = rows(2, 10)
    x.requires_grad_()
    loss, _ = contrast(x, classes, made("scales"), views=2)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY = """
    import torch
    from kladi.losses.contrast import OwnView, PairTables, contrast
    torch.set_num_threads(1)
    def call(n):
        x = torch.nn.functional.normalize(torch.randn(n, 64), dim=1).requires_grad_()
        table = torch.rand(8, 8)
        tables = PairTables(table + table.T, 5 + table + table.T)
        contrast(x, torch.arange(n) % 8, tables, views=2, own=OwnView())[0].backward()
    call(64)
    before = peak()
    call(12_000)
    print(peak() - before)
"""


@pytest.mark.slow
@needs_proc
def test_no_matrix_of_all_pairs_is_ever_held():
    """Peak memory of the process, forward and backward, a fifth of one n x n matrix."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK + textwrap.dedent(MEMORY)], capture_output=True, text=True, check=True
    )
    assert 0 < int(done.stdout) < 12_000**2 * 4 / 5

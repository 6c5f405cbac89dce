"""One battery for every loss that `kladi.losses` exports: what anyone may rely on without reading its formula.

A new loss needs one line in `CASES`; `test_every_loss_is_here` fails until it has one.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kladi import losses
from kladi.structure.taxonomy import Taxonomy

PATHS = ["a/x", "a/y/p", "a/y/q", "b/x", "b/y", "c"]
D = 6


@dataclasses.dataclass(frozen=True)
class Case:
    """How to make a loss and what it eats.

    make: taxonomy -> module.
    eats: "z" views of embeddings; "pair" online and target embeddings, [V, B, D] each; "logits" one column a node;
        "leaf logits" one a leaf.
    target: "" none, "nodes" ids of a taxonomy, "classes" any ids, "sets" bool label sets.
    pairwise: it compares samples, so that samples without a mate are idle.
    order_free: permuting samples or views changes nothing.
    direction: only the direction of a row matters, not its length.
    needs: smallest batch with a gradient.
    views: fewest views.
    """

    make: Callable[[Taxonomy], nn.Module]
    eats: str = "z"
    target: str = ""
    pairwise: bool = False
    order_free: bool = True
    direction: bool = True
    needs: int = 1
    views: int = 1


def of(name: str, **arguments: object) -> Callable[[Taxonomy], nn.Module]:
    return lambda tax: getattr(losses, name)(**arguments)


def on_tree(name: str, **arguments: object) -> Callable[[Taxonomy], nn.Module]:
    return lambda tax: getattr(losses, name)(tax, **arguments)


WRITTEN = {
    "NTXentLoss": Case(of("NTXentLoss"), pairwise=True),
    "SupConLoss": Case(of("SupConLoss"), target="classes", pairwise=True),
    "MultiLabelContrastiveLoss": Case(of("MultiLabelContrastiveLoss"), target="sets", pairwise=True),
    "HierarchyWeightedContrastiveLoss": Case(
        on_tree("HierarchyWeightedContrastiveLoss"), target="nodes", pairwise=True
    ),
    "HierarchyWeightedContrastiveLoss, mass, graded": Case(
        on_tree("HierarchyWeightedContrastiveLoss", mode="mass", positives="graded"), target="nodes", pairwise=True
    ),
    "HierarchyWeightedContrastiveLoss, view": Case(
        on_tree("HierarchyWeightedContrastiveLoss", positives="view"), target="nodes", pairwise=True
    ),
    "HierarchyWeightedContrastiveLoss, ball": Case(
        on_tree("HierarchyWeightedContrastiveLoss", temperature=0.2, geometry="poincare"),
        target="nodes",
        pairwise=True,
        direction=False,
    ),
    "LevelAwareMarginLoss": Case(on_tree("LevelAwareMarginLoss", dim=D), target="nodes"),
    "LevelAwareMarginLoss, ball": Case(
        on_tree("LevelAwareMarginLoss", dim=D, geometry="poincare"), target="nodes", direction=False
    ),
    "HiMulConLoss": Case(on_tree("HiMulConLoss"), target="nodes", pairwise=True, order_free=False),
    "HiMulConLoss, all rows": Case(on_tree("HiMulConLoss", deduplicate=False), target="nodes", pairwise=True),
    "BarlowTwinsLoss": Case(of("BarlowTwinsLoss"), direction=False, needs=2, views=2),
    "BYOLLoss": Case(of("BYOLLoss"), eats="pair", views=2),
    "MoCoV3Loss": Case(of("MoCoV3Loss"), eats="pair", views=2),
    "DINOLoss": Case(of("DINOLoss", dim=D), eats="pair", direction=False, views=2),
    "HierarchyAwareCrossEntropy": Case(
        on_tree("HierarchyAwareCrossEntropy"), eats="logits", target="nodes", direction=False
    ),
    "HierarchyAwareCrossEntropy, anchored, smoothed": Case(
        on_tree("HierarchyAwareCrossEntropy", weighting="anchored", label_smoothing=0.1),
        eats="logits",
        target="nodes",
        direction=False,
    ),
    "HierarchicalCrossEntropy": Case(
        on_tree("HierarchicalCrossEntropy"), eats="leaf logits", target="nodes", direction=False
    ),
    "SoftLabelCrossEntropy": Case(
        on_tree("SoftLabelCrossEntropy"), eats="leaf logits", target="nodes", direction=False
    ),
}
EXPORTED = {
    name
    for name in dir(losses)
    if inspect.isclass(getattr(losses, name)) and issubclass(getattr(losses, name), nn.Module)
}
# Losses of the public contract that are not exported yet have their line already; it wakes up with the export.
CASES = {title: case for title, case in WRITTEN.items() if title.split(",")[0] in EXPORTED}


def every(keep: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("title", [title for title, case in CASES.items() if keep(case)])


@pytest.fixture(scope="module")
def tax() -> Taxonomy:
    return Taxonomy.from_paths(PATHS)


@pytest.fixture
def without_type_checks():
    """What a user meets, who does not run jaxtyping's hook: the loss's own words."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- making inputs ----------------------------------------------------------------------------------------------------


def differentiable(case: Case, tax: Taxonomy, V: int = 2, B: int = 7, dtype=torch.float64, seed: int = 0) -> Tensor:
    """The argument that the loss is differentiated in."""
    shape = {"logits": (B, len(tax.names)), "leaf logits": (B, len(tax.leaves))}.get(case.eats, (V, B, D))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def others(case: Case, tax: Taxonomy, z: Tensor, seed: int = 0) -> list[Tensor]:
    """The arguments after it: targets of the same batch, or the target network's embeddings."""
    B = z.shape[0] if "logits" in case.eats else z.shape[1]
    rng = np.random.default_rng(seed)
    if case.eats == "pair":
        return [
            torch.randn(z.shape, generator=torch.Generator().manual_seed(seed + 99), dtype=torch.float64).to(z.dtype)
        ]
    if case.target == "sets":
        return [torch.from_numpy(rng.random((B, 4)) < 0.5)]
    if case.target:
        leaves = np.asarray(tax.leaves)
        picks = np.resize(leaves[rng.permutation(len(leaves))[: max(1, min(3, B))]], B)  # mates for nearly all
        return [torch.from_numpy(picks[rng.permutation(B)])]
    return []


def made(title: str, tax: Taxonomy, dtype=torch.float64) -> nn.Module:
    """The loss, past its first call, where one with prototypes still has nothing to compare."""
    case = CASES[title]
    module = case.make(tax).to(dtype if dtype == torch.float64 else torch.float32)
    if title.startswith("LevelAwareMarginLoss"):
        every_leaf = torch.from_numpy(np.array(tax.leaves))
        module(differentiable(case, tax, B=len(every_leaf), dtype=dtype, seed=5), every_leaf)
    return module.eval()


def value_and_gradient(module: nn.Module, z: Tensor, rest: list[Tensor]) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    value = module(z, *rest)
    value.backward()
    assert z.grad is not None
    return value.detach(), z.grad


# --- the list ---------------------------------------------------------------------------------------------------------


def test_every_loss_is_here():
    assert {title.split(",")[0] for title in CASES} == EXPORTED


@every()
def test_the_signature_is_the_schema(title, tax):
    kinds = {p.kind for p in inspect.signature(type(CASES[title].make(tax)).__init__).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    assert len((type(CASES[title].make(tax)).__doc__ or "").split()) > 20


# --- scalar, dtype, precision -----------------------------------------------------------------------------------------


@every()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scalar_in_at_least_float32(title, tax, dtype):
    case = CASES[title]
    z = differentiable(case, tax, dtype=dtype)
    value, gradient = value_and_gradient(made(title, tax, dtype), z, others(case, tax, z))
    assert value.shape == ()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.isfinite()
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@every()
def test_autocast_changes_nothing(title, tax):
    case = CASES[title]
    module, z = made(title, tax, torch.float32), differentiable(case, tax, dtype=torch.float32)
    rest = others(case, tax, z)
    want, want_gradient = value_and_gradient(module, z, rest)
    z.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(z, *rest)
    got.backward()  # outside, as torch asks
    assert got.dtype == torch.float32
    assert torch.equal(got.detach(), want)
    assert torch.equal(z.grad, want_gradient)


@every()
def test_float32_is_within_a_hundred_thousandth_of_float64(title, tax):
    case = CASES[title]
    z = differentiable(case, tax, B=40)
    want = made(title, tax)(z, *others(case, tax, z))
    z = z.float()
    got = made(title, tax, torch.float32)(z, *others(case, tax, z))
    assert got.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)


@every()
def test_gradcheck(title, tax):
    case = CASES[title]
    module, z = made(title, tax), differentiable(case, tax, B=4)
    rest = others(case, tax, z)
    assert torch.autograd.gradcheck(lambda z: module(z, *rest), z.requires_grad_())


@every()
def test_inputs_stay_as_they_were_and_the_value_repeats(title, tax):
    case = CASES[title]
    module, z = made(title, tax), differentiable(case, tax)
    rest = others(case, tax, z)
    before = [t.clone() for t in (z, *rest)]
    first, second = module(z, *rest), module(z, *rest)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, (z, *rest), strict=True))


# --- permutations -----------------------------------------------------------------------------------------------------


@every(lambda case: case.order_free)
def test_order_of_samples_does_not_matter(title, tax):
    case = CASES[title]
    module, z = made(title, tax), differentiable(case, tax)
    rest = others(case, tax, z)
    want, want_gradient = value_and_gradient(module, z, rest)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    along = 0 if "logits" in case.eats else 1
    moved = [t[order] if case.target else t[:, order] for t in rest]
    got, gradient = value_and_gradient(module, z.index_select(along, order), moved)
    assert got.item() == pytest.approx(want.item(), abs=1e-12)
    assert torch.allclose(gradient, want_gradient.index_select(along, order), atol=1e-12)


@every(lambda case: case.order_free and "logits" not in case.eats)
@pytest.mark.parametrize("V", [2, 3])
def test_order_of_views_does_not_matter(title, tax, V):
    case = CASES[title]
    module, z = made(title, tax), differentiable(case, tax, V=V)
    rest = others(case, tax, z)
    flipped = [t.flip(0) if case.eats == "pair" else t for t in rest]
    assert module(z.flip(0), *flipped).item() == pytest.approx(module(z, *rest).item(), abs=1e-12)


@every(lambda case: case.target == "nodes" and case.order_free)
def test_names_of_nodes_do_not_matter(title, tax):
    """Other names, so another order of nodes, and the columns of logits with them."""
    case = CASES[title]
    new_name = {name: "/".join(chr(219 - ord(part)) for part in name.split("/")) for name in tax.names}
    renamed = Taxonomy.from_paths([new_name[name] for name in tax.names])
    move = torch.from_numpy(np.array(renamed.index([new_name[name] for name in tax.names])))
    assert not torch.equal(move, torch.arange(len(move)))
    z = differentiable(case, tax)
    (target,) = others(case, tax, z)
    moved = z
    if case.eats == "logits":
        moved = torch.empty_like(z).index_copy(1, move, z)
    if case.eats == "leaf logits":
        leaf_move = torch.searchsorted(
            torch.from_numpy(np.array(renamed.leaves)), move[torch.from_numpy(np.array(tax.leaves))]
        )
        moved = torch.empty_like(z).index_copy(1, leaf_move, z)
    modules = [case.make(t).double() for t in (tax, renamed)]
    for call in range(2):  # the second call of a loss with prototypes has something to compare
        values = [modules[0](z + call, target), modules[1](moved + call, move[target])]
        assert values[0].item() == pytest.approx(values[1].item(), abs=1e-12)


@every(lambda case: case.direction)
def test_only_direction_matters(title, tax):
    case = CASES[title]
    module, z = made(title, tax), differentiable(case, tax)
    rest = others(case, tax, z)
    length = torch.rand(2, 7, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    assert module(length * z, *rest).item() == pytest.approx(module(z, *rest).item(), abs=1e-12)


# --- batches that are not what one hopes for --------------------------------------------------------------------------


@every()
@pytest.mark.parametrize(
    "situation", ["one sample", "no sample", "one label", "equal rows", "zero rows", "one zero row", "long", "short"]
)
def test_degenerate_batches_are_finite(title, tax, situation):
    case = CASES[title]
    B = {"one sample": 1, "no sample": 0}.get(situation, 7)
    if case.needs > B:
        pytest.skip(f"needs {case.needs} samples")
    z = differentiable(case, tax, B=B)
    rest = others(case, tax, z)
    if situation == "one label" and case.target:
        rest = [rest[0][:1].repeat(7, *[1] * (rest[0].ndim - 1))]
    elif situation == "equal rows":
        z = torch.ones_like(z)
    elif situation == "zero rows":
        z = torch.zeros_like(z)
    elif situation == "one zero row":
        z.flatten(0, -2)[3] = 0
    elif situation == "long":
        z = 1e4 * z
    elif situation == "short":
        z = 1e-8 * z
    for dtype in (torch.float64, torch.float32):
        value, gradient = value_and_gradient(
            made(title, tax, dtype), z.to(dtype), [t.to(dtype) if t.is_floating_point() else t for t in rest]
        )
        assert value.isfinite()
        assert gradient.isfinite().all()
        if B == 0:
            assert value == 0


@every(lambda case: case.pairwise)
@pytest.mark.parametrize("B", [0, 1, 5])
def test_no_positive_is_a_zero_that_keeps_its_graph(title, tax, B):
    """One view, and no two samples alike."""
    case = CASES[title]
    module, z = made(title, tax), differentiable(case, tax, V=1, B=B)
    rest = []
    if case.target == "sets":
        rest = [torch.eye(5, dtype=torch.bool)[:B]]
    elif case.target:
        kinless = (["a/x", "b/x", "c"] if "graded" in title or "HiMul" in title else PATHS)[:B]
        rest = [torch.from_numpy(np.array(tax.index(kinless)))]
        z = z[:, : len(kinless)]
    value, gradient = value_and_gradient(module, z, rest)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert module.idle == 1


@every(lambda case: case.pairwise)
def test_idle_share(title, tax):
    case = CASES[title]
    module, z = made(title, tax), differentiable(case, tax)
    z.requires_grad_()
    module(z, *others(case, tax, z))
    assert module.idle.shape == ()
    assert not module.idle.requires_grad
    assert module.idle == 0  # two views: everybody has a mate


@every(lambda case: case.pairwise and case.target in {"nodes", "classes"} and case.order_free)
def test_idle_share_counts_rows_without_a_mate(title, tax):
    case = CASES[title]
    if "view" in title:
        pytest.skip("its mates are views")
    module, z = made(title, tax), differentiable(case, tax, V=1, B=4)
    module(z, torch.from_numpy(np.array(tax.index(["a/x", "a/x", "b/x", "c"]))))
    assert module.idle == 0.5


@every(lambda case: "logits" not in case.eats and case.order_free)
def test_duplicate_rows(title, tax):
    case = CASES[title]
    z = differentiable(case, tax).repeat(1, 2, 1)
    rest = [t.repeat(2, *[1] * (t.ndim - 1)) if case.target else t.repeat(1, 2, 1) for t in others(case, tax, z[:, :7])]
    value, gradient = value_and_gradient(made(title, tax), z, rest)
    assert value.isfinite()
    assert torch.allclose(gradient[:, :7], gradient[:, 7:], atol=1e-12)


# --- targets that are none --------------------------------------------------------------------------------------------


@every(lambda case: case.target == "nodes")
@pytest.mark.parametrize("bad", [-1, -7, 10_000])
def test_a_target_outside_the_taxonomy_is_named(title, tax, bad):
    case = CASES[title]
    module, z = made(title, tax), differentiable(case, tax)
    (target,) = others(case, tax, z)
    target[3] = bad
    with pytest.raises((IndexError, ValueError), match=str(bad)):
        module(z, target)


@every(lambda case: case.target in {"nodes", "classes", "sets"})
@pytest.mark.parametrize("mistake", ["too many", "too few", "numbers with a point"])
def test_a_target_of_the_wrong_shape_or_kind_is_named(title, tax, mistake, without_type_checks):
    case = CASES[title]
    module, z = made(title, tax), differentiable(case, tax)
    (target,) = others(case, tax, z)
    target = {"too many": torch.cat([target, target[:1]]), "too few": target[:-1]}.get(mistake, target.double() + 0.5)
    with pytest.raises((IndexError, ValueError), match="target"):
        module(z, target)


# --- state ------------------------------------------------------------------------------------------------------------


@every()
def test_state_survives_saving(title, tax):
    case = CASES[title]
    module, z = made(title, tax), differentiable(case, tax)
    rest = others(case, tax, z)
    module.train()(z, *rest)
    state = copy.deepcopy(module.state_dict())
    twin = case.make(tax).double()
    twin.load_state_dict(state)
    for _ in range(2):
        assert torch.equal(twin(z, *rest), module(z, *rest))
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True))
    assert not list(module.parameters())


@every()
def test_tables_are_no_state_and_casts_come_back(title, tax):
    """What a taxonomy says is made anew at construction: a checkpoint holds none of it, and a cast harms none of it."""
    case = CASES[title]
    module, z = case.make(tax), differentiable(case, tax)
    rest = others(case, tax, z)
    kept = {name: buffer.dtype for name, buffer in module.named_buffers() if name not in module.state_dict()}
    assert set(module.state_dict()) <= {"prototypes", "seen", "center", "centre"}
    want = copy.deepcopy(module).double()(z, *rest)
    got = copy.deepcopy(module).half().double()(z, *rest)
    assert got.item() == pytest.approx(want.item(), abs=1e-12), f"a table lost digits: {kept}"


@every()
def test_deep_copies_are_independent(title, tax):
    case = CASES[title]
    module, z = case.make(tax).double(), differentiable(case, tax)
    rest = others(case, tax, z)
    twin = copy.deepcopy(module)
    module(z, *rest)
    assert all(b.isfinite().all() for b in twin.state_dict().values())
    assert twin(z, *rest).isfinite()


@every()
@pytest.mark.parametrize("V", [1, 3])
def test_other_numbers_of_views(title, tax, V):
    case = CASES[title]
    if "logits" in case.eats:
        pytest.skip("has no views")
    module, z = made(title, tax), differentiable(case, tax, V=V)
    rest = others(case, tax, z)
    if V == 1 and case.views > 1:  # a loss of views refuses a single one, in words
        with pytest.raises(ValueError, match="view"):
            module(z, *rest)
    else:
        assert module(z, *rest).isfinite()

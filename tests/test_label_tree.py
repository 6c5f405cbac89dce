"""Hierarchy-weighted contrast and level-aware margins: worked numbers, naive loops, reductions, laws, edges."""

import copy
import doctest
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from scipy import stats

import reference
from kladi.losses import HierarchyWeightedContrastiveLoss, LevelAwareMarginLoss, label_prototypes, label_tree
from kladi.losses.contrast import PairTables, contrast
from kladi.losses.contrast_ball import contrast_in_ball
from kladi.losses.geometry import PoincareBall
from kladi.structure.taxonomy import Taxonomy

PATHS = ["A/x", "A/y", "B/z"]
RAGGED = ["a/x", "a/y/p", "a/y/q", "b", "c/x/p/r", "c/y"]
GEOMETRIES = ["sphere", "poincare"]
MODES = ["scale", "mass"]
POSITIVES = ["leaf", "view", "graded"]
BOTH = list(itertools.product(GEOMETRIES, MODES))
EVERY = list(itertools.product(GEOMETRIES, MODES, POSITIVES))


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(tax: Taxonomy, names) -> torch.Tensor:
    return torch.as_tensor(np.array(tax.index(list(names)), dtype=np.int64))


def ragged_case(seed: int = 0, V: int = 2, B: int = 8, D: int = 3):
    tax, parents = Taxonomy.from_paths(RAGGED), reference.parents_from_paths(RAGGED)
    names = np.random.default_rng(seed).choice(sorted(parents), B).tolist()  # inner nodes too
    return tax, parents, rows(V, B, D, seed=seed), names


@pytest.fixture
def without_type_checks():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- worked numbers ---------------------------------------------------------------------------------------------------

E1_ROWS = double([[[1, 0], [0.8, 0.6], [0.6, 0.8], [-0.6, 0.8]]])
E1 = [  # positives, alpha, beta: sphere scale, sphere mass, ball scale, ball mass
    ("leaf", 0.0, 0.0, 0.748093, 0.748093, 0.994232, 0.994232),
    ("leaf", 0.5, 0.0, 0.410133, 0.977420, 1.865440, 1.226009),
    ("leaf", 0.0, 0.5, 0.581412, 0.625542, 0.739838, 0.849111),
    ("leaf", 0.5, 0.5, 0.305611, 0.830358, 1.427870, 1.061420),
    ("graded", 0.5, 0.5, 0.797967, 0.855176, 1.443144, 1.083529),
    ("graded", 0.5, 0.9, 0.797967, 0.855176, 1.443144, 1.083529),
    ("graded", 0.0, 0.5, 0.812899, 0.812899, 1.077513, 1.077513),
]


@pytest.mark.parametrize("line", E1, ids=lambda line: f"{line[0]}-{line[1]}-{line[2]}")
@pytest.mark.parametrize(("geometry", "mode"), BOTH)
def test_worked_contrast(line, geometry, mode):
    positives, alpha, beta, *values = line
    value = values[2 * GEOMETRIES.index(geometry) + MODES.index(mode)]
    tax = Taxonomy.from_paths(PATHS)
    loss = HierarchyWeightedContrastiveLoss(tax, 0.5, alpha, beta, mode, positives, geometry)
    target = ids(tax, ["A/x", "A/x", "A/y", "B/z"])
    assert loss(E1_ROWS, target).item() == pytest.approx(value, abs=1e-6)
    if positives == "leaf":
        assert loss.idle.item() == 0.5
    assert loss.kin.item() == pytest.approx(4 / 12)


@pytest.mark.parametrize(
    ("names", "alpha", "values"),
    [
        (["A/x", "A/y"], 0.5, (0.612551, 1.061547, 2.340760, 1.647796)),
        (["A/x", "A/x"], 0.5, (0.514950, 0.834395, 1.732577, 1.409176)),
        (["A/x", "A/y"], 0.0, (0.991946, 0.991946, 1.575993, 1.575993)),
    ],
)
def test_worked_view_positives(names, alpha, values):
    tax = Taxonomy.from_paths(PATHS)
    z = double([[[1, 0], [0.6, 0.8]], [[0.8, 0.6], [-0.6, 0.8]]])
    for (geometry, mode), value in zip(BOTH, values, strict=True):
        loss = HierarchyWeightedContrastiveLoss(tax, 0.5, alpha, alpha, mode, "view", geometry)
        assert loss(z, ids(tax, names)).item() == pytest.approx(value, abs=1e-6)


E3_FIRST = double([[[1, 0], [0.6, 0.8], [-0.6, 0.8]]])
E3_SECOND = double([[[0.8, 0.6], [0, 1], [0.6, 0.8]]])


@pytest.mark.parametrize(
    ("geometry", "second", "third", "mean", "moved"),
    [
        ("sphere", 0.736816, 0.511603, (0.894427, 0.447214), (0.707107, 0.707107)),
        ("poincare", 0.420750, 0.288732, (0.759008, 0.379504), (0.564908, 0.564908)),
    ],
)
def test_worked_prototypes(geometry, second, third, mean, moved):
    tax = Taxonomy.from_paths(PATHS)
    target = ids(tax, PATHS)
    loss = LevelAwareMarginLoss(tax, 2, geometry=geometry).double()
    assert loss(E3_FIRST, target).item() == 0
    a, x, b = (int(v) for v in tax.index(["A", "A/x", "B"]))
    assert loss.prototypes[a].tolist() == pytest.approx(mean, abs=1e-6)
    assert loss(E3_SECOND, target).item() == pytest.approx(second, abs=1e-6)
    assert loss.prototypes[a].tolist() == pytest.approx(moved, abs=1e-6)
    if geometry == "sphere":
        assert loss.prototypes[x].tolist() == pytest.approx((0.948683, 0.316228), abs=1e-6)
        assert loss.prototypes[b].tolist() == pytest.approx((0, 1), abs=1e-6)
    assert (loss.seen == 2).all()
    before = copy.deepcopy(loss.state_dict())
    assert loss.eval()(E3_SECOND, target).item() == pytest.approx(third, abs=1e-6)
    assert all(torch.equal(before[k], v) for k, v in loss.state_dict().items())


# --- against naive loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("geometry", "mode", "positives"), EVERY)
@pytest.mark.parametrize("beta", [0.5, -0.7])
def test_contrast_against_a_double_loop(geometry, mode, positives, beta):
    tax, parents, z, names = ragged_case()
    arguments = {"temperature": 0.3, "alpha": 0.4, "beta": beta, "mode": mode, "positives": positives}
    arguments["geometry"] = geometry
    for wide in (z, 3 * z[:1]):
        ours, naive = wide.clone().requires_grad_(), wide.clone().requires_grad_()
        got = HierarchyWeightedContrastiveLoss(tax, **arguments)(ours, ids(tax, names))
        want = reference.hierarchy_weighted_contrast(naive, names, parents, **arguments)
        # The ball's distances come from one matmul, which costs near pairs half their digits.
        assert got.item() == pytest.approx(want.item(), abs=1e-12 if geometry == "sphere" else 1e-11)
        if want.requires_grad:
            got.backward()
            want.backward()
            assert torch.allclose(ours.grad, naive.grad, atol=1e-11 if geometry == "sphere" else 1e-9)


@pytest.mark.parametrize(("geometry", "mode"), BOTH)
def test_view_positives_are_classes_of_one_sample(geometry, mode):
    """Naming each sample its own class gives the same number as correcting the own-view pairs afterwards."""
    tax, _, z, names = ragged_case(V=3)
    loss = HierarchyWeightedContrastiveLoss(tax, 0.3, 0.4, 0.5, mode, "view", geometry)
    overlap = label_tree.overlap_of(loss.lineage[ids(tax, names)], torch.float64)
    tables = label_tree.pair_tables(overlap, temperature=0.3, alpha=0.4, mode=mode, positives="view", geometry=geometry)
    own = label_tree.own_view(temperature=0.3, alpha=0.4, mode=mode)
    itself = torch.eye(len(names), dtype=torch.bool)
    bias = torch.zeros_like(overlap) if tables.bias is None else tables.bias
    per_sample = PairTables(
        weight=itself.double(),
        scale=torch.where(itself, own.scale, tables.scale),
        bias=torch.where(itself, own.bias, bias),
        positive=None,
    )
    x, each = loss.space.embed(z.flatten(0, 1)), torch.arange(len(names)).repeat(3)
    if geometry == "sphere":
        value, _ = contrast(x, each, per_sample, views=3)
    else:
        value, _ = contrast_in_ball(x, each, per_sample, loss.space, views=3)
    assert loss(z, ids(tax, names)).item() == pytest.approx(value.item(), abs=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("seed", range(4))
def test_prototypes_against_loops(geometry, seed):
    tax, parents = Taxonomy.from_paths(RAGGED), reference.parents_from_paths(RAGGED)
    loss = LevelAwareMarginLoss(tax, 3, momentum=0.6, geometry=geometry, level_weights=[1.0, 0.5, 0.25, 2.0]).double()
    naive = reference.LevelAwareMargin(parents, momentum=0.6, geometry=geometry)
    naive.level_weight = lambda depth: [1.0, 0.5, 0.25, 2.0][depth - 1]
    for call in range(6):
        _, _, z, names = ragged_case(seed * 10 + call, B=5)
        ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
        got, want = loss(ours, ids(tax, names)), naive(theirs, names)
        assert got.item() == pytest.approx(want.item(), abs=1e-9)
        got.backward()
        if want.requires_grad and call:
            want.backward()
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-8)
        for node, point in naive.point.items():
            v = tax.index([node])[0]
            assert loss.seen[v] == naive.seen[node]
            assert torch.allclose(loss.prototypes[v], point, atol=1e-10)
        assert (loss.seen > 0).sum() == len(naive.point)


@pytest.mark.parametrize("seed", range(6))
def test_overlap_against_a_walk_over_paths(seed):
    """Random ragged trees, the same words under many parents; and what the taxonomy itself says."""
    rng = np.random.default_rng(seed)
    paths = ["/".join(rng.choice(list("ab"), rng.integers(1, 6))) for _ in range(8)]
    tax, parents = Taxonomy.from_paths(paths), reference.parents_from_paths(paths)
    loss = HierarchyWeightedContrastiveLoss(tax)
    got = label_tree.overlap_of(loss.lineage, torch.float64)
    want = [[reference.overlap(parents, a, b) for b in tax.names] for a in tax.names]
    assert torch.allclose(got, double(want), atol=1e-15)
    every = np.arange(len(tax.names))
    assert np.allclose(tax.overlap(every, every), got.numpy())
    assert ((got == 1) == torch.eye(len(got), dtype=torch.bool)).all()


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("geometry", "mode", "positives"), EVERY)
def test_contrast_gradcheck(geometry, mode, positives):
    tax, _, z, names = ragged_case(B=5)
    loss = HierarchyWeightedContrastiveLoss(tax, 0.3, 0.4, 0.5, mode, positives, geometry)
    assert torch.autograd.gradcheck(lambda z: loss(z, ids(tax, names)), (0.7 * z).requires_grad_())


@pytest.mark.parametrize(("geometry", "mode"), BOTH)
def test_closed_form_of_the_gradient(geometry, mode):
    """M_ik = [i has a positive] A_ik (p_ik - q_ik) / |I+|; the gradient with respect to s is M + M^T."""
    tax, _, z, names = ragged_case(V=1, B=7)
    z = z.requires_grad_()
    loss = HierarchyWeightedContrastiveLoss(tax, 0.3, 0.4, 0.5, mode, "graded", geometry)
    loss(z, ids(tax, names)).backward()
    x = loss.space.embed(z.detach()[0]).requires_grad_()
    s = loss.space.similarities(x, x)
    overlap = label_tree.overlap_of(loss.lineage[ids(tax, names)], torch.float64)
    tables = label_tree.pair_tables(
        overlap, temperature=0.3, alpha=0.4, beta=0.5, mode=mode, positives="graded", geometry=geometry
    )
    logits = tables.scale * s.detach() + (0 if tables.bias is None else tables.bias)
    off = ~torch.eye(7, dtype=torch.bool)
    p = torch.softmax(logits.masked_fill(~off, -math.inf), 1)
    W = tables.weight * off
    has = W.sum(1) > 0
    q = torch.where(has[:, None], W / W.sum(1, keepdim=True).clamp_min(1e-300), 0)
    M = has[:, None] * tables.scale * (p - q) * off / has.sum()
    (g,) = torch.autograd.grad((s * off * M).sum(), x)  # sums both roles of each point: M + M^T
    (want,) = torch.autograd.grad(loss.space.embed(z)[0], z, g)
    assert torch.allclose(z.grad, want, atol=1e-10)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_prototype_gradcheck(geometry):
    tax, _, z, names = ragged_case()
    loss = LevelAwareMarginLoss(tax, 3, geometry=geometry).double()
    loss(rows(2, 8, 3, seed=9), ids(tax, names))
    loss.eval()
    assert torch.autograd.gradcheck(lambda z: loss(z, ids(tax, names)), z.requires_grad_())
    assert not loss.prototypes.requires_grad


@pytest.mark.parametrize(("geometry", "mode", "positives"), EVERY)
def test_equal_rows(geometry, mode, positives):
    """A distance has a kink where points meet, a cosine has none."""
    tax = Taxonomy.from_paths(RAGGED)
    target = ids(tax, ["a/x", "a/x", "a/y/p", "b"])
    loss = HierarchyWeightedContrastiveLoss(tax, 0.3, 0.4, 0.5, mode, positives, geometry)
    z = torch.ones(2, 4, 3, dtype=torch.float64, requires_grad=True)
    if geometry == "sphere":
        assert torch.autograd.gradcheck(lambda z: loss(z, target), z)
    loss(z, target).backward()
    assert z.grad.isfinite().all()


# --- reductions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_no_alpha_no_beta_is_supcon(mode):
    tax, parents, z, names = ragged_case()
    numbers = [sorted(parents).index(n) for n in names]
    loss = HierarchyWeightedContrastiveLoss(tax, 0.2, 0.0, 0.0, mode)
    assert loss(z, ids(tax, names)).item() == pytest.approx(reference.supcon(z, numbers, 0.2).item(), abs=1e-12)
    from pytorch_metric_learning.losses import SupConLoss

    theirs = SupConLoss(temperature=0.2)(z.flatten(0, 1), torch.tensor(numbers).repeat(2))
    assert loss(z, ids(tax, names)).item() == pytest.approx(theirs.item(), abs=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_no_alpha_no_beta_view_is_ntxent(mode):
    tax, _, z, names = ragged_case()
    loss = HierarchyWeightedContrastiveLoss(tax, 0.2, 0.0, 0.0, mode, "view")
    from pytorch_metric_learning.losses import NTXentLoss

    theirs = NTXentLoss(temperature=0.2)(z.flatten(0, 1), torch.arange(8).repeat(2))
    assert loss(z, ids(tax, names)).item() == pytest.approx(theirs.item(), abs=1e-10)
    assert loss(z, ids(tax, ["a/x"] * 8)).item() == pytest.approx(theirs.item(), abs=1e-10)  # no label is read


@pytest.mark.parametrize(("geometry", "mode"), BOTH)
def test_without_beta_leaf_is_one_value_for_every_tree(geometry, mode):
    z = rows(2, 6, 3)
    values = set()
    for paths in (["a", "b", "c"], ["x/a", "x/b", "y/c"], ["x/a", "x/y/b", "c"]):
        tax = Taxonomy.from_paths(paths)
        target = ids(tax, [paths[i] for i in (0, 0, 1, 1, 2, 2)])
        loss = HierarchyWeightedContrastiveLoss(tax, 0.2, 0.7, 0.0, mode, "leaf", geometry)
        values.add(round(loss(z, target).item(), 12))
    assert len(values) == 1


@pytest.mark.parametrize(("geometry", "mode"), BOTH)
def test_a_tree_of_depth_one_has_no_kin(geometry, mode):
    tax = Taxonomy.from_paths(["a", "b", "c"])
    z, target = rows(2, 6, 3), ids(tax, ["a", "a", "b", "b", "c", "c"])

    def value(beta, positives, alpha=0.5):
        return HierarchyWeightedContrastiveLoss(tax, 0.2, alpha, beta, mode, positives, geometry)(z, target).item()

    assert value(0.9, "leaf") == pytest.approx(value(0.0, "leaf"), abs=1e-12)
    for alpha in (0.0, 0.5, 2.0):
        assert value(0.5, "graded", alpha) == pytest.approx(value(0.5, "leaf", alpha), abs=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_one_factor_for_all_pairs_is_a_temperature(geometry):
    """a = g everywhere: all rows kin of one leaf, so that only positives are left, at 1 + alpha."""
    tax, z = Taxonomy.from_paths(PATHS), rows(1, 5, 3)
    target = ids(tax, ["A/x"] * 5)
    sharp = HierarchyWeightedContrastiveLoss(tax, 0.3, 0.5, 0.5, "scale", "leaf", geometry)(z, target)
    plain = HierarchyWeightedContrastiveLoss(tax, 0.3 / 1.5, 0.0, 0.0, "scale", "leaf", geometry)(z, target)
    assert sharp.item() == pytest.approx(plain.item(), abs=1e-12)


def test_graded_without_alpha_is_supcon_with_soft_targets():
    tax, parents, z, names = ragged_case()
    x = torch.nn.functional.normalize(z, dim=-1).flatten(0, 1)
    kin = double([[reference.overlap(parents, a, b) for b in names * 2] for a in names * 2])
    off = ~torch.eye(16, dtype=torch.bool)
    log_p = torch.log_softmax((x @ x.T / 0.2).masked_fill(~off, -math.inf), 1)
    q = kin * off / (kin * off).sum(1, keepdim=True)
    want = -(q * log_p.masked_fill(~off, 0)).sum(1).mean()
    got = HierarchyWeightedContrastiveLoss(tax, 0.2, 0.0, 0.5, "scale", "graded")(z, ids(tax, names))
    assert got.item() == pytest.approx(want.item(), abs=1e-12)


def test_mass_counts_kin_negatives_and_positives_as_stated():
    """In the softmax, a kin negative counts 1 - beta r times and a positive 1 / (1 + alpha) times."""
    tax, parents, z, names = ragged_case(V=1)
    names[1] = names[0]
    x = torch.nn.functional.normalize(z[0], dim=-1)
    losses = []
    for i in range(8):
        mates = [k for k in range(8) if k != i and names[k] == names[i]]
        if not mates:
            continue
        count = {k: 1 - 0.5 * reference.overlap(parents, names[i], names[k]) for k in range(8) if k != i}
        count |= dict.fromkeys(mates, 1 / 1.5)
        total = sum(n * torch.exp(x[i] @ x[k] / 0.2) for k, n in count.items())
        losses.append(-sum(torch.log(count[k] * torch.exp(x[i] @ x[k] / 0.2) / total) for k in mates) / len(mates))
    got = HierarchyWeightedContrastiveLoss(tax, 0.2, 0.5, 0.5, "mass")(z, ids(tax, names))
    assert got.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-12)


def test_length_of_a_row_does_not_matter_on_the_sphere():
    tax, _, z, names = ragged_case()
    loss = HierarchyWeightedContrastiveLoss(tax)
    scale = rows(2, 8, 1, seed=3).exp()
    assert loss(scale * z, ids(tax, names)).item() == pytest.approx(loss(z, ids(tax, names)).item(), abs=1e-12)


# --- laws: what beta and alpha may never do ---------------------------------------------------------------------------


def push_and_pull(tables, d_or_s: dict[str, float], geometry: str) -> tuple[float, float]:
    """|d loss / d s| of one anchor on its kin negative and on its positive; classes: 0 own, 1 kin, 2 unrelated."""
    kinds = [("positive", 0), ("kin", 1)] + [("other", 2)] * 30
    s = double([d_or_s[k] for k, _ in kinds]) * (1 if geometry == "sphere" else -1)
    s.requires_grad_()
    column = torch.tensor([c for _, c in kinds])
    bias = 0 if tables.bias is None else tables.bias[0, column]
    logits = tables.scale[0, column] * s + bias
    (-torch.log_softmax(logits, 0)[0]).backward()
    return abs(float(s.grad[1])), abs(float(s.grad[0]))


def tables_of(alpha=0.0, beta=0.0, mode="scale", geometry="sphere", temperature=0.2):
    overlap = double([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])
    return label_tree.pair_tables(
        overlap, temperature=temperature, alpha=alpha, beta=beta, mode=mode, positives="leaf", geometry=geometry
    )


def naive_table(beta: float, temperature: float):
    """The rule of the sphere taken over to the ball: the sign hazard."""
    return tables_of(beta=beta, geometry="sphere", temperature=temperature)


GRID = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9]


def law_holds(make, situation, geometry, which: int) -> bool:
    values = [push_and_pull(make(strength), situation, geometry)[which] for strength in GRID]
    steps = [b - a for a, b in itertools.pairwise(values)]
    return all(d <= 1e-12 for d in steps) if which == 0 else all(d >= -1e-12 for d in steps)


BALL_SITUATIONS = [
    {"positive": p, "kin": k, "other": 3.0} for p in (0.3, 0.5, 1.0, 2.0) for k in (0.8, 1.0, 1.5, 2.0, 4.0)
]
SPHERE_SITUATIONS = [
    {"positive": p, "kin": k, "other": 0.0} for p in (-0.2, 0.2, 0.6, 0.9) for k in (-0.1, 0.0, 0.3, 0.6, 0.9)
]


def inside(situation, geometry: str, strength: float, temperature: float = 0.2) -> bool:
    """The stated domain of the push law of `scale`: d >= w tau / (1 - p), or s >= -tau / (w (1 - p))."""
    tables = tables_of(beta=strength, geometry=geometry, temperature=temperature)
    push, _ = push_and_pull(tables, situation, geometry)
    w = 1 - strength * 0.5
    p = push / float(tables.scale[0, 1])
    if geometry == "sphere":
        return situation["kin"] >= -temperature / (w * (1 - p))
    return situation["kin"] >= w * temperature / (1 - p)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("geometry", "situations"), [("sphere", SPHERE_SITUATIONS), ("poincare", BALL_SITUATIONS)])
def test_more_beta_never_pushes_a_kin_negative_more(geometry, situations, mode):
    tested = 0
    for situation in situations:
        if mode == "scale" and not all(inside(situation, geometry, b) for b in GRID):
            continue
        tested += 1
        assert law_holds(lambda b: tables_of(beta=b, mode=mode, geometry=geometry), situation, geometry, 0), situation
    assert tested >= 10


@pytest.mark.parametrize("mode", MODES)
def test_more_alpha_never_pulls_a_positive_less_in_the_ball(mode):
    for situation in BALL_SITUATIONS:
        assert law_holds(lambda a: tables_of(alpha=a, mode=mode, geometry="poincare"), situation, "poincare", 1)


def test_more_alpha_never_pulls_a_positive_less_by_mass_on_the_sphere():
    for situation in SPHERE_SITUATIONS:
        assert law_holds(lambda a: tables_of(alpha=a, mode="mass"), situation, "sphere", 1)


def test_the_naive_table_breaks_the_law_in_the_ball():
    """w d instead of d / w: a kin negative is pushed more, the opposite of the purpose."""
    near = [s for s in BALL_SITUATIONS if all(inside(s, "poincare", b) for b in GRID) and s["kin"] < s["other"]]
    broken = [s for s in near if not law_holds(lambda b: naive_table(b, 0.2), s, "poincare", 0)]
    assert len(broken) >= 0.75 * len(near) >= 9
    assert not law_holds(lambda b: naive_table(b, 0.2), SHEET, "poincare", 0)
    reciprocal = [push_and_pull(naive_positive(w), SHEET | {"positive": 2.0}, "poincare")[1] for w in (1, 1.25, 1.5)]
    assert reciprocal == sorted(reciprocal, reverse=True)


def naive_positive(w: float):
    tables = tables_of(geometry="poincare")
    return type(tables)(
        weight=tables.weight,
        scale=torch.where(torch.eye(3, dtype=torch.bool), tables.scale / w, tables.scale),
        bias=None,
        positive=None,
    )


SHEET = {"positive": 0.5, "kin": 1.5, "other": 3.0}


def test_the_sheet_s_table_of_pushes():
    """One anchor, 30 unrelated at d = 3, temperature .2; sibling at 1.5, positive at .5; w = 1, .75, .5."""
    for make, want in [
        (lambda b: naive_table(b, 0.2), (0.0335, 0.158, 0.557)),
        (lambda b: tables_of(beta=b, geometry="poincare"), (0.0335, 0.00369, 0.0000373)),
        (lambda b: tables_of(beta=b, mode="mass", geometry="poincare"), (0.0335, 0.0251, 0.0168)),
    ]:
        # r = .5, so w = 1 - beta / 2; the last is beyond the loss's own limit of .95.
        got = [push_and_pull(make(beta), SHEET, "poincare")[0] for beta in (0.0, 0.5, 1.0)]
        assert got == pytest.approx(want, rel=6e-3)


def test_the_sheet_s_table_of_pulls():
    """A lone positive at 2: 30 unrelated at 3 and no sibling."""

    def pull(alpha, mode):
        tables = tables_of(alpha=alpha, mode=mode, geometry="poincare")
        s = double([-2.0] + [-3.0] * 30).requires_grad_()
        column = torch.tensor([0] + [2] * 30)
        logits = tables.scale[0, column] * s + (0 if tables.bias is None else tables.bias[0, column])
        (-torch.log_softmax(logits, 0)[0]).backward()
        return abs(float(s.grad[0]))

    assert [pull(a, "scale") for a in (0.0, 0.25, 0.5)] == pytest.approx([0.841, 4.45, 7.26], rel=6e-3)
    assert [pull(a, "mass") for a in (0.0, 0.25, 0.5)] == pytest.approx([0.841, 1.01, 1.16], rel=6e-3)


def test_table_by_depth_of_the_common_ancestor():
    """Uniform depth 2, beta = .5: 1, .75, .5 for nothing, the parent, everything shared."""
    overlap = double([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])
    scale = label_tree.pair_tables(overlap, temperature=1.0, positives="view").scale
    assert scale[0].tolist() == [0.5, 0.75, 1]
    assert label_tree.pair_tables(overlap, temperature=1.0).scale[0].tolist() == [1.5, 0.75, 1]


# --- trees that are not tidy ------------------------------------------------------------------------------------------


def test_a_dag_is_fine_for_contrast_and_refused_for_prototypes():
    edges = [("t", None), ("u", None), ("m", "t"), ("m", "u"), ("n", "u"), ("l", "m"), ("k", "n")]
    parents: dict[str, list[str]] = {}
    for child, parent in edges:
        parents.setdefault(child, []).extend([parent] if parent else [])
    tax, z, names = Taxonomy.from_edges(edges), rows(2, 6, 3), ["l", "m", "k", "n", "l", "u"]
    got = HierarchyWeightedContrastiveLoss(tax, 0.3)(z, ids(tax, names))
    want = reference.hierarchy_weighted_contrast(z, names, parents, temperature=0.3)
    assert got.item() == pytest.approx(want.item(), abs=1e-12)
    with pytest.raises(ValueError, match=r"m.*t.*u"):
        LevelAwareMarginLoss(tax, 3)


def test_an_inner_node_target_is_a_class_of_its_own():
    tax = Taxonomy.from_paths(RAGGED)
    z, target = rows(1, 4, 3), ids(tax, ["a/y", "a/y", "a/y/p", "b"])
    loss = HierarchyWeightedContrastiveLoss(tax)
    loss(z, target)
    assert loss.idle.item() == 0.5  # the leaf below has no mate
    graded = HierarchyWeightedContrastiveLoss(tax, positives="graded")
    graded(z, target)
    assert graded.idle.item() == 0.25


def test_prototypes_reach_only_down_to_the_target():
    tax = Taxonomy.from_paths(RAGGED)
    loss = LevelAwareMarginLoss(tax, 3)
    loss(rows(1, 2, 3).float(), ids(tax, ["a/y", "b"]))
    assert {tax.names[v] for v in loss.seen.nonzero().flatten()} == {"a", "a/y", "b"}


def test_ten_levels_and_a_very_deep_chain():
    for depth in (10, 300):
        tax = Taxonomy.from_paths(["/".join("c" * depth), "/".join("c" * (depth // 2)) + "/d"])
        target = torch.as_tensor(np.array(tax.leaves)).repeat(3)
        z = rows(1, 6, 4)
        assert HierarchyWeightedContrastiveLoss(tax)(z, target).isfinite()
        loss = LevelAwareMarginLoss(tax, 4)
        loss(z, target)
        assert loss(z, target).isfinite()


@pytest.mark.slow
def test_a_large_taxonomy_stays_small():
    """50,000 nodes: nothing that is as large as their square, at construction or in a step."""
    paths = [f"{i % 5}/{i % 50}/{i % 500}/{i}" for i in range(49_000)]
    tax = Taxonomy.from_paths(paths)
    contrast, margin = HierarchyWeightedContrastiveLoss(tax), LevelAwareMarginLoss(tax, 8)
    z = rows(2, 64, 8).float().requires_grad_()
    target = torch.as_tensor(np.array(tax.leaves)[:: len(tax.leaves) // 63][:64])
    assert max(b.numel() for m in (contrast, margin) for b in m.buffers()) < 10 * len(tax.names)
    for loss in (contrast, margin, margin):
        value = loss(z, target)
        value.backward()
    assert value > 0


# --- prototypes: state ------------------------------------------------------------------------------------------------


def lam_case(geometry="sphere", **arguments):
    tax = Taxonomy.from_paths(["A/x", "A/y", "B/z", "B/w"])
    return tax, LevelAwareMarginLoss(tax, 3, geometry=geometry, **arguments), ids(tax, ["A/x", "A/y", "B/z", "B/w"])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_first_call_is_exactly_zero_and_keeps_its_graph(geometry):
    _, loss, target = lam_case(geometry)
    z = rows(2, 4, 3).float().requires_grad_()
    value = loss(z, target)
    value.backward()
    assert value.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))
    assert loss.idle.item() == 1


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_backward_after_the_update_sees_the_prototypes_of_the_forward(geometry):
    _, loss, target = lam_case(geometry)
    loss.double()(rows(2, 4, 3), target)
    twin = copy.deepcopy(loss).eval()
    z, w = rows(2, 4, 3, seed=1).requires_grad_(), rows(2, 4, 3, seed=1).requires_grad_()
    loss(z, target).backward()
    twin(w, target).backward()
    assert torch.equal(z.grad, w.grad)
    assert not torch.equal(loss.prototypes, twin.prototypes)
    assert loss.idle.item() == 0


def test_eval_leaves_the_state_alone_and_saving_keeps_it():
    tax, loss, target = lam_case()
    loss(rows(2, 4, 3).float(), target)
    before = copy.deepcopy(loss.state_dict())
    loss.eval()(rows(2, 4, 3, seed=1).float(), target)
    assert all(torch.equal(before[k], v) for k, v in loss.state_dict().items())
    assert set(before) == {"prototypes", "seen"}
    other = LevelAwareMarginLoss(tax, 3)
    other.load_state_dict(before)
    z = rows(2, 4, 3, seed=2).float()
    assert torch.equal(other(z, target), loss.train()(z, target))
    assert torch.equal(other.prototypes, loss.prototypes)


def test_margins_met_and_nothing_to_pull_is_zero():
    _, loss, _ = lam_case()
    tax = Taxonomy.from_paths(["A/x", "B/z"])
    loss = LevelAwareMarginLoss(tax, 2)
    z, target = torch.tensor([[[1.0, 0], [-1.0, 0]]]), ids(tax, ["A/x", "B/z"])
    loss(z, target)
    assert loss(z, target).item() == pytest.approx(0, abs=1e-12)
    assert loss.idle.item() == 0


def test_unseen_nodes_are_no_rivals_and_lonely_levels_are_skipped():
    tax, loss, _ = lam_case()
    a_only, both = ids(tax, ["A/x", "A/x"]), ids(tax, ["A/x", "A/y"])
    z = rows(1, 2, 3).float()
    loss(z, a_only)
    assert loss(z, a_only).item() == 0  # one node seen on each level: no rival, and no pull either
    loss(z, both)
    value = loss.eval()(z, both)
    assert value > 0  # the leaves are two now, the tops still one
    assert loss.idle.item() == 0
    assert loss(z, ids(tax, ["B/z", "B/w"])).item() == 0  # own nodes unseen


def test_absent_nodes_do_not_move():
    tax, loss, target = lam_case()
    loss(rows(2, 4, 3).float(), target)
    before = loss.prototypes.clone()
    loss(rows(1, 1, 3, seed=1).float(), ids(tax, ["A/x"]))
    moved = (loss.prototypes != before).any(1)
    assert {tax.names[v] for v in moved.nonzero().flatten()} == {"A", "A/x"}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_running_mean_until_momentum_binds(geometry):
    """One row a call, steps 1/n: at the nineteenth update still a mean; momentum .95 binds from the twentieth."""
    tax = Taxonomy.from_paths(["a", "b"])
    loss = LevelAwareMarginLoss(tax, 3, geometry=geometry).double()
    naive, points = None, []
    for n in range(1, 26):
        z = rows(1, 1, 3, seed=n)
        before = loss.prototypes[0].clone()
        loss(z, ids(tax, ["a"]))
        x = reference.embed(z[0, 0], geometry)
        share = max(1 / n, 1 - 0.95)
        naive = x if n == 1 else reference.step(before, x, share, geometry)
        points.append(x)
        assert torch.allclose(loss.prototypes[0], naive, atol=1e-9)
        assert math.isclose(share, 1 / n) == (n <= 20)
    assert loss.seen.tolist() == [25, 0]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_order_of_rows_and_halves_of_a_batch_do_not_matter(geometry):
    _, loss, target = lam_case(geometry)
    loss.double()
    twin = copy.deepcopy(loss)
    z, order = rows(2, 4, 3), torch.tensor([2, 0, 3, 1])
    for step in range(3):
        loss(z + step, target)
        twin(z.flip(0)[:, order] + step, target[order])
        assert torch.allclose(loss.prototypes, twin.prototypes, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_ten_thousand_updates_stay_on_the_manifold(geometry, without_type_checks):
    tax = Taxonomy.from_paths(["a", "b", "c", "d"])
    loss, paths = LevelAwareMarginLoss(tax, 3, geometry=geometry), torch.arange(4)[:, None]
    generator = torch.Generator().manual_seed(0)
    for z in 20 * torch.randn(10_000, 4, 3, generator=generator):
        loss._follow(loss.space.embed(z), paths, loss.prototypes, loss.space)
    norm = loss.prototypes.norm(dim=1)
    if geometry == "sphere":
        assert torch.allclose(norm, torch.ones_like(norm), atol=1e-6)
    else:
        assert (norm < 1 / math.sqrt(0.1)).all()
    assert loss.prototypes.isfinite().all()
    assert (loss.seen == 10_000).all()


def test_rows_that_cancel_leave_their_prototype_alone():
    tax = Taxonomy.from_paths(["a", "b"])
    loss = LevelAwareMarginLoss(tax, 2)
    opposite = torch.tensor([[[1.0, 0], [-1.0, 0]]])
    loss(opposite, ids(tax, ["a", "a"]))
    assert loss.seen.tolist() == [0, 0]
    loss(torch.tensor([[[1.0, 0]]]), ids(tax, ["a"]))
    loss(opposite, ids(tax, ["a", "a"]))
    assert loss.seen.tolist() == [1, 0]
    assert loss.prototypes[0].tolist() == [1, 0]
    loss(torch.zeros(1, 1, 2), ids(tax, ["b"]))  # a zero row has no direction
    assert loss.seen.tolist() == [1, 0]


def test_both_geometries_have_diameter_two():
    """Two nodes at opposite ends: a row at the wrong one costs 2 + margin + pull 4 in either."""
    tax = Taxonomy.from_paths(["a", "b"])
    for geometry in GEOMETRIES:
        loss = LevelAwareMarginLoss(tax, 2, geometry=geometry).double()
        z = double([[[100.0, 0], [-100.0, 0]]])
        loss(z, ids(tax, ["a", "b"]))
        value = loss.eval()(z, ids(tax, ["b", "a"]))
        assert value.item() == pytest.approx(2 + 0.3 + 0.1 * 4, abs=1e-9)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"alpha": -0.1}, "alpha"),
        ({"beta": 0.96}, "beta"),
        ({"beta": -1.1}, "beta"),
        ({"mode": "weight"}, "mode"),
        ({"positives": "kin"}, "positives"),
        ({"geometry": "torus"}, "geometry"),
        ({"geometry": "poincare", "curvature": 0.0}, "curvature"),
        ({"geometry": "poincare", "clip": 50.0}, "clip"),
    ],
)
def test_contrast_refuses_impossible_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        HierarchyWeightedContrastiveLoss(Taxonomy.from_paths(PATHS), **arguments)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"dim": 0}, "dim"),
        ({"margin": -0.1}, "margin"),
        ({"margin": 2.0}, "margin"),
        ({"decay": 0.0}, "decay"),
        ({"decay": 1.1}, "decay"),
        ({"pull": -1.0}, "pull"),
        ({"momentum": 1.0}, "momentum"),
        ({"level_weights": [1.0]}, "level_weights"),
        ({"level_weights": [1.0, -1.0]}, "level_weights"),
        ({"geometry": "torus"}, "geometry"),
    ],
)
def test_prototypes_refuse_impossible_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        LevelAwareMarginLoss(Taxonomy.from_paths(PATHS), **({"dim": 2} | arguments))


def test_wrong_width_is_named():
    tax = Taxonomy.from_paths(PATHS)
    with pytest.raises(ValueError, match=r"z has 3 dimensions, the prototypes 2"):
        LevelAwareMarginLoss(tax, 2)(torch.ones(1, 1, 3), ids(tax, ["A/x"]))


def test_share_of_clipped_rows_is_told():
    tax = Taxonomy.from_paths(PATHS)
    z, target = torch.tensor([[[3.0, 0], [0, 2.0], [0, 0], [5, 5]]]), ids(tax, ["A", "A", "B", "B"])
    for make in (
        HierarchyWeightedContrastiveLoss,
        lambda tax, geometry: LevelAwareMarginLoss(tax, 2, geometry=geometry),
    ):
        ball, sphere = make(tax, geometry="poincare"), make(tax, geometry="sphere")
        ball(z, target)
        sphere(z, target)
        assert ball.clipped == 0.5
        assert sphere.clipped is None


@pytest.mark.parametrize("module", [label_tree, label_prototypes], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0


def test_modules_print_their_arguments():
    tax = Taxonomy.from_paths(PATHS)
    assert "positives='leaf'" in repr(HierarchyWeightedContrastiveLoss(tax))
    assert "momentum=0.95" in repr(LevelAwareMarginLoss(tax, 2))
    assert LevelAwareMarginLoss(tax, 2, geometry="poincare").space == PoincareBall(0.1, 2.3)


# --- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tree_shows_in_the_embedding_and_a_shuffled_one_does_not():
    """Against SupCon, eight dimensions: fewer violations at about equal top-1; with a shuffled tree more.

    The effect needs an embedding in which the classes crowd: in sixteen dimensions SupCon keeps them so far apart that
    its violation rate is as low, and only the shuffled tree still does harm.
    """
    script = Path(__file__).parent / "trained_trees.py"
    done = subprocess.run([sys.executable, str(script), "7"], capture_output=True, text=True, check=True)
    results = {arm: np.array(found) for arm, found in json.loads(done.stdout).items()}
    for arm, sign in [("tree", -1), ("shuffled", 1)]:
        rate, top1 = (results[arm] - results["supcon"]).T
        half = stats.t.ppf(0.975, len(rate) - 1) * rate.std(ddof=1) / math.sqrt(len(rate))
        effect = f"violation rate {rate.mean():+.3f} +- {half:.3f}, top-1 {top1.mean():+.3f}, {len(rate)} seeds"
        print(arm, effect)  # shown by -rP
        assert sign * rate.mean() > 0, effect
        assert stats.wilcoxon(rate).pvalue < 0.05, effect
        assert abs(top1.mean()) < 0.03, effect

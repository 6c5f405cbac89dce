"""Cross-entropies on a label tree: worked numbers, dense statements, identities, extremes."""

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from kladi.losses import (
    HierarchicalCrossEntropy,
    HierarchyAwareCrossEntropy,
    SoftLabelCrossEntropy,
    node_log_probs,
    tree_cross_entropy,
)
from kladi.losses.subtree_sums import Subtrees, all_log_probs, path_log_probs
from kladi.losses.tree_cross_entropy import path_shares
from kladi.structure.taxonomy import Taxonomy

TAX = Taxonomy.from_paths(["A/a", "A/b", "B/c", "B/d", "B/e"])  # A B A/a A/b B/c B/d B/e
Z = [0.2, -0.1, 1, 0.5, -0.3, 0.8, 0]
LEAF_Z = [1, 0.5, -0.3, 0.8, 0]
DAG = Taxonomy.from_edges([("T", None), ("B", "T"), ("C", "T"), ("D", "B"), ("E", "B"), ("E", "C")])
RAGGED = Taxonomy.from_paths(["A/a", "A/M/m1", "A/M/m2", "B"])


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def value_and_gradient(loss, logits, target):
    z = double([logits]).requires_grad_()
    value = loss.double()(z, torch.tensor([target]))
    value.backward()
    return value.item(), z.grad[0].tolist()


# --- worked numbers --------------------------------------------------------------------------------------------------

WORKED = [
    ("A/a", {}, 1.131312, (0.051205, 0.086508, -0.586041, 0.069120, 0.070827, 0.212775, 0.095606)),
    (
        "A/a",
        {"label_smoothing": 0.1},
        1.186903,
        (0.056123, 0.082328, -0.505096, 0.058258, 0.049905, 0.184995, 0.073487),
    ),
    ("A/a", {"retain": 1.0}, 1.347520, (0.116773, 0.086508, -0.740116, 0.157628, 0.070827, 0.212775, 0.095606)),
    ("A/a", {"retain": 0.2}, 0.770965, (-0.058075, 0.086508, -0.329248, -0.078393, 0.070827, 0.212775, 0.095606)),
    ("B/c", {}, 2.082519, (0.116773, 0.030782, 0.259884, 0.157628, -0.674798, 0.075712, 0.034019)),
    ("A", {}, 0.626826, (-0.101787, 0.086508, -0.226531, -0.137398, 0.070827, 0.212775, 0.095606)),
    (
        "A",
        {"label_smoothing": 0.1},
        0.739729,
        (-0.079931, 0.080935, -0.177889, -0.107895, 0.042931, 0.175735, 0.066114),
    ),
]


@pytest.mark.parametrize(("name", "arguments", "value", "gradient"), WORKED)
def test_worked_numbers(name, arguments, value, gradient):
    got, slope = value_and_gradient(HierarchyAwareCrossEntropy(TAX, **arguments), Z, int(TAX.index(name)))
    assert got == pytest.approx(value, abs=1e-6)
    assert slope == pytest.approx(gradient, abs=1e-6)


def test_worked_log_probabilities():
    want = (-0.626826, -0.764181, -1.347520, -1.847520, -2.647520, -1.547520, -2.347520)
    assert all_log_probs(double([Z]), Subtrees(TAX))[0].tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "want"),
    [({"log_epsilon": 1e-6}, 1.131309), ({"soft_beta": 10.0}, 1.133739), ({"soft_beta": 4.0}, 1.199938)],
)
def test_worked_variants(arguments, want):
    assert value_and_gradient(HierarchyAwareCrossEntropy(TAX, **arguments), Z, 2)[0] == pytest.approx(want, abs=1e-6)


def test_worked_root_as_a_node():
    tax = Taxonomy.from_edges(
        [("root", None), ("A", "root"), ("B", "root")] + [(f"{p}{c}", p) for p, c in ["Aa", "Ab", "Bc", "Bd", "Be"]]
    )
    got, _ = value_and_gradient(HierarchyAwareCrossEntropy(tax), [0, *Z], int(tax.index("Aa")))
    assert got == pytest.approx(1.157988, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "want"),
    [
        (HierarchicalCrossEntropy(TAX, 0.0), 1.120267),
        (HierarchicalCrossEntropy(TAX, 0.1), 0.972838),
        (HierarchicalCrossEntropy(TAX, 0.5), 0.566337),
        (HierarchicalCrossEntropy(TAX, 0.5, normalise=True), 0.139752),
        (SoftLabelCrossEntropy(TAX, 10.0), 1.123726),
        (SoftLabelCrossEntropy(TAX, 4.0), 1.215586),
        (SoftLabelCrossEntropy(TAX, 2.0), 1.414693),
    ],
    ids=str,
)
def test_worked_peers(loss, want):
    assert value_and_gradient(loss, LEAF_Z, 2)[0] == pytest.approx(want, abs=1e-6)


def test_worked_gradient_of_a_peer():
    _, slope = value_and_gradient(HierarchicalCrossEntropy(TAX, 0.5), LEAF_Z, 2)
    assert slope == pytest.approx((-0.318584, 0.029899, 0.053919, 0.161982, 0.072783), abs=1e-6)


def test_worked_dag():
    T = _dense(DAG)
    assert T[:, DAG.index("E")].tolist() == pytest.approx([0.09, 0.105, 0.105, 0, 0.7])
    assert T[:, DAG.index("D")].tolist() == pytest.approx([0.09, 0.21, 0, 0.7, 0])
    z = [0, 0.5, -0.5, 1, 0.2]
    P = all_log_probs(double([z]), Subtrees(DAG)).exp()[0].tolist()
    assert pytest.approx([1, 0.776714, 0.254058, 0.377805, 0.169759], abs=1e-6) == P
    got, slope = value_and_gradient(HierarchyAwareCrossEntropy(DAG), z, int(DAG.index("E")))
    assert got == pytest.approx(1.411766, abs=1e-6)
    assert slope == pytest.approx((0.126478, 0.177549, 0.041872, 0.292729, -0.638628), abs=1e-6)


# --- against dense statements ----------------------------------------------------------------------------------------


def _dense(tax: Taxonomy, retain: float = 0.7, weighting: str = "geometric") -> np.ndarray:
    """T[v, y] from the padded lists."""
    lineage, share = tree_cross_entropy.lineage_of(tax), path_shares(tax, retain, weighting)
    T = np.zeros((len(tax), len(tax)))
    for y in range(len(tax)):
        for v, mass in zip(lineage[y], share[y], strict=True):
            if v >= 0:
                T[v, y] += mass
    return T


def _naive_shares(tax: Taxonomy, d: float) -> np.ndarray:
    """T by its recursion, tree or DAG."""
    T = np.zeros((len(tax), len(tax)))
    for v, parents in enumerate(tax.parents):
        T[v, v] = d if parents else 1.0
        for p in parents:
            T[:, v] += (1 - d) / len(parents) * T[:, p]
    return T


def _naive(tax: Taxonomy, z: torch.Tensor, target: list[int], T: np.ndarray, eps: float = 0.0) -> torch.Tensor:
    R = torch.from_numpy(tax.closure.T.astype(float))
    P = torch.softmax(z, 1) @ R.T
    leaves = tax.leaves.tolist()
    rows = []
    for i, y in enumerate(target):
        outside = [c for c in leaves if not tax.closure[c, y]]
        s = np.zeros(len(tax))
        s[y] = 1 - eps if outside else 1.0
        for c in outside:
            s[c] += eps / len(outside)
        rows.append(-(torch.from_numpy(T @ s) * P[i].log()).sum())
    return torch.stack(rows).mean()


@st.composite
def edges_of(draw, dag: bool = False):
    """(child, parent) pairs of a random tree or DAG."""
    n = draw(st.integers(1, 12))
    edges = [("n0", None)]
    for k in range(1, n):
        above = draw(st.lists(st.integers(0, k - 1), min_size=0, max_size=2 if dag else 1, unique=True))
        edges += [(f"n{k}", f"n{p}") for p in above] or [(f"n{k}", None)]
    return edges


@given(edges_of(dag=True), st.integers(0, 2**31), st.sampled_from([0.1, 0.7, 1.0]), st.sampled_from([0.0, 0.1]))
def test_against_dense_matrices(edges, seed, retain, eps):
    tax = Taxonomy.from_edges(edges)
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(6, len(tax), generator=generator, dtype=torch.float64)
    target = torch.randint(len(tax), (6,), generator=generator)
    T = _naive_shares(tax, retain)
    np.testing.assert_allclose(_dense(tax, retain), T, atol=1e-14)
    np.testing.assert_allclose(T.sum(0), 1)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    got = HierarchyAwareCrossEntropy(tax, retain, label_smoothing=eps)(ours, target)
    want = _naive(tax, theirs, target.tolist(), T, eps)
    got.backward()
    want.backward()
    assert got.item() == pytest.approx(want.item(), abs=1e-11)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-11)


@given(edges_of(), st.integers(0, 2**31), st.sampled_from([1.0, 60.0]))
def test_two_ways_to_one_number(edges, seed, size):
    """Plain sums and a maximum a segment; with logits this large the plain sums give up."""
    tax = Taxonomy.from_edges(edges)
    generator = torch.Generator().manual_seed(seed)
    below = Subtrees(tax)
    nodes = torch.from_numpy(tree_cross_entropy.lineage_of(tax))[torch.randint(len(tax), (5,), generator=generator)]
    mass = torch.rand(len(tax), generator=generator, dtype=torch.float64)
    for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        z = (size * torch.randn(5, len(tax), generator=generator)).to(dtype)
        one, two = z.clone().requires_grad_(), z.clone().requires_grad_()
        every = all_log_probs(two, below)
        b = every.gather(1, nodes.clamp_min(0)).masked_fill(nodes < 0, 0)
        weight = torch.randn(nodes.shape, generator=generator).to(dtype)
        a, nothing = path_log_probs(one, nodes, below)
        assert not nothing.any()
        c, everywhere = path_log_probs(one, nodes, below, mass.to(dtype))
        (((a + c) * weight).sum() + everywhere.sum()).backward()
        (2 * (b * weight).sum() + (every @ mass.to(dtype)).sum()).backward()
        assert torch.allclose(a, b, atol=atol, rtol=1e-6)
        assert torch.allclose(c, b, atol=atol, rtol=1e-6)
        assert torch.allclose(everywhere, every @ mass.to(dtype), atol=atol, rtol=1e-6)
        assert torch.allclose(one.grad, two.grad, atol=10 * atol)


def test_node_log_probs_are_sums_over_leaves():
    z = torch.randn(3, 5, 4, dtype=torch.float64)
    got = node_log_probs(z, RAGGED).exp()
    p = torch.softmax(z, -1)
    for v in range(len(RAGGED)):
        below = torch.from_numpy(RAGGED.closure[RAGGED.leaves, v])
        assert torch.allclose(got[..., v], p[..., below].sum(-1), atol=1e-14)
    with pytest.raises(ValueError, match="3 logits for 4 leaves"):
        node_log_probs(torch.zeros(2, 3), RAGGED)


def test_inner_logits_of_minus_infinity_have_a_gradient():
    z = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: node_log_probs(z, RAGGED), z)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7])
def test_hxe_is_the_sum_over_steps(alpha):
    z = torch.randn(len(RAGGED), 4, dtype=torch.float64)
    log_p = node_log_probs(z, RAGGED)
    rows = []
    for y in range(len(RAGGED)):
        total = 0.0
        for v in RAGGED.ancestors(y):
            parent = RAGGED.parents[v]
            above = log_p[y, parent[0]] if parent else 0.0
            total = total - math.exp(-alpha * RAGGED.depth[v]) * (log_p[y, v] - above)
        rows.append(total)
    got = HierarchicalCrossEntropy(RAGGED, alpha)(z, torch.arange(len(RAGGED)))
    assert got.item() == pytest.approx(torch.stack(rows).mean().item(), abs=1e-12)


@pytest.mark.parametrize("distance", ["height", "depth"])
def test_soft_labels_are_their_formula(distance):
    loss, leaves = SoftLabelCrossEntropy(RAGGED, 3.0, distance), RAGGED.leaves
    mass = loss.leaf_mass(torch.zeros(1, dtype=torch.float64), torch.from_numpy(np.array(leaves)))
    for i, y in enumerate(leaves):
        D = []
        for c in leaves:
            shared = [v for v in RAGGED.ancestors(c) if RAGGED.closure[y, v]]
            if distance == "height":
                apart = (RAGGED.height[max(shared, key=lambda v: RAGGED.depth[v])] if shared else 3) / 3
            else:
                apart = 1 - max((RAGGED.depth[v] for v in shared), default=0) / 3
            D.append(0 if c == y else apart)
        want = np.exp(-3 * np.array(D))
        assert mass[i].tolist() == pytest.approx((want / want.sum()).tolist(), abs=1e-12)
    with pytest.raises(ValueError, match=r'"A/M", which is no leaf'):
        loss(torch.zeros(1, 4), torch.tensor([int(RAGGED.index("A/M"))]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: HierarchyAwareCrossEntropy(RAGGED),
        lambda: HierarchyAwareCrossEntropy(RAGGED, 0.3, label_smoothing=0.2),
        lambda: HierarchyAwareCrossEntropy(RAGGED, weighting="anchored", soft_beta=4.0),
        lambda: HierarchyAwareCrossEntropy(RAGGED, log_epsilon=1e-6),
        lambda: HierarchyAwareCrossEntropy(DAG, label_smoothing=0.1),
    ],
)
def test_gradcheck(make):
    loss = make()
    tax = DAG if loss.below.nodes == len(DAG) else RAGGED
    leaves = torch.from_numpy(np.array(tax.leaves))
    z = 2 * torch.randn(len(leaves), len(tax), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda z: loss(z, leaves), z.requires_grad_())


def test_closed_form_of_the_gradient():
    """dL/dz_j = q_j (1 - sum over v above-or-at j of t_v / P_v)."""
    z = torch.randn(4, len(RAGGED), dtype=torch.float64).requires_grad_()
    target = torch.tensor([0, 2, 3, 4])
    HierarchyAwareCrossEntropy(RAGGED)(z, target).backward()
    q = torch.softmax(z.detach(), 1)
    P = all_log_probs(z.detach(), Subtrees(RAGGED)).exp()
    t = torch.from_numpy(_dense(RAGGED)).T[target]
    pull = (t / P) @ torch.from_numpy(RAGGED.closure.T.astype(float))
    assert torch.allclose(z.grad, q * (1 - pull) / 4, atol=1e-12)
    assert torch.allclose(z.grad.sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12)


# --- identities ------------------------------------------------------------------------------------------------------


def test_edge_form():
    """L = sum_h c_h (-log P_h / P_{h+1}), c_h = 1 - (1-d)^(h+1), c = 1 at the top."""
    z, d = torch.randn(1, len(RAGGED), dtype=torch.float64), 0.7
    y = int(RAGGED.index("A/M/m1"))
    log_p = all_log_probs(z, Subtrees(RAGGED))[0]
    path = RAGGED.ancestors(y)[::-1]
    want = 0.0
    for h, v in enumerate(path):
        c = 1 - (1 - d) ** (h + 1) if h < len(path) - 1 else 1.0
        want -= c * (log_p[v] - (log_p[path[h + 1]] if h + 1 < len(path) else 0.0))
    got = HierarchyAwareCrossEntropy(RAGGED, d)(z, torch.tensor([y]))
    assert got.item() == pytest.approx(float(want), abs=1e-12)


def test_retain_one_is_cross_entropy_over_nodes():
    z, target = torch.randn(9, len(RAGGED), dtype=torch.float64), torch.from_numpy(np.array(RAGGED.leaves))
    z = z[: len(target)]
    got = HierarchyAwareCrossEntropy(RAGGED, 1.0)(z, target)
    assert got.item() == pytest.approx(functional.cross_entropy(z, target).item(), abs=1e-12)


@pytest.mark.parametrize("retain", [0.1, 0.7, 1.0])
def test_a_flat_tree_is_cross_entropy_with_pytorchs_smoothing_too(retain):
    tax = Taxonomy.from_paths(list("abcde"))
    z, target = torch.randn(7, 5, dtype=torch.float64), torch.randint(5, (7,))
    for e in (0.0, 0.1):
        got = HierarchyAwareCrossEntropy(tax, retain, label_smoothing=e * 4 / 5)(z, target)
        assert got.item() == pytest.approx(functional.cross_entropy(z, target, label_smoothing=e).item(), abs=1e-12)


def test_limits_of_the_peers():
    z, target = torch.randn(4, 4, dtype=torch.float64), torch.from_numpy(np.array(RAGGED.leaves))
    want = functional.cross_entropy(z, torch.arange(4)).item()
    assert HierarchicalCrossEntropy(RAGGED, 0.0)(z, target).item() == pytest.approx(want, abs=1e-12)
    assert SoftLabelCrossEntropy(RAGGED, 1e4)(z, target).item() == pytest.approx(want, abs=1e-12)
    uniform = -torch.log_softmax(z, 1).mean().item()
    assert SoftLabelCrossEntropy(RAGGED, 0.0)(z, target).item() == pytest.approx(uniform, abs=1e-12)


def _minimiser(tax: Taxonomy, p: dict[str, float], **arguments) -> dict[str, float]:
    """P of the leaves at the minimum of the expected loss."""
    loss, target = HierarchyAwareCrossEntropy(tax, **arguments), torch.from_numpy(tax.index(list(p)))
    weight = torch.tensor(list(p.values()), dtype=torch.float64)
    z = torch.zeros(len(tax), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [z], max_iter=3000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = weight @ loss.rows(z.expand(len(p), -1), target)
        value.backward()
        return value

    optimizer.step(closure)
    P = all_log_probs(z.detach()[None], Subtrees(tax)).exp()[0]
    return {name: float(P[tax.index(name)]) for name in p}


def test_leaves_of_one_depth_are_calibrated():
    p = {"A/a": 0.3, "A/b": 0.1, "B/c": 0.2, "B/d": 0.25, "B/e": 0.15}
    for retain in (0.2, 0.7, 1.0):
        assert _minimiser(TAX, p, retain=retain) == pytest.approx(p, abs=1e-5)


def test_ragged_leaves_are_drawn_downwards_and_anchored_ones_are_not():
    p = {"B": 0.4, "A/a": 0.3, "A/M/m1": 0.2, "A/M/m2": 0.1}
    biased = {"B": 0.4, "A/a": 0.260870, "A/M/m1": 0.226087, "A/M/m2": 0.113043}
    assert _minimiser(RAGGED, p, retain=0.7) == pytest.approx(biased, abs=1e-5)
    more = {"B": 0.4, "A/a": 0.214286, "A/M/m1": 0.257143, "A/M/m2": 0.128571}
    assert _minimiser(RAGGED, p, retain=0.2) == pytest.approx(more, abs=1e-5)
    for retain in (0.2, 0.7):
        assert _minimiser(RAGGED, p, retain=retain, weighting="anchored") == pytest.approx(p, abs=1e-5)


def test_weightings():
    leaves = TAX.leaves
    np.testing.assert_allclose(_dense(TAX, 0.7, "anchored")[:, leaves], _dense(TAX, 0.7)[:, leaves], atol=1e-12)
    deep = int(RAGGED.index("A/M/m1"))
    path = RAGGED.ancestors(deep)
    assert _dense(RAGGED, 0.7)[path, deep].tolist() == pytest.approx([0.09, 0.21, 0.7])
    assert _dense(RAGGED, 0.2)[path, deep].tolist() == pytest.approx([0.64, 0.16, 0.2])
    assert _dense(RAGGED, 0.7, "uniform")[path, deep].tolist() == pytest.approx([1 / 3] * 3)
    e = np.exp([-2.0, -1.0, 0.0])
    assert _dense(RAGGED, 0.7, "exponential")[path, deep].tolist() == pytest.approx((e / e.sum()).tolist())
    for weighting in tree_cross_entropy.WEIGHTINGS:
        for retain in (0.2, 0.7, 1.0):
            T = _dense(RAGGED, retain, weighting)
            np.testing.assert_allclose(T.sum(0), 1, atol=1e-12)
            assert (T >= 0).all()
            assert not T[~RAGGED.closure.T].any()
    with pytest.raises(ValueError, match="needs a tree"):
        HierarchyAwareCrossEntropy(DAG, weighting="anchored")


def test_floor_of_the_smoothed_loss():
    t = HierarchyAwareCrossEntropy(TAX, label_smoothing=0.1).targets(double([0.0]), torch.tensor([2]))[0]
    assert t.tolist() == pytest.approx([0.2775, 0.0225, 0.63, 0.0175, 0.0175, 0.0175, 0.0175])
    s = {"A/a": 0.9, "A/b": 0.025, "B/c": 0.025, "B/d": 0.025, "B/e": 0.025}
    share = [sum(v for k, v in s.items() if TAX.closure[TAX.index(k), node]) for node in range(len(TAX))]
    assert -(t * double(share).log()).sum().item() == pytest.approx(0.404514, abs=1e-6)


# --- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_large_logits_are_finite(dtype, eps):
    loss = HierarchyAwareCrossEntropy(RAGGED, label_smoothing=eps)
    z = torch.zeros(4, len(RAGGED), dtype=dtype)
    z[torch.arange(4), torch.arange(4)] = 1e4
    z[0] = -1e4
    z.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(z, torch.from_numpy(np.array(RAGGED.leaves)))
    value.backward()
    assert value.isfinite()
    assert z.grad.isfinite().all()
    assert value.dtype == torch.float32


def test_a_truth_without_any_mass_still_has_a_gradient():
    z = torch.tensor([[0.0, 0.0, -200.0, 0.0, 0.0, 0.0, 0.0]]).requires_grad_()
    HierarchyAwareCrossEntropy(TAX)(z, torch.tensor([2])).backward()
    assert z.grad[0, 2].item() == pytest.approx(-0.7, abs=1e-4)


def test_a_chain_of_five_hundred():
    tax = Taxonomy.from_edges([("n0", None), *((f"n{k}", f"n{k - 1}") for k in range(1, 500)), ("n0b", "n0")])
    z = torch.randn(3, len(tax)).requires_grad_()
    loss = HierarchyAwareCrossEntropy(tax, label_smoothing=0.1)
    value = loss(z, torch.from_numpy(np.array(tax.index(["n499", "n0b", "n7"]))))
    value.backward()
    assert value.isfinite()
    assert z.grad.isfinite().all()


def test_a_single_node_is_no_question():
    z = torch.randn(3, 1).requires_grad_()
    for eps in (0.0, 0.2):
        value = HierarchyAwareCrossEntropy(Taxonomy.from_paths(["a"]), label_smoothing=eps)(z, torch.zeros(3).long())
        assert value.item() == 0


def test_fifty_thousand_nodes_without_a_dense_matrix():
    rng = np.random.default_rng(0)
    sizes = [10, 60, 400, 2500, 9000, 38030]
    edges = [(f"0.{k}", None) for k in range(sizes[0])]
    for level in range(1, len(sizes)):
        above = rng.integers(0, sizes[level - 1], sizes[level])
        edges += [(f"{level}.{k}", f"{level - 1}.{p}") for k, p in enumerate(above)]
    tax = Taxonomy.from_edges(edges)
    assert len(tax) == 50_000
    target = torch.from_numpy(rng.choice(tax.leaves, 4))
    for eps in (0.0, 0.1):
        loss = HierarchyAwareCrossEntropy(tax, label_smoothing=eps)
        z = (60 * torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))).requires_grad_()
        value = loss(z, target)
        value.backward()
        assert value.isfinite()
        assert z.grad.isfinite().all()
        assert z.grad.sum(1).abs().max() < 1e-3


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"retain": 0.0}, "retain"),
        ({"retain": 1.1}, "retain"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"weighting": "geometrical"}, "weighting"),
        ({"log_epsilon": -1.0}, "log_epsilon"),
        ({"label_smoothing": 0.1, "soft_beta": 4.0}, "give one"),
    ],
)
def test_impossible_arguments_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        HierarchyAwareCrossEntropy(TAX, **arguments)


def test_peers_refuse_impossible_arguments():
    with pytest.raises(ValueError, match="alpha"):
        HierarchicalCrossEntropy(TAX, -0.1)
    with pytest.raises(ValueError, match="beta"):
        SoftLabelCrossEntropy(TAX, -1.0)
    with pytest.raises(ValueError, match="distance"):
        SoftLabelCrossEntropy(TAX, 1.0, "edges")
    for make in (HierarchicalCrossEntropy, SoftLabelCrossEntropy):
        with pytest.raises(ValueError, match=r'node "E" has 2 parents'):
            make(DAG)


def test_logits_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"logits must be \[batch, 7\]"):
        HierarchyAwareCrossEntropy(TAX)(torch.zeros(1, 5), torch.tensor([2]))
    with pytest.raises(ValueError, match=r"logits must be \[batch, 5\]"):
        HierarchicalCrossEntropy(TAX)(torch.zeros(1, 7), torch.tensor([2]))


@pytest.mark.parametrize("module", [tree_cross_entropy])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0

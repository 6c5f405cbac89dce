"""SupCon and the overlap of label sets: the worked example, the identities of the method, thresholds and refusals."""

from __future__ import annotations

import math

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kladi.losses import MultiLabelContrastiveLoss, NTXentLoss, SupConLoss
from kladi.losses.multi_label import jaccard
from kladi.structure.labelset import LabelSets

Z = torch.tensor([[[4, 0], [3, 1], [1, 2], [-1, 2]], [[4, 1], [2, 2], [0, 3], [-2, 1]]], dtype=torch.float64)
MODALITY, ANATOMY = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
SETS = torch.cat([torch.nn.functional.one_hot(MODALITY), torch.nn.functional.one_hot(ANATOMY)], 1).bool()
PAIRS = torch.tensor([0, 0, 1, 2])


@pytest.fixture
def without_type_checks():
    """What a user meets, who does not run jaxtyping's hook: the loss's own words."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def drawn(V: int = 2, B: int = 10, D: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(V, B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_sets(B: int = 10, K: int = 5, seed: int = 0) -> Tensor:
    return torch.rand(B, K, generator=torch.Generator().manual_seed(seed)) < 0.45


def from_metadata(modality: list[str], anatomy: list[str], **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """(target, similarity, comparable) by way of `LabelSets`."""
    sets = LabelSets.from_columns({"modality": modality, "anatomy": anatomy})
    return tuple(torch.from_numpy(np.array(part)) for part in sets.similarity(**options))


def by_anchor(z: Tensor, w: Tensor, temperature: float, threshold: float, normalise: str = "count") -> list[float]:
    """L_a of eq. 3 for each row, pair by pair; nan where a row has no positive. w: [B, B]."""
    V, B = z.shape[:2]
    x = normalize(z.flatten(0, 1), dim=1).tolist()
    values = []
    for a in range(V * B):
        others = [k for k in range(V * B) if k != a]
        logit = {k: sum(p * q for p, q in zip(x[a], x[k], strict=True)) / temperature for k in others}
        log_sum = math.log(sum(math.exp(v) for v in logit.values()))
        weight = {k: 1.0 if k % B == a % B else float(w[a % B, k % B]) for k in others}
        positive = [k for k in others if weight[k] >= threshold - 1e-9]
        total = sum(weight[k] * (log_sum - logit[k]) for k in positive)
        share = len(positive) if normalise == "count" else sum(weight[k] for k in positive)
        values.append(total / share if share else math.nan)
    return values


def mean(values: list[float]) -> float:
    there = [v for v in values if not math.isnan(v)]
    return sum(there) / len(there) if there else 0.0


# --- the worked example -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "eq3", "pairs", "ones", "weight", "modality", "anatomy", "unknown", "bare"),
    [
        (0.07, 1.887276, 1.316978, 4.407188, 3.224039, 3.560775, 3.039852, 2.167485, 3.560775),
        (0.5, 0.967086, 1.329748, 1.762377, 1.596736, 1.643879, 1.570950, 1.197927, 1.643879),
    ],
)
def test_worked_example(T, eq3, pairs, ones, weight, modality, anatomy, unknown, bare):
    def value(module: torch.nn.Module, target: Tensor) -> float:
        return module(Z, target).item()

    assert value(MultiLabelContrastiveLoss(T, 0.3), SETS) == pytest.approx(eq3, abs=1e-6)
    assert value(MultiLabelContrastiveLoss(T, 0.34), SETS) == pytest.approx(pairs, abs=1e-6)
    assert value(SupConLoss(T), PAIRS) == pytest.approx(pairs, abs=1e-6)
    reached = (jaccard(SETS) >= 0.3).double()
    set_to_one = MultiLabelContrastiveLoss(T, 0.3, similarity=reached)
    assert value(set_to_one, torch.arange(4)) == pytest.approx(ones, abs=1e-6)
    assert value(MultiLabelContrastiveLoss(T, 0.3, normalise="weight"), SETS) == pytest.approx(weight, abs=1e-6)
    assert value(SupConLoss(T), MODALITY) == pytest.approx(modality, abs=1e-6)
    assert value(SupConLoss(T), ANATOMY) == pytest.approx(anatomy, abs=1e-6)
    for discount, want in ((True, unknown), (False, bare)):
        target, similarity, _ = from_metadata(
            ["MR", "MR", "MR", ""], ["knee", "knee", "", ""], coverage_discount=discount
        )
        assert value(MultiLabelContrastiveLoss(T, 0.3, similarity), target) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("unknown_pairs", ["keep", "drop"])
def test_a_table_that_is_looked_up_for_each_batch_gives_what_the_whole_table_gives(unknown_pairs):
    sets = LabelSets.from_columns({"m": ["a", "b", None, "a", None], "s": ["k", None, None, "l", "k"]})
    target, table, comparable = (torch.from_numpy(np.array(p)) for p in sets.similarity(unknown_pairs=unknown_pairs))
    some = target[torch.tensor([4, 1, 1, 2])]
    z = drawn(B=4)
    asked = []

    def part(ids):
        asked.append(ids.tolist())
        found, which = sets.table(ids.numpy(), ids.numpy(), unknown_pairs=unknown_pairs)
        return torch.from_numpy(found), torch.from_numpy(which)

    whole = MultiLabelContrastiveLoss(0.07, 0.2, similarity=table, comparable=comparable)(z, some)
    assert MultiLabelContrastiveLoss(0.07, 0.2, similarity=part)(z, some).item() == whole.item()
    assert asked == [sorted(set(some.tolist()))]


def test_worked_example_by_anchor():
    """The loops give the anchors of the sheet, and the loss gives the mean of the loops."""
    w = jaccard(SETS)
    third = 1 / 3
    want = torch.tensor([[1, 1, third, 0], [1, 1, third, 0], [third, third, 1, third], [0, 0, third, 1]]).double()
    assert torch.allclose(w, want, rtol=0, atol=1e-7)
    values = by_anchor(Z, w, 0.07, 0.3)
    wanted = [2.649330, 1.765450, 1.879219, 1.051826, 1.964813, 1.765263, 2.188893, 1.833411]
    assert values == pytest.approx(wanted, abs=1e-6)
    assert MultiLabelContrastiveLoss(0.07, 0.3)(Z, SETS).item() == pytest.approx(mean(values), abs=1e-12)


def test_worked_example_counts():
    """Counts 5 5 7 3 and weights 11/3 11/3 3 5/3: with all rows equal an anchor is log 7 times their ratio."""
    ratios = [11 / 15, 11 / 15, 3 / 7, 5 / 9]
    equal = torch.ones_like(Z)
    value = MultiLabelContrastiveLoss(0.07, 0.3)(equal, SETS).item()
    assert value == pytest.approx(math.log(7) * sum(ratios) / 4, abs=1e-10)
    assert value == pytest.approx(1.192256, abs=1e-6)


def test_worked_example_gradient():
    z = Z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(MultiLabelContrastiveLoss(0.07, 0.3)(z, SETS), z)
    want = [
        [[0, -0.167637], [0.053367, -0.160102], [0.132312, -0.066156], [0.069537, 0.034769]],
        [[0.036873, -0.147492], [-0.249934, 0.249934], [-0.267851, 0], [-0.106479, -0.212957]],
    ]
    assert torch.allclose(gradient, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-6)


def test_worked_example_of_one_view_and_of_the_hybrid():
    assert MultiLabelContrastiveLoss(0.07, 0.3)(Z[:1], SETS).item() == pytest.approx(0.611247, abs=1e-6)
    hybrid = 0.75 * MultiLabelContrastiveLoss(0.07, 0.3)(Z, SETS) + 0.25 * NTXentLoss(0.10)(Z)
    assert hybrid.item() == pytest.approx(1.662010, abs=1e-6)


# --- against loops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.2, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("normalise", ["count", "weight"])
@pytest.mark.parametrize("seed", range(3))
def test_sets_against_loops(V, threshold, normalise, seed):
    z, sets = drawn(V, seed=seed), some_sets(seed=seed)
    w = [[len(a & b) / max(len(a | b), 1) for b in members(sets)] for a in members(sets)]
    values = by_anchor(z, torch.tensor(w, dtype=torch.float64), 0.3, threshold, normalise)
    module = MultiLabelContrastiveLoss(0.3, threshold, normalise=normalise)
    assert module(z, sets).item() == pytest.approx(mean(values), abs=1e-12)
    assert module.idle.item() == pytest.approx(sum(map(math.isnan, values)) / len(values), abs=1e-12)


def members(sets: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in sets]


@pytest.mark.parametrize("normalise", ["count", "weight"])
@pytest.mark.parametrize("seed", range(3))
def test_similarity_table_with_unknowns_against_loops(normalise, seed):
    """Where the diagonal is below 1, an own view still weighs 1 and other rows of the class what the table says."""
    rng = np.random.default_rng(seed)
    target, similarity, _ = from_metadata(
        rng.choice(["CT", "MR", ""], 12).tolist(), rng.choice(["lung", "knee", "brain", ""], 12).tolist()
    )
    assert (similarity.diagonal() < 1).any()
    z = drawn(2, 12, seed=seed)
    for threshold in (0.2, 0.5, 0.9):
        module = MultiLabelContrastiveLoss(0.2, threshold, similarity, normalise)
        values = by_anchor(z, similarity[target][:, target], 0.2, threshold, normalise)
        assert module(z, target).item() == pytest.approx(mean(values), abs=1e-12)


@pytest.mark.parametrize("normalise", ["count", "weight"])
def test_gradient_of_the_sheet(normalise):
    """C = (m p - w) / n; dL/dz = (C + C^T) z / (T anchors) for unit z, projected, over the norm (4.2)."""
    z, sets, T, tau = drawn().requires_grad_(), some_sets(), 0.3, 0.3
    (got,) = torch.autograd.grad(MultiLabelContrastiveLoss(T, tau, normalise=normalise)(z, sets), z)
    flat = z.detach().flatten(0, 1)
    norm = flat.norm(dim=1, keepdim=True)
    x = flat / norm
    w = jaccard(sets).fill_diagonal_(1).repeat(2, 2).fill_diagonal_(0)
    w = torch.where(w >= tau - 1e-9, w, 0)
    p = torch.softmax((x @ x.T / T).fill_diagonal_(-math.inf), 1)
    n = ((w > 0).double() if normalise == "count" else w).sum(1, keepdim=True)
    C = (w.sum(1, keepdim=True) * p - w) / n
    on_unit = (C + C.T) @ x / (T * len(x))
    want = (on_unit - (on_unit * x).sum(1, keepdim=True) * x) / norm
    assert torch.allclose(got.flatten(0, 1), want, rtol=0, atol=1e-12)


def test_gradcheck():
    z = drawn(2, 3, 2).requires_grad_()
    for normalise in ("count", "weight"):
        module = MultiLabelContrastiveLoss(0.5, 0.3, normalise=normalise)
        assert torch.autograd.gradcheck(lambda z, module=module: module(z, some_sets(3)), z)


# --- identities -------------------------------------------------------------------------------------------------------


def same(a: Tensor, b: Tensor) -> None:
    assert a.item() == pytest.approx(b.item(), abs=1e-12)
    assert a.item() > 0.1


@pytest.mark.parametrize("threshold", [1e-6, 0.3, 1.0])
def test_one_attribute_is_supcon(threshold):
    z, target = drawn(), torch.arange(10) % 3
    one_hot = torch.nn.functional.one_hot(target).bool()
    same(MultiLabelContrastiveLoss(0.2, threshold)(z, one_hot), SupConLoss(0.2)(z, target))


@pytest.mark.parametrize("threshold", [0.34, 0.7, 1.0])
def test_two_attributes_above_a_third_are_supcon_on_pairs(threshold):
    z, a, b = drawn(), torch.arange(10) % 2, torch.arange(10) % 3
    sets = torch.cat([torch.nn.functional.one_hot(a), torch.nn.functional.one_hot(b)], 1).bool()
    same(MultiLabelContrastiveLoss(0.2, threshold)(z, sets), SupConLoss(0.2)(z, 3 * a + b))


def test_nothing_shared_or_nothing_known_is_ntxent():
    z = drawn()
    want = NTXentLoss(0.2)(z)
    same(MultiLabelContrastiveLoss(0.2)(z, torch.eye(10, dtype=torch.bool)), want)
    same(MultiLabelContrastiveLoss(0.2)(z, torch.zeros(10, 3, dtype=torch.bool)), want)
    same(SupConLoss(0.2)(z, torch.arange(10)), want)
    target, similarity, _ = from_metadata([""] * 10, ["?"] * 10)
    same(MultiLabelContrastiveLoss(0.2, similarity=similarity)(z, target), want)
    assert MultiLabelContrastiveLoss(0.07)(Z, torch.zeros(4, 2, dtype=torch.bool)).item() == pytest.approx(
        1.056500, abs=1e-6
    )


def test_one_set_is_one_class():
    z = drawn()
    same(
        MultiLabelContrastiveLoss(0.2)(z, torch.ones(10, 3, dtype=torch.bool)),
        SupConLoss(0.2)(z, torch.zeros(10).long()),
    )


def test_normalised_by_weight_any_threshold_below_the_least_overlap_is_alike():
    z, sets = drawn(), some_sets()
    least = jaccard(sets)[jaccard(sets) > 0].min().item()
    values = [MultiLabelContrastiveLoss(0.2, t, normalise="weight")(z, sets).item() for t in (1e-6, least / 2, least)]
    assert values == pytest.approx([values[0]] * 3, abs=1e-12)


def test_classes_of_a_table_are_their_sets():
    z, sets = drawn(), some_sets()
    module = MultiLabelContrastiveLoss(0.2, 0.3, similarity=jaccard(sets))
    same(module(z, torch.arange(10)), MultiLabelContrastiveLoss(0.2, 0.3)(z, sets))


def test_order_of_labels_and_of_table_rows_does_not_matter():
    z, sets = drawn(), some_sets()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    same(MultiLabelContrastiveLoss(0.2)(z, sets[:, order]), MultiLabelContrastiveLoss(0.2)(z, sets))
    table = jaccard(sets)
    move = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    there = MultiLabelContrastiveLoss(0.2, similarity=table[move][:, move])(z, torch.argsort(move))
    same(there, MultiLabelContrastiveLoss(0.2, similarity=table)(z, torch.arange(10)))


# --- thresholds -------------------------------------------------------------------------------------------------------


def test_a_third_is_reached_by_a_third():
    """1/3 in float64, 0.3 and a third rounded up in its last digits are one switch; 0.34 is another."""
    values = [MultiLabelContrastiveLoss(0.07, t)(Z, SETS).item() for t in (0.3, 1 / 3, 1 / 3 + 1e-10, 0.1)]
    assert values == pytest.approx([1.887276] * 4, abs=1e-6)
    assert len(set(values)) == 1
    assert MultiLabelContrastiveLoss(0.07, 0.34)(Z, SETS).item() == pytest.approx(1.316978, abs=1e-6)
    table = jaccard(SETS).float()  # a third of a float32 table is 1e-8 off, above; one cut to 7 digits is below
    assert MultiLabelContrastiveLoss(0.07, 1 / 3, table)(Z, torch.arange(4)).item() == pytest.approx(1.887276, abs=1e-6)


@pytest.mark.parametrize("threshold", [0.0, -0.3, 1.01, math.nan])
def test_threshold_outside_its_range_is_refused(threshold):
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\], not .*at 0 every pair counts"):
        MultiLabelContrastiveLoss(threshold=threshold)


def test_the_refusal_names_the_smallest_useful_threshold():
    with pytest.raises(ValueError, match=r"0\.3333 means any overlap"):
        MultiLabelContrastiveLoss(threshold=0.0, similarity=jaccard(SETS))


# --- pairs that cannot be compared ------------------------------------------------------------------------------------


def test_pairs_that_cannot_be_compared_leave_the_denominator_but_own_views_stay():
    target, similarity, comparable = from_metadata(
        ["CT", "CT", "MR", "", ""], ["lung", "", "knee", "", "knee"], unknown_pairs="drop"
    )
    assert not comparable.all()
    z = drawn(2, 5)
    x = normalize(z.flatten(0, 1), dim=1)
    logits = x @ x.T / 0.2
    sample = torch.arange(10) % 5
    own = sample[:, None] == sample
    w = torch.where(own, 1, similarity[target][:, target].repeat(2, 2)).fill_diagonal_(0)
    there = (comparable[target][:, target].repeat(2, 2) | own).fill_diagonal_(False)
    w = torch.where(there & (w >= 0.3), w, 0)
    log_sum = logits.masked_fill(~there, -math.inf).logsumexp(1, keepdim=True)
    want = ((w * (log_sum - logits)).sum(1) / (w > 0).sum(1)).mean()
    same(MultiLabelContrastiveLoss(0.2, 0.3, similarity, comparable=comparable)(z, target), want)
    kept = MultiLabelContrastiveLoss(0.2, 0.3, similarity)(z, target)
    assert abs(kept.item() - want.item()) > 1e-3
    everything = torch.ones_like(comparable)
    same(MultiLabelContrastiveLoss(0.2, 0.3, similarity, comparable=everything)(z, target), kept)


def test_an_image_nothing_can_be_compared_with_has_its_own_view_alone():
    """Then its denominator is its numerator: it adds an anchor of 0."""
    target, similarity, comparable = from_metadata(["CT", "CT", ""], ["lung", "lung", ""], unknown_pairs="drop")
    z = drawn(2, 3)
    two = MultiLabelContrastiveLoss(0.2, similarity=similarity, comparable=comparable)(z[:, :2], target[:2])
    three = MultiLabelContrastiveLoss(0.2, similarity=similarity, comparable=comparable)(z, target)
    assert three.item() == pytest.approx(two.item() * 2 / 3, abs=1e-12)


# --- a peer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [1, 2])
def test_supcon_is_that_of_pytorch_metric_learning(V):
    """Value and gradient; both leave rows without a positive out of the mean (class 3 has one image)."""
    from pytorch_metric_learning.losses import SupConLoss as Theirs

    z, target = drawn(V).requires_grad_(), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 3])
    module = SupConLoss(0.2)
    ours, theirs = module(z, target), Theirs(temperature=0.2)(z.flatten(0, 1), target.repeat(V))
    same(ours.detach(), theirs.detach())
    a, b = (torch.autograd.grad(loss, z)[0] for loss in (ours, theirs))
    assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert module.idle.item() == pytest.approx(0.1 if V == 1 else 0)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_impossible_temperatures(temperature):
    for loss in (SupConLoss, MultiLabelContrastiveLoss):
        with pytest.raises(ValueError, match="temperature must be a positive number"):
            loss(temperature=temperature)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.rand(3, 2), "square"),
        (torch.tensor([[1, 0.2], [0.3, 1]]), "symmetric"),
        (torch.tensor([[1, 1.5], [1.5, 1]]), r"\[0, 1\]"),
        (torch.tensor([[1, -0.5], [-0.5, 1]]), r"\[0, 1\]"),
        (torch.tensor([[1, math.nan], [math.nan, 1]]), r"\[0, 1\]"),
    ],
)
def test_impossible_tables(table, message, without_type_checks):
    with pytest.raises(ValueError, match=message):
        MultiLabelContrastiveLoss(similarity=table)


def test_other_impossible_arguments(without_type_checks):
    with pytest.raises(ValueError, match='"count" or "weight"'):
        MultiLabelContrastiveLoss(normalise="sum")
    for similarity in (None, torch.eye(3)):
        with pytest.raises(ValueError, match="comparable must have the shape of similarity"):
            MultiLabelContrastiveLoss(similarity=similarity, comparable=torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("wrong", [-1, 4, 1000])
def test_a_class_that_is_no_row_of_the_table_is_named(wrong):
    module = MultiLabelContrastiveLoss(similarity=jaccard(SETS))
    with pytest.raises(IndexError, match=f"target {wrong} is no row of a similarity table of 4 classes"):
        module(Z, torch.tensor([0, 1, wrong, 2]))


def test_a_target_of_the_wrong_kind_is_named(without_type_checks):
    with pytest.raises(ValueError, match=r"target is bool\[B, K\]"):
        MultiLabelContrastiveLoss()(Z, torch.arange(4))
    with pytest.raises(ValueError, match="target must be int64"):
        MultiLabelContrastiveLoss(similarity=jaccard(SETS))(Z, SETS)
    with pytest.raises(ValueError, match="target has 3 rows, but z has 4 images"):
        MultiLabelContrastiveLoss()(Z, SETS[:3])
    with pytest.raises(ValueError, match="target has 3 entries, but z has 4 images"):
        SupConLoss()(Z, PAIRS[:3])
    with pytest.raises(ValueError, match="target must be int64"):
        SupConLoss()(Z, PAIRS.double())


def test_print_shows_the_arguments():
    assert repr(SupConLoss(0.2)) == "SupConLoss(temperature=0.2)"
    assert repr(MultiLabelContrastiveLoss()) == (
        "MultiLabelContrastiveLoss(temperature=0.07, threshold=0.3, normalise='count')"
    )

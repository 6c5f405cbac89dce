"""Masks have exactly no effect, every weight has one, the fusion is its five formulas."""

import copy

import pytest
import torch

import tiny
from kladi.evaluate.record.account import network
from kladi.models import backbones
from kladi.models.fused import DiagramAlone, Fused, Sight, around
from kladi.models.topology import (
    EXPERTS,
    SIZES,
    MaskedAttention,
    MixtureOfExperts,
    Sizes,
    TopologyEncoder,
    three_layers,
)

TINY = Sizes(width=8, point=(6, 8, 8), hidden=10, k0=4, k1=6)


def encoder(**changes):
    torch.manual_seed(0)
    return TopologyEncoder(TINY, out=5, heads=2, **changes).double()


def diagrams(rows=3, k=10, seed=0):
    """Tokens, and masks with some, no H0, no H1, and no points at all."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.rand(rows, k, 2, generator=generator, dtype=torch.float64)
    mask = torch.zeros(rows, k, dtype=torch.bool)
    mask[0, [0, 1, 2, 4, 5]] = True
    if rows > 1:
        mask[1, 4:7] = True
    if rows > 2:
        mask[2, :2] = True
    return tokens, mask


def test_parameters_are_those_of_the_sheet():
    counts = {name: sum(p.numel() for p in TopologyEncoder(sizes).parameters()) for name, sizes in SIZES.items()}
    assert counts == {"paper": 4_081_984, "small": 454_496}
    for features, count in ((2048, 2_833_669), (512, 2_047_237)):
        parts = three_layers(features, 512, 256), MixtureOfExperts(256, 512)
        assert sum(p.numel() for part in parts for p in part.parameters()) == count


def test_what_the_mask_hides_has_no_effect_and_no_gradient():
    module, (tokens, mask) = encoder(), diagrams()
    want = module(tokens, mask)
    other = torch.where(mask[..., None], tokens, torch.randn(tokens.shape, dtype=torch.float64) * 100)
    assert torch.equal(module(other, mask), want)
    other[~mask] = float("nan")
    other.requires_grad_()
    found = module(other, mask)
    assert torch.equal(found, want)
    (gradient,) = torch.autograd.grad(found.square().sum(), other)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask].abs() > 0).all()


def test_order_of_points_and_length_of_padding_do_not_matter():
    module, (tokens, mask) = encoder(), diagrams()
    want = module(tokens, mask)
    order = torch.cat([torch.randperm(4), 4 + torch.randperm(6)])
    torch.testing.assert_close(module(tokens[:, order], mask[:, order]), want, rtol=0, atol=1e-12)
    longer = torch.cat([tokens, torch.rand(3, 20, 2, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(
        module(longer, torch.cat([mask, mask.new_zeros(3, 20)], dim=1)), want, rtol=0, atol=1e-12
    )


def test_births_and_deaths_are_not_rounded_to_bfloat16():
    module, tokens, mask = TopologyEncoder(TINY, heads=2), torch.rand(2, 10, 2), torch.ones(2, 10, dtype=torch.bool)
    wanted = module._points(tokens, mask)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module._points(tokens, mask)[0], wanted)
        assert module(tokens, mask).isfinite().all()


def test_a_point_says_its_dimension():
    module, (tokens, _) = encoder(), diagrams(1)
    first, second = torch.zeros(1, 10, dtype=torch.bool), torch.zeros(1, 10, dtype=torch.bool)
    first[0, 0], second[0, 4] = True, True
    tokens[0, 4] = tokens[0, 0]
    assert not torch.allclose(module(tokens, first), module(tokens, second))


def test_rows_without_points_are_finite_and_their_neighbours_do_not_matter():
    module, (tokens, mask) = encoder(), diagrams(4)
    assert not mask[3].any()
    tokens.requires_grad_()
    found = module(tokens, mask)
    found.square().sum().backward()
    assert found.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    torch.testing.assert_close(module(tokens[3:], mask[3:]), found[3:], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[3], module.head(torch.zeros(1, 48, dtype=torch.float64))[0])


def test_every_weight_has_a_gradient():
    module, (tokens, mask) = encoder(), diagrams(1)
    module(tokens, mask).square().sum().backward()
    for name, parameter in module.named_parameters():
        if not name.endswith("key.bias"):  # one number for all keys: the softmax takes it out
            assert parameter.grad.abs().max() > 1e-12, name


def test_gradcheck():
    module, (tokens, mask) = encoder(), diagrams(2)
    parameters = [p for p in module.parameters() if p.ndim > 1][:3]
    assert torch.autograd.gradcheck(lambda t, *_: module(t, mask), (tokens.requires_grad_(), *parameters))


def test_attention_is_a_softmax_over_the_kept_keys():
    torch.manual_seed(0)
    module = MaskedAttention(8, 2).double()
    query, keys = torch.randn(1, 3, 8).double(), torch.randn(1, 5, 8).double()
    mask = torch.tensor([[True, False, True, True, False]])
    q, k, v = module.query(query)[0], module.key(keys)[0], module.value(keys)[0]
    rows = []
    for i in range(3):
        row = []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            scores = {j: torch.exp(q[i, part] @ k[j, part] / 2) for j in (0, 2, 3)}
            row.append(sum(scores[j] * v[j, part] for j in scores) / sum(scores.values()))
        rows.append(torch.cat(row))
    torch.testing.assert_close(module(query, keys, mask)[0], module.out(torch.stack(rows)))
    with pytest.raises(ValueError, match="width 8 is no multiple of 3 heads"):
        MaskedAttention(8, 3)


def test_attention_that_a_point_receives():
    """Naive: softmax of each asking point over the points of its dimension, mean over heads and askers."""
    module, (tokens, mask) = encoder(), diagrams(4)
    found = module.attended(tokens, mask)
    assert (found[~mask] == 0).all()
    h0 = module._points(tokens, mask)[0][0]
    points, within = [0, 1, 2], module.within0
    q, k = within.query(h0), within.key(h0)
    want = torch.zeros(3, dtype=torch.float64)
    for i in points:
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            want += torch.softmax(torch.stack([q[i, part] @ k[j, part] / 2 for j in points]), dim=0).detach() / 6
    torch.testing.assert_close(found[0, :3], want)
    torch.testing.assert_close(found[:, :4].sum(dim=1), mask[:, :4].any(dim=1).double())
    torch.testing.assert_close(found[:, 4:].sum(dim=1), mask[:, 4:].any(dim=1).double())


def mixture():
    torch.manual_seed(0)
    return MixtureOfExperts(6, 7).double(), torch.randn(4, 6).double(), torch.randn(4, 6).double()


def test_the_fusion_is_its_five_formulas():
    module, f, t = mixture()
    both = torch.cat([f, t], dim=1)
    g = torch.sigmoid(both @ module.mix.weight.T + module.mix.bias)
    u, w = module.to_visual, module.to_topology
    crossed = torch.cat([module.norm_visual(f + u(t)), module.norm_topology(t + w(f))], dim=1)
    said = {
        "visual": module.experts["visual"](f),
        "topology": module.experts["topology"](t),
        "concat": module.experts["concat"](both),
        "gated": module.experts["gated"](g * f + (1 - g) * t),
        "cross": module.experts["cross"](crossed),
    }
    for i, name in enumerate(EXPERTS):
        only = copy.deepcopy(module)
        with torch.no_grad():
            only.score[-1].weight.zero_()
            only.score[-1].bias.copy_(1e4 * torch.eye(5)[i])
        torch.testing.assert_close(only(f, t), said[name])
    h = module(f, t)
    torch.testing.assert_close(module.gate.sum(dim=1), torch.ones(4).double())
    torch.testing.assert_close(h, sum(module.gate[:, i : i + 1] * said[name] for i, name in enumerate(EXPERTS)))


def fresh():
    """An image encoder of timm's with a diagram encoder round it, and what was there before."""
    config = tiny.settings()
    torch.manual_seed(0)
    image = backbones.build(config.encoder, config.intensity)
    before = {name: tensor.clone() for name, tensor in image.state_dict().items()}
    return Fused(image, Sight("small", 16)).eval(), before


def test_zero_diagrams_make_topology_a_constant():
    fused, _ = fresh()
    image, empty = torch.randn(4, 1, 16, 16), torch.zeros(4, 72, dtype=torch.bool)
    t = fused.topology(torch.rand(4, 72, 2), empty)
    assert torch.equal(t, t[:1].expand_as(t))
    assert fused(image, torch.rand(4, 72, 2), empty).shape == (4, 512)


def test_it_can_be_copied_after_use_in_double_precision_and_of_nothing():
    fused, _ = fresh()
    image = torch.rand(2, 1, 16, 16)
    points, mask = torch.rand(2, 72, 2), torch.ones(2, 72, dtype=torch.bool)
    fused(image, points, mask).sum().backward()
    assert copy.deepcopy(fused)(image, points, mask).shape == (2, 512)
    config = tiny.settings()
    whole = around(backbones.build(config.encoder, config.intensity), Sight("small", 16)).double().eval()
    assert whole(image.double()).dtype == torch.float64
    assert whole(image[:0].double()).shape == (0, 512)


def test_nothing_that_was_there_is_initialised_again():
    fused, before = fresh()
    state = fused.state_dict()
    assert before
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_the_diagram_alone_is_its_encoder():
    config = tiny.settings()
    alone = around(backbones.build(config.encoder, config.intensity), Sight("small", 16, sees="diagram")).eval()
    assert isinstance(alone, DiagramAlone)
    points, mask = torch.rand(3, 72, 2), torch.ones(3, 72, dtype=torch.bool)
    found = alone(torch.rand(3, 1, 16, 16), points, mask)
    assert torch.equal(found, alone.topology(points, mask))
    assert found.shape == (3, alone.width) == (3, 256)
    assert network(alone) == {
        "encoder": "small diagram encoder, diagrams at 16 px, 24 + 48 points",
        "parameters": 454_496,
    }


@pytest.mark.parametrize(
    ("given", "region", "said"),
    [
        ("none", "whole", "empty diagrams"),
        ("own", "foreground", "diagrams of the foreground at 16 px, 24 + 48 points"),
        ("own", "mask", "diagrams inside masks at 16 px, 24 + 48 points"),
        ("another", "whole", "diagrams of other images at 16 px, 24 + 48 points"),
    ],
)
def test_a_control_does_not_read_like_what_it_controls(given, region, said):
    assert str(Sight("small", 16, given=given, region=region)) == said


def test_an_account_of_both_names_both():
    config = tiny.settings()
    plain = backbones.build(config.encoder, config.intensity)
    both = around(plain, Sight("small", 16))
    said, image = network(both), network(plain)
    diagrams = "diagrams at 16 px, 24 + 48 points"
    assert said["encoder"] == f"{config.encoder.name} and small diagram encoder, {diagrams}"
    assert said["parameters"] > image["parameters"] + 454_496

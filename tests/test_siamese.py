"""One module, four methods: what the moving copy does, when, and that a run of each goes on to the same bits."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny
from kladi.data.views.batch import Batch, View
from kladi.errors import UserError
from kladi.evaluate.embed import embed
from kladi.learn import checkpoint, presets
from kladi.learn.console import Silent
from kladi.learn.facts import Facts
from kladi.learn.fit import fit
from kladi.learn.objectives import Progress
from kladi.losses import BarlowTwinsLoss, BYOLLoss, MoCoV3Loss
from kladi.models import backbones, heads
from kladi.models.heads import Projector

NAMES = ["barlow_twins", "byol", "dino", "moco_v3"]
MOVING = ["byol", "dino", "moco_v3"]


class Small(nn.Module):
    """An encoder with all that a target must treat apart: batch normalisation, dropout, parameters."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(9, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)

    def forward(self, image):
        return self.drop(self.norm(self.layer(image.flatten(1))))


def built(name, **args):
    torch.manual_seed(0)
    facts = Facts.of(tiny.data())
    return presets.build(name, args, facts, Small(), Projector(16, 8, 6))


def batch(seed=1, size=10):
    generator = torch.Generator().manual_seed(seed)
    views = tuple(View(torch.randn(size, 1, 3, 3, generator=generator)) for _ in range(2))
    return Batch(views, {}, {}, torch.arange(size))


def moved(objective, m):
    """The target after one step that follows with share 1 - m, from parameters that were pushed."""
    objective.before_step(Progress(0, 10, 0))
    assert objective._follow == pytest.approx(1 - objective.momentum)
    objective._follow = 1 - m
    with torch.no_grad():
        for parameter in objective.encoder.parameters():
            parameter.add_(1.0)
    objective.after_step()


@pytest.mark.parametrize("name", MOVING)
def test_the_target_begins_as_the_network_and_follows_it(name):
    objective = built(name)
    pairs = list(zip(objective.target["encoder"].parameters(), objective.encoder.parameters(), strict=True))
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    before = [mine.clone() for mine, _ in pairs]
    moved(objective, 1.0)
    assert all(torch.equal(mine, was) for (mine, _), was in zip(pairs, before, strict=True))
    moved(objective, 0.75)
    for (mine, theirs), was in zip(pairs, before, strict=True):
        torch.testing.assert_close(mine, 0.75 * was + 0.25 * theirs)
    moved(objective, 0.0)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("name", MOVING)
def test_its_momentum_rises_to_one_by_half_a_cosine(name):
    objective = built(name, momentum=0.9)
    for step in (0, 1, 5, 9):
        objective.before_step(Progress(step, 10, 0))
        m = 1 - 0.1 * (1 + math.cos(math.pi * step / 10)) / 2
        assert objective._follow == pytest.approx(1 - m)


@pytest.mark.parametrize("name", MOVING)
def test_no_gradient_no_dropout_and_its_own_statistics_in_the_target(name):
    objective = built(name).train()
    objective.total(objective(batch())).backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.target.parameters())
    targets = [objective._targets(objective.target, batch()) for _ in range(2)]
    assert torch.equal(*targets)  # the online network would drop other units
    target, online = objective.target["encoder"].norm, objective.encoder.norm
    assert target.training
    assert target.num_batches_tracked == 2 * 3
    assert online.num_batches_tracked == 2
    assert not objective.target["encoder"].drop.training
    objective.eval()
    assert not target.training
    objective.train()
    assert target.training
    assert not objective.target["encoder"].drop.training


def test_each_is_its_criterion_of_what_its_heads_say():
    one = batch()
    views = [view.image for view in one.views]
    byol, moco, barlow = (built(name).eval() for name in ("byol", "moco_v3", "barlow_twins"))
    for objective, criterion in ((byol, BYOLLoss()), (moco, MoCoV3Loss(0.2))):
        z = [objective.projector(objective.encoder(view)) for view in views]
        p = torch.stack([objective.predictor(view) for view in z])
        torch.testing.assert_close(objective.total(objective(one)), criterion(p, torch.stack(z)))  # a copy, still equal
    z = torch.stack([barlow.projector(barlow.encoder(view)) for view in views])
    torch.testing.assert_close(barlow.total(barlow(one)), BarlowTwinsLoss(0.005)(z))


def test_what_each_embedding_is_compared_with():
    assert {name: built(name).others(8, 2) for name in [*NAMES, "simclr"]} == {
        "barlow_twins": 0,
        "byol": 0,
        "dino": 0,
        "moco_v3": 7,
        "simclr": 15,
    }


def test_views_pass_one_by_one():
    """Batch statistics are those of a view: another second view changes nothing of the first."""
    objective = built("barlow_twins").train()
    objective.encoder.drop.p = 0.0
    one, other = batch(), batch(2)
    mixed = Batch((one.views[0], other.views[1]), {}, {}, one.row)
    assert torch.equal(objective.embed(one.views)[0], objective.embed(mixed.views)[0])
    assert objective.projector.layers[1].num_batches_tracked == 0


def test_heads_are_those_of_the_papers():
    kinds = {name: [type(layer).__name__ for layer in built(name).projector.layers] for name in NAMES}
    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds == {
        "byol": [*hidden, "Linear"],
        "moco_v3": [*hidden, "Linear", "BatchNorm1d"],
        "barlow_twins": [*hidden, *hidden, "Linear"],
        "dino": ["Linear", "GELU", "Linear", "GELU", "Linear", "Unit"],
    }
    assert not built("moco_v3").projector.layers[-1].affine
    assert built("byol").projector.layers[0].bias is None
    directions = built("dino", prototypes=7).last
    z = built("dino").projector(torch.randn(4, 16))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))
    assert directions(z).abs().max() <= 1 + 1e-6
    assert directions(z).shape == (4, 7)


def test_prototypes_are_held_for_the_first_epoch():
    objective = built("dino", prototypes=7)
    for epoch, frozen in ((0, True), (1, False)):
        objective.zero_grad()
        objective.before_step(Progress(3 * epoch, 6, epoch))
        objective.total(objective(batch())).backward()
        assert (objective.last.weight.grad is None) == frozen


def test_moco_holds_the_patches_of_a_vision_transformer():
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    config = tiny.settings(encoder__name="vit_tiny_patch16_224", encoder__args=args)
    facts = Facts.of(tiny.data())
    for frozen in (True, False):
        encoder = backbones.build(config.encoder, config.intensity)
        presets.build("moco_v3", {"freeze_patches": frozen}, facts, encoder, Projector(24, 8, 6))
        assert encoder.model.patch_embed.proj.weight.requires_grad != frozen
        assert encoder.model.blocks[0].attn.qkv.weight.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_a_run_stopped_and_resumed_has_the_same_bits(tmp_path, name):
    data = tiny.data()
    changes = {"objective__name": name, "encoder__args": {"drop_rate": 0.2}}
    fit(data, tiny.settings(**changes), tmp_path / "whole", progress=Silent())
    fit(data, tiny.settings(**changes, train__max_steps=4), tmp_path / "cut", progress=Silent())
    kept = load_file(checkpoint.newest(tmp_path / "cut").folder / "train.safetensors")
    assert any("target." in key for key in kept) == (name in MOVING)
    assert any(key.endswith("centre") for key in kept) == (name == "dino")
    fit(data, tiny.settings(**changes), tmp_path / "cut", resume=True, progress=Silent())
    for file in ("model.safetensors", "head.safetensors"):
        whole, cut = load_file(tmp_path / "whole" / file), load_file(tmp_path / "cut" / file)
        assert whole.keys() == cut.keys()
        assert all(torch.equal(cut[key], value) for key, value in whole.items())
    assert not any(key.startswith("target.") for key in load_file(tmp_path / "cut" / "head.safetensors"))
    found = embed(backbones.load(tmp_path / "cut"), data, head=heads.load(tmp_path / "cut"))
    assert found.z.shape == (len(data), 8)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())["kladi"]
    assert config["projector_form"] in heads.FORMS


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("byol", {"momentum": 1.5}, "momentum must lie between 0 and 1, not 1.5"),
        ("dino", {"prototypes": 1}, "prototypes must be 2 or more, not 1"),
        ("dino", {"prototypes": 8.5}, 'objective.args.prototypes = "8.5" is not a whole number'),
        ("moco_v3", {"temprature": 0.2}, 'closest: "temperature"'),
    ],
)
def test_mistakes_are_named(name, args, said):
    with pytest.raises(UserError, match=said):
        built(name, **args)


def test_a_projector_of_another_kladi_is_refused(tmp_path):
    fit(tiny.data(), tiny.settings(objective__name="byol", train__epochs=1), tmp_path, progress=Silent())
    config = json.loads((tmp_path / "config.json").read_text())
    config["kladi"]["projector_form"] = "newer"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r'no projector of the form "newer"'):
        heads.load(tmp_path)

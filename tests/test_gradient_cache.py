"""A batch embedded in parts has the gradient of the whole: exactly, with dropout, and in a run."""

import copy
import json

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

import ranks_worker
import tiny
from kladi.data.views.batch import View
from kladi.data.views.loader import Loader
from kladi.learn import gradient_cache, presets
from kladi.learn.console import Silent
from kladi.learn.facts import Facts
from kladi.learn.fit import fit
from kladi.models.heads import Projector

FABRIC = Fabric(accelerator="cpu", devices=1)


class Noisy(ranks_worker.Flat):
    """With dropout, and a layer that keeps running statistics."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(12)

    def forward(self, image):
        return self.norm(self.drop(super().forward(image)))


def setting(name, encoder):
    """An objective and a batch of eight images in float64."""
    dataset = ranks_worker.with_tables(tiny.data(labelled=0.7))
    torch.manual_seed(0)
    known = Facts.of(dataset)
    args = ranks_worker.CASES[name]
    objective = presets.build(name.split()[0], args, known, encoder, Projector(12, 8, 6)).double()
    batch = next(Loader(dataset, tiny.settings(), 2, torch.device("cpu")).epoch(0))
    return objective, ranks_worker.exact(batch)


def gradients(objective, batch, chunk, seed=7):
    objective = copy.deepcopy(objective)
    terms = gradient_cache.backward(objective, batch, FABRIC, seed, chunk)
    return terms, {name: p.grad for name, p in objective.named_parameters()}, objective


@pytest.mark.parametrize("name", ranks_worker.CASES)
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_parts_have_the_gradient_of_the_whole(name, chunk):
    torch.manual_seed(3)
    objective, batch = setting(name, ranks_worker.Flat())
    whole, want, _ = gradients(objective, batch, 0)
    terms, found, _ = gradients(objective, batch, chunk)
    for key, term in whole.items():
        assert terms[key].item() == pytest.approx(term.item(), rel=1e-12)
    for key, gradient in want.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-12)


def test_dropout_falls_alike_in_both_passes():
    """Against one graph over all parts."""
    torch.manual_seed(3)
    objective, batch = setting("simclr", Noisy())
    _, found, _ = gradients(objective, batch, 3)
    twin, parts = copy.deepcopy(objective), []
    for number, part in enumerate((slice(0, 3), slice(3, 6), slice(6, 8))):
        torch.manual_seed(7 + (number << 32))
        parts.append(twin.embed(tuple(View(view.image[part]) for view in batch.views)))
    twin.total(twin.terms(torch.cat(parts, dim=1), batch)).backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12)


def test_running_statistics_count_each_image_once():
    torch.manual_seed(3)
    objective, batch = setting("simclr", Noisy())
    _, _, after = gradients(objective, batch, 3)
    assert int(after.encoder.norm.num_batches_tracked) == 3
    assert all(layer.track_running_stats for layer in after.modules() if isinstance(layer, nn.BatchNorm1d))


@pytest.mark.parametrize("chunk", [0, 8, 99])
def test_a_part_that_is_the_whole_is_one_pass(chunk):
    torch.manual_seed(3)
    objective, batch = setting("simclr", Noisy())
    _, want, _ = gradients(objective, batch, 0)
    _, found, _ = gradients(objective, batch, chunk)
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_a_run_in_parts_is_the_run_of_the_whole(tmp_path):
    """An encoder without batch statistics and dropout."""
    losses = []
    for chunk in (0, 3):
        changes = {"encoder__name": "test_convnext", "encoder__args": {}, "intensity__size": 32, "train__chunk": chunk}
        fit(tiny.data(size=32), tiny.settings(**changes), tmp_path / str(chunk), progress=Silent())
        lines = [json.loads(line) for line in (tmp_path / str(chunk) / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert "3 at a time" in (tmp_path / "3" / "log.txt").read_text()

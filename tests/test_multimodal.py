"""The objective of an image and tables: what reaches it, what it learns, what a run of it keeps."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import tiny
from kladi.data.dataset import TRAIN
from kladi.data.modalities import Modality
from kladi.data.views.loader import Loader
from kladi.errors import UserError
from kladi.learn import presets
from kladi.learn.console import Silent
from kladi.learn.facts import Facts
from kladi.learn.fit import fit
from kladi.learn.multimodal import Multimodal
from kladi.losses.factor import StructureContrastLoss
from kladi.models.heads import Projector
from ranks_worker import Flat, with_tables


def setting(dataset, **args):
    torch.manual_seed(0)
    objective = presets.build("multimodal", args, Facts.of(dataset), Flat(), Projector(12, 8, 6))
    batch = next(Loader(dataset, tiny.settings(), 2, torch.device("cpu")).epoch(0))
    return objective, batch


def test_the_term_is_the_loss_of_both_views_and_every_table():
    objective, batch = setting(with_tables(tiny.data()), ranks=3)
    z = objective.embed(batch.views)
    one, two = (objective.factors([view, *batch.tables]) for view in z)
    present = torch.cat([torch.ones(8, 1, dtype=torch.bool), batch.in_table], dim=1)
    want = StructureContrastLoss(objective.factors.lattice)(one, present, two)
    torch.testing.assert_close(objective(batch)["factors"], want)
    assert 0 < objective.idle["factors"] < 1
    assert objective.others(8, 2) == 7


def test_what_a_missing_table_holds_is_not_read():
    objective, batch = setting(with_tables(tiny.data()))
    want = objective(batch)["factors"]
    assert not batch.in_table.all()
    tables = tuple(
        torch.where(there[:, None], table, torch.nan)
        for table, there in zip(batch.tables, batch.in_table.T, strict=True)
    )
    found = objective(dataclasses.replace(batch, tables=tables))["factors"]
    assert found.item() == want.item()
    found.backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters())


def test_without_any_row_in_a_table_the_views_still_train():
    objective, batch = setting(with_tables(tiny.data()))
    objective(dataclasses.replace(batch, in_table=torch.zeros_like(batch.in_table)))["factors"].backward()
    assert objective.encoder.layer.weight.grad.abs().sum() > 0
    assert objective.idle["factors"] == 1


def test_a_table_may_take_part_in_nothing():
    """The control without tables."""
    objective, batch = setting(with_tables(tiny.data()), ranks={"image": 4})
    objective(batch)["factors"].backward()
    bare = objective(dataclasses.replace(batch, in_table=torch.zeros_like(batch.in_table)))["factors"]
    assert objective(batch)["factors"].item() == pytest.approx(bare.item(), rel=1e-6)


def test_ranks_are_named_by_modality():
    objective, _ = setting(with_tables(tiny.data()), ranks={"clinic+image": 2, "image": 3, "image + labs": 4})
    assert str(objective.factors.lattice) == "0+1 (2), 0+2 (4), 0 (3)"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"ranks": {"image+clinik": 2}}, 'ranks: "clinik" is no modality; closest: "clinic"'),
        ({"ranks": {"clinic": 2}}, "ranks leave the image out"),
        ({"ranks": -1}, "it takes 0 or more"),
        ({"ranks": 2.5}, "is not a whole number or a table of whole numbers"),
        ({"weight": 0.0}, "weight must be a positive number"),
        ({"rank": 3}, 'rank is no argument of multimodal; closest: "ranks"'),
    ],
)
def test_mistakes_are_named(args, said):
    with pytest.raises(UserError) as caught:
        setting(with_tables(tiny.data()), **args)
    assert said in str(caught.value)


def test_it_asks_for_a_table():
    with pytest.raises(UserError, match="multimodal needs a table: --data"):
        setting(tiny.data())


def test_tables_make_it_the_automatic_choice():
    assert presets.choose(Facts.of(with_tables(tiny.data()))) == "multimodal"


@pytest.mark.slow
def test_what_image_and_table_share_is_found_and_a_dealt_out_table_has_none():
    """Brightness of a patient's pictures is in the table beside noise; held-out patients tell whether it was learnt."""
    agreed = {}
    for dealt in (False, True):
        data = bright(n=240, dealt=dealt)
        torch.manual_seed(0)
        objective = presets.build("multimodal", {"ranks": 2}, Facts.of(data), Flat(), Projector(12, 32, 16))
        optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
        loader = Loader(data, tiny.settings(train__batch=64), 2, torch.device("cpu"))
        for epoch in range(60):
            for batch in loader.epoch(epoch):
                optimizer.zero_grad()
                objective.total(objective(batch)).backward()
                optimizer.step()
        held = np.flatnonzero(data.split != TRAIN)
        batch = next(Loader(data, tiny.settings(train__batch=64), 2, torch.device("cpu"), rows=held).epoch(0))
        image, table = (part[:, :2] for part in objective.factors([objective.embed(batch.views)[0], *batch.tables]))
        q = [torch.linalg.qr(part - part.mean(0))[0] for part in (image, table)]
        agreed[dealt] = float(torch.linalg.svdvals(q[0].T @ q[1])[0].detach())  # the first canonical correlation
    assert agreed[False] > 0.8
    assert agreed[True] < 0.5


def bright(n, dealt):
    data = tiny.data(n=n)
    pixels = data.store.gather(np.arange(n)).reshape(n, -1).astype(np.float64).mean(axis=1)
    rng = np.random.default_rng(0)
    told = rng.permutation(pixels) if dealt else pixels
    values = np.stack([(told - told.mean()) / told.std(), *rng.normal(size=(2, n))], axis=1).astype(np.float32)
    return dataclasses.replace(data, modalities=(Modality("clinic", ("mean", "a", "b"), values, np.ones(n, bool)),))


def test_a_run_says_its_tables_and_goes_on_to_the_same_bits(tmp_path):
    data = with_tables(tiny.data())
    whole = tiny.settings(objective__name="auto", train__epochs=3)
    fit(data, whole, tmp_path / "whole", progress=Silent())
    part = tiny.settings(objective__name="auto", train__epochs=3, train__max_steps=4)
    fit(data, part, tmp_path / "run", progress=Silent())
    other = with_tables(tiny.data(), seed=1)
    with pytest.raises(UserError, match="tables or masks have changed"):
        fit(other, whole, tmp_path / "run", resume=True, progress=Silent())
    fit(data, whole, tmp_path / "run", resume=True, progress=Silent())
    for name in ("model.safetensors", "head.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((tmp_path / "run" / "data.json").read_text())["modalities"] == {"clinic": 3, "labs": 5}
    assert "clinic: 3 columns" in (tmp_path / "run" / "log.txt").read_text()
    described = json.loads((tmp_path / "run" / "config.json").read_text())["kladi"]["objective"]
    assert described["name"] == "multimodal"
    assert isinstance(presets.PRESETS["multimodal"], type(presets.simclr))
    assert issubclass(Multimodal, torch.nn.Module)

"""Topology in a run: bounded pairs with their diagrams, a fused encoder that is kept, resumed, embedded, compared."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kladi
import tiny
from kladi import commands, toy
from kladi.data.embeddings import Embeddings
from kladi.data.load import load
from kladi.data.views import bounded_pair, kept_strengths, region
from kladi.data.views.bounded_pair import BoundedPair
from kladi.data.views.calibration import Range, Strengths
from kladi.data.views.kept_strengths import strengths_of
from kladi.data.views.partners import partners
from kladi.data.views.region import Looks
from kladi.data.views.whole import pictures
from kladi.errors import UserError
from kladi.evaluate.embed import embed
from kladi.evaluate.evaluation import random_encoder
from kladi.evaluate.record import shapes
from kladi.learn import training
from kladi.learn.console import Silent
from kladi.learn.fit import fit
from kladi.models import backbones, fused, heads
from kladi.models.topology import EXPERTS
from kladi.structure.topology import diagram, diagrams

SOME = {"noise": Range(0.04, 0.1, 0.9, 0.08, 10), "brightness": Range(0.05, 0.14, 1.0, 0.1, 10)}
STRONG = {"noise": Range(0.15, 0.2, 0.9, 0.2, 10), "gamma": Range(0.16, 0.24, 1.0, 0.2, 10)}
STRENGTHS = Strengths({"weak": SOME, "strong": STRONG}, 0)
ON = {"topology__on": True, "topology__encoder": "small", "encoder__args": {"drop_rate": 0.2}}
CPU = torch.device("cpu")
ALONE = fused.Sight("small", 16, sees="diagram")


@pytest.fixture(autouse=True)
def known_strengths(monkeypatch):
    """Calibration has its own tests; here it would take a minute a run."""
    monkeypatch.setattr("kladi.learn.training.strengths_of", lambda dataset, config, side, say: STRENGTHS)


def pair(data, tokens=(4, 6), side=16, **changes):
    return BoundedPair(data, tiny.settings(**ON, **changes), STRENGTHS, side, tokens)


def test_views_are_a_function_of_row_and_epoch():
    data = tiny.data()
    one = pair(data)
    whole = one.views(np.arange(8), 3, CPU)
    part = pair(data).views(np.array([5, 2]), 3, CPU)
    for seen, some in zip(whole, part, strict=True):
        assert all(torch.equal(a[[5, 2]], b) for a, b in zip(seen.inputs, some.inputs, strict=True))
    other = one.views(np.arange(8), 4, CPU)
    assert not torch.equal(whole[0].image, other[0].image)
    assert not torch.equal(whole[0].image, whole[1].image)


def test_the_diagram_is_that_of_the_view_in_the_range_of_the_original():
    data = tiny.data()
    views = pair(data).views(np.arange(4), 0, CPU)
    config = tiny.settings(**ON)
    x = pictures(data, np.arange(4), config.intensity).double().mean(dim=1).numpy()
    for view in views:
        seen = view.image * config.intensity.std[0] + config.intensity.mean[0]
        for i, (grey, before) in enumerate(zip(seen.double().mean(dim=1).numpy(), x, strict=True)):
            v = np.clip((grey - before.min()) / (before.max() - before.min()), 0, 1)
            points, mask = diagram(v).tokens(4, 6)
            np.testing.assert_allclose(view.diagram.points[i], points, atol=1e-5)
            np.testing.assert_array_equal(view.diagram.mask[i], mask)


def kept_data(folder):
    """A data set whose diagrams have a place."""
    data = tiny.data()
    return dataclasses.replace(data, store=dataclasses.replace(data.store, folder=folder / "store"))


def test_diagrams_are_made_once_and_read_by_every_run(tmp_path, monkeypatch):
    data, rows = kept_data(tmp_path), np.array([4, 1, 9])
    bare = pair(tiny.data(), topology__draws=2).views(rows, 5, CPU)
    pair(data, topology__draws=2).views(rows, 1, CPU)
    pair(data, topology__draws=2).views(rows, 0, CPU)
    (file,) = tmp_path.iterdir()
    seen = []
    monkeypatch.setattr(bounded_pair, "diagrams", lambda v: seen.extend(v) or diagrams(v))
    for given in ("own", "another"):
        later = pair(data, topology__draws=2, topology__diagrams=given)
        of = rows if given == "own" else np.argsort(partners(data.split, data.group, data.row_id))[rows]
        for view, plain in zip(later.views(of, 5, CPU), bare, strict=True):
            assert torch.equal(view.diagram.points, plain.diagram.points)
            assert torch.equal(view.image, plain.image) == (given == "own")
    assert not seen
    for change in ({"topology__draws": 3}, {"train__seed": 1}, {"topology__region": "foreground"}):
        pair(data, **{"topology__draws": 2, **change}).views(rows, 5, CPU)
    assert len(seen) == 3 * 6
    assert len(list(tmp_path.iterdir())) == 4
    assert file in tmp_path.iterdir()


def test_no_region_stays_in_memory(tmp_path):
    """Those of a million images would fill it: they are found again where a diagram has to be made."""
    one = pair(kept_data(tmp_path), topology__region="foreground")
    first = one.views(np.arange(12), 0, CPU)
    held = {name: value.nbytes for name, value in vars(one).items() if isinstance(value, np.ndarray)}
    assert sum(held.values()) <= 28 * len(one.dataset)
    assert not [name for name, value in vars(one).items() if isinstance(value, dict | list)]
    again = pair(kept_data(tmp_path), topology__region="foreground").views(np.arange(12), 0, CPU)
    for view, other in zip(first, again, strict=True):
        assert torch.equal(view.diagram.points, other.diagram.points)


def test_each_weak_view_meets_each_strong_one_and_is_turned_afresh():
    one = pair(tiny.data(), topology__draws=3, augment__flip_horizontal=0.5)
    drawn = [(one._draw(epoch, 0), one._draw(epoch, 1)) for epoch in range(9)]
    assert sorted(drawn) == [(a, b) for a in range(3) for b in range(3)]
    rows = np.arange(12)
    first, other = (one.views(rows, epoch, CPU)[0] for epoch in (0, 3))
    assert torch.equal(first.diagram.points, other.diagram.points)
    same = [torch.equal(a, b) for a, b in zip(first.image, other.image, strict=True)]
    mirrored = [torch.equal(a.flip(2), b) for a, b in zip(first.image, other.image, strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert any(same)
    assert any(mirrored)


def test_without_tokens_views_have_no_diagram():
    (weak, strong) = pair(tiny.data(), tokens=None).views(np.arange(3), 0, CPU)
    assert weak.diagram is None
    assert len(strong.inputs) == 1


@pytest.mark.parametrize(
    ("across", "down", "count"), [(0.0, 0.0, 1), (0.5, 0.0, 2), (0.0, 0.5, 2), (0.5, 0.5, 8)], ids=str
)
def test_only_the_flips_that_the_settings_allow(across, down, count):
    data = tiny.data()
    one = pair(data, augment__flip_horizontal=across, augment__flip_vertical=down)
    u = np.random.default_rng(0).random((bounded_pair.TURN + 1, 400))
    turns = one._turns(u)
    x = torch.rand(1, 1, 5, 5).expand(400, -1, -1, -1)
    found = bounded_pair.bounded.turned(x, turns)
    kinds = {image.numpy().tobytes() for image in found}
    assert len(kinds) == count
    if (across, down) == (0.5, 0.0):
        assert x[0].flip(2).contiguous().numpy().tobytes() in kinds
    if (across, down) == (0.0, 0.5):
        assert x[0].flip(1).contiguous().numpy().tobytes() in kinds


def test_the_control_without_diagrams_has_the_same_pixels_and_no_point():
    data = tiny.data()
    own, none = (pair(data, topology__diagrams=word).views(np.arange(5), 2, CPU) for word in ("own", "none"))
    for mine, bare in zip(own, none, strict=True):
        assert torch.equal(mine.image, bare.image)
        assert bare.diagram.mask.shape == mine.diagram.mask.shape
        assert not bare.diagram.mask.any()
        assert mine.diagram.mask.any()


def test_the_control_with_others_diagrams_has_those_of_the_partners_views():
    data = tiny.data()
    of = partners(data.split, data.group, data.row_id)
    rows = np.array([3, 11, 0])
    shown = pair(data, topology__diagrams="another").views(rows, 1, CPU)
    own = pair(data).views(of[rows], 1, CPU)
    for mine, theirs, plain in zip(shown, own, pair(data).views(rows, 1, CPU), strict=True):
        assert torch.equal(mine.diagram.points, theirs.diagram.points)
        assert torch.equal(mine.image, plain.image)


def test_a_region_is_looked_at_in_both_views_and_in_evaluation():
    data = tiny.data()
    whole, front = (pair(data, topology__region=word).views(np.arange(6), 1, CPU) for word in ("whole", "foreground"))
    for one, other in zip(whole, front, strict=True):
        assert not torch.equal(one.diagram.points, other.diagram.points)
    config = tiny.settings(**ON, topology__region="foreground")
    x = pictures(data, np.arange(6), config.intensity)
    encoder = fused.fused(backbones.build(config.encoder, config.intensity), config.topology)
    looks = Looks.of(x, 16, region.foregrounds(x))
    seen = encoder.diagrams((x - config.intensity.mean[0]) / config.intensity.std[0])
    for found, v in zip(seen, looks.v(x), strict=True):
        np.testing.assert_allclose(found.h1, diagram(v).h1, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"topology__sees": "diagram", "topology__diagrams": "none"}, "would see nothing at all"),
        ({"topology__sees": "image", "topology__diagrams": "another"}, "has no say with --topology.sees image"),
        ({"topology__side": 17}, "an image of --intensity.size 16 has no more than 16"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        fit(tiny.data(), tiny.settings(**ON, **change), tmp_path, progress=Silent())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"), [({"topology__region": "mask"}, "masks"), ({"topology__diagrams": "another"}, "other images")]
)
def test_an_image_alone_does_not_tell_what_the_encoder_was_trained_with(change, words):
    config = tiny.settings(**ON, **change)
    encoder = fused.fused(backbones.build(config.encoder, config.intensity), config.topology).eval()
    image = torch.zeros(2, config.intensity.channels, 16, 16)
    with pytest.warns(UserWarning, match=words):
        alone = encoder(image)
    assert torch.equal(encoder(image, *encoder.tokens(image)), alone)


@pytest.mark.slow
def test_strengths_are_measured_once_and_kept(tmp_path, monkeypatch):
    data = tiny.data(size=24)
    data = dataclasses.replace(data, store=dataclasses.replace(data.store, folder=tmp_path / "store" / "x"))
    (tmp_path / "store").mkdir()
    config = tiny.settings(**ON, topology__calibration=6, intensity__size=24)
    monkeypatch.setattr(kept_strengths, "require_enough", lambda found: None)
    said = []
    first = strengths_of(data, config, 24, lambda *words: said.append(words))
    assert said == [("topology", "measuring how far 8 operations move 6 diagrams, once")]
    (file,) = (tmp_path / "store").glob("strengths-*.json")
    assert file.stat().st_mode & 0o777 == 0o600
    assert list((tmp_path / "store").iterdir()) == [file]
    whole = file.read_text()
    monkeypatch.setattr(kept_strengths, "calibrate", lambda *given: first)  # no third time
    digit = whole.replace('"skipped": 0', '"skipped": 1')
    assert digit != whole
    for damaged in (
        "",
        whole[:40],
        digit,
        '{"ranges": {}, "skipped": 0}',
        whole.replace('"low": 0', '"low": "x"'),
        "[]",
    ):
        file.write_text(damaged)
        assert kept_strengths._read(file) is None
        assert strengths_of(data, config, 24) == first
        assert file.read_text() == whole
    monkeypatch.setattr(kept_strengths, "calibrate", None)
    second = strengths_of(data, config, 24)
    assert first.ranges == second.ranges
    assert first.skipped == second.skipped
    file.unlink()
    file.mkdir()  # stands for a folder that cannot be written
    monkeypatch.setattr(kept_strengths, "calibrate", lambda *given: first)
    said.clear()
    assert strengths_of(data, config, 24, lambda *words: said.append(words)) == first
    assert "cannot be kept" in said[-1][1]


@pytest.mark.parametrize("name", ["simclr", "byol", "dino", "moco_v3", "barlow_twins", "label_tree", "metadata"])
def test_every_method_trains_with_topology(tmp_path, name):
    data = tiny.data()
    fit(data, tiny.settings(**ON, objective__name=name, train__epochs=1), tmp_path, progress=Silent())
    found = embed(kladi.load(tmp_path), data, head=heads.load(tmp_path))
    assert found.features.shape == (len(data), 512)
    assert found.z.shape == (len(data), 8)
    plain = backbones.load(tmp_path)  # what timm alone would open
    assert type(plain) is backbones.Encoder
    assert json.loads((tmp_path / "config.json").read_text())["num_features"] == plain.width


def test_the_three_stages_hand_over_what_they_trained(tmp_path):
    """Image encoder, then diagram encoder alone, then both: each stage begins with what those before it ended with."""
    data, first, second = tiny.data(), tmp_path / "image", tmp_path / "diagram"
    fit(data, tiny.settings(objective__name="byol", encoder__args={"drop_rate": 0.2}), first, progress=Silent())
    alone = {**ON, "objective__name": "byol", "topology__sees": "diagram"}
    fit(data, tiny.settings(**alone, init__weights=str(first)), second, progress=Silent())
    assert "tensors matched, 0 missing, 0 unexpected; diagram encoder new" in (second / "log.txt").read_text()
    image, both = kladi.load(first), kladi.load(second)
    assert all(torch.equal(both.model.state_dict()[n], t) for n, t in image.model.state_dict().items())
    found = embed(both, data, head=heads.load(second))
    assert found.features.shape == (len(data), 256)
    assert np.linalg.matrix_rank(found.features) > 1
    config = tiny.settings(**ON, objective__name="byol", init__weights=str(second), topology__scale=0.4)
    t = training.assemble(data, config, training.device(config.train))
    assert str(t.match).endswith("; diagram encoder read")
    elsewhere = tiny.settings(**{**ON, "topology__region": "foreground"}, init__weights=str(second))
    match = training.assemble(data, elsewhere, training.device(elsewhere.train)).match
    assert "it was trained on diagrams at" in str(match)
    assert "and sees diagrams of the foreground at" in str(match)
    for name, tensor in t.encoder.state_dict().items():
        assert torch.equal(tensor, both.state_dict()[name]), name
    assert all(p.requires_grad for p in t.encoder.parameters())
    group = {id(p): g["scale"] for g in t.optimizer.param_groups for p in g["params"]}
    parts = [(t.encoder.model, 1.0), (t.encoder.topology, 0.4), (t.encoder.mixture, 1.0), (t.objective.predictor, 1.0)]
    assert all({group[id(p)] for p in part.parameters()} == {scale} for part, scale in parts)


def test_the_diagram_stage_moves_the_diagram_encoder_alone(tmp_path):
    data = tiny.data()
    config = tiny.settings(**ON, objective__name="simclr", topology__sees="diagram")
    t = training.assemble(data, config, training.device(config.train))
    torch.manual_seed(training.seed_of(config.train.seed, "init"))
    before = training.built_encoder(config).state_dict()
    fit(data, config, tmp_path, progress=Silent())
    after = kladi.load(tmp_path).state_dict()
    moved = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {"topology"}
    assert {p.shape for p in t.encoder.parameters() if p.requires_grad} == {
        p.shape for p in t.encoder.topology.parameters()
    }


def test_a_run_that_was_killed_while_it_began_is_begun_again(tmp_path):
    (tmp_path / "strengths.json").write_text("half a tab")
    fit(tiny.data(), tiny.settings(**ON), tmp_path, resume=True, progress=Silent())
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("given", ["none", "another"])
def test_the_controls_are_evaluated_as_they_were_trained(tmp_path, given):
    data = tiny.data()
    changes = {**ON, "objective__name": "simclr", "topology__diagrams": given, "train__epochs": 1}
    fit(data, tiny.settings(**changes), tmp_path, progress=Silent())
    encoder = kladi.load(tmp_path)
    found = embed(encoder, data).features
    x = pictures(data, np.arange(len(data)), encoder.intensity)
    x = (x - encoder.intensity.mean[0]) / encoder.intensity.std[0]
    if given == "none":
        assert not encoder.tokens(x)[1].any()
        wanted = encoder(x)
    else:
        order = partners(data.split, data.group, data.row_id)
        wanted = encoder(x, *encoder.tokens(x[torch.from_numpy(order)]))
        assert not np.allclose(found, encoder(x, *encoder.tokens(x)).detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(found, wanted.detach().numpy(), atol=1e-5)


def test_what_topology_saw_is_kept_of_the_images_of_the_map():
    data = tiny.data()
    config = tiny.settings(**ON)
    encoder = fused.fused(backbones.build(config.encoder, config.intensity), config.topology)
    own, rows = embed(encoder, data), np.arange(30)[::-1]
    visible = rows % 3 > 0
    found = shapes.of(encoder, data, own, rows, visible)
    assert found["experts"]["n"]["all"] == 30
    assert sum(found["experts"]["n"].values()) == 30 + int((data.target[rows] >= 0).sum())
    for gates in found["experts"]["groups"].values():
        assert sum(gates) == pytest.approx(1, abs=1e-3)
    assert len(found["images"]) == shapes.EXAMPLES
    assert len({image["label"] for image in found["images"]}) > 1
    assert {image["thumbnail"] for image in found["images"]} < set(range(int(visible.sum())))
    for image in found["images"]:
        where = rows[np.flatnonzero(visible)[image["thumbnail"]]]
        assert data.taxonomy.names[data.target[where]] == image["label"]
        (mine,) = encoder.diagrams(_plain(data, [where], encoder.intensity))
        np.testing.assert_allclose([birth for birth, _, _ in image["h0"]], mine.h0[:24, 0], atol=1e-4)
        assert sum(share for _, _, share in image["h1"]) == pytest.approx(float(bool(image["h1"])), abs=0.01)
    assert 0 < found["persistence"]["all"] < 1
    assert "experts" not in shapes.of(
        fused.around(backbones.build(config.encoder, config.intensity), ALONE), data, own, rows, visible
    )
    assert shapes.of(backbones.build(config.encoder, config.intensity), data, own, rows, visible) == {}


def _plain(data, rows, intensity):
    x = pictures(data, np.array(rows), intensity)
    return (x - intensity.mean[0]) / intensity.std[0]


def test_a_run_with_topology_goes_on_to_the_same_bits(tmp_path):
    data, changes = tiny.data(), {**ON, "objective__name": "dino"}  # of all methods the one with most to keep
    fit(data, tiny.settings(**changes), tmp_path / "whole", progress=Silent())
    fit(data, tiny.settings(**changes, train__max_steps=4), tmp_path / "cut", progress=Silent())
    with pytest.MonkeyPatch.context() as patch:  # measured otherwise now: the run keeps its own
        patch.setattr("kladi.learn.training.strengths_of", None)
        fit(data, tiny.settings(**changes), tmp_path / "cut", resume=True, progress=Silent())
    for file in ("model.safetensors", "head.safetensors"):
        whole, cut = load_file(tmp_path / "whole" / file), load_file(tmp_path / "cut" / file)
        assert all(torch.equal(cut[key], value) for key, value in whole.items())


def test_a_run_that_has_lost_its_strengths_does_not_go_on(tmp_path):
    fit(tiny.data(), tiny.settings(**ON, train__max_steps=2), tmp_path, progress=Silent())
    (tmp_path / "strengths.json").write_text("{}")
    with pytest.raises(UserError, match=r"strengths.json: missing or damaged; start anew"):
        fit(tiny.data(), tiny.settings(**ON), tmp_path, resume=True, progress=Silent())


def test_gates_are_logged_while_training(tmp_path):
    fit(tiny.data(), tiny.settings(**ON, objective__name="byol"), tmp_path, progress=Silent())
    (look,) = [
        line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "rank" in line
    ]
    gates = [look[f"gate {name}"] for name in EXPERTS]
    assert sum(gates) == pytest.approx(1, abs=1e-6)
    assert look["gate entropy"] == pytest.approx(-sum(g * np.log(g) for g in gates), abs=1e-6)


def test_a_run_with_topology_is_a_beginning_for_another(tmp_path):
    """All of it for a fused encoder, the image's part for another; and what follows the encoder begins as its copy."""
    data = tiny.data()
    fit(data, tiny.settings(**ON, objective__name="byol"), tmp_path / "first", progress=Silent())
    first = kladi.load(tmp_path / "first").state_dict()
    for changes in (ON, {"encoder__args": {"drop_rate": 0.2}}):
        config = tiny.settings(**changes, objective__name="byol", train__seed=5, init__weights=str(tmp_path / "first"))
        torch.manual_seed(9)
        t = training.assemble(data, config, training.device(config.train))
        mine = t.encoder.state_dict()
        assert all(torch.equal(tensor, first[name]) for name, tensor in mine.items())
        target = t.objective.target["encoder"].state_dict()
        assert all(torch.equal(target[name], tensor) for name, tensor in mine.items())
        assert t.match.share == 1
    other = tiny.settings(**{**ON, "topology__encoder": "paper"}, init__weights=str(tmp_path / "first"))
    with pytest.raises(UserError, match='its diagram encoder is "small", not "paper"'):
        training.assemble(data, other, training.device(other.train))


@pytest.mark.parametrize(
    "damaged",
    [
        *("small", [], {"size": "small"}, {"size": "big", "side": 16}, {"size": "small", "side": 16, "sees": "x"}),
        *({"size": "small", "side": True}, {"size": "small", "side": 17}),
    ],
)
def test_a_damaged_description_is_refused(tmp_path, damaged):
    fit(tiny.data(), tiny.settings(**ON, objective__name="simclr", train__epochs=1), tmp_path, progress=Silent())
    config = json.loads((tmp_path / "config.json").read_text())
    config["kladi"]["topology"] = damaged
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (fused.load, heads.load):
        with pytest.raises(UserError, match="the run is damaged"):
            read(tmp_path)


def test_the_untrained_control_of_a_fused_run_is_fused():
    config = tiny.settings(**ON)
    mine = fused.fused(backbones.build(config.encoder, config.intensity), config.topology)
    control = random_encoder(config.encoder, config.intensity, like=mine)
    assert {n: t.shape for n, t in control.state_dict().items()} == {n: t.shape for n, t in mine.state_dict().items()}
    assert type(random_encoder(config.encoder, config.intensity)) is backbones.Encoder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"train__batch": 9, "train__chunk": 4},
            "--train.chunk 4 leaves 1 of 9 images by itself; byol takes 2 or more",
        ),
        ({"train__chunk": 1}, "--train.chunk 1 leaves 1 of 8 images by itself"),
        ({"train__batch": 1}, "--train.batch 1: byol takes 2 or more images a process"),
    ],
)
def test_parts_too_small_for_batch_statistics_are_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        fit(tiny.data(), tiny.settings(objective__name="byol", **changes), tmp_path / "run", progress=Silent())
    assert not (tmp_path / "run").exists()


def test_the_command_embed_writes_what_the_whole_encoder_sees(tmp_path):
    toy.write(tmp_path / "toy", n=24, size=24)
    config = tiny.settings(**ON, objective__name="byol", train__epochs=1, data__store=str(tmp_path / "store"))
    data, _ = load(tmp_path / "toy" / "manifest.csv", config)
    fit(data, config, tmp_path / "run", progress=Silent())
    store = {"data.store": str(tmp_path / "store")}
    assert commands.embed(tmp_path / "run", tmp_path / "toy" / "manifest.csv", tmp_path / "out", store) == 0
    found = Embeddings.read(tmp_path / "out" / "embeddings.npz")
    assert found.features.shape == (len(data), 512)
    np.testing.assert_array_equal(found.features, embed(kladi.load(tmp_path / "run"), data).features)


def test_every_part_of_the_fused_encoder_learns(tmp_path):
    data = tiny.data()
    config = tiny.settings(**ON, objective__name="simclr", train__epochs=1)
    torch.manual_seed(0)
    fit(data, config, tmp_path / "run", progress=Silent())
    trained = fused.load(tmp_path / "run")
    fit(data, tiny.settings(**ON, objective__name="simclr", train__lr=1e-12), tmp_path / "start", progress=Silent())
    start = fused.load(tmp_path / "start")
    for part in ("topology.point", "topology.within0", "topology.from1", "mixture.score", "mixture.experts", "visual"):
        mine = [t for n, t in trained.state_dict().items() if n.startswith(part)]
        theirs = [t for n, t in start.state_dict().items() if n.startswith(part)]
        assert any((a - b).abs().max() > 1e-6 for a, b in zip(mine, theirs, strict=True)), part


def test_bounded_views_alone_are_a_control(tmp_path):
    fit(tiny.data(), tiny.settings(**ON, topology__sees="image", objective__name="simclr"), tmp_path, progress=Silent())
    assert type(fused.load(tmp_path)) is backbones.Encoder
    said = "topology   no diagrams; weak views by 2 operations, strong views by 2 operations"
    assert said in (tmp_path / "log.txt").read_text()


def test_called_with_an_image_it_makes_the_diagram_itself():
    config = tiny.settings(**ON)
    encoder = fused.fused(backbones.build(config.encoder, config.intensity), config.topology).eval()
    image = torch.rand(3, 1, 16, 16)
    points, mask = encoder.tokens(image)
    assert torch.equal(encoder(image), encoder(image, points, mask))
    assert mask.any(dim=1).all()
    assert not torch.equal(encoder(image), encoder(image, points, torch.zeros_like(mask)))
    bright = encoder.diagrams(0.5 * image + 0.1)  # its own range: contrast and brightness do not matter
    for a, b in zip(bright, encoder.diagrams(image), strict=True):
        np.testing.assert_allclose(a.h0, b.h0, atol=1e-5)


def test_sizes_follow_the_image_encoder():
    config = tiny.settings(**{**ON, "topology__encoder": "auto"})
    small = fused.fused(backbones.build(config.encoder, config.intensity), config.topology)
    assert small.sight.size == "small"
    assert fused.side_of(config.topology, 224) == 112
    assert fused.side_of(config.topology, 64) == 64

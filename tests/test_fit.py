"""The loop: what it leaves behind, what stops it and how that is told; the same seed gives the same bits."""

import dataclasses
import io
import itertools
import json
import math
import re
import stat
import sys
import threading

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import kladi
import tiny
from kladi import config
from kladi.errors import RunStopped, UserError
from kladi.evaluate import metrics
from kladi.learn import checkpoint, console, fit, journal, monitors, run_folder, training
from kladi.models import backbones, heads, weights

TIMED = ("seconds", "waited")


@pytest.fixture(scope="module")
def data():
    return tiny.data()


def train(data, run, resume=False, progress=None, **changes):
    fit.fit(data, tiny.settings(**changes), run, resume=resume, progress=progress or console.Silent())
    return run


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("fit") / "run")


def lines(run):
    return [{k: v for k, v in line.items() if k not in TIMED} for line in journal.read(run / "metrics.jsonl")]


def steps(run):
    return [line for line in lines(run) if "loss" in line]


# --- what is left behind -----------------------------------------------------------------------------------------


def test_a_run_folder_holds_what_it_should_and_only_the_owner_reads_it(run):  # S6
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("config.toml", "taxonomy.json", "environment.json", "data.json", "rows.safetensors", "metrics.jsonl"),
        *("log.txt", "checkpoints", "model.safetensors", "config.json", "head.safetensors"),
    }
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in run.iterdir() if path.is_file()} == {0o600}


def test_a_line_a_step(run):
    found = steps(run)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in found] == [1, 1, 1, 2, 2, 2]
    for line in found:
        assert line["loss"] == pytest.approx(line["hwc"] + 0.5 * line["lam"], rel=1e-6)
        assert line["images"] == 8
        assert set(line["idle"]) == {"hwc", "lam"}
        assert line["lr"] == training.learning_rate(line["step"] - 1, 6, 0.003, 0.05)
    assert found[0]["lam"] == 0  # no prototype yet
    assert found[1]["lam"] > 0


def test_the_encoder_has_learnt_and_opens(run, data):
    encoder = kladi.load(run)
    torch.manual_seed(training.seed_of(0, "init"))
    fresh = backbones.build(tiny.settings().encoder, tiny.settings().intensity)
    changed = [not torch.equal(a, b) for a, b in zip(encoder.parameters(), fresh.parameters(), strict=True)]
    assert all(changed)
    described = json.loads((run / "config.json").read_text())
    assert described["kladi"]["objective"] == {"name": "label_tree", "args": {}, "weights": {"hwc": 1.0, "lam": 0.5}}
    assert described["kladi"]["taxonomy_digest"] == data.taxonomy.digest
    assert described["kladi"]["steps"] == 6


def test_the_head_comes_back_and_gives_z(run, data):
    rows = np.arange(5)
    settings = tiny.settings()
    z, leaning = monitors.embeddings(
        kladi.load(run), heads.load(run), data, rows, settings.intensity, torch.device("cpu")
    )
    assert leaning == {}
    assert z.shape == (5, 8)
    head = load_file(run / "head.safetensors")
    assert {"losses.lam.prototypes", "losses.lam.seen", "projector.layers.0.weight"} <= head.keys()
    assert int(head["losses.lam.seen"].sum()) > 0


def test_config_and_data_say_what_was_done(run, data):
    settings = run_folder.read_config(run)
    assert settings.train == tiny.settings().train
    described = json.loads((run / "data.json").read_text())
    assert described["images"] == len(data)
    assert described["splits"]["train"] == int((data.split == 0).sum())
    assert described["digest"] == run_folder.digest(data)


def test_no_path_is_kept(data, tmp_path):  # S2
    folder = tmp_path / "Mustermann"
    folder.mkdir()
    data.taxonomy.write(folder / "tree.json")
    (folder / "synonyms.toml").write_text("")
    source = train(data, folder / "source", train__max_steps=1)
    changes = {
        "data__taxonomy": str(folder / "tree.json"),
        "data__synonyms": str(folder / "synonyms.toml"),
        "data__key": str(folder / "key"),
        "data__store": str(folder / "store"),
        "init__weights": str(source),
        "train__max_steps": 1,
    }
    run = train(data, folder / "run", **changes)
    kept = [path for path in run.rglob("*") if path.is_file()]
    assert len(kept) > 10
    assert not [path for path in kept if b"Mustermann" in path.read_bytes()]
    settings = run_folder.read_config(run)
    assert settings.data.taxonomy == str(run / "taxonomy.json")
    assert settings.data.synonyms == str(run / "synonyms.toml")


def test_stopping_early_changes_no_schedule_and_exports(data, run, tmp_path):
    short = train(data, tmp_path / "short", train__max_steps=2)
    assert steps(short) == steps(run)[:2]
    assert [line["at_stop"] for line in lines(short) if "loss" not in line] == [True]
    assert kladi.load(short).width == 256


def test_the_same_seed_gives_the_same_bits_and_another_does_not(data, run, tmp_path):  # R14
    again, other = train(data, tmp_path / "again"), train(data, tmp_path / "other", train__seed=1)
    assert lines(again) == lines(run)
    for name in (
        "model.safetensors",
        "head.safetensors",
        "config.json",
        "config.toml",
        "data.json",
        "rows.safetensors",
    ):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name
    assert steps(other) != steps(run)


def test_the_callers_switches_and_random_numbers_are_left_alone(data, tmp_path):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    train(data, tmp_path / "run", train__max_steps=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_callers_random_numbers_have_no_say(data, run, tmp_path):
    torch.manual_seed(99)
    assert lines(train(data, tmp_path / "run")) == lines(run)


@pytest.mark.parametrize("name", ["simclr", "supcon", "metadata", "auto"])
def test_every_objective_runs(data, tmp_path, name):
    found = steps(train(data, tmp_path / "run", objective__name=name, train__max_steps=2))
    assert len(found) == 2
    assert all(math.isfinite(line["loss"]) for line in found)


def test_sgd_half_precision_and_no_clipping_run(data, tmp_path):
    assert steps(train(data, tmp_path / "a", train__optimizer="sgd", train__max_steps=2))
    assert steps(train(data, tmp_path / "b", train__precision="bf16-mixed", train__max_steps=2))
    clipped = steps(train(data, tmp_path / "c", train__max_steps=2))
    free = steps(train(data, tmp_path / "d", train__clip=0.0, train__max_steps=2))
    assert free[0] == clipped[0]  # the norm that is logged is the one before clipping


def test_it_runs_outside_the_main_thread(data, tmp_path):
    thread = threading.Thread(target=train, args=(data, tmp_path / "run"), kwargs={"train__max_steps": 1})
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_initial_weights_are_read_and_reported(data, run, tmp_path):
    said = Kept()
    started = train(data, tmp_path / "run", progress=said, init__weights=str(run), train__max_steps=1)
    count = len(load_file(run / "model.safetensors"))
    assert f"{count} of {count} tensors matched, 0 missing, 0 unexpected" in said.text
    first = checkpoint.newest(started)
    assert first is not None
    fresh = train(data, tmp_path / "fresh", train__max_steps=1)
    assert steps(fresh)[0]["loss"] != steps(started)[0]["loss"]


def test_weight_decay_leaves_vectors_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    for name in ("adamw", "sgd"):
        optimizer = training.optimizer_of(model, config.Train(optimizer=name, weight_decay=0.1))
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert [decay[id(p)] for p in model.parameters()] == [0.1, 0, 0, 0]


def test_learning_rate_warms_up_and_falls_to_nothing():
    rates = [training.learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] < 0.002
    assert training.learning_rate(0, 1, 2.0, 0.05) == 2.0


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__epochs": 0}, r"--train\.epochs 0: takes 1 or more"),
        ({"train__lr": 0.0}, r"--train\.lr"),
        ({"train__warmup": 1.0}, r"--train\.warmup"),
        ({"train__precision": "16-mixed"}, 'closest: "bf16-mixed"'),
        ({"train__device": "gpu"}, "is no device"),
        ({"train__device": "cuda:99"}, "this machine has"),
        ({"train__batch": 0}, r"--train\.batch"),
        ({"encoder__name": "resnet_18"}, "no timm model"),
        ({"objective__name": "label_treee"}, "no objective"),
        ({"objective__args": {"bta": 1}}, 'closest: "beta"'),
        ({"init__weights": "nowhere.safetensors"}, "cannot be read"),
    ],
)
def test_a_mistake_is_said_and_nothing_is_written(data, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        train(data, tmp_path / "run", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused_and_untouched(data, run, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"not empty .* go on with the same command and --resume"):
        train(data, run)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (tmp_path / "holiday.jpg").write_text("mine")
    with pytest.raises(UserError, match=r"it holds holiday\.jpg\); give another --out"):
        train(data, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        train(data, tmp_path / "holiday.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


# --- L9 ----------------------------------------------------------------------------------------------------------

BAD = """
import torch
from torch import nn
class Late(nn.Module):
    calls = 0
    def forward(self, z):
        Late.calls += 1
        return (z ** 2).mean() * (float("nan") if Late.calls > 4 else 1.0)
class Steep(nn.Module):
    def forward(self, z):
        return (0.0 * z).abs().sqrt().sum()
"""


def stopped(data, run, **changes):
    with pytest.raises(RunStopped) as error:
        train(data, run, train__checkpoint_steps=2, **changes)
    files = list(run.glob("nan-step-*.json"))
    return str(error.value), json.loads(files[0].read_text()) if files else {}


def test_a_loss_that_is_not_finite_stops_before_the_step(data, tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text(BAD)
    monkeypatch.chdir(tmp_path)
    said, found = stopped(data, tmp_path / "run", objective__name="bad:Late")
    assert "step 5: late is not finite" in said
    assert "last good checkpoint step-00000004" in said
    assert found["step"] == 5
    assert found["terms"] == {"late": "nan"}
    assert found["bad_parameters"] == []
    assert len(found["rows"]) == 8
    assert set(found["rows"][0]) == {"row", "id", "finite", "min", "max", "mean", "std", "embedding_norms"}
    assert len(steps(tmp_path / "run")) == 4
    kept = checkpoint.newest(tmp_path / "run")
    tensors = weights.read(kept.folder / "model.safetensors")
    assert all(bool(torch.isfinite(t.float()).all()) for t in tensors.values())
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_gradient_that_is_not_finite_stops_too(data, tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text(BAD)
    monkeypatch.chdir(tmp_path)
    said, found = stopped(data, tmp_path / "run", objective__name="bad:Steep")
    assert "step 1: gradient is not finite; first bad layer gradient of projector.layers.2.bias" in said
    assert "no checkpoint was written before" in said
    assert found["terms"] == {"steep": 0.0}
    assert found["gradient_norm"] == "nan"


def test_exploding_weights_name_the_layer(data, tmp_path):
    said, found = stopped(data, tmp_path / "run", train__optimizer="sgd", train__lr=1e38, train__clip=0.0)
    assert re.search(r"step 2: hwc.* is not finite; first bad layer encoder\.model\.\w+", said)
    assert found["lr"] == training.learning_rate(1, 6, 1e38, 0.05)


def test_a_broken_image_names_its_row(tmp_path, monkeypatch):
    data = tiny.data()
    poisoned = int(np.flatnonzero(data.split == 0)[3])
    settings = tiny.settings(train__batch=26)

    class Poisoned(training.Loader):
        def prepare(self, epoch, rows):
            batch = super().prepare(epoch, rows)
            view = batch.views[1].image.clone()
            view[batch.row == poisoned] = math.inf
            return dataclasses.replace(batch, views=(batch.views[0], dataclasses.replace(batch.views[1], image=view)))

    monkeypatch.setattr(training, "Loader", Poisoned)
    with pytest.raises(RunStopped) as error:
        fit.fit(data, settings, tmp_path / "run", progress=console.Silent())
    assert "first bad layer the images themselves" in str(error.value)
    assert f"manifest row {data.manifest_row[poisoned]};" in str(error.value)


# --- L10 -----------------------------------------------------------------------------------------------------------


def test_spread_agrees_with_the_metrics_of_evaluation():
    for shape in ((40, 8), (5, 8), (300, 16)):
        z = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, shape[1])
        found = monitors.spread(z)
        assert found.rank == pytest.approx(metrics.effective_rank(z, centred=True), rel=1e-10)
        assert found.std == pytest.approx(float(metrics.per_dimension_std(z).mean()), rel=1e-10)
        assert not found.collapsed


@pytest.mark.parametrize(
    "z",
    [
        torch.ones(20, 8),
        torch.zeros(20, 8),
        torch.full((20, 8), math.nan),
        torch.ones(20, 8) + 1e-3 * torch.randn(20, 8, generator=torch.Generator().manual_seed(0)),  # hardly any spread
        torch.linspace(-1, 1, 20)[:, None] * torch.ones(8),  # one dimension only
        torch.ones(1, 8),
    ],
)
def test_a_constant_or_thin_embedding_has_collapsed(z):
    assert monitors.spread(z).collapsed


def test_fixed_rows_do_not_depend_on_the_order_of_the_data(data):
    rows = monitors.fixed_rows(data, 0)
    assert (data.split[rows] == 0).all()
    turned = np.arange(len(data))[::-1]
    other = dataclasses.replace(data, row_id=data.row_id[turned], split=data.split[turned])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitors, "ROWS", 10)
        one, two = monitors.fixed_rows(data, 0), monitors.fixed_rows(other, 0)
    assert len(one) == 10
    assert np.array_equal(data.row_id[one], other.row_id[two])


def test_looking_changes_nothing(data):
    encoder = backbones.build(tiny.settings().encoder, tiny.settings().intensity)
    head = heads.Projector(encoder.width, 16, 8)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    rows = monitors.fixed_rows(data, 0)
    look = (encoder, head, data, rows, tiny.settings().intensity, torch.device("cpu"))
    torch.testing.assert_close(monitors.embeddings(*look)[0], monitors.embeddings(*look, batch=5)[0])
    assert encoder.training
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_collapse_raises_the_alarm_at_the_second_look_and_stops_only_if_asked(data, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "LOOK_STEPS", 3)
    monkeypatch.setattr(fit, "FIRST_LOOK", 1)
    monkeypatch.setattr(monitors, "embeddings", lambda *_, **__: (torch.ones(10, 8), {}))
    said = Kept()
    run = train(data, tmp_path / "a", progress=said, train__epochs=4)
    assert [line["alarm"] for line in lines(run) if "std" in line] == [False, True, True, True]
    assert said.text.count("ALARM") == 1
    assert "collapsed at epoch 2: effective rank 0.0, std 0.00" in said.text
    with pytest.raises(RunStopped, match=r"collapsed at epoch 2.*last good checkpoint step-00000006"):
        train(data, tmp_path / "b", train__epochs=4, train__stop_on_collapse=True)


def test_a_healthy_encoder_is_silent(data, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "LOOK_STEPS", 12)
    said = Kept()
    run = train(data, tmp_path / "run", progress=said, train__epochs=12, objective__name="simclr", train__lr=0.001)
    looks = [line for line in lines(run) if "std" in line]
    assert len(looks) >= 2
    assert not any(line["alarm"] for line in looks)
    assert "ALARM" not in said.text


# --- what is told ------------------------------------------------------------------------------------------------


class Kept(console.Lines):
    """Keeps what would be shown."""

    def __init__(self):
        super().__init__()
        self.text = ""

    def _out(self, text):
        self.text += text + "\n"


def test_what_a_person_sees(data, tmp_path):
    said = Kept()
    run = train(data, tmp_path / "run", progress=said)
    shown = said.text.splitlines()
    count, patients = int((data.split == 0).sum()), len(np.unique(data.group[data.split == 0]))
    assert shown[0].startswith(f"data       {count} images, {patients} patients; ")
    assert shown[1] == f"labels     {count} images; all of them"
    assert shown[2] == "loss       label_tree = hwc + 0.5 lam"
    assert shown[3] == "batch      8 images in 2 views; 15 others for each anchor"
    assert shown[4].split() == [
        "epoch",
        "step",
        "loss",
        "hwc",
        "lam",
        "no",
        "positive",
        "std",
        "rank",
        "lr",
        "images/s",
        "left",
    ]
    assert [line.split()[:2] for line in shown[5:7]] == [["1", "3"], ["2", "6"]]
    assert shown[7].startswith("done       step 6, ")
    assert (run / "log.txt").read_text() == said.text


def test_rows_without_a_label_are_counted(tmp_path):  # M13
    data = tiny.data(labelled=0.8)
    known = int((data.target[data.split == 0] >= 0).sum())
    rest = int((data.split == 0).sum()) - known
    said = Kept()
    train(data, tmp_path / "a", progress=said, train__max_steps=1)
    assert f"labels     {known} images; {rest} without one feed no term" in said.text
    said = Kept()
    train(data, tmp_path / "b", progress=said, train__max_steps=1, objective__args={"views": 0.5})
    assert f"{rest} without one feed ntxent" in said.text


def test_anchors_without_a_positive_are_warned_about_once(tmp_path):  # L1
    said = Kept()
    data = tiny.data(labelled=0.2)
    train(data, tmp_path / "run", progress=said, objective__name="supcon", train__batch=2, train__epochs=2)
    assert said.text.count("had no positive; a larger --train.batch helps") == 1


def test_a_row_of_the_table():
    row = console.Row(50, 1650, 4.338, {"hwc": 4.18, "lam": 0.316}, 0.0, 0.9, 52.7, 2.6e-4, 301.0, 4200.0)
    text = console.body(row)
    assert text == "    50   1,650    4.338    4.180    0.316        0.0 %  .90   52.7  2.6e-04       301 70 min"
    assert len(console.head(("hwc", "lam"))) == len(text)
    blank = console.Row(1, 3, 5.2, {"hwc": 5.0, "lam": 0.4}, 0.25, None, None, 1e-3, 20000.0, 30.0)
    assert console.body(blank).split()[5:] == ["25.0", "%", "-", "-", "1.0e-03", "20,000", "30", "s"]
    assert len(console.body(blank)) == len(text)


def test_many_epochs_have_fifty_lines():
    said = Kept()
    for epoch in range(1, 1001):
        said.epoch(console.Row(epoch, epoch, 1.0, {}, 0.0, None, None, 0.1, 1.0, 1.0), 1000)
    shown = [line.split()[0] for line in said.text.splitlines()]
    assert shown[:3] == ["1", "20", "40"]
    assert shown[-1] == "1000"
    assert len(shown) == 51


def test_control_characters_and_markup_are_inert(capsys):  # M11
    console.Lines().say("labels", "[red]x[/red] \x1b[31m \u202e é")
    assert capsys.readouterr().err == "labels     [red]x[/red] \\x1b[31m \\u202e é\n"


def test_a_terminal_gets_a_bar_and_a_file_does_not(capsys):
    for is_terminal in (True, False):
        text = io.StringIO()
        shown = console.Lines(Console(file=text, force_terminal=is_terminal, width=100))
        shown.start(("hwc",), 3, 10)
        shown.step(4)
        shown.end()
        assert ("of 10" in text.getvalue()) == is_terminal
        assert "no positive" in text.getvalue()


def test_tensorboard_is_written_where_asked_for(data, tmp_path):
    run = train(data, tmp_path / "run", train__tensorboard=True, train__max_steps=1)
    assert list((run / "tensorboard").glob("events.*"))


def test_tensorboard_that_is_not_installed_is_said(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r'pip install "kladi\[tensorboard\]"'):
        train(data, tmp_path / "run", train__tensorboard=True)
    assert list(tmp_path.iterdir()) == []


# --- R10 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_a_batch_that_would_fit(data, tmp_path, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(fit, "_step", fails)
    with pytest.raises(RunStopped, match=r"out of memory with --train\.batch 8; --train\.batch 4 needs about half"):
        train(data, tmp_path / "run")
    assert not (tmp_path / "run" / "lock").exists()


def test_a_fault_of_ours_stays_what_it_is(data, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(fit, "_step", fails)
    with pytest.raises(RuntimeError, match="something else") as error:
        train(data, tmp_path / "run")
    assert not isinstance(error.value, RunStopped)

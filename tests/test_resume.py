"""A run that stops anywhere goes on to the same bits, or is refused in one line that says why."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from kladi.errors import RunStopped, UserError
from kladi.learn import checkpoint, console, fit, journal, lock, run_folder
from kladi.models import weights

TIMED = ("seconds", "waited")


@pytest.fixture(scope="module")
def data():
    return tiny.data()


def train(data, run, resume=False, progress=None, force_unlock=False, **changes):
    progress = progress or console.Silent()
    fit.fit(data, tiny.settings(**changes), run, resume=resume, progress=progress, force_unlock=force_unlock)
    return run


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Two epochs of three steps, undisturbed."""
    return train(data, tmp_path_factory.mktemp("resume") / "whole")


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The same run, stopped after step 4."""
    return train(data, tmp_path_factory.mktemp("resume") / "stopped", train__max_steps=4)


@pytest.fixture
def half(stopped, tmp_path):
    """A copy of the stopped run."""
    return Path(shutil.copytree(stopped, tmp_path / "half"))


def lines(run):
    return [{k: v for k, v in line.items() if k not in TIMED} for line in journal.read(run / "metrics.jsonl")]


def require_equal(run, whole):
    """Parameters, buffers, moments, prototypes, state, exported encoder, metrics: the same bits."""
    for name in ("checkpoints/step-00000006", "."):
        for file in sorted((whole / name).glob("*.safetensors")) + sorted((whole / name).glob("*.json")):
            assert (run / name / file.name).read_bytes() == file.read_bytes(), file.name
    assert lines(run) == lines(whole)


# --- R1, R2 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_k_steps_and_a_resume_are_n_steps(data, whole, tmp_path, k):
    run = train(data, tmp_path / "run", train__max_steps=k)
    assert checkpoint.newest(run).state["step"] == k
    require_equal(train(data, run, resume=True), whole)


def test_stopping_after_every_step_changes_nothing(data, whole, tmp_path):
    run = train(data, tmp_path / "run", train__max_steps=1)
    for k in range(2, 7):
        train(data, run, resume=True, train__max_steps=k)
    train(data, run, resume=True)
    require_equal(run, whole)


@pytest.mark.parametrize(("first", "then"), [(0, 2), (2, 0), (8, 1)])
def test_workers_may_change(data, whole, tmp_path, first, then):  # R2
    run = train(data, tmp_path / "run", train__max_steps=2, train__workers=first)
    require_equal(train(data, run, resume=True, train__workers=then), whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__optimizer": "sgd", "train__lr": 0.01},
        {"objective__name": "metadata", "objective__args": {"instance": 0.5}},
        {"objective__name": "simclr", "train__precision": "bf16-mixed"},
        {"objective__args": {"geometry": "poincare", "learn_curvature": True}},
        {
            "objective__args": {"geometry": "poincare", "views": 0.5},
            "encoder__name": "test_vit",
            "encoder__args": {"drop_rate": 0.2},
        },
    ],
)
def test_other_optimisers_objectives_and_encoders_resume_too(data, tmp_path, changes):
    undisturbed = train(data, tmp_path / "a", **changes)
    run = train(data, tmp_path / "b", train__max_steps=4, **changes)
    require_equal(train(data, run, resume=True, **changes), undisturbed)


def test_rows_may_come_in_another_order(data, whole, half):
    turned = np.random.default_rng(0).permutation(len(data))
    store = dataclasses.replace(
        data.store,
        images=data.store.images[turned],
        extent=data.store.extent[turned],
        row_id=data.store.row_id[turned],
        pixel_digest=data.store.pixel_digest[turned],
    )
    other = dataclasses.replace(
        data,
        store=store,
        row_id=data.row_id[turned],
        manifest_row=data.manifest_row[turned],
        group=data.group[turned],
        split=data.split[turned],
        target=data.target[turned],
        label_sets=data.label_sets.take(turned),
    )
    require_equal(train(other, half, resume=True), whole)


def test_a_finished_run_is_left_as_it_is(data, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    require_equal(train(data, run, resume=True), whole)


def test_a_run_that_never_began_begins(data, whole, tmp_path):
    (tmp_path / "run").mkdir()
    require_equal(train(data, tmp_path / "run", resume=True), whole)


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again(data, whole, half):
    shutil.rmtree(half / "checkpoints")
    (half / "model.safetensors").unlink()
    require_equal(train(data, half, resume=True), whole)


def test_weights_are_read_again_where_no_checkpoint_was_written(data, whole, tmp_path):
    """Continued pretraining, stopped before its first checkpoint, begins from its weights again, not from noise."""
    given = {"init__weights": str(whole)}
    straight = train(data, tmp_path / "straight", **given)
    shutil.copytree(straight, tmp_path / "stopped")
    for name in ("checkpoints", "model.safetensors", "config.json", "head.safetensors", "metrics.jsonl"):
        path = tmp_path / "stopped" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    require_equal(train(data, tmp_path / "stopped", resume=True, **given), straight)


def test_there_must_be_something_to_resume(data, tmp_path):
    with pytest.raises(UserError, match="leave --resume out"):
        train(data, tmp_path / "run", resume=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no run of kladi's"):
        train(data, tmp_path, resume=True)


def test_the_table_of_a_resumed_epoch_counts_its_first_steps(data, whole, half):
    train(data, half, resume=True)
    rows = [
        [line.split()[:5] for line in (run / "log.txt").read_text().splitlines() if line.split()[:1] == ["2"]]
        for run in (whole, half)
    ]
    assert rows[0] == rows[1] != [[]]


# --- R3 ------------------------------------------------------------------------------------------------------------


def killed(tmp_path, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_a_hundred_random_times(tmp_path):
    found = killed(tmp_path, "random", "100", "0")
    assert found["kills"] == 100
    assert len(found["steps"]) > 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_every_touch_of_the_disk(tmp_path):
    found = killed(tmp_path, "every")
    assert found["kills"] > 40
    assert found["steps"] == [0, 1, 2, 3]


# --- R4 ------------------------------------------------------------------------------------------------------------


class Signalling(console.Silent):
    """Sends this process a signal after a step."""

    def __init__(self, step, *numbers):
        super().__init__()
        self.at, self.numbers, self.said = step, numbers, ""

    def step(self, step):
        if step == self.at:
            for number in self.numbers:
                os.kill(os.getpid(), number)

    def say(self, name, text):
        self.said += f"{name} {text}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_term_and_int_save_and_stop(data, whole, tmp_path, number):
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    progress = Signalling(2, number)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as error:
        train(data, tmp_path / "run", progress=progress)
    if number == signal.SIGTERM:
        assert error.value.code == 143
    else:
        assert error.type is KeyboardInterrupt
    assert "step 2 (verified); go on with the same command and --resume" in progress.said
    assert checkpoint.newest(tmp_path / "run").state["step"] == 2
    assert not (tmp_path / "run" / "lock").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert before == [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    require_equal(train(data, tmp_path / "run", resume=True), whole)


def test_a_second_int_stops_at_once(data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "run", progress=Signalling(2, signal.SIGINT, signal.SIGINT))
    assert checkpoint.newest(tmp_path / "run") is None
    assert not (tmp_path / "run" / "lock").exists()


def test_usr1_saves_and_goes_on(data, whole, tmp_path, monkeypatch):
    saved = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda run, snapshot: (saved.append(snapshot.step), save(run, snapshot)))
    run = train(data, tmp_path / "run", progress=Signalling(2, signal.SIGUSR1))
    assert saved == [2, 6]
    require_equal(run, whole)


def test_checkpoints_come_when_they_should(data, tmp_path, monkeypatch):
    saved = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda run, snapshot: (saved.append(snapshot.step), save(run, snapshot)))
    train(data, tmp_path / "a", train__checkpoint_steps=4)
    assert saved == [4, 6]
    saved.clear()
    monkeypatch.setattr(fit, "SAVE_SECONDS", 0.0)
    train(data, tmp_path / "b")
    assert saved == [3, 6]


# --- R5 ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_stops_the_run_and_the_last_checkpoint_goes_on(data, whole, tmp_path, monkeypatch):
    def full(path, raw, write=weights.write_new):
        if path.parent.name.endswith("-6"):  # `.tmp-PROCESS-STEP`
            raise OSError(28, "No space left on device")
        write(path, raw)

    monkeypatch.setattr(weights, "write_new", full)
    with pytest.raises(RunStopped, match=r"No space left on device.*bytes.*last good checkpoint step-00000004"):
        train(data, tmp_path / "run", train__checkpoint_steps=4)
    monkeypatch.undo()
    require_equal(train(data, tmp_path / "run", resume=True), whole)


def test_a_disk_too_small_is_said_before_the_first_step(data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RunStopped, match=r"need [\d,]+ bytes, 1,000 are free; nothing was trained"):
        train(data, tmp_path / "run")
    monkeypatch.undo()
    train(data, tmp_path / "run", train__max_steps=1)  # nothing was left that would refuse a second try


def test_a_disk_that_fails_under_the_journal_stops_the_run(data, tmp_path, monkeypatch):
    def fails(self, line):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(journal.Journal, "write", fails)
    with pytest.raises(RunStopped, match=r"Input/output error\); no checkpoint was written before"):
        train(data, tmp_path / "run")


def test_a_folder_that_cannot_be_made_is_said(data, tmp_path, monkeypatch):
    def refuses(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuses)
    with pytest.raises(RunStopped, match="Permission denied"):
        train(data, tmp_path / "run")


# --- R6, R7 --------------------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_costs_its_steps_and_a_notice(data, whole, half):
    checkpoint.save(half, checkpoint.Snapshot({}, {}, {"step": 5}))
    broken = half / "checkpoints" / "step-00000005" / "train.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    progress = Signalling(0)
    require_equal(train(data, half, resume=True, progress=progress), whole)
    assert "step-00000005 is not intact (train.safetensors has" in progress.said
    assert "going on from step-00000004" in progress.said


def test_no_intact_checkpoint_is_refused(data, half):
    (half / "checkpoints" / "step-00000004" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint can be used: step-00000004 is not intact"):
        train(data, half, resume=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model, train: model.update({"conv_stem.weight": torch.zeros(1)}), "conv_stem.weight is F32"),
        (lambda model, train: model.pop("conv_stem.weight"), "lacks conv_stem.weight"),
        (lambda model, train: train.update({"optimizer.encoder.model.fc.exp_avg": torch.zeros(1)}), "has not"),
        (
            lambda model, train: train.update({"optimizer.projector.layers.0.bias.step": torch.zeros(2)}),
            r"not F32 \[\]",
        ),
        (lambda model, train: train.update({"objective.losses.lam.seen": torch.zeros(14)}), "lam.seen is F32"),
        (lambda model, train: train.update({"more": torch.zeros(1)}), "has more, which this model has not"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(data, half, change, said):
    model, rest, state = contents(half)
    change(model, rest)
    checkpoint.save(half, checkpoint.Snapshot(model, rest, {**state, "step": 5}))
    with pytest.raises(UserError, match=said):
        train(data, half, resume=True)


def test_a_damaged_account_of_the_data_is_refused(data, half):
    (half / "data.json").write_text("{")
    with pytest.raises(UserError, match=r"data\.json is damaged"):
        train(data, half, resume=True)


@pytest.mark.parametrize("name", ["data.json", "environment.json"])
def test_an_account_that_is_no_table_is_refused(data, half, name):
    (half / name).write_text("[1, 2]")
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        train(data, half, resume=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"low": None}, r"step-00000005/state\.json is damaged"),
        ({"spread": [1, "x"]}, r"step-00000005/state\.json is damaged"),
        ({"spread": 3}, r"step-00000005/state\.json is damaged"),
    ],
)
def test_a_state_that_was_signed_again_is_refused(data, half, change, said):
    model, rest, state = contents(half)
    checkpoint.save(half, checkpoint.Snapshot(model, rest, {**state, "step": 5, **change}))
    with pytest.raises(UserError, match=said):
        train(data, half, resume=True)


def test_a_step_after_the_last_is_refused(data, half):
    model, rest, state = contents(half)
    checkpoint.save(half, checkpoint.Snapshot(model, rest, {**state, "step": 70}))
    with pytest.raises(UserError, match="step-00000070 is of step 70, this run has 6"):
        train(data, half, resume=True)


def contents(run, step=4):
    folder = run / "checkpoints" / f"step-{step:08d}"
    tensors = (weights.read(folder / f"{name}.safetensors") for name in ("model", "train"))
    return *tensors, checkpoint.read_state(folder)


def test_lost_metrics_are_said(data, half):
    journal_of = half / "metrics.jsonl"
    journal_of.write_text("".join(journal_of.read_text().splitlines(keepends=True)[2:]))
    progress = Signalling(0)
    train(data, half, resume=True, progress=progress)
    assert "metrics.jsonl has lost 2 of the 4 steps before" in progress.said


def test_a_file_in_place_of_the_checkpoints_is_said(data, half):
    shutil.rmtree(half / "checkpoints")
    (half / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints is a file"):
        train(data, half, resume=True)


def test_pickles_in_the_folder_are_never_opened(data, whole, half):  # R7
    canary = half.parent / "canary"

    class Trap:
        def __reduce__(self):
            return (canary.write_text, ("touched",))

    for place in (half, half / "checkpoints", half / "checkpoints" / "step-00000004"):
        for name in ("model.pt", "train.pkl", "last.ckpt", "pytorch_model.bin"):
            torch.save({"weights": Trap()}, place / name)
    train(data, half, resume=True)
    assert not canary.exists()
    (half / "checkpoints" / "step-00000006" / "train.safetensors").write_bytes((half / "model.pt").read_bytes())
    (half / "checkpoints" / "step-00000004" / "train.safetensors").write_bytes((half / "model.pt").read_bytes())
    with pytest.raises(UserError, match="no checkpoint can be used"):
        train(data, half, resume=True)
    assert not canary.exists()


# --- R8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__lr": 0.01}, r"train\.lr was 0\.003, is now 0\.01"),
        ({"train__epochs": 3}, r"train\.epochs was 2, is now 3"),
        ({"train__batch": 4}, r"train\.batch"),
        ({"objective__args": {"alpha": 0.1}}, r"objective\.args"),
        ({"augment__blur": 0.5}, r"augment\.blur"),
        ({"intensity__mean": (0.4,)}, r"intensity\.mean"),
        ({"train__seed": 1, "train__clip": 2.0}, r"train\.clip was 1\.0, is now 2\.0; train\.seed was 0"),
    ],
)
def test_another_configuration_is_refused_with_the_difference(data, half, changes, said):
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=said):
        train(data, half, resume=True, **changes)
    assert before == {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}


def test_what_has_no_say_in_the_numbers_may_change(data, whole, half, tmp_path):
    changes = {
        "train__workers": 1,
        "train__checkpoint_steps": 5,
        "train__stop_on_collapse": True,
        "data__store": str(tmp_path),
        "evaluate__folds": 3,
        "init__weights": "gone.safetensors",
    }
    require_equal(train(data, half, resume=True, **changes), whole)
    assert run_folder.read_config(half).train.workers == 1


def test_the_index_of_a_device_may_change_and_its_kind_not():
    assert run_folder._may_change("train.device", "cuda:0", "cuda:1")
    assert not run_folder._may_change("train.device", "cuda:0", "cpu")


def test_another_environment_is_said(data, half):
    file = half / "environment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "torch": "1.0", "threads": 99}))
    progress = Signalling(0)
    train(data, half, resume=True, progress=progress)
    assert "not bitwise the same from here on: torch 1.0 -> " in progress.said
    assert "threads 99 -> " in progress.said


# --- M21 -----------------------------------------------------------------------------------------------------------


def test_other_data_are_refused_with_the_counts(data, half):
    def refused(other):
        with pytest.raises(UserError, match="--resume") as error:
            train(other, half, resume=True)
        return str(error.value)

    longer = tiny.data(n=40)
    assert "rows added" in refused(longer)
    fewer = dataclasses.replace(data, row_id=np.r_[data.row_id[:-1], np.uint64(7)])
    assert "1 rows added, 1 rows removed" in refused(fewer)
    target = data.target.copy()
    target[:2] = target[2:4]
    assert "2 rows changed" in refused(dataclasses.replace(data, target=target))
    pixels = dataclasses.replace(data.store, pixel_digest=data.store.pixel_digest + np.uint64(1))
    assert f"{len(data)} rows changed" in refused(dataclasses.replace(data, store=pixels))


def test_another_tree_is_refused(data, half):
    from kladi.structure.taxonomy import Taxonomy

    names = [name.replace("ring", "torus") for name in data.taxonomy.names]
    other = dataclasses.replace(data, taxonomy=Taxonomy.from_paths(names))
    with pytest.raises(UserError, match="label tree is another one"):
        train(other, half, resume=True)


# --- R9 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_in_use_is_refused(data, half, resume):
    with lock.held(half), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        train(data, half, resume=resume)


def test_the_lock_of_another_machine_is_taken_over_only_by_force(data, half, whole):
    (half / "lock").write_text(json.dumps({"pid": 1, "host": "gone", "boot": "", "started": ""}))
    with pytest.raises(UserError, match="--force-unlock"):
        train(data, half, resume=True)
    require_equal(train(data, half, resume=True, force_unlock=True), whole)


def test_a_finished_run_without_its_checkpoints_is_not_begun_anew(data, half):
    shutil.rmtree(half / "checkpoints")
    before = (half / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds no checkpoint any more"):
        train(data, half, resume=True)
    assert (half / "model.safetensors").read_bytes() == before


def test_a_folder_that_is_no_run_is_not_resumed_into(data, tmp_path):
    (tmp_path / "thesis.doc").write_text("x")
    with pytest.raises(UserError, match=r"holds thesis\.doc"):
        train(data, tmp_path, resume=True)
    assert not (tmp_path / "config.toml").exists()

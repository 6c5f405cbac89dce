"""Checkpoints are whole or not there; a damaged one is passed over with a notice; one process a folder."""

import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kladi.errors import RunStopped, UserError
from kladi.learn import checkpoint, lock
from kladi.models import weights


def snapshot(step, seed=0):
    generator = torch.Generator().manual_seed(seed + step)
    model = {"conv.weight": torch.randn(3, 2, generator=generator), "bn.num_batches_tracked": torch.tensor(step)}
    train = {
        "projector.weight": torch.randn(2, 2, generator=generator),
        "optimizer.conv.weight.step": torch.tensor(3.0),
    }
    return checkpoint.Snapshot(model, train, {"step": step, "epoch": 0, "seed": seed})


def promises(step=1):
    return weights.promises(snapshot(step).model), weights.promises(snapshot(step).train)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def listing(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_is_read(tmp_path):
    folder = checkpoint.save(tmp_path, snapshot(12000))
    assert folder.name == "step-00012000"
    assert sorted(p.name for p in folder.iterdir()) == sorted([*checkpoint.FILES, "manifest.json"])
    found = checkpoint.newest(tmp_path)
    assert found.folder == folder
    assert found.notices == ()
    read = checkpoint.read(found.folder, *promises())
    assert equal(read.model, snapshot(12000).model)
    assert equal(read.train, snapshot(12000).train)
    assert read.state == snapshot(12000).state


def test_nothing_written_is_nothing_found(tmp_path):
    assert checkpoint.newest(tmp_path) is None


def test_two_are_kept_and_the_newest_is_named(tmp_path):
    for step in (5, 99_999_999, 100_000_000, 7):  # names of more than eight digits sort by number
        checkpoint.save(tmp_path, snapshot(step))
    assert listing(tmp_path) == ["latest.json", "step-100000000", "step-99999999"]
    assert checkpoint.newest(tmp_path).state["step"] == 100_000_000


def test_latest_names_the_last_save(tmp_path):
    checkpoint.save(tmp_path, snapshot(5))
    checkpoint.save(tmp_path, snapshot(6))
    assert json.loads((tmp_path / "checkpoints" / "latest.json").read_text()) == {
        "checkpoint": "step-00000006",
        "step": 6,
    }


def test_only_the_owner_can_read(tmp_path):  # S6
    folder = checkpoint.save(tmp_path, snapshot(1))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_the_same_state_gives_the_same_bytes(tmp_path):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        folder = checkpoint.save(tmp_path / name, snapshot(3))
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1]


def test_a_checkpoint_is_never_written_over(tmp_path):
    checkpoint.save(tmp_path, snapshot(3))
    with pytest.raises(RunStopped, match="never written over"):
        checkpoint.save(tmp_path, snapshot(3, seed=1))
    assert equal(checkpoint.read(checkpoint.newest(tmp_path).folder, *promises()).model, snapshot(3).model)


def test_a_save_that_was_cut_off_after_the_rename_is_settled(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, snapshot(step))
    before = (tmp_path / "checkpoints" / "latest.json").read_bytes()
    checkpoint.save(tmp_path, snapshot(3), keep=3)
    (tmp_path / "checkpoints" / "latest.json").write_bytes(before)
    checkpoint.settle(tmp_path, checkpoint.newest(tmp_path).folder)
    assert listing(tmp_path) == ["latest.json", "step-00000002", "step-00000003"]
    assert json.loads((tmp_path / "checkpoints" / "latest.json").read_text())["step"] == 3


# --- R6 ----------------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("file", [*checkpoint.FILES, "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path, file, damage):
    checkpoint.save(tmp_path, snapshot(1))
    damage(checkpoint.save(tmp_path, snapshot(2)) / file)
    found = checkpoint.newest(tmp_path)
    assert found.state["step"] == 1
    assert len(found.notices) == 1
    assert found.notices[0].startswith("step-00000002 is not intact (")
    checkpoint.settle(tmp_path, found.folder)
    assert listing(tmp_path) == ["latest.json", "step-00000001"]
    checkpoint.save(tmp_path, snapshot(2))  # and its place is free again
    assert checkpoint.newest(tmp_path).state["step"] == 2


def test_every_bit_of_a_small_checkpoint_counts(tmp_path):
    checkpoint.save(tmp_path, snapshot(1))
    folder = checkpoint.save(tmp_path, snapshot(2))
    for name in checkpoint.FILES:
        whole = (folder / name).read_bytes()
        for position in range(0, len(whole), 7):
            changed = bytearray(whole)
            changed[position] ^= 1 << (position % 8)
            (folder / name).write_bytes(bytes(changed))
            with pytest.raises(checkpoint.Broken):
                checkpoint.verify(folder)
        (folder / name).write_bytes(whole)
    checkpoint.verify(folder)


def test_all_damaged_is_refused_and_each_is_named(tmp_path):
    for step in (1, 2):
        truncate(checkpoint.save(tmp_path, snapshot(step)) / "state.json")
    with pytest.raises(UserError, match=r"step-00000002 is not intact .*step-00000001 is not intact"):
        checkpoint.newest(tmp_path)


def test_another_architecture_is_refused_before_it_is_read(tmp_path):
    folder = checkpoint.save(tmp_path, snapshot(1))
    model, train = promises()
    with pytest.raises(UserError, match=r"conv.weight is F32 \[3, 2\], this model builds F32 \[4, 2\]"):
        checkpoint.read(folder, {**model, "conv.weight": weights.Promise("F32", (4, 2))}, train)
    with pytest.raises(UserError, match=r"lacks fc.weight"):
        checkpoint.read(folder, {**model, "fc.weight": weights.Promise("F32", (4, 2))}, train)


def test_a_newer_version_is_refused_with_the_cure(tmp_path):
    folder = checkpoint.save(tmp_path, snapshot(1))
    listed = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**listed, "version": 2}))
    with pytest.raises(UserError, match="version 2; this kladi reads up to 1: pip install"):
        checkpoint.newest(tmp_path)


def test_foreign_files_are_no_checkpoints(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "step-00000009").mkdir(parents=True)
    (folder / "step-9").mkdir()
    (folder / "step-00000010").write_text("a file")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"manifest.json cannot be read"):
        checkpoint.newest(tmp_path)
    shutil.rmtree(folder / "step-00000009")
    assert checkpoint.newest(tmp_path) is None
    (folder / "step-00000011").mkdir()
    (folder / "step-00000011" / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        checkpoint.newest(tmp_path)


# --- R5 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", range(1, 6))
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, call):
    checkpoint.save(tmp_path, snapshot(1))
    calls = []

    def full(path, raw, write=weights.write_new):
        calls.append(path)
        if len(calls) == call:
            write(path, raw[: len(raw) // 2])
            raise OSError(28, "No space left on device")
        write(path, raw)

    monkeypatch.setattr(weights, "write_new", full)
    with pytest.raises(
        RunStopped, match=r"No space left on device\); it needs [\d,]+ bytes, [\d,]+ are free; last good"
    ):
        checkpoint.save(tmp_path, snapshot(2))
    monkeypatch.undo()
    assert not [name for name in listing(tmp_path) if name.startswith(".tmp")]
    # The fifth write is latest.json: by then the new checkpoint is whole.
    assert checkpoint.newest(tmp_path).state["step"] == (2 if call == 5 else 1)


def test_a_rename_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, snapshot(1))

    def fails(self, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(RunStopped, match="Operation not permitted"):
        checkpoint.save(tmp_path, snapshot(2))
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path).state["step"] == 1


def test_a_disk_that_does_not_keep_what_it_took_is_noticed(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, snapshot(1))

    def forgets(path, raw, write=weights.write_new):
        write(path, raw[:-1] + b"?" if path.name == "train.safetensors" else raw)

    monkeypatch.setattr(weights, "write_new", forgets)
    with pytest.raises(RunStopped, match=r"train.safetensors has changed"):
        checkpoint.save(tmp_path, snapshot(2))
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path).state["step"] == 1


def test_space_is_checked_before_the_first_step(tmp_path, monkeypatch):
    checkpoint.check_space(tmp_path, snapshot(0))
    assert list(tmp_path.iterdir()) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RunStopped, match=r"need [\d,]+ bytes, 1,000 are free; nothing was trained"):
        checkpoint.check_space(tmp_path, snapshot(0))


# --- leftovers ---------------------------------------------------------------------------------------------------


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path):
    checkpoint.save(tmp_path, snapshot(1))
    dead, living = f".tmp-{dead_process()}-2", f".tmp-{os.getppid()}-2"
    for name in (dead, living):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / f".tmp-{dead_process()}-config.json").write_text("half")
    assert len(checkpoint.clean(tmp_path)) == 2
    assert listing(tmp_path) == [living, "latest.json", "step-00000001"]
    assert not list(tmp_path.glob(".tmp*"))


# --- R9 ----------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_the_first_is_named(tmp_path):
    said = f"in use by process {os.getpid()} on {platform.node()}"
    with lock.held(tmp_path), pytest.raises(UserError, match=said), lock.held(tmp_path):
        pytest.fail("two hold it")
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    with lock.held(tmp_path):
        content = json.loads((tmp_path / "lock").read_text())
    for change in ({"pid": dead_process()}, {"boot": "another"}, {"started": "0"}):
        (tmp_path / "lock").write_text(json.dumps({**content, **change}))
        with lock.held(tmp_path):
            assert json.loads((tmp_path / "lock").read_text()) == content


def test_the_lock_of_another_host_needs_force(tmp_path):
    with lock.held(tmp_path):
        content = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps({**content, "host": "elsewhere"}))
    said = "on elsewhere; if that machine is gone: --force-unlock"
    with pytest.raises(UserError, match=said), lock.held(tmp_path):
        pytest.fail("two hold it")
    with lock.held(tmp_path, force=True):
        assert json.loads((tmp_path / "lock").read_text()) == content


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"pid": "x", "host": "y"}', b'{"pid": 1e999, "host": "y"}', b"\xff\xfe", b"[" * 9999],
)
def test_a_damaged_lock_needs_force(tmp_path, content):
    (tmp_path / "lock").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged.*--force-unlock"), lock.held(tmp_path):
        pytest.fail("two hold it")
    with lock.held(tmp_path, force=True):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_place_of_the_lock_is_said(tmp_path):
    (tmp_path / "lock").mkdir()
    for force in (False, True):
        with pytest.raises(UserError, match="lock is a folder"), lock.held(tmp_path, force=force):
            pytest.fail("nobody holds it")


def test_the_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), lock.held(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_only_one_of_many_processes_gets_a_stale_lock(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"pid": dead_process(), "host": platform.node(), "boot": "x"}))
    code = (
        "import sys, time; from pathlib import Path; from kladi.learn import lock\n"
        "with lock.held(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    winners = [run for run in runs if run.stdout.readline() == "mine\n"]
    outputs = [run.communicate(input="", timeout=60) for run in runs]
    assert len(winners) == 1
    assert sum("UserError" in err for _, err in outputs) == 2

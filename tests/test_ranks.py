"""Two processes train what one trains: same loss, same gradient; a run of them can be killed and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ranks_worker
import tiny
from kladi import config as settings
from kladi.errors import UserError
from kladi.learn import ranks, training

HERE = Path(__file__).parent
LOCAL = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(HERE)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder where two processes left what they found."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, str(HERE / "ranks_worker.py"), str(folder)]
    both = [subprocess.Popen([*command, str(rank), "2"], env=LOCAL) for rank in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    return folder


@pytest.mark.parametrize("name", ranks_worker.CASES)
def test_loss_and_gradient_are_those_of_one_process(two, name):
    number = list(ranks_worker.CASES).index(name)
    alone = ranks_worker.measured(name, 0, 1)
    for rank in range(2):
        found = load_file(two / f"{number}-{rank}.safetensors")
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
    assert any(key.startswith("gradient encoder") and value.abs().max() > 1e-4 for key, value in alone.items())


@pytest.fixture
def command(tmp_path):
    """`kladi pretrain` on generated images, of a network without batch statistics; give it --out and more."""
    from kladi import toy

    toy.write(tmp_path / "toy", n=48, size=32)
    words = {
        "intensity.size": 32,
        "encoder.name": "test_convnext",
        "objective.name": "simclr",
        "train.batch": 8,
        "train.epochs": 3,
        "train.device": "cpu",
        "train.workers": 0,
        "train.checkpoint_steps": 2,
        "data.store": tmp_path / "store",
        "data.key": tmp_path / "key",
    }
    (tmp_path / "key").write_bytes(bytes(range(32)))
    flags = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "kladi", "pretrain", str(tmp_path / "toy" / "manifest.csv"), *flags]


def lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


def test_a_run_of_two_processes_goes_on_after_a_kill_to_the_same_bits(command, tmp_path):
    def called(*more, **options):
        return subprocess.run([*command, *more], env=LOCAL, capture_output=True, text=True, timeout=240, **options)

    done = called("--out", str(tmp_path / "one"))
    assert done.returncode == 0, done.stderr
    done = called("--out", str(tmp_path / "two"), "--train.devices", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1  # the process that follows says nothing
    two = lines(tmp_path / "two")
    assert [line["step"] for line in two] == list(range(1, len(two) + 1))
    assert {line["images"] for line in two} == {8}  # of both processes
    assert [line["loss"] for line in two] == pytest.approx([x["loss"] for x in lines(tmp_path / "one")], rel=1e-3)
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2

    killed = subprocess.Popen([*command, "--out", str(tmp_path / "cut"), "--train.devices", "2"], env=LOCAL)
    while not list((tmp_path / "cut" / "checkpoints").glob("step-*")):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = called("--out", str(tmp_path / "cut"), "--train.devices", "2", "--resume")
    assert done.returncode == 0, done.stderr
    whole, cut = load_file(tmp_path / "two" / "model.safetensors"), load_file(tmp_path / "cut" / "model.safetensors")
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


LEFT = """
import sys, torch.distributed as dist
from kladi.cli import main
code = main()
assert not dist.is_initialized()
raise SystemExit(code)
"""
"""`kladi`, and that it is no member of a process group afterwards: to end as one may abort the process."""


def test_torchrun_starts_it_too(command, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    done = subprocess.run(
        [sys.executable, *launcher, sys.executable, "-c", LEFT, *command[3:], "--out", str(tmp_path / "run")],
        env=LOCAL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 2


def test_alone_nothing_is_gathered():
    x = torch.randn(3, 2, requires_grad=True)
    assert ranks.rows_of_all(x) is x
    assert ranks.agreed(True, False, device=torch.device("cpu")) == (True, False)
    assert not ranks.follows(settings.Train())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__devices": 9}, "--train.batch 8 leaves some of 9 processes without an image"),
        ({"train__devices": 2, "train__device": "cpu:0"}, "is one device, not 2"),
    ],
)
def test_mistakes_are_named(changes, said):
    config = tiny.settings(**changes)
    with pytest.raises(UserError, match=said):
        training.assemble(tiny.data(), config, training.device(config.train))


def test_the_one_who_follows(monkeypatch):
    two = settings.Train(devices=2)
    assert not ranks.follows(two)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ranks.follows(two)
    assert not ranks.follows(settings.Train())
    monkeypatch.setenv("RANK", "0")
    assert not ranks.follows(two)

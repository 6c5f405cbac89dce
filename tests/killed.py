"""Trains in child processes that are killed; run by `test_resume.py` as a process of its own, which forks cheaply.

usage: killed.py FOLDER random COUNT SEED    kill COUNT times, each at a random time, then let the run end
       killed.py FOLDER every                kill at the first touch of the disk, the second, ... until a run ends first

Prints one line of JSON: how often it killed, at how many steps, and whether the end is that of an undisturbed run.
"""

import functools
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch

import tiny
from kladi.learn import checkpoint, console, fit
from kladi.models import weights

SETTINGS = {"train__checkpoint_steps": 1}
CLOCKED = {"log.txt", "metrics.jsonl"}
DATA = tiny.data()


def train(run, resume):
    epochs = 2 if sys.argv[2] == "random" else 1
    fit.fit(DATA, tiny.settings(**SETTINGS, train__epochs=epochs), run, resume=resume, progress=console.Silent())


def in_child(work):
    """Process id of a fork that does `work` and exits."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def ended(pid):
    """Whether the child ended by itself; a child that failed ends everything."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in {signal.SIGKILL, signal.SIGPROF}:
        return False
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"child failed with {os.waitstatus_to_exitcode(status)}")
    return True


def started(run):
    """A folder that a run once began in; a process that is killed before that is started anew, as a user would."""
    return run.is_dir()


def at_random_times(run, count, seed):
    """Times are of the child's own processor clock, so that a busy machine changes nothing."""
    chance, kills, steps = random.Random(seed), 0, set()
    longest = cpu_of(functools.partial(train, run.parent / "timed", resume=False))
    while kills < count:
        if not ended(in_child(functools.partial(until, chance.uniform(0.001, longest), run))):
            kills += 1
            found = checkpoint.newest(run) if (run / "checkpoints").is_dir() else None
            steps.add(found.state["step"] if found else 0)
            continue
        check(run)
        shutil.rmtree(run)
    ended(in_child(lambda: train(run, started(run))))
    return kills, steps


def until(seconds, run):
    """Train, and be ended by the kernel after so many seconds of work: SIGPROF's default, as final as SIGKILL."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    train(run, started(run))
    signal.setitimer(signal.ITIMER_PROF, 0)


def cpu_of(work):
    used = os.wait4(in_child(work), 0)[2]
    return used.ru_utime + used.ru_stime


def at_every_touch(run):
    """Kill just before the n-th write, rename or deletion of a process, for n = 1, 2, ..."""
    kills, steps = 0, set()
    while True:
        pid = in_child(functools.partial(touched, run, kills + 1))
        if ended(pid):
            return kills, steps
        kills += 1
        found = checkpoint.newest(run) if (run / "checkpoints").is_dir() else None
        steps.add(found.state["step"] if found else 0)
        ended(in_child(lambda: train(run, started(run))))
        check(run)
        shutil.rmtree(run)


def touched(run, fatal):
    seen = 0

    def counting(work):
        def wrapped(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*args, **kwargs)

        return wrapped

    weights.write_new = counting(weights.write_new)
    shutil.rmtree = counting(shutil.rmtree)
    for name in ("rename", "replace", "unlink", "mkdir"):
        setattr(Path, name, counting(getattr(Path, name)))
    os.link = counting(os.link)
    train(run, resume=False)


def check(run):
    """The end of `run` against that of the undisturbed one."""
    for file in sorted(path for path in (run.parent / "whole").rglob("*") if path.is_file()):
        other = run / file.relative_to(run.parent / "whole")
        if file.name not in CLOCKED and other.read_bytes() != file.read_bytes():
            raise SystemExit(f"{other.name} differs")
    if metrics(run) != metrics(run.parent / "whole"):
        raise SystemExit("metrics differ")
    left = [path.name for path in run.rglob("*") if path.name.startswith(".tmp") or path.name == "lock"]
    if left:
        raise SystemExit(f"left over: {left}")


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in {"seconds", "waited"}} for line in lines]


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not survive a fork
    folder = Path(sys.argv[1])
    ended(in_child(lambda: train(folder / "whole", resume=False)))
    if sys.argv[2] == "random":
        kills, steps = at_random_times(folder / "run", int(sys.argv[3]), int(sys.argv[4]))
        check(folder / "run")
    else:
        kills, steps = at_every_touch(folder / "run")
    sys.stdout.write(json.dumps({"kills": kills, "steps": sorted(steps)}) + "\n")

"""`make demo`: the main job on the embedded real example, the DICOM files of the package `pydicom-data`.

They are a few dozen test files of many modalities, some deliberately damaged: enough to see every step, and every
kind of message, on real files; far too few to learn anything from. The commands are printed as a user would type them.
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from kladi import cli

FOLDER = Path("demo")
OVERRIDES = ["--data.metadata", "modality,anatomy", "--data.frames", "middle", "--data.max_left_out", "0.5"]
OVERRIDES += ["--data.held_out", "0.7"]
"""One frame a file, because one cine loop would outnumber all patients; half of the files may be unreadable, since they
are the test files of a DICOM library; and most of the 20 patients are held out, lest there be none to measure on."""


def main() -> int:
    """Check, plan, pretrain, evaluate; stops at the first command that fails."""
    scans = example()
    if scans is None:
        print('kladi: the demo needs the package pydicom-data: pip install "kladi[demo]"', file=sys.stderr)
        return 2
    run, plan = FOLDER / "run", FOLDER / "plan.toml"
    if (run / "config.toml").is_file():
        shutil.rmtree(run)  # only ever a run of ours, and only the demo's
    FOLDER.mkdir(exist_ok=True)
    steps = [
        ["check", str(scans), *OVERRIDES],
        ["plan", str(scans), *OVERRIDES, "--train.epochs", "40", "--out", str(plan)],
        ["pretrain", str(scans), "--config", str(plan), "--out", str(run)],
        ["evaluate", str(run), str(scans), "--out", str(FOLDER / "eval")],
    ]
    for step in steps:
        print(f"\n$ kladi {' '.join(step)}", flush=True)
        code = cli.main(step)
        if code:
            return code
    print(f"\nThe report: {(FOLDER / 'eval' / 'report.html').resolve()}")
    print("These files show the way, not a result: with so few patients every interval is wide.")
    return 0


def example() -> Path | None:
    """The folder of DICOM files that the package `pydicom-data` brings; None where it is not installed."""
    found = find_spec("data_store")
    return Path(found.origin).parent / "data" if found and found.origin else None


if __name__ == "__main__":
    raise SystemExit(main())

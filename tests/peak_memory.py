"""Peak memory of a child process, for tests that bound it.

`resource.getrusage` will not do: a child begins with the peak of its parent, here a test worker of any size.
"""

from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak from /proc")

PEAK = """
import re
from pathlib import Path


def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
"""Put before the code of a child: `peak()` is its own peak so far, in bytes. Linux only."""

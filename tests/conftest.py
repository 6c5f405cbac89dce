"""Types of `kladi` are executed in tests: every annotated shape and dtype is checked at each call."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores. Two that each spin on all of them while they wait took forty times as long.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

from hypothesis import settings
from jaxtyping import install_import_hook

hook = install_import_hook("kladi", "beartype.beartype")
hook.__enter__()

# A limit in wall time fails on a busy machine, where nothing is wrong; pytest-timeout stops what hangs.
settings.register_profile("kladi", deadline=None)
settings.load_profile("kladi")

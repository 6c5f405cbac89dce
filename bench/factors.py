"""What the factor model costs where patients and features are many, beside a PCA of all of them, which knows no
structure, and beside writing the covariance out.

    python bench/factors.py [--patients 100000] [--features 5000]

CPU and wall seconds, float32 tables, three modalities with three factors a structure.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.decomposition import PCA

from kladi import HierarchicalFactorModel, Lattice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=5_000)
    options = parser.parse_args()
    tables, weights = drawn(options.patients, options.features)
    print("| what | CPU s | wall s |\n|---|---|---|")
    model = timed("fit, three modalities, 21 factors", lambda: HierarchicalFactorModel(ranks=3).fit(tables))
    timed("factors of every patient", lambda: model.transform(tables))
    timed("PCA by scikit-learn, randomised, 21 components", lambda: principal(tables))
    timed("one product X^T X", lambda: product(tables))
    found = model.weights_ @ (model.weights_.T @ model.weights_)
    true = weights @ (weights.T @ weights)
    print(f"\nsteps {model.n_iter_}, converged {model.converged_}")
    print(f"relative error of W W^T W: {np.linalg.norm(found) / np.linalg.norm(true) - 1:+.4f} in length")
    print(f"greatest memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def drawn(n: int, d: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Loadings of length about one, noise of variance .1."""
    rng = np.random.default_rng(0)
    sizes = (d // 5, d // 2, d - d // 5 - d // 2)
    lattice = Lattice.of(3, 3)
    z = rng.normal(size=(n, lattice.width)).astype(np.float32)
    tables, rows = [], []
    for m, size in enumerate(sizes):
        w = np.zeros((size, lattice.width), dtype=np.float32)
        own = lattice.of_modality(m)
        w[:, own] = np.linalg.qr(rng.normal(size=(size, own.sum())))[0] * rng.uniform(0.5, 1.5, own.sum())
        x = rng.standard_normal(size=(n, size), dtype=np.float32)
        x *= np.float32(0.1**0.5)
        x += z @ w.T
        tables.append(x)
        rows.append(w)
    return tables, np.concatenate(rows).astype(np.float64)


def principal(tables: list[np.ndarray]) -> None:
    """With the copy that puts the tables side by side."""
    PCA(n_components=21, svd_solver="randomized", random_state=0).fit(np.concatenate(tables, axis=1))


def product(tables: list[np.ndarray]) -> None:
    x = np.concatenate([table[:10_000] for table in tables], axis=1)
    for _ in range(len(tables[0]) // len(x)):
        x.T @ x


def timed(what: str, work: Callable[[], Any]) -> Any:
    cpu, wall = time.process_time(), time.perf_counter()
    found = work()
    print(f"| {what} | {time.process_time() - cpu:.1f} | {time.perf_counter() - wall:.1f} |", flush=True)
    return found


if __name__ == "__main__":
    main()

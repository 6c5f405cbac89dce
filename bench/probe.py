"""Batched linear probes against a loop of scikit-learn, at one equal tolerance: CPU seconds, and that both agree.

    python bench/probe.py [--quick]

CPU time of this process, BLAS threads included. The embeddings are correlated, as those of networks are: normal
directions with variances 1, 1/2, 1/3, ..., through a ReLU. 5 folds x 13 penalties each.
"""

from __future__ import annotations

import sys
import time
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from kladi.evaluate.readouts.probe import LAMBDAS, fit_probes

TOLERANCE = 1e-6
CASES = ((2000, 128, 2), (2000, 128, 8), (2000, 512, 8), (150, 512, 8), (5000, 512, 10))


def embeddings(n, width, classes, seed=0):
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(classes, width)) * 0.3
    y = rng.integers(0, classes, n)
    turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
    x = (centre[y] + rng.normal(size=(n, width))) / np.sqrt(np.arange(1.0, width + 1)) @ turn
    fold = np.arange(n) % 5
    train = np.stack([(fold != k) & (fold != (k + 1) % 5) for k in range(5)])
    return np.maximum(x + 0.05, 0).astype(np.float32), y, train


def objective(rows, y, weights, intercept, penalty):
    logits = rows @ weights + intercept
    logits -= logits.max(axis=1, keepdims=True)
    loss = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]
    # Two columns of a binary problem hold half of its one column each: the penalty is that of their difference.
    square = ((weights[:, 1] - weights[:, 0]) ** 2).sum() if weights.shape[1] == 2 else (weights**2).sum()
    return loss.mean() + penalty / 2 * square


def loop(x, y, train):
    """One scikit-learn fit after the other; seconds, and (mean, sd, weights, intercept) of each."""
    start, found = time.process_time(), []
    for mask in train:
        rows = x[mask].astype(np.float64)
        mean, sd = rows.mean(axis=0), rows.std(axis=0)
        sd[sd < 1e-12] = 1
        rows = (rows - mean) / sd
        for penalty in LAMBDAS:
            model = LogisticRegression(C=1 / (penalty * len(rows)), tol=TOLERANCE, max_iter=20_000)
            model.fit(rows, y[mask])
            found.append((mean, sd, model.coef_.T, model.intercept_))
    return time.process_time() - start, found


def main():
    warnings.simplefilter("ignore", ConvergenceWarning)
    cases = CASES[:2] if "--quick" in sys.argv else CASES
    print(
        f"{'n':>6} {'width':>6} {'classes':>7} {'batched':>9} {'loop':>9} {'ratio':>6} {'worst gap':>10} {'answers':>8}"
    )
    for n, width, classes in cases:
        x, y, train = embeddings(n, width, classes)
        start = time.process_time()
        probes = fit_probes(x, y, train, tolerance=TOLERANCE)
        batched = time.process_time() - start
        seconds, found = loop(x, y, train)
        worst, differing, asked = 0.0, 0, 0
        for p, (mean, sd, weights, intercept) in enumerate(found):
            mask, penalty = train[p // len(LAMBDAS)], LAMBDAS[p % len(LAMBDAS)]
            rows = (x.astype(np.float64) - mean) / sd
            if weights.shape[1] == 1:
                weights = np.concatenate([np.zeros_like(weights), weights], axis=1)
                intercept = np.array([0.0, intercept[0]])
            ours = objective(
                rows[mask],
                y[mask],
                probes.weight[p] * sd[:, None],
                probes.intercept[p] + mean @ probes.weight[p],
                penalty,
            )
            theirs = objective(rows[mask], y[mask], weights, intercept, penalty)
            worst = max(worst, (ours - theirs) / theirs)
            held_out = ~mask
            differing += int((probes.predict(x[held_out], p) != (rows[held_out] @ weights + intercept).argmax(1)).sum())
            asked += int(held_out.sum())
        print(
            f"{n:>6} {width:>6} {classes:>7} {batched:>7.1f} s {seconds:>7.1f} s {seconds / batched:>6.1f} "
            f"{worst:>10.1e} {differing / asked:>8.1e}",
            flush=True,
        )
    print("worst gap: our objective above scikit-learn's, relative. answers: share of held-out answers that differ.")


if __name__ == "__main__":
    main()

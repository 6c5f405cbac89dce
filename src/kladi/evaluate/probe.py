"""Linear probes: every fold, repeat and penalty solved at once, by one L-BFGS over one copy of the embeddings.

A problem p is a training mask and a penalty. With x~ = (x - mu_p) / sd_p, fitted on the mask's rows alone,

    J(V, b) = (1/S) sum_i w_i CE(softmax(x~_i V + b), y_i) + (lambda/2) ||V||^2,      S = sum of w over the mask.

The rows are never standardised in memory: x~ V + b = X (V/sd) + (b - mu . (V/sd)), so all problems share two products
with X in each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kladi.evaluate.logistic import MEMORY, Batch

CHUNK_BYTES = 512 * 2**20
"""Problems are solved in chunks whose working arrays stay below this."""
LAMBDAS = tuple(10 ** (1 - k / 2) for k in range(13))
"""Penalties tried by default: 10 down to 1e-5, independent of the number of rows."""


@dataclass(frozen=True)
class Probes:
    """P solved problems; problem p belongs to mask `p // len(lambdas)` and penalty `lambdas[p % len(lambdas)]`.

    classes: int64[C], the targets that the columns stand for.
    weight: float64[P, F, C] and intercept float64[P, C], to be applied to raw rows. A class without a training row in
        its problem has intercept -inf, so that it is never predicted.
    objective: float64[P], J at the solution.
    gradient: float64[P], largest absolute entry of the gradient there.
    steps: int64[P], L-BFGS steps taken.
    converged: bool[P].
    """

    classes: Int[np.ndarray, " C"]
    lambdas: Float[np.ndarray, " L"]
    weight: Float[np.ndarray, "P F C"]
    intercept: Float[np.ndarray, "P C"]
    objective: Float[np.ndarray, " P"]
    gradient: Float[np.ndarray, " P"]
    steps: Int[np.ndarray, " P"]
    converged: Bool[np.ndarray, " P"]

    def log_probabilities(self, x: Float[np.ndarray, "n F"], problem: int) -> Float[np.ndarray, "n C"]:
        """log softmax of the logits; -inf for a class that the problem never saw."""
        logits = x.astype(np.float64) @ self.weight[problem] + self.intercept[problem]
        logits = logits - logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def predict(self, x: Float[np.ndarray, "n F"], problem: int) -> Int[np.ndarray, " n"]:
        """The most probable class, as a target; ties go to the least."""
        return self.classes[self.log_probabilities(x, problem).argmax(axis=1)]


def fit_probes(
    x: Float[np.ndarray, "n F"],
    y: Int[np.ndarray, " n"],
    train: Bool[np.ndarray, "M n"],
    *,
    lambdas: tuple[float, ...] = LAMBDAS,
    balanced: bool = False,
    row_weight: Float[np.ndarray, " n"] | None = None,
    tolerance: float = 1e-6,
    max_steps: int = 20_000,
    device: str = "cpu",
) -> Probes:
    """Solve the M x len(lambdas) problems of all training masks and penalties together.

    Args:
        x: embeddings; rows outside every mask may hold anything finite and change nothing.
        y: target of each row, any integers; rows outside every mask are not read.
        train: a mask of training rows for each fold and repeat.
        lambdas: penalties.
        balanced: weigh row i by n / (C n_c), its class's share within the mask, on top of `row_weight`.
        row_weight: of each row in the objective (not in the scaler); None: 1.
        tolerance: largest absolute gradient entry at which a problem is finished.
        max_steps: a problem that needs more is returned with `converged` False.
        device: of the arithmetic, which is float64.

    The optimum is that of scikit-learn's `LogisticRegression(C=1/(lambda S))` on standardised rows. A column that is
    constant over a mask gets weight 0. Exactly two classes in a mask: one logit column, as scikit-learn has it (two
    columns with penalty 2 lambda have the same optimum, which is how a problem of a multi-class batch is solved).

    Source: Liu and Nocedal, On the limited memory BFGS method (1989).

    Raises:
        ValueError: a training mask with fewer than two classes, names the mask; a value that is not finite; a penalty
            that is not positive.
    """
    _refuse(x, y, train, lambdas, row_weight)
    used = train.any(axis=0)
    train, y = train[:, used], y[used]
    row_weight = None if row_weight is None else row_weight[used]
    x64 = torch.from_numpy(x[used].astype(np.float64)).to(device)
    classes, code = np.unique(y, return_inverse=True)
    mu, sd = _scalers(x64, train)
    spectrum, axes = _axes(x64)
    weight, seen = _weights(code, train, len(classes), balanced, row_weight)
    # One problem a mask and penalty; all penalties of a mask stand together.
    mask_of = np.repeat(np.arange(len(train)), len(lambdas))
    penalty = np.tile(np.array(lambdas), len(train))
    if len(classes) > 2:
        penalty = np.where(seen.sum(axis=1)[mask_of] == 2, 2 * penalty, penalty)
    columns = len(classes) if len(classes) > 2 else 1
    n, width = x64.shape
    bytes_each = 8 * columns * (5 * n + (2 * MEMORY + 6) * width)
    size = max(1, CHUNK_BYTES // bytes_each)
    solved = []
    for start in range(0, len(penalty), size):
        masks = torch.from_numpy(mask_of[start : start + size]).to(device)
        solved.append(
            Batch(
                x=x64,
                code=torch.from_numpy(code).to(device),
                weight=torch.from_numpy(weight).to(device)[:, masks],
                mu=mu[masks],
                sd=sd[masks],
                seen=torch.from_numpy(seen).to(device)[masks],
                penalty=torch.from_numpy(penalty[start : start + size]).to(device),
                axes=axes,
                spectrum=spectrum,
                columns=columns,
            ).solve(tolerance, max_steps)
        )
    raw, intercept, objective, gradient, steps = (torch.cat(parts).cpu().numpy() for parts in zip(*solved, strict=True))
    return Probes(
        classes=classes,
        lambdas=np.array(lambdas, dtype=np.float64),
        weight=raw,
        intercept=intercept,
        objective=objective,
        gradient=gradient,
        steps=steps,
        converged=gradient < tolerance,
    )


def choose(scores: Float[np.ndarray, "M L"], lambdas: Float[np.ndarray, " L"]) -> Int[np.ndarray, " M"]:
    """For each mask the index of the penalty with the best score on validation rows; ties go to the larger penalty.

    A score that is nan never wins; where all are nan the largest penalty is taken.
    """
    order = np.argsort(-lambdas, kind="stable")
    ranked = np.where(np.isnan(scores), -np.inf, scores)[:, order]
    return order[ranked.argmax(axis=1)].astype(np.int64)


def _refuse(
    x: np.ndarray, y: np.ndarray, train: np.ndarray, lambdas: tuple[float, ...], row_weight: np.ndarray | None
) -> None:
    if not np.isfinite(x).all():
        raise ValueError("an embedding is not finite")
    if not lambdas or min(lambdas) <= 0:
        raise ValueError(f"penalties are positive, not {lambdas}")
    if row_weight is not None and not (np.isfinite(row_weight).all() and (row_weight >= 0).all()):
        raise ValueError("row weights are finite and not negative")
    for m, mask in enumerate(train):
        if len(np.unique(y[mask])) < 2:
            raise ValueError(f"training mask {m} holds fewer than two classes, so there is nothing to learn")


def _scalers(x: Tensor, train: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over each mask, float64[M, F]. One mask's rows are gathered at a time."""
    mu: list[Tensor] = []
    sd: list[Tensor] = []
    for mask in train:
        rows = x[torch.from_numpy(mask).to(x.device)]
        centre = rows.mean(dim=0)
        spread = (rows - centre).square().mean(dim=0).sqrt()
        # A constant column is zero once centred, so its optimal weight is zero; dividing by infinity makes it exactly
        # that. Relative to the mean as well, as the rounding of a large constant is no spread.
        spread[spread < 1e-12 * centre.abs().clamp(min=1)] = math.inf
        mu.append(centre)
        sd.append(spread)
    return torch.stack(mu), torch.stack(sd)


def _axes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [F] and eigenvectors [F, F] of the correlation of all training rows, for the preconditioner.

    The Hessian of J is near (mean p (1-p)) Correlation + lambda; the masks overlap so much that one basis serves all.
    It changes how fast a problem is solved, never its solution.
    """
    everything = torch.ones(1, len(rows), dtype=torch.bool).numpy()
    mu, sd = _scalers(rows, everything)
    standardised = (rows - mu) / sd
    spectrum, axes = torch.linalg.eigh(standardised.T @ standardised / len(rows))
    return spectrum.clamp(min=0), axes


def _weights(
    code: np.ndarray, train: np.ndarray, classes: int, balanced: bool, row_weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """w / S of each row in each mask, float64[n, M], zero outside; and which classes a mask has seen, bool[M, C]."""
    counts = np.stack([np.bincount(code[mask], minlength=classes) for mask in train])
    weight = train.T.astype(np.float64)
    if row_weight is not None:
        weight *= row_weight[:, None]
    if balanced:
        present = np.maximum(counts > 0, 0).sum(axis=1)
        factor = counts.sum(axis=1)[:, None] / (present[:, None] * np.maximum(counts, 1))
        weight *= factor[:, code].T
    return weight / weight.sum(axis=0), counts > 0

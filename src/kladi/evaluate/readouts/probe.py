"""Linear probes: all folds and repeats solved at once, penalty after penalty, over one copy of the embeddings.

A problem p is a training mask and a penalty. With x~ = (x - mu_p) / sd_p, fitted on the mask's rows alone,

    J(V, b) = (1/S) sum_i w_i CE(softmax(x~_i V + b), y_i) + (lambda/2) ||V||^2,      S = sum of w over the mask.

The rows are never standardised in memory: x~ V + b = X (V/sd) + (b - mu . (V/sd)), so all problems share two products
with X in each step. Where a fold has fewer rows than half the columns, its rows are turned into their principal axes
instead, which moves no optimum and leaves far fewer coordinates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kladi.evaluate.readouts.designs import Design, Own, Shared
from kladi.evaluate.readouts.logistic import Batch, Solution

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
    steps: int64[P], products with the Hessian that it took, two products with X each.
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
    x: Float[np.ndarray, "n F"] | Sequence[Float[np.ndarray, "n F"]],
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
        x: embeddings, or a sequence of M matrices where they were fitted on each mask's rows; rows outside every mask
            may hold anything finite and change nothing.
        y: target of each row, any integers; rows outside every mask are not read.
        train: a mask of training rows for each fold and repeat.
        lambdas: penalties.
        balanced: weigh row i by n / (C n_c), its class's share within the mask, on top of `row_weight`.
        row_weight: of each row in the objective (not in the scaler); None: 1.
        tolerance: largest absolute gradient entry at which a problem is finished, in the coordinates of its design.
        max_steps: a problem that needs more is returned with `converged` False.
        device: of the arithmetic, which is float64.

    The optimum is that of scikit-learn's `LogisticRegression(C=1/(lambda S))` on standardised rows. A column that is
    constant over a mask gets weight 0. Exactly two classes in a mask: one logit column, as scikit-learn has it (two
    columns with penalty 2 lambda have the same optimum, which is how a problem of a multi-class batch is solved).

    Raises:
        ValueError: a training mask with fewer than two classes, names the mask; a value that is not finite; a penalty
            that is not positive.
    """
    matrices = [x] if isinstance(x, np.ndarray) else list(x)
    _refuse(matrices, y, train, lambdas, row_weight)
    used = train.any(axis=0)
    train, y = train[:, used], y[used]
    row_weight = None if row_weight is None else row_weight[used]
    tensors = [torch.from_numpy(matrix[used].astype(np.float64)).to(device) for matrix in matrices]
    classes, code = np.unique(y, return_inverse=True)
    weight, seen = _weights(code, train, len(classes), balanced, row_weight)
    penalty = np.tile(np.array(lambdas)[:, None], len(train))  # [L, M]
    if len(classes) > 2:
        penalty = np.where(seen.sum(axis=1) == 2, 2 * penalty, penalty)
    chunks = []
    for design, first, masks in _designs(tensors, train, len(classes)):
        batch = Batch(
            design=design,
            masks=torch.from_numpy(masks - first).to(device),
            code=torch.from_numpy(code).to(device),
            weight=torch.from_numpy(weight[:, masks]).to(device),
            seen=torch.from_numpy(seen[masks]).to(device),
        )
        chunks.append(_path(batch, torch.from_numpy(penalty[:, masks]).to(device), tolerance, max_steps))
    raw, intercept, objective, gradient, steps = (torch.cat(parts).cpu().numpy() for parts in zip(*chunks, strict=True))
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


def _path(batch: Batch, penalty: Tensor, tolerance: float, most: int) -> tuple[Tensor, ...]:
    """Solve from the strongest penalty to the weakest [L, P]; every result [P L, ...], a mask's penalties together."""
    order = torch.argsort(-penalty[:, 0], stable=True).tolist()
    solved: dict[int, Solution] = {}
    costly = False
    for which in order:
        solved[which] = batch.solve(penalty[which], tolerance, most, costly=costly)
        # Blocks cost about as much as half as many products as there are coordinates.
        costly = costly or bool(2 * solved[which].steps.float().mean() > batch.design.width)
    return tuple(
        torch.stack([getattr(solved[k], field.name) for k in range(len(penalty))], dim=1).flatten(0, 1)
        for field in dataclasses.fields(Solution)
    )


def choose(scores: Float[np.ndarray, "M L"], lambdas: Float[np.ndarray, " L"]) -> Int[np.ndarray, " M"]:
    """For each mask the index of the penalty with the best score on validation rows; ties go to the larger penalty.

    A score that is nan never wins; where all are nan the largest penalty is taken.
    """
    order = np.argsort(-lambdas, kind="stable")
    ranked = np.where(np.isnan(scores), -np.inf, scores)[:, order]
    return order[ranked.argmax(axis=1)].astype(np.int64)


def _refuse(
    x: list[np.ndarray], y: np.ndarray, train: np.ndarray, lambdas: tuple[float, ...], row_weight: np.ndarray | None
) -> None:
    if len(x) not in (1, len(train)):
        raise ValueError(f"{len(x)} matrices for {len(train)} training masks")
    if not all(np.isfinite(matrix).all() for matrix in x):
        raise ValueError("an embedding is not finite")
    if not lambdas or min(lambdas) <= 0:
        raise ValueError(f"penalties are positive, not {lambdas}")
    if row_weight is not None and not (np.isfinite(row_weight).all() and (row_weight >= 0).all()):
        raise ValueError("row weights are finite and not negative")
    for m, mask in enumerate(train):
        if len(np.unique(y[mask])) < 2:
            raise ValueError(f"training mask {m} holds fewer than two classes, so there is nothing to learn")


def _designs(x: list[Tensor], train: np.ndarray, classes: int) -> Iterator[tuple[Design, int, np.ndarray]]:
    """Chunks of masks that fit into memory: their design, its first mask, and the masks' numbers.

    One matrix is shared by all masks, unless it has more than twice as many columns as a mask has rows.
    """
    n, width = x[0].shape
    columns = classes if classes > 2 else 1
    most = int(train.sum(axis=1).max())
    shared = Shared(x[0], train) if len(x) == 1 and width <= 2 * most else None
    inner = width if shared is not None else min(width, most)
    size = max(1, CHUNK_BYTES // (8 * columns * (8 * n + 10 * inner)))
    if shared is None:  # each mask brings a matrix of its own
        size = max(1, min(size, CHUNK_BYTES // (8 * n * inner)))
    for start in range(0, len(train), size):
        some = np.arange(start, min(start + size, len(train)))
        if shared is not None:
            yield shared, 0, some
        else:
            yield Own([x[m % len(x)] for m in some], train[some]), start, some


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

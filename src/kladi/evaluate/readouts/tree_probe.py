"""Linear probes under any criterion: for each fold, repeat, variant and penalty the minimum of

    J(V, b) = 1/n sum_i L(x~_i V + b, y_i) + (lambda / 2) ||V||^2

over its training rows, with x~ standardised on these, as the plain probe has it. The criteria that know a tree are not
convex, so there is no Newton system to solve, and L-BFGS takes its place. It solves one problem at a time: of many at
once the hardest decides how many steps all of them take, and its memory is that of their sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kladi.evaluate import metrics
from kladi.evaluate.answers import Answers, column_of, said
from kladi.evaluate.readouts.criteria import Criterion, Judge, judges
from kladi.evaluate.readouts.regimes import Part, ProbeNotes, View
from kladi.evaluate.splits import TEST, TRAIN, VAL

LAMBDAS = tuple(10.0 ** (1 - k) for k in range(6))
"""Every other penalty of the plain probe's grid, from 10 down to 1e-4: weaker ones are not solved in `ITERATIONS`."""
ITERATIONS = 400
TOLERANCE = 1e-4
"""L-BFGS stops where no entry of the gradient is larger."""
NEAR = 1e-3
"""The largest entry of a gradient at which a problem counts as solved, in float32."""


def tree_probe(
    view: View,
    criterion: Criterion,
    notes: ProbeNotes | None = None,
    *,
    seed: int = 0,
    lambdas: tuple[float, ...] = LAMBDAS,
) -> Iterator[tuple[Part, Answers]]:
    """The probe of each fold: variant and penalty are those that are best on its validation rows.

    A shuffled criterion has another draw in each repeat.
    """
    notes = notes or ProbeNotes()
    if not criterion.shuffled:
        yield from _probed(view, criterion, notes, seed, lambdas)
        return
    for repeat in dict.fromkeys(part.repeat for part in view.parts):
        places = [i for i, part in enumerate(view.parts) if part.repeat == repeat]
        each = [view.features[i % len(view.features)] for i in places]
        some = replace(
            view,
            parts=tuple(view.parts[i] for i in places),
            features=tuple(each) if len(view.features) > 1 else view.features,
        )
        yield from _probed(some, criterion, notes, seed + repeat, lambdas)


def _probed(
    view: View, criterion: Criterion, notes: ProbeNotes, seed: int, lambdas: tuple[float, ...]
) -> Iterator[tuple[Part, Answers]]:
    """The probes of all folds of a view, each variant's together."""
    shown = list(view.able())
    if not shown:
        return
    seen = np.logical_or.reduce([part.of == TRAIN for part, *_ in shown])
    classes = np.unique(view.task.target[seen])
    code = column_of(view.task.target, classes)
    best: list[tuple[tuple[float, float], int, Judge, Tensor, Tensor] | None] = [None] * len(shown)
    for judge in judges(criterion, view.task.taxonomy, classes, seed):
        for m, (part, features, _) in enumerate(shown):
            train, val = part.rows(TRAIN), part.rows(VAL)
            for penalty, solved, weight, bias in _solved(judge, features[train], code[train], lambdas):
                notes.unsolved += not solved
                score = _score(_log_p(judge, features, val, weight, bias), view.target(val), classes)
                held = best[m]
                if held is None or score > held[0]:
                    best[m] = (score, penalty, judge, weight, bias)
    for (part, features, _), found in zip(shown, best, strict=True):
        if found is not None:
            _, penalty, judge, weight, bias = found
            notes.penalties.append(penalty)
            test = part.rows(TEST)
            log_p = _log_p(judge, features, test, weight, bias)
            pred = classes[log_p.argmax(axis=1)]
            yield part, Answers(view.method, "probe", part.fold, part.repeat, test, pred, log_p, classes)


def _score(
    log_p: Float[np.ndarray, "m C"], true: Int[np.ndarray, " m"], classes: Int[np.ndarray, " C"]
) -> tuple[float, float]:
    """Balanced accuracy on validation rows; of equals, the likelier truth."""
    right = said(lambda: metrics.balanced_accuracy(classes[log_p.argmax(axis=1)], true))[0]
    column = column_of(true, classes)
    known = np.flatnonzero(column >= 0)
    likely = float(log_p[known, column[known]].mean()) if len(known) else -np.inf
    return (right if np.isfinite(right) else -np.inf, likely)


def _log_p(
    judge: Judge, x: Float[np.ndarray, "n F"], rows: Int[np.ndarray, " m"], weight: Tensor, bias: Tensor
) -> Float[np.ndarray, "m C"]:
    return judge.log_p(torch.from_numpy(x[rows].astype(np.float32)) @ weight + bias).double().numpy()


def _solved(
    judge: Judge,
    x: Float[np.ndarray, "n F"],
    code: Int[np.ndarray, " n"],
    lambdas: tuple[float, ...],
) -> Iterator[tuple[int, bool, Tensor, Tensor]]:
    """Of every penalty: its place, whether it was solved, weight [F, columns] and bias on raw rows."""
    rows = torch.from_numpy(x.astype(np.float32))
    mean = rows.mean(0)
    sd = rows.std(0, correction=0)
    scale = torch.where(sd > 0, 1 / sd.clamp_min(1e-30), 0)
    standardised, y = (rows - mean) * scale, torch.from_numpy(code)
    for place, penalty in enumerate(lambdas):
        V, b, solved = _minimum(judge, standardised, y, penalty)
        weight = V * scale[:, None]
        yield place, solved, weight, b - mean @ weight


def _minimum(
    judge: Judge, x: Float[Tensor, "n F"], y: Int[Tensor, " n"], penalty: float
) -> tuple[Float[Tensor, "F K"], Float[Tensor, " K"], bool]:
    """V and b, from zero, and whether they have come near a minimum."""
    V = torch.zeros(x.shape[1], judge.columns, requires_grad=True)
    b = torch.zeros(judge.columns, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [V, b],
        max_iter=ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-9,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = judge.rows(x @ V + b, y).mean() + 0.5 * penalty * V.square().sum()
        value.backward()
        return value

    optimizer.step(objective)
    objective()
    steepest = max(0.0 if p.grad is None else float(p.grad.abs().max()) for p in (V, b))
    return V.detach(), b.detach(), steepest < NEAR

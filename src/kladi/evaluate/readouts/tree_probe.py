"""Linear probes under any criterion: all folds, repeats and penalties of a variant solved at once.

    J_p(V, b) = (1 / S_p) sum_i m_pi L(x~_i V + b, y_i) + (lambda_p / 2) ||V||^2,      S_p = sum_i m_pi

with x~ standardised on the rows of the mask m_p, as the plain probe has it. The criteria that know a tree are not
convex, so there is no Newton system to solve: the sum over problems, which separates, goes through one L-BFGS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kladi.evaluate import metrics
from kladi.evaluate.answers import Answers, column_of, said
from kladi.evaluate.readouts.criteria import Criterion, Judge, judges
from kladi.evaluate.readouts.regimes import Part, ProbeNotes, View
from kladi.evaluate.splits import TEST, TRAIN, VAL

LAMBDAS = tuple(10.0 ** (1 - k) for k in range(7))
"""Every other penalty of the plain probe's grid, from 10 down to 1e-5."""
ENTRIES = 1 << 26
"""Logits that are held at once; problems beyond are solved after one another."""
ITERATIONS = 400
TOLERANCE = 1e-5
NEAR = 1e-3
"""The largest entry of a gradient at which a problem counts as solved: in float32, of a sum over all problems."""


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
    train = np.stack([part.of == TRAIN for part, *_ in shown])
    classes = np.unique(view.task.target[train.any(axis=0)])
    code = column_of(view.task.target, classes)
    best: list[tuple[tuple[float, float], int, Judge, Tensor, Tensor] | None] = [None] * len(shown)
    for judge in judges(criterion, view.task.taxonomy, classes, seed):
        matrices = [features for _, features, _ in shown] if len(view.features) > 1 else [view.features[0]]
        for (m, penalty), solved, weight, bias in _solved(judge, matrices, code, train, lambdas):
            part, features, _ = shown[m]
            notes.unsolved += not solved
            val = part.rows(VAL)
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
    matrices: Sequence[Float[np.ndarray, "n F"]],
    code: Int[np.ndarray, " n"],
    train: Bool[np.ndarray, "M n"],
    lambdas: tuple[float, ...],
) -> Iterator[tuple[tuple[int, int], bool, Tensor, Tensor]]:
    """Of every mask and penalty: which they are, whether it was solved, weight [F, columns] and bias on raw rows."""
    used = train.any(axis=0)
    y = torch.from_numpy(code[used])
    problems = [(m, penalty) for m in range(len(train)) for penalty in range(len(lambdas))]
    size = max(1, ENTRIES // max(1, int(used.sum()) * judge.columns))
    for start in range(0, len(problems), size):
        some = problems[start : start + size]
        mask = torch.from_numpy(train[[m for m, _ in some]][:, used].astype(np.float32))
        x = [torch.from_numpy(matrices[m % len(matrices)][used].astype(np.float32)) for m, _ in some]
        share = mask / mask.sum(1, keepdim=True)
        mean = torch.stack([s @ a for s, a in zip(share, x, strict=True)])
        sd = torch.stack([(s @ (a - mu) ** 2).sqrt() for s, a, mu in zip(share, x, mean, strict=True)])
        scale = torch.where(sd > 0, 1 / sd.clamp_min(1e-30), 0)
        shared = x[0] if len(matrices) == 1 else torch.stack(x)
        penalties = torch.tensor([lambdas[penalty] for _, penalty in some])
        V, b, solved = _minimum(judge, shared, y, share, mean, scale, penalties)
        weight = V * scale[:, :, None]
        for p, which in enumerate(some):
            yield which, bool(solved[p]), weight[p], b[p] - mean[p] @ weight[p]


def _minimum(
    judge: Judge,
    x: Float[Tensor, "*P n F"],
    y: Int[Tensor, " n"],
    share: Float[Tensor, "P n"],
    mean: Float[Tensor, "P F"],
    scale: Float[Tensor, "P F"],
    penalty: Float[Tensor, " P"],
) -> tuple[Float[Tensor, "P F K"], Float[Tensor, "P K"], Bool[Tensor, " P"]]:
    """V and b of all problems, from zero, and which of them have come near a minimum."""
    P, F = scale.shape
    V = torch.zeros(P, F, judge.columns, requires_grad=True)
    b = torch.zeros(P, judge.columns, requires_grad=True)
    n, targets = len(y), y.repeat_interleave(P)
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
        weight = V * scale[:, :, None]
        # One product for all problems where they share their rows.
        own = x.ndim == 3
        product = (x @ weight).transpose(0, 1) if own else (x @ weight.transpose(0, 1).flatten(1)).view(n, P, -1)
        logits = product + (b - (mean[:, None] @ weight)[:, 0])
        rows = judge.rows(logits.flatten(0, 1), targets).view(n, P)
        value = (share.T * rows).sum() + 0.5 * (penalty * V.square().sum((1, 2))).sum()
        value.backward()
        return value

    optimizer.step(objective)
    objective()
    slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in (V, b)]
    steepest = torch.maximum(slopes[0].abs().amax((1, 2)), slopes[1].abs().amax(1))
    return V.detach(), b.detach(), steepest < NEAR

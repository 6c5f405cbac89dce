"""Many penalised logistic regressions over one matrix, solved together: L-BFGS whose every vector has a problem axis.

Each problem keeps its own history, direction and step; a finished one leaves the batch. Two ideas make it fast. The
step is searched along the logits, which are linear in it, so a trial costs no product with X. And the first guess of
the inverse Hessian is not a multiple of the identity but (curvature x correlation of the columns + penalty)^-1, which
is what makes weak penalties on correlated embeddings take tens of steps instead of many hundreds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kladi.evaluate.readouts.designs import Design

MEMORY = 10
"""Pairs of steps and gradient changes that L-BFGS remembers."""


class Batch:
    """State of one batch. Shapes: n rows, K logit columns, P problems, D coordinates.

    `point`, `gradient` and the history are [K, P, D + 1], the last entry of a row being the bias; `logits` is
    [n, K, P]: P innermost makes the softmax over K a vectorised one, and [K P, D] the operand of both products.

    Args:
        design: the rows, as each problem sees them.
        masks: int64[P], ascending, the training mask of each problem.
        code: int64[n], class of each row as 0..C-1.
        weight: [n, P], weights that sum to one over a problem's mask, zero outside.
        seen: bool[P, C], the classes that occur in a problem's mask.
        penalty: [P].
    """

    def __init__(
        self, *, design: Design, masks: Tensor, code: Tensor, weight: Tensor, seen: Tensor, penalty: Tensor
    ) -> None:
        self.design, self.masks, self.all_masks = design, masks, masks
        self.code, self.weight, self.penalty = code, weight, penalty
        self.row = torch.arange(len(code), device=code.device)
        self.closed = self.all_closed = ~seen.T
        # Two classes: one logit, of the second class; that of the first is zero.
        self.columns = seen.shape[1] if seen.shape[1] > 2 else 1
        self.point = weight.new_zeros(self.columns, len(masks), design.width + 1)
        self.logits = weight.new_zeros(design.rows, self.columns, len(masks))
        if self.columns > 1:  # a class that a problem never saw has no column there
            self.logits.masked_fill_(self.closed, -math.inf)

    def solve(self, tolerance: float, max_steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Raw weights [P, F, C], intercepts [P, C], objective, largest gradient entry and steps [P]."""
        problems = len(self.penalty)
        point, objective = self.point.clone(), self.penalty.new_zeros(problems)
        largest, steps = self.penalty.new_zeros(problems), torch.zeros(problems, dtype=torch.int64)
        active = torch.arange(problems, device=self.penalty.device)
        value, _, residual = self._evaluate(self.logits, None)
        gradient, curvature = self._gradient(residual), self._curvature(residual)
        history: list[tuple[Tensor, Tensor, Tensor]] = []  # step, change of gradient, 1 / (their product) or 0
        stalled = torch.zeros_like(value, dtype=torch.bool)
        for step in range(max_steps + 1):
            size = gradient.abs().amax(dim=(0, 2))
            direction = self._direction(gradient, history, curvature)
            # Half the Newton decrement estimates what is left to gain, which a small gradient alone does not bound
            # where the penalty is weak.
            gain = -0.5 * (direction * gradient).sum(dim=(0, 2))
            done = ((size < tolerance) & (gain <= tolerance * value)) | stalled | (step == max_steps)
            # Taking problems out copies what stays, so it waits until an eighth has finished; those go on meanwhile.
            if 8 * int(done.sum()) >= len(done):
                ids = active[done]
                point[:, ids], objective[ids], largest[ids] = self.point[:, done], value[done], size[done]
                steps[ids.cpu()] = step
                keep = torch.nonzero(~done).squeeze(1)
                if not len(keep):
                    break
                active, value, gradient = active[keep], value[keep], gradient[:, keep]
                curvature, direction = curvature[:, keep], direction[:, keep]
                history = [(s[:, keep], u[:, keep], r[keep]) for s, u, r in history]
                self._keep(keep)
            value, new_gradient, moved, stalled, residual = self._line_search(direction, value, gradient)
            change = new_gradient - gradient
            bend = (moved * change).sum(dim=(0, 2))
            # Too little curvature is rounding: the pair of that problem is then left out, as if never seen.
            fit = bend > 1e-16 * (moved.square().sum(dim=(0, 2)) * change.square().sum(dim=(0, 2))).sqrt()
            rho = torch.where(fit, 1 / torch.where(fit, bend, 1.0), 0.0)
            history = [*history[-(MEMORY - 1) :], (moved, change, rho)]
            gradient = new_gradient
            if step & (step - 1) == 0:  # it changes slowly: looked at after steps 0, 1, 2, 4, 8, ...
                curvature = self._curvature(residual)
        return (*self._raw(point), objective, largest, steps.to(self.penalty.device))

    def _keep(self, index: Tensor) -> None:
        """Take finished problems out of the batch."""
        self.point, self.logits = self.point[:, index], self.logits[:, :, index]
        self.weight, self.closed = self.weight[:, index], self.closed[:, index]
        self.masks, self.penalty = self.masks[index], self.penalty[index]

    def _gradient(self, residual: Tensor) -> Tensor:
        """dJ, [K, P, D + 1]: the data term's, plus the penalty's; the bias is free."""
        gradient = self.design.pullback(residual, self.masks)
        gradient[..., :-1] += self.penalty[:, None] * self.point[..., :-1]
        return gradient

    def _curvature(self, residual: Tensor) -> Tensor:
        """Mean of p (1 - p) over the mask for each logit column, float64[K, P]: how bent the data term is there."""
        size = residual.abs()
        rest = 1 - size / torch.where(self.weight > 0, self.weight, 1.0)[:, None]
        return (size * rest).sum(dim=0)

    def _direction(self, gradient: Tensor, history: list[tuple[Tensor, Tensor, Tensor]], curvature: Tensor) -> Tensor:
        """L-BFGS two-loop recursion of every problem, from the preconditioner as the first guess of the inverse."""
        q = gradient.clone()
        alphas: list[Tensor] = []
        for s, u, rho in reversed(history):
            alpha = rho * (s * q).sum(dim=(0, 2))
            q.addcmul_(u, alpha[:, None], value=-1)
            alphas.append(alpha)
        bend = curvature.clamp(min=1e-12)[..., None]
        q = self.design.precondition(q, bend, self.penalty[:, None], self.masks)
        for (s, u, rho), alpha in zip(history, reversed(alphas), strict=True):
            beta = rho * (u * q).sum(dim=(0, 2))
            q.addcmul_(s, (alpha - beta)[:, None])
        return q.neg_()

    def _evaluate(
        self, logits: Tensor, direction: Tensor | None, chosen: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Data term of J, its slope along `direction` (logits' change) and the residual dJ/dlogits, [n, K, P].

        Rows outside a problem's mask are cut out by a condition, not by a product: their logits may be infinite.
        """
        weight = self.weight[:, chosen]
        if self.columns == 1:  # logits of the second class; that of the first is zero
            sign = torch.where(self.code == 1, 1.0, -1.0).to(logits.dtype)[:, None]
            margin = logits[:, 0] * sign
            loss = torch.nn.functional.softplus(-margin, threshold=math.inf)
            residual = (-sign * weight * torch.sigmoid(-margin))[:, None]
        else:
            log_p = torch.log_softmax(logits, dim=1)
            loss = -log_p[self.row, self.code]
            residual = log_p.exp_()
            residual[self.row, self.code] -= 1
            residual *= weight[:, None]
        residual.masked_fill_((weight == 0)[:, None], 0.0)
        value = torch.where(weight > 0, weight * loss, 0.0).sum(dim=0)
        if direction is None:
            return value, torch.zeros_like(value), residual
        slope = (residual * direction).sum(dim=(0, 1))
        if not torch.isfinite(slope).all():  # zero times the infinite logit of a row outside the mask
            slope = torch.where((weight > 0)[:, None], residual * direction, 0.0).sum(dim=(0, 1))
        return value, slope, residual

    def _line_search(
        self, direction: Tensor, value: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Move along `direction`, each problem by its own step.

        Returns the new value and gradient, the step taken, where none was found, and the residual.

        J is convex along the line, so its slope rises, and a step with a small slope is found by closing a bracket
        with secants: Wolfe's conditions with a slope of at most half the first one.
        """
        along = self.design.product(direction, self.masks)
        slope0 = (direction * gradient).sum(dim=(0, 2))
        v, dv = self.point[..., :-1], direction[..., :-1]
        linear = self.penalty * (v * dv).sum(dim=(0, 2))
        quadratic = self.penalty * dv.square().sum(dim=(0, 2))
        ridge = 0.5 * self.penalty * v.square().sum(dim=(0, 2))
        t = torch.ones_like(value)
        low, high = torch.zeros_like(t), torch.full_like(t, math.inf)
        slope_low, slope_high = slope0.clone(), torch.zeros_like(t)
        new_value = value.clone()
        residual = torch.empty_like(self.logits)
        pending = torch.arange(len(t), device=t.device)
        for _ in range(40):
            everyone = len(pending) == len(t)
            step = t[pending]
            part: Tensor | slice = slice(None) if everyone else pending
            trial = torch.addcmul(self.logits[:, :, part], along[:, :, part], step)
            data, slope, rest = self._evaluate(trial, along[:, :, part], part)
            f = data + ridge[pending] + step * linear[pending] + 0.5 * step**2 * quadratic[pending]
            slope = slope + linear[pending] + step * quadratic[pending]
            if everyone:
                residual = rest
            else:
                residual[:, :, pending] = rest
            new_value[pending] = f
            start = slope0[pending]
            noise = 1e-14 * value[pending].abs()
            falls = f <= value[pending] + 1e-4 * step * start + noise
            good = falls & (slope.abs() <= 0.5 * start.abs() + 1e-300)
            beyond = ~falls | (slope > 0)
            high[pending] = torch.where(beyond, step, high[pending])
            slope_high[pending] = torch.where(beyond, slope, slope_high[pending])
            low[pending] = torch.where(beyond, low[pending], step)
            slope_low[pending] = torch.where(beyond, slope_low[pending], slope)
            pending = pending[~good]
            if not len(pending):
                break
            t[pending] = _next_step(low[pending], high[pending], slope_low[pending], slope_high[pending])
        moved = direction * t[:, None]
        self.point = self.point + moved
        self.logits.addcmul_(along, t)
        stalled = torch.zeros_like(t, dtype=torch.bool)
        stalled[pending] = True
        return new_value, self._gradient(residual), moved, stalled, residual

    def _raw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and intercepts for raw rows, [P, F, C] and [P, C], of all problems of the batch."""
        weight, intercept = self.design.raw(point, self.all_masks)
        if self.columns == 1:
            weight = torch.cat([torch.zeros_like(weight), weight])
            intercept = torch.cat([torch.zeros_like(intercept), intercept])
        else:
            intercept = intercept.masked_fill(self.all_closed, -math.inf)
        return weight.permute(1, 2, 0).contiguous(), intercept.T.contiguous()


def _next_step(low: Tensor, high: Tensor, slope_low: Tensor, slope_high: Tensor) -> Tensor:
    """The secant's zero of the slope, kept inside the bracket; twice to ten times as far while there is no bracket."""
    open_ended = torch.isinf(high)
    width = torch.where(open_ended, 0.0, high - low)
    rise = torch.where(open_ended, 1.0, slope_high - slope_low)
    secant = low - slope_low * width / torch.where(rise > 0, rise, math.inf)
    inside = torch.minimum(torch.maximum(secant, low + 0.1 * width), low + 0.9 * width)
    return torch.where(open_ended, 4 * low, inside)

"""Many penalised logistic regressions over one matrix, solved together along the path of their penalties.

Newton's method, each step solved by preconditioned conjugate gradients whose every vector has a problem axis: a
product with the Hessian costs two products with X, for all problems at once. Three ideas make it fast. The path starts
at the strongest penalty and each solution begins the next, carried on in the direction in which the last one moved. A
Newton step is solved no further than it is worth. And the preconditioner is (curvature x correlation + penalty)^-1,
or, once a penalty has cost more products than that takes, the exact blocks of the Hessian, one a class.

Source: Nocedal and Wright, Numerical Optimization (2006), chapter 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kladi.evaluate.readouts.designs import Design

BLOCK_BYTES = 256 * 2**20
"""Room for the blocks of the Hessian; where they need more, the first preconditioner stays."""
MOST_PRODUCTS = 500
"""Products that one Newton step may cost: beyond, rounding has cost the directions their conjugacy."""
Precondition = Callable[[Tensor], Callable[[Tensor], Tensor]]
"""Which problems, int64[P'], -> (vector [K, P', D + 1] -> about the inverse Hessian times the vector)."""


@dataclass
class Solution:
    """Raw weights [P, F, C], intercepts [P, C], objective [P], largest gradient entry [P], products [P]."""

    weight: Tensor
    intercept: Tensor
    objective: Tensor
    gradient: Tensor
    steps: Tensor


class Batch:
    """P problems, one a training mask. Shapes: n rows, K logit columns, D coordinates.

    `point` is [K, P, D + 1], the last entry of a row being the bias; `logits` is [n, K, P]: P innermost makes the
    softmax over K a vectorised one, and [K P, D] the operand of both products.

    Args:
        design: the rows, as each problem sees them.
        masks: int64[P], ascending, the training mask of each problem.
        code: int64[n], class of each row as 0..C-1.
        weight: [n, P], weights that sum to one over a problem's mask, zero outside.
        seen: bool[P, C], the classes that occur in a problem's mask.
    """

    def __init__(self, *, design: Design, masks: Tensor, code: Tensor, weight: Tensor, seen: Tensor) -> None:
        self.design, self.masks, self.code, self.weight = design, masks, code, weight
        self.row = torch.arange(len(code), device=code.device)
        self.closed = ~seen.T
        # Two classes: one logit, of the second class; that of the first is zero.
        self.columns = seen.shape[1] if seen.shape[1] > 2 else 1
        self.point = weight.new_zeros(self.columns, len(masks), design.width + 1)
        self.logits = weight.new_zeros(design.rows, self.columns, len(masks))
        if self.columns > 1:  # a class that a problem never saw has no column there
            self.logits.masked_fill_(self.closed, -math.inf)
        self.moved = torch.zeros_like(self.point)

    def solve(self, penalty: Tensor, tolerance: float, most: int, *, costly: bool) -> Solution:
        """The optimum for one penalty a problem [P], from where the last call left off.

        Args:
            penalty: not above that of the last call, or the start is a bad one.
            tolerance: of the largest gradient entry, and of what is left to gain relative to the objective.
            most: products with the Hessian that a problem may cost.
            costly: whether many products are to be expected, so that exact blocks are worth their price.
        """
        before, problems = self.point.clone(), len(self.masks)
        spent = torch.zeros(problems, dtype=torch.int64, device=penalty.device)
        stalled = torch.zeros(problems, dtype=torch.bool, device=penalty.device)
        self._carry_on(penalty)
        precondition: Precondition | None = None
        while True:
            value, gradient = self._state(penalty)
            size = gradient.abs().amax(dim=(0, 2))
            if precondition is None:
                precondition = self._preconditioner(penalty, blocks=costly)
            # A small gradient alone does not bound what is left to gain where the penalty is weak.
            rest = precondition(torch.arange(problems, device=penalty.device))(gradient)
            gain = 0.5 * (rest * gradient).sum(dim=(0, 2))
            open_ = ~(((size < tolerance) & (gain <= tolerance * value)) | stalled | (spent >= most))
            part = torch.nonzero(open_).squeeze(1)
            if not len(part):
                break
            direction, products = self._newton_step(part, gradient, size, penalty, tolerance, precondition, most, spent)
            spent[part] += products
            stalled[part] = ~self._move(part, direction, gradient, value, penalty)
        self.moved = self.point - before
        return Solution(*self._raw(), value, size, spent)

    def _carry_on(self, penalty: Tensor) -> None:
        """Begin where the path leads, for each problem in which that is lower than where it stands."""
        along = self.design.product(self.moved, self.masks)
        here = self._value(self.logits, self.point, penalty)
        there = self._value(self.logits + 0.9 * along, self.point + 0.9 * self.moved, penalty)
        share = torch.where(there < here, 0.9, 0.0)
        self.point = self.point + share[:, None] * self.moved
        self.logits.addcmul_(along, share)

    def _state(self, penalty: Tensor) -> tuple[Tensor, Tensor]:
        """J [P] and dJ [K, P, D + 1]; the bias is free of the penalty."""
        loss, residual = self._evaluate(self.logits, slice(None))
        gradient = self.design.pullback(residual, self.masks)
        gradient[..., :-1] += penalty[:, None] * self.point[..., :-1]
        return loss + self._ridge(self.point, penalty), gradient

    def _newton_step(
        self,
        part: Tensor,
        gradient: Tensor,
        size: Tensor,
        penalty: Tensor,
        tolerance: float,
        precondition: Precondition,
        most: int,
        spent: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Conjugate gradients on H d = -g for the problems in `part`: d [K, P', D + 1] and the products each took."""
        masks, ridge = self.masks[part], penalty[part][:, None]
        share, outside = self._probability(part), (self.weight[:, part] == 0)[:, None]
        weighted = (share if self.columns > 1 else share * (1 - share)) * self.weight[:, part][:, None]
        some_outside = bool(outside.any())
        rest = -gradient[:, part]
        step, first = torch.zeros_like(rest), _norm(rest)
        # Far from the optimum a rough step does as well; near it, the step is to end below the tolerance.
        enough = torch.maximum(0.3 * first.sqrt().clamp(max=0.3), 0.3 * tolerance / size[part]).clamp(max=0.3) * first
        invert = precondition(part)
        z = invert(rest)
        along, product = z, (rest * z).sum(dim=(0, 2))
        products = torch.zeros_like(part)
        running = torch.ones_like(part, dtype=torch.bool)
        for _ in range(MOST_PRODUCTS):
            change = self.design.product(along, masks)
            bent = weighted * change
            if self.columns > 1:
                bent.addcmul_(weighted, (share * change).sum(dim=1, keepdim=True), value=-1)
            if some_outside:  # rows whose change may be infinite, times zero
                bent.masked_fill_(outside, 0.0)
            curved = self.design.pullback(bent, masks)
            curved[..., :-1] += ridge * along[..., :-1]
            length = product / (along * curved).sum(dim=(0, 2)).clamp(min=1e-300)
            length = torch.where(running, length, 0.0)[:, None]
            step.addcmul_(along, length)
            rest = rest.addcmul(curved, length, value=-1)
            products += running
            running &= (_norm(rest) > enough) & (spent[part] + products < most)
            if not running.any():
                break
            z = invert(rest)
            new = (rest * z).sum(dim=(0, 2))
            along = z.addcmul(along, (new / product.clamp(min=1e-300))[:, None])
            product = new
        return step, products

    def _move(self, part: Tensor, step: Tensor, gradient: Tensor, value: Tensor, penalty: Tensor) -> Tensor:
        """Go along the step, halved until J falls enough; whether it did, bool[P'].

        The logits are linear in the step, so a trial costs no product with X.
        """
        along = self.design.product(step, self.masks[part])
        slope = (step * gradient[:, part]).sum(dim=(0, 2))
        length = torch.ones_like(slope)
        noise = 1e-14 * value[part].abs()
        for _ in range(40):
            logits = torch.addcmul(self.logits[:, :, part], along, length)
            point = self.point[:, part] + length[:, None] * step
            loss, _ = self._evaluate(logits, part)
            falls = loss + self._ridge(point, penalty[part]) <= value[part] + 1e-4 * length * slope + noise
            if falls.all():
                break
            length = torch.where(falls, length, length / 2)
        length = torch.where(falls, length, 0.0)
        self.point[:, part] += length[:, None] * step
        self.logits[:, :, part] = torch.addcmul(self.logits[:, :, part], along, length)
        return falls

    def _preconditioner(self, penalty: Tensor, *, blocks: bool) -> Precondition:
        """About the inverse Hessian at this point: w p (1 - p) of each row bends its logit."""
        share = self._probability(slice(None))
        bend = (share * (1 - share)).mul_(self.weight[:, None]).masked_fill_((self.weight == 0)[:, None], 0.0)
        if blocks and 8 * self.columns * len(self.masks) * (self.design.width + 1) ** 2 <= BLOCK_BYTES:
            # Inverted once: a triangular solve reads the same numbers at a seventh of a product's speed.
            inverse = torch.cholesky_inverse(self.design.factors(bend, penalty, self.masks))

            def exact(part: Tensor) -> Callable[[Tensor], Tensor]:
                some = inverse if len(part) == len(self.masks) else inverse[:, part]  # copied once a step
                return lambda vector: (vector[..., None, :] @ some)[..., 0, :]

            return exact
        mean = bend.sum(dim=0).clamp(min=1e-12)[..., None]

        def rough(part: Tensor) -> Callable[[Tensor], Tensor]:
            bent, ridge, masks = mean[:, part], penalty[part][:, None], self.masks[part]
            return lambda vector: self.design.precondition(vector, bent, ridge, masks)

        return rough

    def _probability(self, part: Tensor | slice) -> Tensor:
        """Of each logit column, [n, K, P']."""
        logits = self.logits[:, :, part]
        return torch.sigmoid(logits) if self.columns == 1 else torch.softmax(logits, dim=1)

    def _value(self, logits: Tensor, point: Tensor, penalty: Tensor) -> Tensor:
        loss, _ = self._evaluate(logits, slice(None))
        return loss + self._ridge(point, penalty)

    def _ridge(self, point: Tensor, penalty: Tensor) -> Tensor:
        return 0.5 * penalty * point[..., :-1].square().sum(dim=(0, 2))

    def _evaluate(self, logits: Tensor, part: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Data term of J and the residual dJ/dlogits, [n, K, P'].

        Rows outside a problem's mask are cut out by a condition, not by a product: their logits may be infinite.
        """
        weight = self.weight[:, part]
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
        return torch.where(weight > 0, weight * loss, 0.0).sum(dim=0), residual

    def _raw(self) -> tuple[Tensor, Tensor]:
        """Weights and intercepts for raw rows, [P, F, C] and [P, C]."""
        weight, intercept = self.design.raw(self.point, self.masks)
        if self.columns == 1:
            weight = torch.cat([torch.zeros_like(weight), weight])
            intercept = torch.cat([torch.zeros_like(intercept), intercept])
        else:
            intercept = intercept.masked_fill(self.closed, -math.inf)
        return weight.permute(1, 2, 0).contiguous(), intercept.T.contiguous()


def _norm(vector: Tensor) -> Tensor:
    """Of each problem, [P]."""
    return vector.square().sum(dim=(0, 2)).sqrt()

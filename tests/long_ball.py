"""Thousands of float32 steps in a ball whose curvature is learned; a process of its own, without checks of types.

Prints the first loss, the last, and the curvature at the end; fails where a number is not finite.
"""

import torch

from kladi.losses.contrast_ball import contrast_in_ball
from kladi.losses.geometry import LearnedCurvature
from kladi.losses.label_tree import pair_tables

STEPS = 4_000


def main() -> None:
    torch.set_num_threads(1)
    classes = torch.tensor([0, 0, 1, 2, 3, 1, 2, 0, 3])
    kin = torch.tensor([[1, 0.5, 0, 0], [0.5, 1, 0, 0], [0, 0, 1, 0.5], [0, 0, 0.5, 1]])
    tables, bend = pair_tables(kin, temperature=0.2, geometry="poincare"), LearnedCurvature(0.1)
    # From next to the centre, where a norm squares to nothing, to far beyond the clip.
    size = torch.tensor([1e-15, 1e-7, 1e-3, 0.1, 1.0, 2.3, 10.0, 1e6, 0.0])[:, None]
    z = (2 * torch.randn(9, 3, generator=torch.Generator().manual_seed(0)) * size).requires_grad_()
    optimizer = torch.optim.AdamW([z, bend.logit], lr=0.01)
    values = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        ball = bend()
        value, _ = contrast_in_ball(ball.embed(z), classes, tables, ball)
        value.backward()
        optimizer.step()  # a gradient that is no number would stay in its moments, and in all that follows
        values.append(value.detach())
    assert torch.stack(values).isfinite().all()
    assert z.isfinite().all()
    print(values[0].item(), values[-1].item(), bend().number)


if __name__ == "__main__":
    main()

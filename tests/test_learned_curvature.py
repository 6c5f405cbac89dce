"""The ball whose curvature is a parameter: gradients, limits, prototypes that move along, a run that learns it."""

import copy
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from kladi.evaluate.pretraining import of_run, space_of
from kladi.learn.console import Silent
from kladi.learn.fit import fit
from kladi.losses import HierarchyWeightedContrastiveLoss, LevelAwareMarginLoss
from kladi.losses.geometry import REACH, LearnedCurvature, PoincareBall
from kladi.structure.taxonomy import Taxonomy

TAX = Taxonomy.from_paths(["A/x", "A/y", "B/z", "B/w"])
NAMES = ["A/x", "A/x", "A/y", "B/z", "B/w", "A/y", "B/z", "A/x", "B/w"]
TARGET = torch.from_numpy(np.array(TAX.index(NAMES), dtype=np.int64))


def rows(seed: int = 0, V: int = 2, D: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(V, len(NAMES), D, generator=generator, dtype=torch.float64)  # some meet the clip


def contrast(curvature, **arguments):
    return HierarchyWeightedContrastiveLoss(TAX, geometry="poincare", curvature=curvature, **arguments)


def gradient_of_both(loss, z):
    learned = loss.learned.logit.detach().clone().requires_grad_()
    asked = (z.requires_grad_(), learned)
    return torch.autograd.gradcheck(
        lambda z, a: torch.func.functional_call(loss, {"learned.logit": a}, (z, TARGET)), asked
    )


@pytest.mark.parametrize("temperature", [0.2, 0.002])  # one exponential a pair; a running log-sum-exp
@pytest.mark.parametrize(("mode", "positives"), list(itertools.product(["scale", "mass"], ["leaf", "view", "graded"])))
def test_contrast_gradcheck(mode, positives, temperature):
    bend = LearnedCurvature(0.3).double()
    loss = contrast(bend, temperature=temperature, mode=mode, positives=positives)
    assert gradient_of_both(loss, rows())
    fixed = contrast(bend().curvature.item(), temperature=temperature, mode=mode, positives=positives)
    z, w = rows().requires_grad_(), rows().requires_grad_()
    value, want = loss(z, TARGET), fixed(w, TARGET)
    value.backward()
    want.backward()
    assert value.item() == pytest.approx(want.item(), abs=1e-14)
    assert torch.allclose(z.grad, w.grad, atol=1e-13)


def test_equal_rows_have_a_finite_slope():
    """Rows that meet are at distance zero in every ball: they pull at nothing."""
    z, loss = rows(), contrast(LearnedCurvature(0.3).double())
    z[:, 1] = z[:, 0]
    z[1] = z[0]
    loss(z, TARGET).backward()
    slope = loss.learned.logit.grad.item()
    step = 1e-3  # the forward's own rounding puts them some 1e-8 apart
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(loss)
        moved.learned.logit.data += sign * step
        values.append(moved(z, TARGET).item())
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-3)


def test_prototype_gradcheck():
    loss = LevelAwareMarginLoss(TAX, 3, geometry="poincare", curvature=LearnedCurvature(0.3)).double()
    loss(rows(9), TARGET)
    loss.eval()
    assert loss(rows(), TARGET) > 0
    # Prototypes keep their share of the radius, which the check must not see as a way of the curvature to the loss.
    assert gradient_of_both(_with_prototypes_at_rest(loss), rows())


def _with_prototypes_at_rest(loss):
    points = loss.prototypes * loss._rim(loss.space)
    loss._rim = lambda space: 1.0
    loss.prototypes.copy_(points)
    return loss


def test_prototypes_keep_their_place_between_centre_and_rim():
    bend = LearnedCurvature(0.1)
    loss = LevelAwareMarginLoss(TAX, 3, geometry="poincare", curvature=bend)
    fixed = LevelAwareMarginLoss(TAX, 3, geometry="poincare", curvature=bend().curvature.item())
    z = rows().float()
    assert loss(z, TARGET) == fixed(z, TARGET) == 0
    share = math.sqrt(bend().curvature.item())
    assert torch.allclose(loss.prototypes, fixed.prototypes * share, atol=1e-6)
    assert loss(z, TARGET).item() == pytest.approx(fixed(z, TARGET).item(), abs=1e-6)
    bend.logit.data += 12  # to a ball of a third of the radius, in which the old points would lie outside
    assert loss(z, TARGET).isfinite()
    assert (loss.prototypes.norm(dim=1) < 1).all()


@pytest.mark.parametrize("logit", [-80.0, -20.0, 0.0, 20.0, 80.0])
def test_every_parameter_is_a_ball_that_float32_holds(logit):
    bend = LearnedCurvature(0.1, clip=1.5)
    bend.logit.data.fill_(logit)
    ball = bend()
    assert 0 < ball.curvature <= (REACH / 1.5) ** 2
    loss = HierarchyWeightedContrastiveLoss(TAX, geometry="poincare", curvature=bend, clip=1.5)
    z = rows().float().requires_grad_()
    loss(z, TARGET).backward()
    assert z.grad.isfinite().all()
    assert bend.logit.grad.isfinite()


def test_it_begins_where_it_is_told():
    assert LearnedCurvature(0.25, clip=2.0)().curvature.item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"geometry": "sphere"}, "poincare"),
        ({"geometry": "poincare", "clip": 1.0}, "clip"),
    ],
)
def test_a_space_without_that_curvature_is_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        HierarchyWeightedContrastiveLoss(TAX, curvature=LearnedCurvature(0.1), **arguments)


@pytest.mark.parametrize("clip", [0.0, -1.0, math.inf])
def test_an_impossible_clip_is_refused(clip):
    with pytest.raises(ValueError, match="clip must be positive"):
        LearnedCurvature(0.1, clip)


@pytest.mark.parametrize("start", [0.0, -1.0, 2.0, math.nan])
def test_a_beginning_out_of_range_is_refused(start):
    with pytest.raises(ValueError, match="begin between"):
        LearnedCurvature(start)


@pytest.mark.slow
def test_thousands_of_float32_steps_stay_finite():
    """From 1e-15 from the centre and from far beyond the clip, the curvature learned."""
    script = Path(__file__).parent / "long_ball.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    first, last, curvature = map(float, done.stdout.split())
    assert last < first
    assert abs(curvature - 0.1) > 1e-3


# --- in a run ---------------------------------------------------------------------------------------------------------

LEARNT = {"objective__args": {"geometry": "poincare", "learn_curvature": True}, "train__lr": 0.03}


def test_a_run_learns_it_and_evaluation_measures_in_it(tmp_path):
    data = tiny.data()
    fit(data, tiny.settings(**LEARNT), tmp_path, progress=Silent())
    described = json.loads((tmp_path / "config.json").read_text())["kladi"]["objective"]["args"]
    assert abs(described["curvature"] - 0.1) > 1e-4
    assert space_of(tmp_path) == of_run(tmp_path, data).space == PoincareBall(described["curvature"], 2.3)
    looks = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["curvature"] for line in looks if "curvature" in line][-1] == described["curvature"]
    assert f"curvature {described['curvature']:.3g}, learned" in (tmp_path / "log.txt").read_text()


def test_what_is_not_learned_is_not_said(tmp_path):
    fit(tiny.data(), tiny.settings(train__epochs=1), tmp_path, progress=Silent())
    assert "curvature" not in (tmp_path / "metrics.jsonl").read_text()
    assert "curvature" not in json.loads((tmp_path / "config.json").read_text())["kladi"]["objective"]["args"]

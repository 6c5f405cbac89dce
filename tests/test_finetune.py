"""Fine-tuning: it learns, repeats, leaves the encoder alone, and reads no test label before it answers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import tiny
from kladi.evaluate import metrics
from kladi.evaluate.answers import Task
from kladi.evaluate.evaluation import random_encoder
from kladi.evaluate.measure import parts_of
from kladi.evaluate.readouts import finetune
from kladi.evaluate.readouts.criteria import Criterion, judges
from kladi.evaluate.readouts.finetune import Recipe, begin, fine_tune
from kladi.evaluate.splits import TEST, TRAIN, UNUSED, VAL, make_splits
from kladi.structure.taxonomy import Taxonomy

QUICK = Recipe(steps=30, epochs=0, batch=16, encoder_lr=3e-3, head_lr=3e-2, scales=(1.0,), looks=3)


@pytest.fixture(scope="module")
def setting():
    """Striped against plain pictures, which an untrained network half knows."""
    data = tiny.data(n=120)
    config = tiny.settings()
    names = np.array(data.taxonomy.names)[data.target]
    flat = Taxonomy.from_edges([("plain", None), ("striped", None)])
    target = np.array(flat.index([name.rpartition("/")[2] for name in names]))
    task = Task("texture", flat, target, data.group)
    (part, *_) = parts_of(make_splits(data.row_id, target, data.group, folds=3, repeats=1), data.row_id)
    encoder = random_encoder(config.encoder, config.intensity, seed=0)
    return encoder, data, task, part, config


def tuned(setting, recipe=QUICK, seed=0, **changes):
    encoder, data, task, part, config = setting
    named = {"task": task, "part": part, **changes}
    start = begin(encoder, data, named["task"], named["part"], config.intensity)
    found = start and fine_tune(start, data, named["task"], named["part"], config, recipe, seed=seed)
    return found and found.answers


def test_it_answers_every_test_row_better_than_chance(setting):
    answers = tuned(setting, dataclasses.replace(QUICK, steps=60))
    _, _, task, part, _ = setting
    np.testing.assert_array_equal(answers.rows, np.flatnonzero(part.of == TEST))
    np.testing.assert_allclose(np.exp(answers.scores).sum(axis=1), 1, rtol=1e-5)
    assert metrics.balanced_accuracy(answers.pred, task.target[answers.rows]) > 0.7


def test_the_encoder_stays_as_it_was_and_the_answers_repeat(setting):
    before = {name: tensor.clone() for name, tensor in setting[0].state_dict().items()}
    first, second = tuned(setting), tuned(setting)
    np.testing.assert_array_equal(first.scores, second.scores)
    assert all(torch.equal(tensor, before[name]) for name, tensor in setting[0].state_dict().items())
    assert (tuned(setting, seed=1).scores != first.scores).any()


def test_test_labels_and_rows_outside_the_fold_change_nothing(setting):
    _, _, task, part, _ = setting
    other = task.target.copy()
    other[part.of == TEST] = 1 - other[part.of == TEST]
    changed = dataclasses.replace(task, target=other)
    np.testing.assert_array_equal(tuned(setting).scores, tuned(setting, task=changed).scores)
    fewer = dataclasses.replace(
        part, of=np.where(np.arange(120) == np.flatnonzero(part.of == TEST)[0], UNUSED, part.of)
    )
    np.testing.assert_array_equal(tuned(setting).scores[1:], tuned(setting, part=fewer).scores)


def test_the_start_is_the_probe_of_settled_features(setting):
    """Running statistics of the training rows, then their probe: nothing of the encoder's own is read."""
    encoder, data, task, part, config = setting
    start = begin(encoder, data, task, part, config.intensity)
    classes = start.probes.classes
    (judge,) = judges(Criterion(), task.taxonomy, classes)
    model = finetune.Classifier(start.encoder, finetune._head(start, judge))
    train = part.rows(TRAIN)
    first = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    seen = []
    hook = first.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    log_p = finetune.log_probabilities(model, data, train, config.intensity)
    hook.remove()
    mean = torch.cat(seen).mean(dim=(0, 2, 3))
    torch.testing.assert_close(first.running_mean, mean, rtol=1e-4, atol=1e-5)
    assert metrics.balanced_accuracy(classes[log_p.argmax(dim=1).numpy()], task.target[train]) > 0.8
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean += 3
    settled = begin(encoder, data, task, part, config.intensity).encoder
    again = finetune.Classifier(settled, finetune._head(start, judge))
    encoder.load_state_dict(before)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name])


def test_the_best_look_is_kept_as_a_copy(setting, monkeypatch):
    """Looks whose scores are made up: the state of the best one answers, not the last."""
    seen = []
    keep = finetune._keep

    def scored(model, fold, best):
        before = best.state
        keep(model, fold, best)
        if len(seen) != 1:  # only the second look counts
            best.state = before
        else:
            best.score = (2.0, 0.0)
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    kept = {}
    load = torch.nn.Module.load_state_dict
    monkeypatch.setattr(finetune, "_keep", scored)
    monkeypatch.setattr(
        finetune.Classifier, "load_state_dict", lambda self, state: (kept.update(state), load(self, state))[1]
    )
    tuned(setting)
    assert len(seen) == 3
    name = "head.weight"
    assert torch.equal(kept[name], seen[1][name])
    assert not torch.equal(kept[name], seen[2][name])


@pytest.mark.parametrize("scales", [(1e-6, 1.0), (1.0, 1e-6)])
def test_the_scale_that_validation_rows_chose_is_said(setting, scales):
    encoder, data, task, part, config = setting
    start = begin(encoder, data, task, part, config.intensity)
    start.probes.weight[:] = 0  # so that standing still is worse than learning
    found = fine_tune(start, data, task, part, config, dataclasses.replace(QUICK, steps=60, scales=scales))
    assert found.scale == 1.0


def test_a_fold_without_two_classes_gives_no_answers(setting):
    _, _, task, part, _ = setting
    one = dataclasses.replace(part, of=np.where((part.of == TRAIN) & (task.target == 1), UNUSED, part.of))
    assert tuned(setting, part=one) is None
    nobody = dataclasses.replace(part, of=np.where(part.of == TEST, UNUSED, part.of))
    assert tuned(setting, part=nobody) is None


def test_without_validation_rows_it_still_answers(setting):
    _, _, _, part, _ = setting
    none = dataclasses.replace(part, of=np.where(part.of == VAL, UNUSED, part.of))
    assert np.isfinite(tuned(setting, part=none).scores).all()
    start = begin(setting[0], setting[1], setting[2], none, setting[4].intensity)
    assert fine_tune(start, *setting[1:3], none, setting[4], QUICK).scale is None

"""The published recipes: what they train, what they answer by, against a naive statement of them."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import tiny
from kladi.data.views import augment, philox
from kladi.evaluate.answers import Task
from kladi.evaluate.evaluation import random_encoder
from kladi.evaluate.measure import parts_of
from kladi.evaluate.readouts.published import COMPAT, published
from kladi.evaluate.splits import TEST, TRAIN, VAL, make_splits
from kladi.learn.training import seed_of

PAPER, RELEASED = COMPAT["paper"], COMPAT["released"]


@pytest.fixture(scope="module")
def setting():
    data, config = tiny.data(n=90), tiny.settings()
    target = (data.target >= np.median(data.target)).astype(np.int64)
    tree = data.taxonomy.from_edges([("a", None), ("b", None)])
    task = Task("half", tree, target, data.group)
    (part, *_) = parts_of(make_splits(data.row_id, target, data.group, folds=3, repeats=1), data.row_id)
    return random_encoder(config.encoder, config.intensity, seed=0), data, task, part, config.intensity


def answered(setting, regime, recipe, **options):
    encoder, data, task, part, intensity = setting
    return published(encoder, data, task, part, intensity, regime, recipe, **options)


def naive_probe(setting, lr, best, adapting):
    """Ten epochs of Adam on a linear layer, written out; log-probabilities of the test rows."""
    encoder, data, task, part, intensity = setting
    encoder = copy.deepcopy(encoder)

    def images(rows):
        return augment.plain(torch.from_numpy(data.store.gather(rows)), data.store.extent[rows], intensity)

    torch.manual_seed(seed_of(0, "published head"))
    head = nn.Linear(encoder.width, 2)
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    target = torch.from_numpy(task.target)
    rows, kept, least = part.rows(TRAIN), None, float("inf")
    for epoch in range(10):
        for group in optimizer.param_groups:
            group["lr"] = lr if epoch < 5 else lr / 10
        order = rows[philox.epoch_order(0, epoch, data.row_id[rows])]
        for start in range(0, len(order), 32):
            index = order[start : start + 32]
            encoder.train(adapting)
            with torch.no_grad():
                shown = encoder(images(index))
            optimizer.zero_grad()
            functional.cross_entropy(head(shown), target[index]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = functional.cross_entropy(head(encoder.eval()(images(part.rows(VAL)))), target[part.rows(VAL)]).item()
        if not best or loss < least:
            least, kept = loss, copy.deepcopy(head)
    with torch.no_grad():
        return functional.log_softmax(kept(encoder.eval()(images(part.rows(TEST)))), dim=1).numpy()


@pytest.mark.parametrize(
    ("recipe", "lr", "best", "adapting"), [(PAPER, 1e-4, True, False), (RELEASED, 1e-3, False, True)]
)
def test_the_probe_is_what_it_says(setting, recipe, lr, best, adapting):
    found = answered(setting, "probe", recipe)
    np.testing.assert_allclose(found.scores, naive_probe(setting, lr, best, adapting), atol=1e-5)
    np.testing.assert_array_equal(found.rows, setting[3].rows(TEST))


def test_fine_tuning_trains_the_encoder_and_leaves_the_callers_alone(setting):
    before = {name: value.clone() for name, value in setting[0].state_dict().items()}
    tuned, probed = answered(setting, "finetune", PAPER), answered(setting, "probe", PAPER)
    assert np.abs(tuned.scores - probed.scores).max() > 1e-3
    np.testing.assert_array_equal(tuned.scores, answered(setting, "finetune", PAPER).scores)
    assert all(torch.equal(value, before[name]) for name, value in setting[0].state_dict().items())
    assert all(p.requires_grad for p in setting[0].parameters())


def test_the_released_fine_tuning_takes_features_for_classes(setting):
    headless = answered(setting, "finetune", RELEASED)
    assert headless.scores.shape[1] == 2
    assert (np.exp(headless.scores).sum(axis=1) < 0.999).any()  # the other features had their share
    fair = answered(setting, "finetune", dataclasses.replace(RELEASED, headless=False))
    np.testing.assert_allclose(np.exp(fair.scores).sum(axis=1), 1, rtol=1e-5)


def test_test_labels_change_nothing(setting):
    encoder, data, task, part, intensity = setting
    turned = task.target.copy()
    turned[part.rows(TEST)] = 1 - turned[part.rows(TEST)]
    other = dataclasses.replace(task, target=turned)
    one = published(encoder, data, task, part, intensity, "finetune", PAPER)
    two = published(encoder, data, other, part, intensity, "finetune", PAPER)
    np.testing.assert_array_equal(one.scores, two.scores)

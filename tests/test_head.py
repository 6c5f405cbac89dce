"""The classifier that is trained with the encoder: kept in the run, asked in evaluation, in the names of the tree."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from kladi.data.dataset import TRAIN
from kladi.errors import UserError
from kladi.evaluate.answers import Task
from kladi.evaluate.embed import embed
from kladi.evaluate.measure import Method, measure
from kladi.evaluate.pretraining import own_answers
from kladi.evaluate.readouts.regimes import OwnAnswers, Part
from kladi.evaluate.splits import TEST
from kladi.learn.console import Silent
from kladi.learn.fit import fit
from kladi.models import backbones, heads
from kladi.structure.parts import above, with_leaves
from kladi.structure.taxonomy import Taxonomy

TAX = Taxonomy.from_paths(["A/a", "A/b/x", "A/b/y", "B/c", "C"])


def test_the_part_above_labels():
    part, place = above(TAX, TAX.index(["A/b/x", "A/b"]))
    assert part.names == ("A", "A/b", "A/b/x")
    assert [part.names[p] for p in place[TAX.index(["A", "A/b", "A/b/x"])]] == ["A", "A/b", "A/b/x"]
    assert (place[TAX.index(["A/a", "C", "A/b/y"])] == -1).all()


def test_every_label_a_leaf():
    labels = TAX.index(["A/b", "A/b/x", "C"])
    part, leaf = with_leaves(TAX, labels)
    assert [part.names[v] for v in leaf] == ["A/b (itself)", "A/b/x", "C"]
    assert set(leaf) == set(part.leaves)
    flat, same = with_leaves(TAX, TAX.index(["A/a", "C"]))
    assert [flat.names[v] for v in same] == ["A/a", "C"]


@pytest.mark.parametrize("name", ["cross_entropy", "tree_cross_entropy", "hxe", "soft_labels"])
def test_a_run_keeps_its_classifier_and_answers_with_it(tmp_path, name):
    data = tiny.data()
    changes = {"objective__name": name, "train__epochs": 30, "train__lr": 0.01, "encoder__args": {}}
    fit(data, tiny.settings(**changes), tmp_path, progress=Silent())
    found = embed(backbones.load(tmp_path), data, head=heads.load(tmp_path))
    own = own_answers(tmp_path, found.z)
    assert own.log_p.shape == (len(data), len(own.names))
    assert set(own.names) == {data.taxonomy.names[t] for t in np.unique(data.target[data.split == TRAIN])}
    assert (np.exp(own.log_p).sum(1) < 1 + 1e-5).all()
    pred = data.taxonomy.index([own.names[k] for k in own.log_p.argmax(1)])
    right = (pred == data.target)[data.split == TRAIN].mean()
    assert right > 0.5, right  # it was trained on these


def test_answers_are_scored_where_the_task_scores():
    """An answer below a scored class counts as it, with the sum of the probabilities; unknown names are left out."""
    names = ("A/a", "A/b/x", "A/b/y", "Z/unknown")
    log_p = np.log(np.array([[0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.1, 0.3]]))
    target = TAX.index(["A/b", "A/a"])
    task = Task("label", TAX, target, np.arange(2))
    method = Method("m", np.zeros((2, 3), np.float32), own=OwnAnswers(log_p, names))
    measured = measure(method, task, (Part(0, 0, np.full(2, TEST)),), regimes=["head"])
    (answers,) = measured.answers
    assert [TAX.names[c] for c in answers.classes] == ["A/a", "A/b"]
    np.testing.assert_allclose(np.exp(answers.scores), [[4 / 9, 5 / 9], [5 / 7, 2 / 7]])
    assert answers.pred.tolist() == target.tolist()
    without = measure(dataclasses.replace(method, own=None), task, (Part(0, 0, np.full(2, TEST)),), regimes=["head"])
    assert not without.rows


def test_what_a_classifier_does_not_know_is_said():
    names, log_p = ("A/a", "A/b/x", "Z/unknown"), np.log(np.full((4, 3), 1 / 3))
    target = TAX.index(["A/a", "A/b/x", "B/c", "A/b"])
    task = Task("label", TAX, target, np.arange(4))
    method = Method("m", np.zeros((4, 3), np.float32), own=OwnAnswers(log_p, names))
    measured = measure(method, task, (Part(0, 0, np.full(4, TEST)),), regimes=["head"])
    said = " | ".join(measured.warnings)
    assert "1 of its 3 labels are none of the task's" in said
    assert 'it knows no label of "B/c"' in said
    assert "1 images whose label has other classes below it are left out" in said
    assert measured.answers[0].rows.tolist() == [0, 1, 2]
    np.testing.assert_allclose(np.exp(measured.answers[0].scores).sum(1), 1)
    lone = dataclasses.replace(method, own=OwnAnswers(log_p[:, :1], names[:1]))
    assert not measure(lone, task, (Part(0, 0, np.full(4, TEST)),), regimes=["head"]).rows


@pytest.mark.parametrize("answers", ["foo", {"columns": ["a"]}, {"columns": 5, "nodes": []}])
def test_tampered_answers_are_a_damaged_run(tmp_path, answers):
    fit(tiny.data(), tiny.settings(objective__name="hxe", train__epochs=1), tmp_path, progress=Silent())
    described = json.loads((tmp_path / "config.json").read_text())
    described["kladi"]["objective"]["answers"] = answers
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="the run is damaged"):
        heads.classifier(tmp_path)


def test_a_run_without_a_classifier_has_none(tmp_path):
    fit(tiny.data(), tiny.settings(train__epochs=1), tmp_path, progress=Silent())
    assert heads.classifier(tmp_path) is None
    assert own_answers(tmp_path, np.zeros((3, 8), np.float32)) is None


def test_a_damaged_classifier_is_refused(tmp_path):
    changes = {"objective__name": "tree_cross_entropy", "train__epochs": 1}
    fit(tiny.data(), tiny.settings(**changes), tmp_path, progress=Silent())
    tensors = load_file(tmp_path / "head.safetensors")
    name = next(name for name in tensors if name.endswith("classifier.bias"))
    save_file({**tensors, name: torch.zeros(2)}, tmp_path / "head.safetensors")
    with pytest.raises(UserError, match="does not fit the description"):
        heads.classifier(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["kladi"]["objective"]["answers"]["nodes"]

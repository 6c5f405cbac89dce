"""What a run began with: what earlier stages read and saw counts as read and seen, and can be said."""

import dataclasses
import json

import numpy as np
import pytest

import kladi
import tiny
from kladi import config as settings
from kladi.data.dataset import HELD_OUT, TRAIN
from kladi.errors import UserError
from kladi.evaluate import pretraining, protocol
from kladi.evaluate.embed import embed
from kladi.learn import lineage
from kladi.learn.console import Silent
from kladi.learn.fit import fit
from kladi.learn.lineage import Stage
from kladi.study import arms


def with_trained(data, some):
    """The data set where `some` is what training may see."""
    return dataclasses.replace(data, split=np.where(some, TRAIN, HELD_OUT))


@pytest.fixture
def stages(tmp_path):
    """Three runs, each of which begins with the one before: of labels, of views, of views; the first saw other rows."""
    data = tiny.data()
    half = np.arange(len(data)) % 2 == 0
    fit(with_trained(data, half), tiny.settings(objective__name="supcon"), tmp_path / "a", progress=Silent())
    views = {"objective__name": "simclr", "train__epochs": 1}
    for name, before in (("b", "a"), ("c", "b")):
        config = tiny.settings(**views, init__weights=str(tmp_path / before))
        fit(with_trained(data, ~half), config, tmp_path / name, progress=Silent())
    return data, half, tmp_path


def test_what_was_before_counts(stages):
    data, half, runs = stages
    first, last = (pretraining.of_run(runs / name, data) for name in ("a", "c"))
    assert [stage.objective for stage in last.before.stages] == ["supcon", "simclr"]
    assert [stage.epochs for stage in last.before.stages] == [first.epochs, 1]
    assert last.before.stages[0].images_seen == first.images_seen
    assert not first.before.stages
    assert last.supervised  # it reads no label itself
    assert lineage.of_run(runs / "c").row_id.tolist() == sorted(data.row_id.tolist())
    own = np.isin(data.group, data.group[~half])
    assert np.array_equal(last.seen, own | np.isin(data.group, data.group[half]))
    assert json.loads((runs / "c" / "config.json").read_text())["kladi"]["before"] == [
        dataclasses.asdict(stage) for stage in last.before.stages
    ]


def test_no_file_is_named(stages):
    _, _, runs = stages
    for file in (runs / "c").glob("*.json"):
        assert str(runs) not in file.read_text()


def test_a_resumed_run_keeps_what_it_began_with(stages):
    data, half, runs = stages
    trained = with_trained(data, ~half)
    config = tiny.settings(objective__name="simclr", init__weights=str(runs / "a"))
    stopped = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=1))
    fit(trained, stopped, runs / "d", progress=Silent())
    (runs / "a").rename(runs / "elsewhere")
    fit(trained, config, runs / "d", resume=True, progress=Silent())
    assert [stage.objective for stage in pretraining.of_run(runs / "d", data).before.stages] == ["supcon"]


def test_weights_that_say_nothing_of_themselves_are_said_to(stages):
    data, half, runs = stages
    assert lineage.behind(runs / "b" / "model.safetensors").stages == lineage.behind(runs / "b").stages
    alone = (runs / "a" / "model.safetensors").rename(runs / "somebodys.safetensors")
    assert lineage.behind(alone).stages == (Stage(""),)
    other = runs / "hub"  # as other libraries lay them out
    other.mkdir()
    (other / "model.safetensors").write_bytes(alone.read_bytes())
    (other / "config.json").write_text('{"architecture": "resnet18"}')
    assert lineage.behind(other / "model.safetensors").stages == (Stage(""),)
    config = tiny.settings(objective__name="simclr", train__epochs=1, init__weights=str(other / "model.safetensors"))
    fit(with_trained(data, half), config, runs / "e", progress=Silent())
    found = pretraining.of_run(runs / "e", data)
    assert not found.before.known
    assert (found.before.epochs, found.before.images_seen) == (None, None)
    plan = protocol.choose(embed(kladi.load(runs / "e"), data), found, config)
    assert any("began with weights from a file" in warning for warning in plan.warnings)


def test_a_study_knows_what_stands_behind_weights(stages):
    data, _, runs = stages
    config = tiny.settings(objective__name="simclr", init__weights=str(runs / "b"))
    arm = arms.Arm("other", config, "pretrained")
    assert arm.reads_labels
    assert arms.epochs_before(arm) == lineage.behind(runs / "b").epochs == 3
    bare = arms.Arm("bare", dataclasses.replace(config, init=settings.Init()), "pretrained")
    assert not bare.reads_labels
    assert arms.epochs_before(bare) == 0
    assert arms.images_seen(arm, data) == arms.images_seen(bare, data) + lineage.behind(runs / "b").images_seen


def test_a_lost_lineage_is_refused(stages):
    data, _, runs = stages
    (runs / "c" / "before.json").unlink()
    with pytest.raises(UserError, match=r"before.json is missing"):
        pretraining.of_run(runs / "c", data)


@pytest.mark.parametrize("damaged", ["", "{", '[{"objective": 1, "x": 2}]', "[1]"])
def test_a_damaged_lineage_is_refused(stages, damaged):
    data, _, runs = stages
    (runs / "c" / "before.json").write_text(damaged)
    with pytest.raises(UserError, match=r"before.json is damaged"):
        pretraining.of_run(runs / "c", data)

"""What a run began with: what earlier stages read and saw counts as read and seen, and can be said."""

import dataclasses
import json

import numpy as np
import pytest

import tiny
from kladi.data.dataset import HELD_OUT, TRAIN
from kladi.errors import UserError
from kladi.evaluate import pretraining
from kladi.learn import lineage
from kladi.learn.console import Silent
from kladi.learn.fit import fit
from kladi.learn.lineage import Stage


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
    assert [stage.objective for stage in last.before] == ["supcon", "simclr"]
    assert [stage.epochs for stage in last.before] == [first.epochs, 1]
    assert last.before[0].images_seen == first.images_seen
    assert not first.before
    assert last.supervised  # it reads no label itself
    assert lineage.of_run(runs / "c").row_id.tolist() == sorted(data.row_id.tolist())
    own = np.isin(data.group, data.group[~half])
    assert np.array_equal(last.seen, own | np.isin(data.group, data.group[half]))
    assert json.loads((runs / "c" / "config.json").read_text())["kladi"]["before"] == [
        dataclasses.asdict(stage) for stage in last.before
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
    assert [stage.objective for stage in pretraining.of_run(runs / "d", data).before] == ["supcon"]


def test_weights_that_say_nothing_of_themselves_are_said_to(stages):
    _, _, runs = stages
    assert lineage.behind(runs / "a" / "model.safetensors").stages == (Stage(""),)


@pytest.mark.parametrize("damaged", ["", "{", '[{"objective": 1, "x": 2}]', "[1]"])
def test_a_damaged_lineage_is_refused(stages, damaged):
    data, _, runs = stages
    (runs / "c" / "before.json").write_text(damaged)
    with pytest.raises(UserError, match=r"before.json is damaged"):
        pretraining.of_run(runs / "c", data)

"""Configuration: every key round-trips, and every mistake is answered with the closest word."""

import dataclasses
import re

import pytest

from kladi import config, sections
from kladi.errors import UserError, closest


def test_toml_round_trip(tmp_path):
    changed = config.override(
        config.Config(),
        {
            "train.epochs": "7",
            "data.metadata": "modality,anatomy",
            "objective.args.alpha": "0.25",
            "augment.crop": "0.2,1",
        },
    )
    file = tmp_path / "plan.toml"
    file.write_text(config.to_toml(changed, {"train.epochs": "because"}))
    assert "epochs = 7  # because" in file.read_text()
    assert config.read(file) == changed
    assert config.from_dict(config.to_dict(changed)) == changed


@pytest.mark.parametrize(
    ("text", "value"),
    [("8,16", [8, 16]), ("[8, 16]", [8, 16]), ("0.5", 0.5), ("a,b", "a,b"), ("1,b", "1,b"), ("true", True), (",", ",")],
)
def test_arguments_are_read_as_what_they_look_like(text, value):
    found = config.override(config.Config(), {"encoder.args.x": text}).encoder.args["x"]
    assert found == value
    assert type(found) is type(value)


def test_every_default_has_its_own_type():
    """A default that its own key would refuse could not be written to a file and read back."""
    default = config.Config()
    assert config.from_dict(config.to_dict(default)) == default
    assert len(config.keys()) == sum(
        len(dataclasses.fields(getattr(default, f.name))) for f in dataclasses.fields(default)
    )


@pytest.mark.parametrize("key", config.keys())
def test_a_misspelt_key_names_the_right_one(key):
    """One letter dropped from any key: the message names a key that exists, and the right section's."""
    typo = key[:-1]
    if typo in set(config.keys()):
        pytest.skip(f"{typo} is a key of its own")
    with pytest.raises(UserError, match=f"--{typo} is not a key; closest: --{key.split('.')[0]}"):
        config.override(config.Config(), {typo: "1"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.epochs", "many", "whole number"),
        ("train.epochs", "1.5", "whole number"),
        ("train.lr", "fast", "a number"),
        ("train.optimizer", "adam", 'closest: "adamw"'),
        ("data.drop_blank", "yes", "true or false"),
        ("augment.crop", "0.3", "takes 2 values"),
        ("encoder.args", "3", "is a table, not"),
        ("train.epochs.more", "3", "not a key"),
        ("epochs", "3", "not a key"),
    ],
)
def test_wrong_values_say_what_was_expected(key, value, message):
    with pytest.raises(UserError, match=message):
        config.override(config.Config(), {key: value})


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        config.read(tmp_path / "absent.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("a = = 3")
    with pytest.raises(UserError, match="not a TOML file"):
        config.read(bad)
    bad.write_text("[train]\nepoch = 3\n")
    with pytest.raises(UserError, match=r"bad.toml: train.epoch is not a key; closest: train.epochs"):
        config.read(bad)


def test_closest_is_case_blind_and_never_empty():
    assert closest("EPOCHS", ["epochs", "batch"]) == ["epochs"]
    assert closest("zzz", ["epochs"]) == ["epochs"]
    assert closest("zzz", []) == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("data.held_out", "2", "data.held_out 2: takes 0 to 0.9"),
        ("data.held_out", "nan", "data.held_out nan: takes"),
        ("intensity.size", "7", "intensity.size 7: takes 8 to"),
        ("evaluate.folds", "1", "evaluate.folds 1: takes 3 to"),
        ("encoder.projector", "0,128", "encoder.projector 0: takes 1 to"),
        ("intensity.low", "99.9", "intensity.low 99.9 is not below intensity.high 99.5"),
        ("intensity.mean", "0.1,0.2", "intensity.mean has 2 values for 1 channels"),
    ],
)
def test_impossible_numbers_are_refused_before_any_image_is_read(key, value, said):
    with pytest.raises(UserError, match=re.escape(said)):
        config.override(config.Config(), {key: value})


def test_every_range_holds_its_default():
    for key, (least, most) in sections.RANGES.items():
        section, name = key.split(".")
        value = getattr(getattr(config.Config(), section), name)
        assert all(least <= v <= most for v in (value if isinstance(value, tuple) else (value,)))


def test_every_key_says_what_it_means():
    meanings = config.meanings()
    assert list(meanings) == config.keys()
    assert meanings["train.epochs"] == ("100", "Times that each training image is seen, in two views.")
    for key, (default, meaning) in meanings.items():
        assert len(meaning) > 8, key
        assert meaning.endswith("."), key
        assert config.override(
            config.Config(), {key: config.to_dict(config.Config())[key.split(".")[0]][key.split(".")[1]]}
        )
        assert default, key


def test_names_of_columns_hold_blanks_and_dots(tmp_path):
    given = {
        "objective.args.weights": {"Body Part": 2.0, "x.y": 0.5},
        "data.metadata_trees.Body Part": "parts.csv",
        "data.metadata": ["Body Part", "x.y"],
    }
    found = config.override(config.Config(), given)
    (tmp_path / "c.toml").write_text(config.to_toml(found), encoding="utf-8")
    assert config.read(tmp_path / "c.toml") == found


def test_a_table_among_the_arguments_takes_single_entries():
    found = config.override(config.Config(), {"objective.args.weights": {"a": 1.0}})
    found = config.override(found, {"objective.args.weights.b": "2.0"})
    assert found.objective.args == {"weights": {"a": 1.0, "b": 2.0}}

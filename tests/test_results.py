"""results.json: what may be in it, what may not, and that the clock is the only thing that may differ."""

from __future__ import annotations

import csv
import io
import json
import math
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kladi.errors import UserError
from kladi.evaluate.record import results
from kladi.evaluate.record.results import Row


def row(**given):
    return Row(
        **{
            "method": "encoder",
            "regime": "probe",
            "dataset": "label",
            "metric": "accuracy",
            "value": 0.5,
            "n": 10,
            "n_patients": 4,
            **given,
        }
    )


def test_the_file_holds_every_section_sorted_and_no_nan(tmp_path):
    content = results.assemble([row(value=math.nan, reason="one class"), row(fold=1)], study={"name": "x"})
    path = results.write(content, tmp_path / "deep" / "er")
    text = path.read_text()
    plain = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    assert list(plain) == sorted(plain)
    assert plain["format"] == "kladi-results"
    assert plain["version"] == 1
    assert set(results.SECTIONS) <= set(plain)
    assert plain["rows"][0]["value"] is None
    assert plain["rows"][0]["reason"] == "one class"
    assert plain["rows"][1]["value"] == 0.5
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((path.parent / "results.csv").stat().st_mode) == 0o600
    assert sorted(p.name for p in path.parent.iterdir()) == ["results.csv", "results.json"]
    assert results.read(path) == results.read(path.parent) == content


@given(st.floats(allow_nan=True, allow_infinity=True))
@settings(max_examples=50)
def test_floats_survive_exactly_and_the_rest_is_null_with_a_reason(value):
    content = results.assemble([row(value=value)])
    kept = json.loads(json.dumps(content))["rows"][0]
    if math.isfinite(value):
        assert kept["value"] == value
        assert kept["reason"] == ""
    else:
        assert kept["value"] is None
        assert kept["reason"]


def test_not_a_number_anywhere_else_is_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        results.assemble([], figures={"levels": {"a": [math.nan]}})


def test_row_keys_are_those_of_the_sheet():
    key = {"method", "regime", "dataset", "fold", "repeat", "seed", "label_fraction", "shift", "metric"}
    about = {"value", "reason", "n", "n_patients", "config_digest", "wall_seconds", "cpu_seconds"}
    assert set(row().to_dict()) == key | about
    assert set(results.KEY) == key


def test_a_key_occurs_once():
    with pytest.raises(ValueError, match="occurs twice"):
        results.assemble([row(), row(value=0.7)])
    results.assemble([row(), row(fold=1), row(repeat=1), row(seed=1), row(metric="auc"), row(shift="blur 1")])


def test_unknown_sections_are_refused():
    with pytest.raises(ValueError, match="no section 'stduy'"):
        results.assemble([], stduy={})
    with pytest.raises(TypeError, match="methods"):
        results.assemble([], methods={})


def test_the_digest_knows_everything_but_the_clock():
    def made(**kw):
        a = results.assemble(
            [row(wall_seconds=kw.get("wall", 1.0), value=kw.get("value", 0.5))],
            provenance={"started": kw.get("started", "now"), "git": kw.get("git", "a")},
            figures={"cost": {"images_per_second": kw.get("rate", 3.0)}},
        )
        return a["digest"]

    assert made() == made(wall=9.0, started="later", rate=7.0)
    assert made() != made(value=0.6)
    assert made() != made(git="b")
    reordered = results.assemble([row(fold=1), row()])
    assert reordered["digest"] == results.assemble([row(), row(fold=1)])["digest"]


def test_a_changed_file_is_refused(tmp_path):
    path = results.write(results.assemble([row()]), tmp_path)
    path.write_text(path.read_text().replace("0.5", "0.9"))
    with pytest.raises(UserError, match="digest"):
        results.read(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [("{", "JSON"), ('{"format": "other"}', "not results"), ('{"format": "kladi-results", "version": 9}', "version 9")],
)
def test_foreign_files_are_refused(tmp_path, text, why):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=why):
        results.read(tmp_path)
    with pytest.raises(UserError, match="kladi evaluate"):
        results.read(tmp_path / "nowhere.json")


def test_csv_is_the_twin_of_the_rows_and_inert():
    evil = "=cmd|' /C calc'!A0"
    content = results.assemble([row(method=evil), row(value=None, reason="a, b\nc"), row(metric="@x", value=1e-17)])
    read = list(csv.DictReader(io.StringIO(results.to_csv(content["rows"]))))
    assert [r["method"] for r in read].count("'" + evil) == 1
    assert {r["metric"] for r in read} == {"accuracy", "'@x"}
    for mine, theirs in zip(content["rows"], read, strict=True):
        assert theirs["value"] == ("" if mine["value"] is None else repr(mine["value"]))
    assert any(r["reason"] == "a, b\nc" for r in read)

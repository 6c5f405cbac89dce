"""The page of strengths says what was measured, in numbers and in a figure, and needs no network."""

import json

import numpy as np
import pytest

from kladi import commands, toy
from kladi.data.views import kept_strengths
from kladi.data.views.calibration import QUANTILES, Range, Reach, Strengths
from kladi.data.views.kept_strengths import written
from kladi.errors import UserError
from kladi.report import page, strengths
from kladi.structure.topology import BANDS


def table():
    reaches = {
        name: tuple(Reach(u, tuple(np.quantile([u * k, u * 2 * k], QUANTILES))) for u in (0.02, 0.05, 0.2))
        for k, name in enumerate(("blur", "gamma", "noise"), start=1)
    }
    weak = {"noise": Range(0.05, 0.2, 0.9, 0.1, 12), "<b>": Range(0.1, 0.1, 0.7, 0.1, 12)}
    return Strengths({"weak": weak, "strong": {}}, 3, reaches)


def test_what_is_written_is_what_was_measured(tmp_path):
    file = tmp_path / "strengths.json"
    file.write_text(written(table()))
    with pytest.raises(UserError, match="missing or damaged"):  # an operation that nobody knows
        kept_strengths.read_strengths(file)
    usable = dict.fromkeys(("noise", "blur"), table().ranges["weak"]["noise"])
    known = Strengths({"weak": usable, "strong": usable}, 3, table().reaches)
    file.write_text(written(known))
    assert kept_strengths.read_strengths(file) == known
    file.write_text(written(Strengths({"weak": usable, "strong": {}}, 3, table().reaches)))
    with pytest.raises(UserError, match="0 of 8 operations"):
        kept_strengths.read_strengths(file)


def test_every_operation_has_its_line_and_its_panel():
    content = json.loads(written(table()))
    assert strengths.lines(content) == [
        ("<b>", "0.100; 70% in band, median 0.100, n 12", "not used"),
        ("blur", "not used", "not used"),
        ("gamma", "not used", "not used"),
        ("noise", "0.050 to 0.200; 90% in band, median 0.100, n 12", "not used"),
    ]
    figure = strengths.figure(content)
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["blur", "gamma", "noise"]
    medians = [trace for trace in figure["data"] if trace["mode"] == "lines+markers"]
    np.testing.assert_allclose(medians[1]["y"], [0.06, 0.15, 0.6])
    assert sum(shape["opacity"] == 1 for shape in figure["layout"]["shapes"]) == 1
    assert strengths.figure({"ranges": {}, "reaches": {}}) is None
    assert strengths.LIMITS == BANDS


def test_the_page_is_private_and_inert(tmp_path):
    page.write_strengths(json.loads(written(table())), tmp_path / "s.html")
    html = (tmp_path / "s.html").read_text()
    assert (tmp_path / "s.html").stat().st_mode & 0o777 == 0o600
    assert "&lt;b&gt;" in html
    assert "default-src &#39;none&#39;" in html
    assert "3 images with next to no topology" in html


def test_a_plan_with_topology_writes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kept_strengths, "strengths_of", lambda *_: table())
    manifest = toy.write(tmp_path / "toy", n=24, size=16)
    given = {"topology.on": "true", "intensity.size": "16", "data.store": str(tmp_path / "store")}
    commands.plan(manifest, tmp_path / "plan.toml", None, given, smoke=False)
    html = (tmp_path / "plan.strengths.html").read_text()
    assert "Whole images, diagrams at 16 px, seed 0." in html
    assert manifest.name not in html  # a page is kept, and a path may carry a name
    said = capsys.readouterr().out
    assert "weak 0.050 to 0.200; 90% in band, median 0.100, n 12; strong not used" in said

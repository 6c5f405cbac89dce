"""The page: from results.json alone, offline, with hostile names inert, and alive in a real browser."""

import json
import re
import shutil
import stat

import pytest

from kladi.errors import UserError
from kladi.report import comparison, facts, figures, page, shapes, tables, wording
from results_example import THUMBNAIL, example, example_map, study_example, study_map

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = [
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    '"><svg onload=window.pwned=1>',
    "{{7*7}}",
    "<a href='http://example.invalid/'>x</a>",
    "]]>--><!--",
    "javascript:window.pwned=1//",
]


def written(folder, prefix="", with_map=True):
    (folder / "results.json").write_text(json.dumps(example(prefix)))
    if with_map:
        (folder / "map.json").write_text(json.dumps(example_map(prefix)))
        (folder / "thumbnails.json").write_text(json.dumps([THUMBNAIL]))
    return page.write(folder)


def test_the_page_needs_only_results_json(tmp_path):
    target = written(tmp_path, with_map=False)
    html = target.read_text()
    assert target.name == "report.html"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert "0.810" in html  # mean of .80 .81 .82
    assert "sd 0.010, 3 values, n 40 to 42, 20 patients" in html
    assert "map.json is not beside results.json" in html
    assert "leans better" in html


def test_every_number_of_a_table_has_n_and_spread():
    for regime in tables.regimes(example()):
        for row in regime["rows"]:
            for cell in row["cells"]:
                assert cell["note"], f"{regime['name']}, {row['method']}: {cell['value']} stands alone"


def test_an_undefined_value_is_said_with_its_reason():
    assert any("one class is absent" in line and "(3 times)" in line for line in facts.not_run(example()))
    cells = [cell for regime in tables.regimes(example()) for row in regime["rows"] for cell in row["cells"]]
    assert {"undefined"} == {cell["value"] for cell in cells if cell["raw"] is None}


def test_digests_of_several_splits_are_listed():
    results = example()
    results["splits"]["digest"] = {"skin": "5" * 4, "blood": "b" * 4}
    assert ("split digest", "blood bbbb, skin 5555") in facts.provenance(results)


def test_lower_is_best_where_it_is():
    probe = tables.regimes(example())[0]
    column = probe["metrics"].index("mistake severity (lower is better)")
    best = [row["method"] for row in probe["rows"] if row["cells"][column]["best"]]
    assert best == ["histogram"]


def test_a_bare_results_file_draws_a_page_that_says_why_it_is_empty(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"format": "kladi-results", "version": 1}))
    html = page.write(tmp_path).read_text()
    assert html.count('class="empty"') >= 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "no results file of kladi"),
        ('{"format": "other"}', "no results file of kladi"),
        ('{"format": "kladi-results", "version": 2}', "format version 2"),
    ],
)
def test_foreign_files_are_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        page.write(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_file_names_the_command(tmp_path):
    with pytest.raises(UserError, match="kladi evaluate"):
        page.write(tmp_path)


def test_nothing_is_fetched(tmp_path):
    html = written(tmp_path).read_text()
    markup = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    targets = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>]*)""", markup)
    assert targets
    assert all(t.startswith(("data:", "#")) for t in targets)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    assert policy.group(1).startswith("default-src &#39;none&#39;")
    assert "unsafe-eval" not in policy.group(1)


def test_lines_of_the_confusion_stand_where_the_top_of_the_path_changes():
    figure = figures.all_figures(example(), None)["confusion"]
    assert {shape["y0"] for shape in figure["layout"]["shapes"] if shape["x0"] == -0.5} == {1.5}
    assert sum(sum(map(float, row)) for row in figure["data"][0]["z"]) == pytest.approx(4)  # rows are shares


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()


def opened(browser, target):
    """The page after its script has run, with every message and every request that it made."""
    tab = browser.new_page(viewport={"width": 1280, "height": 1000})
    errors, requests = [], []
    tab.on("pageerror", lambda e: errors.append(str(e)))
    tab.on("console", lambda m: errors.append(m.text) if m.type in {"error", "warning"} else None)
    tab.on("request", lambda r: requests.append(r.url) if not r.url.startswith(("data:", target.as_uri())) else None)
    tab.goto(target.as_uri())
    tab.wait_for_selector("body[data-drawn=yes]", timeout=30_000)
    return tab, errors, requests


def test_without_patient_ids_no_patient_is_counted():
    results = {**example(), "data": {**example()["data"], "patients": None}}
    known, unknown = (page.render(r, None, None).partition("plotly")[0] for r in (example(), results))
    assert "bootstrap over patients" in known
    assert " patients" in known
    assert "bootstrap over images" in unknown
    assert "image bootstrap" in unknown
    assert re.findall(r"[\d,]+ patients", unknown) == []


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("US/breast/benign", "US/breast/benign"),
        ("SM/blood/leukocyte/granulocyte/neutrophil", "…/leukocyte/granulocyte/neutrophil"),
        ("a" * 40, "a" * 36 + "…"),
        ("SM/" + "a" * 40, "…/" + "a" * 36 + "…"),
    ],
)
def test_a_long_label_is_shown_by_its_last_parts(label, shown):
    images = [{"label": label, "thumbnail": None, "h0": [], "h1": []}]
    drawn = shapes.figures({"figures": {"shapes": {"images": images}}}, [])["diagrams"]
    assert drawn["layout"]["annotations"][0]["text"] == shown


def test_diagrams_stand_beside_their_images():
    figures = shapes.figures(example(), ["data:image/png;base64,a", "data:image/png;base64,b"])
    drawn = figures["diagrams"]
    assert [image["source"][-1] for image in drawn["layout"]["images"]] == [
        "a",
        "b",
    ]  # the first has none, the last is missing
    assert [trace["xaxis"] for trace in drawn["data"]] == ["x", "x", "x2", "x2", "x3", "x3", "x4", "x4"]
    sizes = drawn["data"][2]["marker"]["size"]
    assert sizes[0] > sizes[1]
    experts = figures["experts"]["data"]
    assert [trace["name"] for trace in experts] == ["visual", "topology", "concat", "gated", "cross"]
    assert experts[0]["y"][0] == "all (40)"
    assert "0.040, all points of 0.020 (900 points of 40 images)" in shapes.attended(example())
    assert shapes.figures({"figures": {}}, []) == {}
    assert shapes.attended({}) == ""


@pytest.mark.browser
@pytest.mark.slow
def test_a_browser_draws_it_without_error_or_request(browser, tmp_path):
    tab, errors, requests = opened(browser, written(tmp_path))
    assert (errors, requests) == ([], [])
    assert tab.locator(".plot .main-svg").count() >= 9
    assert tab.locator("#figure-diagrams .imagelayer image").count() >= 1
    tab.select_option("#colour", "level 2")
    dot = tab.locator("#figure-map .scatterlayer .points path").first
    dot.hover(force=True)
    tab.wait_for_selector("#shown p:has-text('modality')", timeout=5_000)
    tab.close()


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_names_are_inert(browser, tmp_path, hostile):
    tab, errors, requests = opened(browser, written(tmp_path, prefix=hostile))
    assert tab.evaluate("window.pwned") is None
    assert (errors, requests) == ([], [])
    assert hostile in tab.locator("h1").inner_text()  # shown as it is written, not hidden
    assert "49" not in tab.locator("h1").inner_text()
    tab.close()


@pytest.mark.parametrize(
    "damage",
    [
        {"study": None},
        {"rows": [1]},
        {"rows": [{"method": "a", "regime": "probe"}]},
        {"rows": [{"method": "a", "regime": "probe", "metric": "auc", "value": "x"}]},
        {"methods": [{}]},
        {"comparisons": 1},
        {"study": {"name": "\ud800"}},
    ],
    ids=str,
)
def test_results_of_a_wrong_shape_are_refused_in_one_line(tmp_path, damage):
    (tmp_path / "results.json").write_text(json.dumps({"format": "kladi-results", "version": 1, **damage}))
    with pytest.raises(UserError, match="damaged") as refused:
        page.write(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"format": "kladi-results", "version": 1, "x": ' + "9" * 5000 + "}"])
def test_results_that_no_reader_survives_are_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match="damaged"):
        page.write(tmp_path)


@pytest.mark.parametrize(("verdict", "lead"), [("leans better", "Against its controls"), ("cannot tell", "Not shown")])
def test_the_page_says_first_whether_the_controls_were_beaten(verdict, lead):
    one = {"method": "a", "regime": "probe", "metric": "balanced_accuracy", "interval": [0.1, 0.3], "difference": 0.2}
    results = {
        "comparisons": [
            {**one, "reference": "random_encoder", "verdict": "leans better"},
            {**one, "reference": "histogram", "verdict": verdict},
            {**one, "regime": "knn", "reference": "histogram", "verdict": "leans worse"},
        ]
    }
    said = tables.summary(results)[-1]
    assert said.startswith(lead)
    assert "histogram +0.200 [+0.100, +0.300]" in said
    assert "knn" not in said
    assert [c["decides"] for c in tables.comparisons(results)] == [True, True, False]


# --- a study -----------------------------------------------------------------------------------------------------


def test_the_table_of_a_study_has_controls_under_their_method_and_every_difference():
    table = comparison.table(study_example())
    assert table["columns"] == ["breast, probe", "brain, probe"]
    assert [row["method"] for row in table["rows"]] == ["metadata", "metadata, shuffled", "simclr"]
    assert [row["control_of"] for row in table["rows"]] == ["", "metadata", ""]
    first, second = table["rows"][0]["cells"][0], table["rows"][1]["cells"][0]
    assert (first["value"], first["note"], first["difference"], first["best"]) == (
        "0.800", "sd 0.010, 60 patients", "", True,
    )  # fmt: skip
    assert second["difference"] == "-0.100 [-0.150, -0.080], p 0.080"
    assert second["verdict"] == "cannot tell"
    assert comparison.table(example()) is None


def test_tasks_are_never_averaged_together():
    tables_of = tables.regimes(study_example())
    assert [one["name"] for one in tables_of] == [
        "breast: linear probe on frozen features", "brain: linear probe on frozen features",
    ]  # fmt: skip
    assert [one["rows"][0]["cells"][0]["value"] for one in tables_of] == ["0.810", "0.830"]  # whole labels only


def test_the_figures_of_a_study():
    drawn = comparison.figures(study_example())
    assert {len(trace["x"]) for trace in drawn["differences"]["data"]} == {2}
    assert drawn["few_labels"]["data"][0]["x"] == pytest.approx([10, 100])
    panels = comparison.panels(study_map())
    assert [panel["purity"] for panel in panels] == ["modality 0.90 (chance 0.40)"] * 3
    colours = [{t["name"]: t["marker"]["color"] for t in panel["figure"]["data"]} for panel in panels]
    assert colours[0] == colours[1] == colours[2]
    assert comparison.panels(None) == comparison.panels(example_map()) == []


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", *HOSTILE])
def test_a_browser_draws_a_study(browser, tmp_path, prefix):
    for name, content in (("results.json", study_example(prefix)), ("map.json", study_map(prefix))):
        (tmp_path / name).write_text(json.dumps(content))
    tab, errors, requests = opened(browser, page.write(tmp_path))
    assert (errors, requests) == ([], [])
    assert tab.evaluate("window.pwned") is None
    assert tab.locator(".panels .main-svg").count() >= 3
    tab.close()


def test_the_page_and_the_measurements_agree_which_way_is_better():
    """The page imports nothing of the measuring side, so the list stands twice."""
    from kladi.evaluate.answers import LOWER_IS_BETTER

    assert wording.LOWER_IS_BETTER == LOWER_IS_BETTER


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a/b/c", "a/b/d/e"], ["c", "d/e"]),
        (["a/b", "a/b/c"], ["b", "b/c"]),
        (["a", "b"], ["a", "b"]),
        (["a/b"], ["b"]),
        (["a/b", "c/d"], ["a/b", "c/d"]),
    ],
)
def test_what_stands_above_all_labels_says_nothing(names, shown):
    assert figures._below_all(names) == shown


def test_a_study_says_its_verdicts_at_its_head():
    (line,) = [line for line in tables.summary(study_example()) if line.startswith("Beside ")]
    counted = sum(int(n) for n in re.findall(r" (\d+)(?=[,.])", line.partition("comparison")[2]))
    assert f"of {counted} comparison" in line


def test_labels_that_look_like_numbers_are_names():
    confusion = {"nodes": ["birads/1", "birads/2"], "counts": [[3, 1], [0, 2]]}
    layout = figures.all_figures({"figures": {"confusion": confusion}}, None)["confusion"]["layout"]
    assert layout["xaxis"]["type"] == layout["yaxis"]["type"] == "category"
    assert layout["shapes"] == []  # siblings have no border between them


def test_a_method_has_one_colour_in_every_figure():
    shown = figures.all_figures(example(), None)
    colours = {}
    for name in ("levels", "calibration", "severity", "violations"):
        for trace in shown[name]["data"] if name in shown else ():
            colours.setdefault(trace["name"], set()).add(trace["marker"]["color"])
    for trace in shown["stopping"]["data"] if "stopping" in shown else ():
        colours.setdefault(trace["name"].partition(",")[0], set()).add(trace["line"]["color"])
    assert len(colours) > 1
    assert all(len(own) == 1 for own in colours.values())
    assert len({next(iter(own)) for own in colours.values()}) == len(colours)

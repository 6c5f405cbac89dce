"""The command line: a mistake is at most three lines on stderr, exit 2, no traceback, and nothing is written."""

import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from kladi import cli, commands, toy


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    """Sixty generated images of twenty patients with a label tree and metadata."""
    folder = tmp_path_factory.mktemp("ward")
    toy.write(folder, 60, size=24, seed=0)
    return folder


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """The store and the key go to a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)


def said(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrian", "x"], ["pretrian", "pretrain"]),
        (["pretrain", "x"], ["--out"]),
        (
            ["pretrain", "x", "--out", "o", "--train.epoch", "3"],
            ["--train.epoch is not a key", "closest: --train.epochs"],
        ),
        (["pretrain", "x", "--out", "o", "--train.epochs", "many"], ["many", "whole number"]),
        (["pretrain", "x", "--out", "o", "--train.epochs"], ["--train.epochs lacks its value"]),
        (["pretrain", "x", "--out", "o", "--epochs", "3"], ["--epochs is no option"]),
        (["pretrain", "x", "y", "--out", "o"], ['"y" is one argument too many']),
        (["pretrain", "absent.csv", "--out", "o"], ["absent.csv"]),
        (["check", "absent"], ["absent"]),
        (["plan", "absent.csv"], ["absent.csv"]),
        (["embed", "absent", "absent.csv", "--out", "o"], ["absent"]),
        (["evaluate", "absent", "absent.csv", "--out", "o"], ["absent"]),
        (["report", "absent"], ["absent", "kladi evaluate"]),
        (["export", "absent", "--out", "o"], ["absent is not a finished run"]),
        (["list", "objektives"], ["objectives"]),
        (["pretrain", "x", "--out", "o", "--config", "absent.toml"], ["absent.toml"]),
        (["check", "x", "--taxonomy"], ["--taxonomy"]),
        (
            ["pretrain", "x", "--out", "o", "--topology.side", "32"],
            ["--topology.side has no say without --topology.on true"],
        ),
    ],
)
def test_x6_a_mistake_is_one_line_and_exit_2(capsys, tmp_path, arguments, words):
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    code, out, err = said(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("kladi: ")
    assert 1 <= len(err.strip().splitlines()) <= 3
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before


@pytest.mark.parametrize(
    "verb", ["check", "plan", "pretrain", "embed", "evaluate", "compare", "report", "list", "export"]
)
def test_help_answers_with_an_example_first(capsys, verb):
    code, out, _ = said(capsys, verb, "--help")
    assert code == 0
    assert f"Example: kladi {verb}" in " ".join(out.split())


@pytest.mark.parametrize("what", ["objectives", "backbones", "metrics", "keys"])
def test_list_names_what_there_is(capsys, what):
    code, out, _ = said(capsys, "list", what)
    known = {"objectives": "label_tree", "backbones": "resnet18", "metrics": "hierarchical_f1", "keys": "train.epochs"}
    assert code == 0
    assert known[what] in out.split()


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["list"], ["one of objectives, backbones, metrics, keys"]),
        (["pretrain", "x.csv"], ["pretrain needs --out", "kladi pretrain --help"]),
        (["pretrain"], ["pretrain needs DATA"]),
        (["compare", "nowhere.toml", "--out", "S"], ["nowhere.toml: cannot be read"]),
    ],
)
def test_what_is_missing_is_named_with_a_way_to_an_example(capsys, tokens, words):
    code, _, err = said(capsys, *tokens)
    assert code == 2
    for word in words:
        assert word in err
    assert not Path("S").exists()


def test_check_names_the_columns_that_nothing_uses(capsys, tmp_path):
    Image.new("L", (16, 16), 9).save(tmp_path / "a.png")
    (tmp_path / "m.csv").write_text("path,scanner,site\na.png,x,y\n")
    _, out, _ = said(capsys, "check", tmp_path / "m.csv", "--data.metadata", "site")
    assert "unused     scanner (--data.metadata and --data.covariates take columns)" in out


def test_check_says_what_tables_know(capsys, ward):
    rows = "".join(f"p{k:04d},{k}\n" for k in range(15))
    (ward / "labs.csv").write_text(f"patient_id,crp\n{rows}")
    _, out, _ = said(capsys, "check", ward / "manifest.csv", "--data.tables", ward / "labs.csv")
    assert "table      labs: 1 column, 45 of 60 images" in out
    assert "table labs: 45 rows of 60 are in it" in out


@pytest.mark.slow
def test_a_run_with_tables_is_embedded_without_them(capsys, ward, tmp_path):
    rows = "".join(f"p{k:04d},{k},{'xy'[k % 2]},{'uv'[k % 2]}\n" for k in range(20))
    (tmp_path / "labs.csv").write_text(f"patient_id,crp,ward,note\n{rows}")
    tables = ["--data.tables", tmp_path / "labs.csv", "--data.levels", "ward", "--data.leave_out", "note"]
    small = ["--intensity.size", "16", "--encoder.name", "test_efficientnet", "--train.epochs", "1"]
    run = tmp_path / "run"
    assert said(capsys, "pretrain", ward / "manifest.csv", *tables, *small, "--out", run)[0] == 0
    assert str(tmp_path) not in (run / "config.toml").read_text()
    (tmp_path / "labs.csv").unlink()
    assert said(capsys, "embed", run, ward / "manifest.csv", "--out", tmp_path / "embedded")[0] == 0


def test_dry_run_writes_nothing(capsys, ward, tmp_path):
    code, out, _ = said(capsys, "pretrain", ward / "manifest.csv", "--out", tmp_path / "run", "--dry-run")
    assert code == 0
    assert "would" in out
    assert not (tmp_path / "run").exists()


def test_check_lists_faults_and_answers_1(capsys, ward, tmp_path):
    text = (ward / "manifest.csv").read_text()
    bad = ward / "bad.csv"
    lines = text.splitlines()
    bad.write_text("\n".join([*lines, lines[1].replace("plain", "plian")]) + "\nabsent.png" + "," * lines[0].count(","))
    code, out, _ = said(capsys, "check", bad)
    bad.unlink()
    assert code == 1
    assert "not ready" in out
    assert "two labels" in out
    assert "file missing" in out
    assert "(absent.png)" in out


@pytest.mark.slow
def test_the_whole_job(capsys, ward, tmp_path):
    """check, plan, pretrain, embed, evaluate, report: the README's five lines on generated images."""
    manifest, run = ward / "manifest.csv", tmp_path / "run"
    small = ["--intensity.size", "16", "--encoder.name", "resnet10t", "--train.epochs", "2", "--train.batch", "16"]
    assert said(capsys, "check", manifest)[0] == 0
    code, out, _ = said(capsys, "plan", manifest, "--out", tmp_path / "plan.toml", *small)
    assert code == 0
    assert "yours" in out
    assert said(capsys, "pretrain", manifest, "--config", tmp_path / "plan.toml", "--out", run)[0] == 0
    assert said(capsys, "pretrain", manifest, "--config", tmp_path / "plan.toml", "--out", run)[0] == 2  # not empty
    assert said(capsys, "embed", run, manifest, "--out", tmp_path / "embedded")[0] == 0
    assert said(capsys, "evaluate", run, manifest, "--out", tmp_path / "eval")[0] == 0
    page = (tmp_path / "eval" / "report.html").read_bytes()
    assert said(capsys, "report", tmp_path / "eval")[0] == 0
    assert len((tmp_path / "eval" / "report.html").read_bytes()) == len(page)


def test_a_stopped_command_says_so(capsys, monkeypatch, tmp_path):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "check", stopped)
    assert said(capsys, "check", tmp_path) == (130, "", "kladi: stopped\n")


def anatomies(ward):
    lines = [line.split(",") for line in (ward / "manifest.csv").read_text().splitlines()]
    return [line[lines[0].index("anatomy")] for line in lines[1:]]


def test_what_comes_next_can_be_pasted(capsys, ward, tmp_path):
    folder = tmp_path / "a b"
    folder.mkdir()
    tree = folder / "parts.csv"
    tree.write_text("child,parent\n" + "".join(f"{name},\n" for name in sorted(set(anatomies(ward)))))
    keys = ["--data.metadata", "anatomy", "--data.metadata_trees.anatomy", tree, "--data.allow_outside", "true"]
    keys += ["--objective.args.alpha", "0.2", "--intensity.size", "32"]
    manifest = shutil.copytree(ward, folder / "ward") / "manifest.csv"
    _, out, _ = said(capsys, "check", manifest, *keys)
    (line,) = [line for line in out.splitlines() if line.startswith("next")]
    words = shlex.split(line.removeprefix("next").replace("plan.toml", shlex.quote(str(tmp_path / "plan.toml"))))
    assert words[:3] == ["kladi", "plan", str(manifest)]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert {key: str(value) for key, value in zip(keys[::2], keys[1::2], strict=True)}.items() <= given.items()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--objective.name", "byool"], '"byool" is no objective; closest: "byol"'),
        (["--objective.name", "byol", "--objective.args.tempature", "3"], "is no argument of byol"),
        (["--topology.side", "900"], "has no more than"),
        (["--topology.sees", "diagram", "--topology.diagrams", "none"], "would see nothing at all"),
    ],
)
def test_a_dry_run_promises_nothing_that_the_run_refuses(capsys, ward, tmp_path, asked, words):
    on = ["--topology.on", "true"] if "--topology.side" in asked or "--topology.sees" in asked else []
    code, _, err = said(capsys, "pretrain", ward / "manifest.csv", "--out", tmp_path / "r", "--dry-run", *on, *asked)
    assert code == 2
    assert words in err


def test_a_dry_run_sees_that_the_folder_is_taken(capsys, ward, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine.txt").write_text("mine")
    code, _, err = said(capsys, "pretrain", ward / "manifest.csv", "--out", tmp_path / "r", "--dry-run")
    assert (code, "is not empty (it holds mine.txt)" in err) == (2, True)

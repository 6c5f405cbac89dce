"""A study from its file to its results: what is compared, resumed, refused, and what controls must show."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ranks_worker
from kladi import config as settings
from kladi import toy
from kladi.data.load import load
from kladi.errors import RunStopped, UserError
from kladi.evaluate.answers import Task
from kladi.evaluate.embed import describe
from kladi.evaluate.measure import Measured, Method, measure
from kladi.evaluate.readouts.regimes import Part
from kladi.evaluate.record import results
from kladi.evaluate.record.results import Row
from kladi.evaluate.splits import TEST, TRAIN, UNUSED, VAL
from kladi.learn import console, lock
from kladi.learn.fit import fit
from kladi.study import arms, cells, design, questions, record
from kladi.study.compare import compare, rates_at_an_end
from kladi.study.shift import fold_places

TOML = """
name = "toy"
data = "manifest.csv"
reference = "simclr"
regimes = ["probe"]
folds = 3
repeats = 2
seeds = 2
bootstrap = 100
controls = ["random_encoder", "histogram", "shuffled_labels"]

[settings]
data.metadata = ["modality", "anatomy"]
data.held_out = 0.5
data.store = "store"
intensity.size = 16
encoder.name = "test_efficientnet"
encoder.projector = [16, 8]
train.batch = 16
train.epochs = 1

[methods.simclr]
objective.name = "simclr"
[methods.scratch]
objective.name = "none"

[tasks.shape]
below = "round"
"""

ALONE = ('controls = ["random_encoder", "histogram", "shuffled_labels"]\n', "")
"""A change that leaves the controls out, which most of the time of a small study goes to."""


@pytest.fixture(scope="module", autouse=True)
def own_home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    before = {name: os.environ.get(name) for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    os.environ.update({name: str(home) for name in before})
    yield
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes that these tests start: another number of threads gives other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    toy.write(folder, 120, size=24, seed=0)
    (folder / "study.toml").write_text(TOML)
    return folder


@pytest.fixture(scope="module")
def finished(ward):
    torch.set_num_threads(1)  # fixtures of a module come before those of a test
    compare(ward / "study.toml", ward / "S")
    return ward / "S"


def changed(folder, *pairs, name="other.toml"):
    text = TOML
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    (folder / name).write_text(text)
    return folder / name


# --- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('reference = "simclr"', 'reference = "simcrl"', r'"simcrl" is no method; closest: "simclr"'),
        ('regimes = ["probe"]', 'regimes = ["prob"]', r'regimes = "prob" is not one of head, probe.*closest: "probe"'),
        ("folds = 3", 'folds = 3\ncontrols_of = ["simcrl"]', r'controls_of = "simcrl" is no method; closest: "simclr"'),
        ("repeats = 2", "repeat = 2", r'repeat is no key of a study; closest: "repeats"'),
        ("folds = 3", "folds = 2", r"folds 2: takes 3 to 100"),
        ("seeds = 2", "seeds = 3", r"seeds = 3 needs as many repeats"),
        ('controls = ["random_encoder"', 'controls = ["random_encodr"', r'closest: "random_encoder"'),
        ("[methods.scratch]", "[methods.scratch]\ntrain.devices = 2", r"trains each encoder in one process"),
        ("[methods.scratch]", "[methods.scratch]\nintensity.size = 32", r"intensity.size is the same for all methods"),
        ("train.epochs = 1", "train.epoch = 1", r"train.epoch is not a key; closest: .*train.epochs"),
        (
            'below = "round"',
            'below = "round"\ncolumn = "modality"',
            r"takes one of classes, below and column; it has 2",
        ),
        ('data = "manifest.csv"\n', "", r"data is missing"),
        ('data = "manifest.csv"\n', 'data = ""\n', r"data is missing"),
        ('["modality", "anatomy"]', '["modality", "label"]', r'data.metadata names "label", the label'),
        ('below = "round"', 'below = ""', r"tasks.shape.below is empty"),
        ('regimes = ["probe"]', 'regimes = ["retrieval"]', r'"shuffled_labels" needs a regime that classifies'),
        ('objective.name = "simclr"', 'objective.name = "simcrl"', r'"simcrl" is not one of .*closest: "simclr"'),
        ('objective.name = "simclr"', "train.lr = 0.1", r"methods.simclr: a study names the objective, here or under"),
        (
            'objective.name = "simclr"',
            'objective.name = "simclr"\ntopology = { sees = "diagram" }',
            r"methods.simclr: --topology.sees has no say without --topology.on true",
        ),
        (
            'objective.name = "simclr"',
            'objective.name = "simclr"\ntopology = { on = true, sees = "diagram", diagrams = "none" }',
            r"methods.simclr: --topology.diagrams none: .* would see nothing at all",
        ),
        ('regimes = ["probe"]', "regimes = []", r"regimes names nothing"),
        ("bootstrap = 100", "bootstrap = 100\nlabel_fractions = [0.0]", r"label_fractions 0: takes 1e-09 to 1"),
        (
            "[methods.scratch]",
            "[finetune]\nstep = 3\n[methods.scratch]",
            r'finetune.step is not a key; closest: "steps"',
        ),
        ('name = "toy"', "name = 3", r'name = "3" is not text'),
        ("[methods.scratch]", '[methods."../../scratch"]', r"the name '../../scratch' becomes a file's"),
        ("[tasks.shape]", '[tasks."a/b"]', r"the name 'a/b' becomes a file's"),
        ('name = "toy"', 'name = "toy"\ncompat = "relased"', r'compat = "relased" is not one of .*closest: "released"'),
        ('name = "toy"', 'name = "toy"\ncompat = "paper"', r'needs the regime "probe", without compat'),
    ],
)
def test_a_mistake_is_named_with_the_closest_word(ward, old, new, said):
    with pytest.raises(UserError, match=said):
        design.read(changed(ward, (old, new)))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('below = "round"', 'below = "rond"', r'task shape: "rond" is no node; closest: "round"'),
        ('below = "round"', 'column = "modalty"', r'no column "modalty"; closest: "modality"'),
        ('below = "round"', 'classes = {a = ["round"], b = ["round/disc"]}', r'"round/disc.*" is in two classes'),
        ('"histogram"', '"shuffled_tree"', r'control "shuffled_tree" has no use'),
        ("[methods.scratch]", '[methods.scratch]\ninit.weights = "no.safetensors"', r"no\.safetensors: cannot be read"),
    ],
)
def test_a_mistake_that_only_the_data_show_is_named_too(ward, old, new, said):
    with pytest.raises(UserError, match=said):
        compare(changed(ward, (old, new)), ward / "never")


def test_the_digest_knows_every_decision_and_no_path(ward, tmp_path):
    study = design.read(ward / "study.toml")
    moved = dataclasses.replace(study, data=tmp_path / "elsewhere.csv")
    assert moved.digest == study.digest
    for old, new in (("repeats = 2", "repeats = 4"), ("train.epochs = 1", "train.epochs = 2"), ('"histogram", ', "")):
        assert design.read(changed(ward, (old, new))).digest != study.digest


# --- the results -------------------------------------------------------------------------------------------------


def test_every_method_under_the_same_folds_against_the_reference(finished):
    content = results.read(finished)
    names = ["simclr", "random_encoder", "histogram", "shuffled_labels", "scratch"]
    assert [m["method"] for m in content["methods"]] == names
    made = {m["method"]: (m["encoder"], m["parameters"], m["width"]) for m in content["methods"]}
    assert made["simclr"] == made["random_encoder"] == made["shuffled_labels"] == made["scratch"]
    network, parameters, _ = made["simclr"]
    assert network == "test_efficientnet"
    assert parameters == 98_764
    grey, none, columns = made["histogram"]
    assert grey.startswith("64-bin grey histogram")
    assert (none, columns) == (0, 128)
    rows = [r for r in content["rows"] if r["metric"] == "balanced_accuracy"]
    for name in names:
        assert sorted((r["repeat"], r["fold"]) for r in rows if r["method"] == name) == [
            (repeat, fold) for repeat in range(2) for fold in range(3)
        ]
    # Repeat r is of pretraining seed r mod 2; what is not drawn has one seed.
    assert {(r["repeat"], r["seed"]) for r in rows if r["method"] == "simclr"} == {(0, 0), (1, 1)}
    assert {r["seed"] for r in rows if r["method"] == "histogram"} == {0}
    compared = {(c["method"], c["reference"]) for c in content["comparisons"]}
    assert compared == {(name, "simclr") for name in names[1:]}
    decided = [c for c in content["comparisons"] if c["holm_p"] is not None]
    assert {c["metric"] for c in decided} == {"balanced_accuracy"}
    assert len(decided) == 4
    assert content["study"]["digest"] == design.read(finished.parent / "study.toml").digest
    assert all(r["n"] > 0 and r["n_patients"] > 0 for r in rows)


def test_a_second_run_computes_nothing_and_gives_the_same_digest(finished, monkeypatch):
    before = results.read(finished)["digest"]
    monkeypatch.setattr(cells, "_frozen", lambda *a: pytest.fail("measured again"))
    monkeypatch.setattr(arms, "encoder_of", lambda *a: pytest.fail("prepared again"))
    compare(finished.parent / "study.toml", finished)
    assert results.read(finished)["digest"] == before


def test_two_runs_of_one_seed_give_the_same_results(finished, ward):
    compare(ward / "study.toml", ward / "again")
    assert results.read(ward / "again")["digest"] == results.read(finished)["digest"]


def test_a_damaged_cell_is_measured_again(finished):
    before = results.read(finished)["digest"]
    cell = sorted((finished / "cells").iterdir())[0]
    cell.write_bytes(cell.read_bytes()[:200])
    compare(finished.parent / "study.toml", finished)
    assert results.read(finished)["digest"] == before


def test_another_setting_is_never_answered_from_old_cells(finished, ward):
    path = changed(ward, ALONE, ("train.epochs = 1", "train.epochs = 2"))
    said = []
    compare(path, finished, say=said.append)
    assert sum("encoder    simclr" in line for line in said) == 2
    assert len(list((finished / "runs").glob("simclr-0-*"))) == 2


def test_nothing_is_reused_once_rows_patients_sites_or_an_early_end_have_changed(ward, finished):
    """What was kept holds positions of rows and shuffles over patients: each change has its own runs and cells."""
    context = cells.context((ward / "study.toml").absolute(), finished.absolute())
    data, arm, cell = context.dataset, context.arms[0], cells.cells(context)[0]
    order = np.arange(len(data))[::-1]
    moved = [
        dataclasses.replace(data, row_id=data.row_id[order]),
        dataclasses.replace(data, group=data.group[order]),
        dataclasses.replace(data, columns={**data.columns, "site": ("a",) * len(data)}),
    ]
    for other in moved:
        changed = dataclasses.replace(context, data_digest=cells.data_digest(other))
        assert changed.run_of(arm, 0) != context.run_of(arm, 0)
        assert cells.digest(cell, changed) != cells.digest(cell, context)
    early = dataclasses.replace(arm, config=settings.override(arm.config, {"train.max_steps": 1}))
    assert early.digest(0, "d") != arm.digest(0, "d")


def test_a_file_that_decides_is_known_by_its_content(ward, tmp_path):
    config = design.read(ward / "study.toml").config
    digests = []
    for number in range(2):
        file = tmp_path / str(number) / "my_loss.py"
        file.parent.mkdir()
        file.write_text(f"# {number}")
        named = settings.override(config, {"objective.name": f"{file}:Loss"})
        digests.append(arms.Arm("m", named, "pretrained").digest(0, "d"))
    assert digests[0] != digests[1]


def test_an_edited_study_is_read_again_in_the_same_process(ward, tmp_path):
    path = changed(ward, ALONE, name="edited.toml")
    compare(path, tmp_path / "S")
    changed(ward, ALONE, ("folds = 3", "folds = 4"), name="edited.toml")
    compare(path, tmp_path / "S")
    assert results.read(tmp_path / "S")["splits"]["folds"] == 4


def test_a_run_that_was_killed_before_it_began_is_taken_up(ward, finished, tmp_path):
    compare(ward / "study.toml", finished)  # another test may have left the results of other settings there
    shutil.copytree(finished, tmp_path / "S")
    for run in (tmp_path / "S").glob("runs/simclr-0-*"):
        kept = (run / "rows.safetensors").read_bytes()
        shutil.rmtree(run)
        run.mkdir()
        (run / "rows.safetensors").write_bytes(kept)
        (run / "log.txt").write_text("begun\n")
    compare(ward / "study.toml", tmp_path / "S")
    assert results.read(tmp_path / "S")["digest"] == results.read(finished)["digest"]


def test_the_family_is_the_reference_and_nothing_else(ward):
    """A control of another method is compared with it, but decides nothing."""
    path = changed(
        ward,
        (', "histogram", "shuffled_labels"', ', "shuffled_metadata"'),
        ("[methods.scratch]", '[methods.metadata]\nobjective.name = "metadata"\n[methods.scratch]'),
    )
    compare(path, ward / "family")
    content = results.read(ward / "family")
    own = [c for c in content["comparisons"] if c["reference"] == "metadata, shuffled_metadata"]
    assert {c["method"] for c in own} == {"metadata"}
    assert all(c["holm_p"] is None for c in own)
    decided = [c for c in content["comparisons"] if c["holm_p"] is not None]
    said = {f"{c['metric']}, {c['regime']}, {c['dataset']}, {c['method']} against {c['reference']}" for c in decided}
    assert said == set(content["study"]["family"])


def test_a_share_named_twice_is_one_and_the_whole_is_always_there(ward):
    study = design.read(changed(ward, ("bootstrap = 100", "bootstrap = 100\nlabel_fractions = [0.5, 0.5, 0.1]")))
    assert study.label_fractions == (1.0, 0.5, 0.1)


def test_two_trees_have_each_their_own_temperatures(ward):
    path = changed(
        ward,
        ('"histogram"', '"matched_temperature"'),
        (
            "[methods.scratch]",
            '[methods.a]\nobjective.name = "label_tree"\n[methods.b]\nobjective.name = "label_tree"\n'
            'objective.args = { temperature = "warm" }\n[methods.scratch]',
        ),
    )
    with pytest.raises(UserError, match=r"b: objective\.args\.temperature = warm is no number"):
        arms.arms(design.read(path))
    path.write_text(path.read_text().replace('"warm"', "0.2"))
    names = [arm.name for arm in arms.arms(design.read(path)) if "supcon" in arm.name]
    assert names == [f"a, supcon T {t}" for t in ("0.05", "0.07", "0.1", "0.14", "0.2")] + [
        f"b, supcon T {t}" for t in ("0.1", "0.14", "0.2", "0.28", "0.4")
    ]


def test_a_tree_that_cannot_be_shuffled_is_said_before_anything_is_trained(ward):
    lines = (ward / "manifest.csv").read_text().splitlines()
    flat = [lines[0], *(line.replace("/", "_").replace("images_", "images/") for line in lines[1:])]
    (ward / "flat.csv").write_text("\n".join(flat))
    path = changed(
        ward,
        ("manifest.csv", "flat.csv"),
        ('"histogram"', '"shuffled_tree"'),
        ('below = "round"', 'column = "modality"'),
        ("[methods.scratch]", '[methods.tree]\nobjective.name = "label_tree"\n[methods.scratch]'),
    )
    with pytest.raises(UserError, match=r"shuffled_tree of tree: .* cannot be arranged"):
        compare(path, ward / "flat")
    assert not list((ward / "flat").glob("runs/*"))


def test_workers_are_one_or_more(ward):
    with pytest.raises(UserError, match="--workers 0: takes 1 or more"):
        compare(ward / "study.toml", ward / "never", workers=0)


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on_to_the_same_results(ward, finished, tmp_path):
    command = [sys.executable, "-m", "kladi", "compare", str(ward / "study.toml"), "--out", str(tmp_path / "S")]
    rng, kills, alone = np.random.default_rng(0), 0, {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for turn in range(40):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=alone)
        time.sleep(float(rng.uniform(1, 3)) * 1.5**turn)  # early at first, and soon late enough on any machine
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, err = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err.decode()
    assert process.returncode == 0
    assert kills >= 1
    compare(ward / "study.toml", ward / "S")
    killed, undisturbed = results.read(tmp_path / "S"), results.read(ward / "S")
    assert killed["provenance"]["threads"] == undisturbed["provenance"]["threads"]
    timeless = [results._timeless(content) for content in (killed, undisturbed)]
    assert [key for key in timeless[0] if timeless[0][key] != timeless[1][key]] == []
    assert killed["digest"] == undisturbed["digest"]


@pytest.mark.slow
def test_no_worker_outlives_a_study_that_was_killed(ward, tmp_path):
    path = changed(ward, ("train.epochs = 1", "train.epochs = 500"), name="long.toml")
    command = [sys.executable, "-m", "kladi", "compare", str(path), "--out", str(tmp_path / "S"), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "S").glob("runs/*/metrics.jsonl"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    holders = [json.loads(p.read_text())["pid"] for p in (tmp_path / "S").glob("runs/*/lock")]
    assert holders
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(lock.alive(pid) for pid in holders):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_processes_side_by_side_measure_what_one_does(ward, tmp_path):
    """Embeddings of encoders that nothing trains: the same bits whatever the number of threads."""
    path = changed(ward, ('objective.name = "simclr"', 'objective.name = "none"'), name="still.toml")
    compare(path, tmp_path / "one")
    compare(path, tmp_path / "two", workers=2)
    one, two = results.read(tmp_path / "one"), results.read(tmp_path / "two")
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a["metric"] == b["metric"]
        assert a["value"] == pytest.approx(b["value"], abs=1e-6) if a["value"] is not None else b["value"] is None


# --- leaks and controls ------------------------------------------------------------------------------------------


def test_a_patient_on_both_sides_is_refused(ward):
    lines = (ward / "manifest.csv").read_text().splitlines()
    split = ["split", *(("train", "test")[i % 2] for i in range(len(lines) - 1))]
    (ward / "torn.csv").write_text("\n".join(f"{line},{part}" for line, part in zip(lines, split, strict=True)))
    with pytest.raises(UserError, match="in two splits"):
        compare(changed(ward, ("manifest.csv", "torn.csv")), ward / "torn")


def test_shuffled_labels_are_dealt_over_patients_and_tests_keep_the_truth():
    data = toy.dataset(n=90, size=16)
    study = design.from_tables(
        {"data": "x", "methods": {"m": {"objective": {"name": "simclr"}}}, "folds": 3, "repeats": 1, "seeds": 1}, Path()
    )
    asked = questions.ask(design.Question("label"), data, np.ones(90, dtype=bool), study)
    part = asked.parts[0]
    dealt = questions.shuffled_labels(asked, part, seed=0)
    rows, rest = part.rows(TRAIN), np.flatnonzero(part.of != TRAIN)
    assert (dealt[rest] == asked.task.target[rest]).all()
    assert sorted(dealt[rows]) == sorted(asked.task.target[rows])
    assert (dealt[rows] != asked.task.target[rows]).mean() > 0.5


def test_metadata_is_dealt_over_patients_with_equal_counts():
    data = toy.dataset(n=90, size=16)
    config = design.from_tables({"data": "x", "methods": {"m": {"objective": {"name": "metadata"}}}}, Path()).config
    arm = arms.Arm("metadata, shuffled", config, "pretrained", shuffled="metadata")
    dealt = arms.shuffled(arm, 0, data)
    rows = data.split == TRAIN
    before, after = data.label_sets.class_id, dealt.label_sets.class_id
    assert sorted(before[rows]) == sorted(after[rows])
    assert (before[~rows] == after[~rows]).all()
    assert (before[rows] != after[rows]).mean() > 0.3
    assert (arms.shuffled(arm, 0, data).label_sets.class_id == after).all()
    assert (arms.shuffled(arm, 1, data).label_sets.class_id != after).any()


def test_tables_are_dealt_among_training_rows_and_a_row_stays_whole():
    data = ranks_worker.with_tables(toy.dataset(n=90, size=16))
    config = design.from_tables({"data": "x", "methods": {"m": {"objective": {"name": "multimodal"}}}}, Path()).config
    arm = arms.Arm("multimodal, shuffled", config, "pretrained", shuffled="tables")
    dealt = arms.shuffled(arm, 0, data)
    rows = data.split == TRAIN

    def whole(dataset):
        return np.concatenate([np.column_stack([m.values, m.present]) for m in dataset.modalities], axis=1)

    before, after = whole(data), whole(dealt)
    assert np.array_equal(before[~rows], after[~rows])
    assert not np.array_equal(before[rows], after[rows])
    assert sorted(map(tuple, before[rows])) == sorted(map(tuple, after[rows]))
    assert not np.array_equal(whole(arms.shuffled(arm, 1, data)), after)


def test_one_image_a_patient_is_a_plain_permutation_and_counts_are_kept():
    values, group = np.arange(20), np.arange(20)
    dealt = questions.over_patients(values, group, np.random.default_rng(0))
    assert sorted(dealt) == list(range(20))
    assert (dealt != values).any()


def test_fewer_labels_are_nested_stratified_and_of_whole_patients():
    data = toy.dataset(n=240, size=16)
    study = design.from_tables(
        {"data": "x", "methods": {"m": {"objective": {"name": "simclr"}}}, "folds": 5, "repeats": 2, "seeds": 1}, Path()
    )
    asked = questions.ask(design.Question("label"), data, np.ones(240, dtype=bool), study)
    part = asked.parts[0]
    all_patients = set(data.group[part.of == TRAIN])
    kept = {}
    for share in (0.01, 0.1, 0.5):
        fewer = questions.fewer_labels(part, asked, data, share, seed=0)
        kept[share] = set(data.group[fewer.of == TRAIN])
        assert (fewer.of[part.of == TEST] == TEST).all()
        assert (fewer.of[part.of == VAL] == VAL).all()
        gone = (part.of == TRAIN) & (fewer.of == UNUSED)
        assert not kept[share] & set(data.group[gone])
    assert kept[0.01] <= kept[0.1] <= kept[0.5] < all_patients
    other = questions.fewer_labels(asked.parts[5], asked, data, 0.1, seed=0)
    assert set(data.group[other.of == TRAIN]) != kept[0.1]


# --- the tasks ---------------------------------------------------------------------------------------------------


def test_a_task_is_classes_or_a_subtree_or_a_column():
    data = toy.dataset(n=90, size=16)
    study = design.from_tables(
        {"data": "x", "methods": {"m": {"objective": {"name": "simclr"}}}, "folds": 3, "repeats": 1, "seeds": 1}, Path()
    )
    everyone = np.ones(90, dtype=bool)
    names = np.array(data.taxonomy.names)

    below = questions.ask(design.Question("b", below="round"), data, everyone, study).task
    inside = np.char.startswith(names[data.target], "round/")
    assert ((below.target >= 0) == inside).all()
    assert "round" not in below.taxonomy.names
    assert "round/disc" in below.taxonomy.names
    assert (np.array(below.taxonomy.names)[below.target[inside]] == names[data.target[inside]]).all()

    flat = {"ring": ("round/ring",), "else": ("angular", "round/disc/plain")}
    classes = questions.ask(design.Question("c", flat), data, everyone, study).task
    is_ring = np.char.startswith(names[data.target], "round/ring")
    assert (np.array(classes.taxonomy.names)[classes.target[is_ring]] == "ring").all()
    assert (classes.target[names[data.target] == "round/disc/striped"] == -1).all()

    column = questions.ask(design.Question("d", column="modality"), data, everyone, study).task
    assert [column.taxonomy.names[t] for t in column.target] == list(data.columns["modality"])


@pytest.mark.parametrize("crossed", [False, True])
@given(st.integers(0, 2**31), st.integers(2, 4), st.integers(3, 5))
def test_a_shift_tests_a_place_by_what_was_trained_elsewhere(crossed, seed, places, folds):
    rng = np.random.default_rng(seed)
    n, patients = 80, 20
    group = rng.integers(0, patients, n)
    place = rng.integers(0, places, n) if crossed else (group % places)
    place = np.where(rng.random(n) < 0.1, -1, place)
    place[:places], group[:places] = np.arange(places), np.arange(places)
    fold = rng.permutation(patients) % folds
    of_fold = [
        np.where(fold[group] == k, TEST, np.where(fold[group] == (k + 1) % folds, VAL, TRAIN)) for k in range(folds)
    ]
    unused = rng.random(n) < 0.1
    given_parts = tuple(
        Part(k, r, np.where(unused, UNUSED, of)) for r in range(2) for k, of in enumerate(np.roll(of_fold, r, axis=0))
    )
    target = rng.integers(0, 2, n)
    parts = fold_places(given_parts, place, group, target)
    assert [(part.repeat, part.fold) for part in parts] == [(r, v) for r in range(2) for v in range(places)]
    for part in parts:
        test, others = part.rows(TEST), np.concatenate([part.rows(TRAIN), part.rows(VAL)])
        assert (place[test] == part.fold).all()
        assert (place[others] != part.fold).all()
        assert (place[others] >= 0).all()
        assert not set(group[test]) & set(group[others])
        assert not set(group[part.rows(TRAIN)]) & set(group[part.rows(VAL)])
        assert not unused[np.concatenate([test, others])].any()
    if not crossed:  # every patient in one place: all of them are tested, once a repeat
        tested = sum((part.of == TEST).astype(int) for part in parts if part.repeat == 0)
        assert (tested == ((place >= 0) & ~unused)).all()


def test_a_study_measures_a_shift(ward, tmp_path):
    file = changed(ward, ('below = "round"', 'below = "round"\nshift = "Modality"'), name="shift.toml")
    with pytest.raises(UserError, match=r'no column "Modality"; closest: "modality"'):
        compare(file, tmp_path / "S")
    file = changed(ward, ALONE, ('below = "round"', 'below = "round"\nshift = "modality"'), name="shift.toml")
    compare(file, tmp_path / "S")
    found = results.read(tmp_path / "S")
    places = len(set(cells.context(file, tmp_path / "S").dataset.columns["modality"]))
    assert {row["fold"] for row in found["rows"]} == set(range(places))
    assert len(found["splits"]["shift"]["shape"]["places"]) == places
    assert all(c["corrected_t_p"] is None and c["wilcoxon_p"] is None for c in found["comparisons"])
    assert not found["study"]["family"]
    assert all(row["value"] is not None for row in found["rows"] if row["metric"] == "balanced_accuracy")
    same = changed(ward, ('below = "round"', 'column = "modality"\nshift = "modality"'), name="shift.toml")
    with pytest.raises(UserError, match=r"no class of .* is anywhere else"):
        compare(same, tmp_path / "U")
    one = changed(ward, ('below = "round"', 'below = "round/disc"\nshift = "site"'), name="shift.toml")
    text = (ward / "manifest.csv").read_text().splitlines()
    (ward / "one.csv").write_text("\n".join([f"{text[0]},site", *(f"{line},here" for line in text[1:])]) + "\n")
    one.write_text(one.read_text().replace("manifest.csv", "one.csv"))
    with pytest.raises(UserError, match=r'shift = "site" has 1 value here; it takes 2 to 50'):
        compare(one, tmp_path / "T")


CLASSIFIERS = """
name = "losses"
data = "manifest.csv"
reference = "flat"
regimes = ["head", "probe", "finetune"]
folds = 3
repeats = 1
seeds = 1
bootstrap = 50
controls = ["shuffled_tree"]
[settings]
data.held_out = 0.5
data.store = "store"
intensity.size = 16
encoder.name = "test_efficientnet"
encoder.projector = [16, 8]
train.batch = 16
train.epochs = 1
[finetune]
steps = 4
epochs = 0
scales = [1.0]
looks = 2
[methods.flat]
objective.name = "cross_entropy"
classify = { loss = "cross_entropy" }
[methods.tree]
objective.name = "tree_cross_entropy"
classify = { loss = "hace", retain = 0.5 }
[methods.hxe]
objective.name = "hxe"
classify = { loss = "hxe", alpha = 0.2 }
[tasks.all]
"""


@pytest.mark.slow
def test_a_study_of_losses(ward, tmp_path):
    file = ward / "losses.toml"
    file.write_text(CLASSIFIERS)
    compare(file, tmp_path / "L")
    found = results.read(tmp_path / "L")
    values = {
        (row["method"], row["regime"]): row["value"] for row in found["rows"] if row["metric"] == "calibration_error"
    }
    methods = ["flat", "tree", "tree, shuffled_tree", "hxe", "hxe, shuffled_tree"]
    assert set(values) == {(m, r) for m in methods for r in ("head", "probe", "finetune")}
    assert all(value is not None for value in values.values())
    scales = [row["value"] for row in found["rows"] if row["metric"] == "learning_rate_scale"]
    assert len(scales) == 3 * len(methods)
    assert set(scales) <= set(cells.context(file, tmp_path / "L").study.finetune.scales)
    for name in ("head", "probe", "finetune"):
        assert values["tree", name] != values["tree, shuffled_tree", name]
    context = cells.context(file, tmp_path / "L")
    digests = {arm.name: cells.digest(cells.Cell(arm.name, 0, "all", "frozen"), context) for arm in context.arms}
    assert len(set(digests.values())) == len(digests)


def test_a_grid_of_learning_rates_that_ends_too_soon_is_said():
    def measured(method, *scales):
        rows = [Row(method, "finetune", "all", "learning_rate_scale", s, 9, 9, fold=i) for i, s in enumerate(scales)]
        return Measured(rows=rows)

    found = [measured("a", 3.0, 3.0, 1.0), measured("b", 0.3, 3.0), measured("c", 1.0, 1.0), measured("d", 0.3)]
    assert rates_at_an_end((0.3, 1.0, 3.0), found) == [
        "all: 2 of 3 fine-tunes chose the greatest learning rate of a; let finetune.scales reach further",
        "all: 1 of 1 fine-tunes chose the least learning rate of d; let finetune.scales reach further",
    ]
    assert rates_at_an_end((0.3, 3.0), found) == []


@pytest.mark.slow
def test_methods_that_differ_in_their_loss_begin_at_one_place(ward, tmp_path, monkeypatch):
    """Of each repeat one fold is fine-tuned, its start is made once, and sharing it changes no answer."""
    plain = '[methods.plain]\nobjective.name = "none"\n'
    hace = '[methods.hace]\nobjective.name = "none"\nclassify = { loss = "hace", retain = 0.5 }\n'
    head = CLASSIFIERS.partition("[methods.flat]")[0]
    head = head.replace('["head", "probe", "finetune"]', '["finetune"]').replace("flat", "hace")
    head = head.replace('controls = ["shuffled_tree"]', "controls = []\ntrained_folds = 1")
    head = head.replace("repeats = 1\nseeds = 1", "repeats = 2\nseeds = 2")
    began = []
    begin = cells.begin
    monkeypatch.setattr(cells, "begin", lambda *given: began.append(given[3].repeat) or begin(*given))
    values = []
    for name, methods in (("both", plain + hace), ("one", hace)):
        file = ward / f"{name}.toml"
        file.write_text(head + methods + "[tasks.all]\n")
        compare(file, tmp_path / name)
        rows = results.read(tmp_path / name)["rows"]
        assert {(row["fold"], row["repeat"]) for row in rows} == {(0, 0), (0, 1)}
        values.append([row["value"] for row in rows if row["method"] == "hace"])
    assert began == [0, 1, 0, 1]  # once a repeat for both methods, and again for the study of one
    assert values[0] == values[1]


LONGER = '[methods.longer]\nafter = "simclr"\nobjective.name = "metadata"\n[methods.scratch]'
AS_IT_IS = '[methods."as it is"]\nafter = "longer"\nobjective.name = "none"\n[methods.scratch]'


@pytest.mark.slow
def test_a_method_can_begin_where_another_ended(ward, tmp_path):
    """Of the same seed; in two processes the other one is trained first, and what it has read counts as read."""
    file = changed(
        ward,
        ("[methods.scratch]", LONGER.replace("[methods.scratch]", AS_IT_IS)),
        ('"shuffled_labels"', '"shuffled_metadata"'),
        name="longer.toml",
    )
    compare(file, tmp_path / "L", workers=2)
    context = cells.context(file, tmp_path / "L")
    arm, first = context.arm("longer"), context.arm("simclr")
    assert context.before(arm, 1) == context.run_of(first, 1)
    assert context.before(context.arm("longer, shuffled_metadata"), 1) == context.run_of(first, 1)
    assert context.before(first, 0) is None
    alone = dataclasses.replace(arm, after=None)
    assert arm.digest(0, "d") != alone.digest(0, "d")
    assert arms.images_seen(arm, context.dataset) == 2 * arms.images_seen(first, context.dataset)
    longer = settings.override(arm.seeded(1), {"init.weights": str(context.run_of(first, 1))})
    fit(context.dataset, longer, tmp_path / "by hand", progress=console.Silent())
    kept = (context.run_of(arm, 1) / "model.safetensors").read_bytes()
    assert kept == (tmp_path / "by hand" / "model.safetensors").read_bytes()
    same = context.arm("as it is")
    assert (same.kind, len(context.seeds(same)), same.reads_labels) == ("given", 2, False)
    assert arms.images_seen(same, context.dataset) == arms.images_seen(arm, context.dataset)
    for seed in (0, 1):
        mine, theirs = (cells.prepared(one, seed, context).features for one in (same, arm))
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('after = "simclr"', 'after = "simcrl"', 'after = "simcrl" is no method above it; closest: "simclr"'),
        ('after = "simclr"', 'after = "longer"', 'after = "longer" is no method above it'),
        ('"metadata"\n', '"metadata"\ninit.weights = "x"\n', 'after = "simclr" goes without init.weights'),
    ],
)
def test_a_mistake_in_after_is_named(ward, old, new, said):
    assert old in LONGER
    with pytest.raises(UserError, match=said):
        design.read(changed(ward, ("[methods.scratch]", LONGER.replace(old, new))))


def test_embeddings_from_a_file_are_a_method(ward, tmp_path):
    data = load(ward / "manifest.csv", settings.override(design.read(ward / "study.toml").config, {}))[0]
    rng = np.random.default_rng(0)
    order = rng.permutation(len(data))
    told = np.eye(len(data.taxonomy), dtype=np.float32)[data.target] + 0.1 * rng.normal(size=(len(data), 1))
    embedded = describe(data, told.astype(np.float32))
    fields = ("features", "row_id", "pixel_digest", "manifest_row", "target", "group", "split")
    moved = dataclasses.replace(embedded, **{name: getattr(embedded, name)[order] for name in fields}, columns={})
    moved.write(ward / "theirs.npz")
    theirs = '[methods.theirs]\nembeddings = "theirs.npz"\nclassify = { loss = "hxe" }\n[methods.scratch]'
    file = changed(ward, ALONE, ("[methods.scratch]", theirs), name="theirs.toml")
    compare(file, tmp_path / "E")
    found = results.read(tmp_path / "E")
    right = [r["value"] for r in found["rows"] if (r["method"], r["metric"]) == ("theirs", "balanced_accuracy")]
    assert np.mean(right) > 0.95  # in another order, joined by what the images hold
    assert any("which patients its encoder has seen is unknown" in w for w in found["data"]["warnings"])
    made = next(m for m in found["methods"] if m["method"] == "theirs")
    assert (made["encoder"], made["parameters"], made["width"]) == ("embeddings from a file", None, told.shape[1])
    fewer = {name: getattr(embedded, name)[3:] for name in fields}
    dataclasses.replace(embedded, **fewer, columns={}).write(ward / "theirs.npz")
    with pytest.raises(UserError, match=r"theirs.npz lacks 3 of 120 images \(rows"):
        compare(file, tmp_path / "F")
    both = changed(
        ward, ("[methods.scratch]", theirs.replace("[methods.scratch]", "train.lr = 1.0\n[methods.scratch]"))
    )
    with pytest.raises(UserError, match="no other setting has a say"):
        design.read(both)
    tuned = changed(ward, ("[methods.scratch]", theirs), ('["probe"]', '["finetune"]'))
    with pytest.raises(UserError, match="embeddings cannot be fine-tuned"):
        design.read(tuned)


@pytest.mark.parametrize(
    ("classify", "said"),
    [
        ('{ loss = "hase" }', r'methods.simclr.classify.loss = "hase" is not one of .*closest: "hace"'),
        ('{ loss = "hace", retan = 0.2 }', r'methods.simclr.classify.retan is no argument of hace; closest: "retain"'),
        ('"hace"', r"methods.simclr.classify is a table: "),
    ],
)
def test_a_mistake_in_a_criterion_is_named(ward, classify, said):
    file = changed(ward, ('objective.name = "simclr"', f'objective.name = "simclr"\nclassify = {classify}'))
    with pytest.raises(UserError, match=said):
        design.read(file)


def test_only_rows_that_pretraining_has_not_seen_are_asked():
    data = toy.dataset(n=90, size=16)
    study = design.from_tables(
        {"data": "x", "methods": {"m": {"objective": {"name": "simclr"}}}, "folds": 3, "repeats": 1, "seeds": 1}, Path()
    )
    asked = questions.ask(design.Question("m", column="modality"), data, data.split != TRAIN, study)
    assert not (asked.task.target[data.split == TRAIN] >= 0).any()


# --- cells -------------------------------------------------------------------------------------------------------


def test_a_cell_comes_back_as_it_was(finished):
    context = cells.context((finished.parent / "study.toml").absolute(), finished.absolute())
    cell = cells.cells(context)[0]
    cells.run(cell, context)
    measured = cells.done(cell, context)
    path = finished / "copy.npz"
    record.write(path, measured, "d")
    again = record.read(path, "d")
    assert again.rows == measured.rows
    for a, b in zip(again.answers, measured.answers, strict=True):
        np.testing.assert_array_equal(a.scores, b.scores)
        np.testing.assert_array_equal(a.pred, b.pred)
    assert record.read(path, "e") is None
    path.write_bytes(b"PK nothing")
    assert record.read(path, "d") is None
    record.write(path, Measured(), "d")
    assert record.read(path, "d") == Measured()
    path.unlink()


def test_no_path_and_no_patient_in_what_is_kept(finished):
    whole = b"".join(p.read_bytes() for p in finished.rglob("*") if p.is_file())
    for secret in (str(finished.parent), "p0003"):
        assert secret.encode() not in whole
    assert json.loads((finished / "results.json").read_text())["study"]["command"] == "kladi compare study.toml --out S"


def test_shuffled_labels_give_chance_where_the_true_ones_are_plain_to_see():
    """Features that hold the label whole: the true probe reads it, one taught with dealt labels answers by chance."""
    data = toy.dataset(n=240, size=16)
    study = design.from_tables(
        {"data": "x", "methods": {"m": {"objective": {"name": "simclr"}}}, "folds": 5, "repeats": 4, "seeds": 1}, Path()
    )
    asked = questions.ask(design.Question("label"), data, np.ones(240, dtype=bool), study)
    rng = np.random.default_rng(0)
    features = (np.eye(len(data.taxonomy))[data.target] + 0.2 * rng.normal(size=(240, len(data.taxonomy)))).astype("f4")
    method, classes = Method("m", features), len(np.unique(data.target))

    def accuracy(task, part):
        rows = measure(method, task, (part,), regimes=("probe",), lambdas=(0.1, 0.001)).rows
        return next(r.value for r in rows if r.metric == "balanced_accuracy")

    true = [accuracy(asked.task, part) for part in asked.parts]
    task = asked.task
    dealt = [
        accuracy(Task(task.name, task.taxonomy, questions.shuffled_labels(asked, part, 0), task.group), part)
        for part in asked.parts
    ]
    assert np.mean(true) > 0.9
    assert abs(np.mean(dealt) - 1 / classes) < 3 * np.std(dealt, ddof=1) / np.sqrt(len(dealt)) + 0.01


def test_a_study_by_the_published_recipes(ward):
    changes = (ALONE[0], 'compat = "released"\n'), ('["probe"]', '["probe", "finetune"]'), ("folds = 3", "folds = 3\n")
    compare(changed(ward, *changes, name="compat.toml"), ward / "compat")
    content = results.read(ward / "compat")
    assert content["study"]["compat"] == "released"
    assert {(i["method"], i["regime"]) for i in content["figures"]["intervals"] if i["metric"] == "auc"} == {
        (method, regime) for method in ("simclr", "scratch") for regime in ("probe", "finetune")
    }
    assert any("published recipes" in warning for warning in content["data"]["warnings"])
    assert len(content["comparisons"]) > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (('objective.name = "simclr"', 'objective = { name = "simclr", args = { temperature = 0 } }'), "temperature"),
        (('objective.name = "simclr"', 'objective.name = "my.py:Loss"'), "there is no file"),
        (('objective.name = "simclr"', 'objective.name = ":"'), "without a file"),
        (('objective.name = "none"', 'objective.name = "none"\ninit.weights = "study.toml"'), "study.toml"),
    ],
)
def test_a_mistake_of_the_last_method_costs_no_training(ward, tmp_path, changes, said):
    file = changed(ward, changes, name="late.toml")
    with pytest.raises(UserError, match=said) as error:
        compare(file, tmp_path / "late")
    assert str(error.value).startswith("methods.")
    assert not (tmp_path / "late" / "runs").exists()


def test_patients_that_foreign_weights_have_seen_are_in_no_fold(ward, tmp_path):
    config = design.read(ward / "study.toml").config
    dataset, _ = load(ward / "manifest.csv", config)
    everyone = dataclasses.replace(dataset, split=np.where(np.arange(len(dataset)) < 30, 0, 1))
    fit(everyone, settings.override(config, {"objective.name": "simclr"}), tmp_path / "run", progress=console.Silent())
    weights = f'objective.name = "none"\ninit.weights = "{tmp_path / "run" / "model.safetensors"}"'
    context = cells.context(changed(ward, ('objective.name = "none"', weights), name="foreign.toml"), tmp_path)
    met = np.isin(dataset.group, dataset.group[:30])
    for asked in context.asked.values():
        assert (asked.task.target[met] == -1).all()
        assert (asked.task.target[~met] >= 0).any()
    assert any("in no fold of any method" in warning for warning in context.warnings)


def test_a_column_is_read_as_metadata_are(ward, tmp_path):
    text = (ward / "manifest.csv").read_text().splitlines()
    cells_of = ["High", "high ", "low", "unknown", "LOW", "n/a"]
    rows = [f"{line},{cells_of[i % 6]}" for i, line in enumerate(text[1:])]
    (ward / "graded.csv").write_text("\n".join([f"{text[0]},grade", *rows]) + "\n")
    changes = ('data = "manifest.csv"', 'data = "graded.csv"'), ('below = "round"', 'column = "grade"')
    context = cells.context(changed(ward, *changes, name="graded.toml"), tmp_path)
    assert context.asked["shape"].task.taxonomy.names == ("high", "low")


def test_a_task_that_the_pretraining_was_told_is_named(ward, tmp_path):
    changes = ('objective.name = "simclr"', 'objective.name = "metadata"'), ('below = "round"', 'column = "modality"')
    context = cells.context(changed(ward, *changes, name="told.toml"), tmp_path)
    assert any("that is no transfer" in warning for warning in context.warnings)


def test_fine_tuning_that_diverges_is_a_row_with_its_reason(ward, tmp_path):
    wild = "encoder_lr = 1e5\nhead_lr = 1e5\nscales = [1.0]\nsteps = 4\nepochs = 0\nclip = 1e9"
    recipe = f"[finetune]\n{wild}\n[methods.scratch]"
    file = changed(ward, ALONE, ('["probe"]', '["finetune"]'), ("[methods.scratch]", recipe), name="wild.toml")
    compare(file, tmp_path / "wild")
    rows = results.read(tmp_path / "wild")["rows"]
    assert rows
    assert all(row["value"] is not None or row["reason"] for row in rows)


def test_what_is_wrong_with_one_run_is_mended_by_deleting_it(ward, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "S")
    for broken in (tmp_path / "S" / "runs").glob("simclr-*"):
        (broken / "embeddings.npz").write_bytes(b"PK")
    shutil.rmtree(tmp_path / "S" / "cells")
    with pytest.raises(UserError, match="delete that folder"):
        compare(ward / "study.toml", tmp_path / "S")


def test_a_folder_that_is_in_the_way_is_named(ward, tmp_path):
    (tmp_path / "S").mkdir()
    (tmp_path / "S" / "splits").write_text("")
    with pytest.raises(RunStopped, match="cannot be read or written"):
        compare(ward / "study.toml", tmp_path / "S")

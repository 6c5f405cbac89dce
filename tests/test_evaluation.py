"""From a run folder to results.json: what is written, what is refused, what is said of where the encoder looked."""

from __future__ import annotations

import dataclasses
import json
import re
import stat

import numpy as np
import pytest
import torch
from torch import nn

from kladi import config as settings
from kladi import toy
from kladi.data.dataset import HELD_OUT, TEST, TRAIN, VAL
from kladi.data.embeddings import Embeddings
from kladi.data.findings import Finding
from kladi.errors import UserError
from kladi.evaluate import protocol
from kladi.evaluate.embed import describe
from kladi.evaluate.evaluation import evaluate, random_encoder
from kladi.evaluate.pretraining import Pretraining, of_run, seen_rows
from kladi.evaluate.record import results
from kladi.evaluate.splits import Splits
from kladi.learn import run_folder
from kladi.learn.console import Silent
from kladi.learn.fit import fit

KEYS = {
    "intensity.size": 32,
    "encoder.name": "test_resnet",
    "encoder.projector": (16, 8),
    "train.epochs": 1,
    "train.batch": 32,
    "train.device": "cpu",
    "objective.name": "label_tree",
    "evaluate.folds": 3,
    "evaluate.repeats": 1,
    "evaluate.bootstrap": 50,
}
CONFIG = settings.override(settings.Config(), KEYS)


@pytest.fixture(scope="module")
def data():
    """160 pictures, 54 patients, 16 of them held out."""
    return toy.dataset(n=160, size=32)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    fit(data, CONFIG, folder, progress=Silent())
    return folder


@pytest.fixture(scope="module")
def measured(run, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "eval"
    found = [
        Finding("W1", "warning", "anatomy unknown", (3, 4)),
        Finding("I1", "left out", "empty file", (7, 8)),
    ]
    return evaluate(run, data, CONFIG, out, findings=found)


def test_everything_is_written_for_its_owner_alone(measured):
    names = {"results.json", "results.csv", "splits.json", "embeddings.npz", "predictions.npz", "map.json"}
    assert {p.name for p in measured.parent.iterdir()} == names | {"thumbnails.json"}
    for path in measured.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
    assert stat.S_IMODE(measured.parent.stat().st_mode) == 0o700


def test_the_results_are_of_the_format_and_hold_the_controls(measured, data):
    content = results.read(measured)
    assert [m["method"] for m in content["methods"]] == ["label_tree", "random_encoder", "histogram"]
    encoder, untrained, grey = content["methods"]
    assert encoder["control_of"] is None
    assert untrained["control_of"] == grey["control_of"] == "label_tree"
    assert (encoder["init"], untrained["init"], grey["init"]) == ("pretrained", "random", "none")
    assert encoder["labels_in_pretraining"] == int((data.split == TRAIN).sum())
    assert untrained["labels_in_pretraining"] == 0
    assert encoder["width"] == untrained["width"]
    assert encoder["parameters"] == untrained["parameters"] > 0
    assert content["study"]["pretrain"] == "held-out"
    assert content["splits"]["digest"] == Splits.read(measured.parent / "splits.json").digest
    assert content["splits"]["group"] == "patient"
    assert content["data"]["labels"]["round"][0] == 80
    assert content["data"]["excluded"] == {"used in pretraining": int((data.split == TRAIN).sum()), "I1 left out": 2}
    assert "anatomy unknown: rows 3, 4" in content["data"]["warnings"]
    pairs = {(c["method"], c["reference"]) for c in content["comparisons"]}
    assert pairs == {("label_tree", "random_encoder"), ("label_tree", "histogram")}
    assert {row["method"] for row in content["rows"]} == {"label_tree", "random_encoder", "histogram"}
    assert {row["regime"] for row in content["rows"]} == {"probe", "knn", "retrieval", "prototype", "representation"}


def test_only_held_out_patients_are_measured(measured, data):
    content = results.read(measured)
    held_out = data.split == HELD_OUT
    splits = Splits.read(measured.parent / "splits.json")
    np.testing.assert_array_equal(np.sort(data.row_id[held_out]), splits.row_id)
    whole = sum(part["images"] for part in content["splits"]["parts"] if part["fold"] == 0)
    assert whole == held_out.sum()


def test_figures_have_their_data(measured):
    shown = results.read(measured)["figures"]
    assert set(shown) >= {"confusion", "severity", "levels", "violations", "intervals", "curves", "cost"}
    counts = np.array(shown["confusion"]["counts"])
    assert counts.shape == (len(shown["confusion"]["nodes"]),) * 2
    assert set(shown["levels"]) == {"label_tree", "random_encoder", "histogram"}
    assert shown["severity"]["heights"] == [1, 2, 3]
    assert {"step", "epoch", "loss", "hwc", "lam", "idle hwc"} <= set(shown["curves"][0])
    assert shown["cost"]["embed_seconds"] > 0


def test_the_same_seed_gives_the_same_digest(measured, run, data, tmp_path):
    again = evaluate(run, data, CONFIG, tmp_path / "again", findings=())
    before, now = results.read(measured), results.read(again)
    for key in ("rows", "comparisons", "splits", "figures"):
        assert results.digest({key: before[key]}) == results.digest({key: now[key]}), key


def test_nothing_personal_and_no_path_is_kept(measured, run, data):
    """Patient names of the toy are p0000, p0001, ...; paths would show the run's folder."""
    for path in measured.parent.iterdir():
        content = path.read_bytes()
        assert str(run.parent).encode() not in content, path.name
        assert not re.search(rb"\bp00\d\d\b", content), path.name


def test_predictions_hold_every_answer(measured, data):
    with np.load(measured.parent / "predictions.npz", allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        assert len(about["answers"]) == 3 * 3 * 3  # methods, regimes, folds
        first = about["answers"][0]
        assert first == {"method": "label_tree", "regime": "probe", "fold": 0, "repeat": 0}
        rows, answer, scores = file["0/rows"], file["0/answer"], file["0/scores"]
        np.testing.assert_array_equal(file["0/classes"][scores.argmax(axis=1)], answer)
        content = results.read(measured)
        accuracy = next(
            r
            for r in content["rows"]
            if (r["method"], r["regime"], r["metric"], r["fold"]) == ("label_tree", "probe", "accuracy", 0)
        )
        assert accuracy["value"] == pytest.approx((data.target[rows] == answer).mean())


def test_the_head_is_used_for_prototypes(measured):
    found = Embeddings.read(measured.parent / "embeddings.npz")
    assert found.z is not None
    assert found.z.shape[1] == 8


def test_the_report_can_be_drawn_from_it(measured):
    from kladi.report import page

    assert page.write(measured.parent, measured.parent.parent / "report.html").stat().st_size > 100_000


def test_a_plain_module_is_measured_and_stamped(data, tmp_path):
    class Sums(nn.Module):
        def forward(self, image):
            return torch.nn.functional.adaptive_avg_pool2d(image, 4).flatten(1)

    path = evaluate(Sums(), data, CONFIG, tmp_path, controls=("histogram",))
    content = results.read(path)
    assert [m["method"] for m in content["methods"]] == ["encoder", "histogram"]
    assert content["study"]["pretrain"] == "pretraining data unknown"
    assert content["methods"][0]["labels_in_pretraining"] is None


def test_unknown_controls_and_folders_are_refused(run, data, tmp_path):
    with pytest.raises(UserError, match='closest: "histogram"'):
        evaluate(run, data, CONFIG, tmp_path / "x", controls=("histgram",))
    with pytest.raises(UserError, match="not a finished run"):
        evaluate(tmp_path, data, CONFIG, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_untrained_control_repeats_and_leaves_the_generator_alone():
    torch.random.default_generator.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two = (random_encoder(CONFIG.encoder, CONFIG.intensity, seed=s) for s in (0, 0))
    assert torch.equal(torch.random.get_rng_state(), before)
    other = random_encoder(CONFIG.encoder, CONFIG.intensity, seed=1)
    image = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(one(image), two(image))
        assert not torch.equal(one(image), other(image))


# --- what the run has seen -----------------------------------------------------------------------------------------


def test_the_run_has_seen_its_training_patients(run, data):
    np.testing.assert_array_equal(seen_rows(run, data), data.split == TRAIN)
    about = of_run(run, data)
    assert about.objective == "label_tree"
    assert about.supervised
    assert about.epochs == 1
    assert about.images_seen == 32 * (int((data.split == TRAIN).sum()) // 32) or about.images_seen > 0


def test_another_split_of_the_same_images_changes_nothing_that_was_seen(run, data):
    """What was trained on is known, what was held out is known to be clean."""
    moved = dataclasses.replace(data, split=np.full_like(data.split, TEST))
    np.testing.assert_array_equal(seen_rows(run, moved), data.split == TRAIN)


def test_other_labels_or_metadata_change_nothing_that_was_seen(run, data):
    leaf = data.taxonomy.leaves
    relabelled = dataclasses.replace(
        data, target=leaf[(np.searchsorted(leaf, data.target) + 1) % len(leaf)], label_sets=None
    )
    np.testing.assert_array_equal(seen_rows(run, relabelled), data.split == TRAIN)


def test_foreign_images_were_not_seen(run):
    assert not seen_rows(run, toy.dataset(n=24, size=32, seed=9)).any()


def test_images_of_a_seen_patient_are_seen(run, data):
    one = int(data.group[np.flatnonzero(data.split == TRAIN)[0]])
    other = np.flatnonzero(data.split == HELD_OUT)[0]
    group = data.group.copy()
    group[other] = one
    assert seen_rows(run, dataclasses.replace(data, group=group))[other]


def test_a_run_without_a_list_is_unknown(run, data, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "rows.safetensors").unlink()
    assert seen_rows(copy, data) is None
    assert of_run(copy, data).seen is None


# --- protocol ------------------------------------------------------------------------------------------------------


def plan(dataset, about=None, **keys):
    embeddings = describe(dataset, np.zeros((len(dataset), 2), dtype=np.float32))
    return protocol.choose(embeddings, about or Pretraining(), settings.override(CONFIG, keys))


def by_patient(data, shares=(0.6, 0.2, 0.2)):
    limit = np.cumsum(shares) * (data.group.max() + 1)
    split = np.where(data.group < limit[0], TRAIN, np.where(data.group < limit[1], VAL, TEST))
    return dataclasses.replace(data, split=split.astype(np.int64))


def test_the_manifests_own_test_rows_are_used(data):
    split = by_patient(data)
    found = plan(split, Pretraining(objective="label_tree", seen=split.split == TRAIN))
    assert found.splits.kind == "manifest"
    assert found.pretrain == "disjoint"
    folds = plan(split, Pretraining(objective="label_tree", seen=split.split == TRAIN), **{"evaluate.use_split": False})
    assert folds.splits.kind == "folds"
    assert folds.pretrain == "held-out"


@pytest.mark.parametrize("place", [VAL, TEST])
def test_a_row_that_was_pretrained_on_with_its_label_is_refused(data, place):
    split = by_patient(data)
    leaked = int(np.flatnonzero(split.split == place)[0])
    seen = split.split == TRAIN
    seen[leaked] = True
    with pytest.raises(UserError, match=f"row {leaked + 1} is tested on"):
        plan(split, Pretraining(objective="label_tree", seen=seen))
    allowed = plan(split, Pretraining(objective="label_tree", seen=seen), **{"data.allow_leak": True})
    assert allowed.pretrain == "LEAK ALLOWED (1)"
    assert any("tested on" in warning for warning in allowed.warnings)
    # Without labels it is no leak, but it is said.
    free = plan(split, Pretraining(objective="simclr", supervised=False, seen=seen))
    assert free.pretrain == "transductive"


def test_a_patient_in_train_and_test_is_refused(data):
    split = by_patient(data)
    group = split.group.copy()
    group[np.flatnonzero(split.split == TEST)[0]] = group[np.flatnonzero(split.split == TRAIN)[0]]
    with pytest.raises(UserError, match="one patient is in two parts"):
        plan(dataclasses.replace(split, group=group))


def test_a_test_image_copied_into_training_is_refused(data):
    """The planted leak of the sheet: the same pixels under another patient."""
    split = by_patient(data)
    store = split.store
    pixels = store.pixel_digest.copy()
    pixels[np.flatnonzero(split.split == TEST)[0]] = pixels[np.flatnonzero(split.split == TRAIN)[0]]
    with pytest.raises(UserError, match="same pixels"):
        plan(dataclasses.replace(split, store=dataclasses.replace(store, pixel_digest=pixels)))


def test_folds_lie_inside_what_pretraining_has_not_seen(data):
    found = plan(data, Pretraining(objective="label_tree", seen=data.split == TRAIN))
    assert found.pretrain == "held-out"
    assert set(found.splits.row_id) == set(data.row_id[data.split == HELD_OUT])


def test_with_all_labels_seen_nothing_is_left_to_test(data):
    everything = np.ones(len(data), dtype=bool)
    with pytest.raises(UserError, match="none is left to test"):
        plan(data, Pretraining(objective="label_tree", seen=everything))
    free = plan(data, Pretraining(objective="simclr", supervised=False, seen=everything))
    assert free.pretrain == "transductive"
    # Metadata objectives read no label, so they are free for labels; not for the columns they read.
    meta = Pretraining(objective="metadata", supervised=False, reads_metadata=True, seen=everything)
    assert plan(data, meta).pretrain == "transductive"
    unlabelled = dataclasses.replace(data, taxonomy=None, target=np.full(len(data), -1))
    with pytest.raises(UserError, match="none is left to test"):
        plan(unlabelled, meta)


def test_without_val_the_penalty_is_chosen_on_rows_that_the_encoder_knows_and_that_is_said(data):
    split = by_patient(data, (0.7, 0, 0.3))
    found = plan(split, Pretraining(objective="label_tree", seen=split.split == TRAIN))
    assert found.pretrain == "disjoint"
    assert any("no validation rows" in warning for warning in found.warnings)


def test_unlabelled_data_are_asked_for_their_metadata(data):
    bare = dataclasses.replace(data, taxonomy=None, target=np.full(len(data), -1))
    found = plan(bare)
    assert found.task.name == "modality"
    assert set(found.task.taxonomy.names) == set(toy.MODALITIES)
    nothing = dataclasses.replace(bare, columns={"site": ("a",) * 160}, label_sets=None)
    found = plan(nothing)
    assert found.task is None
    assert "no labels" in found.reason


def test_one_class_is_a_reason_and_few_patients_are_refused(data):
    one = dataclasses.replace(data, target=np.full(len(data), data.taxonomy.leaves[0]))
    found = plan(one)
    assert found.splits is None
    assert "one class only" in found.reason
    few = dataclasses.replace(data, target=np.where(data.group >= data.group.max() - 1, data.target, -1))
    with pytest.raises(UserError, match="three patients"):
        plan(few)


def test_rare_classes_are_said_by_name(data):
    held_out = np.flatnonzero(data.split == HELD_OUT)
    target = data.target.copy()
    rare = data.taxonomy.index("round/disc/plain")
    others = held_out[data.target[held_out] == rare]
    keep = others[data.group[others] == data.group[others[0]]]
    target[np.setdiff1d(others, keep)] = -1
    found = plan(dataclasses.replace(data, target=target))
    assert "round/disc/plain: fewer than 3 patients, scored at round/disc" in found.warnings or any(
        warning.startswith("round/disc/plain") for warning in found.warnings
    )
    assert found.excluded["unlabelled"] == len(others) - len(keep)


def test_without_patient_ids_it_is_stamped(data):
    found = plan(dataclasses.replace(data, has_patients=False))
    assert any("no patient id" in warning for warning in found.warnings)


@pytest.mark.parametrize("labelled", [0.0, 1.0])
def test_data_that_cannot_be_asked_give_a_row_with_a_reason(data, tmp_path, labelled):
    few = dataclasses.replace(
        data,
        columns={},
        label_sets=None,
        taxonomy=data.taxonomy if labelled else None,
        target=np.full(len(data), data.taxonomy.leaves[0] if labelled else -1),
    )

    class Means(nn.Module):
        def forward(self, image):
            return image.mean(dim=(2, 3))

    content = results.read(evaluate(Means(), few, CONFIG, tmp_path, controls=("histogram",)))
    assert [row["value"] for row in content["rows"]] == [None, None]
    assert all(row["reason"] for row in content["rows"])
    assert content["comparisons"] == []
    assert content["figures"]["confusion"] == {}


def test_run_folder_digest_is_what_results_say(measured, data):
    assert results.read(measured)["data"]["digest"] == run_folder.digest(data)

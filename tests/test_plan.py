"""The plan: rules, reasons, and that nothing a person wrote is lost."""

import dataclasses

import pytest

from kladi import commands, config, plan, toy
from kladi.evaluate.diagnostics import Diagnostic
from kladi.plan import Fingerprint

FACTS = Fingerprint(
    images=100,
    train_images=70,
    patients=50,
    held_out_patients=15,
    colour_share=0.0,
    labelled_share=1.0,
    leaves=5,
    depth=3,
    metadata=(),
    tables=(),
    modalities=("ct",),
    cores=2,
    accelerator_gb=0.0,
)

TREE = Diagnostic("tree against features", "Mantel r", 0.6, 0.001, 0.0001, "", "present")


@pytest.mark.parametrize(
    ("facts", "objective"),
    [
        ({}, "label_tree"),
        ({"depth": 1}, "supcon"),
        ({"labelled_share": 0.1, "metadata": ("modality",)}, "metadata"),
        ({"leaves": 0}, "simclr"),
        ({"structure": (dataclasses.replace(TREE, verdict="absent"),)}, "supcon"),
        ({"structure": (TREE,)}, "label_tree"),
    ],
)
def test_the_objective_is_what_the_data_carry(facts, objective):
    chosen, reasons = plan.choose(dataclasses.replace(FACTS, **facts), {})
    assert chosen.objective.name == objective
    assert reasons["objective.name"]


def test_laterality_as_a_label_forbids_flips_even_on_skin():
    free, _ = plan.choose(dataclasses.replace(FACTS, modalities=("xc",)), {})
    bound, reasons = plan.choose(dataclasses.replace(FACTS, modalities=("xc",), metadata=("laterality",)), {})
    assert free.augment.flip_horizontal == 0.5
    assert bound.augment.flip_horizontal == 0.0
    assert "laterality" in reasons["augment.flip_horizontal"]


def test_what_a_person_changed_is_read_back_and_nothing_else(tmp_path):
    file = tmp_path / "plan.toml"
    chosen, reasons = plan.choose(FACTS, {"train.epochs": "7"})
    plan.write(chosen, reasons, file)
    assert plan.changed_by_hand(file) == {"train.epochs": 7}
    file.write_text(file.read_text().replace("lr = 0.001", "lr = 0.005"))
    assert plan.changed_by_hand(file) == {"train.epochs": 7, "train.lr": 0.005}


def test_planning_again_keeps_what_a_person_wrote(tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    toy.write(tmp_path / "ward", n=30, size=24)
    manifest, out = tmp_path / "ward" / "manifest.csv", tmp_path / "plan.toml"
    commands.plan(manifest, out, None, {}, smoke=False)
    out.write_text(out.read_text().replace("lr = 0.001", "lr = 0.005"))
    commands.plan(manifest, out, None, {}, smoke=False)
    assert config.read(out).train.lr == 0.005


def test_the_fingerprint_holds_what_the_structure_says():
    facts = plan.fingerprint(toy.dataset(n=96, size=16))
    assert [d.name for d in facts.structure] == ["tree against features", "anatomy from pixels", "modality from pixels"]
    assert plan.fingerprint(toy.dataset(n=12, size=16)).structure == ()

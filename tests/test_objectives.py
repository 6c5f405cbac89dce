"""What a step minimises: one forward pass, terms that see only their rows, presets whose mistakes are named."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from kladi import losses, sections, toy
from kladi.data.views.batch import Batch, View
from kladi.errors import UserError
from kladi.learn import objectives, presets
from kladi.learn.facts import Facts
from kladi.learn.objectives import Supervised, Term
from kladi.models.heads import Projector
from kladi.structure.taxonomy import Taxonomy
from ranks_worker import with_tables

B, D = 6, 4


class Counted(nn.Module):
    """An encoder that flattens, and counts its calls."""

    def __init__(self, width=16):
        super().__init__()
        self.layer, self.calls = nn.Linear(9, width), 0

    def forward(self, image):
        self.calls += 1
        return self.layer(image.flatten(1))


def parts(seed=0):
    torch.manual_seed(seed)
    return Counted(), Projector(16, 8, D)


def batch(present=None, labels=None, sizes=(3, 3)):
    torch.manual_seed(1)
    known = torch.tensor(present if present is not None else [True] * B)
    target = torch.tensor(labels if labels is not None else [6, 6, 7, 8, 8, 9])
    views = tuple(View(torch.randn(B, 1, size, 3)) for size in sizes)
    return Batch(
        views,
        {"label": target * known, "metadata": torch.arange(B) % 3},
        {"label": known, "metadata": torch.ones(B, dtype=torch.bool)},
        torch.arange(B),
    )


def facts(**changes):
    return Facts.of(toy.dataset(**{"n": 60, "size": 16, **changes}))


def test_views_share_one_forward_pass():
    encoder, projector = parts()
    z = objectives.project(encoder, projector, batch().views)
    assert encoder.calls == 1
    assert z.shape == (2, B, D)
    torch.testing.assert_close(z[1], projector(encoder(batch().views[1].image)))


def test_views_of_other_sizes_go_one_by_one():
    class Pooled(nn.Module):
        def forward(self, image):
            return image.mean((1, 2, 3))[:, None].expand(-1, 16)

    views = batch(sizes=(3, 2)).views
    assert objectives.project(Pooled(), Projector(16, 8, D), views).shape == (2, B, D)


def test_terms_share_the_embedding_and_are_weighted_in_the_total():
    encoder, projector = parts()
    tax = toy.taxonomy()
    hwc, lam = losses.HierarchyWeightedContrastiveLoss(tax), losses.LevelAwareMarginLoss(tax, D)
    objective = Supervised(encoder, projector, {"hwc": Term(hwc, "label"), "lam": Term(lam, "label", 0.5)})
    for _ in range(2):  # the first call of LAM is zero by definition
        terms = objective(batch())
    assert encoder.calls == 2
    assert list(terms) == ["hwc", "lam"]
    z = objectives.project(encoder, projector, batch().views)
    torch.testing.assert_close(terms["hwc"], hwc(z, batch().target["label"]))
    torch.testing.assert_close(objective.total(terms), terms["hwc"] + 0.5 * terms["lam"])
    assert set(objective.idle) == {"hwc", "lam"}


def test_rows_without_a_label_feed_label_free_terms_only():
    encoder, projector = parts()
    supcon, ntxent = losses.SupConLoss(), losses.NTXentLoss()
    objective = Supervised(encoder, projector, {"supcon": Term(supcon, "label"), "ntxent": Term(ntxent)})
    known = [True, False, True, True, True, False]
    terms = objective(batch(known))
    z = objectives.project(encoder, projector, batch().views)
    keep = torch.tensor(known)
    torch.testing.assert_close(terms["supcon"], supcon(z[:, keep], batch().target["label"][keep]))
    torch.testing.assert_close(terms["ntxent"], ntxent(z))
    # What stands in the target of such a row is never read.
    other = objective(batch(known, labels=[6, 10**6, 7, 8, 8, -5]))
    torch.testing.assert_close(other["supcon"], terms["supcon"])


def test_a_batch_without_labels_gives_a_zero_that_keeps_its_graph():
    encoder, projector = parts()
    tax = toy.taxonomy()
    lam = losses.LevelAwareMarginLoss(tax, D)
    objective = Supervised(
        encoder, projector, {"supcon": Term(losses.SupConLoss(), "label"), "lam": Term(lam, "label")}
    )
    terms = objective(batch([False] * B))
    assert all(term.item() == 0 for term in terms.values())
    assert objective.idle == {"supcon": 1.0, "lam": 1.0}
    objective.total(terms).backward()
    assert encoder.layer.weight.grad.abs().sum() == 0
    assert int(lam.seen.sum()) == 0


def test_idle_is_the_share_of_labelled_rows_without_a_positive():
    encoder, projector = parts()
    objective = Supervised(encoder, projector, {"supcon": Term(losses.SupConLoss(), "label")})
    one = batch(sizes=(3,))  # with one view, labels 7 and 9 stand alone
    objective(one)
    assert objective.idle["supcon"] == pytest.approx(2 / B)


def test_simclr_is_one_term_without_a_target():
    objective = build("simclr", {"temperature": 0.2})
    terms = objective(batch())
    z = objectives.project(objective.encoder, objective.projector, batch().views)
    torch.testing.assert_close(objective.total(terms), losses.NTXentLoss(temperature=0.2)(z))


def test_an_objective_needs_a_term():
    with pytest.raises(ValueError, match="at least one term"):
        Supervised(*parts(), {})


# --- presets -----------------------------------------------------------------------------------------------------


def build(name, args=None, known=None):
    return presets.build(name, args or {}, known or facts(), *parts())


def test_label_tree_is_hwc_and_half_of_lam():
    objective = build("label_tree")
    assert objective.weights == {"hwc": 1.0, "lam": 0.5}
    assert objective.targets == {"hwc": "label", "lam": "label"}
    assert objective.losses["hwc"].temperature == 0.1
    assert objective.losses["lam"].prototypes.shape == (14, D)


def test_the_ball_has_its_own_temperature_unless_one_is_given():
    assert build("label_tree", {"geometry": "poincare"}).losses["hwc"].temperature == 0.2
    assert build("label_tree", {"geometry": "poincare", "temperature": 1}).losses["hwc"].temperature == 1.0


def test_arguments_reach_the_losses():
    objective = build("label_tree", {"beta": 0.25, "margin": 0.2, "lam": 2, "views": 0.5})
    assert objective.losses["hwc"].beta == 0.25
    assert objective.losses["lam"].margin == 0.2
    assert objective.weights == {"hwc": 1.0, "lam": 2.0, "ntxent": 0.5}
    assert objective.targets["ntxent"] == ""
    assert list(build("label_tree", {"lam": 0}).losses) == ["hwc"]


def test_the_hybrid_of_metadata_mixes_by_lambda():
    assert build("metadata").weights == {"metadata": 1.0}
    objective = build("metadata", {"instance": 0.25})
    assert objective.weights == {"metadata": 0.75, "ntxent": 0.25}
    assert objective.targets == {"metadata": "metadata", "ntxent": ""}


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_every_preset_trains(name):
    data = with_tables(toy.dataset(n=60, size=16)) if name == "multimodal" else toy.dataset(n=60, size=16)
    objective = presets.build(name, {}, Facts.of(data), *parts())
    rows = torch.arange(B)
    classes = torch.from_numpy(data.label_sets.similarity()[0])
    one = batch(labels=data.target[:B].tolist())
    one = Batch(one.views, {**one.target, "metadata": classes[rows]}, one.present, rows)
    tables = [torch.from_numpy(table.values[:B]) for table in data.modalities]
    if tables:
        in_table = torch.from_numpy(np.stack([table.present[:B] for table in data.modalities], axis=1))
        one = dataclasses.replace(one, tables=tuple(tables), in_table=in_table)
    objective(one)
    objective.total(objective(one)).backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.requires_grad)
    assert any(p.grad.abs().sum() > 0 for p in objective.encoder.parameters())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "label_tree"),
        ({"labelled": 0.3}, "metadata"),
        ({"labelled": 0.0}, "metadata"),
    ],
)
def test_auto_takes_what_the_data_can_carry(changes, name):
    assert presets.choose(facts(**changes)) == name
    assert presets.resolved("auto", facts(**changes)) == name


def test_metadata_of_one_attribute_is_supcon_on_it():
    """Weight 0 leaves the others out: the controls "modality only" and "anatomy only" of a study."""
    known = facts()
    sets = known.label_sets
    others = dict.fromkeys(set(sets.attributes) - {"modality"}, 0.0)
    torch.manual_seed(0)
    z = torch.randn(2, len(sets), 4, dtype=torch.float64)
    objective = build("metadata", {"weights": others, "temperature": 0.1}, known)
    found = objective.losses["metadata"](z, torch.from_numpy(sets.class_id.copy()))
    of = sets.attributes.index("modality")
    value = [next(k for k in sets.sets[u] if sets.label_attribute[k] == of) for u in sets.class_id]
    assert found.item() == pytest.approx(losses.SupConLoss(0.1)(z, torch.tensor(value)).item(), abs=1e-9)


@pytest.mark.parametrize("unknown_pairs", ["keep", "drop"])
def test_very_many_label_sets_are_compared_batch_by_batch(monkeypatch, unknown_pairs):
    known = facts()
    target = torch.from_numpy(known.label_sets.class_id[:9].copy())
    torch.manual_seed(0)
    z = torch.randn(2, 9, 4, dtype=torch.float64)
    args = {"unknown_pairs": unknown_pairs}
    whole = build("metadata", args, known).losses["metadata"]
    monkeypatch.setattr(presets, "TABLE_CLASSES", 1)
    parts = build("metadata", args, known).losses["metadata"]
    assert whole.similarity is not None
    assert parts.similarity is None
    assert parts(z, target).item() == whole(z, target).item()


def test_auto_on_flat_labels_and_on_nothing():
    known = facts()

    flat = Taxonomy.from_paths(["a", "b"])
    assert presets.choose(Facts(flat, np.array([0, 1, 1]), None)) == "supcon"
    assert presets.choose(Facts(None, np.full(3, -1), None)) == "simclr"
    assert presets.choose(Facts(known.taxonomy, np.array([3, 3]), None)) == "simclr"  # one class teaches nothing


@pytest.mark.parametrize(
    ("name", "args", "changes", "said"),
    [
        ("label_treee", {}, {}, 'no objective; closest: "label_tree"'),
        ("label_tree", {"temperture": 0.2}, {}, 'temperture is no argument of label_tree; closest: "temperature"'),
        ("simclr", {"facts": 1}, {}, "facts is no argument of simclr"),
        ("auto", {"beta": 0.1}, {}, "it takes none"),
        ("label_tree", {"beta": 3.0}, {}, "beta"),
        ("label_tree", {"geometry": "hyperbolic"}, {}, "geometry"),
        ("simclr", {"temperature": -1.0}, {}, "temperature"),
        ("simclr", {"temperature": "warm"}, {}, 'args.temperature = "warm" is not a number'),
        ("metadata", {"normalise": 3}, {}, 'args.normalise = "3" is not text'),
        ("metadata", {"coverage_discount": "no"}, {}, "is not true or false"),
        ("label_tree", {"level_weights": 1.0}, {}, "is not a list of numbers"),
        ("metadata", {"weights": 2.0}, {}, "is not a table"),
        ("metadata", {"weights": {"modality": "heavy"}}, {}, 'weights.modality = "heavy" is not a number'),
        ("metadata", {"weights": {"modalty": 2.0}}, {}, 'no attribute; closest: "modality"'),
        ("metadata", {"weights": {"modality": -1.0}}, {}, "not a number from 0 on"),
        ("metadata", {"threshold": 0.0}, {}, "threshold"),
        ("metadata", {"instance": 2.0}, {}, "instance"),
        ("label_tree", {}, {"labelled": 0.0}, "no training image has one; --objective.name metadata needs none"),
        ("supcon", {}, {"labelled": 0.0}, "needs labels"),
    ],
)
def test_mistakes_are_named(name, args, changes, said):
    with pytest.raises(UserError, match=said) as error:
        build(name, args, facts(**changes))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "args", "paths", "said"),
    [
        ("hxe", {}, ["A", "A/a"], 'all labels lie on one way down to "A/a"'),
        ("tree_cross_entropy", {"soft_beta": 4.0}, ["A", "A/a", "B"], 'needs labels at leaves, and "A" has others'),
        ("soft_labels", {}, ["A", "A/a", "B"], 'needs labels at leaves, and "A" has others below it'),
    ],
)
def test_labels_that_a_tree_classifier_cannot_take_are_named(name, args, paths, said):
    tax = Taxonomy.from_paths(paths)
    with pytest.raises(UserError, match=said):
        presets.build(name, args, Facts(tax, tax.index(paths), None), *parts())


def test_one_class_is_refused_by_supervision():  # M14
    known = facts()
    one = Facts(known.taxonomy, np.full(5, int(known.taxonomy.leaves[0])), None)
    with pytest.raises(UserError, match='all training images are "angular/box/plain"'):
        build("label_tree", known=one)


def test_metadata_needs_metadata():
    known = facts()
    with pytest.raises(UserError, match=r"--data\.metadata"):
        build("metadata", known=Facts(known.taxonomy, known.target, None))


def test_facts_are_those_of_the_training_rows():
    data = tiny.data()
    assert len(Facts.of(data).target) == int((data.split == 0).sum()) < len(data)


# --- a loss of the user's own ------------------------------------------------------------------------------------

MINE = """
from torch import nn
class MyLoss(nn.Module):
    def __init__(self, dim, scale=1.0):
        super().__init__()
        self.dim, self.scale = dim, scale
    def forward(self, z, target):
        return self.scale * (z ** 2).mean() + 0 * target.sum()
class Free(nn.Module):
    def forward(self, z):
        return (z ** 2).mean()
class Strict(nn.Module):
    def __init__(self, scale):
        raise ValueError("scale is too much")
NOT_A_LOSS = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_file.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("mine")
def test_a_loss_of_the_users_own_is_a_term_like_any():
    objective = build("my_file:MyLoss", {"scale": 3.0})
    assert objective.losses["myloss"].dim == D
    assert objective.targets == {"myloss": "label"}
    terms = objective(batch())
    z = objectives.project(objective.encoder, objective.projector, batch().views)
    torch.testing.assert_close(terms["myloss"], 3 * (z**2).mean())
    assert build("my_file.py:Free").targets == {"free": ""}


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("other:MyLoss", {}, "there is no file other.py"),
        ("my_file:MyLos", {}, 'no module "MyLos"; closest: "MyLoss"'),
        ("my_file:NOT_A_LOSS", {}, "no module"),
        ("my_file:MyLoss", {"scal": 1}, 'scal is no argument of MyLoss; closest: "scale"'),
        ("my_file:Strict", {"scale": 1}, "scale is too much"),
    ],
)
def test_mistakes_with_a_loss_of_ones_own_are_named(name, args, said):
    with pytest.raises(UserError, match=said):
        build(name, args)


@pytest.mark.usefixtures("mine")
def test_a_loss_that_reads_labels_needs_them():
    with pytest.raises(UserError, match="needs labels"):
        build("my_file:MyLoss", known=facts(labelled=0.0))
    build("my_file:Free", known=facts(labelled=0.0))


def test_every_preset_is_known_to_read_labels_or_not():
    assert sections.WITH_LABELS | sections.WITHOUT_LABELS | {"auto"} == set(presets.PRESETS)
    for name in sections.WITH_LABELS:
        with pytest.raises(UserError, match="needs labels"):
            presets.build(name, {}, Facts(None, np.full(3, -1), None), torch.nn.Identity(), torch.nn.Identity())

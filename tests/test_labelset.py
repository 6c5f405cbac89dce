"""Label sets: what a cell means, what two rows share, and what the coverage report says (and keeps to itself)."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kladi.errors import UserError
from kladi.structure import coverage, synonyms
from kladi.structure.anatomy import combine_anatomy, normalise_anatomy
from kladi.structure.labelset import LabelSets
from kladi.structure.taxonomy import Taxonomy
from strategies import columns

NONE = frozenset[str]()


def rows_table(sets: LabelSets, **how: object) -> np.ndarray:
    """float64[n, n]: similarity of any two rows."""
    class_id, table, _ = sets.similarity(**how)
    return table[np.ix_(class_id, class_id)]


def row_labels(sets: LabelSets, row: int) -> set[tuple[str, str]]:
    return {sets.labels[k] for k in sets.sets[sets.class_id[row]]}


def naive(sets: LabelSets, a: int, p: int, *, discount: bool = True) -> float:
    """Equation 1 of the sheet, attribute by attribute."""
    both = [g for g in range(len(sets.attributes)) if sets.known[a, g] and sets.known[p, g]]
    shared = united = 0.0
    for g in both:
        mine = {label for label in row_labels(sets, a) if label[0] == sets.attributes[g]}
        theirs = {label for label in row_labels(sets, p) if label[0] == sets.attributes[g]}
        shared += sets.weight[g] * len(mine & theirs)
        united += sets.weight[g] * len(mine | theirs)
    if united == 0:
        return 0.0
    return (sum(sets.weight[g] for g in both) / sum(sets.weight) if discount else 1.0) * shared / united


# --- similarity ----------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(columns(), st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_other_weights_are_those_of_the_constructor(table: dict[str, list[str | None]], omega: list[float]) -> None:
    weights = dict(zip(table, omega, strict=False))
    assert LabelSets.from_columns(table).weighted(weights) == LabelSets.from_columns(table, weights=weights)


@settings(max_examples=25)
@given(columns())
def test_an_attribute_of_weight_zero_is_as_if_it_were_not_there(table: dict[str, list[str | None]]) -> None:
    first, *others = list(table)
    assume(others)
    without = LabelSets.from_columns({name: table[name] for name in others})
    off = LabelSets.from_columns(table).weighted({first: 0})
    assert (rows_table(off) == rows_table(without)).all()
    assert off.smallest_useful_threshold == without.smallest_useful_threshold
    assert (off.class_id == LabelSets.from_columns(table).class_id).all()  # a loader's targets stay what they are


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"b": 1}, 'weight of "b", which is no attribute'),
        ({"a": -1}, "not a number from 0 on"),
        ({"a": math.nan}, "not a number from 0 on"),
        ({"a": math.inf}, "not a number from 0 on"),
        ({"a": 0}, "nothing is left to compare"),
    ],
)
def test_impossible_weights_are_refused(weights: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LabelSets.from_columns({"a": ["x", "y"]}).weighted(weights)


def test_worked_example() -> None:
    sets = LabelSets.from_columns({"modality": ["MR", "MR", "MR", "CT"], "anatomy": ["knee", "knee", "brain", "brain"]})
    third = 1 / 3
    assert rows_table(sets).tolist() == [[1, 1, third, 0], [1, 1, third, 0], [third, third, 1, third], [0, 0, third, 1]]
    assert sets.labels == (("anatomy", "brain"), ("anatomy", "knee"), ("modality", "ct"), ("modality", "mr"))
    assert sets.attributes == ("anatomy", "modality")
    assert sets.values.tolist()[3] == [True, False, True, False]
    assert sets.known.all()
    class_id, table, comparable = sets.similarity()
    assert (class_id.dtype, table.dtype, comparable.dtype) == (np.int64, np.float64, np.bool_)
    assert comparable.all()


def test_worked_example_with_unknowns() -> None:
    sets = LabelSets.from_columns({"modality": ["MR", "MR", "MR", "?"], "anatomy": ["knee", "knee", None, "unknown"]})
    assert rows_table(sets)[2].tolist() == [0.5, 0.5, 0.5, 0]
    assert rows_table(sets, coverage_discount=False)[2].tolist() == [1, 1, 1, 0]
    assert rows_table(sets)[3].tolist() == [0, 0, 0, 0]
    class_id, _, comparable = sets.similarity(unknown_pairs="drop")
    assert comparable[np.ix_(class_id, class_id)].tolist() == [[True] * 3 + [False]] * 3 + [[False] * 4]


def test_kappa_keeps_agreement_on_what_is_known_from_meaning_agreement() -> None:
    sets = LabelSets.from_columns({"modality": ["US", "US"], "anatomy": [None, "thyroid"]})
    assert rows_table(sets)[0, 1] == 0.5
    assert rows_table(sets, coverage_discount=False)[0, 1] == 1.0


@settings(max_examples=50)
@given(columns(), st.lists(st.floats(0.1, 10), min_size=3, max_size=3), st.booleans())
def test_against_the_equation(table: dict[str, list[str | None]], omega: list[float], discount: bool) -> None:
    weights = dict(zip(table, omega, strict=False))
    sets = LabelSets.from_columns(table, weights=weights)
    w = rows_table(sets, coverage_discount=discount)
    n = len(sets)
    expected = [[naive(sets, a, p, discount=discount) for p in range(n)] for a in range(n)]
    np.testing.assert_allclose(w, expected, rtol=0, atol=1e-12)
    assert (w == w.T).all()
    assert ((w >= 0) & (w <= 1)).all()
    positive = w[w > 0]
    assert (positive >= sets.smallest_useful_threshold - 1e-12).all()


@settings(max_examples=50)
@given(
    st.lists(st.tuples(*[st.sampled_from(["a", "b", "c", None])] * 3), min_size=2, max_size=2),
    st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
)
def test_lies_between_what_filling_the_unknowns_could_give(
    pair: list[tuple[str | None, ...]], omega: list[float]
) -> None:
    """One value an attribute: kappa I/U is between the least and the largest weighted Jaccard of any completion."""
    names = ["x", "y", "z"]
    weights = dict(zip(names, omega, strict=True))
    sets = LabelSets.from_columns({n: [row[g] for row in pair] for g, n in enumerate(names)}, weights=weights)
    w = rows_table(sets)[0, 1]
    fill = ["a", "b", "c"]
    possible = []
    for mine in itertools.product(*[fill if v is None else [v] for v in pair[0]]):
        for theirs in itertools.product(*[fill if v is None else [v] for v in pair[1]]):
            shared = sum(o for o, m, t in zip(omega, mine, theirs, strict=True) if m == t)
            possible.append(shared / (2 * sum(omega) - shared))
    assert min(possible) - 1e-12 <= w <= max(possible) + 1e-12


@settings(max_examples=15)
@given(columns(), st.floats(0.01, 100), st.randoms(use_true_random=False))
def test_invariances(table: dict[str, list[str | None]], factor: float, shuffler: object) -> None:
    sets = LabelSets.from_columns(table)
    names = list(table)
    shuffler.shuffle(names)
    turned = {name: [c and "|".join(reversed(c.split("|"))) for c in table[name]] for name in names}
    other = LabelSets.from_columns(turned)
    assert other == sets
    assert hash(other) == hash(sets)
    assert other.digest == sets.digest
    scaled = LabelSets.from_columns(table, weights=dict.fromkeys(table, factor))
    np.testing.assert_allclose(rows_table(scaled), rows_table(sets), rtol=1e-12)
    constant = LabelSets.from_columns({**table, "fourth": ["same"] * len(sets)})
    assert (rows_table(constant) >= rows_table(sets) - 1e-12).all()
    swap = {"v0": "v3", "v3": "v0"}
    renamed = {n: [c and "|".join(swap.get(v, v) for v in c.split("|")) for c in cells] for n, cells in table.items()}
    np.testing.assert_allclose(rows_table(LabelSets.from_columns(renamed)), rows_table(sets), rtol=0, atol=1e-15)


def test_content_makes_equality() -> None:
    one = LabelSets.from_columns({"a": ["x", "y", None]})
    assert one != LabelSets.from_columns({"a": ["x", "y", "z"]})
    assert one != LabelSets.from_columns({"a": ["y", "x", None]})
    assert one != LabelSets.from_columns({"a": ["x", "y", None]}, weights={"a": 2})
    assert one != LabelSets.from_columns({"b": ["x", "y", None]})
    assert one == LabelSets.from_columns({"a": [" X", "Y ", ""]})
    assert one != "a"
    with pytest.raises(ValueError, match="read-only"):
        one.class_id[0] = 1


@pytest.mark.parametrize(("m", "expected"), [(1, 1.0), (2, 1 / 3), (3, 1 / 5), (4, 1 / 7)])
def test_what_the_threshold_means_for_equal_attributes(m: int, expected: float) -> None:
    table = {f"a{g}": ["same" if s > g else f"v{s}" for s in range(m + 1)] + ["same"] for g in range(m)}
    sets = LabelSets.from_columns(table)
    np.testing.assert_allclose(rows_table(sets)[-1, : m + 1], [s / (2 * m - s) for s in range(m + 1)], atol=1e-15)
    assert sets.smallest_useful_threshold == pytest.approx(expected, abs=1e-15)


def test_unequal_weights() -> None:
    """Weights 1:2 give .2 when the first is shared, .5 when the second is: w = M/(2 - M)."""
    sets = LabelSets.from_columns({"p": ["x", "x", "y"], "q": ["u", "v", "u"]}, weights={"q": 2})
    w = rows_table(sets)
    assert w[0, 1] == pytest.approx(0.2)
    assert w[0, 2] == pytest.approx(0.5)
    assert sets.smallest_useful_threshold == pytest.approx(0.2)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0.1, 5)), min_size=1, max_size=4),
)
def test_smallest_threshold_is_the_least_over_all_sets_of_known_attributes(parts: list[tuple[int, float]]) -> None:
    """Prefixes in the order of b are enough: compared with all subsets."""
    table = {f"a{g}": ["|".join(f"v{k}" for k in range(b)) or "[]", None] for g, (b, _) in enumerate(parts)}
    weights = {f"a{g}": omega for g, (_, omega) in enumerate(parts)}
    sets = LabelSets.from_columns(table, weights=weights)
    total = sum(omega for _, omega in parts)
    least = 1.0
    for g, (b, omega) in enumerate(parts):
        for rest in itertools.chain.from_iterable(
            itertools.combinations([h for h in range(len(parts)) if h != g], k) for k in range(len(parts))
        ):
            if b:
                known = omega + sum(parts[h][1] for h in rest)
                size = omega * b + sum(parts[h][0] * parts[h][1] for h in rest)
                least = min(least, known / total * omega / (2 * size - omega))
    assert sets.smallest_useful_threshold == pytest.approx(least, rel=1e-12)


def test_known_and_empty_shares_nothing_but_is_compared() -> None:
    sets = LabelSets.from_columns({"nodule": ["1", "0", "0", "", "-1"], "site": ["s", "s", "s", "s", "s"]})
    assert sets.labels == (("nodule", "1"), ("site", "s"))
    assert sets.known[:, 0].tolist() == [True, True, True, False, False]
    w = rows_table(sets)
    assert w[0].tolist() == [1, 0.5, 0.5, 0.5, 0.5]
    assert w[1, 2] == 1.0  # the site is all that either has
    assert w[3, 4] == 0.5
    only = LabelSets.from_columns({"nodule": ["0", "0"]})
    assert rows_table(only).tolist() == [[0, 0], [0, 0]]
    assert only.smallest_useful_threshold == 1.0


def test_taxonomy_lets_a_lung_share_half_with_a_chest() -> None:
    tree = Taxonomy.from_paths(["Chest/Lung", "Chest/Heart", "Head/Brain"])
    sets = LabelSets.from_columns(
        {"anatomy": ["lung", "chest", "HEART", "chest/lung", "knee"]}, taxonomies={"anatomy": tree}
    )
    assert row_labels(sets, 0) == {("anatomy", "chest"), ("anatomy", "chest/lung")}
    assert row_labels(sets, 4) == {("anatomy", "knee")}
    w = rows_table(sets)
    assert w[0, 1] == 0.5
    assert w[0, 2] == 1 / 3
    assert w[0, 3] == 1.0
    assert w[0, 4] == 0.0


def test_part_of_the_table_and_too_large_a_table() -> None:
    sets = LabelSets.from_columns({"id": [f"v{i}" for i in range(4097)], "side": ["l", "r", "l"] + ["l"] * 4094})
    with pytest.raises(UserError, match="4,097 distinct label sets are too many for one table"):
        sets.similarity()
    table, comparable = sets.table(sets.class_id[:3], sets.class_id[:2])
    np.testing.assert_allclose(table, [[1, 0], [0, 1], [1 / 3, 0]])
    assert comparable.shape == (3, 2)


# --- cells ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell", ["", None, " ", "unknown", "UNK", "Undefined", "n/a", "NA", "nan", "null", "?", float("nan")]
)
def test_unknown_cells(cell: object) -> None:
    sets = LabelSets.from_columns({"finding": [cell, "mass"]})
    assert sets.known.tolist() == [[False], [True]]
    assert sets.labels == (("finding", "mass"),)


def test_none_is_a_value() -> None:
    sets = LabelSets.from_columns({"finding": ["none", "None"]})
    assert sets.labels == (("finding", "none"),)


@pytest.mark.parametrize(
    "cell", ["chest|abdomen", '["abdomen", "chest"]', "CHESTABDOMEN", " Abdomen | unknown | THORAX"]
)
def test_several_values(cell: str) -> None:
    sets = LabelSets.from_columns({"anatomy": [cell]})
    assert row_labels(sets, 0) == {("anatomy", "chest"), ("anatomy", "abdomen")}


def test_odd_cells_are_text() -> None:
    sets = LabelSets.from_columns({"x": ["[no json", "ﬁne", 'a "b"', "2", "[" * 5000], "y": ["0", "1", "2", "", None]})
    assert [v for name, v in sets.labels if name == "x"] == ["2", "[" * 5000, "[no json", 'a "b"', "fine"]
    assert [v for name, v in sets.labels if name == "y"] == ["0", "1", "2"]  # a 2 makes it no indicator


def test_unmapped_values_by_policy() -> None:
    table = {"anatomy": ["chest", "flipper", "chest|flipper"], "site": ["s1", "s2", "s2"]}
    own = LabelSets.from_columns(table)
    assert ("anatomy", "flipper") in own.labels
    unknown = LabelSets.from_columns(table, unmapped="unknown")
    assert unknown.known[:, 0].tolist() == [True, False, True]
    assert unknown.known[:, 1].all()  # no synonyms serve this column: nothing can be unmapped
    assert row_labels(unknown, 2) == {("anatomy", "chest"), ("site", "s2")}
    with pytest.raises(UserError, match='column "anatomy", row 2: a value is no known value') as caught:
        LabelSets.from_columns(table, unmapped="error")
    assert "flipper" not in str(caught.value)  # a rare text may be a name
    with pytest.raises(UserError, match='"hart" is no known value; closest: "heart"'):
        LabelSets.from_columns({"body_part": ["hart"] * 5}, unmapped="error")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": {}}, "at least one column"),
        ({"columns": {"a": ["x"], "b": ["x", "y"]}}, "different length: a 1, b 2"),
        ({"columns": {"a": ["x"]}, "weights": {"a": 0}}, 'weight 0 of "a" is not above 0'),
        ({"columns": {"a": ["x"]}, "weights": {"a": math.nan}}, "not above 0"),
        ({"columns": {"side": ["x"]}, "weights": {"sid": 1}}, 'weight of "sid", which is no column; closest: "side"'),
        ({"columns": {"a": ["x"]}, "taxonomies": {"b": Taxonomy.from_paths(["x"])}}, "taxonomy of"),
        ({"columns": {"a": ["x"]}, "unmapped": "drop"}, "none of own, unknown, error"),
        ({"columns": {"a": ["x"]}, "rungs": {"a": ["first"]}}, 'rung "first" is none of'),
        ({"columns": {"a": ["x"]}, "synonyms": {"a": {"y": "x"}}}, '"y" must be a list'),
    ],
)
def test_impossible_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LabelSets.from_columns(**arguments)


def test_rows_can_be_taken_and_permuted() -> None:
    sets = LabelSets.from_columns({"a": ["x", "y", None, "x"], "b": ["u", "u", "v", "w"]})
    some = sets.take(np.array([3, 2, 2]))
    assert len(some) == 3
    assert row_labels(some, 0) == {("a", "x"), ("b", "w")}
    assert rows_table(some).tolist() == rows_table(sets)[np.ix_([3, 2, 2], [3, 2, 2])].tolist()
    assert len(some.sets) == 2
    assert sets.take(np.arange(4)) == sets
    assert coverage.of(some).rows == 3


def test_many_classes_in_blocks() -> None:
    sets = LabelSets.from_columns({"a": [f"v{i % 40}" for i in range(700)], "b": [f"v{i % 33}" for i in range(700)]})
    _, table, comparable = sets.similarity()
    assert len(table) == 700
    assert (table == table.T).all()
    assert comparable.all()
    class_id = sets.class_id
    assert table[class_id[0], class_id[40]] == 1 / 3
    assert table[class_id[699], class_id[699]] == 1.0
    assert table[class_id[699], class_id[698]] == 0.0


def test_no_rows() -> None:
    sets = LabelSets.from_columns({"a": []})
    assert len(sets) == 0
    assert sets.similarity()[1].shape == (0, 0)
    assert coverage.of(sets, batch=4).expected_positives is None


# --- the ladder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values", "rung"),
    [
        ("ABD PEL", {"abdomen", "pelvis"}, "exact"),
        ("  Chest ", {"chest"}, "exact"),
        ("CHEST ABDOMEN", {"chest", "abdomen"}, "compact"),
        ("C-SPINE", {"spine"}, "compact"),
        ("CHEST (THORAX) ", {"chest"}, "compound"),
        ("Head-Neck", {"head", "neck"}, "exact"),
        ("LIVER & KIDNEY", {"liver", "kidney"}, "compound"),
        ("hip to knee", {"hip", "knee"}, "compound"),
        ("CT CHEST WO CE", {"chest"}, "loose"),
        ("PET_ABDOMEN_PEL", {"abdomen"}, "loose"),
        ("LUMBO-SACRAL SP", {"spine"}, "exact"),
        ("bladder", {"bladder"}, "exact"),
        ("J BRZUSZNA", set(), "unmapped"),
        ("HEAD OF FEMUR", set(), "unmapped"),
        ("ABDÓMEN", set(), "unmapped"),
        ("CHEST PHANTOM", set(), "unmapped"),
        ("chestnut", set(), "unmapped"),
        ("UNDEFINED", set(), "unknown"),
        ("OUTSIDE FIL", set(), "unknown"),
        ("", set(), "unknown"),
        (None, set(), "unknown"),
    ],
)
def test_ladder(text: str | None, values: set[str], rung: str) -> None:
    assert normalise_anatomy(text) == (values, rung)


def test_loose_is_off_for_columns() -> None:
    assert normalise_anatomy("CT CHEST WO CE", loose=False) == (NONE, "unmapped")
    table = {"anatomy": ["CT CHEST WO CE"]}
    assert row_labels(LabelSets.from_columns(table), 0) == {("anatomy", "ct chest wo ce")}
    assert row_labels(LabelSets.from_columns(table, loose=["anatomy"]), 0) == {("anatomy", "chest")}


SHEET = {
    "abdomen": "ABDOMEN, ABD",
    "abdomen|pelvis": "ABDOMENPELVIS, ABD PEL, ABD PELV, ABDOMEN_PELVIS",
    "chest": "CHEST, THORAX, TORAX",
    "chest|abdomen": "CHESTABDOMEN, CHEST/ABD, THORAXABD",
    "chest|abdomen|pelvis": "CHESTABDPELVIS, CHEST_TO_PELVIS, CAP",
    "chest|neck": "NECKCHEST",
    "lung": "LUNG, LUNGS",
    "heart": "HEART, CARDIAC",
    "mediastinum": "MEDIASTINUM",
    "breast": "BREAST, MAMMA",
    "head": "HEAD, SKULL, SELLA, ORBIT",
    "brain": "BRAIN, CEREBRUM",
    "neck": "NECK, CAROTID, LARYNX",
    "eye": "EYE, RETINA",
    "head|neck": "HEADNECK, HEADANDNECK, HEAD-NECK",
    "spine": "SPINE, CSPINE, TSPINE, LSPINE, LSSPINE, SSPINE, CTSPINE, TLSPINE, CERVICAL SPINE, THORACIC SPINE, "
    "LUMBAR SPINE, LUMBO-SACRAL SP, VERTEBRA",
    "hip": "HIP, HIP JOINT",
    "knee": "KNEE, PATELLA",
    "shoulder": "SHOULDER, CLAVICLE, SCAPULA",
    "ankle_foot": "ANKLE, FOOT, CALCANEUS, TOE",
    "pelvis": "PELVIS",
    "prostate": "PROSTATE",
    "kidney": "KIDNEY, RENAL",
    "liver": "LIVER, HEPATIC",
    "thyroid": "THYROID, THYROID GLAND",
    "arm": "ARM, HUMERUS, ELBOW, FOREARM",
    "hand": "HAND, WRIST, FINGER, THUMB",
    "leg": "LEG, FEMUR, THIGH, TIBIA, FIBULA",
    "whole_body": "WHOLEBODY",
    "bladder": "BLADDER",
    "colon": "COLON",
    "stomach": "STOMACH",
    "rectum": "RECTUM",
    "pancreas": "PANCREAS",
    "uterus": "UTERUS",
    "ovary": "OVARY",
    "cervix": "CERVIX",
    "": "UNDEFINED, OUTSIDE FIL, SEG, FUSION, WO INTER, EXTREMITY, PHANTOM",
}


def test_shipped_anatomy_is_the_table_of_the_sheet() -> None:
    for canonical, variants in SHEET.items():
        for variant in variants.split(", "):
            values, rung = normalise_anatomy(variant)
            assert values == frozenset(canonical.split("|")) - {""}, variant
            assert rung == ("exact" if canonical else "unknown"), variant


def test_shipped_compact_forms_do_not_collide() -> None:
    for terms in synonyms.shipped().terms.values():
        meanings: dict[str, frozenset[str]] = {}
        for term, values in terms.items():
            assert meanings.setdefault(synonyms.compact(term), values) == values, term


def test_modality_and_laterality_of_columns() -> None:
    sets = LabelSets.from_columns({"Modality": ["CR", "DX", "MRI", "OT"], "laterality": ["L", "B", "U", "R"]})
    assert row_labels(sets, 0) == {("Modality", "xr"), ("laterality", "left")}
    assert row_labels(sets, 1) == {("Modality", "xr"), ("laterality", "left"), ("laterality", "right")}
    assert row_labels(sets, 2) == {("Modality", "mr"), ("laterality", "unpaired")}
    assert row_labels(sets, 3) == {("laterality", "right")}


@pytest.mark.parametrize(
    ("sources", "values", "conflict"),
    [
        ([], set(), False),
        ([{"chest"}], {"chest"}, False),
        ([set(), {"head"}, set()], {"head"}, False),
        ([{"chest"}, {"chest"}], {"chest"}, False),
        ([{"chest"}, {"chest", "abdomen"}], {"chest", "abdomen"}, False),
        ([{"chest"}, {"lung"}], {"lung"}, False),
        ([{"prostate"}, {"abdomen", "pelvis"}], {"prostate"}, False),
        ([{"head"}, {"neck"}], set(), True),
        ([{"lung", "liver"}, {"chest"}], set(), True),
        ([{"head"}, {"neck"}, {"head"}], set(), True),
    ],
)
def test_two_sources(sources: list[set[str]], values: set[str], conflict: bool) -> None:
    assert combine_anatomy([frozenset(s) for s in sources]) == (values, conflict)


def test_damaged_synonyms_are_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.toml"
    for text, said in (("part_of = 3", "part_of: expected a table"), ("a = " + "[" * 9999, "not a TOML file")):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            synonyms.read(path)


def test_user_synonyms_lie_over_the_shipped_ones(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(
        '[anatomy]\n"chest" = ["BRUST"]\nribcage = ["RIB"]\n[scanner]\nbig = ["B1", "B2"]\n'
        '[columns]\nanatomy = ["Region"]\n'
        '[part_of.anatomy]\nleg = ["knee"]\n'
    )
    mine = synonyms.read(path)
    assert normalise_anatomy("brust", synonyms=mine) == ({"chest"}, "exact")
    assert normalise_anatomy("rib", synonyms=mine)[0] == {"ribcage"}
    assert normalise_anatomy("thorax", synonyms=mine)[0] == {"chest"}
    assert normalise_anatomy("rib")[0] == {"rib"}
    assert combine_anatomy([frozenset({"leg"}), frozenset({"knee"})], synonyms=mine) == ({"knee"}, False)
    sets = LabelSets.from_columns({"scanner": ["b1", "B-2"], "region": ["Brust", "rib"]}, synonyms=mine)
    assert row_labels(sets, 1) == {("scanner", "big"), ("region", "ribcage")}
    assert synonyms.overlay(mine.to_dict(), synonyms.Synonyms()) == mine
    direct = LabelSets.from_columns({"scanner": ["b1"]}, synonyms={"scanner": {"big": ["B1"]}})
    assert row_labels(direct, 0) == {("scanner", "big")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[anatomy\n", "not a TOML file"),
        ("anatomy = 3\n", "anatomy: expected a table"),
        ('[anatomy]\nchest = "x"\n', 'anatomy: "chest" must be a list'),
        ('[anatomy]\nchest = ["x"]\nhead = ["X "]\n', 'anatomy: "X " stands under two values'),
        ('[part_of]\nanatomy = ["x"]\n', "part_of.anatomy: expected a table"),
    ],
)
def test_faulty_synonyms_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        synonyms.read(path)
    assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        synonyms.read(tmp_path / "none.toml")


# --- coverage ------------------------------------------------------------------------------------------------------


def test_coverage_counts() -> None:
    table = {
        "anatomy": ["CHEST", "chest", "C H E S T", "head|neck", "flipper", None, "UNDEFINED", "head"],
        "modality": ["CT", "CT", None, "CT", "CT", None, "MR", "CT"],
    }
    sets = LabelSets.from_columns(table, rungs={"anatomy": [None] * 7 + ["conflict"]})
    report = coverage.of(sets, np.array([0, 0, 1, 2, 3, 4, 5, 6]))
    anatomy, modality = report.attributes
    assert report.rows == 8
    assert (anatomy.name, anatomy.known, modality.known) == ("anatomy", 5 / 8, 6 / 8)
    assert anatomy.values == (("chest", 3), ("head", 1), ("neck", 1))
    assert anatomy.hidden == 1  # one patient has the flipper
    assert anatomy.rungs == {"exact": 3 / 8, "compact": 1 / 8, "unmapped": 1 / 8, "unknown": 2 / 8, "conflict": 1 / 8}
    assert (anatomy.conflicts, anatomy.unmapped, anatomy.unmapped_rows) == (1, (), 1)
    assert report.nothing_known == 1
    assert report.distinct == len(sets.sets) == 7
    assert report.together.tolist() == [[5, 4], [4, 6]]
    assert report.threshold == pytest.approx(1 / 6)  # two anatomies each, one shared, modality unknown: 1/2 of 1/3
    assert report.findings == ('"anatomy": two sources contradict each other in 1 rows (unknown)',)


def test_names_stay_out_of_the_report() -> None:
    """A text that fewer than five patients have may be somebody's name."""
    names = ["Erika Mustermann"] * 9 + ["localiser"] * 5 + ["chest"] * 3
    patients = np.array([1, 1, 1, 2, 2, 2, 3, 4, 4, *range(5, 10), 20, 21, 22])
    for column in ("anatomy", "operator"):
        sets = LabelSets.from_columns({column: names})
        report = coverage.of(sets, patients, batch=4)
        assert "mustermann" not in (repr(report) + repr(sets)).casefold()
        assert "localiser" in repr(report)
        assert ("localiser", 5) in report.attributes[0].values
    assert coverage.of(LabelSets.from_columns({"anatomy": names}), patients).attributes[0].unmapped == (
        ("localiser", 5),
    )


def enumerate_positives(sets: LabelSets, batch: int, views: int, threshold: float) -> tuple[float, float]:
    """Over all batches and all anchors in them: mean positives, and share with none but own views."""
    similar = rows_table(sets) >= threshold - 1e-9
    positives, alone = [], []
    for rows in itertools.combinations(range(len(sets)), batch):
        for a in rows:
            others = sum(similar[a, p] for p in rows if p != a)
            positives.append(views - 1 + views * others)
            alone.append(others == 0)
    return float(np.mean(positives)), float(np.mean(alone))


@settings(max_examples=40)
@given(columns(rows=6), st.integers(2, 6), st.integers(1, 3), st.sampled_from([None, 0.3, 0.6, 1.0]))
def test_expected_positives_against_all_batches(
    table: dict[str, list[str | None]], batch: int, views: int, threshold: float | None
) -> None:
    sets = LabelSets.from_columns(table)
    report = coverage.of(sets, batch=batch, views=views, threshold=threshold)
    expected, alone = enumerate_positives(sets, batch, views, report.threshold)
    assert report.expected_positives == pytest.approx(expected, rel=1e-12)
    assert report.own_view_only == pytest.approx(alone, rel=1e-9, abs=1e-12)
    assert report.positive_share == pytest.approx(expected / (views * batch - 1))


def test_expected_positives_of_a_hand_count() -> None:
    """n = 5, N = 3, V = 2: two of a kind meet in half the batches that hold one of them."""
    matches = np.array([1, 0])
    assert coverage.expected_positives(matches, 5, 3, 2).tolist() == [1 + 2 * 2 / 4, 1.0]


def test_findings() -> None:
    table = {
        "same": ["x"] * 6,
        "id": [f"v{i}" for i in range(6)],
        "nothing": [None] * 6,
        "anatomy": ["phantom", "head", "head", "head", "head", "head"],
    }
    found = coverage.of(LabelSets.from_columns(table), batch=4, threshold=0.5).findings
    assert '"same" is the same in every row that has it: it lifts every similarity' in found
    assert '"id" is different in every row: the loss becomes plain view contrast (SimCLR)' in found
    assert '"nothing" is known of no row' in found
    assert '"anatomy": 1 rows are of a phantom' in found
    assert any(finding.startswith("threshold 0.5 may ask for more") for finding in found)
    crowded = coverage.of(LabelSets.from_columns({"a": ["x"] * 9 + ["y"]}), batch=8)
    assert any("of a batch would be positives" in finding for finding in crowded.findings)
    fine = coverage.of(LabelSets.from_columns({"a": ["x", "y", "z"] * 3, "b": ["u", "u", "v"] * 3}), batch=8)
    assert fine.findings == ()


def test_batch_that_does_not_fit() -> None:
    sets = LabelSets.from_columns({"a": ["x", "y"]})
    assert coverage.of(sets, batch=3).expected_positives is None
    assert coverage.of(sets).own_view_only is None


@pytest.mark.slow
def test_a_million_rows() -> None:
    draw = np.random.default_rng(0)
    words = np.array(["CT", "MR", "us", None, "X-Ray"], dtype=object)
    parts = np.array(["CHEST", "HEAD|NECK", "knee", None, "flipper"], dtype=object)
    table = {"modality": words[draw.integers(0, 5, 10**6)], "anatomy": parts[draw.integers(0, 5, 10**6)]}
    start = time.process_time()
    sets = LabelSets.from_columns(table)
    sets.similarity()
    coverage.of(sets, draw.integers(0, 10**5, 10**6), batch=256)
    assert time.process_time() - start < 10
    assert len(sets.sets) == 25

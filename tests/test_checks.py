"""What a manifest's columns say together, listed all at once; one test a row of the fault list, named by its id."""

import re

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kladi.config import Data
from kladi.data import findings
from kladi.data.findings import Finding, counted, line, listed, merged, quoted, visible
from kladi.data.rows import checks
from kladi.data.rows.manifest import Manifest
from kladi.structure.taxonomy import Taxonomy

TREE = Taxonomy.from_paths(["US/breast/benign", "US/breast/malignant", "US/thyroid", "MR/brain"])
GIVEN = Data(taxonomy="some/where/tree.csv")


def made(tmp_path, *, label=None, patient=None, split=None, n=None):
    """A manifest in memory with these columns."""
    n = n or len(next(c for c in (label, patient, split) if c is not None))
    blank = [None] * n
    table = pl.DataFrame(
        {
            "row": range(1, n + 1),
            "path": [f"{i}.png" for i in range(n)],
            "frame": [-1] * n,
            "label": label or blank,
            "patient": patient or blank,
            "split": split or blank,
        },
        schema_overrides={"row": pl.Int64, "label": pl.String, "patient": pl.String, "split": pl.String},
    )
    return Manifest(tmp_path, table)


def check(tmp_path, data=None, tree=None, *, supervised=False, folds=0, **columns):
    return checks.check(made(tmp_path, **columns), data or Data(), tree, supervised=supervised, folds=folds)


def of(found, code, severity=None):
    return [f for f in found if f.code == code and severity in (None, f.severity)]


def people(n):
    return [f"p{i}" for i in range(n)]


def test_sound_data_has_no_finding(tmp_path):
    label = ["US/breast/benign", "US/thyroid"] * 6
    assert check(tmp_path, GIVEN, TREE, label=label, patient=people(12), split=["train"] * 12, folds=5) == ()


# --- M16 -------------------------------------------------------------------------------------------------------------


def test_m16_a_patient_in_two_splits_is_an_error_that_shows_a_pair(tmp_path):
    patient = ["a", "b", "a", "a", "c", "c", "b", None, None]
    split = ["train", "val", "train", "test", "test", "val", None, "train", "test"]
    (finding,) = of(check(tmp_path, patient=patient, split=split), "M16")
    assert finding.severity == "error"
    assert finding.rows == (1, 4, 5, 6, 3)  # one row in each split first, then the rest of these patients
    assert "2 patients in two splits (1 in test and train, 1 in test and val)" in finding.message
    assert "remove the column split" in finding.message


def test_m16_with_allow_leak_it_is_a_warning(tmp_path):
    found = check(tmp_path, Data(allow_leak=True), patient=["a", "a"], split=["train", "test"])
    assert [f.severity for f in of(found, "M16")] == ["warning"]


def test_m16_rows_without_a_file_leak_too(tmp_path):
    base = made(tmp_path, patient=["a", "b"], split=["train", "train"])
    aside = base.table.head(1).with_columns(row=pl.lit(9, dtype=pl.Int64), split=pl.lit("test"))
    found = checks.check(Manifest(tmp_path, base.table, set_aside=aside), Data())
    assert of(found, "M16")[0].rows == (1, 9)


def test_rows_without_a_file_are_checked_and_not_counted(tmp_path):
    base = made(tmp_path, label=["US", "MR"] * 3, patient=people(6))
    aside = base.table.head(2).with_columns(
        row=pl.Series([8, 9]), label=pl.Series(["US/thyriod", None]), patient=pl.lit(None, dtype=pl.String)
    )
    found = checks.check(Manifest(tmp_path, base.table, set_aside=aside), GIVEN, TREE)
    assert [(f.code, f.rows) for f in found] == [("T5", (8,))]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.sampled_from(["train", "val", "test", None]))))
def test_m16_is_found_exactly_where_it_is(tmp_path_factory, rows):
    if not rows:
        return
    found = check(tmp_path_factory.getbasetemp(), patient=[p for p, _ in rows], split=[s for _, s in rows])
    torn = {p for p, _ in rows if p and len({s for q, s in rows if q == p and s}) > 1}
    expected = {i + 1 for i, (p, s) in enumerate(rows) if p in torn and s}
    assert {row for f in of(found, "M16") for row in f.rows} == expected


# --- M17, M18 --------------------------------------------------------------------------------------------------------


def test_m17_blank_ids_are_counted_and_are_patients_of_their_own(tmp_path):
    (finding,) = of(check(tmp_path, patient=["a", None, "b", None], folds=4), "M17")
    assert finding.rows == (2, 4)
    assert "2 rows without a patient id" in finding.message
    assert not of(check(tmp_path, patient=["a", None, "b", None], folds=4), "M18")


def test_m17_no_ids_at_all_is_said_once(tmp_path):
    (finding,) = of(check(tmp_path, n=5), "M17")
    assert finding.rows == ()
    assert "patient_id" in finding.message


def test_m17_one_id_on_most_rows_is_suspected_and_not_shown(tmp_path):
    (finding,) = of(check(tmp_path, patient=["Mustermann"] * 30 + people(10)), "M17")
    assert "75% of the rows" in finding.message
    assert "Mustermann" not in finding.message


@pytest.mark.parametrize(
    ("patients", "words"), [(4, "4 folds, not 5"), (3, "3 folds, not 5"), (2, "too few for folds")]
)
def test_m18_fewer_patients_than_folds(tmp_path, patients, words):
    (finding,) = of(check(tmp_path, patient=people(patients) * 3, folds=5), "M18")
    assert words in finding.message
    assert finding.severity == "warning"


def test_m18_enough_patients_say_nothing(tmp_path):
    assert not of(check(tmp_path, patient=people(5), folds=5), "M18")
    assert not of(check(tmp_path, patient=people(2)), "M18")


# --- labels ----------------------------------------------------------------------------------------------------------


def test_t5_a_label_that_is_not_in_the_tree_names_three_closest(tmp_path):
    label = ["US/thyriod", "US/thyroid", "US/thyriod", "MR/brian", None]
    found = of(check(tmp_path, GIVEN, TREE, label=label), "T5", "error")
    assert [f.rows for f in found] == [(1, 3), (4,)]
    assert found[0].message.startswith('label "US/thyriod" is not in tree.csv; closest: "US/thyroid", ')
    assert len(re.findall(r'"', found[0].message)) == 8
    assert 'closest: "MR/brain"' in found[1].message


def test_t5_inner_nodes_are_labels(tmp_path):
    assert not of(check(tmp_path, GIVEN, TREE, label=["US", "US/breast"]), "T5")


def test_t5_twenty_labels_are_listed_the_most_frequent_first(tmp_path):
    label = [f"zz{i:02d}" for i in range(30) for _ in range(i + 1)]
    found = of(check(tmp_path, GIVEN, TREE, label=label), "T5")
    assert len(found) == 21
    assert '"zz29"' in found[0].message
    assert "10 more labels not in tree.csv" in found[-1].message
    assert len(found[-1].rows) == sum(range(1, 11))


def test_t5_without_a_file_every_label_is_a_node(tmp_path):
    assert not of(check(tmp_path, tree=TREE, label=["anything", "else"]), "T5")


def test_m4_several_labels_in_a_cell_are_refused_by_name(tmp_path):
    label = ["a|b", '["a", "c"]', "a", "[x]", '["a"]', "b"]
    (finding,) = of(check(tmp_path, label=label), "M4", "error")
    assert finding.rows == (1, 2)
    assert '"a|b"' in finding.message
    assert "--data.metadata" in finding.message


def test_m4_a_bar_in_the_name_of_a_node_is_no_separator(tmp_path):
    tree = Taxonomy.from_edges([("a|b", None), ("c", None)])
    assert not of(check(tmp_path, GIVEN, tree, label=["a|b", "c"]), "M4")


def test_m9_labels_that_differ_in_leading_zeros_are_warned_of(tmp_path):
    label = ["1", "01", "001", "0", "00", "10", "1.05", "1.5", "x/07", "x/7"]
    found = of(check(tmp_path, label=label), "M9", "warning")
    assert [f.rows for f in found] == [(4, 5), (1, 2, 3), (9, 10)]
    assert "they stay 3 labels" in found[1].message


def test_m9_and_m10_ids_that_look_alike_are_counted_and_not_shown(tmp_path):
    found = check(tmp_path, patient=["P01", "p01", "7", "007", "Q2"])
    assert [(f.code, f.rows) for f in found if f.code in {"M9", "M10"}] == [("M10", (1, 2)), ("M9", (3, 4))]
    assert not any("P01" in f.message or "007" in f.message for f in found)


@pytest.mark.parametrize(
    ("label", "both", "rows"),
    [
        (["Breast", "breast", "x"], '"Breast" and "breast"', (1, 2)),
        (["US/a", "us/b"], '"US" and "us"', (1, 2)),
        (["US/Ä", "US/ä"], '"Ä" and "ä" below "us"', (1, 2)),
        (["STRASSE", "straße"], '"STRASSE" and "straße"', (1, 2)),
    ],
)
def test_m10_labels_that_differ_in_case_are_refused_with_both_spellings(tmp_path, label, both, rows):
    (finding,) = of(check(tmp_path, label=label), "M10", "error")
    assert both in finding.message
    assert "--data.fold_case" in finding.message
    assert finding.rows == rows


def test_m10_spellings_that_the_tree_tells_apart_are_two_labels(tmp_path):
    tree = Taxonomy.from_edges([("a", None), ("A", None)])
    assert not of(check(tmp_path, GIVEN, tree, label=["a", "A"]), "M10")


def test_m10_bidi_controls_are_printed_escaped(tmp_path):
    (finding,) = of(check(tmp_path, GIVEN, TREE, label=["US/\u202edoryht"]), "T5")
    assert "\u202e" not in finding.message
    assert r"\u202e" in finding.message


# --- classes ---------------------------------------------------------------------------------------------------------


def test_m13_both_counts_are_said(tmp_path):
    (finding,) = of(check(tmp_path, label=["a", None, "b", None, None]), "M13")
    assert finding.message.startswith("2 of 5 rows have a label")
    assert finding.severity == "warning"


def test_m13_no_labels_is_an_error_only_where_they_are_needed(tmp_path):
    assert not of(check(tmp_path, n=4), "M13")
    assert [f.severity for f in of(check(tmp_path, n=4, supervised=True), "M13")] == ["error"]


def test_m14_one_class_is_fine_without_labels_and_refused_with(tmp_path):
    (warning,) = of(check(tmp_path, label=["a"] * 5), "M14")
    (error,) = of(check(tmp_path, label=["a"] * 5, supervised=True), "M14")
    assert (warning.severity, error.severity) == ("warning", "error")
    assert '"a"' in error.message


def test_m15_rare_classes_are_named_with_images_and_patients(tmp_path):
    label = ["common"] * 6 + ["single", "twin", "twin", "twin", "blank", "blank", "blank"]
    patient = [*people(6), "s", "t", "t", "u", None, None, None]
    found = of(check(tmp_path, label=label, patient=patient), "M15")
    assert [(f.severity, f.rows) for f in found] == [("warning", (7,)), ("warning", (8, 9, 10))]
    assert '"single" has 1 image of 1 patient' in found[0].message
    assert '"twin" has 3 images of 2 patients' in found[1].message


def test_m15_without_ids_an_image_is_a_patient(tmp_path):
    found = of(check(tmp_path, label=["a"] * 3 + ["b"] * 2), "M15")
    assert [f.rows for f in found] == [(4, 5)]


def test_frames_of_one_file_are_one_row(tmp_path):
    one = made(tmp_path, label=["a"], patient=["p"])
    three = Manifest(tmp_path, pl.concat([one.table.with_columns(frame=pl.lit(i, dtype=pl.Int64)) for i in range(3)]))
    assert checks.check(three, Data()) == checks.check(one, Data())


def test_all_faults_are_listed_at_once(tmp_path):
    label = ["US/thyriod", "a|b", "US", None]
    found = check(
        tmp_path, GIVEN, TREE, label=label, patient=["p", "p", None, "q"], split=["train", "test", None, None]
    )
    assert {f.code for f in found} == {"M16", "M17", "M4", "T5", "M13", "M15"}


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.text(min_size=1, max_size=6), st.sampled_from(["a/b", "A/b", "a|b", "01", "1"])),
            st.one_of(st.none(), st.text(min_size=1, max_size=3)),
            st.sampled_from([None, "train", "val", "test"]),
        ),
        min_size=1,
        max_size=40,
    ),
    st.booleans(),
)
def test_any_text_gives_findings_that_print_on_one_line(tmp_path_factory, rows, with_tree):
    label, patient, split = (list(column) for column in zip(*rows, strict=True))
    found = checks.check(
        made(tmp_path_factory.getbasetemp(), label=label, patient=patient, split=split),
        GIVEN if with_tree else Data(),
        TREE if with_tree else None,
        folds=5,
    )
    for finding in found:
        assert line(finding).isprintable()
        assert all(1 <= row <= len(rows) for row in finding.rows)
        assert len(set(finding.rows)) == len(finding.rows)


# --- wording ---------------------------------------------------------------------------------------------------------


def test_a_line_shows_five_rows_and_counts_the_rest():
    assert line(Finding("I1", "left out", "empty file", (3,))) == "empty file: row 3"
    assert line(Finding("I1", "left out", "x", tuple(range(1000, 1007)))) == (
        "x: rows 1,000, 1,001, 1,002, 1,003, 1,004 and 2 more"
    )
    assert line(Finding("T2", "warning", "no rows here")) == "no rows here"


def test_counts_and_lists():
    assert [counted(n, "row") for n in (0, 1, 12480)] == ["0 rows", "1 row", "12,480 rows"]
    assert listed([]) == ""
    assert listed(["a", "b", "c"]) == "a, b, c"


@pytest.mark.parametrize(
    "text", ["\x1b[31m", "\x00", "\x9b", "\u202e", "\u2066", "\u200b", "\ufeff", "\u2028", "\ud800", "\U000e0041"]
)
def test_m11_nothing_invisible_is_printed(text):
    shown = quoted(f"a{text}b")
    assert shown.isprintable()
    assert shown.startswith('"a\\')
    shown.encode()


def test_m11_letters_of_any_script_and_brackets_stay():
    for text in ("Größe", "شبكية", "甲状腺", "🫀", "[red]x[/red]", "<b>", "a b"):
        assert visible(text) == text


def test_m11_markup_is_text_on_the_console_that_the_commands_use(capsys):
    from kladi import printed

    printed.line("errors", quoted("[red]US[/red]\x1b]0;x\x07"))
    assert capsys.readouterr().out.endswith('"[red]US[/red]\\x1b]0;x\\x07"\n')


def test_m11_a_formula_is_text_in_the_file_of_problems(tmp_path):
    from kladi.data import summary

    summary.write_csv([Finding("T5", "error", "=cmd()", (1,))], tmp_path / "problems.csv")
    assert (tmp_path / "problems.csv").read_text().splitlines()[1] == "error,T5,1,'=cmd()"


def test_long_texts_are_cut():
    assert len(quoted("x" * 10_000)) == findings.LONGEST + 2
    assert quoted("x" * 81).endswith('…"')


def test_what_was_seen_twice_is_told_once():
    twice = [
        Finding("D12", "warning", "burnt in", (1, 2)),
        Finding("M5", "left out", "missing", (3,)),
        Finding("D14", "warning", "burnt in", (2, 4)),
        Finding("M5", "error", "missing", (3,)),
    ]
    assert merged(twice) == [Finding("D12", "warning", "burnt in", (1, 2, 4)), *twice[1:2], twice[3]]


@pytest.mark.slow
def test_m12_checks_of_many_rows_of_hostile_shape(tmp_path):
    """Every patient in two splits, every label unknown, every label rare: still seconds, and few findings."""
    import time

    n = 400_000
    number = pl.Series(range(n))
    base = made(tmp_path, n=1).table
    table = pl.DataFrame(
        {
            "row": number + 1,
            "path": number.cast(pl.String),
            "frame": pl.repeat(-1, n, dtype=pl.Int64, eager=True),
            "label": "label/" + (number % 50_000).cast(pl.String),
            "patient": (number // 2).cast(pl.String),
            "split": pl.Series(["train", "test"] * (n // 2)),
        }
    ).select(base.columns)
    start = time.process_time()
    found = checks.check(Manifest(tmp_path, table), GIVEN, TREE)
    assert time.process_time() - start < 20
    assert len(found) < 100

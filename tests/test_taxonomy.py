"""Label trees: the numbers of the sheet, walks over paths and sets against the arrays, every file form, every fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kladi.errors import UserError
from kladi.structure.taxonomy import Taxonomy, UnknownNode
from peak_memory import PEAK, needs_proc
from strategies import NAME, dags, edges_of, slash_paths, taxonomy_of, trees

SHEET = ["US/breast/benign", "US/breast/malignant", "US/thyroid", "MR/brain", "MR/knee"]
"""The example of the evaluation sheet: depths 3 3 2 2 2, diameter 5, heights US 2, breast 1, MR 1."""


def every(tax: Taxonomy) -> np.ndarray:
    return np.arange(len(tax))


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- worked numbers ------------------------------------------------------------------------------------------------


def test_nodes_come_by_depth_and_name() -> None:
    tax = Taxonomy.from_paths(SHEET)
    assert tax.names == (
        "MR",
        "US",
        "MR/brain",
        "MR/knee",
        "US/breast",
        "US/thyroid",
        "US/breast/benign",
        "US/breast/malignant",
    )
    assert tax.parents == ((), (), (0,), (0,), (1,), (1,), (4,), (4,))
    assert tax.children == ((2, 3), (4, 5), (), (), (6, 7), (), (), ())
    assert tax.depth.tolist() == [1, 1, 2, 2, 2, 2, 3, 3]
    assert tax.height.tolist() == [1, 2, 0, 0, 1, 0, 0, 0]
    assert [tax.names[v] for v in tax.leaves] == ["MR/brain", "MR/knee", "US/thyroid", *SHEET[:2]]
    assert tax.diameter == 5
    assert tax.is_tree
    tax.require_tree()
    for array in (tax.depth, tax.leaves, tax.height, tax.index(SHEET), tax.distance([0], [1]), tax.ancestor_table):
        assert array.dtype == np.int64
    assert tax.closure.dtype == np.bool_
    assert tax.overlap([0], [1]).dtype == np.float64


def test_distances_of_the_sheet() -> None:
    tax = Taxonomy.from_paths(SHEET)
    benign, malignant, thyroid, brain, knee = tax.index(SHEET)
    assert tax.distance([benign], [malignant, thyroid, brain, benign]).tolist() == [[2, 3, 5, 0]]
    assert tax.lca_depth([brain], [knee, benign]).tolist() == [[1, 0]]
    assert tax.ancestors(malignant).tolist() == tax.index(["US", "US/breast", "US/breast/malignant"]).tolist()
    assert tax.ancestor_table[thyroid].tolist() == [*tax.index(["US", "US/thyroid"]), -1]


def test_overlap_of_example_e1() -> None:
    tax = Taxonomy.from_paths(["A/x", "A/y", "B/z"])
    x, y, z, a = tax.index(["A/x", "A/y", "B/z", "A"])
    assert tax.overlap([x, y, z], [x, y, z]).tolist() == [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]
    assert tax.overlap([a], [x]).tolist() == [[0.5]]  # an inner node against its descendant: L_a / L_b


def test_evaluation_example_has_diameter_five_on_ragged_leaves() -> None:
    assert Taxonomy.from_paths(["B/x", "B/y", "M/u/p", "M/u/q", "M/v"]).diameter == 5


@pytest.mark.parametrize(
    ("paths", "diameter"),
    [(["a"], 0), (["a/b/c"], 0), (["a", "b"], 2), (["a/b", "a/c"], 2), (["a/b/c", "d"], 4), (["a/b", "a/c", "d/e"], 4)],
)
def test_diameter(paths: list[str], diameter: int) -> None:
    assert Taxonomy.from_paths(paths).diameter == diameter


# --- against walks over the graph ----------------------------------------------------------------------------------


@given(trees())
def test_tree_against_reference(parents: dict[str, list[str]]) -> None:
    tax = taxonomy_of(parents)
    names = tax.names
    assert tax.is_tree
    assert sorted(names) == sorted(parents)
    above = {n: reference.ancestors(parents, n) for n in names}
    for i, a in enumerate(names):
        assert tax.depth[i] == len(above[a])
        assert tax.height[i] == reference.height(parents, a)
        assert {names[j] for j in tax.ancestors(i)} == above[a]
        for column, node in enumerate(tax.ancestor_table[i]):
            expected = reference.ancestor_at(parents, a, column + 1)
            assert (names[node] if node >= 0 else None) == expected
    assert tax.ancestor_table.shape == (len(names), max(map(len, above.values())))
    shared = [[len(above[a] & above[b]) for b in names] for a in names]
    assert tax.lca_depth(every(tax), every(tax)).tolist() == shared
    assert (tax.closure.astype(int) @ tax.closure.T.astype(int)).tolist() == shared
    assert tax.overlap(every(tax), every(tax)).tolist() == [
        [reference.overlap(parents, a, b) for b in names] for a in names
    ]
    assert tax.distance(every(tax), every(tax)).tolist() == [
        [reference.edges_between(parents, a, b) for b in names] for a in names
    ]
    assert tax.diameter == reference.leaf_diameter(parents)
    assert [names[v] for v in tax.leaves] == [n for n in names if n in reference.leaves(parents)]


@given(dags())
def test_dag_against_reference(parents: dict[str, list[str]]) -> None:
    tax = taxonomy_of(parents)
    names = tax.names

    def longest(node: str) -> int:
        return 1 + max((longest(p) for p in parents[node]), default=0)

    assert [int(d) for d in tax.depth] == [longest(n) for n in names]
    assert list(names) == sorted(parents, key=lambda n: (longest(n), n))
    for i, a in enumerate(names):
        assert {names[j] for j in np.flatnonzero(tax.closure[i])} == reference.ancestors(parents, a)
        assert tax.ancestors(i).tolist() == np.flatnonzero(tax.closure[i]).tolist()
        assert [names[p] for p in tax.parents[i]] == [n for n in names if n in parents[a]]
        assert tax.height[i] == reference.height(parents, a)
    some, others = every(tax)[::2], every(tax)[::-1]
    expected = [[reference.overlap(parents, names[a], names[b]) for b in others] for a in some]
    np.testing.assert_allclose(tax.overlap(some, others), expected, rtol=0, atol=1e-15)
    for parent in ("first", "longest"):
        tree = tax.projected(parent)
        assert tree.is_tree
        assert sorted(tree.names) == sorted(names)
        assert all({tree.names[p] for p in tree.parents[v]} <= set(parents[n]) for v, n in enumerate(tree.names))
    assert {n: int(d) for n, d in zip(tree.names, tree.depth, strict=True)} == {n: longest(n) for n in names}


@given(slash_paths())
def test_same_name_under_two_parents_is_two_nodes(paths: list[str]) -> None:
    tax = Taxonomy.from_paths(paths)
    parents = reference.parents_from_paths(paths)
    assert set(tax.names) == set(parents)
    for i, a in enumerate(tax.names):
        shared = [len(reference.ancestors(parents, a) & reference.ancestors(parents, b)) for b in tax.names]
        assert tax.lca_depth([i], every(tax))[0].tolist() == shared


@given(st.one_of(trees(), dags()), st.randoms(use_true_random=False))
def test_content_decides_not_the_order_of_rows(parents: dict[str, list[str]], shuffler: object) -> None:
    tax = taxonomy_of(parents)
    edges = edges_of(parents)
    shuffler.shuffle(edges)
    other = Taxonomy.from_edges(edges)
    assert other == tax
    assert hash(other) == hash(tax)
    assert other.digest == tax.digest
    renamed = taxonomy_of({"x" + n: ["x" + p for p in above] for n, above in parents.items()})
    assert renamed != tax
    assert renamed.digest != tax.digest


def test_digest_is_stable() -> None:
    """Kept in checkpoints: a change of this value is a change of format."""
    assert Taxonomy.from_paths(SHEET).digest.startswith("4ddb06cf0acf")


def test_arrays_cannot_be_changed() -> None:
    tax = Taxonomy.from_paths(SHEET)
    for array in (tax.depth, tax.height, tax.leaves, tax.closure, tax.ancestor_table):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


# --- labels --------------------------------------------------------------------------------------------------------


def test_unknown_label_names_three_closest() -> None:
    tax = Taxonomy.from_paths(SHEET)
    assert tax.index([]).shape == (0,)
    assert tax.index("US") == 1
    assert "US/breast" in tax
    assert "breast" not in tax
    with pytest.raises(KeyError) as caught:
        tax.index(["US", "US/thyriod"])
    assert str(caught.value).startswith('"US/thyriod" is no node of the taxonomy; closest: "US/thyroid", ')
    assert str(caught.value).count('"') == 8
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, UnknownNode)


def test_closest_among_many() -> None:
    tax = Taxonomy.from_paths([f"organ{i}/tissue{j}" for i in range(60) for j in range(20)])
    assert tax.closest("organ17/tisue3")[0] == "organ17/tissue3"
    assert len(tax.closest("zzz", 3)) == 3


@pytest.mark.parametrize("bad", [[-1], [8], [0.5], [[0, 1]]])
def test_ids_outside_are_refused(bad: list[object]) -> None:
    tax = Taxonomy.from_paths(SHEET)
    for ask in (tax.lca_depth, tax.distance, tax.overlap):
        with pytest.raises(IndexError):
            ask(bad, [0])
    with pytest.raises(IndexError, match="8 is no node id of a taxonomy of 8 nodes"):
        tax.ancestors(8)


# --- faults of drawings (the rows T1 to T6 of the fault list) ------------------------------------------------------


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([("a", "b"), ("b", "a")], "cycle: a > b > a"),
        ([("top", None), ("x", "top"), ("c", "a"), ("a", "b"), ("b", "c"), ("d", "c")], "cycle: a > b > c > a"),
        ([("a", "a")], r'pair 1: "a" is its own parent \(a > a\)'),
        ([("a", None), ("b", "a"), ("b", "a")], 'pair 3: "b" below "a" occurs twice, first in pair 2'),
        ([("a", None), ("a", "")], 'pair 2: top node "a" occurs twice, first in pair 1'),
        ([("b", None), ("a", None), ("a", "b")], 'pair 3: "a" is a top node in pair 2 and below "b" in pair 3'),
        ([("b", None), ("a", "b"), ("a", None)], 'pair 3: "a" is a top node in pair 3 and below "b" in pair 2'),
        ([(" ", "b")], "pair 1: the child is empty"),
        ([], "at least one node"),
    ],
)
def test_faulty_edges_are_refused(edges: list[tuple[str, str | None]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Taxonomy.from_edges(edges)


def test_long_cycle_is_abbreviated() -> None:
    ring = [(f"n{i:03d}", f"n{(i + 1) % 100:03d}") for i in range(100)]
    with pytest.raises(UserError) as caught:
        Taxonomy.from_edges(ring)
    assert "n000 > n001" in str(caught.value)
    assert str(caught.value).endswith("> n000")
    assert "... 90 more ..." in str(caught.value)


@pytest.mark.parametrize("paths", [[], [""], ["a//b"], ["/a"], ["a/"], ["a", "b/ /c"]])
def test_faulty_paths_are_refused(paths: list[str]) -> None:
    with pytest.raises(UserError):
        Taxonomy.from_paths(paths)


def test_parent_that_is_nowhere_a_child_is_reported() -> None:
    tax = Taxonomy.from_edges([("x", "a"), ("y", "b"), ("a", None)])
    assert tax.names == ("a", "b", "x", "y")
    assert tax.findings == ('1 parent is nowhere a child and taken as a top node: "b"',)
    assert Taxonomy.from_edges([("x", "a"), ("y", "b")]).findings[0].startswith("2 parents are")


def test_one_top_over_all_is_reported_and_two_are_fine() -> None:
    assert 'root="all"' in Taxonomy.from_paths(["all/x", "all/y"]).findings[0]
    assert Taxonomy.from_paths(["a/x", "b/y"]).findings == ()


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"a": ["x\\ud800"], "b": null}')
    with pytest.raises(UserError, match="half a character"):
        Taxonomy.read(tmp_path / "t.json")


def test_blanks_and_unicode_forms_are_one_node() -> None:
    tax = Taxonomy.from_edges([(" café", None), ("x", "cafe\u0301 ")])  # composed, and letter with accent
    assert tax.names == ("café", "x")
    assert "trimmed" in tax.findings[0]
    assert Taxonomy.from_paths([" a / b", "a/c"]).names == ("a", "a/b", "a/c")
    assert 'differ in case only: "A" and "a"' in Taxonomy.from_paths(["a/x", "A/y"]).findings[0]


def test_dag_is_refused_where_a_tree_is_needed() -> None:
    dag = Taxonomy.from_edges([("a", None), ("b", None), ("c", "a"), ("c", "b")])
    assert not dag.is_tree
    for ask in (
        dag.require_tree,
        lambda: dag.lca_depth([0], [1]),
        lambda: dag.distance([0], [1]),
        lambda: dag.ancestor_table,
        lambda: dag.diameter,
    ):
        with pytest.raises(ValueError, match='node "c" has 2 parents: "a", "b"'):
            ask()
    assert dag.overlap([2], [0, 1, 2]).tolist() == [[1 / 3, 1 / 3, 1]]


def test_projection_keeps_one_parent() -> None:
    dag = Taxonomy.from_edges([("a", None), ("z", None), ("y", "z"), ("c", "a"), ("c", "y")])
    first, longest = dag.projected("first"), dag.projected("longest")
    assert first.ancestors(int(first.index("c"))).tolist() == first.index(["a", "c"]).tolist()
    assert longest.ancestors(int(longest.index("c"))).tolist() == longest.index(["z", "y", "c"]).tolist()
    with pytest.raises(ValueError, match="neither"):
        dag.projected("last")
    tree = Taxonomy.from_paths(SHEET)
    assert tree.projected("first") == tree == tree.projected("longest")


def test_nodes_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="before their children"):
        Taxonomy(("a", "b"), ((1,), ()))
    with pytest.raises(ValueError, match="at least 1"):
        Taxonomy((), ())


# --- size (T6) -----------------------------------------------------------------------------------------------------


def test_chain_longer_than_the_recursion_limit() -> None:
    count = 5 * sys.getrecursionlimit()
    tax = Taxonomy.from_edges([(f"n{i:05d}", f"n{i - 1:05d}" if i else None) for i in range(count)])
    assert tax.depth[-1] == count == len(tax.ancestors(count - 1))
    assert tax.lca_depth([10], [count - 1]).tolist() == [[11]]
    assert tax.overlap([count // 2 - 1], [count - 1]).tolist() == [[0.5]]
    assert tax.diameter == 0
    assert Taxonomy.from_dict(tax.to_dict()) == tax


def test_dense_tables_of_large_trees_are_refused_with_their_size() -> None:
    flat = Taxonomy.from_edges([(f"n{i}", None) for i in range(20_001)])
    with pytest.raises(UserError, match=r"closure of 20,001 nodes would take 0.4 GB"):
        _ = flat.closure
    chain = Taxonomy.from_edges([(f"n{i:05d}", f"n{i - 1:05d}" if i else None) for i in range(9000)])
    with pytest.raises(UserError, match=r"9,000 nodes at depth 9,000 would take 0.6 GB"):
        _ = chain.ancestor_table


LARGE = """
import json, time
import numpy as np
from kladi import Taxonomy
start = time.process_time()
draw = np.random.default_rng(0)
above = [i - 1 if i < 500 else int(draw.integers(0, i)) for i in range(50_000)]
edges = [(f"n{i}", f"n{p}" if p >= 0 else None) for i, p in enumerate(above)]
tax = Taxonomy.from_edges(edges)
some = draw.integers(0, len(tax), 1000)
shared = tax.lca_depth(some, some)
r = tax.overlap(some, some)
tax.ancestor_table, tax.diameter, tax.digest, tax.leaves
try:
    tax.index("n0000x")
except KeyError:
    pass
assert shared[0, 0] == tax.depth[some[0]] and r[0, 0] == 1
second = [(f"n{i}", f"n{draw.integers(0, i)}") for i in range(1, 50_000)]
dag = Taxonomy.from_edges(sorted(set(edges) | set(second) - {("n0", None)}, key=str))
dag.overlap(some[:200], some[:200])
print(json.dumps({"seconds": time.process_time() - start, "bytes": peak(), "depth": int(tax.depth.max())}))
"""


@pytest.mark.slow
@needs_proc
def test_fifty_thousand_nodes_under_five_seconds_and_a_gigabyte() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK + LARGE], capture_output=True, text=True, check=True)
    cost = json.loads(done.stdout)
    assert cost["depth"] >= 500
    assert cost["seconds"] < 5
    assert cost["bytes"] < 1e9


# --- files ---------------------------------------------------------------------------------------------------------

EDGES = Taxonomy.from_edges([("a", None), ("b", None), ("x", "a"), ("y", "a"), ("z", "b")])
PATHS = Taxonomy.from_paths(["a/x", "a/y", "b/z"])

TABLES = {
    "header": ("t.csv", "child,parent\na,\nb,\nx,a\ny,a\nz,b\n", EDGES),
    "parent first": ("t.csv", "parent,child\n,a\n,b\na,x\na,y\nb,z\n", EDGES),
    "other words": ("t.csv", "Node-ID,ParentID\na,\nb,\nx,a\ny,a\nz,b\n", EDGES),
    "is_a": ("t.tsv", "id\tis_a\nx\ta\ny\ta\nz\tb\n", EDGES),
    "no header": ("t.csv", "a,\nb,\nx,a\ny,a\nz,b\n", EDGES),
    "no header, parent first": ("t.csv", ",a\n,b\na,x\na,y\nb,z\n", EDGES),
    "no header, by what repeats": ("t.csv", "x,a\ny,a\nz,b\na,all\nb,all\n", None),
    "no header, parent first, by what repeats": ("t.csv", "a,x\na,y\nb,z\nall,a\nall,b\n", None),
    "unknown header": ("t.csv", "what,of\nx,a\ny,a\nz,b\n", EDGES),
    "semicolons, CRLF, BOM": ("t.csv", b"\xef\xbb\xbfchild;parent\r\na;\r\nb;\r\nx;a\r\ny;a\r\nz;b\r\n", EDGES),
    "UTF-16": ("t.csv", "child,parent\na,\nb,\nx,a\ny,a\nz,b\n".encode("utf-16"), EDGES),
    "trailing comma, blank rows": ("t.csv", "child,parent,\na,,\n\nb,,\nx,a,\ny,a,\nz,b,\n,,\n", EDGES),
    "levels": ("t.csv", "organ,kind\na,x\na,y\nb,z\n", PATHS),
    "levels, named": ("t.csv", "level 1,level 2\na,x\nb,z\na,y\n", PATHS),
    "levels, ragged": ("t.csv", "organ,kind,sub\na,x,\na,y,\nb,,\nb,z,\n", PATHS),
    "levels, no header": ("t.csv", "a,x,\na,y,\nb,z,\na,y,k\n", Taxonomy.from_paths(["a/x", "a/y/k", "b/z"])),
    "paths": ("t.csv", "path\na/x\na/y\nb/z\n", PATHS),
    "paths, other columns": ("t.csv", "count,path\n1,a/x\n2,a/y\n3,b/z\n", PATHS),
    "paths, no header": ("t.csv", "a\na/x\na/y\nb/z\n", PATHS),
    "paths, unknown header": ("t.tsv", "what\na/x\na/y\nb/z\n", PATHS),
    "quoted": ("t.csv", 'child,parent\n"a",\nb,\n"x",a\ny,a\n"z","b"\n', EDGES),
    "nested": ("t.json", '{"a": ["x", "y"], "b": {"z": null}}', PATHS),
    "nested, dicts": ("t.json", '{"a": {"x": {}, "y": []}, "b": ["z"]}', PATHS),
    "nested, dicts in lists": ("t.json", '["b", {"a": ["x", {"y": null}]}, {"b": ["z"]}]', None),
    "newick": ("t.nwk", "((x,y)a,(z)b);", EDGES),
    "newick, lengths and comments": ("t.nwk", "((x:0.1,'y':1e-3[remark])a:2,\n(z)b)[&R];\n", EDGES),
    "obo": (
        "t.obo",
        "format-version: 1.2\n\n[Term]\nid: a\nname: Alpha\n\n[Term]\nid: b\n\n[Term]\nid: x\nis_a: a ! Alpha\n\n"
        '[Typedef]\nid: part_of\n\n[Term]\nid: y\nis_a: a {source="s"} ! Alpha\nrelationship: part_of b\n\n'
        "[Term]\nid: z\nis_a: b\nis_a: gone\n\n[Term]\nid: gone\nis_obsolete: true\n",
        EDGES,
    ),
}


@pytest.mark.parametrize("form", [form for form, (_, _, tax) in TABLES.items() if tax is not None])
def test_file_forms(tmp_path: Path, form: str) -> None:
    name, text, expected = TABLES[form]
    tax = Taxonomy.read(write(tmp_path, name, text))
    assert tax.names == expected.names
    assert tax == expected


@pytest.mark.parametrize("form", ["no header, by what repeats", "no header, parent first, by what repeats"])
def test_direction_by_what_repeats_is_said(tmp_path: Path, form: str) -> None:
    name, text, _ = TABLES[form]
    tax = Taxonomy.read(write(tmp_path, name, text), root="all")
    assert tax == EDGES
    assert any("columns are read as" in finding for finding in tax.findings)


def test_what_was_assumed_is_said(tmp_path: Path) -> None:
    said = Taxonomy.read(write(tmp_path, "t.csv", "what,of\nx,a\ny,a\nz,b\n")).findings
    assert said[:2] == ('the first row is taken as header: "what,of"', "columns are read as child,parent")
    said = Taxonomy.read(write(tmp_path, "t.csv", TABLES["paths, other columns"][1])).findings
    assert said == ("columns not used: count",)
    said = Taxonomy.read(write(tmp_path, "t.obo", TABLES["obo"][1])).findings
    assert said == ("1 obsolete terms are left out, and 1 is_a to them",)


def test_titles_are_kept_for_display(tmp_path: Path) -> None:
    tax = Taxonomy.read(write(tmp_path, "t.obo", TABLES["obo"][1]))
    assert tax.titles == {"a": "Alpha"}
    assert tax == EDGES  # a title is no content
    table = Taxonomy.read(write(tmp_path, "t.csv", "id,parent,name\nR1,,lung\nR2,R1,nodule\n"))
    assert table.titles == {"R1": "lung", "R2": "nodule"}
    for name in ("u.json", "u.csv", "u.tsv"):
        table.write(tmp_path / name)
        assert Taxonomy.read(tmp_path / name).titles == table.titles


def test_root_becomes_implicit(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", "child,parent\nall,\na,all\nb,all\nx,a\n")
    assert Taxonomy.read(path).diameter == 3  # x - a - all - b
    tax = Taxonomy.read(path, root="all")
    assert tax == Taxonomy.from_edges([("a", None), ("b", None), ("x", "a")])
    part = Taxonomy.read(path, root="a")
    assert part.names == ("x",)
    assert '2 nodes that are not below root "a" are left out' in part.findings
    with pytest.raises(UserError, match='root "al" is no node of the taxonomy; closest: "all"'):
        Taxonomy.read(path, root="al")
    with pytest.raises(UserError, match='nothing is below root "x"'):
        Taxonomy.read(path, root="x")


@settings(max_examples=30)
@given(st.data())
def test_round_trip_with_any_names(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    parents = data.draw(st.one_of(trees(most=6), dags(most=6)))
    names = data.draw(st.lists(NAME.map(str.strip), min_size=len(parents), max_size=len(parents), unique_by=_clean))
    of = dict(zip(parents, names, strict=True))
    tax = taxonomy_of({of[n]: [of[p] for p in above] for n, above in parents.items()})
    folder = tmp_path_factory.getbasetemp()
    for name in ("t.json", "t.csv", "t.tsv", *(["t.nwk"] if tax.is_tree else [])):
        tax.write(folder / name)
        assert Taxonomy.read(folder / name) == tax
    assert Taxonomy.from_dict(json.loads(json.dumps(tax.to_dict()))) == tax


def _clean(name: str) -> str:
    import unicodedata

    return unicodedata.normalize("NFC", name).strip()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "child,parent\na,\nx,a\nx,a\n", r'row 3 \(line 4\): "x" below "a" occurs twice, first in row 2'),
        ("t.csv", "path\na/x\na/x\n", r'row 2 \(line 3\): "a/x" occurs twice'),
        ("t.csv", "organ,kind,s\na,x,\na,x,\n", r'row 2 \(line 3\): "a/x" occurs twice'),
        ("t.csv", "organ,kind,s\na,,k\n", r'row 1 \(line 2\): column 2 is blank, but "k" follows'),
        ("t.csv", "child,parent\na,b\nb,a\n", "cycle: a > b > a"),
        ("t.csv", "child,parent\na,a\n", "own parent"),
        ("t.csv", "child,parent\n", "no rows"),
        ("t.csv", "path\n", "no rows"),
        ("t.csv", "child,parent\na,,b,c\n", r"row 1 \(line 2\): 4 cells, but the first row has 2"),
        ("t.csv", "a,b\nb,c\n", "which column is the parent"),
        ("t.csv", "parent,one,two\na,b,c\n", "which column is the child"),
        ("t.csv", 'child,parent\n"a,\n', "line"),
        ("t.csv", "", "empty"),
        ("t.csv", b"child,parent\na,\nb\xff,a\n", "line 3: byte 17 is no UTF-8 text"),
        ("t.json", "{", "line 1, column 2: no JSON"),
        ("t.json", '{"a": ["x", 3]}', 'below "a" stands the int 3'),
        ("t.json", '{"name": "a", "children": []}', 'below "name" stands the str "a"'),
        ("t.json", '{"a": null, "a": []}', '"a" occurs twice'),
        ("t.json", '{"a": ["x", "x"]}', '"a/x" occurs twice'),
        ("t.json", "3", "dict or a list"),
        ("t.json", "[" * 3000 + "]" * 3000, "nested too deep"),
        ("t.json", '{"format": "kladi-taxonomy", "version": 2}', "version 2"),
        ("t.json", '{"format": "kladi-taxonomy", "version": 1, "nodes": [{"id": 1}]}', "node 1 has no name"),
        (
            "t.json",
            '{"format": "kladi-taxonomy", "version": 1, "nodes": [{"name": "a", "parents": "b"}]}',
            "no list|not a list",
        ),
        ("t.nwk", "((x,y),z)r;", "character 7: an inner node without a name"),
        ("t.nwk", "(x,,z)r;", "character 4: an end node without a name"),
        ("t.nwk", "((x,y)a;", "1 brackets are open"),
        ("t.nwk", "(x,y)a)b;", 'character 7: "\\)" outside'),
        ("t.nwk", "(x,y)a", 'does not end with ";"'),
        ("t.nwk", "(x,x)a;", 'the name "x" occurs twice'),
        ("t.nwk", "x;y;", "a second tree"),
        ("t.nwk", "('x,y)a;", "character 2: a quote is not closed"),
        ("t.nwk", "(x[,y)a;", "a comment is not closed"),
        ("t.nwk", "(x 'y')a;", 'the name "y" follows the name "x"'),
        ("t.nwk", ";", "without a name"),
        ("t.obo", "[Term]\nname: x\n", r"line 1: a \[Term\] with 0 ids"),
        ("t.obo", "[Term]\nid: x\n\n[Term]\nid: x\n", 'line 4: the term "x" occurs twice'),
        ("t.obo", "nothing here\n", "at least one node"),
        ("t.txt", "a", "a taxonomy is .csv"),
    ],
)
def test_faulty_files_are_refused_with_file_and_place(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(UserError, match=message) as caught:
        Taxonomy.read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Taxonomy.read(tmp_path / "none.csv")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    dag = Taxonomy.from_edges([("a", None), ("b", None), ("c", "a"), ("c", "b")])
    with pytest.raises(UserError, match='"c" has 2 parents, which Newick cannot say'):
        dag.write(tmp_path / "t.nwk")
    with pytest.raises(UserError, match=r"written as \.json"):
        dag.write(tmp_path / "t.obo")


def test_deep_newick_and_json_need_no_recursion(tmp_path: Path) -> None:
    depth = 3 * sys.getrecursionlimit()
    path = write(tmp_path, "t.nwk", "(" * (depth - 1) + "n0" + "".join(f")n{i}" for i in range(1, depth)) + ";")
    assert Taxonomy.read(path).depth[-1] == depth
    text: object = None
    for i in range(500):
        text = {f"k{i}": text}
    assert Taxonomy.read(write(tmp_path, "t.json", json.dumps(text))).depth[-1] == 500


@pytest.mark.mosaic
def test_tree_of_a_real_collection() -> None:
    here = Path(__file__).parents[1]
    path = Path(os.environ.get("KLADI_MOSAIC", here.parent / "shared" / "data" / "mosaic")) / "taxonomy.csv"
    if not path.exists():
        pytest.skip(f"no {path}; set KLADI_MOSAIC")
    tax = Taxonomy.read(path)
    assert len(tax) == 66
    assert tax.is_tree
    assert tax.findings == ()
    assert tax == Taxonomy.from_paths(tax.names)
    covid, pneumonia = tax.index(["DX/chest/infection/pneumonia/viral/covid-19", "DX/chest/infection/pneumonia"])
    assert tax.distance([covid], [pneumonia]).tolist() == [[2]]

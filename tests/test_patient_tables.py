"""Tables of patients are joined by id, every fault is named, no id travels on; and the command that reads them."""

import csv
import json
import re

import numpy as np
import pytest

from kladi import toy
from kladi.cli import main
from kladi.data import patient_tables
from kladi.errors import UserError
from kladi.evaluate.embed import describe
from kladi.report import factors as page
from kladi.structure.lattice import Lattice
from reference_factors import loadings, sample

N = 24


def written(folder, name, columns, ids=None, key="patient_id"):
    path = folder / f"{name}.csv"
    ids = [f"P{i:03d}" for i in range(N)] if ids is None else ids
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([key, *columns])
        writer.writerows(zip(ids, *columns.values(), strict=True))
    return path


@pytest.fixture
def numbers():
    rng = np.random.default_rng(0)
    return {f"x{j}": rng.normal(size=N).round(3).tolist() for j in range(3)}


def test_patients_are_joined_by_id_whatever_their_order(tmp_path, numbers):
    order = np.random.default_rng(1).permutation(N)
    a = written(tmp_path, "a", numbers)
    b = written(tmp_path, "b", {"y": order.tolist()}, ids=[f"P{i:03d}" for i in order], key="Subject ID")
    found = patient_tables.read([a, b])
    assert found.names == ("a", "b")
    assert found.features == (("x0", "x1", "x2"), ("y",))
    np.testing.assert_array_equal(found.values[1][:, 0], np.arange(N))
    np.testing.assert_array_equal(found.rows[:, 0], np.arange(1, N + 1))
    np.testing.assert_array_equal(found.rows[:, 1], 1 + np.argsort(order))
    assert found.present.all()
    assert "P0" not in repr(found.findings)


def test_a_patient_who_is_not_in_a_table_is_a_row_of_nan(tmp_path, numbers):
    a = written(tmp_path, "a", numbers)
    ids = [f"P{i:03d}" for i in range(4, 20)]
    b = written(tmp_path, "b", {"y": [*range(15), ""]}, ids=ids)  # the last one has no value at all
    found = patient_tables.read([a, b])
    assert found.present[:, 1].sum() == 15
    assert np.isnan(found.values[1][~found.present[:, 1]]).all()
    said = [finding.message for finding in found.findings]
    assert said == ["b: 1 row without any value", "9 patients in one table only"]


def test_columns_are_cleaned_and_that_is_said(tmp_path, numbers):
    odd = {**numbers, "flat": [7] * N, "holes": ["NA", "", 3, *range(N - 3)], "empty": [""] * N}
    found = patient_tables.read([written(tmp_path, "a", odd), written(tmp_path, "b", numbers)])
    assert found.features[0] == ("x0", "x1", "x2", "holes")
    holes = found.values[0][:, 3]
    assert holes[0] == holes[1] == pytest.approx(np.mean([3, *range(N - 3)]))
    said = " / ".join(finding.message for finding in found.findings)
    assert 'a: 2 columns with the same value everywhere: "flat", "empty"' in said
    assert "a: 2 blank cells in 1 column filled with the column's mean" in said


def test_text_becomes_columns_where_that_is_asked(tmp_path, numbers):
    sex = ["m", "f", ""] * (N // 3)
    paths = [written(tmp_path, "a", {**numbers, "sex": sex, "note": sex}), written(tmp_path, "b", numbers)]
    with pytest.raises(
        UserError, match=r'text where numbers belong in 2 columns: "sex", "note"; --leave-out sex drops'
    ):
        patient_tables.read(paths)
    found = patient_tables.read(paths, levels=["sex"], leave_out=["note"])
    assert found.features[0][-1] == "sex=m"
    np.testing.assert_allclose(found.values[0][:3, -1], [1, 0, 0.5])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c | {"x0": [*c["x0"][:-1], "inf"]}, 'infinite or beyond 1e100 in column "x0": row 24'),
        (lambda c: {"flat": [1] * N}, "has no column of numbers that differ between patients"),
    ],
)
def test_impossible_columns_are_named(tmp_path, numbers, change, said):
    with pytest.raises(UserError, match=said):
        patient_tables.read([written(tmp_path, "a", change(numbers)), written(tmp_path, "b", numbers)])


def test_impossible_ids_are_named(tmp_path, numbers):
    good = written(tmp_path, "b", numbers)
    twice = [f"P{max(i, 1):03d}" for i in range(N)]
    for ids, said in (
        (twice, r'a patient twice in column "patient_id": rows 1, 2; one row a patient'),
        (["", *[f"P{i:03d}" for i in range(1, N)]], r'no id in column "patient_id": row 1'),
        (
            [f"PAT-{i}" for i in range(N)],
            r'b and a share 0 patients; 10 are needed; ids look like "A999" and "AAA-9"',
        ),
        ([f"P{i:03d}" for i in range(15, 15 + N)], "b and a share 9 patients; 10 are needed$"),
    ):
        with pytest.raises(UserError, match=said):
            patient_tables.read([good, written(tmp_path, "a", numbers, ids=ids)])
    with pytest.raises(UserError, match="has no column of patient ids; --key COLUMN names it"):
        patient_tables.read([good, written(tmp_path, "a", numbers, key="who")])
    same = [written(tmp_path, name, numbers, key="who") for name in ("c", "d")]
    assert patient_tables.read(same, key="who").names == ("c", "d")
    with pytest.raises(UserError, match=r'--key whom is no column of .*; closest: "who"'):
        patient_tables.read(same, key="whom")
    with pytest.raises(UserError, match=r'two tables are called "c"; rename'):
        patient_tables.read([same[0], same[0]], key="who")
    with pytest.raises(UserError, match="1 table; factors are shared by two or more"):
        patient_tables.read([good])


def test_nothing_is_asked_for_in_vain(tmp_path, numbers):
    ids = [f"MRN{i}" for i in range(60)]
    many = {"mrn": ids, "y": list(range(60)), "x": [1.5, 2.5] * 30}
    paths = [written(tmp_path, "a", many, ids=[f"P{i:03d}" for i in range(60)]), written(tmp_path, "b", numbers)]
    for options, said in (
        ({"levels": ["mrn"]}, "--levels mrn has 60 different words in 60 rows, as names have; it takes 30 at most"),
        ({"leave_out": ["mrn", "mnr"]}, '--leave-out mnr is no column of these tables; closest: "mrn"'),
        ({"leave_out": ["mrn"], "outcome": "mrn"}, "--outcome mrn is asked about, and cannot be left out"),
        ({"leave_out": ["mrn"], "outcome": "z"}, "--outcome z is no column"),
    ):
        with pytest.raises(UserError, match=said):
            patient_tables.read(paths, **options)
    few = written(tmp_path, "c", {**numbers, "alive": ["yes"] * 5 + ["no"] * 5 + [""] * (N - 10)})
    with pytest.raises(UserError, match="10 patients with --outcome alive; 20 are needed"):
        patient_tables.read([few, paths[1]], outcome="alive")
    with pytest.raises(UserError, match="9 tables; at most 8"):
        patient_tables.read([tmp_path / f"{i}.csv" for i in range(9)])


def test_a_row_with_a_cell_too_many_is_no_row(tmp_path, numbers):
    broken = written(tmp_path, "a", numbers)
    lines = broken.read_text().splitlines()
    lines[3] = lines[3].replace(",", ",1,", 1)
    broken.write_text("\n".join(lines))
    with pytest.raises(UserError, match="row 3"):
        patient_tables.read([broken, written(tmp_path, "b", numbers)])


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    """Three tables of 300 patients, of whom some lack one, and their lattice."""
    folder, rng = tmp_path_factory.mktemp("ward"), np.random.default_rng(0)
    sizes, lattice = (20, 24, 18), Lattice.of(3, {"0+1+2": 2, "0+1": 1, "2": 1})
    tables, _ = sample(loadings(sizes, lattice, rng), sizes, 0.05, 300, rng)
    paths = []
    for name, table in zip(("rna", "protein", "clinic"), tables, strict=True):
        some = np.sort(rng.permutation(300)[:270])
        columns = {f"{name}{j}": table[some, j].round(4).tolist() for j in range(table.shape[1])}
        paths.append(written(folder, name, columns, ids=[f"SECRET{i}" for i in some]))
    return paths, lattice


def test_the_command_finds_the_lattice_and_writes_no_id(ward, tmp_path, capsys):
    paths, lattice = ward
    out = tmp_path / "out"
    assert main(["factors", *map(str, paths), "--out", str(out), "--resamples", "4"]) == 0
    said = capsys.readouterr()
    assert re.search(r"rna\+protein\+clinic +2 factors: rna \d+%, protein \d+%, clinic \d+%", said.out)
    content = json.loads((out / "factors.json").read_text())
    assert {s["structure"]: s["rank"] for s in content["structures"]} == dict(
        zip(lattice.names, lattice.ranks, strict=True)
    )
    assert content["converged"]
    assert content["stability"]["n"] == 4
    assert content["stability"]["overlap"]["0+1+2"]["rna"]["mean"] > 0.8
    assert sum(pattern["patients"] for pattern in content["patterns"]) == content["patients"]
    rows = list(csv.reader((out / "factors.csv").read_text().splitlines()))
    assert rows[0][:4] == ["row in rna", "row in protein", "row in clinic", "0+1+2 factor 0"]
    assert len(rows) == 1 + content["patients"]
    for file in out.iterdir():
        assert "SECRET" not in file.read_text()
        assert file.stat().st_mode & 0o777 == 0o600
    assert "SECRET" not in said.out + said.err


def test_an_outcome_is_no_feature_and_is_foretold(ward, tmp_path, capsys):
    paths, _ = ward
    rows = list(csv.reader(paths[2].read_text().splitlines()))
    signal = np.array([[float(cell) for cell in row[1:]] for row in rows[1:]]).mean(axis=1)
    place = tmp_path / "clinic.csv"
    with place.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*rows[0], "alive"])
        writer.writerows([*row, "yes" if value > 0 else "no"] for row, value in zip(rows[1:], signal, strict=True))
    arguments = ["factors", str(paths[0]), str(paths[1]), str(place), "--resamples", "0", "--out"]
    assert main([*arguments, str(tmp_path / "o"), "--outcome", "alive"]) == 0
    assert re.search(r"alive +factors foretell [1-9]\d% of it", capsys.readouterr().out)
    content = json.loads((tmp_path / "o/factors.json").read_text())
    assert content["outcome"]["patients"] == 270
    assert content["tables"][2]["features"] == 18
    assert "in patients whose outcome was not read" in (tmp_path / "o/report.html").read_text()
    assert main([*arguments, str(tmp_path / "p"), "--leave-out", "alive", "--outcome", "alife"]) == 2
    assert "--outcome alife is no column of these tables" in capsys.readouterr().err


def test_an_images_embedding_and_a_table_of_its_manifest(tmp_path):
    """Joined by the row of the manifest."""
    rng = np.random.default_rng(0)
    data = toy.dataset(n=60, size=16)
    z = rng.normal(size=60)
    features = np.outer(z, rng.normal(size=6)) + 0.1 * rng.normal(size=(60, 6))
    describe(data, np.column_stack([features, np.ones(60)]).astype(np.float32)).write(tmp_path / "embeddings.npz")
    place = np.argsort(data.manifest_row)
    with (tmp_path / "m.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "age", "dose", "site"])
        writer.writerows([f"{i}.png", 50 + 10 * z[i], z[i] + 0.1 * rng.normal(), "ab"[i % 2]] for i in place)
    arguments = [str(tmp_path / "embeddings.npz"), str(tmp_path / "m.csv"), "--key", "row", "--leave-out", "path"]
    code = main(["factors", *arguments, "--levels", "site", "--ranks", "0+1=1", "--out", str(tmp_path / "o")])
    assert code == 0
    content = json.loads((tmp_path / "o/factors.json").read_text())
    assert [(t["name"], t["features"]) for t in content["tables"]] == [("embeddings", 6), ("m", 3)]
    assert content["patients"] == 60
    assert content["structures"][0]["explained"]["embeddings"] > 0.9


def test_the_command_twice_is_the_same(ward, tmp_path):
    for name in ("a", "b"):
        main(["factors", *map(str, ward[0]), "--out", str(tmp_path / name), "--resamples", "2", "--ranks", "1"])
    assert (tmp_path / "a/factors.json").read_bytes() == (tmp_path / "b/factors.json").read_bytes()
    content = json.loads((tmp_path / "a/factors.json").read_text())
    assert content["ranks_from"] == "given"
    assert len(content["structures"]) == 7
    assert page.stable_ranks(content) == []
    drawn = page.figures(content)
    assert set(drawn) == {"lattice", "explained", "stability"}
    shares = [sum(trace["x"][i] for trace in drawn["explained"]["data"]) for i in range(3)]
    np.testing.assert_allclose(shares, 1, atol=1e-3)
    edges = drawn["lattice"]["data"][0]["x"].count(None)
    assert edges == 9  # each pair of three sets of two, and each of these of two of one


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ("many", "--ranks many: takes auto, a number"),
        ("99999999999", "takes auto, a number up to 1000"),
        ("0+1=1,0+1=2", "each set once"),
        ("0+1=x", "takes auto, a number"),
        ("0+9=1", "is no structure of 3 modalities"),
        ("9", "rna has 20 features for 36 factors"),
        ("0", "no structure has a rank above 0"),
    ],
)
def test_a_mistake_is_one_line(ward, tmp_path, capsys, ranks, said):
    assert main(["factors", *map(str, ward[0]), "--out", str(tmp_path / "o"), "--ranks", ranks]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    (tmp_path / "file").touch()
    for out, more, words in (
        ("file/x", [], "file is a file; name a folder"),
        ("p", ["--seed", "-1"], "--seed -1: takes 0 or more"),
        ("p", [str(ward[0][0])], "is named twice"),
    ):
        assert main(["factors", *map(str, ward[0]), *more, "--out", str(tmp_path / out), "--ranks", "1"]) == 2
        assert words in capsys.readouterr().err

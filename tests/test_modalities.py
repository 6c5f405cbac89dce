"""Tables beside images: how a row finds its image, what is refused, that only training rows set centre and scale."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from kladi import config as settings
from kladi.data import load, modalities
from kladi.data.dataset import TRAIN
from kladi.data.embeddings import Embeddings
from kladi.data.modalities import Beside
from kladi.errors import UserError
from kladi.learn import run_folder

N = 40


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    """40 images of 20 patients, of which 30 are for training, with age and sex in the manifest."""
    folder = tmp_path_factory.mktemp("ward")
    lines = ["path,label,patient_id,split,age,sex"]
    for i in range(N):
        Image.new("L", (16, 16), 5 * i + 10).save(folder / f"{i}.png")
        age = "" if i == 3 else str(30 + i)
        lines.append(f"{i}.png,{'ab'[i % 2]},P{i // 2},{'train' if i < 30 else 'test'},{age},{'fm'[i // 2 % 2]}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


def read(ward, **data):
    given = {f"data.{key}": value for key, value in data.items()}
    config = settings.override(settings.Config(), {"data.store": str(ward / "store"), "intensity.size": 16, **given})
    return load.load(ward / "manifest.csv", config)


def table(ward, name, text):
    (ward / name).write_text(text)
    return str(ward / name)


def test_columns_of_the_manifest_are_one_modality(ward):
    dataset, _ = read(ward, covariates=["age", "sex"])
    (found,) = dataset.modalities
    assert (found.name, found.features) == ("covariates", ("age", "sex=f", "sex=m"))
    assert found.present.all()
    train = dataset.split == TRAIN
    known = np.arange(N) != 3
    assert found.values[3, 0] == 0  # blank: the mean
    ages = 30.0 + np.arange(N)
    centre, scale = ages[train & known].mean(), ages[train & known].std()
    np.testing.assert_allclose(found.values[known, 0], (ages[known] - centre) / scale, rtol=1e-5)


def test_a_file_of_patients_reaches_every_image_of_each(ward):
    rows = "\n".join(f"P{k},{k * k}.5,{k % 3}" for k in range(15))
    path = table(ward, "labs.csv", f"patient_id,crp,stage\n{rows}\n")
    dataset, inspection = read(ward, tables=[path])
    (found,) = dataset.modalities
    assert found.name == "labs"
    assert found.present.tolist() == [i // 2 < 15 for i in range(N)]
    assert (found.values[30:] == 0).all()
    assert found.values[0].tolist() == found.values[1].tolist() != found.values[2].tolist()
    assert any("table labs: 30 rows of 40 are in it" in finding.message for finding in inspection.findings)


def test_a_file_with_a_column_of_paths_is_joined_by_image(ward):
    rows = "\n".join(f"{i}.png,{i},{i % 5}" for i in reversed(range(0, N, 2)))
    dataset, _ = read(ward, tables=[table(ward, "counts.csv", f"path,red,white\n{rows}\n")])
    (found,) = dataset.modalities
    assert found.present.tolist() == [i % 2 == 0 for i in range(N)]
    assert (np.diff(found.values[::2, 0]) > 0).all()


def test_ready_embeddings_are_joined_by_content(ward, tmp_path):
    dataset, _ = read(ward)
    order = np.random.default_rng(0).permutation(N)
    features = np.random.default_rng(1).normal(size=(N, 6)).astype(np.float32)
    fields = {name: getattr(dataset, name)[order] for name in ("row_id", "manifest_row", "target", "group", "split")}
    made = Embeddings(features[order], None, pixel_digest=dataset.store.pixel_digest[order], **fields)
    made.write(tmp_path / "other.npz")
    (found,) = read(ward, tables=[str(tmp_path / "other.npz")])[0].modalities
    dataclasses.replace(made, features=np.full((N, 6), np.nan, np.float32)).write(tmp_path / "nan.npz")
    with pytest.raises(UserError, match="40 rows with NaN or infinity"):
        read(ward, tables=[str(tmp_path / "nan.npz")])
    train = dataset.split == TRAIN
    want = (features - features[train].mean(axis=0)) / features[train].std(axis=0)
    np.testing.assert_allclose(found.values, want, atol=1e-5)


def test_other_rows_do_not_move_the_training_rows(ward):
    """What is held out has no say in centre, scale, or which columns are used."""
    values = np.random.default_rng(0).normal(size=(N, 3))
    values[:30, 2] = 4  # differs among the held out alone
    train = np.arange(N) < 30
    (one,) = modalities.standardised([Beside("t", ("a", "b", "c"), values)], train)
    values = values.copy()
    values[30:] *= 1e6
    (two,) = modalities.standardised([Beside("t", ("a", "b", "c"), values)], train)
    assert one.features == ("a", "b")
    assert np.array_equal(one.values[:30], two.values[:30])


def test_the_digest_knows_the_tables(ward):
    bare = read(ward)[0]
    one = read(ward, covariates=["age"])[0]
    (found,) = one.modalities
    moved = dataclasses.replace(one, modalities=(dataclasses.replace(found, values=found.values + 1),))
    assert len({run_folder.digest(dataset) for dataset in (bare, one, moved)}) == 3
    assert run_folder.describe(one)["modalities"] == {"covariates": 1}
    config = settings.override(settings.Config(), {"data.tables": ["/home/jane/labs.csv"]})
    assert run_folder.portable(config).data.tables == ("labs.csv",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("patient_id,crp\nP1,1\nP1,2\n", "a patient twice"),
        ("path,crp\n1.png,1\n1.png,2\n", "an image twice"),
        ("patient_id,crp\nX-01,1\nX-02,2\n", 'value by its column "patient_id"; ids look like "A-99" and "A9"'),
        ("path,crp\nscan1.png,1\nscan2.png,2\n", 'no image of DATA has a value by its column "path"'),
        ("patient_id,split\nP1,train\nP2,test\n", "no column is left to use"),
        ("patient_id,crp\nP1,1\nP2,2\n", "4 training images of 30 have a row in it; 10 are needed"),
        ("patient_id,ward\nP1,east\nP2,west\n", "--data.leave_out ward drops it, --data.levels"),
        ("patient_id,crp\nP1,1\nP2,inf\n", "infinite or beyond 1e100"),
        ("name,crp\nP1,1\nP2,2\n", 'call it "patient_id", or "path"'),
        ("patient_id,crp\n" + "".join(f"P{k},7\n" for k in range(20)), "no column differs between training images"),
    ],
)
def test_faults_are_named(ward, text, said):
    with pytest.raises(UserError, match="labs") as caught:
        read(ward, tables=[table(ward, "labs.csv", text)])
    assert said in str(caught.value)
    assert "P1" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("label", "says the label of a row"),
        ("patient_id", "says the patient_id of a row"),
        ("split", "says the split of a row"),
        ("mask", "says the mask of a row"),
        ("agee", 'is no column of the manifest; closest: "age"'),
    ],
)
def test_columns_that_are_no_covariates_are_named(ward, column, said):
    with pytest.raises(UserError, match=f"--data.covariates {column}") as caught:
        read(ward, covariates=[column])
    assert said in str(caught.value)


def other(ward, name, change):
    """The manifest with its lines changed."""
    lines = (ward / "manifest.csv").read_text().splitlines()
    (ward / name).write_text("\n".join(change(i, line) for i, line in enumerate(lines)) + "\n")
    config = {"data.store": str(ward / "store"), "intensity.size": 16}
    return lambda **data: load.load(
        ward / name,
        settings.override(settings.Config(), {**config, **{f"data.{key}": value for key, value in data.items()}}),
    )


def test_a_few_words_among_numbers_are_named_with_their_rows(ward):
    typo = other(ward, "typo.csv", lambda i, line: line.replace(",36,", ",36y,").replace(",38,", ',"38,5",'))
    with pytest.raises(UserError, match=r"--data.covariates age: no number, where most cells are one: rows 7, 9"):
        typo(covariates=["age"])
    with pytest.raises(UserError, match=r"--data.covariates age has 39 different words in 39 rows, as names have"):
        typo(covariates=["age"], levels=["age"])


def test_words_are_said_and_blank_ones_are_blank(ward):
    read_it = other(ward, "words.csv", lambda i, line: line[:-1] + "NA" if i in (4, 5) else line)
    dataset, inspection = read_it(covariates=["sex"])
    (found,) = dataset.modalities
    assert found.features == ("sex=f", "sex=m")
    assert np.flatnonzero(~found.present).tolist() == [3, 4]
    assert any('covariate "sex": 2 words, a column each' in f.message for f in inspection.findings)


def test_who_a_row_is_is_no_feature(ward):
    rows = "".join(f"{i}.png,{i // 2},{i % 2},{i * i}\n" for i in range(N))
    path = table(ward, "roles.csv", f"path,patient_id,label,area\n{rows}")
    dataset, inspection = read(ward, tables=[path])
    assert dataset.modalities[0].features == ("area",)
    assert any('"patient_id", "label" say who or what a row is' in f.message for f in inspection.findings)


def test_held_out_rows_change_no_column_of_training(ward):
    """A word that only a held-out patient has, first in the alphabet; and a value far beyond all."""
    for last, value in (("zz", "5"), ("aa", "1e99")):
        rows = "".join(f"P{k},{'xy'[k % 2] if k < 19 else last},{k if k < 19 else value}\n" for k in range(20))
        path = table(ward, f"{last}.csv", f"patient_id,ward,crp\n{rows}")
        (found,) = read(ward, tables=[path], levels=["ward"])[0].modalities
        assert sorted(found.features) == ["crp", "ward=x", "ward=y"]
        assert np.isfinite(found.values).all()


def test_paths_are_written_in_many_ways(ward):
    for form in ("./{}.png", ".\\{}.png", f"{ward}/{{}}.png"):
        rows = "".join(f"{form.format(i)},{i}\n" for i in range(N))
        path = table(ward, "ways.csv", f"path,area\n{rows}")
        if form.startswith("."):
            assert read(ward, tables=[path])[0].modalities[0].present.all()


def test_faults_of_tables_stand_beside_all_others(ward):
    read_it = other(ward, "broken.csv", lambda i, line: line.replace(",train,", ",trian,") if i == 2 else line)
    with pytest.raises(UserError) as caught:
        read_it(tables=[table(ward, "labs.csv", "patient_id,crp\nP1,1\nP1,2\n")])
    assert "trian" in str(caught.value)
    assert "a patient twice" in str(caught.value)


def test_a_name_is_used_once(ward):
    path = table(ward, "covariates.csv", "patient_id,crp\n" + "".join(f"P{k},{k}\n" for k in range(20)))
    with pytest.raises(UserError, match='two modalities are called "covariates"'):
        read(ward, tables=[path], covariates=["age"])


def test_a_column_that_no_table_has_is_named(ward):
    rows = "".join(f"P{k},{k},{'xy'[k % 2]}\n" for k in range(20))
    paths = [table(ward, f"{name}.csv", f"patient_id,{name},ward\n{rows}") for name in ("crp", "hb")]
    with pytest.raises(UserError, match=r'--data.leave_out cpr is no column .*; closest: "crp"'):
        read(ward, tables=paths, leave_out=["cpr", "ward"])
    crp, hb = read(ward, tables=paths, levels=["ward"])[0].modalities
    assert (crp.features, hb.features) == (("crp", "ward=x", "ward=y"), ("hb", "ward=x", "ward=y"))

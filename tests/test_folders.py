"""A folder -> rows: content decides, the order is the paths', a label comes from a sub-folder only where it is one."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kladi.config import Data
from kladi.data.pixels import dicom_tags
from kladi.data.rows import folders, manifest
from kladi.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"
DICM = bytes(128) + b"DICM"


def fill(root, *names, content=PNG):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def rows(root, **data):
    return manifest.read(root, Data(**data)).table["path"].to_list()


def said(found, code):
    return [f for f in found.findings if f.code == code]


def test_the_walk_is_sorted_and_leaves_hidden_files_alone(tmp_path):
    fill(tmp_path, "b/2.png", "a.png", "b/10.png", ".git/x.png", "c/.hidden.png", "B/1.png", "b.png", "._a.png")
    found = manifest.read(tmp_path, Data())
    assert found.table["path"].to_list() == ["B/1.png", "a.png", "b.png", "b/10.png", "b/2.png"]
    assert found.table["row"].to_list() == [1, 2, 3, 4, 5]
    assert set(found.table["frame"]) == {-1}
    assert found.described["kind"] == "folder, 5 PNG"
    assert found.root == tmp_path


def test_i3_content_decides_and_a_promise_is_kept_as_a_row(tmp_path):
    """What claims to be an image stays, so that the decoder names it; what does not claim it is counted."""
    fill(tmp_path, "a.dat", "b")
    fill(tmp_path, "html.png", "text.dcm.jpg", content=b"<html>")
    fill(tmp_path, "empty.png", "empty.txt", content=b"")
    fill(tmp_path, "notes.txt", "list.csv", content=b"BMI, weight and height")
    fill(tmp_path, "letter.docx", "arrays.npz", content=b"PK\x03\x04")
    fill(tmp_path, "volume.nii.gz", "log.gz", content=b"\x1f\x8b\x08")
    found = manifest.read(tmp_path, Data())
    kept = ["a.dat", "arrays.npz", "b", "empty.png", "html.png", "text.dcm.jpg", "volume.nii.gz"]
    assert found.table["path"].to_list() == kept
    (skipped,) = said(found, "I3")
    assert skipped.severity == "skipped"
    assert skipped.message.startswith("5 files that are no images")
    assert "2 .txt" in skipped.message


def test_what_follows_a_dot_is_shown_only_where_it_is_a_suffix(tmp_path):
    """A part of a name, such as J.Smith, is nobody's business."""
    fill(tmp_path, "a.png")
    fill(tmp_path, "report.jsmith1970", "note of J. Smith", "x.ABC", content=b"words")
    message = said(manifest.read(tmp_path, Data()), "I3")[0].message
    assert "mith" not in message
    assert "1 .abc" in message


def test_m7_links_out_of_the_folder_are_not_followed(tmp_path, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    fill(outside, "x.png", "deep/y.png")
    fill(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "out.png").symlink_to(outside / "x.png")
    (tmp_path / "outdir").symlink_to(outside)
    (tmp_path / "again.png").symlink_to("a.png")
    (tmp_path / "sub" / "up").symlink_to("..")
    (outside / "circle").symlink_to(outside)
    (tmp_path / "broken.png").symlink_to("nowhere")
    found = manifest.read(tmp_path, Data())
    assert found.table["path"].to_list() == ["a.png", "again.png", "broken.png", "sub/b.png"]
    assert "2 links out of the folder" in said(found, "M7")[0].message
    both = rows(tmp_path, allow_outside=True)
    assert both == ["a.png", "again.png", "broken.png", "out.png", "outdir/deep/y.png", "outdir/x.png", "sub/b.png"]


def test_m7_pipes_are_never_opened(tmp_path):
    fill(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert rows(tmp_path) == ["a.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of other systems are Unicode")
def test_i15_a_name_that_is_no_text_is_counted(tmp_path):
    fill(tmp_path, "ä.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(PNG)
    found = manifest.read(tmp_path, Data())
    assert found.table["path"].to_list() == ["ä.png"]
    assert "1 file whose name" in said(found, "I15")[0].message


@pytest.mark.parametrize("name", ["metadata.csv", "manifest.csv", "manifest.tsv", "metadata.parquet"])
def test_a_table_inside_describes_the_folder(tmp_path, name):
    import polars as pl

    fill(tmp_path, "train/a.png", "train/b.png")
    table = pl.DataFrame({"file_name": ["train/a.png"], "label": ["x"]})
    if name.endswith("parquet"):
        table.write_parquet(tmp_path / name)
    else:
        table.write_csv(tmp_path / name, separator="\t" if name.endswith("tsv") else ",")
    found = manifest.read(tmp_path, Data())
    assert found.table["path", "label"].rows() == [("train/a.png", "x")]
    assert found.root == tmp_path


def test_two_tables_inside_are_refused(tmp_path):
    fill(tmp_path, "a.png")
    fill(tmp_path, "metadata.csv", "manifest.csv", content=b"path\na.png\n")
    with pytest.raises(UserError, match=r"metadata\.csv, manifest\.csv"):
        manifest.read(tmp_path, Data())


def test_metadata_of_plain_pictures_is_refused(tmp_path):
    fill(tmp_path, "a.png")
    with pytest.raises(UserError, match=r"metadata\.csv"):
        manifest.read(tmp_path, Data(metadata=("modality",)))


# --- DICOM -----------------------------------------------------------------------------------------------------------


def tags(patient, frames=1, modality="ct", **more):
    cells = dict.fromkeys(("anatomy", "laterality", "view", "device")) | {"modality": modality}
    return dicom_tags.Tags(cells, patient, "patient" if patient else "", frames, False, {"anatomy": "unknown"}, **more)


@pytest.fixture
def answers(monkeypatch):
    """File name -> what the tag reader answers."""
    table = {}
    monkeypatch.setattr(dicom_tags, "read_tags", lambda path, **_: table[path.name])
    return table


def test_a_folder_of_dicom_and_pictures_becomes_rows(tmp_path, answers):
    fill(tmp_path, "p1/IM0001", "p1/IM0002", "p2/cine", "p2/report", "p2/torn", "DICOMDIR", content=DICM)
    fill(tmp_path, "p2/photo.png")
    answers["IM0001"] = answers["IM0002"] = tags("p1")
    answers["cine"] = tags("p2", frames=7, modality="us", warnings=("ultrasound",))
    answers["report"] = dicom_tags.Skipped("structured report, no image", "D1", True)
    answers["DICOMDIR"] = dicom_tags.Skipped("DICOM directory, no image", "D1", True)
    answers["torn"] = dicom_tags.Skipped("damaged DICOM", "D13", False)
    found = manifest.read(tmp_path, Data(frames="middle", metadata=("modality",)))
    assert found.table["row", "path", "frame", "patient", "modality"].rows() == [
        (2, "p1/IM0001", -1, "p1", "ct"),
        (3, "p1/IM0002", -1, "p1", "ct"),
        (4, "p2/cine", 3, "p2", "us"),
        (5, "p2/photo.png", -1, None, None),
    ]
    assert [(f.severity, f.rows) for f in said(found, "D1")] == [("skipped", (1,)), ("skipped", (6,))]
    assert said(found, "D13")[0].rows == (7,)
    assert said(found, "D12")[0].rows == (4,)
    assert found.described["rungs"] == {"anatomy": {"unknown": 3}}
    assert found.table["label"].null_count() == 4


@pytest.mark.parametrize(
    ("choice", "frames"), [("all", [0, 1, 2, 3, 4]), ("first", [0]), ("middle", [2]), ("2", [0, 2, 4])]
)
def test_frames_become_rows_of_one_patient(tmp_path, answers, choice, frames):
    fill(tmp_path, "cine", content=DICM)
    answers["cine"] = tags("p", frames=5)
    found = manifest.read(tmp_path, Data(frames=choice))
    assert found.table["frame"].to_list() == frames
    assert set(found.table["patient"]) == {"p"}
    assert set(found.table["row"]) == {1}


def test_d12_conflicts_and_studies_are_said(tmp_path, answers):
    fill(tmp_path, "a", "b", content=DICM)
    answers["a"] = tags("p", conflict=True)
    answers["b"] = dicom_tags.Tags(
        dict.fromkeys(("modality", "anatomy", "laterality", "view", "device")), "1.2", "study", 1, False
    )
    found = manifest.read(tmp_path, Data())
    assert "different anatomy" in said(found, "D12")[0].message
    assert said(found, "M17")[0].rows == (2,)


def test_an_unknown_attribute_names_the_closest(tmp_path, answers):
    fill(tmp_path, "a", content=DICM)
    answers["a"] = tags("p")
    with pytest.raises(UserError, match='closest: "anatomy"'):
        manifest.read(tmp_path, Data(metadata=("anatmy",)))


def test_d1_a_bare_data_set_is_dicom_without_preamble(tmp_path, answers):
    fill(tmp_path, "bare", content=b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100")
    answers["bare"] = tags("p")
    assert rows(tmp_path) == ["bare"]


# --- sub-folders -----------------------------------------------------------------------------------------------------


def laid_out(*folders_, each=5, patients=()):
    return folders.layout([f"{f}{'/' if f else ''}{i}.png" for f in folders_ for i in range(each)], patients)


def test_class_folders_become_labels_and_it_is_said(tmp_path):
    fill(tmp_path, *(f"{c}/{i}.png" for c in ("benign", "malignant") for i in range(5)))
    found = manifest.read(tmp_path, Data())
    assert found.table["label"].to_list() == ["benign"] * 5 + ["malignant"] * 5
    (finding,) = said(found, "M13")
    assert finding.severity == "warning"
    assert '2 classes, "benign", "malignant"' in finding.message


def test_nested_folders_spell_the_tree_below_a_wrapper():
    found = laid_out("images/CT/chest/normal", "images/CT/head", "images/MR/head")
    assert found.label == ["CT/chest/normal"] * 5 + ["CT/head"] * 5 + ["MR/head"] * 5


def test_splits_above_the_classes_are_splits():
    found = laid_out("train/a", "train/b", "valid/a", "Test/b")
    assert found.label == ["a"] * 5 + ["b"] * 5 + ["a"] * 5 + ["b"] * 5
    assert found.split == ["train"] * 10 + ["val"] * 5 + ["test"] * 5
    assert "train 10, val 5, test 5" in found.findings[0].message


@pytest.mark.parametrize(
    "names", [("0", "1", "2"), ("grade 1", "grade 2"), ("BI-RADS 4", "BI-RADS 5"), ("covid-19", "T1")]
)
def test_numbered_classes_are_classes(names):
    assert laid_out(*names).label[0] == names[0]


@pytest.mark.parametrize(
    "names",
    [
        ("sub-01", "sub-02"),
        ("patient 7", "patient 8"),
        ("p1", "p2"),
        ("LIDC-IDRI-0001", "LIDC-IDRI-0002"),
        ("1.2.840.1", "1.2.840.2"),
        ("000123", "000124"),
        ("images", "masks"),
        ("a", ""),
        ("a/b/c/d/e/f/g", "a/b/c/d/e/f/h", "b/b/c/d/e/f/g"),
    ],
)
def test_folders_that_are_no_classes_give_no_labels_and_it_is_said(names):
    found = laid_out(*names)
    assert not any(found.label)
    assert "not taken as labels" in found.findings[0].message
    if names != ("images", "masks"):
        assert not any(name and f'"{name}"' in found.findings[0].message for name in names)  # it may be a person's


def test_small_folders_are_more_likely_patients():
    assert not any(laid_out("anna", "berta", "carl", each=3).label)


def test_folders_of_one_patient_each_are_patients():
    paths = 10
    assert not any(laid_out("anna", "berta", patients=["1"] * 5 + ["2"] * 5).label)
    assert all(laid_out("benign", "malignant", patients=[str(i % 3) for i in range(paths)]).label)


def test_a_flat_folder_says_nothing():
    assert laid_out("").findings == []
    assert laid_out("images").findings == []
    assert folders.layout([]).label == []


@given(st.lists(st.lists(st.sampled_from(["a", "train", "test", "images", "p1", "b"]), max_size=4), max_size=30))
def test_any_layout_gives_one_entry_a_path(parts):
    paths = ["/".join([*p, f"{i}.png"]) for i, p in enumerate(parts)]
    found = folders.layout(paths)
    assert len(found.label) == len(found.split) == len(paths)
    assert not any(label == "" for label in found.label)


def test_images_of_the_decoder_are_rows_of_the_walk(tmp_path):
    """Every format that is read by content is a row under any name."""
    for suffix in ("png", "jpg", "gif", "bmp", "tiff", "webp"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"x.{suffix}")
    np.save(tmp_path / "x.npy", np.zeros((8, 8)))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert rows(tmp_path) == names
    for name in names:
        if not name.endswith("bmp"):
            (tmp_path / name).rename(tmp_path / name.replace(".", "_"))
    assert len(rows(tmp_path)) == len(names)

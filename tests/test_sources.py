"""Miniatures of public data sets as they lie on disk, each with its known defect planted."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from kladi import config as settings
from kladi.data import load
from kladi.data.rows import manifest
from kladi.errors import UserError


def picture(path, seed=0, size=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, len(str(path))]).integers(0, 255, (size, size)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def rows(root, **data):
    config = settings.override(settings.Config(), {f"data.{k}": v for k, v in data.items()}).data
    found = manifest.read(root, config)
    return found, found.table, [f.message for f in found.findings]


def test_busi_masks_are_no_images(tmp_path):
    root = tmp_path / "Dataset_BUSI_with_GT"
    for i, name in enumerate(["benign", "malignant", "normal"] * 2):
        picture(root / name / f"{name} ({i}).png", i)
        picture(root / name / f"{name} ({i})_mask.png", 100 + i)
    picture(root / "benign" / "benign (0)_mask_1.png", 200)
    found, table, said = rows(tmp_path, metadata="modality,anatomy")
    assert found.described["kind"] == "folder, BUSI"
    assert sorted(table["label"]) == sorted(["benign", "malignant", "normal"] * 2)
    assert not any("mask" in path for path in table["path"])
    assert set(table["anatomy"]) == {"breast"}
    assert any("7 masks" in text for text in said)
    assert any("duplicates" in text for text in said)


def test_radimagenet_reads_modality_and_anatomy_from_the_path(tmp_path):
    names = [
        "CT/abd/normal",
        "CT/lung/nodule_",
        "MR/af/achilles",
        "MR/brain/glioma",
        "US/thyroid/thyroid_nodule",
        "US/cyst",
    ]
    for i, name in enumerate(names):
        picture(tmp_path / "radiology_ai" / name / f"{i}.png", i)
    _, table, said = rows(tmp_path)
    assert sorted(table["label"]) == [
        "CT/abdomen/normal",
        "CT/lung/nodule",
        "MR/ankle_foot/achilles",
        "MR/brain/glioma",
        "US/abdomen/cyst",
        "US/thyroid/thyroid_nodule",
    ]
    assert table["patient"].null_count() == 6
    assert any("no patient ids" in text for text in said)


def test_breakhis_groups_by_slide_and_says_which_stand_under_two_subtypes(tmp_path):
    base = tmp_path / "BreaKHis_v1/histology_slides/breast"
    for i, (side, folder, code, slide) in enumerate(
        [
            ("benign", "adenosis", "SOB_B_A-14", "22549AB"),
            ("benign", "adenosis", "SOB_B_A-14", "22549CD"),
            ("malignant", "ductal_carcinoma", "SOB_M_DC-14", "13412"),
            ("malignant", "lobular_carcinoma", "SOB_M_LC-14", "13412"),
        ]
    ):
        name = f"{code}-{slide}-40-{i:03d}.png"
        picture(base / side / "SOB" / folder / f"{code}-{slide}" / "40X" / name, i)
    _, table, said = rows(tmp_path)
    assert sorted(table["label"]) == [
        "benign/adenosis",
        "benign/adenosis",
        "malignant/ductal_carcinoma",
        "malignant/lobular_carcinoma",
    ]
    assert sorted(table["patient"]) == ["14-13412", "14-13412", "14-22549", "14-22549"]
    assert any("1 slide stand under two subtypes" in text for text in said)
    assert set(table["magnification"]) == {"40"}


def test_ham10000_groups_by_lesion_and_finds_repeated_rows(tmp_path):
    lines = ["lesion_id,image_id,dx,dx_type,age,sex,localization"]
    for i in range(4):
        picture(tmp_path / f"HAM10000_images_part_{1 + i % 2}" / f"ISIC_{i:07d}.jpg", i)
        lines.append(f"HAM_{i // 2},ISIC_{i:07d},{['nv', 'mel'][i // 2]},histo,,unknown,back")
    picture(tmp_path / "HAM10000_images_part_1" / "ISIC_9999999.jpg", 99)
    (tmp_path / "HAM10000_metadata.csv").write_text("\n".join([*lines, lines[1]]))
    _, table, said = rows(tmp_path)
    assert dict(zip(table["path"], table["label"], strict=True))["HAM10000_images_part_1/ISIC_0000002.jpg"] == "mel"
    assert sorted(table["patient"]) == ["HAM_0", "HAM_0", "HAM_1", "HAM_1"]
    assert any("1 row of the table repeat" in text for text in said)
    assert any("1 image without a row" in text for text in said)


def test_ddti_grades_become_classes_and_the_ungraded_are_named(tmp_path):
    for case, grade in (("1", "2"), ("2", "4a"), ("3", ""), ("4", "5")):
        for k in (1, 2) if case == "2" else (1,):
            picture(tmp_path / f"{case}_{k}.jpg", int(case) * 10 + k)
        (tmp_path / f"{case}.xml").write_text(f"<case><number>{case}</number><tirads>{grade}</tirads></case>")
    _, table, said = rows(tmp_path)
    assert dict(zip(table["path"], table["label"], strict=True)) == {
        "1_1.jpg": "benign",
        "2_1.jpg": "malignant",
        "2_2.jpg": "malignant",
        "4_1.jpg": "malignant",
    }
    assert sorted(table["patient"]) == ["1", "2", "2", "4"]
    assert any("1 image without a TI-RADS grade" in text for text in said)


def test_mrnet_reads_cases_as_padded_text_from_tables_without_header(tmp_path):
    for part, case in (("train", "0000"), ("train", "0001"), ("valid", "1130")):
        for plane in ("axial", "sagittal"):
            file = tmp_path / part / plane / f"{case}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, np.random.default_rng(0).integers(0, 255, (5, 16, 16)).astype(np.uint8))
    for part, lines in (("train", "0000,1\n0001,0\n"), ("valid", "1130,1\n")):
        for finding in ("abnormal", "acl", "meniscus"):
            (tmp_path / f"{part}-{finding}.csv").write_text(lines)
    _, table, _ = rows(tmp_path, metadata="view")
    by_path = {path: row for path, *row in table.select("path", "label", "patient", "split", "view").iter_rows()}
    assert by_path["train/axial/0000.npy"] == ["acl_tear", "0000", "train", "axial"]
    assert by_path["valid/sagittal/1130.npy"] == ["acl_tear", "1130", "val", "sagittal"]


def medmnist(file, counts=(4, 2, 3), several=False):
    arrays = {}
    rng = np.random.default_rng(0)
    for part, n in zip(("train", "val", "test"), counts, strict=True):
        arrays[f"{part}_images"] = rng.integers(0, 255, (n, 28, 28)).astype(np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 2, (n, 14 if several else 1)).astype(np.uint8)
    np.savez(file, **arrays)
    return arrays


def test_medmnist_is_one_row_an_image_with_its_own_pixels(tmp_path):
    arrays = medmnist(tmp_path / "breastmnist.npz")
    medmnist(tmp_path / "chestmnist.npz", several=True)
    _, table, said = rows(tmp_path)
    breast = table.filter(table["path"] == "breastmnist.npz")
    assert breast["frame"].to_list() == list(range(9))
    assert breast["split"].to_list() == ["train"] * 4 + ["val"] * 2 + ["test"] * 3
    assert breast["label"][0] == f"breast/{arrays['train_labels'][0, 0]}"
    assert table.filter(table["path"] == "chestmnist.npz")["label"].null_count() == 9
    assert any("BreastMNIST is BUSI" in text for text in said)
    config = settings.override(
        settings.Config(), {"data.store": str(tmp_path / "store"), "intensity.size": 28, "data.metadata": "modality"}
    )
    (tmp_path / "chestmnist.npz").unlink()
    dataset, _ = load.load(tmp_path, config)
    assert len(dataset) == 9
    order = np.argsort(dataset.store.source)
    means = dataset.store.gather(order).reshape(9, -1).mean(axis=1)
    want = np.concatenate([arrays[f"{p}_images"] for p in ("train", "val", "test")]).reshape(9, -1).mean(axis=1)
    np.testing.assert_allclose(means, want, rtol=0.05)


def test_a_medmnist_file_without_labels_is_refused_in_a_line(tmp_path):
    np.savez(tmp_path / "bloodmnist.npz", train_images=np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(UserError, match=r"bloodmnist\.npz: train_labels cannot be read"):
        rows(tmp_path)


def test_parts_of_different_sizes_are_named_and_left_out(tmp_path):
    arrays = {f"{p}_labels": np.zeros((2, 1), np.uint8) for p in ("train", "val", "test")}
    sizes = {"train_images": 28, "val_images": 28, "test_images": 14}
    np.savez(tmp_path / "bloodmnist.npz", **arrays, **{k: np.zeros((2, n, n), np.uint8) for k, n in sizes.items()})
    config = settings.override(settings.Config(), {"data.store": str(tmp_path / "store")})
    found = load.inspect(tmp_path, config)
    assert any(f.severity == "left out" and "parts of different sizes" in f.message for f in found.findings)


def test_folders_of_an_institute_are_not_radimagenet(tmp_path):
    """The same names without the set's own top folder: patients in them must not become labels."""
    for i in range(12):
        picture(tmp_path / "MR" / "brain" / "glioma" / f"p{i // 2:03d}" / f"{i}.png", i)
    found, table, _ = rows(tmp_path)
    assert "RadImageNet" not in found.described["kind"]
    assert table["label"].null_count() == len(table)


def test_other_folders_are_nobodys(tmp_path):
    for i in range(12):
        picture(tmp_path / ("cat", "dog")[i % 2] / f"{i}.png", i)
    found, _, said = rows(tmp_path)
    assert "BUSI" not in found.described["kind"]
    assert not any("recognised as" in text for text in said)


def test_a_column_that_the_set_has_not_is_named(tmp_path):
    for i, name in enumerate(["benign", "malignant"]):
        picture(tmp_path / name / f"{name} ({i}).png", i)
    with pytest.raises(UserError, match=r'BUSI has none; closest: "modality"'):
        rows(tmp_path, metadata="modalty")

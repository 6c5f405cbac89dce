"""Nothing leaves, nothing personal is kept: the whole job with sockets blocked, then every byte of it is searched."""

import io
import socket
import zipfile

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from kladi import cli

SECRETS = ["Plantedsurname", "Plantedgiven", "PID-471147", "ACC-998877", "19481103", "Plantedward", "Dr Plantedreader"]
SMALL = ["--intensity.size", "16", "--encoder.name", "resnet10t", "--train.epochs", "2", "--train.batch", "8"]


def write_dicom(path, patient, modality, anatomy, pixels):
    """A CT or MR slice that carries every secret a header can carry."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    d.SOPClassUID, d.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    d.StudyInstanceUID, d.SeriesInstanceUID = generate_uid(), generate_uid()
    d.PatientName, d.PatientID = "Plantedsurname^Plantedgiven", f"PID-471147-{patient}"
    d.AccessionNumber, d.PatientBirthDate, d.InstitutionName = "ACC-998877", "19481103", "Plantedward"
    d.StudyDescription = "follow up Plantedsurname"
    d.ReferringPhysicianName = "Dr Plantedreader"
    d.Modality, d.BodyPartExamined = modality, anatomy
    d.Rows, d.Columns = pixels.shape
    d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 12, 11, 0
    d.PixelData = pixels.astype(np.uint16).tobytes()
    pydicom.dcmwrite(path, d, enforce_file_format=True)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Thirty-six slices of eighteen patients, in a folder named after one of them."""
    folder = tmp_path_factory.mktemp("scans") / "Plantedsurname"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(36):
        modality, anatomy = [("CT", "HEAD"), ("MR", "BRAIN"), ("CT", "CHEST")][i % 3]
        write_dicom(
            folder / f"Plantedsurname-{i}.dcm", i // 2, modality, anatomy, generator.integers(0, 4096, (20, 24))
        )
    return folder


def everything_in(folder):
    """(name, bytes) of each file below `folder`, archives unpacked: compression hides nothing."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        yield str(path.relative_to(folder)), content
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for name in archive.namelist():
                    yield f"{path.name}:{name}", archive.read(name)


def hits(name, content):
    """Secrets in the content, in the encodings that text and arrays have, or in the name itself."""
    forms = {secret: [secret.encode(e) for e in ("utf-8", "utf-16-le", "utf-32-le")] for secret in SECRETS}
    return [s for s, encoded in forms.items() if s in name or any(e in content for e in encoded)]


def test_the_search_finds_what_is_planted(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", names=np.array(["x", "Plantedsurname"]))
    assert any(hits(name, content) for name, content in everything_in(tmp_path))


@pytest.mark.slow
def test_s1_s2_nothing_leaves_and_nothing_personal_stays(scans, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)

    def refused(self, address, *_):
        if self.family != socket.AF_UNIX:
            raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket.socket, "connect_ex", refused)
    metadata = ["--data.metadata", "modality,anatomy"]
    steps = [
        ["check", str(scans), *metadata, "--out", "problems.csv"],
        ["plan", str(scans), *metadata, *SMALL, "--out", "plan.toml"],
        ["pretrain", str(scans), "--config", "plan.toml", "--out", "run"],
        ["embed", "run", str(scans), "--out", "embedded"],
        ["evaluate", "run", str(scans), "--out", "eval"],
    ]
    for step in steps:
        code = cli.main(step)
        assert code == 0, (step, capsys.readouterr().err)
    found = {name: hits(name, content) for name, content in everything_in(tmp_path)}
    assert {name: secrets for name, secrets in found.items() if secrets} == {}
    assert len(found) > 15  # the search saw a run, an evaluation, a store

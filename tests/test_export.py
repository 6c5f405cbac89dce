"""An encoder for somebody who has no kladi: the features of the run, by the line that is printed."""

import json
import sys

import numpy as np
import onnx
import onnx.reference
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image

import kladi
from kladi import cli, config
from kladi import export as exporting
from kladi.errors import RunStopped, UserError
from kladi.export import export
from kladi.models import backbones, fused

NAMES = {"onnx": onnx, "safetensors": safetensors, "timm": timm, "torch": torch, "torchvision": torchvision}


def finished(folder, name, *, channels=1, size=32, args=(), topology=None):
    """A run's encoder with statistics of its own in every normalisation."""
    torch.manual_seed(0)
    encoder = backbones.build(config.Encoder(name, dict(args)), config.Intensity(size=size, channels=channels))
    for _ in range(2):
        encoder(torch.rand(4, channels, size, size))
    folder.mkdir()
    facts = {"topology": topology} if topology else {}
    backbones.export(encoder.eval(), folder, {"environment": {"device": "ours"}, **facts})
    return folder


def features(kind, line, image):
    """What the printed line's network makes of an image, nothing added to it."""
    if kind == "onnx":
        return torch.from_numpy(eval(line, {**NAMES, "image": image.numpy()}))
    if kind == "timm":
        return eval(line, NAMES)(image)
    known = dict(NAMES)
    exec(line, known)
    return known["model"](image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("kind", "name"), [("timm", "test_vit"), ("torchvision", "resnet18"), ("onnx", "test_efficientnet")]
)
def test_x1_features_through_the_pipeline_are_those_of_the_run(tmp_path, capsys, kind, name, channels):
    run = finished(tmp_path / "run", name, channels=channels)
    assert cli.main(["export", str(run), "--format", kind, "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    grey = kind == "torchvision" and channels == 1
    assert ("feed it the grey image three times" in err) == grey
    line = next(said for said in out.splitlines() if said.startswith("in Python")).split(maxsplit=2)[2]
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "scan.png")
    encoder = kladi.load(run)
    image = encoder.preprocess(tmp_path / "scan.png")[None]
    with torch.no_grad():
        found, wanted = features(kind, line, image.repeat(1, 3, 1, 1) if grey else image), encoder(image)
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    kept = safetensors.torch.load_file(tmp_path / "out/example.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(features(kind, line, kept["image"]), kept["features"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("torchvision", "efficientnet_b0"),
        ("torchvision", "densenet121"),
        ("torchvision", "convnext_tiny"),
        ("onnx", "test_vit"),
    ],
)
def test_other_families_too(tmp_path, kind, name):
    run = finished(tmp_path / "run", name)
    export(run, tmp_path / "out", kind)  # compares before it is done
    assert (tmp_path / "out" / "config.json").is_file()


def test_beside_it_lie_the_pipeline_and_an_example(tmp_path):
    run = finished(tmp_path / "run", "test_efficientnet")
    (tmp_path / "out").mkdir()  # an empty folder is a new one
    export(run, tmp_path / "out", "timm")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "example.safetensors",
        "model.safetensors",
    ]
    assert json.loads((tmp_path / "out/config.json").read_text())["kladi"]["intensity"]["size"] == 32
    assert "ours" not in (tmp_path / "out/config.json").read_text()
    example = safetensors.torch.load_file(tmp_path / "out/example.safetensors")
    again = kladi.load(tmp_path / "out")
    assert torch.equal(again.preprocess(example["source"][1].numpy()), example["image"][1])
    assert torch.equal(again(example["image"]), example["features"])
    assert not torch.equal(example["features"][0], example["features"][1])
    alone = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(alone(example["image"]), example["features"])


def test_an_onnx_file_names_nothing_of_this_machine(tmp_path):
    run = finished(tmp_path / "run", "test_vit")
    state = torch.get_rng_state()
    export(run, tmp_path / "out", "onnx")
    assert torch.equal(state, torch.get_rng_state())
    content = (tmp_path / "out/model.onnx").read_bytes()
    for word in (b"site-packages", str(tmp_path).encode(), timm.__file__.encode(), b".py"):
        assert word not in content


def test_of_a_run_with_topology_goes_the_image_encoder(tmp_path, capsys):
    run = finished(tmp_path / "run", "test_vit", topology={"size": "small", "side": 32})
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "the image encoder alone" in capsys.readouterr().err
    assert type(fused.load(tmp_path / "out")) is backbones.Encoder


@pytest.mark.parametrize(
    ("kind", "name", "args", "topology", "said"),
    [
        ("onx", "test_vit", {}, None, '--format onx: one of timm, torchvision, onnx; closest: "onnx"'),
        ("torchvision", "test_vit", {}, None, "torchvision has no test_vit; try --format onnx"),
        ("torchvision", "resnet18", {"channels": [8, 8, 16, 16]}, None, "torchvision's resnet18 is another network"),
        ("timm", "test_vit", {}, {"size": "small", "side": 32, "sees": "diagram"}, "trained a diagram encoder"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path, kind, name, args, topology, said):
    run = finished(tmp_path / "run", name, args=args, topology=topology)
    with pytest.raises(UserError, match=said):
        export(run, tmp_path / "out", kind)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("damage", ["[]", "{", '{"kladi": "x"}', "\udcff"])
def test_a_damaged_run_is_said_to_be_one(tmp_path, capsys, damage):
    run = finished(tmp_path / "run", "test_vit")
    (run / "config.json").write_text(damage, errors="surrogateescape")
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "not the description of an encoder" in capsys.readouterr().err


def test_weights_that_are_no_numbers_are_the_runs_own(tmp_path):
    run = finished(tmp_path / "run", "test_efficientnet")
    tensors = safetensors.torch.load_file(run / "model.safetensors")
    tensors["conv_stem.weight"][:] = float("nan")
    safetensors.torch.save_file(tensors, run / "model.safetensors")
    with pytest.raises(UserError, match="its weights are damaged"):
        export(run, tmp_path / "out", "timm")


def test_odd_folders(tmp_path, capsys, monkeypatch):
    """One with something in it stays as it is; an empty one may be a link, or where the user stands."""
    run = finished(tmp_path / "run", "test_vit")
    assert cli.main(["export", str(run), "--out", str(run)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "file").write_text("")
    assert cli.main(["export", str(run), "--out", str(tmp_path / "file")]) == 2
    assert "is a file; --out takes a folder" in capsys.readouterr().err
    assert cli.main(["export", str(run), "--out", str(tmp_path / "file" / "under")]) == 1
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export(run, tmp_path / "link", "timm")
    assert (tmp_path / "real/config.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(run, ".", "timm")
    assert (tmp_path / "here/config.json").is_file()


def test_a_network_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch, capsys):
    """The same tensors in the same order, and another network: the features tell."""
    run, usual = finished(tmp_path / "run", "resnet18"), torchvision.models.get_model

    def strided(name, **settings):
        network = usual(name, **settings)
        network.layer2[0].conv1.stride = network.layer2[0].downsample[0].stride = (1, 1)
        return network

    monkeypatch.setattr(torchvision.models, "get_model", strided)
    with pytest.raises(RunStopped, match="gives other features"):
        export(run, tmp_path / "out", "torchvision")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert cli.main(["export", str(run), "--format", "torchvision", "--out", str(tmp_path / "out")]) == 1
    assert "try another --format" in capsys.readouterr().err


def test_without_its_packages_onnx_names_them(tmp_path, monkeypatch):
    run = finished(tmp_path / "run", "test_vit")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r'pip install "kladi\[onnx\]"'):
        export(run, tmp_path / "out", "onnx")


def test_what_torch_cannot_write_as_onnx_is_said_in_a_line(tmp_path, monkeypatch):
    run = finished(tmp_path / "run", "test_vit")

    def refuses(*given, **settings):
        advice = "Failed to export the model.\nTwo hundred lines of advice"
        raise torch.onnx.OnnxExporterError(advice) from ValueError("no such operator\nmore")

    monkeypatch.setattr(torch.onnx, "export", refuses)
    with pytest.raises(RunStopped, match=r"^torch cannot write test_vit as ONNX: no such operator$"):
        export(run, tmp_path / "out", "onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_what_an_onnx_file_cannot_hold(tmp_path, monkeypatch):
    run = finished(tmp_path / "run", "test_vit")
    monkeypatch.setattr(exporting, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match="test_vit is too large for an ONNX file"):
        export(run, tmp_path / "out", "onnx")

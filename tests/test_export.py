"""An encoder for somebody who has no kladi: the features of the run, by the line that is printed."""

import json

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image

import kladi
from kladi import cli, config
from kladi.errors import RunStopped, UserError
from kladi.export import export
from kladi.models import backbones, fused

OPENS = {
    "onnxruntime": onnxruntime,
    "safetensors": safetensors,
    "timm": timm,
    "torch": torch,
    "torchvision": torchvision,
}


def finished(folder, name, *, channels=1, size=32, args=(), topology=None):
    """A run's encoder with statistics of its own in every normalisation."""
    torch.manual_seed(0)
    encoder = backbones.build(config.Encoder(name, dict(args)), config.Intensity(size=size, channels=channels))
    for _ in range(2):
        encoder(torch.rand(4, channels, size, size))
    folder.mkdir()
    backbones.export(encoder.eval(), folder, {"topology": topology} if topology else {})
    return folder


def features(kind, line, image):
    """What the printed line's network makes of an image."""
    *before, last = line.split("; ")
    if kind == "onnx":
        session = eval(line, OPENS)
        return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
    if kind == "torchvision":
        known = dict(OPENS)
        exec(line, known)
        return known["model"].eval()(image.expand(-1, 3, -1, -1))
    assert not before
    return eval(last, OPENS).eval()(image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("kind", "name"), [("timm", "test_vit"), ("torchvision", "resnet18"), ("onnx", "test_efficientnet")]
)
def test_x1_features_through_the_pipeline_are_those_of_the_run(tmp_path, kind, name, channels):
    run = finished(tmp_path / "run", name, channels=channels)
    line = export(run, tmp_path / "out", kind)
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "scan.png")
    encoder = kladi.load(run)
    image = encoder.preprocess(tmp_path / "scan.png")[None]
    with torch.no_grad():
        found, wanted = features(kind, line, image), encoder(image)
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


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
    example = safetensors.torch.load_file(tmp_path / "out/example.safetensors")
    again = kladi.load(tmp_path / "out")
    assert torch.equal(again(example["image"]), example["features"])
    assert not torch.equal(example["features"][0], example["features"][1])
    alone = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(alone(example["image"]), example["features"])


def test_of_a_run_with_topology_goes_the_image_encoder(tmp_path):
    run = finished(tmp_path / "run", "test_vit", topology={"size": "small", "side": 32})
    export(run, tmp_path / "out", "timm")
    assert type(fused.load(tmp_path / "out")) is backbones.Encoder


@pytest.mark.parametrize(
    ("kind", "name", "args", "topology", "said"),
    [
        ("onx", "test_vit", {}, None, '--format onx: one of timm, torchvision, onnx; closest: "onnx"'),
        ("torchvision", "test_vit", {}, None, "torchvision has no test_vit; --format onnx takes every encoder"),
        ("torchvision", "resnet18", {"channels": [8, 8, 16, 16]}, None, "torchvision has no resnet18 with"),
        ("timm", "test_vit", {}, {"size": "small", "side": 32, "sees": "diagram"}, "trained a diagram encoder"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path, kind, name, args, topology, said):
    run = finished(tmp_path / "run", name, args=args, topology=topology)
    with pytest.raises(UserError, match=said):
        export(run, tmp_path / "out", kind)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_folder_with_something_in_it_stays_as_it_is(tmp_path, capsys):
    run = finished(tmp_path / "run", "test_vit")
    assert cli.main(["export", str(run), "--out", str(run)]) == 2
    assert "is there and not empty; name a new folder" in capsys.readouterr().err
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "model.safetensors"]


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
    assert "nothing was kept" in capsys.readouterr().err


def test_without_its_packages_onnx_names_them(tmp_path, monkeypatch):
    run = finished(tmp_path / "run", "test_vit")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'pip install "kladi\[onnx\]"'):
        export(run, tmp_path / "out", "onnx")


def test_what_torch_cannot_write_as_onnx_is_said_in_a_line(tmp_path, monkeypatch):
    run = finished(tmp_path / "run", "test_vit")

    def refuses(*given, **settings):
        raise torch.onnx.OnnxExporterError("no such operator\nand two hundred lines of advice")

    monkeypatch.setattr(torch.onnx, "export", refuses)
    with pytest.raises(RunStopped, match=r"^torch cannot write test_vit as ONNX: no such operator$"):
        export(run, tmp_path / "out", "onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]

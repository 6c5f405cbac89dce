"""Any timm encoder, weights from local files only, and a run folder that opens with kladi or with timm alone.

The model of the fast tests is timm's `test_efficientnet` (99,000 parameters, 256 features): the smallest with batch
normalisation.
"""

import ast
import json
import struct

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import kladi
from kladi import config
from kladi.errors import UserError
from kladi.models import backbones, heads, weights

NAME = "test_efficientnet"


def intensity(size=32, channels=1):
    return config.Intensity(size=size, channels=channels)


def small(seed=0, channels=1, **changes):
    torch.manual_seed(seed)
    return backbones.build(config.Encoder(NAME, **changes), intensity(channels=channels))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [NAME, "test_vit", "test_convnext"])
def test_images_become_one_vector_each(name, channels):
    encoder = backbones.build(config.Encoder(name), intensity(channels=channels))
    features = encoder(torch.randn(2, channels, 32, 32))
    assert features.shape == (2, encoder.width)
    assert encoder.training


def test_width_is_what_comes_out_also_where_timm_names_another_number():
    encoder = backbones.build(config.Encoder("mobilenetv3_small_050"), intensity())
    assert encoder.width == encoder(torch.randn(2, 1, 32, 32)).shape[1] != encoder.model.num_features


def test_arguments_reach_timm():
    encoder = small(args={"drop_rate": 0.5})
    x = torch.randn(8, 1, 32, 32)
    assert not torch.equal(encoder(x), encoder(x))


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        (config.Encoder("resnet_18"), 'no timm model; closest: "resnet'),
        (config.Encoder("resnet18.a1_in1k"), "kladi downloads nothing; write resnet18"),
        (config.Encoder("hf-hub:someone/model"), "no timm model"),
        (config.Encoder("local-dir:/somewhere"), "no timm model"),
        (config.Encoder(NAME, {"pretrained": True}), "downloads nothing"),
        (config.Encoder(NAME, {"checkpoint_path": "x.pth"}), "--init.weights"),
        (config.Encoder(NAME, {"in_chans": 3}), "set --intensity.channels"),
        (config.Encoder(NAME, {"dropp_rate": 0.1}), "--encoder.args.dropp_rate is no argument of"),
        (config.Encoder(NAME, {"global_pool": ""}), "not one feature vector"),
    ],
)
def test_mistakes_are_named(encoder, said):
    with pytest.raises(UserError, match=said) as error:
        backbones.build(encoder, intensity())
    assert len(str(error.value).splitlines()) == 1


def test_an_image_too_small_for_the_model_is_said():
    with pytest.raises(UserError, match="cannot see images of 8 px"):
        backbones.build(config.Encoder("test_maxvit"), intensity(size=8))


def test_two_channels_are_no_image():
    with pytest.raises(UserError, match="1 or 3"):
        backbones.build(config.Encoder(NAME), intensity(channels=2))


# --- local weights ---------------------------------------------------------------------------------------------------


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_local_weights_are_read_by_name_and_reported(tmp_path):
    source, encoder = small(1), small(2)
    save_file({**source.model.state_dict(), "classifier.weight": torch.zeros(5, 256)}, tmp_path / "w.safetensors")
    match = backbones.load_weights(encoder, tmp_path / "w.safetensors")
    assert same(source.model, encoder.model)
    count = len(source.model.state_dict())
    assert match.unexpected == ("classifier.weight",)
    assert str(match) == f"{count} of {count} tensors matched, 0 missing, 1 unexpected (classifier.weight)"


def test_few_matching_tensors_are_refused_with_the_counts_and_change_nothing(tmp_path):  # X2
    source, encoder = small(1), small(2)
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    few = dict(list(source.model.state_dict().items())[:2])
    save_file(few, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"2 of \d+ tensors matched, \d+ missing .*0 unexpected; at least 90%"):
        backbones.load_weights(encoder, tmp_path / "w.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.model.state_dict().items())


def test_nine_of_ten_is_the_border(tmp_path):
    state = small(1).model.state_dict()
    names = list(state)
    enough = -(-len(names) * 9 // 10)
    for count, fits in ((enough, True), (enough - 1, False)):
        save_file({name: state[name] for name in names[:count]}, tmp_path / "w.safetensors")
        if fits:
            assert len(backbones.load_weights(small(2), tmp_path / "w.safetensors").missing) == len(names) - enough
        else:
            with pytest.raises(UserError, match="at least 90%"):
                backbones.load_weights(small(2), tmp_path / "w.safetensors")


def test_a_prefix_of_another_training_loop_is_no_obstacle(tmp_path):
    source, encoder = small(1), small(2)
    save_file({f"module.{n}": t for n, t in source.model.state_dict().items()}, tmp_path / "w.safetensors")
    assert backbones.load_weights(encoder, tmp_path / "w.safetensors").share == 1
    assert same(source.model, encoder.model)


def test_colour_weights_serve_a_grey_encoder(tmp_path):
    colour, grey = small(1, channels=3), small(2)
    save_file(colour.model.state_dict(), tmp_path / "w.safetensors")
    match = backbones.load_weights(grey, tmp_path / "w.safetensors")
    assert match.adapted == ("conv_stem.weight",)
    assert match.share == 1
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey.eval()(x), colour.eval()(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_grey_weights_serve_a_colour_encoder(tmp_path):
    grey, colour = small(1), small(2, channels=3)
    save_file(grey.model.state_dict(), tmp_path / "w.safetensors")
    backbones.load_weights(colour, tmp_path / "w.safetensors")
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey.eval()(x), colour.eval()(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_a_pickle_is_never_opened(tmp_path):  # R7
    canary = tmp_path / "canary"

    class Trap:
        def __reduce__(self):
            return (canary.write_text, ("touched",))

    torch.save({"weights": Trap()}, tmp_path / "model.pt")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.pt").read_bytes())
    for name in ("model.pt", "model.safetensors"):
        with pytest.raises(UserError, match="kladi reads safetensors"):
            backbones.load_weights(small(), tmp_path / name)
    assert not canary.exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        backbones.load_weights(small(), tmp_path / "none.safetensors")


# --- headers -----------------------------------------------------------------------------------------------------


def raw(entries, data=b"", length=None):
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no safetensors"),
        (b"PK\x03\x04 something else entirely", "no safetensors"),
        (raw({}, length=weights.MAX_HEADER + 1), "no safetensors"),
        (raw({"a": entry([1], 0, 4)}, length=4000), "cut short"),
        (raw(b"[1, 2]"), "no table"),
        (raw(b"[" * 100_000), "no safetensors"),
        (raw({"a": entry([2], 0, 4)}, b"\0" * 4), "takes 4 bytes"),
        (raw({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"\0" * 4), "overlaps"),
        (raw({"a": entry([1], 4, 8)}, b"\0" * 8), "gap"),
        (raw({"a": entry([1], 0, 4)}, b"\0" * 3), "3 bytes of numbers"),
        (raw({"a": entry([1], 0, 4)}, b"\0" * 40), "40 bytes of numbers"),
        (raw({"a": entry([-1], 0, 4)}, b"\0" * 4), "malformed"),
        (raw({"a": entry([2**62, 2**62], 0, 4)}, b"\0" * 4), "takes 4 bytes"),
        (raw({"a": entry([1], 0, 4, "OBJECT")}, b"\0" * 4), "malformed"),
        (raw({"a": 3}), "malformed"),
        (raw({f"t{i}": entry([0], 0, 0) for i in range(weights.MAX_TENSORS + 1)}), "more than 50,000"),
    ],
)
def test_headers_that_do_not_add_up_are_refused(tmp_path, content, said):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=said):
        weights.header(tmp_path / "x.safetensors")


def test_header_and_reading_agree_with_the_library(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.tensor(4), "c": torch.tensor([True]), "d": torch.zeros(0, 2)}
    weights.write(tmp_path / "x.safetensors", weights.to_bytes(tensors))
    assert weights.header(tmp_path / "x.safetensors") == weights.promises(tensors)
    for read in (weights.read(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_the_same_tensors_give_the_same_bytes():
    a, b = torch.ones(2), torch.zeros(3)
    assert weights.to_bytes({"a": a, "b": b}) == weights.to_bytes({"b": b, "a": a})


def test_what_is_expected_is_compared_before_it_is_read(tmp_path):
    weights.write(tmp_path / "x.safetensors", weights.to_bytes({"a": torch.zeros(2)}))
    expected = weights.promises({"a": torch.zeros(3)})
    with pytest.raises(UserError, match=r"a is F32 \[2\], this model builds F32 \[3\]"):
        weights.read(tmp_path / "x.safetensors", expected)


# --- a run folder ------------------------------------------------------------------------------------------------


def exported(folder, encoder, **facts):
    folder.mkdir(exist_ok=True)
    backbones.export(encoder.eval(), folder, facts)
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_a_run_opens_with_kladi(tmp_path, channels):
    encoder = small(1, channels=channels, args={"drop_path_rate": 0.1}, projector=(32, 16))
    encoder(torch.randn(8, channels, 32, 32))  # batch statistics move too
    state = torch.random.get_rng_state()
    loaded = kladi.load(exported(tmp_path / "run", encoder))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not loaded.training
    assert loaded.intensity == encoder.intensity
    assert loaded.architecture == encoder.architecture
    x = torch.randn(2, channels, 32, 32)
    assert torch.equal(loaded(x), encoder(x))
    assert loaded.width == encoder.width


@pytest.mark.parametrize("name", [NAME, "test_vit"])
def test_a_run_opens_with_timm_alone(tmp_path, name):  # X3
    encoder = backbones.build(config.Encoder(name), intensity())
    run = exported(tmp_path / "run", encoder)
    alone = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(alone(x), encoder(x))


@pytest.mark.parametrize(("name", "args"), [("resnet18", {"channels": [8, 8, 16, 16]}), ("test_vit", {}), (NAME, {})])
def test_the_line_that_opens_a_run_with_timm_is_true(tmp_path, name, args):
    encoder = backbones.build(config.Encoder(name, args=args), intensity())
    run = exported(tmp_path / "run", encoder)
    line = backbones.in_timm(encoder.architecture, encoder.intensity, f"{run}/model.safetensors")
    whole = ast.parse(line, mode="eval").body
    call = whole.func.value
    assert ast.unparse(whole) == f"{ast.unparse(call)}.eval()"
    assert ast.unparse(call.func) == "timm.create_model"
    given = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    alone = timm.create_model(ast.literal_eval(call.args[0]), **given).eval()
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(alone(x), encoder(x.contiguous()))


def test_the_description_says_how_images_are_prepared(tmp_path):
    run = exported(tmp_path / "run", small(), objective="label_tree")
    described = json.loads((run / "config.json").read_text())
    assert described["architecture"] == NAME
    assert described["pretrained_cfg"]["mean"] == [0.5]
    assert described["kladi"]["intensity"]["window"] == "file"
    assert described["kladi"]["objective"] == "label_tree"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: (run / "config.json").unlink(), "is not a finished run"),
        (lambda run: (run / "config.json").write_text("{"), "not the description"),
        (lambda run: (run / "config.json").write_text("[]"), "not the description"),
        (lambda run: (run / "config.json").write_text("[" * 100_000), "not the description"),
        (lambda run: edited(run, lambda d: d["kladi"].update(version=99)), "version 99; this kladi reads"),
        (lambda run: edited(run, lambda d: d.update(architecture="test_byobnet")), "lacks"),
        (lambda run: edited(run, lambda d: d["model_args"].update(checkpoint_path="x.pth")), "cannot be set"),
        (lambda run: edited(run, lambda d: d.update(architecture="hf-hub:x/y")), "no timm model"),
        (lambda run: (run / "model.safetensors").write_bytes(b"x"), "no safetensors"),
    ],
)
def test_a_damaged_run_is_refused(tmp_path, damage, said):  # R6
    run = exported(tmp_path / "run", small())
    damage(run)
    with pytest.raises(UserError, match=said):
        kladi.load(run)


def edited(run, change):
    described = json.loads((run / "config.json").read_text())
    change(described)
    (run / "config.json").write_text(json.dumps(described))


def test_an_unfinished_run_says_how_to_finish_it(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="--resume"):
        kladi.load(tmp_path / "run")


# --- the head ----------------------------------------------------------------------------------------------------


def test_projector_is_two_layers_and_reads_each_row_alone():
    head = heads.Projector(6, 5, 4)
    h = torch.randn(7, 6)
    first, second = head.layers[0], head.layers[2]
    by_hand = torch.relu(h @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(head(h), by_hand)
    torch.testing.assert_close(head(h[:1]), head(h)[:1])


def test_a_runs_projector_comes_back(tmp_path):
    encoder = small(projector=(8, 4))
    head = heads.Projector(encoder.width, 8, 4)
    run = exported(tmp_path / "run", encoder)
    assert heads.load(run) is None
    tensors = {f"projector.{name}": tensor for name, tensor in head.state_dict().items()}
    weights.write(run / "head.safetensors", weights.to_bytes({**tensors, "terms.lam.prototypes": torch.zeros(3, 4)}))
    assert same(heads.load(run), head)
    weights.write(run / "head.safetensors", weights.to_bytes({"projector.layers.0.bias": torch.zeros(8)}))
    with pytest.raises(UserError, match="lacks"):
        heads.load(run)

import dataclasses
import json

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import sela_ext
from sela_ext.data import Loader
from sela_ext.errors import CheckpointError, NumericsError, OptionError
from sela_ext.export.network import Plain, load_plain
from sela_ext.export.request import Request
from sela_ext.export.state_dict import _as_linear, last_linear
from sela_ext.models import Network


def features_and_logits(run, count=5):
    plain = load_plain(Request(run), "all")
    images = torch.randn(count, *plain.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = plain.network.features(images)
        embedding = plain.network.projection(features)
        logits = [plain.network.heads.logits_of(head, embedding) for head in plain.heads]
    return images, features, logits


def test_torchvision_takes_the_backbone_and_lacks_the_last_layer_alone(files_run, tmp_path):
    written = sela_ext.export(files_run, tmp_path / "resnet18.pth")
    network = torchvision.models.resnet18()
    found = network.load_state_dict(torch.load(written.path, weights_only=True), strict=False)
    assert found.missing_keys == ["fc.weight", "fc.bias"] == written.facts["missing"]
    assert not found.unexpected_keys
    network.fc = nn.Identity()
    images, features, _ = features_and_logits(files_run)
    with torch.no_grad():
        assert torch.equal(network.eval()(images), features)
    assert any("fc.weight, fc.bias" in line for line in written.lines)


def test_a_head_becomes_the_last_layer(files_run, tmp_path):
    written = sela_ext.export(files_run, tmp_path / "resnet18.pth", head=1)
    network = torchvision.models.resnet18(num_classes=5).eval()
    network.load_state_dict(torch.load(written.path, weights_only=True), strict=True)
    images, _, logits = features_and_logits(files_run)
    with torch.no_grad():
        assert torch.allclose(network(images), logits[1], atol=1e-5)
    assert written.facts["missing"] == []


def test_a_network_that_torchvision_has_not_keeps_its_own_names(digits_run, tmp_path):
    written = sela_ext.export(digits_run, tmp_path / "backbone.pth")
    state = torch.load(written.path, weights_only=True)
    own = sela_ext.load_released(digits_run)[0].backbone.state_dict()
    assert list(state) == list(own)
    assert all(torch.equal(state[key], own[key]) for key in own)
    assert "torchvision has none such" in written.lines[0]
    assert "missing" not in written.facts
    with pytest.raises(OptionError, match="ends in a linear layer, found small-resnet"):
        sela_ext.export(digits_run, tmp_path / "headed.pth", head="best")
    assert not (tmp_path / "headed.pth").exists()


@pytest.mark.parametrize(("name", "layer"), [("vit_b_32", "heads.head"), ("mobilenet_v3_small", "classifier.3")])
def test_the_last_layer_of_other_families_is_found(name, layer):
    with torch.device("meta"):
        assert last_linear(torchvision.models.get_model(name, weights=None)) == layer


def test_of_a_cosine_head_the_last_layer_keeps_the_likeliest_cluster(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    settings = {"model": "resnet18", "epochs": 1, "threads": 1, "progress": False, "batch_size": 20, "seed": 1}
    run = sela_ext.train(images, out=tmp_path / "cosine", clusters=[4], head_kind="cosine", **settings)
    written = sela_ext.export(run, tmp_path / "net.pth", head="best")
    network = torchvision.models.resnet18(num_classes=4).eval()
    network.load_state_dict(torch.load(written.path, weights_only=True))
    inputs, _, logits = features_and_logits(run, 31)
    with torch.no_grad():
        assert torch.equal(network(inputs).argmax(1), logits[0].argmax(1))
    assert any("cosine head" in line for line in written.lines)


def test_heads_behind_a_projection_are_no_last_layer():
    network = Network(nn.Linear(4, 4), 4, [2], projection=8)
    plain = Plain(network, "resnet18", [0], None, 25.0, 0, (3, 32, 32), [0.0] * 3, [1.0] * 3, "")
    with pytest.raises(OptionError, match="found a projection between"):
        _as_linear(plain, "fc")
    with pytest.raises(OptionError, match="found several"):
        _as_linear(dataclasses.replace(plain, heads=[0, 1]), "fc")


def test_safetensors_hold_backbone_heads_and_how_to_use_them(digits_run, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    from safetensors import safe_open

    written = sela_ext.export(digits_run, tmp_path / "net.safetensors", "safetensors")
    state = safetensors.load_file(written.path)
    network = sela_ext.load_released(digits_run)[0]
    own = network.backbone.state_dict()
    assert {key for key in state if not key.startswith("sela.")} == set(own)
    assert torch.equal(state["sela.heads.1.weight"], network.heads.weight[10:17])
    assert state["sela.heads.2.potential"].shape == (10,)
    with safe_open(written.path, "pt") as file:
        told = file.metadata()
    assert told["model"] == "small-resnet"
    assert told["clusters"] == "[10, 7, 10]"
    assert told["image_size"] == "32"
    assert told["sela_ext"] == sela_ext.__version__
    assert len(told["mean"].strip("[]").split(",")) == 1

    bare = sela_ext.export(digits_run, tmp_path / "bare.safetensors", "safetensors", head="none")
    assert set(safetensors.load_file(bare.path)) == set(own)


def test_labels_follow_from_what_safetensors_hold(digits_run, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    from safetensors import safe_open

    state = safetensors.load_file(
        sela_ext.export(digits_run, tmp_path / "net.safetensors", "safetensors", head="all").path
    )
    images = np.random.default_rng(2).integers(0, 256, (33, 32, 32), dtype=np.uint8)
    features = torch.from_numpy(sela_ext.embed(digits_run, images, threads=1, precision="float32"))
    projection = [key for key in state if key.startswith("sela.projection.")]
    assert not projection
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        told = {key: json.loads(value) for key, value in file.metadata().items() if key in ("lambda", "temperature")}
    weight = nn.functional.normalize(state["sela.heads.0.weight"], dim=1)
    logits = nn.functional.normalize(features, dim=1) @ weight.T / told["temperature"]
    labels = (told["lambda"] * logits.double() + state["sela.heads.0.potential"]).argmax(1)
    assert np.array_equal(labels, sela_ext.predict(digits_run, images, head=0, threads=1, precision="float32"))


def test_onnx_gives_the_features_logits_and_labels_of_the_run(digits_run, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    written = sela_ext.export(digits_run, tmp_path / "net.onnx", "onnx", head="all", threads=1)
    assert written.facts["max_difference"] <= 1e-4
    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["images"]
    assert session.get_inputs()[0].shape == ["N", 1, 32, 32]
    told = session.get_modelmeta().custom_metadata_map
    assert told["model"] == "small-resnet"
    assert told["view"] == "resized to 32 x 32 pixels"
    data = np.random.default_rng(3).integers(0, 256, (31, 32, 32), dtype=np.uint8)
    mean, std = (float(told[key].strip("[]")) for key in ("mean", "std"))
    images = ((data[:, None] / np.float32(255)) - np.float32(mean)) / np.float32(std)
    found = dict(zip([one.name for one in session.get_outputs()], session.run(None, {"images": images}), strict=True))
    expected = sela_ext.embed(digits_run, data, threads=1, precision="float32")
    assert np.abs(found["features"] - expected).max() <= 1e-4 * np.abs(expected).max()
    labels = sela_ext.predict(digits_run, data, threads=1, precision="float32")
    for head in range(3):
        assert np.array_equal(found[f"labels_{head}"], labels[head])


def test_an_onnx_file_tells_nothing_of_the_machine_and_is_of_the_opset_asked_for(digits_run, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    written = sela_ext.export(digits_run, tmp_path / "net.onnx", "onnx", opset=20)
    graph = onnx.load(written.path)
    onnx.checker.check_model(graph, full_check=True)
    assert {one.domain: one.version for one in graph.opset_import}[""] == 20
    assert [one.name for one in graph.graph.output] == ["features"]
    assert sela_ext.__file__.rpartition("/")[0].encode() not in written.path.read_bytes()
    with pytest.raises(OptionError, match=r"opset: expected a number in 18 \.\. 23, found 7"):
        sela_ext.export(digits_run, tmp_path / "old.onnx", "onnx", opset=7)


def test_a_graph_that_gives_something_else_is_not_written(digits_run, tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from sela_ext.export import onnx_graph

    real = onnx_graph._graph

    def broken(plain, outputs, opset):
        graph = real(plain, outputs, opset)
        with torch.no_grad():
            plain.network.backbone.stem[0].weight *= 1.01
        return graph

    monkeypatch.setattr(onnx_graph, "_graph", broken)
    with pytest.raises(NumericsError, match="expected features as torch gives them within"):
        sela_ext.export(digits_run, tmp_path / "net.onnx", "onnx")
    assert not list(tmp_path.iterdir())


def test_a_run_of_vectors_is_exported_too(tmp_path):
    rows = np.random.default_rng(0).standard_normal((60, 12), dtype=np.float32)
    run = sela_ext.train(rows, out=tmp_path / "run", clusters=[4], epochs=1, threads=1, progress=False)
    plain = load_plain(Request(run), "all")
    assert plain.shape == (12,)
    assert plain.told() == ["input: vectors float32 [N, 12]"]
    written = sela_ext.export(run, tmp_path / "net.pth")
    assert set(torch.load(written.path, weights_only=True)) == {"mean", "scale"}


def test_a_checkpoint_is_exported_like_its_run(digits_run, tmp_path):
    checkpoint = max((digits_run / "checkpoints").glob("*.ckpt"))
    written = sela_ext.export(checkpoint, tmp_path / "backbone.pth")
    own = sela_ext.load_released(digits_run)[0].backbone.state_dict()
    state = torch.load(written.path, weights_only=True)
    assert state.keys() == own.keys()


@pytest.mark.parametrize("package", ["safetensors.torch", "onnx", "pyarrow"])
def test_a_missing_package_is_named_with_what_brings_it(digits_run, tmp_path, monkeypatch, package):
    from sela_ext.export import optional

    real = optional.importlib.import_module

    def absent(name, *rest):
        if name == package:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(optional.importlib, "import_module", absent)
    extra = {"safetensors.torch": "safetensors", "onnx": "onnx", "pyarrow": "parquet"}[package]
    with pytest.raises(OptionError, match=rf"not installed; pip install 'sela_ext\[{extra}\]'"):
        sela_ext.export(digits_run, tmp_path / f"x.{extra}", extra)
    assert not list(tmp_path.iterdir())


def test_a_start_from_weights_of_another_network_is_refused(files_run, tmp_path):
    from sela_ext.models import build_backbone

    file = sela_ext.export(files_run, tmp_path / "resnet18.pth").path
    built = build_backbone(f"resnet18:{file}", channels=3, image_size=(32, 32))
    assert (built.name, built.feature_dim) == ("resnet18", 512)
    own = sela_ext.load_released(files_run)[0].backbone
    assert torch.equal(built.module.conv1.weight, own.conv1.weight)
    with pytest.raises(CheckpointError, match=r"expected the weights of small-resnet, with stem\.0\.weight"):
        build_backbone(f"small-resnet:{file}", channels=3, image_size=(32, 32))
    with pytest.raises(CheckpointError, match="expected a checkpoint file"):
        build_backbone(f"resnet18:{tmp_path / 'absent.pth'}", channels=3, image_size=(32, 32))


def test_inputs_as_the_loader_makes_them_fit_what_is_said(files_run):
    plain = load_plain(Request(files_run), "none")
    view = load_plain(Request(files_run), "none").shape[-1]
    loader = Loader(
        np.full((1, view, view, 3), 128, np.uint8), batch_size=1, augment=sela_ext.Augment.none(view), threads=1
    )
    batch = next(iter(loader.epoch(0)))
    expected = (128 / 255 - np.array(plain.mean)) / np.array(plain.std)
    assert np.allclose(batch.images[0, :, 0, 0], expected, atol=1e-5)

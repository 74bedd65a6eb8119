import gc
import pickletools
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import sela_ext
from sela_ext.compat.layouts import detect, differences, plain_name, take_apart
from sela_ext.errors import CheckpointError
from sela_ext.models import AlexNet, Network


def with_heads(state, names, width, clusters, seed=5):
    generator = torch.Generator().manual_seed(seed)
    heads = {}
    for name, k in zip(names, clusters, strict=True):
        heads[f"{name}.weight"] = torch.randn(k, width, generator=generator) * 0.02
        heads[f"{name}.bias"] = torch.randn(k, generator=generator)
    return {**state, **heads}


def saved(path, content, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def pictures(size, count=2, seed=3):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_computes(network, state, names, features, images):
    """The loaded network equals the restated layout: features, and every head's logits."""
    expected = features(state, images)
    found = network.features(images)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert float(expected.std()) > 1e-3  # the comparison is of something
    logits = network.heads.split(network.heads(network(images)))
    for name, part in zip(names, logits, strict=True):
        own = F.linear(expected, state[f"{name}.weight"], state[f"{name}.bias"])
        assert torch.allclose(part, own, rtol=1e-3, atol=1e-3)


# --- The published shapes, on the meta device: no memory, every layout


LAYOUTS = {
    "alexnet": ("alexnet", lambda p: p.alexnet()),
    "alexnet-small": ("alexnet-small", lambda p: p.alexnet("small")),
    "deepcluster-alexnet": ("alexnet-sobel", lambda p: p.alexnet(channels=2, tracked=False) | p.sobel()),
    "deepcluster-vgg16": ("vgg16-bn-sobel", lambda p: p.vgg16(channels=2, tracked=False) | p.sobel()),
    "vgg16": ("vgg16-bn", lambda p: p.vgg16()),
    "resnetv2": ("resnet50-preact", lambda p: p.preact()),
    "resnetv1": ("resnet50", lambda p: p.resnet(**p.RESNET_V1)),
    "resnetv1-18": ("resnet18", lambda p: p.resnet(**p.RESNET_V1, deep=False)),
    "torchvision": ("resnet50", lambda p: p.resnet()),
    "torchvision-18": ("resnet18", lambda p: p.resnet(deep=False)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_is_recognised_and_fits_to_the_last_tensor(published, layout):
    name, shapes = LAYOUTS[layout]
    state = published.draw_meta(shapes(published))
    found = detect(state)
    assert found.name == name
    with torch.device("meta"):
        expected = found.build().state_dict()
    assert differences(expected, {found.rename(key): tensor for key, tensor in state.items()}) == []


def test_the_released_resnet_holds_313_tensors(published):
    names = [f"top_layer{i}" for i in range(10)]
    shapes = published.preact()
    for name in names:
        shapes |= published.linear(name, 2048, 3000)
    assert len(shapes) == 313
    parts = take_apart(published.draw_meta(shapes))
    assert len(parts.backbone) == 293
    assert sorted(parts.heads) == [(i, part) for i in range(10) for part in ("bias", "weight")]
    assert all(parts.heads[i, "weight"].shape == (3000, 2048) for i in range(10))


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("module.features.0.weight", "features.0.weight"),
        ("features.module.0.weight", "features.0.weight"),
        ("module.features.module.2.0.bn1.bias", "features.2.0.bn1.bias"),
        ("top_layer3.module.weight", "top_layer3.weight"),
        ("submodule.0.weight", "submodule.0.weight"),
        ("features.0.weight", "features.0.weight"),
    ],
)
def test_module_is_removed_wherever_it_stands_in_a_name(key, plain):
    assert plain_name(key) == plain


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34", "resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d", "resnext101_64x4d"]
)
def test_torchvision_resnets_are_told_apart_by_their_shapes(name):
    import torchvision

    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None)
    assert detect(take_apart(network.state_dict()).backbone).name == name


# --- Round trips through files


def test_a_bare_alexnet_with_ten_heads_computes_what_its_tensors_say(published, tmp_path):
    names = [f"top_layer{i}" for i in range(10)]
    state = with_heads(published.draw(published.alexnet()), names, 4096, [3] * 10)
    path = saved(tmp_path / "alexnet-10x3k.pth", state)
    network, labels = sela_ext.load_released(path)
    assert labels is None
    assert isinstance(network, Network)
    assert isinstance(network.backbone, AlexNet)
    assert not network.training
    assert network.heads.clusters == [3] * 10
    assert network.heads.kind == "linear"
    assert_computes(network, state, names, published.alexnet_features, pictures(224, 1))


def test_a_deepcluster_checkpoint_in_the_old_format_loads_with_its_sobel_filter(published, tmp_path):
    shapes = published.alexnet(channels=2, tracked=False) | published.sobel()
    state = with_heads(published.draw(shapes, 1), ["top_layer"], 4096, [7])
    content = {
        "epoch": 500,
        "arch": "alexnet",
        "state_dict": {key.replace("features.", "features.module."): value for key, value in state.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.05, "momentum": 0.9}]},
    }
    path = saved(tmp_path / "checkpoint.pth.tar", content, legacy=True)
    network, labels = sela_ext.load_released(path)
    assert (network.name, labels, network.heads.clusters) == ("alexnet-sobel", None, [7])
    assert not any(parameter.requires_grad for parameter in network.backbone.sobel.parameters())
    assert all(parameter.requires_grad for parameter in network.backbone.features.parameters())
    assert int(network.backbone.features[1].num_batches_tracked) == 0
    assert_computes(network, state, ["top_layer"], published.alexnet_features, pictures(224, 1))


@pytest.mark.parametrize("single", [False, True])
def test_a_preactivation_resnet_computes_what_its_tensors_say(published, tmp_path, single):
    names = ["top_layer.0"] if single else [f"top_layer{i}" for i in range(3)]
    clusters = [11] if single else [11, 5, 11]
    state = with_heads(published.draw(published.preact(), 2), names, 2048, clusters)
    L = torch.randint(0, 5, (len(clusters), 31))
    content = {"epoch": 3, "arch": "resnetv2", "state_dict": state, "optimizer": {}, "L": L}
    network, labels = sela_ext.load_released(saved(tmp_path / "resnet-10x3k.pth", content))
    assert network.heads.clusters == clusters
    assert labels.dtype == torch.int64
    assert torch.equal(labels, L)
    assert_computes(network, state, names, published.preact_features, pictures(64))


def test_the_older_resnet_names_become_torchvisions(published, tmp_path):
    import torchvision

    shapes = published.resnet(**published.RESNET_V1, deep=False)
    state = with_heads(published.draw(shapes, 3), ["top_layer0", "top_layer1"], 512, [4, 4])
    content = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "L": torch.zeros(2, 9).long()}
    network, labels = sela_ext.load_released(saved(tmp_path / "v1.pth", content))
    assert labels.shape == (2, 9)
    plain = {name for name in torchvision.models.resnet18().state_dict() if not name.startswith("fc.")}
    assert set(network.backbone.state_dict()) == plain

    def features(s, x):
        return published.resnet_features(s, x, **published.RESNET_V1, deep=False)

    assert_computes(network, state, ["top_layer0", "top_layer1"], features, pictures(64))


@pytest.mark.parametrize("key", ["labels", "L"])
def test_torchvision_names_load_with_fc_as_head_0_and_the_labels_of_all_heads(published, tmp_path, key):
    state = with_heads(published.draw(published.resnet(), 4), ["fc"], 2048, [6])
    labels = torch.arange(30).reshape(10, 3) % 6
    given = labels if key == "L" else labels[0].to(torch.int32)
    network, found = sela_ext.load_released(saved(tmp_path / "resnet50_pp.pth", {"state_dict": state, key: given}))
    assert network.name == "resnet50"
    assert torch.equal(found, labels if key == "L" else labels[:1])
    assert_computes(network, state, ["fc"], published.resnet_features, pictures(64))


def test_torchvision_weights_without_a_head_load_too(published, tmp_path):
    state = published.draw(published.resnet(deep=False), 4)
    network, labels = sela_ext.load_released(saved(tmp_path / "trunk.pth", state))
    assert (network.heads.clusters, labels) == ([], None)
    assert network.heads(network(pictures(32))).shape == (2, 0)


def test_half_precision_weights_become_float32(published, tmp_path):
    state = {
        k: v.half() if v.is_floating_point() else v for k, v in published.draw(published.resnet(deep=False)).items()
    }
    network, _ = sela_ext.load_released(saved(tmp_path / "half.pth", state))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert torch.equal(network.backbone.conv1.weight, state["conv1.weight"].float())


def cifar_content(published, heads):
    names = ["top_layer"] if heads == 1 else [f"top_layer{i}" for i in range(heads)]
    state = with_heads(published.draw(published.resnet(**published.RESNET_V1, deep=False), 6), names, 512, [8] * heads)
    shape = (13,) if heads == 1 else (heads, 13)
    labels = torch.randint(0, 8, shape, generator=torch.Generator().manual_seed(1))
    return {"net": state, "acc": 0.776, "epoch": 400, "opt": {"state": {}, "param_groups": []}, "L": labels}


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("legacy", [False, True])
def test_cifar_files_hold_net_and_labels_of_one_or_several_heads(published, tmp_path, heads, legacy):
    content = cifar_content(published, heads)
    network, labels = sela_ext.load_released(saved(tmp_path / "best_ckpt.t7", content, legacy))
    assert network.heads.clusters == [8] * heads
    assert torch.equal(labels, content["L"].reshape(heads, 13))


def test_the_layer_for_rotations_is_kept_apart_from_the_heads(published, tmp_path):
    names = ["top_layer0", "top_layer1", "top_layer2"]
    state = with_heads(published.draw(published.resnet(**published.RESNET_V1, deep=False)), names, 512, [9, 9, 4])
    network, _ = sela_ext.load_released(saved(tmp_path / "wRot.pth", state))
    assert network.heads.clusters == [9, 9]
    assert torch.equal(network.rotation.weight, state["top_layer2.weight"])
    assert torch.equal(network.rotation.bias, state["top_layer2.bias"])


def test_four_clusters_in_every_head_are_no_rotations(published, tmp_path):
    names = ["top_layer0", "top_layer1"]
    state = with_heads(published.draw(published.resnet(**published.RESNET_V1, deep=False)), names, 512, [4, 4])
    network, _ = sela_ext.load_released(saved(tmp_path / "four.pth", state))
    assert network.heads.clusters == [4, 4]
    assert network.rotation is None


def test_prototypes_become_cosine_heads_behind_their_projection(published, tmp_path):
    generator = torch.Generator().manual_seed(7)
    state = published.draw(published.resnet(deep=False), 8)
    layers = published.linear("projection_head.0", 512, 24) | published.batch_norm("projection_head.1", 24)
    layers |= published.linear("projection_head.3", 24, 12)
    state |= published.draw(layers, 9)
    for i, k in enumerate((5, 6)):
        state[f"prototypes.prototypes{i}.weight"] = F.normalize(torch.randn(k, 12, generator=generator), dim=1)
    content = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    network, _ = sela_ext.load_released(saved(tmp_path / "selav2.pth", content))
    assert (network.heads.kind, network.heads.clusters, network.embedding_dim) == ("cosine", [5, 6], 12)
    x = pictures(64)
    with torch.no_grad():
        hidden = published.resnet_features(state, x, deep=False)
        hidden = F.linear(hidden, state["projection_head.0.weight"], state["projection_head.0.bias"])
        hidden = F.relu(published._norm(state, "projection_head.1", hidden))
        hidden = F.linear(hidden, state["projection_head.3.weight"], state["projection_head.3.bias"])
        expected = F.normalize(hidden, dim=1) @ state["prototypes.prototypes1.weight"].T / 0.1
        assert torch.allclose(network.heads.logits_of(1, network(x)), expected, rtol=1e-3, atol=1e-3)


def test_the_network_of_a_run_loads_as_it_was(tmp_path):
    out = tmp_path / "run"
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16), np.uint8)
    result = sela_ext.train(images, out=out, epochs=1, progress=False, model="small-resnet", projection=16, holdout=0)
    network, labels = sela_ext.load_released(out)
    assert labels is None
    x = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(network.heads(network(x)), result.network.heads(result.network(x)))
    assert network.heads.kind == result.network.heads.kind


def test_a_loaded_network_is_a_copy_of_the_file(published, tmp_path):
    state = published.draw(published.resnet(deep=False))
    path = saved(tmp_path / "trunk.pth", state)
    network, _ = sela_ext.load_released(path)
    size = path.stat().st_size
    with open(path, "r+b") as file:  # were the tensors still mapped, they would change with it
        file.write(b"\0" * size)
    assert torch.equal(network.backbone.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])


class PythonTwoDict(OrderedDict):
    """Pickled as Python 2 pickles an OrderedDict: by a list of pairs."""

    def __reduce__(self):
        return OrderedDict, ([[key, value] for key, value in self.items()],)


def as_python_two(path):
    """Rewrite a file of the old format so that its strings are those of Python 2: bytes without an encoding."""
    data, out, at = path.read_bytes(), bytearray(), 0
    for _ in range(5):  # magic number, version, system, content, keys of the storages; raw storages follow
        starts = [(op.name, arg, at + pos) for op, arg, pos in pickletools.genops(data[at:])]
        ends = [pos for _, _, pos in starts[1:]] + [starts[-1][2] + 1]
        for (name, text, begin), end in zip(starts, ends, strict=True):
            if name == "BINUNICODE":
                out += b"U" + bytes([len(text)]) + text.encode()
            else:
                out += data[begin:end]
        at = ends[-1]
    path.write_bytes(bytes(out) + data[at:])


def test_checkpoints_that_python_two_wrote_load(published, tmp_path):
    state = with_heads(published.draw(published.resnet(**published.RESNET_V1, deep=False)), ["top_layer"], 512, [5])
    content = {
        "epoch": 10**10,  # a long
        "arch": "resnet18",
        "state_dict": PythonTwoDict((f"module.{key}", value) for key, value in state.items() if value.ndim),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.05, "params": [1, 2]}]},
    }
    path = saved(tmp_path / "checkpoint.pth.tar", content, legacy=True)
    before = path.read_bytes()
    as_python_two(path)
    assert b"U\x0astate_dict" in path.read_bytes()
    assert len(path.read_bytes()) < len(before)
    network, _ = sela_ext.load_released(path)
    assert torch.equal(network.backbone.conv1.weight, state["features.0.weight"])
    assert torch.equal(network.heads.bias, state["top_layer.bias"])


# --- What is refused


def trunk(published):
    return published.draw(published.resnet(deep=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer2.0.conv1.weight"), "1 missing: 'layer2.0.conv1.weight'"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("bn1.")], "4 missing: 'bn1.weight', .* and 1 more"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected: 'extra'"),
        (
            lambda s: s.update({"bn1.bias": torch.zeros(63)}),
            r"1 of another shape: bn1.bias \(63,\) instead of \(64,\)",
        ),
        (lambda s: s.update({"bn1.bias": torch.full((64,), torch.nan)}), "finite weights, found NaN .* in 'bn1.bias'"),
        (lambda s: s.update({"bn1.bias": torch.zeros(64, dtype=torch.complex64)}), "expected real numbers"),
        (lambda s: s.update({"module.bn1.bias": torch.zeros(64)}), "'bn1.bias' under two names"),
        (lambda s: s.update({"top_layer0.weight": torch.zeros(3, 512)}), None),
        (
            lambda s: s.update({"top_layer1.weight": torch.zeros(3, 512), "top_layer1.bias": torch.zeros(3)}),
            "heads are incomplete: 2 missing: weight of head 0, bias of head 0",
        ),
        (
            lambda s: s.update({"fc.weight": torch.zeros(3, 511), "fc.bias": torch.zeros(3)}),
            r"the weight of head 0 to be \(3, 512\), found \(3, 511\)",
        ),
        (lambda s: s.update(number=3), "expected names with tensors, found 'number' with int"),
        (lambda s: s.clear(), "expected a state dict"),
    ],
)
def test_tensors_that_do_not_fit_are_named_in_one_line(published, tmp_path, change, message):
    state = trunk(published)
    change(state)
    path = saved(tmp_path / "trunk.pth", state)
    if message is None:
        assert sela_ext.load_released(path)[0].heads.kind == "cosine"
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        sela_ext.load_released(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 8]), r"labels of head 0 in -1 \.\. 7, found 0 \.\. 8"),
        (torch.tensor([-2, 3]), r"labels of head 0 in -1 \.\. 7, found -2"),
        (torch.tensor([0.0, 1.0]), "whole-numbered labels"),
        (torch.zeros(2, 2, 2).long(), r"found torch.int64 \(2, 2, 2\)"),
        (torch.tensor([True, False]), "whole-numbered labels"),
        ("one", "found str"),
        ([[0, 1], [0]], "a list that is no array"),
        ([0, 1.5], "a list that is no array"),
        ([[0] * 1000] * 10**6, "a list that is no array"),  # in the file: one row, a million times
        ([2**63], "larger ones"),
    ],
)
def test_labels_that_are_none_are_refused(published, tmp_path, labels, message):
    content = cifar_content(published, 1)
    content["L"] = labels
    with pytest.raises(CheckpointError, match=message):
        sela_ext.load_released(saved(tmp_path / "ckpt.t7", content))


def test_heads_that_share_their_weights_are_refused(published, tmp_path):
    state, weight, bias = trunk(published), torch.zeros(3000, 512), torch.zeros(3000)
    for number in range(200):
        state[f"top_layer{number}.weight"], state[f"top_layer{number}.bias"] = weight, bias
    with pytest.raises(CheckpointError, match=r"every head's own weights, found 1,231,200,000 bytes"):
        sela_ext.load_released(saved(tmp_path / "shared.pth", state))


def test_labels_in_a_list_are_labels(published, tmp_path):
    content = cifar_content(published, 1)
    content["L"] = [0, 1, 7, -1]
    _, labels = sela_ext.load_released(saved(tmp_path / "ckpt.t7", content))
    assert labels.tolist() == [[0, 1, 7, -1]]


def test_foreign_weights_are_refused_with_their_first_names(tmp_path):
    path = saved(tmp_path / "other.pth", {"encoder.weight": torch.zeros(2), "decoder.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"found 2 tensors named 'encoder.weight', 'decoder.weight'"):
        sela_ext.load_released(path)


# --- At the published size


@pytest.mark.slow
def test_ten_heads_of_3000_clusters_and_the_labels_of_a_million_images_load(published, tmp_path):
    names = [f"top_layer{i}" for i in range(10)]
    state = with_heads(published.draw(published.preact()), names, 2048, [3000] * 10)
    labels = torch.randint(0, 3000, (10, 1_281_167), dtype=torch.int64)
    path = saved(tmp_path / "resnet-10x3k.pth", {"state_dict": state, "L": labels})
    last = state["top_layer9.weight"].clone()
    del state
    gc.collect()
    network, found = sela_ext.load_released(path)
    assert torch.equal(found, labels)
    assert torch.equal(network.heads.as_linear(9)[0], last)
    assert np.prod(network.heads.weight.shape) == 30_000 * 2048
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("sobel", [False, True])
def test_vgg16_computes_what_its_tensors_say(published, tmp_path, sobel):
    shapes = published.vgg16(2, tracked=False) | published.sobel() if sobel else published.vgg16()
    state = with_heads(published.draw(shapes, 1), ["top_layer"], 4096, [10])
    for key in ("classifier.0.weight", "classifier.3.weight"):
        state[key] = state[key].half()  # half the memory; they become float32 again
    path = saved(tmp_path / "vgg16.pth", {"epoch": 1, "arch": "vgg16", "state_dict": state})
    images = pictures(224, 1)
    for key in ("classifier.0.weight", "classifier.3.weight"):
        state[key] = state[key].float()
    with torch.no_grad():
        expected = published.vgg16_features(state, images)
        logits = F.linear(expected, state["top_layer.weight"], state["top_layer.bias"])
    del state
    gc.collect()
    network, _ = sela_ext.load_released(path)
    path.unlink()
    with torch.no_grad():
        assert torch.allclose(network.features(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert torch.allclose(network.heads(network(images)), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_small_alexnet_computes_what_its_tensors_say(published, tmp_path):
    state = with_heads(published.draw(published.alexnet("small"), 1), ["top_layer"], 4096, [10])
    network, _ = sela_ext.load_released(saved(tmp_path / "small.pth", state))
    assert network.name == "alexnet-small"
    assert_computes(network, state, ["top_layer"], published.alexnet_features, pictures(224, 1))

import json

import pytest
import torch
from torch import nn

import sela_ext
from sela_ext.errors import CheckpointError, OptionError, ResourceError
from sela_ext.finetuning.trunk import dilate, load_trunk, stages_of


def trunk(name):
    return load_trunk(name, pretrained=False, size=64)


@pytest.mark.parametrize(
    ("name", "widths", "strides"),
    [
        ("resnet18", [64, 128, 256, 512], [4, 8, 16, 32]),
        ("resnet50-preact", [256, 512, 1024, 2048], [4, 8, 16, 32]),
        ("small-resnet", [32, 64, 128], [2, 4, 8]),
        ("small-convnet", [32, 128, 256], [2, 4, 8]),
        ("alexnet", [256], [16]),
        ("alexnet-sobel", [256], [16]),
        ("mobilenet_v3_small", [576], [32]),
    ],
)
def test_maps_have_the_strides_they_claim(name, widths, strides):
    stages = stages_of(trunk(name)).eval()
    assert stages.widths == widths
    assert stages.strides == strides
    with torch.no_grad():
        maps = stages(torch.zeros(1, 3, 192, 192))
    for one, stride in zip(maps, strides, strict=True):
        assert abs(one.shape[2] - 192 / stride) <= 1


def test_networks_without_known_maps_are_refused():
    with pytest.raises(OptionError, match="no feature maps that are known"):
        stages_of(load_trunk(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 5)), pretrained=False, size=64))
    with pytest.raises(OptionError, match="no feature maps that are known"):
        stages_of(trunk("swin_t"))


@pytest.mark.parametrize("name", ["resnet18", "resnet50-preact"])
def test_a_dilated_network_computes_the_same_at_more_places(name):
    torch.manual_seed(0)
    network = trunk(name)
    for layer in network.module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    stages = stages_of(network).eval()
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        coarse = stages(images)[-1]
        spread = dilate(stages.stages[2], 1)
        assert spread == 2
        assert dilate(stages.stages[3], spread) == 4
        fine = stages(images)[-1]
    assert fine.shape[2] == 4 * coarse.shape[2]
    assert torch.allclose(fine[:, :, ::4, ::4], coarse, rtol=1e-3, atol=1e-3 * float(coarse.abs().max()))


def test_the_features_of_a_trunk_are_those_of_its_last_map():
    network = trunk("resnet18")
    network.module.eval()
    stages = stages_of(network).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(stages(images)[-1].mean((2, 3)), network.module(images), atol=1e-5)


def test_alexnets_head_takes_the_pooled_last_map():
    network = trunk("alexnet")
    network.module.eval()
    stages = stages_of(network).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        maps = nn.functional.max_pool2d(stages(images)[0], 3, 2)
        assert stages.pool == maps.shape[2] == 6
        assert torch.equal(stages.head(maps.flatten(1)), network.module(images))


def test_a_run_gives_its_weights_and_its_normalisation(tmp_path):
    torch.manual_seed(0)
    built = trunk("small-resnet")
    from sela_ext.models import Heads

    torch.save(
        {
            "model": "small-resnet",
            "backbone": built.module.state_dict(),
            "projection": {},
            "heads": Heads(128, [5]).state_dict(),
            "clusters": [5],
            "head_kind": "linear",
            "temperature": 0.1,
        },
        tmp_path / "network.pt",
    )
    resolved = {"resolved": {"augment": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}}
    (tmp_path / "options.json").write_text(json.dumps(resolved))
    found = load_trunk(tmp_path, pretrained=False, size=64)
    assert found.trained
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    state = built.module.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in found.module.state_dict().items())
    network, _ = sela_ext.load_released(tmp_path)
    assert network.heads.clusters == [5]


def test_what_is_no_backbone_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"backbone: .* did you mean resnet18"):
        trunk("resnet_18")
    with pytest.raises(CheckpointError, match="No such file"):
        trunk(str(tmp_path / "absent.pth"))
    with pytest.raises(OptionError, match="pretrained: expected a network of torchvision, found 'small-resnet'"):
        load_trunk("small-resnet", pretrained=True, size=64)


class _Weights:
    """Stands in for torchvision's weights of a network."""

    def __init__(self, state):
        self.DEFAULT = self
        self._state = state

    def get_state_dict(self, progress):
        if isinstance(self._state, Exception):
            raise self._state
        return self._state


def test_torchvisions_weights_are_asked_for_and_fitted(monkeypatch):
    import torchvision

    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: _Weights(state))
    found = load_trunk("resnet18", pretrained=True, size=64)
    assert found.trained
    assert torch.equal(found.module.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: _Weights(OSError("no network")))
    with pytest.raises(ResourceError, match="weights of resnet18 cannot be had: no network"):
        load_trunk("resnet18", pretrained=True, size=64)

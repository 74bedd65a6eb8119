import json

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import sela_ext

TINY = {
    "epochs": 1,
    "batch_size": 16,
    "clusters": 3,
    "heads": 2,
    "holdout": 0,
    "image_size": 32,
    "precision": "float32",
    "device": "cpu",
    "threads": 1,
    "progress": False,
    "checkpoint_seconds": 1e9,
}


def pictures(count=33):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_a_trained_backbone_has_the_names_of_torchvision(name, tmp_path):
    sela_ext.train(pictures(), out=tmp_path / "run", model=name, **TINY)
    saved = torch.load(tmp_path / "run" / "network.pt", weights_only=True)["backbone"]
    plain = torchvision.models.get_model(name, weights=None)
    result = plain.load_state_dict(saved, strict=False)
    last = [key for key, child in plain.named_modules() if isinstance(child, nn.Linear)][-1]
    assert not result.unexpected_keys
    assert set(result.missing_keys) == {f"{last}.weight", f"{last}.bias"}


def test_the_small_transformer_is_trained_at_both_resolutions_and_loaded_by_its_name(tmp_path):
    images = pictures()
    result = sela_ext.train(images, out=tmp_path / "run", model="small-vit", **TINY)
    options = json.loads((tmp_path / "run" / "options.json").read_text())
    assert options["resolved"]["half_resolution"] == 0.5
    assert options["resolved"]["feature_dim"] == 128
    assert np.mean(sela_ext.predict(tmp_path / "run", images, threads=1) == result.labels) > 0.9


def test_a_users_network_of_maps_is_trained_in_place_and_taken_again(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU())
    before = module[0].weight.detach().clone()
    images = pictures()
    result = sela_ext.train(images, out=tmp_path / "run", model=module, **TINY)
    assert not torch.equal(module[0].weight, before)
    assert result.network.feature_dim == 8
    fresh = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU())
    features = sela_ext.embed(tmp_path / "run", images, model=fresh, threads=1)
    assert features.shape == (33, 8)
    assert torch.equal(fresh[0].weight, module[0].weight)

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import sela_ext
from sela_ext.errors import OptionError
from sela_ext.models import (
    AlexNet,
    Heads,
    Network,
    PreActResNet,
    SmallConvNet,
    SmallResNet,
    SmallViT,
    Sobel,
    build_backbone,
)
from sela_ext.models.small import patch_positions


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("make", [SmallResNet, SmallConvNet])
@pytest.mark.parametrize("size", [28, 32, 33])
def test_small_networks_give_one_feature_vector_per_image(make, channels, size):
    network = make(channels)
    assert network(torch.randn(3, channels, size, size)).shape == (3, network.feature_dim)


def test_alexnet_has_the_names_of_the_released_weights():
    names = set(AlexNet().state_dict())
    for i in (0, 4, 8, 11, 14):
        assert f"features.{i}.weight" in names
    for i in (1, 5, 9, 12, 15):
        assert f"features.{i}.running_mean" in names
    assert {"classifier.1.weight", "classifier.4.bias"} <= names
    assert AlexNet().features[0].weight.shape == (96, 3, 11, 11)
    assert AlexNet(layout="small").features[4].weight.shape == (192, 64, 5, 5)


def test_alexnet_pooling_changes_nothing_at_224_pixels():
    network = AlexNet().eval()
    maps = network.features(torch.randn(1, 3, 224, 224))
    assert maps.shape[1:] == (256, 6, 6)
    assert torch.equal(network.pool(maps), maps)


def test_cosine_logits_are_cosines_over_the_temperature():
    heads = Heads(8, [3, 5], "cosine", temperature=0.1)
    x = torch.randn(4, 8)
    expected = torch.cosine_similarity(x[:, None], heads.weight[None], dim=2) / 0.1
    assert torch.allclose(heads(x), expected, atol=1e-5)
    assert heads.bias is None


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_logits_of_one_head_are_its_part_of_all(kind):
    heads = Heads(8, [3, 5, 2], kind)
    x = torch.randn(7, 8)
    for head, part in enumerate(heads.split(heads(x))):
        assert torch.allclose(heads.logits_of(head, x), part, atol=1e-6)


def test_torchvision_networks_lose_their_classifier_and_keep_their_names():
    import torchvision

    backbone = build_backbone("resnet18", channels=3, image_size=(64, 64))
    assert backbone.feature_dim == 512
    plain = {name for name in torchvision.models.resnet18().state_dict() if not name.startswith("fc.")}
    assert set(backbone.module.state_dict()) == plain


@pytest.mark.parametrize(("name", "dim"), [("mobilenet_v3_small", 1024), ("squeezenet1_1", 512), ("alexnet", 4096)])
def test_feature_length_is_found_by_running_the_network(name, dim):
    assert build_backbone(name, channels=3, image_size=(96, 96)).feature_dim == dim


def test_grey_images_are_repeated_for_colour_networks():
    backbone = build_backbone("resnet18", channels=1, image_size=(32, 32))
    network = Network(backbone.module, backbone.feature_dim, [4], channels_in=backbone.channels_in).eval()
    grey = torch.randn(2, 1, 32, 32)
    assert torch.equal(network(grey), network(grey.expand(-1, 3, -1, -1)))


def test_modules_and_callables_are_taken_as_they_are():
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 11))
    assert build_backbone(module, channels=3, image_size=(16, 16)).module is module
    assert build_backbone(lambda: module, channels=3, image_size=(16, 16)).feature_dim == 11


def test_the_trial_run_changes_no_batch_norm_statistics():
    module = SmallResNet()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    build_backbone(module, channels=3, image_size=(32, 32))
    assert module.training
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_unusable_networks_are_refused():
    with pytest.raises(OptionError, match="did you mean resnet18"):
        build_backbone("resnet_18", channels=3, image_size=(32, 32))
    with pytest.raises(OptionError, match=r"expected features of shape \[B, D\], .* found \(6,\) for B = 2"):
        build_backbone(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(0)), channels=3, image_size=(32, 32))
    with pytest.raises(OptionError, match="found no tensor for B = 2 from MaxPool2d"):
        build_backbone(nn.MaxPool2d(2, return_indices=True), channels=3, image_size=(32, 32))
    with pytest.raises(OptionError, match="does not take images of 3 x 16 x 16"):
        build_backbone(nn.Linear(7, 3), channels=3, image_size=(16, 16))
    with pytest.raises(OptionError, match=r"callable that returns an nn\.Module, found int"):
        build_backbone(lambda: 3, channels=3, image_size=(16, 16))


@pytest.mark.parametrize(
    ("name", "channels_in", "dim"),
    [
        ("alexnet-sobel", 3, 4096),
        ("vgg16-bn", 1, 4096),
        ("vgg16-bn-sobel", 3, 4096),
        ("resnet50-preact", 1, 2048),
        ("resnetv2", 1, 2048),
        ("resnetv1", 3, 2048),
    ],
)
def test_the_papers_networks_are_there_by_name(name, channels_in, dim):
    with torch.device("meta"):
        backbone = build_backbone(name, channels=1, image_size=(64, 64))
    assert (backbone.name, backbone.channels_in, backbone.feature_dim) == (name, channels_in, dim)


@torch.no_grad()
def test_alexnet_is_drawn_as_the_paper_says():
    torch.manual_seed(0)
    network = AlexNet()
    for index, fan_out in ((0, 11 * 11 * 96), (4, 25 * 256), (8, 9 * 384), (11, 9 * 384), (14, 9 * 256)):
        conv, norm = network.features[index], network.features[index + 1]
        assert float(conv.weight.std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
        assert float(conv.bias.abs().max()) == 0
        assert float(norm.weight.min()) == float(norm.weight.max()) == 1
    for index in (1, 4):
        assert float(network.classifier[index].weight.std()) == pytest.approx(0.01, rel=0.01)
        assert float(network.classifier[index].bias.abs().max()) == 0


def test_the_sobel_filter_sees_edges_and_is_not_trained():
    sobel = Sobel()
    image = torch.zeros(1, 3, 9, 9)
    image[..., 5:] = 1.0  # white to the right of column 5
    found = sobel(image)
    assert torch.allclose(found[0, 0, 1:-1, 4:6], torch.full((7, 2), -4.0))
    assert float(found[0, 0, 1:-1, 1:4].abs().max()) == 0
    assert float(found[0, 1, 1:-1, 1:-1].abs().max()) < 1e-6
    assert not any(parameter.requires_grad for parameter in sobel.parameters())
    turned = sobel(image.mT)
    assert torch.allclose(turned[0, 1, 4:6, 1:-1], torch.full((2, 7), -4.0))


def test_preactivation_has_no_batch_norm_outside_its_blocks():
    network = PreActResNet(blocks=(1, 1, 1, 1), width=4)
    outside = {name.split(".")[1] for name, _ in network.named_parameters() if name.count(".") == 2}
    assert outside == {"0"}  # the stem's convolution
    assert network.features[0].bias is None
    assert network(torch.randn(2, 3, 33, 31)).shape == (2, 128)
    assert network.feature_dim == 128


def test_vision_transformers_take_the_size_of_the_images():
    with torch.device("meta"):
        assert build_backbone("vit_b_16", channels=3, image_size=(32, 32)).feature_dim == 768
        with pytest.raises(OptionError, match="vit_b_16 does not take images of 3 x 40 x 40"):
            build_backbone("vit_b_16", channels=3, image_size=(40, 40))


@pytest.mark.parametrize("name", ["vgg16_bn", "densenet121", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_32"])
def test_torchvision_networks_of_other_kinds_give_features_under_their_names(name):
    import torchvision

    with torch.device("meta"):
        backbone = build_backbone(name, channels=3, image_size=(224, 224))
        plain = set(torchvision.models.get_model(name, weights=None).state_dict())
    own = set(backbone.module.state_dict())
    assert own < plain
    assert len(plain - own) == 2  # weight and bias of the classifier


def test_timm_networks_are_asked_for_by_a_prefix(monkeypatch):
    asked = {}

    def create_model(name, **options):
        asked.update(options, name=name)
        return SmallResNet(options["in_chans"])

    fake = types.SimpleNamespace(
        is_model=lambda name: name == "resnet10t",
        list_models=lambda: ["resnet10t"],
        get_pretrained_cfg=lambda name: None,
        create_model=create_model,
    )
    monkeypatch.setitem(sys.modules, "timm", fake)
    backbone = build_backbone("timm/resnet10t", channels=1, image_size=(32, 32))
    assert backbone.feature_dim == 128
    assert asked == {"name": "resnet10t", "pretrained": False, "num_classes": 0, "in_chans": 1}
    with pytest.raises(OptionError, match="did you mean timm/resnet10t"):
        build_backbone("timm/resnet10", channels=1, image_size=(32, 32))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(OptionError, match=r"needs the package timm, .*sela_ext\[timm\]"):
        build_backbone("timm/resnet10t", channels=1, image_size=(32, 32))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (7, "callable without arguments that returns one, found 7"),
        (nn.Linear, "found Linear: missing a required argument"),
        (lambda size: None, "missing a required argument: 'size'"),
        ("resnet50-prea", "did you mean resnet50-preact"),
        ("alexnet-sobol", "did you mean alexnet-sobel"),
    ],
)
def test_what_is_no_network_is_refused_in_one_line(model, message):
    with pytest.raises(OptionError, match=message) as caught:
        build_backbone(model, channels=3, image_size=(32, 32))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", ["alexnet-sobel", "alexnet-small", "vgg16-bn", "resnet50-preact", "resnetv1", "vit_b_32"]
)
def test_networks_train_by_name_and_load_again(name, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), np.uint8)
    size = 64 if name != "vit_b_32" else 96
    options = {"epochs": 1, "batch_size": 4, "clusters": 3, "heads": 2, "image_size": size, "holdout": 0}
    result = sela_ext.train(images, out=tmp_path / "run", model=name, progress=False, **options)
    assert result.labels.shape == (2, 8)
    assert result.network.name == name
    network, _ = sela_ext.load_released(tmp_path / "run")
    x = torch.randn(2, 3, size, size)
    trained = result.network.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in network.state_dict().items())
    with torch.no_grad():  # not the same order of channels in memory, so not the same rounding
        assert torch.allclose(network.heads(network(x)), result.network.heads(result.network(x)), atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (28, 28), (33, 31), (4, 5)])
def test_the_small_transformer_takes_images_of_any_size(channels, size):
    network = SmallViT(channels, width=24, depth=2, heads=3)
    assert network(torch.randn(3, channels, *size)).shape == (3, 24)
    with pytest.raises(OptionError, match="does not take images of 3 x 3 x 8"):
        build_backbone(SmallViT(), channels=3, image_size=(3, 8))


@torch.no_grad()
def test_the_small_transformer_knows_where_a_patch_is():
    network = SmallViT(1, width=24, depth=1, heads=2).eval()
    corner = torch.zeros(1, 1, 32, 32)
    corner[..., :4, :4] = 1.0
    turned = [corner, corner.flip(2), corner.flip(3), corner.roll((4, 8), (2, 3))]
    features = torch.cat([network(picture) for picture in turned])
    assert float(torch.pdist(features).min()) > 1e-4


@torch.no_grad()
def test_places_are_shares_of_the_image_whatever_its_size():
    # The only patch of a small image lies in its middle, as the fifth of nine does.
    one, nine = (patch_positions(torch.zeros(1, 16, side, side)) for side in (1, 3))
    assert torch.allclose(nine[4], one[0], atol=1e-5)
    assert float(torch.pdist(nine).min()) > 0.5


@pytest.mark.parametrize("name", ["small-resnet", "small-convnet", "small-vit"])
def test_small_networks_learn_from_half_a_batch_at_half_the_size(name):
    backbone = build_backbone(name, channels=3, image_size=(32, 32))
    whole = backbone.module(torch.randn(4, 3, 32, 32))
    half = backbone.module(torch.randn(4, 3, 16, 16))
    assert whole.shape == half.shape == (4, backbone.feature_dim)
    (whole.square().sum() + half.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in backbone.module.parameters())


def test_timm_transformers_take_the_size_of_the_images():
    pytest.importorskip("timm")
    with torch.device("meta"):
        assert build_backbone("timm/vit_tiny_patch16_224", channels=1, image_size=(32, 32)).feature_dim == 192
        assert build_backbone("timm/convnext_atto", channels=3, image_size=(32, 32)).feature_dim == 320
        with pytest.raises(OptionError, match="timm/vit_tiny_patch16_224 does not take images of 3 x 8 x 8"):
            build_backbone("timm/vit_tiny_patch16_224", channels=3, image_size=(8, 8))


@torch.no_grad()
def test_maps_and_tokens_of_a_users_network_are_averaged():
    maps = nn.Conv2d(3, 8, 3)
    images = torch.randn(4, 3, 12, 10)
    backbone = build_backbone(maps, channels=3, image_size=(12, 10))
    assert backbone.feature_dim == 8
    assert backbone.name == "Conv2d"
    assert torch.allclose(backbone.module(images), maps(images).mean((2, 3)))
    tokens = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(2), nn.Linear(30, 7))  # [B, 8, 7]
    backbone = build_backbone(tokens, channels=3, image_size=(12, 10))
    assert backbone.feature_dim == 7
    assert torch.allclose(backbone.module(images), tokens(images).mean(1))


def test_a_timm_network_of_unknown_weights_is_refused():
    pytest.importorskip("timm")
    with pytest.raises(OptionError, match=r"found 'resnet10t.wat': .*; leave out what follows the dot"):
        build_backbone("timm/resnet10t.wat", channels=1, image_size=(32, 32))

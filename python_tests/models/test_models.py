import pytest
import torch
from torch import nn

from sela_ext.errors import OptionError
from sela_ext.models import AlexNet, Heads, Network, SmallConvNet, SmallResNet, build_backbone


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
    with pytest.raises(OptionError, match=r"expected features of shape \[B, D\], found \(2, 8, 30, 30\)"):
        build_backbone(nn.Conv2d(3, 8, 3), channels=3, image_size=(32, 32))
    with pytest.raises(OptionError, match="does not take images of 3 x 16 x 16"):
        build_backbone(nn.Linear(7, 3), channels=3, image_size=(16, 16))
    with pytest.raises(OptionError, match=r"callable that returns an nn\.Module, found int"):
        build_backbone(lambda: 3, channels=3, image_size=(16, 16))

import copy

import pytest
import torch
import torchvision
from torch import nn

from sela_ext.errors import OptionError
from sela_ext.evaluation import Stages, fold_batch_norm
from sela_ext.evaluation.probes import Probe, stage_shapes
from sela_ext.evaluation.stages import probe_side
from sela_ext.models import AlexNet, SmallConvNet, SmallResNet


def lived_in(network, seed=0):
    """The network with batch norms as training leaves them: statistics, scales and shifts of all sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor, low, high):
        tensor.data.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            draw(module.running_mean, -2, 2)
            draw(module.running_var, 0.1, 4)
            if module.affine:
                draw(module.weight, -1.5, 1.5)
                draw(module.bias, -1, 1)
    return network.eval()


def relative(one, other):
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("layout", ["big", "small"])
@torch.no_grad()
def test_a_folded_alexnet_computes_the_same(layout):
    torch.manual_seed(0)
    network = lived_in(AlexNet(3, layout))
    images = torch.randn(2, 3, 224, 224)
    expected = network.features(images)
    folded = fold_batch_norm(copy.deepcopy(network))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert relative(folded.features(images), expected) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("groups", "stride", "padding"), [(1, 1, 0), (3, 2, 1)])
@torch.no_grad()
def test_folding_is_exact_for_every_kind_of_convolution(bias, affine, groups, stride, padding):
    torch.manual_seed(1)
    layers = nn.Sequential(
        nn.Conv2d(6, 9, 3, stride, padding, groups=groups, bias=bias), nn.BatchNorm2d(9, affine=affine), nn.ReLU()
    )
    network = lived_in(layers).double()
    images = torch.randn(3, 6, 13, 11, dtype=torch.float64)
    expected = network(images)
    assert relative(fold_batch_norm(network)(images), expected) < 1e-12
    assert isinstance(network[1], nn.Identity)


@torch.no_grad()
def test_a_batch_norm_without_statistics_stays():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    images = torch.randn(2, 3, 8, 8)
    expected = network(images)
    assert torch.equal(fold_batch_norm(network)(images), expected)
    assert isinstance(network[1], nn.BatchNorm2d)


def test_probes_of_the_big_alexnet_see_the_papers_numbers_of_values():
    stages = Stages(AlexNet(3, "big"))
    shapes = stage_shapes(stages, 224, 3, torch.device("cpu"))
    assert shapes == {
        "conv1": (96, 55, 55),
        "conv2": (256, 27, 27),
        "conv3": (384, 13, 13),
        "conv4": (384, 13, 13),
        "conv5": (256, 13, 13),
    }
    assert [Probe(shape, 3).values for shape in shapes.values()] == [9600, 9216, 9600, 9600, 9216]


@torch.no_grad()
def test_alexnet_is_tapped_after_each_relu():
    torch.manual_seed(2)
    network = lived_in(AlexNet(3, "small"))
    images = torch.randn(2, 3, 96, 96)
    found = Stages(network)(images)
    x, expected = images, []
    for layer in network.features:
        x = layer(x).clone()
        if isinstance(layer, nn.ReLU):
            expected.append(x)
    assert list(found) == ["conv1", "conv2", "conv3", "conv4", "conv5"]
    for one, other in zip(found.values(), expected, strict=True):
        assert float(one.min()) == 0.0
        assert relative(one, other) < 1e-5


@pytest.mark.parametrize(
    ("build", "names", "channels"),
    [
        (torchvision.models.resnet18, ["layer1", "layer2", "layer3", "layer4"], [64, 128, 256, 512]),
        (torchvision.models.alexnet, ["conv1", "conv2", "conv3", "conv4", "conv5"], [64, 192, 384, 256, 256]),
        (torchvision.models.vgg11_bn, ["stage1", "stage2", "stage3", "stage4", "stage5"], [64, 128, 256, 512, 512]),
        (SmallResNet, ["block1", "block2", "block3"], [32, 64, 128]),
        (SmallConvNet, ["group1", "group2", "group3"], [32, 128, 256]),
    ],
)
@torch.no_grad()
def test_other_networks_are_tapped_after_each_stage(build, names, channels):
    torch.manual_seed(3)
    network = lived_in(build())
    stages = Stages(network)
    images = torch.randn(1, 3, 64, 64)
    found = stages(images)
    assert list(found) == stages.names == names
    assert [int(maps.shape[1]) for maps in found.values()] == channels
    if names[0] == "layer1":
        x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
        for name in names:
            x = getattr(network, name)(x)
            assert relative(found[name], x) < 1e-5


@torch.no_grad()
def test_a_network_behind_a_filter_is_tapped_through_it():
    class Filtered(nn.Module):
        def __init__(self):
            super().__init__()
            self.sobel = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 3, padding=1))
            self.network = AlexNet(2, "small")

        def forward(self, images):
            return self.network(self.sobel(images))

    network = lived_in(Filtered())
    images = torch.randn(1, 3, 80, 80)
    found = Stages(network)(images)
    expected = network.network.features[:4](network.sobel(images))
    assert next(iter(found)) == "conv1"
    assert relative(torch.nn.functional.max_pool2d(found["conv1"], 3, 2), expected) < 1e-5


def test_what_lies_behind_the_last_stage_is_not_computed():
    network = AlexNet(3, "small")
    network.classifier = nn.Identity()  # 224-pixel weights on 64-pixel images would not fit
    calls = []
    stages = Stages(network)
    stages.network.pool.register_forward_hook(lambda *given: calls.append(1))
    stages(torch.zeros(1, 3, 64, 64))
    assert calls == []


def test_the_network_given_is_not_touched_and_the_copy_stays_frozen():
    network = AlexNet(3, "small").train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    stages = Stages(network)
    stages.train()
    stages(torch.randn(2, 3, 64, 64))
    assert network.training
    assert not any(module.training for module in stages.modules())
    assert not any(parameter.requires_grad for parameter in stages.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("channels", [1, 31, 64, 128, 512, 1024, 2048, 9600, 20_000])
def test_pooled_maps_are_the_largest_that_fit(channels):
    side = probe_side(channels, 56, 56)
    assert channels * side**2 <= 9600 or side == 1
    assert side == 56 or channels * (side + 1) ** 2 > 9600


def test_a_network_of_another_build_is_refused():
    with pytest.raises(OptionError, match=r"expected an AlexNet, a VGG, a ResNet .* found Sequential"):
        Stages(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()))

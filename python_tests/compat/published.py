"""The published checkpoints, stated again: names and shapes of their tensors, and what their networks compute.

Nothing here uses the package: it is what the package is compared with.
"""

import math

import torch
from torch.nn import functional as F

ALEXNET = {"big": (96, 256, 384, 384, 256), "small": (64, 192, 384, 256, 256)}
ALEXNET_CONV = (0, 4, 8, 11, 14)
VGG_CONV = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)
VGG_WIDTH = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG_POOL_AFTER = (3, 10, 20, 30, 40)
STAGES = (3, 4, 6, 3)


def batch_norm(name, width, tracked=True):
    parts = {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return {**parts, f"{name}.num_batches_tracked": ()} if tracked else parts


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def sobel():
    return {
        "sobel.0.weight": (1, 3, 1, 1),
        "sobel.0.bias": (1,),
        "sobel.1.weight": (2, 1, 3, 3),
        "sobel.1.bias": (2,),
    }


def alexnet(kind="big", channels=3, tracked=True):
    shapes = {}
    for index, width, kernel in zip(ALEXNET_CONV, ALEXNET[kind], (11, 5, 3, 3, 3), strict=True):
        shapes[f"features.{index}.weight"] = (width, channels, kernel, kernel)
        shapes[f"features.{index}.bias"] = (width,)
        shapes |= batch_norm(f"features.{index + 1}", width, tracked)
        channels = width
    return shapes | linear("classifier.1", 9216, 4096) | linear("classifier.4", 4096, 4096)


def vgg16(channels=3, tracked=True):
    shapes = {}
    for index, width in zip(VGG_CONV, VGG_WIDTH, strict=True):
        shapes[f"features.{index}.weight"] = (width, channels, 3, 3)
        shapes[f"features.{index}.bias"] = (width,)
        shapes |= batch_norm(f"features.{index + 1}", width, tracked)
        channels = width
    return shapes | linear("classifier.0", 25088, 4096) | linear("classifier.3", 4096, 4096)


def preact():
    shapes, before = {"features.0.weight": (64, 3, 7, 7)}, 64
    for stage, blocks in enumerate(STAGES):
        width = 64 << stage
        for b in range(blocks):
            name = f"features.{stage + 2}.{b}"
            shapes |= batch_norm(f"{name}.bn1", before) | {f"{name}.conv1.weight": (width, before, 1, 1)}
            shapes |= batch_norm(f"{name}.bn2", width) | {f"{name}.conv2.weight": (width, width, 3, 3)}
            shapes |= batch_norm(f"{name}.bn3", width) | {f"{name}.conv3.weight": (4 * width, width, 1, 1)}
            if b == 0:
                shapes[f"{name}.shortcut.0.weight"] = (4 * width, before, 1, 1)
            before = 4 * width
    return shapes


def resnet(stem=("conv1", "bn1"), stages=("layer1", "layer2", "layer3", "layer4"), deep=True):
    """ResNet-50, or ResNet-18 where not deep; by default under torchvision's names."""
    shapes, before = {f"{stem[0]}.weight": (64, 3, 7, 7)} | batch_norm(stem[1], 64), 64
    for stage, blocks in enumerate(STAGES if deep else (2, 2, 2, 2)):
        width = 64 << stage
        for b in range(blocks):
            name = f"{stages[stage]}.{b}"
            layers = [(width, before, 1), (width, width, 3), (4 * width, width, 1)]
            layers = layers if deep else [(width, before, 3), (width, width, 3)]
            for i, (outputs, inputs, kernel) in enumerate(layers, 1):
                shapes[f"{name}.conv{i}.weight"] = (outputs, inputs, kernel, kernel)
                shapes |= batch_norm(f"{name}.bn{i}", outputs)
            after = layers[-1][0]
            if b == 0 and (deep or stage):
                shapes[f"{name}.downsample.0.weight"] = (after, before, 1, 1)
                shapes |= batch_norm(f"{name}.downsample.1", after)
            before = after
    return shapes


RESNET_V1 = {"stem": ("features.0", "features.1"), "stages": tuple(f"features.{i}" for i in (4, 5, 6, 7))}


def draw(shapes, seed=0):
    """Tensors of these shapes whose network neither explodes nor dies out."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        else:
            scale = 1.5 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
            state[name] = torch.empty(shape).uniform_(-1, 1, generator=generator) * scale
    return state


def draw_meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _norm(s, name, x):
    return F.batch_norm(
        x, s[f"{name}.running_mean"], s[f"{name}.running_var"], s[f"{name}.weight"], s[f"{name}.bias"], eps=1e-5
    )


def _linear(s, name, x):
    return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])


def _edges(s, x):
    if "sobel.0.weight" not in s:
        return x
    x = F.conv2d(x, s["sobel.0.weight"], s["sobel.0.bias"])
    return F.conv2d(x, s["sobel.1.weight"], s["sobel.1.bias"], padding=1)


def alexnet_features(s, x):
    x = _edges(s, x)
    for index, stride, padding, pool in ((0, 4, 2, 1), (4, 1, 2, 1), (8, 1, 1, 0), (11, 1, 1, 0), (14, 1, 1, 1)):
        x = F.conv2d(x, s[f"features.{index}.weight"], s[f"features.{index}.bias"], stride, padding)
        x = F.relu(_norm(s, f"features.{index + 1}", x))
        x = F.max_pool2d(x, 3, 2) if pool else x
    return F.relu(_linear(s, "classifier.4", F.relu(_linear(s, "classifier.1", x.flatten(1)))))


def vgg16_features(s, x):
    x = _edges(s, x)
    for index in VGG_CONV:
        x = F.conv2d(x, s[f"features.{index}.weight"], s[f"features.{index}.bias"], padding=1)
        x = F.relu(_norm(s, f"features.{index + 1}", x))
        x = F.max_pool2d(x, 2) if index in VGG_POOL_AFTER else x
    return F.relu(_linear(s, "classifier.3", F.relu(_linear(s, "classifier.0", x.flatten(1)))))


def preact_features(s, x):
    x = F.max_pool2d(F.conv2d(x, s["features.0.weight"], stride=2, padding=3), 3, 2, 1)
    for stage, blocks in enumerate(STAGES):
        for b in range(blocks):
            name, stride = f"features.{stage + 2}.{b}", 2 if stage and b == 0 else 1
            a = F.relu(_norm(s, f"{name}.bn1", x))
            short = F.conv2d(a, s[f"{name}.shortcut.0.weight"], stride=stride) if b == 0 else x
            y = F.relu(_norm(s, f"{name}.bn2", F.conv2d(a, s[f"{name}.conv1.weight"])))
            y = F.relu(_norm(s, f"{name}.bn3", F.conv2d(y, s[f"{name}.conv2.weight"], stride=stride, padding=1)))
            x = F.conv2d(y, s[f"{name}.conv3.weight"]) + short
    return x.mean((2, 3))


def resnet_features(s, x, stem=("conv1", "bn1"), stages=("layer1", "layer2", "layer3", "layer4"), deep=True):
    x = F.relu(_norm(s, stem[1], F.conv2d(x, s[f"{stem[0]}.weight"], stride=2, padding=3)))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage, blocks in enumerate(STAGES if deep else (2, 2, 2, 2)):
        for b in range(blocks):
            name, stride = f"{stages[stage]}.{b}", 2 if stage and b == 0 else 1
            short = x
            if f"{name}.downsample.0.weight" in s:
                short = _norm(s, f"{name}.downsample.1", F.conv2d(x, s[f"{name}.downsample.0.weight"], stride=stride))
            layers = ((1, 0), (stride, 1), (1, 0)) if deep else ((stride, 1), (1, 1))  # stride and padding
            y = x
            for i, (step, padding) in enumerate(layers, 1):
                y = F.conv2d(y, s[f"{name}.conv{i}.weight"], stride=step, padding=padding)
                y = _norm(s, f"{name}.bn{i}", y)
                y = F.relu(y) if i < len(layers) else y
            x = F.relu(y + short)
    return x.mean((2, 3))

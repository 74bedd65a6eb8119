"""Published figures to read one's own beside: per network and data set, in percent of the papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """What was published of one model.

    Attributes:
        model: how the source calls it.
        networks: names of the network here.
        data: name of the data set, as `known_data` gives it.
        figures: metric to value, shares in [0, 1], under the names that `sela_ext.evaluate` uses.
        source: where they stand.
    """

    model: str
    networks: tuple[str, ...]
    data: str
    figures: dict[str, float] = field(default_factory=dict)
    source: str = "Asano et al. 2020"


_ALEXNET = ("alexnet", "alexnet-small")

PUBLISHED: tuple[Published, ...] = (
    Published("AlexNet, 1 x 1k", _ALEXNET, "imagenet", {"nmi": 0.505, "ami": 0.122, "ari": 0.027, "linear": 0.421}),
    Published("AlexNet, 1 x 10k", _ALEXNET, "imagenet", {"nmi": 0.664, "ami": 0.047, "ari": 0.047, "linear": 0.438}),
    Published(
        "ResNet-50, 10 x 3k",
        ("resnet50-preact",),
        "imagenet",
        {"nmi": 0.542, "ami": 0.344, "ari": 0.072, "linear": 0.615},
    ),
    Published(
        "ResNet-18, 1 x 1k, Aug++",
        ("resnet18",),
        "imagenet",
        {"accuracy": 0.269, "nmi": 0.627, "ami": 0.364, "ari": 0.125, "linear": 0.533},
        "the authors' page of released models",
    ),
    Published(
        "ResNet-50, 1 x 1k, Aug++",
        ("resnet50",),
        "imagenet",
        {"accuracy": 0.305, "nmi": 0.657, "ami": 0.42, "ari": 0.162, "linear": 0.635},
        "the authors' page of released models",
    ),
    Published(
        "ResNet-50, 10 x 3k, Aug++",
        ("resnet50",),
        "imagenet",
        {"accuracy": 0.381, "nmi": 0.757, "ami": 0.528, "ari": 0.276, "linear": 0.688},
        "the authors' page of released models",
    ),
    Published("AlexNet by labels of ResNet-50, 10 x 3k", _ALEXNET, "imagenet", {"linear": 0.484}),
    Published("AlexNet, own labels, 10 x 3k", _ALEXNET, "imagenet", {"linear": 0.465}),
    Published(
        "SeLa-v2, ResNet-50, 400 epochs, 2x160+4x96 crops",
        ("resnet50",),
        "imagenet",
        {"linear": 0.718},
        "Caron et al. 2020 (SwAV)",
    ),
    Published(
        "SeLa-v2, ResNet-50, 400 epochs, 2x224 crops",
        ("resnet50",),
        "imagenet",
        {"linear": 0.672},
        "Caron et al. 2020 (SwAV)",
    ),
    Published("AlexNet, 10 heads", _ALEXNET, "cifar10", {"linear": 0.834, "knn": 0.776}),
    Published("AlexNet", _ALEXNET, "svhn", {"linear": 0.945}),
)

# What pixels alone give in 64 principal directions: k-means with one cluster per class and logistic regression on at
# most 20,000 images by scikit-learn; kNN as `weighted_knn` has it, cosine, k = 20, sigma .1, so that a network's figure
# stands beside one of the same protocol. Unweighted Euclidean neighbours find less: .855 of Fashion-MNIST, .399 of
# CIFAR-10.
TRIVIAL: dict[str, dict[str, float]] = {
    "digits": {"nmi": 0.710, "ari": 0.600, "accuracy": 0.695, "knn": 0.981, "linear": 0.975},
    "fashion-mnist": {"nmi": 0.491, "ari": 0.340, "accuracy": 0.501, "knn": 0.861, "linear": 0.831},
    "cifar10": {"nmi": 0.079, "ari": 0.042, "accuracy": 0.206, "knn": 0.474, "linear": 0.384},
}

_CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}


def known_data(name: str, class_names: Sequence[str] | None, classes: int) -> str | None:
    """Tell which known data set this is, by its classes, or by its name and their number; None: none of them.

    Args:
        name: path or name of the data.
        class_names: names of the classes, where known.
        classes: number of classes that occur.

    Returns:
        "imagenet", "cifar10", "svhn", "fashion-mnist", "digits", or None.

    Example:
        >>> known_data("/data/fashion-mnist", None, 10)
        'fashion-mnist'
    """
    text = name.lower().replace("_", "-")
    named = {str(one).lower() for one in class_names or ()}
    if named == _CIFAR10 or (classes == 10 and ("cifar10" in text.replace("-", "") and "cifar100" not in text)):
        return "cifar10"
    if classes == 1000 and (
        "imagenet" in text or all(one[:1] == "n" and one[1:].isdigit() and len(one) == 9 for one in named)
    ):
        return "imagenet"
    if classes != 10:
        return None
    if text == "digits":
        return "digits"
    return next((known for known in ("fashion-mnist", "svhn") if known in text), None)


def published_for(network: str, data: str | None) -> list[Published]:
    """The published models of this network and data set."""
    return [entry for entry in PUBLISHED if entry.data == data and network in entry.networks]

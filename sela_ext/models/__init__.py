"""Networks and heads."""

from sela_ext.models.alexnet import AlexNet
from sela_ext.models.heads import Heads, Network, make_projection, projection_widths
from sela_ext.models.preact import PreActResNet
from sela_ext.models.registry import BUILT_FOR_224, Backbone, build_backbone
from sela_ext.models.small import SmallConvNet, SmallResNet, SmallViT
from sela_ext.models.sobel import Sobel
from sela_ext.models.vectors import Standardize, build_vector_backbone
from sela_ext.models.vgg import VGG16

__all__ = [
    "BUILT_FOR_224",
    "VGG16",
    "AlexNet",
    "Backbone",
    "Heads",
    "Network",
    "PreActResNet",
    "SmallConvNet",
    "SmallResNet",
    "SmallViT",
    "Sobel",
    "Standardize",
    "build_backbone",
    "build_vector_backbone",
    "make_projection",
    "projection_widths",
]

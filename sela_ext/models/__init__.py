"""Networks and heads."""

from sela_ext.models.alexnet import AlexNet
from sela_ext.models.heads import Heads, Network
from sela_ext.models.registry import Backbone, build_backbone
from sela_ext.models.small import SmallConvNet, SmallResNet

__all__ = ["AlexNet", "Backbone", "Heads", "Network", "SmallConvNet", "SmallResNet", "build_backbone"]

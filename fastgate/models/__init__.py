"""Networks with residual blocks, and functions that put gates on them."""

from fastgate.models.attachment import attach
from fastgate.models.block import ResidualBlock
from fastgate.models.layout import register_block
from fastgate.models.resnet import ResNet, resnet, resnet20, resnet32, resnet44, resnet56, resnet110

__all__ = [
    "ResNet",
    "ResidualBlock",
    "attach",
    "register_block",
    "resnet",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
]

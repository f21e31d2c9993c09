"""CIFAR ResNets (He et al., 2015, section 4.2; https://arxiv.org/abs/1512.03385) of depth 6n + 2, gated or plain."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.models.attachment import attach
from fastgate.models.block import PadShortcut, ResidualBlock

WIDTHS = (16, 32, 64)
BRANCH = ("conv1", "bn1", "relu", "conv2", "bn2")
SHORTCUTS = ("conv", "pad")


def basic_block(in_channels: int, out_channels: int, stride: int, shortcut: str) -> ResidualBlock:
    """Two 3x3 convolutions with batch norm; only downsampling blocks have a shortcut module."""
    modules: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
        "bn1": nn.BatchNorm2d(out_channels),
        "relu": nn.ReLU(),
        "conv2": nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
        "bn2": nn.BatchNorm2d(out_channels),
    }
    downsamples = stride != 1 or in_channels != out_channels
    if downsamples and shortcut == "conv":
        modules["shortcut"] = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )
    elif downsamples:
        modules["shortcut"] = PadShortcut(in_channels, out_channels, stride)
    return ResidualBlock(modules, BRANCH, "shortcut" if downsamples else None, "relu")


# a torch.fx Proxy has no shape to compare
@torch.fx.wrap
def _check_images(x: Tensor, in_channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != in_channels:
        # int(): under tracing (fvcore) the sizes are tensors
        shape = [int(n) for n in x.shape]
        raise ValueError(
            f"x: expected [N, {in_channels}, H, W], got {shape}; set in_channels when building the network"
        )


class ResNet(nn.Module):
    """A CIFAR ResNet of depth 6n + 2: a 3x3 stem, three stages of n blocks with 16, 32 and 64 channels, a classifier.

    Args:
        depth: 6n + 2, for example 20, 32, 44, 56, 110.
        num_classes: number of classes.
        in_channels: channels of the image.
        widths: channels of the three stages.
        shortcut: `"conv"` (1x1 convolution + batch norm, option B) or `"pad"` (option A) on downsampling blocks.

    `forward(x [N, in_channels, H, W]) -> [N, num_classes]`, any H and W.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        widths: Sequence[int] = WIDTHS,
        shortcut: str = "conv",
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth: expected 6n + 2 (20, 32, 44, 56, 110, ...), got {depth}")
        if len(widths) != len(WIDTHS) or any(width < 1 for width in widths):
            raise ValueError(f"widths: expected {len(WIDTHS)} positive numbers of channels, got {tuple(widths)}")
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut: expected one of {', '.join(SHORTCUTS)}, got {shortcut!r}")
        self.in_channels = in_channels
        channels = widths[0]
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        for stage, out_channels in enumerate(widths, 1):
            blocks = nn.Sequential()
            for i in range((depth - 2) // 6):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(basic_block(channels, out_channels, stride, shortcut))
                channels = out_channels
            self.add_module(f"layer{stage}", blocks)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        _check_images(x, self.in_channels)
        x = self.relu(self.bn1(self.conv1(x)))
        # by attribute: TorchScript does not support getattr with computed names
        x = self.layer3(self.layer2(self.layer1(x)))  # type: ignore[operator]
        return self.fc(x.mean((2, 3)))


def resnet(
    depth: int,
    /,
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    widths: Sequence[int] = WIDTHS,
    gating: str | None = None,
    position: str = "middle",
    shortcut: str = "conv",
    **gate_options: Any,
) -> ResNet:
    """Build a CIFAR ResNet of any depth 6n + 2, with gates unless `gating` is None.

    Args:
        depth: 6n + 2.
        num_classes: number of classes.
        in_channels: channels of the image.
        widths: channels of the three stages.
        gating: None, `"layer"`, `"channel"` or `"both"`.
        position: position of channel gates, see :func:`fastgate.attach`.
        shortcut: `"conv"` or `"pad"`.
        gate_options: passed to the gates, see :func:`fastgate.attach`.
    """
    model = ResNet(depth, num_classes, in_channels=in_channels, widths=widths, shortcut=shortcut)
    if gating is None:
        if gate_options:
            raise ValueError(f"gate options without gating: {', '.join(gate_options)}; set gating to layer or channel")
        return model
    attach(model, gating, position, **gate_options)
    return model


def resnet20(num_classes: int = 10, **options: Any) -> ResNet:
    """ResNet-20: 9 blocks. Options as for :func:`resnet`."""
    return resnet(20, num_classes, **options)


def resnet32(num_classes: int = 10, **options: Any) -> ResNet:
    """ResNet-32: 15 blocks. Options as for :func:`resnet`."""
    return resnet(32, num_classes, **options)


def resnet44(num_classes: int = 10, **options: Any) -> ResNet:
    """ResNet-44: 21 blocks. Options as for :func:`resnet`."""
    return resnet(44, num_classes, **options)


def resnet56(num_classes: int = 10, **options: Any) -> ResNet:
    """ResNet-56: 27 blocks. Options as for :func:`resnet`."""
    return resnet(56, num_classes, **options)


def resnet110(num_classes: int = 10, **options: Any) -> ResNet:
    """ResNet-110, the paper's network: 54 blocks. Options as for :func:`resnet`."""
    return resnet(110, num_classes, **options)

"""MobileNetV2 for small images (mobilenetv2: expansion 6, half width).

Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, arXiv 1801.04381.

The network of the distillation literature: a stem of stride 2, so that all maps of 32x32 images are small; plain ReLU; the last
1x1 convolution has 1280 channels whatever the width. A stage ends with a linear bottleneck, which no activation follows.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from distillzoo.errors import OptionError
from distillzoo.models.base import MODELS, Network, check_count, initialise
from distillzoo.types import Stage

__all__ = ["InvertedResidual", "MobileNetV2"]

_WIDTHS = (16, 24, 32, 64, 96, 160, 320)
_DEPTHS = (1, 2, 3, 4, 3, 3, 1)
_STRIDES = (1, 1, 2, 2, 1, 2, 1)
_TAPPED = (1, 2, 4, 6)  # the groups after which the resolution falls or the network ends; the very first belongs to the stem


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depth-wise convolution, linear 1x1 projection; the input is added where the shape allows.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the depth-wise convolution.
        expansion: Channels inside, as a multiple of those of the input.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * in_channels
        self.residual = stride == 1 and in_channels == channels
        self.expand = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.project = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, channels, H / stride, W / stride)``."""
        inner = self.relu1(self.bn1(self.expand(x)))
        inner = self.relu2(self.bn2(self.depthwise(inner)))
        out: Tensor = self.bn3(self.project(inner))
        return x + out if self.residual else out


class MobileNetV2(Network):
    """A 3x3 stem of stride 2, seven groups of inverted residuals, a 1x1 convolution to 1280 channels, one linear layer.

    Args:
        num_classes: Width of the logits, at least 2.
        expansion: Expansion of all groups but the first, whose expansion is 1.
        width: Factor on the widths of stem and groups, above 0.
        in_channels: Channels of the images.
    Raises:
        OptionError: If a number is out of range.
    """

    classifier_path = "classifier"

    def __init__(self, num_classes: int, *, expansion: int = 6, width: float = 0.5, in_channels: int = 3) -> None:
        super().__init__(num_classes, in_channels)
        check_count("expansion", expansion, 1)
        if not (math.isfinite(width) and int(width * _WIDTHS[0]) >= 1):
            raise OptionError(f"width must be a finite factor that leaves at least one channel; got {width!r}. Pass 0.5 or more.")
        channels = int(32 * width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        groups: list[nn.Module] = []
        for number, (base, depth, stride) in enumerate(zip(_WIDTHS, _DEPTHS, _STRIDES, strict=True)):
            blocks: list[nn.Module] = []
            for position in range(depth):
                factor = 1 if number == 0 else expansion
                blocks.append(InvertedResidual(channels, int(base * width), stride if position == 0 else 1, factor))
                channels = int(base * width)
            groups.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*groups)
        last = max(1280, int(1280 * width))
        self.conv2 = nn.Conv2d(channels, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, num_classes)
        self.stages = tuple(self._stage(number) for number in _TAPPED)
        initialise(self, linear_std=0.01, zero_linear_bias=True)

    @staticmethod
    def _stage(number: int) -> Stage:
        block = f"blocks.{number}.{_DEPTHS[number] - 1}"
        return Stage(f"blocks.{number}", None, f"{block}.project", f"{block}.bn3", layout="nchw")

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(B, num_classes)`` logits of ``(B, in_channels, H, W)`` images."""
        x = self.blocks(self.relu1(self.bn1(self.conv1(images))))
        x = self.relu2(self.bn2(self.conv2(x)))
        logits: Tensor = self.classifier(self.pool(x).flatten(1))
        return logits


MODELS.register("mobilenetv2")(MobileNetV2)

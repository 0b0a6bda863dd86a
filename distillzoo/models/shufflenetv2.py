"""ShuffleNetV2 for small images (shufflenetv2: 1.0x).

Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018, arXiv 1807.11164.

The network of the distillation literature: a 1x1 stem of stride 1 in place of the paper's. A stage ends with a concatenation of an
untouched half and a rectified branch, shuffled: no tensor is its pre-activation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distillzoo.models.base import MODELS, ChannelShuffle, Network
from distillzoo.types import Stage

__all__ = ["DownUnit", "ShuffleNetV2", "SplitUnit"]

_STEM_WIDTH = 24


class _Branch(nn.Module):
    """1x1, 3x3 depth-wise and 1x1 convolutions with norms, an activation after the first and the last."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu3(self.bn3(self.conv3(inner)))
        return out


class SplitUnit(nn.Module):
    """Half of the channels pass untouched, the other half goes through a branch; the halves are joined and shuffled.

    Args:
        channels: Channels of input and output, an even number.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _Branch(channels // 2, channels // 2, 1)
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, channels, H, W)`` to the same shape."""
        kept, changed = x.chunk(2, dim=1)
        out: Tensor = self.shuffle(torch.cat([kept, self.branch(changed)], 1))
        return out


class DownUnit(nn.Module):
    """Two branches of stride 2 read the whole input; their results are joined and shuffled.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output, an even number.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.short = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
        )
        self.branch = _Branch(in_channels, half, 2)
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, channels, H / 2, W / 2)``."""
        out: Tensor = self.shuffle(torch.cat([self.short(x), self.branch(x)], 1))
        return out


class ShuffleNetV2(Network):
    """A 1x1 stem of 24 channels, three groups that halve the resolution first, a 1x1 convolution, one linear layer.

    Args:
        num_classes: Width of the logits, at least 2.
        widths: Channels of the three groups and of the last convolution.
        depths: Units of the three groups, the first of which halves the resolution.
        in_channels: Channels of the images.
    Raises:
        OptionError: If ``num_classes`` or ``in_channels`` is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        widths: Sequence[int] = (116, 232, 464, 1024),
        depths: Sequence[int] = (4, 8, 4),
        in_channels: int = 3,
    ) -> None:
        super().__init__(num_classes, in_channels)
        *group_widths, last = widths
        self.conv1 = nn.Conv2d(in_channels, _STEM_WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM_WIDTH)
        self.relu1 = nn.ReLU()
        channels = _STEM_WIDTH
        stages: list[Stage] = []
        for number, (width, depth) in enumerate(zip(group_widths, depths, strict=True), 1):
            self.add_module(
                f"layer{number}", nn.Sequential(DownUnit(channels, width), *(SplitUnit(width) for _ in range(depth - 1)))
            )
            branch = f"layer{number}.{depth - 1}.branch"
            stages.append(Stage(f"layer{number}", linear=f"{branch}.conv3", linear_norm=f"{branch}.bn3", layout="nchw"))
            channels = width
        self.stages = tuple(stages)
        self._layers = tuple(stage.path for stage in stages)  # stages are the user's to choose; what is computed is not
        self.conv2 = nn.Conv2d(channels, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(B, num_classes)`` logits of ``(B, in_channels, H, W)`` images."""
        x = self.relu1(self.bn1(self.conv1(images)))
        for name in self._layers:
            x = getattr(self, name)(x)
        x = self.relu2(self.bn2(self.conv2(x)))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


MODELS.register("shufflenetv2")(ShuffleNetV2)

"""ShuffleNetV1 with three groups, for 32 px (shufflenetv1) and behind the paper's stem for 224 px (shufflenetv1_224).

Zhang, Zhou, Lin, Sun, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices", CVPR 2018,
arXiv 1707.01083.

The blocks of the distillation literature: an activation also follows the depth-wise convolution, which the paper leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from distillzoo.errors import OptionError
from distillzoo.models.base import MODELS, ChannelShuffle, Network, check_count
from distillzoo.types import Stage

__all__ = ["ShuffleNetV1", "ShuffleUnit"]

_STEM_WIDTH = 24


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, 3x3 depth-wise and grouped 1x1 convolutions; the input is added, or pooled and appended.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output, appended ones included.
        stride: 1 adds the input, 2 appends its 3x3 average pool.
        groups: Groups of the last 1x1 convolution.
        first_groups: Groups of the first 1x1 convolution and of the shuffle.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        branch = channels - in_channels if stride == 2 else channels
        inner = branch // 4
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.shuffle = ChannelShuffle(first_groups)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, branch, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, channels, H / stride, W / stride)``."""
        inner = self.shuffle(self.relu1(self.bn1(self.conv1(x))))
        inner = self.relu2(self.bn2(self.conv2(inner)))
        branch = self.bn3(self.conv3(inner))
        out: Tensor = self.relu3(branch + x if self.pool is None else torch.cat([branch, self.pool(x)], 1))
        return out


class ShuffleNetV1(Network):
    """A stem of 24 channels and three groups of shuffle units, each of which halves the resolution first.

    Args:
        num_classes: Width of the logits, at least 2.
        widths: Channels of the three groups.
        depths: Units of the three groups.
        groups: Groups of the 1x1 convolutions; the very first one is not grouped.
        stem: ``"small"`` is a 1x1 convolution of stride 1 (32 px), ``"large"`` the paper's 3x3 convolution and 3x3 max pooling of
            stride 2 each (224 px).
        in_channels: Channels of the images.
    Raises:
        OptionError: If an option is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        widths: Sequence[int] = (240, 480, 960),
        depths: Sequence[int] = (4, 8, 4),
        groups: int = 3,
        stem: Literal["small", "large"] = "small",
        in_channels: int = 3,
    ) -> None:
        super().__init__(num_classes, in_channels)
        check_count("groups", groups, 1)
        if stem not in ("small", "large"):
            raise OptionError(f"stem must be 'small' (32 px) or 'large' (224 px); got {stem!r}. Pass one of the two.")
        large = stem == "large"
        if large:
            self.input_size = (224, 224)
        self.conv1 = nn.Conv2d(in_channels, _STEM_WIDTH, 3 if large else 1, 2 if large else 1, 1 if large else 0, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM_WIDTH)
        self.relu1 = nn.ReLU()
        self.stem_pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        channels = _STEM_WIDTH
        stages: list[Stage] = []
        for number, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
            first = ShuffleUnit(channels, width, 2, groups, 1 if number == 1 else groups)
            rest = (ShuffleUnit(width, width, 1, groups, groups) for _ in range(depth - 1))
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
            unit = f"layer{number}.{depth - 1}"
            conv, norm = f"{unit}.conv3", f"{unit}.bn3"
            stages.append(Stage(f"layer{number}", f"{unit}.relu3:input", conv, norm, norm, layout="nchw"))
            channels = width
        self.stages = tuple(stages)
        self._layers = tuple(stage.path for stage in stages)  # stages are the user's to choose; what is computed is not
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(B, num_classes)`` logits of ``(B, in_channels, H, W)`` images."""
        x = self.stem_pool(self.relu1(self.bn1(self.conv1(images))))
        for name in self._layers:
            x = getattr(self, name)(x)
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


MODELS.register("shufflenetv1")(ShuffleNetV1)
MODELS.register("shufflenetv1_224")(partial(ShuffleNetV1, stem="large"))

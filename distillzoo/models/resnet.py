"""Residual networks for small images: three groups of basic blocks (resnet8 .. resnet110, x4), and ResNet18 and ResNet50.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385.

The networks of the distillation literature: 1x1 convolution and norm on every shortcut that changes shape (not the paper's
zero-padding), the x4 networks with a stem of 32 and groups of 64, 128 and 256 channels. ResNet18 and ResNet50 are the paper's
four groups behind a 3x3 stem of stride 1 without pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from distillzoo.models.base import MODELS, Network, initialise
from distillzoo.types import Stage

__all__ = ["BasicBlock", "Bottleneck", "ResNet"]


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with norms, the shortcut added before the last activation.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution.
    """

    expansion = 1
    last = ("conv2", "bn2", "relu2")

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, channels, H / stride, W / stride)``."""
        inner = self.relu1(self.bn1(self.conv1(x)))
        out: Tensor = self.relu2(self.bn2(self.conv2(inner)) + self.downsample(x))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with norms, the shortcut added before the last activation.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the 3x3 convolution, a quarter of the output's.
        stride: Stride of the 3x3 convolution.
    """

    expansion = 4
    last = ("conv3", "bn3", "relu3")

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, 4 * channels, H / stride, W / stride)``."""
        inner = self.relu1(self.bn1(self.conv1(x)))
        inner = self.relu2(self.bn2(self.conv2(inner)))
        out: Tensor = self.relu3(self.bn3(self.conv3(inner)) + self.downsample(x))
        return out


class ResNet(Network):
    """A 3x3 stem of stride 1 and groups of residual blocks, of stride 2 from the second group on.

    Args:
        num_classes: Width of the logits, at least 2.
        depths: Blocks of each group.
        widths: Channels of each group's 3x3 convolutions.
        stem_width: Channels of the stem.
        block: Kind of block.
        in_channels: Channels of the images.
    Raises:
        OptionError: If ``num_classes`` or ``in_channels`` is out of range.
    Example:
        >>> import torch
        >>> ResNet(10, depths=(1, 1, 1))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    published_keys = ((r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc."))

    def __init__(
        self,
        num_classes: int,
        *,
        depths: Sequence[int],
        widths: Sequence[int] = (16, 32, 64),
        stem_width: int = 16,
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        in_channels: int = 3,
    ) -> None:
        super().__init__(num_classes, in_channels)
        self.conv1 = nn.Conv2d(in_channels, stem_width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.relu = nn.ReLU()
        channels = stem_width
        stages: list[Stage] = []
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
            stride = 1 if number == 1 else 2
            blocks = [block(channels if i == 0 else block.expansion * width, width, stride if i == 0 else 1) for i in range(depth)]
            channels = block.expansion * width
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            conv, norm, relu = (f"layer{number}.{depth - 1}.{name}" for name in block.last)
            stages.append(Stage(f"layer{number}", f"{relu}:input", conv, norm, norm, layout="nchw"))
        self.stages = tuple(stages)
        self._layers = tuple(stage.path for stage in stages)  # stages are the user's to choose; what is computed is not
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(B, num_classes)`` logits of ``(B, in_channels, H, W)`` images."""
        x = self.relu(self.bn1(self.conv1(images)))
        for name in self._layers:
            x = getattr(self, name)(x)
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


for _depth in (8, 14, 20, 32, 44, 56, 110):
    MODELS.register(f"resnet{_depth}")(partial(ResNet, depths=((_depth - 2) // 6,) * 3))
for _depth in (8, 32):
    _wide = partial(ResNet, depths=((_depth - 2) // 6,) * 3, widths=(64, 128, 256), stem_width=32)
    MODELS.register(f"resnet{_depth}x4")(_wide)
_four_groups = partial(ResNet, widths=(64, 128, 256, 512), stem_width=64)
MODELS.register("resnet18")(partial(_four_groups, depths=(2, 2, 2, 2)))
MODELS.register("resnet50")(partial(_four_groups, depths=(3, 4, 6, 3), block=Bottleneck))

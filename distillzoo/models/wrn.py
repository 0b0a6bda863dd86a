"""Wide residual networks for small images (wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2).

Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016, arXiv 1605.07146.

Pre-activation blocks: a stage ends with the raw residual stream, which nothing rectifies. Its pre-activation tap is what the
next norm (the first of the next group, or the last of the network) makes of it, read where that norm runs anyway.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from distillzoo.errors import OptionError
from distillzoo.models.base import MODELS, Network, check_count, initialise
from distillzoo.types import Stage

__all__ = ["PreActivationBlock", "WideResNet"]


class PreActivationBlock(nn.Module):
    """Norm, activation, 3x3 convolution, twice; the input is added to the result.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        same = stride == 1 and in_channels == channels
        self.shortcut = None if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, channels, H / stride, W / stride)``."""
        active = self.relu1(self.bn1(x))
        # a shortcut that changes the shape reads the activated input, any other one the raw stream
        skip = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active)))) + skip
        return out


class WideResNet(Network):
    """A 3x3 stem without norm and three groups of pre-activation blocks, then norm, activation and pooling.

    Args:
        num_classes: Width of the logits, at least 2.
        depth: Number of layers, 6n + 4.
        width: Factor on the group widths 16, 32 and 64.
        in_channels: Channels of the images.
    Raises:
        OptionError: If a number is out of range.
    """

    published_keys = ((r"\.layer\.", "."), (r"\.convShortcut\.", ".shortcut."), (r"^bn1\.", "bn."))

    def __init__(self, num_classes: int, *, depth: int = 16, width: int = 1, in_channels: int = 3) -> None:
        super().__init__(num_classes, in_channels)
        check_count("width", width, 1)
        check_count("depth", depth, 10)
        if (depth - 4) % 6:
            raise OptionError(
                f"depth of a wide residual network must be 6n + 4; got {depth}. The next one is {depth + (4 - depth) % 6}."
            )
        blocks = (depth - 4) // 6
        widths = (16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.block1 = self._group(16, widths[0], 1, blocks)
        self.block2 = self._group(widths[0], widths[1], 2, blocks)
        self.block3 = self._group(widths[1], widths[2], 2, blocks)
        self.bn = nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], num_classes)
        self.stages = tuple(
            Stage(
                f"block{number}",
                pre=norm,
                linear=f"block{number}.{blocks - 1}.conv2",
                norm=norm,
                layout="nchw",
            )
            for number, norm in enumerate(("block2.0.bn1", "block3.0.bn1", "bn"), 1)
        )
        initialise(self, zero_linear_bias=True)

    @staticmethod
    def _group(in_channels: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
        rest = (PreActivationBlock(channels, channels, 1) for _ in range(blocks - 1))
        return nn.Sequential(PreActivationBlock(in_channels, channels, stride), *rest)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(B, num_classes)`` logits of ``(B, in_channels, H, W)`` images."""
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        logits: Tensor = self.fc(self.pool(self.relu(self.bn(x))).flatten(1))
        return logits


for _depth, _width in ((16, 1), (16, 2), (40, 1), (40, 2)):
    MODELS.register(f"wrn_{_depth}_{_width}")(partial(WideResNet, depth=_depth, width=_width))

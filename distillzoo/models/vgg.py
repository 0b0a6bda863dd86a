"""VGG networks with batch normalisation for small images (vgg8, vgg11, vgg13, vgg16, vgg19).

Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, arXiv 1409.1556.

The networks of the distillation literature: five blocks of 3x3 convolutions (with bias) of 64, 128, 256, 512 and 512 channels, one
linear layer behind average pooling. The first block is the stem; the other four are the stages, read before they are pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from distillzoo.errors import OptionError
from distillzoo.models.base import MODELS, Network, check_count, initialise
from distillzoo.types import Stage

__all__ = ["VGG"]

_WIDTHS = (64, 128, 256, 512, 512)
_LARGE = (64, 64)  # pixels: the literature pools a fourth time for such images, so that the last block reads 4x4 maps


class VGG(Network):
    """Five blocks of convolution, norm and activation, pooled in between, and one linear layer.

    Args:
        num_classes: Width of the logits, at least 2.
        depths: Convolutions of each of the five blocks.
        in_channels: Channels of the images.
    Raises:
        OptionError: If ``depths`` does not give five numbers, or a number is out of range.
    """

    classifier_path = "classifier"

    def __init__(self, num_classes: int, *, depths: Sequence[int] = (1, 1, 1, 1, 1), in_channels: int = 3) -> None:
        super().__init__(num_classes, in_channels)
        if len(depths) != len(_WIDTHS):
            raise OptionError(
                f"depths must give the convolutions of {len(_WIDTHS)} blocks; got {tuple(depths)}. Pass five numbers."
            )
        channels = in_channels
        for number, (depth, width) in enumerate(zip(depths, _WIDTHS, strict=True)):
            check_count(f"depths[{number}]", depth, 1)
            self.add_module(f"block{number}", self._block(channels, width, depth))
            channels = width
        self.pool = nn.MaxPool2d(2, 2)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        self.stages = tuple(self._stage(number, depths[number]) for number in range(1, len(_WIDTHS)))
        initialise(self, linear_std=0.01, zero_linear_bias=True)

    @staticmethod
    def _block(in_channels: int, channels: int, depth: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for number in range(depth):
            conv = nn.Conv2d(in_channels if number == 0 else channels, channels, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
        return nn.Sequential(*layers)

    @staticmethod
    def _stage(number: int, depth: int) -> Stage:
        conv, norm, relu = (f"block{number}.{3 * depth - 3 + i}" for i in range(3))
        return Stage(f"block{number}", f"{relu}:input", conv, norm, norm, layout="nchw")

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(B, num_classes)`` logits of ``(B, in_channels, H, W)`` images."""
        x = images
        for number in range(len(_WIDTHS)):
            x = getattr(self, f"block{number}")(x)
            if number < 3 or (number == 3 and images.shape[-2:] == _LARGE):
                x = self.pool(x)
        logits: Tensor = self.classifier(self.average(x).flatten(1))
        return logits


_DEPTHS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
for _name, _depths in _DEPTHS.items():
    MODELS.register(f"vgg{_name}")(partial(VGG, depths=_depths))

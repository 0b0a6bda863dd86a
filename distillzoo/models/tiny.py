"""Very small convolutional networks for 8 px images, which train in seconds (tinycnn_8, tinycnn_32)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from distillzoo.models.base import MODELS, Network, check_count, initialise
from distillzoo.types import Stage

__all__ = ["TinyCNN"]


class TinyCNN(Network):
    """Three stages of 3x3 convolution, norm and activation, of widths w, 2w, 4w and strides 1, 2, 2, and one linear layer.

    Args:
        num_classes: Width of the logits, at least 2.
        width: Channels of the first stage.
        depth: Convolutions of each stage.
        in_channels: Channels of the images.
    Raises:
        OptionError: If a number is out of range.
    Example:
        >>> [(stage.path, stage.pre) for stage in TinyCNN(10).stages][:2]
        [('stage1', 'stage1.2:input'), ('stage2', 'stage2.2:input')]
    """

    input_size = (8, 8)

    def __init__(self, num_classes: int, *, width: int = 8, depth: int = 1, in_channels: int = 3) -> None:
        super().__init__(num_classes, in_channels)
        check_count("width", width, 1)
        check_count("depth", depth, 1)
        self.stage1 = self._layers(in_channels, width, 1, depth)
        self.stage2 = self._layers(width, 2 * width, 2, depth)
        self.stage3 = self._layers(2 * width, 4 * width, 2, depth)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        self.stages = tuple(self._stage(number, depth) for number in (1, 2, 3))
        initialise(self)

    @staticmethod
    def _layers(in_channels: int, channels: int, stride: int, depth: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for number in range(depth):
            source, step = (in_channels, stride) if number == 0 else (channels, 1)
            layers += [nn.Conv2d(source, channels, 3, step, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        return nn.Sequential(*layers)

    @staticmethod
    def _stage(number: int, depth: int) -> Stage:
        conv, norm, relu = (f"stage{number}.{3 * depth - 3 + i}" for i in range(3))
        return Stage(f"stage{number}", f"{relu}:input", conv, norm, norm, layout="nchw")

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(B, num_classes)`` logits of ``(B, in_channels, H, W)`` images."""
        x = self.stage3(self.stage2(self.stage1(images)))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


MODELS.register("tinycnn_8")(TinyCNN)
MODELS.register("tinycnn_32")(partial(TinyCNN, width=32, depth=2))

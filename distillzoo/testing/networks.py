"""The small networks and data that the battery runs on: 16 pixels, five classes, a few thousand parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distillzoo.types import DataSpec, Stage

__all__ = ["Pair", "PairMaker", "TinyNet", "TinyTeacher", "odd_pairs", "tiny_data", "tiny_pair"]

Pair = tuple[nn.Module, nn.Module | None]
"""A student and its teacher."""

PairMaker = Callable[[], Pair]
"""Makes a fresh pair; called under a seeded generator, so that every call gives the same weights."""


class _Block(nn.Module):
    """Convolution, norm, activation in place: the hardest case for a tap before the activation."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, channels, H / stride, W / stride)``."""
        out: Tensor = self.act(self.norm(self.conv(x)))
        return out


class TinyNet(nn.Module):
    """A plain convolutional classifier that declares its stages.

    Args:
        widths: Channels of each stage; every stage but the first halves the resolution.
        blocks: Blocks of each stage.
        stem_stride: Stride of the stem.
        num_classes: Width of the logits.
    Example:
        >>> TinyNet((4, 8))(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 5])
    """

    classifier_path = "head"

    def __init__(self, widths: Sequence[int] = (4, 6, 8), *, blocks: int = 1, stem_stride: int = 1, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = _Block(3, widths[0], stem_stride)
        groups = []
        for number, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            group = [_Block(before, width, 2 if number else 1)]
            group += [_Block(width, width, 1) for _ in range(blocks - 1)]
            groups.append(nn.Sequential(*group))
        self.groups = nn.ModuleList(groups)
        self.head = nn.Linear(widths[-1], num_classes)
        last = [f"groups.{number}.{blocks - 1}" for number in range(len(widths))]
        self.stages = tuple(
            Stage(path, f"{path}.norm", f"{path}.conv", f"{path}.norm", f"{path}.norm", width)
            for path, width in zip(last, widths, strict=True)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(B, num_classes)`` of ``(B, 3, H, W)`` images."""
        x: Tensor = self.stem(images)
        for group in self.groups:
            x = group(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class TinyTeacher(TinyNet):
    """A :class:`TinyNet` of another class than the student, and wider, whose norms have seen data.

    Args:
        widths: Channels of each stage.
        blocks: Blocks of each stage.
        stem_stride: Stride of the stem.
        num_classes: Width of the logits.
    """

    def __init__(self, widths: Sequence[int] = (6, 8, 12), *, blocks: int = 1, stem_stride: int = 1, num_classes: int = 5) -> None:
        super().__init__(widths, blocks=blocks, stem_stride=stem_stride, num_classes=num_classes)
        with torch.no_grad():
            self(torch.randn(8, 3, 16, 16))  # running statistics that are not the initial 0 and 1


def tiny_pair() -> Pair:
    """Make the battery's default student and teacher."""
    return TinyNet(), TinyTeacher()


def tiny_data() -> DataSpec:
    """Describe the battery's default data: 12 samples of 16x16 pixels in five classes."""
    return DataSpec(5, (16, 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), num_samples=12, targets=torch.arange(12) % 5)


def odd_pairs() -> dict[str, PairMaker]:
    """Return pairs that differ in one respect each, by what the difference is."""
    return {
        "a wider student": lambda: (TinyNet((8, 12, 16)), TinyTeacher((4, 6, 8))),
        "a wider teacher": lambda: (TinyNet((4, 4, 4)), TinyTeacher((8, 12, 20))),
        "a deeper student": lambda: (TinyNet(blocks=3), TinyTeacher()),
        "a deeper teacher": lambda: (TinyNet(), TinyTeacher(blocks=2)),
        "a student of fewer stages": lambda: (TinyNet((4, 8)), TinyTeacher((4, 6, 8))),
        "a teacher of fewer stages": lambda: (TinyNet((4, 6, 8)), TinyTeacher((4, 8))),
        "a student of half the resolution": lambda: (TinyNet(stem_stride=2), TinyTeacher()),
        "a teacher of half the resolution": lambda: (TinyNet(), TinyTeacher(stem_stride=2)),
    }

"""The small networks and data that the battery runs on: 16 pixels, five classes, a few thousand parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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
        channels: Channels of the images.
    Example:
        >>> TinyNet((4, 8))(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 5])
    """

    classifier_path = "head"

    def __init__(
        self,
        widths: Sequence[int] = (4, 6, 8),
        *,
        blocks: int = 1,
        stem_stride: int = 1,
        num_classes: int = 5,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.stem = _Block(channels, widths[0], stem_stride)
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
        """Return the logits ``(B, num_classes)`` of ``(B, channels, H, W)`` images."""
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
        channels: Channels of the images.
    """

    def __init__(
        self,
        widths: Sequence[int] = (6, 8, 12),
        *,
        blocks: int = 1,
        stem_stride: int = 1,
        num_classes: int = 5,
        channels: int = 3,
    ) -> None:
        super().__init__(widths, blocks=blocks, stem_stride=stem_stride, num_classes=num_classes, channels=channels)
        with torch.no_grad():
            self(torch.randn(8, channels, 16, 16))  # running statistics that are not the initial 0 and 1


def tiny_pair(data: DataSpec | None = None) -> Pair:
    """Make the battery's default student and teacher.

    Args:
        data: Whose classes and channels they have; ``None``: those of :func:`tiny_data`.
    """
    student, teacher = _makers(data or tiny_data())
    return student(), teacher()


def _makers(data: DataSpec) -> tuple[partial[TinyNet], partial[TinyTeacher]]:
    return (
        partial(TinyNet, num_classes=data.num_classes, channels=data.channels),
        partial(TinyTeacher, num_classes=data.num_classes, channels=data.channels),
    )


def tiny_data() -> DataSpec:
    """Describe the battery's default data: 12 samples of 16x16 pixels in five classes."""
    return DataSpec(5, (16, 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), num_samples=12, targets=torch.arange(12) % 5)


def odd_pairs(data: DataSpec) -> dict[str, PairMaker]:
    """Return pairs that differ in one respect each, by what the difference is.

    Args:
        data: Whose classes and channels they have; they take images of any size.
    """
    student, teacher = _makers(data)
    return {
        "a wider student": lambda: (student((8, 12, 16)), teacher((4, 6, 8))),
        "a wider teacher": lambda: (student((4, 4, 4)), teacher((8, 12, 20))),
        "a deeper student": lambda: (student(blocks=3), teacher()),
        "a deeper teacher": lambda: (student(), teacher(blocks=2)),
        "a student of fewer stages": lambda: (student((4, 8)), teacher((4, 6, 8))),
        "a teacher of fewer stages": lambda: (student((4, 6, 8)), teacher((4, 8))),
        "a student of half the resolution": lambda: (student(stem_stride=2), teacher()),
        "a teacher of half the resolution": lambda: (student(), teacher(stem_stride=2)),
    }

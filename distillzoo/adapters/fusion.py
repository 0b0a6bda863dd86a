"""Fusion of a feature map with what deeper levels handed on, by attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo.adapters.connectors import EdgeSafeBatchNorm2d

__all__ = ["AttentionFusion"]


class AttentionFusion(nn.Module):
    """Fuse a map with the one carried from the deeper level, pixel by pixel, and project the result.

    x = norm(1x1(x)); with a carried map y, resized to x: z = sigmoid(1x1([x; y])), x = z_0 x + z_1 y; x is resized to the size
    that is asked for; out = norm(3x3(x)), and x is carried on. Resizing is to the nearest pixel; there is no other activation.

    Args:
        in_channels: Channels of the map.
        mid_channels: Channels of what is carried from level to level.
        out_channels: Channels of the output.
        fuse: Whether there is a carried map (the deepest level has none).
    Example:
        >>> deep, shallow = AttentionFusion(8, 4, 6, fuse=False), AttentionFusion(5, 4, 3, fuse=True)
        >>> out, carried = deep(torch.zeros(2, 8, 1, 1), None, (1, 1))
        >>> [tuple(x.shape) for x in shallow(torch.zeros(2, 5, 4, 4), carried, (8, 8))]
        [(2, 3, 8, 8), (2, 4, 8, 8)]
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, *, fuse: bool) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
        self.reduce_norm = EdgeSafeBatchNorm2d(mid_channels)
        self.attention = nn.Conv2d(2 * mid_channels, 2, 1) if fuse else None
        self.expand = nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False)
        self.expand_norm = EdgeSafeBatchNorm2d(out_channels)
        for conv in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(conv.weight, a=1.0)  # the authors' initialisation

    def forward(self, features: Tensor, carried: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the output and what is carried on.

        Args:
            features: ``(B, in_channels, H, W)``.
            carried: ``(B, mid_channels, h, w)`` from the deeper level; not read by a level that does not fuse.
            size: Height and width of both results.
        Returns:
            ``(B, out_channels, *size)`` and ``(B, mid_channels, *size)``.
        """
        x: Tensor = self.reduce_norm(self.reduce(features))
        if self.attention is not None and carried is not None:
            x = self._fuse(self.attention, x, carried)
        x = _resize(x, size)
        return self.expand_norm(self.expand(x)), x

    @staticmethod
    def _fuse(attention: nn.Conv2d, x: Tensor, carried: Tensor) -> Tensor:
        # A 1x1 convolution of [x; y] is the sum of one of x and one of y, and commutes with resizing: y is small before it.
        own, other = torch.split(attention.weight, x.shape[1], dim=1)
        size = (x.shape[2], x.shape[3])
        scores = F.conv2d(x, own, attention.bias) + _resize(F.conv2d(carried, other), size)
        own_share, other_share = torch.split(torch.sigmoid(scores), 1, dim=1)
        return x * own_share + _resize(carried, size) * other_share


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="nearest")

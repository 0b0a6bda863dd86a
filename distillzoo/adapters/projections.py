"""Linear projections of feature maps onto another number of channels."""

from __future__ import annotations

import math

from torch import Tensor, nn

from distillzoo.adapters.connectors import EdgeSafeBatchNorm2d

__all__ = ["NormedProjection"]


class NormedProjection(nn.Module):
    """A 1x1 convolution without bias and batch norm, no activation: every target is in reach.

    The convolution starts from N(0, sqrt(2 / out_channels)), He's rule over the fan out.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
    Example:
        >>> import torch
        >>> NormedProjection(3, 5)(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 5, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        nn.init.normal_(self.conv.weight, std=math.sqrt(2.0 / out_channels))
        self.norm = EdgeSafeBatchNorm2d(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``."""
        out: Tensor = self.norm(self.conv(features))
        return out

"""Bridges from branch features to the channels of another network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distillzoo.adapters.projections import NormedProjection

__all__ = ["Bridge"]


class Bridge(nn.Module):
    """A 1x1 convolution and affine batch norm, one for all branches or one for each.

    A shared bridge still runs on every branch by itself, so that each is normalised by statistics of its own.

    Args:
        in_channels: Channels of the branches.
        out_channels: Channels to reach.
        bridges: 1 is shared by all branches; else as many as there are branches.
    Example:
        >>> Bridge(3, 5)([torch.zeros(2, 3, 8, 8)] * 4)[0].shape
        torch.Size([2, 5, 8, 8])
    """

    def __init__(self, in_channels: int, out_channels: int, bridges: int = 1) -> None:
        super().__init__()
        self.projections = nn.ModuleList(NormedProjection(in_channels, out_channels) for _ in range(bridges))

    def forward(self, branches: Sequence[Tensor]) -> list[Tensor]:
        """Map as many ``(B, C, H, W)`` as there are branches to as many ``(B, D, H, W)``."""
        count = len(self.projections)
        return [self.projections[number % count](branch) for number, branch in enumerate(branches)]

    def mean(self, features: Tensor) -> Tensor:
        """Map the mean of the branches, ``(B, C, H, W)``, to ``(B, D, H, W)``: the mean over the bridges."""
        return torch.stack([projection(features) for projection in self.projections]).mean(0)

    def scale(self) -> Tensor:
        """Return the channels' scale at the end of every bridge, ``(bridges, D)``, without gradient."""
        norms = [projection.norm for projection in self.projections if isinstance(projection, NormedProjection)]
        return torch.stack([norm.weight for norm in norms]).detach().abs()

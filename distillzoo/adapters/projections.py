"""Linear projections of feature maps onto another number of channels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distillzoo.adapters.connectors import EdgeSafeBatchNorm2d

__all__ = ["NormedProjection"]

_POSITIONS_PER_CHANNEL = 4  # fewer, and statistics by covariance cost more than the norm that they save


class NormedProjection(nn.Module):
    """A 1x1 convolution without bias and batch norm, no activation: every target is in reach.

    In training the statistics of the convolution's output follow from mean and covariance of its input, m = W mu and
    v = diag(W S W'), and norm and convolution are one matrix product: the wide map before the norm, which the two passes of
    a norm would read and keep for the backward, is never made. Values, gradients and running statistics are those of the two
    modules one after the other, up to rounding. So it is where the input is laid out with channels last; elsewhere the two
    modules run one after the other.

    The convolution starts from N(0, sqrt(2 / out_channels)), He's rule over the fan out.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
    Example:
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
        if self._joint_pays(features):
            return self._joint(features)
        out: Tensor = self.norm(self.conv(features))
        return out

    def _joint_pays(self, features: Tensor) -> bool:
        norm, conv = self.norm, self.conv
        if not norm.training or type(norm) is not EdgeSafeBatchNorm2d or norm.momentum is None or not norm.track_running_stats:
            return False  # nothing to measure, or another norm was put in its place: one that synchronises processes
        if conv.in_channels > conv.out_channels or not features.is_contiguous(memory_format=torch.channels_last):
            return False
        return features.numel() >= _POSITIONS_PER_CHANNEL * conv.in_channels**2

    def _joint(self, features: Tensor) -> Tensor:
        batch, channels, height, width = features.shape
        rows = features.permute(0, 2, 3, 1).reshape(-1, channels)
        weight = self.conv.weight.flatten(1)
        out, mean, variance = _ProjectAndNorm.apply(rows, weight, self.norm.weight, self.norm.bias, self.norm.eps)
        self._track(mean, variance, len(rows))
        result: Tensor = out.view(batch, height, width, -1).permute(0, 3, 1, 2)
        return result

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the norm's running statistics as the norm does: the unbiased variance."""
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        assert norm.momentum is not None
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_(variance.to(norm.running_var.dtype) * (count / (count - 1)), norm.momentum)
        norm.num_batches_tracked.add_(1)


class _ProjectAndNorm(torch.autograd.Function):
    """gamma (W x - m) / sqrt(v + eps) + beta over the rows x, with m and v the mean and variance of W x over all rows.

    Returns the rows, m and v. With c the centred rows, S = c'c / n and s = gamma / sqrt(v + eps) the result is c (s W)' + beta.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean = rows.mean(0)
        centred = rows - mean
        projected = weight @ (centred.t() @ centred / len(rows))
        variance = (projected * weight).sum(1).clamp_min(0.0)  # rounding may go below
        inverse = torch.rsqrt(variance + eps)
        out = torch.addmm(beta, centred, (weight * (gamma * inverse).unsqueeze(1)).t())
        mean = weight @ mean
        ctx.save_for_backward(centred, weight, projected, gamma, inverse)
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        centred, weight, projected, gamma, inverse = ctx.saved_tensors
        scale = (gamma * inverse).unsqueeze(1)
        total, inner = grad.sum(0), grad.t() @ centred
        along = (inner * weight).sum(1)  # by s
        slope = (-gamma * along * inverse**3).unsqueeze(1)  # by v, twice
        grad_rows = torch.addmm(-(total @ (scale * weight)) / len(grad), grad, scale * weight)
        grad_rows.addmm_(centred, weight.t() @ (slope * weight) / len(grad))
        return grad_rows, scale * inner + slope * projected, along * inverse, total, None

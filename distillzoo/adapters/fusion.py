"""Fusion of a feature map with what deeper levels handed on, by attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from distillzoo.adapters.connectors import EdgeSafeBatchNorm2d
from distillzoo.adapters.projections import NormedProjection

__all__ = ["AttentionFusion"]

_CHUNK_CPU = 1 << 21  # elements of the backward's temporaries on a CPU, which stay in its cache


class AttentionFusion(nn.Module):
    """Fuse a map with the one carried from the deeper level, pixel by pixel, and project the result.

    x = norm(1x1(x)); with a carried map y, resized to x: z = sigmoid(1x1([x; y])), x = z_0 x + z_1 y; x is resized to the size
    that is asked for; out = norm(3x3(x)), and x is carried on. Resizing is to the nearest pixel; there is no other activation.
    Inside, maps are laid out with channels last (a third less time on a CPU), and doubled ones are never made.

    Args:
        in_channels: Channels of the map.
        mid_channels: Channels of what is carried from level to level.
        out_channels: Channels of the output.
        fuse: Whether there is a carried map (the deepest level has none).
    Example:
        >>> deep, shallow = AttentionFusion(8, 4, 6, fuse=False), AttentionFusion(5, 4, 3, fuse=True)
        >>> out, carried = deep(torch.zeros(2, 8, 1, 1), None, (1, 1))
        >>> [tuple(x.shape) for x in shallow(torch.zeros(2, 5, 4, 4), carried, (4, 4))]
        [(2, 3, 4, 4), (2, 4, 4, 4)]
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, *, fuse: bool) -> None:
        super().__init__()
        self.reduce = NormedProjection(in_channels, mid_channels)
        self.attention = nn.Conv2d(2 * mid_channels, 2, 1) if fuse else None
        self.expand = nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False)
        self.norm = EdgeSafeBatchNorm2d(out_channels)
        for conv in (self.reduce.conv, self.expand):
            nn.init.kaiming_uniform_(conv.weight, a=1.0)  # the authors' initialisation

    def forward(self, features: Tensor, carried: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the output and what is carried on.

        Args:
            features: ``(B, in_channels, H, W)``.
            carried: ``(B, mid_channels, h, w)`` from the deeper level; not read by a level that does not fuse.
            size: Height and width of the output.
        Returns:
            ``(B, out_channels, *size)``; and ``(B, mid_channels, *size)``, or half of that size where ``size`` doubles the map,
            which resizing to any third size cannot tell from it.
        """
        x: Tensor = self.reduce(features.contiguous(memory_format=torch.channels_last))
        if self.attention is not None and carried is not None:
            x = _fuse(self.attention, x, carried)
        if size == (2 * x.shape[2], 2 * x.shape[3]):
            return self.norm(_convolve_doubled(x, self.expand.weight)), x
        x = _resize(x, size)
        return self.norm(self.expand(x)), x


def _fuse(attention: nn.Conv2d, x: Tensor, carried: Tensor) -> Tensor:
    # A 1x1 convolution of [x; y] is the sum of one of x and one of y, and commutes with resizing: y is small before it.
    own, other = torch.split(attention.weight, x.shape[1], dim=1)
    size = (x.shape[2], x.shape[3])
    scores = F.conv2d(x, own, attention.bias) + _resize(F.conv2d(carried, other), size)
    if size[0] % carried.shape[2] or size[1] % carried.shape[3]:
        carried = _resize(carried, size)
    mixed: Tensor = _Mix.apply(x, carried, torch.sigmoid(scores))
    return mixed


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="nearest")


def _convolve_doubled(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve a map of doubled height and width with a 3x3 kernel, padded by one, from the map before doubling.

    Of the three rows that an even row's kernel covers two are the same pixel's, and so are two of an odd row's: each of the four
    kinds of pixel sees 2x2 pixels of the small map, with the weights of equal pixels summed: four products instead of nine.
    """
    height, width = x.shape[2:]
    kernels = torch.stack([both for one in _halves(weight, 2) for both in _halves(one, 3)])
    small = F.conv2d(x, kernels.flatten(0, 1).contiguous(memory_format=torch.channels_last), padding=1)
    small = small.view(len(x), 4, len(weight), height + 1, width + 1)
    rows = [
        torch.stack([small[:, 2 * odd + side, :, odd : odd + height, side : side + width] for side in (0, 1)], dim=-1).flatten(-2)
        for odd in (0, 1)
    ]
    return torch.stack(rows, dim=3).flatten(2, 3)


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What a kernel of three is to the small map, for even and for odd rows.

    Rows 2h - 1, 2h, 2h + 1 are h - 1, h, h of the small map; rows 2h, 2h + 1, 2h + 2 are h, h, h + 1.
    """
    before, own, after = torch.unbind(weight, dim)
    return torch.stack([before, own + after], dim), torch.stack([before + own, after], dim)


class _Mix(torch.autograd.Function):
    """``z_0 x + z_1 y`` with y repeated to the size of x, without ever making the repeated map or a product of that size.

    These maps are the largest of all: as plain operations they cost more than the convolution that reads them, and half as much
    memory again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, shares)
        mixed = x * shares[:, :1]
        _blocks(mixed, y).addcmul_(y[:, :, :, None, :, None], _blocks(shares[:, 1:], y))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, y, shares = ctx.saved_tensors
        factors = (x.shape[2] // y.shape[2], x.shape[3] // y.shape[3])
        rows = max(_CHUNK_CPU // x[0].numel(), 1) if x.device.type == "cpu" else len(x)
        grad_x, grad_y, grad_shares = torch.empty_like(x), torch.empty_like(y), torch.empty_like(shares)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            own, deep, share = grad[part], y[part], shares[part]
            grad_x[part] = own * share[:, :1]
            grad_shares[part, 0] = (own * x[part]).sum(1)
            grad_shares[part, 1] = (_blocks(own, deep) * deep[:, :, :, None, :, None]).sum(1).flatten(3).flatten(1, 2)
            grad_y[part] = F.avg_pool2d(own * share[:, 1:], factors, divisor_override=1)
        return grad_x, grad_y, grad_shares


def _blocks(x: Tensor, y: Tensor) -> Tensor:
    """View ``(B, C, H, W)`` as ``(B, C, h, H / h, w, W / w)``, the pixels of x that one pixel of ``y`` is repeated to."""
    height, width = y.shape[2:]
    return x.view(len(x), -1, height, x.shape[2] // height, width, x.shape[3] // width)

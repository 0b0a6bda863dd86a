"""Bring two tensors together: into one precision, onto one spatial size, to unit length, to one softened distribution of classes;
and regressors from map to map.

Nothing here knows a student or a teacher, only tensors and sizes ``(C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo.errors import ShapeError

__all__ = [
    "ConvRegressor",
    "EdgeSafeBatchNorm2d",
    "PointwiseRegressor",
    "full_precision",
    "pool_larger",
    "softened_divergence",
    "unit_rows",
]

_HALF = (torch.float16, torch.bfloat16)
_LARGEST_KERNEL = 7  # a valid convolution from 32 to 4 pixels would need 29x29


def full_precision(x: Tensor) -> Tensor:
    """Return half types as float32 and every other type as it is: squares and Gram matrices overflow or drown in 16 bits.

    Example:
        >>> full_precision(torch.zeros(2, dtype=torch.bfloat16)).dtype, full_precision(torch.zeros(2, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return x.float() if x.dtype in _HALF else x


def pool_larger(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool whichever of two maps is larger to the height and width of the other.

    Args:
        first: ``(B, C, H, W)``.
        second: ``(B, D, G, V)``.
    Returns:
        Both maps, of height ``min(H, G)`` and width ``min(W, V)``; a map of that size is returned as it is.
    Example:
        >>> [tuple(x.shape) for x in pool_larger(torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, 4, 4))]
        [(2, 3, 4, 4), (2, 5, 4, 4)]
    """
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    return _pool(first, size), _pool(second, size)


def _pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool where a map is larger, interpolate where it is smaller."""
    x = _pool(x, (min(x.shape[2], size[0]), min(x.shape[3], size[1])))
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def unit_rows(x: Tensor, *, floor: float | Tensor = 1e-12, added: float = 0.0) -> Tensor:
    """Divide every row by its Euclidean norm: ``x / (max(norm, floor) + added)``.

    A row whose norm does not exceed the floor is a constant: the true slope there, one over the floor, would wreck a run for
    the sake of a sample that has no direction.

    Args:
        x: ``(B, D)``.
        floor: Smallest norm to divide by, > 0.
        added: What is added to the norm.
    Returns:
        ``(B, D)``.
    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    smallest = floor if isinstance(floor, Tensor) else x.new_full((), floor)
    unit = x / (torch.maximum(norm, smallest) + added)
    return torch.where(norm > smallest, unit, unit.detach())


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 (1/B) sum_b KL(p^t || p^s), p = softmax(z / T): the sum over classes, the mean over the batch, a scalar.

    Args:
        student: Logits, ``(B, C)``.
        teacher: Logits, ``(B, C)``, -inf among them or not; no gradient flows into it.
        temperature: T, > 0.
    """
    log_student = F.log_softmax(full_precision(student) / temperature, dim=1)
    probabilities = F.softmax(full_precision(teacher.detach()) / temperature, dim=1)  # a zero contributes nothing
    return F.kl_div(log_student, probabilities, reduction="batchmean") * temperature**2


class EdgeSafeBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that uses its running statistics where a batch holds one value a channel, which has no variance."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Map ``(B, C, H, W)`` to the same shape."""
        if self.training and input.numel() == self.num_features:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(input)


class ConvRegressor(nn.Module):
    """One convolution from a map of one size to a map of another, batch norm, and a ReLU where the target has no negative values.

    The convolution follows the sizes (classic FitNet code, RepDistiller's and mdistiller's ConvReg): half the size is a 3x3 of
    stride 2, twice the size a transposed 4x4 of stride 2, a little smaller an unpadded convolution whose kernel makes up the
    difference (1x1 at equal size). Where that kernel would exceed 7, and where the references give up, a 1x1 convolution and
    average pooling (to smaller) or bilinear interpolation (to larger) do it. So do they for maps of another size than these, as
    images of another size give: the same convolution, and what it leaves is resized.

    Args:
        source: ``(C, H, W)`` of the input.
        target: ``(C, H, W)`` of the output.
        rectify: Whether a ReLU comes last.
    Raises:
        ShapeError: If a size is not ``(C, H, W)``.
    Example:
        >>> ConvRegressor((16, 8, 8), (32, 16, 16), rectify=True)(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 32, 16, 16])
    """

    def __init__(self, source: Sequence[int], target: Sequence[int], *, rectify: bool) -> None:
        super().__init__()
        for size in (source, target):
            if len(size) != 3:
                raise ShapeError(f"ConvRegressor maps (C, H, W) to (C, H, W); got the size {tuple(size)}; give it a feature map.")
        channels, height, width = source
        out_channels, *goal = target
        kernel = (1 + height - goal[0], 1 + width - goal[1])
        self.conv: nn.Conv2d | nn.ConvTranspose2d
        self.size = (goal[0], goal[1])
        self.resizes = False  # whether the convolution leaves the size to pooling and interpolation
        self.smallest = (1, 1)  # map that the convolution can take
        if (height, width) == (2 * goal[0], 2 * goal[1]):
            self.conv = nn.Conv2d(channels, out_channels, 3, 2, 1)
        elif (2 * height, 2 * width) == (goal[0], goal[1]):
            self.conv = nn.ConvTranspose2d(channels, out_channels, 4, 2, 1)
        elif min(kernel) >= 1 and max(kernel) <= _LARGEST_KERNEL:
            self.conv = nn.Conv2d(channels, out_channels, kernel)
            self.smallest = kernel
        else:
            self.conv = nn.Conv2d(channels, out_channels, 1)
            self.resizes = True
        self.norm = EdgeSafeBatchNorm2d(out_channels)
        self.activation: nn.Module = nn.ReLU() if rectify else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, D, *size)``; ``None`` is the height and width of ``target``."""
        size = self.size if size is None else size
        if self.resizes:
            x = _pool(x, (min(x.shape[2], size[0]), min(x.shape[3], size[1])))
        x = _resize(x, (max(x.shape[2], self.smallest[0]), max(x.shape[3], self.smallest[1])))
        x = _resize(self.conv(x), size)
        out: Tensor = self.activation(self.norm(x))
        return out


class PointwiseRegressor(nn.Sequential):
    """Three 1x1 convolutions without bias or norm, ReLU between them, none after the last: every target is in reach.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output and of the two hidden maps.
    Example:
        >>> PointwiseRegressor(3, 5)(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 5, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 1, bias=False),
        )

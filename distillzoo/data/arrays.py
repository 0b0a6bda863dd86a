"""Images as arrays: a split held in memory, crops and flips of a whole batch at once, normalisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distillzoo.errors import DataError, OptionError
from distillzoo.kinds import is_whole

__all__ = ["Augment", "Split", "crop_flip", "normalise"]


@dataclass(frozen=True)
class Augment:
    """How training images are varied: pad with zeros, crop back to the old size at a random place, flip at random.

    Args:
        pad: Zero pixels added on every side before the crop, at least 0.
        flip: Whether half of the images are mirrored left to right.
    Raises:
        OptionError: If ``pad`` is not a whole number of pixels.
    """

    pad: int
    flip: bool

    def __post_init__(self) -> None:
        if not is_whole(self.pad, 0):
            raise OptionError(f"Augment.pad must be a whole number of pixels, at least 0; got {self.pad!r}; use 0 for no crop.")


@dataclass(frozen=True, eq=False)
class Split:
    """The images and labels of one split, in memory.

    Args:
        images: ``(N, H, W, C)`` uint8; any strides (planes in memory are read without a copy).
        targets: ``(N,)`` int64 labels.
    Raises:
        DataError: If shapes, types or lengths do not fit together, or there is no image.
    """

    images: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise DataError(
                f"Images must be one (N, H, W, C) uint8 tensor; got {tuple(self.images.shape)} {self.images.dtype}; "
                "convert them to 0..255 and put the channels last."
            )
        if self.targets.shape != self.images.shape[:1] or self.targets.dtype != torch.int64:
            raise DataError(
                f"Targets must be ({len(self.images)},) int64, one label an image; got {tuple(self.targets.shape)} "
                f"{self.targets.dtype}; pass class numbers as torch.int64."
            )
        if not len(self.images):
            raise DataError("A split needs at least one image; got none; check how the split was made.")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def planes(self) -> Tensor:
        """The images as contiguous ``(N, C, H, W)``, copied only if they lie otherwise in memory."""
        return self.images.permute(0, 3, 1, 2).contiguous()

    def take(self, rows: Tensor) -> Split:
        """Return the split of the given rows, in their order.

        Args:
            rows: ``(M,)`` int64 positions.
        """
        planes = self.images.permute(0, 3, 1, 2).index_select(0, rows)
        return Split(planes.permute(0, 2, 3, 1), self.targets.index_select(0, rows))

    def to(self, device: torch.device) -> Split:
        """Return the split on a device; itself where it is there already."""
        if self.images.device == device:
            return self
        return Split(self.images.to(device), self.targets.to(device))


def crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor | None, pad: int) -> Tensor:
    """Pad every image with zeros, cut its own window of the old size out, and mirror some of the windows.

    The windows of all images are one strided view of the padded batch, so a single ``index_select`` cuts them all: no host
    synchronisation, no loop, and rows are copied whole. Mirrored images lie in the same buffer beside the others; mirroring
    before the crop means counting the window from the other side.

    Args:
        images: ``(B, C, H, W)`` uint8.
        top: ``(B,)`` int64 first row of each window in the padded image, 0 .. ``2 * pad``.
        left: ``(B,)`` int64 first column, 0 .. ``2 * pad``.
        flip: ``(B,)`` int64, 1 where the window is mirrored; ``None`` mirrors none.
        pad: Zero pixels on every side.
    Returns:
        ``(B, C, H, W)`` uint8, contiguous.
    """
    batch, channels, height, width = images.shape
    sides = 1 if flip is None else 2
    buffer = images.new_zeros((batch, sides, channels, height + 2 * pad, width + 2 * pad))
    inner = buffer[..., pad : pad + height, pad : pad + width]
    inner[:, 0] = images
    start = torch.arange(batch, device=images.device) * buffer.stride(0) + top * buffer.stride(3)
    if flip is None:
        start = start + left
    else:
        inner[:, 1] = images.flip(-1)
        start = start + torch.where(flip.bool(), buffer.stride(1) + 2 * pad - left, left)
    strides = buffer.stride()[2:]
    extent = sum((size - 1) * stride for size, stride in zip((channels, height, width), strides, strict=True))
    windows = buffer.as_strided((buffer.numel() - extent, channels, height, width), (1, *strides))
    return windows.index_select(0, start)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Scale uint8 images to 0..1, subtract the mean and divide by the standard deviation.

    The three operations stay apart, in this order: so every value equals that of the usual per-image transforms to the last bit.

    Args:
        images: ``(B, C, H, W)`` uint8.
        mean: ``(C, 1, 1)`` float32.
        std: ``(C, 1, 1)`` float32.
    Returns:
        ``(B, C, H, W)`` float32.
    """
    return images.to(torch.float32).div_(255).sub_(mean).div_(std)

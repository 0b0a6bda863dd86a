"""Random resized crops: where they lie, and cutting and shrinking them for a whole batch with antialiasing.

Windows are drawn from :mod:`distillzoo.streams`, so the view of an image is a pure function of (seed, phase, epoch, position of the
image). The resampling is that of Pillow's antialiased bilinear resize: a triangle filter as wide as the reduction, two passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distillzoo.errors import OptionError
from distillzoo.kinds import is_whole
from distillzoo.streams import Stream

__all__ = ["CropViews", "centre_box", "make_views", "resize_each", "resize_windows"]

_TRIES = 10  # as torchvision's RandomResizedCrop, which then takes the middle
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class CropViews:
    """How photographs become square images; its ``repr`` goes into records.

    Training: a random part of the image, resized to ``crop``, half of them mirrored. Evaluation: the short side resized to
    ``resize``, then the middle cut out.

    Args:
        crop: Height and width of the images in pixels.
        resize: Short side, in pixels, that evaluation images are resized to before the middle is cut out.
        scale: Least and greatest share of the image's area that a training crop covers.
        ratio: Least and greatest width over height of a training crop before it is resized.
        flip: Whether half of the training images are mirrored left to right.
        mean: Mean of each channel that is subtracted from images scaled to 0..1.
        std: Standard deviation of each channel that they are divided by.
        source: What the crops are cut from: part of the protocol.
    Raises:
        OptionError: If a number is out of range.
    """

    crop: int = 224
    resize: int = 256
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    source: str = "image files"

    def __post_init__(self) -> None:
        for name in ("crop", "resize"):
            value = getattr(self, name)
            if not is_whole(value, 1):
                raise OptionError(f"{name} must be a whole number of pixels, at least 1; got {value!r}; choose one, such as 224.")
        if self.resize < self.crop:
            raise OptionError(
                f"resize must be at least crop, so that the middle can be cut out of an evaluation image; got resize={self.resize} "
                f"and crop={self.crop}; enlarge resize or reduce crop."
            )
        for name, (low, high), most in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if not 0 < low <= high <= most:
                raise OptionError(f"{name} must be two rising numbers above 0{' and at most 1' * (most == 1)}; got {(low, high)}.")
        for name in ("mean", "std"):  # numbers of a YAML list come as they like; records want them alike
            given = getattr(self, name)
            values = _floats(given)
            if len(values) != 3 or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
                raise OptionError(
                    f"{name} must be 3 numbers, one a channel{', above 0' * (name == 'std')}, as (0.5, 0.5, 0.5); got {given!r}."
                )
            object.__setattr__(self, name, values)

    def draw(self, seed: int, view: str, phase: str, epoch: int, index: Tensor, sizes: Tensor) -> Tensor:
        """Draw the window of every image's view.

        Ten windows are tried for each image: the area uniform in ``scale``, the logarithm of the width over the height uniform in
        ``ratio``; the first that fits is placed at random. If none fits it is the middle, as near to ``ratio`` as the image allows.

        Args:
            seed: Seed of the views.
            view: ``"first"`` or ``"second"``.
            phase: Name of the phase.
            epoch: Epoch of the phase.
            index: ``(B,)`` int64 positions in the training set.
            sizes: ``(B, 2)`` int64 heights and widths of those images.
        Returns:
            ``(B, 5)`` int64: top, left, height, width, and 1 where the window is mirrored.
        """

        def stream(what: str) -> Stream:
            return Stream.named(seed, "views", view, what, phase)

        tries = index.view(-1, 1) * _TRIES + torch.arange(_TRIES)
        share = stream("area").uniform(epoch, tries).double() * (self.scale[1] - self.scale[0]) + self.scale[0]
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = (stream("aspect").uniform(epoch, tries).double() * (high - low) + low).exp()
        whole = sizes.double()
        area = share * whole.prod(1, keepdim=True)
        windows = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], 2).round().long()  # (B, tries, height and width)
        fits = ((windows >= 1) & (windows <= sizes.unsqueeze(1))).all(2)
        first = fits.to(torch.uint8).argmax(1)
        chosen = windows[torch.arange(len(index)), first]
        found = fits.any(1, keepdim=True)
        height, width = torch.where(found, chosen, self._middle(sizes)).unbind(1)
        top = stream("top").integers(epoch, index, sizes[:, 0] - height + 1)
        left = stream("left").integers(epoch, index, sizes[:, 1] - width + 1)
        found = found.squeeze(1)
        top = torch.where(found, top, (sizes[:, 0] - height) // 2)
        left = torch.where(found, left, (sizes[:, 1] - width) // 2)
        flip = stream("flip").integers(epoch, index, 2) if self.flip else torch.zeros_like(index)
        return torch.stack([top, left, height, width, flip], 1)

    def _middle(self, sizes: Tensor) -> Tensor:
        """Return heights and widths of the largest windows whose shape is within ``ratio``."""
        height, width = sizes.unbind(1)
        narrow = width.double() < self.ratio[0] * height.double()
        wide = width.double() > self.ratio[1] * height.double()
        cut_height = (width.double() / self.ratio[0]).round().long()
        cut_width = (height.double() * self.ratio[1]).round().long()
        return torch.stack([torch.where(narrow, cut_height, height), torch.where(wide, cut_width, width)], 1)


def _floats(values: Any) -> tuple[float, ...]:
    """Return numbers as floats; of anything else nothing."""
    try:
        return () if isinstance(values, str) else tuple(float(value) for value in values)
    except (TypeError, ValueError):
        return ()


def make_views(
    crop: int, resize: int | None, mean: Sequence[float] | None, std: Sequence[float] | None, source: str = "image files"
) -> CropViews:
    """Return how images are cropped, with defaults in place of what is ``None``.

    Args:
        crop: Height and width of the images in pixels.
        resize: Short side of evaluation images in pixels; ``None`` is 8/7 of ``crop``.
        mean: Mean of each channel; ``None`` is ImageNet's.
        std: Standard deviation of each channel; ``None`` is ImageNet's.
        source: What crops are cut from.
    Raises:
        OptionError: If a number is out of range.
    """
    if resize is None:
        resize = round(crop * 8 / 7) if isinstance(crop, int) else crop
    views = CropViews(crop=crop, resize=resize, source=source)
    given: dict[str, Any] = {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
    return replace(views, **given)


def centre_box(height: int, width: int, crop: int) -> tuple[int, int]:
    """Return the top and left of the middle ``crop`` x ``crop`` pixels, rounded as torchvision rounds.

    Args:
        height: Height of the image in pixels, at least ``crop``.
        width: Width of the image in pixels, at least ``crop``.
        crop: Height and width of the window in pixels.
    """
    return round((height - crop) / 2.0), round((width - crop) / 2.0)


def resize_each(windows: Sequence[Tensor], flips: Sequence[int], size: int) -> Tensor:
    """Resize windows one by one by torch's own 8-bit kernel: the fast way on a CPU.

    Args:
        windows: ``(h, w, 3)`` uint8 each, of any size.
        flips: 1 where a window is mirrored.
        size: Height and width of the result in pixels.
    Returns:
        ``(B, 3, size, size)`` uint8.
    """
    result = torch.empty((len(windows), 3, size, size), dtype=torch.uint8)
    for row, (window, flip) in enumerate(zip(windows, flips, strict=True)):
        planes = window.permute(2, 0, 1).unsqueeze(0)
        resized = F.interpolate(planes, (size, size), mode="bilinear", align_corners=False, antialias=True)[0]
        result[row] = resized.flip(-1) if flip else resized
    return result


def resize_windows(windows: Tensor, heights: Tensor, widths: Tensor, flips: Tensor, size: int) -> Tensor:
    """Resize windows of different sizes all at once, as two batched matrix products: the fast way on a GPU.

    Args:
        windows: ``(B, H, W, 3)`` uint8; each window lies at the top left, what is beyond it is not read.
        heights: ``(B,)`` int64 height of each window, at most H.
        widths: ``(B,)`` int64 width of each window, at most W.
        flips: ``(B,)`` int64, 1 where a window is mirrored.
        size: Height and width of the result in pixels.
    Returns:
        ``(B, 3, size, size)`` uint8.
    """
    batch, height, width, channels = windows.shape
    down = _filters(heights, height, size)
    across = _filters(widths, width, size)
    across = torch.where(flips.bool().view(-1, 1, 1), across.flip(1), across)
    rows = torch.bmm(down, windows.view(batch, height, width * channels).to(torch.float32))
    rows = rows.view(batch, size, width, channels).permute(0, 3, 1, 2)  # (B, 3, size, W)
    images = torch.matmul(rows, across.transpose(1, 2).unsqueeze(1))
    return images.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _filters(lengths: Tensor, extent: int, size: int) -> Tensor:
    """Return ``(B, size, extent)`` float32: the weight of every source pixel in every resized one; each row sums to 1."""
    scale = (lengths.to(torch.float32) / size).view(-1, 1, 1)
    centres = (torch.arange(size, device=lengths.device, dtype=torch.float32).view(1, -1, 1) + 0.5) * scale
    pixels = torch.arange(extent, device=lengths.device, dtype=torch.float32).view(1, 1, -1)
    weights = (1 - (pixels + 0.5 - centres).abs() / scale.clamp_min(1)).clamp_min(0)
    weights = weights * (pixels < lengths.view(-1, 1, 1))
    return weights / weights.sum(2, keepdim=True)

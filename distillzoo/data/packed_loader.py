"""Packed images and their loader: windows of a memory-mapped file, resized for a whole batch on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distillzoo.data.crops import CropViews, centre_box, resize_each, resize_windows
from distillzoo.data.view_loader import Plan, ViewLoader
from distillzoo.types import DataSpec

__all__ = ["PackedImages", "PackedLoader"]


@dataclass(frozen=True, eq=False)
class PackedImages:
    """Images of different sizes, one after the other in one tensor.

    Args:
        pixels: ``(bytes,)`` uint8, memory-mapped or on a device; an image is (height, width, 3).
        offsets: ``(N,)`` int64: where each image starts.
        sizes: ``(N, 2)`` int64 heights and widths in pixels.
        targets: ``(N,)`` int64 labels.
        identity: Digest of the file, and of which of its images these are.
    """

    pixels: Tensor
    offsets: Tensor
    sizes: Tensor
    targets: Tensor
    identity: str

    def __len__(self) -> int:
        return len(self.offsets)

    def take(self, rows: Tensor) -> PackedImages:
        """Return the images of the given rows, in their order; pixels are shared.

        Args:
            rows: ``(M,)`` int64 positions.
        """
        identity = hashlib.sha256(self.identity.encode() + rows.numpy().tobytes()).hexdigest()
        return PackedImages(self.pixels, self.offsets[rows], self.sizes[rows], self.targets[rows], identity)

    def choose(self, present: Sequence[str], wanted: Sequence[str]) -> PackedImages:
        """Return the images of some classes, class by class in the order in which they are wanted, which gives the labels.

        Args:
            present: Names of the classes, by label.
            wanted: Names of the classes to keep, all of them present.
        """
        if tuple(present) == tuple(wanted):
            return self
        places = {name: label for label, name in enumerate(wanted)}
        labels = torch.tensor([places.get(name, len(wanted)) for name in present])[self.targets]
        rows = labels.argsort(stable=True)[: int((labels < len(wanted)).sum())]
        return replace(self.take(rows), targets=labels[rows])

    def window(self, row: int, top: int, left: int, height: int, width: int) -> Tensor:
        """Return the ``(height, width, 3)`` uint8 window of an image, without a copy.

        Args:
            row: Which image.
            top: First row of the window.
            left: First column.
            height: Height in pixels.
            width: Width in pixels.
        """
        stride = 3 * int(self.sizes[row, 1])
        start = int(self.offsets[row]) + top * stride + 3 * left
        return self.pixels.as_strided((height, width, 3), (stride, 3, 1), start)

    def windows(self, rows: Tensor, boxes: Tensor) -> Tensor:
        """Return the windows of several images in one tensor of their largest height and width.

        Rows of bytes are copied whole by one ``index_select`` where the pixels lie; what is beyond a window is other pixels.

        Args:
            rows: ``(B,)`` int64 positions, on the CPU.
            boxes: ``(B, 4)`` int64 top, left, height and width, on the CPU.
        Returns:
            ``(B, H, W, 3)`` uint8.
        """
        top, left, height, width = boxes.unbind(1)
        high, wide = int(height.max()), 3 * int(width.max())
        stride = 3 * self.sizes[rows, 1]
        lines = torch.arange(high).clamp_max(height.view(-1, 1) - 1)  # below a window its last row is repeated
        starts = (self.offsets[rows] + top * stride + 3 * left).view(-1, 1) + lines * stride.view(-1, 1)
        every = self.pixels.as_strided((self.pixels.numel() - wide + 1, wide), (1, 1))
        return every.index_select(0, starts.flatten().to(self.pixels.device)).view(len(rows), high, wide // 3, 3)


class PackedLoader(ViewLoader):
    """Batches of packed images.

    On a CPU every window is resized by torch's 8-bit kernel; elsewhere all windows of a batch are resized by two matrix products
    on the device, from pixels that lie there if they fit, and else are sent as cut out. The two differ by rounding.

    Args:
        images: The images.
        spec: What a distiller may know about the data.
        views: How images are cropped.
        batch_size: Images in a batch, at least 1.
        seed: Seed of order and views; ``None`` evaluates: in order, the middle of every image.
        device: Where batches are wanted.
        channels_last: Whether images are laid out with the channels last in memory.
    Raises:
        OptionError: If the batch size or the seed is out of range.
    """

    def __init__(
        self,
        images: PackedImages,
        spec: DataSpec,
        views: CropViews,
        *,
        batch_size: int,
        seed: int | None,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> None:
        super().__init__(
            spec, images.targets, images.sizes, views, batch_size=batch_size, seed=seed, device=device, channels_last=channels_last
        )
        self._images = images

    def _pixels(self, parts: list[Plan]) -> Iterator[tuple[Tensor, ...]]:
        for part in parts:
            if not part.windows:
                yield (self._middles(part.rows),)
            elif self._device.type == "cpu":
                yield tuple(self._one_by_one(part.rows, windows) for windows in part.windows)
            else:
                yield tuple(self._all_at_once(part.rows, windows) for windows in part.windows)

    def _middles(self, rows: Tensor) -> Tensor:
        crop = self._views.crop
        places = [(*centre_box(height, width, crop), crop, crop) for height, width in self._sizes[rows].tolist()]
        return self._images.windows(rows, torch.tensor(places)).permute(0, 3, 1, 2)

    def _one_by_one(self, rows: Tensor, windows: Tensor) -> Tensor:
        cut = [self._images.window(row, *place[:4]) for row, place in zip(rows.tolist(), windows.tolist(), strict=True)]
        return resize_each(cut, windows[:, 4].tolist(), self._views.crop)

    def _all_at_once(self, rows: Tensor, windows: Tensor) -> Tensor:
        cut = self._images.windows(rows, windows[:, :4]).to(self._device, non_blocking=True)
        height, width, flip = windows[:, 2:].to(self._device, non_blocking=True).unbind(1)
        return resize_windows(cut, height, width, flip, self._views.crop)

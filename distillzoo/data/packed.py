"""Packed images: read from a memory-mapped file, cropped and resized for a whole batch on the device.

Crops are cut from images that were resized once already, so training is another protocol than that of image files, and says so in
its name, caption and record. Evaluation images are those of image files to the last bit, where ``resize`` is the packed short side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from distillzoo.data.base import DATASETS, SplitName
from distillzoo.data.crops import CropViews, centre_box, resize_each, resize_windows
from distillzoo.data.folder import make_views
from distillzoo.data.packing import PackedPart, file_sha256, read_index
from distillzoo.data.tree import hold_out_rows
from distillzoo.data.view_loader import Plan, ViewLoader
from distillzoo.errors import DataError, OptionError
from distillzoo.types import DataSpec

__all__ = ["PackedDataSet", "PackedImages", "PackedLoader", "packed"]

_RESIDENT_SHARE = 0.5  # of the device's free memory that images may take


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


@dataclass(frozen=True, eq=False)
class PackedDataSet:
    """Images that were decoded once; it follows :class:`distillzoo.data.DataSet`.

    Args:
        name: Registered name.
        title: Name as it is written in captions.
        split: What networks are evaluated on.
        class_names: Names of the classes, by label.
        augment: How images are cropped, for training and evaluation, and from what.
        train: The training subset.
        evaluation: The images of the split.
    """

    name: str
    title: str
    split: SplitName
    class_names: tuple[str, ...]
    augment: CropViews
    train: PackedImages
    evaluation: PackedImages
    _resident: dict[tuple[torch.device, int], Tensor] = field(init=False, repr=False, default_factory=dict)

    @cached_property
    def spec(self) -> DataSpec:
        """What a distiller may know about the data."""
        views = self.augment
        size, number = (views.crop, views.crop), len(self.class_names)
        return DataSpec(number, size, views.mean, views.std, num_samples=len(self.train), targets=self.train.targets)

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change when any packed image or label does."""
        identity = hashlib.sha256()
        for part in (self.train, self.evaluation):
            identity.update(part.identity.encode() + part.targets.numpy().tobytes())
        return identity.hexdigest()[:12]

    @property
    def description(self) -> str:
        """One line for captions."""
        held = "test" if self.split == "test" else "held-out training"
        return f"{self.title}, {len(self.train):,} training and {len(self.evaluation):,} {held} images"

    def train_loader(
        self, batch_size: int, *, seed: int, device: torch.device | str = "cpu", channels_last: bool = False
    ) -> PackedLoader:
        """Return the loader of the training subset: shuffled and augmented.

        Args:
            batch_size: Images in a batch.
            seed: Seed of order and views.
            device: Where batches are wanted.
            channels_last: Whether images are laid out with the channels last in memory.
        """
        images = self._near(self.train, torch.device(device))
        return PackedLoader(
            images, self.spec, self.augment, batch_size=batch_size, seed=seed, device=device, channels_last=channels_last
        )

    def eval_loader(self, batch_size: int, *, device: torch.device | str = "cpu", channels_last: bool = False) -> PackedLoader:
        """Return the loader of the evaluation images: in order, the middle of each.

        Args:
            batch_size: Images in a batch.
            device: Where batches are wanted.
            channels_last: Whether images are laid out with the channels last in memory.
        """
        spec = replace(self.spec, num_samples=None, targets=None)  # those of the training subset would be wrong here
        images = self._near(self.evaluation, torch.device(device))
        return PackedLoader(
            images, spec, self.augment, batch_size=batch_size, seed=None, device=device, channels_last=channels_last
        )

    def _near(self, images: PackedImages, device: torch.device) -> PackedImages:
        """Return images whose pixels lie on the device, if it is a GPU and they fit into half of what is free there."""
        if device.type != "cuda":
            return images
        key = (device, images.pixels.data_ptr())  # training and held-out images share one file
        if key not in self._resident:
            free = torch.cuda.mem_get_info(device)[0]
            fits = images.pixels.numel() <= _RESIDENT_SHARE * free
            self._resident[key] = images.pixels.to(device) if fits else images.pixels
        return replace(images, pixels=self._resident[key])


@DATASETS.register("packed")
def packed(
    *,
    root: str | PathLike[str] | None = None,
    split: SplitName = "test",
    crop: int = 224,
    resize: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    verify: bool = False,
) -> PackedDataSet:
    """Load a folder that ``python -m distillzoo pack SRC DST`` has written.

    Args:
        root: The packed folder.
        split: What networks are evaluated on; ``"heldout"`` chooses the same training images as for the data set ``folder``.
        crop: Height and width of the images in pixels.
        resize: Short side of evaluation images in pixels: that of the packed images, which ``None`` takes.
        mean: Mean of each channel of images scaled to 0..1; ``None`` is ImageNet's.
        std: Standard deviation of each channel; ``None`` is ImageNet's.
        verify: Whether to read the files whole and compare their digests with those that were written; otherwise their lengths.
    Raises:
        OptionError: If no root is given or an option is out of range.
        DataError: If the folder is missing, half written or damaged.
    """
    if root is None:
        raise OptionError(
            "The data set 'packed' needs a data root, none was given; name a folder that python -m distillzoo pack SRC DST has "
            "written (--data-root DST)."
        )
    place = Path(root).expanduser()
    index = read_index(place)
    short = index.short_side
    if resize not in (None, short):
        raise OptionError(
            f"resize={resize!r} was asked of images that are packed with a short side of {short} pixels; only {short} is possible; "
            "leave it out, or pack them again with that short side."
        )
    views = make_views(crop, short, mean, std, source=f"packed at short side {short}")
    train, evaluation = (_open(place, part, verify) for part in (index.train, index.evaluation))
    if split == "heldout":
        stays, held = hold_out_rows(train.targets, index.classes)
        train, evaluation = train.take(stays), train.take(held)
    notes = ["a fifth split off"] * index.seeded + [f"without {(n := len(index.skipped)):,} unusable file{'s' * (n > 1)}"] * bool(
        index.skipped
    )
    title = f"{index.source} ({', '.join([f'packed at short side {short}: another protocol than image files', *notes])})"
    return PackedDataSet("packed", title, split, tuple(index.classes), views, train, evaluation)


def _open(root: Path, part: PackedPart, verify: bool) -> PackedImages:
    path = root / part.file
    try:
        if verify and file_sha256(path) != part.sha256:
            raise DataError(
                f"The packed file {str(path)!r} is not what was written: its digest has changed; pack the images again and name "
                "the new folder."
            )
        pixels = torch.from_file(str(path), shared=False, size=part.bytes, dtype=torch.uint8)  # mapped, not read
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"Cannot read the packed file {str(path)!r} ({error}); it must be readable by you; check the permissions and the disk."
        ) from error
    offsets, sizes, targets = (torch.tensor(values, dtype=torch.int64) for values in (part.offsets, part.sizes, part.labels))
    return PackedImages(pixels, offsets, sizes, targets, part.sha256)

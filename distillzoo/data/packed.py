"""Packed images: read from a memory-mapped file, cropped and resized for a whole batch on the device.

Crops are cut from images that were resized once already, so training is another protocol than that of image files, and says so in
its name, caption and record. Evaluation images are those of image files to the last bit, where ``resize`` is the packed short side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from distillzoo.data.base import DATASETS, SplitName
from distillzoo.data.crops import make_views
from distillzoo.data.packed_loader import PackedImages, PackedLoader
from distillzoo.data.packing import PackedPart, file_sha256, read_index
from distillzoo.data.splits import hold_out_rows
from distillzoo.data.view_loader import ViewDataSet
from distillzoo.errors import DataError, OptionError
from distillzoo.types import DataSpec

__all__ = ["PackedDataSet", "PackedImages", "PackedLoader", "packed", "packed_set"]

_RESIDENT_SHARE = 0.5  # of the device's free memory that images may take


@dataclass(frozen=True, eq=False)
class PackedDataSet(ViewDataSet[PackedImages]):
    """Images that were decoded once; it follows :class:`distillzoo.data.DataSet`.

    Args:
        name: Registered name.
        title: Name as it is written in captions.
        split: What networks are evaluated on.
        class_names: Names of the classes, by label.
        augment: How images are cropped, for training and evaluation, and from what.
        train: The training subset.
        evaluation: The images of the split.
        class_list: Classes of ImageNet that were chosen, where they were.
    """

    _resident: dict[tuple[torch.device, int], Tensor] = field(init=False, repr=False, default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change when any packed image or label does: as the index says, which ``verify`` checks."""
        identity = hashlib.sha256()
        for part in (self.train, self.evaluation):
            identity.update(part.identity.encode() + part.targets.numpy().tobytes())
        return identity.hexdigest()[:12]

    def _loader(
        self, part: PackedImages, spec: DataSpec, batch_size: int, seed: int | None, device: torch.device | str, channels_last: bool
    ) -> PackedLoader:
        near = self._near(part, torch.device(device))
        return PackedLoader(near, spec, self.augment, batch_size=batch_size, seed=seed, device=device, channels_last=channels_last)

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
    return packed_set(root, split=split, crop=crop, resize=resize, mean=mean, std=std, verify=verify)


def packed_set(
    root: str | PathLike[str] | None,
    *,
    split: SplitName,
    crop: int,
    resize: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    verify: bool,
    name: str = "packed",
    title: str = "",
    classes: Sequence[str] | None = None,
) -> PackedDataSet:
    """Load a packed folder under the name of a data set; the other arguments are those of the data set ``packed``.

    Args:
        root: The packed folder.
        split: What networks are evaluated on.
        crop: Height and width of the images in pixels.
        resize: Short side of evaluation images in pixels.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        verify: Whether to compare digests.
        name: What records call the data.
        title: What captions call it; empty takes the name of the folder that was packed.
        classes: Names of the classes to use, all of them packed; their order gives the labels. ``None`` uses all.
    Raises:
        OptionError: If no root is given or an option is out of range.
        DataError: If the folder is missing, half written or damaged.
    """
    if root is None:
        raise OptionError(
            f"The data set {name!r} needs a data root, none was given; name a folder that python -m distillzoo pack SRC DST has "
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
    if isinstance(crop, int) and crop > short:
        raise OptionError(
            f"Crops of {crop} pixels do not fit into images that are packed with a short side of {short}; at most {short} is "
            f"possible; crop less (--data.crop {short}), or pack them again with a longer one (--short-side)."
        )
    views = make_views(crop, short, mean, std, source=f"packed at short side {short}")
    chosen = tuple(index.classes if classes is None else classes)
    train, evaluation = (_open(place, part, verify).choose(index.classes, chosen) for part in (index.train, index.evaluation))
    if split == "heldout":
        stays, held = hold_out_rows(train.targets, chosen)
        train, evaluation = train.take(stays), train.take(held)
    notes = ["a fifth split off"] * index.seeded + [f"without {(n := len(index.skipped)):,} unusable file{'s' * (n > 1)}"] * bool(
        index.skipped
    )
    protocol = f"packed at short side {short}: another protocol than image files"
    return PackedDataSet(
        name, f"{title or index.source} ({', '.join([protocol, *notes])})", split, chosen, views, train, evaluation
    )


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

"""Any folder of images: ``train`` and ``val``, or one tree, with a folder for each class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike

import torch

from distillzoo.data.base import DATASETS, SplitName
from distillzoo.data.crops import CropViews, make_views
from distillzoo.data.file_loader import FileLoader, check_workers
from distillzoo.data.packed import PackedDataSet, packed_set
from distillzoo.data.splits import hold_out_rows
from distillzoo.data.tree import Listing, Tree, read_tree
from distillzoo.data.view_loader import ViewDataSet
from distillzoo.errors import OptionError
from distillzoo.types import DataSpec

__all__ = ["FolderDataSet", "folder", "folder_from_tree"]


@dataclass(frozen=True, eq=False)
class FolderDataSet(ViewDataSet[Listing]):
    """Image files that are read when they are needed; it follows :class:`distillzoo.data.DataSet`.

    Args:
        name: Registered name.
        title: Name as it is written in captions.
        split: What networks are evaluated on.
        class_names: Names of the classes, by label.
        augment: How images are cropped, for training and evaluation.
        train: The training subset.
        evaluation: The images of the split.
        class_list: Classes of ImageNet that were chosen, where they were.
        workers: Processes that read images; ``None`` takes as many as there are processors, at most 16.
    """

    workers: int | None = field(default=None, kw_only=True)

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change when any file or label does, wherever the files lie; reads every file once."""
        return hashlib.sha256(f"{self.train.digest} {self.evaluation.digest}".encode()).hexdigest()[:12]

    def _loader(
        self, part: Listing, spec: DataSpec, batch_size: int, seed: int | None, device: torch.device | str, channels_last: bool
    ) -> FileLoader:
        return FileLoader(
            part,
            spec,
            self.augment,
            batch_size=batch_size,
            seed=seed,
            device=device,
            channels_last=channels_last,
            workers=self.workers,
        )


@DATASETS.register("folder")
def folder(
    *,
    root: str | PathLike[str] | None = None,
    split: SplitName = "test",
    crop: int = 224,
    resize: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    workers: int | None = None,
    skip_bad: bool = False,
    packed: bool = False,
    verify: bool = False,
) -> FolderDataSet | PackedDataSet:
    """Load any folder of images.

    ``root`` holds ``train`` and ``val`` (or ``validation``, or ``test``; the first that is there), each with a folder for every
    class; or the class folders themselves, of which a fifth of every class is split off for evaluation, always the same images.

    Args:
        root: The folder of the images; with ``packed`` one that ``python -m distillzoo pack`` has written from it.
        split: What networks are evaluated on; ``"heldout"`` holds a tenth of the training images out, of every class as many,
            always the same.
        crop: Height and width of the images in pixels.
        resize: Short side of evaluation images, in pixels, before the middle is cut out; ``None`` is 8/7 of ``crop``: 256 for 224;
            of packed images it is their own short side, and no other is possible.
        mean: Mean of each channel of images scaled to 0..1; ``None`` is ImageNet's.
        std: Standard deviation of each channel; ``None`` is ImageNet's.
        workers: Processes that read images; ``None`` takes one a processor, at most 16. It does not change the images.
        skip_bad: Whether to leave out files that cannot be used, which are found by decoding all once; otherwise one is an error.
            Packed images were looked at when they were packed.
        packed: Whether ``root`` is a packed folder: another protocol, under the name ``folder_packed``.
        verify: Whether to compare a packed folder's digests; see the data set ``packed``.
    Raises:
        OptionError: If no root is given or an option is out of range.
        DataError: If folders or files are not as they should be; the message names them.
    """
    check_workers(workers)
    if packed:
        return packed_set(root, split=split, crop=crop, resize=resize, mean=mean, std=std, verify=verify, name="folder_packed")
    if root is None:
        raise OptionError(
            "The data set 'folder' needs a data root, none was given; name a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or "
            "with CLASS/IMAGE (--data-root DIR)."
        )
    views = make_views(crop, resize, mean, std)
    tree = read_tree(root, skip_bad=skip_bad)
    return folder_from_tree(tree, views, split=split, workers=workers)


def folder_from_tree(
    tree: Tree, views: CropViews, *, split: SplitName = "test", name: str = "folder", title: str = "", workers: int | None = None
) -> FolderDataSet:
    """Make the data set of a tree of images.

    Args:
        tree: The images.
        views: How they are cropped.
        split: What networks are evaluated on.
        name: Registered name.
        title: Name as it is written in captions; empty takes the name of the folder.
        workers: Processes that read images.
    """
    train, evaluation = tree.train, tree.evaluation
    if split == "heldout":
        stays, held = hold_out_rows(train.targets, tree.classes)
        train, evaluation = train.take(stays), train.take(held)
    title = title or f"{tree.root.resolve().name} (image folder{', a fifth split off' if tree.seeded else ''})"
    if tree.skipped:
        title += f" without {len(tree.skipped):,} unusable file{'s' * (len(tree.skipped) > 1)}"
    return FolderDataSet(name, title, split, tree.classes, views, train, evaluation, workers=workers)

"""ImageNet-100, or any other classes of ImageNet-1k: a class list over an ordinary copy, whole or of those classes alone."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path

from distillzoo.data.base import DATASETS, SplitName
from distillzoo.data.class_lists import ClassList, find_class_list, name_class
from distillzoo.data.crops import make_views
from distillzoo.data.file_loader import check_workers
from distillzoo.data.folder import FolderDataSet, folder_from_tree
from distillzoo.data.images import EXTENSIONS
from distillzoo.data.packed import PackedDataSet, packed_set
from distillzoo.data.packing import read_index
from distillzoo.data.tree import find_parts, read_tree
from distillzoo.errors import DataError, OptionError

__all__ = ["imagenet100", "present_classes"]

_NAMED = 8  # classes that a sentence lists before it counts the others


@DATASETS.register("imagenet100")
def imagenet100(
    *,
    root: str | PathLike[str] | None = None,
    split: SplitName = "test",
    class_list: str | PathLike[str] = "cmc",
    allow_missing_classes: bool = False,
    crop: int = 224,
    resize: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    workers: int | None = None,
    skip_bad: bool = False,
    packed: bool = False,
    verify: bool = False,
) -> FolderDataSet | PackedDataSet:
    """Load classes of ImageNet from a copy as it is usually kept: ``train/WNID/IMAGE`` and ``val/WNID/IMAGE``.

    Args:
        root: The copy, of all 1,000 classes or of those of the list; with ``packed`` what ``python -m distillzoo pack`` wrote.
        split: What networks are evaluated on, as for the data set ``folder``.
        class_list: ``"cmc"``, ``"first100"``, ``"seed1993"``, or a file; see :func:`~distillzoo.data.class_lists.find_class_list`.
        allow_missing_classes: Whether to go on with a copy that lacks classes, or images of a list whose numbers are known.
        crop: Height and width of the images in pixels.
        resize: Short side of evaluation images, in pixels, before the middle is cut out; ``None`` is 8/7 of ``crop``: 256 for 224.
        mean: Mean of each channel of images scaled to 0..1; ``None`` is ImageNet's.
        std: Standard deviation of each channel; ``None`` is ImageNet's.
        workers: Processes that read images; ``None`` takes as many as there are processors. It does not change the images.
        skip_bad: Whether to leave out files that cannot be used; otherwise one is an error.
        packed: Whether ``root`` is a packed folder: another protocol, under the name ``imagenet100_packed``.
        verify: Whether to compare a packed folder's digests; see the data set ``packed``.
    Raises:
        UnknownNameError: If there is no such class list.
        OptionError: If no root is given or an option is out of range.
        DataError: If classes or images are missing, or a file cannot be used; the message names them.
    """
    wanted = find_class_list(class_list)
    check_workers(workers)
    if root is None:
        raise OptionError(
            "The data set 'imagenet100' needs a data root, none was given; name a copy of ImageNet with train/WNID/IMAGE and "
            "val/WNID/IMAGE, of all classes or of those of the list (--data-root DIR)."
        )
    place = Path(root).expanduser()
    if packed:
        there = frozenset(read_index(place).classes)
        chosen = _choose(wanted, {place.name: there}, place, allow_missing_classes)
        title = f"ImageNet, {chosen}"
        load = partial(
            packed_set,
            place,
            crop=crop,
            resize=resize,
            mean=mean,
            std=std,
            name="imagenet100_packed",
            title=title,
            classes=chosen.wnids,
        )
        images = load(split="test", verify=verify)
        _check_counts(chosen, (len(images.train), len(images.evaluation)), place, allow_missing_classes)
        return replace(images if split == "test" else load(split=split, verify=False), class_list=chosen)
    cropped = make_views(crop, resize, mean, std)
    chosen = present_classes(place, wanted, allow_missing=allow_missing_classes)
    tree = read_tree(place, classes=chosen.wnids, skip_bad=skip_bad)
    train = str(tree.train.root)
    bad = sum(Path(file).is_relative_to(train) for file in tree.skipped)
    found = (len(tree.train) + bad, len(tree.evaluation) + len(tree.skipped) - bad)
    _check_counts(chosen, found, place, allow_missing_classes)
    title = f"ImageNet, {chosen}" + (", a fifth split off" if tree.seeded else "")
    data = folder_from_tree(tree, cropped, split=split, name="imagenet100", title=title, workers=workers)
    return replace(data, class_list=chosen)


def present_classes(root: str | PathLike[str], wanted: ClassList, *, allow_missing: bool = False) -> ClassList:
    """Return the classes of a list that a copy has, with at least one image in every part.

    Args:
        root: The copy.
        wanted: The list.
        allow_missing: Whether some may be missing.
    Raises:
        DataError: If classes are missing; the message counts and names them.
    """
    place = Path(root).expanduser()
    try:
        parts = {part.name: part for part in find_parts(place)}
        there = {name: frozenset(wnid for wnid in wanted.wnids if _has_image(part / wnid)) for name, part in parts.items()}
        for name, part in parts.items():
            if not there[name] and any(entry.name.lower().endswith(EXTENSIONS) for entry in os.scandir(part)):
                raise DataError(
                    f"{str(part)!r} holds images that lie in no class folder; expected is {name}/WNID/IMAGE; sort them by their "
                    "labels, as the script valprep.sh or torchvision.datasets.ImageNet does."
                )
    except OSError as error:
        raise DataError(
            f"Cannot read {str(error.filename or place)!r} ({error.strerror or error}); check the permissions and the disk."
        ) from error
    return _choose(wanted, there, place, allow_missing)


def _has_image(folder: Path) -> bool:
    return any(file.lower().endswith(EXTENSIONS) for _, _, files in os.walk(folder) for file in files)


def _choose(wanted: ClassList, there: Mapping[str, Collection[str]], place: Path, allow_missing: bool) -> ClassList:
    missing = [wnid for wnid in wanted.wnids if not all(wnid in part for part in there.values())]
    if not missing:
        return wanted
    left = len(wanted.wnids) - len(missing)
    if allow_missing and left >= 2:
        return wanted.without(missing)
    named = ", ".join(map(name_class, missing[:_NAMED]))
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    counted = ", ".join(f"{name} has {sum(wnid in part for wnid in wanted.wnids)}" for name, part in there.items())
    advice = "complete the copy, name another list (--class-list)" + (
        ", or go on with the others (--allow-missing-classes)" if left >= 2 else " or another folder (--data-root)"
    )
    raise DataError(
        f"{str(place)!r} lacks {len(missing)} of the {len(wanted.wnids)} classes of the class list {wanted.name!r} ({counted}): "
        f"{named}{more}; a partial copy is refused; {advice}."
    )


def _check_counts(chosen: ClassList, found: tuple[int, int], place: Path, allow_missing: bool) -> None:
    if chosen.counts is not None and chosen.counts != found and not allow_missing:
        train, evaluation = chosen.counts
        raise DataError(
            f"{str(place)!r} has {found[0]:,} training and {found[1]:,} evaluation images of the class list {chosen.name!r}, a "
            f"whole copy has {train:,} and {evaluation:,}; a partial copy is refused; complete it, or go on with what is there "
            "(--allow-missing-classes)."
        )

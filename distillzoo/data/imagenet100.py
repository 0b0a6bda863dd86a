"""ImageNet-100, or any other classes of ImageNet-1k: a class list over an ordinary copy, whole or of those classes alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from os import PathLike
from pathlib import Path

from distillzoo.data.base import DATASETS, SplitName
from distillzoo.data.class_lists import ClassList, find_class_list, imagenet_wnids, name_class
from distillzoo.data.crops import make_views
from distillzoo.data.file_loader import check_workers
from distillzoo.data.folder import FolderDataSet, folder_from_tree
from distillzoo.data.images import EXTENSIONS
from distillzoo.data.packed import PackedDataSet, packed_set
from distillzoo.data.packing import read_index
from distillzoo.data.tree import find_parts, read_tree, walk_visible
from distillzoo.errors import DataError, OptionError

__all__ = ["imagenet100", "present_classes"]

_NAMED = 100  # missing classes that a sentence lists before it counts the others
_SHOWN = 8  # of the classes of a list, or of the folders of a copy that has none of them
_MANY = 200  # folders of a level that are looked into for the one that was meant
_LAYOUT = "DIR/train/WNID/IMAGE and DIR/val/WNID/IMAGE"


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
        resize: Short side of evaluation images, in pixels, before the middle is cut out; ``None`` is 8/7 of ``crop``: 256 for 224;
            of packed images it is their own short side, and no other is possible.
        mean: Mean of each channel of images scaled to 0..1; ``None`` is ImageNet's.
        std: Standard deviation of each channel; ``None`` is ImageNet's.
        workers: Processes that read images; ``None`` takes one a processor, at most 16. It does not change the images.
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
        index = read_index(place)
        _refuse_none(wanted, index.classes, place, packed=True)
        chosen = _choose(wanted, {place.name: frozenset(index.classes)}, place, allow_missing_classes)
        load = partial(packed_set, place, split=split, crop=crop, resize=resize, mean=mean, std=std, verify=verify)
        images = load(name="imagenet100_packed", title=f"ImageNet, {chosen}", classes=chosen.wnids)
        labels = {index.classes.index(wnid) for wnid in chosen.wnids}
        train, evaluation = (sum(label in labels for label in part.labels) for part in (index.train, index.evaluation))
        _check_counts(chosen, (train, evaluation), index.skipped, place, allow_missing_classes, seeded=index.seeded)
        return replace(images, class_list=chosen)
    cropped = make_views(crop, resize, mean, std)
    chosen = present_classes(place, wanted, allow_missing=allow_missing_classes)
    tree = read_tree(place, classes=chosen.wnids, skip_bad=skip_bad)
    found = (len(tree.train), len(tree.evaluation))
    _check_counts(chosen, found, tree.skipped, place, allow_missing_classes, seeded=tree.seeded)
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
        DataError: If classes are missing; the message counts and names them. Where that is allowed they are told as a warning.
    """
    place = Path(root).expanduser()
    try:
        parts = {part.name: part for part in find_parts(place)}
        there = {name: frozenset(wnid for wnid in wanted.wnids if _has_image(part / wnid)) for name, part in parts.items()}
        for name, part in parts.items():
            if not there[name] and any(entry.name.lower().endswith(EXTENSIONS) for entry in os.scandir(part)):
                if part == place:
                    raise DataError(
                        f"{str(place)!r} holds images that lie in no class folder; expected is {_LAYOUT}; name DIR (--data-root)."
                    )
                raise DataError(
                    f"{str(part)!r} holds images that lie in no class folder; expected is {name}/WNID/IMAGE; sort them by their "
                    "labels, as the script valprep.sh or torchvision.datasets.ImageNet does."
                )
        if not any(there.values()):
            _refuse_none(wanted, sorted(entry.name for entry in os.scandir(next(iter(parts.values())))), place)
    except OSError as error:
        raise DataError(
            f"Cannot read {str(error.filename or place)!r} ({error.strerror or error}); check the permissions and the disk."
        ) from error
    return _choose(wanted, there, place, allow_missing)


def _has_image(folder: Path) -> bool:
    return folder.is_dir() and any(file.lower().endswith(EXTENSIONS) for _, files in walk_visible(folder) for file in files)


def _choose(wanted: ClassList, there: Mapping[str, Collection[str]], place: Path, allow_missing: bool) -> ClassList:
    missing = [wnid for wnid in wanted.wnids if not all(wnid in part for part in there.values())]
    if not missing:
        return wanted
    left = len(wanted.wnids) - len(missing)
    named = _named(missing, _NAMED)
    foreign = [wnid for wnid in missing if wnid not in imagenet_wnids()]
    if foreign:
        named += f" ({len(foreign)} of them, such as {foreign[0]}, no class of ImageNet-1k)"
    if allow_missing and left >= 2:
        warnings.warn(
            f"{str(place)!r} lacks {len(missing)} of the {len(wanted.wnids)} classes of the class list {wanted.name!r}, and goes "
            f"without: {named}.",
            stacklevel=2,
        )
        return wanted.without(missing)
    counted = ", ".join(f"{name} has {sum(wnid in part for wnid in wanted.wnids)}" for name, part in there.items())
    advice = "complete the copy, name another list (--class-list)" + (
        ", or go on with the others (--allow-missing-classes)" if left >= 2 else " or another folder (--data-root)"
    )
    raise DataError(
        f"{str(place)!r} lacks {len(missing)} of the {len(wanted.wnids)} classes of the class list {wanted.name!r} ({counted}): "
        f"{named}; a partial copy is refused; {advice}."
    )


def _named(wnids: Sequence[str], most: int) -> str:
    return ", ".join(map(name_class, wnids[:most])) + (f" and {len(wnids) - most} more" if len(wnids) > most else "")


def _refuse_none(wanted: ClassList, there: Sequence[str], place: Path, *, packed: bool = False) -> None:
    """Refuse a copy with none of the classes: most likely it is another folder than was meant, so say what it holds."""
    if any(wnid in there for wnid in wanted.wnids):
        return
    deeper = None if packed else next(_deeper(place, wanted), None)
    holds = ", ".join(map(repr, there[:_SHOWN])) + (" and others" if len(there) > _SHOWN else "") if there else "nothing"
    expected = "what python -m distillzoo pack wrote of these classes" if packed else _LAYOUT
    advice = "name another folder (--data-root) or another list (--class-list)" if deeper is None else f"name {str(deeper)!r}"
    raise DataError(
        f"{str(place)!r} has none of the {len(wanted.wnids)} classes of the class list {wanted.name!r} "
        f"({_named(wanted.wnids, _SHOWN)}); it holds {holds}; expected is {expected}; {advice}."
    )


def _deeper(place: Path, wanted: ClassList) -> Iterator[Path]:
    """Yield the folders up to three levels below one that hold a class of the list, or ``train`` with one, shallow ones first."""
    level = [place]
    for _ in range(3):
        entries = (entry for folder in level for entry in sorted(os.scandir(folder), key=attrgetter("name")))
        level = [Path(entry) for entry in entries if entry.is_dir()][:_MANY]
        for folder in level:
            train = folder / "train" if (folder / "train").is_dir() else folder
            if any(_has_image(train / wnid) for wnid in wanted.wnids):
                yield folder


def _bad_images(files: Sequence[str], chosen: ClassList) -> tuple[int, int]:
    """Count the training and evaluation images of a list that were left out because they cannot be used."""
    paths = [Path(file) for file in files]
    folders = [path.parts[path.parts.index(wnid) - 1] for path in paths for wnid in chosen.wnids if wnid in path.parts]
    return folders.count("train"), len(folders) - folders.count("train")


def _check_counts(
    chosen: ClassList, used: tuple[int, int], skipped: Sequence[str], place: Path, allow_missing: bool, *, seeded: bool
) -> None:
    bad = _bad_images(skipped, chosen)
    found = (used[0] + bad[0], used[1] + bad[1])
    if chosen.counts is None or chosen.counts == found:
        return
    train, evaluation = chosen.counts
    counted = (
        f"{str(place)!r} has {found[0]:,} training and {found[1]:,} evaluation images of the class list {chosen.name!r}, a whole "
        f"copy has {train:,} and {evaluation:,}"
    )
    if allow_missing:
        warnings.warn(f"{counted}.", stacklevel=2)
        return
    if seeded:
        raise DataError(
            f"{str(place)!r} is one tree of classes without evaluation images of its own, so the class list {chosen.name!r} is not "
            f"whole here; expected is {_LAYOUT}; name DIR (--data-root), or go on with a fifth split off (--allow-missing-classes)."
        )
    raise DataError(f"{counted}; a partial copy is refused; complete it, or go on with what is there (--allow-missing-classes).")

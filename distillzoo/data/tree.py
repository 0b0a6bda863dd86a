"""Folders of images, one folder a class: which files there are, their labels and sizes, and the seeded parts of them."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from distillzoo.data.images import EXTENSIONS, inspect_image, unusable
from distillzoo.data.splits import set_aside
from distillzoo.errors import DataError, OptionError, near_matches

__all__ = ["EVALUATION_FOLDERS", "Listing", "Tree", "available_cpus", "find_parts", "read_tree", "walk_visible"]

EVALUATION_FOLDERS = ("val", "validation", "test")
"""Folders beside ``train`` that evaluation images are looked for in, in this order."""

_LAYOUT = "expected is DIR/train/CLASS/IMAGE beside DIR/val/CLASS/IMAGE (or validation, or test), or one tree DIR/CLASS/IMAGE"
_TEST_SHARE = 5  # one tree: a fifth of every class is evaluated on


@dataclass(frozen=True, eq=False)
class Listing:
    """Image files with their labels and sizes.

    Args:
        root: The folder that ``names`` start from.
        names: Paths below ``root``, with ``/``.
        targets: ``(N,)`` int64 labels.
        sizes: ``(N, 2)`` int64 heights and widths in pixels.
    """

    root: Path
    names: tuple[str, ...]
    targets: Tensor
    sizes: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Tensor) -> Listing:
        """Return the listing of the given rows, in their order.

        Args:
            rows: ``(M,)`` int64 positions.
        """
        names = tuple(self.names[row] for row in rows.tolist())
        return Listing(self.root, names, self.targets[rows], self.sizes[rows])

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits of the files' contents and labels, in order; reads every file once."""
        identity = hashlib.sha256()
        with ThreadPoolExecutor(available_cpus()) as pool:
            contents = pool.map(_content_digest, (self.root / name for name in self.names))
            for label, content in zip(self.targets.tolist(), contents, strict=True):
                identity.update(b"%d:" % label + content)
        return identity.hexdigest()


@dataclass(frozen=True, eq=False)
class Tree:
    """All images below a data root.

    Args:
        root: The data root.
        classes: Names of the class folders, by label.
        train: Training images.
        evaluation: Evaluation images.
        seeded: Whether the evaluation images were split off by us, as there is one tree only.
        skipped: Files that were left out because they cannot be used.
    """

    root: Path
    classes: tuple[str, ...]
    train: Listing
    evaluation: Listing
    seeded: bool
    skipped: tuple[str, ...]


def available_cpus() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_tree(root: str | os.PathLike[str], *, classes: Sequence[str] | None = None, skip_bad: bool = False) -> Tree:
    """List the images below a data root and look at each.

    Args:
        root: The data root: ``train`` and ``val`` (or ``validation``, or ``test``) with a folder for each class, or the class
            folders themselves, of which a fifth of every class is then split off for evaluation, always the same.
        classes: Names of the class folders to use; their order gives the labels. ``None`` uses all, sorted.
        skip_bad: Whether to leave files out that cannot be used. All are then decoded once, which finds the broken ones beforehand;
            otherwise the first look is at their heads, and a file that breaks off in the middle is named when its turn comes.
    Raises:
        DataError: If folders are missing, empty or do not agree, or a file cannot be used; the message names it.
    """
    place = Path(root).expanduser()
    try:
        parts = find_parts(place)
        names = [_class_folders(part) for part in parts]
        chosen = _choose(parts, names, classes)
        found = [_list_images(part, chosen) for part in parts]
    except OSError as error:
        raise DataError(
            f"Cannot read {str(error.filename or place)!r} ({error.strerror or error}); {_LAYOUT}, readable by you; check the "
            "permissions and the disk."
        ) from error
    listings, skipped = [], []
    for listing in found:
        good, bad = _inspect(listing, chosen, skip_bad)
        listings.append(good)
        skipped += bad
    if skipped:
        warnings.warn(
            f"{len(skipped):,} image file{'s' if len(skipped) > 1 else ''} below {str(place)!r} cannot be used and "
            f"{'are' if len(skipped) > 1 else 'is'} left out: {', '.join(skipped[:5])}{' and others' if len(skipped) > 5 else ''}.",
            stacklevel=2,
        )
    if len(listings) == 1:
        listings = list(_split_off(listings[0], chosen))
    return Tree(place, chosen, listings[0], listings[1], len(parts) == 1, tuple(skipped))


def _content_digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise unusable(str(path), (error.strerror or str(error)).lower()) from error


def _split_off(listing: Listing, classes: Sequence[str]) -> Iterator[Listing]:
    counts = torch.bincount(listing.targets, minlength=len(classes))
    if int(counts.min()) < 2:
        raise DataError(
            f"The class {classes[int(counts.argmin())]!r} of {str(listing.root)!r} has 1 image, but there is one tree only, so at "
            f"least 2 of every class are needed, one to train and one to evaluate on; add images, or give {_LAYOUT[12:]}."
        )
    return map(listing.take, set_aside(listing.targets, (counts // _TEST_SHARE).clamp_min(1), "folder", "test"))


def find_parts(root: Path) -> list[Path]:
    """Return the folders that hold class folders: training and evaluation, or one tree for both.

    Args:
        root: The data root.
    Raises:
        DataError: If they are not as they should be.
    """
    if not root.exists():
        raise DataError(f"The data root {str(root)!r} does not exist; {_LAYOUT}; name the right folder.")
    if not root.is_dir():
        raise DataError(f"The data root {str(root)!r} is a file, not a folder; {_LAYOUT}; name the folder of the images.")
    if (root / "index.json").is_file():
        raise DataError(
            f"The data root {str(root)!r} holds packed images, not image files; load it as the data set 'packed' (of run_table.py: "
            "--packed)."
        )
    there = [root / name for name in EVALUATION_FOLDERS if (root / name).is_dir()]
    if (root / "train").is_dir():
        if there:
            return [root / "train", there[0]]
        raise DataError(
            f"The data root {str(root)!r} has train but none of {', '.join(EVALUATION_FOLDERS)}; {_LAYOUT}; add evaluation images, "
            f"or name {str(root / 'train')!r} to have a fifth of it split off for evaluation."
        )
    if there:
        raise DataError(
            f"The data root {str(root)!r} has {there[0].name} but no train; {_LAYOUT}; name the folder that holds both."
        )
    deeper = sorted(path.parent for path in root.glob("*/train") if path.is_dir())
    if deeper:
        raise DataError(f"The data root {str(root)!r} is one level too high; {_LAYOUT}; name {str(deeper[0])!r}.")
    return [root]


def _class_folders(part: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(part) if entry.is_dir() and not entry.name.startswith("."))


def _choose(parts: Sequence[Path], names: Sequence[list[str]], classes: Sequence[str] | None) -> tuple[str, ...]:
    if classes is not None:
        if len(set(classes)) < len(classes):
            raise OptionError(f"classes names a folder twice: {sorted({c for c in classes if list(classes).count(c) > 1})}.")
        for part, present in zip(parts, names, strict=True):
            missing = [name for name in classes if name not in present]
            if missing:
                near = near_matches(missing[0], present)
                raise DataError(
                    f"{str(part)!r} lacks {len(missing)} of the {len(classes)} classes: {_some(missing)}"
                    f"{'; near names there are ' + ', '.join(near) if near else ''}; name another folder or other classes."
                )
        chosen = tuple(classes)
    else:
        if len(names) == 2 and names[0] != names[1]:
            raise DataError(_disagreement(parts, names))
        chosen = tuple(names[0])
    if len(chosen) < 2:
        here = f"one class folder, {chosen[0]!r}" if chosen else "no class folder"
        loose = [entry.name for entry in os.scandir(parts[0]) if entry.name.lower().endswith(EXTENSIONS)]
        lying = f" and {len(loose)} images that lie in no class folder" if loose else ""
        raise DataError(
            f"{str(parts[0])!r} has {here}{lying}; {_LAYOUT}, with at least 2 classes; put every image into its class folder."
        )
    return chosen


def _disagreement(parts: Sequence[Path], names: Sequence[list[str]]) -> str:
    only = [sorted(set(a) - set(b)) for a, b in ((names[0], names[1]), (names[1], names[0]))]
    said = [f"only {part.name} has {_some(lone)}" for part, lone in zip(parts, only, strict=True) if lone]
    return (
        f"The class folders of {parts[0].name} and {parts[1].name} in {str(parts[0].parent)!r} differ: {'; '.join(said)}; both "
        "must have the same; rename or remove the folders that are alone."
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _raise(error: OSError) -> None:
    raise error


def walk_visible(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the folders from ``top`` on with their files; what is hidden are other programs' notes, and is left out.

    Args:
        top: The folder.
    Raises:
        OSError: If it or one below cannot be read.
    """
    for folder, below, files in os.walk(top, onerror=_raise, followlinks=True):
        below[:] = [each for each in below if not each.startswith(".")]  # what stays here is walked next
        yield folder, [file for file in files if not file.startswith(".")]


def _list_images(part: Path, classes: Sequence[str]) -> Listing:
    """List the images of every class, folders within it included, in the order of torchvision's ``ImageFolder``."""
    names: list[str] = []
    targets: list[int] = []
    for label, name in enumerate(classes):
        images: list[str] = []
        others: list[str] = []
        for folder, files in sorted(walk_visible(part / name)):
            place = Path(folder).relative_to(part).as_posix()
            for file in sorted(files):
                (images if file.lower().endswith(EXTENSIONS) else others).append(f"{place}/{file}")
        if not images:
            there = f"it holds {_some(others)}" if others else "it is empty"
            raise DataError(
                f"The class folder {str(part / name)!r} has no image: {there}; images are files that end in "
                f"{', '.join(EXTENSIONS)}; put some there, rename them, or remove the folder in every part."
            )
        names += images
        targets += [label] * len(images)
    return Listing(part, tuple(names), torch.tensor(targets), torch.zeros(len(names), 2, dtype=torch.int64))


def _inspect(listing: Listing, classes: Sequence[str], skip_bad: bool) -> tuple[Listing, list[str]]:
    """Fill the sizes in; refuse or leave out the files that cannot be used."""
    with ThreadPoolExecutor(available_cpus()) as pool:
        looks = list(pool.map(lambda name: inspect_image(listing.root / name, decode=skip_bad), listing.names))
    bad = {row: look for row, look in enumerate(looks) if isinstance(look, str)}
    if bad and not skip_bad:
        row, fault = next(iter(bad.items()))
        raise unusable(str(listing.root / listing.names[row]), fault, len(bad) - 1)
    sizes = torch.tensor([(0, 0) if isinstance(look, str) else look for look in looks])
    sized = Listing(listing.root, listing.names, listing.targets, sizes)
    good = sized.take(torch.tensor([row for row in range(len(looks)) if row not in bad], dtype=torch.int64))
    for label, name in enumerate(classes):
        if bad and not bool((good.targets == label).any()):
            raise DataError(
                f"No image of the class folder {str(listing.root / name)!r} can be used; at least one is needed; repair its files, "
                "or remove the folder in every part."
            )
    return good, [str(listing.root / listing.names[row]) for row in bad]

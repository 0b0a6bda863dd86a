"""Which classes of ImageNet are used, and in which order: named lists, and files of the user.

The label of a class is its position in the list. The index of all 1,000 classes is the sorted one that networks are trained with.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np

from distillzoo.errors import DataError, OptionError, UnknownNameError, near_matches, unknown_name

__all__ = ["CLASS_LISTS", "ClassList", "find_class_list", "imagenet_rows", "imagenet_wnids", "name_class"]

CLASS_LISTS = ("cmc", "first100", "seed1993")
"""Names of the lists that come with the package."""

_CMC = Path(__file__).with_name("imagenet100_cmc.txt")
_WNID = re.compile(r"n\d{8}")
_COUNTS = {"cmc": (126_689, 5_000)}


@dataclass(frozen=True)
class ClassList:
    """Classes of ImageNet in the order of their labels.

    Args:
        name: Name of the list, or of the user's file.
        wnids: WordNet identifiers, as ``n02869837``; their order gives the labels.
        order: What the order is, in words.
        counts: Training and evaluation images of a whole copy, where they are known.
    """

    name: str
    wnids: tuple[str, ...]
    order: str = "as listed"
    counts: tuple[int, int] | None = None

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of the identifiers in order."""
        return hashlib.sha256("\n".join(self.wnids).encode()).hexdigest()[:12]

    def without(self, missing: Sequence[str]) -> ClassList:
        """Return the list without some classes, the others in their order.

        Args:
            missing: Identifiers to leave out.
        """
        kept = tuple(wnid for wnid in self.wnids if wnid not in set(missing))
        return ClassList(f"{self.name} without {len(missing)}", kept, self.order) if missing else self

    def describe(self) -> dict[str, Any]:
        """Return name, order, digest and identifiers as plain data, for records."""
        return {"name": self.name, "order": self.order, "digest": self.digest, "wnids": list(self.wnids)}

    def __str__(self) -> str:
        return f"class list {self.name}, {len(self.wnids)} classes, labels {self.order}, digest {self.digest}"


@functools.cache
def imagenet_wnids() -> tuple[str, ...]:
    """Return the 1,000 classes of ImageNet-1k in the order of the logits of networks that were trained on it.

    Example:
        >>> imagenet_wnids()[0], len(imagenet_wnids())
        ('n01440764', 1000)
    """
    return tuple(_info().label_names())


@functools.cache
def _info() -> Any:
    from timm.data.imagenet_info import ImageNetInfo  # timm takes seconds to import

    return ImageNetInfo("imagenet-1k")


def name_class(wnid: str) -> str:
    """Return an identifier with its first English name, where it is a class of ImageNet-1k.

    Args:
        wnid: The identifier.
    Example:
        >>> name_class("n01440764"), name_class("n00000000")
        ('n01440764 (tench)', 'n00000000')
    """
    if wnid not in imagenet_wnids():
        return wnid
    return f"{wnid} ({_info().label_name_to_description(wnid).split(',')[0]})"


def imagenet_rows(classes: Sequence[str]) -> list[int]:
    """Return where some classes stand among the logits of a network that was trained on ImageNet-1k.

    Args:
        classes: WordNet identifiers.
    Raises:
        OptionError: If one is no class of ImageNet-1k.
    Example:
        >>> imagenet_rows(["n01443537", "n01440764"])
        [1, 0]
    """
    places = {wnid: row for row, wnid in enumerate(imagenet_wnids())}
    unknown = [name for name in classes if name not in places]
    if unknown:
        raise OptionError(
            f"{len(unknown)} of the {len(classes)} classes are none of ImageNet-1k (the first is {unknown[0]!r}), so a head of its "
            "1,000 classes has no rows for them; use a teacher with a head of its own (--teacher-head own), or classes named by "
            "their WordNet identifiers, as n01440764."
        )
    return [places[name] for name in classes]


def find_class_list(name: str | PathLike[str]) -> ClassList:
    """Return a list by its name, or read a file with one identifier at the beginning of each line.

    ``cmc``: the 100 classes of Tian, Krishnan, Isola, "Contrastive Multiview Coding", ECCV 2020, as their list has them;
    ``first100``: the first 100 of the sorted 1,000; ``seed1993``: the first 100 of the 1,000 as numpy's ``RandomState(1993)``
    shuffles them, the custom of class-incremental learning.

    Args:
        name: A name, or a file of any number of classes; empty lines and what stands behind ``#`` are not read.
    Raises:
        UnknownNameError: If there is neither.
        DataError: If the file is not such a list.
    Example:
        >>> find_class_list("first100").wnids[:2]
        ('n01440764', 'n01443537')
    """
    text = fspath(name)
    if text == "cmc":
        return ClassList("cmc", tuple(_CMC.read_text(encoding="utf-8").split()), counts=_COUNTS["cmc"])
    if text == "first100":
        return ClassList("first100", imagenet_wnids()[:100], "sorted")
    if text == "seed1993":
        order = np.random.RandomState(1993).permutation(1000)[:100]  # the generator of those who use this list
        return ClassList("seed1993", tuple(imagenet_wnids()[row] for row in order.tolist()), "shuffled")
    path = Path(text).expanduser()
    if text and path.is_dir():
        raise DataError(f"The class list {text!r} is a folder; name a text file with one identifier a line.")
    if not path.is_file():
        raise UnknownNameError(
            unknown_name("class list", text, CLASS_LISTS, listed="There are") + " A file of the user is the other way."
        )
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"The class list {text!r} cannot be read ({error}); name a text file with one identifier a line."
        ) from error
    return ClassList(path.name, _checked([line for line in lines if line], text))


def _find_name(text: str) -> str | None:
    """Return the identifier of the class that has an English name; ``None`` where none has it, or several have."""
    wanted = text.strip().lower()
    names = {wnid: str(_info().label_name_to_description(wnid)).lower() for wnid in imagenet_wnids()}
    found = [wnid for wnid, listed in names.items() if wanted in [listed, *(name.strip() for name in listed.split(","))]]
    return found[0] if len(found) == 1 else None


def _checked(lines: list[str], source: str) -> tuple[str, ...]:
    wnids = [line.split()[0] for line in lines]
    for wnid, line in zip(wnids, lines, strict=True):
        if _WNID.fullmatch(wnid) is None:
            named = _find_name(line)
            near = near_matches(wnid, imagenet_wnids(), limit=1) or ["n01440764"]
            example = f"{named}, which has this name" if named else near[0]
            raise DataError(
                f"The class list {source!r} holds {(line if named else wnid)!r}, which is no WordNet identifier (n and 8 digits, "
                f"as {example}); write one at the beginning of each line."
            )
    twice = sorted({wnid for wnid in wnids if wnids.count(wnid) > 1})
    if twice:
        raise DataError(f"The class list {source!r} names {twice[0]} twice; name each class once.")
    if len(wnids) < 2:
        raise DataError(f"The class list {source!r} has {len(wnids)} classes, at least 2 are needed; write one identifier a line.")
    return tuple(wnids)

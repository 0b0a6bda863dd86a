"""Fixed, class-balanced choices of training images: the held-out split and the reduced training set.

Their seed is a constant: every run of every seed, student and method sees the same split.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distillzoo.data.arrays import Split
from distillzoo.errors import DataError
from distillzoo.streams import Stream

__all__ = ["SPLIT_SEED", "class_ranks", "hold_out", "hold_out_rows", "keep_first", "set_aside"]

SPLIT_SEED = 20_250_101  # any number; changing it changes every held-out result ever recorded
_HELD_OUT_SHARE = 10  # of the smallest class


def class_ranks(targets: Tensor, *names: str) -> Tensor:
    """Number the samples of every class in a random order that only the names decide.

    Args:
        targets: ``(N,)`` int64 labels.
        names: Name of the order.
    Returns:
        ``(N,)`` int64: 0 .. n-1 within each class of n samples.
    Example:
        >>> class_ranks(torch.tensor([3, 3, 7]), "example").sort().values
        tensor([0, 0, 1])
    """
    shuffled = Stream.named(SPLIT_SEED, *names).permutation(0, len(targets))
    by_class = shuffled[torch.argsort(targets[shuffled], stable=True)]
    counts = torch.bincount(targets)
    first = (counts.cumsum(0) - counts)[targets[by_class]]
    ranks = torch.empty_like(targets)
    ranks[by_class] = torch.arange(len(targets)) - first
    return ranks


def set_aside(targets: Tensor, number: int | Tensor, *names: str) -> tuple[Tensor, Tensor]:
    """Return the rows that stay and those set aside: of every class the last ``number``, which can be ``(C,)``, one for each."""
    stays = class_ranks(targets, *names) < (torch.bincount(targets) - number)[targets]
    return stays.nonzero().squeeze(1), (~stays).nonzero().squeeze(1)


def hold_out(data: Split, per_class: int, *names: str) -> tuple[Split, Split]:
    """Take ``per_class`` images of every class, the last of its random order, out of a training set.

    Args:
        data: The training set.
        per_class: Images to hold out of every class, at least 1.
        names: Name of the random order.
    Returns:
        What stays and what is held out, each in the order of ``data``.
    Raises:
        DataError: If a class would have nothing left.
    """
    counts = torch.bincount(data.targets)
    smallest = int(counts[counts > 0].min())
    if not 1 <= per_class < smallest:
        raise DataError(
            f"Cannot hold {per_class} images of every class out: the smallest class has {smallest} and one must stay; "
            f"ask for 1 to {smallest - 1}, or for more training images."
        )
    stays, held = set_aside(data.targets, per_class, *names)
    return data.take(stays), data.take(held)


def hold_out_rows(targets: Tensor, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Choose training images to hold out: of every class as many, a tenth of the smallest, always the same ones.

    Args:
        targets: ``(N,)`` int64 labels.
        classes: Names of the classes, for the message.
    Returns:
        The rows that stay and the rows that are held out, each in order.
    Raises:
        DataError: If a class has one image only.
    """
    counts = torch.bincount(targets, minlength=len(classes))
    smallest = int(counts.min())
    if smallest < 2:
        raise DataError(
            f"Cannot hold images out: the class {classes[int(counts.argmin())]!r} has {smallest} training image, at least 2 are "
            "needed; add images, remove the class, or evaluate on the split 'test'."
        )
    return set_aside(targets, max(1, smallest // _HELD_OUT_SHARE), "folder", "heldout")


def keep_first(data: Split, per_class: int, *names: str) -> Split:
    """Keep ``per_class`` images of every class, the first of its random order.

    With the same names :func:`hold_out` counts from the other end of the same order: as long as both numbers fit into a class,
    the images kept and the images held out are disjoint, and neither number changes the other choice.

    Args:
        data: The training set.
        per_class: Images to keep of every class.
        names: Name of the random order.
    Returns:
        What is kept, in the order of ``data``.
    """
    return data.take((class_ranks(data.targets, *names) < per_class).nonzero().squeeze(1))

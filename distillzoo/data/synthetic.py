"""Synthetic images for tests and smoke runs: a blocky prototype for every class, and noise."""

from __future__ import annotations

import torch
from torch import Tensor

from distillzoo.data.arrays import Augment, Split
from distillzoo.data.base import DATASETS, ResidentDataSet, SplitName, training_spec
from distillzoo.data.splits import hold_out
from distillzoo.errors import OptionError
from distillzoo.streams import Stream

__all__ = ["synthetic"]

_SEED = 7
_CELLS = 4  # a prototype is 4x4 cells of one colour: crops of a few pixels leave it recognisable
_CHUNK = 1024  # images generated at once: bounds the memory of the int64 draws


@DATASETS.register("synthetic")
def synthetic(
    *, split: SplitName = "test", num_classes: int = 10, size: int = 32, num_train: int = 512, num_test: int = 256
) -> ResidentDataSet:
    """Make synthetic images: everything is integer arithmetic on :class:`~distillzoo.streams.Stream`, equal on every machine.

    Args:
        split: What networks are evaluated on; ``"heldout"`` holds a tenth of every class out (at least one image).
        num_classes: Number of classes, at least 2.
        size: Height and width in pixels, at least 4.
        num_train: Training images, at least one a class (two with ``"heldout"``).
        num_test: Test images, at least 1.
    Raises:
        OptionError: If a number is out of range.
    """
    least = {"num_classes": 2, "size": 4, "num_train": num_classes * (2 if split == "heldout" else 1), "num_test": 1}
    given = {"num_classes": num_classes, "size": size, "num_train": num_train, "num_test": num_test}
    for option, value in given.items():
        if type(value) is not int or value < least[option]:
            raise OptionError(
                f"{option} of synthetic must be a whole number, at least {least[option]} with {num_classes} classes and split "
                f"{split!r}; got {value!r}; choose a larger one."
            )
    train, evaluation = (_generate(part, number, num_classes, size) for part, number in (("train", num_train), ("test", num_test)))
    if split == "heldout":
        train, evaluation = hold_out(train, max(1, num_train // num_classes // 10), "synthetic", "heldout")
    return ResidentDataSet(
        name="synthetic",
        title="synthetic",
        split=split,
        class_names=tuple(f"class {label}" for label in range(num_classes)),
        spec=training_spec(train, num_classes, (0.5,) * 3, (0.25,) * 3),
        augment=Augment(pad=size // 8, flip=True),
        train=train,
        evaluation=evaluation,
    )


def _generate(part: str, number: int, num_classes: int, size: int) -> Split:
    cells = torch.arange(num_classes * _CELLS * _CELLS * 3)
    prototypes = Stream.named(_SEED, "synthetic", "prototype").integers(0, cells, 128).add_(64)
    prototypes = prototypes.view(num_classes, _CELLS, _CELLS, 3)
    cell = torch.arange(size) * _CELLS // size
    prototypes = prototypes[:, cell][:, :, cell]
    targets = torch.arange(number) % num_classes
    images = torch.empty((number, size, size, 3), dtype=torch.uint8)
    for start in range(0, number, _CHUNK):
        rows = torch.arange(start, min(start + _CHUNK, number))
        images[rows] = (prototypes[targets[rows]] + _noise(part, rows, size)).to(torch.uint8)
    return Split(images, targets)


def _noise(part: str, rows: Tensor, size: int) -> Tensor:
    """Draw the noise of some images: the sum of two uniform draws, -64 .. 62, which keeps every pixel within 0 .. 255."""
    pixels = rows.view(-1, 1, 1, 1) * (size * size * 3) + torch.arange(size * size * 3).view(1, size, size, 3)
    stream = Stream.named(_SEED, "synthetic", "noise", part)
    return stream.integers(0, pixels, 64) + stream.integers(1, pixels, 64) - 64

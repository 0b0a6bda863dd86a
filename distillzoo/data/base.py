"""What a data set is to the rest of the project, and how one is loaded by name."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import Any, Literal, Protocol

import torch

from distillzoo.data.arrays import Augment, Split
from distillzoo.data.loader import ResidentLoader
from distillzoo.errors import DataError, OptionError, unknown_name
from distillzoo.registry import Registry
from distillzoo.types import DataSpec, Loader

__all__ = ["DATASETS", "SPLITS", "DataSet", "ResidentDataSet", "SplitName", "load_dataset", "takes_root", "training_spec"]

SplitName = Literal["test", "heldout"]
SPLITS: tuple[SplitName, ...] = ("test", "heldout")
"""What a network is evaluated on: the test set, or training images that were held out (for every choice that is made)."""


class DataSet(Protocol):
    """Training images and what networks are evaluated on.

    A data set that does not fit into memory has the same interface; its loaders are its own.
    """

    @property
    def name(self) -> str:
        """Registered name."""
        ...

    @property
    def spec(self) -> DataSpec:
        """What a distiller may know; ``num_samples`` and ``targets`` are those of the training subset."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        ...

    @property
    def split(self) -> SplitName:
        """What networks are evaluated on."""
        ...

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change when any training or evaluation image or label does."""
        ...

    @property
    def description(self) -> str:
        """One line for captions: the data set and how many images train and evaluate."""
        ...

    @property
    def augment(self) -> object | None:
        """How training images are varied; its ``repr`` goes into records. ``None``: not at all."""
        ...

    def train_loader(
        self, batch_size: int, *, seed: int, device: torch.device | str = "cpu", channels_last: bool = False
    ) -> Loader:
        """Return the loader of the training subset: shuffled and augmented.

        Args:
            batch_size: Images in a batch.
            seed: Seed of order and views.
            device: Where batches are wanted.
            channels_last: Whether images are laid out with the channels last in memory.
        """
        ...

    def eval_loader(self, batch_size: int, *, device: torch.device | str = "cpu", channels_last: bool = False) -> Loader:
        """Return the loader of the evaluation images: in order, never augmented.

        Args:
            batch_size: Images in a batch.
            device: Where batches are wanted.
            channels_last: Whether images are laid out with the channels last in memory.
        """
        ...


def described(title: str, split: SplitName, train: int, evaluation: int) -> str:
    """Return what captions say of a data set with so many images."""
    return f"{title}, {train:,} training and {evaluation:,} {'test' if split == 'test' else 'held-out training'} images"


@dataclass(frozen=True, eq=False)
class ResidentDataSet:
    """A data set that fits into the device's memory; it follows :class:`DataSet`.

    Args:
        name: Registered name.
        title: Name as it is written in captions.
        split: What networks are evaluated on.
        class_names: Names of the classes, by label.
        spec: What a distiller may know (see :func:`training_spec`).
        augment: How training images are varied; ``None`` leaves them alone.
        train: The training subset.
        evaluation: The images of the split.
    Raises:
        DataError: If a label has no class name, or the number of names is not the number of classes.
    """

    name: str
    title: str
    split: SplitName
    class_names: tuple[str, ...]
    spec: DataSpec
    augment: Augment | None
    train: Split
    evaluation: Split
    _resident: dict[tuple[torch.device, str], Split] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.class_names) != self.spec.num_classes:
            raise DataError(
                f"{self.title} has {self.spec.num_classes} classes but {len(self.class_names)} class names; give one name a class."
            )
        for part in (self.train, self.evaluation):
            low, high = int(part.targets.min()), int(part.targets.max())
            if low < 0 or high >= self.spec.num_classes:
                raise DataError(
                    f"{self.title} has labels from {low} to {high}, allowed are 0 to {self.spec.num_classes - 1}; "
                    "check the number of classes and the source of the labels."
                )

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change when any training or evaluation image or label does."""
        identity = hashlib.sha256()
        for part in (self.train, self.evaluation):
            identity.update(repr(tuple(part.images.shape)).encode())
            identity.update(part.planes.numpy().data)
            identity.update(part.targets.numpy().data)
        return identity.hexdigest()[:12]

    @property
    def description(self) -> str:
        """One line for captions."""
        return described(self.title, self.split, len(self.train), len(self.evaluation))

    def train_loader(
        self, batch_size: int, *, seed: int, device: torch.device | str = "cpu", channels_last: bool = False
    ) -> ResidentLoader:
        """Return the loader of the training subset: shuffled and augmented; the images stay on the device for the next one."""
        data = self._on(device, "train")
        return ResidentLoader(data, self.spec, batch_size=batch_size, seed=seed, augment=self.augment, channels_last=channels_last)

    def eval_loader(self, batch_size: int, *, device: torch.device | str = "cpu", channels_last: bool = False) -> ResidentLoader:
        """Return the loader of the evaluation images: in order, never augmented; the images stay on the device too."""
        spec = replace(self.spec, num_samples=None, targets=None)  # those of the training subset would be wrong here
        data = self._on(device, "evaluation")
        return ResidentLoader(data, spec, batch_size=batch_size, shuffle=False, channels_last=channels_last)

    def _on(self, device: torch.device | str, part: Literal["train", "evaluation"]) -> Split:
        device = torch.device(device)
        key = (device, part)
        if key not in self._resident:
            self._resident[key] = (self.train if part == "train" else self.evaluation).to(device)
        return self._resident[key]


DATASETS: Registry[Callable[..., DataSet]] = Registry("data set")
"""Functions that load a data set, by name.

Each takes keyword arguments only: ``split``, its own options, and ``root`` or ``download`` where it reads files or can fetch them.
"""


def training_spec(train: Split, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]) -> DataSpec:
    """Return what a distiller may know about a training subset.

    Args:
        train: The training subset.
        num_classes: Number of classes.
        mean: Mean of each channel of images scaled to 0..1.
        std: Standard deviation of each channel.
    """
    _, height, width, _ = train.images.shape
    return DataSpec(num_classes, (height, width), mean, std, num_samples=len(train), targets=train.targets)


def takes_root(name: str) -> bool:
    """Return whether a data set reads files, so that their folder is to be named.

    Args:
        name: Registered name.
    Raises:
        UnknownNameError: If there is no such data set.
    """
    return "root" in inspect.signature(DATASETS[name]).parameters


def load_dataset(
    name: str,
    *,
    root: str | PathLike[str] | None = None,
    split: SplitName = "test",
    download: bool = False,
    **options: Any,
) -> DataSet:
    """Load a data set by name.

    Args:
        name: Registered name.
        root: Folder of the files, for data sets that read some.
        split: ``"test"`` trains on all training images and evaluates on the test set; ``"heldout"`` trains on a part of them and
            evaluates on the rest, always the same, for whatever is chosen (learning rates, weights, defaults).
        download: Whether missing files may be fetched.
        options: Options of the data set.
    Raises:
        UnknownNameError: If there is no such data set.
        OptionError: If an option does not exist or has a value that is not allowed.
        DataError: If the files are missing, damaged or not those of the data set.
        MissingDependencyError: If a package that the data set comes with is not installed.
    Example:
        >>> load_dataset("synthetic", num_classes=3, num_train=30, num_test=9).description
        'synthetic, 30 training and 9 test images'
    """
    load = DATASETS[name]
    if split not in SPLITS:
        raise OptionError(unknown_name("split", str(split), SPLITS, listed="Allowed"))
    takes = set(inspect.signature(load).parameters)
    for option, asked in (("root", root is not None), ("download", bool(download))):
        if asked and option not in takes:
            if "root" in takes:
                raise OptionError(
                    f"The data set {name!r} cannot be downloaded here, but download was given; name a folder that holds it "
                    "(--data-root DIR) without --download."
                )
            given = f"root {str(root)!r}" if option == "root" else "download"
            raise OptionError(
                f"The data set {name!r} reads no files, but {given} was given; leave it out, or name another data set."
            )
    own = takes - {"split", "root", "download"}
    for option in options:
        if option not in own:
            raise OptionError(unknown_name(f"option of data set {name!r}", option, own, listed="Allowed"))
    places = {"root": root, "download": download}
    return load(split=split, **{key: value for key, value in places.items() if key in takes}, **options)

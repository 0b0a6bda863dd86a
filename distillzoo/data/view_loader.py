"""What data sets of photographs and their loaders share: order, windows and batches; how pixels come about is each one's own.

The order of an epoch is a pure function of (seed, phase, epoch); the view of an image is one of (seed, phase, epoch, position of
the image). Neither depends on batch size, number of workers, device or what ran before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from distillzoo.data.arrays import normalise
from distillzoo.data.base import SplitName, described
from distillzoo.data.class_lists import ClassList
from distillzoo.data.crops import CropViews
from distillzoo.errors import OptionError
from distillzoo.kinds import is_whole
from distillzoo.streams import Stream, draw_seed
from distillzoo.types import Batch, DataSpec

__all__ = ["Plan", "ViewLoader"]


@dataclass(frozen=True, eq=False)
class Plan:
    """What is wanted of an epoch.

    Args:
        rows: ``(N,)`` int64 positions of the images, in order.
        windows: ``(N, 5)`` int64 for every view: top, left, height, width, mirrored; none where the middle is cut out.
    """

    rows: Tensor
    windows: tuple[Tensor, ...]

    def part(self, start: int, stop: int) -> Plan:
        """Return the plan of some images in a row.

        Args:
            start: The first.
            stop: One after the last.
        """
        return Plan(self.rows[start:stop], tuple(view[start:stop] for view in self.windows))


class ViewLoader(ABC):
    """Batches of photographs; it follows :class:`distillzoo.types.Loader`. An incomplete last batch is kept.

    Args:
        spec: What a distiller may know about the data.
        targets: ``(N,)`` int64 labels of the images.
        sizes: ``(N, 2)`` int64 heights and widths of the images before they are cropped.
        views: How they are cropped.
        batch_size: Images in a batch, at least 1.
        seed: Seed of order and views; ``None`` evaluates: in order, the middle of every image.
        device: Where batches are wanted.
        channels_last: Whether images are laid out with the channels last in memory.
    Raises:
        OptionError: If the batch size or the seed is out of range.
    """

    def __init__(
        self,
        spec: DataSpec,
        targets: Tensor,
        sizes: Tensor,
        views: CropViews,
        *,
        batch_size: int,
        seed: int | None,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> None:
        if not is_whole(batch_size, 1):
            raise OptionError(
                f"batch_size must be a whole number of images, at least 1; got {batch_size!r}; choose one, such as 64."
            )
        self._spec = spec
        self._targets = targets
        self._sizes = sizes
        self._views = views
        self._batch_size = batch_size
        self._seed = None if seed is None else draw_seed(seed)
        self._device = torch.device(device)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._mean, self._std = (torch.tensor(values, device=self._device).view(-1, 1, 1) for values in (spec.mean, spec.std))

    @property
    def spec(self) -> DataSpec:
        """What a distiller may know about the data."""
        return self._spec

    def __len__(self) -> int:
        """Return the number of batches in an epoch; an incomplete last batch counts."""
        return -(-len(self._targets) // self._batch_size)

    def epoch(self, epoch: int, *, phase: str = "main", second_view: bool = False) -> Iterator[Batch]:
        """Return the batches of an epoch.

        Args:
            epoch: Which epoch of the phase, counted from 0.
            phase: Name of the phase: each has orders and views of its own.
            second_view: Whether batches carry another augmentation of the same images.
        Raises:
            OptionError: If ``epoch`` is negative, or a second view is asked of evaluation images.
            DataError: If a file cannot be used, as its turn comes.
        """
        if not is_whole(epoch, 0):
            raise OptionError(f"epoch must be a whole number, at least 0; got {epoch!r}; the first epoch is 0.")
        if second_view and self._seed is None:
            raise OptionError(
                "A second view was asked for, but this loader does not augment, so both views would be equal; "
                "use a training loader, or a method that needs one view."
            )
        return self._batches(self._plan(epoch, phase, second_view))

    def _plan(self, epoch: int, phase: str, second_view: bool) -> Plan:
        if self._seed is None:
            return Plan(torch.arange(len(self._targets)), ())
        rows = Stream.named(self._seed, "order", phase).permutation(epoch, len(self._targets))
        names = ("first", "second") if second_view else ("first",)
        return Plan(rows, tuple(self._views.draw(self._seed, name, phase, epoch, rows, self._sizes[rows]) for name in names))

    def _batches(self, plan: Plan) -> Iterator[Batch]:
        parts = [plan.part(start, start + self._batch_size) for start in range(0, len(plan.rows), self._batch_size)]
        for part, views in zip(parts, self._pixels(parts), strict=True):
            first, *second = (self._finish(view) for view in views)
            targets = self._targets[part.rows].to(self._device, non_blocking=True)
            yield Batch(first, targets, part.rows.to(self._device, non_blocking=True), second[0] if second else None)

    def _finish(self, pixels: Tensor) -> Tensor:
        images = normalise(pixels.to(self._device, non_blocking=True), self._mean, self._std)
        return images.contiguous(memory_format=self._format)

    @abstractmethod
    def _pixels(self, parts: list[Plan]) -> Iterator[tuple[Tensor, ...]]:
        """Yield for every batch the ``(B, 3, crop, crop)`` uint8 images of its views."""


class _Images(Protocol):
    @property
    def targets(self) -> Tensor: ...

    def __len__(self) -> int: ...


ImagesT = TypeVar("ImagesT", bound=_Images)


@dataclass(frozen=True, eq=False)
class ViewDataSet(ABC, Generic[ImagesT]):
    """Photographs that a :class:`ViewLoader` reads; it follows :class:`distillzoo.data.DataSet`."""

    name: str
    title: str
    split: SplitName
    class_names: tuple[str, ...]
    augment: CropViews
    train: ImagesT
    evaluation: ImagesT
    class_list: ClassList | None = field(default=None, kw_only=True)

    @cached_property
    def spec(self) -> DataSpec:
        """What a distiller may know about the data."""
        views = self.augment
        size, number = (views.crop, views.crop), len(self.class_names)
        return DataSpec(number, size, views.mean, views.std, num_samples=len(self.train), targets=self.train.targets)

    @property
    def description(self) -> str:
        """One line for captions."""
        return described(self.title, self.split, len(self.train), len(self.evaluation))

    def train_loader(
        self, batch_size: int, *, seed: int, device: torch.device | str = "cpu", channels_last: bool = False
    ) -> ViewLoader:
        """Return the loader of the training subset: shuffled and augmented."""
        return self._loader(self.train, self.spec, batch_size, seed, device, channels_last)

    def eval_loader(self, batch_size: int, *, device: torch.device | str = "cpu", channels_last: bool = False) -> ViewLoader:
        """Return the loader of the evaluation images: in order, the middle of each."""
        spec = replace(self.spec, num_samples=None, targets=None)  # those of the training subset would be wrong here
        return self._loader(self.evaluation, spec, batch_size, None, device, channels_last)

    @abstractmethod
    def _loader(
        self, part: ImagesT, spec: DataSpec, batch_size: int, seed: int | None, device: torch.device | str, channels_last: bool
    ) -> ViewLoader:
        """Return the loader of some images; without a seed it evaluates."""

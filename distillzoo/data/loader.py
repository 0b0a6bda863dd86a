"""The loader for everything that fits into the device's memory: batches of replayable views, made there.

The order of an epoch is a pure function of (seed, phase, epoch); the view of an image is a pure function of (seed, phase,
epoch, position of the image). Neither depends on batch size, order, device, number of workers or what ran before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distillzoo.data.arrays import Augment, Split, crop_flip, normalise
from distillzoo.errors import OptionError, ShapeError
from distillzoo.kinds import is_whole
from distillzoo.streams import Stream, draw_seed
from distillzoo.types import Batch, DataSpec

__all__ = ["ResidentLoader"]

_AHEAD_ON_GPU = 4096  # images made at once on a GPU, where the launches of a small batch cost more than its work


class ResidentLoader:
    """Batches of a split that lies on the device as uint8: per-sample pad, crop and flip for the whole batch at once.

    It follows :class:`distillzoo.types.Loader`. An incomplete last batch is kept. Where the images lie is where batches are made.

    Args:
        data: Images and labels, on the device of the batches.
        spec: What a distiller may know about the data; mean and standard deviation of it normalise the images.
        batch_size: Images in a batch, at least 1.
        seed: Seed of order and views.
        augment: How images are varied; ``None`` leaves them alone.
        shuffle: Whether every epoch has its own order; otherwise the split's.
        channels_last: Whether images are laid out with the channels last in memory (their shape is the same).
    Raises:
        OptionError: If the batch size or the seed is out of range, or ``spec`` counts other samples than there are.
        ShapeError: If the images have another size or number of channels than ``spec`` says.
    Example:
        >>> split = Split(torch.zeros(5, 8, 8, 3, dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 0]))
        >>> loader = ResidentLoader(split, DataSpec(2, (8, 8)), batch_size=2, seed=0, augment=Augment(pad=1, flip=True))
        >>> [tuple(batch.images.shape) for batch in loader.epoch(0)]
        [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    """

    def __init__(
        self,
        data: Split,
        spec: DataSpec,
        *,
        batch_size: int,
        seed: int = 0,
        augment: Augment | None = None,
        shuffle: bool = True,
        channels_last: bool = False,
    ) -> None:
        if not is_whole(batch_size, 1):
            raise OptionError(
                f"batch_size must be a whole number of images, at least 1; got {batch_size!r}; choose one, such as 64."
            )
        if spec.num_samples is not None and spec.num_samples != len(data):
            raise OptionError(
                f"spec.num_samples is {spec.num_samples} but the loader has {len(data)} images; index counts within the loader's "
                "images, so pass the number of those or None."
            )
        _check_images(data, spec)
        self._spec = spec
        self._planes = data.planes
        self._targets = data.targets
        self._batch_size = batch_size
        self._seed = draw_seed(seed)
        self._augment = augment
        self._shuffle = shuffle
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        device = data.images.device
        self._mean, self._std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (spec.mean, spec.std))
        self._ahead = max(1, _AHEAD_ON_GPU // batch_size) if device.type == "cuda" else 1

    @property
    def spec(self) -> DataSpec:
        """What a distiller may know about the data."""
        return self._spec

    def __len__(self) -> int:
        """Return the number of batches in an epoch; an incomplete last batch counts."""
        return -(-len(self._planes) // self._batch_size)

    def epoch(self, epoch: int, *, phase: str = "main", second_view: bool = False) -> Iterator[Batch]:
        """Return the batches of an epoch.

        Args:
            epoch: Which epoch of the phase, counted from 0.
            phase: Name of the phase: each has orders and views of its own.
            second_view: Whether batches carry another augmentation of the same images.
        Raises:
            OptionError: If ``epoch`` is negative, or a second view is asked for and nothing varies the images.
        """
        if not is_whole(epoch, 0):
            raise OptionError(f"epoch must be a whole number, at least 0; got {epoch!r}; the first epoch is 0.")
        if second_view and self._augment is None:
            raise OptionError(
                "A second view was asked for, but this loader does not augment, so both views would be equal; "
                "use a training loader with augmentation, or a method that needs one view."
            )
        return self._batches(epoch, phase, second_view)

    def _batches(self, epoch: int, phase: str, second_view: bool) -> Iterator[Batch]:
        size, device = len(self._planes), self._planes.device
        with _one_thread():
            if self._shuffle:
                order = Stream.named(self._seed, "order", phase).permutation(epoch, size, device)
            else:
                order = torch.arange(size, device=device)
            views = [self._draws(name, epoch, phase, order) for name in (("first", "second") if second_view else ("first",))]
        step = self._ahead * self._batch_size
        for start in range(0, size, step):
            rows = order[start : start + step]
            targets = self._targets.index_select(0, rows)
            with _one_thread():
                images = [self._view(rows, tuple(draw[start : start + step] for draw in draws)) for draws in views]
            parts = [torch.split(piece, self._batch_size) for piece in (targets, rows, *images)]
            for targets_part, rows_part, first, *second in zip(*parts, strict=True):
                yield Batch(first, targets_part, rows_part, second[0] if second else None)

    def _draws(self, view: str, epoch: int, phase: str, order: Tensor) -> tuple[Tensor, ...]:
        """Draw the window corners and flips of a whole epoch; the phase comes last in the name, so that no two names can meet."""
        if self._augment is None:
            return ()
        bounds = {"top": 2 * self._augment.pad + 1, "left": 2 * self._augment.pad + 1}
        if self._augment.flip:
            bounds["flip"] = 2
        return tuple(
            Stream.named(self._seed, "views", view, what, phase).integers(epoch, order, bound) for what, bound in bounds.items()
        )

    def _view(self, rows: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
        images = self._planes.index_select(0, rows)
        if self._augment is not None:
            top, left, *flip = draws
            images = crop_flip(images, top, left, flip[0] if flip else None, self._augment.pad)
        return normalise(images, self._mean, self._std).contiguous(memory_format=self._format)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run the block on one thread: for so little work threads gain little, and on a busy machine they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_images(data: Split, spec: DataSpec) -> None:
    _, height, width, channels = data.images.shape
    if (height, width) != spec.input_size or channels != spec.channels:
        raise ShapeError(
            f"Images are {height}x{width} with {channels} channels, but spec says {spec.input_size[0]}x{spec.input_size[1]} with "
            f"{spec.channels}; give the spec the size of the images, and mean and std one number a channel."
        )

"""The loader of image files: decoded, cropped and resized one by one in worker processes, normalised on the device."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distillzoo.data.crops import CropViews, centre_box
from distillzoo.data.images import read_image
from distillzoo.data.tree import Listing, available_cpus
from distillzoo.data.view_loader import Plan, ViewLoader
from distillzoo.errors import DataError, OptionError
from distillzoo.kinds import is_whole
from distillzoo.types import DataSpec

__all__ = ["FileLoader", "check_workers", "resize_short_side"]

_MOST_WORKERS = 16  # more are seldom of use to one GPU, and each holds two batches


class FileLoader(ViewLoader):
    """Batches of image files; the view of an image is that of torchvision's per-image transforms, whatever the number of workers.

    Args:
        files: The files, with labels and sizes.
        spec: What a distiller may know about the data.
        views: How images are cropped.
        batch_size: Images in a batch, at least 1.
        seed: Seed of order and views; ``None`` evaluates: in order, the middle of every image.
        device: Where batches are wanted.
        channels_last: Whether images are laid out with the channels last in memory.
        workers: Processes that read images; 0 reads in this one, ``None`` takes as many as there are processors, up to 16.
    Raises:
        OptionError: If the batch size, the seed or the number of workers is out of range.
    """

    def __init__(
        self,
        files: Listing,
        spec: DataSpec,
        views: CropViews,
        *,
        batch_size: int,
        seed: int | None,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        workers: int | None = None,
    ) -> None:
        super().__init__(
            spec, files.targets, files.sizes, views, batch_size=batch_size, seed=seed, device=device, channels_last=channels_last
        )
        self._files = files
        self._workers = check_workers(workers)

    def _pixels(self, parts: list[Plan]) -> Iterator[tuple[Tensor, ...]]:
        workers = min(self._workers, len(parts))
        loader: DataLoader[tuple[Tensor, ...] | str] = DataLoader(
            _Batches(self._files, self._views, parts),
            batch_size=None,
            num_workers=workers,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_ignore_interrupt if workers else None,
            generator=torch.Generator(),  # its own: the loader would otherwise draw from torch's global one
        )
        batches = iter(loader)
        while True:
            try:
                found = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:  # a worker was killed, for want of memory or of shared memory
                raise DataError(
                    f"A worker process that reads images ended ({str(error).splitlines()[0]}); {workers} were at work; use fewer "
                    "(workers=0 reads in the training process), or give the machine more memory (a container: more /dev/shm)."
                ) from error
            if isinstance(found, str):
                raise DataError(found)
            yield found


class _Batches(Dataset[tuple[Tensor, ...] | str]):
    """The batches of an epoch as a worker makes them; a file that cannot be used comes back as the sentence about it."""

    def __init__(self, files: Listing, views: CropViews, parts: list[Plan]) -> None:
        self.files = files
        self.views = views
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> tuple[Tensor, ...] | str:
        part = self.parts[number]
        try:
            images = [self._views_of(int(row), [view[at].tolist() for view in part.windows]) for at, row in enumerate(part.rows)]
        except DataError as error:
            return str(error)
        return tuple(torch.stack(view) for view in zip(*images, strict=True))

    def _views_of(self, row: int, windows: list[list[int]]) -> list[Tensor]:
        path = self.files.root / self.files.names[row]
        image = read_image(path)
        if [image.height, image.width] != self.files.sizes[row].tolist():
            raise DataError(
                f"The image file {str(path)!r} has another size than at the start, {image.width} x {image.height} pixels; the data "
                "must not change while it is read; start again."
            )
        if not windows:
            return [_tensor(_resize_and_cut(image, self.views))]
        made = []
        for top, left, height, width, flip in windows:
            view = image.crop((left, top, left + width, top + height)).resize((self.views.crop,) * 2, Image.Resampling.BILINEAR)
            made.append(_tensor(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view))
        return made


def resize_short_side(image: Image.Image, short: int) -> Image.Image:
    """Resize an image so that its short side has ``short`` pixels and its shape stays, rounded down as torchvision does."""
    width, height = image.size
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def _resize_and_cut(image: Image.Image, views: CropViews) -> Image.Image:
    """Return what a network is evaluated on: the image resized by its short side, the middle cut out."""
    image = resize_short_side(image, views.resize)
    top, left = centre_box(image.height, image.width, views.crop)
    return image.crop((left, top, left + views.crop, top + views.crop))


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def check_workers(workers: int | None) -> int:
    """Return the number of worker processes.

    Args:
        workers: What was asked for; ``None`` takes as many as there are processors, up to 16.

    Raises:
        OptionError: If it is no whole number from 0 on.
    """
    if workers is None:
        return min(available_cpus(), _MOST_WORKERS)
    if not is_whole(workers, 0):
        raise OptionError(f"workers must be a whole number of processes, at least 0, or None; got {workers!r}; 0 starts none.")
    return workers


def _ignore_interrupt(worker: int) -> None:  # noqa: ARG001 - the interface of a DataLoader
    """Leave Ctrl-C to the training process, which ends its workers: else each would print a traceback of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

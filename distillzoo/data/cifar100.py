"""CIFAR-100: 60,000 photographs of 32x32 pixels in 100 classes."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from distillzoo.data import cifar_files as files
from distillzoo.data.arrays import Augment
from distillzoo.data.base import DATASETS, ResidentDataSet, SplitName, training_spec
from distillzoo.data.splits import hold_out
from distillzoo.errors import DataError, OptionError

__all__ = ["cifar100"]

_HELD_OUT_PER_CLASS = 50  # 5,000 of the 50,000 training images
_MEAN, _STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # the constants of the published comparisons
_URL = "https://www.cs.toronto.edu/~kriz/" + files.ARCHIVE


@DATASETS.register("cifar100")
def cifar100(*, root: str | PathLike[str] | None = None, split: SplitName = "test", download: bool = False) -> ResidentDataSet:
    """Load CIFAR-100 from its standard files.

    A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", technical report, University of Toronto, 2009.

    Args:
        root: The folder that holds ``cifar-100-python`` or ``cifar-100-python.tar.gz``; the archive is read where it is.
        split: What networks are evaluated on; ``"heldout"`` holds 50 training images of every class out, always the same.
        download: Whether to fetch the archive into ``root`` where neither is there.
    Raises:
        OptionError: If no root is given.
        DataError: If the files are missing, damaged, or not those of CIFAR-100.
    """
    if root is None:
        raise OptionError(
            f"The data set 'cifar100' needs a data root, none was given; name the folder that holds {files.FOLDER} or "
            f"{files.ARCHIVE} (--data-root DIR), or a folder to fetch it into together with --download."
        )
    folder = Path(root).expanduser()
    if download:
        _download(folder)
    place = files.find(folder)
    content = files.read_files(place)
    class_names = files.parse_names(content.pop("meta"), place / "meta")
    train, evaluation = (files.parse_split(content.pop(part), place / part) for part in ("train", "test"))
    if split == "heldout":
        train, evaluation = hold_out(train, _HELD_OUT_PER_CLASS, "cifar100", "heldout")
    return ResidentDataSet(
        name="cifar100",
        title="CIFAR-100",
        split=split,
        class_names=class_names,
        spec=training_spec(train, 100, _MEAN, _STD),
        augment=Augment(pad=4, flip=True),
        train=train,
        evaluation=evaluation,
    )


def _download(root: Path) -> None:
    """Fetch the archive into a folder that holds nothing of CIFAR-100 yet; it is not extracted, and read only after its digest."""
    from torchvision.datasets.utils import download_url

    try:
        if root.is_file() or any((root / name).exists() for name in (files.FOLDER, files.ARCHIVE, "train")):
            return  # whatever is wrong with it, reading says so better
        download_url(_URL, str(root), files.ARCHIVE + ".part", files.ARCHIVE_MD5)
        (root / (files.ARCHIVE + ".part")).replace(root / files.ARCHIVE)
    except (OSError, RuntimeError) as error:  # no network, no space, no permission; an interrupted or altered file
        raise DataError(
            f"Cannot download CIFAR-100 from {_URL} into {str(root)!r} ({error}); it needs a network and a folder to write to; "
            f"fetch {files.ARCHIVE} by other means and put it there."
        ) from error

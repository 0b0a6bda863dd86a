"""Images decoded once: the format of a packed folder, and writing one.

A packed folder holds ``index.json`` and, for training and evaluation images, one file of bytes: the images one after the other,
each (height, width, 3) uint8, the short side of all equal. The folder appears under its name when all is written, never before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from distillzoo.data.file_loader import resize_short_side
from distillzoo.data.images import read_image
from distillzoo.data.tree import Listing, Tree, available_cpus, read_tree
from distillzoo.errors import DataError, OptionError
from distillzoo.kinds import is_whole

__all__ = ["INDEX", "Packed", "PackedPart", "file_sha256", "pack_folder", "read_index"]

INDEX = "index.json"
_VERSION = 1
_AHEAD = 64  # images decoded at once: bounds the memory
_MANY_BYTES = 1 << 26


@dataclass(frozen=True)
class PackedPart:
    """One file of images.

    Args:
        file: Its name in the packed folder.
        bytes: Its length, padding at the end included.
        sha256: Digest of its content.
        labels: Label of each image.
        sizes: Height and width of each image in pixels.
        offsets: Where each image starts, in bytes.
        names: Where each image came from, below the source folder.
    """

    file: str
    bytes: int
    sha256: str
    labels: list[int]
    sizes: list[list[int]]
    offsets: list[int]
    names: list[str]


@dataclass(frozen=True)
class Packed:
    """The index of a packed folder.

    Args:
        version: Version of the format.
        source: Name of the folder that was packed.
        short_side: Short side of all images in pixels.
        seeded: Whether the evaluation images were split off one tree.
        classes: Names of the classes, by label.
        skipped: Files that were left out because they cannot be used.
        train: Training images.
        evaluation: Evaluation images.
    """

    version: int
    source: str
    short_side: int
    seeded: bool
    classes: list[str]
    skipped: list[str]
    train: PackedPart
    evaluation: PackedPart

    @property
    def summary(self) -> str:
        """One line: what was packed, and how large it is."""
        size = self.train.bytes + self.evaluation.bytes
        left_out = f", {len(self.skipped):,} unusable files left out" if self.skipped else ""
        return (
            f"{self.source}: {len(self.train.labels):,} training and {len(self.evaluation.labels):,} evaluation images of "
            f"{len(self.classes)} classes, short side {self.short_side} pixels, {size / 1e9:.2f} GB{left_out}"
        )


def pack_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    short_side: int = 256,
    classes: Sequence[str] | None = None,
    skip_bad: bool = False,
    restart: bool = False,
    advance: Callable[[int, int], None] | None = None,
) -> Packed:
    """Decode every image of a folder once, resize it by its short side as evaluation does, and write all into one file a part.

    Args:
        source: The folder of images, as for the data set ``folder``.
        target: The folder to write; it must not exist. Until all is written it is called ``target.partial``.
        short_side: Short side of the packed images in pixels. Evaluation images are cut from them without another resize.
        classes: Names of the class folders to pack; their order gives the labels. ``None`` packs all, sorted.
        skip_bad: Whether to leave out files that cannot be used; otherwise the first ends the work.
        restart: Whether to throw ``target.partial`` away, which an interrupted call has left.
        advance: Told how many images are done, of how many.
    Raises:
        OptionError: If the short side is out of range.
        DataError: If the source is not as it should be, or the target exists or cannot be written.
    """
    if not is_whole(short_side, 8):
        raise OptionError(f"short_side must be a whole number of pixels, at least 8; got {short_side!r}; choose one, such as 256.")
    place = Path(target).expanduser()
    partial = place.with_name(place.name + ".partial")
    if place.exists():
        raise DataError(f"The folder {str(place)!r} exists; packing writes a new folder only; name another one, or remove it.")
    if partial.exists() and not restart:
        raise DataError(
            f"{str(partial)!r} was left by a call that was interrupted or is still running; packing begins anew only on request; "
            "wait for the other call, or pass restart=True (--restart), which removes it."
        )
    tree = read_tree(source, classes=classes, skip_bad=skip_bad)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        index = _write(tree, partial, short_side, advance or (lambda *_: None))
        partial.replace(place)
    except DataError:  # a file that cannot be used: what was written until then is of no use
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        gigabytes = 4 * short_side**2 * (len(tree.train) + len(tree.evaluation)) / 1e9
        raise DataError(
            f"Cannot write {str(error.filename or partial)!r} ({error.strerror or error}); packing needs about {gigabytes:.1f} GB; "
            "free space or name another folder."
        ) from error
    return index


def read_index(root: str | os.PathLike[str]) -> Packed:
    """Read the index of a packed folder and check that its files are whole.

    Args:
        root: The packed folder.
    Raises:
        DataError: If it is none, is half written, or a file has another length than was written.
    """
    place = Path(root).expanduser()
    again = "pack the images again (python -m distillzoo pack SRC DST) and name DST"
    if not (place / INDEX).is_file():
        partial = place.with_name(place.name + ".partial")
        there = "is half written" if place.name.endswith(".partial") or partial.is_dir() else f"has no {INDEX}"
        there = there if place.exists() or partial.exists() else "does not exist"
        raise DataError(f"The packed folder {str(place)!r} {there}; expected is what packing wrote to the end; {again}.")
    try:
        content: dict[str, Any] = json.loads((place / INDEX).read_bytes())
        train, evaluation = (PackedPart(**content.pop(name)) for name in ("train", "evaluation"))
        index = Packed(**content, train=train, evaluation=evaluation)
        if index.version != _VERSION:
            raise ValueError(f"it has version {index.version}, this package reads version {_VERSION}")
        for part in (train, evaluation):
            _check_part(place / part.file, part)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"The packed folder {str(place)!r} is damaged or not of this format ({type(error).__name__}: {error}); {again}."
        ) from error
    return index


def file_sha256(path: Path) -> str:
    """Return the digest of a file's content.

    Args:
        path: The file.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_part(path: Path, part: PackedPart) -> None:
    if path.stat().st_size != part.bytes:
        raise ValueError(f"{part.file} has {path.stat().st_size:,} bytes, {part.bytes:,} were written")
    counts = {len(part.labels), len(part.sizes), len(part.offsets), len(part.names)}
    ends = [offset + 3 * height * width for offset, (height, width) in zip(part.offsets, part.sizes, strict=False)]
    if len(counts) > 1 or not ends or max(ends) > part.bytes or min(part.offsets) < 0:
        raise ValueError(f"the entries of {part.file} do not agree")


def _write(tree: Tree, folder: Path, short_side: int, advance: Callable[[int, int], None]) -> Packed:
    total = len(tree.train) + len(tree.evaluation)
    train = _write_part(tree.train, folder / "train.bin", short_side, lambda done: advance(done, total))
    evaluation = _write_part(tree.evaluation, folder / "val.bin", short_side, lambda done: advance(len(tree.train) + done, total))
    name = tree.root.resolve().name
    index = Packed(_VERSION, name, short_side, tree.seeded, list(tree.classes), list(tree.skipped), train, evaluation)
    with open(folder / INDEX, "wb") as file:
        file.write(json.dumps(asdict(index)).encode())
        _sync(file)
    return index


def _write_part(listing: Listing, path: Path, short_side: int, advance: Callable[[int], None]) -> PackedPart:
    identity, offset, unsynced = hashlib.sha256(), 0, 0
    sizes: list[list[int]] = []
    offsets: list[int] = []
    with open(path, "wb") as file:
        for pixels in _decoded(listing, short_side):
            offsets.append(offset)
            sizes.append([pixels.shape[0], pixels.shape[1]])
            content = pixels.tobytes()
            file.write(content)
            identity.update(content)
            offset, unsynced = offset + len(content), unsynced + len(content)
            advance(len(sizes))
            if unsynced > _MANY_BYTES:  # so that a full disk is noticed early, and the end does not wait for gigabytes
                _sync(file)
                unsynced = 0
        tail = bytes(3 * max(width for _, width in sizes))  # a window may be read a row beyond the last image
        file.write(tail)
        identity.update(tail)
        _sync(file)
    return PackedPart(
        path.name, offset + len(tail), identity.hexdigest(), listing.targets.tolist(), sizes, offsets, list(listing.names)
    )


def _decoded(listing: Listing, short_side: int) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Decode and resize in threads (the decoders release the interpreter), in order, a bounded number ahead."""

    def decode(name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.asarray(resize_short_side(read_image(listing.root / name), short_side))

    with ThreadPoolExecutor(available_cpus()) as pool:
        for start in range(0, len(listing), _AHEAD):
            yield from pool.map(decode, listing.names[start : start + _AHEAD])


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())

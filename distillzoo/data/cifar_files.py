"""Reading CIFAR-100 as it is published: find the files, check their digests, then unpickle numpy arrays and nothing else."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distillzoo.data.arrays import Split
from distillzoo.errors import DataError

__all__ = ["ARCHIVE", "ARCHIVE_MD5", "FOLDER", "MD5", "find", "parse_names", "parse_split", "read_files", "restricted_load"]

FOLDER = "cifar-100-python"
ARCHIVE = "cifar-100-python.tar.gz"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
"""Published digests, as torchvision lists them too."""

_CIFAR10_NAMES = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar-10-batches-bin", "data_batch_1", "batches.meta")
_LAYOUT = f"expected is a data root DIR with DIR/{FOLDER}/train, test and meta, or with DIR/{ARCHIVE}"
_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]  # numpy's own, wherever this numpy keeps it
_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}  # what a pickled array names; everything else is refused, and nothing is imported


def find(root: Path) -> Path:
    """Return the folder or the archive of CIFAR-100 below a data root.

    Args:
        root: The data root.
    Raises:
        DataError: If neither is there; the message says what is there instead and which folder to name.
    """
    try:
        if not root.exists():
            raise DataError(f"The data root {str(root)!r} does not exist; {_LAYOUT}; name the right folder or download the data.")
        if not root.is_dir():
            raise DataError(
                f"The data root {str(root)!r} is a file, not a folder; {_LAYOUT}; name the folder that holds it, "
                f"{str(root.parent)!r}."
            )
        for candidate in (root / FOLDER, root / ARCHIVE):
            if candidate.exists():
                return candidate
        raise DataError(_what_is_there_instead(root))
    except OSError as error:
        raise _unreadable(root, error) from error


def _what_is_there_instead(root: Path) -> str:
    """Write the sentence for a data root without CIFAR-100."""
    if any((root / name).exists() for name in _CIFAR10_NAMES):
        return f"The data root {str(root)!r} holds CIFAR-10, not CIFAR-100; {_LAYOUT}; name a folder with CIFAR-100 or download it."
    if all((root / name).is_file() for name in MD5):
        home = root.resolve()
        rename = "" if home.name == FOLDER else f"rename it to {FOLDER!r} and "
        return (
            f"The data root {str(root)!r} is the folder of the files themselves, one level too deep; {_LAYOUT}; {rename}name "
            f"{str(home.parent)!r}."
        )
    deeper = sorted(path.parent for name in (FOLDER, ARCHIVE) for path in root.glob(f"*/{name}"))
    if deeper:
        return f"The data root {str(root)!r} is one level too high; {_LAYOUT}; name {str(deeper[0])!r}."
    found = sorted(path.name for path in root.iterdir())
    there = f"it holds {', '.join(found[:5])}{' and more' if len(found) > 5 else ''}" if found else "it is empty"
    return f"The data root {str(root)!r} has no CIFAR-100: {there}; {_LAYOUT}; name the right folder or download the data."


def read_files(place: Path) -> dict[str, bytes]:
    """Read the three files and check their digests before anything looks inside.

    Args:
        place: The folder, or the archive, which is read without being extracted to disk.
    Returns:
        The contents of ``train``, ``test`` and ``meta``.
    Raises:
        DataError: If a file is missing, cannot be read, or is not the published one.
    """
    if place.is_dir():
        members = {name: _read(place / name) for name in MD5}
    else:
        archive = _read(place)
        _check(place, archive, ARCHIVE_MD5)
        members = _unpack(place, archive)
    for name, content in members.items():
        _check(place / name, content, MD5[name])
    return members


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        there, do = "the data set is incomplete", "copy or download CIFAR-100 again"
        if any((path.parent / name).exists() for name in _CIFAR10_NAMES):
            there = "CIFAR-10 is there in its place"
        elif (path.parent / FOLDER).exists():
            there, do = f"a second {FOLDER} is there in its place", f"name {str(path.parent)!r} as the data root"
        raise DataError(f"The file {str(path)!r} is missing, {there}; {_LAYOUT}; {do}.") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"Cannot read {str(path)!r} ({error.strerror or error}); {_LAYOUT}, readable by you; check the permissions and the disk."
    )


def _check(path: Path, content: bytes, expected: str) -> None:
    """Refuse a file whose MD5 is not the published one: it is either not the file or damaged."""
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != expected:
        raise DataError(
            f"The file {str(path)!r} is damaged, truncated or not CIFAR-100's: its {len(content):,} bytes have MD5 {digest}, the "
            f"published file has {expected}; nothing was unpickled; delete it and download it again."
        )


def _unpack(path: Path, archive: bytes) -> dict[str, bytes]:
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            for name in MD5:
                member = tar.extractfile(f"{FOLDER}/{name}")
                if member is None:
                    raise KeyError(name)
                members[name] = member.read()
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise DataError(
            f"The archive {str(path)!r} cannot be unpacked ({error}); expected in it are {FOLDER}/train, test and meta; "
            "delete it and download it again."
        ) from error
    return members


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that knows numpy arrays and plain Python values and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, allowed are numpy arrays") from None


def restricted_load(content: bytes, path: Path) -> dict[bytes, Any]:
    """Unpickle a dictionary of numpy arrays and plain values; nothing that is named in the pickle is imported or called.

    Args:
        content: The pickle.
        path: Where it came from, for messages.
    Raises:
        DataError: If it holds anything else.
    """
    try:
        value = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a broken pickle can raise anything
        raise DataError(
            f"The file {str(path)!r} is not a pickle of numpy arrays ({type(error).__name__}: {error}); expected is CIFAR-100's "
            "own file; do not trust it, download it again."
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"The file {str(path)!r} holds a {type(value).__name__}, expected is a dictionary; download it again.")
    return value


def parse_split(content: bytes, path: Path) -> Split:
    """Read images and fine labels out of ``train`` or ``test``, whose digest was checked.

    Args:
        content: The file's content.
        path: Where it came from, for messages.
    Raises:
        DataError: If it holds anything but arrays and plain values.
    """
    values = restricted_load(content, path)
    planes = torch.from_numpy(np.require(values[b"data"], requirements=["C", "W"])).view(-1, 3, 32, 32)
    return Split(planes.permute(0, 2, 3, 1), torch.tensor(values[b"fine_labels"]))


def parse_names(content: bytes, path: Path) -> tuple[str, ...]:
    """Read the names of the classes out of ``meta``, whose digest was checked.

    Args:
        content: The file's content.
        path: Where it came from, for messages.
    Raises:
        DataError: If it holds anything but arrays and plain values.
    """
    return tuple(name.decode("ascii") for name in restricted_load(content, path)[b"fine_label_names"])

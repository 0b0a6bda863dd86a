"""Reading one image file: its size, its pixels as RGB, and the reason where that cannot be done.

What a file is, its content decides, not its name. EXIF orientation is not applied and transparency is dropped, as in the usual
``ImageFolder`` pipelines.
"""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from distillzoo.errors import DataError

__all__ = ["EXTENSIONS", "MAX_PIXELS", "inspect_image", "read_image", "unusable"]

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Ends of the names of image files, in any case."""
MAX_PIXELS = 89_478_485
"""Largest image that is read: Pillow's own limit against files that unpack to more memory than a machine has."""

_ALLOWED = (
    f"allowed are greyscale, colour, palette and CMYK images of 8 bits, or 16 bits of grey, with at most {MAX_PIXELS:,} pixels"
)


class _FaultError(Exception):
    """A reason of ours, in words."""


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image as RGB, whatever it is stored as.

    Args:
        path: The file.
    Raises:
        DataError: If it cannot be read; the message names the file and says how to go on.
    """
    try:
        return _decode(path)
    except Exception as error:  # a broken image can make a decoder raise anything
        raise unusable(os.fspath(path), _reason(error)) from error


def inspect_image(path: str | os.PathLike[str], *, decode: bool = False) -> tuple[int, int] | str:
    """Look at an image file without raising.

    Args:
        path: The file.
        decode: Whether to decode its pixels too, which is slow and finds files that break off in the middle; otherwise the head
            of the file is looked at.
    Returns:
        Height and width in pixels, or why the file cannot be used.
    """
    try:
        if decode:
            image = _decode(path)
            return image.height, image.width
        with open(path, "rb") as file, Image.open(file) as image:
            _check(image)
            return image.height, image.width
    except Exception as error:
        return _reason(error)


def unusable(path: str, reason: str, others: int = 0) -> DataError:
    """Return the error for a file that cannot be used.

    Args:
        path: The file.
        reason: Why.
        others: How many more there are.
    """
    more = f" (and {others:,} other{'s' if others > 1 else ''})" if others else ""
    return DataError(
        f"The image file {path!r}{more} cannot be used: {reason}; {_ALLOWED}; repair or remove it, or leave all such files out "
        "with skip_bad=True (on a command line: --skip-bad, of run_table.py --data.skip_bad true)."
    )


def _decode(path: str | os.PathLike[str]) -> Image.Image:
    with open(path, "rb") as file, Image.open(file) as image:
        _check(image)
        image.load()
        if image.mode.startswith("I"):
            return _from_16_bits(image)
        if image.mode == "P":  # a palette with transparency converts without complaint only by way of RGBA
            return image.convert("RGBA").convert("RGB")
        return image.convert("RGB")


def _check(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _FaultError(f"it has {image.width} x {image.height} pixels")
    if image.mode == "F":
        raise _FaultError("its pixels are floating-point numbers, whose range is not known")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Keep the upper 8 of 16 bits; Pillow's own conversion would clip all that is brighter than 255 of 65,535 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise _FaultError("its pixels have 32 bits, whose range is not known")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, _FaultError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "its content is no image of a known format, or is empty"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"

"""How a tapped tensor becomes a map ``(B, C, H, W)`` or a vector ``(B, D)``: what the model says of itself, then its shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from distillzoo.errors import TapError
from distillzoo.types import DataSpec, Layout

__all__ = ["View", "as_view"]

_DIMENSIONS = {"nchw": 4, "nhwc": 4, "tokens": 3}  # of a tensor of a layout; any can be a vector
_MOST_PREFIX = 16  # class, distillation and register tokens that are looked for where a model does not say how many it has


@dataclass(frozen=True)
class View:
    """How a tensor is read.

    Args:
        layout: How it is laid out; never ``"auto"``.
        prefix: Tokens that come before the grid and are dropped.
        grid: Height and width of the grid of tokens.
        sequence_first: Whether tokens come as ``(N, B, C)``.
        mean: Whether the mean over the positions is read, as ``(B, C)``.
    Example:
        >>> import torch
        >>> View("tokens", 1, (2, 3))(torch.zeros(5, 7, 4)).shape
        torch.Size([5, 4, 2, 3])
    """

    layout: Layout
    prefix: int = 0
    grid: tuple[int, int] = (0, 0)
    sequence_first: bool = False
    mean: bool = False

    def __call__(self, value: Tensor) -> Tensor:
        """Return the tensor as ``(B, C, H, W)``, or as ``(B, D)`` if it is a vector."""
        if self.layout == "tokens":
            value = value.transpose(0, 1) if self.sequence_first else value
            value = value[:, self.prefix :].transpose(1, 2).reshape(value.shape[0], value.shape[2], *self.grid)
        elif self.layout == "nhwc":
            value = value.permute(0, 3, 1, 2)
        elif self.layout == "vector":
            value = value.flatten(1)
        return value.mean((2, 3)) if self.mean else value


def as_view(
    module: nn.Module, data: DataSpec, shape: Sequence[int], declared: Layout = "auto", channels: int | None = None
) -> View:
    """Decide how a tensor of a network is read.

    What is declared comes first, then what the network says of itself (``num_prefix_tokens``, ``output_fmt``, as timm's do), then
    which reading has the image's aspect.

    Args:
        module: The network.
        data: Size of the images.
        shape: Shape of the tensor for two images.
        declared: The layout that is asked for.
        channels: Channels of the tensor, where they are known.
    Raises:
        TapError: If tokens form no grid, the tensor is no two maps, rows of tokens or vectors, or not what is declared.
    Example:
        >>> as_view(nn.Identity(), DataSpec(10, (224, 224)), (2, 50, 768))
        View(layout='tokens', prefix=1, grid=(7, 7), sequence_first=False, mean=False)
    """
    if 2 not in shape[:2] or (shape[0] != 2 and len(shape) != 3):
        raise TapError(
            f"A tap of {type(module).__name__} has the shape {tuple(shape)} for two images; windows or patches in "
            "the batch dimension are no map of an image: name a module around them."
        )
    if _DIMENSIONS.get(declared, len(shape)) != len(shape):
        raise TapError(
            f"A tap of {type(module).__name__} has the shape {tuple(shape)} for two images, and the layout {declared!r} that is "
            f"declared for it has {_DIMENSIONS[declared]} dimensions; declare the layout that it has, or 'auto'."
        )
    if declared == "vector" or len(shape) == 2:
        return View("vector")
    if len(shape) == 3:
        return _tokens(module, data, shape)
    if len(shape) == 4:
        return View(_four(module, data, shape, channels) if declared == "auto" else declared)
    raise TapError(
        f"A tap of {type(module).__name__} has the shape {tuple(shape)}; a tap is (B, C, H, W), (B, H, W, C), (B, N, C) or (B, D): "
        "name a module that returns one of them."
    )


def pooled_view(module: nn.Module, data: DataSpec, shape: Sequence[int]) -> View:
    """Decide how a classifier's input is read as ``(B, D)``: maps and tokens by their mean over the positions."""
    if len(shape) == 2 or math.prod(shape[2:]) == 1:
        return View("vector")
    if len(shape) == 3:
        view = _tokens(module, data, shape)
        return View("tokens", view.prefix, view.grid, view.sequence_first, mean=True)
    return View(_four(module, data, shape, None), mean=True)


def _tokens(module: nn.Module, data: DataSpec, shape: Sequence[int]) -> View:
    swapped = shape[0] != 2 and shape[1] == 2
    tokens = shape[0] if swapped else shape[1]
    said = getattr(module, "num_prefix_tokens", None)
    # a network may say that it has prefix tokens and add them after this very tensor
    tries = range(min(_MOST_PREFIX, tokens - 1) + 1) if not isinstance(said, int) else dict.fromkeys((said, 0))
    for prefix in tries:
        grid = token_grid(tokens - prefix, data)
        if grid is not None:
            return View("tokens", prefix, grid, swapped)
    height, width = data.input_size
    raise TapError(f"{tokens} tokens do not form a grid for images of {height}x{width}; tap a module that returns maps.")


def token_grid(tokens: int, data: DataSpec) -> tuple[int, int] | None:
    """Return rows and columns of a grid of tokens that has the image's aspect, or None."""
    if tokens < 1:
        return None
    height, width = data.input_size
    exact = math.sqrt(tokens * min(height, width) / max(height, width))  # of the shorter side, which is off by less than one
    for short in dict.fromkeys((math.floor(exact), math.ceil(exact))):
        long = tokens // max(short, 1)
        grid = (short, long) if height <= width else (long, short)
        if short and short * long == tokens and _has_aspect(grid, data):
            return grid
    return None


def _four(module: nn.Module, data: DataSpec, shape: Sequence[int], channels: int | None) -> Layout:
    if channels is not None and (shape[1] == channels) != (shape[3] == channels):
        return "nchw" if shape[1] == channels else "nhwc"
    first, last = _has_aspect(shape[2:], data), _has_aspect(shape[1:3], data)
    if first != last:
        return "nchw" if first else "nhwc"
    return "nhwc" if getattr(module, "output_fmt", None) == "NHWC" else "nchw"


def _has_aspect(size: Sequence[int], data: DataSpec) -> bool:
    """Whether rows and columns can be those of the images at some stride.

    Images that the stride does not divide are padded or cut, so either side may be off by less than one. Seen from the shorter side
    the other's share of that is below one as well; seen from the longer it would be multiplied by the aspect.
    """
    height, width = data.input_size
    return abs(size[0] * width - size[1] * height) < max(height, width)


def map_size(module: nn.Module, data: DataSpec, shape: Sequence[int]) -> tuple[int, int] | None:
    """Return height and width of a tensor that can be read as maps, or None.

    One of four dimensions must have the image's aspect: one that does not holds windows, heads or the like.
    """
    try:
        view = as_view(module, data, shape)
    except TapError:
        return None
    if view.layout == "vector":
        return None
    if view.layout == "tokens":
        return view.grid
    size = (shape[1], shape[2]) if view.layout == "nhwc" else (shape[2], shape[3])
    return size if _has_aspect(size, data) else None

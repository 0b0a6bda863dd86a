"""What a network returned: :func:`logits_of`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from distillzoo.errors import ShapeError

__all__ = ["logits_of"]


def logits_of(module: nn.Module, output: Any, images: int, classes: int, role: str) -> Tensor:
    """Return the logits among what a network returned: the first tensor of their shape.

    In training mode alone many return more, such as features, the logits of auxiliary classifiers, or a dictionary. Features of as
    many dimensions as there are classes that come before the logits are mistaken for them.

    Args:
        module: The network.
        output: What it returned.
        images: Number of images that it was given.
        classes: Number of classes.
        role: What the network is, for the message.
    Raises:
        ShapeError: If none of the tensors is ``(images, classes)``.
    Example:
        >>> import torch
        >>> logits_of(nn.Identity(), {"features": torch.zeros(2, 7), "logits": torch.ones(2, 5)}, 2, 5, "student").shape
        torch.Size([2, 5])
    """
    found: Iterable[Any] = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else (output,)
    )
    shapes: list[tuple[int, ...]] = []
    for item in found:
        if isinstance(item, Tensor):
            if item.shape == (images, classes):
                return item
            shapes.append(tuple(item.shape))
    mode, held = "training" if module.training else "eval", ", ".join(map(str, shapes)) or "none"
    what = f"of shape {held}" if isinstance(output, Tensor) else f"with tensors of the shapes {held}"
    raise ShapeError(
        f"The {role} {type(module).__name__} returns a {type(output).__name__} {what} in {mode} mode for {images} images, and no "
        f"logits of the shape (B, num_classes), which is {(images, classes)}; wrap it in a module that returns them."
    )

"""Cut a classifier's head down to some of its classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from distillzoo.errors import OptionError

__all__ = ["slice_head"]

_Head = nn.Linear | nn.Conv2d


def slice_head(model: nn.Module, rows: Sequence[int], num_classes: int) -> nn.Module:
    """Keep some of a network's logits, in place: a network of many classes then serves for a few of them; returns the network.

    Args:
        model: A classifier whose logits come from a linear layer or a 1x1 convolution (of several heads all are cut).
        rows: Which logits to keep, in the order in which they are wanted.
        num_classes: How many logits it has.
    Raises:
        OptionError: If it has no such head, or a row is none of its logits.
    Example:
        >>> net = slice_head(nn.Sequential(nn.Flatten(), nn.Linear(4, 1000)), [7, 3], 1000)
        >>> net(torch.zeros(1, 4)).shape
        torch.Size([1, 2])
    """
    heads = list(_heads(model, num_classes))
    if not heads:
        raise OptionError(
            f"{type(model).__name__} has no linear layer or 1x1 convolution with {num_classes:,} outputs at its end, so its head "
            "cannot be cut down to some classes; take another network, or one with a head of its own for them."
        )
    if len(set(rows)) < max(2, len(rows)) or not all(0 <= row < num_classes for row in rows):
        raise OptionError(f"rows must be at least 2 different numbers from 0 to {num_classes - 1}; got {list(rows)}.")
    for head in heads:
        keep = torch.tensor(rows, device=head.weight.device)
        head.weight = nn.Parameter(head.weight.detach()[keep].clone())
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias.detach()[keep].clone())
        setattr(head, "out_features" if isinstance(head, nn.Linear) else "out_channels", len(rows))
    if isinstance(getattr(model, "num_classes", None), int):
        model.num_classes = len(rows)  # type: ignore[assignment]
    return model


def _heads(model: nn.Module, num_classes: int) -> Iterator[_Head]:
    """Yield what makes the logits: all of that width in what timm's networks call their classifier, else the last layer."""
    named = getattr(model, "get_classifier", None)
    found = named() if callable(named) else None
    called = [each for each in (found if isinstance(found, tuple | list) else [found]) if isinstance(each, nn.Module)]
    layers = [part for each in called for part in each.modules() if isinstance(part, _Head)]  # a head may be a norm and a layer
    layers = layers or [module for module in model.modules() if isinstance(module, _Head)][-1:]
    for module in layers:
        if _outputs(module) == num_classes and (isinstance(module, nn.Linear) or module.kernel_size == (1, 1)):
            yield module


def _outputs(module: _Head) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels

"""Copies of a module to try on whether a change leaves its function alone: nothing hides behind its start or its rounding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from distillzoo.copying import detached_copy

__all__ = ["exact_copies", "scrambled"]


@torch.no_grad()
def scrambled(network: nn.Module) -> nn.Module:
    """Return a copy of a network on which no error hides behind a 0 or a 1 of its start.

    Vectors (norms, biases, statistics), single parameters and weights that are all 0 are drawn anew; other weights stay.
    """
    twin = detached_copy(network)
    generator = torch.Generator().manual_seed(0)
    started = [(name, tensor) for name, tensor in twin.named_parameters() if tensor.ndim <= 1 or not tensor.any()]
    for name, tensor in (*started, *((name, tensor) for name, tensor in twin.named_buffers() if tensor.ndim == 1)):
        if tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=generator)
            around_zero = tensor.ndim > 1 or name.endswith(("bias", "mean"))
            tensor.copy_((values - 0.5) / 5.0 if around_zero else values + 0.5)
    return twin


def exact_copies(module: nn.Module) -> Iterator[nn.Module]:
    """Yield copies of a module to try a rule on, so exact that a difference between the widths is none of rounding.

    Half types round more than a difference that matters, and so does TF32. The first copy is in double precision; the second, for a
    module that turns what it sees to single precision or a device without double, in single precision on the CPU.

    Args:
        module: The module; it is left as it is.
    Example:
        >>> [twin.weight.dtype for twin in exact_copies(nn.Linear(2, 2).bfloat16())]
        [torch.float64, torch.float32]
    """
    try:
        double = detached_copy(module).double()
    except TypeError:  # how a device says that it has none
        pass
    else:
        yield double
    yield detached_copy(module).to("cpu", torch.float32)

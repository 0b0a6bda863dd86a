"""Floating types: losses and what belongs to a method run in float32 at least, whatever the networks are cast to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distillzoo.types import Trace

__all__ = ["OwnTensors", "full_precision_trace"]

_HALF = (torch.float16, torch.bfloat16)


def full_precision_trace(trace: Trace) -> Trace:
    """Return a trace with half types as float32, and float32 and float64 as they are.

    Args:
        trace: What a network returned.
    """
    second = None if trace.second is None else full_precision_trace(trace.second)
    return Trace(_float(trace.logits), {name: _float(value) for name, value in trace.features.items()}, second)


def _float(value: Tensor) -> Tensor:
    return value.float() if value.dtype in _HALF else value


class OwnTensors:
    """A function of tensors, as ``Module._apply`` takes it, for a method's own: those of its networks stay as they are.

    Where the function casts to a half type the values are kept in float32, not rounded, and follow in device and layout alone.

    Args:
        fn: The function.
        networks: Student and teacher; their tensors are left alone wherever they hang.
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], networks: Sequence[nn.Module]) -> None:
        self._fn = fn
        parameters = [parameter for network in networks for parameter in network.parameters()]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [buffer for network in networks for buffer in network.buffers()]
        self._others = {id(tensor): tensor for tensor in (*parameters, *gradients, *buffers)}  # held: no id is used again

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor moved and cast, or itself where it is a network's."""
        if id(tensor) in self._others:
            return tensor
        moved = self._fn(tensor)
        if moved.dtype not in _HALF:
            return moved
        if tensor.dtype in _HALF:
            return moved.float()
        return torch.empty_like(moved, dtype=torch.float32).copy_(tensor)

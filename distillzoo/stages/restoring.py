"""Run modules and leave no trace in them: modes, buffers and plain attributes are put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["restored"]

_TORCHS_OWN = vars(nn.Module()).keys()  # parameters, buffers, children, hooks


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Run the block without gradients; flags, buffers and plain attributes of a module and its children are put back as they were.

    A forward may write to a buffer, put another tensor in its place, or make one on its first call: all of it is undone.

    Args:
        module: What runs in the block.
    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with restored(norm):
        ...     _ = norm(torch.ones(3, 2))
        >>> int(norm.num_batches_tracked)
        0
    """
    parts = list(module.modules())
    flags = [part.training for part in parts]
    tables = [(dict(part._buffers), set(part._non_persistent_buffers_set)) for part in parts]
    plain = [_plain_state(part) for part in parts]
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.no_grad():
            yield
    finally:
        for part, (buffers, passing) in zip(parts, tables, strict=True):
            part._buffers.clear()
            part._buffers.update(buffers)
            part._non_persistent_buffers_set = passing
        with torch.no_grad():
            for buffer, before in values:
                buffer.copy_(before)
        for part, attributes, flag in zip(parts, plain, flags, strict=True):
            _put_back(part, attributes)
            part.training = flag


def _plain_state(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What a module keeps in plain attributes, each with a copy where it is a dictionary or a list."""
    own = {name: value for name, value in vars(module).items() if name not in _TORCHS_OWN}
    return {name: (value, copy.copy(value) if type(value) in (dict, list) else None) for name, value in own.items()}


def _put_back(module: nn.Module, before: dict[str, tuple[Any, Any]]) -> None:
    """Undo what a run left there: some keep what they computed in eval mode, with the graph of that run, which nobody can copy."""
    for name in vars(module).keys() - before.keys() - _TORCHS_OWN:
        delattr(module, name)
    for name, (value, held) in before.items():
        if vars(module).get(name) is not value:
            object.__setattr__(module, name, value)
        if isinstance(held, dict):
            value.clear()
            value.update(held)
        elif held is not None:
            value[:] = held

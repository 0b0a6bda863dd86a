"""Copies of networks, whatever their layers keep beside their weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["detached_copy"]

_Module = TypeVar("_Module", bound=nn.Module)


def detached_copy(module: _Module) -> _Module:
    """Return a deep copy of a module, in which what was computed from weights and kept stands without its graph.

    torch copies no tensor that has a graph. Layers under ``torch.nn.utils.weight_norm`` or the former ``spectral_norm`` keep their
    weight as one, and compute it anew at every call, in the copy as well; others keep what they computed last.

    Args:
        module: The module; it is left as it is.
    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(action="ignore"):  # torch advises parametrizations
        ...     layer = nn.utils.weight_norm(nn.Linear(2, 3))
        >>> layer.weight.is_leaf, detached_copy(layer).weight.is_leaf
        (False, True)
    """
    kept = [tensor for part in module.modules() for tensor in _tensors(vars(part), set()) if not tensor.is_leaf]
    return copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in kept})


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors that plain attributes hold: themselves, in lists, in tuples and in dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple) and id(value) not in seen:
        seen.add(id(value))  # what holds itself ends here
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each, seen)

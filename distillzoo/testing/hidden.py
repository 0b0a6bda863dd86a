"""The walk through plain Python objects that finds what hides from a module: parameters and modules that nobody registered."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import CellType, FunctionType, MemberDescriptorType, MethodType
from typing import Any

from torch import Tensor, nn

__all__ = ["hidden"]


def hidden(value: Any, path: str, known: Callable[[Any], bool], seen: set[int]) -> Iterator[str]:
    """Yield the paths of unregistered modules and trainable tensors under ``value``.

    Args:
        value: Anything.
        path: How ``value`` is reached.
        known: Whether a thing is registered, or somebody else's.
        seen: Identities of what was walked through already; grows.
    """
    if id(value) in seen or isinstance(value, type) or known(value):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module) or (isinstance(value, Tensor) and value.requires_grad and value.is_leaf):
        yield path
        return
    for step, item in _inside(value):
        yield from hidden(item, f"{path}{step}", known, seen)


def _inside(value: Any) -> list[tuple[str, Any]]:
    """What a container, a function or a plain object holds, with how it is reached."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [(f"[{number}]", item) for number, item in enumerate(value)]
    if isinstance(value, functools.partial):
        return [(".func", value.func), (".args", value.args), (".keywords", value.keywords)]
    if isinstance(value, MethodType):
        return [(".__self__", value.__self__), (".__func__", value.__func__)]
    if isinstance(value, FunctionType):
        return [
            *((".__closure__", item) for cell in value.__closure__ or () for item in _content(cell)),
            (".__defaults__", value.__defaults__),
            (".__kwdefaults__", value.__kwdefaults__),
            *_attributes(value),
        ]
    if isinstance(value, Tensor) or type(value).__module__.partition(".")[0] in ("torch", "builtins"):
        return []
    return _attributes(value)


def _content(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # a name that is not bound yet, or no longer
        return []


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """An object's attributes: those of its ``__dict__``, and those that its classes keep in slots."""
    slots = {
        name: getattr(value, name)
        for cls in type(value).__mro__
        if cls.__module__ != "builtins"
        for name, member in vars(cls).items()
        if isinstance(member, MemberDescriptorType) and hasattr(value, name)
    }
    return [(f".{name}", item) for name, item in {**slots, **getattr(value, "__dict__", {})}.items()]

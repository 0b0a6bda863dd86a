"""Names: registered classes and functions by name, with near matches, refusal of taken names, and entry points.

The registry of distillers lives here, empty of methods: ``@register_distiller("name")`` fills it, and so do entry points in the
group ``distillzoo.distillers`` (what worker processes see).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from torch import nn

from distillzoo.errors import OptionError, UnknownNameError, unknown_name
from distillzoo.types import Stage

__all__ = ["DISTILLERS", "STAGE_FINDERS", "Registry", "register_distiller"]

T = TypeVar("T")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to things of one kind.

    Args:
        kind: What the things are, for messages: ``"distiller"``.
        group: Entry-point group that is read when a name is first looked up; ``None`` for none.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind = kind
        self._group = group
        self._items: dict[str, T] = {}
        self._loaded = group is None

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers what it decorates under ``name``.

        Raises:
            OptionError: If the name is malformed or already taken by something else.
        """
        if not _NAME.fullmatch(name):
            raise OptionError(f"A {self.kind} name is lower-case letters, digits and '_', starting with a letter; got {name!r}.")

        def decorate(item: T) -> T:
            present = self._items.get(name)
            if present is not None and present is not item:
                raise OptionError(
                    f"The {self.kind} name {name!r} is taken by {_where(present)}; register {_where(item)} under another name."
                )
            self._items[name] = item
            return item

        return decorate

    def names(self, pattern: str = "*") -> list[str]:
        """Return the sorted names that match a shell pattern."""
        self._load()
        return sorted(name for name in self._items if fnmatchcase(name, pattern))

    def __getitem__(self, name: str) -> T:
        self._load()
        try:
            return self._items[name]
        except KeyError:
            raise UnknownNameError(unknown_name(self.kind, name, self._items)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        self._load()
        return len(self._items)

    def _load(self) -> None:
        if self._loaded or self._group is None:
            return
        self._loaded = True  # before loading: an entry point may look names up itself
        for entry in entry_points(group=self._group):
            try:
                self.register(entry.name)(entry.load())
            except Exception as error:
                self._loaded = False  # a broken entry point is an error every time, not only the first
                if isinstance(error, OptionError):
                    raise
                raise OptionError(
                    f"The entry point {entry.name!r} = {entry.value!r} in group {self._group!r} cannot be loaded "
                    f"({type(error).__name__}: {error}); repair or uninstall the package that ships it."
                ) from error


def _where(item: object) -> str:
    module, name = getattr(item, "__module__", "?"), getattr(item, "__qualname__", repr(item))
    return f"{module}.{name}"


DISTILLERS: Registry[type[Any]] = Registry("distiller", group="distillzoo.distillers")
"""Distiller classes by name."""

STAGE_FINDERS: Registry[Callable[[nn.Module], tuple[Stage, ...] | None]] = Registry("stage finder")
"""Functions that know the stages of some foreign networks (torchvision's) and return None for all others."""


def register_distiller(name: str) -> Callable[[type[T]], type[T]]:
    """Register a :class:`~distillzoo.distiller.Distiller` class under ``name``.

    Args:
        name: Lower-case name, as it is typed in ``--methods``.
    Raises:
        OptionError: If the name is malformed or taken.
    Example:
        >>> from distillzoo import Distiller, register_distiller
        >>> @register_distiller("example_empty")
        ... class Empty(Distiller):
        ...     '''Cross-entropy alone.'''
        ...     def distill_terms(self, student, teacher, batch):
        ...         return {}
    """
    return DISTILLERS.register(name)

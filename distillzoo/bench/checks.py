"""Checks of what is read from files and command lines: lists, keys, types; no data ever becomes an object."""

from __future__ import annotations

import argparse
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import jsonargparse

from distillzoo.errors import OptionError, unknown_name

__all__ = ["check_keys", "check_list", "plain", "refuse_objects", "typed_fields"]


def check_list(name: str, values: Sequence[object]) -> None:
    """Refuse an empty list and a list with a value twice.

    Raises:
        OptionError: In either case.
    """
    if not values:
        raise OptionError(f"{name} is empty; name at least one, separated by commas.")
    twice = [value for position, value in enumerate(values) if value in values[:position]]
    if twice:
        raise OptionError(f"{name} lists {twice[0]!r} twice; name each once.")


def check_keys(given: object, known: Iterable[str] | None, where: str) -> None:
    """Refuse anything but a mapping with known keys, ``None``: any keys; near matches are named.

    Raises:
        OptionError: If a key is unknown, or it is no mapping.
    """
    if not isinstance(given, Mapping):
        raise OptionError(f"{where[0].upper()}{where[1:]} must be a mapping of names to values; got {reprlib.repr(given)}.")
    for key in given:
        if known is not None and key not in known:
            raise OptionError(unknown_name(f"field of {where}", str(key), known, listed="Its fields are"))


def plain(value: Any) -> Any:
    """Return nested mappings and lists as plain dictionaries and lists."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def typed_fields(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check values against the types of a dataclass's fields, which also turns lists into tuples and 1 into 1.0.

    Args:
        cls: The dataclass.
        values: Values by field; no field of type Any may be among them (see :func:`refuse_objects`).
        where: What is read, for messages.
    Returns:
        The value of every field, defaults filled in.
    Raises:
        OptionError: If a value has another type.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "it", sub_configs=False)
    try:
        parsed = parser.parse_object({"it": dict(values)}, env=False)
        made = parser.instantiate(parsed) if hasattr(parser, "instantiate") else parser.instantiate_classes(parsed)
    except (argparse.ArgumentError, jsonargparse.ArgumentError, TypeError) as error:
        raise OptionError(f"{where[0].upper()}{where[1:]} has a wrong value: {_readable(str(error))}; correct it.") from error
    return {item.name: getattr(made.it, item.name) for item in fields(cls)}


def _readable(message: str) -> str:
    """Take the parser's own names and Python's brackets out of a message of jsonargparse."""
    text = " ".join(message.split()).replace('Parser key "it.', 'the field "').replace("it.", "").rstrip(".")
    return re.sub(r"<class '(\w+)'>|typing\.", r"\1", text).replace("Expected a ", "expected ").replace(". Got value:", "; got")


def refuse_objects(value: object, source: str) -> None:
    """Refuse what jsonargparse would read as an object to import and construct, at any depth."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            raise OptionError(f"{source} is refused: {value['class_path']!r} would construct an object; only plain data is read.")
        for item in value.values():
            refuse_objects(item, source)
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_objects(item, source)

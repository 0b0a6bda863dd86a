"""YAML for recipes, tables and records: the safe loader, which also refuses what YAML readers let pass."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from distillzoo.errors import OptionError

__all__ = ["dump_yaml", "load_yaml", "parse_scalar"]

# YAML 1.1 reads 5e-4 as a string because it has no dot; everybody else reads a number.
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*(\.\d*)?([eE][-+]?\d+)|\d[\d_]*\.\d*|\.\d+([eE][-+]?\d+)?|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$")


_MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """Builds plain data only; a key that stands twice in a mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise _DuplicateKeyError(
                        f"the key {key.value!r} stands twice, in lines {seen[key.value]} and {line}; keep one of them"
                    )
                if isinstance(key, yaml.ScalarNode):
                    seen[key.value] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _size(value: Any, known: dict[int, int]) -> int:
    """Count the values in plain data, those behind an alias as often as it stands."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(item, known) for item in items)
    return known[id(value)]


class _DuplicateKeyError(yaml.YAMLError):
    """A mapping has a key twice."""


def load_yaml(text: str, source: str) -> Any:
    """Read one YAML document into plain data.

    Args:
        text: The document.
        source: Where it comes from, for messages.
    Raises:
        OptionError: If it is no YAML, has a key twice, or a tag that would construct an object.
    """
    try:
        found = yaml.load(text, Loader=_Loader)  # a child of the safe loader
        if _size(found, {}) > _MOST_VALUES:  # few bytes of aliases can stand for more than a memory holds
            raise OptionError(f"{source} is refused: its aliases stand for more than {_MOST_VALUES} values; write them out.")
        return found
    except RecursionError as error:
        raise OptionError(f"{source} is refused: it contains itself, or is nested too deeply; write plain data.") from error
    except yaml.constructor.ConstructorError as error:
        place = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise OptionError(
            f"{source} is refused{place}: {error.problem}; only plain data is read (mappings, lists, numbers, strings), "
            "never tags that construct objects."
        ) from error
    except _DuplicateKeyError as error:
        raise OptionError(f"{source} is refused: {error}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" in line {mark.line + 1}"
        reason = getattr(error, "problem", None) or type(error).__name__
        raise OptionError(f"{source} is not valid YAML{place} ({reason}); correct it.") from error


def parse_scalar(text: str) -> Any:
    """Read a value as it is typed on the command line: a number, ``true``, ``null``, ``[1, 2]`` or a string."""
    if text.strip().lower().lstrip("+-") in ("nan", "inf"):  # YAML wants a dot before them; a method can say what it takes
        return float(text)
    return load_yaml(text, f"The value {text!r}") if text.strip() else text


def read_yaml(path: Path) -> Any:
    """Read a YAML file; see :func:`load_yaml`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"The file {str(path)!r} cannot be read ({error}); name a readable YAML file.") from error
    return load_yaml(text, f"The file {str(path)!r}")


def dump_yaml(value: Any) -> str:
    """Write plain data as YAML, keys in the order they have."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)

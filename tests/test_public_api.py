"""What is public is listed, documented, and documented as it is."""

from __future__ import annotations

import ast
import configparser
import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import distillzoo

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(["distillzoo", *(info.name for info in pkgutil.walk_packages(distillzoo.__path__, "distillzoo."))])


def public_objects() -> Iterator[tuple[str, Any]]:
    """Every public class and function, once, by the module that defines it; and the classes' public methods."""
    for module in map(importlib.import_module, MODULES):
        for name in getattr(module, "__all__", ()):
            item = getattr(module, name, None)
            if (inspect.isclass(item) or inspect.isfunction(item)) and item.__module__ == module.__name__:
                yield f"{module.__name__}.{name}", item


def public_methods(name: str, item: Any) -> Iterator[tuple[str, Any]]:
    for key, value in vars(item).items() if inspect.isclass(item) else ():
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if isinstance(value, property):
            value = value.fget
        if not key.startswith("_") and inspect.isfunction(value) and value.__module__ == item.__module__:
            yield f"{name}.{key}", value


OBJECTS = dict(public_objects())
METHODS = {name: item for owner, cls in OBJECTS.items() for name, item in public_methods(owner, cls)}


def documented(item: Any, section: str) -> list[str] | None:
    """The names that a docstring's section lists; None where it has no such section."""
    text = inspect.getdoc(item) or ""
    match = re.search(rf"^{section}:\n((?:[ \t]+.*\n?|\n)+)", text, flags=re.MULTILINE)
    if match is None or item.__doc__ is None:
        return None
    lines = match.group(1).splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    entries = [line.strip() for line in lines if line.strip() and len(line) - len(line.lstrip()) == indent]
    return [name.strip().lstrip("*\\") for entry in entries for name in entry.partition(":")[0].split(",")]


def actual(item: Any) -> list[str]:
    """The parameters of a function, of a class's constructor, or the fields that a dataclass is made of."""
    if dataclasses.is_dataclass(item):
        return [field.name for field in dataclasses.fields(item) if field.init]
    function = item.__init__ if inspect.isclass(item) else item
    bound = ("self", "cls") if "." in function.__qualname__ else ()  # a plain function may well take a cls
    return [name for name in inspect.signature(function).parameters if name not in bound]


def complaints(item: Any) -> list[str]:
    """What is wrong with the documented arguments of a class or function."""
    args = documented(item, "Args")
    if args is None:
        own = inspect.isclass(item) and (dataclasses.is_dataclass(item) or inspect.isfunction(vars(item).get("__init__")))
        missing = actual(item) if own and not getattr(item, "_is_protocol", False) else []
        return [f"has no Args but takes {', '.join(missing)}"] if missing else []
    parameters = actual(item)
    found = [f"documents {name!r}, which it does not take" for name in args if name not in parameters]
    found += [f"takes {name!r}, which it does not document" for name in parameters if name not in args]
    if not found and args != parameters:
        found = [f"documents {args} in another order than it takes them: {parameters}"]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_module_lists_its_public_names(module):
    loaded = importlib.import_module(module)
    assert loaded.__doc__, f"{module} has no docstring"
    tree = ast.parse(inspect.getsource(loaded) or "''")
    if len(tree.body) > 1:  # a docstring alone lists nothing
        assert isinstance(getattr(loaded, "__all__", None), list), f"{module} has no __all__"
    for name in getattr(loaded, "__all__", ()):
        assert hasattr(loaded, name), f"{module}.__all__ names {name!r}, which it does not have"
        assert not name.startswith("_") or name == "__version__"


def test_the_package_exports_what_the_reference_documents():
    reference = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    named = re.findall(r"^\.\. auto(?:class|function|exception|data|decorator):: distillzoo\.(\w+)$", reference, re.MULTILINE)
    assert len(named) == len(set(named))
    assert sorted(named) == sorted(set(distillzoo.__all__) - {"__version__"})
    assert "__version__" in distillzoo.__all__
    assert "``distillzoo.__version__``" in reference


def test_the_reference_covers_every_public_module():
    """All but the methods, whose pages are generated, and what is used within; the harness is a command and lists nothing."""
    reference = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    covered = set(re.findall(r"^\.\. automodule:: (\S+)$", reference, re.MULTILINE))
    assert covered <= set(MODULES)
    top = {name for name in MODULES if name.count(".") == 1 and getattr(importlib.import_module(name), "__all__", None)}
    within = {"arguments", "casting", "checking", "copying", "kinds", "options", "weighting"}
    assert top - covered == {f"distillzoo.{name}" for name in ("methods", *within)}


def test_public_things_have_docstrings():
    bare = [name for name, item in (OBJECTS | METHODS).items() if not (item.__doc__ or "").strip()]
    bare += [
        name  # what dataclass writes itself is a signature
        for name, item in OBJECTS.items()
        if dataclasses.is_dataclass(item) and (item.__doc__ or "").startswith(f"{item.__name__}(")
    ]
    assert not bare, f"without a docstring: {', '.join(bare)}"


def test_documented_arguments_are_the_actual_ones():
    found = [f"{name} {complaint}" for name, item in (OBJECTS | METHODS).items() for complaint in complaints(item)]
    assert not found, "\n".join(["Args that are not the parameters:", *found])


def test_types_stand_in_the_signature_alone():
    typed = {name: [arg for arg in documented(item, "Args") or () if "(" in arg] for name, item in (OBJECTS | METHODS).items()}
    typed = {name: args for name, args in typed.items() if args}
    assert not typed, f"types repeated in docstrings: {typed}"


def test_there_is_one_version():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == "attr: distillzoo.__version__"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == distillzoo.__version__
    assert citation["license"] == config["metadata"]["license"] == "Apache-2.0"


class _Good:
    """Hold two numbers.

    Args:
        first: The first:
            with a colon in its text.
        second: The second.
    Raises:
        ValueError: Never.
    """

    def __init__(self, first: int, second: int = 0) -> None: ...


@dataclasses.dataclass(frozen=True)
class _GoodRecord:
    """Hold a number.

    Args:
        field: The number.
    """

    field: int
    derived: int = dataclasses.field(default=0, init=False)


class _Undocumented:
    """Takes a number and does not say so."""

    def __init__(self, number: int) -> None: ...


def _renamed(actual_name: int) -> None:
    """Document another name.

    Args:
        old_name: Gone.
    """


def _swapped(first: int, second: int) -> None:
    """Document in another order.

    Args:
        second: The second.
        first: The first.
    """


def _options(*args: int, **options: int) -> None:
    """Take any number.

    Args:
        *args: Numbers.
        **options: Numbers by name.
    """


def test_the_check_of_arguments_sees_what_it_should():
    assert complaints(_Good) == complaints(_GoodRecord) == complaints(_options) == []
    assert complaints(_Undocumented) == ["has no Args but takes number"]
    assert complaints(_renamed) == [
        "documents 'old_name', which it does not take",
        "takes 'actual_name', which it does not document",
    ]
    assert "in another order" in complaints(_swapped)[0]

"""Who may import whom: the imports of the sources as they stand, lazy and type-only ones included, against one table."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("distillzoo", "benchmarks", "examples")

FOUNDATION = frozenset({"types", "errors", "kinds", "copying", "streams", "schedules", "registry"})
NETWORK = frozenset({"dataflow", "stages", "taps"})  # how a network is read: what the design calls taps
DISTILLER = frozenset({"distiller", "weighting", "casting", "checking", "options"})  # the base class and what belongs to it
ALLOWED: dict[str, frozenset[str]] = {
    **dict.fromkeys(FOUNDATION, frozenset({"types", "errors", "kinds"})),
    **dict.fromkeys(NETWORK, FOUNDATION | NETWORK),
    "models": FOUNDATION,
    "data": FOUNDATION,
    "adapters": FOUNDATION,
    "weighting": FOUNDATION,
    "casting": FOUNDATION,
    "options": FOUNDATION | {"distiller"},
    "checking": FOUNDATION | {"taps"},  # of batches and traces
    "export": FOUNDATION,
    "distiller": FOUNDATION | NETWORK | DISTILLER,
    "composition": FOUNDATION | NETWORK | DISTILLER,
    "methods": FOUNDATION | NETWORK | DISTILLER | {"adapters"},
    "arguments": FOUNDATION | NETWORK | DISTILLER | {"adapters"},  # of build_distiller
    "build": FOUNDATION | NETWORK | DISTILLER | {"arguments", "composition", "methods"},
    "functional": frozenset({"methods"}),
    "testing": FOUNDATION | NETWORK | DISTILLER | {"composition", "build"},
    "engine": FOUNDATION | {"taps", "distiller"},  # the teacher and the interface
    "bench": FOUNDATION | {"taps", "distiller", "engine", "build", "models", "data", "root"},  # what build returns, engine takes
    "__main__": FOUNDATION | NETWORK | {"build", "models", "data"},  # the small commands
    "taps_cli": FOUNDATION | NETWORK | {"models"},  # a command: builds a network by name and shows its taps
    "root": FOUNDATION | NETWORK | {"distiller", "build", "models", "data", "engine", "functional", "testing"},
}
"""A component (a file or folder of the package, ``root`` for its ``__init__``) and those that it may import beside itself."""


@dataclass(frozen=True)
class Import:
    """One imported module, or name of a module."""

    line: int
    module: str
    name: str | None


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """Yield everything of the package that a source imports, wherever it does so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [Import(node.lineno, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, base] if base else kept)
            found = [Import(node.lineno, base, alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            argument = node.args[0] if node.args else None
            text = argument.value if isinstance(argument, ast.Constant) else None
            found = [Import(node.lineno, text, None)] if isinstance(text, str) else []
        else:
            continue
        yield from (each for each in found if each.module.partition(".")[0] == "distillzoo")


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def full_name(found: Import) -> str:
    """The dotted module that an import reaches: ``from distillzoo import data`` reaches ``distillzoo.data``."""
    deeper = ROOT.joinpath(*found.module.split("."), found.name or "")
    if found.name and (deeper.is_dir() or deeper.with_suffix(".py").is_file()):
        return f"{found.module}.{found.name}"
    return found.module


def component(module: str) -> str:
    return [*module.split("."), "root"][1]


def offences(source: str, module: str, where: str, *, is_package: bool = False) -> list[str]:
    """Return one line an offending import: ``file:line: what``."""
    found: list[str] = []
    for each in imports(source, module, is_package=is_package):
        target = full_name(each)
        problem = _inside(module, target, is_package) if module.startswith("distillzoo") else _outside(target, each.name)
        if problem:
            found.append(f"{where}:{each.line}: {module} imports {target}: {problem}")
    return list(dict.fromkeys(found))


def _inside(module: str, target: str, is_package: bool) -> str | None:
    own, other = component(module), component(target)
    if own != other:
        return None if other in ALLOWED.get(own, ()) else f"{own} may import {', '.join(sorted(ALLOWED.get(own, ())))}"
    lists_them = is_package and module == "distillzoo.methods"
    if own == "methods" and target != module and not lists_them:
        return "methods never import each other"
    return None


def _outside(target: str, name: str | None) -> str | None:
    """Benchmarks and examples use what a user can use: the harness, and names that the reference documents."""
    if component(target) == "bench" or (target in public_modules() and not (name or "").startswith("_")):
        return None
    return "benchmarks and examples import the harness and the public names of docs/api.rst only"


def public_modules() -> set[str]:
    """The package itself and every module that the reference documents."""
    reference = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    return {"distillzoo", *re.findall(r"^\.\. automodule:: (distillzoo\.\S+)$", reference, flags=re.MULTILINE)}


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def check(path: Path) -> list[str]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    return offences(path.read_text(encoding="utf-8"), module, str(path.relative_to(ROOT)), is_package=is_package)


def test_every_import_is_allowed():
    found = [offence for path in sources() for offence in check(path)]
    assert not found, "\n".join(["Imports against the rules:", *found])


def test_the_table_knows_every_part_of_the_package():
    parts = {path.stem for path in (ROOT / "distillzoo").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert parts - {"__init__"} <= ALLOWED.keys()


OFFENDING = """
from __future__ import annotations
from typing import TYPE_CHECKING
import importlib
import torch
from distillzoo.errors import OptionError
from distillzoo import models
if TYPE_CHECKING:
    from distillzoo.engine.trainer import Trainer
class Method:
    def lazily(self):
        import distillzoo.data.digits
        from .kd import kd_loss
        from ..adapters import connectors
        from distillzoo.bench.plan import Plan as Renamed
        return importlib.import_module("distillzoo.models.resnet")
"""


def test_offending_imports_of_a_method_are_all_found_with_their_lines():
    found = offences(OFFENDING, "distillzoo.methods.fitnet", "methods/fitnet.py")
    seen = [re.match(r"methods/fitnet\.py:(\d+): distillzoo\.methods\.fitnet imports (\S+):", line).groups() for line in found]
    assert sorted(seen, key=lambda pair: int(pair[0])) == [
        ("7", "distillzoo.models"),
        ("9", "distillzoo.engine.trainer"),
        ("12", "distillzoo.data.digits"),
        ("13", "distillzoo.methods.kd"),
        ("15", "distillzoo.bench.plan"),
        ("16", "distillzoo.models.resnet"),
    ]
    assert sum("never import each other" in line for line in found) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("distillzoo.engine.trainer", "from distillzoo.methods.kd import KD"),
        ("distillzoo.engine.trainer", "from distillzoo.build import build_distiller"),
        ("distillzoo.engine.trainer", "from distillzoo import build_distiller"),
        ("distillzoo.engine.config", "from distillzoo.bench.recipe import Recipe"),
        ("distillzoo.engine.trainer", "from distillzoo.data import load_dataset"),
        ("distillzoo.build", "from distillzoo.models import create_model"),
        ("distillzoo.methods.kd", "import distillzoo.methods.fitnet"),
        ("distillzoo.methods.kd", "from distillzoo.methods import fitnet"),
        ("distillzoo.methods.kd", "from distillzoo import methods"),
        ("distillzoo.methods.kd", "from distillzoo.build import build_distiller"),
        ("distillzoo.methods.kd", "from distillzoo.composition import Composition"),
        ("distillzoo.adapters.fusion", "from distillzoo.taps import Tapped"),
        ("distillzoo.adapters.fusion", "from distillzoo.methods.kd import kd_loss"),
        ("distillzoo.models.resnet", "from distillzoo.distiller import Distiller"),
        ("distillzoo.models.resnet", "from distillzoo.taps import Tapped"),
        ("distillzoo.data.base", "from distillzoo.models import create_model"),
        ("distillzoo.taps", "from distillzoo.distiller import Distiller"),
        ("distillzoo.distiller", "from distillzoo.methods.kd import KD"),
        ("distillzoo.types", "from distillzoo.streams import Stream"),
        ("distillzoo.functional", "from distillzoo.distiller import Distiller"),
        ("distillzoo.bench.plan", "from distillzoo.methods.kd import KD"),
        ("distillzoo.unheard_of", "from distillzoo.errors import OptionError"),
        ("benchmarks.run_table", "from distillzoo.methods.kd import KD"),
        ("examples.quickstart", "from distillzoo.engine.member import Member"),
        ("examples.quickstart", "from distillzoo.taps import _Hook"),
    ],
)
def test_forbidden(module, line):
    assert len(offences(line, module, "made_up.py")) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("distillzoo.engine.trainer", "from distillzoo.engine.config import TrainConfig"),
        ("distillzoo.engine.trainer", "from . import config"),
        ("distillzoo.build", "import distillzoo.methods"),
        ("distillzoo.methods.kd", "import torch, timm"),
        ("distillzoo.methods.kd", "from distillzoo.adapters.connectors import Regressor"),
        ("distillzoo.bench.runner", "from distillzoo.build import describe_distiller"),
        ("benchmarks.run_table", "from distillzoo.bench.cli import main"),
        ("examples.quickstart", "from distillzoo import build_distiller"),
        ("examples.quickstart", "from distillzoo.types import Trace"),
    ],
)
def test_allowed(module, line):
    assert offences(line, module, "made_up.py") == []


def test_the_list_of_methods_imports_them_and_a_method_does_not():
    line = "from distillzoo.methods import kd, vanilla"
    assert offences(line, "distillzoo.methods", "methods/__init__.py", is_package=True) == []
    assert len(offences(line, "distillzoo.methods.other", "methods/other.py")) == 2

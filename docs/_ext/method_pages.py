"""Write one page a registered method into ``methods/`` before Sphinx reads the sources.

Everything on a page comes from the class: its docstring, its pure losses, its weights, and what it asks of the loop, which is read
from a distiller built with the default options on a small pair.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from sphinx.application import Sphinx

from distillzoo import Distiller, build_distiller, functional
from distillzoo.errors import UnsupportedPairError
from distillzoo.models import create_model
from distillzoo.options import option_defaults
from distillzoo.registry import DISTILLERS
from distillzoo.schedules import Weight, describe_weight
from distillzoo.types import DataSpec

STUDENT, TEACHER, SIZE, CLASSES = "resnet8", "resnet20", 32, 10


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the writer with Sphinx."""
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / "methods"))
    app.connect("autodoc-process-docstring", escape_bars, priority=400)  # before napoleon, which rewrites sections
    return {"parallel_read_safe": True}


def escape_bars(app: Sphinx, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:  # noqa: ARG001
    """Escape the bars of norms and absolute values: formulae are plain text, and ``|x|`` would be a substitution."""
    in_example = False
    for number, line in enumerate(lines):
        in_example = bool(line.strip()) and (in_example or line.lstrip().startswith(">>>"))
        if not in_example:
            literals = line.split("``")
            lines[number] = "``".join(part if index % 2 else part.replace("|", r"\|") for index, part in enumerate(literals))


def write_pages(folder: Path) -> None:
    """Write a page for every registered method and an index of them; pages of methods that are gone are removed."""
    pages = {f"{name}.rst": method_page(name, method) for name, method in sorted(DISTILLERS.items())}
    pages["index.rst"] = index_page(DISTILLERS)
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.rst"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # an unchanged page is not read again
            path.write_text(text, encoding="utf-8")


def index_page(methods: Iterable[str]) -> str:
    """Return the page that lists the methods, each with the first sentence of its docstring."""
    rows = [(f":doc:`{name}`", (inspect.getdoc(DISTILLERS[name]) or "").partition("\n\n")[0]) for name in sorted(methods)]
    entries = [f"   {name}" for name in sorted(methods)]
    return "\n".join(
        [
            *heading("Methods", "="),
            "Made from the classes' docstrings. The name is what ``build_distiller`` and ``--methods`` take;",
            'names joined by ``+`` are composed, as in ``"at+kd"``.\n',
            *table(("Name", "What is taught"), rows),
            ".. toctree::\n   :hidden:\n",
            *entries,
            "",
        ]
    )


def method_page(name: str, method: type[Distiller]) -> str:
    """Return the page of one method."""
    module = sys.modules[method.__module__]
    lines = [
        *heading(f"{method.__name__} (``{name}``)", "="),
        f".. autoclass:: {method.__module__}.{method.__qualname__}\n",
        *weights(method),
        *needs(name),
    ]
    losses = [key for key in getattr(module, "__all__", ()) if inspect.isfunction(getattr(module, key))]
    if losses:
        lines += heading("Pure functions", "-")
    first = min(key for key, other in DISTILLERS.items() if other.__module__ == method.__module__)
    for loss in losses:
        public = getattr(functional, loss, None) is getattr(module, loss)
        lines.append(f".. autofunction:: {'distillzoo.functional' if public else module.__name__}.{loss}")
        lines += [] if name == first else ["   :no-index:"]  # described where the first method of the file is
        lines.append("")
    return "\n".join(lines)


def weights(method: type[Distiller]) -> list[str]:
    """Return the section on terms and weights: one column a preset, and one for compositions where those differ."""
    presets: dict[str, Any] = {
        preset: {"ce": 1.0, **chosen} for preset, chosen in method.presets_with(option_defaults(method)).items()
    }
    terms = list(dict.fromkeys(term for chosen in presets.values() for term in chosen))
    header = ["Term", *(f"``{preset}``" for preset in presets)]
    rows = [[f"``{term}``", *(shown(chosen.get(term)) for chosen in presets.values())] for term in terms]
    if len(terms) > 1:
        first = next(iter(presets.values()))
        header.append("in a composition")
        for row, term in zip(rows, terms, strict=True):
            row.append("1" if term == "ce" else shown(method.composed_weights.get(term, first.get(term))))
    return [
        *heading("Terms and weights", "-"),
        f"``{next(iter(presets))}`` is the default; ``weights=`` takes the name of another, or numbers by term.\n",
        *table(header, rows),
    ]


def shown(weight: Weight | None) -> str:
    """Return a weight as text."""
    if weight is None:
        return "absent"
    plain = describe_weight(weight)
    if isinstance(plain, dict):
        kind = str(plain.pop("kind")).replace("_", " ")
        return f"{kind}: " + ", ".join(f"{key} {value:g}" for key, value in plain.items())
    return f"{plain:g}"


def needs(name: str) -> list[str]:
    """Return the section on what a distiller with the default options asks of the loop and adds to the student."""
    lines = heading("What it needs", "-")
    labels = torch.arange(50_000) % CLASSES  # as many as a common training set has: memories and negatives as in real use
    data = DataSpec(CLASSES, (SIZE, SIZE), num_samples=len(labels), targets=labels)
    student, teacher = (create_model(network, num_classes=CLASSES) for network in (STUDENT, TEACHER))
    plain = trained(student)
    try:
        distiller = build_distiller(name, student, teacher, data=data, seed=0)
    except UnsupportedPairError as error:
        return [*lines, f"On {TEACHER} and {STUDENT} it refuses: {error}\n"]
    asks = distiller.requires
    rows = [
        ("Teacher", "yes" if asks.teacher else "no"),
        ("Student taps", listed(asks.student_taps)),
        ("Teacher taps", listed(asks.teacher_taps)),
        ("Position of each sample in the data set (``index``)", "yes" if asks.index else "no"),
        ("Second view of each image", "yes" if asks.second_view else "no"),
        ("Class numbers, so no mixing of labels", "yes" if asks.hard_labels else "no"),
        ("Phases", ", ".join(phase.name for phase in distiller.phases())),
        ("Parameters that are trained beside the plain student's", f"{trained(distiller) - plain:,}"),
    ]
    return [*lines, f"With default options, ``{TEACHER}`` teaching ``{STUDENT}``, {CLASSES} classes:\n", *table(("", ""), rows)]


def trained(module: torch.nn.Module) -> int:
    """Return the number of parameters that require a gradient."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def listed(names: Iterable[str]) -> str:
    """Return names of taps as text."""
    return ", ".join(f"``{name}``" for name in names) or "none"


def heading(text: str, line: str) -> list[str]:
    """Return a heading's lines."""
    return [text, line * len(text), ""]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return a list-table; a header of empty cells is left out."""
    header = list(header)
    all_rows = [header, *map(list, rows)] if any(header) else [list(row) for row in rows]
    lines = [".. list-table::", "   :widths: auto"]
    lines += ["   :header-rows: 1", ""] if any(header) else [""]
    for row in all_rows:
        lines += [f"   {'* -' if number == 0 else '  -'} {' '.join(cell.split())}" for number, cell in enumerate(row)]
    return [*lines, ""]

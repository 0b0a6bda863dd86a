"""Sweeps: every value of one or two options, trained under the same recipe, as a table and a plot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distillzoo.bench.captions import INSIDE_SPREAD, Results, protocol_note, record_sentences
from distillzoo.bench.checks import check_list
from distillzoo.bench.plan import Cell, Plan
from distillzoo.bench.recipe import Recipe, apply_override
from distillzoo.bench.render import Spread, as_csv, as_markdown, as_text
from distillzoo.bench.rows import Row, TableSpec, select_rows
from distillzoo.bench.table import Line, make_line
from distillzoo.bench.yamls import parse_scalar
from distillzoo.errors import OptionError

__all__ = ["RECIPE_SCALARS", "Axis", "SweepView", "is_recipe_path", "method_override", "parse_axis", "sweep_points", "sweep_rows"]

_RECIPE_PARTS = ("student", "teacher", "data")
RECIPE_SCALARS = ("teacher_seed", "teacher_storage")
"""Fields of a recipe that are set and swept by their bare names: they have no parts and no option of their own."""


@dataclass(frozen=True)
class Axis:
    """One swept field.

    Args:
        path: ``METHOD.option``, ``METHOD.weights.TERM``, or a recipe field such as ``student.lr``.
        values: Its values.
    """

    path: str
    values: tuple[Any, ...]

    @property
    def of_recipe(self) -> bool:
        """Whether it changes the recipe, and not one method."""
        return is_recipe_path(self.path)

    @property
    def row(self) -> str:
        """Name of the method whose option it is."""
        return self.path.split(".", 1)[0]


def is_recipe_path(path: str) -> bool:
    """Return whether a dotted path is a recipe field; other paths begin with a method."""
    return path.split(".", 1)[0] in (*_RECIPE_PARTS, *RECIPE_SCALARS)


def parse_axis(text: str) -> Axis:
    """Read ``kd.temperature=1,2,4,8``.

    Raises:
        OptionError: If it is not of that form, empty, or has a value twice.
    """
    path, equals, listed = text.partition("=")
    path = path.strip()
    if not equals or not path or ("." not in path and path not in RECIPE_SCALARS):
        raise OptionError(f"--sweep is written METHOD.option=v1,v2 or student.lr=v1,v2; got {text!r}.")
    parts = [part.strip() for part in listed.split(",")]
    if "" in parts:
        raise OptionError(f"--sweep {path} has an empty value in {listed!r}; write values separated by single commas.")
    values = tuple(parse_scalar(part) for part in parts)
    check_list(f"--sweep {path}", values)
    return Axis(path, values)


def method_override(row: Row, path: str, value: Any) -> Row:
    """Set ``option`` or ``weights.TERM`` of a row; a composition's option is ``member.option``.

    Args:
        row: The row.
        path: Path without the row's name.
        value: The value.
    """
    first, _, rest = path.partition(".")
    if first == "weights":
        return row.override({}, {rest: value} if rest else value)
    nested: Any = value
    for part in reversed(path.split(".")):
        nested = {part: nested}
    return row.override(nested)


def sweep_rows(axes: Sequence[Axis], recipe: Recipe) -> Recipe:
    """Return the recipe with the methods of a sweep: those that were named, else those that the axes belong to."""
    own = tuple(dict.fromkeys(axis.row for axis in axes if not axis.of_recipe))
    if recipe.methods is not None:
        left_out = [name for name in own if name not in recipe.methods and recipe.methods != ("all",)]
        if left_out:
            raise OptionError(f"--sweep names {left_out[0]!r}, which --methods leaves out; add it there, or leave --methods away.")
        return recipe
    return replace(recipe, methods=own) if own else recipe


def sweep_points(axes: Sequence[Axis], table: TableSpec, recipe: Recipe) -> list[tuple[Recipe, tuple[Row, ...]]]:
    """Return a recipe for every combination of recipe fields, with a row for every combination of method options.

    Raises:
        OptionError: If there are more than two axes or two with one path, or a field does not exist.
    """
    if len(axes) > 2:
        raise OptionError(f"--sweep takes one or two axes; got {len(axes)}; drop some.")
    check_list("--sweep", [axis.path for axis in axes])
    ours = [axis for axis in axes if axis.of_recipe]
    theirs = [axis for axis in axes if not axis.of_recipe]
    base_rows = select_rows(table, recipe)
    points = []
    for values in itertools.product(*(axis.values for axis in ours)):
        point, where = recipe, []
        for axis, value in zip(ours, values, strict=True):
            point = apply_override(point, axis.path, value)
            where.append((axis.path, value))
        rows = [expanded for row in base_rows for expanded in _expand(row, theirs)]
        points.append((point, tuple(replace(row, point=(*where, *row.point)) for row in rows)))
    return points


def _expand(row: Row, axes: Sequence[Axis]) -> list[Row]:
    """Return a row for every combination of the axes that are its own."""
    own = [axis for axis in axes if axis.row == row.name]
    rows = []
    for values in itertools.product(*(axis.values for axis in own)):
        made = row
        for axis, value in zip(own, values, strict=True):
            made = method_override(made, axis.path.removeprefix(f"{row.name}."), value)
        rows.append(replace(made, point=tuple((axis.path, value) for axis, value in zip(own, values, strict=True))))
    return rows


@dataclass(frozen=True)
class SweepView:
    """The view of a sweep: accuracy by values of the swept fields.

    Args:
        plan: The plan of the sweep.
        axes: What was swept.
        results: Results by run id.
    """

    plan: Plan
    axes: tuple[Axis, ...]
    results: Results

    @property
    def title(self) -> str:
        """Title of the table and the plot."""
        return f"{self.plan.recipe.dataset}: {' x '.join(axis.path for axis in self.axes)}"

    def _entries(self) -> list[tuple[str, Line]]:
        found: dict[tuple[str, str, str], list[Cell]] = {}
        for cell in self.plan.cells:
            found.setdefault((str(cell.pair), cell.row.title, repr(cell.row.point)), []).append(cell)
        return [(pair, make_line(self.plan, cells, self.results, {})) for (pair, _, _), cells in found.items()]

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        paths = [axis.path for axis in self.axes]
        lines = []
        for pair, line in self._entries():
            point = dict(line.row.point)
            lines.append([line.row.title, pair, *(str(point.get(path, "-")) for path in paths), line.accuracy, line.count()])
        return ["method", "pair", *paths, "last epoch", "n"], lines

    @property
    def caption(self) -> str:
        """What must be known to read the numbers."""
        data = self.plan.cells[0].run.data
        chosen = (
            "Choose here, never on the test set."
            if data.split == "heldout"
            else "Evaluated on the test set: nothing may be chosen here."
        )
        counts = [len(line.last) for _, line in self._entries()]
        described = "; ".join(dict.fromkeys(cell.run.data.description for cell in self.plan.cells))
        return (
            f"{described} (split: {data.split}); top-1 accuracy in per cent after the last epoch, mean ± standard deviation "
            f"over seeds. Differences between rows are paired over seeds; those {INSIDE_SPREAD} mean nothing. {chosen} "
            f"{protocol_note(self.plan, counts)}"
            f"{''.join(f' {sentence}' for sentence in record_sentences(self.plan.cells, self.results))}"
        )

    def text(self) -> str:
        """Return the table for a terminal."""
        return f"{self.title}\n\n{as_text(*self._cells())}\n\n{self.caption}"

    def markdown(self) -> str:
        """Return the table as Markdown."""
        return f"## {self.title}\n\n{as_markdown(*self._cells())}\n\n{self.caption}\n"

    def csv(self) -> str:
        """Return one line for every point."""
        rows: list[dict[str, Any]] = []
        for pair, line in self._entries():
            last = line.spreads()[0]
            figures = {"n": last.n, "last_mean": last.mean, "last_sd": last.sd}
            rows.append({"pair": pair, "row": line.row.title, **dict(line.row.point), **figures})
        return as_csv(rows)

    def series(self) -> tuple[str, tuple[Any, ...], dict[str, list[Spread]]]:
        """Return the option on the horizontal axis, its values, and the accuracies by label of a line."""
        axis = self.axes[0]
        lines: dict[str, list[Spread]] = {}
        pairs = len({str(cell.pair) for cell in self.plan.cells}) > 1
        for pair, line in self._entries():
            point, last = dict(line.row.point), line.spreads()[0]
            others = [f"{path}={value}" for path, value in point.items() if path != axis.path]
            label = ", ".join([line.row.title, *([pair] if pairs else []), *others])
            places = lines.setdefault(label, [Spread(()) for _ in axis.values])
            if axis.path in point:
                places[axis.values.index(point[axis.path])] = last
            else:
                lines[label] = [last] * len(axis.values)  # a row that the option does not belong to: a level line
        return axis.path, axis.values, lines

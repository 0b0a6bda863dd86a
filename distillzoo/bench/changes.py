"""In what a table differs from the recipe of its name: fields, options and weights with their values, table file, teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from distillzoo.bench.plan import Plan
from distillzoo.bench.recipe import Pair
from distillzoo.bench.rows import Row

__all__ = ["changes"]

_ABSENT = object()


def changes(plan: Plan) -> list[str]:
    """Return what was changed, each with its value and the one it had: ``"student.epochs 3 (recipe: 8)"``.

    A field that was set to the value it has anyway is no change. Of files only the names are said.

    Args:
        plan: The plan of the table.
    """
    recipe = plan.recipe
    found = []
    for path in recipe.changed:
        parts = _parts(path)
        now, before = _shown(_find(recipe.as_dict(), parts)), _before(plan, parts)
        if not before.endswith(f": {now}"):
            shown = f"{parts[1]}.{'.'.join(_own(parts))}" if parts[0] in ("options", "weights") else path
            found.append(f"{shown} {now}{f' ({before})' if before else ''}")
    table, usual = (str(each or recipe.dataset) for each in (recipe.table, recipe.original.get("table")))
    if recipe.original and table != usual:
        found.append(f"the table {plan.table.name}")
    files = {cell.teacher.checkpoint.name: None for cell in plan.cells if cell.teacher.checkpoint is not None}
    return [*found, *(f"the teacher of the file {name}" for name in files)]


def _parts(path: str) -> tuple[str, ...]:
    """Return where a path leads in the recipe: ``kd.weights.kd``, as it is typed, stands under ``weights.kd.kd``."""
    first, *rest = path.split(".")
    return ("weights", first, *rest[1:]) if rest[:1] == ["weights"] else (first, *rest)


def _own(parts: Sequence[str]) -> Sequence[str]:
    return parts[2:] if parts[0] == "options" else ("weights", *parts[2:])


def _before(plan: Plan, parts: tuple[str, ...]) -> str:
    """Say which value something had in the recipe, or in the table; empty if that is not known."""
    original = plan.recipe.original
    was = _find(original, parts)
    if was is not _ABSENT:
        overrides = original.get(f"{parts[0]}_overrides", {}) if parts[0] in ("student", "teacher") else {}
        special = [f"{_shown(values[parts[1]])} for {network}" for network, values in overrides.items() if parts[1] in values]
        return f"recipe: {', '.join([_shown(was), *special])}"
    if parts[0] not in ("options", "weights") or len(parts) < 2:
        return ""
    name = parts[1]
    row = next((row for row in plan.table.rows if row.name == name), Row(name, name, name))
    pairs = dict.fromkeys(str(cell.pair) for cell in plan.cells)
    found = {pair: _find(row.describe(Pair.parse(pair)), (parts[0], *parts[2:])) for pair in pairs}
    was = {pair: _shown(value) for pair, value in found.items() if value is not _ABSENT}
    values = dict.fromkeys(was.values())
    if len(values) < 2:
        return f"table: {next(iter(values))}" if values else ""
    return f"table: {', '.join(f'{value} for {pair}' for pair, value in was.items())}"


def _find(values: Any, parts: Sequence[str]) -> Any:
    for part in parts:
        if not isinstance(values, Mapping) or part not in values:
            return _ABSENT
        values = values[part]
    return values


def _shown(value: Any) -> str:
    """Write a value briefly; a file by its name, since tables are made public and folders are nobody's business."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_shown(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return PurePath(value).name if isinstance(value, str) and value else str(value)

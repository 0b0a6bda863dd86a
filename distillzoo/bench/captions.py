"""What is said under a table: what its numbers are, by which recipe, from which networks, how long it took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distillzoo.bench.plan import Cell, Plan, TeacherJob
from distillzoo.bench.recipe import Recipe

if TYPE_CHECKING:
    from distillzoo.bench.table import Line

__all__ = ["Results", "TeacherInfo", "cost_sentence", "figures_by_seed", "pair_caption", "protocol_note", "table_caption"]

Results = Mapping[str, Mapping[str, Any]]
TeacherInfo = Callable[[TeacherJob], Mapping[str, Any] | None]


def figures_by_seed(cells: Sequence[Cell], results: Results, key: str) -> dict[int, float]:
    """Return a figure of the cells' results by seed, of those that have one.

    Args:
        cells: Cells of one row of one pair.
        results: Results by run id.
        key: Name of the figure.
    """
    found = {cell.seed: results[cell.run.id].get(key) for cell in cells if cell.run.id in results}
    return {seed: float(value) for seed, value in found.items() if value is not None}


def protocol_note(recipe: Recipe) -> str:
    """Say by which recipe the numbers came, and that only the published protocol compares with published figures."""
    count = f"{len(recipe.seeds)} seed{'s' if len(recipe.seeds) != 1 else ''}"
    short = recipe.name.removeprefix(f"{recipe.dataset}_")
    short = short.upper() if short == "cpu" else short
    changed = f" with {', '.join(recipe.changed)} changed" if recipe.changed else ""
    if recipe.comparable and not changed:
        return f"Recipe {short}, {count}."
    return f"{short} recipe{changed}, {count}: not comparable with published figures."


def table_caption(plan: Plan, lines: Sequence[Line]) -> str:
    """Return what must be known to read any of the lines.

    Args:
        plan: The plan of the table.
        lines: Its lines.
    """
    data = plan.cells[0].run.data
    origins: dict[str, dict[str, None]] = {}
    for line in lines:
        if line.row.source:
            origins.setdefault(line.row.source.partition(":")[0], {})[line.row.title] = None
    starred: dict[tuple[str, str], dict[str, None]] = {}
    for line in lines:
        for label, _ in line.published:
            if label in line.protocols:
                starred.setdefault((label, line.protocols[label]), {})[line.row.title] = None
    sentences = [
        f"{data.description} (split: {data.split}); top-1 accuracy in per cent after the last epoch, mean ± standard deviation "
        "over seeds.",
        f"Differences to {plan.table.baseline} are paired over seeds; differences inside the spread mean nothing. The best epoch "
        "is chosen on the evaluation images and so flatters.",
        protocol_note(plan.recipe),
        "In brackets: ours less the published figure." if any(line.published and line.last for line in lines) else "",
        *(f"* {label}'s {' and '.join(titles)}: {protocol}." for (label, protocol), titles in starred.items()),
        *(f"Settings of {', '.join(titles)}: from {origin}." for origin, titles in origins.items()),
        plan.table.note.strip(),
        plan.recipe.note.strip(),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def pair_caption(
    cells: Sequence[Cell],
    results: Results,
    teacher_info: TeacherInfo,
    reasons: Mapping[str, str],
    published: Sequence[tuple[str, float]] = (),
) -> str:
    """Return what must be known of one pair.

    Args:
        cells: Its cells.
        results: Results by run id.
        teacher_info: Accuracy and parameters of a teacher, ``None`` if they are not known.
        reasons: Why a run has no result, by run id.
        published: Published accuracies of the teacher, each with its source.
    """
    pair = cells[0].pair
    info = teacher_info(cells[0].teacher)
    teacher = (
        f"Teacher {pair.teacher} not made"
        if info is None
        else f"Teacher {pair.teacher} {info['accuracy']:.2f} % ({info['parameters']:,} parameters)"
    )
    theirs = f", published {', '.join(f'{value:.2f} % ({label})' for label, value in published)}" if published else ""
    sizes = [results[cell.run.id].get("parameters") for cell in cells if cell.run.id in results]
    size = next((f" ({value:,} parameters)" for value in sizes if value), "")
    counts = sorted(
        {
            len(figures_by_seed([c for c in cells if c.row.name == name], results, "last_accuracy"))
            for name in {cell.row.name for cell in cells}
        }
    )
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    sentences = [
        f"{teacher}{theirs}, student {pair.student}{size}; n = {n} seed{'s' if n != '1' else ''}.",
        "One seed ranks nothing." if n == "1" else "",
        cost_sentence([cell for cell in cells if cell.run.id in results], results),
        *sorted({f"Not applicable: {cell.row.title} ({reasons[cell.run.id]})" for cell in cells if cell.run.id in reasons}),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def cost_sentence(cells: Sequence[Cell], results: Results) -> str:
    """Say how long the groups of a pair trained and where, as far as their records tell.

    Args:
        cells: Cells of one pair that have a result.
        results: Results by run id, each with its ``environment``.
    """
    groups: dict[tuple[int, float], Mapping[str, Any]] = {}
    for cell in cells:
        where = results[cell.run.id].get("environment") or {}
        if where.get("group_seconds") and where.get("group_images_per_second"):
            groups[cell.seed, where["group_seconds"]] = where
    if not groups:
        return ""
    minutes = [where["group_seconds"] / 60 for where in groups.values()]
    sizes = sorted({where["group_size"] for where in groups.values()})
    speeds = [where["group_images_per_second"] for where in groups.values()]
    places = dict.fromkeys(
        where["gpu"] or f"{where['threads']} thread{'s' if where['threads'] != 1 else ''} of {where['cpu']}"
        for where in groups.values()
    )
    rows = f"{' or '.join(map(str, sizes))} row{'s' if sizes != [1] else ''} on one teacher pass"
    speed = f"{_range(speeds, '.0f')} images/s for each row"
    return f"Training took {_range(minutes, '.1f')} minutes for a group of {rows}, {speed}, on {', '.join(places)}."


def _range(values: list[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"

"""What is said under a table: what its numbers are, by which recipe, from which networks, how long it took."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distillzoo.bench.changes import changes
from distillzoo.bench.places import cost_sentence, places, places_sentence
from distillzoo.bench.plan import Cell, Plan, TeacherJob
from distillzoo.bench.provenance import commits_sentence, exports_sentence, teachers_sentence, untold_sentence
from distillzoo.bench.render import Spread

if TYPE_CHECKING:
    from distillzoo.bench.table import Line

__all__ = [
    "INSIDE_SPREAD",
    "Results",
    "TeacherInfo",
    "accuracy_text",
    "baseline_title",
    "ended_by_seed",
    "ended_text",
    "figures_by_seed",
    "pair_caption",
    "protocol_note",
    "record_sentences",
    "seeds_text",
    "table_caption",
]

INSIDE_SPREAD = "inside the spread (a 95 % interval of their mean by Student's t holds zero)"
"""When differences say nothing, as every caption has it."""

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


def ended_by_seed(cells: Sequence[Cell], results: Results) -> dict[int, str]:
    """Return by seed how runs ended that have a result and did not reach their last epoch.

    Args:
        cells: Cells of one row of one pair.
        results: Results by run id.
    """
    states = {cell.seed: str(results[cell.run.id].get("status", "done")) for cell in cells if cell.run.id in results}
    return {seed: state for seed, state in states.items() if state != "done"}


def seeds_text(counts: Collection[int], asked: int) -> str:
    """Say how many seeds are there, and of how many where some are missing.

    Args:
        counts: Seeds that each row has.
        asked: Seeds that were asked for.

    Example:
        >>> seeds_text([3, 3], 3), seeds_text([0, 2], 3), seeds_text([1], 3)
        ('n = 3 seeds', 'n = 0 to 2 of 3 seeds', 'n = 1 of 3 seeds')
    """
    low, high = min(counts, default=0), max(counts, default=0)
    there = str(low) if low == high else f"{low} to {high}"
    return f"n = {there if low == high == asked else f'{there} of {asked}'} seed{'s' if asked != 1 else ''}"


def ended_text(ended: Mapping[int, str], asked: int) -> str:
    """Say how seeds ended that have a result and no figure: ``"seed 1 diverged"``; empty if there are none.

    Args:
        ended: Their states by seed.
        asked: Seeds that were asked for; of a single one the number says nothing.
    """
    by_state: dict[str, list[int]] = {}
    for seed, state in sorted(ended.items()):
        by_state.setdefault(state, []).append(seed)
    if asked == 1:
        return ", ".join(by_state)
    return ", ".join(f"seed{'s' if len(seeds) > 1 else ''} {_listed(seeds, ' and ')} {state}" for state, seeds in by_state.items())


def accuracy_text(figures: Spread, missing: str) -> str:
    """Write a cell: mean ± standard deviation, and why seeds are missing, where that is known.

    Args:
        figures: Accuracies of the seeds that have one.
        missing: Why others have none; may be empty.
    """
    if not figures.n:
        return missing or "missing"
    return f"{figures.text()} ({missing})" if missing else figures.text()


def baseline_title(plan: Plan) -> str:
    """Return the title of the row that the others are compared with, as its column has it.

    Args:
        plan: The plan of the table.
    """
    return next((row.title for row in plan.table.rows if row.name == plan.table.baseline), plan.table.baseline)


def protocol_note(plan: Plan, counts: Collection[int]) -> str:
    """Say by which recipe the numbers came, and that only the published protocol compares with published figures.

    Args:
        plan: The plan of the table.
        counts: Seeds that each row has.
    """
    recipe = plan.recipe
    short = recipe.name.removeprefix(f"{recipe.dataset}_")
    short = short.upper() if short == "cpu" else short
    swept = dict.fromkeys(f"{path} swept" for cell in plan.cells for path, _ in cell.row.point)
    changed = [*changes(plan), *swept]
    named = f" with {_listed(changed, ' and ')}" if changed else ""
    seeds = seeds_text(counts, len(recipe.seeds))
    trained = _trained(plan)
    if recipe.comparable and not changed:
        return f"Recipe {short}, {seeds}. {trained}"
    return f"{short} recipe{named}, {seeds}: not comparable with published figures. {trained}"


def _trained(plan: Plan) -> str:
    """Say for how many epochs and in which batches students and teachers train."""
    configs = {
        "Students": [cell.run.config for cell in plan.cells],
        "teachers": [cell.teacher.config for cell in plan.cells if not cell.teacher.imported],
    }
    said = []
    for who, found in configs.items():
        if found:
            epochs = _listed(sorted({config.epochs for config in found}), " or ")
            batches = _listed(sorted({config.batch_size for config in found}), " or ")
            said.append(f"{who} train {epochs} epoch{'s' if epochs != '1' else ''} in batches of {batches}")
    return f"{', '.join(said)}."


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
        f"Differences to {baseline_title(plan)} are paired over seeds; those marked ns are {INSIDE_SPREAD} and "
        "mean nothing. The best epoch is chosen on the evaluation images and so flatters.",
        protocol_note(plan, [len(line.last) for line in lines if line.applies]),
        "In brackets: ours less the published figure." if any(line.published and line.last for line in lines) else "",
        *(f"* {label}'s {' and '.join(titles)}: {protocol}." for (label, protocol), titles in starred.items()),
        *(f"Settings of {', '.join(titles)}: from {origin}." for origin, titles in origins.items()),
        plan.table.note.strip(),
        plan.recipe.note.strip(),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def pair_caption(
    cells: Sequence[Cell],
    lines: Sequence[Line],
    results: Results,
    teacher_info: TeacherInfo,
    reasons: Mapping[str, str],
    published: Sequence[tuple[str, float]] = (),
) -> str:
    """Return what must be known of one pair.

    Args:
        cells: Its cells.
        lines: Its lines.
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
        else f"Teacher {pair.teacher} {info['accuracy']:.2f} % ({info['parameters']:,} parameters{_made(info)})"
    )
    theirs = f", published {', '.join(f'{value:.2f} % ({label})' for label, value in published)}" if published else ""
    sizes = [results[cell.run.id].get("parameters") for cell in cells if cell.run.id in results]
    size = next((f" ({value:,} parameters)" for value in sizes if value), "")
    counts = [len(line.last) for line in lines if line.applies]
    fates = {line.row.title: ended_text(line.ended, line.asked) for line in lines if line.ended}
    ended = [f"{title}: {fate}" for title, fate in fates.items()]
    sentences = [
        f"{teacher}{theirs}, student {pair.student}{size}; {seeds_text(counts, lines[0].asked)}.",
        "One seed ranks nothing." if max(counts, default=0) == 1 else "",
        f"{'; '.join(ended)}; a mean of the other seeds flatters." if ended else "",
        *record_sentences(cells, results),
        *sorted({f"Not applicable: {cell.row.title} ({reasons[cell.run.id]})" for cell in cells if cell.run.id in reasons}),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _made(info: Mapping[str, Any]) -> str:
    """Say where a teacher trained, and that the commit of that is not known; empty of what is not told."""
    environment = info.get("environment") or {}
    where = " and then ".join(places(environment))
    parts = [f"trained on {where}" if where else "", "no commit named" if environment and not environment.get("commit") else ""]
    return "".join(f"; {part}" for part in parts if part)


def record_sentences(cells: Sequence[Cell], results: Results) -> list[str]:
    """Return what records tell besides their figures: teachers, places, cost, exports, and what is not told.

    Args:
        cells: The cells.
        results: Results by run id.
    """
    sentences = (teachers_sentence, places_sentence, cost_sentence, exports_sentence, commits_sentence, untold_sentence)
    return [said for sentence in sentences if (said := sentence(cells, results))]


def _listed(parts: Sequence[object], last: str) -> str:
    words = [str(part) for part in parts]
    return last.join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)

"""A table is a view of records: it can always be made again without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distillzoo.bench.plan import Cell, Plan, TeacherJob
from distillzoo.bench.recipe import Pair, Recipe
from distillzoo.bench.render import Spread, as_csv, as_markdown, as_text, spread
from distillzoo.bench.rows import Row

__all__ = ["Block", "Line", "Table", "make_table", "protocol_note"]

Results = Mapping[str, Mapping[str, Any]]
TeacherInfo = Callable[[TeacherJob], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Line:
    """One row of one pair.

    Args:
        row: The row.
        asked: Number of seeds that were asked for.
        last: Accuracy after the last epoch, by seed.
        best: Accuracy of the best epoch, by seed.
        against: Difference to the baseline by seed, for the seeds that both have.
        published: Published figures with their source.
        missing: Why seeds are missing, where that is known.
    """

    row: Row
    asked: int
    last: Mapping[int, float]
    best: Mapping[int, float]
    against: Mapping[int, float]
    published: tuple[tuple[str, float], ...] = ()
    missing: str = ""

    def spreads(self) -> tuple[Spread, Spread, Spread]:
        """Return last, best and difference over seeds."""
        return spread([*self.last.values()]), spread([*self.best.values()]), spread([*self.against.values()])

    def count(self) -> str:
        """Return the number of seeds, and of how many where some are missing."""
        n = len(self.last)
        return str(n) if n == self.asked else f"{n} of {self.asked}"


@dataclass(frozen=True)
class Block:
    """The rows of one pair.

    Args:
        pair: The networks.
        lines: The rows.
        caption: What must be known to read them.
        cut: Accuracy of a teacher whose head was cut to the classes, measured before any student trained.
    """

    pair: Pair
    lines: tuple[Line, ...]
    caption: str
    cut: float | None = None

    @property
    def teacher(self) -> str:
        """Name of the teacher, as the heading has it."""
        return self.pair.teacher + ("" if self.cut is None else f" ({self.cut:.2f} %, head cut to these classes)")


@dataclass(frozen=True)
class Table:
    """A finished view.

    Args:
        title: Title.
        baseline: Title of the row that others are compared with.
        baseline_name: Its name.
        blocks: One a pair.
    """

    title: str
    baseline: str
    baseline_name: str
    blocks: tuple[Block, ...]

    def _cells(self, block: Block) -> tuple[list[str], list[list[str]]]:
        sources = list(dict.fromkeys(label for line in block.lines for label, _ in line.published))
        header = ["method", "last epoch", "best epoch", f"vs {self.baseline}", "n", *(f"published ({label})" for label in sources)]
        lines = []
        for line in block.lines:
            last, best, against = line.spreads()
            empty = line.missing or "missing"
            figures = dict(line.published)
            lines.append(
                [
                    line.row.title,
                    last.text() if last.n else empty,
                    best.text() if best.n else "-",
                    "-" if line.row.name == self.baseline_name else against.text(signed=True),
                    line.count(),
                    *(f"{figures[label]:.2f}" if label in figures else "-" for label in sources),
                ]
            )
        return header, lines

    def text(self) -> str:
        """Return the table for a terminal."""
        parts = []
        for block in self.blocks:
            parts.append(f"{self.title}: {block.teacher} -> {block.pair.student}\n\n{as_text(*self._cells(block))}")
            parts.append(block.caption)
        return "\n\n".join(parts)

    def markdown(self) -> str:
        """Return the table as Markdown."""
        parts = [f"## {self.title}"]
        for block in self.blocks:
            parts += [f"### {block.teacher} → {block.pair.student}", as_markdown(*self._cells(block)), block.caption]
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """Return one line a pair and row, with every seed's figure."""
        return as_csv([self._csv_row(block, line) for block in self.blocks for line in block.lines])

    def _csv_row(self, block: Block, line: Line) -> dict[str, object]:
        last, best, against = line.spreads()
        return {
            "teacher": block.pair.teacher,
            "student": block.pair.student,
            "row": line.row.name,
            "method": line.row.method,
            "n": last.n,
            "last_mean": last.mean,
            "last_sd": last.sd,
            "best_mean": best.mean,
            "best_sd": best.sd,
            f"vs_{self.baseline_name}_mean": against.mean,
            f"vs_{self.baseline_name}_sd": against.sd,
            **{f"last_seed_{seed}": value for seed, value in line.last.items()},
            **{f"published_{label}": value for label, value in line.published},
        }


def make_table(plan: Plan, results: Results, teacher_info: TeacherInfo, reasons: Mapping[str, str] | None = None) -> Table:
    """Make the table of a plan from the records there are.

    Args:
        plan: Which cells there are.
        results: Results by run id; cells without one are shown as missing.
        teacher_info: Name, accuracy and parameters of a teacher, ``None`` if it is not known.
        reasons: Why a run has no result, by run id.
    """
    baseline = next((row for row in plan.table.rows if row.name == plan.table.baseline), None)
    title = baseline.title if baseline else plan.table.baseline
    blocks = []
    for pair in dict.fromkeys(cell.pair for cell in plan.cells):
        cells = [cell for cell in plan.cells if cell.pair == pair]
        reference = _figures([cell for cell in cells if cell.row.name == plan.table.baseline], results, "last_accuracy")
        rows = {cell.row.name: cell.row for cell in cells}
        lines = []
        for row in rows.values():
            own = [cell for cell in cells if cell.row.name == row.name]
            last = _figures(own, results, "last_accuracy")
            lines.append(
                Line(
                    row,
                    len(own),
                    last,
                    _figures([cell for cell in own if cell.seed in last], results, "best_accuracy"),
                    {seed: value - reference[seed] for seed, value in last.items() if seed in reference},
                    tuple(plan.table.published_figures(row.name, pair)),
                    _missing(own, results, reasons or {}),
                )
            )
        info = teacher_info(cells[0].teacher) or {}
        cut = info["accuracy"] if info.get("head") == "slice" else None
        blocks.append(Block(pair, tuple(lines), _caption(plan, cells, results, teacher_info, reasons or {}), cut))
    heading = plan.table.title if plan.table.name == plan.recipe.dataset else plan.recipe.dataset
    return Table(heading, title, plan.table.baseline, tuple(blocks))


def _figures(cells: list[Cell], results: Results, key: str) -> dict[int, float]:
    found = {cell.seed: results[cell.run.id].get(key) for cell in cells if cell.run.id in results}
    return {seed: float(value) for seed, value in found.items() if value is not None}


def _missing(cells: list[Cell], results: Results, reasons: Mapping[str, str]) -> str:
    states = [results[cell.run.id].get("status", "") for cell in cells if cell.run.id in results]
    ended = [state for state in states if state != "done"]
    if ended:
        return str(ended[0])
    return "not applicable" if any(cell.run.id in reasons for cell in cells) else ""


def protocol_note(recipe: Recipe) -> str:
    """Say by which recipe the numbers came, and that only the published protocol compares with published figures."""
    count = f"{len(recipe.seeds)} seed{'s' if len(recipe.seeds) != 1 else ''}"
    short = recipe.name.removeprefix(f"{recipe.dataset}_")
    short = short.upper() if short == "cpu" else short
    changed = f" with {', '.join(recipe.changed)} changed" if recipe.changed else ""
    if recipe.comparable and not changed:
        return f"Recipe {short}, {count}."
    return f"{short} recipe{changed}, {count}: not comparable with published figures."


def _caption(plan: Plan, cells: list[Cell], results: Results, teacher_info: TeacherInfo, reasons: Mapping[str, str]) -> str:
    pair, recipe = cells[0].pair, plan.recipe
    data = cells[0].run.data
    info = teacher_info(cells[0].teacher)
    teacher = (
        f"teacher {pair.teacher} not made"
        if info is None
        else (f"teacher {pair.teacher} {info['accuracy']:.2f} % ({info['parameters']:,} parameters)")
    )
    sizes = [results[cell.run.id].get("parameters") for cell in cells if cell.run.id in results]
    size = next((f" ({value:,} parameters)" for value in sizes if value), "")
    counts = sorted(
        {
            len(_figures([c for c in cells if c.row.name == name], results, "last_accuracy"))
            for name in {cell.row.name for cell in cells}
        }
    )
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    sentences = [
        f"{data.description} (split: {data.split}); top-1 accuracy in per cent after the last epoch, mean ± standard deviation "
        f"over n = {n} seed{'s' if n != '1' else ''}; {teacher}, student {pair.student}{size}.",
        f"Differences to {plan.table.baseline} are paired over seeds; differences inside the spread mean nothing. The best epoch "
        "is chosen on the evaluation images and so flatters.",
        protocol_note(recipe),
        recipe.note.strip(),
        *sorted({f"Not applicable: {cell.row.title} ({reasons[cell.run.id]})" for cell in cells if cell.run.id in reasons}),
    ]
    if n == "1":
        sentences.insert(2, "One seed ranks nothing.")
    return " ".join(sentence for sentence in sentences if sentence)

"""A table is a view of records: it can always be made again without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from distillzoo.bench.captions import (
    Results,
    TeacherInfo,
    accuracy_text,
    baseline_title,
    ended_by_seed,
    ended_text,
    figures_by_seed,
    pair_caption,
    table_caption,
)
from distillzoo.bench.places import places
from distillzoo.bench.plan import Cell, Plan
from distillzoo.bench.recipe import Pair
from distillzoo.bench.render import Spread, as_csv, as_markdown, as_text
from distillzoo.bench.rows import Row

__all__ = ["NOT_APPLICABLE", "Block", "Line", "Table", "count_cells", "make_line", "make_table"]

NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Line:
    """One row of one pair.

    Args:
        row: The row.
        asked: Number of seeds that were asked for.
        last: Accuracy after the last epoch, by seed.
        best: Accuracy of the best epoch, by seed.
        against: Difference to the baseline by seed, as :meth:`less` gives it.
        published: Published figures with their source.
        protocols: By source, under which other protocol its figure came about.
        ended: How seeds ended that have a result and no figure, by seed.
        applies: Whether the method works on the pair.
        runs: Ids of its runs by seed; rows that read no teacher share theirs between pairs.
        teachers: Digest of the teacher's weights by seed, as far as records tell; rows that read none have none.
        places: Where it trained by seed, as :func:`~distillzoo.bench.places.places` says it, as far as records tell.
    """

    row: Row
    asked: int
    last: Mapping[int, float]
    best: Mapping[int, float]
    against: Mapping[int, float] = field(default_factory=dict)
    published: tuple[tuple[str, float], ...] = ()
    protocols: Mapping[str, str] = field(default_factory=dict)
    ended: Mapping[int, str] = field(default_factory=dict)
    applies: bool = True
    runs: Mapping[int, str] = field(default_factory=dict)
    teachers: Mapping[int, str] = field(default_factory=dict)
    places: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def less(self, other: Line) -> dict[int, float]:
        """Return this row less another by seed, for the seeds that both have.

        Two trainings of one teacher make no pair, and neither do runs on different devices or numbers of threads.
        """

        def alike(one: Mapping[int, object], two: Mapping[int, object], seed: int) -> bool:
            return seed not in one or seed not in two or one[seed] == two[seed]

        return {
            seed: value - other.last[seed]
            for seed, value in self.last.items()
            if seed in other.last and alike(self.teachers, other.teachers, seed) and alike(self.places, other.places, seed)
        }

    @property
    def missing(self) -> str:
        """Why seeds are missing, where that is known."""
        return ended_text(self.ended, self.asked) if self.applies else NOT_APPLICABLE

    @property
    def accuracy(self) -> str:
        """Mean ± standard deviation after the last epoch, and which seeds are not in it because they diverged."""
        return accuracy_text(self.spreads()[0], self.missing)

    def spreads(self) -> tuple[Spread, Spread, Spread]:
        """Return last, best and difference over seeds."""
        return Spread(self.last.values()), Spread(self.best.values()), Spread(self.against.values())

    def count(self) -> str:
        """Return the number of seeds, and of how many where some are missing."""
        n = len(self.last)
        return str(n) if n == self.asked else f"{n} of {self.asked}"

    def beside(self, source: str) -> str:
        """Return a source's figure, with our mean less it in brackets; a star says that it is from another protocol."""
        value = dict(self.published).get(source)
        if value is None:
            return "-"
        mean = self.spreads()[0].mean
        ours = "" if mean is None else f" ({mean - value:+.2f})"
        return f"{value:.2f}{'*' if source in self.protocols else ''}{ours}"


def count_cells(lines: Sequence[Line]) -> tuple[int, int]:
    """Return how many cells have all of their seeds, and how many have some.

    Args:
        lines: The cells, rows of pairs.
    """
    return sum(len(line.last) == line.asked for line in lines), sum(0 < len(line.last) < line.asked for line in lines)


@dataclass(frozen=True)
class Block:
    """The rows of one pair.

    Args:
        pair: The networks.
        lines: The rows.
        caption: What must be known of this pair to read them.
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
        caption: What must be known to read any of them.
    """

    title: str
    baseline: str
    baseline_name: str
    blocks: tuple[Block, ...]
    caption: str = ""

    @property
    def count(self) -> str:
        """How many cells (rows of pairs) have all or some of their seeds, and how many runs; empty for one pair without gaps."""
        lines = [line for block in self.blocks for line in block.lines if line.applies]
        done, part = count_cells(lines)
        if done == len(lines) and len(self.blocks) == 1:
            return ""
        runs, ended = ({line.runs[seed] for line in lines for seed in getattr(line, kind)} for kind in ("last", "ended"))
        asked = {run_id for line in lines for run_id in line.runs.values()}
        there = f"{done} of {len(lines)} cells are there{f', {part} in part' if part else ''}"
        return f"{there} ({len(runs)} of {len(asked)} runs{f'; {len(ended)} diverged' if ended else ''})."

    def _cells(self, block: Block) -> tuple[list[str], list[list[str]]]:
        sources = list(dict.fromkeys(label for line in block.lines for label, _ in line.published))
        header = ["method", "last epoch", "best epoch", f"vs {self.baseline}", "n", *(f"published ({label})" for label in sources)]
        lines = []
        for line in block.lines:
            _, best, against = line.spreads()
            lines.append(
                [
                    line.row.title,
                    line.accuracy,
                    best.text() if best.n else "-",
                    "-" if line.row.name == self.baseline_name else against.difference,
                    line.count(),
                    *(line.beside(label) for label in sources),
                ]
            )
        return header, lines

    def text(self) -> str:
        """Return the table for a terminal."""
        parts = []
        for block in self.blocks:
            parts.append(f"{self.title}: {block.teacher} -> {block.pair.student}\n\n{as_text(*self._cells(block))}")
            parts.append(block.caption)
        return "\n\n".join([*parts, self._foot()] if len(self.blocks) > 1 else [*parts[:-1], f"{parts[-1]} {self._foot()}"])

    def _foot(self) -> str:
        return " ".join(part for part in (self.count, self.caption) if part)

    def markdown(self) -> str:
        """Return the table as Markdown."""
        parts = [f"## {self.title}"]
        for block in self.blocks:
            parts += [f"### {block.teacher} → {block.pair.student}", as_markdown(*self._cells(block)), block.caption]
        return "\n\n".join([*parts, self._foot()]) + "\n"

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
            f"vs_{self.baseline_name}_ns": None
            if against.sd is None or line.row.name == self.baseline_name
            else against.holds_zero,
            **{f"last_seed_{seed}": value for seed, value in line.last.items()},
            **{f"last_seed_{seed}": state for seed, state in line.ended.items()},
            **{f"published_{label}": value for label, value in line.published},
            **{f"minus_{label}": last.mean - value for label, value in line.published if last.mean is not None},
        }


def make_table(plan: Plan, results: Results, teacher_info: TeacherInfo, reasons: Mapping[str, str] | None = None) -> Table:
    """Make the table of a plan from the records there are.

    Args:
        plan: Which cells there are.
        results: Results by run id; cells without one are shown as missing.
        teacher_info: Name, accuracy and parameters of a teacher, ``None`` if it is not known.
        reasons: Why a run has no result, by run id.
    """
    reasons = reasons or {}
    blocks = []
    for pair in dict.fromkeys(cell.pair for cell in plan.cells):
        cells = [cell for cell in plan.cells if cell.pair == pair]
        names = dict.fromkeys(cell.row.name for cell in cells)
        lines = [make_line(plan, [cell for cell in cells if cell.row.name == name], results, reasons) for name in names]
        baseline = next((line for line in lines if line.row.name == plan.table.baseline), None)
        if baseline is not None:
            lines = [replace(line, against=line.less(baseline)) for line in lines]
        info = teacher_info(cells[0].teacher) or {}
        cut = info["accuracy"] if info.get("head") == "slice" else None
        published = plan.table.published_figures("teacher", pair)
        caption = pair_caption(cells, lines, results, teacher_info, reasons, published)
        blocks.append(Block(pair, tuple(lines), caption, cut))
    dataset, name = plan.recipe.dataset, plan.recipe.table or plan.table.name
    own = name == dataset or name.startswith(f"{dataset}_") or name.endswith((".yaml", ".yml"))  # the rows of others are lent
    heading = plan.table.title if own else dataset
    caption = table_caption(plan, [line for block in blocks for line in block.lines])
    return Table(heading, baseline_title(plan), plan.table.baseline, tuple(blocks), caption)


def make_line(plan: Plan, own: Sequence[Cell], results: Results, reasons: Mapping[str, str]) -> Line:
    """Make the line of one row of one pair, but for its differences.

    Args:
        plan: The plan of the table.
        own: The row's cells on the pair.
        results: Results by run id.
        reasons: Why a run has no result, by run id.
    """
    row, last = own[0].row, figures_by_seed(own, results, "last_accuracy")
    trained = {cell.seed: places(results.get(cell.run.id, {}).get("environment") or {}) for cell in own}
    taught = {cell.seed: (results.get(cell.run.id, {}).get("teacher") or {}).get("sha256") for cell in own}
    return Line(
        row,
        len(own),
        last,
        figures_by_seed([cell for cell in own if cell.seed in last], results, "best_accuracy"),
        published=tuple(plan.table.published_figures(row.name, own[0].pair)),
        protocols=plan.table.published_protocols(row.name),
        ended=ended_by_seed(own, results),
        applies=bool(last) or not any(cell.run.id in reasons for cell in own),
        runs={cell.seed: cell.run.id for cell in own},
        teachers={seed: digest for seed, digest in taught.items() if digest is not None},
        places={seed: found for seed, found in trained.items() if found},
    )

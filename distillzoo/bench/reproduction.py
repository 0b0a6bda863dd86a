"""What a table reproduces: ours beside the published figures from records alone, what is far from them, and which orders hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distillzoo.bench.checks import check_keys
from distillzoo.bench.plan import Plan, make_plan
from distillzoo.bench.recipe import Recipe
from distillzoo.bench.recorded import RecordedDataSet, recorded_data
from distillzoo.bench.records import RecordStore
from distillzoo.bench.render import Spread
from distillzoo.bench.rows import load_table
from distillzoo.bench.table import Block, Line, Table, make_table
from distillzoo.bench.teachers import TeacherStore
from distillzoo.bench.yamls import read_yaml
from distillzoo.errors import OptionError

__all__ = ["Comparison", "Deviation", "comparisons", "deviations", "orders", "read_explanations", "recorded_table"]

_NEAR = 0.5  # points; what two runs of one protocol on other machines may differ by


def recorded_table(recipe: Recipe, folder: Path, teachers: Sequence[Path], say: Callable[[str], None]) -> tuple[Plan, Table]:
    """Return a recipe's plan and table from records alone; neither data nor records need be there.

    Args:
        recipe: The recipe.
        folder: Folder of its records, which may not exist.
        teachers: Folders of teachers that are only read.
        say: Where to name a damaged record.
    """
    nothing = RecordedDataSet(recipe.dataset, recipe.split, "", f"{recipe.dataset}, nothing recorded", None)
    data = recorded_data(folder, recipe) or nothing
    plan = make_plan(recipe, load_table(recipe.table or recipe.dataset), lambda _: data)
    store = RecordStore(folder, say, readonly=True)
    results = store.results(plan.runs)
    stored = TeacherStore(store, teachers)
    reasons = store.refusals(plan.runs.keys() - results.keys())
    return plan, make_table(plan, results, lambda job: stored.describe(job, results), reasons)


@dataclass(frozen=True)
class Deviation:
    """A cell that is far from what was published.

    Args:
        block: Its pair.
        line: Its row.
        ours: Our figures.
        published: The published figure.
        sources: Who published it.
    """

    block: Block
    line: Line
    ours: Spread
    published: float
    sources: tuple[str, ...]

    @property
    def difference(self) -> float:
        """Ours less the published one, in points."""
        return (self.ours.mean or 0.0) - self.published


def deviations(table: Table) -> list[Deviation]:
    """Return the cells that are farther from a published figure than half a point and than two standard errors of our mean.

    Args:
        table: The table. Cells without a result are left out; those of one seed have no standard error.
    """
    found = []
    for block in table.blocks:
        for line in block.lines:
            ours = line.spreads()[0]
            if ours.mean is None:
                continue
            error = 0.0 if ours.sd is None else ours.sd / math.sqrt(ours.n)
            by_value: dict[float, list[str]] = {}
            for source, value in line.published:
                by_value.setdefault(value, []).append(source)
            found += [
                Deviation(block, line, ours, value, tuple(sources))
                for value, sources in by_value.items()
                if abs(ours.mean - value) > max(_NEAR, 2 * error)
            ]
    return found


@dataclass(frozen=True)
class Comparison:
    """Two rows of a pair, seed by seed.

    Args:
        block: The pair.
        row: The row.
        other: The row that it is compared with.
    """

    block: Block
    row: Line
    other: Line

    @property
    def differences(self) -> Spread:
        """The row less the other one, for the seeds that both have from one training of their teacher."""
        return Spread(self.row.less(self.other).values())

    @property
    def doubt(self) -> str:
        """Why the sign of the mean says little: ``"one seed"``, ``"inside the spread"`` (Student's t), or nothing."""
        found = self.differences
        if found.n < 2:
            return "one seed" if found.n else ""
        return "inside the spread" if found.holds_zero else ""

    @property
    def gaps(self) -> str:
        """Why one of the rows has no figure for seeds that will not come any more, which the mean of the others hides."""
        return "; ".join(f"{line.row.title}: {line.missing}" for line in (self.row, self.other) if line.missing)

    @property
    def absent(self) -> str:
        """Why there is no difference; empty if there is one."""
        if self.differences.n:
            return ""
        if self.row.last.keys() & self.other.last.keys():
            return "of different trainings of the teacher, devices or numbers of threads"
        return self.gaps or "not there yet"

    @property
    def verdict(self) -> str:
        """Of a row that is expected above: ``"met"`` or ``"not met"`` with what is to be doubted of it, or why there is none."""
        mean = self.differences.mean
        if mean is None:
            return self.absent
        met = "met" if mean > 0 else "not met"
        return ", ".join(part for part in (met, self.doubt, self.gaps) if part)

    def text(self) -> str:
        """Write the differences, how many they are, and the doubt; or why there are none."""
        found = self.differences
        parts = [found.text(signed=True), f"n = {found.n}", self.doubt, self.gaps]
        return self.absent or ", ".join(part for part in parts if part)


def orders(plan: Plan, table: Table) -> list[Comparison]:
    """Return every order that the published figures lead to expect, for every pair: the row above with the one below.

    Args:
        plan: The plan; its table file says which orders are expected.
        table: The table.
    """
    found = []
    for block in table.blocks:
        lines = {line.row.name: line for line in block.lines}
        for source in plan.table.published:
            for below, above in source.get("orders", ()):
                if below in lines and above in lines:
                    found.append(Comparison(block, lines[above], lines[below]))
    return found


def comparisons(plan: Plan, table: Table) -> list[Comparison]:
    """Return the rows that a publication is about against those that it is measured by, for every pair: each with each.

    Args:
        plan: The plan; its table file says which rows.
        table: The table.
    """
    found = []
    for block in table.blocks:
        lines = {line.row.name: line for line in block.lines}
        for source in plan.table.published:
            asked = source.get("compare", {"rows": (), "against": ()})
            names = itertools.product(asked["rows"], asked["against"])
            found += [Comparison(block, lines[row], lines[other]) for row, other in names if row in lines and other in lines]
    return found


def read_explanations(path: Path, plan: Plan) -> dict[tuple[str, str], str]:
    """Read what is written about far cells: text by pair and row; no figure stands in it.

    Args:
        path: A YAML file, ``{"teacher:student": {row: text}}``; it may not exist.
        plan: Which pairs and rows there are.
    Raises:
        OptionError: If it names a pair or row that is not in the plan.
    """
    if not path.is_file():
        return {}
    found = read_yaml(path) or {}
    where = f"the explanations {path.name!r}"
    check_keys(found, {str(cell.pair) for cell in plan.cells}, where)
    texts: dict[tuple[str, str], str] = {}
    for pair, rows in found.items():
        check_keys(rows, {cell.row.name for cell in plan.cells}, f"{where}, {pair}")
        for row, text in rows.items():
            if not isinstance(text, str) or not text.strip():
                raise OptionError(f"{where[0].upper()}{where[1:]}, {pair}, {row}, must be a text; got {text!r}; write one.")
            texts[str(pair), str(row)] = text.strip()
    return texts

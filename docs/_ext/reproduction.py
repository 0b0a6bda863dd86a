"""The directive ``reproduction``: a recipe's table and what it reproduces, made from the committed records with the pages."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util import logging

from distillzoo.bench.plan import Plan
from distillzoo.bench.recipe import find_recipe, load_recipe
from distillzoo.bench.recorded import several_sets, unused_records
from distillzoo.bench.reproduction import Comparison, comparisons, deviations, orders, read_explanations, recorded_table
from distillzoo.bench.table import Table, count_cells

_BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
_LOG = logging.getLogger(__name__)


def page(name: str, benchmarks: Path = _BENCHMARKS) -> list[str]:
    """Return the lines of a recipe's section.

    Args:
        name: Name of the recipe.
        benchmarks: The folder that holds ``results`` and ``teachers``.
    """
    folder = benchmarks / "results" / name
    plan, table = recorded_table(load_recipe(find_recipe(name, None)), folder, [benchmarks / "teachers"], _LOG.warning)
    lines = [".. code-block:: none", "", *(f"   {line}".rstrip() for line in table.text().splitlines()), ""]
    texts = read_explanations(folder / "reproduction.yaml", plan)
    unused = several_sets(folder, plan.recipe) or unused_records(folder, plan)
    lines += [unused, ""] if unused else []
    return [*lines, *_far(table, texts), *_expected(plan, table), *_compared(plan, table)]


def _far(table: Table, texts: dict[tuple[str, str], str]) -> list[str]:
    published = [line for block in table.blocks for line in block.lines if line.published and line.applies]
    there, part = count_cells(published)
    far = deviations(table)
    if not published:
        return ["Nothing is published of this pair.", ""]
    if not there + part:
        return [f"None of the {len(published)} cells with a published figure is there yet, so there is nothing to compare.", ""]
    lines = [
        f"{there} of the {len(published)} cells with a published figure are there{f', {part} in part' if part else ''}; "
        f"{len(far)} figures are farther from theirs than half a point and two standard errors:",
        "",
    ]
    for each in far:
        pair, row = each.block.pair, each.line.row
        protocols = [each.line.protocols[source] for source in each.sources if source in each.line.protocols]
        seeds = f"{each.ours.n} seed{'s' if each.ours.n > 1 else ''}"
        theirs = f"published {each.published:.2f} ({', '.join(each.sources)})"
        missing = f"; {each.line.missing}, so that the mean of the others flatters" if each.line.missing else ""
        figures = f"ours {each.ours.text()} ({seeds}{missing}), {theirs}, {each.difference:+.2f}."
        label = "".join(f" The published figure is from {protocol}." for protocol in protocols)
        text = texts.get((str(pair), row.name), "The reason is not known yet.")
        lines += [f"**{row.title}, {pair.teacher} to {pair.student}**: {figures}{label} {' '.join(text.split())}", ""]
    return lines


def _expected(plan: Plan, table: Table) -> list[str]:
    claims = orders(plan, table)
    if not claims:
        return []
    cells = [["Pair", "Expected", "Difference", "n", "Verdict"]]
    for order in claims:
        pair, found = order.block.pair, order.differences
        expected = f"{order.other.row.title} below {order.row.row.title}"
        cells.append([f"{pair.teacher} to {pair.student}", expected, found.text(signed=True), str(found.n), order.verdict])
    return ["Orders that the published figures lead to expect:", "", *_list_table(cells)]


def _compared(plan: Plan, table: Table) -> list[str]:
    found = comparisons(plan, table)
    if not found:
        return []
    rows = dict.fromkeys(each.row.row.title for each in found)
    others = dict.fromkeys(each.other.row.title for each in found)
    cells = [["Pair", "Row", *(f"less {title}" for title in others)]]
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for each in found:
        pair = f"{each.block.pair.teacher} to {each.block.pair.student}"
        lines.setdefault((pair, each.row.row.title), {})[each.other.row.title] = each.text()
    cells += [[pair, row, *(texts.get(title, "-") for title in others)] for (pair, row), texts in lines.items()]
    asked = f"{_listed(rows)}, each against {_listed(others)}, whichever way it falls"
    return [f"{asked}: {_counted(found)}", "", *_list_table(cells)]


def _counted(found: list[Comparison]) -> str:
    """Say how many comparisons are there and which way they fall."""
    there = [each for each in found if each.differences.n]
    ways: dict[str, int] = {}
    for each in there:
        way = each.doubt or ("above" if (each.differences.mean or 0.0) > 0 else "below")
        ways[way] = ways.get(way, 0) + 1
    counts = ", ".join(f"{ways[way]} {way}" for way in ("above", "below", "inside the spread", "one seed") if way in ways)
    whole = sum(each.differences.n == each.row.asked for each in there)
    part = f", {len(there) - whole} of them in part" if whole < len(there) else ""
    return f"{len(there)} of {len(found)} comparisons are there{part}{f' ({counts})' if counts else ''}."


def _listed(titles: Iterable[str]) -> str:
    *first, last = titles
    return f"{', '.join(first)} and {last}" if first else last


def _list_table(cells: list[list[str]]) -> list[str]:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in cells:
        texts = [cell.replace("-", r"\-", 1) if cell.startswith("-") else cell for cell in row]  # a minus, not the mark of a list
        lines += [f"   {'*' if number == 0 else ' '} - {cell}" for number, cell in enumerate(texts)]
    return [*lines, ""]


class Reproduction(Directive):
    """The lines of :func:`page`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return their nodes."""
        self.state.document.settings.env.note_reread()  # records change, and with them the page, without a change of its source
        holder = nodes.container()
        self.state.nested_parse(StringList(page(self.arguments[0]), source="reproduction"), self.content_offset, holder)
        return list(holder.children)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("reproduction", Reproduction)
    return {"parallel_read_safe": True}

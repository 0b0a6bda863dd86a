"""The directive ``reproduction``: a recipe's table and what it reproduces, made from the committed records with the pages."""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util import logging

from distillzoo.bench.plan import Plan
from distillzoo.bench.recipe import find_recipe, load_recipe
from distillzoo.bench.reproduction import deviations, orders, read_explanations, recorded_table
from distillzoo.bench.table import Table

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
    return [*lines, *_far(table, texts), *_expected(plan, table)]


def _far(table: Table, texts: dict[tuple[str, str], str]) -> list[str]:
    published = [line for block in table.blocks for line in block.lines if line.published]
    there = sum(bool(line.last) for line in published)
    far = deviations(table)
    if not published:
        return ["Nothing is published of this pair.", ""]
    if not there:
        return [f"None of the {len(published)} cells with a published figure is there yet, so there is nothing to compare.", ""]
    lines = [
        f"{there} of the {len(published)} cells with a published figure are there; {len(far)} figures are farther from theirs than "
        "half a point and two standard errors:",
        "",
    ]
    for each in far:
        pair, row = each.block.pair, each.line.row
        protocols = [each.line.protocols[source] for source in each.sources if source in each.line.protocols]
        seeds = f"{each.ours.n} seed{'s' if each.ours.n > 1 else ''}"
        theirs = f"published {each.published:.2f} ({', '.join(each.sources)})"
        figures = f"ours {each.ours.text()} ({seeds}), {theirs}, {each.difference:+.2f}."
        label = "".join(f" The published figure is from {protocol}." for protocol in protocols)
        text = texts.get((str(pair), row.name), "The reason is not known yet.")
        lines += [f"**{row.title}, {pair.teacher} to {pair.student}**: {figures}{label} {' '.join(text.split())}", ""]
    return lines


def _expected(plan: Plan, table: Table) -> list[str]:
    claims = orders(plan, table)
    if not claims:
        return []
    lines = [
        "Orders that the published figures lead to expect; inside the spread of the paired differences they mean nothing:",
        "",
        ".. list-table::",
        "   :header-rows: 1",
        "",
    ]
    cells = [("Pair", "Expected", "Difference", "Verdict")]
    for order in claims:
        expected = f"{order.below.row.title} below {order.above.row.title}"
        pair = f"{order.block.pair.teacher} to {order.block.pair.student}"
        cells.append((pair, expected, order.differences.text(signed=True), order.verdict))
    for row in cells:
        lines += [f"   {'*' if number == 0 else ' '} - {cell}" for number, cell in enumerate(row)]
    return [*lines, ""]


class Reproduction(Directive):
    """The lines of :func:`page`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return their nodes."""
        holder = nodes.container()
        self.state.nested_parse(StringList(page(self.arguments[0]), source="reproduction"), self.content_offset, holder)
        return list(holder.children)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("reproduction", Reproduction)
    return {"parallel_read_safe": True}

"""Plots of a table or a sweep, as PNG files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillzoo.bench.records import atomic
from distillzoo.bench.render import Spread
from distillzoo.errors import MissingDependencyError
from distillzoo.kinds import is_number

if TYPE_CHECKING:
    from distillzoo.bench.table import Line, Table

__all__ = ["fits_log_axis", "plot_sweep", "plot_table"]

_INK, _QUIET, _MARK = "#222222", "#9aa0a6", "#1f6feb"
_LINES = ("#1f6feb", "#d1495b", "#2e8b57", "#8d5fd3", "#c98a00", "#4d4d4d", "#00838f", "#ad1457")


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingDependencyError(
            'Plots need matplotlib, which is not installed; run pip install "distillzoo[benchmarks]".'
        ) from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _clean(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="both", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def plot_table(table: Table, path: Path) -> None:
    """Draw one panel a pair: a dot for every seed, a bar of one standard deviation around the mean of every row.

    Args:
        table: The table.
        path: The PNG file.
    """
    plt = _pyplot()
    rows = max(len(block.lines) for block in table.blocks)
    columns = min(len(table.blocks), 3)
    height = math.ceil(len(table.blocks) / columns)
    figure, grid = plt.subplots(height, columns, figsize=(2.0 + 4.6 * columns, 1.9 + 0.42 * rows * height), squeeze=False)
    for axes in grid.flat[len(table.blocks) :]:
        axes.set_visible(False)
    for block, axes in zip(table.blocks, grid.flat, strict=False):
        for position, line in enumerate(block.lines):
            last = line.spreads()[0]
            if last.mean is None:
                axes.text(
                    0.02, position, line.missing or "missing", color=_QUIET, va="center", transform=axes.get_yaxis_transform()
                )
                continue
            offsets = [0.16 * (i - (last.n - 1) / 2) for i in range(last.n)]
            axes.scatter(last.values, [position + offset for offset in offsets], s=16, color=_QUIET, zorder=2)
            axes.errorbar(last.mean, position, xerr=last.sd or 0.0, fmt="o", ms=6, color=_MARK, capsize=3, lw=1.4, zorder=3)
        reference = next((line.spreads()[0].mean for line in block.lines if line.row.name == table.baseline_name), None)
        if reference is not None:
            axes.axvline(reference, color=_INK, lw=0.8, ls=":", zorder=1)
        axes.set_yticks(range(len(block.lines)), [_label(line) for line in block.lines])
        axes.set_ylim(len(block.lines) - 0.5, -0.5)
        axes.set_title(f"{block.pair.teacher} → {block.pair.student}", fontsize=10, color=_INK)
        axes.set_xlabel("top-1 after the last epoch, %")
        _clean(axes)
    seeds = max((len(line.last) for block in table.blocks for line in block.lines), default=0)
    spread = f"grey: each of {seeds} seeds; blue: mean ± sd" if seeds > 1 else ("nothing yet", "one seed")[seeds]
    figure.suptitle(f"{table.title} ({spread}; dotted: {table.baseline})", fontsize=10, color=_INK)
    figure.tight_layout()
    _save(plt, figure, path)


def _label(line: Line) -> str:
    """Return a row's title, with the number of seeds where some are missing."""
    return line.row.title if len(line.last) in (0, line.asked) else f"{line.row.title} ({line.count()})"


def fits_log_axis(values: Sequence[float]) -> bool:
    """Return whether values are positive and spread more evenly in their logarithms than as they are.

    Example:
        >>> fits_log_axis([1, 2, 4, 8]), fits_log_axis([1, 2, 3, 4])
        (True, False)
    """
    ordered = sorted(set(values))
    if len(ordered) < 3 or ordered[0] <= 0:
        return False

    def unevenness(points: Sequence[float]) -> float:
        steps = [b - a for a, b in itertools.pairwise(points)]
        return max(steps) / min(steps)

    return unevenness([math.log(value) for value in ordered]) < unevenness(ordered)


def plot_sweep(title: str, axis: str, positions: Sequence[Any], series: Mapping[str, Sequence[Spread]], path: Path) -> None:
    """Draw accuracy against a swept option, one line for every series, seeds as dots.

    Args:
        title: Title.
        axis: Path of the option.
        positions: Its values, in order.
        series: Accuracies at every value, by label.
        path: The PNG file.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    numeric = all(map(is_number, positions))
    places = [float(value) for value in positions] if numeric else [float(i) for i in range(len(positions))]
    for number, (label, spreads) in enumerate(series.items()):
        colour = _LINES[number % len(_LINES)]
        there = [(place, spread) for place, spread in zip(places, spreads, strict=True) if spread.mean is not None]
        axes.errorbar(
            [place for place, _ in there],
            [spread.mean for _, spread in there],
            yerr=[spread.sd or 0.0 for _, spread in there],
            marker="o",
            ms=5,
            lw=1.4,
            capsize=3,
            color=colour,
            label=label,
        )
        for place, spread in there:
            if spread.n > 1:
                axes.scatter([place] * spread.n, spread.values, s=12, color=colour, alpha=0.4)
    if numeric and fits_log_axis(places):
        axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(places, [str(value) for value in positions])
    axes.set_xlabel(axis)
    axes.set_ylabel("top-1 after the last epoch, %")
    axes.set_title(title, fontsize=10, color=_INK)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9)
    _clean(axes)
    figure.tight_layout()
    _save(plt, figure, path)


def _save(plt: Any, figure: Any, path: Path) -> None:
    with atomic(path) as handle:
        figure.savefig(handle, format="png", dpi=140)
    plt.close(figure)

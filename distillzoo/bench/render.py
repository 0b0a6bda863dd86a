"""Small things that every view of records shares: mean and spread, aligned text, Markdown, CSV."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Spread", "as_csv", "as_markdown", "as_text"]


_ALIKE = 1e-9
"""Deviation that differences of equal accuracies have by rounding."""


class Spread:
    """Mean and sample standard deviation of some values.

    Args:
        values: The values, one a seed.
    """

    def __init__(self, values: Iterable[float]) -> None:
        self.values = tuple(values)

    @property
    def n(self) -> int:
        """Number of values."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """Mean, ``None`` of nothing."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        """Standard deviation with n - 1, ``None`` of fewer than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def holds_zero(self) -> bool:
        """Whether a 95 % interval of the mean by Student's t (n - 1 degrees of freedom) holds zero.

        Of one value it does, and of values that are all alike: accuracies are multiples of one image's share, and their spread is
        not known to be less than that.
        """
        if self.mean is None or self.sd is None or self.sd < _ALIKE:
            return True
        from scipy.stats import t as student_t  # takes a second to import

        return abs(self.mean) <= float(student_t.ppf(0.975, self.n - 1)) * self.sd / math.sqrt(self.n)

    @property
    def difference(self) -> str:
        """The values as differences: signed, and ``ns`` in front where their mean has an interval and it holds zero."""
        return f"{'ns ' if self.n > 1 and self.holds_zero else ''}{self.text(signed=True)}"

    def text(self, *, signed: bool = False) -> str:
        """Write ``mean ± sd``; ``-`` stands for what one value, or none, does not give."""
        if self.mean is None:
            return "-"
        mean = f"{self.mean:+.2f}" if signed else f"{self.mean:.2f}"
        return f"{mean} ± {'-' if self.sd is None else f'{self.sd:.2f}'}"


def as_text(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Align columns for a terminal: the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]
    rule = "  ".join("-" * width for width in widths)
    body = [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (header, *lines)
    ]
    return "\n".join(line.rstrip() for line in (body[0], rule, *body[1:]))


def as_markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    rule = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (header, rule, *lines))


def as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Write mappings as CSV, columns in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)
    return out.getvalue()

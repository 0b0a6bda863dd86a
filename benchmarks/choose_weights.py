"""Choose the weights of a table on held-out images, and write the table file that follows from the records.

    python benchmarks/choose_weights.py --data-root DIR --output runs
    python benchmarks/choose_weights.py --table-only --output benchmarks/results/cifar100_cpu_weights

Each row of the search (default: ``benchmarks/weights_cifar100_cpu.yaml``) is one ``run_table.py --sweep``, one after the other;
what is finished is skipped, and after an interruption the same command goes on. Then the sweeps are printed, their records are
copied to ``benchmarks/results``, and the table file is written from them. ``--table-only`` does this with the records there are,
unless a row would lose the weight that was chosen for it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distillzoo.bench.choice import choose, load_search
from distillzoo.bench.choice_text import check_kept, table_file, table_text
from distillzoo.bench.progress import Console
from distillzoo.bench.rows import TABLES
from distillzoo.bench.series import copy_records, exit_code, series_options, series_parser, write_text

_HERE = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = series_parser(__doc__ or "", _HERE / "results")
    made.add_argument("--search", metavar="FILE", type=Path, default=_HERE / "weights_cifar100_cpu.yaml", help="what is tried")
    made.add_argument("--tables", metavar="DIR", type=Path, default=TABLES, help=argparse.SUPPRESS)
    return made


def main(arguments: list[str], console: Console | None = None) -> int:
    """Run the command line and return its exit code, as ``run_table.py`` has them."""
    console, given = console or Console(), parser().parse_args(arguments)
    return exit_code("choose_weights.py", lambda: _choose(given, console), console)


def _choose(given: argparse.Namespace, console: Console) -> int:
    search = load_search(given.search)
    choices, code = choose(search, series_options(given), [_HERE / "teachers"], console)
    text, written = table_text(search, choices), given.tables / f"{search.table}.yaml"
    console.say(f"\n{text}\n")
    table = table_file(search, choices, "python benchmarks/choose_weights.py --data-root DIR")
    check_kept(table, written)
    place = given.results / f"{search.table}_weights"
    kept = [choice.ids[value] for choice in choices for value in choice.accuracies]
    copy_records(kept, given.output, place)
    write_text(place / "choice.txt", f"{text}\n")
    write_text(written, table)
    console.say(f"Written: {len(kept)} records and choice.txt in {place}, and {written}.")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

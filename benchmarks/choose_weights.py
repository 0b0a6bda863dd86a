"""Choose the weights of a table on held-out images, and write the table file that follows from the records.

    python benchmarks/choose_weights.py --data-root DIR --output runs
    python benchmarks/choose_weights.py --table-only --output benchmarks/results/cifar100_cpu_weights

Each row of the search (default: ``benchmarks/weights_cifar100_cpu.yaml``) is one ``run_table.py --sweep``, one after the other;
what is finished is skipped, and after an interruption the same command goes on. Then the sweeps are printed, their records are
copied to ``benchmarks/results``, and the table file is written from them. ``--table-only`` does this with the records there are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distillzoo.bench.choice import choose, keep_records, load_search, table_file, table_text, write
from distillzoo.bench.progress import Console
from distillzoo.bench.rows import TABLES
from distillzoo.errors import DistillZooError

_HERE = Path(__file__).resolve().parent
_DONE, _WRONG_INPUT, _INTERRUPTED = 0, 2, 130


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    made.add_argument("--search", metavar="FILE", type=Path, default=_HERE / "weights_cifar100_cpu.yaml", help="what is tried")
    made.add_argument("--data-root", metavar="DIR", help="folder of the data set")
    made.add_argument("--output", metavar="DIR", type=Path, default=Path("runs"), help="folder of the records (default: runs)")
    made.add_argument("--threads", metavar="N", help="threads of torch on the CPU")
    made.add_argument("--device", metavar="auto|cpu|cuda", help="where to train")
    made.add_argument("--table-only", action="store_true", help="train nothing")
    made.add_argument("--results", metavar="DIR", type=Path, default=_HERE / "results", help=argparse.SUPPRESS)
    made.add_argument("--tables", metavar="DIR", type=Path, default=TABLES, help=argparse.SUPPRESS)
    return made


def main(arguments: list[str], console: Console | None = None) -> int:
    """Run the command line and return its exit code, as ``run_table.py`` has them."""
    console = console or Console()
    given = parser().parse_args(arguments)
    options = ["--output", str(given.output)]
    for name in ("data_root", "threads", "device"):
        if getattr(given, name) is not None:
            options += [f"--{name.replace('_', '-')}", getattr(given, name)]
    if given.table_only:
        options.append("--table-only")
    try:
        search = load_search(given.search)
        choices, code = choose(search, options, [_HERE / "teachers"], console)
    except DistillZooError as error:
        console.warn(f"choose_weights.py: {' '.join(str(error).split())}")
        return _WRONG_INPUT
    except KeyboardInterrupt:
        console.warn("Interrupted. The same command again goes on from the last checkpoints.")
        return _INTERRUPTED
    text = table_text(search, choices)
    place = given.results / f"{search.table}_weights"
    count = keep_records(choices, given.output, place)
    write(place / "choice.txt", f"{text}\n")
    write(given.tables / f"{search.table}.yaml", table_file(search, choices, "python benchmarks/choose_weights.py --data-root DIR"))
    console.say(f"\n{text}\n\nWritten: {count} records and choice.txt in {place}, and {given.tables / search.table}.yaml.")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Commit a table: copy its finished records without the students' weights, and write the table into README.rst.

    python benchmarks/publish.py digits runs
    python benchmarks/publish.py cifar100_cpu runs --with-teachers --dataset cifar100 --data-root DIR --recipe cpu

The first word names the folder under ``benchmarks/results`` and the section of README.rst, the second is the folder of the
records; the rest are the options of ``run_table.py`` that made them. With ``--with-teachers`` their teachers go to
``benchmarks/teachers``, where ``run_table.py`` finds them. No figure is typed: what stands in README.rst is what
``run_table.py --table-only`` prints from the copied records.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

from distillzoo.bench import series
from distillzoo.bench.cli import Command
from distillzoo.bench.options import parse_options
from distillzoo.bench.progress import Console
from distillzoo.bench.table import Table
from distillzoo.errors import DistillZooError

_HERE = Path(__file__).resolve().parent
_README = _HERE.parent / "README.rst"


def copy_records(source: Path, name: str, with_teachers: bool) -> tuple[Path, int]:
    """Copy finished records to ``benchmarks/results/NAME``, and maybe their teachers to ``benchmarks/teachers``."""
    target = _HERE / "results" / name
    finished = sorted(path.parent for path in source.glob("*/result.json"))
    series.copy_records([record.name for record in finished], source, target)
    used = {(json.loads((record / "result.json").read_text()).get("teacher") or {}).get("id") for record in finished}
    for teacher in sorted(path.parent for path in source.glob("teachers/*/manifest.json")):
        if with_teachers and teacher.name in used:
            shutil.copytree(
                teacher, _HERE / "teachers" / teacher.name, ignore=shutil.ignore_patterns("last.pt"), dirs_exist_ok=True
            )
    return target, len(finished)


def make_view(target: Path, options: list[str]) -> Table:
    """Return the table that ``run_table.py --table-only`` makes from the copied records."""
    try:
        command = Command(
            parse_options([*options, "--table-only", "--output", str(target)]), [_HERE / "teachers"], Console(io.StringIO())
        )
        command.run()
    except DistillZooError as error:
        raise SystemExit(f"publish.py: {error}") from error
    if not isinstance(command.view, Table):
        raise SystemExit("publish.py: a sweep has no section; leave --sweep out.")
    return command.view


def row_commands(view: Table) -> str:
    """Say how one row alone is run: the same command with its name."""
    rows = {line.row.name: line.row.title for block in view.blocks for line in block.lines}
    return f"One row alone is the same command with its name: {', '.join(f'``--methods {n}`` ({t})' for n, t in rows.items())}."


def write_section(name: str, options: list[str], view: Table) -> None:
    """Put the table and its command between the section's marks in README.rst."""
    text = view.text()
    shown = ["DIR" if before == "--data-root" else word for before, word in zip(["", *options], options, strict=False)]
    table, _, caption = text.rpartition("\n\n")
    block = "\n".join(f"    {line}".rstrip() for line in table.splitlines())
    section = f"``python benchmarks/run_table.py {' '.join(shown)}``".replace(" ``", "``")
    body = f"\n{section}::\n\n{block}\n\n{caption.replace('*', chr(92) + '*')}\n\n{row_commands(view)}\n\n"
    readme = _README.read_text(encoding="utf-8")
    marks = re.compile(rf"(\.\. table: {re.escape(name)} begin\n).*?(\.\. table: {re.escape(name)} end\n)", re.DOTALL)
    if not marks.search(readme):
        raise SystemExit(f"README.rst has no section '.. table: {name} begin' .. 'end'; add it where the table belongs.")
    _README.write_text(marks.sub(lambda found: found[1] + body + found[2], readme), encoding="utf-8")


def main(arguments: list[str]) -> None:
    if len(arguments) < 2 or not Path(arguments[1]).is_dir():
        raise SystemExit(__doc__)
    name, source, *options = arguments
    with_teachers = "--with-teachers" in options
    options = [option for option in options if option != "--with-teachers"]
    target, count = copy_records(Path(source), name, with_teachers)
    write_section(name, options, make_view(target, options))
    print(f"{count} records in {target.relative_to(_HERE.parent)}; README.rst has its table.")


if __name__ == "__main__":
    main(sys.argv[1:])

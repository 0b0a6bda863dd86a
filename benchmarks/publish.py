"""Commit a table: copy its finished records without the students' weights, and write the table into README.rst.

    python benchmarks/publish.py digits runs
    python benchmarks/publish.py cifar100_cpu runs --with-teachers --dataset cifar100 --data-root DIR --recipe cpu

The first word names the folder under ``benchmarks/results`` and the section of README.rst, the second is the folder of the
records; the rest are the options of ``run_table.py`` that made them. The records of this table are copied, and no others; records
of that folder under ``benchmarks/results`` that are not the table's are removed. No figure is typed: what stands in README.rst is
what ``run_table.py --table-only`` prints from the copied records.

With ``--with-teachers`` their teachers go to ``benchmarks/teachers``, where ``run_table.py`` finds them: with their weights if
these take less than ``--keep-teachers-below`` megabytes (default 16), else by recipe and digest alone; then they are trained again
where they are needed, and whether they came out the same is said. A teacher that is kept is never replaced by another training.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillzoo.bench import series
from distillzoo.bench.cli import Command
from distillzoo.bench.options import parse_options
from distillzoo.bench.progress import Console
from distillzoo.bench.records import Record
from distillzoo.bench.table import Table
from distillzoo.data import DataSet
from distillzoo.errors import DistillZooError, RecordError

_HERE = Path(__file__).resolve().parent
_PLACES = {"--data-root": "DIR", "--teacher-checkpoint": "FILE"}
KEEP_BELOW = 16.0
"""Megabytes that the weights of a kept teacher stay below: networks of up to 8 million parameters in float16."""

_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Shelf:
    """Where published things stand.

    Args:
        root: The folder that holds ``results`` and ``teachers``.
        readme: The file that has a section for the table.
        say: Where to say what was done.
    """

    root: Path = _HERE
    readme: Path = _HERE.parent / "README.rst"
    say: Callable[[str], None] = print

    @property
    def teachers(self) -> Path:
        """Folder of the teachers that are kept."""
        return self.root / "teachers"

    def section(self, name: str) -> re.Pattern[str]:
        """Return what finds a table's section in the file, which must be there.

        Args:
            name: Name of the table.
        """
        marks = re.compile(rf"(\.\. table: {re.escape(name)} begin\n).*?(\.\. table: {re.escape(name)} end\n)", re.DOTALL)
        if not marks.search(self.readme.read_text(encoding="utf-8")):
            raise SystemExit(
                f"publish.py: {self.readme.name} has no section '.. table: {name} begin' .. 'end'; add it where the table belongs."
            )
        return marks


def make_view(source: Path, options: list[str], shelf: Shelf, loaded: dict[str, DataSet], *, show: bool) -> tuple[Command, Table]:
    """Return the command and the table that ``run_table.py --table-only`` makes from records.

    Args:
        source: Folder of the records.
        options: Options of ``run_table.py``.
        shelf: Where the teachers are.
        loaded: Data sets that were read before; new ones are added.
        show: Whether the table's files are written beside the records.
    """
    try:
        asked = parse_options([*options, "--table-only", "--output", str(source)])
        command = Command(asked, [shelf.teachers], Console(io.StringIO()), loaded, show=show)
        command.run()
    except DistillZooError as error:
        raise SystemExit(f"publish.py: {error}") from error
    if not isinstance(command.view, Table):
        raise SystemExit("publish.py: a sweep has no section; leave --sweep out.")
    return command, command.view


def remove_others(target: Path, wanted: Iterable[str]) -> int:
    """Remove the records in a folder of results that are not a table's; returns how many there were.

    Args:
        target: The folder. Only folders with the name of an id and a result in it are records; nothing else is touched.
        wanted: Ids of the table's runs.
    """
    keep = set(wanted)
    found = [path.parent for path in target.glob("*/result.json") if re.fullmatch(r"[0-9a-f]{16}", path.parent.name)]
    others = [record for record in found if record.name not in keep]
    for record in others:
        shutil.rmtree(record)
    return len(others)


def keep_teachers(results: Iterable[Mapping[str, Any]], source: Path, below: float, shelf: Shelf) -> None:
    """Copy the teachers of results, those of large weights by recipe and digest alone.

    Args:
        results: Results of students.
        source: Folder of the records.
        below: Megabytes that the weights of a teacher must stay below to be kept.
        shelf: Where they go.
    """
    copied: list[tuple[Path, list[str]]] = []
    used = {(result.get("teacher") or {}).get("id") for result in results} - {None}
    for teacher in sorted(path.parent for path in source.glob("teachers/*/manifest.json") if path.parent.name in used):
        try:
            there = Record(teacher, "manifest.json").read_result() or {}
            kept = Record(shelf.teachers / teacher.name, "manifest.json").read_result()
        except RecordError as error:
            raise SystemExit(f"publish.py: the teacher {teacher.name} is damaged ({error}); run the table again.") from error
        if kept is not None and kept["sha256"] != there["sha256"]:
            shelf.say(f"The teacher {there['network']} ({teacher.name}) that is kept is another training of it, and stays.")
            continue
        left_out = ["last.pt", ".*"]
        weights = teacher / "model.safetensors"
        size = weights.stat().st_size / _MEGABYTE if weights.is_file() else None
        if size is not None and size >= below:
            left_out.append(weights.name)
            shelf.say(f"Of the teacher {there['network']} ({teacher.name}) the digest is kept, not the weights ({size:.1f} MB).")
        copied.append((teacher, left_out))
    for teacher, left_out in copied:
        shutil.copytree(teacher, shelf.teachers / teacher.name, ignore=shutil.ignore_patterns(*left_out), dirs_exist_ok=True)


def row_commands(view: Table) -> str:
    """Say how one row alone is run: the same command with its name."""
    rows = {line.row.name: line.row.title for block in view.blocks for line in block.lines}
    named = ", ".join(f"``{name}`` ({title})" for name, title in rows.items())
    return f"One row alone is the same command with ``--methods`` and its name, in place of any ``--methods`` there: {named}."


def shown(options: Sequence[str]) -> list[str]:
    """Return options as everyone may read them: places of this machine become DIR and FILE, files of the project stay.

    Args:
        options: Options of ``run_table.py``.
    """
    words = []
    for before, word in zip(["", *options], options, strict=False):
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            words.append(f"{name}={_public(name, value)}" if equals else word)
        else:
            words.append(_public(before, word))
    return words


def _public(option: str, value: str) -> str:
    if option in _PLACES:
        return _PLACES[option]
    path = Path(value).expanduser()
    local = path.is_absolute() or value.startswith(("./", "../", "~")) or (len(path.parts) > 1 and path.exists())
    if not local:
        return value
    whole, project = path.resolve(), _HERE.parent
    return whole.relative_to(project).as_posix() if whole.is_relative_to(project) else "FILE"


def section_text(options: Sequence[str], view: Table) -> str:
    """Return what stands between a section's marks: the command, the table and what must be known to read it.

    Args:
        options: Options of ``run_table.py``.
        view: The table.
    """
    table, _, caption = view.text().rpartition("\n\n")
    block = "\n".join(f"    {line}".rstrip() for line in table.splitlines())
    section = f"``python benchmarks/run_table.py {' '.join(shown(options))}``".replace(" ``", "``")
    return f"\n{section}::\n\n{block}\n\n{caption.replace('*', chr(92) + '*')}\n\n{row_commands(view)}\n\n"


def write_section(name: str, options: list[str], view: Table, shelf: Shelf) -> None:
    """Put the table and its command between the section's marks.

    Args:
        name: Name of the section.
        options: Options of ``run_table.py``.
        view: The table.
        shelf: Where the section is.
    """
    body = section_text(options, view)
    marks, text = shelf.section(name), shelf.readme.read_text(encoding="utf-8")
    series.write_text(shelf.readme, marks.sub(lambda found: found[1] + body + found[2], text))


def _own_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="publish.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--with-teachers", action="store_true")
    parser.add_argument("--keep-teachers-below", metavar="MB", type=float, default=None)
    given, rest = parser.parse_known_args(arguments)
    below = given.keep_teachers_below
    if below is not None and not (given.with_teachers and below >= 0):
        raise SystemExit(
            f"publish.py: --keep-teachers-below takes megabytes of at least 0, beside --with-teachers; got {below:g}; give both."
        )
    return given, rest


def main(arguments: list[str], shelf: Shelf | None = None) -> None:
    if len(arguments) < 2 or arguments[0].startswith("-") or not Path(arguments[1]).is_dir():
        raise SystemExit(__doc__)
    shelf = shelf or Shelf()
    name, source = arguments[0], Path(arguments[1])
    given, options = _own_options(arguments[2:])
    shelf.section(name)
    loaded: dict[str, DataSet] = {}
    command, _ = make_view(source, options, shelf, loaded, show=False)
    if not command.results:
        raise SystemExit(f"publish.py: of the {len(command.plan.runs)} runs of this table none is in {source}; nothing changed.")
    target = shelf.root / "results" / name
    if given.with_teachers:
        below = KEEP_BELOW if given.keep_teachers_below is None else given.keep_teachers_below
        keep_teachers(command.results.values(), source, below, shelf)
    series.copy_records([*command.results, *command.reasons], source, target)
    others = remove_others(target, command.plan.runs)
    command, view = make_view(target, options, shelf, loaded, show=True)
    write_section(name, options, view, shelf)
    removed = f"; {others} of others removed" if others else ""
    place = target.relative_to(shelf.root.parent)
    count = f"{len(command.results)} record{'s' if len(command.results) != 1 else ''}"
    shelf.say(f"{count} in {place}{removed}; {shelf.readme.name} has the table.")


if __name__ == "__main__":
    main(sys.argv[1:])

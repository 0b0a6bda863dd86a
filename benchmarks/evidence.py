"""Run the experiments that a default rests on, one ``run_table.py`` after the other, and keep their records and tables.

    python benchmarks/evidence.py --data-root DIR --output runs
    python benchmarks/evidence.py --table-only --output benchmarks/results/kdiffusion

Each part of the list (default: ``benchmarks/evidence_kdiffusion.yaml``) is the options of one ``run_table.py``. What is finished is
skipped, and after an interruption the same command goes on. Then the finished records are copied to ``benchmarks/results``, without
the students' weights, beside ``evidence.txt``: every part's command and the table that its records make, gaps shown as such.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from distillzoo.bench.checks import check_keys
from distillzoo.bench.cli import Command
from distillzoo.bench.options import parse_options
from distillzoo.bench.progress import Console
from distillzoo.bench.series import copy_records, exit_code, series_options, series_parser, write_text
from distillzoo.bench.yamls import read_yaml
from distillzoo.data import DataSet, takes_root
from distillzoo.errors import OptionError

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Part:
    """One experiment.

    Args:
        title: What it asks.
        options: Options of ``run_table.py``, without the data's place.
    """

    title: str
    options: str

    def section(self, table: str) -> str:
        """Return title, command, table and its caption as text.

        Args:
            table: What the records make.
        """
        body, _, caption = table.rpartition("\n\n")
        recipe = parse_options(shlex.split(self.options)).recipe
        root = "--data-root DIR " if recipe is not None and takes_root(recipe.dataset) else ""
        command = f"python benchmarks/run_table.py {root}{self.options}"
        return f"{self.title}\n{'-' * len(self.title)}\n\n{command}\n\n{body}\n\n{textwrap.fill(caption, 120)}\n"


def load_parts(path: Path) -> tuple[str, list[Part]]:
    """Read a list of experiments from its YAML file; returns its name and its parts.

    Raises:
        OptionError: If it is not valid.
    """
    found, where = read_yaml(path), f"the list {path.stem!r}"
    check_keys(found, ("name", "common", "parts"), where)
    parts = found.get("parts")
    if not isinstance(found.get("name"), str) or not isinstance(parts, dict) or not parts:
        raise OptionError(f"{where[0].upper()}{where[1:]} needs a name and parts, options by title; got {found!r}; write both.")
    common = str(found.get("common", ""))
    return found["name"], [Part(str(title), f"{common} {options}".strip()) for title, options in parts.items()]


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = series_parser(__doc__ or "", _HERE / "results")
    made.add_argument("--list", metavar="FILE", type=Path, default=_HERE / "evidence_kdiffusion.yaml", help="what is run")
    return made


def main(arguments: list[str], console: Console | None = None) -> int:
    """Run the command line and return its exit code, as ``run_table.py`` has them."""
    console, given = console or Console(), parser().parse_args(arguments)
    return exit_code("evidence.py", lambda: _run(given, console), console)


def _run(given: argparse.Namespace, console: Console) -> int:
    sections: list[str] = []
    kept: dict[str, None] = {}
    asked: dict[str, None] = {}
    loaded: dict[str, DataSet] = {}
    code = 0
    name, parts = load_parts(given.list)
    for part in parts:
        options = parse_options([*shlex.split(part.options), *series_options(given)])
        command = Command(options, [_HERE / "teachers"], console, loaded, show=False)
        code = max(code, command.run())
        sections.append(part.section("" if command.view is None else command.view.text()))
        asked |= dict.fromkeys(command.plan.runs)
        kept |= dict.fromkeys(cell.run.id for cell in command.plan.cells if cell.run.id in command.results | command.reasons)
    place = given.results / name
    lost = [run_id for run_id in asked if run_id not in kept and (place / run_id / "result.json").is_file()]
    if lost:
        raise OptionError(
            f"{len(lost)} records that stand in {str(place)!r} were not found in {str(given.output)!r}, so nothing was written; "
            "name their folder with --output, or run without --table-only."
        )
    copy_records(list(kept), given.output, place)
    text = "\n\n".join(sections)
    write_text(place / "evidence.txt", text)
    console.say(f"\n{text}\nWritten: {len(kept)} records and evidence.txt in {place}.")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

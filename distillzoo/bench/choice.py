"""Choose a table's weights on held-out images: one sweep a row, all of the same budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillzoo.bench.captions import Results
from distillzoo.bench.checks import check_keys, check_list
from distillzoo.bench.cli import Command
from distillzoo.bench.options import parse_options
from distillzoo.bench.plan import Cell
from distillzoo.bench.progress import Console
from distillzoo.bench.recipe import Pair
from distillzoo.bench.rows import load_table
from distillzoo.bench.series import DONE, FAILED
from distillzoo.bench.yamls import read_yaml
from distillzoo.data import DataSet
from distillzoo.errors import OptionError
from distillzoo.kinds import is_number

__all__ = ["Choice", "Search", "choose", "load_search"]

_FIELDS = ("dataset", "recipe", "base", "table", "epochs", "seed", "rows", "note")
_ROW_FIELDS = ("term", "values", "like")


@dataclass(frozen=True)
class Swept:
    """What is tried for one row.

    Args:
        row: Name of the row.
        term: The term whose weight is tried.
        values: The weights, above 0.
        like: A row chosen before, whose weight this one takes over.
    """

    row: str
    term: str
    values: tuple[float, ...]
    like: str | None = None


@dataclass(frozen=True)
class Search:
    """A choice of weights: what is swept, and how long.

    Args:
        name: Name of its file.
        dataset: Data set.
        recipe: Recipe.
        base: Table file whose rows are swept.
        table: Name of the table file that is written.
        epochs: Epochs of every run.
        seed: Seed of every run.
        rows: What is tried, in order.
        note: What else a reader must know of it, in sentences.
    """

    name: str
    dataset: str
    recipe: str
    base: str
    table: str
    epochs: int
    seed: int
    rows: tuple[Swept, ...]
    note: str = ""


@dataclass(frozen=True)
class Choice:
    """What came out for a row.

    Args:
        swept: What was tried.
        default: The weight that the row has in the base table, as records describe it.
        accuracies: Held-out top-1 in per cent after the last epoch by weight; ``None`` for a run that diverged. A weight that has
            no record is not in it.
        ids: Ids of the runs by weight.
        taken: Weights by term that were taken over from another row.
        cells: Cells of the sweep.
        results: Their results by run id.
    """

    swept: Swept
    default: float | Mapping[str, Any]
    accuracies: Mapping[float, float | None]
    ids: Mapping[float, str]
    taken: Mapping[str, float]
    cells: tuple[Cell, ...] = field(default=(), repr=False)
    results: Results = field(default_factory=dict, repr=False)

    @property
    def finished(self) -> bool:
        """Whether every weight has a record."""
        return len(self.accuracies) == len(self.swept.values)

    @property
    def chosen(self) -> float | None:
        """The weight of the highest accuracy, of equal ones the smallest; ``None`` until all are there."""
        reached = {value: accuracy for value, accuracy in self.accuracies.items() if accuracy is not None}
        if not self.finished or not reached:
            return None
        return max(reached, key=lambda value: (reached[value], -value))

    @property
    def at_end(self) -> bool:
        """Whether the chosen weight is the least or the greatest that was tried: a better one may lie beyond."""
        return self.chosen in (min(self.swept.values), max(self.swept.values))


def load_search(path: Path) -> Search:
    """Read a search from its YAML file.

    Raises:
        OptionError: If it is not valid.
    """
    found, where = read_yaml(path), f"the search {path.stem!r}"
    check_keys(found, _FIELDS, where)
    lacking = [name for name in _FIELDS[:-1] if name not in found]
    if lacking:
        raise OptionError(f"{where[0].upper()}{where[1:]} lacks {lacking[0]!r}; it needs {', '.join(_FIELDS[:-1])}.")
    known = {row.name for row in load_table(found["base"]).rows}
    rows: list[Swept] = []
    check_keys(found["rows"], known, f"{where}, rows")
    for name, given in found["rows"].items():
        check_keys(given, _ROW_FIELDS, f"{where}, {name}")
        values = given.get("values")
        if not isinstance(values, list) or not all(is_number(v) and v > 0 for v in values) or "term" not in given:
            raise OptionError(f"{name} of {where} needs a term and a list of values above 0; got {given!r}; write both.")
        check_list(f"values of {name}", values)
        like = given.get("like")
        if like is not None and like not in [row.row for row in rows]:
            raise OptionError(f"{name} of {where} is like {like!r}, which must be a row before it; move it up.")
        rows.append(Swept(str(name), str(given["term"]), tuple(map(float, values)), like))
    fields = {key: found[key] for key in _FIELDS if key != "rows" and key in found}
    return Search(name=path.stem, rows=tuple(rows), **fields)


def choose(search: Search, options: Sequence[str], folders: Sequence[Path], console: Console) -> tuple[list[Choice], int]:
    """Run every sweep that is not finished, one after the other, each as ``run_table.py --sweep`` would.

    Args:
        search: What is swept.
        options: More options of ``run_table.py``: ``--data-root``, ``--output``, ``--threads``, ``--device``, ``--table-only``.
        folders: Folders of teachers that are only read.
        console: What the user sees.
    Returns:
        What came out, and the highest exit code of the sweeps.
    """
    choices: dict[str, Choice] = {}
    loaded: dict[str, DataSet] = {}
    code = 0
    for swept in search.rows:
        like = None if swept.like is None else choices[swept.like]
        taken = {} if like is None or like.chosen is None else {**like.taken, like.swept.term: like.chosen}
        if like is not None and like.chosen is None:
            choices[swept.row] = Choice(swept, _default(search, swept), {}, {}, {})
            console.say(f"{swept.row} waits: the weight of {swept.like} is not chosen yet.")
            continue
        command = Command(parse_options([*arguments(search, swept, taken), *options]), folders, console, loaded, show=False)
        ended = command.run()
        if ended == FAILED and command.results.keys() >= command.plan.runs.keys():
            ended = DONE  # every run has its record: a weight that makes it diverge is an outcome, told as such
        code = max(code, ended)
        choices[swept.row] = _choice(search, swept, command, taken)
    return list(choices.values()), code


def arguments(search: Search, swept: Swept, taken: Mapping[str, float]) -> list[str]:
    """Return the options of ``run_table.py`` that sweep one row.

    Args:
        search: The search.
        swept: The row.
        taken: Weights of its other terms.
    """
    listed = ",".join(f"{value:g}" for value in swept.values)
    settled = [word for term, value in taken.items() for word in (f"--{swept.row}.weights.{term}", f"{value:g}")]
    where = ["--dataset", search.dataset, "--recipe", search.recipe, "--table", search.base]
    how = ["--methods", swept.row, "--seeds", str(search.seed), "--epochs", str(search.epochs), *settled]
    return [*where, *how, "--sweep", f"{swept.row}.weights.{swept.term}={listed}"]


def _default(search: Search, swept: Swept) -> float | Mapping[str, Any]:
    row = next(row for row in load_table(search.base).rows if row.name == swept.row)
    weight: float | Mapping[str, Any] = row.describe(Pair("", ""))["weights"][swept.term]
    return weight


def _choice(search: Search, swept: Swept, command: Command, taken: Mapping[str, float]) -> Choice:
    ids = {float(dict(cell.row.point)[f"{swept.row}.weights.{swept.term}"]): cell.run.id for cell in command.plan.cells}
    results = {value: command.results[run_id] for value, run_id in ids.items() if run_id in command.results}
    accuracies = {value: None if r["status"] != "done" else float(r["last_accuracy"]) for value, r in results.items()}
    return Choice(swept, _default(search, swept), accuracies, ids, taken, command.plan.cells, command.results)

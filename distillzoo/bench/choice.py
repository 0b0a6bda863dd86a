"""Choose a table's weights on held-out images: one sweep a row, all of the same budget, and the table file that follows."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillzoo.bench.captions import Results
from distillzoo.bench.checks import check_keys, check_list
from distillzoo.bench.cli import Command
from distillzoo.bench.options import parse_options
from distillzoo.bench.places import cost_sentence, places_sentence
from distillzoo.bench.plan import Cell
from distillzoo.bench.progress import Console
from distillzoo.bench.provenance import untold_sentence
from distillzoo.bench.recipe import Pair
from distillzoo.bench.render import as_text
from distillzoo.bench.rows import TABLES, load_table
from distillzoo.bench.series import DONE, FAILED, copy_records
from distillzoo.bench.yamls import dump_yaml, load_yaml, read_yaml
from distillzoo.data import DataSet
from distillzoo.errors import OptionError

__all__ = ["Choice", "Search", "check_kept", "choose", "keep_records", "load_search", "table_file", "table_text"]

HELD_OUT = "held-out images"
"""Where chosen weights come from, as rows and captions say it."""

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
        if (
            not isinstance(values, list)
            or not all(type(v) in (int, float) and 0 < v < math.inf for v in values)
            or "term" not in given
        ):
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


def table_text(search: Search, choices: Sequence[Choice]) -> str:
    """Return every sweep and what it chose, as text.

    Args:
        search: The search.
        choices: What came out.
    """
    widest = max(len(choice.swept.values) for choice in choices)
    header = ["row", "weight of", "default", *(f"tried {i + 1}" for i in range(widest)), "chosen"]
    lines = []
    for choice in choices:
        cells = [_cell(choice, value) for value in choice.swept.values]
        chosen = "not yet" if choice.chosen is None else f"{choice.chosen:g}{' (end)' if choice.at_end else ''}"
        names = [choice.swept.row, choice.swept.term, _default_text(choice.default)]
        lines.append([*names, *cells, *[""] * (widest - len(cells)), chosen])
    done = sum(len(choice.accuracies) for choice in choices)
    asked = sum(len(choice.swept.values) for choice in choices)
    said = (
        f"weight: top-1 in per cent on held-out training images, {search.dataset}, recipe {search.recipe}, {search.epochs} epochs, "
        f"seed {search.seed}. The highest is chosen, of equal ones the smallest; (end): a better one may lie beyond. "
        f"One seed and few epochs: neighbours mean nothing against each other. {done} of {asked} runs are there. {search.note}"
    )
    results = {run_id: result for choice in choices for run_id, result in choice.results.items()}
    where = [places_sentence(choice.cells, results) for choice in choices]
    everyone = [cell for choice in choices for cell in choice.cells]
    sentences = [said, *where, cost_sentence(everyone, results), untold_sentence(everyone, results)]
    return f"{as_text(header, lines)}\n\n{textwrap.fill(' '.join(filter(None, map(str.strip, sentences))), 120)}"


def _default_text(weight: float | Mapping[str, Any]) -> str:
    """Write a weight; of a schedule its kind and numbers, since a constant that is tried is not what it says."""
    if not isinstance(weight, Mapping):
        return f"{weight:g}"
    numbers = ", ".join(f"{key} {value}" for key, value in weight.items() if key != "kind")
    return f"{weight['kind'].replace('_', ' ')} ({numbers})"


def _cell(choice: Choice, value: float) -> str:
    if value not in choice.accuracies:
        return f"{value:g}: missing"
    accuracy = choice.accuracies[value]
    return f"{value:g}: {'diverged' if accuracy is None else f'{accuracy:.2f}'}"


def table_file(search: Search, choices: Sequence[Choice], command: str) -> str:
    """Return the table file that follows from the choices: the base table's rows with the chosen weights and where each is from.

    Args:
        search: The search.
        choices: What came out.
        command: The command that writes it, for its first line.
    """
    table: dict[str, Any] = dict(read_yaml(TABLES / f"{search.base}.yaml"))
    known = {row.name: row for row in load_table(search.base).rows}
    rows = {str(name): dict(fields or {}) for name, fields in table["rows"].items()}
    for choice in choices:
        if choice.chosen is None:
            continue
        fields = rows[choice.swept.row]
        row = known[choice.swept.row].override({}, {**choice.taken, choice.swept.term: choice.chosen})
        fields["weights"] = row.weights
        usual = (dict(row.options), row.weights)
        special = {pair: own for pair, own in row.pairs.items() if row.settings(Pair.parse(pair)) != usual}
        fields["pairs"] = {pair: {name: values for name, values in own.items() if values} for pair, own in special.items()}
        if not special:
            del fields["pairs"]
        tried = ", ".join(f"{value:g}" for value in choice.swept.values)
        fields["source"] = f"{HELD_OUT}: the best of {tried} after {search.epochs} epochs; record {choice.ids[choice.chosen]}"
    if search.note:
        table["note"] = search.note.strip()  # how even the effort was belongs under every table with these weights
    return f"# Written from records, never by hand: {command}\n{dump_yaml({**table, 'rows': rows})}"


def check_kept(table: str, path: Path) -> None:
    """Refuse to write a table file in which a row would lose the weight that was chosen for it.

    Args:
        table: What would be written, as :func:`table_file` makes it.
        path: The table file, which need not exist.
    Raises:
        OptionError: If there are choices in it that the records no longer make, or that the search does not ask for.
    """
    made = _chosen_rows(load_yaml(table, "the new table"))
    lost = [name for name in (_chosen_rows(read_yaml(path)) if path.is_file() else ()) if name not in made]
    if lost:
        raise OptionError(
            f"The records that were found do not make the choices of {', '.join(lost)} that stand in {path.name}, so nothing was "
            "written; name their folder with --output, run without --table-only, list these rows in the search, or delete that "
            "file first."
        )


def _chosen_rows(table: Mapping[str, Any]) -> list[str]:
    """Return the rows of a table file whose weights were chosen."""
    rows: Mapping[str, Any] = table.get("rows") or {}
    return [name for name, fields in rows.items() if str((fields or {}).get("source", "")).startswith(f"{HELD_OUT}:")]


def keep_records(choices: Sequence[Choice], source: Path, target: Path) -> int:
    """Copy the finished records of a search without the students' weights; returns how many there are.

    Args:
        choices: What came out.
        source: Folder of the records.
        target: Folder to keep them in.
    """
    kept = [choice.ids[value] for choice in choices for value in choice.accuracies]
    copy_records(kept, source, target)
    return len(kept)

"""Chosen weights as text: every sweep and what it chose, and the table file that follows."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distillzoo.bench.choice import Choice, Search
from distillzoo.bench.places import cost_sentence, places_sentence
from distillzoo.bench.provenance import commits_sentence, teachers_sentence, untold_sentence
from distillzoo.bench.recipe import Pair
from distillzoo.bench.render import as_text
from distillzoo.bench.rows import TABLES, load_table
from distillzoo.bench.yamls import dump_yaml, load_yaml, read_yaml
from distillzoo.errors import OptionError

__all__ = ["check_kept", "table_file", "table_text"]

HELD_OUT = "held-out images"
"""Where chosen weights come from, as rows and captions say it."""


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
    told = (teachers_sentence, cost_sentence, commits_sentence, untold_sentence)
    sentences = [said, *where, *(sentence(everyone, results) for sentence in told)]
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

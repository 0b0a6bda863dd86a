"""Where the rows of a table trained and how long: device and threads decide no id, and yet change numbers a little."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from distillzoo.bench.plan import Cell
from distillzoo.bench.provenance import calls_of, named_rows

__all__ = ["cost_sentence", "places", "places_sentence"]


def places(environment: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the devices, of CPUs with their threads, on which a run trained: one, or more where it was resumed elsewhere.

    Args:
        environment: The run's ``env.json``; nothing is said of what it does not tell.
    """
    return tuple(dict.fromkeys(_place(call) for call in calls_of(environment) if call.get("gpu") or call.get("threads")))


def _place(call: Mapping[str, Any]) -> str:
    threads = call.get("threads")
    return str(call.get("gpu") or f"{threads} thread{'s' if threads != 1 else ''} of {call.get('cpu')}")


def places_sentence(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Say which rows trained where, for the seeds of which they did so at different places; empty if there are none.

    Args:
        cells: Cells that are compared.
        results: Results by run id, each with its ``environment``.
    """
    told: list[tuple[Cell, tuple[str, ...]]] = []
    for cell in _done(cells, results):
        found = places(results[cell.run.id].get("environment") or {})
        if found:
            told.append((cell, found))
    by_seed: dict[tuple[object, int], set[tuple[str, ...]]] = {}
    for cell, found in told:
        by_seed.setdefault((cell.pair, cell.seed), set()).add(found)
    by_place: dict[tuple[str, ...], list[Cell]] = {}
    for cell, found in told:
        if len(by_seed[cell.pair, cell.seed]) > 1:
            by_place.setdefault(found, []).append(cell)
    if not by_place:
        return ""
    everyone = [cell for cell, _ in told]
    parts = [f"{named_rows(own, everyone)} on {' and then '.join(found)}" for found, own in by_place.items()]
    said = (
        "Runs of one seed trained on different devices or numbers of threads, which moves figures, so that differences between "
        "them are not paired: "
    )
    return f"{said}{'; '.join(parts)}."


def cost_sentence(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how long groups trained and where, as far as the records of what trained to its end tell; one figure a group.

    Args:
        cells: Cells that have a result.
        results: Results by run id, each with its ``environment``.
    """
    groups: dict[tuple[object, ...], Mapping[str, Any]] = {}
    done = _done(cells, results)
    # rows that read no teacher share their runs between pairs: theirs may tell of another pair's group
    taught = {(cell.pair, cell.seed) for cell in done if results[cell.run.id].get("teacher")}
    own = [cell for cell in done if results[cell.run.id].get("teacher") or (cell.pair, cell.seed) not in taught]
    for cell in own:
        where = results[cell.run.id].get("environment") or {}
        if where.get("group_seconds") and where.get("group_images_per_second"):
            # records from before groups were written tell the group's size; rows of sweeps were then groups of their own
            group = where.get("group") or (where.get("group_size"), cell.run.config, cell.row.point and cell.row.name)
            key = (str(cell.pair), cell.teacher.id, cell.seed, group)
            groups[key] = max(groups.get(key, where), where, key=lambda one: float(one["group_seconds"]))
    if not groups:
        return ""
    minutes = [where["group_seconds"] / 60 for where in groups.values()]
    sizes = sorted({where["group_size"] for where in groups.values()})
    speeds = [where["group_images_per_second"] for where in groups.values()]
    told = dict.fromkeys(place for cell in own for place in places(results[cell.run.id].get("environment") or {}))
    rows = f"{' or '.join(map(str, sizes))} row{'s' if sizes != [1] else ''} on one teacher pass"
    turns = "" if sizes == [1] else ", all rows taking turns"
    speed = f"{_range(speeds, '.0f')} images/s for each row{turns}"
    beside = "evaluation, checkpoints and epochs that were interrupted come on top"
    set_by = Counter(f"{name}={value}" for where in groups.values() for name, value in (where.get("settings") or {}).items())
    whole = len(groups)
    said = [text if number == whole else f"{text} in {number} of {whole} groups" for text, number in set_by.items()]
    settings = f" with {', '.join(said)}" if said else ""
    where = f"on {', '.join(told)}{settings}"
    return f"Training took {_range(minutes, '.1f')} minutes for a group of {rows}, {speed}, {where}; {beside}."


def _done(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """Return the cells whose runs trained to their end."""
    return [cell for cell in cells if cell.run.id in results and results[cell.run.id].get("status", "done") == "done"]


def _range(values: list[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"

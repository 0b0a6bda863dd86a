"""Where the figures of a table come from: whose students the rows are, what is exported, and what records do not tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distillzoo.bench.plan import Cell

__all__ = ["calls_of", "commits_sentence", "exports_sentence", "named_rows", "teachers_sentence", "untold_sentence"]


def calls_of(environment: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what a run's ``env.json`` tells of the calls that trained it: of a record from before calls were written it is one.

    Args:
        environment: The run's ``env.json``.
    """
    calls = environment.get("calls")
    return [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else [environment]


def exports_sentence(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Say by how much exported students differ from those that trained, where they do; empty if none does.

    Args:
        cells: Cells that are compared.
        results: Results by run id.
    """
    gaps: list[tuple[Cell, float]] = []
    for cell in cells:
        result = results.get(cell.run.id, {})
        last, exported = result.get("last_accuracy"), result.get("exported_accuracy")
        if last is not None and exported is not None and last != exported:
            gaps.append((cell, abs(last - exported)))
    if not gaps:
        return ""
    rows, worst = named_rows([cell for cell, _ in gaps], cells), max(gap for _, gap in gaps)
    return f"Accuracies are of the networks as they trained; exported, those of {rows} differ by up to {worst:.2f} points."


def commits_sentence(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Say by which commits of the code the runs trained, where there are several, and where the code differed from its commit.

    Args:
        cells: Cells that are compared.
        results: Results by run id, each with its ``environment``.
    """
    environments = {cell.run.id: results[cell.run.id].get("environment") or {} for cell in cells if cell.run.id in results}
    calls = {run_id: calls_of(found) for run_id, found in environments.items()}
    trained = {run_id: dict.fromkeys(str(call["commit"]) for call in made if call.get("commit")) for run_id, made in calls.items()}
    commits = dict.fromkeys(commit for own in trained.values() for commit in own)
    several = sum(len(own) > 1 for own in trained.values())
    dirty = sum(any(call.get("dirty") for call in made) for made in calls.values())
    said = []
    if len(commits) > 1:
        both = f", {several} of the {len(trained)} runs by more than one of them" if several else ""
        said.append(f"The code is of {len(commits)} commits ({', '.join(commit[:7] for commit in commits)}){both}.")
    if dirty:
        said.append(f"In {dirty} of {len(trained)} runs it differed from its commit.")
    return " ".join(said)


def untold_sentence(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how many records name no commit, no digest of their teacher's weights, or no exported accuracy; empty if all do.

    A record whose ``env.json`` is gone names no commit.

    Args:
        cells: Cells that are compared.
        results: Results by run id, each with its ``environment``.
    """
    known = {cell.run.id: results[cell.run.id] for cell in cells if cell.run.id in results}
    taught = [result["teacher"] for result in known.values() if result.get("teacher")]
    commits = sum(not (result.get("environment") or {}).get("commit") for result in known.values())
    digests = sum("sha256" not in teacher for teacher in taught)
    done = [result for result in known.values() if result.get("status", "done") == "done"]
    exported = sum("exported_accuracy" not in result for result in done)
    counts = {
        "commit of their code": (commits, len(known)),
        "digest of their teacher's weights": (digests, len(taught)),
        "accuracy of the exported student": (exported, len(done)),
    }
    said = [f"{number} of {whole} records name no {what}" for what, (number, whole) in counts.items() if number]
    return f"{'; '.join(said)}." if said else ""


def teachers_sentence(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Say which rows were taught by which teacher, where records name several trainings of one; empty if they do not.

    Records from before digests were written name none; nothing is said of them.

    Args:
        cells: Cells that are compared.
        results: Results by run id.
    """
    students = [cell for cell in cells if results.get(cell.run.id, {}).get("teacher")]
    taught: dict[str, dict[str, list[Cell]]] = {}
    known: dict[str, Mapping[str, Any]] = {}
    for cell in students:
        teacher = results[cell.run.id]["teacher"]
        if "sha256" in teacher:
            known[teacher["sha256"]] = teacher
            taught.setdefault(teacher["id"], {}).setdefault(teacher["sha256"], []).append(cell)
    said = []
    for several in (by_digest for by_digest in taught.values() if len(by_digest) > 1):
        parts = [
            f"{known[digest]['accuracy']:.2f} % (sha256 {digest[:8]}) taught {named_rows(own, students)}"
            for digest, own in several.items()
        ]
        name = known[next(iter(several))]["name"]
        said.append(f"The teacher {name} was trained {len(several)} times, and students of different ones are not paired: ")
        said[-1] += f"{'; '.join(parts)}."
    return " ".join(said)


def named_rows(own: Sequence[Cell], everyone: Sequence[Cell]) -> str:
    """Name rows, with their seeds unless they are all the seeds of the row.

    Args:
        own: Cells of these rows.
        everyone: All cells that are compared, of these rows and others.
    """
    parts = []
    for label in dict.fromkeys(cell.row.label for cell in own):
        seeds, every = ([cell.seed for cell in cells if cell.row.label == label] for cells in (own, everyone))
        listed = f" seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(set(seeds))))}"
        parts.append(label if len(seeds) == len(every) else f"{label}{listed}")
    return ", ".join(parts)

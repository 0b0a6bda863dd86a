"""The data set of records, where the data itself is not there: enough to make a table again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from distillzoo.bench.plan import Plan
from distillzoo.bench.recipe import Recipe
from distillzoo.bench.records import canonical_json
from distillzoo.data import SplitName
from distillzoo.errors import DataError, OptionError
from distillzoo.types import DataSpec, Loader

__all__ = ["RecordedDataSet", "recorded_data", "several_sets", "unused_records"]

_DIFFERENCES = {
    "results_version": "of another version",
    "student": "of other students",
    "config": "trained otherwise",
    "method": "of other methods",
    "options": "with other options",
    "weights": "with other weights",
    "taps": "with other taps",
    "seed": "of other seeds",
    "teacher": "of other teachers",
}
"""Parts of a run's identity, and what is said of a record that differs in them."""


@dataclass(frozen=True)
class _Written:
    """Something whose ``repr`` was written down."""

    text: str

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class RecordedDataSet:
    """What records say of their data set; it follows :class:`~distillzoo.data.DataSet` and has no images.

    Args:
        name: Registered name.
        split: What networks were evaluated on.
        digest: Digest of the images and labels.
        description: One line for captions.
        augment: How training images were varied.
    """

    name: str
    split: SplitName
    digest: str
    description: str
    augment: object | None

    @property
    def spec(self) -> DataSpec:
        """Not known."""
        self._refuse()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Not known."""
        self._refuse()

    def train_loader(self, *_: Any, **__: Any) -> Loader:
        """Refuse: there are no images."""
        self._refuse()

    def eval_loader(self, *_: Any, **__: Any) -> Loader:
        """Refuse: there are no images."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise DataError(f"Only the records of {self.name} are here, not its images; name their folder with --data-root.")


def recorded_data(root: Path, recipe: Recipe) -> RecordedDataSet | None:
    """Return the data set that the records of a folder were made with; ``None`` unless there is exactly one that fits.

    It fits if it was loaded with the recipe's options; of records from before these were written nothing is known.

    Args:
        root: Folder of the records.
        recipe: Whose data set and split are looked for.
    """
    found = _recorded_sets(root, recipe)
    if len(found) != 1:
        return None
    (digest, augment), (description, *_) = next(iter(found.items()))
    return RecordedDataSet(_name(recipe), recipe.split, digest, description, None if augment == "None" else _Written(augment))


def several_sets(root: Path, recipe: Recipe) -> str:
    """Say that a folder has records of several sets of images or augmentations under one name; empty if it has not.

    Args:
        root: Folder of the records.
        recipe: Whose data set and split are looked for.
    """
    found = _recorded_sets(root, recipe)
    if len(found) < 2:
        return ""
    listed = ", ".join(
        f"{len(descriptions)} of {digest[:8]} with augmentation {augment}" for (digest, augment), descriptions in found.items()
    )
    count = sum(map(len, found.values()))
    return (
        f"{count} finished records of {_name(recipe)} (split: {recipe.split}) are not used: they are of {len(found)} sets of "
        f"images or augmentations ({listed}), and a table is of one."
    )


def unused_records(root: Path, plan: Plan) -> str:
    """Say how many records of a plan's images it does not ask for, and by what they differ; empty if none, or if no run is missing.

    Records of other images, splits and augmentations may lie in the folder on purpose, and nothing is said of them.

    Args:
        root: Folder of the records.
        plan: The plan of a table.
    """
    runs = plan.runs
    asked = {name: {canonical_json(run.identity.get(name)) for run in runs.values()} for name in ("data", *_DIFFERENCES)}
    found = {run_id: one["identity"] for run_id, one in _finished(root) if canonical_json(one["identity"]["data"]) in asked["data"]}
    reasons: Counter[str] = Counter()
    for identity in (identity for run_id, identity in found.items() if run_id not in runs):
        differs = (name for name, known in asked.items() if canonical_json(identity.get(name)) not in known)
        reasons[_DIFFERENCES.get(next(differs, ""), "in another combination")] += 1
    if not reasons or runs.keys() <= found.keys():
        return ""
    listed = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
    return f"{reasons.total()} of {len(found)} finished records of these images are not asked for by this table: {listed}."


def _name(recipe: Recipe) -> str:
    return f"{recipe.dataset}_packed" if recipe.data.get("packed") else recipe.dataset  # another protocol


def _finished(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return id and content of the folder's finished records that say what they are of."""
    for path in sorted(root.glob("*/result.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            result["identity"]["data"]
            canonical_json(result["identity"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # damaged: whoever reads the record as a record says so
        yield path.parent.name, result


def _recorded_sets(root: Path, recipe: Recipe) -> dict[tuple[str, str], list[str]]:
    """Return digest and augmentation of the data sets that have a recipe's name and split, with a description for each record."""
    found: dict[tuple[str, str], list[str]] = {}
    for _, result in _finished(root):
        data = result["identity"]["data"]
        try:
            same = canonical_json(result.get("data_options", recipe.data_options)) == canonical_json(recipe.data_options)
            if same and (data["name"], data["split"]) == (_name(recipe), recipe.split):
                found.setdefault((str(data["digest"]), str(data["augment"])), []).append(str(result["data"]))
        except (KeyError, TypeError, OptionError):
            continue
    return found

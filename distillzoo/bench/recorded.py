"""The data set of records, where the data itself is not there: enough to make a table again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from distillzoo.bench.recipe import Recipe
from distillzoo.data import SplitName
from distillzoo.errors import DataError
from distillzoo.types import DataSpec, Loader

__all__ = ["RecordedDataSet", "recorded_data"]


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

    Args:
        root: Folder of the records.
        recipe: Whose data set and split are looked for.
    """
    found: dict[tuple[str, str], str] = {}
    name = f"{recipe.dataset}_packed" if recipe.data.get("packed") else recipe.dataset  # another protocol
    for path in sorted(root.glob("*/result.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            data, description = result["identity"]["data"], str(result["data"])
            if (data["name"], data["split"]) == (name, recipe.split):
                found[str(data["digest"]), str(data["augment"])] = description
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # damaged: whoever reads the record as a record says so
    if len(found) != 1:
        return None
    (digest, augment), description = next(iter(found.items()))
    return RecordedDataSet(name, recipe.split, digest, description, None if augment == "None" else _Written(augment))

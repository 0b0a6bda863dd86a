"""Records that a table does not use: of several sets of images, or not asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distillzoo.bench import cli
from distillzoo.bench.recipe import Recipe, apply_override
from distillzoo.bench.recorded import recorded_data, several_sets, unused_records
from distillzoo.bench.reproduction import recorded_table
from distillzoo.errors import DataError
from tests.bench.conftest import Call, records


@pytest.fixture
def mixed(finished: Path, tmp_path: Path) -> Path:
    """The finished records, one of them of other images."""
    output = tmp_path / "mixed"
    shutil.copytree(finished, output)
    path = records(output)["kd", 1] / "result.json"
    found = json.loads(path.read_text())
    found["identity"]["data"]["digest"] = "f" * 16
    path.write_text(json.dumps(found))
    return output


def test_several_sets_of_images_are_said(
    mixed: Path, finished: Path, call: Call, recipe_file: str, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert several_sets(finished, tiny) == ""
    assert recorded_data(mixed, tiny) is None
    said = several_sets(mixed, tiny)
    assert said.startswith(
        "4 finished records of synthetic (split: test) are not used: they are of 2 sets of images or augmentations"
    )
    assert "1 of ffffffff with augmentation" in said
    assert said.endswith(", and a table is of one.")

    def missing(*_: Any, **__: Any) -> None:
        raise DataError("The data is not there.")

    monkeypatch.setattr(cli, "load_dataset", missing)
    outcome = call("--recipe", recipe_file, "--output", str(mixed), "--table-only")
    assert (outcome.code, outcome.err) == (2, f"run_table.py: The data is not there. {said}\n")


def test_records_that_are_not_asked_for_are_counted_with_what_differs(
    finished: Path, call: Call, recipe_file: str, tiny: Recipe
) -> None:
    plan, _ = recorded_table(tiny, finished, [], pytest.fail)
    assert unused_records(finished, plan) == ""
    arguments = ["--recipe", recipe_file, "--output", str(finished), "--table-only"]
    assert call(*arguments).err == ""
    for more, listed in {
        ("--methods", "vanilla,kd", "--seeds", "1,2"): "2 of 4 finished records of these images are not asked for by this table: "
        "2 of other seeds",
        ("--methods", "kd", "--seeds", "2"): "4 of 4 finished records of these images are not asked for by this table: "
        "2 of other methods, 2 of other seeds",
        ("--kd.temperature", "3"): "2 of 4 finished records of these images are not asked for by this table: 2 with other options",
        ("--epochs", "4"): "4 of 4 finished records of these images are not asked for by this table: 4 trained otherwise",
        ("--methods", "kd", "--seeds", "0"): "",  # nothing is missing
        ("--split", "heldout"): "",  # other images
    }.items():
        outcome = call(*arguments, *more)
        assert sorted(outcome.err.removeprefix("Note: ").rstrip(".\n").split(", ")) == sorted(listed.split(", ")), more
        assert outcome.code == 0


def test_records_of_other_options_of_the_data_are_not_taken_for_these(finished: Path, tiny: Recipe, tmp_path: Path) -> None:
    assert recorded_data(finished, tiny) is not None
    other = apply_override(tiny, "data.num_test", 24)
    assert recorded_data(finished, other) is None
    assert recorded_data(finished, apply_override(tiny, "data.workers", 2)) is not None
    old = tmp_path / "old"
    shutil.copytree(finished, old)
    for path in old.glob("*/result.json"):
        found = json.loads(path.read_text())
        del found["data_options"]
        path.write_text(json.dumps(found))
    assert recorded_data(old, other) is not None, "of records from before options were written nothing is known"

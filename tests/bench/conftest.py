"""A tiny recipe on generated images, and the command line called in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from distillzoo.bench import recording
from distillzoo.bench.cli import main
from distillzoo.bench.progress import Console
from distillzoo.bench.recipe import Recipe, make_recipe
from distillzoo.data import DataSet, load_dataset

TINY_YAML = """
name: tiny
dataset: synthetic
pairs: [tinycnn_32:tinycnn_8]
table: digits
methods: [vanilla, kd]
seeds: [0, 1]
data: {num_classes: 3, size: 8, num_train: 24, num_test: 12}
teacher: {epochs: 2, batch_size: 12, lr: 0.05, schedule: onecycle}
student: {epochs: 3, batch_size: 12, lr: 0.05, schedule: onecycle}
"""
TINY = yaml.safe_load(TINY_YAML)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


def records(output: Path) -> dict[tuple[str, int], Path]:
    """Return the folders of the finished runs by method and seed."""
    found = {}
    for path in output.glob("*/result.json"):
        identity = json.loads(path.read_text())["identity"]
        found[identity["method"], identity["seed"]] = path.parent
    return found


class Stop:
    """Interrupts after some epoch reports; every one of them saves a checkpoint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, reports: int) -> None:
        original = recording.GroupRecorder.on_epoch
        self.left = reports

        def on_epoch(recorder: recording.GroupRecorder, report: Any) -> None:
            original(recorder, report)
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(recording.GroupRecorder, "on_epoch", on_epoch)
        monkeypatch.setattr(recording, "_SAVE_SECONDS", 0.0)


@pytest.fixture
def call() -> Call:
    """Call the command line; returns its exit code and what it wrote."""

    def run(*arguments: str, teacher_folders: tuple[Path, ...] = ()) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        code = main(arguments, teacher_folders=teacher_folders, console=Console(out, err))
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_YAML)
    return str(path)


@pytest.fixture
def tiny() -> Recipe:
    return make_recipe(TINY)


@pytest.fixture
def tiny_data() -> Callable[[Recipe], DataSet]:
    return lambda recipe: load_dataset(recipe.dataset, split=recipe.split, **recipe.data)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of one unbroken run; nobody writes to them."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY_YAML)
    console = Console(io.StringIO(), io.StringIO())
    assert main(["--recipe", str(folder / "tiny.yaml"), "--output", str(folder / "runs")], console=console) == 0
    return folder / "runs"

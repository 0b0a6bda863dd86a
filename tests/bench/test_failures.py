"""Damaged records, diverging and failing members, methods that cannot work on a pair."""

from __future__ import annotations

import errno
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distillzoo import Distiller, register_distiller
from distillzoo.bench.choice import Search, Swept, choose
from distillzoo.bench.choice_text import table_text
from distillzoo.bench.progress import Console
from distillzoo.bench.recipe import load_recipe
from distillzoo.bench.reproduction import recorded_table
from distillzoo.errors import UnsupportedPairError
from distillzoo.registry import DISTILLERS
from distillzoo.types import Requires
from tests.bench.conftest import Call, Stop, records


@pytest.mark.parametrize("kind", ["junk", "empty", "half", "pickle", "state", "keys"])
def test_a_checkpoint_that_cannot_be_read_or_does_not_fit_is_set_aside_and_run_again(
    kind: str, finished: Path, call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "runs"
    with monkeypatch.context() as patch:
        Stop(patch, 6)
        call("--recipe", recipe_file, "--output", str(output))
    path = min(output.rglob("last.pt"))
    content, saved = path.read_bytes(), torch.load(path, weights_only=True)
    saved["state"]["distiller"].popitem()
    unread = kind not in ("state", "keys")
    if unread:
        pickled = b"\x80\x02cposix\nsystem\n."
        path.write_bytes({"junk": b"junk", "empty": b"", "half": content[: len(content) // 2], "pickle": pickled}[kind])
    else:
        torch.save({**saved, "state": {"epoch": "x"}} if kind == "state" else saved, path)
    outcome = call("--recipe", recipe_file, "--output", str(output))
    assert outcome.code == 0, outcome.err
    assert f"{path.parent.name} was damaged (" in outcome.err
    assert ("cannot be read" if unread else "does not fit") in outcome.err
    assert [place.name for place in (output / "quarantine").iterdir()] == [f"{path.parent.name}-1"]
    for key, folder in records(finished).items():
        assert (folder / "result.json").read_bytes() == (records(output)[key] / "result.json").read_bytes()


@pytest.mark.parametrize("kind", ["deep", "file"])
def test_a_record_that_is_no_record_is_set_aside(kind: str, finished: Path, call: Call, recipe_file: str, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    shutil.copytree(finished, output)
    folder = records(output)["kd", 1]
    original = (folder / "result.json").read_bytes()
    if kind == "deep":
        (folder / "result.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    else:
        shutil.rmtree(folder)
        folder.write_text("not a folder")
    outcome = call("--recipe", recipe_file, "--output", str(output))
    assert outcome.code == 0, outcome.err
    assert f"{folder} was damaged" in outcome.err
    assert (output / "quarantine" / f"{folder.name}-1").exists()
    assert (folder / "result.json").read_bytes() == original


def test_a_record_changed_by_hand_is_set_aside_and_run_again(finished: Path, call: Call, recipe_file: str, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    shutil.copytree(finished, output)
    path = records(output)["kd", 1] / "result.json"
    original = path.read_bytes()
    path.write_text(path.read_text().replace('"status": "done"', '"status": "fine"'))
    outcome = call("--recipe", recipe_file, "--output", str(output))
    assert outcome.code == 0
    assert str(path.parent) in outcome.err
    assert "quarantine" in outcome.err
    assert path.read_bytes() == original


def test_a_damaged_teacher_is_made_again(finished: Path, call: Call, recipe_file: str, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    shutil.copytree(finished / "teachers", output / "teachers")
    (weights,) = output.glob("teachers/*/model.safetensors")
    good = weights.read_bytes()
    weights.write_bytes(good[:-4] + b"\x00\x00\x00\x00")
    outcome = call("--recipe", recipe_file, "--output", str(output), "--methods", "kd", "--seeds", "0")
    assert outcome.code == 0
    assert "model.safetensors" in outcome.err
    assert weights.read_bytes() == good


def test_a_table_without_matplotlib_is_a_table(
    finished: Path, call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "runs")
    for path in (tmp_path / "runs").glob("tiny.*"):
        path.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = call("--recipe", recipe_file, "--output", str(tmp_path / "runs"), "--table-only")
    assert outcome.code == 0
    assert "The plot was not written: Plots need matplotlib" in outcome.err
    assert sorted(path.name for path in (tmp_path / "runs").glob("tiny.*")) == ["tiny.csv", "tiny.md"]


def test_what_the_system_refuses_is_a_sentence(
    call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/some/file")

    monkeypatch.setattr("distillzoo.bench.cli.folder_lock", full)
    outcome = call("--recipe", recipe_file, "--output", str(tmp_path / "runs"))
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith(
        "run_table.py: '/some/file' could not be read or written (No space left on device)"
    )


def test_a_committed_teacher_is_used_and_never_written(finished: Path, call: Call, recipe_file: str, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    before = {path: path.read_bytes() for path in (finished / "teachers").rglob("*") if path.is_file()}
    outcome = call(
        "--recipe",
        recipe_file,
        "--output",
        str(output),
        "--methods",
        "kd",
        "--seeds",
        "0",
        teacher_folders=(finished / "teachers",),
    )
    assert outcome.code == 0
    assert not (output / "teachers").exists()
    assert {path: path.read_bytes() for path in (finished / "teachers").rglob("*") if path.is_file()} == before
    assert (records(output)["kd", 0] / "result.json").read_bytes() == (records(finished)["kd", 0] / "result.json").read_bytes()


def test_a_given_teacher_is_imported_and_not_trained(finished: Path, call: Call, recipe_file: str, tmp_path: Path) -> None:
    (weights,) = finished.glob("teachers/*/model.safetensors")
    (manifest,) = finished.glob("teachers/*/manifest.json")
    output = tmp_path / "runs"
    arguments = ["--recipe", recipe_file, "--output", str(output), "--methods", "kd", "--seeds", "0"]
    outcome = call(*arguments, "--teacher-checkpoint", str(weights))
    assert outcome.code == 0
    (imported,) = output.glob("teachers/*/manifest.json")
    assert json.loads(imported.read_text())["accuracy"] == json.loads(manifest.read_text())["accuracy"]
    assert imported.parent.name != manifest.parent.name
    assert "method: imported\n" in (imported.parent / "recipe.yaml").read_text()
    given, trained = (json.loads((records(place)["kd", 0] / "result.json").read_text()) for place in (output, finished))
    assert given["last_loss"] == trained["last_loss"], "the same weights teach the same"


class _Diverging(Distiller):
    """Loses itself in its third step."""

    requires = Requires(teacher=False)
    weight_presets = {"default": {"ce": 1.0, "loss": 1.0}}

    def distill_terms(self, student: Any, teacher: Any, batch: Any) -> dict[str, Tensor]:
        return {"loss": student.logits.sum() * torch.where(self.step >= 2, float("nan"), 0.0)}


class _Ruined(_Diverging):
    """Has weights that are not finite after its last step, of which no loss tells any more."""

    def distill_terms(self, student: Any, teacher: Any, batch: Any) -> dict[str, Tensor]:
        return {"loss": student.logits.sum() * 0.0}

    def after_step(self) -> None:
        with torch.no_grad():
            for weight in self.student.parameters():
                weight.mul_(torch.where(self.step >= 6, float("nan"), 1.0))


class _Failing(_Diverging):
    """Raises what no one expects."""

    def distill_terms(self, student: Any, teacher: Any, batch: Any) -> dict[str, Tensor]:
        raise ZeroDivisionError("never mind")


class _Picky(_Diverging):
    """Works on no pair."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        raise UnsupportedPairError("Picky works on no pair; use kd.")


@pytest.fixture
def bad_methods() -> Iterator[None]:
    for name, cls in (("zz_diverging", _Diverging), ("zz_failing", _Failing), ("zz_picky", _Picky), ("zz_ruined", _Ruined)):
        register_distiller(name)(cls)
    yield
    for name in ("zz_diverging", "zz_failing", "zz_picky", "zz_ruined"):
        DISTILLERS._items.pop(name)


@pytest.mark.usefixtures("bad_methods")
def test_a_diverged_member_leaves_the_others_alone(finished: Path, call: Call, recipe_file: str, tmp_path: Path) -> None:
    arguments = [
        "--recipe",
        recipe_file,
        "--output",
        str(tmp_path / "runs"),
        "--methods",
        "vanilla,zz_diverging,kd",
        "--seeds",
        "0",
    ]
    outcome = call(*arguments)
    assert outcome.code == 1
    assert "diverged" in outcome.err
    assert "diverged" in outcome.out
    found = records(tmp_path / "runs")
    for method in ("vanilla", "kd"):
        assert (found[method, 0] / "result.json").read_bytes() == (records(finished)[method, 0] / "result.json").read_bytes()
    again = call(*arguments)
    assert again.code == 1
    assert again.out.lstrip() == outcome.out[outcome.out.index("synthetic: ") :], "it would diverge again, so it is not tried again"


@pytest.mark.usefixtures("bad_methods")
def test_a_group_without_a_figure_says_so(call: Call, recipe_file: str, tmp_path: Path) -> None:
    outcome = call("--recipe", recipe_file, "--output", str(tmp_path / "runs"), "--seeds", "0", "--methods", "zz_diverging")
    assert outcome.code == 1
    assert "seed 0: no run came to its end." in outcome.out


@pytest.mark.usefixtures("bad_methods")
def test_a_member_that_is_lost_in_its_last_step_leaves_the_others_alone(
    finished: Path, call: Call, recipe_file: str, tmp_path: Path
) -> None:
    arguments = ["--recipe", recipe_file, "--output", str(tmp_path / "runs"), "--seeds", "0"]
    outcome = call(*arguments, "--methods", "vanilla,zz_ruined,kd")
    assert outcome.code == 1
    assert "diverged: not finite by step 6 (epoch 3): loss on the evaluation images" in outcome.err
    found = records(tmp_path / "runs")
    assert json.loads((found["zz_ruined", 0] / "result.json").read_text())["status"] == "diverged"
    for method in ("vanilla", "kd"):
        assert (found[method, 0] / "result.json").read_bytes() == (records(finished)[method, 0] / "result.json").read_bytes()


@pytest.mark.usefixtures("bad_methods")
@pytest.mark.parametrize(("method", "code"), [("zz_diverging", 0), ("zz_failing", 1)])
def test_a_weight_that_diverges_is_an_outcome_of_a_search(method: str, code: int, recipe_file: str, tmp_path: Path) -> None:
    table = tmp_path / "table.yaml"
    table.write_text(f"rows:\n  {method}: {{}}\n")
    swept = Swept(method, "loss", (0.5, 1.0))
    search = Search("mine", "synthetic", recipe_file, str(table), "mine", epochs=3, seed=0, rows=(swept,))
    for _ in range(2):
        choices, ended = choose(search, ["--output", str(tmp_path / "runs")], [], Console(io.StringIO(), io.StringIO()))
        assert ended == code
        assert ("0.5: diverged" in table_text(search, choices)) == (code == 0)


@pytest.mark.usefixtures("bad_methods")
def test_a_failed_group_leaves_the_others_alone(call: Call, recipe_file: str, tmp_path: Path) -> None:
    arguments = ["--recipe", recipe_file, "--output", str(tmp_path / "runs"), "--seeds", "0"]
    assert call(*arguments, "--methods", "vanilla").code == 0
    outcome = call(*arguments, "--methods", "vanilla,zz_failing")
    assert outcome.code == 1
    assert "never mind" in outcome.err
    assert "missing" in outcome.out
    assert set(records(tmp_path / "runs")) == {("vanilla", 0)}


@pytest.mark.usefixtures("bad_methods")
def test_a_method_that_cannot_work_on_the_pair(
    call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "runs"
    outcome = call("--recipe", recipe_file, "--output", str(output), "--methods", "vanilla,zz_picky")
    assert (outcome.code, output.exists()) == (2, False)
    assert "use kd" in outcome.err
    table = tmp_path / "table.yaml"
    table.write_text("rows:\n  vanilla: {}\n  zz_picky: {}\n")
    recipe = Path(recipe_file)
    recipe.write_text(recipe.read_text().replace("methods: [vanilla, kd]\n", "").replace("table: digits", f"table: {table}"))
    outcome = call("--recipe", recipe_file, "--output", str(output), "--seeds", "0")
    assert outcome.code == 0, outcome.err
    assert "not applicable" in outcome.out
    assert "Picky works on no pair" in outcome.out
    again = call("--recipe", recipe_file, "--output", str(output), "--seeds", "0", "--table-only")
    assert again.code == 0
    assert outcome.out.endswith(again.out), "a table of records alone knows the reason too"
    made = recorded_table(load_recipe(recipe), output, [], pytest.fail)[1].blocks[0].lines
    assert [(line.row.name, line.applies) for line in made] == [("vanilla", True), ("zz_picky", False)]
    (refused,) = output.glob("*/refused.json")
    refused.write_text(refused.read_text().replace("no pair", "any pair"))
    assert "missing" in call("--recipe", recipe_file, "--output", str(output), "--seeds", "0", "--table-only").out, "damaged"
    with monkeypatch.context() as patch:
        patch.setattr(_Picky, "__init__", _Diverging.__init__)
        call("--recipe", recipe_file, "--output", str(output), "--seeds", "0")
    assert not refused.exists(), "once it trains it is not refused"

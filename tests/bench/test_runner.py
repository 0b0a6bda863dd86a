"""Runs through the real engine, on a few generated images: records, resume, damage, failure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distillzoo import Distiller, register_distiller
from distillzoo.bench import networks, recording, training
from distillzoo.errors import UnsupportedPairError
from distillzoo.registry import DISTILLERS
from distillzoo.types import Requires
from tests.bench.conftest import Call


def records(output: Path) -> dict[tuple[str, int], Path]:
    found = {}
    for path in output.glob("*/result.json"):
        identity = json.loads(path.read_text())["identity"]
        found[identity["method"], identity["seed"]] = path.parent
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of one unbroken run."""
    from tests.bench.conftest import TINY_YAML

    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY_YAML)
    import io

    from distillzoo.bench.cli import main
    from distillzoo.bench.progress import Console

    assert (
        main(
            ["--recipe", str(folder / "tiny.yaml"), "--output", str(folder / "runs")], console=Console(io.StringIO(), io.StringIO())
        )
        == 0
    )
    return folder / "runs"


def test_what_is_on_disk(finished: Path) -> None:
    found = records(finished)
    assert set(found) == {(method, seed) for method in ("vanilla", "kd") for seed in (0, 1)}
    for (method, seed), folder in found.items():
        assert {path.name for path in folder.iterdir()} == {
            "recipe.yaml", "env.json", "metrics.jsonl", "result.json", "student.safetensors",
        }  # fmt: skip
        assert f"method: {method}\n" in (folder / "recipe.yaml").read_text()
        assert f"seed: {seed}\n" in (folder / "recipe.yaml").read_text()
        result = json.loads((folder / "result.json").read_text())
        assert (result["status"], result["epochs"], result["parameters"] > 1000) == ("done", 3, True)
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in metrics] == [0, 1, 2]
        assert metrics[-1]["accuracy"] == result["last_accuracy"]
        assert max(line["accuracy"] for line in metrics) == result["best_accuracy"]
        environment = json.loads((folder / "env.json").read_text())
        assert environment["device"] == "cpu"
        assert environment["group_size"] == 2
        assert environment["group_images_per_second"] > 0
    vanilla = json.loads((found["vanilla", 0] / "result.json").read_text())
    kd = json.loads((found["kd", 0] / "result.json").read_text())
    assert vanilla["teacher"] is None
    (manifest,) = (json.loads(path.read_text()) for path in finished.glob("teachers/*/manifest.json"))
    assert kd["teacher"] == {key: manifest[key] for key in ("id", "accuracy", "parameters")} | {"name": "tinycnn_32"}
    assert {path.suffix for path in finished.iterdir() if path.is_file()} == {".md", ".csv", ".png"}


def test_the_teacher_is_stored_in_half_and_students_see_the_stored_one(
    call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    original = training.GroupTask.run

    def run(task: training.GroupTask, *arguments: Any) -> Any:
        if task.teacher is not None:
            seen.append(task.teacher.module.state_dict())
        return original(task, *arguments)

    monkeypatch.setattr(training.GroupTask, "run", run)
    assert call("--recipe", recipe_file, "--output", str(tmp_path / "runs"), "--seeds", "0").code == 0
    (weights,) = (tmp_path / "runs").glob("teachers/*/model.safetensors")
    tensors = load_file(weights)
    assert {value.dtype for value in tensors.values() if value.ndim >= 2} == {torch.float16}
    assert {value.dtype for value in tensors.values() if value.ndim == 1} == {torch.float32}
    assert len(seen) == 1
    assert all(torch.equal(seen[0][name], value.to(seen[0][name].dtype)) for name, value in tensors.items())


def test_a_finished_run_only_prints_the_table(
    finished: Path, call: Call, recipe_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr(networks, "create_model", refuse)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.json*")}
    outcome = call("--recipe", recipe_file, "--output", str(finished))
    assert outcome.code == 0
    assert "student alone" in outcome.out
    assert "missing" not in outcome.out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.json*")} == before
    only = call("--recipe", recipe_file, "--output", str(finished), "--table-only")
    assert (only.code, only.out) == (0, outcome.out)


class _Stop:
    """Interrupts after some epoch reports."""

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


# 1: in the teacher. 3: after one member of the first epoch, so that two members resume at different epochs. 6: at an epoch's end.
# 8: between the last epoch and the results.
@pytest.mark.parametrize("reports", [1, 3, 6, 8, 11])
def test_interrupted_and_resumed_equals_unbroken(
    reports: int, finished: Path, call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "runs"
    with monkeypatch.context() as patch:
        _Stop(patch, reports)
        outcome = call("--recipe", recipe_file, "--output", str(output))
    assert outcome.code == 130
    assert "The same command again goes on" in outcome.err
    assert list(output.rglob("last.pt"))
    assert call("--recipe", recipe_file, "--output", str(output)).code == 0
    assert not list(output.rglob("last.pt"))
    whole, resumed = records(finished), records(output)
    assert set(whole) == set(resumed)
    for key, folder in whole.items():
        for name in ("result.json", "metrics.jsonl", "recipe.yaml", "student.safetensors"):
            assert (folder / name).read_bytes() == (resumed[key] / name).read_bytes(), (key, name)


def test_a_resumed_run_trains_only_what_is_left(
    call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "runs"
    with monkeypatch.context() as patch:
        _Stop(patch, 6)
        call("--recipe", recipe_file, "--output", str(output))
    epochs: list[tuple[str, int]] = []
    original = recording.GroupRecorder.on_epoch
    monkeypatch.setattr(
        recording.GroupRecorder,
        "on_epoch",
        lambda recorder, report: (epochs.append((report.member, report.epoch)), original(recorder, report))[1],
    )
    assert call("--recipe", recipe_file, "--output", str(output)).code == 0
    assert [epoch for _, epoch in epochs] == [2, 2, 0, 0, 1, 1, 2, 2], "teacher and two epochs of seed 0 were there"


def test_a_truncated_checkpoint_is_set_aside_and_run_again(
    finished: Path, call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "runs"
    with monkeypatch.context() as patch:
        _Stop(patch, 6)
        call("--recipe", recipe_file, "--output", str(output))
    first, _ = sorted(output.rglob("last.pt"))
    first.write_bytes(first.read_bytes()[:100])
    outcome = call("--recipe", recipe_file, "--output", str(output))
    assert outcome.code == 0
    assert first.parent.name in outcome.err
    assert [path.name for path in (output / "quarantine").iterdir()] == [f"{first.parent.name}-1"]
    for key, folder in records(finished).items():
        assert (folder / "result.json").read_bytes() == (records(output)[key] / "result.json").read_bytes()


def test_a_checkpoint_that_does_not_fit_is_set_aside(
    call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "runs"
    with monkeypatch.context() as patch:
        _Stop(patch, 6)
        call("--recipe", recipe_file, "--output", str(output))
    path = min(output.rglob("last.pt"))
    saved = torch.load(path, weights_only=True)
    saved["state"]["distiller"].popitem()
    torch.save(saved, path)
    outcome = call("--recipe", recipe_file, "--output", str(output))
    assert outcome.code == 0
    assert "does not fit" in outcome.err
    assert len(records(output)) == 4


def test_a_record_changed_by_hand_is_set_aside_and_run_again(finished: Path, call: Call, recipe_file: str, tmp_path: Path) -> None:
    import shutil

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
    import shutil

    output = tmp_path / "runs"
    shutil.copytree(finished / "teachers", output / "teachers")
    (weights,) = output.glob("teachers/*/model.safetensors")
    good = weights.read_bytes()
    weights.write_bytes(good[:-4] + b"\x00\x00\x00\x00")
    outcome = call("--recipe", recipe_file, "--output", str(output), "--methods", "kd", "--seeds", "0")
    assert outcome.code == 0
    assert "model.safetensors" in outcome.err
    assert weights.read_bytes() == good


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
    for name, cls in (("zz_diverging", _Diverging), ("zz_failing", _Failing), ("zz_picky", _Picky)):
        register_distiller(name)(cls)
    yield
    for name in ("zz_diverging", "zz_failing", "zz_picky"):
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
def test_a_failed_group_leaves_the_others_alone(call: Call, recipe_file: str, tmp_path: Path) -> None:
    arguments = ["--recipe", recipe_file, "--output", str(tmp_path / "runs"), "--seeds", "0"]
    assert call(*arguments, "--methods", "vanilla").code == 0
    outcome = call(*arguments, "--methods", "vanilla,zz_failing")
    assert outcome.code == 1
    assert "never mind" in outcome.err
    assert "missing" in outcome.out
    assert set(records(tmp_path / "runs")) == {("vanilla", 0)}


@pytest.mark.usefixtures("bad_methods")
def test_a_method_that_cannot_work_on_the_pair(call: Call, recipe_file: str, tmp_path: Path) -> None:
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


def test_a_sweep_trains_on_the_held_out_split_and_writes_its_view(call: Call, recipe_file: str, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    arguments = [
        "--recipe",
        recipe_file,
        "--output",
        str(output),
        "--methods",
        "kd",
        "--seeds",
        "0",
        "--sweep",
        "kd.temperature=1,4",
    ]
    outcome = call(*arguments)
    assert outcome.code == 0, outcome.err
    assert "split: heldout" in outcome.out
    assert {path.name for path in output.iterdir() if path.is_file()} == {
        f"sweep_tiny_kd-temperature.{end}" for end in ("md", "csv", "png")
    }
    splits = {json.loads(path.read_text())["identity"]["data"]["split"] for path in output.glob("*/result.json")}
    assert splits == {"heldout"}
    assert "split: test" in call(*arguments, "--split", "test", "--table-only").out


def test_epochs_and_overrides_reach_the_records(call: Call, recipe_file: str, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    outcome = call(
        "--recipe", recipe_file, "--output", str(output), "--methods", "kd", "--seeds", "3", "--epochs", "1", "--kd.temperature=2",
        "--kd.weights.kd", "0.5", "--student.momentum", "0.5",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    identity = json.loads((records(output)["kd", 3] / "result.json").read_text())["identity"]
    assert (identity["config"]["epochs"], identity["config"]["momentum"]) == (1, 0.5)
    assert (identity["options"], identity["weights"]) == ({"temperature": 2}, {"ce": 0.1, "kd": 0.5})
    assert "student.epochs" in outcome.out
    assert "not comparable" in outcome.out

"""Runs through the real engine, on a few generated images: what is on disk, resume, teachers, sweeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distillzoo.bench import cli, networks, progress, recording, training
from distillzoo.engine import Trainer
from distillzoo.engine.member import Member
from distillzoo.errors import DataError
from tests.bench.conftest import Call, Stop, records


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
    assert kd["teacher"] == {key: manifest[key] for key in ("id", "accuracy", "parameters", "sha256")} | {"name": "tinycnn_32"}
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


# 1: in the teacher. 3: after one member of the first epoch, so that two members resume at different epochs. 6: at an epoch's end.
# 8: between the last epoch and the results.
@pytest.mark.parametrize("reports", [1, 3, 6, 8, 11])
def test_interrupted_and_resumed_equals_unbroken(
    reports: int, finished: Path, call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "runs"
    with monkeypatch.context() as patch:
        Stop(patch, reports)
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


def test_minutes_end_with_an_epoch_and_nothing_is_lost(
    finished: Path, call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "runs"
    arguments = ["--recipe", recipe_file, "--output", str(output)]
    outcome = call(*arguments, "--minutes", "0.000001")
    assert (outcome.code, outcome.out) == (130, "")
    assert "The minutes are over" in outcome.err
    asked = iter(range(100))
    with monkeypatch.context() as patch:  # asked as the teacher and the students begin, and once at the end of each epoch
        patch.setattr(progress.Meter, "time_is_up", lambda _: next(asked) >= 4)
        assert call(*arguments).code == 130
    kept = [len((path.parent / "metrics.jsonl").read_text().splitlines()) for path in output.glob("*/last.pt")]
    assert kept == [1, 1], "the students' first epoch, though it took no twenty seconds"
    assert call(*arguments, "--minutes", "60").code == 0
    whole, resumed = records(finished), records(output)
    assert set(whole) == set(resumed)
    assert all(
        (folder / "result.json").read_bytes() == (resumed[key] / "result.json").read_bytes() for key, folder in whole.items()
    )


def test_a_resumed_run_trains_only_what_is_left(
    call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "runs"
    with monkeypatch.context() as patch:
        Stop(patch, 6)
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


def test_env_json_tells_of_every_call(call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, threads = tmp_path / "runs", torch.get_num_threads()
    arguments = ["--recipe", recipe_file, "--output", str(output)]
    try:
        with monkeypatch.context() as patch:
            Stop(patch, 6)
            call(*arguments, "--threads", "1")
        outcome = call(*arguments, "--threads", "2")
    finally:
        torch.set_num_threads(threads)
    assert outcome.code == 0
    told = {key: json.loads((folder / "env.json").read_text()) for key, folder in records(output).items()}
    for (method, seed), environment in told.items():
        calls = [(entry["threads"], entry["epochs"]) for entry in environment["calls"]]
        assert calls == ([(1, 2), (2, 1)] if seed == 0 else [(2, 3)]), (method, seed)
        assert {"date", "commit", "dirty", "device"} < environment["calls"][0].keys()
        assert (environment["threads"], environment["group"]) == (2, told["kd", seed]["group"])
    assert told["kd", 0]["group"] != told["kd", 1]["group"]
    (teacher,) = (json.loads(path.read_text()) for path in output.glob("teachers/*/env.json"))
    assert [(entry["threads"], entry["epochs"]) for entry in teacher["calls"]] == [(1, 2)]
    cpu = told["kd", 0]["cpu"]
    assert f"on 1 thread of {cpu}, 2 threads of {cpu};" in outcome.out
    assert "are not paired" not in outcome.out, "the rows of each seed went the same way"


def test_times_are_of_the_training_and_evaluation_is_not_in_them(
    call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def lasting(seconds: float, action: Any) -> Any:
        def run(*arguments: Any) -> Any:
            now[0] += seconds
            return action(*arguments)

        return run

    monkeypatch.setattr("distillzoo.engine.trainer.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr("distillzoo.bench.runner.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Member, "train_step", lasting(0.5, Member.train_step))
    monkeypatch.setattr(Trainer, "_evaluate", lasting(100.0, Trainer._evaluate))
    output = tmp_path / "runs"
    assert call("--recipe", recipe_file, "--output", str(output), "--seeds", "0").code == 0
    images, epochs, steps, members = 24, 3, 2, 2
    for folder in records(output).values():
        environment = json.loads((folder / "env.json").read_text())
        assert environment["group_seconds"] == epochs * steps * members * 0.5
        assert environment["group_images_per_second"] == images * epochs / environment["group_seconds"] == 12.0
        assert environment["wall_seconds_of_last_call"] == environment["group_seconds"] + epochs * 100.0
    (teacher,) = (json.loads(path.read_text()) for path in output.glob("teachers/*/env.json"))
    assert (teacher["seconds"], teacher["images_per_second"]) == (2.0, 24.0)


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


def test_a_table_can_be_made_again_without_the_data(
    finished: Path, call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "committed"
    shutil.copytree(finished, output, ignore=shutil.ignore_patterns("*.safetensors", "teachers"))
    whole = call("--recipe", recipe_file, "--output", str(finished), "--table-only").out

    def missing(*_: Any, **__: Any) -> None:
        raise DataError("The data is not there.")

    monkeypatch.setattr(cli, "load_dataset", missing)
    outcome = call("--recipe", recipe_file, "--output", str(output), "--table-only")
    assert outcome.code == 0, outcome.err
    assert outcome.out.replace(str(output), "") == whole.replace(str(finished), "")
    assert call("--recipe", recipe_file, "--output", str(output)).code == 2, "training needs the images"

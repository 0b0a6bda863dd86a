"""Teachers by their digests: which training of one recipe taught a student, what is kept of large ones, and what tables say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from distillzoo.bench.plan import make_plan
from distillzoo.bench.provenance import teachers_sentence
from distillzoo.bench.recipe import Recipe, make_recipe
from distillzoo.bench.records import Record
from distillzoo.bench.rows import load_table
from distillzoo.bench.table import make_table
from distillzoo.data import DataSet
from distillzoo.data.packing import file_sha256
from distillzoo.models import create_model
from tests.bench.conftest import TINY, Call, Stop, records

Load = Callable[[Recipe], DataSet]


def rewrite(manifest: Path, **changes: Any) -> None:
    """Change a manifest as if it had been written so."""
    body = {key: value for key, value in json.loads(manifest.read_text()).items() if key not in ("id", "files", "checksum")}
    Record(manifest.parent, "manifest.json").finish({**body, **changes})


def train_otherwise(teachers: Path) -> str:
    """Put another training of the same recipe in a teacher's place; returns its digest."""
    (weights,) = teachers.glob("*/model.safetensors")
    save_file({name: value * 1.5 if value.is_floating_point() else value for name, value in load_file(weights).items()}, weights)
    rewrite(weights.with_name("manifest.json"), sha256=file_sha256(weights), accuracy=12.5)
    return file_sha256(weights)


def digest_only(finished: Path, place: Path) -> Path:
    """Keep the teachers of a finished run without their weights; returns the manifest."""
    shutil.copytree(finished / "teachers", place, ignore=shutil.ignore_patterns("*.safetensors"))
    (manifest,) = place.glob("*/manifest.json")
    return manifest


def teacher_of(record: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((record / "result.json").read_text())["teacher"]
    return found


def test_a_teacher_of_which_the_digest_is_kept_is_trained_again_and_compared(
    finished: Path, call: Call, recipe_file: str, tmp_path: Path
) -> None:
    manifest = digest_only(finished, tmp_path / "kept")
    before = {path: path.read_bytes() for path in (tmp_path / "kept").rglob("*.*")}
    arguments = ["--recipe", recipe_file, "--output", str(tmp_path / "runs"), "--methods", "kd", "--seeds", "0"]
    outcome = call(*arguments, teacher_folders=(tmp_path / "kept",))
    assert outcome.code == 0, outcome.err
    assert f"only the digest is kept ({manifest.parent})" in outcome.err
    assert "damaged" not in outcome.err
    assert "another one" not in outcome.err, "it came out the same"
    assert {path: path.read_bytes() for path in (tmp_path / "kept").rglob("*.*")} == before
    assert (records(tmp_path / "runs")["kd", 0] / "result.json").read_bytes() == (
        records(finished)["kd", 0] / "result.json"
    ).read_bytes()
    again = call(*arguments, teacher_folders=(tmp_path / "kept",))
    assert (again.code, again.err) == (0, ""), "nothing is told that concerns no run"


def test_a_table_names_a_teacher_of_which_only_the_digest_is_kept(
    finished: Path, call: Call, recipe_file: str, tmp_path: Path
) -> None:
    manifest = json.loads(digest_only(finished, tmp_path / "kept").read_text())
    (tmp_path / "runs").mkdir()
    arguments = ["--recipe", recipe_file, "--output", str(tmp_path / "runs"), "--table-only"]
    outcome = call(*arguments, teacher_folders=(tmp_path / "kept",))
    assert (outcome.code, outcome.err) == (0, "")
    assert f"Teacher tinycnn_32 {manifest['accuracy']:.2f} % ({manifest['parameters']:,} parameters; trained on " in outcome.out


def test_a_teacher_that_came_out_differently_is_told_and_recorded(
    finished: Path, call: Call, recipe_file: str, tmp_path: Path
) -> None:
    manifest = digest_only(finished, tmp_path / "kept")
    rewrite(manifest, sha256="0" * 64)
    arguments = ["--recipe", recipe_file, "--output", str(tmp_path / "runs"), "--methods", "kd", "--seeds", "0"]
    outcome = call(*arguments, teacher_folders=(tmp_path / "kept",))
    assert outcome.code == 0, outcome.err
    taught = teacher_of(records(tmp_path / "runs")["kd", 0])
    assert taught == {**teacher_of(records(finished)["kd", 0]), "differs_from": "0" * 64}
    assert f"(sha256 {taught['sha256'][:8]}, not 00000000): rows that the two taught are not paired" in outcome.err
    assert outcome.err.count("is another one than") == 1
    more = call(*arguments[:-1], "1", teacher_folders=(tmp_path / "kept",))
    assert more.err.count("is another one than") == 1, "nor is the teacher of a later call"
    assert teacher_of(records(tmp_path / "runs")["kd", 1])["differs_from"] == "0" * 64
    only = call(*arguments, "--table-only", teacher_folders=(tmp_path / "kept",))
    assert (only.code, "another one" in only.err) == (0, False)


def test_a_damaged_committed_teacher_is_told_once(finished: Path, call: Call, recipe_file: str, tmp_path: Path) -> None:
    shutil.copytree(finished / "teachers", tmp_path / "kept")
    (weights,) = (tmp_path / "kept").glob("*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x00\x00")
    arguments = ["--recipe", recipe_file, "--output", str(tmp_path / "runs"), "--methods", "kd", "--seeds", "0"]
    outcome = call(*arguments, teacher_folders=(tmp_path / "kept",))
    assert outcome.code == 0, outcome.err
    assert outcome.err.count(f"The teacher in {weights.parent} is damaged") == 1


def test_a_table_of_two_trainings_of_one_teacher_says_so(finished: Path, call: Call, recipe_file: str, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "runs")
    shutil.rmtree(records(tmp_path / "runs")["kd", 1])
    old, new = teacher_of(records(finished)["kd", 0]), train_otherwise(tmp_path / "runs" / "teachers")
    outcome = call("--recipe", recipe_file, "--output", str(tmp_path / "runs"))
    assert outcome.code == 0, outcome.err
    assert teacher_of(records(tmp_path / "runs")["kd", 1])["sha256"] == new
    said = (
        "The teacher tinycnn_32 was trained 2 times, and students of different ones are not paired: "
        f"{old['accuracy']:.2f} % (sha256 {old['sha256'][:8]}) taught KD seed 0; 12.50 % (sha256 {new[:8]}) taught KD seed 1."
    )
    assert said in outcome.out
    whole = call("--recipe", recipe_file, "--output", str(tmp_path / "runs"), "--seeds", "1").out
    assert "trained 2 times" not in whole
    assert "Teacher tinycnn_32 12.50 %" in whole, "the one that taught these rows"


def test_records_without_a_digest_are_unknown_not_different(tiny_data: Load) -> None:
    plan = make_plan(make_recipe({**TINY, "methods": ["vanilla", "kd", "at"]}), load_table("digits"), tiny_data)
    teacher = {"id": "t", "name": "tinycnn_32", "accuracy": 91.25, "parameters": 287843}

    def said(**digests: str | None) -> str:
        results = {}
        for cell in plan.cells:
            digest = digests.get(f"{cell.row.name}{cell.seed}")
            taught = None if cell.row.name == "vanilla" else {**teacher, **({"sha256": digest} if digest else {})}
            results[cell.run.id] = {"status": "done", "last_accuracy": 50.0, "teacher": taught}
        sentence = teachers_sentence(plan.cells, results)
        assert sentence in make_table(plan, results, lambda _: teacher).text()
        return sentence

    assert said() == ""
    assert said(kd0="a" * 64, kd1="a" * 64) == ""
    assert "(sha256 aaaaaaaa) taught KD; 91.25 % (sha256 bbbbbbbb) taught AT seed 1." in said(
        kd0="a" * 64, kd1="a" * 64, at1="b" * 64
    )
    assert "(sha256 aaaaaaaa) taught KD, AT seed 0; 91.25 % (sha256 bbbbbbbb) taught AT seed 1." in said(
        kd0="a" * 64, kd1="a" * 64, at0="a" * 64, at1="b" * 64
    )


def test_a_student_does_not_change_its_teacher_halfway(
    call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "runs"
    arguments = ["--recipe", recipe_file, "--output", str(output), "--seeds", "0"]
    with monkeypatch.context() as patch:
        Stop(patch, 6)
        assert call(*arguments).code == 130
    assert len(list(output.rglob("last.pt"))) == 2
    new = train_otherwise(output / "teachers")
    outcome = call(*arguments)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("was damaged (last.pt was taught by another teacher (sha256 ") == 1, "the student alone goes on"
    assert teacher_of(records(output)["kd", 0])["sha256"] == new
    assert len(list((output / "quarantine").iterdir())) == 1


def test_a_teacher_of_which_the_loss_is_not_finite_is_named_and_teaches_nobody(
    call: Call, recipe_file: str, tmp_path: Path
) -> None:
    state = create_model("tinycnn_32", num_classes=3).state_dict()
    large = {name: value * 1e30 if name.endswith("weight") else value for name, value in state.items()}
    save_file(large, tmp_path / "teacher.safetensors")  # finite, what comes of it is not
    arguments = ["--recipe", recipe_file, "--output", str(tmp_path / "runs"), "--seeds", "0"]
    outcome = call(*arguments, "--teacher-checkpoint", str(tmp_path / "teacher.safetensors"))
    assert outcome.code == 1
    assert "The loss of the teacher tinycnn_32 on the evaluation images is" in outcome.err
    assert "give another checkpoint" in outcome.err
    assert set(records(tmp_path / "runs")) == {("vanilla", 0)}


def test_a_kept_teacher_is_said_and_where_it_was_trained(finished: Path, call: Call, recipe_file: str, tmp_path: Path) -> None:
    shutil.copytree(finished / "teachers", tmp_path / "kept")
    (environment,) = (tmp_path / "kept").glob("*/env.json")
    arguments = ["--recipe", recipe_file, "--output", str(tmp_path / "runs"), "--methods", "kd", "--seeds", "0"]
    outcome = call(*arguments, teacher_folders=(tmp_path / "kept",))
    assert outcome.code == 0, outcome.err
    assert f" %, the one kept in {environment.parent}." in outcome.out
    told = json.loads(environment.read_text())
    threads = f"{told['threads']} thread{'s' if told['threads'] != 1 else ''} of {told['cpu']}"
    assert f" parameters; trained on {threads}" in outcome.out
    environment.write_text(json.dumps({"threads": 7, "cpu": "A CPU", "commit": None}))
    again = call(*arguments, "--table-only", teacher_folders=(tmp_path / "kept",))
    assert " parameters; trained on 7 threads of A CPU; no commit named)" in again.out
    assert "; trained on" not in call(*arguments, "--table-only").out, "of a teacher that the project does not keep nothing is said"

"""What is committed of a table: its own records and no others, teachers by a limit of size, no place of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.publish import KEEP_BELOW, Shelf, main, shown
from distillzoo.bench.records import Record
from distillzoo.data.packing import file_sha256
from distillzoo.models import create_model
from tests.bench.conftest import records

ROOT = Path(__file__).resolve().parents[2]
README = "Above\n.. table: mine begin\nold\n.. table: mine end\nBelow\n"


class Place(NamedTuple):
    shelf: Shelf
    said: list[str]
    options: list[str]

    def publish(self, source: Path, *more: str, name: str = "mine") -> None:
        main([name, str(source), *self.options, *more], self.shelf)

    def records(self) -> set[tuple[str, int]]:
        return set(records(self.shelf.root / "results" / "mine"))

    def everything(self) -> dict[str, bytes]:
        top = self.shelf.root.parent
        return {path.relative_to(top).as_posix(): path.read_bytes() for path in top.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path: Path, recipe_file: str) -> Place:
    (tmp_path / "top" / "benchmarks").mkdir(parents=True)
    (tmp_path / "top" / "README.rst").write_text(README)
    said: list[str] = []
    shelf = Shelf(tmp_path / "top" / "benchmarks", tmp_path / "top" / "README.rst", said.append)
    return Place(shelf, said, ["--recipe", recipe_file])


def test_the_tables_own_records_are_copied_and_shown(finished: Path, place: Place) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    place.publish(finished, "--methods", "kd")
    assert place.records() == {("kd", 0), ("kd", 1)}, "not the student alone, which lies in the same folder"
    assert not [path for path in place.everything() if path.endswith((".safetensors", "last.pt"))]
    assert not (place.shelf.root / "teachers").exists()
    text = place.shelf.readme.read_text()
    assert text.startswith("Above\n.. table: mine begin\n\n``python benchmarks/run_table.py --recipe FILE --methods kd``::")
    assert text.endswith(".. table: mine end\nBelow\n")
    assert "\nold\n" not in text
    assert "    KD  " in text
    assert place.said[-1] == "2 records in benchmarks/results/mine; README.rst has the table."
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_records_of_other_tables_leave_and_nothing_else_does(finished: Path, place: Place) -> None:
    place.publish(finished)
    target = place.shelf.root / "results" / "mine"
    (target / "notes.txt").write_text("mine")
    (target / ("a" * 16)).mkdir()
    (target / ("a" * 16) / "notes.txt").write_text("no record")
    (target / "figures").mkdir()
    (target / "figures" / "result.json").write_text("{}")
    (place.shelf.root / "results" / "other").mkdir()
    shutil.copytree(records(finished)["vanilla", 0], place.shelf.root / "results" / "other" / records(finished)["vanilla", 0].name)
    before = place.everything()
    place.publish(finished, "--methods", "kd", "--seeds", "0")
    assert place.said[-1] == "1 record in benchmarks/results/mine; 3 of others removed; README.rst has the table."
    gone = {path.split("/")[3] for path in before.keys() - place.everything().keys()}
    assert gone == {folder.name for key, folder in records(finished).items() if key != ("kd", 0)}
    assert "benchmarks/results/mine/figures/result.json" in place.everything()


def test_what_another_day_published_of_the_table_stays(finished: Path, place: Place, tmp_path: Path) -> None:
    place.publish(finished)
    part = tmp_path / "part"
    shutil.copytree(finished, part)
    shutil.rmtree(records(part)["kd", 0])
    place.publish(part)
    assert place.records() == set(records(finished))
    place.publish(place.shelf.root / "results" / "mine")
    assert place.records() == set(records(finished)), "a folder of results may be its own source"
    assert "    KD  " in place.shelf.readme.read_text()


def test_nothing_is_changed_where_a_table_cannot_be_made(finished: Path, place: Place, tmp_path: Path) -> None:
    place.publish(finished)
    before = place.everything()
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([finished, "--methods", "nosuch"], "nosuch"),
        ([finished, "--student.epochs", "7"], "of the 4 runs of this table none is in"),
        ([tmp_path / "empty"], "none is in"),
        ([finished, "--sweep", "kd.temperature=1,4"], "leave --sweep out"),
        ([finished, "--keep-teachers-below", "3"], "beside --with-teachers"),
        ([finished, "--with-teachers", "--keep-teachers-below", "-1"], "at least 0"),
        ([finished, "--with-teachers", "--keep-teachers-below", "nan"], "at least 0"),
    ):
        with pytest.raises(SystemExit, match=words):
            place.publish(*arguments)  # type: ignore[arg-type]
        assert place.everything() == before, arguments
    with pytest.raises(SystemExit, match=r"no section '\.\. table: yours begin'"):
        place.publish(finished, name="yours")
    assert place.everything() == before


def test_a_damaged_record_is_not_published(finished: Path, place: Place, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "runs")
    result = records(tmp_path / "runs")["kd", 1] / "result.json"
    result.write_text(result.read_text().replace('"done"', '"fine"'))
    place.publish(tmp_path / "runs")
    assert place.records() == set(records(finished)) - {("kd", 1)}
    assert result.exists(), "nothing is set aside where nothing is run"


def test_teachers_are_kept_by_size(finished: Path, place: Place) -> None:
    (manifest,) = finished.glob("teachers/*/manifest.json")
    size = manifest.with_name("model.safetensors").stat().st_size / 1e6
    kept = place.shelf.teachers / manifest.parent.name
    place.publish(finished, "--methods", "vanilla", "--with-teachers")
    assert not place.shelf.teachers.exists(), "no row of the table was taught"
    place.publish(finished, "--with-teachers", f"--keep-teachers-below={size}")
    assert sorted(path.name for path in kept.iterdir()) == ["env.json", "manifest.json", "metrics.jsonl", "recipe.yaml"]
    assert place.said[-2] == f"Of the teacher tinycnn_32 ({kept.name}) the digest is kept, not the weights ({size:.1f} MB)."
    assert "sha256" in json.loads((kept / "manifest.json").read_text())
    place.publish(finished, "--with-teachers")
    assert (kept / "model.safetensors").read_bytes() == manifest.with_name("model.safetensors").read_bytes()
    assert "teachers-below" not in place.shelf.readme.read_text()


def test_the_teachers_that_are_kept_and_those_that_are_not() -> None:
    """In float16: resnet20, WRN-40-2 and resnet32x4 stay below the limit, VGG13 and ResNet50 do not."""
    megabytes = {
        name: sum(value.numel() * 2 for value in create_model(name, num_classes=100).parameters()) / 1e6
        for name in ("resnet20", "wrn_40_2", "resnet32x4", "vgg13", "resnet50")
    }
    assert [name for name, size in megabytes.items() if size < KEEP_BELOW] == ["resnet20", "wrn_40_2", "resnet32x4"], megabytes


def test_a_kept_teacher_is_never_replaced_by_another_training(finished: Path, place: Place, tmp_path: Path) -> None:
    place.publish(finished, "--with-teachers")
    (manifest,) = place.shelf.teachers.glob("*/manifest.json")
    shutil.copytree(finished, tmp_path / "runs")
    (other,) = (tmp_path / "runs").glob("teachers/*/manifest.json")
    weights = other.with_name("model.safetensors")
    weights.write_bytes(weights.read_bytes() + b" ")
    body = {key: value for key, value in json.loads(other.read_text()).items() if key not in ("id", "files", "checksum")}
    Record(other.parent, "manifest.json").finish({**body, "sha256": file_sha256(weights)})
    before = manifest.read_bytes()
    place.publish(tmp_path / "runs", "--with-teachers")
    assert manifest.read_bytes() == before
    assert place.said[-2].endswith("that is kept is another training of it, and stays.")


def test_a_damaged_teacher_stops_it_before_anything_is_copied(finished: Path, place: Place, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "runs")
    (weights,) = (tmp_path / "runs").glob("teachers/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    before = place.everything()
    with pytest.raises(SystemExit, match="is damaged"):
        place.publish(tmp_path / "runs", "--with-teachers")
    assert place.everything() == before


def test_places_of_this_machine_are_not_shown(tmp_path: Path) -> None:
    inside = ROOT / "benchmarks" / "weights_cifar100_cpu.yaml"
    given = [
        "--data-root", "data", "--data-root=/data/sets", "--teacher-checkpoint=mine.pt", "--recipe", str(tmp_path / "a.yaml"),
        f"--table={inside}", "--class-list", "~/list.txt", "--recipe=../a.yaml", "--data.class_list=/lists/mine.txt",
        "--recipe", "cpu", "--teacher", "timm/resnet18", "--pairs=timm/resnet18:resnet8", "--kd.weights.kd", ".5", "--packed",
    ]  # fmt: skip
    assert shown(given) == [
        "--data-root", "DIR", "--data-root=DIR", "--teacher-checkpoint=FILE", "--recipe", "FILE",
        "--table=benchmarks/weights_cifar100_cpu.yaml", "--class-list", "FILE", "--recipe=FILE", "--data.class_list=FILE",
        "--recipe", "cpu", "--teacher", "timm/resnet18", "--pairs=timm/resnet18:resnet8", "--kd.weights.kd", ".5", "--packed",
    ]  # fmt: skip

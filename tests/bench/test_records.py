from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distillzoo.bench.records import Record, RecordStore, atomic, canonical_json, content_id
from distillzoo.errors import OptionError, RecordError

IDENTITY = {"method": "kd", "seed": 0}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> RecordStore:
    return RecordStore(tmp_path / "runs", said.append)


@pytest.fixture
def finished(store: RecordStore) -> Record:
    record = store.record(content_id(IDENTITY))
    record.begin({"method": "kd", **IDENTITY}, {"threads": 1})
    record.write_metrics([{"epoch": 0, "accuracy": 50.0}])
    record.save_checkpoint({"epoch": 1})
    record.finish({"identity": IDENTITY, "last_accuracy": 50.0})
    return record


def test_canonical_json_has_one_form() -> None:
    assert canonical_json({"b": 1.0, "a": (1, 2.5)}) == canonical_json({"a": [1.0, 2.5], "b": 1}) == '{"a":[1,2.5],"b":1}'
    assert content_id({"x": True}) != content_id({"x": 1})
    assert len(content_id({})) == 16
    for wrong in (float("nan"), float("inf"), object()):
        with pytest.raises(OptionError, match="plain data"):
            canonical_json({"a": wrong})


def test_a_finished_record_reads_back(finished: Record, store: RecordStore) -> None:
    result = store.result(finished)
    assert result is not None
    assert result["last_accuracy"] == 50.0
    assert result["id"] == finished.id
    assert not (finished.path / "last.pt").exists()
    assert (finished.path / "recipe.yaml").read_text().startswith("method: kd\n")
    assert {path.name for path in finished.path.iterdir()} == {"recipe.yaml", "env.json", "metrics.jsonl", "result.json"}


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), atomic(path) as handle:
        handle.writelines([b"half", "no bytes"])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_is_renamed_into_its_place(tmp_path: Path) -> None:
    path, reader = tmp_path / "file", tmp_path / "reader"
    path.write_bytes(b"old")
    reader.hardlink_to(path)
    with atomic(path) as handle:
        handle.write(b"new")
    assert path.read_bytes() == b"new"
    assert reader.read_bytes() == b"old", "who has the old file open reads it to its end"


def _change_result(record: Record, **changes: object) -> None:
    found = json.loads(record.result_path.read_text())
    record.result_path.write_text(json.dumps({**found, **changes}))


DAMAGES = {
    "truncated": lambda record: record.result_path.write_text(record.result_path.read_text()[:40]),
    "no mapping": lambda record: record.result_path.write_text("[]"),
    "binary": lambda record: record.result_path.write_bytes(b"\xff\x00"),
    "figure": lambda record: _change_result(record, last_accuracy=99.0),
    "nan": lambda record: _change_result(record, last_accuracy=float("nan")),
    "identity": lambda record: _change_result(record, identity={"method": "kd", "seed": 1}),
    "id": lambda record: _change_result(record, id="0" * 16),
    "metrics": lambda record: (record.path / "metrics.jsonl").write_text("{}\n"),
    "recipe": lambda record: (record.path / "recipe.yaml").write_text("method: crd\n"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_set_aside_named_and_absent(damage: str, finished: Record, store: RecordStore, said: list[str]) -> None:
    DAMAGES[damage](finished)
    assert store.result(finished) is None
    assert not finished.path.exists()
    assert (store.root / "quarantine" / f"{finished.id}-1" / "result.json").exists()
    assert len(said) == 1
    assert str(finished.path) in said[0]
    assert f"{finished.id}-1" in said[0]
    finished.begin({"method": "kd"}, {})
    finished.result_path.write_text("{")
    assert store.result(finished) is None
    assert (store.root / "quarantine" / f"{finished.id}-2").is_dir(), "nothing in quarantine is overwritten"


def test_missing_files_are_no_damage(finished: Record, store: RecordStore) -> None:
    (finished.path / "metrics.jsonl").unlink()
    assert store.result(finished) is not None


def test_a_record_that_was_copied_to_another_id_is_damaged(finished: Record, store: RecordStore) -> None:
    other = finished.path.with_name("f" * 16)
    finished.path.rename(other)
    assert store.result(Record(other)) is None


def test_what_a_killed_process_left_half_written_is_cleared(store: RecordStore) -> None:
    record = store.record("a" * 16)
    record.begin({}, {})
    (record.path / ".last.pt.123.tmp").write_bytes(b"half")
    record.begin({}, {})
    assert {path.name for path in record.path.iterdir()} == {"recipe.yaml", "env.json"}


def test_a_readonly_store_moves_nothing(finished: Record, said: list[str]) -> None:
    DAMAGES["truncated"](finished)
    store = RecordStore(finished.path.parent, said.append, readonly=True)
    assert store.result(finished) is None
    assert store.result(finished) is None
    assert finished.path.exists()
    assert len(said) == 1


def test_checkpoints(store: RecordStore, said: list[str]) -> None:
    record = store.record("a" * 16)
    assert store.checkpoint(record) is None
    record.begin({}, {})
    record.save_checkpoint({"epoch": 3, "weights": torch.ones(2)})
    state = store.checkpoint(record)
    assert state is not None
    assert state["epoch"] == 3
    path = record.path / "last.pt"
    path.write_bytes(path.read_bytes()[:-50])
    assert store.checkpoint(record) is None
    assert "last.pt" in said[0]
    assert not record.path.exists()


def test_a_checkpoint_of_another_run_or_with_objects_is_refused(store: RecordStore) -> None:
    one, other = store.record("a" * 16), store.record("b" * 16)
    for record in (one, other):
        record.begin({}, {})
    one.save_checkpoint({"epoch": 3})
    (one.path / "last.pt").rename(other.path / "last.pt")
    with pytest.raises(RecordError, match="another run"):
        other.load_checkpoint()
    torch.save({"id": one.id, "state": {"path": Path()}}, one.path / "last.pt")
    with pytest.raises(RecordError, match="cannot be read"):
        one.load_checkpoint()


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OptionError, match="cannot be written to"):
            RecordStore(place, print).check_writable()
    RecordStore(tmp_path / "new" / "deep", print).check_writable()
    assert list((tmp_path / "new" / "deep").iterdir()) == []


def test_an_environment_that_was_changed_by_hand_is_not_known(finished: Record, store: RecordStore) -> None:
    assert store.environment(finished) == {"threads": 1}
    path = finished.path / "env.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "threads": 64}))
    assert store.environment(finished) == {}
    path.write_text(json.dumps({"threads": 2}))
    assert store.environment(finished) == {"threads": 2}, "records of before have no checksum"
    path.write_text("[]")
    assert store.environment(finished) == {}

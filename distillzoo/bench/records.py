"""Records on disk: one folder a run, written atomically, checked when read, set aside when damaged."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from distillzoo.bench.yamls import dump_yaml
from distillzoo.data.packing import file_sha256
from distillzoo.errors import OptionError, RecordError

__all__ = ["Record", "RecordStore", "canonical_json", "content_id"]

ID_LENGTH = 16
REFUSED = "refused.json"
_GUARDED = ("recipe.yaml", "metrics.jsonl", "student.safetensors", "model.safetensors")


def canonical_json(value: object) -> str:
    """Write plain data as JSON in one way only: sorted keys, no spaces, whole floats as integers (4.0 and 4 are one value).

    Example:
        >>> canonical_json({"b": 4.0, "a": (1, None)})
        '{"a":[1,null],"b":4}'
    """
    return json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _canonical(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_canonical(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else value
    raise OptionError(f"A record holds plain data only (finite numbers, strings, lists, mappings); got {value!r}.")


def content_id(value: object) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of plain data in canonical form."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:ID_LENGTH]


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """Write a file under a temporary name, flush it to the disk, and rename it: a reader sees the old or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Record:
    """The folder of one run or teacher.

    Args:
        path: The folder; its name is the id.
        result_name: The file that says the run is finished.
        teacher: Digest of the weights that teach it; a checkpoint under another teacher is none of this run.
    """

    def __init__(self, path: Path, result_name: str = "result.json", teacher: str | None = None) -> None:
        self.path = path
        self.teacher = teacher
        self.result_path = path / result_name

    @property
    def id(self) -> str:
        """Id of the run."""
        return self.path.name

    def begin(self, recipe: Mapping[str, object], environment: Mapping[str, object]) -> None:
        """Make the folder and say what is run and where."""
        self.path.mkdir(parents=True, exist_ok=True)
        for left_over in self.path.glob(".*.tmp"):  # of a process that was killed while it wrote
            left_over.unlink(missing_ok=True)
        (self.path / REFUSED).unlink(missing_ok=True)  # an earlier code refused what this one trains
        self.write_text("recipe.yaml", dump_yaml(dict(recipe)))
        self.write_environment(environment)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        with atomic(self.path / name) as handle:
            handle.write(text.encode())

    def write_json(self, name: str, value: Mapping[str, object]) -> None:
        """Write a JSON file atomically."""
        self.write_text(name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def write_metrics(self, lines: Sequence[Mapping[str, object]]) -> None:
        """Write ``metrics.jsonl`` whole."""
        self.write_text("metrics.jsonl", "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Write ``last.pt``."""
        with atomic(self.path / "last.pt") as handle:
            torch.save({"id": self.id, "teacher": self.teacher, "state": dict(state)}, handle)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return the state in ``last.pt``, ``None`` where there is none.

        Raises:
            RecordError: If the file is truncated, damaged, of another run or of a student of another teacher.
        """
        self._check_folder()
        path = self.path / "last.pt"
        if not path.exists():
            return None
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # junk can raise anything in there: struct.error, AttributeError, ...
            raise RecordError(f"last.pt cannot be read ({type(error).__name__})") from error
        if not isinstance(found, dict) or found.get("id") != self.id or not isinstance(found.get("state"), dict):
            raise RecordError("last.pt belongs to another run")
        if self.teacher is not None and found.get("teacher") not in (None, self.teacher):
            raise RecordError(f"last.pt was taught by another teacher (sha256 {str(found['teacher'])[:8]}, not {self.teacher[:8]})")
        state: dict[str, Any] = found["state"]
        return state

    def _check_folder(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RecordError("it is a file where a folder should be")

    def write_environment(self, environment: Mapping[str, object]) -> None:
        """Write where and how fast the run was made, with a checksum of its own: two equal runs have equal results."""
        self.write_json("env.json", {**environment, "checksum": content_id(environment)})

    def finish(self, result: Mapping[str, object]) -> None:
        """Write the result with the digests of the other files, last of all, and drop the checkpoint."""
        digests = {name: file_sha256(self.path / name) for name in _GUARDED if (self.path / name).is_file()}
        body = {"id": self.id, **result, "files": digests}
        self.write_json(self.result_path.name, {**body, "checksum": content_id(body)})
        (self.path / "last.pt").unlink(missing_ok=True)

    def read_result(self) -> dict[str, Any] | None:
        """Return the result, ``None`` where the run is not finished.

        Raises:
            RecordError: If the file is no JSON, is of another run, or it or a file beside it was changed by hand. A file that
                is missing is no damage: committed records leave the weights out.
        """
        self._check_folder()
        if not self.result_path.exists():
            return None
        try:
            found = json.loads(self.result_path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise RecordError(f"{self.result_path.name} cannot be read ({type(error).__name__})") from error
        if not isinstance(found, dict):
            raise RecordError(f"{self.result_path.name} holds no mapping")
        body = {key: value for key, value in found.items() if key != "checksum"}
        try:
            identity, checksum = content_id(body.get("identity")), content_id(body)
        except (OptionError, RecursionError) as error:  # NaN: JSON readers take it, records never hold it
            raise RecordError(f"{self.result_path.name} holds what no record does") from error
        if body.get("id") != self.id or identity != self.id:
            raise RecordError(f"{self.result_path.name} belongs to another run")
        if found.get("checksum") != checksum:
            raise RecordError(f"{self.result_path.name} was changed after it was written")
        for name, digest in body.get("files", {}).items():
            if (self.path / name).is_file() and file_sha256(self.path / name) != digest:
                raise RecordError(f"{name} was changed after it was written")
        return body


class RecordStore:
    """A folder of records.

    Args:
        root: The folder; made when something is written.
        say: Where to name a record that was set aside.
        readonly: Whether damaged records stay where they are (nothing is run, so nothing is set aside).
    """

    def __init__(self, root: Path, say: Callable[[str], None], *, readonly: bool = False) -> None:
        self.root = root
        self.say = say
        self.readonly = readonly
        self._ignored: set[Path] = set()

    def check_writable(self) -> None:
        """Make the folder and write to it once.

        Raises:
            OptionError: If that fails.
        """
        probe = self.root / f".probe.{os.getpid()}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"full disks take empty files")
            probe.unlink()
        except OSError as error:
            raise OptionError(
                f"The output folder {str(self.root)!r} cannot be written to ({error.strerror}); name another with --output."
            ) from error

    def record(self, run_id: str, teacher: str | None = None) -> Record:
        """Return the record of a run, whether it exists or not.

        Args:
            run_id: Id of the run.
            teacher: Digest of the weights that teach it, where it is about to train.
        """
        return Record(self.root / run_id, teacher=teacher)

    def teacher(self, teacher_id: str) -> Record:
        """Return the record of a teacher, whether it exists or not."""
        return Record(self.root / "teachers" / teacher_id, "manifest.json")

    def result(self, record: Record) -> dict[str, Any] | None:
        """Return a finished record's result; a damaged record is set aside and counts as absent."""
        if record.path in self._ignored:
            return None
        try:
            return record.read_result()
        except RecordError as error:
            self.quarantine(record, str(error))
            return None

    def results(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the results of the runs that are finished by id, each with its environment."""
        found = ((record, self.result(record)) for record in map(self.record, ids))
        return {record.id: {**result, "environment": self.environment(record)} for record, result in found if result is not None}

    def refuse(self, run_id: str, identity: Mapping[str, object], reason: str) -> None:
        """Write down that a method cannot work on a pair: a table made from records alone says so too.

        Args:
            run_id: Id of the run.
            identity: What its id hashes.
            reason: Why.
        """
        record, body = Record(self.root / run_id, REFUSED), {"id": run_id, "identity": dict(identity), "reason": reason}
        record.path.mkdir(parents=True, exist_ok=True)
        record.write_json(REFUSED, {**body, "checksum": content_id(body)})

    def refusals(self, ids: Iterable[str]) -> dict[str, str]:
        """Return why methods cannot work on pairs by run id, where that is written down; a damaged file counts as none."""
        reasons: dict[str, str] = {}
        for run_id in ids:
            with suppress(RecordError):
                found = Record(self.root / run_id, REFUSED).read_result()
                reasons |= {} if found is None else {run_id: str(found["reason"])}
        return reasons

    @staticmethod
    def environment(record: Record) -> dict[str, Any]:
        """Return where and how fast a record was made, which decides no number; nothing where it is not known or changed by hand.

        Records from before the file had a checksum are taken as they are.
        """
        try:
            found = json.loads((record.path / "env.json").read_text(encoding="utf-8"))
            body = {key: value for key, value in found.items() if key != "checksum"}
            return body if found.get("checksum") in (None, content_id(body)) else {}
        except (OSError, ValueError, RecursionError, AttributeError, OptionError):
            return {}

    def checkpoint(self, record: Record) -> dict[str, Any] | None:
        """Return an unfinished record's state; a damaged record is set aside and counts as absent."""
        try:
            return record.load_checkpoint()
        except RecordError as error:
            self.quarantine(record, str(error))
            return None

    def quarantine(self, record: Record, reason: str) -> None:
        """Move a record to ``quarantine/`` and say so."""
        if self.readonly:
            self._ignored.add(record.path)
            self.say(f"The record {record.path} is damaged: {reason}. The next run sets it aside and makes it again.")
            return
        place = self.root / "quarantine"
        taken = {path.name for path in place.glob(f"{record.id}-*")} if place.exists() else set()
        number = next(n for n in range(1, len(taken) + 2) if f"{record.id}-{n}" not in taken)
        target = place / f"{record.id}-{number}"
        try:
            place.mkdir(parents=True, exist_ok=True)
            record.path.rename(target)
        except OSError as error:
            raise OptionError(
                f"The damaged record {str(record.path)!r} cannot be set aside ({error.strerror}); remove it by hand."
            ) from error
        self.say(f"The record {record.path} was damaged ({reason}); it now lies in {target} and is run again.")

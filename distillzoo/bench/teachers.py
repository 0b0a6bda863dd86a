"""Teachers: found in a store, imported from a file, or trained; always read back from the file before a student sees them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distillzoo.bench.environment import begun, describe_environment, ended
from distillzoo.bench.networks import count_parameters, make_network
from distillzoo.bench.plan import TeacherJob
from distillzoo.bench.progress import GroupProgress
from distillzoo.bench.recording import Exported, describe_classes, metrics_line, save_weights
from distillzoo.bench.records import Record, RecordStore
from distillzoo.bench.training import GroupTask
from distillzoo.bench.views import as_view
from distillzoo.build import build_distiller
from distillzoo.data import imagenet_rows, imagenet_wnids
from distillzoo.data.packing import file_sha256
from distillzoo.distiller import Distiller
from distillzoo.engine import MemberResult, evaluate_all
from distillzoo.errors import OptionError, RecordError
from distillzoo.models import load_weights, slice_head

__all__ = ["StoredTeacher", "TeacherStore"]

_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class StoredTeacher:
    """A teacher on disk.

    Args:
        id: Its id.
        name: Name of the network.
        path: File of its weights.
        accuracy: Top-1 of the stored weights on the evaluation images, per cent.
        parameters: Number of its parameters.
        sha256: Digest of the file of its weights: two trainings under one id are two teachers.
        sliced: Whether its head was cut out of a larger one.
        differs_from: Digest of the teacher of this id that the project keeps, where this is another one.
    """

    id: str
    name: str
    path: Path
    accuracy: float
    parameters: int
    sha256: str
    sliced: bool = False
    differs_from: str | None = None

    @classmethod
    def from_manifest(cls, record: Record, manifest: Mapping[str, Any]) -> StoredTeacher:
        """Return the teacher that a manifest tells of, whether its weights are there or not.

        Args:
            record: The teacher's folder.
            manifest: What stands in its manifest.
        """
        sliced = manifest["identity"].get("head") == "slice"
        accuracy, parameters, sha256 = (manifest[key] for key in ("accuracy", "parameters", "sha256"))
        return cls(record.id, manifest["network"], record.path / _WEIGHTS, accuracy, parameters, sha256, sliced)

    def describe(self) -> dict[str, Any]:
        """Return what a student's record says of its teacher."""
        figures = {"id": self.id, "name": self.name, "accuracy": self.accuracy, "parameters": self.parameters}
        differs = {} if self.differs_from is None else {"differs_from": self.differs_from}
        return {**figures, "sha256": self.sha256, **differs, **({"head": "slice"} if self.sliced else {})}


class TeacherStore:
    """Teachers in the output folder, and in folders that are only read (those committed with the project).

    Of a committed teacher the weights may be left out, where they are large: then its digest alone is kept, it is trained again
    where it is needed, and whether it came out the same is said and recorded.

    Args:
        store: The records of the output folder.
        committed: Folders with one folder a teacher.
    """

    def __init__(self, store: RecordStore, committed: Sequence[Path] = ()) -> None:
        self.store = store
        self.committed = tuple(committed)
        self._found: dict[str, StoredTeacher] = {}
        self._kept: dict[str, StoredTeacher] = {}  # what committed manifests tell, with weights or without
        self._damaged: set[Path] = set()

    def find(self, job: TeacherJob) -> StoredTeacher | None:
        """Return a teacher that is there and undamaged, ``None`` otherwise; a damaged one is set aside."""
        if job.id in self._found:
            return self._found[job.id]
        found = self._committed(job)
        if found is None:
            record = self.store.teacher(job.id)
            try:
                found = self._read(record, self.store.result(record))
            except RecordError as error:
                self.store.quarantine(record, str(error))
        if found is None:
            return None
        return self._found.setdefault(job.id, self._compared(found))

    def _committed(self, job: TeacherJob) -> StoredTeacher | None:
        for record in (Record(root / job.id, "manifest.json") for root in self.committed):
            if record.path in self._damaged:
                continue
            try:
                manifest = record.read_result()
                if manifest is not None:
                    self._kept.setdefault(job.id, StoredTeacher.from_manifest(record, manifest))
                if (record.path / _WEIGHTS).is_file():
                    return self._read(record, manifest)
            except RecordError as error:
                self._damaged.add(record.path)
                self.store.say(f"The teacher in {record.path} is damaged ({error}) and is not used.")
        return None

    def _compared(self, found: StoredTeacher) -> StoredTeacher:
        """Note and say that a teacher is not the one whose digest is kept."""
        kept = self._kept.get(found.id)
        if kept is None or kept.sha256 == found.sha256:
            return found
        if not self.store.readonly:
            self.store.say(
                f"The teacher {found.name} in {found.path.parent} is another one than that of {kept.path.parent}, though trained "
                f"in the same way (sha256 {found.sha256[:8]}, not {kept.sha256[:8]}): rows that the two taught are not paired."
            )
        return replace(found, differs_from=kept.sha256)

    @staticmethod
    def _read(record: Record, manifest: dict[str, Any] | None) -> StoredTeacher | None:
        if manifest is None:
            return None
        found = StoredTeacher.from_manifest(record, manifest)
        if not found.path.is_file():
            raise RecordError(f"{_WEIGHTS} is missing")
        if file_sha256(found.path) != found.sha256:
            raise RecordError(f"{_WEIGHTS} is not the file that was written")
        return found

    def describe(self, job: TeacherJob, results: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Return what is known of a teacher: what the records of its students say, else the stored one, else a kept manifest.

        With it comes the ``environment`` in which it was trained, where the project keeps the record of that: a table says the same
        whether it is made where its teacher was trained or from records that were copied.

        Args:
            job: The teacher.
            results: Results by run id.
        """
        told = (result.get("teacher") for result in results.values())
        taught: Mapping[str, Any] | None = next((teacher for teacher in told if teacher and teacher["id"] == job.id), None)
        if taught is None:
            found = self.find(job) or self._kept.get(job.id)
            taught = None if found is None else found.describe()
        return None if taught is None else {**taught, "environment": self._environment(job, taught.get("sha256"))}

    def _environment(self, job: TeacherJob, sha256: str | None) -> dict[str, Any]:
        """Return ``env.json`` of the training that made these weights; empty if it is not kept, or they were not trained here."""
        for record in () if job.imported or sha256 is None else (Record(root / job.id, "manifest.json") for root in self.committed):
            try:
                manifest = record.read_result()
            except RecordError:  # said where its weights are wanted
                continue
            if manifest is not None and manifest["sha256"] == sha256:
                return self.store.environment(record)
        return {}

    def is_kept(self, found: StoredTeacher) -> bool:
        """Return whether a teacher lies in one of the folders that are only read, and not in the output folder."""
        return found.path.parent.parent in self.committed

    def load(self, job: TeacherJob) -> nn.Module:
        """Return the stored teacher's network."""
        found = self.find(job)
        if found is None:
            raise RecordError(f"The teacher {job.name} ({job.id}) is not stored.")
        return load_weights(make_network(job.name, job.data, job.seed, "teacher"), found.path)

    def check_import(self, job: TeacherJob, *, fetch: bool = True) -> None:
        """Refuse weights that do not fit, before anything is written.

        Args:
            job: A teacher whose weights come from elsewhere.
            fetch: Whether published weights may be fetched.
        Raises:
            OptionError: If the file is of another network or another number of classes, or weights cannot be had.
        """
        if fetch or job.checkpoint is not None:
            self._imported(job)
        elif job.sliced:
            imagenet_rows(job.data.class_names)

    @staticmethod
    def _imported(job: TeacherJob) -> nn.Module:
        rows = imagenet_rows(job.data.class_names) if job.sliced else None
        width = job.data.spec.num_classes if rows is None else len(imagenet_wnids())
        try:
            network = make_network(job.name, job.data, job.seed, "teacher", num_classes=width, pretrained=job.checkpoint is None)
            if job.checkpoint is not None:
                load_weights(network, str(job.checkpoint))
        except OptionError as error:
            reason = textwrap.shorten(str(error).rstrip("."), 240, placeholder=" ...")
            other = " (--teacher-head own takes one with a head for the classes of the data)" if job.sliced else ""
            if job.checkpoint is None:
                raise OptionError(
                    f"--teacher-head slice: {reason}; give a file of a {job.name} with {width} classes with --teacher-checkpoint."
                ) from error
            raise OptionError(
                f"--teacher-checkpoint: {reason}; it must hold weights of a {job.name} with {width} classes{other}."
            ) from error
        if rows is not None:
            slice_head(network, rows, width)
        broken = [name for name, value in network.state_dict().items() if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            raise OptionError(
                f"--teacher-checkpoint: {str(job.checkpoint)!r} holds NaN or infinite values in {broken[0]!r}, weights must be "
                "finite; give a checkpoint of a training that did not diverge."
            )
        return network

    def make(self, job: TeacherJob, device: torch.device, progress: GroupProgress) -> StoredTeacher | None:
        """Import or train a teacher and store it; ``None`` if it diverged or failed.

        Args:
            job: The teacher.
            device: Where it trains.
            progress: Told of every step.
        """
        record = self.store.teacher(job.id)
        if job.id in self._kept:
            self.store.say(
                f"Of the teacher {job.name} only the digest is kept ({self._kept[job.id].path.parent}), not the weights: "
                "it is made again."
            )
        if job.imported:
            record.begin({"method": "imported", **job.identity}, describe_environment(device))
            self._finish(job, record, self._imported(job), device, {}, "float32")
            return self.find(job)

        environment: dict[str, Any] = {}

        def begin(_: str, epochs: int) -> None:
            environment.update(begun(describe_environment(device), self.store.environment(record), epochs))
            record.begin({"method": "vanilla", **job.identity}, environment)

        def finish(_: str, result: MemberResult, exported: Exported | None) -> None:
            if exported is None:
                self.store.say(f"The teacher {job.name} {result.status}: {result.message}.")
                return
            record.write_metrics([metrics_line(report) for report in result.history])
            seconds = sum(report.seconds for report in result.history)
            images = (job.data.spec.num_samples or 0) * len(result.history)
            speed = {"seconds": round(seconds, 3), "images_per_second": round(images / seconds, 1) if seconds else None}
            where = ended(describe_environment(device), environment, len(result.history))
            record.write_environment({**where, **speed})
            figures = {
                "trained_accuracy": result.last_accuracy,
                "best_accuracy": result.best_accuracy,
                "epochs": result.epochs,
            }
            self._finish(job, record, exported.network, device, figures, job.identity["storage"])

        self.task(job, device).run(self.store, begin, progress, finish)
        return self.find(job)

    def task(self, job: TeacherJob, device: torch.device) -> GroupTask:
        """Return the training of a teacher: a group of one that learns from the labels alone."""

        def build() -> dict[str, Distiller]:
            network = make_network(job.name, job.data, job.seed, "teacher")
            return {job.id: build_distiller("vanilla", network, data=job.data.spec, seed=job.seed)}

        return GroupTask(build, None, job.data, job.config, job.seed, device, {job.id: self.store.teacher(job.id)})

    @staticmethod
    def _finish(
        job: TeacherJob, record: Record, network: nn.Module, device: torch.device, figures: dict[str, Any], storage: str
    ) -> None:
        """Store the weights, read them back, and write down the accuracy of what was read."""
        save_weights(record, _WEIGHTS, network, storage)
        path = record.path / _WEIGHTS
        stored = load_weights(make_network(job.name, job.data, job.seed, "teacher"), path).to(device)
        loader = job.data.eval_loader(job.config.eval_batch_size, device=device)
        view = as_view(job.view, job.data.spec) or nn.Identity()
        stored.eval()
        accuracy, loss = evaluate_all({"it": lambda images: stored(view(images))}, loader, job.config, device)["it"]
        if not math.isfinite(loss):
            raise OptionError(
                f"The loss of the teacher {job.name} on the evaluation images is {loss}, and must be finite; give another "
                "checkpoint, or train it with a lower --teacher.lr."
            )
        record.finish(
            {
                "identity": job.identity,
                "network": job.name,
                "data": job.data.description,
                **describe_classes(job.data),
                "accuracy": accuracy,
                "loss": loss,
                "parameters": count_parameters(stored),
                "storage": storage,
                "sha256": file_sha256(path),
                **figures,
            }
        )

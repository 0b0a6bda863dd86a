"""The serial executor: train the missing teachers, then one group after the other."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from distillzoo.bench.environment import begun, describe_environment, ended
from distillzoo.bench.networks import build_members, count_parameters, make_network, make_teacher
from distillzoo.bench.plan import Group, Plan, Run, TeacherJob
from distillzoo.bench.progress import Console, GroupProgress, Meter
from distillzoo.bench.recording import Exported, describe_classes, metrics_line, save_weights
from distillzoo.bench.records import RecordStore, content_id
from distillzoo.bench.teachers import TeacherStore
from distillzoo.bench.training import forward_cost, student_task
from distillzoo.bench.views import view_spec
from distillzoo.data import DataSet
from distillzoo.engine import MemberResult, TrainConfig
from distillzoo.errors import DistillZooError, OptionError, UnsupportedPairError
from distillzoo.types import DataSpec

__all__ = ["SerialRunner", "check_groups"]

_LOG = logging.getLogger(__name__)
_BACKWARD = 2.0  # a backward pass costs about two forward passes


def check_groups(groups: Iterable[Group], *, lenient: bool) -> tuple[list[Group], dict[str, str]]:
    """Build every member once, before anything is trained or written.

    Args:
        groups: What is to be trained.
        lenient: Whether a method that cannot work on a pair is left out; otherwise that is an error.
    Returns:
        The groups without what was left out, and the reasons by run id.
    Raises:
        DistillZooError: If a model, option, weight or tap is wrong.
    """
    kept: list[Group] = []
    reasons: dict[str, str] = {}
    checked: dict[tuple[Any, ...], str | None] = {}
    for group in groups:
        runs = []
        for run in group.runs:
            key = (str(group.pair), id(group.data), run.row.name, repr(run.row.point))
            if key not in checked:
                checked[key] = _problem(group, run, lenient)
            reason = checked[key]
            if reason is None:
                runs.append(run)
            else:
                reasons[run.id] = reason
        if runs:
            kept.append(replace(group, runs=tuple(runs)))
    return kept, reasons


def _problem(group: Group, run: Run, lenient: bool) -> str | None:
    teacher = None
    if run.teacher is not None:
        teacher = make_teacher(group, make_network(group.pair.teacher, group.data, 0, "teacher"))
    try:
        build_members(replace(group, runs=(run,)), teacher)
    except UnsupportedPairError as error:
        if not lenient:
            raise
        return str(error)
    except TypeError as error:  # an option of a type that the method's own checks cannot even compare
        options = run.row.settings(group.pair)[0]
        listed = ", ".join(f"{name} = {value!r}" for name, value in options.items())
        raise OptionError(f"The method {run.row.method!r} cannot work with {listed}; give values like the defaults.") from error
    return None


class SerialRunner:
    """Runs what a plan lacks, one group after the other, in this process.

    Args:
        plan: The plan.
        store: Where records are kept.
        teachers: Where teachers are kept.
        device: Where to train.
        console: What the user sees.
        deadline: When to stop, in seconds of the monotonic clock: at the end of the epoch that is under way then.
    """

    def __init__(
        self,
        plan: Plan,
        store: RecordStore,
        teachers: TeacherStore,
        device: torch.device,
        console: Console,
        deadline: float = math.inf,
    ) -> None:
        self.plan = plan
        self.store = store
        self.teachers = teachers
        self.device = device
        self.console = console
        self.deadline = deadline
        self.failed = False
        self._started = time.monotonic()

    def run(self, groups: list[Group]) -> bool:
        """Train the groups; returns whether everything went well. What failed is said.

        Raises:
            TimeIsUp: When the deadline is over.
        """
        jobs = {group.teacher.id: group.teacher for group in groups if group.teacher is not None}
        stored = {job.id: self.teachers.find(job) for job in jobs.values()}
        for found in filter(None, stored.values()):
            if self.teachers.is_kept(found):
                self.console.say(f"Teacher {found.name}: {found.accuracy:.2f} %, the one kept in {found.path.parent}.")
        missing = [job for job in jobs.values() if stored[job.id] is None]
        costs = _Costs()
        total = sum(costs.teacher(job) for job in missing) + sum(costs.group(group) for group in groups)
        meter = Meter(self.console, total, self.deadline)
        try:
            for job in missing:
                self._make_teacher(job, costs, meter)
            for group in groups:
                self._run_group(group, costs, meter)
        finally:
            meter.close()
        return not self.failed

    def _make_teacher(self, job: TeacherJob, costs: _Costs, meter: Meter) -> None:
        progress = GroupProgress(meter, f"teacher {job.name}", 0.0, costs.teacher_step(job))
        try:
            found = self.teachers.make(job, self.device, progress)
        except Exception as error:  # the groups of other teachers go on
            _LOG.error("teacher %s", job.id, exc_info=not isinstance(error, DistillZooError | OSError))
            self._failed(f"The teacher {job.name} could not be made ({type(error).__name__}: {error})")
            return
        if found is None:
            self._failed(f"The teacher {job.name} did not train to its end, so its students are left out")
        else:
            self.console.say(f"Teacher {found.name} ({found.id}): {found.accuracy:.2f} % on {job.data.description}.")

    def _failed(self, sentence: str) -> None:
        self.failed = True
        self.console.warn(f"{sentence}.")

    def _run_group(self, group: Group, costs: _Costs, meter: Meter) -> None:
        runs = tuple(run for run in group.runs if run.teacher is None or self.teachers.find(run.teacher) is not None)
        if not runs:
            return
        group = replace(group, runs=runs)
        label = f"{group.pair} seed {group.seed}, {len(runs)} method{'s' if len(runs) > 1 else ''}"
        try:
            self._train(group, label, costs, meter)
        except Exception as error:  # whatever went wrong in it, the other groups go on
            _LOG.error("group %s", label, exc_info=not isinstance(error, DistillZooError | OSError))
            self._failed(f"The group {label} failed ({type(error).__name__}: {error}); the other records stand")

    def _train(self, group: Group, label: str, costs: _Costs, meter: Meter) -> None:
        teacher, stored = None, None
        if group.teacher is not None:
            stored = self.teachers.find(group.teacher)
            teacher = make_teacher(group, self.teachers.load(group.teacher))
        described = None if stored is None else stored.describe()
        runs = {run.id: run for run in group.runs}
        taught = {run_id: stored.sha256 for run_id, run in runs.items() if stored is not None and run.teacher is not None}
        records = {run_id: self.store.record(run_id, taught.get(run_id)) for run_id in runs}

        together = {"group": content_id(sorted(runs))}
        environments: dict[str, dict[str, Any]] = {}

        def begin(run_id: str, epochs: int) -> None:
            run, record = runs[run_id], records[run_id]
            environment = {**describe_environment(self.device), **together}
            environments[run_id] = begun(environment, self.store.environment(record), epochs)
            record.begin({"method": run.row.method, **run.identity}, environments[run_id])

        def finish(run_id: str, result: MemberResult, student: Exported | None) -> None:
            environment = {**describe_environment(self.device), **together}
            where = ended(environment, environments[run_id], len(result.history))
            self._finish(runs[run_id], result, student, described, where)

        task = student_task(group, teacher, self.device, records)
        self._started = time.monotonic()
        progress = GroupProgress(meter, label, costs.shared(group), costs.member(group))
        results = task.run(self.store, begin, progress, finish)
        last = {runs[run_id].row.label: result.last_accuracy for run_id, result in results.items()}
        figures = [f"{title} {accuracy:.2f}" for title, accuracy in last.items() if accuracy is not None]
        self.console.say(f"{group.pair} seed {group.seed}: {', '.join(figures) or 'no run came to its end'}.")

    def _finish(
        self, run: Run, result: MemberResult, student: Exported | None, teacher: dict[str, Any] | None, where: dict[str, Any]
    ) -> None:
        record = self.store.record(run.id)
        if result.status == "failed":  # not a result: memory ran out, say; the next call tries again
            self._failed(f"{run.row.label} on {run.pair}, seed {run.seed}, failed: {result.message}")
            return
        record.write_metrics([metrics_line(report) for report in result.history])
        seconds = sum(report.seconds for report in result.history)
        images = (run.data.spec.num_samples or 0) * len(result.history)
        record.write_environment(
            {
                **where,
                "group_seconds": round(seconds, 3),
                "group_size": max((report.group_size for report in result.history), default=0),
                "wall_seconds_of_last_call": round(time.monotonic() - self._started, 3),
                "group_images_per_second": round(images / seconds, 1) if seconds else None,
            },
        )
        if student is not None:
            save_weights(record, "student.safetensors", student.network)
        else:
            self._failed(f"{run.row.label} on {run.pair}, seed {run.seed}, {result.status}: {result.message}")
        record.finish(
            {
                "identity": run.identity,
                "status": result.status,
                "message": result.message,
                "last_accuracy": result.last_accuracy,
                "best_accuracy": result.best_accuracy,
                "best_epoch": result.best_epoch,
                "exported_accuracy": None if student is None else student.accuracy,
                "last_loss": result.last_loss,
                "epochs": result.epochs,
                "parameters": None if student is None else count_parameters(student.network),
                "teacher": teacher if run.teacher is not None else None,
                "data": run.data.description,
                "data_options": run.data_options,
                **describe_classes(run.data),
            }
        )


class _Costs:
    """Estimated seconds of the parts of a plan, for the bar."""

    def __init__(self) -> None:
        self._forward: dict[tuple[str, int, tuple[int, int], int], float] = {}

    def forward(self, name: str, data: DataSet, config: TrainConfig, seen: DataSpec | None = None) -> float:
        seen = seen or data.spec
        key = (name, id(data), seen.input_size, config.batch_size)
        if key not in self._forward:
            self._forward[key] = forward_cost(make_network(name, data, 0, "student"), seen, config.batch_size)
        return self._forward[key]

    @staticmethod
    def steps(data: DataSet, config: TrainConfig) -> int:
        return -(-(data.spec.num_samples or 1) // config.batch_size) * config.epochs

    def teacher_step(self, job: TeacherJob) -> float:
        if job.imported:  # it takes no step, and need not run on images of this size
            return 0.0
        return self.forward(job.name, job.data, job.config) * (1 + _BACKWARD)

    def teacher(self, job: TeacherJob) -> float:
        return self.steps(job.data, job.config) * self.teacher_step(job)

    def shared(self, group: Group) -> float:
        if group.teacher is None:
            return 0.0
        return self.forward(group.pair.teacher, group.data, group.config, view_spec(group.teacher.view, group.data.spec))

    def member(self, group: Group) -> float:
        return self.forward(group.pair.student, group.data, group.config) * (1 + _BACKWARD)

    def group(self, group: Group) -> float:
        return self.steps(group.data, group.config) * (self.shared(group) + len(group.runs) * self.member(group))

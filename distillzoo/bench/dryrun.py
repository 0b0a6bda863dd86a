"""What a plan will cost, measured before it is spent: a few real steps of every kind of group."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from distillzoo.bench.costs import Cost, EnoughError, count_flops, extrapolated
from distillzoo.bench.networks import make_network, make_teacher
from distillzoo.bench.plan import Group, Plan
from distillzoo.bench.render import as_text
from distillzoo.bench.teachers import TeacherStore
from distillzoo.bench.training import GroupTask, student_task
from distillzoo.engine import EpochReport, Observer, StepReport, Trainer, evaluate_all
from distillzoo.errors import DistillZooError
from distillzoo.types import Batch, DataSpec, Loader, Phase

__all__ = ["estimate", "measure"]

_WARM_UP, _STEPS, _EVAL_BATCHES = 2, 10, 3
_MOST_FLOPS = 2e12  # of a step that a CPU is asked for: some minute's work of a core, and memory to match
_PATIENCE = 10.0  # seconds; whoever takes longer is measured over fewer steps, after the first


class _Clock(Observer):
    """Stops a trainer after a few steps and keeps what one took.

    An accelerator runs behind the host, so the clock waits for it where its readings count: a step's own end says when it was sent.

    Attributes:
        wait: Returns once the device has done what it was sent.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.start = time.perf_counter()
        self.step_seconds = 0.0
        self.wait: Callable[[], None] = lambda: None

    def on_step(self, report: StepReport) -> None:  # noqa: ARG002 - the interface of an observer
        if len(self.times) in (0, _WARM_UP, _WARM_UP + _STEPS):
            self.wait()
        self.times.append(time.perf_counter())
        if len(self.times) > 1 and self.times[-1] - self.start > _PATIENCE:
            self.wait()
            self.times[-1] = time.perf_counter()
        elif len(self.times) <= _WARM_UP + _STEPS:
            return
        first = _WARM_UP if len(self.times) > _WARM_UP + 1 else 0
        self.step_seconds = (self.times[-1] - self.times[first]) / (len(self.times) - 1 - first)
        raise EnoughError

    def on_epoch(self, report: EpochReport) -> None:  # an epoch shorter than the measurement
        self.step_seconds = report.seconds / max(1, len(self.times))
        raise EnoughError


class _FirstBatch:
    """The first batch of a loader, as a loader."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    @property
    def spec(self) -> DataSpec:
        return self._loader.spec

    def __len__(self) -> int:
        return 1

    def epoch(self, epoch: int, *, phase: str = "main", second_view: bool = False) -> Iterable[Batch]:
        return itertools.islice(self._loader.epoch(epoch, phase=phase, second_view=second_view), 1)


def measure(task: GroupTask) -> Cost:
    """Count a step's arithmetic, and measure it; on a CPU, one that is too large is told from small batches.

    Args:
        task: The group; it writes nothing.
    """
    flops = count_flops(task)
    if task.device.type == "cpu" and flops > _MOST_FLOPS:
        return replace(extrapolated(task, _measure), flops=flops)
    return replace(_measure(task), flops=flops)


def _first_epochs(phases: Sequence[Phase], epochs: int) -> int:
    """Epochs before the main phase; a phase that does not say takes those of the recipe."""
    return sum(epochs if phase.epochs is None else phase.epochs for phase in phases[:-1])


def _measure(task: GroupTask) -> Cost:
    """Run up to ten real steps of a group's main phase and a few batches of its evaluation, and extrapolate."""
    clock = _Clock()
    _reset_peak(task.device)
    trainer = task.trainer(clock)
    clock.wait = partial(_wait, trainer)
    epochs = task.config.epochs
    first_epochs = [_first_epochs(member.phases, epochs) for member in trainer.members.values()]
    for member in trainer.members.values():
        while member.phase_number < len(member.phases) - 1:
            member.finish_phase()
    with contextlib.suppress(EnoughError):
        trainer.run()
    faults = {name: member.message for name, member in trainer.members.items() if member.status in ("failed", "diverged")}
    if faults:
        return Cost(0, 0.0, 0.0, _peak(task.device), faults=faults)
    batch_seconds = _evaluation_seconds(trainer, task)
    memory = _peak(task.device)
    steps = len(trainer.train)
    alone = clock.step_seconds / len(trainer.members)
    evaluation = epochs * len(trainer.evaluation) * batch_seconds
    seconds = epochs * steps * clock.step_seconds + evaluation + sum(first_epochs) * steps * alone
    return Cost(steps * (epochs + max(first_epochs)), clock.step_seconds, seconds / 60, memory, evaluation / 60)


def _wait(trainer: Trainer) -> None:
    """Wait for the device: read one value of every member to the host, which takes until it is there, on any device."""
    for member in trainer.members.values():
        weight = next(member.distiller.parameters())
        weight[(0,) * weight.ndim].item()


def _evaluation_seconds(trainer: Trainer, task: GroupTask) -> float:
    """Measure a batch of the evaluation of all members."""
    for member in trainer.members.values():
        member.distiller.eval()
    predict = {name: member.predict for name, member in trainer.members.items()}
    _wait(trainer)
    start = time.perf_counter()
    batches = 0
    while batches < _EVAL_BATCHES and (not batches or time.perf_counter() - start < _PATIENCE):
        evaluate_all(predict, _FirstBatch(trainer.evaluation), task.config, task.device)
        batches += 1
    return (time.perf_counter() - start) / batches


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: what is free, but kept, would hide what the next group takes
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the process's peak so far


def _peak(device: torch.device) -> float:
    """Return the peak memory in MiB since it was reset; where it cannot be reset, since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:", 1)[1].split()[0]) / 1024
    except (OSError, IndexError, ValueError):
        scale = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def estimate(
    plan: Plan, groups: Sequence[Group], teachers: TeacherStore, device: torch.device, say: Callable[[str], None]
) -> tuple[str, bool]:
    """Return a table of what every missing teacher and every group will cost on this machine, and whether all could be measured.

    Args:
        plan: The plan.
        groups: What is left to run of it.
        teachers: Which teachers are there.
        device: Where it would run.
        say: Told what is being measured.
    """
    of_teachers, teacher_problems = _teacher_costs(groups, teachers, device, say)
    of_groups, group_problems = _group_costs(groups, device, say)
    costs, problems = of_teachers + of_groups, teacher_problems | group_problems
    table = as_text(
        ["group", "members", "steps", "ms/step", "minutes", "peak MiB", "TFLOP/step", "hours"], [_line(each) for each in costs]
    )
    data = "".join(f"\n{text}." for text in dict.fromkeys(group.data.description for group in groups))
    failed = "".join(f"\n{sentence}" for sentence in problems)
    return f"{table}\n\n{_sum_up(plan, groups, [each.cost for each in costs], device)}{data}{failed}", not problems


class _Entry(NamedTuple):
    """One line of the table: what is trained, how many members at once, and what it costs."""

    name: str
    size: int
    cost: Cost


def _teacher_costs(
    groups: Sequence[Group], teachers: TeacherStore, device: torch.device, say: Callable[[str], None]
) -> tuple[list[_Entry], dict[str, None]]:
    """Measure every teacher that is to be trained; also what could not be measured, in sentences."""
    entries: list[_Entry] = []
    problems: dict[str, None] = {}
    jobs = {group.teacher.id: group.teacher for group in groups if group.teacher is not None}
    for job in jobs.values():
        if job.imported or teachers.find(job) is not None:
            continue
        say(f"Measuring teacher {job.name} ...")
        entries.append(_Entry(f"teacher {job.name}", 1, _guarded(partial(measure, teachers.task(job, device)))))
        problems |= _explained(entries[-1].name, entries[-1].cost, {})
    return entries, problems


def _group_costs(groups: Sequence[Group], device: torch.device, say: Callable[[str], None]) -> tuple[list[_Entry], dict[str, None]]:
    """Measure every group, those that differ in their seed alone once; also what could not be measured, in sentences."""
    entries: list[_Entry] = []
    problems: dict[str, None] = {}
    measured: dict[str, Cost] = {}
    for group in groups:
        rows = [(run.row.name, run.row.point) for run in group.runs]
        key = repr((group.pair, group.config, id(group.data), rows))
        if key not in measured:
            say(f"Measuring {group.pair}, {len(group.runs)} members ...")
            measured[key] = _guarded(partial(_group_cost, group, device))
            problems |= _explained(str(group.pair), measured[key], {run.id: run.row.label for run in group.runs})
            if not measured[key].faults:  # it may be half an hour until the last one is measured
                say(f"... {1000 * measured[key].step_seconds:.1f} ms/step, {measured[key].minutes / 60:.2f} hours a seed.")
        entries.append(_Entry(f"{group.pair} seed {group.seed}", len(group.runs), measured[key]))
    return entries, problems


def _line(entry: _Entry) -> list[str]:
    cost = entry.cost
    if cost.faults:
        return [entry.name, str(entry.size), *["-"] * 4, f"{cost.flops / 1e12:.3g}" if cost.flops else "-", "failed"]
    return [
        entry.name,
        str(entry.size),
        str(cost.steps),
        f"{1000 * cost.step_seconds:.1f}",
        f"{cost.minutes:.1f}",
        f"{cost.memory:.0f}",
        f"{cost.flops / 1e12:.3g}",
        f"{cost.minutes / 60:.2f}",
    ]


def _sum_up(plan: Plan, groups: Sequence[Group], costs: Sequence[Cost], device: torch.device) -> str:
    """Say what all of it takes, for how many cells, and how it was measured."""
    minutes = sum(cost.minutes for cost in costs)
    left = {run.id for group in groups for run in group.runs}
    cells = {(cell.pair, cell.row.label) for cell in plan.cells if cell.run.id in left}
    where = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    said = (
        f"In all {minutes:.1f} minutes ({minutes / 60:.2f} hours) for {len(cells)} cells of {len(left)} runs on {where}, measured "
        f"over at most {_STEPS} steps of every kind of group; nothing was written."
    )
    tried = sorted({size for cost in costs for size in cost.tried})
    if tried:
        said += f" Steps above {_MOST_FLOPS / 1e12:g} TFLOP: time and memory are told from batches of {tried[0]} and {tried[1]}."
    return said


def _guarded(action: Callable[[], Cost]) -> Cost:
    """Measure; what goes wrong is part of the answer, and the other groups are measured all the same."""
    try:
        return action()
    except DistillZooError:
        raise
    except Exception as error:
        return Cost(0, 0.0, 0.0, 0.0, faults={"": f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"})


def _explained(name: str, cost: Cost, labels: Mapping[str, str]) -> dict[str, None]:
    """Return a sentence for each thing that went wrong, as keys."""
    texts = {f"{labels[member]}: {text}" if member in labels else text: None for member, text in cost.faults.items()}
    advice = "it is left out of the sum; if memory ran out, take a smaller --student.batch_size or fewer --methods"
    return {f"{name} could not be measured ({text.rstrip('.')}); {advice}.": None for text in texts}


def _group_cost(group: Group, device: torch.device) -> Cost:
    teacher = None
    if group.teacher is not None:  # untrained: it costs the same
        teacher = make_teacher(group, make_network(group.pair.teacher, group.data, 0, "teacher"))
    return measure(student_task(group, teacher, device, {}))

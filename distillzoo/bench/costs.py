"""What a group of runs costs: arithmetic counted, and time and memory of a batch that is too large to be tried here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from distillzoo.bench.training import GroupTask
from distillzoo.engine import Observer, StepReport

__all__ = ["Cost", "EnoughError", "count_flops", "extrapolated", "with_batch"]

_COUNTED = 2  # images in the batch whose arithmetic is counted
_TRIED = (4, 8)  # images in the batches that stand for a larger one


class EnoughError(BaseException):
    """Ends a measurement; no ``except Exception`` on the way may take it for a failure."""


@dataclass(frozen=True)
class Cost:
    """What a group costs from its beginning to its end.

    Args:
        steps: Optimiser steps of every member, first phases included.
        step_seconds: Seconds of a step of the whole group.
        minutes: Predicted minutes with evaluation.
        memory: Peak memory of the process (CPU) or of the device, in MiB.
        evaluation_minutes: Those of the minutes that evaluation takes.
        flops: Floating-point operations of a step of the whole group, two for a multiplication with its addition.
        tried: Batch sizes that were tried in place of the group's own; empty where its own was measured.
        faults: What went wrong, by name of the member, ``""`` for all of them: memory ran out, say. The rest then means nothing.
    """

    steps: int
    step_seconds: float
    minutes: float
    memory: float
    evaluation_minutes: float = 0.0
    flops: float = 0.0
    tried: tuple[int, ...] = ()
    faults: Mapping[str, str] = field(default_factory=dict)


class _OneStep(Observer):
    """Ends a training after its first step."""

    def on_step(self, report: StepReport) -> None:  # noqa: ARG002 - the interface of an observer
        raise EnoughError


def with_batch(task: GroupTask, size: int) -> GroupTask:
    """Return a group that trains and evaluates with another batch size.

    Args:
        task: The group.
        size: Images in a batch.
    """
    return replace(task, config=replace(task.config, batch_size=size, eval_batch_size=size))


def count_flops(task: GroupTask) -> float:
    """Count the floating-point operations of a step of a group: forward, backward and the teacher's pass, on a small batch.

    Args:
        task: The group; it writes nothing.
    Returns:
        Operations at the group's own batch size; those of layers without weights, norms and optimiser are not counted.
    """
    size = min(_COUNTED, task.config.batch_size)
    trainer = with_batch(task, size).trainer(_OneStep())
    for member in trainer.members.values():
        while member.phase_number < len(member.phases) - 1:
            member.finish_phase()
    counting = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops})
    with counting as counter, contextlib.suppress(EnoughError):
        trainer.run()
    return float(counter.get_total_flops()) * task.config.batch_size / size


def _convolution_backward_flops(output: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, **_: Any) -> int:
    """Count a convolution's backward pass: once the forward pass for each gradient that is asked for.

    torch's own count takes the weight's gradient of a grouped convolution for that of a whole one.
    """
    transposed, wanted = bool(rest[4]), rest[7]
    return sum(map(bool, wanted[:2])) * int(conv_flop_count(list(x), list(weight), list(output), transposed=transposed))


def extrapolated(task: GroupTask, measure: Callable[[GroupTask], Cost]) -> Cost:
    """Measure two small batches and tell from them what the group's own costs: time and memory are straight lines in its size.

    Args:
        task: The group; it writes nothing.
        measure: Measures a group as it is.
    """
    small, large = _TRIED
    low, high = (measure(with_batch(task, size)) for size in _TRIED)
    if low.faults or high.faults:
        return replace(high, faults=low.faults or high.faults)
    size = task.config.batch_size
    # what does not grow with the batch is neither negative nor more than the small one took: clocks are noisy
    fixed = (large * low.step_seconds - small * high.step_seconds) / (large - small)
    fixed = min(max(fixed, 0.0), low.step_seconds, high.step_seconds)
    step_seconds = fixed + (high.step_seconds - fixed) * size / large
    training = high.minutes - high.evaluation_minutes
    faster = (step_seconds / size) / (high.step_seconds / large) if high.step_seconds else 1.0
    memory = high.memory + max(high.memory - low.memory, 0.0) * (size - large) / (large - small)
    steps = round(high.steps / -(-_samples(task) // large) * -(-_samples(task) // size))
    return Cost(steps, step_seconds, training * faster + high.evaluation_minutes, memory, high.evaluation_minutes, tried=_TRIED)


def _samples(task: GroupTask) -> int:
    return task.data.spec.num_samples or 1

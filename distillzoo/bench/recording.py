"""Watches a trainer and writes what it tells: metrics and checkpoints at epoch ends, the result at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from distillzoo.bench.progress import TimeIsUp
from distillzoo.bench.records import Record, atomic
from distillzoo.data import DataSet
from distillzoo.engine import EpochReport, MemberResult, Observer, StepReport, Trainer, evaluate

__all__ = ["Exported", "GroupRecorder", "describe_classes", "metrics_line", "save_weights"]

_SAVE_SECONDS = 20.0  # between two checkpoints of a group: epochs of digits take less than a second


@dataclass(frozen=True)
class Exported:
    """What a member hands over at its end.

    Args:
        network: The plain student.
        accuracy: Its own top-1 in per cent on the evaluation images: branches that were folded away may round otherwise.
    """

    network: nn.Module
    accuracy: float


Finish = Callable[[str, MemberResult, Exported | None], None]


def describe_classes(data: DataSet) -> dict[str, Any]:
    """Return which classes a data set chose and in which order, where it chose some: what the logits of its networks mean.

    Args:
        data: The data set.
    """
    chosen = getattr(data, "class_list", None)
    return {} if chosen is None else {"class_list": chosen.describe()}


class GroupRecorder(Observer):
    """Keeps the records of a group while it trains.

    Args:
        records: The record of every member.
        advance: Told of every step, for the progress bar.
        finish: Writes a member's result: its name, how it ended, and what it exports if it trained to the end.
        time_is_up: Whether training is to stop at the end of the epoch.
    """

    def __init__(
        self,
        records: Mapping[str, Record],
        advance: Callable[[StepReport], None],
        finish: Finish,
        time_is_up: Callable[[], bool],
    ) -> None:
        self.records = records
        self.trainer: Trainer | None = None
        self._advance = advance
        self._finish = finish
        self._time_is_up = time_is_up
        self._saved = time.monotonic()
        self._saving: bool | None = None  # whether this epoch's members are saved: one answer for all of them
        self._stopping: bool | None = None  # whether time was up at the end of the last epoch; not known before the first one

    def on_step(self, report: StepReport) -> None:
        """Move the bar.

        Raises:
            TimeIsUp: With the first step after an epoch whose end was too late, all of whose members are saved.
        """
        if report.step == 1 and (self._time_is_up() if self._stopping is None else self._stopping):
            raise TimeIsUp
        self._saving = None
        self._advance(report)

    def on_epoch(self, report: EpochReport) -> None:
        """Write the member's checkpoint, unless the group's were written a moment ago and there is time for more epochs."""
        if self.trainer is None:
            return
        if self._saving is None:
            self._stopping = self._time_is_up()
            self._saving = self._stopping or time.monotonic() - self._saved >= _SAVE_SECONDS
        if not self._saving:
            return
        record = self.records[report.member]
        state = self.trainer.state(report.member)
        record.write_metrics([metrics_line(line) for line in self.trainer.members[report.member].history])
        record.save_checkpoint(state)
        self._saved = time.monotonic()

    def on_end(self, member: str, result: MemberResult) -> None:
        """Write the member's result."""
        exported = None
        if result.status == "done" and self.trainer is not None:
            student, trainer = self.trainer.members[member].export_student(), self.trainer
            exported = Exported(student, evaluate(student, trainer.evaluation, trainer.config, trainer.device)[0])
        self._finish(member, result, exported)


def finite(value: float | None) -> float | None:
    """Return the value, ``None`` where it is not finite: JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def metrics_line(report: EpochReport) -> dict[str, Any]:
    """Return an epoch's figures as plain data, without times: two equal runs write equal lines."""
    return {
        "phase": report.phase,
        "epoch": report.epoch,
        "accuracy": finite(report.accuracy),
        "eval_loss": finite(report.eval_loss),
        "loss": finite(report.loss),
        "terms": {name: finite(value) for name, value in report.terms.items()},
        "train_accuracy": finite(report.train_accuracy),
        "lr": report.lr,
    }


def save_weights(record: Record, name: str, network: nn.Module, storage: str = "float32") -> None:
    """Write a network's weights as safetensors.

    Args:
        record: The record to write to.
        name: Name of the file.
        network: Whose weights.
        storage: ``"float16"`` halves matrices and kernels; vectors (norms, biases, statistics) stay as they are.
    """
    tensors = {key: _stored(value, storage) for key, value in network.state_dict().items()}
    with atomic(record.path / name) as handle:
        handle.write(safetensors_bytes(tensors))


def _stored(value: Tensor, storage: str) -> Tensor:
    value = value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    if storage == "float16" and value.ndim >= 2 and value.dtype == torch.float32:
        half = value.half()
        return half if bool(half.isfinite().all()) else value
    return value

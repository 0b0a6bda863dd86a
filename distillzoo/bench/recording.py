"""Watches a trainer and writes what it tells: metrics and checkpoints at epoch ends, the result at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from distillzoo.bench.records import Record, atomic
from distillzoo.data import DataSet
from distillzoo.engine import EpochReport, MemberResult, Observer, StepReport, Trainer

__all__ = ["GroupRecorder", "describe_classes", "metrics_line", "save_weights"]

_SAVE_SECONDS = 20.0  # between two checkpoints of a member: epochs of digits take less than a second

Finish = Callable[[str, MemberResult, nn.Module | None], None]


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
        finish: Writes a member's result: its name, how it ended, and the student if it trained to the end.
    """

    def __init__(self, records: Mapping[str, Record], advance: Callable[[StepReport], None], finish: Finish) -> None:
        self.records = records
        self.trainer: Trainer | None = None
        self._advance = advance
        self._finish = finish
        now = time.monotonic()
        self._saved = dict.fromkeys(records, now)

    def on_step(self, report: StepReport) -> None:
        """Move the bar."""
        self._advance(report)

    def on_epoch(self, report: EpochReport) -> None:
        """Write the member's checkpoint, unless it was written a moment ago."""
        name = report.member
        if self.trainer is None or time.monotonic() - self._saved[name] < _SAVE_SECONDS:
            return
        record = self.records[name]
        state = self.trainer.state(name)
        record.write_metrics([metrics_line(line) for line in self.trainer.members[name].history])
        record.save_checkpoint(state)
        self._saved[name] = time.monotonic()

    def on_end(self, member: str, result: MemberResult) -> None:
        """Write the member's result."""
        done = result.status == "done" and self.trainer is not None
        student = self.trainer.members[member].export_student() if done and self.trainer is not None else None
        self._finish(member, result, student)


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

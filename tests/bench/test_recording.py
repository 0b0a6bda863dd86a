"""When checkpoints are written: all members of a group at the end of the same epoch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from distillzoo.bench import recording
from distillzoo.bench.progress import TimeIsUp
from distillzoo.bench.recording import GroupRecorder
from distillzoo.engine import EpochReport, StepReport


class _Run:
    """A group of two whose epochs take a second, and the end of an epoch one more for each member."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, deadline: float) -> None:
        self.now = 0.0
        self.saved: list[tuple[str, float]] = []
        monkeypatch.setattr(recording, "time", SimpleNamespace(monotonic=lambda: self.now))
        records = {
            name: SimpleNamespace(write_metrics=lambda _: None, save_checkpoint=lambda state: self.saved.append(state["it"]))
            for name in "ab"
        }
        self.recorder = GroupRecorder(cast(Any, records), lambda _: None, lambda *_: None, lambda: self.now > deadline)
        self.recorder.trainer = cast(
            Any,
            SimpleNamespace(state=lambda name: {"it": (name, self.now)}, members=dict.fromkeys("ab", SimpleNamespace(history=[]))),
        )

    def epoch(self, number: int) -> None:
        self.recorder.on_step(StepReport("main", number, 9, 1, 1, 2))
        self.now += 1
        for name in "ab":
            self.recorder.on_epoch(EpochReport(name, "main", number, 50.0, 1.0, 1.0, {}, 50.0, 0.1, 1.0, 2))
            self.now += 1


def test_members_are_saved_together_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Run(monkeypatch, deadline=1e9)
    for number in range(16):
        run.epoch(number)
    assert run.saved == [("a", 22.0), ("b", 23.0), ("a", 43.0), ("b", 44.0)], "twenty seconds after the last, between b and a once"


def test_an_epoch_that_ends_too_late_is_saved_whole_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Run(monkeypatch, deadline=3.5)
    run.epoch(0)
    assert run.saved == []
    run.epoch(1)
    assert run.saved == [("a", 4.0), ("b", 5.0)]
    with pytest.raises(TimeIsUp):
        run.epoch(2)


def test_time_that_ends_between_two_epochs_costs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Run(monkeypatch, deadline=2.5)
    run.epoch(0)  # its end was in time for one member
    run.epoch(1)
    with pytest.raises(TimeIsUp):
        run.epoch(2)
    assert run.saved == [("a", 4.0), ("b", 5.0)]


def test_without_time_nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Run(monkeypatch, deadline=-1.0)
    with pytest.raises(TimeIsUp):
        run.epoch(0)

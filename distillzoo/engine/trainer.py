"""The one training loop: a group of distillers on the same batches, one teacher pass for all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from distillzoo.distiller import Distiller
from distillzoo.engine.config import TrainConfig
from distillzoo.engine.evaluation import autocast, evaluate_all
from distillzoo.engine.member import Member
from distillzoo.engine.reports import MemberResult, Observer, StepReport
from distillzoo.errors import OptionError
from distillzoo.taps import Teacher
from distillzoo.types import Batch, Loader, Trace

__all__ = ["Trainer"]

_LOG = logging.getLogger(__name__)
_FINITE_CHECK_STEPS = 50  # a check reads the device: often enough to stop a lost run, rare enough to cost nothing


class Trainer:
    """Train a group: members of one teacher-student pair, on the very same batches and views.

    A member's trajectory does not depend on who else is in the group: bit-equal alone, in any group, in any order. A member
    that diverges or fails is marked and stopped; the others go on.

    Args:
        members: Distillers by name; those that read a teacher were built on ``teacher``.
        teacher: The shared teacher; ``None`` where no member needs one.
        train: Training batches.
        evaluation: Evaluation batches.
        config: How everybody is trained.
        seed: Seed of the run.
        device: Where to train; networks are moved there.
        observer: Who watches.
    Raises:
        OptionError: If there is no member, a loader is empty, or a member needs a teacher other than ``teacher``.
    """

    def __init__(
        self,
        members: Mapping[str, Distiller],
        teacher: Teacher | None,
        train: Loader,
        evaluation: Loader,
        config: TrainConfig,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        observer: Observer | None = None,
    ) -> None:
        if not members:
            raise OptionError("A group needs at least one member; got none.")
        for split, loader in {"training": train, "evaluation": evaluation}.items():
            if not len(loader):
                raise OptionError(f"The {split} loader is empty: an epoch has no batch; pass one that has images.")
        for name, distiller in members.items():
            if distiller.requires.teacher and (teacher is None or distiller.teacher_net is not teacher):
                raise OptionError(
                    f"The member {name!r} was not built on the group's teacher; pass that Teacher to build_distiller."
                )
        self.teacher = teacher
        self.train = train
        self.evaluation = evaluation
        self.config = config
        self.device = torch.device(device)
        self.observer = observer or Observer()
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        for distiller in members.values():
            distiller.to(self.device)
            distiller.to(memory_format=layout)
        if teacher is not None:
            teacher.module.to(self.device)
            teacher.module.to(memory_format=layout)
        self.members = {
            name: Member(name, distiller, config, seed=seed, steps_per_epoch=len(train), device=self.device)
            for name, distiller in members.items()
        }

    def state(self, member: str) -> dict[str, Any]:
        """Return everything that ``member`` needs to resume: tensors and plain data. Valid at the end of an epoch."""
        return self.members[member].state()

    def restore(self, member: str, state: Mapping[str, Any]) -> None:
        """Let ``member`` go on from a state; the group then starts at its earliest member and each joins at its own epoch.

        Raises:
            RecordError: If the state does not fit the member.
        """
        self.members[member].restore(state)

    def run(self) -> dict[str, MemberResult]:
        """Train every member to the end and return how each ended.

        Raises:
            Exception: What the observer raised at a member's end, once all members have had theirs.
        """
        for member in self.members.values():
            if member.step == 0:
                self._guarded(member, member.distiller.prepare, self.train)
            while member.status == "running" and member.phase_number < len(member.phases) - 1:
                self._train_phase([member])  # a first phase is a member's own affair, on views of its own
                self._guarded(member, member.finish_phase)
        self._train_phase(list(self.members.values()))
        self._finish()
        return {name: member.result() for name, member in self.members.items()}

    def _finish(self) -> None:
        """Tell how every member ended, all of them, also where the observer fails on one."""
        failures: list[Exception] = []
        for member in self.members.values():
            member.finish()
            try:
                self.observer.on_end(member.name, member.result())
            except Exception as error:  # one member's end must not cost the others theirs
                if failures:  # the first one is raised, and whoever catches it logs it
                    _LOG.error("the end of member %s failed", member.name, exc_info=True)
                failures.append(error)
        if failures:
            raise failures[0]

    def _train_phase(self, members: Sequence[Member]) -> None:
        """Train members that stand in the same phase, from the earliest epoch of any of them to its end."""
        waiting = [member for member in members if member.status == "running"]
        if not waiting:
            return
        for epoch in range(min(member.epoch for member in waiting), waiting[0].epochs):
            active = [member for member in waiting if member.status == "running" and member.epoch == epoch]
            if active:
                self._train_epoch(active, epoch)

    def _train_epoch(self, active: list[Member], epoch: int) -> None:
        start = time.perf_counter()
        phase = active[0].phase.name
        size = len(active)
        for member in active:
            member.start_epoch()
        second_view = any(member.distiller.requires.second_view for member in active)
        for number, batch in enumerate(self.train.epoch(epoch, phase=phase, second_view=second_view), 1):
            trace = self._teacher_trace(batch, active)
            for member in active:
                self._guarded(member, member.train_step, batch, trace)
            last = number == len(self.train)
            if last or number % _FINITE_CHECK_STEPS == 0:
                active = [member for member in active if member.status == "running" and member.check_finite()]
            if not active:
                return
            self.observer.on_step(StepReport(phase, epoch, active[0].epochs, number, len(self.train), len(active)))
        seconds = time.perf_counter() - start
        scores = self._evaluate(active) if phase == "main" else {}
        for member in active:
            score = scores.get(member.name)
            if member.check_evaluation(None if score is None else score[1]):
                self.observer.on_epoch(member.finish_epoch(score, seconds, size))

    def _teacher_trace(self, batch: Batch, active: Sequence[Member]) -> Trace | None:
        if self.teacher is None or not any(member.distiller.requires.teacher for member in active):
            return None
        with autocast(self.config, self.device):
            return self.teacher.trace(batch)

    def _evaluate(self, active: Sequence[Member]) -> dict[str, tuple[float, float]]:
        for member in active:
            member.distiller.eval()
        predictors = {member.name: member.predict for member in active}
        return evaluate_all(predictors, self.evaluation, self.config, self.device, lambda name, e: _failed(self.members[name], e))

    def _guarded(self, member: Member, action: Callable[..., None], *args: Any) -> None:
        """Run a member's own code; what goes wrong there ends this member, not the group."""
        if member.status != "running":
            return
        try:
            action(*args)
        except Exception as error:  # whatever it is: the traceback is logged, the others go on
            _failed(member, error)


def _failed(member: Member, error: Exception) -> None:
    """Mark a member that failed; called where the error is caught, whose traceback is logged."""
    _LOG.error("member %s failed", member.name, exc_info=True)
    member.fail("failed", f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}")

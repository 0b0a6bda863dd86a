"""Train one group with records: build, take up what was saved, run, write down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from distillzoo.bench.networks import build_members
from distillzoo.bench.plan import Group
from distillzoo.bench.progress import GroupProgress
from distillzoo.bench.recording import Finish, GroupRecorder
from distillzoo.bench.records import Record, RecordStore
from distillzoo.data import DataSet
from distillzoo.distiller import Distiller
from distillzoo.engine import MemberResult, Observer, TrainConfig, Trainer
from distillzoo.errors import RecordError
from distillzoo.taps import Teacher
from distillzoo.types import DataSpec

__all__ = ["GroupTask", "forward_cost", "student_task"]

_FLOPS_A_SECOND = 2e10  # of a small network on a CPU core or two: only the ratio to the next constant matters
_SECONDS_A_MODULE = 2e-5


def forward_cost(network: torch.nn.Module, data: DataSpec, batch_size: int) -> float:
    """Estimate the seconds of a forward pass: what the progress bar weighs steps with.

    Args:
        network: A network on the CPU; it is left in eval mode.
        data: Size and channels of its images.
        batch_size: Images in a batch.
    """
    network.eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(torch.zeros(1, data.channels, *data.input_size))
    modules = sum(not any(module.children()) for module in network.modules())
    return counter.get_total_flops() * batch_size / _FLOPS_A_SECOND + modules * _SECONDS_A_MODULE


@dataclass
class GroupTask:
    """A group that is about to train.

    Args:
        build: Builds the members anew; called again if a checkpoint turns out not to fit.
        teacher: The shared teacher.
        data: What is trained on.
        config: How.
        seed: Seed of the run.
        device: Where.
        records: The record of every member.
    """

    build: Callable[[], Mapping[str, Distiller]]
    teacher: Teacher | None
    data: DataSet
    config: TrainConfig
    seed: int
    device: torch.device
    records: Mapping[str, Record]

    def trainer(self, observer: Observer | None = None) -> Trainer:
        """Return a trainer at the very beginning."""
        layout = self.config.channels_last
        train = self.data.train_loader(self.config.batch_size, seed=self.seed, device=self.device, channels_last=layout)
        evaluation = self.data.eval_loader(self.config.eval_batch_size, device=self.device, channels_last=layout)
        return Trainer(
            self.build(), self.teacher, train, evaluation, self.config, seed=self.seed, device=self.device, observer=observer
        )

    def run(
        self, store: RecordStore, begin: Callable[[str, int], None], progress: GroupProgress, finish: Finish
    ) -> dict[str, MemberResult]:
        """Train to the end, from where the records stand.

        Args:
            store: Where damaged checkpoints are set aside.
            begin: Writes the beginning of a member's record; told its name and how many epochs earlier calls have trained.
            progress: Told of every step.
            finish: Writes a member's result.
        """
        observer = GroupRecorder(self.records, progress.step, finish, progress.time_is_up)
        trainer = self.trainer(observer)
        while not self._restored(trainer, store):
            trainer = self.trainer(observer)
        observer.trainer = trainer
        for name in self.records:
            begin(name, len(trainer.members[name].history))
        epochs = [member.epoch if member.phase.name == "main" else 0 for member in trainer.members.values()]
        progress.resumed(epochs, len(trainer.train))
        return trainer.run()

    def _restored(self, trainer: Trainer, store: RecordStore) -> bool:
        """Take up every checkpoint; False if one did not fit, was set aside, and the members must be built anew."""
        for name, record in self.records.items():
            state = store.checkpoint(record)
            if state is None:
                continue
            try:
                trainer.restore(name, state)
            except (RecordError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                store.quarantine(record, str(error) if isinstance(error, RecordError) else f"last.pt does not fit ({error})")
                return False
        return True


def student_task(group: Group, teacher: Teacher | None, device: torch.device, records: Mapping[str, Record]) -> GroupTask:
    """Return the task of a group of students on their shared teacher."""
    return GroupTask(lambda: build_members(group, teacher), teacher, group.data, group.config, group.seed, device, records)

"""What a group costs over its parts: one teacher forward and the members' own steps, timed in the same run.

    python benchmarks/perf/bench_group.py --teacher resnet20 --student resnet8 --methods vanilla,kd,fitnet,at,vid

Rounds of the trainer's own epoch alternate with rounds in which every part is timed alone, on the same batches; the ratio of the
medians says what the loop itself adds. Time nothing else meanwhile: absolute figures are of this machine at this moment.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import time
from collections.abc import Iterable

import torch

from distillzoo import Teacher, build_distiller, create_model
from distillzoo.data import load_dataset
from distillzoo.engine import TrainConfig, Trainer
from distillzoo.types import Batch, DataSpec


class FirstBatches:
    """The first batches of another loader, made beforehand: the loader's own cost is measured elsewhere."""

    def __init__(self, batches: list[Batch], spec: DataSpec) -> None:
        self.batches = batches
        self.spec = spec

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, *, phase: str = "main", second_view: bool = False) -> Iterable[Batch]:
        """Return the same batches again."""
        del epoch, phase, second_view
        return self.batches


def build(args: argparse.Namespace) -> Trainer:
    """Build the group on random 32 px images."""
    count = args.batch_size * args.batches
    data = load_dataset("synthetic", num_classes=100, size=32, num_train=max(count, 1000), num_test=100)
    batches = [batch for batch, _ in zip(data.train_loader(args.batch_size, seed=0).epoch(0), range(args.batches), strict=False)]
    teacher = Teacher(create_model(args.teacher, num_classes=100), data.spec)
    student = create_model(args.student, num_classes=100)
    members = {
        name: build_distiller(name, copy.deepcopy(student), teacher, data=data.spec, seed=0) for name in args.methods.split(",")
    }
    config = TrainConfig(epochs=1_000, batch_size=args.batch_size, channels_last=args.channels_last)
    loader = FirstBatches(batches, data.spec)
    return Trainer(members, teacher, loader, FirstBatches(batches[:1], data.spec), config, seed=0)


def time_group(trainer: Trainer) -> float:
    """Time the training part of one epoch of the group, per batch, in seconds."""
    members = list(trainer.members.values())
    trainer._train_epoch(members, members[0].epoch)
    return members[0].history[-1].seconds / len(trainer.train)


def time_parts(trainer: Trainer) -> dict[str, float]:
    """Time the teacher's forward and every member's own step on the same batches, each in a loop of its own, in seconds a batch."""
    batches = list(trainer.train.epoch(0))
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    assert trainer.teacher is not None
    for batch in batches:
        trace = trainer.teacher.trace(batch)
    seconds["teacher"] = (time.perf_counter() - start) / len(batches)
    for member in trainer.members.values():
        member.start_epoch()
        seconds[member.name] = 0.0
        for batch in batches:
            trace = trainer.teacher.trace(batch)
            start = time.perf_counter()
            member.train_step(batch, trace if member.distiller.requires.teacher else None)
            seconds[member.name] += (time.perf_counter() - start) / len(batches)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet20")
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--methods", default="vanilla,kd,fitnet,at,vid")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer = build(args)
    time_group(trainer)
    groups, parts = [], []
    for _ in range(args.rounds):
        groups.append(time_group(trainer))
        parts.append(time_parts(trainer))
    each = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    ratio = statistics.median(group / sum(part.values()) for group, part in zip(groups, parts, strict=True))
    print(json.dumps({f"{name}_ms": round(1000 * value, 1) for name, value in each.items()}))
    print(f"group {1000 * statistics.median(groups):.1f} ms a batch, sum of parts {1000 * sum(each.values()):.1f} ms")
    print(f"ratio group / sum of parts: {ratio:.3f} (median of {args.rounds} rounds)")
    print(f"peak resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()

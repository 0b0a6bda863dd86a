"""What KDiffusion costs in training and what its export costs: step time, memory, parameters, and the error of the fold.

    python benchmarks/perf/bench_kdiffusion.py                       # the two settings that have a limit, and the fold
    python benchmarks/perf/bench_kdiffusion.py --ablation --no-fold  # every row of the ablation

The floor is one teacher forward and the plain student's step (forward, cross-entropy, backward, SGD). A setting is the same teacher
forward and the distiller's step. Floor and settings alternate on one batch, and the smallest processor time of each counts; a busy
machine moves them by a tenth, so compare within a run alone. Memory is what torch's allocator hands out at the peak of a step,
with weights, gradients and momentum and without the teacher. Every setting's export must have the plain student's operations and
parameters. The fold's error is the largest difference between the export, loaded strictly into a fresh plain student, and the
branched student in eval mode, over the largest output, after ten training steps with branches in all layers.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from distillzoo import DataSpec, Distiller, Teacher, build_distiller, create_model
from distillzoo.models import MODELS
from distillzoo.types import Batch, Trace

Options = Mapping[str, Any]

LIMITED: dict[str, Options] = {"last": {}, "all": {"layers": "all"}}
SWEEPS: dict[str, Sequence[Options]] = {
    "branches": [{"branches": count} for count in (1, 2, 8)],
    "schedule": [{"schedule": name} for name in ("cosine", "ddpm")],
    "start": [{"start": "shared_noise"}],
    "noise": [{"noise": name} for name in ("student_same", "gaussian", "zero")],
    "shuffle": [{"shuffle": False}],
    "objective": [{"objective": name} for name in ("average", "teacher_forced")],
    "layers": [{"layers": name} for name in ("first", "middle", "all")],
    "guide": [{"guide": True}, {"guide": True, "guide_on": "final"}, {"guide": True, "layers": "all"}],
    "bridge": [{"bridge": "per_branch"}],
}
"""One sweep each away from the defaults, which are a row of their own."""
MOST_TIME = {"last": 1.15, "all": 1.40}
MOST_MEMORY = {"last": 1.25}
"""Limits for resnet32x4 -> shufflenetv1 at batch 64, m = 4: step over the floor, peak over the plain student's."""
FOREIGN = ("timm/resnet18", "timm/mobilenetv2_100", "timm/mobilenetv3_large_100", "torchvision/shufflenet_v2_x1_0")
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}
CLASSES = 100


class Learner:
    """A distiller with its optimiser."""

    def __init__(self, distiller: Distiller, rate: float = 0.01) -> None:
        self.distiller = distiller
        self.optimizer = torch.optim.SGD(distiller.parameters(), lr=rate, momentum=0.9)

    def step(self, batch: Batch, trace: Trace | None) -> None:
        """Do one optimiser step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.distiller(batch.images, batch.targets, teacher=trace).loss.backward()
        self.optimizer.step()

    def peak_megabytes(self, batch: Batch, trace: Trace | None) -> float:
        """Return the peak of one step: weights, momentum, and what the allocator hands out at most."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter would fall between the lines of the table
        self.optimizer.zero_grad(set_to_none=True)  # what is freed within the record must have been handed out within it
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            self.step(batch, trace)
        with TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            recorded.export_chrome_trace(str(path))
            events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
        handed_out = (int(event["args"]["Bytes"]) for event in sorted(events, key=lambda event: float(event["ts"])))
        kept = sum(2 * p.numel() * p.element_size() for p in self.distiller.parameters())
        return (kept + max(accumulate(handed_out, initial=0))) / 2**20


@dataclass
class Row:
    """One setting and what it costs."""

    name: str
    learner: Learner
    seconds: list[float] = field(default_factory=list)  # processor time of each round's step
    time: float = 0.0  # teacher and step, over the floor
    memory: float = 0.0  # peak over the plain student's
    extra: int = 0  # parameters that are trained beside the student's
    inference: bool = False  # whether the export has the plain student's operations and parameters

    @property
    def within(self) -> bool:
        """Whether what has a limit stays below it."""
        most_time, most_memory = MOST_TIME.get(self.name, float("inf")), MOST_MEMORY.get(self.name, float("inf"))
        return self.inference and self.time <= most_time and self.memory <= most_memory

    def __str__(self) -> str:
        inference = "as plain" if self.inference else "DIFFERS"
        figures = f"{100 * (self.time - 1):8.1f} % {self.memory:8.3f} {self.extra:10,d} {inference:>10s}"
        limits = [f"time {100 * (MOST_TIME[self.name] - 1):.0f} %"] if self.name in MOST_TIME else []
        limits += [f"memory {MOST_MEMORY[self.name]}"] if self.name in MOST_MEMORY else []
        text = f"  {'within' if self.within else 'OVER'}: {', '.join(limits)}" if limits else ""
        return f"{self.name:32s} {figures}{text}"


def settings(ablation: bool) -> dict[str, Options]:
    """Return the options of every row, by its name."""
    rows = dict(LIMITED)
    if ablation:
        given = [options for sweep in SWEEPS.values() for options in sweep]
        rows |= {
            " ".join(f"{name}={value}" for name, value in options.items()): options for options in given if options != rows["all"]
        }
    return rows


def processor_time(step: Any, *args: Any) -> float:
    """Time one call, in seconds of this process."""
    start = time.process_time()
    step(*args)
    return time.process_time() - start


def work(network: nn.Module, images: torch.Tensor) -> tuple[int, int]:
    """Return the operations of a forward pass, and the number of parameters."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(images)
    return int(counter.get_total_flops()), sum(parameter.numel() for parameter in network.parameters())


def measure(args: argparse.Namespace) -> tuple[float, float, list[Row]]:
    """Return the floor in seconds, the plain student's peak in MiB, and every row."""
    torch.manual_seed(0)
    data = DataSpec(CLASSES, (args.size, args.size))
    batch = Batch(torch.randn(args.batch_size, 3, args.size, args.size), torch.arange(args.batch_size) % CLASSES)
    teacher, student = (create_model(name, num_classes=CLASSES) for name in (args.teacher, args.student))
    frozen = Teacher(teacher, data)
    plain = Learner(build_distiller("vanilla", copy.deepcopy(student), data=data, seed=0))
    rows = [
        Row(name, Learner(build_distiller("kdiffusion", copy.deepcopy(student), frozen, data=data, seed=0, **options)))
        for name, options in settings(args.ablation).items()
    ]
    trace = frozen.trace(batch)  # after every row has asked for its taps
    for learner in (plain, *(row.learner for row in rows)):
        learner.step(batch, trace)
    forwards, plains = [], []
    for _ in range(args.rounds):
        forwards.append(processor_time(frozen.trace, batch))
        plains.append(processor_time(plain.step, batch, None))
        for row in rows:
            row.seconds.append(processor_time(row.learner.step, batch, trace))
    forward, floor = min(forwards), min(forwards) + min(plains)
    peak, expected = plain.peak_megabytes(batch, None), work(student, batch.images[:1])
    for row in rows:
        distiller = row.learner.distiller
        row.time = (forward + min(row.seconds)) / floor
        row.memory = row.learner.peak_megabytes(batch, trace) / peak
        row.extra = sum(parameter.numel() for parameter in distiller.parameters()) - expected[1]
        row.inference = work(distiller.export_student(), batch.images[:1]) == expected
    return floor, peak, rows


def fold_error(name: str, dtype: torch.dtype, layers: str = "all") -> float:
    """Return the fold's relative error after ten training steps on random images, at 32 pixels or, for foreign networks, 96."""
    torch.manual_seed(0)
    size, count = (96, 2) if name in FOREIGN else (32, 4)
    plain, teacher = (create_model(each, num_classes=CLASSES).to(dtype) for each in (name, "resnet8"))
    distiller = build_distiller("kdiffusion", copy.deepcopy(plain), teacher, input_size=size, seed=0, layers=layers)
    learner = Learner(distiller)
    for _ in range(10):
        learner.step(Batch(torch.randn(count, 3, size, size, dtype=dtype), torch.randint(CLASSES, (count,))), None)
    images = torch.randn(count, 3, size, size, dtype=dtype)
    with torch.no_grad():
        plain.load_state_dict(distiller.eval().export_student().state_dict(), strict=True)
        expected = distiller.predict(images)
        return float((plain.eval()(images) - expected).abs().max() / expected.abs().max())


def fold_errors(names: Sequence[str]) -> Iterator[tuple[str, dict[torch.dtype, float]]]:
    """Yield every network with the fold's error in every type."""
    for name in names:
        yield name, {dtype: fold_error(name, dtype) for dtype in TOLERANCES}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; returns 1 if something is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="shufflenetv1")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="pixels of the random images")
    parser.add_argument("--rounds", type=int, default=5, help="0 leaves step time, memory and parameters out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ablation", action="store_true", help="a row for every option")
    parser.add_argument("--fold", action=argparse.BooleanOptionalAction, default=True, help="print the fold's errors")
    parser.add_argument("--students", help="networks to fold, separated by commas; default: all of the project's and four others")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    kept = True
    if args.rounds:
        floor, peak, rows = measure(args)
        print(f"{args.teacher} -> {args.student}, batch {args.batch_size}, {args.size} pixels, float32, {args.threads} thread(s)")
        print(f"floor {1e3 * floor:.0f} ms of processor time a step, plain student's peak {peak:.0f} MiB; both are 1 below")
        print(f"{'setting':32s} {'over floor':>10s} {'memory':>8s} {'extra':>10s} {'inference':>10s}")
        for row in rows:
            print(row)
        kept = all(row.within for row in rows)
    if args.fold:
        print(f"{'fold error':32s} {'float32':>10s} {'float64':>10s}", flush=True)
        ours = [name for name in MODELS.names("*") if not name.endswith("_224")]
        for name, errors in fold_errors(args.students.split(",") if args.students else [*ours, *FOREIGN]):
            over = [str(dtype) for dtype, error in errors.items() if not error <= TOLERANCES[dtype]]
            print(f"{name:32s} {' '.join(f'{error:10.1e}' for error in errors.values())}{'  OVER' if over else ''}", flush=True)
            kept = kept and not over
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

"""What each method's loss costs beside the networks: share of the teacher + student floor, and peak extra memory.

    python benchmarks/perf/bench_losses.py --pairs resnet32x4:resnet8x4,resnet32x4:shufflenetv1 --methods all
    python -m pytest benchmarks/perf/bench_losses.py

The first prints the table and ends with 1 where a loss is over its budget; the second asserts the budgets, CRD's speed among them.

Batch 64, float32, one thread, 50,000 samples of 100 classes. The floor is one teacher forward without gradients, the student's
forward, cross-entropy, backward and SGD step. A loss is ``distill_terms``, its backward to the student's features and to the
adapters, and ``after_step``, on traces made beforehand; what a method changes inside the student's own forward is not in it.
Floor and losses alternate; the smallest processor time of the rounds counts. Memory is what torch's allocator hands out at most
in one forward and backward, gradients of parameters not among it. ``products`` is 3 x the loss's forward products over the
floor's: what a loss with convolutions of its own cannot avoid. Time nothing else meanwhile: a busy machine moves shares by a fifth.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from distillzoo import Teacher, build_distiller, create_model, list_distillers
from distillzoo.errors import DistillZooError
from distillzoo.types import Batch, DataSpec, Trace

PAIRS = (("resnet32x4", "resnet8x4"), ("resnet32x4", "shufflenetv1"))
MAP_LOSSES = ("at",)  # may cost 15 % of the floor
CONNECTOR_LOSSES = ("fitnet", "vid", "ofd", "reviewkd", "diffkd", "kdiffusion", "gpd")  # the share of their products and 25 % more
MUST, MUST_MAP, MUST_BEYOND_PRODUCTS = 0.05, 0.15, 0.25
MUST_MEGABYTES, MUST_MEGABYTES_REVIEWKD = 200.0, 400.0
SAMPLES, CLASSES, BATCH = 50_000, 100, 64


@dataclass
class Case:
    """One method on one pair, and what it costs."""

    name: str
    run: Callable[[], None]  # one forward and backward of the loss alone
    products: float  # 3 x those of its forward, over the floor's
    seconds: list[float] = field(default_factory=list)  # processor time of each round
    floor: float = 1.0  # the floor's smallest processor time
    megabytes: float = 0.0  # peak extra memory

    @property
    def share(self) -> float:
        """The loss over the floor."""
        return min(self.seconds) / self.floor

    @property
    def must(self) -> float:
        """The largest share that is accepted."""
        if self.name in CONNECTOR_LOSSES:
            return self.products + MUST_BEYOND_PRODUCTS
        return MUST_MAP if self.name in MAP_LOSSES else MUST

    @property
    def within(self) -> bool:
        """Whether time and memory stay within the budget."""
        limit = MUST_MEGABYTES_REVIEWKD if self.name == "reviewkd" else MUST_MEGABYTES
        return self.share <= self.must and self.megabytes <= limit

    def __str__(self) -> str:
        figures = (
            f"{1e3 * min(self.seconds):9.1f} ms {100 * self.share:8.2f} % {100 * self.must:8.1f} % {100 * self.products:8.1f} %"
        )
        return f"{self.name:12s} {figures} {self.megabytes:8.0f} MB{'' if self.within else '  over budget'}"


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processor_time(run: Callable[[], None]) -> float:
    """Time one call, in seconds of this process."""
    start = time.process_time()
    run()
    return time.process_time() - start


def peak_megabytes(run: Callable[[], None]) -> float:
    """Return the most that the allocator had handed out beyond what it had at the start of a call."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter would fall between the lines of the table
    run()  # gradients are allocated before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    steps = (event["args"]["Bytes"] for event in sorted(events, key=lambda event: float(event["ts"])))
    return float(max(accumulate(steps, initial=0))) / 2**20


def forward_flops(run: Callable[[], Any]) -> int:
    """Count the products of a forward pass."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def random_batch() -> tuple[DataSpec, Batch]:
    """Make a batch of noise of a data set of CIFAR-100's size."""
    generator = torch.Generator().manual_seed(0)
    data = DataSpec(CLASSES, (32, 32), num_samples=SAMPLES, targets=torch.arange(SAMPLES) % CLASSES)
    index = torch.randperm(SAMPLES, generator=generator)[:BATCH]
    images = torch.randn(2, BATCH, 3, 32, 32, generator=generator)
    return data, Batch(images[0], index % CLASSES, index, images[1])


def as_leaves(trace: Trace) -> Trace:
    """Return the trace with every tensor a leaf that wants a gradient."""
    features = {name: value.detach().requires_grad_() for name, value in trace.features.items()}
    return Trace(trace.logits.detach().requires_grad_(), features, None if trace.second is None else as_leaves(trace.second))


def make_case(name: str, student: nn.Module, teacher: nn.Module, whole: int) -> Case:
    """Build a method on a pair and cut its loss out of the step; ``whole`` is the floor's number of products."""
    data, batch = random_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distiller = build_distiller(name, student, Teacher(teacher, data), data=data, seed=0).train()
    own = as_leaves(distiller.student_net(batch.images))
    if distiller.requires.second_view and batch.second_view is not None:
        own = Trace(own.logits, own.features, as_leaves(distiller.student_net(batch.second_view)))
    other = distiller.teacher_net.trace(batch) if distiller.teacher_net is not None else None
    weights = {term: schedule.final() for term, schedule in distiller.weights.items()}

    def run() -> None:
        terms = distiller.distill_terms(own, other, batch)
        if terms:
            torch.stack([weights[term] * value for term, value in terms.items()]).sum().backward()  # type: ignore[no-untyped-call]
        distiller.after_step()

    return Case(name, run, 3 * forward_flops(lambda: distiller.distill_terms(own, other, batch)) / whole)


def make_floor(student: nn.Module, teacher: nn.Module) -> Callable[[], None]:
    """Return a step of teacher and student without distillation."""
    _, batch = random_batch()
    teacher.eval()
    optimizer = torch.optim.SGD(student.train().parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def run() -> None:
        with torch.no_grad():
            teacher(batch.images)
        loss = F.cross_entropy(student(batch.images), batch.targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return run


def measure(teacher: str, student: str, methods: Sequence[str], rounds: int) -> tuple[list[Case], dict[str, str]]:
    """Time methods on a pair against its floor: those that take the pair, and why the others refuse it."""
    cases: list[Case] = []
    refused: dict[str, str] = {}
    images = random_batch()[1].images
    floor = make_floor(network(student), network(teacher))
    whole = forward_flops(lambda: network(teacher)(images)) + 3 * forward_flops(lambda: network(student)(images))
    for name in methods:
        try:
            cases.append(make_case(name, network(student), network(teacher), whole))
        except DistillZooError as error:
            refused[name] = str(error)
    floors: list[float] = []
    with one_thread():
        for run in (floor, *(case.run for case in cases)):
            run()
        for _ in range(rounds):
            floors.append(processor_time(floor))
            for case in cases:
                case.seconds.append(processor_time(case.run))
        for case in cases:
            case.floor, case.megabytes = min(floors), peak_megabytes(case.run)
    return cases, refused


def network(name: str) -> nn.Module:
    """Make a network, the same at each call."""
    torch.manual_seed(0)
    return create_model(name, num_classes=CLASSES)


def crd_against_gathering(rounds: int) -> tuple[float, float]:
    """Return how many times faster the scores' forward and backward are than gathering, and the largest difference."""
    data, batch = random_batch()
    distiller: Any = build_distiller("crd", network("resnet8"), network("resnet8"), data=data, seed=0)
    assert batch.index is not None
    bank = distiller.teacher_bank
    drawn: Tensor = distiller.sampler.draw(distiller.stream("negatives"), 0, labels=batch.targets, index=batch.index)
    anchors = F.normalize(torch.randn(BATCH, bank.memory.shape[1]), dim=1).requires_grad_()
    weight = torch.rand(drawn.shape)

    def literal(own: Tensor) -> Tensor:  # as the authors' code: every row gathered, then one product a sample
        rows: Tensor = bank.memory[drawn.flatten()]
        return torch.bmm(rows.view(*drawn.shape, -1), own.unsqueeze(2)).squeeze(2)

    def product(own: Tensor) -> Tensor:
        scores: Tensor = bank.scores(own, drawn)
        return scores

    def timed(scores: Callable[[Tensor], Tensor]) -> float:
        return processor_time(lambda: (scores(anchors) * weight).sum().backward())  # type: ignore[no-untyped-call]

    with one_thread():
        difference = float((product(anchors) - literal(anchors)).abs().max().detach())
        slow, fast = (min(timed(scores) for _ in range(rounds)) for scores in (literal, product))
    return slow / fast, difference


# ---------------------------------------------------------------------- under pytest


@cache
def _measured(teacher: str, student: str) -> tuple[list[Case], dict[str, str]]:
    return measure(teacher, student, list_distillers(), rounds=5)


@pytest.mark.parametrize("method", list_distillers())
@pytest.mark.parametrize("pair", PAIRS, ids=":".join)
def test_loss(benchmark: Any, pair: tuple[str, str], method: str) -> None:
    """Time a loss; its share of the floor and its memory stay within the budget."""
    cases, refused = _measured(*pair)
    if method in refused:
        pytest.skip(refused[method])
    case = next(case for case in cases if case.name == method)
    with one_thread():
        benchmark.pedantic(case.run, rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(share=case.share, products=case.products, megabytes=case.megabytes)
    print(f"\n{case}")
    assert case.within


def test_crd_scores(benchmark: Any) -> None:
    """Scores by one product with the bank are at least 15 times faster than gathering, and equal to 1e-6."""
    ratio, difference = benchmark.pedantic(crd_against_gathering, args=(3,), rounds=1)
    benchmark.extra_info.update(ratio=ratio, difference=difference)
    print(f"\nCRD scores: {ratio:.1f} x faster than gathering, largest difference {difference:.1e}")
    assert ratio >= 15.0
    assert difference <= 1e-6


# ---------------------------------------------------------------------- on the command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of every pair; return 1 if a loss is over its budget, else 0."""
    parser = argparse.ArgumentParser(description="What each method's loss costs beside the networks.")
    parser.add_argument("--pairs", default=",".join(":".join(pair) for pair in PAIRS), help="teacher:student,...")
    parser.add_argument("--methods", default="all", help="names, or all")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    methods = list_distillers() if given.methods == "all" else given.methods.split(",")
    code = 0
    for pair in given.pairs.split(","):
        teacher, student = pair.split(":")
        cases, refused = measure(teacher, student, methods, given.rounds)
        floor = f"{1e3 * cases[0].floor:.0f} ms" if cases else "not measured"
        print(f"\n{teacher} -> {student}: floor {floor} (batch {BATCH}, float32, one thread)")
        print(f"{'method':12s} {'loss':>12s} {'share':>10s} {'must':>10s} {'products':>10s} {'memory':>11s}")
        for case in cases:
            print(case)
            code |= not case.within
        for name, reason in refused.items():
            print(f"{name:12s} refused: {reason}")
    ratio, difference = crd_against_gathering(given.rounds)
    print(f"\nCRD scores: {ratio:.1f} x faster than gathering, largest difference {difference:.1e}")
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Counted arithmetic, and what a batch that is too large to try is said to cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distillzoo.bench import dryrun
from distillzoo.bench.costs import Cost, EnoughError, count_flops, extrapolated, with_batch
from distillzoo.bench.networks import make_network, make_teacher
from distillzoo.bench.plan import make_plan
from distillzoo.bench.recipe import Recipe
from distillzoo.bench.rows import load_table
from distillzoo.bench.training import GroupTask, student_task
from distillzoo.data import DataSet
from distillzoo.engine import StepReport
from distillzoo.types import Phase
from tests.bench.conftest import Call


def task_of(recipe: Recipe, load: Callable[[Recipe], DataSet]) -> GroupTask:
    group = make_plan(recipe, load_table("digits"), load).groups()[0]
    teacher = make_teacher(group, make_network(group.pair.teacher, group.data, 0, "teacher"))
    return student_task(group, teacher, torch.device("cpu"), {})


def flops(action: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        action()
    return int(counter.get_total_flops())


def test_a_step_is_one_pass_of_the_teacher_and_each_members_own(tiny: Recipe, tiny_data: Callable[[Recipe], DataSet]) -> None:
    task = task_of(tiny, tiny_data)
    images = torch.zeros(12, 3, 8, 8)
    teacher, student = (make_network(name, task.data, 0, "teacher").eval() for name in ("tinycnn_32", "tinycnn_8"))
    with torch.no_grad():
        once = flops(lambda: teacher(images))
    alone = flops(lambda: student(images).sum().backward())
    assert count_flops(task) == once + 2 * alone, "vanilla and kd: two students, one pass of the teacher"
    assert count_flops(with_batch(task, 24)) == 2 * count_flops(task)


def test_the_backward_pass_of_grouped_convolutions_counts_twice_the_forward_pass(
    tiny: Recipe, tiny_data: Callable[[Recipe], DataSet]
) -> None:
    """torch's own count takes the weight's gradient of a depth-wise convolution for that of a whole one."""
    task = task_of(replace(tiny, pairs=("tinycnn_8:shufflenetv2",), methods=("vanilla",)), tiny_data)
    student = make_network("shufflenetv2", task.data, 0, "student").eval()
    images = torch.zeros(task.config.batch_size, 3, 8, 8)
    with torch.no_grad():
        once = flops(lambda: student(images))
    stem = 2 * 24 * 3 * 9 * 64 * len(images)  # the images need no gradient
    assert 2.5 * once < count_flops(task) <= 3 * once
    assert count_flops(task) == pytest.approx(3 * once - stem, rel=0.02)


def test_the_clock_waits_for_a_device_that_runs_behind_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    host, device = 0.0, 0.0
    monkeypatch.setattr(dryrun, "time", SimpleNamespace(perf_counter=lambda: host))

    def wait() -> None:
        nonlocal host
        host = max(host, device)

    clock = dryrun._Clock()
    clock.wait = wait

    def train() -> None:
        nonlocal host, device
        for number in range(100):
            host += 0.001  # to send a step
            device = max(device, host) + (5.0 if number == 0 else 0.25)  # to do it; the first one takes longer
            clock.on_step(StepReport("main", 0, 1, number + 1, 100, 1))

    with pytest.raises(EnoughError):
        train()
    assert clock.step_seconds == pytest.approx(0.25, abs=0.01)
    assert len(clock.times) == 13, "two steps and the first to warm up, ten that count"


def test_a_dry_run_reads_every_member_before_it_reads_the_clock(
    tiny: Recipe, tiny_data: Callable[[Recipe], DataSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []
    original = dryrun._wait
    monkeypatch.setattr(dryrun, "_wait", lambda trainer: (waited.append(len(trainer.members)), original(trainer))[1])
    dryrun._measure(task_of(tiny, tiny_data))
    assert waited == [2, 2], "in the first step, and before the evaluation; two steps make an epoch here"


def test_a_first_phase_of_the_recipes_length_counts_as_that() -> None:
    assert dryrun._first_epochs((Phase("a", 2), Phase("b"), Phase()), 8) == 10
    assert dryrun._first_epochs((Phase(),), 8) == 0


def test_cells_and_runs_are_counted_as_the_table_counts_them(call: Call, recipe_file: str) -> None:
    pairs = "tinycnn_32:tinycnn_8,tinycnn_8:tinycnn_8"
    arguments = ["--recipe", recipe_file, "--pairs", pairs, "--seeds", "0"]
    assert "for 4 cells of 3 runs on" in call(*arguments, "--dry-run").out, "the student alone is the same in both pairs"
    assert "0 of 4 cells are there (0 of 3 runs)." in call(*arguments, "--table-only").out


def test_straight_lines_are_told_from_two_points(tiny: Recipe, tiny_data: Callable[[Recipe], DataSet]) -> None:
    task = task_of(replace(tiny, student=replace(tiny.student, batch_size=256)), tiny_data)
    samples, epochs = 24, tiny.student.epochs

    def measure(small: GroupTask) -> Cost:
        size = small.config.batch_size
        step, evaluation = 0.5 + 0.25 * size, epochs * 12 * 0.125
        steps = epochs * -(-samples // size)
        return Cost(steps, step, (steps * step + evaluation) / 60, 100 + 10 * size, evaluation / 60)

    cost = extrapolated(task, measure)
    assert (cost.steps, cost.step_seconds, cost.memory, cost.tried) == (epochs, 64.5, 2660, (4, 8))
    images = epochs * samples
    assert cost.minutes == pytest.approx((images * 64.5 / 256 + epochs * 12 * 0.125) / 60)


@pytest.mark.parametrize("noise", [0.1, 10.0])
def test_noise_makes_nothing_negative(noise: float, tiny: Recipe, tiny_data: Callable[[Recipe], DataSet]) -> None:
    task = task_of(replace(tiny, student=replace(tiny.student, batch_size=256)), tiny_data)
    found = iter([Cost(6, 1.0, 1.0, 100.0), Cost(3, noise, 1.0, 50.0)])
    cost = extrapolated(task, lambda _: next(found))
    assert cost.step_seconds >= noise
    assert cost.memory == 50.0


def test_a_large_step_is_not_tried_on_a_cpu(
    call: Call, recipe_file: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dryrun, "_MOST_FLOPS", 1e3)
    outcome = call("--recipe", recipe_file, "--dry-run", "--seeds", "0", "--student.batch_size", "20")
    assert outcome.code == 0, outcome.err
    assert "time and memory are told from batches of 4 and 8" in outcome.out
    lines = [line.split() for line in outcome.out.splitlines()]
    assert lines[3][:5] == ["tinycnn_32:tinycnn_8", "seed", "0", "2", "6"], "3 epochs of 2 steps of up to 20 images"
    assert outcome.out.rstrip().endswith("synthetic, 24 training and 12 test images.")


@pytest.mark.parametrize("place", ["distillzoo.engine.member.Member.train_step", "distillzoo.taps.Teacher.trace"])
def test_what_cannot_be_measured_is_said(
    place: str, call: Call, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(place, full)
    outcome = call("--recipe", recipe_file, "--dry-run", "--seeds", "0,1", "--methods", "kd", "--output", str(tmp_path / "runs"))
    assert outcome.code == 1
    assert "OutOfMemoryError: CUDA out of memory" in outcome.out
    assert "it is left out of the sum; if memory ran out, take a smaller --student.batch_size" in outcome.out
    assert outcome.out.count("failed") >= 2, "both seeds"
    assert "tinycnn_32:tinycnn_8 could not be measured" in outcome.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells and forgets a process's peak")
def test_the_peak_of_a_group_is_its_own_and_not_that_of_the_one_before() -> None:
    device = torch.device("cpu")
    large = [torch.ones(1 << 18) for _ in range(400)]  # 400 pieces of a MiB
    kept = large[::40]  # the rest lies free between them
    large.clear()
    dryrun._reset_peak(device)
    before = dryrun._peak(device)
    again = [torch.ones(1 << 18) for _ in range(200)]
    assert dryrun._peak(device) - before == pytest.approx(200, abs=60)
    assert len(kept) + len(again) == 210

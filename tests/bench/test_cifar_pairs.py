"""The five pairs of the CIFAR-100 table with all twelve rows: 20 real steps each, finite, and resumed in the middle bit for bit."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from distillzoo.bench.networks import make_network, make_teacher
from distillzoo.bench.plan import Group, make_plan
from distillzoo.bench.recipe import find_recipe, load_recipe
from distillzoo.bench.rows import load_table
from distillzoo.bench.training import student_task
from distillzoo.data import DataSet, load_dataset
from distillzoo.engine import EpochReport, MemberResult, Observer, Trainer

RECIPES = {name: load_recipe(find_recipe(name, "cifar100")) for name in ("paper", "fast")}
BATCH, STEPS = 8, 10  # of each of two epochs


def few_images() -> DataSet:
    """Two epochs of them are 20 steps: of CIFAR-100 where DISTILLZOO_DATA names its folder, else generated ones."""
    root = os.environ.get("DISTILLZOO_DATA")
    data = (
        load_dataset("cifar100", root=root)
        if root
        else load_dataset("synthetic", num_classes=100, size=32, num_train=100, num_test=100)
    )
    train = replace(data.train, images=data.train.images[: BATCH * STEPS], targets=data.train.targets[: BATCH * STEPS])
    evaluation = replace(data.evaluation, images=data.evaluation.images[:16], targets=data.evaluation.targets[:16])
    spec = replace(data.spec, num_samples=BATCH * STEPS, targets=train.targets)
    return replace(data, train=train, evaluation=evaluation, spec=spec)


class Keep(Observer):
    """Keeps every member's state after the first epoch."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.states: dict[str, dict[str, Any]] = {}

    def on_epoch(self, report: EpochReport) -> None:
        if report.epoch == 0 and self.trainer is not None:
            self.states[report.member] = copy.deepcopy(self.trainer.state(report.member))  # its tensors are the ones that train on


def trainer_of(group: Group, observer: Observer) -> Trainer:
    teacher = make_teacher(group, make_network(group.pair.teacher, group.data, 0, "teacher"))
    return student_task(group, teacher, torch.device("cpu"), {}).trainer(observer)


def figures(result: MemberResult) -> tuple[object, ...]:
    return (result.status, result.last_loss, [(each.loss, dict(each.terms)) for each in result.history])


@pytest.mark.slow
@pytest.mark.parametrize("pair", RECIPES["paper"].pairs)
@pytest.mark.parametrize("name", RECIPES)
def test_twenty_steps_of_all_rows(name: str, pair: str) -> None:
    whole = RECIPES[name]
    share = BATCH / whole.student.batch_size  # so small batches at the recipe's own rate throw VID on a fresh WRN's features off
    student = replace(whole.student, epochs=2, batch_size=BATCH, lr=share * whole.student.lr)
    overrides = {model: {**values, "lr": share * values["lr"]} for model, values in whole.student_overrides.items()}
    recipe = replace(whole, pairs=(pair,), seeds=(0,), student=student, student_overrides=overrides)
    data = few_images()
    (group,) = make_plan(recipe, load_table("cifar100"), lambda _: data).groups()
    assert len(group.runs) == 12
    keep = Keep()
    keep.trainer = trainer_of(group, keep)
    unbroken = keep.trainer.run()
    titles = {run.id: run.row.title for run in group.runs}
    for run_id, result in unbroken.items():
        assert (result.status, result.message) == ("done", ""), titles[run_id]
        assert len(result.history) == 2
        for report in result.history:
            values = torch.tensor([report.loss, report.eval_loss or 0.0, *report.terms.values()])
            assert bool(values.isfinite().all()), (titles[run_id], report)
    resumed = trainer_of(group, Observer())
    for run_id, state in keep.states.items():
        resumed.restore(run_id, state)
    again = resumed.run()
    assert {titles[i]: figures(result) for i, result in again.items()} == {titles[i]: figures(r) for i, r in unbroken.items()}
    for run_id, member in resumed.members.items():
        others = keep.trainer.members[run_id].distiller.state_dict()
        for name, value in member.distiller.state_dict().items():
            assert torch.equal(value, others[name]), (titles[run_id], name)

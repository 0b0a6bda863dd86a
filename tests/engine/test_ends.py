"""How members end: whose last step ruins them, and an observer that fails on one of them."""

import math

import pytest
import torch

from distillzoo.engine import Observer, TrainConfig
from tests.engine.test_trainer import Counting, make, same, weights_of

CONFIG = TrainConfig(epochs=2, batch_size=8, lr=0.05)
STEPS = 4  # of an epoch


class Ruined(Counting):
    """Has weights that are not finite after one of its steps, whose losses were finite."""

    def __init__(self, *args, ruined_after, **kwargs):
        super().__init__(*args, **kwargs)
        self.ruined_after = ruined_after

    def after_step(self):
        if int(self.step) == self.ruined_after:
            with torch.no_grad():
                self.student.fc.weight.fill_(math.nan)


class Ends(Observer):
    def __init__(self, fails=()):
        self.fails = fails
        self.ended = {}
        self.epochs = []

    def on_epoch(self, report):
        self.epochs.append((report.member, report.epoch))

    def on_end(self, member, result):
        self.ended[member] = result
        if member in self.fails:
            raise OSError(f"no room for {member}")


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_member_whose_evaluation_is_not_finite_has_diverged(epoch):
    watch = Ends()
    methods = {"ruined": (Ruined, {"ruined_after": STEPS * (epoch + 1)}), "good": ("kd", {})}
    trainer = make(methods, CONFIG, observer=watch)
    results = trainer.run()
    assert results["ruined"].status == "diverged"
    assert (
        results["ruined"].message == f"not finite by step {STEPS * (epoch + 1)} (epoch {epoch + 1}): loss on the evaluation images"
    )
    assert (results["ruined"].last_accuracy, results["ruined"].last_loss, results["ruined"].epochs) == (None, None, epoch)
    assert watch.epochs == [(name, e) for e in range(2) for name in methods if name == "good" or e < epoch]
    assert results["good"].status == "done"
    assert list(watch.ended) == ["ruined", "good"]
    alone = make({"good": ("kd", {})}, CONFIG)
    alone.run()
    assert same(weights_of(alone, "good"), weights_of(trainer, "good"))


def test_a_state_of_before_that_ended_with_no_finite_loss_has_diverged():
    trainer = make({"kd": ("kd", {})}, CONFIG)
    trainer.run()
    state = trainer.state("kd")
    state["history"][-1]["eval_loss"] = math.nan
    again = make({"kd": ("kd", {})}, CONFIG)
    again.restore("kd", state)
    result = again.run()["kd"]
    assert (result.status, result.last_loss) == ("diverged", None)


def test_one_members_failing_end_costs_no_other_its_own():
    watch = Ends(fails=("a", "c"))
    with pytest.raises(OSError, match="no room for a"):
        make({name: ("vanilla", {}) for name in "abcd"}, CONFIG, observer=watch).run()
    assert list(watch.ended) == ["a", "b", "c", "d"]
    assert {result.status for result in watch.ended.values()} == {"done"}

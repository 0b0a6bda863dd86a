from __future__ import annotations

import math

import pytest

from distillzoo.errors import OptionError
from distillzoo.schedules import Constant, Cosine, LinearWarmup, as_schedule, describe_weight
from distillzoo.types import Progress


def at(epoch: int, step: int = 0) -> Progress:
    return Progress(epoch, 40, step, 10)


def test_a_constant_is_constant():
    assert Constant(0.9)(at(0)) == Constant(0.9)(at(39)) == Constant(0.9).final() == 0.9


def test_a_warm_up_is_the_papers_ramp_counted_from_one():
    ramp = LinearWarmup(5.0, 20)
    for epoch in range(40):
        assert ramp(at(epoch)) == pytest.approx(5.0 * min((epoch + 1) / 20, 1.0))
    assert ramp(at(0)) == 0.25
    assert ramp(at(18)) < ramp(at(19)) == ramp.final() == 5.0
    assert ramp(at(3, step=30)) == ramp(at(3, step=39))


def test_a_cosine_goes_from_start_to_end():
    fall = Cosine(1.0, 0.2, 10)
    assert fall(at(0)) == 1.0
    assert fall(at(5)) == pytest.approx(0.6)
    assert fall(at(10)) == pytest.approx(0.2)
    assert fall(at(30)) == pytest.approx(fall.final()) == pytest.approx(0.2)
    assert [fall(at(e)) for e in range(11)] == sorted([fall(at(e)) for e in range(11)], reverse=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "1", None, True, -1, -0.5])
def test_a_weight_that_is_no_finite_number_is_refused(bad):
    with pytest.raises(OptionError, match="finite number"):
        as_schedule(bad, "kd")
    with pytest.raises(OptionError, match="finite number"):
        LinearWarmup(bad, 2)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_epochs_are_whole_and_positive(bad):
    with pytest.raises(OptionError, match="epochs of a schedule"):
        Cosine(0.0, 1.0, bad)


def test_weights_are_numbers_schedules_or_mappings():
    ramp = LinearWarmup(2.0, 4)
    assert as_schedule(3) == Constant(3.0)
    assert as_schedule(ramp) is ramp
    assert as_schedule({"kind": "linear_warmup", "value": 2.0, "epochs": 4}) == ramp
    assert as_schedule({"kind": "cosine", "start": 0.0, "end": 1.0, "epochs": 4}) == Cosine(0.0, 1.0, 4)


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"kind": "linear_warmpu", "value": 1.0}, ["'crd'", "linear_warmup"]),
        ({"value": 1.0}, ["'crd'", "constant"]),
        ({"kind": "cosine", "start": 0.0}, ["'crd'", "cosine", "end"]),
        ({"kind": "constant", "value": 1.0, "epoch": 3}, ["'crd'", "constant", "epoch"]),
        ({"kind": "constant", "value": "big"}, ["finite number"]),
    ],
)
def test_a_wrong_mapping_is_a_sentence(mapping, words):
    with pytest.raises(OptionError) as caught:
        as_schedule(mapping, "crd")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("weight", [0.5, 2, LinearWarmup(2.0, 4), Cosine(0.0, 1.0, 4), Constant(3.0)])
def test_a_description_reads_back_as_the_same_weight(weight):
    assert as_schedule(describe_weight(weight)) == as_schedule(weight)


def test_a_schedule_of_ones_own_works_and_cannot_be_written_down():
    class Odd:
        def __call__(self, progress):
            return float(progress.epoch % 2)

        def final(self):
            return 1.0

    assert as_schedule(Odd())(at(3)) == 1.0
    with pytest.raises(OptionError, match="Odd"):
        describe_weight(Odd())

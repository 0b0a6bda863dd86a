"""What users bring to the battery: data, options, networks and schedules of their own; and faults that hide well."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from distillzoo.errors import OptionError
from distillzoo.schedules import Cosine
from distillzoo.taps import remove_hooks
from distillzoo.testing import CHECKS, ContractError, Subject, TinyNet, TinyTeacher, check_distiller
from distillzoo.types import DataSpec, Requires
from tests.contract.test_battery import Base

GREY = DataSpec(7, (12, 10), (0.5,), (0.25,), num_samples=14)


def fails(check, subject):
    with pytest.raises(ContractError) as caught:
        CHECKS[check](subject)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ data, options, schedules


def test_data_of_other_classes_channels_and_size():
    tried = ("check_terms", "check_gradients", "check_pairs", "check_misspelt_options")
    check_distiller(Base, data=GREY, skip={check: "knows nothing more of the data" for check in CHECKS if check not in tried})


def test_the_pair_of_the_user_and_the_odd_ones_have_the_classes_of_the_data():
    seen = []

    class Spy(Base):
        def __init__(self, student, teacher, data, *, weights=None, seed=None):
            super().__init__(student, teacher, data, weights=weights, seed=seed)
            seen.append((student.module.head.out_features, student.module.stem.conv.in_channels, data.input_size))

    def make_pair():
        return TinyNet((3, 5), num_classes=7, channels=1), TinyTeacher(num_classes=7, channels=1)

    subject = Subject(Spy, make_pair, data=GREY)
    CHECKS["check_terms"](subject)
    CHECKS["check_pairs"](subject)
    assert set(seen) == {(7, 1, (12, 10))}


class NamesAStage(Base):
    def __init__(self, student, teacher, data, *, weights=None, seed=None, stage="stage3"):
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        if stage not in student.names("stages"):
            raise OptionError(f"stage is one of {', '.join(student.names('stages'))}; got {stage!r}.")


class ForgetsATerm(Base):
    def distill_terms(self, student, teacher, batch):
        return super().distill_terms(student, teacher, batch) if len(self.student_net.names("stages")) == 3 else {}


def test_an_option_of_the_user_may_name_what_other_pairs_lack():
    CHECKS["check_pairs"](Subject(NamesAStage, options={"stage": "stage3"}))


def test_a_default_may_not_and_no_option_excuses_what_a_step_raises():
    assert "a student of fewer stages stopped it with OptionError" in fails("check_pairs", Subject(NamesAStage))
    assert "OptionError" in fails("check_pairs", Subject(ForgetsATerm, options={"bias": False}))


@dataclass(frozen=True)
class Between:
    """1 from one epoch to another, 0 before and after."""

    first: int
    last: int

    def __call__(self, progress):
        return float(self.first <= progress.epoch < self.last)

    def final(self):
        return 0.0


@pytest.mark.parametrize("weight", [Cosine(0.0, 1.0, 10), Cosine(1.0, 0.0, 10), Between(5, 50)], ids=str)
def test_a_term_that_counts_at_some_time_trains_its_adapters(weight):
    class Scheduled(Base):
        weight_presets = {"default": {"hint": weight}}

    CHECKS["check_gradients"](Subject(Scheduled))


@pytest.mark.parametrize("weight", [0.0, Between(5, 5)], ids=str)
def test_a_term_that_never_counts_does_not(weight):
    class Never(Base):
        weight_presets = {"default": {"hint": weight}}

    assert "regressor.weight" in fails("check_gradients", Subject(Never))


# ----------------------------------------------------------------------------------------------------------------- networks


def parametrized_pair():
    class Local(TinyNet):
        """A class of its own for every call, as the classes of parametrized layers are."""

    student = Local()
    parametrizations.weight_norm(student.head)
    return student, TinyTeacher()


class Unparametrized(Base):
    def export_student(self):
        exported = super().export_student()
        parametrize.remove_parametrizations(exported.head, "weight")
        return exported


class AnotherClass(Base):
    def export_student(self):
        exported = super().export_student()
        exported.head.__class__ = type("Linear", (nn.Linear,), {})
        return remove_hooks(exported)


def test_students_of_classes_that_are_made_anew_are_exported():
    CHECKS["check_export"](Subject(Base, parametrized_pair))


@pytest.mark.parametrize(("method", "make_pair"), [(Unparametrized, parametrized_pair), (AnotherClass, None)])
def test_the_classes_of_an_export_are_those_of_its_student(method, make_pair):
    assert re.search("the export's modules head.* are not the plain student's", fails("check_export", Subject(method, make_pair)))


# ------------------------------------------------------------------------------------------------------------------- writes


class CentresLogits(Base):
    def hint(self, student, teacher, batch):
        with torch.no_grad():
            student.logits.sub_(student.logits.mean(1, keepdim=True))
        return super().hint(student, teacher, batch)


class ScalesUnseen(Base):
    def hint(self, student, teacher, batch):
        student.features["pooled"].data.mul_(0.5)
        return super().hint(student, teacher, batch)


class ReplacesAFeature(Base):
    def hint(self, student, teacher, batch):
        student.features["pooled"] = student.features["pooled"] * 0.5
        return super().hint(student, teacher, batch)


class ClampsImages(Base):
    def hint(self, student, teacher, batch):
        batch.images.clamp_(-99.0, 99.0)  # changes none of the battery's
        return super().hint(student, teacher, batch)


class SmoothsTargets(Base):
    def hint(self, student, teacher, batch):
        if batch.targets.ndim == 2:
            batch.targets.mul_(0.9)
        return super().hint(student, teacher, batch)


class CountsFromOne(Base):
    requires = Requires(student_taps=("pooled",), teacher_taps=("pooled",), index=True, second_view=True)

    def hint(self, student, teacher, batch):
        batch.index.add_(1)
        batch.second_view.neg_()
        student.second.logits.neg_()
        return super().hint(student, teacher, batch)


WRITES = {
    CentresLogits: "the student's logits,",
    ScalesUnseen: "the student's pooled,",
    ReplacesAFeature: "the student's pooled,",
    ClampsImages: "the batch's images,",
    SmoothsTargets: "the batch's targets,",
    CountsFromOne: "the student's second.logits, the batch's index, the batch's second_view,",
}


@pytest.mark.parametrize("method", WRITES, ids=lambda method: method.__name__)
def test_a_step_that_writes_into_what_it_is_given_fails_the_first_point(method):
    assert f"point 1 (a step gives finite named terms): a step writes into {WRITES[method]}" in fails(
        "check_terms", Subject(method)
    )


# ------------------------------------------------------------------------------------------------------------- hiding places


class Slotted:
    __slots__ = ("__held", "never_set")

    def __init__(self, held):
        self.__held = held


def unbound():
    def call():
        return later

    if not call:
        later = call
    return call


def holding(make):
    class Holding(Base):
        def __init__(self, student, teacher, data, *, weights=None, seed=None):
            super().__init__(student, teacher, data, weights=weights, seed=seed)
            self.held = make(teacher)

    return Subject(Holding)


NORM = nn.LayerNorm(2)
HIDING = {
    "held.__defaults__[0]": lambda _: lambda x, norm=NORM: norm(x),
    "held.__kwdefaults__['norm']": lambda _: lambda x, *, norm=NORM: norm(x),
    "held[1]": lambda _: deque([1, NORM.weight], maxlen=2),
    "held._Slotted__held": lambda _: Slotted(NORM),
    "held._Slotted__held[0]": lambda teacher: Slotted([nn.Sequential(teacher.module.head, NORM)]),
}


@pytest.mark.parametrize("path", HIDING)
def test_what_hides_is_found(path):
    assert f"distiller.{path} is trainable and not registered" in fails("check_hidden_state", holding(HIDING[path]))


@pytest.mark.parametrize(
    "make", [lambda _: unbound(), lambda teacher: Slotted(nn.Sequential(teacher.module.head))], ids=["empty cell", "frozen layers"]
)
def test_what_only_seems_to_hide_is_not(make):
    CHECKS["check_hidden_state"](holding(make))

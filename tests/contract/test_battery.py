"""The battery itself: sound distillers pass every point, and each broken one fails exactly the point it breaks."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distillzoo import Distiller
from distillzoo.errors import OptionError, UnsupportedPairError
from distillzoo.taps import remove_hooks
from distillzoo.testing import CHECKS, ContractError, Subject, TinyNet, TinyTeacher, check_distiller, tiny_data
from distillzoo.types import Phase, Requires

LAST = Requires(student_taps=("last", "pooled"), teacher_taps=("last", "pooled"))


class Base(Distiller):
    """Regress the teacher's pooled features from the student's: the sound method that the broken ones deviate from."""

    requires = LAST
    weight_presets = {"default": {"hint": 0.5}}

    def __init__(self, student, teacher, data, *, weights=None, seed=None, bias=True):
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        self.width = student.shapes["pooled"][0], teacher.shapes["pooled"][0]
        self.regressor = nn.Linear(*self.width, bias=bias)
        self.make(student, teacher, data)

    def make(self, student, teacher, data):
        """Add what a method needs."""

    def hint(self, student, teacher, batch):
        return F.mse_loss(self.regressor(student.features["pooled"]), teacher.features["pooled"])

    def distill_terms(self, student, teacher, batch):
        return {"hint": self.hint(student, teacher, batch)}


# ---------------------------------------------------------------------------------------------------- sound distillers


class TwoPhases(Base):
    """Trains the regressor and the student's features on the hint alone first."""

    def phases(self):
        return Phase("first", 1, ("regressor.*", "student.stem.*", "student.groups.*"), ("hint",)), Phase()


class Bank(Base):
    """Keeps the student's features of every sample in a buffer, written after the step."""

    requires = Requires(student_taps=("pooled",), teacher_taps=("pooled",), index=True, hard_labels=True)

    def make(self, student, teacher, data):
        self.register_buffer("bank", torch.zeros(data.num_samples, self.width[0]))
        self.register_buffer("new", torch.zeros(data.num_samples, self.width[0]))

    def hint(self, student, teacher, batch):
        pooled = student.features["pooled"]
        if self.training:
            self.new.copy_(self.bank.index_copy(0, batch.index, pooled.detach().to(self.bank.dtype)))
        near = F.one_hot(batch.targets, 5).to(pooled.dtype).mean()
        return super().hint(student, teacher, batch) + near * F.mse_loss(pooled, self.bank[batch.index])

    def after_step(self):
        self.bank.copy_(self.new)


class SecondView(Base):
    requires = Requires(student_taps=("pooled",), teacher_taps=("pooled",), second_view=True)

    def hint(self, student, teacher, batch):
        return super().hint(student, teacher, batch) + super().hint(student.second, teacher.second, batch)


class StreamNoise(Base):
    def make(self, student, teacher, data):
        self.noise = self.stream("noise")

    def hint(self, student, teacher, batch):
        pooled = student.features["pooled"]
        index = torch.arange(pooled.numel(), device=pooled.device)
        noise = self.noise.normal(self.step, index).view_as(pooled).to(pooled.dtype)
        return super().hint(student, teacher, batch) + (pooled * noise).mean()


class Doubled(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv, self.twin = conv, copy.deepcopy(conv)

    def forward(self, x):
        return 0.5 * (self.conv(x) + self.twin(x))


class Restructuring(Base):
    """Expands the last convolution into a mean of two and folds it in the export."""

    def make(self, student, teacher, data):
        self.path = student.stages[-1].linear
        student.replace(self.path, Doubled(student.submodule(self.path)))

    def export_student(self):
        exported = super().export_student()
        parent, _, child = self.path.rpartition(".")
        double = exported.get_submodule(self.path)
        folded = copy.deepcopy(double.conv)
        with torch.no_grad():
            folded.weight.copy_(0.5 * (double.conv.weight + double.twin.weight))
        setattr(exported.get_submodule(parent), child, folded)
        return exported


class Refusing(Base):
    """Works on pairs of equal depth only and says so."""

    def __init__(self, student, teacher, data, *, weights=None, seed=None):
        if len(student.stages) != len(teacher.stages):
            raise UnsupportedPairError("Refusing needs as many stages in student and teacher; use kd.")
        super().__init__(student, teacher, data, weights=weights, seed=seed)


class Prepared(Base):
    """Class means gathered before training, in a buffer."""

    def make(self, student, teacher, data):
        self.register_buffer("mean", torch.zeros(3))

    def prepare(self, loader):
        self.mean.copy_(torch.stack([batch.images.mean((0, 2, 3)) for batch in loader.epoch(0)]).mean(0))

    def hint(self, student, teacher, batch):
        return super().hint(student, teacher, batch) * (1.0 + self.mean.square().sum())


SOUND = [Base, TwoPhases, Bank, SecondView, StreamNoise, Restructuring, Refusing, Prepared]


@pytest.mark.parametrize("method", SOUND, ids=lambda method: method.__name__)
def test_a_sound_distiller_passes_every_point(method):
    like_base = method in (TwoPhases, SecondView, Refusing, Prepared)  # what they add, tracing does not see
    check_distiller(method, skip={"check_compile": "traced with Base"} if like_base else {})


# --------------------------------------------------------------------------------------------------- broken distillers


class VarianceInList(Base):
    """What mdistiller's VID does."""

    def make(self, student, teacher, data):
        self.log_variances = [nn.Parameter(torch.zeros(()))]

    def hint(self, student, teacher, batch):
        value = super().hint(student, teacher, batch)
        return value * torch.exp(-self.log_variances[0]) + self.log_variances[0]


class ModuleInDict(Base):
    def make(self, student, teacher, data):
        self.extra = {"deep": [{"scale": nn.Conv2d(1, 1, 1)}]}


class ModuleInClosure(Base):
    def make(self, student, teacher, data):
        norm = nn.LayerNorm(2)
        self.call = lambda x: norm(x)


class Wakes(Base):
    def distill_terms(self, student, teacher, batch):
        self.teacher_net.module.train()
        return super().distill_terms(student, teacher, batch)


class TeacherAsChild(Base):
    def make(self, student, teacher, data):
        self.teacher = teacher.module


class ScribblesOnTrace(Base):
    def hint(self, student, teacher, batch):
        teacher.features["pooled"].mul_(0.5)
        return super().hint(student, teacher, batch)


class PlainState(Base):
    def make(self, student, teacher, data):
        self.calls = torch.ones(())

    def hint(self, student, teacher, batch):
        return super().hint(student, teacher, batch) * self.calls

    def after_step(self):
        self.calls = self.calls * 0.9


class UnsavedBuffer(Base):
    def make(self, student, teacher, data):
        self.register_buffer("calls", torch.ones(()), persistent=False)

    def hint(self, student, teacher, batch):
        return super().hint(student, teacher, batch) * self.calls

    def after_step(self):
        self.calls.mul_(0.9)


class GeneratorNoise(Base):
    def hint(self, student, teacher, batch):
        pooled = student.features["pooled"]
        return super().hint(student, teacher, batch) + (pooled * torch.randn_like(pooled)).mean()


class OtherNoise(Base):
    """Draws from a generator that torch's state does not show."""

    numbers = iter(range(10**6))

    def make(self, student, teacher, data):
        torch.randn(1)

    def after_step(self):
        torch.rand(1)


class HooksLeft(Base):
    def export_student(self):
        return copy.deepcopy(self.student_net.module)


class ExportsItself(Base):
    def export_student(self):
        return remove_hooks(self.student_net.module)


class ExportsAnother(Base):
    def predict(self, images):
        return super().predict(images) * 2.0


class HostSync(Base):
    def hint(self, student, teacher, batch):
        value = super().hint(student, teacher, batch)
        return value * 2.0 if value.item() > 1e6 else value


class Unused(Base):
    def make(self, student, teacher, data):
        self.unused = nn.Linear(2, 2)


class WritesInEval(Base):
    def make(self, student, teacher, data):
        self.register_buffer("mean", torch.zeros(()))

    def hint(self, student, teacher, batch):
        self.mean.lerp_(student.logits.detach().mean().to(self.mean.dtype), 0.1)
        return super().hint(student, teacher, batch)


class BatchOfFour(Base):
    def hint(self, student, teacher, batch):
        return super().hint(student, teacher, batch) + student.features["pooled"].view(4, self.width[0]).square().mean()


class NormOfOne(Base):
    def make(self, student, teacher, data):
        self.norm = nn.BatchNorm1d(self.width[1])

    def hint(self, student, teacher, batch):
        return F.mse_loss(self.norm(self.regressor(student.features["pooled"])), teacher.features["pooled"])


class HardCodedWidths(Base):
    def make(self, student, teacher, data):
        self.regressor = nn.Linear(8, 12)


class Unmoved(Base):
    def make(self, student, teacher, data):
        self.projection = torch.eye(self.width[0])

    def hint(self, student, teacher, batch):
        return super().hint(student, teacher, batch) + (student.features["pooled"] @ self.projection).mean()


class SwallowsWeights(Base):
    def override_weights(self, weights):
        super().override_weights({name: value for name, value in weights.items() if name in self.weights})


class Unscaled(Base):
    def hint(self, student, teacher, batch):
        return (self.regressor(student.features["pooled"]) - teacher.features["pooled"]).square().mean(1)


class Infinite(Base):
    weight_presets = {"default": {"hint": 0.5, "far": 0.0}}

    def distill_terms(self, student, teacher, batch):
        return {**super().distill_terms(student, teacher, batch), "far": (student.logits.sum() * 0.0).log()}


class UndeclaredLabels(Base):
    def hint(self, student, teacher, batch):
        return super().hint(student, teacher, batch) + student.logits.gather(1, batch.targets[:, None]).mean() * 0.1


class UndeclaredIndex(Base):
    def hint(self, student, teacher, batch):
        value = super().hint(student, teacher, batch)
        return value if batch.index is None else value * 2.0


BROKEN = {
    VarianceInList: "check_hidden_state",
    ModuleInDict: "check_hidden_state",
    ModuleInClosure: "check_hidden_state",
    Wakes: "check_teacher",
    TeacherAsChild: "check_teacher",
    ScribblesOnTrace: "check_teacher",
    PlainState: "check_resume",
    UnsavedBuffer: "check_resume",
    GeneratorNoise: "check_seed",
    OtherNoise: "check_seed",
    HooksLeft: "check_export",
    ExportsItself: "check_export",
    ExportsAnother: "check_export",
    HostSync: "check_compile",
    Unused: "check_gradients",
    WritesInEval: "check_eval",
    BatchOfFour: "check_batch_sizes",
    NormOfOne: "check_batch_sizes",
    HardCodedWidths: "check_pairs",
    Unmoved: "check_moves",
    SwallowsWeights: "check_misspelt_options",
    Infinite: "check_terms",
    UndeclaredLabels: "check_terms",
    UndeclaredIndex: "check_terms",
}


@pytest.mark.parametrize("method", BROKEN, ids=lambda method: method.__name__)
def test_a_broken_distiller_fails_exactly_its_point(method):
    # Tracing is most of the battery's time, so only those are traced whose fault could show there.
    traced = method in (HostSync, WritesInEval)
    with pytest.raises(ContractError) as caught:
        check_distiller(method, skip={} if traced else {"check_compile": "time"})
    assert method.__name__ in str(caught.value)
    points = [int(number) for number in re.findall(r", point (\d+) \(", str(caught.value))]
    assert [list(CHECKS)[number - 1] for number in points] == [BROKEN[method]]


def test_a_vector_term_fails_the_first_point():
    with pytest.raises(ContractError, match="Unscaled, point 1 "):
        CHECKS["check_terms"](Subject(Unscaled))


def test_check_distiller_reports_every_failure_in_one_error():
    class Twice(VarianceInList):
        def export_student(self):
            return copy.deepcopy(self.student_net.module)

    with pytest.raises(ContractError) as caught:
        check_distiller(Twice, skip={"check_compile": "not the point here"})
    assert "point 3" in str(caught.value)
    assert "log_variances[0]" in str(caught.value)
    assert "point 6" in str(caught.value)
    assert isinstance(caught.value, AssertionError)


def test_skip_leaves_a_point_out_and_wants_a_reason():
    check_distiller(HostSync, skip={"check_compile": "reads the loss on the host"})
    with pytest.raises(OptionError, match="check_compile"):
        check_distiller(HostSync, skip={"check_compil": "misspelt"})
    with pytest.raises(OptionError, match="reason"):
        check_distiller(HostSync, skip={"check_compile": " "})


def test_options_and_pairs_of_the_user_are_used():
    seen = []

    class Spy(Base):
        def __init__(self, student, teacher, data, *, weights=None, seed=None, bias=True):
            super().__init__(student, teacher, data, weights=weights, seed=seed, bias=bias)
            seen.append((self.regressor.bias is None, student.shapes["pooled"][0], data.num_samples))

    def make_pair():
        return TinyNet((3, 5)), TinyTeacher((4, 7), blocks=1)

    check_distiller(Spy, make_pair=make_pair, options={"bias": False}, skip={"check_compile": "slow"})
    assert {bias for bias, _, _ in seen} == {True}
    assert 5 in {width for _, width, _ in seen}
    assert {samples for _, _, samples in seen} == {tiny_data().num_samples}


def test_an_option_that_does_not_exist_fails_in_a_sentence():
    with pytest.raises(ContractError, match="bias"):
        CHECKS["check_terms"](Subject(Base, options={"biass": True}))


def test_a_subject_repeats_itself_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, other = Subject(Base).build(), Subject(Base).build()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert torch.equal(Subject(Base).batch(3).images, Subject(Base).batch(3).images)
    assert not torch.equal(Subject(Base).batch(3).images, Subject(Base).batch(4).images)

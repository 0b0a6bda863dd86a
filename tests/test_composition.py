from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distillzoo import Distiller, build_distiller
from distillzoo.composition import Composition
from distillzoo.errors import OptionError, UnknownNameError, UnsupportedPairError
from distillzoo.registry import DISTILLERS
from distillzoo.schedules import LinearWarmup
from distillzoo.testing import TinyNet, TinyTeacher, tiny_data
from distillzoo.types import Phase, Progress, Requires

IMAGES = torch.linspace(-2, 2, 4 * 3 * 16 * 16).view(4, 3, 16, 16).mul(37).sin()
TARGETS = torch.tensor([0, 1, 2, 4])


class Hint(Distiller):
    requires = Requires(student_taps=("pooled",), teacher_taps=("pooled",))
    weight_presets = {"default": {"ce": 0.3, "hint": 2.0}}
    exempt_from_decay = ("scale",)

    def __init__(self, student, teacher, data, *, gain=1.0, weights=None, seed=None):
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        self.gain = gain
        self.calls = []
        self.regressor = nn.Linear(student.shapes["pooled"][0], teacher.shapes["pooled"][0])
        self.scale = nn.Parameter(torch.ones(1))

    def distill_terms(self, student, teacher, batch):
        return {"hint": self.gain * F.mse_loss(self.regressor(student.features["pooled"]) * self.scale, teacher.features["pooled"])}

    def phases(self):
        return Phase("first", 3, ("regressor.*", "student.stem.*"), ("hint",)), Phase()

    def prepare(self, loader):
        self.calls.append("prepare")

    def after_step(self):
        self.calls.append("after_step")


class Index(Distiller):
    requires = Requires(student_taps=("last",), index=True, hard_labels=True, teacher=False)
    weight_presets = {"default": {"zero": 1.0}}

    def distill_terms(self, student, teacher, batch):
        return {"zero": student.features["stage3"].sum() * 0.0}


class Doubles(Index):
    requires = Requires(teacher=False)

    def distill_terms(self, student, teacher, batch):
        return {"zero": student.logits.sum() * 0.0}

    def predict(self, images):
        return 2.0 * super().predict(images)

    def export_student(self):
        exported = super().export_student()
        with torch.no_grad():
            exported.head.weight.mul_(2.0)
            exported.head.bias.mul_(2.0)
        return exported


class Replaces(Doubles):
    def __init__(self, student, teacher, data, *, weights=None, seed=None):
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        student.replace("head", nn.Linear(8, 5))


Replaces.predict = Distiller.predict


class Views(Distiller):
    requires = Requires(second_view=True, teacher=False)
    weight_presets = {"default": {"views": 1.0}}

    def distill_terms(self, student, teacher, batch):
        return {"views": F.mse_loss(student.logits, student.second.logits)}


class Curious(Distiller):
    """Asks for nothing and takes whatever it is handed."""

    requires = Requires(teacher=False)
    weight_presets = {"default": {"found": 1.0}}

    def distill_terms(self, student, teacher, batch):
        found = (teacher is not None) + (batch.second_view is not None) + (student.second is not None)
        return {"found": student.logits.mean() * float(found)}


class ExportsAlone(Hint):
    """Overrides the export without overriding predict or restructuring."""

    def phases(self):
        return (Phase(),)

    def export_student(self):
        exported = super().export_student()
        exported.marked = True
        return exported


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    named = {"hint": Hint, "index": Index, "doubles": Doubles, "replaces": Replaces, "exports": ExportsAlone}
    named |= {"views": Views, "curious": Curious}
    for name, method in named.items():
        monkeypatch.setitem(DISTILLERS._items, f"test_{name}", method)


def build(name, **options):
    torch.manual_seed(0)
    return build_distiller(name, TinyNet(), TinyTeacher(), data=tiny_data(), seed=0, **options)


def test_terms_carry_the_members_names_and_cross_entropy_counts_once():
    distiller = build("test_hint+kd")
    assert isinstance(distiller, Composition)
    out = distiller(IMAGES, TARGETS)
    assert list(out.terms) == ["ce", "test_hint.hint", "kd.kd"]
    assert {name: float(weight) for name, weight in out.weights.items()} == {"ce": 1.0, "test_hint.hint": 2.0, "kd.kd": 1.0}
    torch.testing.assert_close(out.loss, out.terms["ce"] + 2.0 * out.terms["test_hint.hint"] + out.terms["kd.kd"])


def test_a_members_terms_are_those_it_has_alone():
    out = build("vanilla+kd")(IMAGES, TARGETS)
    alone = build("kd")(IMAGES, TARGETS)
    assert torch.equal(out.terms["kd.kd"], alone.terms["kd"])
    assert torch.equal(out.terms["ce"], alone.terms["ce"])


def test_weights_override_by_the_joined_name():
    distiller = build("test_hint+kd", weights={"kd.kd": LinearWarmup(0.8, 4), "ce": 0.5})
    distiller.set_progress(Progress(0, 4, 0, 10))
    out = distiller(IMAGES, TARGETS)
    assert {name: float(weight) for name, weight in out.weights.items()} == {"ce": 0.5, "test_hint.hint": 2.0, "kd.kd": 0.2}
    with pytest.raises(OptionError, match=r"Did you mean 'kd\.kd'"):
        build("test_hint+kd", weights={"kd.kdd": 1.0})
    with pytest.raises(OptionError, match="preset name 'imagenet'"):
        build("test_hint+kd", weights="imagenet")


def test_options_go_to_their_member():
    distiller = build("test_hint+kd", kd={"temperature": 2.0}, test_hint={"gain": 3.0})
    assert distiller.members["kd"].temperature == 2.0
    assert distiller.members["test_hint"].gain == 3.0
    with pytest.raises(OptionError, match="Unknown member of the composition 'temperature'"):
        build("test_hint+kd", temperature=2.0)
    with pytest.raises(OptionError, match=r"Unknown option of kd 'temperatur'\. Did you mean 'temperature'"):
        build("test_hint+kd", kd={"temperatur": 2.0})


@pytest.mark.parametrize("name", ["kd+kd", "kd+", "+kd", "", "kd++vanilla"])
def test_a_malformed_composition_is_refused(name):
    with pytest.raises(OptionError, match="different names joined by"):
        build(name)
    with pytest.raises(UnknownNameError, match="'vanila'"):
        build("kd+vanila")


def test_needs_are_joined():
    needs = build("test_hint+test_index+kd").requires
    assert needs == Requires(("pooled", "last"), ("pooled",), index=True, hard_labels=True, teacher=True)
    assert build("vanilla+test_index").requires.teacher is False


def test_hooks_reach_every_member_and_steps_go_together():
    distiller = build("test_hint+kd")
    member = distiller.members["test_hint"]
    distiller.prepare(None)
    for _ in range(2):
        distiller(IMAGES, TARGETS)
        distiller.after_step()
    assert member.calls == ["prepare", "after_step", "after_step"]
    assert distiller.step == member.step == distiller.members["kd"].step == 2
    distiller.set_progress(Progress(0, 4, 30, 10))
    assert distiller.step == member.step == 30


def test_the_student_is_in_the_state_once_and_adapters_under_their_member():
    distiller = build("test_hint+kd")
    names = {name for name, _ in distiller.named_parameters()}
    assert {"student.head.weight", "members.test_hint.regressor.weight", "members.test_hint.scale"} <= names
    assert sum("head.weight" in name for name in distiller.state_dict()) == 1
    groups = {group.name: group.names for group in distiller.param_groups()}
    assert groups["adapters.exempt"] == ("members.test_hint.scale",)


def test_first_phases_come_first_with_patterns_and_terms_of_the_composition():
    distiller = build("test_hint+kd")
    first, main = distiller.phases()
    assert first == Phase("test_hint.first", 3, ("members.test_hint.regressor.*", "student.stem.*"), ("test_hint.hint",))
    assert main == Phase()
    distiller.set_progress(Progress(0, 3, 0, 10, "test_hint.first"))
    out = distiller(IMAGES, TARGETS)
    assert {name: float(weight) for name, weight in out.weights.items()} == {"ce": 0.0, "test_hint.hint": 2.0, "kd.kd": 0.0}


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "*.weight",
        "s*",
        "*e*",
        "[!s]*",
        "[rs]*.bias",
        "student.*",
        "student*",
        "st?dent.stem.*",
        "*.*.*",
        "regressor.*",
        "scale",
    ],
)
def test_a_members_pattern_trains_in_a_composition_what_it_trains_alone(pattern, monkeypatch):
    monkeypatch.setattr(Hint, "phases", lambda self: (Phase("first", 1, (pattern,)), Phase()))
    alone = [name for name, _ in build("test_hint").named_parameters() if fnmatchcase(name, pattern)]
    composed = build("test_hint+test_exports")
    patterns = composed.phases()[0].trainable
    trained = [name for name, _ in composed.named_parameters() if any(fnmatchcase(name, each) for each in patterns)]
    assert alone
    assert sorted(trained) == sorted(name if name.startswith("student.") else f"members.test_hint.{name}" for name in alone)


def test_all_terms_of_a_members_phase_are_that_members(monkeypatch):
    monkeypatch.setattr(Hint, "phases", lambda self: (Phase("first", 1), Phase()))
    first = build("test_hint+kd").phases()[0]
    assert set(first.terms or ("ce", "test_hint.hint", "kd.kd")) == {"ce", "test_hint.hint"}


def test_what_a_member_says_of_the_main_phase_holds(monkeypatch):
    monkeypatch.setattr(Hint, "phases", lambda self: (Phase(trainable=("student.*",)),))
    assert build("test_hint+kd").phases()[-1].trainable is not None


def test_a_member_cannot_set_the_length_of_the_main_phase(monkeypatch):
    monkeypatch.setattr(Hint, "phases", lambda self: (Phase(epochs=3),))
    with pytest.raises(OptionError, match="The main phase takes its length from the training configuration; got epochs=3"):
        build("test_hint+kd").phases()


def test_one_member_may_predict_and_export_in_its_own_way():
    distiller = build("kd+test_doubles").eval()
    plain = distiller.student(IMAGES)
    assert torch.equal(distiller.predict(IMAGES), 2.0 * plain)
    torch.testing.assert_close(distiller.export_student().eval()(IMAGES), 2.0 * plain)


@pytest.mark.parametrize("name", ["test_doubles+test_replaces", "test_replaces+test_doubles"])
def test_two_such_members_are_refused(name):
    with pytest.raises(UnsupportedPairError, match=f"{name.replace('+', ' and ')} each restructure"):
        build(name)


def test_a_members_export_is_not_dropped():
    assert getattr(build("test_exports+kd").export_student(), "marked", False)


def test_a_composition_has_two_members():
    with pytest.raises(OptionError, match="at least two members; got none"):
        Composition(None, None, tiny_data(), makers={})


def test_a_members_adapters_start_alike_in_any_order():
    one, other = build("test_hint+test_exports"), build("test_exports+test_hint")
    assert torch.equal(one.members["test_hint"].regressor.weight, other.members["test_hint"].regressor.weight)


def test_a_member_sees_what_it_requires_and_nothing_of_what_others_do():
    distiller = build("test_curious+test_views+test_hint")
    out = distiller(IMAGES, TARGETS, second_view=IMAGES.flip(3))
    assert out.terms["test_curious.found"] == 0.0
    assert out.terms["test_views.views"] > 0.0

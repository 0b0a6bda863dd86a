from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distillzoo import Distiller, build_distiller, list_distillers
from distillzoo.build import Ensemble, describe_distiller, resolve_distiller
from distillzoo.errors import DistillZooError, OptionError, ShapeError, TapError, UnknownNameError
from distillzoo.options import option_defaults
from distillzoo.registry import DISTILLERS
from distillzoo.schedules import LinearWarmup
from distillzoo.taps import Teacher
from distillzoo.testing import TinyNet, TinyTeacher, tiny_data
from distillzoo.types import DataSpec, Requires, Stage

IMAGES = torch.linspace(-2, 2, 4 * 3 * 16 * 16).view(4, 3, 16, 16).mul(37).sin()
TARGETS = torch.tensor([0, 1, 2, 4])


class Hint(Distiller):
    requires = Requires(student_taps=("pooled",), teacher_taps=("pooled",))
    weight_presets = {"default": {"hint": 1.0}}

    def __init__(self, student, teacher, data, *, gain=1.0, weights=None, seed=None):
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        self.gain = gain
        self.regressor = nn.Linear(student.shapes["pooled"][0], teacher.shapes["pooled"][0])
        self.register_buffer("mean", torch.zeros(3))
        self.scale = nn.Parameter(torch.ones(()))

    def distill_terms(self, student, teacher, batch):
        return {"hint": self.gain * self.scale * F.mse_loss(self.regressor(student.features["pooled"]), teacher.features["pooled"])}


class Fixed(nn.Module):
    """Runs on one image size only."""

    def __init__(self, size=32, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, 4, 1)
        self.fc = nn.Linear(4 * (size // 4) ** 2, 5)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


def build(method="kd", student=None, teacher=None, **options):
    options.setdefault("input_size", 16)
    student, teacher = TinyNet() if student is None else student, TinyTeacher() if teacher is None else teacher
    return build_distiller(method, student, teacher, **options)


# --------------------------------------------------------------------------------------------------------------- names


def test_names_classes_and_compositions_resolve():
    assert {"kd", "vanilla"} <= set(list_distillers())
    assert list_distillers("van*") == ["vanilla"]
    assert resolve_distiller(Hint) == {"hint": Hint}
    assert list(resolve_distiller("kd + vanilla")) == ["kd", "vanilla"]


def test_an_unknown_name_lists_near_matches_before_anything_is_touched():
    teacher = TinyTeacher()
    with pytest.raises(UnknownNameError, match="Did you mean 'vanilla'"):
        build("vanila", teacher=teacher)
    assert all(p.requires_grad for p in teacher.parameters())


def test_a_class_that_is_no_distiller_is_refused():
    with pytest.raises(OptionError, match=r"subclass of distillzoo\.Distiller; .linear. is"):
        build(nn.Linear)


def test_a_registered_thing_that_is_no_distiller_is_refused(monkeypatch):
    monkeypatch.setitem(DISTILLERS._items, "test_thing", nn.Linear)
    with pytest.raises(DistillZooError, match="test_thing"):
        build("test_thing")


def test_options_are_checked_by_name():
    assert build(Hint, gain=2.5).gain == 2.5
    with pytest.raises(OptionError, match=r"Unknown option of hint 'gian'\. Did you mean 'gain'\? Its options are: gain"):
        build(Hint, gian=2.5)
    assert option_defaults(Hint) == {"gain": 1.0}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kdiffusion", {"guide": "off"}, "The option guide of kdiffusion is True or False; got 'off'; the default is False"),
        ("rkd", {"normalize": 1}, "The option normalize of rkd is True or False; got 1"),
        ("kd", {"temperature": "4"}, "The option temperature of kd must be a number; got '4'; the default is 4.0"),
        ("gpd", {"noise": "1e-6"}, r"must be a number; got '1e-6'; .* write 1\.0e-6"),
        ("fitnet", {"hint_stage": True}, "The option hint_stage of fitnet must be a number; got True; the default is None"),
        ("crd+kd", {"kd": {"temperature": "4"}}, "The option temperature of kd must be a number"),
        ("kd", {"temperature": None}, "The option temperature of kd must be a number; got None; the default is 4.0"),
        ("at", {"power": None}, "The option power of at must be a number; got None"),
        ("vid", {"initial_variance": [5.0]}, r"The option initial_variance of vid must be a number; got \[5\.0\]"),
        ("crd", {"momentum": {}}, r"The option momentum of crd must be a number; got \{\}"),
        ("fitnet", {"hint_stage": [2]}, r"The option hint_stage of fitnet must be a number; got \[2\]; the default is None"),
    ],
)
def test_options_of_another_kind_are_refused(name, options, message):
    with pytest.raises(OptionError, match=message):
        describe_distiller(name, **options)


def test_options_are_taken_as_their_annotation_says():
    assert describe_distiller("reviewkd", mid_channels=64)["options"]["mid_channels"] == 64
    assert describe_distiller("kd", temperature=4)["options"]["temperature"] == 4
    assert describe_distiller("gpd", static=None)["options"]["static"] is None
    assert describe_distiller("fitnet", hint_stage=None)["options"]["hint_stage"] is None
    assert describe_distiller("kd", temperature=np.float32(2.0))["options"]["temperature"] == 2.0


def test_a_description_fills_every_default_in():
    described = describe_distiller(Hint, weights={"hint": LinearWarmup(2.0, 4)})
    assert described["options"] == {"gain": 1.0}
    assert described["weights"] == {"ce": 1.0, "hint": {"kind": "linear_warmup", "value": 2.0, "epochs": 4}}
    assert describe_distiller("kd", weights="imagenet")["weights"] == {"ce": 0.5, "kd": 0.5}
    with pytest.raises(OptionError, match="gian"):
        describe_distiller(Hint, gian=1.0)


@pytest.mark.parametrize("weights", [{"kdd": 1.0}, "imagnet"])
def test_a_description_of_wrong_weights_is_refused(weights):
    with pytest.raises(OptionError):
        describe_distiller("kd", weights=weights)


def test_a_description_of_a_composition_has_every_weight():
    assert describe_distiller("vanilla+kd")["weights"] == {"ce": 1.0, "kd.kd": 1.0}


# ---------------------------------------------------------------------------------------------------------------- data


def test_what_the_data_is_is_inferred():
    distiller = build(num_classes=5, input_size=(16, 24))
    assert distiller.data.num_classes == 5
    assert distiller.data.input_size == (16, 24)
    assert build().data.num_classes == 5


def test_sizes_are_declared_or_tried():
    assert build(student=Fixed(32), teacher=Fixed(32), input_size=None).data.input_size == (32, 32)
    assert build(student=TinyNet(), input_size=None).data.input_size == (224, 224)
    declaring = TinyNet()
    declaring.pretrained_cfg = {"input_size": (3, 20, 28), "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}
    data = build(student=declaring, input_size=None).data
    assert (data.input_size, data.mean, data.std) == ((20, 28), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    grey = build(student=Fixed(16, channels=1), teacher=Fixed(16, channels=1)).data
    assert grey.channels == 1


def test_sizes_are_tried_when_the_classes_are_given():
    assert build(student=Fixed(32), teacher=Fixed(32), input_size=None, num_classes=5).data.input_size == (32, 32)


def test_a_network_that_runs_at_no_size_says_what_to_pass():
    with pytest.raises(ShapeError, match=r"does not run \(at 224x224: .*at 32x32: .*pass input_size="):
        build(student=Fixed(48), input_size=None)


def test_a_student_that_does_not_take_the_images_of_the_data_is_a_sentence():
    with pytest.raises(ShapeError, match=r"student Fixed does not run on 3-channel images of 16x16.*pass input_size="):
        build(student=Fixed(48), data=tiny_data(), input_size=None)


class Asking(nn.Module):
    """Wants more than images, or fails at them in its own way."""

    def __init__(self, error=None):
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.error = error

    def forward(self, images, mask=None):
        if self.error is not None:
            raise self.error
        return {"logits": self.fc(images.mean((2, 3)))} if mask is None else mask


@pytest.mark.parametrize("kind", [TypeError, KeyError, IndexError, ValueError, Warning])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_whatever_a_network_raises_becomes_a_sentence(kind, role):
    error = kind("mask is missing")
    with pytest.raises(ShapeError, match=rf"{role} Asking does not run on .*{type(error).__name__}: .*mask") as caught:
        build(**{role: Asking(error)}, data=tiny_data(), input_size=None)
    assert caught.value.__cause__ is error
    with pytest.raises(ShapeError, match="Asking"):
        build(**{role: Asking(error)})


def test_a_network_that_returns_no_logits_is_told_so_and_nothing_of_sizes():
    with pytest.raises(ShapeError, match=r"^The student Asking returned dict .*Wrap it in a module that does\.$"):
        build(student=Asking())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_networks_that_cannot_be_read_are_refused(role):
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(OptionError, match=f"The {role} Sequential has lazy layers.*run it once"):
        build(**{role: lazy})
    lazy(torch.zeros(1, 3, 16, 16))
    build(**{role: lazy})
    plain = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    with pytest.raises(OptionError, match=f"The {role} is a torch.jit.ScriptModule"):
        build(**{role: torch.jit.script(plain)})


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (torch.compile, r"inside OptimizedModule.*\(\._orig_mod\), and compile the distiller"),
        (
            nn.DataParallel,
            r"inside DataParallel.*\(\.module\), and wrap the distiller in torch\.nn\.parallel\.DistributedDataParallel\.$",
        ),
    ],
)
def test_networks_inside_a_wrapper_are_refused(role, wrap, words):
    with pytest.raises(OptionError, match=f"The {role} is a network {words}"):
        build(**{role: wrap(TinyNet())})
    if role == "teacher":
        with pytest.raises(OptionError, match=words):
            build(teacher=[TinyTeacher(), wrap(TinyNet())])


def test_a_student_that_was_a_teacher_is_refused():
    with pytest.raises(OptionError, match=r"No parameter of the student TinyNet requires a gradient.*requires_grad_\(True\)"):
        build(student=TinyNet().requires_grad_(False))
    partly = TinyNet()
    partly.stem.requires_grad_(False)
    build(student=partly)


def test_a_student_that_runs_on_the_images_and_does_not_train_on_them_is_a_sentence():
    """As networks whose auxiliary classifier, in training mode alone, needs larger maps than the network itself."""

    class Auxiliary(TinyNet):
        def __init__(self):
            super().__init__()
            self.auxiliary = nn.Conv2d(3, 1, 32)
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            if self.training:
                self.auxiliary(x)
            return self.norm(super().forward(x))

    student = Auxiliary()
    with pytest.raises(ShapeError, match=r"student Auxiliary does not train on 3-channel images of 16x16.*pass input_size="):
        build(student=student, data=tiny_data(), input_size=None)
    build(student=(trains := Auxiliary()), teacher=TinyNet(), data=replace(tiny_data(), input_size=(32, 32)), input_size=None)
    assert trains.norm.num_batches_tracked == 0, "the trial leaves no trace"


def test_a_given_spec_is_kept():
    data = tiny_data()
    assert build(data=data, input_size=None).data is data


@pytest.mark.parametrize("other", [{"num_classes": 7}, {"input_size": 99}])
def test_arguments_that_contradict_the_spec_are_refused(other):
    with pytest.raises(OptionError):
        build(data=tiny_data(), **{"input_size": None, **other})


def test_class_counts_must_agree():
    with pytest.raises(OptionError, match="student TinyNet has 5 classes and num_classes is 7"):
        build(num_classes=7)
    with pytest.raises(OptionError, match="teacher TinyTeacher has 6 classes and the student TinyNet has 5"):
        build(teacher=TinyTeacher(num_classes=6))
    with pytest.raises(OptionError, match="num_classes is 9"):
        build(data=DataSpec(9, (16, 16)), input_size=None)


# ------------------------------------------------------------------------------------------------------------- teachers


def test_an_ensemble_averages_probabilities():
    teachers = [TinyTeacher(), TinyTeacher((4, 5)), TinyNet()]
    distiller = build(teacher=teachers)
    with torch.no_grad():
        mean = torch.stack([teacher.eval()(IMAGES).softmax(1) for teacher in teachers]).mean(0)
    torch.testing.assert_close(distiller.teacher_net(IMAGES).logits.exp(), mean)
    assert isinstance(distiller.teacher_net.module, Ensemble)
    assert not any(p.requires_grad for teacher in teachers for p in teacher.parameters())
    torch.testing.assert_close(
        distiller(IMAGES, TARGETS).terms["kd"],
        build(student=distiller.student, teacher=distiller.teacher_net.module)(IMAGES, TARGETS).terms["kd"],
    )


def test_an_ensemble_of_equal_teachers_is_the_teacher():
    teacher = TinyTeacher()
    one = Ensemble([teacher, teacher, teacher]).eval()
    torch.testing.assert_close(one(IMAGES), teacher.eval()(IMAGES).log_softmax(1))
    far = Ensemble([Constant([1e4, 0.0]), Constant([0.0, 1e4])])(IMAGES)
    assert torch.isfinite(far).all()


class Constant(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x):
        return self.logits.expand(len(x), -1)


@pytest.mark.parametrize("teachers", [[], [TinyTeacher(), TinyTeacher(num_classes=6)]], ids=["none", "six classes"])
def test_a_wrong_list_of_teachers_is_a_sentence(teachers):
    with pytest.raises(DistillZooError):
        build_distiller("kd", TinyNet(), teachers, input_size=16)


@pytest.mark.parametrize(
    ("wrong", "got"), [(None, "None"), (Teacher(TinyTeacher(), tiny_data()), "a Teacher")], ids=["none", "wrapped"]
)
def test_what_is_no_network_in_a_list_of_teachers_is_a_sentence(wrong, got):
    with pytest.raises(OptionError, match=rf"A list of teachers holds networks .* got {got}; pass each"):
        build(teacher=[TinyTeacher(), wrong])
    with pytest.raises(OptionError, match="A list of teachers holds networks"):
        Ensemble([TinyTeacher(), wrong])


class Around(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images)


@pytest.mark.parametrize(
    "hide", [lambda net: net, lambda net: [TinyTeacher(), net], Around, lambda net: Ensemble([TinyTeacher(), net])]
)
def test_a_student_among_its_teachers_is_refused_and_not_frozen(hide):
    student = TinyNet()
    with pytest.raises(
        OptionError, match=r"(one and the same module|parameters of the student .* as '.*'\)), which would be frozen"
    ):
        build(student=student, teacher=hide(student))
    assert all(p.requires_grad for p in student.parameters())


def test_a_teacher_that_shares_layers_with_its_student_must_not_freeze_them():
    student, teacher = TinyNet(), TinyNet()
    teacher.stem = student.stem
    with pytest.raises(
        OptionError, match=r"The teacher TinyNet holds 3 parameters of the student \(the first as 'stem\.conv\.weight'"
    ):
        build(student=student, teacher=teacher)
    student.stem.requires_grad_(False)  # frozen on purpose: nothing happens unnoticed
    build(student=student, teacher=teacher)


def test_a_teacher_object_is_shared():
    teacher = Teacher(TinyTeacher(), tiny_data())
    one, other = build(Hint, teacher=teacher), build("kd", teacher=teacher)
    assert one.teacher_net is other.teacher_net is teacher
    assert set(teacher(IMAGES).features) == {"pooled"}


# ----------------------------------------------------------------------------------------------------------------- taps


def test_taps_can_be_named_for_each_network():
    distiller = build(taps={"student": ["groups.0", "groups.2"], "teacher": {"stage1": "groups.1"}})
    assert [stage.path for stage in distiller.student_net.stages] == ["groups.0", "groups.2"]
    assert [stage.path for stage in distiller.teacher_net.stages] == ["groups.1"]
    with pytest.raises(OptionError, match="keys 'student' and 'teacher'; got 'studnet'"):
        build(taps={"studnet": []})
    with pytest.raises(TapError, match=r"'groups\.7'"):
        build(taps={"student": ["groups.7"]})
    with pytest.raises(OptionError, match=r"got 'groups\.1'; write taps="):
        build(taps="groups.1")


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("groups.1", r"are a list of tap paths or Stages.*; got 'groups\.1'; write one of them as a list too"),
        (Stage("groups.1"), r"are a list of tap paths or Stages.*; got Stage\(path='groups\.1'"),
        (3, "are a list of tap paths or Stages.*; got 3"),
        (["groups.1", 2], "is a tap path or a Stage.*; got 2 for 'stage2'"),
        ({"pooled": None}, "is a tap path or a Stage.*; got None for 'pooled'"),
        ({1: "groups.1"}, r"is a tap path or a Stage, and its name is text; got 'groups\.1' for 1;"),
    ],
)
def test_taps_that_are_no_paths_are_a_sentence(role, given, words):
    with pytest.raises(TapError, match=f"of Tiny(Net|Teacher) {words}"):
        build(taps={role: given})


@pytest.mark.parametrize("wrong", ["haed", "head:input"])
def test_a_classifier_path_that_does_not_exist_is_a_sentence(wrong):
    networks = {"student": TinyNet(), "teacher": TinyTeacher()}
    for role, network in networks.items():
        network.classifier_path = wrong
        with pytest.raises(
            TapError, match=rf"The classifier_path of {type(network).__name__} must be a module path.* '{wrong}'.*'head'"
        ):
            build(**{role: network})
    networks["teacher"].classifier_path = None
    assert "pooled" not in build(teacher=networks["teacher"]).teacher_net.shapes


def test_taps_for_a_teacher_object_are_not_swallowed():
    with pytest.raises(DistillZooError):
        build(teacher=Teacher(TinyTeacher(), tiny_data()), taps={"teacher": ["groups.7"]})


def test_hooks_are_attached_for_what_is_required_alone():
    student, teacher = TinyNet(), TinyTeacher()
    build("kd", student, teacher)
    build("vanilla", student, teacher)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for net in (student, teacher) for m in net.modules()) == 0
    build(Hint, student, teacher)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for net in (student, teacher) for m in net.modules()) == 2


# ------------------------------------------------------------------------------------------------ types, seeds, the rest


def test_adapters_follow_the_students_type():
    distiller = build(Hint, TinyNet().double(), TinyTeacher().double())
    assert {p.dtype for p in distiller.parameters()} == {torch.float64}
    assert distiller.mean.dtype == torch.float64
    assert distiller.step.dtype == torch.int64
    loss = distiller(IMAGES.double(), TARGETS).loss
    assert loss.dtype == torch.float64
    loss.backward()


@pytest.mark.parametrize("name", ["fitnet", "fitnet+kd", "gpd"])
def test_networks_of_a_half_type_stay_as_they_are_and_train(name):
    options = {"static": "fitnet"} if name == "gpd" else {}
    distiller = build(name, TinyNet().bfloat16(), TinyTeacher().bfloat16(), **options)
    networks = [distiller.student, distiller.teacher_net.module]
    theirs = [tensor for net in networks for tensor in (*net.parameters(), *net.buffers())]
    assert {tensor.dtype for tensor in theirs if tensor.is_floating_point()} == {torch.bfloat16}
    own = [tensor for key, tensor in distiller.state_dict().items() if not key.startswith("student.")]
    assert {tensor.dtype for tensor in own} == {torch.float32, torch.int64}
    out = distiller(IMAGES.bfloat16(), TARGETS)
    out.loss.backward()
    assert torch.isfinite(out.loss)


def test_a_teacher_is_not_touched_by_a_build(monkeypatch):
    teacher = TinyTeacher()
    monkeypatch.setattr(teacher, "_apply", lambda *_: pytest.fail("the teacher was moved"))
    build("fitnet+kd", TinyNet(), teacher)


class Borrows(Hint):
    """Holds layers of both networks among its own modules."""

    def __init__(self, student, teacher, data, *, weights=None, seed=None):
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        self.adapter = nn.ModuleList([student.module.head, teacher.module.head, nn.Linear(2, 2)])


def test_layers_of_the_networks_stay_as_they_are_wherever_they_hang():
    distiller = build(Borrows, TinyNet().bfloat16(), TinyTeacher().bfloat16())
    assert [layer.weight.dtype for layer in distiller.adapter] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for cast in (torch.float32, torch.bfloat16, torch.float64):
        distiller.to(cast)
        own = torch.float32 if cast == torch.bfloat16 else cast
        assert [layer.weight.dtype for layer in distiller.adapter] == [cast, cast, own]


def test_a_double_student_and_a_single_teacher_are_refused():
    with pytest.raises(OptionError, match=r"torch\.float64 and the teacher in torch\.float32"):
        build("kd", TinyNet().double(), TinyTeacher())


def test_a_seed_decides_adapters_and_leaves_the_generator_alone():
    student, teacher = TinyNet(), TinyTeacher()
    before = torch.get_rng_state()
    one, again, other = (build(Hint, student, teacher, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.regressor.weight, again.regressor.weight)
    assert not torch.equal(one.regressor.weight, other.regressor.weight)


def test_no_seed_draws_one_from_torch():
    with torch.random.fork_rng(devices=[]):
        assert build().seed != build().seed
        student, teacher = TinyNet(), TinyTeacher()
        state = torch.get_rng_state()
        first = build(student=student, teacher=teacher).seed
        torch.set_rng_state(state)
        assert build(student=student, teacher=teacher).seed == first
    with pytest.raises(OptionError, match="seed must be"):
        build(seed=-1)


def test_building_leaves_the_networks_as_they_were():
    student, teacher = TinyNet().train(), TinyTeacher()
    before = {name: value.clone() for net in (student, teacher) for name, value in net.state_dict(prefix=str(id(net))).items()}
    distiller = build(Hint, student, teacher)
    after = {name: value for net in (student, teacher) for name, value in net.state_dict(prefix=str(id(net))).items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert distiller.student is student
    assert student.training


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((5, TinyNet()), "a name or a subclass"),
        (("kd", "resnet8"), "student must be a torch.nn.Module"),
        (("kd", TinyNet(), "resnet20"), "teacher must be a torch.nn.Module"),
        (("kd", TinyNet(), ["resnet20"]), "teacher must be a torch.nn.Module"),
        (("kd", TinyNet), "student must be a torch.nn.Module"),
    ],
)
def test_arguments_of_a_wrong_type_are_a_sentence(arguments, sentence):
    with pytest.raises(OptionError, match=sentence):
        build_distiller(*arguments)


@pytest.mark.parametrize("size", ["8", 8.0, (3, 8, 8), 0])
def test_an_input_size_that_is_no_size_is_a_sentence(size):
    with pytest.raises(OptionError, match="input_size must be pixels"):
        build_distiller("vanilla", TinyNet(), input_size=size)


@pytest.mark.parametrize(
    ("images", "targets", "sentence"),
    [
        (IMAGES, torch.full_like(TARGETS, 99), "Labels must be from 0"),
        (IMAGES, torch.full_like(TARGETS, -100), "Labels must be from 0"),
        ((IMAGES * 10).to(torch.uint8), TARGETS, "floating-point and normalised"),
        (IMAGES.numpy(), TARGETS, "must be tensors"),
        (IMAGES, None, "must be tensors"),
        (IMAGES, torch.ones(len(IMAGES), 5, dtype=torch.int64), "floating-point probabilities"),
    ],
)
def test_a_batch_that_is_none_is_a_sentence(images, targets, sentence):
    distiller = build("vanilla", TinyNet())
    with pytest.raises(ShapeError, match=sentence):
        distiller(images, targets)


# ------------------------------------------------------------------------------------------------------------- refusals


def state_of(network):
    values = {name: value.clone() for name, value in network.state_dict().items()}
    kinds = [(name, type(part), part.training, len(part._forward_hooks)) for name, part in network.named_modules()]
    return values, kinds, [parameter.requires_grad for parameter in network.parameters()]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("kdiffusion", {"weights": {"progresive": 1.0}}),
        ("kdiffusion+kd", {"weights": {"kd.kdd": 1.0}}),
        ("gpd", {"weights": {"dynamc": 1.0}}),
        ("gpd", {"static": "kd", "static_options": {"temperature": 0.0}}),
        ("gpd+kd", {"weights": {"kd.kdd": 1.0}}),
        ("gpd+kdiffusion", {}),
        ("kd", {"num_classes": 7}),
    ],
)
def test_a_refused_build_gives_both_networks_back_as_they_came(method, options):
    """A student that kept its branches would be exported with them by whatever method takes it next."""
    student, teacher = TinyNet().eval(), TinyTeacher()
    before = [state_of(network) for network in (student, teacher)]
    with pytest.raises(DistillZooError):
        build(method, student, teacher, **options)
    for network, (values, *rest) in zip((student, teacher), before, strict=True):
        now, *others = state_of(network)
        assert others == rest
        assert now.keys() == values.keys()
        assert all(torch.equal(now[name], values[name]) for name in values)
    exported = build("kd", student, teacher).export_student()
    assert exported.state_dict().keys() == TinyNet().state_dict().keys()


def test_a_distiller_starts_in_training_mode():
    student = TinyNet().eval()
    distiller = build(student=student)
    assert distiller.training
    assert student.training
    assert not distiller.teacher_net.module.training


@pytest.mark.parametrize("given", [2.0, "temperature", [1]])
def test_options_of_a_member_are_a_mapping(given):
    with pytest.raises(OptionError, match=r"mapping, as kd=\{'temperature': 2\.0\}; got kd="):
        build("at+kd", kd=given)


def test_a_teacher_on_another_device_is_built_on_and_named_at_the_first_step():
    """It may be moved, or moved along, in between; where it is not, torch's own error names neither network."""
    distiller = build()
    distiller.teacher_net.module.to("meta")  # the other device that every machine has
    with pytest.raises(OptionError, match=r"images lie on cpu and the teacher on meta; move it.*distiller\.to\(device\)"):
        distiller(IMAGES, TARGETS)

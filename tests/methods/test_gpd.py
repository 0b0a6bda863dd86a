"""GPD: the dynamic teacher starts as the student, shares its weights, and leaves a plain student behind."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distillzoo import DataSpec, Distiller, build_distiller, create_model, list_distillers, register_distiller
from distillzoo.adapters.expansion import DualOp, pick
from distillzoo.adapters.orepa import LinearBranches
from distillzoo.build import describe_distiller
from distillzoo.errors import OptionError, ShapeError, UnknownNameError, UnsupportedPairError
from distillzoo.methods.gpd import dynamic_teacher_loss
from distillzoo.registry import DISTILLERS
from distillzoo.testing import TinyNet, TinyTeacher, check_distiller, tiny_data
from distillzoo.types import Batch, Phase, Trace

CIFAR = (
    "resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4", "resnet18",
    "resnet50", "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2", "vgg8", "vgg11", "vgg13", "vgg16", "vgg19", "mobilenetv2",
    "shufflenetv1", "shufflenetv2",
)  # fmt: skip
QUICK = ("resnet8", "wrn_16_1", "mobilenetv2", "shufflenetv1", "shufflenetv2")  # one of each kind of structure
RESTRUCTURING = ("kdiffusion", "gpd", "gpd_reduced")  # every other registered method only adds losses


def build(name="gpd_reduced", student=None, teacher=None, **options):
    torch.manual_seed(0)
    student = TinyNet() if student is None else student
    return build_distiller(name, student, teacher, data=tiny_data(), seed=0, **options)


def gap(one, other):
    return float((one - other).abs().max() / other.abs().max())


@torch.no_grad()
def seen_data(network, size=32):
    """The network in eval mode with statistics and norms that are not the initial 0 and 1."""
    network.train()(torch.randn(8, 3, size, size))
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.2, 0.2), alpha=1.0 if "weight" in name else 0.3)
    return network.eval()


def check_start(name, method, noise, allowed, ratio=2):
    torch.manual_seed(0)
    student = seen_data(create_model(name, num_classes=100))
    plain, x = copy.deepcopy(student), torch.randn(4, 3, 32, 32)
    distiller = build_distiller(method, student, input_size=32, seed=0, noise=noise, ratio=ratio).eval()
    with torch.no_grad():
        wanted = plain(x)
        assert gap(distiller.dynamic_net(x).logits, wanted) < allowed
        assert gap(distiller.predict(x), wanted) < 1e-5
        exported = distiller.export_student().eval()
        assert gap(exported(x), distiller.predict(x)) < 1e-5
    plain.load_state_dict(exported.state_dict(), strict=True)
    assert str(exported) == str(plain)


# ------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize(
    ("name", "method", "noise", "allowed"),
    [
        pytest.param(
            name, method, noise, allowed, marks=() if name in QUICK and (method, noise) != ("gpd", 0.0) else pytest.mark.slow
        )
        for name in CIFAR
        for method in ("gpd", "gpd_reduced")
        for noise, allowed in ((0.0, 1e-5), (1e-6, 1e-4))
    ],
)
def test_the_dynamic_teacher_starts_as_the_student(name, method, noise, allowed):
    check_start(name, method, noise, allowed)


def test_another_ratio_starts_alike():
    check_start("resnet8", "gpd_reduced", 0.0, 1e-5, ratio=3)


def test_from_scratch_branches_change_both_alike():
    torch.manual_seed(0)
    student, x = seen_data(TinyNet(), 16), torch.randn(4, 3, 16, 16)
    plain = copy.deepcopy(student)
    distiller = build("gpd", student, branch_start="scratch").eval()
    with torch.no_grad():
        narrow = distiller.predict(x)
        assert gap(distiller.dynamic_net(x).logits, narrow) < 1e-4
        assert gap(plain(x), narrow) > 1e-2
        assert gap(distiller.export_student().eval()(x), narrow) < 1e-5


def test_branches_start_as_published_for_a_fresh_student_and_keep_what_a_trained_one_does():
    def scales(student, **options):
        found = [m.scales for m in build("gpd", student, **options).modules() if isinstance(m, LinearBranches)]
        assert found
        return {tuple(round(v, 2) for v in column) for scale in found for column in scale.t().tolist()}

    mixed, kept = {(0.25, 0.25, 0.0, 0.5, 0.05, 0.5)}, {(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)}
    assert scales(TinyNet()) == scales(TinyNet().bfloat16()) == mixed
    assert scales(TinyTeacher()) == kept, "its norms have seen data"
    assert scales(TinyNet(), branch_start="pretrained") == kept
    assert scales(TinyTeacher(), branch_start="scratch") == mixed
    silent = TinyNet()
    for block in (silent.stem, *(group[0] for group in silent.groups)):
        block.norm = nn.GroupNorm(1, block.conv.out_channels)
    assert scales(silent) == kept, "nothing tells that it is fresh"


def test_a_frozen_convolution_stays_as_it_is():
    student = TinyNet()
    student.groups[0].requires_grad_(False)
    kernel = student.groups[0][0].conv.weight.clone()
    distiller = build("gpd", student, branch_start="scratch")
    assert torch.equal(distiller.export_student().groups[0][0].conv.weight, kernel)
    assert not any(parameter.requires_grad for parameter in distiller.student.groups[0].parameters())
    exported = {name: parameter.requires_grad for name, parameter in distiller.export_student().named_parameters()}
    assert exported == {name: not name.startswith("groups.0.") for name in exported}
    frozen = copy.deepcopy(distiller).requires_grad_(False).export_student()
    assert not any(parameter.requires_grad for parameter in frozen.parameters()), "none of them, branches or not"


def test_how_branches_start_is_refused_where_nothing_takes_them():
    student = create_model("mobilenetv2", num_classes=5)
    with pytest.raises(OptionError, match="branch_start 'scratch' mixes branches, and MobileNetV2 has no 3x3 convolution"):
        build("gpd", student, branch_start="scratch")
    assert not any(isinstance(module, DualOp) for module in student.modules()), "it is as it came"
    build("gpd", student)


def test_a_homogeneous_rule_is_not_needed_of_modules():
    class Smooth(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Hardswish()
            )
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 144, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5))

        def forward(self, x):
            return self.head(self.body(x))

    torch.manual_seed(0)
    student, x = Smooth(), torch.randn(3, 3, 16, 16)
    plain = copy.deepcopy(student)
    distiller = build(student=student)
    torch.testing.assert_close(distiller.dynamic_net(x).logits, plain(x))
    assert str(distiller.export_student()) == str(plain)


@pytest.mark.parametrize("method", ["gpd", "gpd_reduced"])
def test_norms_with_an_activation_inside_are_widened(method):
    torch.manual_seed(0)
    student = seen_data(create_model("timm/mobilenetv2_050", num_classes=5), 32)
    plain, x = copy.deepcopy(student), torch.randn(2, 3, 32, 32)
    distiller = build_distiller(method, student, input_size=32, seed=0).eval()
    with torch.no_grad():
        assert gap(distiller.dynamic_net(x).logits, plain(x)) < 1e-4
        exported = distiller.export_student().eval()
        assert gap(exported(x), plain(x)) < 1e-5
    assert str(exported) == str(plain)
    plain.load_state_dict(exported.state_dict(), strict=True)


# ------------------------------------------------------------------------------------------------------ refusals


class Functional(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.first, self.last, self.change = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), change

    def forward(self, x):
        return self.last(self.change(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (F.silu, "differ by"),
        (lambda x: x * x.sigmoid(), "differ by"),
        (lambda x: x.view(-1, 4, 14, 14), "stops with"),
        (lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1), "stops with"),
    ],
)
def test_what_cannot_be_widened_is_refused_in_a_sentence(change, reason):
    with pytest.raises(UnsupportedPairError, match=rf"Functional cannot be made 2 times as wide.*{reason}.*use kd"):
        build(student=Functional(change))


def test_an_error_that_fresh_norms_hide_is_found():
    class Hidden(nn.Module):
        """A branch that bends, behind a norm of scale 0."""

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
            self.inner, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x):
            x = self.first(x)
            return self.last((x + self.norm(F.silu(self.inner(x)))).mean((2, 3)))

    with pytest.raises(UnsupportedPairError, match="differ by"):
        build(student=Hidden())


def test_transformers_and_unused_layers_are_refused():
    tokens = create_model("timm/vit_tiny_patch16_224", num_classes=5, img_size=32, depth=2)
    with pytest.raises(UnsupportedPairError, match=r"VisionTransformer.*kd"):
        build_distiller("gpd_reduced", tokens, input_size=32)
    spare = TinyNet()
    spare.spare = nn.Linear(3, 3)
    with pytest.raises(UnsupportedPairError, match="spare of TinyNet does not run"):
        build(student=spare)


@pytest.mark.parametrize("static", RESTRUCTURING)
def test_a_static_loss_that_restructures_is_refused(static):
    with pytest.raises(UnsupportedPairError, match=rf"static='{static}' has a export_student of its own.*'dkd'"):
        build(teacher=TinyTeacher(), static=static)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(DISTILLERS, "_items", dict(DISTILLERS._items))


def test_what_a_static_loss_may_not_do_is_found(registry):
    @register_distiller("own_predict")
    class OwnPredict(Distiller):
        def distill_terms(self, student, teacher, batch):
            return {}

        def predict(self, images):
            return self.student_net.module(images)

    @register_distiller("restructures")
    class Restructures(Distiller):
        def __init__(self, student, teacher, data, **base):
            super().__init__(student, teacher, data, **base)
            student.replace("head", student.submodule("head"))

        def distill_terms(self, student, teacher, batch):
            return {}

    @register_distiller("phased")
    class Phased(Distiller):
        def distill_terms(self, student, teacher, batch):
            return {}

        def phases(self):
            return (Phase("first", 1), Phase())

    for name, sentence in (
        ("own_predict", "predict of its own"),
        ("restructures", "restructures the student"),
        ("phased", "phases of its own"),
    ):
        with pytest.raises(UnsupportedPairError, match=sentence):
            build(teacher=TinyTeacher(), static=name)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"ratio": 1}, OptionError, "ratio must be an integer of at least 2; got 1"),
        ({"ratio": 2.0}, OptionError, r"got 2\.0"),
        ({"ratio": True}, OptionError, "got True"),
        ({"strategy": "softest"}, OptionError, "strategy is one of both, hard, soft; got 'softest'"),
        ({"noise": -1.0}, OptionError, "noise must be"),
        ({"noise": float("nan")}, OptionError, "noise must be"),
        ({"smoothing": 1.5}, OptionError, "smoothing must be from 0 to 1"),
        ({"static": "revewkd"}, UnknownNameError, "Did you mean 'reviewkd'"),
        ({"static": "kd", "static_options": {"temprature": 2.0}}, OptionError, "Did you mean 'temperature'"),
        ({"static": "kd", "static_options": {"temperature": "4"}}, OptionError, "temperature of kd must be a number; got '4'"),
        ({"static": None, "static_options": {"temperature": 2.0}}, OptionError, "leave them out"),
        ({"static_weights": "imagnet"}, OptionError, "Did you mean 'imagenet'"),
        ({"static_weights": {"kd": 1.0}}, OptionError, "term of DKD"),
        ({"weights": {"dynamics": 1.0}}, OptionError, "Did you mean 'dynamic'"),
        ({"branch_start": "fresh"}, OptionError, "branch_start is one of pretrained, scratch"),
    ],
)
def test_bad_options_are_refused(options, error, sentence):
    with pytest.raises(error, match=sentence):
        build(**{"name": "gpd", "teacher": TinyTeacher()} | options)


# ------------------------------------------------------------------------------------------------------ losses


def test_the_loss_is_the_two_entropies():
    torch.manual_seed(0)
    student, dynamic = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    loss = dynamic_teacher_loss(student, dynamic)
    wanted = 0.0
    for zs, zd in zip(student.tolist(), dynamic.tolist(), strict=True):
        total, other = (sum(torch.tensor(z).exp().tolist()) for z in (zs, zd))
        log_p = [z - torch.tensor(total).log().item() for z in zs]
        q = [torch.tensor(z).exp().item() / other for z in zd]
        wanted -= sum((0.9 * q[c] + 0.1 / 5) * log_p[c] for c in range(5)) / 3
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    assert dynamic.grad is None
    torch.testing.assert_close(student.grad, (student.softmax(1) - 0.9 * dynamic.softmax(1) - 0.02).detach() / 3)
    assert torch.isfinite(dynamic_teacher_loss(torch.tensor([[0.0, 1e4]]), torch.tensor([[1e4, 0.0]])))
    assert dynamic_teacher_loss(student.half(), dynamic.half()).dtype == torch.float32
    with pytest.raises(ShapeError, match=r"\(3, 5\) and \(3, 4\)"):
        dynamic_teacher_loss(student, dynamic[:, :4])


def step(distiller, size=6):
    torch.manual_seed(1)
    images, targets = torch.randn(size, 3, 16, 16), torch.arange(size) % 5
    return images, targets, distiller(images, targets)


def test_terms_are_the_losses_of_both_networks():
    teacher = TinyTeacher()
    distiller = build("gpd", teacher=teacher, static="kd", static_weights={"kd": 0.7}).train()
    reference = copy.deepcopy(distiller)
    images, targets, out = step(distiller)
    narrow, wide = reference.student_net(images).logits, reference.dynamic_net(images).logits
    expected = {
        "ce": F.cross_entropy(narrow, targets),
        "ce_dynamic": F.cross_entropy(wide, targets),
        "dynamic": dynamic_teacher_loss(narrow, wide),
    }
    kd = build_distiller("kd", TinyNet(), copy.deepcopy(teacher), data=tiny_data())
    taught = kd.teacher_net(images)
    for name, logits in (("static_kd", narrow), ("static_dynamic_kd", wide)):
        expected[name] = kd.distill_terms(Trace(logits, {}), taught, Batch(images, targets))["kd"]
    assert list(out.terms) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(out.terms[name], value)
    assert {name: float(weight) for name, weight in out.weights.items()} == pytest.approx(
        {"ce": 1.0, "ce_dynamic": 1.0, "dynamic": 3.0, "static_kd": 0.7, "static_dynamic_kd": 0.7}
    )


def test_one_backward_is_the_sum_of_two():
    distiller = build(weights={"dynamic": 2.0}).train()
    twin = copy.deepcopy(distiller)
    images, targets, out = step(distiller)
    out.loss.backward()
    narrow = twin.student_net(images).logits
    wide = twin.dynamic_net(images).logits
    F.cross_entropy(wide, targets).backward(retain_graph=True)
    (F.cross_entropy(narrow, targets) + 2.0 * dynamic_teacher_loss(narrow, wide)).backward()
    for (name, one), other in zip(distiller.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_the_static_loss_sees_the_widths_of_each():
    distiller = build(teacher=TinyTeacher(), static="fitnet", ratio=3)
    own, wide = distiller.static.student_net.shapes, distiller.static_dynamic.student_net.shapes
    assert {name: (3 * shape[0], *shape[1:]) for name, shape in own.items()} == {name: tuple(s) for name, s in wide.items()}
    _, _, out = step(distiller.train())
    out.loss.backward()
    assert {name.partition("_")[2] for name in out.terms if name.startswith("static_")} == {"hint", "dynamic_hint"}
    missing = [name for name, p in distiller.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert sum(name.startswith("static") for name, _ in distiller.named_parameters()) > 0


@pytest.mark.parametrize("static", [name for name in list_distillers() if name not in RESTRUCTURING])
def test_any_method_that_only_adds_losses_is_a_static_loss(static):
    options = {"negatives": 6} if static == "crd" else {}
    distiller = build("gpd", teacher=TinyTeacher(), static=static, static_options=options).train()
    index = torch.arange(6) if distiller.requires.index else None
    out = distiller(torch.randn(6, 3, 16, 16), torch.arange(6) % 5, index=index)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert [name for name, p in distiller.named_parameters() if p.requires_grad and p.grad is None] == []
    distiller.after_step()


def test_switches_leave_terms_out():
    teacher = TinyTeacher()
    assert list(build().weights) == ["ce", "ce_dynamic", "dynamic"]
    assert not build().requires.teacher
    assert list(build(teacher=teacher, static=None).weights) == ["ce", "ce_dynamic", "dynamic"]
    some = build(teacher=TinyTeacher(), teach_dynamic=False)
    assert list(some.weights) == ["ce", "ce_dynamic", "dynamic", "static_tckd", "static_nckd"]
    assert list(build(strategy="hard").weights) == ["ce", "ce_dynamic"]
    assert list(step(build(strategy="hard").train())[2].terms) == ["ce", "ce_dynamic"]


def test_weights_of_records_are_those_of_the_distiller():
    for options in ({}, {"static": "kd"}, {"static_weights": "imagenet"}, {"strategy": "hard", "teach_dynamic": False}):
        described = describe_distiller("gpd", **options)["weights"]
        built = build("gpd", teacher=TinyTeacher(), **options).weights
        assert described.keys() == built.keys()
        numbers = {name: value for name, value in described.items() if isinstance(value, float | int)}
        assert numbers == {name: built[name].final() for name in numbers}
    assert describe_distiller("gpd", static="kd", weights={"static_kd": 2.0})["weights"]["static_kd"] == 2.0


# ------------------------------------------------------------------------------------------------------ sharing


def parts(distiller):
    return [module for module in distiller.modules() if isinstance(module, DualOp)]


@pytest.mark.parametrize(("strategy", "shared"), [("both", True), ("hard", True), ("soft", False)])
def test_sharing_is_the_strategy(strategy, shared):
    """What the dynamic teacher learns by itself moves the student's weights where they are shared."""
    silent = {"ce": 0.0} | ({} if strategy == "hard" else {"dynamic": 0.0})
    distiller = build(strategy=strategy, weights=silent).train()
    distiller(torch.randn(4, 3, 16, 16), torch.arange(4)).loss.backward()
    with torch.no_grad():
        for parameter in distiller.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    moved = [not torch.equal(part.read("weight"), given) for part, given in zip(parts(distiller), START, strict=True)]
    assert moved == [shared] * len(moved)


START = [module.weight.detach().clone() for module in TinyNet().modules() if isinstance(module, nn.Conv2d | nn.Linear)]


@pytest.fixture(autouse=True)
def start():
    torch.manual_seed(0)
    START[:] = [module.weight.detach().clone() for module in TinyNet().modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def test_the_student_is_a_slice():
    distiller = build()
    for part, given in zip(parts(distiller), START, strict=True):
        dims = tuple(dim for dim in (0, 1) if part.weight.shape[dim] != given.shape[dim])
        torch.testing.assert_close(pick(part.weight, 2, dims, multiply=0 in dims), given)
        assert torch.equal(part.read("weight"), given)
    count = sum(p.numel() for p in TinyNet().parameters())
    assert sum(p.numel() for p in distiller.parameters()) > 2.5 * count


def test_the_widths_do_not_leak():
    """Neither a trace nor an error leaves the student wide."""
    distiller = build()
    mode = parts(distiller)[0].mode
    distiller.dynamic_net(torch.randn(2, 3, 16, 16))
    assert not mode.wide
    with pytest.raises(RuntimeError):
        distiller.dynamic_net(torch.randn(2, 4, 16, 16))
    assert not mode.wide


def test_noise_is_the_seeds_and_can_be_left_out():
    torch.manual_seed(0)
    student = TinyNet()

    def weights(seed, noise):
        distiller = build_distiller("gpd_reduced", copy.deepcopy(student), data=tiny_data(), seed=seed, noise=noise)
        return [part.weight.detach() for part in parts(distiller)]

    one, again, other, none = weights(1, 1e-3), weights(1, 1e-3), weights(2, 1e-3), weights(1, 0.0)
    assert all(map(torch.equal, one, again))
    assert not all(map(torch.equal, one, other))
    inner = none[1]
    assert torch.equal(inner[::2], inner[1::2])
    assert not torch.equal(one[1][::2], one[1][1::2])


def test_the_dynamic_pass_runs_under_the_loops_autocast():
    distiller = build(teacher=TinyTeacher()).train()
    seen = {}

    def note(module, args, out):
        seen[module.mode.wide] = out.dtype

    distiller.student.groups[0][0].conv.register_forward_hook(note)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = distiller(torch.randn(4, 3, 16, 16), torch.arange(4))
    assert seen == {False: torch.bfloat16, True: torch.bfloat16}
    assert out.loss.dtype == torch.float32
    seen.clear()
    distiller(torch.randn(4, 3, 16, 16), torch.arange(4))
    assert seen == {False: torch.float32, True: torch.float32}


@pytest.mark.parametrize("options", [{"strategy": "soft"}, {"static": "reviewkd"}, {"static": None, "ratio": 3}])
def test_the_contract_holds_with_other_options(options):
    check_distiller("gpd", options=options, skip={"check_compile": "the default options are compiled elsewhere"})


def test_it_composes_with_what_does_not_restructure():
    distiller = build("gpd_reduced+at", teacher=TinyTeacher()).train()
    _, _, out = step(distiller)
    out.loss.backward()
    assert "at.attention" in out.terms
    assert type(distiller.export_student()) is TinyNet
    with pytest.raises(UnsupportedPairError, match=r"groups\.2\.0\.conv of the student TinyNet already; compose with one"):
        build("kdiffusion+gpd_reduced", teacher=TinyTeacher())


def test_another_size_of_images_trains():
    distiller = build_distiller("gpd_reduced", create_model("resnet8", num_classes=10), data=DataSpec(10, (24, 40)), seed=0)
    out = distiller(torch.randn(3, 3, 24, 40), torch.arange(3))
    assert torch.isfinite(out.loss)

"""GPD: the students that it takes, of any floating type, with odd layers, and what they become after steps of training."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distillzoo import DataSpec, build_distiller, create_model
from distillzoo.engine import TrainConfig, Trainer, evaluate
from distillzoo.errors import UnsupportedPairError
from distillzoo.taps import Teacher
from distillzoo.testing import TinyNet, tiny_data
from tests.engine.networks import SmallLoader, SmallNet


def small(*inner, channels=4):
    """A student of five classes around some modules that see ``channels`` channels."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3), *inner, nn.Conv2d(channels, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    )


def build(student, method="gpd", **options):
    return build_distiller(method, student, data=tiny_data(), seed=0, **options)


def gap(one, other):
    return float((one - other).detach().abs().max() / other.detach().abs().max())


# -------------------------------------------------------------------------------------------------------- floating types


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize("inner", [TinyNet, lambda: small(nn.BatchNorm2d(4), nn.PReLU(4), nn.SiLU(), nn.PReLU())])
def test_students_of_half_types_are_widened_and_train(kind, inner):
    torch.manual_seed(0)
    student, x = inner().to(kind), torch.randn(6, 3, 16, 16, dtype=kind)
    plain = copy.deepcopy(student)
    distiller = build(student, branch_start="pretrained", ratio=3).train()  # 2 hardly rounds
    with torch.no_grad():
        assert gap(distiller.eval().dynamic_net(x).logits, plain.eval()(x)) < 0.05
    out = distiller.train()(x, torch.arange(6) % 5)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert {p.dtype for p in distiller.parameters()} == {kind}
    exported = distiller.eval().export_student()
    assert gap(exported(x), distiller.predict(x)) < 0.02
    plain.load_state_dict(exported.state_dict(), strict=True)


@pytest.mark.parametrize("kind", HALF)
def test_what_bends_copies_is_refused_of_half_types_as_well(kind):
    class Bent(TinyNet):
        def forward(self, x):
            return self.head(F.silu(self.groups[2](self.groups[1](self.groups[0](self.stem(x))))).mean((2, 3)))

    with pytest.raises(UnsupportedPairError, match="its logits then differ by"):
        build(Bent().to(kind))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_precision_of_products_does_not_refuse_a_student(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        build(TinyNet())
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_student_that_turns_to_single_precision_is_tried_in_it():
    class Single(nn.Module):
        def forward(self, x):
            return F.relu(x.float())

    class SinglePReLU(nn.PReLU):
        def forward(self, x):
            return super().forward(x.float())

    build(small(Single()))
    build(small(SinglePReLU(4)))


# ------------------------------------------------------------------------------------------------------------ odd layers


def steps(distiller, number=3, size=16):
    """Train some steps on eight images."""
    distiller.train()
    optimizer = torch.optim.SGD(distiller.parameters(), 0.05, momentum=0.9)
    for _ in range(number):
        optimizer.zero_grad()
        out = distiller(torch.randn(8, 3, size, size), torch.arange(8) % 5)
        out.loss.backward()
        optimizer.step()
        distiller.after_step()
    return distiller.eval()


def test_a_fresh_student_whose_norms_average_all_batches_trains():
    """Its rate is 1 / 0 before the first batch, which only counts in training mode."""
    torch.manual_seed(0)
    student = small(nn.BatchNorm2d(4, momentum=None), nn.ReLU())
    plain, x = copy.deepcopy(student), torch.randn(4, 3, 16, 16)
    distiller = steps(build(student))
    norm = distiller.student[1]
    assert norm.num_batches_tracked == norm.wide_batches_tracked == 3
    assert torch.isfinite(norm.wide_var).all()
    exported = distiller.export_student()
    assert gap(exported(x), distiller.predict(x)) < 1e-5
    plain.load_state_dict(exported.state_dict(), strict=True)
    assert plain[1].running_mean.abs().max() > 0.0


class Gain(nn.Module):
    """One number for the whole map, as a tensor without dimensions."""

    def __init__(self, bend=None):
        super().__init__()
        self.gain, self.bend = nn.Parameter(torch.tensor(0.0)), bend or F.relu
        self.register_buffer("floor", torch.tensor(-0.25))

    def forward(self, x):
        return x.clamp(min=self.floor) + self.gain * self.bend(x)


def test_a_parameter_without_dimensions_is_one_of_both_widths():
    torch.manual_seed(0)
    student = small(Gain(), nn.BatchNorm2d(4))
    plain, x = copy.deepcopy(student), torch.randn(4, 3, 16, 16)
    distiller = build(student, branch_start="pretrained").eval()
    with torch.no_grad():
        assert gap(distiller.dynamic_net(x).logits, plain.eval()(x)) < 1e-5
    exported = steps(distiller).export_student()
    assert gap(exported(x), distiller.predict(x)) < 1e-5
    plain.load_state_dict(exported.state_dict(), strict=True)
    assert plain[1].gain.shape == ()
    assert plain[1].gain != 0.0


class Residual(TinyNet):
    """A branch that bends copies, behind something that is 0 at the start."""

    def __init__(self, *, gain):
        super().__init__()
        self.branch = nn.Conv2d(8, 8, 1, bias=False)
        self.gain = nn.Parameter(torch.tensor(0.0 if gain else 1.0))
        if not gain:
            nn.init.zeros_(self.branch.weight)

    def forward(self, images):
        x = self.stem(images)
        for group in self.groups:
            x = group(x)
        return self.head((x + self.gain * F.silu(self.branch(x))).mean((2, 3)))


@pytest.mark.parametrize("gain", [False, True])
def test_an_error_that_a_fresh_gain_or_weight_hides_is_found(gain):
    with pytest.raises(UnsupportedPairError, match="its logits then differ by"):
        build(Residual(gain=gain))


# ------------------------------------------------------------------------------------------------------- after training


class Checkpointed(TinyNet):
    """Computes the inside of its groups again in the backward pass."""

    reentrant = False

    def forward(self, images):
        x = self.stem(images)
        for group in self.groups:
            x = checkpoint(group, x, use_reentrant=self.reentrant) if self.training else group(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_student_that_computes_activations_again_is_refused_and_left_as_it_was(reentrant):
    student = Checkpointed()
    student.reentrant = reentrant
    given, draws = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    with pytest.raises(UnsupportedPairError, match=r"cannot be trained 2 times as wide: the backward pass .*checkpointing"):
        build(student, "gpd_reduced")
    assert torch.equal(torch.get_rng_state(), draws)
    assert type(student.groups[0][0].conv) is nn.Conv2d
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, given[name])
    assert all(parameter.grad is None for parameter in student.parameters())


def check_trained(student, method="gpd", size=16):
    """Some steps tell the copies apart; what is exported is the narrow network, in eval and in training mode."""
    plain, x = copy.deepcopy(student), torch.randn(6, 3, size, size)
    distiller = steps(build_distiller(method, student, data=DataSpec(5, (size, size)), seed=0), size=size)
    with torch.no_grad():
        wanted = distiller.predict(x)
        exported = distiller.export_student()
        assert gap(exported.eval()(x), wanted) < 1e-5
        assert gap(distiller.dynamic_net(x).logits, wanted) > 1e-3
        assert gap(plain.eval()(x), wanted) > 1e-3
        assert gap(exported.train()(x), distiller.train().predict(x)) < 1e-4
    assert str(exported.eval()) == str(plain)
    plain.load_state_dict(exported.state_dict(), strict=True)


STRUCTURES = {
    "depthwise": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU6()),
    "shuffled": lambda: nn.Sequential(nn.Conv2d(8, 8, 1, groups=4, bias=False), nn.ChannelShuffle(4), nn.BatchNorm2d(8)),
    "branched": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU()),
}


@pytest.mark.parametrize("method", ["gpd", "gpd_reduced"])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_what_is_exported_after_training_is_the_narrow_network(kind, method):
    torch.manual_seed(0)
    check_trained(small(STRUCTURES[kind](), nn.Conv2d(8, 8, 3, 2, groups=2), nn.ReLU(), channels=8), method)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv2", "shufflenetv1", "shufflenetv2"])
def test_networks_by_name_are_exported_after_training(name):
    torch.manual_seed(0)
    check_trained(create_model(name, num_classes=5), size=32)


def test_clipped_and_averaged_training_exports_the_average():
    torch.manual_seed(0)
    student, teacher, train = SmallNet(4), SmallNet(6), SmallLoader(24, 8)
    plain, frozen = copy.deepcopy(student), Teacher(teacher, train.spec)
    distiller = build_distiller("gpd", student, frozen, data=train.spec, seed=0, static="kd")
    config = TrainConfig(epochs=2, batch_size=8, clip_norm=5.0, ema_decay=0.9)
    evaluation = SmallLoader(12, 6, shuffle=False)
    trainer = Trainer({"gpd": distiller}, frozen, train, evaluation, config, seed=0)
    result, member, x = trainer.run()["gpd"], trainer.members["gpd"], evaluation.images
    exported = member.export_student().eval()
    with torch.no_grad():
        assert gap(exported(x), member.predict(x)) < 1e-5
        assert gap(exported(x), distiller.eval().predict(x)) > 1e-4
        assert not gap(exported(x), distiller.dynamic_net(x).logits) < 1e-4
    assert evaluate(exported, evaluation, config, torch.device("cpu"))[0] == result.last_accuracy
    assert str(exported) == str(plain.eval())
    plain.load_state_dict(exported.state_dict(), strict=True)

"""KDiffusion on students of every style: functions for activations, stochastic depth, half types, shared tensors, zero scales."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distillzoo import build_distiller, create_model
from distillzoo.adapters.bridge import Bridge
from distillzoo.adapters.reparam import Branched
from distillzoo.errors import UnsupportedPairError
from distillzoo.models.resnet import BasicBlock
from distillzoo.testing import CHECKS, Subject, TinyNet, TinyTeacher, tiny_data, tiny_pair
from tests.methods.test_kdiffusion import batch, bridged_inputs, build, train


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------ what is read of them


class FunctionBlock(BasicBlock):
    """A residual block as many write it: no module stands for its activations."""

    def forward(self, x):
        inner = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(inner)) + self.downsample(x), inplace=True)


def with_functions(name):
    """One of our residual networks whose blocks end with a function; its own stages name modules that are gone."""
    network = create_model(name, num_classes=5)
    for block in (module for module in network.modules() if isinstance(module, BasicBlock)):
        block.__class__ = FunctionBlock
        del block.relu1, block.relu2
    return network


@pytest.mark.parametrize("options", [{}, {"layers": "all", "guide": True}, {"guide": True, "objective": "average"}], ids=str)
def test_blocks_that_end_with_a_function_are_read_as_those_that_end_with_a_module(options):
    groups = ["layer1", "layer2", "layer3"]
    torch.manual_seed(1)
    networks = [with_functions("resnet8"), with_functions("resnet20")]
    taps = {"student": groups, "teacher": groups}
    functional = build_distiller("kdiffusion", *networks, input_size=32, seed=0, taps=taps, **options)
    assert [functional.student_net.path(layer.total) for layer in functional.layers][-1] == "layer3:activation"
    images = batch()
    torch.testing.assert_close(functional(*images).terms, build(**options)(*images).terms)
    train(functional, 3).eval()
    exported = functional.export_student().eval()
    torch.testing.assert_close(exported(images[0]), functional.predict(images[0]), rtol=1e-4, atol=1e-4)


class DropPath(nn.Module):
    def forward(self, x):
        return x * (torch.rand(len(x), 1, 1, 1) < 0.5) * 2.0 if self.training else x


class DroppingBlock(BasicBlock):
    """A residual block with stochastic depth, by a module or by a function."""

    def forward(self, x):
        inner = self.relu1(self.bn1(self.conv1(x)))
        dropped = self.drop(self.bn2(self.conv2(inner)))
        if self.drop_by_function and self.training:
            dropped = dropped * (torch.rand(len(x), 1, 1, 1) < 0.5) * 2.0
        dropped += self.downsample(x)
        return self.relu2(dropped)


def dropping(*, by_function=False):
    network = create_model("resnet8", num_classes=5)
    for block in (module for module in network.modules() if isinstance(module, BasicBlock)):
        block.__class__ = DroppingBlock
        block.drop, block.drop_by_function = nn.Identity() if by_function else DropPath(), by_function
    return network


@pytest.mark.parametrize("by_function", [False, True], ids=["module", "function"])
@pytest.mark.parametrize("mode", [True, False], ids=["training", "eval"])
def test_with_stochastic_depth_a_branch_is_read_as_it_is(by_function, mode):
    distiller = build(dropping(by_function=by_function), layers="all", guide=True).train(mode)
    block = distiller.student.layer3[0]
    outputs, images = {}, batch(count=12)
    for name in ("downsample", "conv2", *(f"conv2.branches.{i}" for i in range(4))):
        block.get_submodule(name).register_forward_hook(lambda m, a, output, name=name: outputs.update({name: output.clone()}))
    means = []
    distiller.bridges["stage3"].mean = lambda mean: means.append(mean) or Bridge.mean(distiller.bridges["stage3"], mean)
    features = bridged_inputs(distiller, "stage3", images)
    shortcut = 0.0 if by_function else outputs["downsample"]  # where no module drops, the op is read alone, in eval mode as well
    for i, feature in enumerate(features):
        torch.testing.assert_close(feature, outputs[f"conv2.branches.{i}"] + shortcut)
    torch.testing.assert_close(means[0], outputs["conv2"] + shortcut)
    exported = distiller.eval().export_student()
    torch.testing.assert_close(exported(images[0]), distiller.predict(images[0]), rtol=1e-4, atol=1e-5)


def test_trying_what_is_dropped_draws_nothing_from_the_users_generator():
    torch.manual_seed(1)
    networks = dropping(), create_model("resnet20", num_classes=5)
    before = torch.get_rng_state()
    build_distiller("kdiffusion", *networks, input_size=32, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"guide": True, "layers": "all"}, {"guide": True, "guide_on": "final"}], ids=str)
def test_networks_of_half_types_are_guided(options, dtype):
    torch.manual_seed(1)
    networks = [create_model(name, num_classes=5).to(dtype) for name in ("resnet8", "resnet20")]
    distiller = build_distiller("kdiffusion", *networks, input_size=32, seed=0, **options)
    images, targets = batch()
    out = distiller(images.to(dtype), targets)
    assert out.terms["guide"].dtype is torch.float32
    assert torch.isfinite(out.loss)
    out.loss.backward()
    for name, parameter in distiller.named_parameters():
        assert not parameter.requires_grad or torch.isfinite(parameter.grad).all(), name
    exact = build(**options)  # the same networks in single precision
    torch.testing.assert_close(out.terms["guide"], exact(images, targets).terms["guide"], rtol=0.1, atol=0.0)


# ------------------------------------------------------------------------------------------------ what folds back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "fresh norms agree"])
def test_an_op_whose_output_is_read_elsewhere_too_is_refused(inplace, dtype):
    class Twice(TinyNet):
        def forward(self, images):
            x = self.stem(images)
            x = self.groups[1](self.groups[0](x))
            block = self.groups[2][0]
            raw = block.conv(x)
            return self.head((block.act(block.norm(raw)) + raw).mean((2, 3)))

    student, teacher = Twice().to(dtype), TinyTeacher().to(dtype)
    student.groups[2][0].act.inplace = inplace
    taps = {"student": ["groups.1.0", "groups.2.0.act"]}
    with pytest.raises(UnsupportedPairError, match=r"groups\.2\.0\.conv of Twice do not fold back.*by hand"):
        build_distiller("kdiffusion", student, teacher, data=tiny_data(), taps=taps)


def test_a_norm_that_normalises_another_op_as_well_is_refused():
    class Shared(TinyNet):
        def forward(self, images):
            x = self.stem(images)
            x = self.groups[1](self.groups[0](x))
            block = self.groups[2][0]
            return self.head(block.act(block.norm(block.conv(x)) + block.norm(self.other(x))).mean((2, 3)))

    student = Shared()
    student.other = nn.Conv2d(6, 8, 1, 2, bias=False)
    taps = {"student": ["groups.1.0", "groups.2.0.act"]}
    with pytest.raises(UnsupportedPairError, match=r"do not fold back"):
        build_distiller("kdiffusion", student, TinyTeacher(), data=tiny_data(), taps=taps)


def test_an_op_that_shares_its_weight_with_another_is_refused_and_the_student_left_as_it_was():
    student = TinyNet((6, 6, 6))
    student.groups[2][0].conv.weight = student.groups[0][0].conv.weight
    with pytest.raises(UnsupportedPairError, match=r"groups\.0\.0\.conv\.weight and groups\.2\.0\.conv\.weight of TinyNet are one"):
        build_distiller("kdiffusion", student, TinyTeacher(), data=tiny_data())
    assert not any(isinstance(module, Branched) for module in student.modules())
    distiller = build_distiller("kdiffusion", student, TinyTeacher(), data=tiny_data(), layers="middle")
    exported = distiller.export_student()
    assert exported.groups[2][0].conv.weight is exported.groups[0][0].conv.weight


def test_a_frozen_op_is_refused_but_by_a_single_branch():
    student = TinyNet()
    student.groups[2].requires_grad_(False)
    with pytest.raises(UnsupportedPairError, match=r"groups\.2\.0\.conv\.weight of TinyNet requires no gradient.*layers="):
        build_distiller("kdiffusion", student, TinyTeacher(), data=tiny_data())
    build_distiller("kdiffusion", copy.deepcopy(student), TinyTeacher(), data=tiny_data(), layers="middle")
    single = build_distiller("kdiffusion", copy.deepcopy(student), TinyTeacher(), data=tiny_data(), branches=1)
    kept = single.student.groups[2][0].conv.branches[0].op.weight
    assert torch.equal(kept, student.groups[2][0].conv.weight)


def test_blocks_that_start_as_nothing_do_so_with_branches():
    student = create_model("resnet8", num_classes=5)
    nn.init.zeros_(student.layer3[0].bn2.weight)
    plain = copy.deepcopy(student)
    distiller, images = build(student, guide=True), batch()
    torch.testing.assert_close(distiller.train()(*images).logits, plain.train()(images[0]))
    train(distiller, 2)
    assert all(branch.norm.weight.any() for branch in distiller.student.layer3[0].conv2.branches)


def test_a_student_whose_forward_casts_to_single_precision_folds_as_well():
    class Casts(TinyNet):
        def forward(self, images):
            return super().forward(images.float())

    distiller = build_distiller("kdiffusion", Casts(), TinyTeacher(), data=tiny_data())
    assert isinstance(distiller.student.groups[2][0].conv, Branched)


# ------------------------------------------------------------------------------------------------ the contract, with a guide


COMPILED = pytest.param("check_compile", marks=pytest.mark.slow)


@pytest.mark.parametrize("check", [COMPILED, "check_resume", "check_export", "check_eval", "check_moves"])
def test_a_guided_distiller_keeps_the_contract(check):
    CHECKS[check](Subject("kdiffusion", tiny_pair, {"guide": True, "layers": "all"}, tiny_data()))

"""What feeds a tap and what follows it, found by running the network: in networks written in every style, none known by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo import create_model
from distillzoo.dataflow import (
    Flow,
    RemainingPath,
    inner_widths,
    linear_sites,
    reaches_by_addition,
    same_function,
    tap_before_activation,
)
from distillzoo.dataflow.experiments import is_linear_op, last_function
from distillzoo.errors import OptionError, TapError, UnsupportedPairError
from distillzoo.stages import Probe
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import DataSpec, Stage

DATA = DataSpec(5, (16, 16))
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class OwnConv(nn.Module):
    """A convolution that is no ``nn.Conv2d``, so that nothing can know it by its class."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, kernel, kernel) * 0.3)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, self.stride, self.weight.shape[-1] // 2)


class Squared(OwnConv):
    """Linear in its input but not in its weight: the mean of two is no third."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.square(), None, self.stride, self.weight.shape[-1] // 2)


class Gate(nn.Module):
    """Scales the channels by what two linear layers make of their means: deeper than the convolution it scales."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()))


class Residual(nn.Module):
    """A block with everything that misleads: control flow, a shortcut that runs last, sums and activations in place."""

    def __init__(self, cin: int, cout: int, *, gate: bool = False, conv: type[nn.Module] = OwnConv) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(cin, cout, 3, 2), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = conv(cout, cout), nn.BatchNorm2d(cout)
        self.short = nn.Sequential(conv(cin, cout, 1, 2), nn.BatchNorm2d(cout))
        self.gate = Gate(cout) if gate else nn.Identity()
        self.act = nn.ReLU(inplace=True)  # called twice

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().abs().mean()) < 0:  # what tracers of the source stop at
            return x
        out = self.act(self.bn1(self.conv1(x)))
        out = self.gate(self.bn2(self.conv2(out)))
        out += self.short(x)
        return self.act(out)


class FunctionResidual(Residual):
    """The same with functions in the place of modules: what its sum was before the last one passes no module."""

    inplace = False

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.bn1(self.conv1(x)), 0.1, inplace=self.inplace)
        out = self.gate(self.bn2(self.conv2(out)))
        return F.leaky_relu(out + self.short(x), 0.1, inplace=self.inplace)


class FunctionResidualInPlace(FunctionResidual):
    inplace = True


class DropPath(nn.Module):
    """Stochastic depth: whole images of what a branch adds are dropped, in training mode alone."""

    def __init__(self, rate: float = 0.5, *, scaled: bool = True) -> None:
        super().__init__()
        self.kept, self.scale = 1.0 - rate, 1.0 - rate if scaled else 1.0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(len(x), 1, 1, 1) < self.kept) / self.scale


class Dropping(Residual):
    def __init__(self, cin: int, cout: int, **options) -> None:
        super().__init__(cin, cout)
        self.drop = DropPath(**options)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.drop(self.bn2(self.conv2(out)))
        out += self.short(x)
        return self.act(out)


class NormAct(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module, width: int = 8, functional: bool = False) -> None:
        super().__init__()
        self.stem = OwnConv(3, 6)
        self.blocks = nn.ModuleList(blocks)
        self.functional = functional
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            if self.functional:
                x = F.relu(x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def flow_of(*blocks: nn.Module, **options) -> Flow:
    return Flow(Net(*blocks, **options), DATA)


# ------------------------------------------------------------------------------------------------ what feeds a tap

FAMILIES = [
    "resnet8", "resnet50", "wrn_16_1", "vgg8", "vgg13", "mobilenetv2", "shufflenetv1", "shufflenetv2", "tinycnn_8", "tinycnn_32",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_found_is_what_our_networks_declare(name):
    network = create_model(name, num_classes=5)
    flow = Flow(network, DataSpec(5, (32, 32)))
    for stage in network.stages:
        assert (flow.linear(stage.path), flow.norm_after(stage.linear)) == (stage.linear, stage.linear_norm)
        bare = Stage(stage.path)
        inside = stage.pre is not None and stage.pre.startswith(stage.path)  # a pre-activation network's lies in the next stage
        assert flow.before_activation(bare) == (stage.pre if inside else stage.path)


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
def test_the_last_op_of_a_residual_block_is_neither_its_shortcut_nor_its_gate(gate):
    flow = flow_of(Residual(6, 8, gate=gate))
    assert flow.linear("blocks.0") == flow.linear("blocks.0.act:input") == "blocks.0.conv2"
    assert flow.norm_after("blocks.0.conv2") == "blocks.0.bn2"
    assert flow.before_activation(Stage("blocks.0")) == "blocks.0.act:input"


def test_maps_of_one_position_do_not_make_a_gate_the_last_op():
    network = Net(nn.Sequential(Residual(6, 8, gate=True), nn.AdaptiveAvgPool2d(1), Residual(8, 8, gate=True)))
    assert Flow(network, DATA).linear("blocks.0.2") == "blocks.0.2.conv2"
    network.blocks[0][2].bn2 = nn.Identity()
    assert Flow(network, DATA).linear("blocks.0.2") == "blocks.0.2.conv2", "not the shortcut, which has a norm"


def test_the_activation_inside_a_norm_is_found_and_a_functional_one_is_not():
    fused = flow_of(nn.Sequential(OwnConv(6, 8), NormAct(8)))
    assert fused.before_activation(Stage("blocks.0")) == "blocks.0.1.act:input"
    assert fused.norm_after("blocks.0.0") == "blocks.0.1"
    functional = flow_of(OwnConv(6, 8), functional=True)
    assert functional.before_activation(Stage("blocks.0")) == "blocks.0"


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (nn.PReLU(8), "blocks.0.1:input"),
        (nn.GELU(), "blocks.0.1:input"),
        (nn.Identity(), "blocks.0"),
        (nn.Dropout(), "blocks.0"),
        (nn.Softmax(1), "blocks.0"),  # no element by itself
        (nn.AvgPool2d(3, 1, 1), "blocks.0"),
        (nn.BatchNorm2d(8), "blocks.0"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_activation_is_what_maps_elements_one_by_one_and_not_affinely(last, expected):
    assert flow_of(nn.Sequential(OwnConv(6, 8), last)).before_activation(Stage("blocks.0")) == expected


def test_an_op_that_is_not_linear_in_its_weight_is_passed_over():
    flow = flow_of(OwnConv(6, 6), Squared(6, 8))
    assert flow.linear("blocks.1") == "blocks.0"


def test_an_op_that_runs_twice_is_passed_over():
    twice = OwnConv(8, 8)
    assert flow_of(OwnConv(6, 8), nn.Sequential(twice, nn.ReLU(), twice)).linear("blocks.1") == "blocks.0"


def test_a_norm_without_statistics_is_none():
    assert flow_of(nn.Sequential(OwnConv(6, 8), nn.GroupNorm(2, 8))).norm_after("blocks.0.0") is None


def test_without_any_linear_op_the_error_names_those_that_there_are():
    network = nn.Sequential(nn.AvgPool2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))
    with pytest.raises(UnsupportedPairError, match=r"feeds the tap '1'; its linear ops are 3\. Name one by hand: taps="):
        Flow(network, DATA).linear("1")


def test_a_tap_that_is_not_reached_is_an_error():
    network = Net(OwnConv(6, 8))
    network.unused = nn.ReLU()
    with pytest.raises(TapError, match="does not reach 'unused'"):
        Flow(network, DATA).linear("unused")


@pytest.mark.parametrize("grad", [False, True])
def test_a_network_without_gradients_is_refused(grad):
    class Graphless(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
                self.fc.weight.add_(0.0)  # no leaf may be written to while gradients are recorded
                return super().forward(x)

    with pytest.raises(UnsupportedPairError, match="What Graphless computes of its images keeps no gradients"):
        Flow(Graphless(OwnConv(6, 8)), DATA).linear("fc")
    with pytest.raises(UnsupportedPairError, match=r"fails where they are on \(a leaf" if grad else "switches them off;"):
        inner_widths(Flow(Graphless(OwnConv(6, 8)), DATA))


def test_what_a_stage_says_by_hand_is_taken():
    network = Net(nn.Sequential(OwnConv(6, 8), NormAct(8), OwnConv(8, 8)))
    net = Tapped(network, DATA, stages=[Stage("blocks.0", linear="blocks.0.0")])
    assert linear_sites(net, Flow(network, DATA), ["stage1"]) == {"stage1": ("blocks.0.0", "blocks.0.1")}
    net = Tapped(network, DATA, stages=["blocks.0"])
    assert linear_sites(net, Flow(network, DATA), ["stage1"]) == {"stage1": ("blocks.0.2", None)}


def test_two_stages_with_one_op_and_a_stage_without_maps_are_refused():
    network = Net(nn.Sequential(OwnConv(6, 8), nn.ReLU()))
    flow = Flow(network, DATA)
    with pytest.raises(OptionError, match=r"stage1 at blocks\.0\.0, stage2 at blocks\.0\.0\. Choose fewer"):
        linear_sites(Tapped(network, DATA, stages=["blocks.0.0", "blocks.0"]), flow, ["stage1", "stage2"])
    with pytest.raises(UnsupportedPairError, match=r"student stage1 is \(8,\)"):
        linear_sites(Tapped(network, DATA, stages=["fc:input"]), flow, ["stage1"])


def test_the_dry_run_leaves_the_network_as_it_was():
    network = Net(Residual(6, 8)).train()
    network.blocks[0].bn1.eval()
    before = copy.deepcopy(network.state_dict())
    flow = Flow(network, DATA)
    flow.linear("blocks.0")
    flow.before_activation(Stage("blocks.0"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.training
    assert not network.blocks[0].bn1.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


BLOCKS = pytest.mark.parametrize("block", [FunctionResidual, FunctionResidualInPlace])


@BLOCKS
def test_what_a_function_takes_is_fed_by_what_feeds_the_sum(block):
    flow = flow_of(block(6, 6), block(6, 8))
    assert flow.linear("blocks.1:activation") == "blocks.1.conv2"
    assert flow.linear_after("blocks.0:activation") == "blocks.1.conv1"
    assert flow.before_activation(Stage("blocks.1", "blocks.1:activation")) == "blocks.1:activation"


# ------------------------------------------------------------------------------------------------ additions


@BLOCKS
def test_a_norm_reaches_what_a_function_takes_and_not_what_it_makes(block):
    network = Net(block(6, 8))
    assert reaches_by_addition(network, DATA, "blocks.0.bn2", "blocks.0:activation")
    assert not reaches_by_addition(network, DATA, "blocks.0.bn2", "blocks.0")
    assert not reaches_by_addition(network, DATA, "blocks.0.bn1", "blocks.0:activation")


def test_a_module_that_ends_with_no_function_has_no_such_tap():
    network = Net(OwnConv(6, 8))
    with pytest.raises(TapError, match=r"'blocks\.0:activation' asks for .* before its activation.*does not end"):
        reaches_by_addition(network, DATA, "stem", "blocks.0:activation")


def test_a_norm_reaches_the_sum_before_the_activation_by_addition_and_not_what_follows():
    network = Net(Residual(6, 8))
    assert reaches_by_addition(network, DATA, "blocks.0.bn2", "blocks.0.act:input")
    assert not reaches_by_addition(network, DATA, "blocks.0.bn2", "blocks.0")  # rectified
    assert not reaches_by_addition(network, DATA, "blocks.0.conv2", "blocks.0.act:input")  # a fresh norm: almost the identity
    assert not reaches_by_addition(network, DATA, "blocks.0.conv1", "blocks.0.act:input")


@pytest.mark.parametrize("options", [{}, {"scaled": False}, {"rate": 0.05}], ids=str)
def test_what_is_dropped_at_random_is_added_in_eval_mode_alone(options):
    network, generator = Net(Dropping(6, 8, **options)), torch.get_rng_state()
    before = copy.deepcopy(network.state_dict())
    for source, training, expected in (("bn2", False, True), ("bn2", True, False), ("drop", False, True), ("drop", True, True)):
        source, tap = f"blocks.0.{source}", "blocks.0.act:input"
        assert reaches_by_addition(network, DATA, source, tap, training=training) is expected
    assert not reaches_by_addition(network, DATA, "blocks.0.drop", "blocks.0", training=True)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.training


@pytest.mark.parametrize("earlier", [Residual, Dropping])
def test_what_is_always_added_is_so_in_training_mode_too_whatever_is_dropped_before(earlier):
    network = Net(earlier(6, 6), Residual(6, 8))
    assert reaches_by_addition(network, DATA, "blocks.1.bn2", "blocks.1.act:input", training=True)


def test_modules_that_do_nothing_in_eval_mode_hand_on_what_they_take():
    flow = flow_of(Dropping(6, 6), nn.Sequential(OwnConv(6, 8), nn.Identity(), nn.Dropout(), nn.ReLU()))
    assert flow.handed_on("blocks.0.bn2") == ["blocks.0.drop"]
    assert flow.handed_on("blocks.1.0") == ["blocks.1.2", "blocks.1.1"]
    assert flow.handed_on("blocks.0.conv2") == []


def test_gates_and_concatenations_are_no_additions():
    assert not reaches_by_addition(Net(Residual(6, 8, gate=True)), DATA, "blocks.0.bn2", "blocks.0.act:input")
    assert not reaches_by_addition(create_model("shufflenetv2", num_classes=5), DATA, "layer3.3.branch.bn3", "layer3")


def test_a_pre_activation_network_is_reached_at_the_raw_stream_only():
    network = create_model("wrn_16_1", num_classes=5)
    assert reaches_by_addition(network, DATA, "block3.1.conv2", "block3")
    assert not reaches_by_addition(network, DATA, "block3.1.conv2", "bn")


def test_networks_are_compared_by_what_they_return():
    network = Net(Residual(6, 8))
    assert same_function(network, copy.deepcopy(network), DATA)
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.fc.bias.add_(1.0)
    assert not same_function(network, other, DATA)


# ------------------------------------------------------------------------------------------------ what follows a tap


def teacher_path(network: nn.Module, size: int, stage: int = -1) -> tuple[Teacher, RemainingPath, str]:
    data = DataSpec(5, (size, size))
    teacher = Teacher(network, data)
    flow = Flow(network, data)
    number = range(1, len(teacher.stages) + 1)[stage]
    tap = tap_before_activation(teacher, flow, f"stage{number}")
    path = flow.before_activation(teacher.stages[stage])
    shape = teacher.shapes[tap]
    stop = None if number == len(teacher.stages) else flow.linear_after(path)
    teacher.request(tap)
    return teacher, RemainingPath(flow, path, shape, shape[1:], stop), tap


@pytest.mark.parametrize("name", FAMILIES[:8])
def test_from_the_last_stage_the_path_goes_to_the_logits_themselves(name):
    teacher, path, tap = teacher_path(create_model(name, num_classes=5), 32)
    trace = teacher(torch.randn(3, 3, 32, 32))
    before = trace.features[tap].clone()
    torch.testing.assert_close(path(trace.features[tap]), trace.logits)
    assert torch.equal(trace.features[tap], before)


@pytest.mark.parametrize(
    ("name", "op"),
    [("resnet8", "layer2.0.conv1"), ("wrn_16_1", "block2.0.shortcut"), ("vgg8", "block2.0"), ("mobilenetv2", "blocks.2.0.expand")],
)
def test_from_an_inner_stage_it_goes_to_the_next_linear_op(name, op):
    network = create_model(name, num_classes=5)
    teacher, path, tap = teacher_path(network, 32, 0)
    seen = []
    network.get_submodule(op).register_forward_hook(lambda module, args, output: seen.append(output))
    trace = teacher(torch.randn(3, 3, 32, 32))
    later = path(trace.features[tap])
    torch.testing.assert_close(later, seen[0])


def test_shared_activations_and_sums_in_place_are_followed():
    network = Net(Residual(6, 6), Residual(6, 8))
    teacher = Teacher(network, DATA, stages=["blocks.0", "blocks.1"])
    flow = Flow(network, DATA)
    for stage, stop in ((1, "blocks.1.conv1"), (2, None)):
        tap = tap_before_activation(teacher, flow, f"stage{stage}")
        teacher.request(tap)
        shape = teacher.shapes[tap]
        assert flow.linear_after(f"blocks.{stage - 1}.act:input") == (stop or "fc")
        path = RemainingPath(flow, f"blocks.{stage - 1}.act:input", shape, shape[1:], stop)
        trace = teacher(IMAGES)
        before = trace.features[tap].clone()
        result = path(trace.features[tap])
        expected = network.fc(before.relu().mean((2, 3))) if stop is None else network.blocks[1].conv1(before.relu())
        torch.testing.assert_close(result, expected)
        assert torch.equal(trace.features[tap], before)  # the activation that follows works in place


@BLOCKS
def test_the_path_from_what_a_function_takes_begins_with_that_function(block):
    network = Net(block(6, 6), block(6, 8))
    teacher = Teacher(network, DATA, stages=["blocks.0", "blocks.1"])
    flow = Flow(network, DATA)
    for stage, stop in ((1, "blocks.1.conv1"), (2, None)):
        tap = tap_before_activation(teacher, flow, f"stage{stage}")
        assert teacher.path(tap) == f"blocks.{stage - 1}:activation"
        teacher.request(tap)
        shape = teacher.shapes[tap]
        path = RemainingPath(flow, teacher.path(tap), shape, shape[1:], stop)
        trace = teacher(IMAGES)
        before = trace.features[tap].clone()
        assert (before < -0.1).any()
        after = F.leaky_relu(before, 0.1)
        torch.testing.assert_close(
            path(trace.features[tap]), network.blocks[1].conv1(after) if stop else network.fc(after.mean((2, 3)))
        )
        assert torch.equal(trace.features[tap], before)
    torch.testing.assert_close(path(before), trace.logits)


def test_a_path_from_a_module_that_ends_with_no_function_is_an_error():
    network = Net(OwnConv(6, 8))
    with pytest.raises(TapError, match=r"forward of blocks\.0 of Net does not end with a function that activates"):
        last_function(Probe(network, DATA), "blocks.0")


def test_gradients_flow_into_the_value_and_not_into_the_network():
    teacher, path, tap = teacher_path(create_model("resnet8", num_classes=5), 16)
    value = torch.randn(2, *teacher.shapes[tap], requires_grad=True)
    path(value).square().sum().backward()
    assert value.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.module.parameters())


def test_smaller_maps_are_followed_too():
    teacher, path, _ = teacher_path(create_model("vgg8", num_classes=5), 32, 2)
    value = torch.randn(2, 512, 2, 2)
    torch.testing.assert_close(path(value), teacher.module.block4[0](value.relu()))


def test_nothing_before_the_tap_runs():
    network = Net(Residual(6, 6), Residual(6, 8))
    flow = Flow(network, DATA)
    path = RemainingPath(flow, "blocks.1.act:input", (8, 4, 4), (4, 4))
    called = []
    for name in ("stem", "blocks.0", "blocks.1.conv1", "blocks.1.short"):
        network.get_submodule(name).register_forward_hook(lambda *args, name=name: called.append(name))
    path(torch.randn(2, 8, 4, 4))
    assert not called


def test_the_path_follows_the_network_to_another_type_and_is_shared_by_copies():
    teacher, path, tap = teacher_path(create_model("wrn_16_1", num_classes=5), 16)
    teacher.module.double()
    with torch.no_grad():
        teacher.module.fc.weight.mul_(2.0)
        teacher.module.bn.running_mean.add_(1.0)
    trace = teacher(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    torch.testing.assert_close(path(trace.features[tap]), trace.logits)
    assert copy.deepcopy(path) is path


class Tokens(nn.Module):
    """A class token before a grid of tokens, read alone by the classifier, as in a vision transformer."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = self.mix(torch.cat([self.token.expand(len(x), -1, -1), x], 1) + x.mean(1, keepdim=True))
        return self.head(self.norm(x)[:, 0])


def test_a_class_token_becomes_the_mean_of_the_map_and_the_networks_own_norm_comes_first():
    network = Tokens()
    path = RemainingPath(Flow(network, DATA), "mix", (8, 4, 4), (2, 2))
    value = torch.randn(2, 8, 2, 2)
    torch.testing.assert_close(path(value), network.head(network.norm(value.mean((2, 3)))))


def test_channels_last_maps_are_handed_on_as_the_network_has_them():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(self.embed(x).permute(0, 2, 3, 1)).mean((1, 2)))

    network = Last()
    path = RemainingPath(Flow(network, DATA), "mix", (8, 4, 4), (4, 4))
    value = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(path(value), network.head(value.mean((2, 3))))


def test_a_network_that_reads_earlier_tensors_after_the_tap_is_refused():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fc = OwnConv(3, 8), OwnConv(8, 8), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            early = self.one(x)
            return self.fc(torch.cat([early, self.two(early)], 1).mean((2, 3)))

    flow = Flow(Skips(), DATA)
    with pytest.raises(UnsupportedPairError, match=r"from 'two' to its logits.*reads other tensors.*guide=False"):
        RemainingPath(flow, "two", (8, 16, 16), (16, 16))


def test_a_network_that_takes_no_smaller_maps_is_refused_with_the_size():
    network = nn.Sequential(OwnConv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 256, 5))
    flow = Flow(network, DATA)
    RemainingPath(flow, "1:input", (4, 16, 16), (16, 16))
    with pytest.raises(UnsupportedPairError, match=r"takes no maps of \(8, 8\)"):
        RemainingPath(flow, "1:input", (4, 16, 16), (8, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_few_digits_bend_no_linear_op(dtype):
    conv = nn.Conv2d(3, 8, 3, padding=1).to(dtype)
    assert is_linear_op(conv, torch.Size((2, 3, 8, 8)))
    assert conv.weight.dtype is dtype
    assert not is_linear_op(nn.LayerNorm((4, 4)).to(dtype), torch.Size((2, 3, 4, 4)))

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from distillzoo.errors import OptionError, ShapeError, TapError
from distillzoo.taps import Tapped, Teacher, pair_from_deep_end, remove_hooks
from distillzoo.testing import TinyNet
from distillzoo.types import Batch, DataSpec, Stage

DATA = DataSpec(5, (16, 16))
IMAGES = torch.linspace(-2, 2, 4 * 3 * 16 * 16).view(4, 3, 16, 16).sin()


def tapped(*taps: str, module: nn.Module | None = None, **options) -> Tapped:
    made = Tapped(TinyNet() if module is None else module, DATA, **options)
    made.request(*taps)
    return made


class Plain(nn.Module):
    """Convolution, activation, convolution, activation, pooling, linear: nothing declared."""

    def __init__(self, *, inplace: bool = False, dropout: float = 0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1)
        self.act1 = nn.ReLU(inplace)
        self.conv2 = nn.Conv2d(4, 6, 3, 2, 1)
        self.act2 = nn.ReLU(inplace)
        self.drop = nn.Dropout(dropout, inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.pool(self.drop(self.act2(self.conv2(self.act1(self.conv1(x)))))).flatten(1))


# ------------------------------------------------------------------------------------------------------- what is read


def test_taps_are_the_tensors_that_the_network_computed():
    net = TinyNet().eval()
    trace = tapped("stages", "stages.pre", "pooled", module=net)(IMAGES)
    assert set(trace.features) == {f"stage{n}{side}" for n in (1, 2, 3) for side in ("", ".pre")} | {"pooled"}
    x = net.stem(IMAGES)
    for number, group in enumerate(net.groups, 1):
        pre = group[0].norm(group[0].conv(x))
        x = pre.relu()
        assert torch.equal(trace.features[f"stage{number}.pre"], pre)
        assert torch.equal(trace.features[f"stage{number}"], x)
    assert torch.equal(trace.features["pooled"], x.mean((2, 3)))
    assert torch.equal(trace.logits, net.head(trace.features["pooled"]))


def test_a_tap_before_an_activation_in_place_holds_the_negative_values():
    features = tapped("last", "last.pre")(IMAGES).features
    assert (features["stage3.pre"] < 0).any()
    assert torch.equal(features["stage3"], features["stage3.pre"].relu())


def test_gradients_flow_through_both_sides_of_an_activation_in_place():
    made = tapped("last.pre", "last")
    features = made(IMAGES).features
    (features["stage3.pre"].sum() + features["stage3"].sum()).backward()
    assert made.module.groups[2][0].conv.weight.grad.abs().sum() > 0


def test_shapes_are_measured_and_hold_for_the_traces():
    made = tapped("stages", "pooled")
    assert made.shapes["stage1"] == (4, 16, 16)
    assert made.shapes["stage3"] == (8, 4, 4)
    assert made.shapes["pooled"] == (8,)
    assert made.num_classes == 5
    assert all(value.shape[1:] == made.shapes[name] for name, value in made(IMAGES).features.items())


def test_only_what_was_requested_is_returned():
    assert tapped()(IMAGES).features == {}
    assert set(tapped("last", "stage1.pre")(IMAGES).features) == {"stage3", "stage1.pre"}


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_modes_buffers_and_the_generator_as_they_were(training):
    net = TinyNet().train(training)
    net.groups[1].eval()
    net(IMAGES)
    flags = {name: module.training for name, module in net.named_modules()}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    made = tapped("stages", module=net)
    assert {name: module.training for name, module in net.named_modules()} == flags
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(state, torch.get_rng_state())
    made(IMAGES)
    moved = not torch.equal(net.stem.norm.running_mean, before["stem.norm.running_mean"])
    assert moved == training


def test_hooks_record_during_their_own_pass_alone():
    net = TinyNet()
    one, other = Tapped(net, DATA), Tapped(net, DATA)
    one.request("stage1")
    other.request("stage2")
    net(IMAGES)
    assert one._recorder.values == {}
    assert set(one(IMAGES).features) == {"stage1"}
    assert set(other(IMAGES).features) == {"stage2"}
    assert one._recorder.values == {}


def test_a_pass_that_fails_leaves_the_recorder_idle():
    made = tapped("stage1")
    with pytest.raises(RuntimeError):
        made(IMAGES[:, :2])
    assert not made._recorder.active
    assert set(made(IMAGES).features) == {"stage1"}


# ------------------------------------------------------------------------------------------------------------ refused


def test_a_tap_that_is_overwritten_is_an_error_and_not_a_wrong_value():
    class Overwrites(Plain):
        def forward(self, x):
            first = self.act1(self.conv1(x))
            second = self.conv2(first)
            if self.training:
                first.mul_(0.0)  # not seen by the dry run, which is in eval mode
            return self.fc(self.pool(second).flatten(1))

    made = tapped("stage1", module=Overwrites().train(), stages=["act1", "conv2"])
    with torch.no_grad(), pytest.raises(TapError, match=r"'stage1' \(act1\) of the student was overwritten in place"):
        made(IMAGES)
    made.module.eval()
    made(IMAGES)


def test_an_unknown_tap_names_the_taps_there_are():
    with pytest.raises(TapError, match="no tap 'stage4'; it has stage"):
        tapped("stage4")
    with pytest.raises(TapError, match="pooled"):
        tapped("poold")


def test_a_module_with_two_paths_is_tapped_by_either():
    net = Plain().eval()
    net.alias = net.act2
    by_name, by_alias = (tapped("stage1", "stage1.pre", module=net, stages=[path]) for path in ("act2", "alias"))
    assert by_alias.stages == by_name.stages
    assert by_alias.stages[0].pre == "act2:input"
    torch.testing.assert_close(by_alias(IMAGES).features, by_name(IMAGES).features, rtol=0, atol=0)


def test_a_path_that_does_not_exist_names_the_nearest():
    with pytest.raises(TapError, match=r"no module 'groups\.1\.0\.nrm'.*groups\.1\.0\.norm"):
        tapped(stages=["groups.1.0.nrm"])
    with pytest.raises(TapError, match=r"groups\.2\.0\.conv"):
        Tapped(TinyNet(), DATA).submodule("groups.2.0.cnv")


def test_a_path_that_the_forward_does_not_reach_is_refused():
    class Idle(Plain):
        def __init__(self):
            super().__init__()
            self.idle = nn.Conv2d(3, 4, 1)

    with pytest.raises(TapError, match=r"did not reach the taps stage1 \(idle\)"):
        tapped(module=Idle(), stages={"stage1": Stage("idle"), "stage2": "act2"})


def test_a_network_that_returns_no_logits_is_refused():
    with pytest.raises(ShapeError, match=r"returned \(2, 3, 16, 16\).*\(B, num_classes\)"):
        Tapped(nn.Conv2d(3, 3, 1), DATA)

    class Two(Plain):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ShapeError, match="returned tuple"):
        Tapped(Two(), DATA, role="teacher")


def test_no_pooled_feature_says_how_to_name_one():
    class Bare(Plain):
        """Its classifier is a matrix and no module."""

        def __init__(self):
            super().__init__()
            self.fc = nn.Identity()
            self.matrix = nn.Parameter(torch.randn(6, 5))

        def forward(self, x):
            return super().forward(x) @ self.matrix

    assert "pooled" not in Tapped(Bare(), DATA).shapes
    with pytest.raises(TapError, match="taps="):
        tapped("pooled", module=Bare())
    named = tapped("pooled", module=Bare(), stages={"stage1": "act2", "pooled": "fc:input"})
    assert named(IMAGES).features["pooled"].shape == (4, 6)


# --------------------------------------------------------------------------------------------------- layouts, explicit


class Tokens(nn.Module):
    """Patches of 4 pixels, a class token in front, (B, 1 + N, C) inside."""

    num_prefix_tokens = 1

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.block = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        return self.fc(self.block(tokens)[:, 0])


def test_tokens_become_maps_without_their_prefix():
    net = Tokens()
    made = tapped("stage1", "pooled", module=net, stages=["block"])
    value = made(IMAGES).features["stage1"]
    assert value.shape == (4, 8, 4, 4)
    patches = net.patch(IMAGES)
    torch.testing.assert_close(value[:, :, 1, 2], net.block(patches[:, :, 1, 2]))
    assert made(IMAGES).features["pooled"].shape == (4, 8)


class ChannelsLast(nn.Module):
    """(B, H, W, C) inside, as Swin."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.block = nn.Linear(8, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(self.block(self.patch(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("layout", ["auto", "nhwc"])
def test_channels_last_maps_become_channels_first(layout):
    net = ChannelsLast()
    value = tapped("stage1", module=net, stages=[Stage("block", layout=layout)])(IMAGES).features["stage1"]
    assert value.shape == (4, 12, 4, 4)
    torch.testing.assert_close(value[:, :, 3, 1], net.block(net.patch(IMAGES)[:, :, 3, 1]))


@pytest.mark.parametrize(("layout", "hint"), [("NHWC", "write 'nhwc'"), ("channels_last", "write 'auto'"), (None, "write 'auto'")])
def test_a_layout_that_there_is_not_is_refused(layout, hint):
    with pytest.raises(OptionError, match=f"one of auto, nchw, nhwc, tokens, vector; got {layout!r}; {hint}"):
        Stage("block", layout=layout)


@pytest.mark.parametrize(
    ("network", "layout", "words"),
    [
        (Tokens, "nchw", r"shape \(2, 17, 8\) for two images, and the layout 'nchw' .* has 4 dimensions"),
        (ChannelsLast, "tokens", r"shape \(2, 4, 4, 12\) for two images, and the layout 'tokens' .* has 3 dimensions"),
    ],
)
def test_a_layout_of_other_dimensions_is_refused(network, layout, words):
    with pytest.raises(TapError, match=words):
        tapped(module=network(), stages=[Stage("block", layout=layout)])
    with pytest.raises(TapError, match=r"shape \(2, (8|12)\).*declare the layout that it has, or 'auto'"):
        tapped(module=network(), stages={"stage1": "block", "pooled": Stage("fc:input", layout=layout)})
    assert tapped(module=network(), stages=[Stage("block", layout="vector")]).shapes["stage1"][0] in (17 * 8, 4 * 4 * 12)


def test_tokens_that_form_no_grid_are_refused():
    class Odd(Tokens):
        num_prefix_tokens = 0

    with pytest.raises(TapError, match="17 tokens do not form a grid"):
        tapped(module=Odd(), stages=["block"])


def test_named_taps_are_stages_and_extras():
    made = tapped(
        "stages", "middle", module=Plain(), stages={"stage1": "act1", "stage2": Stage("act2", pre="conv2"), "middle": "conv2:input"}
    )
    features = made(IMAGES).features
    assert set(features) == {"stage1", "stage2", "middle"}
    assert torch.equal(features["middle"], features["stage1"])


def test_an_input_tap_is_the_input_of_the_last_call():
    class Twice(Plain):
        def forward(self, x):
            x = self.act1(self.conv1(x))
            return self.fc(self.pool(self.act1(self.conv2(x) - 1.0)).flatten(1))

    net = Twice()
    value = tapped("stage1", module=net, stages=["act1:input"])(IMAGES).features["stage1"]
    assert torch.equal(value, net.conv2(net.act1(net.conv1(IMAGES))) - 1.0)


def test_inference_mode_can_trace():
    with torch.inference_mode():
        assert set(tapped("stage1")(IMAGES).features) == {"stage1"}


def test_dropout_in_place_after_a_tap_does_not_stop_training():
    made = tapped("stage2", module=Plain(dropout=0.5).train(), stages=["act1", "act2"])
    assert made(IMAGES).features["stage2"].shape == (4, 6, 8, 8)


# ------------------------------------------------------------------------------------------ copies, replacing, teacher


def test_a_deep_copy_has_hooks_of_its_own():
    made = tapped("stages")
    twin = copy.deepcopy(made)
    with torch.no_grad():
        twin.module.stem.conv.weight.mul_(3.0)
    one, other = made(IMAGES), twin(IMAGES)
    assert set(one.features) == set(other.features)
    assert not torch.equal(one.features["stage1"], other.features["stage1"])
    assert twin._recorder is not made._recorder
    assert len(twin.module.groups[0][0]._forward_hooks) == len(made.module.groups[0][0]._forward_hooks) == 1


def test_a_tapped_network_can_be_pickled():
    made = tapped("stages", "stages.pre")
    made.module.eval()
    again = pickle.loads(pickle.dumps(made))
    for name, value in made(IMAGES).features.items():
        assert torch.equal(again(IMAGES).features[name], value)


def test_remove_hooks_takes_ours_and_leaves_others():
    made = tapped("stages", "pooled")
    called = []
    made.module.head.register_forward_hook(lambda *_: called.append(1))
    plain = remove_hooks(copy.deepcopy(made.module))
    counts = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain.modules()]
    assert sum(counts) == 1
    assert set(made(IMAGES).features) == {"stage1", "stage2", "stage3", "pooled"}


def test_a_module_is_replaced_before_taps_are_hooked_and_not_after():
    made = Tapped(TinyNet(), DATA)
    made.replace("groups.2.0.conv", nn.Conv2d(6, 8, 1, 2))
    assert made.module.groups[2][0].conv.kernel_size == (1, 1)
    assert made.restructured == ["groups.2.0.conv"]
    made.request("last")
    with pytest.raises(OptionError, match="before its taps are hooked"):
        made.replace("head", nn.Identity())
    with pytest.raises(TapError, match="no module"):
        Tapped(TinyNet(), DATA).replace("nothing", nn.Identity())


def test_the_first_to_claim_gets_the_network():
    made = Tapped(TinyNet(), DATA)
    assert [made.claim(), made.claim(), made.claim()] == [True, False, False]


def test_a_teacher_is_frozen_and_its_buffers_stay():
    net = TinyNet().train()
    teacher = Teacher(net, DATA)
    teacher.request("stages")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    trace = teacher(IMAGES)
    assert not any(module.training for module in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    assert not trace.logits.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_teacher_is_shared_by_deep_copies():
    teacher = Teacher(TinyNet(), DATA)
    assert copy.deepcopy({"a": [teacher]})["a"][0] is teacher


def test_a_teacher_traces_the_second_view():
    teacher = Teacher(TinyNet(), DATA)
    teacher.request("last")
    trace = teacher.trace(Batch(IMAGES, torch.zeros(4), None, IMAGES.flip(3)))
    assert trace.second is not None
    assert torch.equal(trace.logits, teacher(IMAGES).logits)
    assert torch.equal(trace.second.features["stage3"], teacher(IMAGES.flip(3)).features["stage3"])
    assert teacher.trace(Batch(IMAGES, torch.zeros(4))).second is None


def test_stages_are_paired_from_the_deep_end():
    assert pair_from_deep_end(["a1", "a2", "a3"], ["b1", "b2"]) == (("a2", "b1"), ("a3", "b2"))
    assert pair_from_deep_end([], ["b1"]) == ()


def test_measuring_puts_back_a_buffer_that_a_forward_in_eval_mode_writes():
    class Counts(Plain):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return super().forward(x)

    made = Tapped(Counts(), DATA)
    assert made.module.calls == 0
    made(IMAGES)
    assert made.module.calls == 1


class Smoothing(Plain):
    """Puts other tensors in the place of its buffers, and makes some on its first call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("late", None)

    def forward(self, x):
        self.centre = 0.9 * self.centre + 0.1 * x.mean((0, 2, 3))
        self.late = self.centre if self.late is None else self.late + 1
        if "made" not in self._buffers:
            self.register_buffer("made", x.new_ones(2), persistent=False)
        return super().forward(x)


def test_measuring_puts_back_buffers_that_a_forward_replaces_or_makes():
    net = Smoothing()
    centre = net.centre
    tapped("stage1", module=net)
    assert net.centre is centre
    assert not centre.any()
    assert (net.late, set(net._buffers), net._non_persistent_buffers_set) == (None, {"centre", "late"}, set())
    assert set(net.state_dict()) == set(Plain().state_dict()) | {"centre"}
    net(IMAGES)
    assert net.centre.any()


def test_hooks_of_a_measurement_that_cannot_begin_are_taken_off(monkeypatch):
    net, attach = Plain(), Tapped._attach

    def fails(self, name):
        if name == "pooled":
            raise AttributeError("fc")
        return attach(self, name)

    monkeypatch.setattr(Tapped, "_attach", fails)
    with pytest.raises(AttributeError):
        Tapped(net, DATA)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


class Functional(nn.Module):
    """Blocks whose activation is a function, as in many a script."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.blocks = nn.ModuleList([_FunctionalBlock(4) for _ in range(2)])
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class _FunctionalBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 3, 2, 1), nn.Conv2d(channels, channels, 3, 1, 1)
        self.short = nn.Conv2d(channels, channels, 1, 2)

    def before(self, x):
        return self.conv2(torch.relu(self.conv1(x))) + self.short(x)

    def forward(self, x):
        return torch.nn.functional.relu(self.before(x), inplace=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_function_that_activates_is_read_before_it_overwrites(compiled):
    net = Functional()
    made = tapped("stages", "stages.pre", module=net)
    assert made.path("stage1.pre") == "blocks.0:activation"
    run = torch.compile(made, fullgraph=True, backend="eager") if compiled else made
    features = run(IMAGES).features
    x = torch.relu(net.stem(IMAGES))
    for number, block in enumerate(net.blocks, 1):
        torch.testing.assert_close(features[f"stage{number}.pre"], block.before(x))
        assert (features[f"stage{number}.pre"] < 0).any()
        x = block(x)
        torch.testing.assert_close(features[f"stage{number}"], x)


def test_a_tap_before_an_activation_that_is_none_is_refused():
    with pytest.raises(TapError, match="does not end with a call of one"):
        tapped(module=Plain(), stages=["conv1:activation"])


def test_auxiliary_logits_of_training_are_left_aside():
    class Auxiliary(Plain):
        def forward(self, x):
            logits = super().forward(x)
            return (logits, logits * 0.0) if self.training else logits

    net = Auxiliary().train()
    trace = tapped("stage1", module=net)(IMAGES)
    assert torch.equal(trace.logits, net(IMAGES)[0])

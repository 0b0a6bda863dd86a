from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distillzoo.errors import TapError
from distillzoo.registry import STAGE_FINDERS
from distillzoo.stages import (
    Probe,
    View,
    as_view,
    classifier_input,
    declared_stages,
    find_stages,
    is_activation,
    resolve_stages,
    split_path,
)
from distillzoo.taps import Tapped, Teacher
from distillzoo.testing import TinyNet
from distillzoo.types import DataSpec, Stage

DATA = DataSpec(5, (16, 16))


class Steps(nn.Module):
    """A stem at the image's resolution, then a block at each half of it; nothing declared."""

    def __init__(self, count: int = 3):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU()) for _ in range(count)])
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def found(module: nn.Module) -> list[str]:
    return [stage.path for stage in find_stages(Probe(module, DATA))]


def test_a_path_has_sides():
    assert split_path("a.b") == ("a.b", "output")
    assert split_path("a.b:output") == ("a.b", "output")
    assert split_path("a.b:input") == ("a.b", "input")
    with pytest.raises(TapError, match="'a:inpt'"):
        split_path("a:inpt")


def test_declared_stages_come_first(monkeypatch):
    net = TinyNet()
    net.feature_info = [{"module": "head", "num_chs": 1, "reduction": 1}]
    assert declared_stages(net) == net.stages
    assert found(net) == ["groups.0.0", "groups.1.0", "groups.2.0"]
    assert declared_stages(Steps()) is None


def test_a_registered_table_comes_before_a_dry_run(monkeypatch):
    monkeypatch.setitem(STAGE_FINDERS._items, "of_steps", lambda m: (Stage("blocks.2"),) if isinstance(m, Steps) else None)
    assert found(Steps()) == ["blocks.2"]


def test_a_table_that_names_a_missing_path_is_an_error(monkeypatch):
    monkeypatch.setitem(
        STAGE_FINDERS._items, "of_steps", lambda m: (Stage("blocks.2", norm="blocks.2.bn"),) if isinstance(m, Steps) else None
    )
    with pytest.raises(TapError, match=r"'blocks\.2\.bn'"):
        found(Steps())


def test_feature_info_drops_the_stem_and_spreads_isotropic_blocks():
    net = Steps(5)
    net.feature_info = [{"module": path, "reduction": 2**n} for n, path in enumerate(["stem", *(f"blocks.{k}" for k in range(5))])]
    assert found(net) == ["blocks.1", "blocks.2", "blocks.3", "blocks.4"]
    deep = Steps(0)
    deep.blocks = nn.Sequential(*[nn.Conv2d(4, 4, 1) for _ in range(12)])
    deep.feature_info = [{"module": f"blocks.{k}", "reduction": 16} for k in range(12)]
    assert found(deep) == ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]


def test_feature_info_that_names_no_maps_gives_way_to_the_dry_run():
    net = Steps(3)
    net.feature_info = [{"module": "blocks.0", "reduction": 2}, {"module": "fc", "reduction": 4}]
    assert found(net) == ["blocks.0", "blocks.1", "blocks"]


def test_a_dry_run_finds_the_last_module_at_each_resolution():
    assert found(Steps(3)) == ["blocks.0", "blocks.1", "blocks"]  # not the stem, at the images' own


def test_the_classifiers_input_is_found_by_what_it_returns():
    net = Steps()
    assert classifier_input(Probe(net, DATA)) == "fc:input"
    tiny = TinyNet()
    assert classifier_input(Probe(tiny, DATA)) == "head:input"

    class Convolutional(Steps):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(4, 5, 1)

        def forward(self, x):
            return self.fc(self.blocks(self.stem(x)).mean((2, 3), keepdim=True)).flatten(1)

    head = Convolutional()
    assert classifier_input(Probe(head, DATA)) == "fc:input"


class Dropping(Steps):
    """Has something between what it pools and its classifier."""

    def __init__(self, drop, head=None):
        super().__init__()
        self.pool, self.drop = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), drop
        self.fc = head or self.fc

    def forward(self, x):
        return self.fc(self.drop(self.pool(self.blocks(self.stem(x)))))


@pytest.mark.parametrize(
    ("drop", "head", "expected"),
    [
        (nn.Dropout(), None, "pool.1"),
        (nn.Dropout(inplace=True), None, "pool.1"),
        (nn.Identity(), nn.Sequential(nn.Dropout(inplace=True), nn.Linear(4, 5)), "pool.1"),
        (nn.Dropout(0.0), None, "fc:input"),
        (nn.Identity(), None, "fc:input"),
        (nn.ReLU(), nn.Sequential(nn.Dropout(), nn.Linear(4, 5)), "drop"),
    ],
)
def test_what_the_classifier_reads_is_tapped_before_dropout(drop, head, expected):
    net = Dropping(drop, head).train()
    tapped = Tapped(net, DATA)
    assert tapped.path("pooled") == expected
    tapped.request("pooled")
    images = Probe(net, DATA).images
    torch.testing.assert_close(tapped(images).features["pooled"], net.blocks(net.stem(images)).mean((2, 3)).relu())


def test_a_dropout_that_is_a_function_is_seen_too():
    class Functional(Dropping):
        def forward(self, x):
            return self.fc(F.dropout(self.pool(self.blocks(self.stem(x))), 0.5, self.training))

    assert classifier_input(Probe(Functional(nn.Identity()), DATA)) == "pool.1"

    class Fails(Functional):
        def forward(self, x):
            if self.training:
                raise RuntimeError
            return super().forward(x)

    assert classifier_input(Probe(Fails(nn.Identity()), DATA)) == "fc:input", "whether it drops is not known"


def test_what_only_looks_like_dropout_is_none():
    class Halves(Steps):
        """Two parts of one tensor, read by two heads."""

        def __init__(self):
            super().__init__()
            self.proj, self.fc, self.classifier_path = nn.Linear(2, 5), nn.Linear(2, 5), "fc"

        def forward(self, x):
            one, two = self.blocks(self.stem(x)).mean((2, 3)).chunk(2, 1)
            return self.proj(one) + self.fc(two)

    assert classifier_input(Probe(Halves(), DATA)) == "fc:input"

    class Auxiliary(Steps):
        """Pools for a second time in training mode."""

        def __init__(self):
            super().__init__()
            self.pool, self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(4, 5)

        def forward(self, x):
            x = self.blocks[:2](self.stem(x))
            logits = self.fc(self.pool(self.blocks[2](x)))
            return (logits, self.aux(self.pool(x))) if self.training else logits

    assert classifier_input(Probe(Auxiliary(), DATA)) == "fc:input"


def test_looking_for_dropout_leaves_the_images_to_the_others():
    class Noisy(Dropping):
        def forward(self, x):
            return super().forward(x.add_(1.0) if self.training else x)

    Teacher(Noisy(nn.Dropout()), DATA)


def test_given_stages_are_numbered_and_gaps_refused():
    probe = Probe(Steps(), DATA)
    stages, extra = resolve_stages(["blocks.0", Stage("blocks.2")], probe)
    assert [stage.path for stage in stages] == ["blocks.0", "blocks.2"]
    assert extra == {}
    stages, extra = resolve_stages({"stage2": "blocks.2", "stage1": "blocks.1", "pooled": "fc:input"}, probe)
    assert [stage.path for stage in stages] == ["blocks.1", "blocks.2"]
    assert extra == {"pooled": Stage("fc:input")}
    with pytest.raises(TapError, match="without a gap"):
        resolve_stages({"stage1": "blocks.1", "stage3": "blocks.2"}, probe)


def test_naming_extras_alone_keeps_declared_stages():
    net = TinyNet()
    stages, extra = resolve_stages({"pooled": "head:input"}, Probe(net, DATA))
    assert stages == net.stages
    assert list(extra) == ["pooled"]


def test_the_probe_is_deterministic_in_the_networks_type():
    one, other = Probe(Steps().double(), DATA), Probe(Steps().double(), DATA)
    assert one.images.dtype == torch.float64
    assert torch.equal(one.images, other.images)
    assert one.images.shape == (2, 3, 16, 16)
    assert not torch.equal(one.images[0], one.images[1])


def test_layouts_are_permuted_by_name():
    value = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    assert View("nhwc")(value).shape == (2, 5, 3, 4)
    assert View("nchw")(value) is value
    assert View("vector")(value).shape == (2, 60)
    torch.testing.assert_close(View("nhwc", mean=True)(value.double()), value.double().mean((1, 2)))
    tokens = torch.arange(2 * 7 * 3).view(2, 7, 3)
    maps = View("tokens", 1, (2, 3))(tokens)
    assert maps.shape == (2, 3, 2, 3)
    assert torch.equal(maps[:, :, 1, 0], tokens[:, 1 + 3])
    assert torch.equal(View("tokens", 1, (2, 3), sequence_first=True)(tokens.transpose(0, 1)), maps)


def test_token_grids_follow_the_images_aspect():
    said = nn.Identity()
    said.num_prefix_tokens = 1
    data = DataSpec(5, (16, 32))
    assert as_view(said, data, (2, 1 + 32, 4)) == View("tokens", 1, (4, 8))
    said.num_prefix_tokens = 0
    with pytest.raises(TapError, match="do not form a grid for images of 16x32"):
        as_view(said, data, (2, 33, 4))


def test_a_silent_networks_prefix_is_the_smallest_that_leaves_a_grid():
    silent, data = nn.Identity(), DataSpec(5, (224, 224))
    assert as_view(silent, data, (2, 50, 4)) == View("tokens", 1, (7, 7))
    assert as_view(silent, data, (2, 196 + 5, 4)) == View("tokens", 5, (14, 14))
    assert as_view(silent, data, (2, 196, 4)) == View("tokens", 0, (14, 14))
    assert as_view(silent, data, (197, 2, 4)) == View("tokens", 1, (14, 14), sequence_first=True)


def test_a_network_that_adds_its_prefix_late_has_grids_before():
    late = nn.Identity()
    late.num_prefix_tokens = 1
    data = DataSpec(5, (224, 224))
    assert as_view(late, data, (2, 196, 4)).prefix == 0
    assert as_view(late, data, (2, 197, 4)).prefix == 1


def test_four_dimensions_are_read_by_channels_then_aspect_then_what_the_network_says():
    said, data = nn.Identity(), DataSpec(5, (16, 16))
    assert as_view(said, data, (2, 8, 8, 8)) == View("nchw")
    said.output_fmt = "NHWC"
    assert as_view(said, data, (2, 8, 8, 8)) == View("nhwc")
    assert as_view(said, data, (2, 6, 8, 8)) == View("nchw")
    assert as_view(said, data, (2, 8, 8, 6)) == View("nhwc")
    assert as_view(said, DataSpec(5, (16, 8)), (2, 4, 4, 2), channels=4) == View("nchw")
    with pytest.raises(TapError, match=r"has the shape \(2, 3, 4, 5, 6\)"):
        as_view(said, data, (2, 3, 4, 5, 6))


@pytest.mark.parametrize("shape", [(8, 16, 3), (8, 4, 4, 3), (4, 3)])
def test_windows_in_the_batch_dimension_are_no_map(shape):
    with pytest.raises(TapError, match="for two images; windows or patches"):
        as_view(nn.Identity(), DataSpec(5, (16, 16)), shape)


# ------------------------------------------------------------------------------------ before the activation, and its norm


class Residual(nn.Module):
    """Two convolutions with norms and a shortcut with a norm; the activation is a module, a shared one, or a function."""

    def __init__(self, channels, kind):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, 2, 1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels)
        self.short, self.bn3 = nn.Conv2d(channels, channels, 1, 2), nn.BatchNorm2d(channels)
        self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.kind = kind

    def forward(self, x):
        inner = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        out = inner + self.bn3(self.short(x))  # the shortcut's norm is called last
        if self.kind == "function":
            return torch.relu_(out)
        return {"module": self.act2, "shared": self.act1, "linear": nn.Identity()}[self.kind](out)


class Blocks(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.body = nn.Sequential(*[Residual(4, kind) for _ in range(3)])
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "pre"), [("module", "act2:input"), ("shared", "act1:input"), ("function", ":activation"), ("linear", None)]
)
def test_the_tensor_before_the_activation_is_found_with_its_norm(kind, pre):
    net = Blocks(kind)
    stages = find_stages(Probe(net, DATA))
    assert [stage.path for stage in stages] == ["body.0", "body.1", "body"]
    last = stages[1]
    join = "" if pre is not None and pre.startswith(":") else "."
    assert last.pre == (None if pre is None else f"body.1{join}{pre}")
    assert last.norm == (None if pre is None else "body.1.bn2")


def test_trying_an_activation_leaves_it_as_it_was():
    class Shrinks(nn.Module):
        """Keeps count and an average of what it saw."""

        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("centre", torch.zeros(()))
            self.last = None

        def forward(self, x):
            self.seen.add_(1)
            self.centre = 0.9 * self.centre + 0.1 * x.mean()
            self.last = x
            return x.relu()

    activation = Shrinks()
    centre = activation.centre
    assert is_activation(activation, (2, 3, 4, 4))
    assert activation.training
    assert (int(activation.seen), activation.centre is centre, activation.last) == (0, True, None)
    net = Steps(2)
    net.blocks = nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), Shrinks()) for _ in range(2)])
    assert find_stages(Probe(net, DATA))[0].pre == "blocks.0.1:input"
    assert [int(block[1].seen) for block in net.blocks] == [0, 0]


def test_a_fused_norm_and_activation_is_read_between_the_two():
    class Fused(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.act(super().forward(x))

    net = Steps(2)
    net.blocks = nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), Fused(4)) for _ in range(2)])
    stages = find_stages(Probe(net, DATA))
    assert (stages[0].pre, stages[0].norm) == ("blocks.0.1.act:input", "blocks.0.1")


def test_branches_of_equal_depth_have_no_one_norm():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4)) for _ in range(2)])
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.parts[0](x) + self.parts[1](x))

    net = Steps(2)
    net.blocks = nn.Sequential(Sum(), Sum())
    stage = find_stages(Probe(net, DATA))[0]
    assert (stage.pre, stage.norm) == ("blocks.0.act:input", None)


def test_paths_of_ones_own_are_completed_and_stages_of_ones_own_are_not():
    net = Blocks("module")
    stages, _ = resolve_stages(["body.0", Stage("body.1", channels=4)], Probe(net, DATA))
    assert stages[0].pre == "body.0.act2:input"
    assert stages[1] == Stage("body.1", channels=4)


# ---------------------------------------------------------------------------------------------------------- the dry run


class Plan(nn.Module):
    """Patches, then blocks of attention and of a perceptron over tokens; nothing said about itself."""

    def __init__(self, depth=8):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(depth)])
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.fc(self.norm(x)[:, 0])


def test_blocks_of_one_size_are_spread_evenly():
    assert found(Plan(8)) == ["layers.1", "layers.3", "layers.5", "layers.7"]
    assert found(Plan(2)) == ["layers.0", "layers.1"]


def test_the_inside_of_a_branch_is_no_stage():
    net = Blocks("module")
    net.body[1].conv2 = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 1))
    assert found(net) == ["body.0", "body.1", "body"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_a_block_holds_before_its_stride_is_no_end_of_a_stage(wrapped):
    def inverted(stride):
        return nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride, 1, groups=8), nn.Conv2d(8, 4, 1))

    net = Steps(0)
    net.stem = nn.Conv2d(3, 4, 3, 2, 1)
    net.blocks = nn.Sequential(*[inverted(stride) for stride in (1, 2, 1, 2)])
    if wrapped:
        net.blocks, net.stem = nn.Sequential(net.stem, *net.blocks), nn.Identity()
    assert found(net) == (["blocks.1", "blocks.3", "blocks"] if wrapped else ["blocks.0", "blocks.2", "blocks"])


def test_the_head_a_network_declares_first_is_the_classifier():
    class Two(Steps):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(4, 5)

        def forward(self, x):
            x = self.blocks(self.stem(x)).mean((2, 3))
            return (self.fc(x) + self.other(x)) / 2

    net = Two()
    assert classifier_input(Probe(net, DATA)) is None
    net.pretrained_cfg = {"classifier": ("other", "fc")}
    assert classifier_input(Probe(net, DATA)) == "other:input"


def test_a_classifier_over_positions_is_read_by_the_mean():
    class Dense(Steps):
        def __init__(self):
            super().__init__(2)
            self.fc = nn.Conv2d(4, 5, 1)

        def forward(self, x):
            return self.fc(self.blocks(self.stem(x))).relu().mean((2, 3))

    net = Dense().eval()
    tapped = Tapped(net, DATA)
    tapped.request("pooled")
    images = Probe(net, DATA).images
    torch.testing.assert_close(tapped(images).features["pooled"], net.blocks(net.stem(images)).mean((2, 3)))


def test_neither_a_pooling_nor_the_classifiers_maps_are_a_stage():
    class Pooled(Steps):
        def __init__(self):
            super().__init__(2)
            self.blocks = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2))
            self.fc = nn.Conv2d(4, 5, 1)

        def forward(self, x):
            return self.fc(self.blocks(self.stem(x))).mean((2, 3))

    net = Pooled()
    assert found(net) == ["blocks.1", "blocks.3"]
    net.blocks.insert(4, nn.Dropout())
    assert found(net) == ["blocks.1", "blocks.3"]
    net.feature_info = [{"module": "blocks.1", "reduction": 2}, {"module": "blocks.5", "reduction": 4}]
    assert found(net) == ["blocks.1"]


def test_a_network_that_runs_without_gradients_alone_is_read_by_shape():
    class Overwrites(Steps):
        def forward(self, x):
            x = self.stem(x)
            self.stem.weight.add_(0.0)  # no leaf may be written to while gradients are recorded
            return self.fc(self.blocks(x).mean((2, 3)))

    net = Overwrites().requires_grad_(True)
    assert Probe(net, DATA).dry_run.calls

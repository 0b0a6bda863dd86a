"""What is particular to one family of networks."""

import pytest
import torch
from torch import nn

from distillzoo.models import MODELS, create_model
from distillzoo.models.base import ChannelShuffle
from tests.models.reading import count_macs, read_taps


def images(size, batch=1):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def build(name, **options):
    torch.manual_seed(0)
    return create_model(name, num_classes=10, **options).eval()


def test_shortcuts_are_convolutions_only_where_the_shape_changes():
    kinds = {name: type(child) for name, child in build("resnet14").named_modules() if name.endswith("downsample")}
    assert [name for name, kind in kinds.items() if kind is nn.Sequential] == ["layer2.0.downsample", "layer3.0.downsample"]
    assert isinstance(build("resnet8x4").get_submodule("layer1.0.downsample"), nn.Sequential)


def test_wide_networks_end_stages_with_the_raw_stream():
    model = build("wrn_16_2")
    assert [stage.pre for stage in model.stages] == ["block2.0.bn1", "block3.0.bn1", "bn"]
    paths = [path for stage in model.stages for path in (stage.path, stage.pre, f"{stage.norm}:input")]
    _, taps = read_taps(model, images(32), [*paths, "fc:input"])
    for stage in model.stages:
        assert taps[stage.path].min() < 0
        assert taps[f"{stage.norm}:input"] is taps[stage.path]
        assert stage.linear_norm is None
    torch.testing.assert_close(taps["fc:input"], taps["bn"].relu().mean((2, 3)))


def test_wide_networks_count_each_batch_once():
    """The pre-activation tap is no second call of the next norm."""
    model = build("wrn_16_1").train()
    model(images(16, batch=2))
    assert {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1}


@pytest.mark.parametrize(
    ("name", "linear_std"), [("wrn_16_1", None), ("vgg8", 0.01), ("mobilenetv2", 0.01), ("resnet8", None), ("shufflenetv1", None)]
)
def test_initial_classifiers(name, linear_std):
    torch.manual_seed(0)
    model = create_model(name, num_classes=100)
    head = model.get_submodule(model.classifier_path)
    uniform = (1 / 3 / head.in_features) ** 0.5  # torch's own rule
    assert head.weight.std().item() == pytest.approx(linear_std or uniform, rel=0.05)
    assert bool((head.bias == 0).all()) is (name in ("wrn_16_1", "vgg8", "mobilenetv2"))


@pytest.mark.parametrize(
    ("name", "path"),
    [("wrn_40_2", "block3.1.conv1"), ("vgg8", "block4.0"), ("mobilenetv2", "conv2"), ("resnet18", "layer4.1.conv1")],
)
def test_initial_convolutions_follow_he_over_the_fan_out(name, path):
    conv = build(name).get_submodule(path)
    expected = (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5
    assert conv.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert conv.bias is None or not conv.bias.any()


@pytest.mark.parametrize(
    ("name", "block", "inner"),
    [
        ("resnet14", "layer1.1", "bn2"),
        ("resnet14", "layer2.0", "bn2"),
        ("resnet50", "layer1.1", "bn3"),
        ("resnet50", "layer1.0", "bn3"),
        ("wrn_16_2", "block2.0", "conv2"),
        ("wrn_16_2", "block2.1", "conv2"),
        ("mobilenetv2", "blocks.3.1", "bn3"),
    ],
)
def test_blocks_add_their_shortcut(name, block, inner):
    model = build(name)
    module = model.get_submodule(block)
    _, taps = read_taps(model, images(32), [f"{block}:input", f"{block}.{inner}", block])
    skip = taps[f"{block}:input"]
    if name.startswith("resnet"):
        skip = module.downsample(skip)
    elif name.startswith("wrn") and module.shortcut is not None:
        skip = module.shortcut(module.bn1(skip).relu())  # of the activated input
    total = taps[f"{block}.{inner}"] + skip
    expected = total.relu() if name.startswith("resnet") else total
    # fresh depth-wise convolutions shrink their input: what counts is the error relative to the largest value
    torch.testing.assert_close(taps[block], expected, rtol=0.0, atol=1e-6 * float(skip.detach().abs().max()))


def test_vgg_pools_a_fourth_time_at_64_pixels_only():
    model = build("vgg8")
    for size, last in ((32, 4), (64, 4), (96, 12)):
        _, taps = read_taps(model, images(size), ["block3", "block4"])
        assert (taps["block3"].shape[-1], taps["block4"].shape[-1]) == (size // 8, last)


def test_mobile_bottlenecks_are_linear():
    model = build("mobilenetv2")
    assert [stage.pre for stage in model.stages] == [None] * 4
    _, taps = read_taps(model, images(32), [stage.path for stage in model.stages] + ["blocks.6.0.bn3"])
    assert all(taps[stage.path].min() < 0 for stage in model.stages)
    assert taps["blocks.6.0.bn3"] is taps["blocks.6"]


def test_shuffle_units_append_or_add():
    model = build("shufflenetv1")
    first, last = "layer2.0", "layer2.7"
    _, taps = read_taps(model, images(32), ["layer1", f"{first}.bn3", first, f"{last}.bn3", f"{last}:input", last])
    pooled = nn.functional.avg_pool2d(taps["layer1"], 3, 2, 1)
    torch.testing.assert_close(taps[first], torch.cat([taps[f"{first}.bn3"], pooled], 1).relu())
    torch.testing.assert_close(taps[last], (taps[f"{last}.bn3"] + taps[f"{last}:input"]).relu())


def test_split_units_keep_half_and_interleave():
    model = build("shufflenetv2")
    assert [stage.pre for stage in model.stages] == [None] * 3
    _, taps = read_taps(model, images(32), ["layer3.3:input", "layer3.3.branch", "layer3.3"])
    assert torch.equal(taps["layer3.3"][:, 0::2], taps["layer3.3:input"][:, :232])
    assert torch.equal(taps["layer3.3"][:, 1::2], taps["layer3.3.branch"])


def test_channel_shuffle_by_hand():
    shuffled = ChannelShuffle(3)(torch.arange(6.0).view(1, 6, 1, 1)).flatten()
    assert shuffled.tolist() == [0, 2, 4, 1, 3, 5]


def test_shufflenetv1_for_large_images():
    torch.manual_seed(0)
    model = create_model("shufflenetv1_224", num_classes=100).eval()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 0.95
    assert 2 * count_macs(model, images(224)) / 1e9 == pytest.approx(0.252, abs=0.001)
    _, taps = read_taps(model, images(224), [stage.path for stage in model.stages])
    assert [tuple(taps[s.path].shape[1:]) for s in model.stages] == [(240, 28, 28), (480, 14, 14), (960, 7, 7)]
    assert model.default_cfg == {"input_size": (3, 224, 224), "num_classes": 100}
    assert build("shufflenetv1", in_channels=1).default_cfg["input_size"] == (1, 32, 32)


@pytest.mark.parametrize(("name", "width", "convolutions"), [("tinycnn_8", 8, 3), ("tinycnn_32", 32, 6)])
def test_tiny_networks(name, width, convolutions):
    model = build(name)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convolutions
    logits, taps = read_taps(model, images(8, batch=2), [p for s in model.stages for p in (s.path, s.pre)] + ["fc:input"])
    assert logits.shape == (2, 10)
    expected = [(width, 8, 8), (2 * width, 4, 4), (4 * width, 2, 2)]
    assert [tuple(taps[s.path].shape[1:]) for s in model.stages] == expected
    assert all(torch.equal(taps[s.pre].relu(), taps[s.path]) and taps[s.pre].min() < 0 for s in model.stages)
    assert taps["fc:input"].shape == (2, 4 * width)
    assert model.default_cfg["input_size"] == (3, 8, 8)


def test_tiny_networks_of_any_size():
    small = create_model("tinycnn_8", num_classes=10, width=3, depth=2, in_channels=1)
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert small.stages[-1].linear == "stage3.3"


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("wrn_16_1", {"depth": 15}, "6n [+] 4; got 15. The next one is 16"),
        ("wrn_16_1", {"depth": 17}, "The next one is 22"),
        ("wrn_16_1", {"width": 0}, "width must be an integer of at least 1; got 0"),
        ("vgg8", {"depths": (1, 1)}, r"five|5 blocks; got \(1, 1\)"),
        ("vgg8", {"depths": (1, 0, 1, 1, 1)}, r"depths\[1\] must be"),
        ("mobilenetv2", {"width": 0.01}, "got 0.01"),
        ("mobilenetv2", {"width": float("nan")}, "got nan"),
        ("mobilenetv2", {"expansion": 0}, "expansion must be"),
        ("shufflenetv1", {"stem": "huge"}, "'small' .* got 'huge'"),
        ("resnet8", {"in_channels": 0}, "in_channels must be"),
        ("tinycnn_8", {"width": -1}, "width must be"),
        ("tinycnn_32", {"depth": 0}, "depth must be"),
    ],
)
def test_options_out_of_range(name, options, reason):
    with pytest.raises(ValueError, match=reason):
        create_model(name, num_classes=10, **options)


def test_registered_names():
    expected = "mobilenetv2 resnet18 resnet50 shufflenetv1 shufflenetv1_224 shufflenetv2 tinycnn_32 tinycnn_8 vgg11 vgg13"
    assert set(expected.split()) <= set(MODELS)
    assert len(MODELS) == 23 + 3  # two tiny ones, and ShuffleNetV1 for 224 px

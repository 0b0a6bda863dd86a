"""The CIFAR networks: parameters, multiplications, stages and taps as the benchmark's table has them."""

import copy

import pytest
import torch
from torch import nn

from distillzoo.models import create_model
from tests.models.reading import count_macs, read_taps

THREE, THREE_X2, THREE_X4 = "16x32 32x16 64x8", "32x32 64x16 128x8", "64x32 128x16 256x8"
VGG = "128x16 256x8 512x4 512x4"
# name: parameters with 100 classes, million multiplications at 3x32x32, stages (channels x size), pooled width
TABLE = {
    "resnet8": (83_892, 12.51, THREE, 64),
    "resnet14": (181_108, 26.66, THREE, 64),
    "resnet20": (278_324, 40.82, THREE, 64),
    "resnet32": (472_756, 69.13, THREE, 64),
    "resnet44": (667_188, 97.44, THREE, 64),
    "resnet56": (861_620, 125.75, THREE, 64),
    "resnet110": (1_736_564, 253.16, THREE, 64),
    "resnet8x4": (1_233_540, 177.07, THREE_X4, 256),
    "resnet32x4": (7_433_860, 1083.04, THREE_X4, 256),
    "resnet18": (11_220_132, 555.47, "64x32 128x16 256x8 512x4", 512),
    "resnet50": (23_705_252, 1298.01, "256x32 512x16 1024x8 2048x4", 2048),
    "wrn_16_1": (180_916, 26.66, THREE, 64),
    "wrn_16_2": (703_284, 101.12, THREE_X2, 128),
    "wrn_40_1": (569_780, 83.29, THREE, 64),
    "wrn_40_2": (2_255_156, 327.61, THREE_X2, 128),
    "vgg8": (3_965_028, 96.19, VGG, 512),
    "vgg11": (9_277_284, 209.44, VGG, 512),
    "vgg13": (9_462_180, 284.94, VGG, 512),
    "vgg16": (14_774_436, 398.18, VGG, 512),
    "vgg19": (20_086_692, 511.43, VGG, 512),
    "mobilenetv2": (812_836, 6.52, "12x16 16x8 48x4 160x2", 1280),
    "shufflenetv1": (949_258, 38.69, "240x16 480x8 960x4", 960),
    "shufflenetv2": (1_355_528, 44.50, "116x16 232x8 464x4", 1024),
}
RECTIFIED = [name for name in TABLE if name.startswith(("resnet", "vgg", "shufflenetv1"))]


@pytest.fixture(scope="module", params=list(TABLE))
def model(request):
    torch.manual_seed(0)
    return request.param, create_model(request.param, num_classes=100).eval()


def images(size=32, batch=1):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_parameters_multiplications_and_stages(model):
    name, network = model
    parameters, macs, stages, pooled = TABLE[name]
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert round(count_macs(network, images()) / 1e6, 2) == macs
    logits, taps = read_taps(network, images(), [s.path for s in network.stages] + [f"{network.classifier_path}:input"])
    assert logits.shape == (1, 100)
    shapes = [tuple(taps[stage.path].shape) for stage in network.stages]
    assert shapes == [(1, int(c), int(s), int(s)) for c, s in (item.split("x") for item in stages.split())]
    assert taps[f"{network.classifier_path}:input"].shape == (1, pooled)
    assert torch.equal(network.get_submodule(network.classifier_path)(taps[f"{network.classifier_path}:input"]), logits)


def test_declared_modules_are_what_they_are_said_to_be(model):
    name, network = model
    for stage, shape in zip(network.stages, TABLE[name][2].split(), strict=True):
        linear = network.get_submodule(stage.linear)
        assert isinstance(linear, nn.Conv2d)
        if stage.linear_norm is not None:
            norm = network.get_submodule(stage.linear_norm)
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.num_features == linear.out_channels
        if stage.norm is not None:
            assert network.get_submodule(stage.norm).num_features == int(shape.split("x")[0])
            assert stage.pre is not None


def test_norm_reads_what_the_linear_op_returns(model):
    _, network = model
    pairs = [(s.linear, f"{s.linear_norm}:input") for s in network.stages if s.linear_norm]
    _, taps = read_taps(network, images(), [path for pair in pairs for path in pair])
    for linear, norm in pairs:
        assert taps[linear] is taps[norm]


@pytest.mark.parametrize("name", RECTIFIED)
def test_rectified_stages_are_the_relu_of_their_pre_activation(name):
    torch.manual_seed(0)
    network = create_model(name, num_classes=100).eval()
    _, taps = read_taps(network, images(), [p for s in network.stages for p in (s.path, s.pre)])
    for stage in network.stages:
        before, after = taps[stage.pre], taps[stage.path]
        assert before.min() < 0, "the activation overwrote what it read"
        assert torch.equal(before.relu(), after)


def test_no_activation_works_in_place(model):
    assert not any(getattr(module, "inplace", False) for module in model[1].modules())


def test_declared_stages_are_the_last_op_before_the_tap(model):
    """A change of the declared linear op moves its own stage and later ones, but no earlier stage."""
    _, network = model
    paths = [stage.path for stage in network.stages]
    _, before = read_taps(network, images(), paths)
    for number, stage in enumerate(network.stages):
        changed = copy.deepcopy(network)
        with torch.no_grad():
            changed.get_submodule(stage.linear).weight.mul_(-1.0)
        _, after = read_taps(changed, images(), paths)
        assert [torch.equal(before[p], after[p]) for p in paths[: number + 1]] == [True] * number + [False]


@pytest.mark.parametrize("size", [8, 20, 64])
def test_other_image_sizes(model, size):
    with torch.no_grad():
        logits = model[1](images(size))
    assert logits.shape == (1, 100)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", list(TABLE))
def test_a_gradient_reaches_every_parameter(name):
    network = create_model(name, num_classes=5)
    network(images(16, batch=2)).logsumexp(1).sum().backward()
    missing = [path for path, parameter in network.named_parameters() if parameter.grad is None]
    assert missing == []
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("name", list(TABLE))
def test_initial_weights_are_a_function_of_the_seed(name):
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(create_model(name, num_classes=10).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(*(state[next(iter(state))] for state in (states[0], states[2])))


def test_deep_copies_agree_and_share_nothing(model):
    _, network = model
    twin = copy.deepcopy(network)
    assert twin.stages == network.stages
    with torch.no_grad():
        assert torch.equal(twin(images()), network(images()))
    ours = {p.data_ptr() for p in network.parameters()}
    assert len(ours) == len(list(network.parameters())) == len(network.state_dict()) - len(list(network.buffers()))
    assert ours.isdisjoint(p.data_ptr() for p in twin.parameters())


@pytest.mark.parametrize("name", ["resnet8", "shufflenetv1", "tinycnn_8"])
def test_compiles_without_graph_breaks(name):
    network = create_model(name, num_classes=4).eval()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(images(16, batch=2)), network(images(16, batch=2)))


def test_one_channel_images():
    assert create_model("resnet8", num_classes=10, in_channels=1).eval()(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2", "tinycnn_8"])
def test_a_choice_of_stages_changes_no_logits(name):
    model = create_model(name, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        whole = model(images)
        model.stages = model.stages[1:]
        assert torch.equal(model(images), whole)

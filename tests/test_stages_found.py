"""Networks whose stages a dry run must find where blocks return no maps, run side by side, or begin with a norm."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo import build_distiller
from distillzoo.stages import Probe, as_view, classifier_input, find_stages
from distillzoo.taps import Tapped
from distillzoo.types import DataSpec

DATA = DataSpec(5, (32, 32))


def found(module: nn.Module) -> list[str]:
    return [stage.path for stage in find_stages(Probe(module, DATA))]


def convs(*widths: int, stride: int = 2) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths)):
        layers += [nn.Conv2d(before, after, 3, 1 if number else stride, 1), nn.ReLU()]
    return nn.Sequential(*layers)


def test_windows_are_no_maps():
    import torchvision

    network = torchvision.models.MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 4, 0.0, num_classes=5)  # windows of 2x2, (B, 16, 4, C)
    assert found(network) == ["stem", "blocks.0", "blocks.1"]


class TwoHeads(nn.Module):
    """Two networks side by side, the second deeper, whose logits are added."""

    def __init__(self) -> None:
        super().__init__()
        self.shallow, self.deep = convs(3, 4, 4), convs(3, 4, 4, 4, 4, 4, 4, stride=4)
        self.heads = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 5)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.shallow(x).mean((2, 3)), self.deep(x).mean((2, 3))
        return self.heads[0](first) + self.heads[1](second)


def test_of_two_heads_the_shorter_way_hides_nothing_of_the_longer():
    assert found(TwoHeads()) == ["shallow", "deep"]
    assert classifier_input(Probe(TwoHeads(), DATA)) is None  # neither is declared the first


class Reducing(nn.Module):
    """A block that norms what it takes, and makes maps smaller behind two ops side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.main, self.side = nn.GroupNorm(1, 4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return F.avg_pool2d(self.main(x) + self.side(x), 2)


def test_the_norm_that_a_reducing_block_begins_with_ends_no_stage():
    body = nn.Sequential(convs(3, 4, 4), Reducing(), nn.Conv2d(4, 4, 1), Reducing(), nn.Conv2d(4, 4, 1))
    network = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    assert found(network) == ["0.0", "0.2", "0"]


class SideBySide(nn.Module):
    """Three resolutions side by side, which everything passes in the first and the last alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.halved, self.quarter = convs(3, 4, 4), convs(4, 4, 4), convs(4, 4, 4, stride=4)
        self.last, self.head = nn.Conv2d(12, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        half, quarter = self.halved(x), self.quarter(x)
        joined = torch.cat([F.avg_pool2d(x, 4), F.avg_pool2d(half, 2), quarter], 1)
        logits: Tensor = self.head(self.last(joined).mean((2, 3)))
        return logits


def test_resolutions_that_run_side_by_side_are_stages_too():
    made = Tapped(SideBySide(), DATA)
    assert [stage.path for stage in made.stages] == ["stem", "halved", "last"]
    assert made.shapes["stage2"] == (4, 8, 8)


class Caching(nn.Module):
    """Keeps what it computes in eval mode, as attention with relative positions does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = convs(3, 4, 4), nn.Linear(4, 5)
        self.biases = nn.Parameter(torch.randn(2, 4))
        self.by_device: dict[str, Tensor] = {}
        self.each: list[Tensor] = []
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.by_device.clear()
        bias = self.by_device.get("cpu", self.biases.sum(0))
        if not self.training:
            self.by_device["cpu"] = bias
            self.each.append(bias)
            self.kept = self.new = bias
        logits: Tensor = self.head(self.conv(x).mean((2, 3)) + bias)
        return logits


@pytest.mark.parametrize("given", [None, torch.ones(4)])
def test_a_dry_run_leaves_nothing_in_a_networks_caches(given):
    network = Caching()
    if given is not None:
        network.by_device["cpu"], network.kept = given, given
        network.each.append(given)
    Tapped(network, DATA)
    expected = [] if given is None else [given]
    assert list(network.by_device.values()) == network.each == expected
    assert network.kept is given
    assert not hasattr(network, "new")
    copy.deepcopy(network)  # a tensor with a graph could not be


class Nested(nn.Module):
    """A block on patches and on what is inside of each: both go on, the inside with patches in the batch dimension first."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(4, 4), nn.Linear(6, 6)
        self.between = nn.Linear(4 * 4, 6)

    def forward(self, inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
        inner = inner + self.inside(inner)
        outer = outer + self.between(inner.reshape(*outer.shape[:2], -1))
        return inner, outer + self.outside(outer)


class NestedNet(nn.Module):
    """Blocks of :class:`Nested` on a grid of 4 x 4 patches, each of four pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_info = [{"module": f"blocks.{number}", "num_chs": 6, "reduction": 8} for number in range(5)]
        self.pixels, self.patches = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(3, 6, 8, 8)
        self.blocks = nn.ModuleList([Nested() for _ in range(5)])
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.unfold(self.pixels(x), 2, stride=2).transpose(1, 2).reshape(-1, 4, 4)  # (B 16, 4, 4)
        outer = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            inner, outer = block(inner, outer)
        logits: Tensor = self.head(outer.mean(1))
        return logits


def test_of_several_tensors_the_one_with_a_row_for_each_image_is_read():
    made = Tapped(NestedNet(), DATA)
    assert [stage.path for stage in made.stages] == ["blocks.1", "blocks.2", "blocks.3", "blocks.4"]
    assert made.shapes["stage4"] == (6, 4, 4)
    made.request("stage4", "pooled")
    for images in (1, 3):
        trace = made(torch.randn(images, 3, 32, 32))
        assert torch.allclose(trace.features["stage4"].mean((2, 3)), trace.features["pooled"], atol=1e-6)


def test_branches_go_where_that_tensor_comes_from():
    torch.manual_seed(0)
    student, teacher = NestedNet(), NestedNet()
    distiller = build_distiller("kdiffusion", student, teacher, data=DATA, seed=0)
    out = distiller(torch.randn(2, 3, 32, 32), torch.tensor([0, 3]))
    out.loss.backward()
    assert distiller.student_net.restructured == ["blocks.4.outside"]
    exported, images = distiller.eval().export_student(), torch.randn(2, 3, 32, 32)
    assert torch.allclose(exported(images), distiller.predict(images), atol=1e-5)
    assert exported.state_dict().keys() == NestedNet().state_dict().keys()


class Again(nn.Module):
    """One block at three resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = convs(3, 4, 4), convs(4, 4, stride=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = F.max_pool2d(self.block(x), 2)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_a_block_that_runs_again_is_the_stage_of_its_last_run():
    made = Tapped(Again(), DATA)
    assert [stage.path for stage in made.stages] == ["stem", "block"]
    assert made.shapes["stage2"] == (4, 4, 4)


class Strided(nn.Module):
    """A stem, then five blocks of stride 2, padded or cut as the images ask for; nothing declared."""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1)
        self.blocks = nn.Sequential(
            *[nn.Sequential(nn.Conv2d(2, 2, 3, 2, padding), nn.BatchNorm2d(2), nn.ReLU()) for _ in range(5)]
        )
        self.fc = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("size", [(90, 160), (270, 480), (40, 101), (80, 1000), (100, 300)])
@pytest.mark.parametrize("turned", [False, True], ids=["landscape", "portrait"])
def test_stages_are_those_of_square_images_where_the_stride_does_not_divide_the_sides(size, turned):
    network, data = Strided(), DataSpec(5, size[::-1] if turned else size)
    paths = [stage.path for stage in find_stages(Probe(network, data))]
    assert paths == ["blocks.1", "blocks.2", "blocks.3", "blocks"]
    network.feature_info = [{"module": f"blocks.{k}", "reduction": 2 ** (k + 1)} for k in range(5)]
    assert [stage.path for stage in find_stages(Probe(network, data))] == [f"blocks.{k}" for k in (1, 2, 3, 4)]
    last = network.blocks(network.stem(torch.zeros(2, 3, *data.input_size)))
    assert as_view(network, data, last.flatten(2).mT.shape).grid == last.shape[2:], "tokens form the grid that maps would"


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_layers_whose_weights_are_computed_are_layers(norm):
    plain, network = Strided(), Strided()
    for layer in [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]:
        norm(layer)
    before = copy.deepcopy(network.state_dict())
    assert find_stages(Probe(network, DATA)) == find_stages(Probe(plain, DATA))
    assert find_stages(Probe(network, DATA))[-1].norm == "blocks.3.1"
    assert classifier_input(Probe(network, DATA)) == "fc:input"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_last_layer_is_the_classifier_where_the_one_before_has_as_many_outputs():
    network = nn.Sequential(convs(3, 4, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 5))
    nn.utils.parametrizations.weight_norm(network[3])
    assert classifier_input(Probe(network, DATA)) == "3:input"

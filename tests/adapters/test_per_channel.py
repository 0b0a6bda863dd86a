"""Modules with numbers for each channel: their two widths, and what is not one of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distillzoo.adapters.expansion import Mode, tile
from distillzoo.adapters.per_channel import per_channel_layer
from distillzoo.adapters.trials import scrambled


class NormAct(nn.BatchNorm2d):
    """A batch norm that bends what it returns, as fused layers of foreign networks do."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.act = act

    def forward(self, x):
        return self.act(super().forward(x))


class Scale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape))

    def forward(self, x):
        return x * self.gamma.view(-1, 1, 1)


class Turned(nn.Module):
    """Every channel gets its neighbour's number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return F.softplus(x) * self.weight.cumsum(0).view(-1, 1, 1)


SHAPE = torch.Size((3, 4, 5, 5))
KINDS = {
    "norm and ReLU6": lambda: NormAct(4, nn.ReLU6()),
    "norm and SiLU": lambda: NormAct(4, nn.SiLU()),
    "PReLU": lambda: nn.PReLU(4),
    "PReLU of one number": lambda: nn.PReLU(),
    "scale": lambda: Scale(4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("training", [False, True])
def test_copies_are_treated_as_the_channel_is(kind, ratio, training):
    torch.manual_seed(0)
    module, mode, x = scrambled(KINDS[kind]()).train(training), Mode(), 3.0 * torch.randn(SHAPE) + 1.0
    dual = per_channel_layer(module, SHAPE, ratio, mode)
    assert dual is not None
    assert dual.training is training
    wanted = module(x)
    torch.testing.assert_close(dual(x), wanted)
    with mode:
        torch.testing.assert_close(dual(tile(x, ratio, (1,), divide=True)), tile(wanted, ratio, (1,), divide=True))


def test_the_modes_share_parameters_and_have_buffers_of_their_own():
    torch.manual_seed(0)
    module, mode = NormAct(4, nn.ReLU()), Mode()
    dual = per_channel_layer(module, SHAPE, 2, mode).train()
    with mode:
        dual(torch.randn(3, 8, 5, 5))
    assert dual.running_mean.abs().max() == 0.0
    assert dual.num_batches_tracked == 0
    assert dual.wide_running_mean.abs().max() > 0.0
    dual(torch.randn(3, 4, 5, 5) + 2.0)
    assert dual.num_batches_tracked == dual.wide_num_batches_tracked == 1
    dual(torch.randn(SHAPE)).square().sum().backward()
    touched = dual.weight.grad.abs() > 0
    assert touched.tolist() == [True, False] * 4, "the narrow one is every second channel of the wide one"
    plain = dual.plain()
    assert str(plain) == str(module)
    assert torch.equal(plain.running_mean, dual.running_mean)
    module.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Turned(), SHAPE),  # numbers that meet other channels
        (Scale(4, 1), SHAPE),  # not a number a channel
        (Scale(4), torch.Size((3, 8, 5, 5))),  # of other channels, so that it does not run
        (nn.Sequential(nn.PReLU(4)), SHAPE),  # the numbers are a child's
    ],
)
def test_what_is_no_such_module_is_refused(module, shape):
    assert per_channel_layer(module, shape, 2, Mode()) is None

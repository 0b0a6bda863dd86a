"""Which channels of a network lie inside it, and the taps of a network in another mode."""

import pytest
import torch
from torch import nn

from distillzoo.dataflow import Flow, inner_widths
from distillzoo.errors import TapError, UnsupportedPairError
from distillzoo.taps import Tapped, TappedWithin
from distillzoo.testing import TinyNet
from distillzoo.types import DataSpec

DATA = DataSpec(5, (8, 8))


def sides(network):
    return {path: (width.inputs, width.outputs) for path, width in inner_widths(Flow(network, DATA)).items()}


class Heads(nn.Module):
    """Two stems and two heads, none of them named as such, and a norm of the images."""

    def __init__(self):
        super().__init__()
        self.z_norm = nn.BatchNorm2d(3)
        self.z, self.y = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.middle = nn.Conv2d(8, 4, 1)
        self.b, self.a = nn.Linear(4, 5), nn.Linear(4, 5)
        self.after = nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.z_norm(x)
        x = self.middle(torch.cat([self.z(x), self.y(x)], 1)).mean((2, 3))
        return self.after(self.a(x) + self.b(x))


def test_first_and_last_are_found_by_what_reads_what():
    assert sides(Heads()) == {
        "z": (False, True),
        "y": (False, True),
        "middle": (True, True),
        "a": (True, False),
        "b": (True, False),
    }


def test_activations_and_norms_inside_are_listed():
    found = sides(TinyNet())
    assert found["stem.conv"] == (False, True)
    assert found["head"] == (True, False)
    assert all(both == (True, True) for path, both in found.items() if path not in ("stem.conv", "head"))
    assert {"stem.norm", "stem.act", "groups.2.0.conv"} <= found.keys()


def test_a_module_that_holds_all_tensors_is_listed_in_place_of_its_children():
    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(super().forward(x))

    network = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4), nn.Sequential(nn.ReLU()), nn.Flatten(), nn.Linear(144, 5))
    assert set(sides(network)) == {"0", "1", "2.0", "3", "4"}


def test_a_layer_that_runs_inside_and_outside_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, 5)

        def forward(self, x):
            return self.head(self.conv(self.conv(x)).mean((2, 3)))

    with pytest.raises(UnsupportedPairError, match="conv of Twice runs several times"):
        sides(Twice())


class Louder:
    """A context in which a network is another one."""

    def __init__(self, module):
        self.module, self.entered = module, 0

    def __enter__(self):
        self.entered += 1
        self.handle = self.module.register_forward_hook(lambda m, args, out: torch.cat([out, out], 1))

    def __exit__(self, *error):
        self.handle.remove()


def test_taps_within_a_context_are_measured_there_and_keep_apart():
    network = TinyNet((4, 6, 8))
    net = Tapped(network, DATA)
    context = Louder(network.groups[2][0].act)
    network.head = nn.Identity()
    within = TappedWithin(net, context)
    assert within.shapes["stage3"] == (16, *net.shapes["stage3"][1:])
    assert within.shapes["stage2"] == net.shapes["stage2"]
    assert not within.claim()
    assert net.claim()
    net.request("stage2")
    within.request("stage3")
    images = torch.randn(2, 3, 8, 8)
    inside, outside = within(images), net(images)
    assert (list(inside.features), list(outside.features)) == (["stage3"], ["stage2"])
    assert inside.features["stage3"].shape[1] == 16
    assert outside.logits.shape[1] == 8
    with pytest.raises(TapError, match="no tap 'stage9'"):
        within.request("stage9")


def test_taps_within_a_context_follow_the_autocast_of_the_network():
    network = TinyNet()
    net = Tapped(network, DATA)
    within = TappedWithin(net, Louder(nn.Identity()))
    images = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(images)
        with torch.autocast("cpu", enabled=False):
            assert within(images).logits.dtype == torch.bfloat16
    net(images)
    assert within(images).logits.dtype == torch.float32

"""A tap under a name of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distillzoo.errors import OptionError, TapError
from distillzoo.taps import Tapped
from distillzoo.testing import TinyNet, tiny_data

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_an_added_tap_is_measured_requested_and_read_before_it_is_overwritten():
    network = TinyNet()
    tapped = Tapped(network, tiny_data())
    assert tapped.add_taps({"normed": "groups.1.0.norm", "stemmed": "stem"}) == ("normed", "stemmed")
    assert tapped.shapes["stemmed"] == (4, 16, 16)
    assert tapped.shapes["normed"] == (6, 8, 8)
    tapped.request("normed", "stage2")
    features = tapped(IMAGES).features
    assert features["normed"].min() < 0  # the activation after it works in place
    torch.testing.assert_close(features["normed"].relu(), features["stage2"])


def test_a_tap_reaches_into_a_module_that_was_put_in():
    tapped = Tapped(TinyNet(), tiny_data())
    tapped.replace("groups.2.0.act", nn.Sequential(nn.ReLU(), nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)))
    tapped.request(*tapped.add_taps({"inner": "groups.2.0.act.1"}))
    assert tapped(IMAGES).features["inner"].shape == (3, 3, 4, 4)


def test_the_same_tap_twice_is_one_and_another_path_is_refused():
    tapped = Tapped(TinyNet(), tiny_data())
    for _ in range(2):
        assert tapped.add_taps({"mine": "stem"}) == ("mine",)
    with pytest.raises(OptionError, match=r"'mine' is 'stem' already; got 'groups\.0\.0'"):
        tapped.add_taps({"mine": "groups.0.0"})


def test_a_layout_that_there_is_not_is_refused_and_leaves_the_taps_as_they_were():
    tapped = Tapped(TinyNet(), tiny_data())
    with pytest.raises(OptionError, match=r"layout of the stage 'stem' must be one of auto, .*got 'NCHW'; write 'nchw'"):
        tapped.add_taps({"mine": "stem"}, layout="NCHW")
    assert "mine" not in tapped.shapes


def test_a_path_that_is_not_there_or_not_reached_is_refused_and_leaves_the_taps_as_they_were():
    network = TinyNet()
    network.unused = nn.Identity()
    tapped = Tapped(network, tiny_data())
    with pytest.raises(TapError, match=r"no module 'groups\.9'"):
        tapped.add_taps({"mine": "groups.9"})
    with pytest.raises(TapError, match="did not reach the taps mine"):
        tapped.add_taps({"yours": "stem", "mine": "unused"})
    assert not {"mine", "yours"} & tapped.shapes.keys()
    with pytest.raises(TapError, match="no tap 'mine'"):
        tapped.request("mine")

"""Heads cut down to some classes: the logits that stay are those of the whole network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distillzoo.errors import OptionError
from distillzoo.models import create_model, slice_head

ROWS = [7, 3, 999, 0]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("timm/test_vit", 160),
        ("timm/test_resnet", 64),
        ("timm/mobilenetv3_small_050", 32),
        ("timm/swin_tiny_patch4_window7_224", 224),
        ("torchvision/squeezenet1_1", 64),  # classifies by a convolution
        ("torchvision/shufflenet_v2_x0_5", 32),
        ("shufflenetv1_224", 64),
        ("timm/levit_128s", 224),  # two classifiers, each a norm and a linear layer
        ("timm/repvit_m0_9", 32),  # two inside one module
    ],
)
def test_the_logits_that_stay_are_the_networks_own(name: str, size: int) -> None:
    whole = create_model(name, num_classes=1000).eval()
    cut = slice_head(copy.deepcopy(whole), ROWS, 1000)
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(cut(images), whole(images)[:, ROWS], rtol=1e-5, atol=1e-5)
    create_model(name, num_classes=len(ROWS)).load_state_dict(cut.state_dict())  # it is the network of so many classes
    assert getattr(cut, "num_classes", len(ROWS)) == len(ROWS)


def test_both_heads_of_a_distilled_transformer_are_cut() -> None:
    whole = create_model("timm/deit_tiny_distilled_patch16_224", num_classes=1000).eval()
    cut = slice_head(copy.deepcopy(whole), ROWS, 1000)
    assert (cut.head.out_features, cut.head_dist.out_features) == (4, 4)


@pytest.mark.parametrize("rows", [[1], [1, 1], [0, 1000], [-1, 2], []])
def test_wrong_rows(rows: list[int]) -> None:
    with pytest.raises(OptionError, match="at least 2 different numbers from 0 to 999"):
        slice_head(nn.Linear(4, 1000), rows, 1000)


def test_a_network_without_such_a_head() -> None:
    for network in (nn.Linear(4, 10), nn.ReLU(), nn.Sequential(nn.Conv2d(3, 1000, 3), nn.Flatten())):
        with pytest.raises(OptionError, match="1,000 outputs at its end"):
            slice_head(network, ROWS, 1000)

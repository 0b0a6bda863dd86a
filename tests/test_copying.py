"""Copies of students whose layers keep a weight that they computed, with the graph of how."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from distillzoo import build_distiller
from distillzoo.adapters.trials import exact_copies, scrambled
from distillzoo.copying import detached_copy
from distillzoo.engine import TrainConfig
from distillzoo.engine.optim import make_averaged
from distillzoo.testing import TinyTeacher, tiny_data

IMAGES = torch.linspace(-2, 2, 4 * 3 * 16 * 16).view(4, 3, 16, 16).mul(37).sin()
TARGETS = torch.tensor([0, 1, 2, 4])

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch advises its parametrizations


def normed(rule):
    torch.manual_seed(0)
    layers = {"conv": rule(nn.Conv2d(3, 6, 3, 2, 1)), "act": nn.ReLU(), "conv2": rule(nn.Conv2d(6, 8, 3, 2, 1))}
    return nn.Sequential(OrderedDict(layers, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, 5)))


@pytest.mark.parametrize("rule", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_student_of_weights_that_are_computed_is_exported_averaged_and_tried_on(rule):
    distiller = build_distiller("kd", normed(rule), TinyTeacher(), data=tiny_data(), seed=0)
    distiller(IMAGES, TARGETS).loss.backward()
    kept = distiller.student.conv.weight
    assert not kept.is_leaf  # which torch refuses to copy
    distiller.eval()
    with torch.no_grad():
        logits = distiller.predict(IMAGES)
        averaged = make_averaged(distiller, TrainConfig(ema_decay=0.9))
        averaged.update_parameters(distiller)
        assert torch.equal(averaged.module.eval().predict(IMAGES), logits)
        exported = distiller.export_student().eval()
        assert torch.equal(exported(IMAGES), logits)
    assert exported.state_dict().keys() == distiller.student.state_dict().keys()
    copy.deepcopy(exported)
    distiller.train()(IMAGES, TARGETS).loss.backward()  # a weight with a graph again
    assert next(exact_copies(scrambled(distiller.student))).double()(IMAGES.double()).isfinite().all()


def test_a_copy_shares_no_tensor_and_the_original_keeps_its_graph():
    class Keeps(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            self.last, self.all = y, {"list": [y, (2.0 * y,)]}
            self.all["self"] = self.all  # as caches do
            return y

    module = Keeps(2, 3)
    module(torch.ones(1, 2))
    twin = detached_copy(module)
    assert torch.equal(twin.last, module.last)
    assert twin.all["list"][0] is twin.last
    assert not twin.last.requires_grad
    assert module.last.grad_fn is not None
    twin.last.zero_()
    assert module.last.any()

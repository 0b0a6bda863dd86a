"""What students return in training mode alone, and how their blocks end there."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distillzoo import build_distiller
from distillzoo.errors import ShapeError, TapError
from distillzoo.taps import Tapped
from distillzoo.testing import TinyNet
from distillzoo.types import DataSpec, Stage

DATA = DataSpec(5, (16, 16))
IMAGES = torch.linspace(-2, 2, 4 * 3 * 16 * 16).view(4, 3, 16, 16).sin()
TARGETS = torch.arange(4)
Named = collections.namedtuple("Named", ["logits", "auxiliary"])


class Returning(TinyNet):
    """Returns something else than logits in training mode."""

    def __init__(self, make):
        super().__init__()
        self.make, self.norm = make, nn.BatchNorm1d(5)

    def forward(self, x):
        logits = self.norm(super().forward(x))
        return self.make(logits, x.flatten(1)) if self.training else logits


@pytest.mark.parametrize(
    "make",
    [
        lambda logits, features: (features, logits),
        lambda logits, features: [None, logits],
        lambda logits, features: Named(logits, 0.0 * logits),
        lambda logits, features: {"loss": None, "features": features, "logits": logits},
        lambda logits, features: collections.OrderedDict(mean=logits.mean(), logits=logits),
    ],
    ids=["features first", "list", "auxiliary logits", "dictionary", "scalar first"],
)
def test_logits_are_found_by_their_shape_among_what_training_returns(make):
    student = Returning(make)
    distiller = build_distiller("kd", student, TinyNet(), data=DATA)
    assert student.norm.num_batches_tracked == 0, "the trial leaves no trace"
    out = distiller(IMAGES, TARGETS)
    assert out.logits.shape == (4, 5)
    torch.testing.assert_close(out.terms["ce"], F.cross_entropy(out.logits, TARGETS))
    out.loss.backward()
    assert student.norm.weight.grad is not None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda logits, features: {"features": features}, r"dict with tensors of the shapes \(2, 768\) in training mode"),
        (
            lambda logits, features: (logits[:, :4], logits[:1]),
            r"tuple with tensors of the shapes \(2, 4\), \(1, 5\) in training",
        ),
        (lambda logits, features: features, r"Tensor of shape \(2, 768\) in training"),
        (lambda logits, features: None, r"NoneType with tensors of the shapes none in training mode for 2 images"),
    ],
    ids=["dictionary", "tuple", "tensor", "nothing"],
)
def test_a_student_that_returns_no_logits_in_training_is_refused_when_it_is_built(make, words):
    student = Returning(make).eval()
    with pytest.raises(ShapeError, match=rf"student Returning returns a {words}.*is \(2, 5\); wrap it in a module"):
        build_distiller("kd", student, TinyNet(), data=DATA)
    assert student.norm.num_batches_tracked == 0
    assert not student.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


class Ending(nn.Module):
    """A residual block whose forward ends with a function, and something after or beside it."""

    def __init__(self, end):
        super().__init__()
        self.conv, self.norm, self.short = nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, 2)
        self.drop, self.end = nn.Dropout(0.5), end

    def forward(self, x):
        gate = torch.sigmoid(x.mean((2, 3)))
        out = F.relu(self.norm(self.conv(x)) + self.short(x))
        ends = {"drop": lambda: self.drop(out), "two": lambda: (out, gate), "late": lambda: (out, torch.sigmoid(gate))}
        return ends[self.end]()


class Ends(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList([Ending(end) for _ in range(3)])
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.fc(x.mean((2, 3)))


def test_of_several_tensors_of_a_block_the_one_that_is_its_map_is_read_before_the_function():
    tapped = Tapped(Ends("two"), DATA)
    assert tapped.path("stage1.pre") == "blocks.0:activation"
    tapped.request("stages", "stages.pre")
    features = tapped(IMAGES).features
    assert torch.equal(features["stage2"], features["stage2.pre"].relu())
    assert (features["stage2.pre"] < 0).any()


@pytest.mark.parametrize("end", ["drop", "late"])
@pytest.mark.parametrize("method", ["ofd", "reviewkd"])
def test_a_stage_whose_function_cannot_be_read_in_training_ends_without_one(end, method):
    student, teacher = Ends(end), Ends(end)
    distiller = build_distiller(method, student, teacher, data=DATA)
    assert distiller.student_net.path("stage1.pre") == "blocks.0"
    assert {(stage.pre, stage.norm) for stage in distiller.student_net.stages} == {(None, None)}
    assert distiller.teacher_net.path("stage1.pre") == ("blocks.0:activation" if end == "drop" else "blocks.0")  # in eval mode
    distiller(IMAGES, TARGETS).loss.backward()
    assert student.blocks[0].norm.num_batches_tracked == 1


def test_a_function_that_a_user_named_must_be_there():
    given = [Stage("blocks.0", pre="blocks.0:activation")]
    with pytest.raises(TapError, match=r"'stage1.pre' .* does not end with a call of one in eval mode; name a module"):
        Tapped(Ends("late"), DATA, stages=given)
    assert Tapped(Ends("late"), DATA, stages=["blocks.0"]).stages == (Stage("blocks.0"),)

"""Networks that write to the images that they are given are refused: others see the same images after them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distillzoo import build_distiller
from distillzoo.errors import OptionError
from distillzoo.taps import Teacher
from distillzoo.testing import TinyNet, TinyTeacher, tiny_data
from distillzoo.types import DataSpec


class Begins(nn.Module):
    """A network behind an operation."""

    def __init__(self, first, network):
        super().__init__()
        self.first, self.network = first, network

    def forward(self, images):
        return self.network(self.first(images))


class Normalise(nn.Module):
    def forward(self, images):
        return images.sub_(0.5).div_(2.0)


def build(student, teacher, **options):
    return build_distiller("kd", student, teacher, data=tiny_data(), seed=0, **options)


@pytest.mark.parametrize("first", [Normalise(), nn.ReLU(inplace=True), nn.Dropout(inplace=True)])
def test_a_student_that_writes_to_the_images_is_refused(first):
    with pytest.raises(OptionError, match=r"The student Begins writes to the images .* or begin it with x = x\.clone\(\)"):
        build(Begins(first, TinyNet()), TinyTeacher())


@pytest.mark.parametrize("first", [Normalise(), nn.ReLU(inplace=True)])
def test_so_is_a_teacher_and_one_of_several(first):
    writes = Begins(first, TinyTeacher())
    with pytest.raises(OptionError, match="The teacher Begins writes to the images"):
        build(TinyNet(), writes)
    with pytest.raises(OptionError, match="The teacher Begins writes to the images"):
        Teacher(writes, tiny_data())
    with pytest.raises(OptionError, match="The teacher Ensemble writes to the images"):
        build(TinyNet(), [TinyTeacher(), writes])
    data = tiny_data()
    with pytest.raises(OptionError, match="The teacher Begins writes to the images"):
        build(TinyNet(), writes, teacher_data=data)  # a view that is the images themselves


def test_what_is_written_to_nobody_elses_images_is_allowed():
    data = tiny_data()
    own = DataSpec(data.num_classes, data.input_size, (0.1,) * data.channels, (0.3,) * data.channels)
    distiller = build(Begins(nn.ReLU(), TinyNet()), Begins(Normalise(), TinyTeacher()), teacher_data=own)
    images = torch.randn(2, data.channels, *data.input_size)
    before = images.clone()
    distiller(images, torch.tensor([0, 1]))
    assert torch.equal(images, before)
    build(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
        TinyTeacher(),
    )

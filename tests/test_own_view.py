"""A teacher that wants another normalisation and size than its student."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distillzoo import Teacher, build_distiller
from distillzoo.errors import OptionError, ShapeError
from distillzoo.taps import Ensemble, OwnView
from distillzoo.taps.teacher import declared_data
from distillzoo.testing import TinyNet, TinyTeacher
from distillzoo.types import Batch, DataSpec

STUDENTS = DataSpec(5, (16, 16), (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
OWN = DataSpec(5, (24, 24), (0.1, 0.2, 0.3), (0.5, 0.5, 1.0))
PIXELS = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def normalised(pixels, spec):
    return (pixels - torch.tensor(spec.mean).view(-1, 1, 1)) / torch.tensor(spec.std).view(-1, 1, 1)


def resized(pixels):
    return F.interpolate(pixels, (24, 24), mode="bilinear", antialias=True, align_corners=False)


class Fixed(TinyTeacher):
    """Runs on its own size only, as a transformer with position embeddings does."""

    def forward(self, x):
        assert x.shape[2:] == (24, 24), "Input height doesn't match"
        return super().forward(x)


def fixed():
    net = Fixed.__new__(Fixed)
    TinyNet.__init__(net, (6, 8, 12))
    return net


def test_the_same_crop_is_renormalised_and_resized():
    seen = OwnView(STUDENTS, OWN)(normalised(PIXELS, STUDENTS))
    torch.testing.assert_close(seen, normalised(resized(PIXELS), OWN))
    same_size = DataSpec(5, (16, 16), OWN.mean, OWN.std)
    torch.testing.assert_close(OwnView(STUDENTS, same_size)(normalised(PIXELS, STUDENTS)), normalised(PIXELS, same_size))


def test_shrinking_is_antialiased():
    stripes = (torch.arange(32) % 2).float().expand(1, 3, 32, 32)
    half = OwnView(DataSpec(5, (32, 32)), DataSpec(5, (12, 12)))(stripes)
    assert (half[..., 2:-2] - 0.5).abs().max() < 0.12  # without it every third stripe would stay


def test_the_same_view_is_the_same_tensor():
    assert OwnView(STUDENTS, STUDENTS)(PIXELS) is PIXELS


def test_grey_images_are_spread_and_other_channels_refused():
    grey = DataSpec(5, (16, 16), (0.5,), (0.25,))
    seen = OwnView(grey, OWN)(PIXELS[:, :1])
    assert seen.shape == (4, 3, 24, 24)
    with pytest.raises(OptionError, match=r"wants 1 channels.*the images have 3"):
        OwnView(STUDENTS, grey)


def test_a_teacher_is_measured_and_run_on_its_own_view():
    net = fixed()
    teacher = Teacher(net, STUDENTS, own_data=OWN)
    assert teacher.shapes["stage3"] == (12, 6, 6)
    teacher.request("last")
    images = normalised(PIXELS, STUDENTS)
    trace = teacher.trace(Batch(images, torch.zeros(4), second_view=images.flip(3)))
    expected = net(normalised(resized(PIXELS), OWN))
    torch.testing.assert_close(trace.logits, expected)
    torch.testing.assert_close(trace.second.logits, net(normalised(resized(PIXELS), OWN).flip(3)))
    assert trace.features["stage3"].shape == (4, 12, 6, 6)


@pytest.mark.parametrize("name", ["kd", "at", "ofd"])
def test_a_distiller_trains_with_a_teacher_of_another_size(name):
    distiller = build_distiller(name, TinyNet(), fixed(), data=STUDENTS, teacher_data=OWN, seed=0)
    out = distiller(normalised(PIXELS, STUDENTS), torch.zeros(4, dtype=torch.int64))
    out.loss.backward()
    assert torch.isfinite(out.loss)


def test_declared_is_what_the_teacher_says_of_itself():
    net = fixed()
    net.pretrained_cfg = {"input_size": (3, 24, 24), "mean": OWN.mean, "std": OWN.std}
    declared = declared_data(net, STUDENTS)
    assert (declared.input_size, declared.mean, declared.std, declared.num_classes) == ((24, 24), OWN.mean, OWN.std, 5)
    distiller = build_distiller("kd", TinyNet(), net, data=STUDENTS, teacher_data="declared")
    images = normalised(PIXELS, STUDENTS)
    trace = distiller.teacher_net(images)
    torch.testing.assert_close(trace.logits, net(normalised(resized(PIXELS), OWN)))
    with pytest.raises(OptionError, match="TinyTeacher declares neither"):
        build_distiller("kd", TinyNet(), TinyTeacher(), data=STUDENTS, teacher_data="declared")


def test_unless_it_is_said_the_teacher_sees_what_the_student_sees():
    net = TinyTeacher()
    net.pretrained_cfg = {"input_size": (3, 24, 24), "mean": OWN.mean, "std": OWN.std}
    trace = build_distiller("kd", TinyNet(), net, data=STUDENTS).teacher_net(PIXELS)
    assert torch.equal(trace.logits, net(PIXELS))


def test_a_teacher_that_does_not_run_says_what_to_pass():
    with pytest.raises(
        ShapeError, match=r"does not run on images of 16x16 \(Input height doesn't match\).*teacher_data='declared'"
    ):
        build_distiller("kd", TinyNet(), fixed(), data=STUDENTS)


def test_each_of_several_teachers_sees_what_it_declares():
    one, other = fixed(), TinyTeacher()
    one.pretrained_cfg = {"input_size": (3, 24, 24), "mean": OWN.mean, "std": OWN.std}
    other.pretrained_cfg = {"mean": STUDENTS.mean, "std": STUDENTS.std}
    distiller = build_distiller("kd", TinyNet(), [one, other], data=STUDENTS, teacher_data="declared")
    images = normalised(PIXELS, STUDENTS)
    trace = distiller.teacher_net(images)
    expected = (one(normalised(resized(PIXELS), OWN)).softmax(1) + other(images).softmax(1)) / 2
    torch.testing.assert_close(trace.logits.exp(), expected)
    with pytest.raises(OptionError, match="2 teachers takes one view each or none; got 1"):
        Ensemble([one, other], [OwnView(STUDENTS, OWN)])


def test_where_there_is_no_view_to_choose_it_is_refused():
    with pytest.raises(OptionError, match="there is no teacher"):
        build_distiller("vanilla", TinyNet(), data=STUDENTS, teacher_data=OWN)
    with pytest.raises(OptionError, match="where its Teacher is made"):
        build_distiller("kd", TinyNet(), Teacher(TinyTeacher(), STUDENTS), data=STUDENTS, teacher_data=OWN)


@pytest.mark.parametrize("wanted", ["teacher", {"mean": OWN.mean, "std": OWN.std}, [OWN], 24])
def test_what_says_nothing_of_a_teachers_images_is_refused(wanted):
    said = re.escape(f"got {wanted!r}; make one by DataSpec(num_classes, (height, width), mean=..., std=...).")
    for teacher in (TinyTeacher(), [TinyTeacher(), TinyTeacher()]):
        with pytest.raises(OptionError, match=rf"^teacher_data is a DataSpec, 'declared' or None; {said}$"):
            build_distiller("kd", TinyNet(), teacher, data=STUDENTS, teacher_data=wanted)
    with pytest.raises(OptionError, match=rf"^own_data is a DataSpec or None; {said}$"):
        Teacher(TinyTeacher(), STUDENTS, own_data=wanted)


@pytest.mark.parametrize("wanted", [OWN, "declared"])
def test_what_the_images_are_is_never_guessed(wanted):
    teacher, student = TinyTeacher(), TinyNet()
    for network in (teacher, student):  # not even where a student declares it: images of one's own are another matter
        network.pretrained_cfg = {"input_size": (3, 24, 24), "mean": OWN.mean, "std": OWN.std}
    for others in ({"input_size": 16}, {"input_size": 16, "num_classes": 5}, {}):
        with pytest.raises(OptionError, match=r"nothing says what the images are.*; pass data=DataSpec\("):
            build_distiller("kd", student, teacher, teacher_data=wanted, **others)
    assert all(p.requires_grad for p in teacher.parameters())


def test_a_view_is_copied_to_a_device_and_type_once():
    view = OwnView(STUDENTS, OWN)
    view(PIXELS)
    kept = dict(view._moved)
    view(PIXELS)
    assert view._moved == kept
    assert view(PIXELS.double()).dtype == torch.float64
    assert nn.Module not in type(view).__mro__  # no state of its own in a checkpoint

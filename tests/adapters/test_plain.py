"""A student that was taken over by a distiller is told from a plain one."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from distillzoo import build_distiller
from distillzoo.adapters.plain import check_plain
from distillzoo.errors import OptionError
from distillzoo.testing import TinyNet, TinyTeacher, tiny_data


def taken_over(method):
    student = TinyNet()
    return student, build_distiller(method, student, TinyTeacher(), data=tiny_data())


@pytest.mark.parametrize(
    ("method", "layer"), [("kdiffusion", "Branched"), ("gpd", "DualOp"), ("gpd_reduced+at", "DualOp")], ids=lambda value: value
)
def test_a_student_that_was_restructured_is_refused_and_its_export_is_not(method, layer):
    student, distiller = taken_over(method)
    for network in (student, copy.deepcopy(student), nn.Sequential(student)):
        with pytest.raises(OptionError, match=rf"of the student .* is a {layer}, which a distiller put there.*export_student\(\)"):
            check_plain(network)
    check_plain(distiller.export_student())


def test_a_student_that_was_only_read_is_plain():
    student, _ = taken_over("at+kd")
    check_plain(student)


@pytest.mark.parametrize("method", ["kd", "kdiffusion", "gpd", "gpd_reduced+at"])
def test_a_distiller_is_not_built_on_a_student_of_another(method):
    for first in ("kdiffusion", "gpd"):
        student, _ = taken_over(first)
        with pytest.raises(OptionError, match=r"of the student TinyNet is a .*, which a distiller put there"):
            build_distiller(method, student, TinyTeacher(), data=tiny_data())

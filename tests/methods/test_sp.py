import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distillzoo.errors import ShapeError, UnsupportedPairError
from distillzoo.functional import sp_loss
from tests.methods import oracles
from tests.methods.oracles import TinyNet


def slow_sp(student, teacher):
    """|G_t - G_s|_F^2 / B^2 with rows over max(norm, 1e-12), entry by entry."""

    def similarities(features):
        rows = features.flatten(1).tolist()
        matrix = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]
        return [[x / max(math.sqrt(sum(y * y for y in row)), 1e-12) for x in row] for row in matrix]

    own, other = similarities(student), similarities(teacher)
    return sum((b - a) ** 2 for r, q in zip(own, other, strict=True) for a, b in zip(r, q, strict=True)) / len(own) ** 2


def test_oracle_and_the_equation_written_out():
    student, teacher = oracles.student_map(), oracles.teacher_map()
    assert sp_loss(student, teacher).item() == pytest.approx(0.46032209, abs=1e-8)
    assert sp_loss(student, teacher).item() == pytest.approx(slow_sp(student, teacher), abs=1e-12)
    assert sp_loss(oracles.student_vectors(), teacher).item() == pytest.approx(
        slow_sp(oracles.student_vectors(), teacher), abs=1e-12
    )


@pytest.mark.parametrize("scale", [1e-7, 3e-7, 1e-6])
def test_equals_the_equation_where_its_floor_holds(scale):
    student, teacher = scale * oracles.student_map(), oracles.teacher_map()
    assert sp_loss(student, teacher).item() == pytest.approx(slow_sp(student, teacher), abs=1e-12)


def test_gradient():
    teacher = oracles.teacher_map()
    torch.autograd.gradcheck(lambda x: sp_loss(x, teacher), oracles.student_map().requires_grad_())
    oracles.check_teacher_is_constant(sp_loss, oracles.student_map(), teacher)


@oracles.UNHURRIED
@given(st.floats(1e-3, 1e3), st.permutations(range(4)), st.permutations(range(48)))
def test_property_blind_to_scale_order_and_features(scale, order, features):
    student, teacher = oracles.student_map(), oracles.teacher_map()
    loss = sp_loss(student, teacher)
    torch.testing.assert_close(sp_loss(scale * student[order], teacher[order] / scale), loss)
    torch.testing.assert_close(sp_loss(student.flatten(1)[:, features], teacher), loss)
    assert sp_loss(scale * student.flatten(1)[:, features], student) < 1e-28
    assert 0 <= loss <= 4 / 4


@pytest.mark.parametrize("size", [1, 2])
def test_finite_for_zero_equal_and_large_features(size):
    zero, large = torch.zeros(size, 3, 4, 4), torch.full((size, 3, 4, 4), 1e4)
    for student, teacher in ((zero, zero), (zero, large), (large, zero), (large, large), (large * 1e15, zero + 1e-30)):
        oracles.check_finite(sp_loss, student, teacher)


def test_a_dead_sample_gets_no_gradient_of_the_size_of_one_over_the_floor():
    student = oracles.student_map().float()
    student[2] = 0
    student.requires_grad_()
    sp_loss(student, oracles.teacher_map().float()).backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 10


def test_huge_values_do_not_overflow():
    student, teacher = oracles.student_map().float(), oracles.teacher_map().float()
    torch.testing.assert_close(sp_loss(1e18 * student, 1e15 * teacher), sp_loss(student, teacher))


def test_half_types_autocast_and_compile():
    student, teacher = oracles.student_map(), oracles.teacher_map()
    oracles.check_half_types(sp_loss, 1e4 * student, teacher)
    oracles.check_compiles(sp_loss, student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sp_loss(student.float(), teacher.float()).item() == pytest.approx(0.46032209, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (4,)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ShapeError, match="sp_loss"):
        sp_loss(oracles.student_map(), torch.zeros(shape))
    with pytest.raises(ShapeError, match="not empty"):
        sp_loss(torch.zeros(0, 5), torch.zeros(0, 5))


# ---------------------------------------------------------------------------------------------------- the distiller


def test_the_last_maps_are_compared():
    distiller = oracles.tiny_pair("sp", student=TinyNet(4, stages=2)).eval()
    assert distiller.pair == ("stage2", "stage3")
    assert [weight.final() for weight in distiller.weights.values()] == [1.0, 3000.0]
    images, targets = oracles.tiny_batch()
    expected = sp_loss(distiller.student_net(images).features["stage2"], distiller.teacher_net(images).features["stage3"])
    torch.testing.assert_close(distiller(images, targets).terms["similarity"], expected)


def test_bad_input_is_refused():
    ensemble = [TinyNet(4), TinyNet(4)]
    with pytest.raises(UnsupportedPairError, match="ensemble"):
        oracles.tiny_pair("sp", teacher=ensemble)


@pytest.mark.parametrize(("size", "documented"), [(16, 0.56), (64, 0.16), (256, 0.041)])
def test_the_weighted_figures_of_the_documentation(size, documented):
    generator = torch.Generator().manual_seed(0)
    draws = [[torch.rand(size, 256, generator=generator) for _ in range(2)] for _ in range(4096 // size)]
    mean = sum(sp_loss(*pair).item() for pair in draws) / len(draws)
    assert 3000 * mean == pytest.approx(documented, rel=0.07)

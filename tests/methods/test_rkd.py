import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distillzoo.errors import OptionError, ShapeError
from distillzoo.functional import rkd_angle_loss, rkd_distance_loss
from distillzoo.methods import rkd
from tests.methods import oracles

LOSSES = [rkd_distance_loss, rkd_angle_loss]


def huber(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def unit(row):
    norm = math.sqrt(sum(x * x for x in row))
    return [x / max(norm, 1e-12) for x in row]


def slow_distance(student, teacher):
    def relative(rows):
        d = [
            [
                0.0 if i == j else math.sqrt(max(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)), 1e-12))
                for j, b in enumerate(rows)
            ]
            for i, a in enumerate(rows)
        ]
        positive = [x for row in d for x in row if x > 0]
        return [[x / (sum(positive) / len(positive)) for x in row] for row in d]

    own, other = relative(student), relative(teacher)
    return sum(huber(a - b) for r, q in zip(own, other, strict=True) for a, b in zip(r, q, strict=True)) / len(own) ** 2


def slow_angle(student, teacher):
    def cosines(rows):
        for i in rows:
            edges = [unit([x - y for x, y in zip(j, i, strict=True)]) for j in rows]
            for v in edges:
                for w in edges:
                    yield sum(x * y for x, y in zip(v, w, strict=True))

    return sum(huber(a - b) for a, b in zip(cosines(student), cosines(teacher), strict=True)) / len(student) ** 3


SLOW = {rkd_distance_loss: slow_distance, rkd_angle_loss: slow_angle}


def test_oracle():
    student, teacher = oracles.student_vectors(), oracles.teacher_vectors()
    distance, angle = rkd_distance_loss(student, teacher).item(), rkd_angle_loss(student, teacher).item()
    assert distance == pytest.approx(0.23948402, abs=1e-8)
    assert angle == pytest.approx(0.15913699, abs=1e-8)
    assert 25 * distance + 50 * angle == pytest.approx(13.94394985, abs=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", [2, 4, 9])
def test_equals_the_equation_written_out(loss, normalize, size):
    student, teacher = oracles.sine(size, 6, alpha=0.9, delta=0.1, scale=2.0), oracles.sine(size, 3, alpha=0.5)
    student[-1, 0] += 9.0  # a far sample: differences beyond 1, Huber's other branch
    rows = [[unit(row) if normalize else row for row in x.tolist()] for x in (student, teacher)]
    assert loss(student, teacher, normalize=normalize).item() == pytest.approx(SLOW[loss](*rows), abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_samples_count_as_the_equation_says(loss):
    student, teacher = oracles.student_vectors() + 100.0, oracles.teacher_vectors()
    student[1] = student[0]
    assert loss(student, teacher).item() == pytest.approx(SLOW[loss](student.tolist(), teacher.tolist()), abs=1e-11)
    single = loss(student.float(), teacher.float()).item()
    assert single == pytest.approx(SLOW[loss](student.float().tolist(), teacher.tolist()), abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradient(loss, normalize):
    student, teacher = oracles.student_vectors(), oracles.teacher_vectors()
    torch.autograd.gradcheck(lambda x: loss(x, teacher, normalize=normalize), student.requires_grad_())
    oracles.check_teacher_is_constant(loss, student.detach(), teacher)


@pytest.mark.parametrize("loss", LOSSES)
@oracles.UNHURRIED
@given(st.floats(1e-2, 1e2), st.floats(-100.0, 100.0), st.permutations(range(4)), st.permutations(range(6)))
def test_property_blind_to_similarities_of_space_and_to_order(loss, scale, shift, order, features):
    student, teacher = oracles.student_vectors(), oracles.teacher_vectors()
    value = loss(student, teacher)
    torch.testing.assert_close(loss(scale * student[order] + shift, teacher[order]), value, rtol=0, atol=1e-9)
    torch.testing.assert_close(loss(-student[:, features], teacher), value)
    assert loss(scale * student[:, features] + shift, student) < 1e-16
    assert value > 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_finite_for_zero_equal_and_large_vectors(loss, normalize, size):
    zero, large, spread = torch.zeros(size, 6), torch.full((size, 6), 1e4), oracles.sine(size, 6, alpha=0.9).float()
    pairs = spread[torch.arange(size) // 2]  # samples that are equal two by two

    def value(student, teacher):
        return loss(student, teacher, normalize=normalize)

    for student in (zero, large, spread, pairs, pairs + 1e-30, spread * 1e-12):
        for teacher in (zero, large, spread, pairs):
            result = oracles.check_finite(value, student, teacher)
            assert size > 1 or result == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_samples_get_no_wild_gradient(loss):
    student = oracles.student_vectors().float()
    student[1] = student[0]
    student.requires_grad_()
    loss(student, oracles.teacher_vectors().float()).backward()
    assert student.grad.abs().max() < 10


@pytest.mark.parametrize("loss", LOSSES)
def test_half_types_autocast_and_compile(loss):
    student, teacher = oracles.student_vectors(), oracles.teacher_vectors()
    oracles.check_half_types(loss, 300 * student + 100, teacher)
    oracles.check_compiles(loss, student, teacher)
    expected = loss(student, teacher).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(student.float(), teacher.float()).item() == pytest.approx(expected, abs=1e-6)


def test_large_batches_are_done_in_parts_with_the_same_value_and_gradient(monkeypatch):
    student, teacher = oracles.sine(7, 5, alpha=0.9).requires_grad_(), oracles.sine(7, 3, alpha=0.5)
    whole = rkd_angle_loss(student, teacher)
    (gradient,) = torch.autograd.grad(whole, student)
    for most in (1, 2 * 49, 3 * 49, 6 * 49):
        monkeypatch.setattr(rkd, "_MOST_ANGLES", most)
        parts = rkd_angle_loss(student, teacher)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-15)
        torch.testing.assert_close(torch.autograd.grad(parts, student)[0], gradient, rtol=0, atol=1e-15)
    oracles.check_compiles(rkd_angle_loss, student.detach(), teacher)


def test_single_precision_far_from_the_origin():
    """Pooled features share a large mean: distances and angles must not be lost in it."""
    student, teacher = oracles.sine(8, 32, alpha=0.9), oracles.sine(8, 16, alpha=0.5)
    moved = (1e-2 * student + 10.0).float()
    for loss in LOSSES:
        expected = loss(moved.double(), teacher).item()
        assert loss(moved, teacher.float()).item() == pytest.approx(expected, abs=1e-5)


def test_single_precision_of_neighbours():
    """Samples ten thousand times nearer than the spread: their angles are differences of nearly equal inner products."""
    student, teacher = oracles.sine(8, 6, alpha=0.9).float(), oracles.sine(8, 6, alpha=0.5)
    student[1] = student[0] + 1e-4 * torch.arange(6.0).cos()
    student[3] = student[2] - 1e-4 * torch.arange(6.0).sin()
    for loss in LOSSES:
        assert loss(student, teacher.float()).item() == pytest.approx(loss(student.double(), teacher).item(), abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(3, 6), (4, 6, 1), (4,)])
def test_other_shapes_are_refused(loss, shape):
    with pytest.raises(ShapeError, match=loss.__name__):
        loss(oracles.student_vectors(), torch.zeros(shape))


# ---------------------------------------------------------------------------------------------------- the distiller


@pytest.mark.parametrize("normalize", [False, True])
def test_the_terms_compare_pooled_vectors(normalize):
    distiller = oracles.tiny_pair("rkd", normalize=normalize).eval()
    assert [weight.final() for weight in distiller.weights.values()] == [1.0, 25.0, 50.0]
    images, targets = oracles.tiny_batch()
    own, other = (net(images).features["pooled"] for net in (distiller.student_net, distiller.teacher_net))
    out = distiller(images, targets)
    torch.testing.assert_close(out.terms["distance"], rkd_distance_loss(own, other, normalize=normalize))
    torch.testing.assert_close(out.terms["angle"], rkd_angle_loss(own, other, normalize=normalize))
    torch.testing.assert_close(out.loss, out.terms["ce"] + 25 * out.terms["distance"] + 50 * out.terms["angle"])


def test_two_steps_of_one_sample_train_with_unit_vectors():
    oracles.check_two_steps(oracles.tiny_pair("rkd", normalize=True), 1)


def test_bad_options_are_refused():
    with pytest.raises(OptionError, match="normalize"):
        oracles.tiny_pair("rkd", normalize="yes")

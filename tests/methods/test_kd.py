import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distillzoo.errors import OptionError, ShapeError
from distillzoo.functional import kd_loss
from tests.methods import oracles


def slow_kd(student, teacher, temperature):
    """T^2 (1/B) sum_b sum_c p^t log(p^t / p^s), sample by sample, class by class."""
    total = 0.0
    for own, other in zip(student.tolist(), teacher.tolist(), strict=True):
        p_s = [math.exp(z / temperature) for z in own]
        p_t = [math.exp(z / temperature) for z in other]
        for a, b in zip(p_s, p_t, strict=True):
            total += b / sum(p_t) * math.log((b / sum(p_t)) / (a / sum(p_s)))
    return total * temperature**2 / len(student)


@pytest.mark.parametrize(("temperature", "value"), [(4.0, 3.33097111), (1.0, 1.88765326)])
def test_oracle(temperature, value):
    loss = kd_loss(oracles.student_logits(), oracles.teacher_logits(), temperature)
    assert loss.item() == pytest.approx(value, abs=1e-8)


def test_the_usual_temperature_is_four():
    assert kd_loss(oracles.student_logits(), oracles.teacher_logits()).item() == pytest.approx(3.33097111, abs=1e-8)
    assert oracles.tiny_pair("kd").temperature == 4.0


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0, 20.0])
def test_equals_the_equation_written_out(temperature):
    student, teacher = oracles.student_logits(), oracles.teacher_logits()
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(slow_kd(student, teacher, temperature), abs=1e-12)


def test_the_gradient_is_t_over_b_times_the_difference_of_probabilities():
    student, teacher, temperature = oracles.student_logits().requires_grad_(), oracles.teacher_logits(), 3.0
    kd_loss(student, teacher, temperature).backward()
    expected = (student / temperature).softmax(1) - (teacher / temperature).softmax(1)
    torch.testing.assert_close(student.grad, expected.detach() * temperature / 4, rtol=0, atol=1e-14)


def test_gradcheck():
    teacher = oracles.teacher_logits()
    torch.autograd.gradcheck(lambda x: kd_loss(x, teacher, 4.0), oracles.student_logits().requires_grad_())


@oracles.UNHURRIED
@given(st.floats(0.5, 20.0), st.floats(-50.0, 50.0), st.permutations(range(4)))
def test_property_not_negative_zero_at_equality_blind_to_shifts_and_order(temperature, shift, order):
    student, teacher = oracles.student_logits(), oracles.teacher_logits()
    loss = kd_loss(student, teacher, temperature)
    assert loss >= 0
    assert kd_loss(teacher + shift, teacher, temperature).abs() < 1e-10 * temperature**2
    torch.testing.assert_close(kd_loss(student + shift, teacher[order][torch.tensor(order).argsort()], temperature), loss)
    torch.testing.assert_close(kd_loss(student[order], teacher[order], temperature), loss)


@pytest.mark.parametrize("size", [1, 2])
def test_finite_at_extreme_logits(size):
    gap = torch.zeros(size, 5)
    gap[:, 0] = 1e4
    for student, teacher in ((gap, -gap), (gap, gap), (torch.zeros(size, 5), gap), (gap, torch.zeros(size, 5))):
        oracles.check_finite(kd_loss, student, teacher)
    oracles.check_finite(kd_loss, torch.tensor([[1e4, -1e4]]), torch.tensor([[-math.inf, 0.0]]))


def test_compiles_and_treats_the_teacher_as_constant():
    oracles.check_compiles(kd_loss, oracles.student_logits(), oracles.teacher_logits())
    oracles.check_teacher_is_constant(kd_loss, oracles.student_logits(), oracles.teacher_logits())


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (4,), (4, 5, 1)])
def test_other_shapes_are_refused_by_name(shape):
    with pytest.raises(ShapeError, match=r"\(B, C\)"):
        kd_loss(oracles.student_logits(), torch.zeros(shape))
    with pytest.raises(ShapeError, match="not empty; got \\(0, 5\\)"):
        kd_loss(torch.zeros(0, 5), torch.zeros(0, 5))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperatures_are_refused(temperature):
    with pytest.raises(OptionError, match="temperature"):
        kd_loss(oracles.student_logits(), oracles.teacher_logits(), temperature)
    with pytest.raises(OptionError, match="temperature"):
        oracles.tiny_pair("kd", temperature=temperature)


def test_weights_of_the_published_scripts():
    values = {name: weight.final() for name, weight in oracles.tiny_pair("kd").weights.items()}
    assert values == {"ce": 0.1, "kd": 0.9}
    values = {name: weight.final() for name, weight in oracles.tiny_pair("kd", weights="imagenet").weights.items()}
    assert values == {"ce": 0.5, "kd": 0.5}
    composed = oracles.tiny_pair("at+kd").weights
    assert (composed["ce"].final(), composed["kd.kd"].final()) == (1.0, 1.0)


def test_the_term_is_the_loss_of_the_logits_and_two_steps_train():
    distiller = oracles.tiny_pair("kd", temperature=2.0)
    images, targets = oracles.tiny_batch()
    out = distiller(images, targets)
    torch.testing.assert_close(out.terms["kd"], kd_loss(out.logits, distiller.teacher_net(images).logits, 2.0))
    torch.testing.assert_close(out.loss, 0.1 * out.terms["ce"] + 0.9 * out.terms["kd"])
    oracles.check_two_steps(distiller)
    oracles.check_two_steps(distiller, 1)

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distillzoo.errors import OptionError, ShapeError
from distillzoo.functional import dkd_loss, kd_loss, nckd_loss, tckd_loss
from distillzoo.types import Progress
from tests.methods import oracles

Y = oracles.LABELS


def softmax(row):
    values = [math.exp(z) for z in row]
    return [value / sum(values) for value in values]


def slow_terms(student, teacher, targets, temperature):
    """(T^2 mean KL of (p_y, 1 - p_y), T^2 mean KL of the others among themselves), class by class."""
    target = rest = 0.0
    for own, other, y in zip(student.tolist(), teacher.tolist(), targets.tolist(), strict=True):
        own, other = ([z / temperature for z in row] for row in (own, other))
        p_s, p_t = softmax(own)[y], softmax(other)[y]
        target += p_t * math.log(p_t / p_s) + (1 - p_t) * math.log((1 - p_t) / (1 - p_s))
        q_s, q_t = (softmax(row[:y] + row[y + 1 :]) for row in (own, other))
        rest += sum(b * math.log(b / a) for a, b in zip(q_s, q_t, strict=True))
    return target * temperature**2 / len(targets), rest * temperature**2 / len(targets)


def test_oracle():
    student, teacher = oracles.student_logits(), oracles.teacher_logits()
    assert tckd_loss(student, teacher, Y).item() == pytest.approx(1.16426709, abs=1e-8)
    assert nckd_loss(student, teacher, Y).item() == pytest.approx(2.63837987, abs=1e-8)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("targets", [[0, 1, 2, 3], [4, 4, 0, 2]])
def test_equals_the_equations_written_out(temperature, targets):
    student, teacher, targets = oracles.student_logits(), oracles.teacher_logits(), torch.tensor(targets)
    expected = slow_terms(student, teacher, targets, temperature)
    assert tckd_loss(student, teacher, targets, temperature).item() == pytest.approx(expected[0], abs=1e-12)
    assert nckd_loss(student, teacher, targets, temperature).item() == pytest.approx(expected[1], abs=1e-12)
    both = dkd_loss(student, teacher, targets, temperature=temperature, target_weight=0.3, non_target_weight=7.0).item()
    assert both == pytest.approx(0.3 * expected[0] + 7.0 * expected[1], abs=1e-11)


def test_the_default_weights_are_the_papers():
    student, teacher = oracles.student_logits(), oracles.teacher_logits()
    expected = tckd_loss(student, teacher, Y, 4.0) + 8.0 * nckd_loss(student, teacher, Y, 4.0)
    torch.testing.assert_close(dkd_loss(student, teacher, Y), expected)


@oracles.UNHURRIED
@given(st.floats(0.5, 10.0), st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_property_the_parts_make_up_kd(temperature, targets):
    student, teacher, targets = oracles.student_logits(), oracles.teacher_logits(), torch.tensor(targets)
    total = 0.0
    for b in range(4):
        own, other, y = student[b : b + 1], teacher[b : b + 1], targets[b : b + 1]
        sure = (other / temperature).softmax(1)[0, y[0]]
        total = total + tckd_loss(own, other, y, temperature) + (1 - sure) * nckd_loss(own, other, y, temperature)
    torch.testing.assert_close(total / 4, kd_loss(student, teacher, temperature), rtol=0, atol=1e-12)


@oracles.UNHURRIED
@given(st.floats(-50.0, 50.0), st.permutations(range(4)), st.permutations(range(5)))
def test_property_not_negative_zero_at_equality_blind_to_shifts_order_and_class_names(shift, order, classes):
    student, teacher = oracles.student_logits(), oracles.teacher_logits()
    renamed = torch.tensor(classes).argsort()[Y]
    for loss in (tckd_loss, nckd_loss):
        value = loss(student, teacher, Y)
        assert value >= 0
        assert loss(teacher + shift, teacher, Y).abs() < 1e-11
        torch.testing.assert_close(loss(student[order], teacher[order] + shift, Y[order]), value)
        torch.testing.assert_close(loss(student[:, classes], teacher[:, classes], renamed), value)


@pytest.mark.parametrize("loss", [tckd_loss, nckd_loss])
def test_gradient(loss):
    teacher = oracles.teacher_logits()
    torch.autograd.gradcheck(lambda x: loss(x, teacher, Y), oracles.student_logits().requires_grad_())
    oracles.check_teacher_is_constant(lambda s, t: loss(s, t, Y), oracles.student_logits(), teacher)


def test_the_parts_look_at_their_own_classes_only():
    student, teacher = oracles.student_logits().requires_grad_(), oracles.teacher_logits()
    nckd_loss(student, teacher, Y).backward()
    assert (student.grad[Y, Y] == 0).all()
    among_others = student.detach().clone()
    among_others[0, 1], among_others[0, 2] = student[0, 2].detach(), student[0, 1].detach()
    torch.testing.assert_close(tckd_loss(among_others, teacher, Y), tckd_loss(student.detach(), teacher, Y))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("loss", [tckd_loss, nckd_loss, dkd_loss])
def test_finite_at_extreme_logits_and_one_hot_teachers(loss, size):
    gap = torch.zeros(size, 5)
    gap[:, 0] = 1e4
    right, wrong, flat = torch.zeros(size).long(), torch.full((size,), 3), torch.zeros(size, 5)
    one_hot = torch.full((size, 5), -math.inf)
    one_hot[:, 0] = 0
    for student in (gap, -gap, flat):
        for teacher in (gap, -gap, flat, one_hot):
            for targets in (right, wrong):
                oracles.check_finite(loss, student, teacher, targets)


def test_a_large_gap_has_the_value_and_the_gradient_of_the_equation():
    """At a gap of 1e4 the binary divergence is the gap, and its slope is 1; a probability would have underflown."""
    student = torch.tensor([[1e4, 0.0]], requires_grad=True)
    teacher, target = torch.tensor([[-1e4, 0.0]]), torch.tensor([0])
    loss = tckd_loss(student, teacher, target, 1.0)
    assert loss.item() == pytest.approx(1e4)
    loss.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("loss", [tckd_loss, nckd_loss, dkd_loss])
def test_half_types_and_compile(loss):
    oracles.check_half_types(loss, oracles.student_logits(), oracles.teacher_logits(), Y)
    oracles.check_compiles(loss, oracles.student_logits(), oracles.teacher_logits(), Y)


def test_two_classes_have_nothing_to_compare_among_the_others():
    student, teacher, targets = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0, 1, 0])
    assert nckd_loss(student, teacher, targets) == 0
    torch.testing.assert_close(tckd_loss(student, teacher, targets), kd_loss(student, teacher, 4.0))


@pytest.mark.parametrize("loss", [tckd_loss, nckd_loss, dkd_loss])
def test_bad_input_is_refused(loss):
    student, teacher = oracles.student_logits(), oracles.teacher_logits()
    for other in (teacher[:, :4], teacher[:3], teacher[0]):
        with pytest.raises(ShapeError, match="kd_loss"):
            loss(student, other, Y)
    with pytest.raises(ShapeError, match="at least 2"):
        loss(student[:, :1], teacher[:, :1], Y)
    for targets in (torch.ones(4, 5) / 5, torch.ones(4), Y[:3]):
        with pytest.raises(OptionError, match="class numbers"):
            loss(student, teacher, targets)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(OptionError, match="temperature"):
            loss(student, teacher, Y, temperature=temperature)


# ---------------------------------------------------------------------------------------------------- the distiller


def test_the_warm_up_is_the_codes():
    distiller = oracles.tiny_pair("dkd")
    at = [distiller.weights["nckd"](Progress(epoch, 240, 0, 10)) for epoch in (0, 9, 19, 20, 239)]
    assert at == pytest.approx([0.4, 4.0, 8.0, 8.0, 8.0])
    assert distiller.weights["tckd"](Progress(0, 240, 0, 10)) == pytest.approx(0.05)
    assert [weight.final() for weight in distiller.weights.values()] == [1.0, 1.0, 8.0]
    imagenet = oracles.tiny_pair("dkd", weights="imagenet").weights
    assert [weight(Progress(0, 100, 0, 10)) for weight in imagenet.values()] == [1.0, 1.0, 0.5]


def test_the_loss_is_the_weighted_sum_of_its_terms():
    distiller = oracles.tiny_pair("dkd", temperature=2.0, weights={"nckd": 2.0})
    images, targets = oracles.tiny_batch()
    out = distiller(images, targets)
    teacher = distiller.teacher_net(images).logits
    expected = dkd_loss(out.logits, teacher, targets, temperature=2.0, non_target_weight=2.0)
    torch.testing.assert_close(out.loss, out.terms["ce"] + expected)
    oracles.check_two_steps(distiller)
    oracles.check_two_steps(distiller, 1)


def test_soft_targets_and_bad_options_are_refused():
    distiller = oracles.tiny_pair("dkd")
    assert distiller.requires.hard_labels
    images, targets = oracles.tiny_batch()
    with pytest.raises(OptionError, match="mixing"):
        distiller(images, torch.nn.functional.one_hot(targets, 5).float())
    with pytest.raises(OptionError, match="temperature"):
        oracles.tiny_pair("dkd", temperature=0.0)

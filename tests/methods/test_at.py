import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distillzoo.errors import OptionError, ShapeError
from distillzoo.functional import attention_loss, attention_map
from tests.methods import oracles
from tests.methods.oracles import TinyNet


def slow_map(features, power):
    """v / max(|v|, 1e-12), v the mean over channels of |f|^p, position by position."""
    rows = []
    for sample in features.flatten(2).tolist():
        v = [sum(abs(channel[i]) ** power for channel in sample) / len(sample) for i in range(len(sample[0]))]
        norm = max(math.sqrt(sum(x * x for x in v)), 1e-12)
        rows.append([x / norm for x in v])
    return rows


def slow_loss(student, teacher, power=2.0, form="code"):
    total, positions = 0.0, student.shape[2] * student.shape[3]
    for a, b in zip(slow_map(student, power), slow_map(teacher, power), strict=True):
        square = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
        total += square if form == "code" else 0.5 * math.sqrt(square)
    return total / (len(student) * positions)


def test_oracle():
    assert attention_loss(oracles.student_map(), oracles.teacher_map()).item() == pytest.approx(0.00653748, abs=1e-8)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 4.5])
@pytest.mark.parametrize("form", ["code", "paper"])
def test_equals_the_equation_written_out(power, form):
    student, teacher = oracles.student_map(), oracles.teacher_map()
    value = attention_loss(student, teacher, power=power, form=form).item()
    assert value == pytest.approx(slow_loss(student, teacher, power, form), abs=1e-12)


def test_the_map_is_a_unit_vector_and_odd_powers_do_not_cancel():
    features = oracles.student_map()
    for power in (1.0, 2.0, 3.0):
        torch.testing.assert_close(attention_map(features, power).norm(dim=1), torch.ones(4, dtype=torch.float64))
        torch.testing.assert_close(attention_map(-features, power), attention_map(features, power), rtol=0, atol=0)


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_the_larger_map_is_pooled_before_it_is_squared(larger):
    big, small = oracles.sine(4, 5, 8, 8, alpha=0.23), oracles.student_map()
    pooled = big.reshape(4, 5, 4, 2, 4, 2).mean((3, 5))
    pair = (big, small) if larger == "student" else (small, big)
    expected = (pooled, small) if larger == "student" else (small, pooled)
    torch.testing.assert_close(attention_loss(*pair), attention_loss(*expected))
    assert attention_loss(*pair).item() == pytest.approx(slow_loss(*expected), abs=1e-12)


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("power", [2.0, 3.0])
def test_gradcheck(form, power):
    teacher = oracles.teacher_map()
    torch.autograd.gradcheck(lambda x: attention_loss(x, teacher, form=form, power=power), oracles.student_map().requires_grad_())
    oracles.check_teacher_is_constant(attention_loss, oracles.student_map(), teacher)


@oracles.UNHURRIED
@given(st.floats(1e-3, 1e3), st.permutations(range(4)), st.permutations(range(3)))
def test_property_blind_to_scale_sign_order_and_channels(scale, order, channels):
    student, teacher = oracles.student_map(), oracles.teacher_map()
    loss = attention_loss(student, teacher)
    torch.testing.assert_close(attention_loss(-scale * student[:, channels], teacher / scale), loss)
    torch.testing.assert_close(attention_loss(student[order], teacher[order]), loss)
    assert 0 <= loss <= 2 / 16
    for form in ("code", "paper"):
        assert attention_loss(scale * student[:, channels], student, form=form) < 1e-14


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("size", [1, 2])
def test_finite_for_zero_equal_and_large_maps(form, size):
    def loss(student, teacher):
        return attention_loss(student, teacher, form=form)

    zero, large = torch.zeros(size, 3, 4, 4), torch.full((size, 3, 4, 4), 1e4)
    half_dead = oracles.student_map()[:size].float()
    half_dead[:, 1:] = 0
    for student, teacher in ((zero, zero), (zero, large), (large, zero), (half_dead, half_dead), (zero + 1e-9, large)):
        oracles.check_finite(loss, student, teacher)
    oracles.check_half_types(loss, oracles.student_map() * 300, oracles.teacher_map())
    oracles.check_compiles(loss, oracles.student_map(), oracles.teacher_map())


@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (4, 5), (4, 5, 16)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ShapeError, match="attention_loss"):
        attention_loss(oracles.student_map(), torch.zeros(shape))
    with pytest.raises(ShapeError, match="attention_map"):
        attention_map(torch.zeros(4, 5))


@pytest.mark.parametrize("options", [{"power": 0.5}, {"power": math.inf}, {"power": math.nan}, {"form": "sum"}])
def test_bad_options_are_refused(options):
    name = next(iter(options))
    with pytest.raises(OptionError, match=name):
        attention_loss(oracles.student_map(), oracles.teacher_map(), **options)
    with pytest.raises(OptionError, match=name):
        oracles.tiny_pair("at", **options)


def test_the_term_sums_over_pairs_from_the_deep_end():
    distiller = oracles.tiny_pair("at", student=TinyNet(3, stages=4), teacher=TinyNet(4, stages=3)).eval()
    assert distiller.pairs == (("stage2", "stage1"), ("stage3", "stage2"), ("stage4", "stage3"))
    images, targets = oracles.tiny_batch()
    own, other = distiller.student_net(images).features, distiller.teacher_net(images).features
    expected = sum(attention_loss(own[a], other[b]) for a, b in distiller.pairs)
    torch.testing.assert_close(distiller(images, targets).terms["attention"], expected)


@pytest.mark.parametrize("options", [{}, {"form": "paper"}, {"power": 1.0}, {"weights": "imagenet"}])
def test_two_steps_train(options):
    distiller = oracles.tiny_pair("at", **options)
    assert [weight.final() for weight in distiller.weights.values()] == [1.0, 1000.0]
    oracles.check_two_steps(distiller)
    oracles.check_two_steps(distiller, 1)

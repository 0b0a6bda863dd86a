import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distillzoo.errors import OptionError, ShapeError
from distillzoo.functional import pkt_loss
from tests.methods import oracles


def slow_pkt(student, teacher, *, rows=False):
    """Mean over B^2 (or over B) of q^t log((q^t + 1e-7) / (q^s + 1e-7)), entry by entry."""

    def probabilities(vectors):
        unit = []
        for row in vectors.tolist():
            norm = math.sqrt(sum(x * x for x in row))
            unit.append([x / (norm + 1e-7) for x in row])
        kernel = [[(sum(x * y for x, y in zip(a, b, strict=True)) + 1) / 2 for b in unit] for a in unit]
        return [[x / sum(row) for x in row] for row in kernel]

    own, other = probabilities(student), probabilities(teacher)
    pairs = [(a, b) for r, q in zip(own, other, strict=True) for a, b in zip(r, q, strict=True)]
    return sum(b * math.log((b + 1e-7) / (a + 1e-7)) for a, b in pairs) / (len(own) if rows else len(pairs))


def test_oracle():
    # the authors' code adds 1e-7 to norms of 1.7 to 1.9: part of the printed digits
    assert pkt_loss(oracles.student_vectors(), oracles.teacher_vectors()).item() == pytest.approx(0.17590968, abs=1e-8)


@pytest.mark.parametrize("mean", ["pairs", "rows"])
def test_equals_the_equation_written_out(mean):
    student, teacher = oracles.student_vectors(), oracles.teacher_vectors()
    expected = slow_pkt(student, teacher, rows=mean == "rows")
    assert pkt_loss(student, teacher, mean=mean).item() == pytest.approx(expected, abs=1e-12)
    small = 1e-6 * student  # where the added 1e-7 is felt
    assert pkt_loss(small, teacher, mean=mean).item() == pytest.approx(slow_pkt(small, teacher, rows=mean == "rows"), abs=1e-12)


def test_the_mean_over_rows_does_not_fall_with_the_batch():
    def value(size, mean):
        student, teacher = (oracles.sine(size, 32, alpha=a).abs() for a in (0.9, 0.5))
        return pkt_loss(student, teacher, mean=mean).item()

    assert value(16, "pairs") > 2.5 * value(64, "pairs")
    assert value(64, "rows") == pytest.approx(64 * value(64, "pairs"))
    assert value(16, "rows") == pytest.approx(value(64, "rows"), rel=0.5)


@pytest.mark.parametrize("mean", ["pairs", "rows"])
def test_gradient(mean):
    teacher = oracles.teacher_vectors()
    torch.autograd.gradcheck(lambda x: pkt_loss(x, teacher, mean=mean), oracles.student_vectors().requires_grad_())
    oracles.check_teacher_is_constant(pkt_loss, oracles.student_vectors(), teacher)


@oracles.UNHURRIED
@given(st.floats(0.1, 1e3), st.permutations(range(4)), st.permutations(range(6)))
def test_property_blind_to_scale_order_and_features(scale, order, features):
    student, teacher = oracles.student_vectors(), oracles.teacher_vectors()
    loss = pkt_loss(student, teacher)
    torch.testing.assert_close(pkt_loss(scale * student[order], teacher[order]), loss, rtol=0, atol=1e-6)  # the added 1e-7
    torch.testing.assert_close(pkt_loss(student[:, features], teacher), loss)
    assert pkt_loss(student[:, features], student).abs() < 1e-14
    assert loss > 0


@pytest.mark.parametrize("size", [1, 2])
def test_finite_for_zero_equal_opposite_and_large_vectors(size):
    zero, large = torch.zeros(size, 6), torch.full((size, 6), 1e4)
    opposite = torch.arange(1.0, 7.0).repeat(size, 1) * torch.tensor([1.0, -1.0])[:size, None]
    for student in (zero, large, opposite, zero + 1e-30):
        for teacher in (zero, large, opposite):
            oracles.check_finite(pkt_loss, student, teacher)


def test_opposite_vectors_that_round_below_minus_one_stay_finite():
    vectors = torch.tensor([[-27.9260196685791, -27.690141677856445]])  # the cosine is -1 - 2.4e-7 in float32
    for scale in (1.0, *torch.linspace(0.5, 2.0, 50)):
        student = torch.cat([vectors, -scale * vectors])
        oracles.check_finite(pkt_loss, student, torch.eye(2))
        oracles.check_finite(pkt_loss, torch.eye(2), student)


def test_a_zero_vector_is_a_constant_and_the_others_keep_their_gradient():
    student = oracles.student_vectors()
    student[1] = 0
    student.requires_grad_()
    given_tensor = student.detach().clone()
    pkt_loss(student, oracles.teacher_vectors()).backward()
    assert (student.grad[1] == 0).all()
    assert (student.grad[0] != 0).any()
    assert torch.isfinite(student.grad).all()
    assert torch.equal(student.detach(), given_tensor)  # the caller's tensor is not masked in place
    assert pkt_loss(student, oracles.teacher_vectors()).item() == pytest.approx(
        slow_pkt(given_tensor, oracles.teacher_vectors()), abs=1e-12
    )


def test_half_types_autocast_and_compile():
    student, teacher = oracles.student_vectors(), oracles.teacher_vectors()
    oracles.check_half_types(pkt_loss, 300 * student, teacher)
    oracles.check_compiles(pkt_loss, student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pkt_loss(student.float(), teacher.float()).item() == pytest.approx(0.17590968, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 6), (4, 6, 1), (4,)])
def test_bad_input_is_refused(shape):
    with pytest.raises(ShapeError, match="pkt_loss"):
        pkt_loss(oracles.student_vectors(), torch.zeros(shape))
    with pytest.raises(ShapeError, match="not empty"):
        pkt_loss(torch.zeros(0, 5), torch.zeros(0, 5))
    with pytest.raises(OptionError, match="mean"):
        pkt_loss(oracles.student_vectors(), oracles.teacher_vectors(), mean="batch")
    with pytest.raises(OptionError, match="mean"):
        oracles.tiny_pair("pkt", mean="batch")


def test_the_distiller_compares_pooled_vectors():
    for options, mean, weight in (({}, "pairs", 30000.0), ({"mean": "rows", "weights": "rows"}, "rows", 468.75)):
        distiller = oracles.tiny_pair("pkt", **options).eval()
        assert [w.final() for w in distiller.weights.values()] == [1.0, weight]
        images, targets = oracles.tiny_batch()
        own, other = (net(images).features["pooled"] for net in (distiller.student_net, distiller.teacher_net))
        torch.testing.assert_close(distiller(images, targets).terms["probability"], pkt_loss(own, other, mean=mean))


@pytest.mark.parametrize(("size", "documented"), [(16, 0.17), (64, 0.047), (256, 0.012)])
def test_the_weighted_figures_of_the_documentation(size, documented):
    generator = torch.Generator().manual_seed(0)
    draws = [[torch.rand(size, 256, generator=generator) for _ in range(2)] for _ in range(4096 // size)]
    mean = sum(pkt_loss(*pair).item() for pair in draws) / len(draws)
    assert 30000 * mean == pytest.approx(documented, rel=0.07)

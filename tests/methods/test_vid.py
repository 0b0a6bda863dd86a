import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distillzoo.adapters.connectors import PointwiseRegressor
from distillzoo.errors import OptionError, ShapeError
from distillzoo.functional import vid_loss
from tests.methods import oracles
from tests.methods.oracles import TinyNet

FIVES = torch.full((5,), 5.0, dtype=torch.float64)
VARIANCES = torch.tensor([0.3, 1.0, 2.0, 5.0, 9.0], dtype=torch.float64)


def slow_vid(mean, target, variance):
    values = []
    for mu, t in zip(mean, target, strict=True):
        for channel in range(len(variance)):
            v = variance[channel].item()
            for a, b in zip(mu[channel].flatten().tolist(), t[channel].flatten().tolist(), strict=True):
                values.append(0.5 * ((a - b) ** 2 / v + math.log(v)))
    return sum(values) / len(values)


def test_oracle_and_the_equation_written_out():
    student, teacher = oracles.wide_student_map(), oracles.teacher_map()
    assert vid_loss(student, teacher, FIVES).item() == pytest.approx(0.90293011, abs=1e-8)
    assert vid_loss(student, teacher, VARIANCES).item() == pytest.approx(slow_vid(student, teacher, VARIANCES), abs=1e-12)


def test_is_the_likelihood_of_a_gaussian():
    student, teacher = oracles.wide_student_map(), oracles.teacher_map()
    gaussian = torch.distributions.Normal(student, VARIANCES.sqrt().view(1, 5, 1, 1))
    expected = -gaussian.log_prob(teacher).mean() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(vid_loss(student, teacher, VARIANCES), expected, rtol=0, atol=1e-12)


def test_gradcheck_by_mean_and_variance():
    teacher = oracles.teacher_map()
    inputs = (oracles.wide_student_map().requires_grad_(), VARIANCES.clone().requires_grad_())
    torch.autograd.gradcheck(lambda mean, variance: vid_loss(mean, teacher, variance), inputs)
    oracles.check_teacher_is_constant(lambda s, t: vid_loss(s, t, VARIANCES), oracles.wide_student_map(), teacher)


@oracles.UNHURRIED
@given(st.floats(0.1, 10.0), st.permutations(range(4)), st.permutations(range(5)))
def test_property_scale_order_and_best_variance(scale, order, channels):
    student, teacher = oracles.wide_student_map(), oracles.teacher_map()
    loss = vid_loss(student, teacher, VARIANCES)
    scaled = vid_loss(scale * student, scale * teacher, scale**2 * VARIANCES)
    torch.testing.assert_close(scaled, loss + math.log(scale))
    shuffled = vid_loss(student[order][:, channels], teacher[order][:, channels], VARIANCES[list(channels)])
    torch.testing.assert_close(shuffled, loss)
    best = (student - teacher).square().mean((0, 2, 3))
    assert vid_loss(student, teacher, best) <= vid_loss(student, teacher, scale * best)


@pytest.mark.parametrize("size", [1, 2])
def test_finite_for_zero_equal_and_large_maps(size):
    zero, large, smallest = torch.zeros(size, 5, 2, 2), torch.full((size, 5, 2, 2), 1e4), torch.full((5,), 1e-5)
    for student, teacher in ((zero, zero), (zero, large), (large, large)):
        oracles.check_finite(vid_loss, student, teacher, smallest)
    oracles.check_half_types(vid_loss, oracles.wide_student_map() * 300, oracles.teacher_map(), VARIANCES)
    oracles.check_compiles(vid_loss, oracles.wide_student_map(), oracles.teacher_map(), VARIANCES)


@pytest.mark.parametrize(
    ("mean", "variance"), [((4, 5, 4, 3), (5,)), ((4, 5), (5,)), ((4, 5, 4, 4), (4,)), ((4, 5, 4, 4), (5, 1)), ((4, 5, 4, 4), ())]
)
def test_other_shapes_are_refused(mean, variance):
    with pytest.raises(ShapeError, match="vid_loss"):
        vid_loss(torch.zeros(mean), oracles.teacher_map(), torch.ones(variance))


def test_the_regressor_reaches_negative_targets_and_has_the_published_size():
    regressor = PointwiseRegressor(64, 64)
    assert (regressor(torch.randn(2, 64, 4, 4)) < 0).any()
    counts = [sum(p.numel() for p in PointwiseRegressor(c, c).parameters()) + c for c in (64, 128, 256)]
    assert sum(counts) == 258_496  # resnet32x4 -> resnet8x4, one variance a channel among them


# ---------------------------------------------------------------------------------------------------- the distiller


def test_the_variance_starts_at_five_from_the_published_parameter():
    distiller = oracles.tiny_pair("vid").double()
    assert distiller.rho[0][0].item() == pytest.approx(4.99323, abs=1e-5)
    assert distiller.variance(0)[0].item() == pytest.approx(5.0, abs=1e-6)
    for value in (1e-3, 200.0):
        assert oracles.tiny_pair("vid", initial_variance=value).variance(1)[0].item() == pytest.approx(value, rel=1e-4)


def test_variances_are_trained_saved_moved_and_one_a_channel():
    distiller = oracles.tiny_pair("vid")
    assert [len(rho) for rho in distiller.rho] == [8, 16, 32]
    names = [name for name, _ in distiller.named_parameters() if name.startswith("rho.")]
    assert names == ["rho.0", "rho.1", "rho.2"]
    assert set(names) <= distiller.state_dict().keys()
    before = copy.deepcopy(distiller.state_dict())
    oracles.check_two_steps(distiller)
    assert all(not torch.equal(before[name], distiller.state_dict()[name]) for name in names)
    assert distiller.double().rho[0].dtype == torch.float64


@pytest.mark.parametrize(("decay", "kind"), [(False, "exempt"), (True, "norm_bias")])
def test_weight_decay_reaches_variances_only_if_asked(decay, kind):
    groups = oracles.tiny_pair("vid", decay_variance=decay).param_groups()
    owners = {name: group.kind for group in groups for name in group.names}
    assert {owners[f"rho.{i}"] for i in range(3)} == {kind}
    composed = {n: g.kind for g in oracles.tiny_pair("vid+kd", vid={"decay_variance": decay}).param_groups() for n in g.names}
    assert composed["members.vid.rho.0"] == kind
    assert oracles.tiny_pair("vid").exempt_from_decay == ("rho.*",)  # the option of one is not the default of all


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_the_larger_map_is_pooled_and_stages_pair_from_the_deep_end(larger):
    nets = {"student": TinyNet(3, stages=3), "teacher": TinyNet(4, stages=3)}
    nets[larger].blocks[0][0].stride = (1, 1)
    nets["teacher" if larger == "student" else "student"].blocks[0][0].stride = (2, 2)
    distiller = oracles.tiny_pair("vid", **nets).eval()
    images, targets = oracles.tiny_batch()
    own, other = distiller.student_net(images).features, distiller.teacher_net(images).features
    expected = 0.0
    for number, (a, b) in enumerate(distiller.pairs):
        source, target = own[a], other[b]
        big = source if larger == "student" else target
        pooled = big.reshape(*big.shape[:2], big.shape[2] // 2, 2, -1, 2).mean((3, 5))
        source, target = (pooled, target) if larger == "student" else (source, pooled)
        expected = expected + vid_loss(distiller.regressors[number](source), target, distiller.variance(number))
    torch.testing.assert_close(distiller(images, targets).terms["vid"], expected)
    fewer = oracles.tiny_pair("vid", student=TinyNet(2, stages=2), teacher=TinyNet(2, stages=4))
    assert fewer.pairs == (("stage1", "stage3"), ("stage2", "stage4"))


def test_two_steps_train_down_to_one_sample():
    distiller = oracles.tiny_pair("vid")
    assert [weight.final() for weight in distiller.weights.values()] == [1.0, 1.0]
    oracles.check_two_steps(distiller)
    oracles.check_two_steps(distiller, 1)


@pytest.mark.parametrize("value", [0.0, 1e-5, -1.0, math.inf, math.nan])
def test_bad_variances_are_refused(value):
    with pytest.raises(OptionError, match="initial_variance"):
        oracles.tiny_pair("vid", initial_variance=value)

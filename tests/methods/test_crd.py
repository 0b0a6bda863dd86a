import copy
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from distillzoo import DataSpec, build_distiller
from distillzoo.errors import OptionError, ShapeError
from distillzoo.functional import nce_loss
from tests.methods import oracles
from tests.methods.oracles import TinyNet

LOG_SCORES = oracles.sine(2, 5, alpha=0.7, delta=0.2)
DATA = DataSpec(5, (16, 16), num_samples=40, targets=torch.arange(40) % 5)


def slow_nce(scores, num_samples, epsilon=1e-7):
    """The equation as the authors write it: of scores, not of their logarithms."""
    batch, count = len(scores), len(scores[0]) - 1
    noise = count / num_samples
    total = 0.0
    for row in scores:
        total += math.log(row[0] / (row[0] + noise + epsilon))
        for score in row[1:]:
            total += math.log(noise / (score + noise + epsilon))
    return -total / batch


def crd(data=DATA, student=None, teacher=None, **options):
    options = {"negatives": 12, "dim": 8, "seed": 1, **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_distiller("crd", student or TinyNet(4), teacher or TinyNet(8), data=data, **options)


def step(distiller, index):
    images, _ = oracles.tiny_batch(len(index))
    index = torch.as_tensor(index)
    out = distiller(images, DATA.targets[index], index=index)
    distiller.zero_grad()
    out.loss.backward()
    with torch.no_grad():
        for parameter in distiller.parameters():
            parameter -= 0.05 * parameter.grad
    distiller.after_step()
    return out


def test_oracle_and_the_equation_written_out():
    assert nce_loss(LOG_SCORES, 100).item() == pytest.approx(13.38285936, abs=1e-8)
    for epsilon, num_samples in ((1e-7, 100), (0.0, 7), (0.3, 5000)):
        expected = slow_nce(LOG_SCORES.exp().tolist(), num_samples, epsilon)
        assert nce_loss(LOG_SCORES, num_samples, epsilon=epsilon).item() == pytest.approx(expected, abs=1e-12)
    far = LOG_SCORES + 18.0  # scores far above the noise, where a softplus of less care is linear
    assert nce_loss(far, 100).item() == pytest.approx(slow_nce(far.exp().tolist(), 100), abs=1e-12)


def test_scores_of_one_over_n_have_the_published_value():
    log_scores = torch.full((3, 1 + 16384), -math.log(50000), dtype=torch.float64)
    expected = math.log(16385) + 16384 * math.log1p(1 / 16384)
    assert nce_loss(log_scores, 50000, epsilon=0.0).item() == pytest.approx(expected, abs=1e-9)
    assert expected == pytest.approx(10.70, abs=0.005)
    # the epsilon is kept: dropping it would miss the authors' value by 5e-3
    assert nce_loss(log_scores, 50000).item() == pytest.approx(slow_nce([[1 / 50000] * 16385], 50000), abs=1e-9)


def test_gradient_is_that_of_the_authors_form():
    log_scores = (3 * LOG_SCORES).requires_grad_()
    (ours,) = torch.autograd.grad(nce_loss(log_scores, 100), log_scores)
    x, noise = log_scores.exp(), 4 / 100
    literal = -((x[:, 0] / (x[:, 0] + noise + 1e-7)).log().sum() + (noise / (x[:, 1:] + noise + 1e-7)).log().sum()) / 2
    torch.testing.assert_close(ours, torch.autograd.grad(literal, log_scores)[0], rtol=0, atol=1e-12)
    torch.autograd.gradcheck(lambda s: nce_loss(s, 100), (log_scores,))


def test_the_normalizer_divides_the_scores_and_has_no_gradient():
    log_scores = LOG_SCORES.clone().requires_grad_()
    log_z = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    loss = nce_loss(log_scores, 100, log_normalizer=log_z)
    torch.testing.assert_close(loss, nce_loss(LOG_SCORES - 1.7, 100), rtol=0, atol=1e-12)
    loss.backward()
    assert log_z.grad is None
    torch.testing.assert_close(nce_loss(LOG_SCORES, 100, log_normalizer=torch.tensor(0.0)), nce_loss(LOG_SCORES, 100))


@oracles.UNHURRIED
@given(
    st.lists(st.lists(st.floats(-12, 12), min_size=4, max_size=4), min_size=1, max_size=4),
    st.integers(1, 10**6),
    st.permutations(range(1, 4)),
)
def test_property_value_order_and_direction(rows, num_samples, order):
    log_scores = torch.tensor(rows, dtype=torch.float64)
    loss = nce_loss(log_scores, num_samples)
    assert loss.item() == pytest.approx(slow_nce(log_scores.exp().tolist(), num_samples), rel=1e-10, abs=1e-10)
    assert loss >= 0
    shuffled = nce_loss(log_scores[:, [0, *order]].flip(0), num_samples)
    torch.testing.assert_close(shuffled, loss)
    better = log_scores + torch.tensor([1.0, -1.0, -1.0, -1.0])
    assert nce_loss(better, num_samples) < loss


@pytest.mark.parametrize("level", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_extreme_scores_are_finite(level):
    for dtype in (torch.float32, torch.float64):
        oracles.check_finite(lambda s: nce_loss(s, 100), (LOG_SCORES + level).to(dtype))
        oracles.check_finite(lambda s: nce_loss(s, 100), (level * LOG_SCORES).to(dtype))


def test_half_types_and_compilation():
    oracles.check_half_types(lambda s: nce_loss(s, 100), LOG_SCORES)
    oracles.check_compiles(lambda s: nce_loss(s, 100, log_normalizer=s.detach().logsumexp((0, 1))), LOG_SCORES)


@pytest.mark.parametrize("shape", [(5,), (2, 1), (0, 3), (2, 3, 4)])
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ShapeError, match=r"\(B, 1 \+ K\)"):
        nce_loss(torch.zeros(shape), 100)


@pytest.mark.parametrize(("num_samples", "epsilon"), [(0, 1e-7), (100, -1.0), (100, math.nan), (100, math.inf)])
def test_bad_numbers_are_refused(num_samples, epsilon):
    with pytest.raises(OptionError, match="num_samples of at least 1"):
        nce_loss(LOG_SCORES, num_samples, epsilon=epsilon)


# ---------------------------------------------------------------------- the distiller


@pytest.mark.parametrize("normalizer", ["first_batch", "none"])
@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_the_term_is_the_authors_equation(mode, normalizer):
    distiller = crd(mode=mode, normalizer=normalizer).double()
    images, _ = oracles.tiny_batch(4)
    index = torch.tensor([3, 17, 8, 30])
    targets = DATA.targets[index]
    trace = distiller.student_net(images.double())
    own = F.normalize(distiller.student_embed(trace.features["pooled"]), dim=1)
    teacher = distiller.teacher_net(images.double())
    other = F.normalize(distiller.teacher_embed(teacher.features["pooled"]), dim=1)
    positive = index
    if mode == "relax":
        positive = distiller.sampler.draw_same_class(distiller.stream("positives"), 0, labels=targets, index=index)
    negatives = distiller.sampler.draw(distiller.stream("negatives"), 0, labels=targets, index=index)
    drawn = torch.cat([positive.unsqueeze(1), negatives], dim=1)
    expected = 0.0
    for anchors, bank in ((own, distiller.teacher_bank), (other, distiller.student_bank)):
        scores = torch.stack([(bank.memory[row] @ anchor / 0.07).exp() for row, anchor in zip(drawn, anchors, strict=True)])
        z = scores.mean() * 40 if normalizer == "first_batch" else 1.0
        expected += slow_nce((scores / z).tolist(), 40)
    before = copy.deepcopy(distiller.state_dict())
    out = distiller.eval()(images.double(), targets, index=index)
    changed = [name for name, value in distiller.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == []
    # networks in eval mode give other features than the traces above, which ran in training mode: so compare in training mode
    distiller.load_state_dict(before)
    out = distiller.train()(images.double(), targets, index=index)
    assert out.terms["contrast"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.07, 0.02])
def test_the_normalizer_is_n_times_the_mean_score(temperature):
    distiller = crd(temperature=temperature).double()
    near, far = (oracles.sine(3, width, alpha=0.7, scale=0.9) / temperature for width in (1, 8))
    expected = torch.cat([near, far], 1).exp().mean().log() + math.log(40)
    torch.testing.assert_close(distiller.eval()._log_normalizer(0, near, far), expected, rtol=0, atol=1e-12)


def test_the_normalizer_is_the_first_training_batch_and_stays():
    distiller = crd()
    distiller.eval()
    step(distiller, [0, 1, 2])
    assert not distiller.normalized.any()
    distiller.train()
    step(distiller, [0, 1, 2])
    assert distiller.normalized.all()
    first = distiller.log_normalizers.clone()
    assert (first != 0).all()
    step(distiller, [3, 4, 5])
    assert torch.equal(distiller.log_normalizers, first)
    assert not crd(normalizer="none").normalized.any()


def test_an_evaluation_waits_for_no_other_process(monkeypatch):
    distiller = crd().eval()
    monkeypatch.setattr("distillzoo.methods.crd.gather_ranks", pytest.fail)
    assert step(distiller, [0, 1, 2]).loss.isfinite()


@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_banks_move_after_the_step_by_the_last_embeddings(mode):
    distiller = crd(momentum=0.25, mode=mode)
    images, _ = oracles.tiny_batch(3)
    index = torch.tensor([5, 9, 5])
    before = copy.deepcopy(distiller.state_dict())
    if mode == "relax":  # a positive is another sample here, and still the sample's own row moves
        drawn = distiller.sampler.draw_same_class(distiller._positives, 0, labels=DATA.targets[index], index=index)
        assert not set(drawn.tolist()) & {5, 9}
    distiller(images, DATA.targets[index], index=index)
    assert torch.equal(distiller.student_bank.memory, before["student_bank.memory"])  # not before the optimiser's step
    _, own, other = distiller._latest
    distiller.after_step()
    for bank, name, embeddings in (
        (distiller.student_bank, "student_bank.memory", own),
        (distiller.teacher_bank, "teacher_bank.memory", other),
    ):
        for row, embedding in ((9, embeddings[1]), (5, embeddings[2])):
            moved = 0.25 * before[name][row] + 0.75 * embedding
            torch.testing.assert_close(bank.memory[row], moved / moved.norm())
        rest = [row for row in range(40) if row not in (5, 9)]
        assert torch.equal(bank.memory[rest], before[name][rest])
    after = distiller.student_bank.memory.clone()
    distiller.after_step()  # nothing new came by
    assert torch.equal(distiller.student_bank.memory, after)
    distiller.eval()
    distiller(images, DATA.targets[index], index=index)
    distiller.after_step()
    assert torch.equal(distiller.student_bank.memory, after)


def test_the_teachers_embedding_trains_and_the_banks_do_not():
    distiller = crd()
    step(distiller, [0, 1, 2, 3])
    assert distiller.teacher_embed.weight.grad.abs().sum() > 0
    assert distiller.student_embed.weight.grad.abs().sum() > 0
    assert not any("bank" in name for name, _ in distiller.named_parameters())
    assert all(parameter.grad is None for parameter in distiller.teacher_net.module.parameters())


def test_resuming_equals_an_unbroken_run():
    batches = [[0, 1, 2, 3], [4, 5, 0, 7], [1, 1, 2, 9], [30, 4, 0, 11]]
    unbroken = crd()
    for index in batches[:2]:
        step(unbroken, index)
    resumed = crd(seed=1)
    resumed.load_state_dict(copy.deepcopy(unbroken.state_dict()), strict=True)
    for index in batches[2:]:
        one, other = step(unbroken, index), step(resumed, index)
        assert torch.equal(one.loss, other.loss)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    kept = set(unbroken.state_dict())
    assert {"student_bank.memory", "teacher_bank.memory", "log_normalizers", "normalized"} <= kept
    assert not any(name.startswith("sampler") for name in kept)  # the labels give it


def test_negatives_change_with_the_step_and_follow_the_seed():
    def losses(seed):
        distiller = crd(seed=seed).double()
        images, _ = oracles.tiny_batch(3)
        index = torch.tensor([1, 2, 3])
        distiller.eval()
        values = []
        for number in range(3):
            distiller.step.fill_(number)
            values.append(distiller(images.double(), DATA.targets[index], index=index).terms["contrast"].item())
        return values

    assert losses(1) == losses(1)
    assert len(set(losses(1))) == 3


def test_fewer_negatives_than_asked_for_are_taken_and_said():
    with pytest.warns(UserWarning, match="asked for 16384 negatives .* 32"):
        distiller = crd(negatives=16384)
    assert (distiller.sampler.count, distiller.sampler.requested) == (32, 16384)
    out = step(distiller, [0, 1, 2])
    assert torch.isfinite(out.loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crd(negatives=32)


def test_published_figures():
    distiller = crd(student=TinyNet(64, stages=3), teacher=TinyNet(64, stages=3), dim=128)
    assert sum(p.numel() for n, p in distiller.named_parameters() if "embed" in n) == 65792
    weights = {name: weight.final() for name, weight in distiller.weights.items()}
    assert weights == {"ce": 1.0, "contrast": 0.8}
    joined = build_distiller("crd+kd", TinyNet(4), TinyNet(8), data=DATA, crd={"negatives": 8})
    weights = {name: weight.final() for name, weight in joined.weights.items()}
    assert weights == {"ce": 1.0, "crd.contrast": 0.8, "kd.kd": 1.0}
    defaults = {"negatives": 16384, "temperature": 0.07, "momentum": 0.5, "dim": 128}
    from distillzoo.methods.crd import CRD
    from distillzoo.options import option_defaults

    assert defaults.items() <= option_defaults(CRD).items()


@pytest.mark.parametrize("size", [1, 2])
def test_small_batches_zero_features_and_equal_embeddings_are_finite(size):
    class Mute(TinyNet):
        def forward(self, images):
            return self.fc(0.0 * self.blocks(images).mean((2, 3)))

    for distiller in (crd(student=Mute(4)), crd(student=Mute(4), teacher=Mute(8))):
        distiller.student_embed.bias.data.zero_()
        for index in ([7] * size, list(range(size))):
            out = step(distiller, index)
            assert torch.isfinite(out.loss)
            assert all(torch.isfinite(p.grad).all() for p in distiller.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"negatives": 0}, "number of negatives .* got 0"),
        ({"temperature": 0.0}, "temperature .* got 0.0"),
        ({"temperature": math.nan}, "temperature .* got nan"),
        ({"momentum": 1.5}, "momentum .* got 1.5"),
        ({"dim": 0}, "dim .* got 0"),
        ({"mode": "loose"}, "mode is one of exact, relax; got 'loose'"),
        ({"normalizer": "last"}, "normalizer is one of first_batch, none; got 'last'"),
        ({"weights": {"crd": 1.0}}, "crd"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        crd(**options)


def test_the_labels_of_the_training_set_are_needed():
    with pytest.raises(OptionError, match="got no labels"):
        crd(data=DataSpec(5, (16, 16), num_samples=40))
    images, targets = oracles.tiny_batch(3)
    with pytest.raises(OptionError, match="index"):
        crd()(images, targets)
    with pytest.raises(OptionError, match="class numbers"):
        crd()(images, F.one_hot(targets, 5).float(), index=torch.arange(3))


@pytest.mark.parametrize("index", [[0, 1, 40], [-1, 2, 3]])
def test_an_index_outside_the_training_set_is_refused(index):
    images, targets = oracles.tiny_batch(3)
    with pytest.raises(OptionError, match="positions in the training set, 0 to 39"):
        crd()(images, targets, index=torch.tensor(index))


def test_the_bank_is_as_long_as_the_labels_where_no_number_is_given():
    assert len(crd(data=DataSpec(5, (16, 16), targets=torch.arange(30) % 5)).student_bank.memory) == 30

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch import distributed, nn

from distillzoo.errors import OptionError, ShapeError, UnsupportedPairError
from distillzoo.functional import ofd_loss, ofd_margin
from distillzoo.taps import Tapped
from distillzoo.testing.subject import TinyLoader
from distillzoo.types import Batch, DataSpec, Stage
from tests.methods import oracles
from tests.methods.oracles import TinyNet, tiny_pair

SHIFT = torch.tensor([0.0, 0.3, -1.0, 1.5, 2.0], dtype=torch.float64)
SCALE = torch.tensor([1.0, 0.5, 0.7, 0.5, 0.5], dtype=torch.float64)
MARGINS = ofd_margin(SHIFT, SCALE)


def slow_margin(shift, scale):
    """The authors' loop over channels."""
    margins = []
    for beta, gamma in zip(shift.tolist(), scale.abs().tolist(), strict=True):
        below = norm.cdf(-beta / gamma)
        if below > 0.001:
            margins.append(-gamma * math.exp(-((beta / gamma) ** 2) / 2) / math.sqrt(2 * math.pi) / below + beta)
        else:
            margins.append(-3 * gamma)
    return torch.tensor(margins, dtype=torch.float64)


def slow_ofd(student, teacher, margin):
    """mdistiller's three cases, element by element."""
    total = 0.0
    for sample_s, sample_t in zip(student, teacher, strict=True):
        for channel, m in enumerate(margin.tolist()):
            for s, t in zip(sample_s[channel].flatten().tolist(), sample_t[channel].flatten().tolist(), strict=True):
                if t > 0 or (m < t <= 0 and s > t):
                    total += (s - t) ** 2
                elif t <= m and s > m:
                    total += (s - m) ** 2
    return total / len(student)


def normed(width, **options):
    """A TinyNet whose stages declare the norm before their activation."""
    net = TinyNet(width, **options)
    net.stages = tuple(Stage(stage.path, stage.pre, norm=f"blocks.{i}.1") for i, stage in enumerate(net.stages))
    return net


def test_margins_have_the_published_values():
    published = [-0.79788456, -0.30751288, -1.10900428, -0.14154933, -1.5]
    torch.testing.assert_close(MARGINS, torch.tensor(published, dtype=torch.float64), rtol=0, atol=1e-8)


def test_margins_equal_the_authors_loop():
    shift, scale = 3 * oracles.sine(200, alpha=0.7), 0.05 + oracles.sine(200, alpha=1.3, delta=0.2).abs()
    scale[::2] *= -1  # the sign of a norm's weight does not matter
    torch.testing.assert_close(ofd_margin(shift, scale), slow_margin(shift, scale), rtol=1e-12, atol=1e-12)
    assert (ofd_margin(shift, scale) < 0).all()
    at_switch = ofd_margin(torch.tensor([3.09, 3.1]), torch.tensor([1.0, 1.0]))  # on either side of Phi = 0.001
    torch.testing.assert_close(at_switch, torch.tensor([-0.277, -3.0]), rtol=0, atol=1e-3)


def test_margins_are_the_mean_of_the_negative_part():
    draws = SHIFT[:3].view(-1, 1) + SCALE[:3].view(-1, 1) * torch.randn(3, 200_000, generator=torch.Generator().manual_seed(0))
    means = torch.stack([row[row < 0].mean() for row in draws])
    torch.testing.assert_close(MARGINS[:3], means, rtol=0, atol=0.01)


def test_margins_of_a_pruned_channel_are_finite():
    shift, scale = torch.tensor([0.0, 2.0, -2.0, -1.0, 1e30]), torch.tensor([0.0, 0.0, 0.0, 1e-40, 1.0])
    torch.testing.assert_close(ofd_margin(shift, scale), torch.tensor([0.0, 0.0, -2.0, -1.0, -3.0]))
    assert ofd_margin(shift.half(), scale.half()).dtype == torch.float16


def test_oracle_and_the_equation_written_out():
    student, teacher = oracles.wide_student_map(), oracles.teacher_map()
    assert ofd_loss(student, teacher, MARGINS).item() == pytest.approx(63.59825714, abs=1e-8)
    assert ofd_loss(student, teacher, MARGINS).item() == pytest.approx(slow_ofd(student, teacher, MARGINS), rel=1e-12)
    assert ofd_loss(2 * student, teacher, 0.3 * MARGINS).item() == pytest.approx(
        slow_ofd(2 * student, teacher, 0.3 * MARGINS), rel=1e-12
    )


def test_gradient_is_that_of_the_masked_square():
    student, teacher = oracles.wide_student_map().requires_grad_(), oracles.teacher_map()
    goal = torch.maximum(teacher, MARGINS.view(-1, 1, 1))
    literal = ((student - goal) ** 2 * ((student > goal) | (teacher > 0))).sum() / 4
    (ours,) = torch.autograd.grad(ofd_loss(student, teacher, MARGINS), student)
    torch.testing.assert_close(ours, torch.autograd.grad(literal, student)[0], rtol=0, atol=1e-12)
    torch.autograd.gradcheck(lambda s: ofd_loss(s, teacher, MARGINS), (student,))
    oracles.check_teacher_is_constant(lambda s, t: ofd_loss(s, t, MARGINS), student.detach(), teacher)


@oracles.UNHURRIED
@given(st.floats(0.05, 20.0), st.floats(-3.0, 3.0), st.permutations(range(4)), st.permutations(range(5)))
def test_property_scale_order_and_what_is_left_alone(scale, offset, order, channels):
    student, teacher = oracles.wide_student_map() + offset, oracles.teacher_map()
    loss = ofd_loss(student, teacher, MARGINS)
    torch.testing.assert_close(ofd_loss(scale * student, scale * teacher, scale * MARGINS), scale**2 * loss)
    shuffled = ofd_loss(student[order][:, channels], teacher[order][:, channels], MARGINS[list(channels)])
    torch.testing.assert_close(shuffled, loss)
    assert loss.item() == pytest.approx(slow_ofd(student, teacher, MARGINS), rel=1e-10)
    negative = -teacher.abs() - 0.01
    assert ofd_loss(torch.maximum(negative, MARGINS.view(-1, 1, 1)) - abs(offset), negative, MARGINS) == 0
    assert ofd_loss(teacher.clamp_min(0), teacher.clamp_min(0), MARGINS) == 0


def test_numerics():
    student, teacher = oracles.wide_student_map(), oracles.teacher_map()
    zeros = torch.zeros_like(student)
    for one, other in ((zeros, zeros), (teacher, teacher), (1e4 * student, teacher), (zeros, 1e4 * teacher)):
        for size in (1, 2):
            oracles.check_finite(lambda s, t: ofd_loss(s, t, MARGINS), one[:size], other[:size])
    big = torch.full((1, 5, 64, 64), 10.0)
    oracles.check_half_types(ofd_loss, big.double(), -big.double(), MARGINS)  # the sum leaves half precision's range
    oracles.check_half_types(ofd_loss, student, teacher, MARGINS)
    oracles.check_compiles(ofd_loss, student, teacher, MARGINS)


@pytest.mark.parametrize(
    ("student", "teacher", "margin", "said"),
    [
        ((2, 3, 4, 4), (2, 3, 4, 5), (3,), "one shape"),
        ((2, 3), (2, 3), (3,), r"\(B, C, H, W\)"),
        ((0, 3, 4, 4), (0, 3, 4, 4), (3,), "one shape"),
        ((2, 3, 4, 4), (2, 3, 4, 4), (4,), r"3 channels; got \(4,\)"),
        ((2, 3, 4, 4), (2, 3, 4, 4), (3, 1, 1), "3 channels"),
    ],
)
def test_bad_shapes_are_refused(student, teacher, margin, said):
    with pytest.raises(ShapeError, match=said):
        ofd_loss(torch.zeros(student), torch.zeros(teacher), torch.zeros(margin))


def test_bad_margin_shapes_are_refused():
    with pytest.raises(ShapeError, match=r"\(C,\)"):
        ofd_margin(torch.zeros(3), torch.zeros(4))


# ---------------------------------------------------------------------- the distiller


def test_the_term_is_the_weighted_sum_over_stages():
    teacher = normed(8)
    for i in range(3):
        nn.init.normal_(teacher.blocks[i][1].bias)
        nn.init.normal_(teacher.blocks[i][1].weight)
    distiller = tiny_pair("ofd", student=normed(4), teacher=teacher).double()
    images, targets = oracles.tiny_batch(3)
    before = copy.deepcopy(distiller.student_net.module)
    term = distiller(images.double(), targets).terms["feature"]
    trace = Tapped(before, distiller.data)
    trace.request("stages.pre")
    own, other = trace(images.double()).features, distiller.teacher_net(images.double()).features
    expected = 0.0
    for number, share in enumerate((0.25, 0.5, 1.0)):
        name = f"stage{number + 1}.pre"
        norm_layer = teacher.blocks[number][1]
        margin = slow_margin(norm_layer.bias.double(), norm_layer.weight.double())
        torch.testing.assert_close(distiller.margin(number), margin, rtol=1e-6, atol=1e-6)
        connected = distiller.connectors[number](own[name])
        expected += share * slow_ofd(connected, other[name], distiller.margin(number))
    assert term.item() == pytest.approx(expected, rel=1e-12)


def test_two_steps_on_pairs_of_other_depth_and_size():
    oracles.check_two_steps(tiny_pair("ofd"))
    for student, teacher in ((2, 3), (3, 2)):
        distiller = tiny_pair("ofd", student=normed(4, stages=student), teacher=normed(8, stages=teacher))
        assert len(distiller.pairs) == 2
        assert distiller.pairs[-1] == (f"stage{student}.pre", f"stage{teacher}.pre")
        oracles.check_two_steps(distiller)
    oracles.check_two_steps(tiny_pair("ofd", student=TinyNet(4, linear_end=True)), size=2)


def test_the_larger_map_is_pooled_whichever_it_is():
    for student, teacher in ((2, 3), (3, 2)):
        distiller = tiny_pair("ofd", student=normed(4, stages=student), teacher=normed(8, stages=teacher)).double()
        images, _ = oracles.tiny_batch(2)
        own = distiller.student_net(images.double())
        other = distiller.teacher_net(images.double())
        expected = 0.0
        for number, (one, two) in enumerate(distiller.pairs):
            s, t = own.features[one], other.features[two]
            size = min(s.shape[2], t.shape[2])
            s, t = (nn.functional.adaptive_avg_pool2d(x, size) for x in (s, t))
            expected += (0.5, 1.0)[number] * slow_ofd(distiller.connectors[number](s), t, distiller.margin(number))
        term = distiller.distill_terms(own, other, None)["feature"]
        assert term.item() == pytest.approx(expected, rel=1e-12)


def literal_mean_negative(features):
    rows = features.transpose(0, 1).flatten(1)
    return torch.stack([row[row < 0].mean() if (row < 0).any() else row.new_zeros(()) for row in rows])


def test_a_stage_without_norm_takes_the_first_training_batch():
    distiller = tiny_pair("ofd")  # stages that declare no norm
    assert distiller.empirical == (0, 1, 2)
    images, targets = oracles.tiny_batch(4)
    assert not distiller.measured.any()
    distiller.eval()
    distiller(images, targets)
    assert not distiller.measured.any()
    distiller.train()
    features = distiller.teacher_net(images).features
    distiller(images, targets)
    assert distiller.measured.all()
    for number in range(3):
        expected = literal_mean_negative(features[f"stage{number + 1}.pre"])
        assert (expected < 0).any()
        torch.testing.assert_close(distiller.margin(number), expected)
    kept = copy.deepcopy(distiller.state_dict())
    distiller(images.flip(0) * 3, targets)
    for name in ("margin0", "margin1", "margin2"):
        assert torch.equal(distiller.state_dict()[name], kept[name])
    larger = tiny_pair("ofd", teacher=TinyNet(8, stages=2))  # its maps are pooled, which the margin is measured before
    features = larger.teacher_net(images).features
    larger(images, targets)
    for number in range(2):
        torch.testing.assert_close(larger.margin(number), literal_mean_negative(features[f"stage{number + 1}.pre"]))
    resumed = tiny_pair("ofd")
    resumed.load_state_dict(kept)
    resumed(images.flip(0) * 3, targets)
    assert torch.equal(resumed.state_dict()["margin1"], kept["margin1"])


def test_prepare_measures_margins_over_batches_where_no_norm_gives_them():
    distiller = tiny_pair("ofd")
    loader = TinyLoader(DataSpec(5, (16, 16)))
    distiller.prepare(loader)
    assert distiller.measured.all()
    batches = list(loader.epoch(0, phase="prepare"))
    features = [distiller.teacher_net(batch.images).features for batch in batches]
    for number in range(3):
        whole = torch.cat([found[f"stage{number + 1}.pre"] for found in features])
        torch.testing.assert_close(distiller.margin(number), literal_mean_negative(whole))
    untouched = tiny_pair("ofd", teacher=normed(8))
    before = copy.deepcopy(untouched.state_dict())
    untouched.prepare(loader)
    assert all(torch.equal(value, before[name]) for name, value in untouched.state_dict().items())


@pytest.mark.parametrize("prepared", [False, True], ids=["first batch", "prepared"])
def test_processes_of_a_distributed_run_measure_the_margins_that_one_would_of_all(monkeypatch, prepared):
    def measured(part):
        distiller = tiny_pair("ofd")
        images, targets = oracles.tiny_batch(6)
        if prepared:
            distiller.prepare(SimpleNamespace(epoch=lambda *args, **named: [Batch(images[part], targets[part])]))
        else:
            distiller(images[part], targets[part])
        return [distiller.margin(number) for number in range(3)]

    def all_gather(parts, tensor):
        parts[0].copy_(tensor)
        parts[1].copy_(theirs.pop(0) if theirs else tensor)
        sent.append(tensor)

    expected, sent, theirs = measured(slice(None)), [], []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather", all_gather)
    measured(slice(3, None))
    theirs = list(sent)
    torch.testing.assert_close(measured(slice(3)), expected)


def test_a_norm_of_another_width_or_kind_gives_no_margin():
    teacher = normed(8)
    teacher.stages = (*teacher.stages[:2], Stage("blocks.2", "blocks.2.2:input", norm="blocks.1.1"))
    assert tiny_pair("ofd", teacher=teacher).empirical == (2,)
    plain = normed(8)
    plain.blocks[1][1] = nn.BatchNorm2d(16, affine=False)
    plain.blocks[0][1] = nn.GroupNorm(1, 8)
    distiller = tiny_pair("ofd", teacher=plain)
    assert distiller.empirical == (0,)
    torch.testing.assert_close(distiller.margin(1), torch.full((16,), -0.79788456))


def test_batch_statistics_of_the_teacher_leave_it_untouched():
    teacher = normed(8)
    with torch.no_grad():
        for module in teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.fill_(0.5)
    distiller = tiny_pair("ofd", teacher=teacher, teacher_bn="batch")
    before = copy.deepcopy(teacher.state_dict())
    images, targets = oracles.tiny_batch(4)
    trace = distiller.teacher_net(images)
    student = distiller.student_net(images)
    ours = distiller.distill_terms(student, trace, Batch(images, targets))["feature"]
    running = tiny_pair("ofd", teacher=teacher)
    running.load_state_dict(distiller.state_dict())
    trained = copy.deepcopy(teacher).train()
    tapped = Tapped(trained, distiller.data)
    tapped.request("stages.pre")
    expected = running.distill_terms(student, tapped(images), Batch(images, targets))["feature"]
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert not torch.isclose(ours, running.distill_terms(student, trace, Batch(images, targets))["feature"])
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    assert all(module.track_running_stats for module in teacher.modules() if isinstance(module, nn.BatchNorm2d))
    oracles.check_two_steps(distiller)


def test_the_second_teacher_pass_runs_under_the_loops_autocast():
    distiller = tiny_pair("ofd", teacher=normed(8), teacher_bn="batch")
    seen = []
    distiller.teacher_net.module.blocks[0][0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = distiller(*oracles.tiny_batch(4))
        assert seen == [dtype, dtype]
        assert out.loss.dtype == torch.float32
        seen.clear()


def test_a_batch_of_one_image_takes_the_teachers_running_statistics():
    student, teacher = normed(4, stages=2), normed(8)
    teacher.blocks[1][1].running_mean.fill_(0.5)
    images, targets = oracles.tiny_batch(2)
    images = images[:, :, :4, :4]  # the last map is 1x1: one value a channel

    def term(statistics, size):
        distiller = tiny_pair("ofd", student=copy.deepcopy(student), teacher=copy.deepcopy(teacher), teacher_bn=statistics)
        return distiller(images[:size], targets[:size]).terms["feature"]

    assert torch.equal(term("batch", 1), term("running", 1))
    assert not torch.isclose(term("batch", 2), term("running", 2))


def test_margins_are_prepared_with_the_statistics_that_training_has():
    distiller = tiny_pair("ofd", teacher_bn="batch")
    distiller.teacher_net.module.blocks[0][1].running_mean.fill_(0.5)
    loader = TinyLoader(DataSpec(5, (16, 16)))
    distiller.prepare(loader)
    trained = Tapped(copy.deepcopy(distiller.teacher_net.module).train(), distiller.data)
    trained.request("stages.pre")
    features = [trained(batch.images).features for batch in loader.epoch(0, phase="prepare")]
    for number in range(3):
        whole = torch.cat([found[f"stage{number + 1}.pre"] for found in features])
        torch.testing.assert_close(distiller.margin(number), literal_mean_negative(whole.detach()))


def test_published_weights_and_sizes():
    distiller = tiny_pair("ofd", student=normed(64), teacher=normed(64))
    count = sum(p.numel() for p in distiller.connectors.parameters())
    assert count == 64**2 + 128**2 + 256**2 + 2 * (64 + 128 + 256) == 86912
    assert {name: weight.final() for name, weight in distiller.weights.items()} == {"ce": 1.0, "feature": 1e-3}
    imagenet = tiny_pair("ofd", weights="imagenet")
    assert {name: weight.final() for name, weight in imagenet.weights.items()} == {"ce": 1.0, "feature": 1e-4}


def test_bad_options_are_refused():
    with pytest.raises(OptionError, match="teacher_bn is one of running, batch; got 'train'"):
        tiny_pair("ofd", teacher_bn="train")
    bare = TinyNet(8)
    for block in bare.blocks:
        block[1] = nn.Identity()
    with pytest.raises(OptionError, match="needs a teacher with batch norms; TinyNet has none"):
        tiny_pair("ofd", teacher=bare, teacher_bn="batch")
    flat = TinyNet(8)
    flat.stages = ()
    with pytest.raises(UnsupportedPairError, match="feature maps"):
        tiny_pair("ofd", teacher=flat)

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from distillzoo.errors import OptionError, ShapeError, UnsupportedPairError
from distillzoo.functional import hierarchical_context_loss
from distillzoo.types import Progress
from tests.methods import oracles
from tests.methods.oracles import TinyNet, tiny_pair

MAPS = [
    (oracles.sine(4, 5, 8, 8, alpha=0.31), oracles.sine(4, 5, 8, 8, alpha=0.17, delta=0.2)),
    (oracles.wide_student_map(), oracles.teacher_map()),
]


def slow_pool(features, size):
    """Adaptive average pooling of one (H, W) list of lists, window by window."""
    height, width = len(features), len(features[0])
    rows = []
    for i in range(size):
        top, bottom = i * height // size, math.ceil((i + 1) * height / size)
        row = []
        for j in range(size):
            left, right = j * width // size, math.ceil((j + 1) * width / size)
            window = [features[y][x] for y in range(top, bottom) for x in range(left, right)]
            row.append(sum(window) / len(window))
        rows.append(row)
    return rows


def slow_mse(student, teacher, pool):
    squares = []
    for one, other in zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), strict=True):
        for row, goal in zip(pool(one), pool(other), strict=True):
            squares += [(a - b) ** 2 for a, b in zip(row, goal, strict=True)]
    return sum(squares) / len(squares)


def slow_hcl(student, teacher):
    """The equation with the table of weights written out."""
    height = student.shape[2]
    table = {4: 0.5, 2: 0.25, 1: 0.125} if height > 4 else {2: 0.5, 1: 0.25} if height > 2 else {1: 0.5} if height == 2 else {}
    total = slow_mse(student, teacher, lambda x: x)
    for size, share in table.items():
        total += share * slow_mse(student, teacher, lambda x, size=size: slow_pool(x, size))
    return total / (1 + sum(table.values()))


def test_oracle_and_the_equation_written_out():
    for (student, teacher), value in zip(MAPS, (0.63007821, 0.81483306), strict=True):
        assert hierarchical_context_loss(student, teacher).item() == pytest.approx(value, abs=1e-8)
        assert hierarchical_context_loss(student, teacher).item() == pytest.approx(slow_hcl(student, teacher), abs=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (8, 8), (12, 9), (6, 10), (8, 2), (2, 8)])
def test_every_height_has_its_weights(size):
    student, teacher = oracles.sine(2, 3, *size, alpha=0.31), oracles.sine(2, 3, *size, alpha=0.17, delta=0.2)
    assert hierarchical_context_loss(student, teacher).item() == pytest.approx(slow_hcl(student, teacher), abs=1e-12)


def test_the_published_table_of_weights():
    """A constant difference has the same error at every scale; one that averages to zero has it at full size alone."""
    for height, shares in ((8, 1.875), (5, 1.875), (4, 1.75), (3, 1.75), (2, 1.5), (1, 1.0)):
        ones = torch.ones(1, 1, height, height, dtype=torch.float64)
        assert hierarchical_context_loss(ones, 0 * ones).item() == pytest.approx(1.0, abs=1e-12)
        if height % 2 == 0:
            signs = torch.ones(height, dtype=torch.float64)
            signs[1::2] = -1
            board = (signs.view(-1, 1) * signs).view(1, 1, height, height)
            assert hierarchical_context_loss(board, 0 * board).item() == pytest.approx(1 / shares, abs=1e-12)


def test_gradient():
    for student, teacher in MAPS:
        student = student.clone().requires_grad_()
        literal, share, shares = (student - teacher).square().mean(), 1.0, 1.0
        for size in (4, 2, 1):
            if size < student.shape[2]:
                share /= 2
                shares += share
                literal = literal + share * F.mse_loss(F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size))
        (ours,) = torch.autograd.grad(hierarchical_context_loss(student, teacher), student)
        torch.testing.assert_close(ours, torch.autograd.grad(literal / shares, student)[0], rtol=0, atol=1e-12)
    student, teacher = (x[:2, :2] for x in MAPS[0])
    torch.autograd.gradcheck(lambda s: hierarchical_context_loss(s, teacher), (student.clone().requires_grad_(),))
    oracles.check_teacher_is_constant(hierarchical_context_loss, student, teacher)


@oracles.UNHURRIED
@given(st.floats(0.01, 50.0), st.floats(-5.0, 5.0), st.integers(1, 9), st.permutations(range(4)), st.permutations(range(5)))
def test_property_scale_shift_order_and_zero(scale, shift, size, order, channels):
    student, teacher = oracles.sine(4, 5, size, size, alpha=0.31), oracles.sine(4, 5, size, size, alpha=0.17, delta=0.2)
    loss = hierarchical_context_loss(student, teacher)
    moved = hierarchical_context_loss(scale * student + shift, scale * teacher + shift)
    torch.testing.assert_close(moved, scale**2 * loss)
    shuffled = hierarchical_context_loss(student[order][:, channels], teacher[order][:, channels])
    torch.testing.assert_close(shuffled, loss)
    torch.testing.assert_close(hierarchical_context_loss(student.flip(2, 3), teacher.flip(2, 3)), loss)
    assert hierarchical_context_loss(student, student) == 0
    assert 0 <= loss <= (student - teacher).square().mean()


def test_numerics():
    student, teacher = MAPS[0]
    zeros = torch.zeros_like(student)
    for one, other in ((zeros, zeros), (teacher, teacher), (1e4 * student, -1e4 * teacher)):
        for size in (1, 2):
            oracles.check_finite(hierarchical_context_loss, one[:size].float(), other[:size].float())
    for pair in MAPS:
        oracles.check_half_types(hierarchical_context_loss, *pair)
    oracles.check_half_types(hierarchical_context_loss, 1e3 * student, -1e3 * teacher)  # squares leave half precision's range
    oracles.check_compiles(hierarchical_context_loss, student, teacher)


@pytest.mark.parametrize(("one", "other"), [((2, 3, 4, 4), (2, 3, 4, 5)), ((2, 3), (2, 3)), ((0, 3, 4, 4), (0, 3, 4, 4))])
def test_bad_shapes_are_refused(one, other):
    with pytest.raises(ShapeError, match=r"\(B, C, H, W\) maps of one shape"):
        hierarchical_context_loss(torch.zeros(one), torch.zeros(other))


# ---------------------------------------------------------------------- the distiller


def literal_review(distiller, student, teacher):
    """The levels from the deepest to the shallowest, each step as its own operation, every map resized before it is carried."""
    total, carried = 0.0, None
    for fusion, (own, other) in list(zip(distiller.fusions, distiller.levels, strict=True))[::-1]:
        target = teacher.features[other]
        target = target.view(*target.shape[:2], 1, 1) if target.ndim == 2 else target
        x = student.features[own]
        x = fusion.reduce.norm(fusion.reduce.conv(x.view(*x.shape[:2], 1, 1) if x.ndim == 2 else x))
        if carried is not None:
            y = F.interpolate(carried, x.shape[2:], mode="nearest")
            z = torch.sigmoid(fusion.attention(torch.cat([x, y], 1)))
            x = x * z[:, :1] + y * z[:, 1:]
        carried = F.interpolate(x, target.shape[2:], mode="nearest")
        total += slow_hcl(fusion.norm(fusion.expand(carried)), target)
    return total


@pytest.mark.parametrize(("student", "teacher"), [(3, 3), (2, 3), (3, 2), (4, 3)])
@pytest.mark.parametrize("preact", [False, True])
def test_the_term_is_the_authors_chain(student, teacher, preact):
    distiller = tiny_pair("reviewkd", student=TinyNet(4, stages=student), teacher=TinyNet(8, stages=teacher), student_preact=preact)
    distiller = distiller.double()
    count, suffix = min(student, teacher), ".pre" if preact else ""
    expected = [(f"stage{student - k}{suffix}", f"stage{teacher - k}.pre") for k in range(count)][::-1]
    assert list(distiller.levels) == [*expected, ("pooled", "pooled")]  # from the deep end
    images, _ = oracles.tiny_batch(3)
    traces = distiller.student_net(images.double()), distiller.teacher_net(images.double())
    with torch.no_grad():
        term = distiller.distill_terms(*traces, None)["review"]
        assert term.item() == pytest.approx(literal_review(distiller, *traces), rel=1e-10)
    oracles.check_two_steps(distiller.float())


def test_a_student_that_reads_before_its_activation_reads_other_maps():
    distiller = tiny_pair("reviewkd", student_preact=True)
    assert set(distiller.requires.student_taps) == {"stage1.pre", "stage2.pre", "stage3.pre", "pooled"}
    assert set(tiny_pair("reviewkd").requires.student_taps) == {"stage1", "stage2", "stage3", "pooled"}
    assert set(distiller.requires.teacher_taps) == {"stage1.pre", "stage2.pre", "stage3.pre", "pooled"}


def test_images_of_another_size_than_the_dry_batch():
    distiller = tiny_pair("reviewkd")
    images = oracles.sine(2, 3, 24, 20, alpha=0.37).float()
    assert torch.isfinite(distiller(images, torch.tensor([0, 1])).loss)


@pytest.mark.parametrize("size", [1, 2])
def test_small_batches_and_zero_features(size):
    distiller = tiny_pair("reviewkd")
    oracles.check_two_steps(distiller, size)
    images, targets = oracles.tiny_batch(size)
    out = distiller(0 * images, targets)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(p.grad).all() for p in distiller.parameters())


def test_middle_width():
    wide = tiny_pair("reviewkd", student=TinyNet(160, stages=3))
    assert wide.mid_channels == 512  # 640 would be the pooled vector's
    assert tiny_pair("reviewkd").mid_channels == 16
    narrow = tiny_pair("reviewkd", mid_channels=7)
    assert {fusion.expand.in_channels for fusion in narrow.fusions} == {7}
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(OptionError, match="mid_channels"):
            tiny_pair("reviewkd", mid_channels=wrong)


def test_published_size_of_resnet8x4():
    distiller = tiny_pair("reviewkd", student=TinyNet(64), teacher=TinyNet(64))  # 64, 128, 256, pooled 256: as resnet8x4's
    assert sum(p.numel() for p in distiller.fusions.parameters()) == 1_808_774


def test_default_weight_warms_up_over_twenty_epochs():
    weight = tiny_pair("reviewkd").weights["review"]
    values = [weight(Progress(epoch, 240, 0, 10)) for epoch in (0, 9, 19, 20, 239)]
    assert values == pytest.approx([0.25, 2.5, 5.0, 5.0, 5.0])
    imagenet = tiny_pair("reviewkd", weights="imagenet").weights["review"]
    assert imagenet(Progress(0, 100, 0, 10)) == 1.0


def test_a_network_without_stages_is_refused():
    flat = TinyNet(8)
    flat.stages = ()
    with pytest.raises(UnsupportedPairError, match="feature maps"):
        tiny_pair("reviewkd", teacher=flat)

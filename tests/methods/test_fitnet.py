import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillzoo.adapters.connectors import ConvRegressor, EdgeSafeBatchNorm2d
from distillzoo.errors import OptionError, ShapeError
from distillzoo.functional import hint_loss
from distillzoo.types import Stage
from tests.methods import oracles
from tests.methods.oracles import TinyNet


def slow_hint(student, teacher):
    values = [(a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)]
    return sum(values) / len(values)


def test_oracle_and_the_equation_written_out():
    loss = hint_loss(oracles.wide_student_map(), oracles.teacher_map()).item()
    assert hint_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]])) == 10.0  # rows of features are maps of one value
    assert loss == pytest.approx(0.98211150, abs=1e-8)
    assert loss == pytest.approx(slow_hint(oracles.wide_student_map(), oracles.teacher_map()), abs=1e-12)


def test_gradient():
    teacher = oracles.teacher_map()
    torch.autograd.gradcheck(lambda x: hint_loss(x, teacher), oracles.wide_student_map().requires_grad_())
    oracles.check_teacher_is_constant(hint_loss, oracles.wide_student_map(), teacher)


@oracles.UNHURRIED
@given(st.floats(-5.0, 5.0), st.permutations(range(4)))
def test_property_quadratic_in_the_scale_and_blind_to_the_order(scale, order):
    student, teacher = oracles.wide_student_map(), oracles.teacher_map()
    torch.testing.assert_close(hint_loss(scale * student, scale * teacher), scale**2 * hint_loss(student, teacher))
    torch.testing.assert_close(hint_loss(student[order], teacher[order]), hint_loss(student, teacher))
    assert hint_loss(teacher, teacher) == 0


def test_numerics():
    for student, teacher in ((torch.zeros(1, 2, 3, 3), torch.full((1, 2, 3, 3), 1e4)), (torch.ones(2, 2, 1, 1),) * 2):
        oracles.check_finite(hint_loss, student, teacher)
    oracles.check_half_types(hint_loss, oracles.wide_student_map() * 1e3, oracles.teacher_map())
    oracles.check_compiles(hint_loss, oracles.wide_student_map(), oracles.teacher_map())


@pytest.mark.parametrize("shape", [(4, 5, 4, 3), (3, 5, 4, 4), (4, 5), (5,)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ShapeError, match="hint_loss"):
        hint_loss(oracles.wide_student_map(), torch.zeros(shape))


# ---------------------------------------------------------------------------------------------------- the regressor


@pytest.mark.parametrize(
    ("source", "target", "count"),
    [
        ((128, 16, 16), (128, 16, 16), 16_768),  # resnet32x4 -> resnet8x4
        ((256, 8, 8), (512, 16, 16), 2_098_688),  # ResNet50 -> vgg8: transposed convolution
        ((480, 8, 8), (128, 16, 16), 983_424),  # resnet32x4 -> ShuffleNetV1
        ((32, 16, 16), (32, 16, 16), 1_120),
        ((64, 16, 16), (64, 16, 16), 4_288),  # wrn_40_2 -> wrn_16_2
        ((16, 8, 8), (256, 8, 8), 4_864),  # vgg13 -> MobileNetV2
        ((16, 8, 8), (512, 16, 16), 132_608),  # ResNet50 -> MobileNetV2
    ],
)
def test_the_regressor_has_the_published_number_of_parameters(source, target, count):
    regressor = ConvRegressor(source, target, rectify=True)
    assert sum(parameter.numel() for parameter in regressor.parameters()) == count
    assert regressor(torch.zeros(2, *source)).shape == (2, *target)


@pytest.mark.parametrize(
    ("source", "target", "kernel"),
    [
        ((2, 8, 8), (3, 4, 4), (3, 3)),  # half: stride 2
        ((2, 4, 4), (3, 8, 8), (4, 4)),  # twice: transposed
        ((2, 7, 7), (3, 4, 4), (4, 4)),  # unpadded
        ((2, 14, 14), (3, 8, 8), (7, 7)),  # the largest kernel
        ((2, 15, 15), (3, 8, 8), (1, 1)),  # 8x8 would be too much
        ((2, 32, 32), (3, 4, 4), (1, 1)),
        ((2, 5, 5), (3, 7, 7), (1, 1)),  # the references fail here
        ((2, 8, 3), (3, 4, 7), (1, 1)),  # one side larger, the other smaller
        ((2, 1, 1), (3, 1, 1), (1, 1)),
    ],
)
def test_any_size_becomes_any_other(source, target, kernel):
    regressor = ConvRegressor(source, target, rectify=False)
    assert regressor.conv.kernel_size == kernel
    for size in (1, 2):
        assert regressor(torch.randn(size, *source)).shape == (size, *target)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((2, 8, 8), (3, 4, 4)),  # stride 2
        ((2, 4, 4), (3, 8, 8)),  # transposed
        ((2, 10, 10), (3, 4, 4)),  # unpadded, 7x7
        ((2, 4, 4), (3, 4, 4)),
        ((2, 32, 32), (3, 4, 4)),  # pooled
        ((2, 5, 5), (3, 7, 7)),  # interpolated
    ],
)
def test_maps_of_another_size_are_resized_to_what_is_asked_for(source, target):
    torch.manual_seed(0)
    regressor = ConvRegressor(source, target, rectify=False)
    built = torch.randn(2, *source)
    assert torch.equal(regressor(built, target[1:]), regressor(built))
    for found, wanted in (((12, 12), (6, 6)), ((3, 5), (6, 4)), ((1, 1), (1, 1)), ((7, 7), (14, 13))):
        assert regressor(torch.randn(2, 2, *found), wanted).shape == (2, 3, *wanted)


def test_resizing_keeps_a_constant_map_constant():
    for source, target in (((2, 32, 32), (3, 4, 4)), ((2, 5, 5), (3, 7, 7))):
        out = ConvRegressor(source, target, rectify=False).eval()(torch.ones(1, *source))
        torch.testing.assert_close(out, out[:, :, :1, :1].expand_as(out))


def test_one_value_a_channel_uses_the_running_statistics():
    norm = EdgeSafeBatchNorm2d(3)
    norm.running_mean.fill_(2.0)
    x = torch.full((1, 3, 1, 1), 5.0, requires_grad=True)
    before = norm.running_mean.clone()
    out = norm(x)
    torch.testing.assert_close(out, torch.full_like(out, 3.0), rtol=1e-4, atol=0)
    assert torch.equal(norm.running_mean, before)
    out.sum().backward()
    assert norm.weight.grad is not None
    more = torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(norm(more), torch.nn.BatchNorm2d(3)(more))


def test_a_vector_is_no_source():
    with pytest.raises(ShapeError, match=r"\(C, H, W\)"):
        ConvRegressor((64,), (32, 4, 4), rectify=True)


# ---------------------------------------------------------------------------------------------------- the distiller


def test_two_steps_train_down_to_one_sample():
    distiller = oracles.tiny_pair("fitnet")
    assert distiller.pair == ("stage2", "stage2")
    assert [weight.final() for weight in distiller.weights.values()] == [1.0, 100.0]
    oracles.check_two_steps(distiller)
    oracles.check_two_steps(distiller, 1)


def test_the_term_is_the_loss_of_the_regressed_tap():
    distiller = oracles.tiny_pair("fitnet").eval()
    images, targets = oracles.tiny_batch()
    guided = distiller.student_net(images).features["stage2"]
    hint = distiller.teacher_net(images).features["stage2"]
    torch.testing.assert_close(distiller(images, targets).terms["hint"], hint_loss(distiller.regressor(guided), hint))


@pytest.mark.parametrize("size", [(8, 8), (20, 20), (24, 24), (16, 24)])
def test_images_of_another_size_than_it_was_built_for(size):
    """A quarter and four times the size, where no convolution scales with the images as one of stride 2 does."""
    for student, teacher in ((1, 3), (3, 1)):
        distiller = oracles.tiny_pair("fitnet", student=TinyNet(2, stages=student), teacher=TinyNet(2, stages=teacher))
        out = distiller(torch.randn(2, 3, *size), torch.tensor([0, 1]))
        out.loss.backward()
        assert torch.isfinite(out.loss)
        assert distiller.regressor.conv.weight.grad.any()


@pytest.mark.parametrize(
    ("head", "linear_end", "kind"),
    [
        ("auto", False, torch.nn.ReLU),
        ("auto", True, torch.nn.Identity),
        ("relu", True, torch.nn.ReLU),
        ("linear", False, torch.nn.Identity),
    ],
)
def test_the_head_follows_the_sign_of_the_teachers_tap(head, linear_end, kind):
    distiller = oracles.tiny_pair("fitnet", head=head, teacher=TinyNet(8, linear_end=linear_end))
    assert isinstance(distiller.regressor.activation, kind)


def test_a_stage_that_a_later_norm_reads_is_not_rectified():
    """Wide residual networks: the pre-activation is a norm that follows the raw stream, so the stage itself has negative values."""
    teacher = TinyNet(8, linear_end=True)
    teacher.stages = (Stage("blocks.0", "blocks.1"), Stage("blocks.1", "blocks.2.1"), Stage("blocks.2"))
    assert isinstance(oracles.tiny_pair("fitnet", teacher=teacher).regressor.activation, torch.nn.Identity)
    mixed = TinyNet(8)
    mixed.stages = (Stage("blocks.0.1"), Stage("blocks.1.1", "blocks.2.2:input"), Stage("blocks.2"))
    assert isinstance(oracles.tiny_pair("fitnet", teacher=mixed).regressor.activation, torch.nn.Identity)
    inner = TinyNet(8)
    inner.stages = (Stage("blocks.0"), Stage("blocks.1", "blocks.1.2"), Stage("blocks.2"))
    assert isinstance(oracles.tiny_pair("fitnet", teacher=inner).regressor.activation, torch.nn.ReLU)  # whatever is declared
    gelu = TinyNet(8)
    gelu.blocks[1][2] = torch.nn.GELU()
    assert isinstance(oracles.tiny_pair("fitnet", teacher=gelu).regressor.activation, torch.nn.Identity)


class ByFunction(torch.nn.Module):
    """A residual block that ends with a function, as is usual for CIFAR."""

    def __init__(self, inputs: int, outputs: int, end) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(inputs, outputs, 3, 2, 1), torch.nn.BatchNorm2d(outputs)
        self.shortcut, self.end = torch.nn.Conv2d(inputs, outputs, 1, 2), end

    def forward(self, x):
        return self.end(self.norm(self.conv(x)) + self.shortcut(x))


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (torch.nn.functional.relu, torch.nn.ReLU),
        (lambda x: torch.relu(x).clone(), torch.nn.ReLU),
        (lambda x: torch.cat([x[:, ::2].relu(), x[:, 1::2].relu_()], 1), torch.nn.ReLU),  # a block of two branches
        (torch.nn.functional.silu, torch.nn.Identity),
        (lambda x: x, torch.nn.Identity),
    ],
    ids=["relu", "relu inside", "joined", "silu", "linear"],
)
def test_the_head_follows_the_sign_of_blocks_that_end_with_a_function(end, kind):
    teacher = TinyNet(8)
    teacher.blocks[1] = ByFunction(8, 16, end)
    teacher.stages = tuple(Stage(f"blocks.{number}") for number in range(3))
    assert isinstance(oracles.tiny_pair("fitnet", teacher=teacher).regressor.activation, kind)


@pytest.mark.parametrize(
    ("student", "teacher", "number", "pair"),
    [
        (3, 4, None, ("stage1", "stage2")),
        (4, 3, None, ("stage3", "stage2")),
        (2, 4, None, ("stage1", "stage3")),  # stage 2 has no partner
        (1, 3, None, ("stage1", "stage3")),
        (3, 1, None, ("stage3", "stage1")),
        (3, 4, 4, ("stage3", "stage4")),
    ],
)
def test_the_hint_pairs_from_the_deep_end(student, teacher, number, pair):
    built = oracles.tiny_pair("fitnet", student=TinyNet(2, stages=student), teacher=TinyNet(2, stages=teacher), hint_stage=number)
    assert built.pair == pair
    assert (built.requires.student_taps, built.requires.teacher_taps) == (pair[:1], pair[1:])
    oracles.check_two_steps(built)


@settings(oracles.UNHURRIED, max_examples=8)
@given(st.integers(1, 4), st.integers(1, 4))
def test_property_any_two_numbers_of_stages_train(student, teacher):
    oracles.check_two_steps(
        oracles.tiny_pair("fitnet", student=TinyNet(2, stages=student), teacher=TinyNet(2, stages=teacher)), size=2
    )


@pytest.mark.parametrize("options", [{"hint_stage": 0}, {"hint_stage": 4}, {"hint_stage": True}, {"head": "gelu"}])
def test_bad_options_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        oracles.tiny_pair("fitnet", **options)


def test_building_leaves_the_teachers_statistics_alone():
    teacher = TinyNet(8)
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    oracles.check_two_steps(oracles.tiny_pair("fitnet", teacher=teacher))
    assert all(torch.equal(buffer, before[name]) for name, buffer in teacher.named_buffers())

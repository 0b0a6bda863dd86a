"""KDiffusion: the process against direct conditioning, the loss against loops, the branches against networks with one alone."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from distillzoo import build_distiller, create_model
from distillzoo.adapters.bridge import Bridge
from distillzoo.adapters.reparam import Branched
from distillzoo.adapters.reverse import diffusion_amplitudes, draw_noise, posterior_coefficients, reverse_chain
from distillzoo.errors import OptionError, ShapeError
from distillzoo.functional import progressive_loss
from distillzoo.models import MODELS
from distillzoo.streams import Stream
from distillzoo.testing import Subject, checks_state, checks_step, tiny_data, tiny_pair
from distillzoo.types import Batch, Stage
from tests.methods import oracles

SCHEDULES = ("linear_amplitude", "cosine", "ddpm")
STEP = torch.tensor(5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def noise_amplitude(amplitude: float) -> float:
    return math.sqrt(1.0 - amplitude**2)


def coefficients(schedule: str, m: int) -> list[tuple[float, float, float]]:
    return [posterior_coefficients(a, b) for a, b in itertools.pairwise(diffusion_amplitudes(schedule, m))]


# ------------------------------------------------------------------------------------------------ the process


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 16])
def test_the_posterior_is_that_of_direct_gaussian_conditioning(schedule, m):
    for (noisy, clean), (u, v, w) in zip(
        itertools.pairwise(diffusion_amplitudes(schedule, m)), coefficients(schedule, m), strict=True
    ):
        ratio = noisy / clean
        # x_s = A_s x_0 + B_s d and x_n = ratio x_s + sqrt(1 - ratio^2) d', jointly normal given x_0 = 1
        mean = np.array([clean, noisy])
        mix = np.array([[noise_amplitude(clean), 0.0], [ratio * noise_amplitude(clean), math.sqrt(1.0 - ratio**2)]])
        covariance = mix @ mix.T
        gain = covariance[0, 1] / covariance[1, 1]
        expected = (gain, mean[0] - gain * mean[1], covariance[0, 0] - gain * covariance[1, 0])
        np.testing.assert_allclose((u, v, w), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "m", "expected"),
    [
        ("linear_amplitude", 4, [(0.004, 0.25), (0.4, 0.4), (0.389, 0.556), (0, 1)]),
        ("cosine", 4, [(0.002, 0.380), (0.320, 0.581), (0.231, 0.758), (0, 1)]),
        ("ddpm", 4, [(0.109, 0.057), (0.192, 0.268), (0.200, 0.666), (0, 1)]),
        (
            "ddpm",
            8,
            [
                (0.306, 0.019), (0.358, 0.051), (0.413, 0.114), (0.465, 0.215),
                (0.476, 0.353), (0.421, 0.518), (0.256, 0.734), (0, 1),
            ],
        ),
    ],
)  # fmt: skip
def test_the_coefficients_of_the_page(schedule, m, expected):
    got = [(u, v) for u, v, _ in coefficients(schedule, m)]
    np.testing.assert_allclose(got, expected, rtol=0, atol=6e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_amplitudes_rise_to_one_and_the_last_step_is_the_plain_difference(schedule, m):
    amplitudes = diffusion_amplitudes(schedule, m)
    assert len(amplitudes) == m + 1
    assert amplitudes[-1] == 1.0
    assert amplitudes[0] >= (1e-3 if schedule != "ddpm" else 6e-3)
    assert all(a < b for a, b in itertools.pairwise(amplitudes))
    assert coefficients(schedule, m)[-1][:2] == (0.0, 1.0)
    assert reverse_chain(amplitudes)[-1].tolist() == [*[0.0] * (m - 1), 1.0, -1.0, 0.0]


def test_the_ddpm_amplitudes_are_products_of_its_thousand_betas():
    kept = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    np.testing.assert_allclose(diffusion_amplitudes("ddpm", 4), [*kept[[999, 749, 500, 250]], 1.0], rtol=1e-12)


# ------------------------------------------------------------------------------------------------ the loss


def loops(z, x0, e, schedule, *, start="student", teacher_forced=False):
    """Equation 12, one number at a time: m, h and X as the page writes them."""
    amplitudes, m = diffusion_amplitudes(schedule, len(z)), len(z)
    total = 0.0
    for index in np.ndindex(*x0.shape):
        noised = [a * x0[index] + noise_amplitude(a) * e[index] for a in amplitudes]
        h = z[0][index] if start == "student" else noised[0]
        for k in range(1, m + 1):
            u, v, _ = posterior_coefficients(amplitudes[k - 1], amplitudes[k])
            h = u * (noised[k - 1] if teacher_forced else h) + v * z[k - 1][index]
            total += (u * noised[k - 1] + v * x0[index] - h) ** 2
    return total / m / x0.size


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("start", ["student", "shared_noise"])
@pytest.mark.parametrize("forced", [False, True], ids=["chained", "forced"])
@pytest.mark.parametrize("m", [1, 3])
def test_the_loss_is_that_of_loops(schedule, start, forced, m):
    z, x0, e = torch.randn(m, 2, 3, 2, 2).double(), torch.randn(2, 3, 2, 2).double(), torch.randn(2, 3, 2, 2).double()
    chain = reverse_chain(diffusion_amplitudes(schedule, m), start=start, teacher_forced=forced)
    expected = loops(z.numpy(), x0.numpy(), e.numpy(), schedule, start=start, teacher_forced=forced)
    assert float(progressive_loss(z, x0, e, chain)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_teacher_forcing_collapses_to_single_steps_and_chaining_does_not(schedule):
    m = 4
    z, x0, e = torch.randn(m, 2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    amplitudes = diffusion_amplitudes(schedule, m)
    single = sum(v**2 * F.mse_loss(z[k], x0) for k, (_, v, _) in enumerate(coefficients(schedule, m))) / m
    forced = progressive_loss(z, x0, e, reverse_chain(amplitudes, teacher_forced=True))
    chained = progressive_loss(z, x0, e, reverse_chain(amplitudes))
    torch.testing.assert_close(forced, single)
    assert abs(float(chained - forced)) > 0.01 * float(forced)
    # what the branches of earlier steps return matters later on, where the teacher stands in its place it does not
    z.requires_grad_()
    for chain, reaches in ((reverse_chain(amplitudes)[1:2], True), (reverse_chain(amplitudes, teacher_forced=True)[1:2], False)):
        (gradient,) = torch.autograd.grad((chain[:, :m] @ z.flatten(1)).square().sum(), z)
        assert bool(gradient[0].any()) == reaches


def orthogonal(size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 of a small second moment and e of unit second moment, orthogonal to it."""
    x0, e = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    e = e - x0 * (e * x0).sum() / x0.square().sum()
    return x0 * size, (e / e.square().mean().sqrt())


@pytest.mark.parametrize(("start", "expected"), [("student", 0.065860), ("shared_noise", 0.065468)])
def test_the_residual_of_a_perfect_student_under_noise(start, expected):
    m = 4
    amplitudes = diffusion_amplitudes("linear_amplitude", m)
    x0, e = orthogonal(1e-3)
    loss = float(progressive_loss(x0.expand(m, *x0.shape), x0, e, reverse_chain(amplitudes, start=start)))
    assert loss == pytest.approx(expected, abs=5e-7)
    noise = [noise_amplitude(a) for a in amplitudes]
    total, c = 0.0, (0.0 if start == "student" else noise[0])
    for k, (u, _, _) in enumerate(coefficients("linear_amplitude", m)):
        total += (u * (noise[k] - c)) ** 2
        c *= u
    assert loss == pytest.approx(total / m, rel=1e-6)


@pytest.mark.parametrize(("schedule", "m", "expected"), [("linear_amplitude", 4, 1.31), ("ddpm", 4, 1.13), ("ddpm", 8, 1.48)])
def test_noise_of_the_same_sample_moves_the_stationary_amplitude(schedule, m, expected):
    x0 = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    chain = reverse_chain(diffusion_amplitudes(schedule, m))

    def slope(value: float, noise: torch.Tensor) -> float:
        c = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(progressive_loss((c * x0).expand(m, *x0.shape), x0, noise, chain), c)
        return float(gradient)

    at_zero, at_one = slope(0.0, 0.0 * x0), slope(1.0, x0)  # e is the student's own feature c x_0, a constant; linear in c
    assert at_zero / (at_zero - at_one) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("m", [1, 4, 8])
def test_a_perfect_student_without_noise_has_no_loss(schedule, m):
    x0 = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    amplitudes = diffusion_amplitudes(schedule, m)
    z, zero = x0.expand(m, *x0.shape), torch.zeros_like(x0)
    assert float(progressive_loss(z, x0, zero, reverse_chain(amplitudes, start="shared_noise"))) < 1e-30
    from_student = float(progressive_loss(z, x0, zero, reverse_chain(amplitudes)))
    assert from_student < (1e-4 if schedule != "ddpm" else 0.2)
    assert m == 1 or schedule != "ddpm" or from_student > 1e-3  # there u_1 is not 0, and the two starts differ


def test_every_branch_has_a_gradient_and_the_teacher_none():
    z, x0, e = torch.randn(4, 2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for tensor in (z, x0, e):
        tensor.requires_grad_()
    progressive_loss(z, x0, e, reverse_chain(diffusion_amplitudes("ddpm", 4)).float()).backward()
    assert all(part.abs().sum() > 0 for part in z.grad)
    assert x0.grad is None
    assert e.grad is None


def test_the_loss_takes_the_chain_as_it_is_made_and_tensors_of_any_floating_type():
    z, x0, e = torch.randn(3, 2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    chain = reverse_chain(diffusion_amplitudes("cosine", 3))
    expected = progressive_loss(z, x0, e, chain)
    torch.testing.assert_close(progressive_loss(z.float(), x0.float(), e.float(), chain), expected.float())
    torch.testing.assert_close(progressive_loss(z.float(), x0.half(), e, chain), expected.float(), rtol=1e-3, atol=0)
    oracles.check_half_types(progressive_loss, 400 * z, x0, e, chain)  # squares leave half precision's range
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = progressive_loss(z.float(), x0.float(), e.float(), chain)
    torch.testing.assert_close(same, expected.float())
    oracles.check_compiles(lambda z: progressive_loss(z, x0, e, chain), z)


@pytest.mark.parametrize(
    ("shapes"),
    [
        ((3, 2, 3, 4, 4), (2, 3, 4, 4), (2, 3, 4, 4), 4),
        ((4, 2, 3, 4, 4), (2, 5, 4, 4), (2, 5, 4, 4), 4),
        ((4, 2, 3, 4, 4), (2, 3, 4, 4), (), 4),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes):
    z, x0, e, m = shapes
    chain = reverse_chain(diffusion_amplitudes("cosine", m))
    with pytest.raises(ShapeError, match=r"progressive_loss needs .* got .* Bring the branches"):
        progressive_loss(torch.zeros(z), torch.zeros(x0), torch.zeros(e), chain)


# ------------------------------------------------------------------------------------------------ the noise

NOISE = Stream.named(3, "test")
BRANCHES = torch.randn(4, 5, 3, 2, 2, generator=torch.Generator().manual_seed(2))


def test_student_noise_is_a_branch_of_another_sample_with_its_channels_centred():
    seen = set()
    for step in range(60):
        noise = draw_noise("student", BRANCHES, torch.ones(1, 3), NOISE, torch.tensor(step))
        torch.testing.assert_close(noise.mean((0, 2, 3)), torch.zeros(3))
        matches = [
            (i, shift)
            for i in range(4)
            for shift in range(5)
            if torch.allclose(noise, (x := BRANCHES[i].roll(-shift, 0)) - x.mean((0, 2, 3), keepdim=True), atol=1e-6)
        ]
        assert len(matches) == 1
        seen |= set(matches)
    assert {i for i, _ in seen} == {0, 1, 2, 3}
    assert {shift for _, shift in seen} == {1, 2, 3, 4}  # never the sample itself


def test_student_noise_of_one_sample_is_zero_and_carries_no_gradient():
    assert not draw_noise("student", BRANCHES[:, :1], torch.ones(1, 3), NOISE, STEP).any()
    assert not draw_noise("student", BRANCHES.clone().requires_grad_(), torch.ones(1, 3), NOISE, STEP).requires_grad


def test_same_sample_noise_is_a_branch_as_it_is_and_zero_is_zero():
    noise = draw_noise("student_same", BRANCHES, torch.ones(1, 3), NOISE, STEP)
    assert sum(torch.equal(noise, branch) for branch in BRANCHES) == 1
    assert not draw_noise("zero", BRANCHES, torch.ones(1, 3), NOISE, STEP).any()


def test_gaussian_noise_has_the_deviations_of_a_bridge():
    branches = torch.zeros(2, 64, 2, 8, 8, dtype=torch.float64)
    scale = torch.tensor([[1.0, 3.0], [0.5, 2.0]])
    deviations = set()
    for step in range(8):
        noise = draw_noise("gaussian", branches, scale, NOISE, torch.tensor(step))
        assert noise.dtype == torch.float64
        assert abs(float(noise.mean())) < 0.1
        deviations.add(tuple(round(2 * float(x)) / 2 for x in noise.std((0, 2, 3))))
    assert deviations == {(1.0, 3.0), (0.5, 2.0)}


@pytest.mark.parametrize("kind", ["student", "student_same", "gaussian"])
def test_noise_is_a_function_of_seed_and_step(kind):
    draws = [draw_noise(kind, BRANCHES, torch.ones(1, 3), NOISE, torch.tensor(step)) for step in (1, 1, 2, 3, 4, 5)]
    assert torch.equal(draws[0], draws[1])
    assert any(not torch.equal(draws[0], other) for other in draws[2:])


def test_processes_of_a_distributed_run_draw_the_gaussian_noise_that_one_would_for_all(monkeypatch):
    def draw(branches):
        return draw_noise("gaussian", branches, torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]), NOISE, STEP)

    whole = draw(BRANCHES[:, :4])
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        parts.append(draw(BRANCHES[:, :2]))
    assert torch.equal(torch.cat(parts), whole)


# ------------------------------------------------------------------------------------------------ the bridge


def test_a_shared_bridge_normalises_every_branch_by_itself_and_is_one():
    bridge = Bridge(3, 5)
    branches = [torch.randn(4, 3, 2, 2) * scale for scale in (1.0, 50.0)]
    for bridged in bridge(branches):
        torch.testing.assert_close(bridged.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
        torch.testing.assert_close(bridged.square().mean((0, 2, 3)), torch.ones(5), atol=1e-3, rtol=0)
    assert sum(parameter.numel() for parameter in bridge.parameters()) == 3 * 5 + 2 * 5
    torch.testing.assert_close(bridge.mean(branches[0]), bridge.projections[0](branches[0]))


def test_a_bridge_for_each_branch_is_applied_to_its_own():
    bridge = Bridge(3, 5, 2).eval()
    first, second = torch.randn(2, 4, 3, 2, 2)
    got = bridge([first, second])
    torch.testing.assert_close(got[0], bridge.projections[0](first))
    torch.testing.assert_close(got[1], bridge.projections[1](second))
    torch.testing.assert_close(bridge.mean(first), (bridge.projections[0](first) + bridge.projections[1](first)) / 2)
    assert bridge.scale().shape == (2, 5)


# ------------------------------------------------------------------------------------------------ the distiller


def build(student="resnet8", teacher="resnet20", *, size=32, seed=0, **options):
    torch.manual_seed(1)
    networks = [create_model(name, num_classes=5) if isinstance(name, str) else name for name in (student, teacher)]
    return build_distiller("kdiffusion", *networks, input_size=size, seed=seed, **options)


def batch(size=32, count=4, seed=0, dtype=torch.float32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype), torch.arange(count) % 5


def train(distiller, steps=10, size=32, count=4):
    optimiser = torch.optim.SGD(distiller.parameters(), lr=0.01)
    dtype = next(distiller.student_net.module.parameters()).dtype
    for seed in range(steps):
        optimiser.zero_grad()
        distiller(*batch(size, count, seed, dtype)).loss.backward()
        optimiser.step()
        distiller.after_step()
    return distiller


def bridged_inputs(distiller, stage, images):
    """What the bridge of a stage is given: the branch features s_i."""
    seen = []
    handle = distiller.bridges[stage].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    distiller(*images)
    handle.remove()
    return seen[0]


def keep_one(branched: Branched, number: int) -> None:
    """Put the given branch in the place of all."""
    kept = copy.deepcopy(branched.branches[number].state_dict())
    for branch in branched.branches:
        branch.load_state_dict(kept)


@pytest.mark.parametrize(
    ("student", "op", "read"),
    [
        ("resnet8", "layer3.0.conv2", "layer3.0.relu2"),
        ("shufflenetv1", "layer3.3.conv3", "layer3.3.relu3"),
        ("mobilenetv2", "blocks.6.0.project", "conv2"),
        ("vgg8", "block4.0", "block4.2"),
        ("wrn_16_1", "block3.1.conv2", "bn"),
        ("shufflenetv2", "layer3.3.branch.conv3", "layer3.3.branch.relu3"),  # the op's own output: a concatenation follows
    ],
)
def test_a_branch_feature_is_what_the_stage_would_be_if_that_branch_alone_were_there(student, op, read):
    distiller = train(build(student), steps=2, count=2).eval()
    images = batch(count=2)
    features = bridged_inputs(distiller, distiller.student_net.names("last")[0], images)
    assert len(features) == 4
    for number, feature in enumerate(features):
        lone = copy.deepcopy(distiller.student_net.module)
        keep_one(lone.get_submodule(op), number)
        seen = []
        lone.get_submodule(read).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))  # noqa: B023
        lone(images[0])
        torch.testing.assert_close(feature, seen[0], rtol=1e-4, atol=1e-4 * float(seen[0].detach().abs().max()))


FAMILIES = ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2", "tinycnn_32"]
OTHERS = [name for name in MODELS.names("*") if not name.endswith("_224") and name not in FAMILIES]


def check_export(student, *, size, dtype, tolerance, layers, count=4, teacher="resnet8"):
    torch.manual_seed(1)
    plain = create_model(student, num_classes=5)
    networks = (copy.deepcopy(plain).to(dtype), create_model(teacher, num_classes=5).to(dtype))
    distiller = build_distiller("kdiffusion", *networks, input_size=size, seed=0, layers=layers)
    assert any(isinstance(module, Branched) for module in distiller.student_net.module.modules())
    train(distiller, size=size, count=count).eval()
    images = batch(size, count, 99, dtype)[0]
    exported = distiller.export_student()
    assert type(exported) is type(plain)
    assert list(exported.state_dict()) == list(plain.state_dict())
    assert repr(exported) == repr(plain.eval())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in exported.modules())
    expected = distiller.predict(images).detach()
    plain.to(dtype).load_state_dict(exported.state_dict(), strict=True)
    for network in (exported, plain):
        assert (network(images) - expected).abs().max() <= tolerance * expected.abs().max()
    counts = []
    for network in (exported, create_model(student, num_classes=5).to(dtype).eval()):
        with FlopCounterMode(display=False) as counter:
            network(images)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("student", FAMILIES)
def test_the_export_is_the_plain_student_after_ten_batches(student, dtype, tolerance):
    check_export(student, size=16, dtype=dtype, tolerance=tolerance, layers="all")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("student", OTHERS)
def test_the_export_of_every_other_network_of_ours(student, dtype, tolerance):
    check_export(student, size=16, dtype=dtype, tolerance=tolerance, layers="all")


FOREIGN = ["timm/resnet18", "timm/mobilenetv2_100", "timm/mobilenetv3_large_100", "torchvision/shufflenet_v2_x1_0"]


@pytest.mark.parametrize("student", FOREIGN)
def test_the_export_of_networks_that_are_not_ours(student):
    check_export(student, size=64, dtype=torch.float32, tolerance=1e-5, layers="last", count=2)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("student", FOREIGN)
def test_the_export_of_all_layers_of_networks_that_are_not_ours(student, dtype, tolerance):
    check_export(student, size=96, dtype=dtype, tolerance=tolerance, layers="all", count=2)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("last", ["stage3"]),
        ("first", ["stage1"]),
        ("middle", ["stage2"]),
        ("all", ["stage1", "stage2", "stage3"]),
        ("stage2", ["stage2"]),
        (["stage3", "stage1"], ["stage1", "stage3"]),
    ],
)
def test_layers_say_which_stages_are_branched(layers, expected):
    distiller = build(layers=layers)
    assert list(distiller.bridges) == expected
    found = [name for name, module in distiller.student.named_modules() if isinstance(module, Branched)]
    assert found == [f"layer{name[-1]}.0.conv2" for name in expected]


def test_terms_and_weights_follow_the_options():
    assert list(build().weights) == ["ce", "progressive"]
    guided = build(guide=True, weights={"guide": 0.5})
    assert list(guided.weights) == ["ce", "progressive", "guide"]
    assert set(guided(*batch()).terms) == {"ce", "progressive", "guide"}
    with pytest.raises(OptionError, match="Unknown term of KDiffusion 'guide'"):
        build(weights={"guide": 0.5})


def test_every_branch_has_a_gradient_at_every_step_and_shuffling_changes_who_does_what():
    distiller = build()
    branched = distiller.student.get_submodule("layer3.0.conv2")
    roles = set()
    for seed in range(12):
        distiller.zero_grad()
        distiller(*batch(seed=seed)).terms["progressive"].backward()
        norms = torch.stack([branch.op.weight.grad.norm() for branch in branched.branches])
        assert (norms > 0).all()
        roles.add(int(norms.argmax()))
    assert len(roles) > 1


def test_without_shuffling_the_last_branch_is_pulled_to_the_teacher_itself():
    distiller = build(shuffle=False, noise="zero").eval()
    images = batch()
    target = distiller.teacher_net.trace(Batch(*images)).features["stage3.pre"]
    z = torch.stack(distiller.bridges["stage3"](bridged_inputs(distiller, "stage3", images)))
    chain = reverse_chain(diffusion_amplitudes("linear_amplitude", 4)).float()
    term = distiller(*images).terms["progressive"]
    torch.testing.assert_close(term, progressive_loss(z, target, torch.zeros_like(target), chain))


def test_with_shuffling_the_term_is_that_of_one_of_the_orders():
    images = batch()
    distiller = build(noise="zero").eval()
    target = distiller.teacher_net.trace(Batch(*images)).features["stage3.pre"]
    z = torch.stack(distiller.bridges["stage3"](bridged_inputs(distiller, "stage3", images)))
    chain = reverse_chain(diffusion_amplitudes("linear_amplitude", 4)).float()
    zero = torch.zeros_like(target)
    allowed = {order: progressive_loss(z[list(order)], target, zero, chain).item() for order in itertools.permutations(range(4))}
    seen = set()
    for step in range(30):
        distiller.step.fill_(step)
        term = distiller(*images).terms["progressive"].item()
        nearest = min(allowed, key=lambda order: abs(allowed[order] - term))
        assert term == pytest.approx(allowed[nearest], rel=1e-5)
        seen.add(nearest)
    assert len(seen) > 12


def test_the_average_objective_is_a_plain_difference_of_the_mean():
    images = batch()
    distiller = build(objective="average").eval()
    trace = distiller.student_net(images[0])
    target = distiller.teacher_net.trace(Batch(*images)).features["stage3.pre"]
    expected = F.mse_loss(distiller.bridges["stage3"].mean(trace.features["stage3.pre"]), target)
    torch.testing.assert_close(distiller(*images).terms["progressive"], expected)


def test_multiple_layers_count_by_their_mean():
    images = batch()
    together = build(layers="all", objective="average").eval()
    trace = together.student_net(images[0]).features
    targets = together.teacher_net.trace(Batch(*images)).features
    names = ("stage1", "stage2", "stage3")
    each = [F.mse_loss(together.bridges[name].mean(trace[f"{name}.pre"]), targets[f"{name}.pre"]) for name in names]
    torch.testing.assert_close(together(*images).terms["progressive"], torch.stack(each).mean())


@pytest.mark.parametrize("guide_on", ["mean", "final"])
def test_the_guide_compares_logits_of_the_teachers_own_head(guide_on):
    images = batch()
    distiller = build(guide=True, guide_on=guide_on, shuffle=False).eval()
    teacher = distiller.teacher_net.module
    target = distiller.teacher_net.trace(Batch(*images))
    bridge = distiller.bridges["stage3"]
    if guide_on == "mean":
        predicted = bridge.mean(distiller.student_net(images[0]).features["stage3.pre"])
    else:
        predicted = bridge(bridged_inputs(distiller, "stage3", images))[-1]
    expected = F.mse_loss(teacher.fc(predicted.relu().mean((2, 3))), target.logits)
    torch.testing.assert_close(distiller(*images).terms["guide"], expected)


def test_the_final_reconstruction_follows_the_shuffling():
    images = batch()
    distiller = build(guide=True, guide_on="final").eval()
    teacher, target = distiller.teacher_net.module, distiller.teacher_net.trace(Batch(*images))
    z = distiller.bridges["stage3"](bridged_inputs(distiller, "stage3", images))
    allowed = [F.mse_loss(teacher.fc(each.relu().mean((2, 3))), target.logits).item() for each in z]
    seen = set()
    for step in range(16):
        distiller.step.fill_(step)
        value = distiller(*images).terms["guide"].item()
        order = distiller._draws["stage3"][0].permutation(distiller.step, 4)
        assert value == pytest.approx(allowed[order.tolist().index(3)], rel=1e-5)
        seen.add(round(value, 6))
    assert len(seen) == 4


def test_the_guide_of_an_inner_stage_compares_the_next_linear_op():
    images = batch()
    distiller = build(layers="stage1", guide=True).eval()
    teacher = distiller.teacher_net.module
    target = distiller.teacher_net.trace(Batch(*images)).features["stage1.pre"]
    predicted = distiller.bridges["stage1"].mean(distiller.student_net(images[0]).features["stage1.pre"])
    conv = teacher.layer2[0].conv1
    torch.testing.assert_close(distiller(*images).terms["guide"], F.mse_loss(conv(predicted.relu()), conv(target.relu())))


@pytest.mark.parametrize(
    "options",
    [
        {"start": "shared_noise", "schedule": "ddpm", "noise": "gaussian", "bridge": "per_branch", "branches": 3},
        {"noise": "student_same", "schedule": "cosine", "shuffle": False, "branches": 2},
        {"objective": "teacher_forced", "noise": "zero", "branches": 1},
        {"objective": "average", "bridge": "per_branch", "guide": True},
        {"guide": True, "guide_on": "final", "bridge": "per_branch", "layers": "all"},
        {"layers": "first"},
    ],
    ids=str,
)
def test_every_option_trains_exports_and_passes_what_a_distiller_must(options):
    subject = Subject("kdiffusion", tiny_pair, options, tiny_data())
    checks_step.check_gradients(subject)
    checks_step.check_terms(subject)
    checks_state.check_export(subject)


def test_unequal_maps_meet_at_the_smaller_size():
    for student, teacher in (("wrn_16_1", "mobilenetv2"), ("mobilenetv2", "resnet8")):
        distiller = build(student, teacher, guide=True)
        seen = []
        distiller.bridges[next(iter(distiller.bridges))].projections[0].register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(tuple(output.shape[2:]))
        )
        distiller(*batch()).loss.backward()
        assert set(seen) == {(2, 2)}


def test_an_op_by_hand_is_taken():
    stage = Stage("layer3", "layer3.0.relu2:input", linear="layer3.0.downsample.0")
    distiller = build(taps={"student": ["layer1", "layer2", stage]})
    assert isinstance(distiller.student.layer3[0].downsample[0], Branched)
    assert isinstance(distiller.student.layer3[0].downsample[1], nn.Identity)
    train(distiller, 2).eval()
    images = batch()[0]
    torch.testing.assert_close(distiller.export_student().eval()(images), distiller.predict(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "noise"}, r"start is one of student, shared_noise; got 'noise'"),
        ({"noise": "pink"}, r"noise is one of student, student_same, gaussian, zero; got 'pink'"),
        ({"schedule": "linear"}, r"schedule is one of linear_amplitude, cosine, ddpm; got 'linear'"),
        ({"objective": "mean"}, r"objective is one of progressive, average, teacher_forced; got 'mean'"),
        ({"guide_on": "last"}, r"guide_on is one of mean, final; got 'last'"),
        ({"bridge": "none"}, r"bridge is one of shared, per_branch; got 'none'"),
        ({"branches": 0}, r"number of branches .* at least 1; got 0\. Pass 4"),
        ({"branches": 2.0}, r"got 2\.0"),
        ({"layers": "stage9"}, r"layers is one of last, first, middle, all, .* stage1, stage2, stage3; got 'stage9'"),
        ({"layers": []}, r"got \[\]"),
        ({"guide": True, "guide_on": "final", "objective": "average"}, r"guide_on='final' needs a chain"),
        ({"weights": 3.0}, r"weights is a mapping"),
    ],
)
def test_what_is_not_allowed_is_said_in_a_sentence(options, message):
    with pytest.raises(OptionError, match=message):
        build(**options)


def test_a_student_of_double_precision_has_a_chain_of_double_precision():
    exact = reverse_chain(diffusion_amplitudes("cosine", 4))
    networks = [create_model(name, num_classes=5).double() for name in ("resnet8", "resnet20")]
    assert torch.equal(build_distiller("kdiffusion", *networks, input_size=32, schedule="cosine").chain, exact)
    assert torch.equal(build(schedule="cosine").chain, exact.float())


def test_the_seed_decides_branches_and_draws():
    images = batch()
    losses = [build(seed=seed)(*images).loss.item() for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_in_a_composition_the_branches_are_exported():
    distiller = build_distiller("kdiffusion+kd", create_model("resnet8", num_classes=5), create_model("resnet20", num_classes=5))
    assert {"kdiffusion.progressive", "kd.kd"} <= set(distiller(*batch()).terms)
    distiller.eval()
    images = batch()[0]
    exported = distiller.export_student().eval()
    assert not any(isinstance(module, Branched) for module in exported.modules())
    torch.testing.assert_close(exported(images), distiller.predict(images), rtol=1e-4, atol=1e-5)

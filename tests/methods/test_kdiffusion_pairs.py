"""KDiffusion put together: its terms from their parts for every option, and teachers made of tokens with every student."""

from __future__ import annotations

import copy
import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distillzoo import build_distiller, create_model
from distillzoo.adapters.bridge import Bridge
from distillzoo.adapters.reverse import diffusion_amplitudes, draw_noise
from distillzoo.errors import UnsupportedPairError
from distillzoo.models import MODELS
from distillzoo.types import Batch
from tests.methods import oracles
from tests.methods.test_kdiffusion import FOREIGN, batch, bridged_inputs, build, train

TOKENS = ("timm/swin_tiny_patch4_window7_224", "timm/vit_small_patch16_224")
OURS = [name for name in MODELS.names("*") if not name.endswith("_224")]


# ------------------------------------------------------------------------------------------------ the terms from their parts


def stepwise(z, clean, noise, amplitudes, *, start="student", forced=False):
    """The mean over the steps of |m_k - h_k|^2, with the posterior's coefficients written out."""
    noised = [a * clean + math.sqrt(1 - a * a) * noise for a in amplitudes]
    running, total = z[0] if start == "student" else noised[0], 0.0
    for k, (noisy, cleaner) in enumerate(pairwise(amplitudes)):
        ratio = noisy / cleaner
        u = (1 - cleaner**2) * ratio / (1 - noisy**2)
        v = (1 - ratio**2) * cleaner / (1 - noisy**2)
        running = u * (noised[k] if forced else running) + v * z[k]
        total = total + (u * noised[k] + v * clean - running).square().mean()
    return total / len(z)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"noise": "student_same", "schedule": "ddpm", "branches": 8},
        {"noise": "gaussian", "bridge": "per_branch", "branches": 3},
        {"noise": "zero", "schedule": "cosine", "shuffle": False},
        {"start": "shared_noise", "schedule": "ddpm"},
        {"objective": "teacher_forced"},
        {"layers": "all"},
    ],
    ids=str,
)
def test_the_progressive_term_written_out(options):
    m, images = options.get("branches", 4), batch()
    distiller = build(**options).eval()
    for bridge in distiller.bridges.values():
        for projection in bridge.projections:
            nn.init.uniform_(projection.norm.weight, -2.0, 2.0)
    amplitudes = diffusion_amplitudes(options.get("schedule", "linear_amplitude"), m)
    targets = distiller.teacher_net.trace(Batch(*images)).features
    z = {stage: torch.stack(bridge(bridged_inputs(distiller, stage, images))) for stage, bridge in distiller.bridges.items()}
    values = set()
    for step in (0, 1, 7):
        distiller.step.fill_(step)
        terms = []
        for stage, bridge in distiller.bridges.items():
            orders, noises = distiller._draws[stage]
            order = orders.permutation(distiller.step, m).tolist() if options.get("shuffle", True) else list(range(m))
            scale = torch.stack([projection.norm.weight.abs() for projection in bridge.projections])
            noise = draw_noise(options.get("noise", "student"), z[stage], scale, noises, distiller.step)
            served = z[stage][[order.index(k) for k in range(m)]]
            forced = options.get("objective") == "teacher_forced"
            start = options.get("start", "student")
            terms.append(stepwise(served, targets[f"{stage}.pre"], noise, amplitudes, start=start, forced=forced))
        term = distiller(*images).terms["progressive"]
        torch.testing.assert_close(term, torch.stack(terms).mean(), rtol=1e-4, atol=1e-6)
        values.add(round(term.item(), 6))
    assert (len(values) == 1) == (options.get("noise") == "zero")  # there nothing is drawn, elsewhere every step draws anew


def test_layers_draw_orders_and_noise_of_their_own():
    distiller = build(layers="all")
    assert len({stream.root for streams in distiller._draws.values() for stream in streams}) == 6


def test_the_deviations_of_gaussian_noise_are_the_size_of_the_last_norms_scale():
    bridge = Bridge(3, 2, 2)
    for projection, scale in zip(bridge.projections, ([1.0, -3.0], [0.5, 0.0]), strict=True):
        projection.norm.weight.data = torch.tensor(scale)
    assert bridge.scale().tolist() == [[1.0, 3.0], [0.5, 0.0]]
    assert not bridge.scale().requires_grad


# ------------------------------------------------------------------------------------------------ teachers of tokens


@cache
def _tokens(name: str, size: int) -> nn.Module:
    torch.manual_seed(1)
    return create_model(name, num_classes=5, img_size=size)


def token_teacher(name: str, size: int = 64) -> nn.Module:
    return copy.deepcopy(_tokens(name, size))


@pytest.mark.parametrize("guide_on", ["mean", "final"])
@pytest.mark.parametrize("name", TOKENS)
def test_the_guide_of_a_pre_norm_head_goes_through_its_norm(name, guide_on):
    network, images = token_teacher(name), batch(64, 2)
    distiller = build("resnet8", network, size=64, guide=True, guide_on=guide_on, shuffle=False).eval()
    trace = distiller.teacher_net.trace(Batch(*images))
    clean = trace.features[distiller.layers[0].target]
    pooled = F.adaptive_avg_pool2d(distiller.student_net(images[0]).features["stage3.pre"], clean.shape[2:])
    z = distiller.bridges["stage3"]([F.adaptive_avg_pool2d(x, clean.shape[2:]) for x in distiller_branches(distiller, images)])
    predicted = distiller.bridges["stage3"].mean(pooled) if guide_on == "mean" else z[-1]
    if "swin" in name:
        expected = F.mse_loss(network.head(network.norm(predicted.permute(0, 2, 3, 1))), trace.logits)
    else:  # the head reads the class token, which no map has: the mean of the map stands for it
        wanted, got = (network.head(network.fc_norm(network.norm(x.mean((2, 3))))) for x in (clean, predicted))
        expected = F.mse_loss(got, wanted)
    torch.testing.assert_close(distiller(*images).terms["guide"], expected, rtol=1e-4, atol=1e-7)
    distiller(*images).loss.backward()
    assert all(parameter.grad is None for parameter in network.parameters())


def distiller_branches(distiller, images):
    """What the branches of the last stage are before they are pooled: the stage's sum with one of them in the mean's place."""
    features = distiller.student_net(images[0]).features
    (layer,) = distiller.layers
    return [features[name] + features[layer.total] - features[layer.mean] for name in layer.branches]


@pytest.mark.parametrize(("name", "op"), [(TOKENS[0], "layers.2.downsample.reduction"), (TOKENS[1], "blocks.6.attn.qkv")])
def test_the_guide_of_an_inner_stage_of_tokens_goes_through_the_next_norm(name, op):
    network, images = token_teacher(name), batch(64, 2)
    distiller = build("resnet20", network, size=64, guide=True, layers="all")
    stage = distiller.layers[0].stage
    seen = []
    network.get_submodule(op).register_forward_hook(lambda module, args, output: seen.append(output))
    clean = distiller.teacher_net.trace(Batch(*images)).features[distiller.layers[0].target]
    after, (own,) = distiller._guides[stage](clean), seen[:1]
    if "vit" in name:
        after, own = after[:, 1:], own[:, 1:]  # the class token's row is the mean's
    torch.testing.assert_close(after, own)


def check_step(student: str, teacher: str, size: int, **options) -> None:
    distiller = build(student, token_teacher(teacher, size), size=size, **options)
    out = train(distiller, 1, size, 2)(*batch(size, 2, 1))
    out.loss.backward()
    assert all(torch.isfinite(term) for term in out.terms.values())
    gradients = {name: parameter.grad for name, parameter in distiller.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())


def test_a_step_with_tokens_as_the_teacher_is_finite():
    check_step("shufflenetv1", TOKENS[0], 64, guide=True, layers="all")


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("guide", [False, True], ids=["alone", "guided"])
@pytest.mark.parametrize("teacher", TOKENS)
@pytest.mark.parametrize("student", [*OURS, *FOREIGN])
def test_a_step_of_every_student_with_tokens_as_the_teacher(student, teacher, guide, layers):
    check_step(student, teacher, 64 if student in FOREIGN else 32, guide=guide, layers=layers)


def test_a_teacher_that_switches_gradients_off_teaches_where_its_stages_say_all():
    teacher = create_model("resnet20", num_classes=5)
    teacher.forward = torch.no_grad()(teacher.forward)
    distiller = build_distiller("kdiffusion", create_model("resnet8", num_classes=5), teacher, input_size=16, seed=0)
    assert distiller(*oracles.tiny_batch()).loss.isfinite()


def test_a_guide_that_would_have_no_gradient_is_refused():
    class Quiet(type(create_model("resnet20", num_classes=5))):
        @torch.no_grad()
        def forward(self, images):
            return super().forward(images)

    teacher = create_model("resnet20", num_classes=5)
    teacher.__class__ = Quiet
    student = create_model("resnet8", num_classes=5)
    with pytest.raises(UnsupportedPairError, match="to its logits, and gradients do not: its forward switches them off"):
        build_distiller("kdiffusion", student, teacher, input_size=16, guide=True)
    build_distiller("kdiffusion", student, teacher, input_size=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_pre_activation_student_is_read_at_the_raw_stream_in_every_type(dtype):
    student, teacher = (create_model(name, num_classes=5).to(dtype) for name in ("wrn_16_1", "wrn_16_2"))
    (layer,) = build_distiller("kdiffusion", student, teacher, input_size=16, seed=0).layers
    assert layer.total == "stage3"

import copy

import pytest
import torch
from torch.nn import functional as F

from distillzoo.adapters import fusion
from distillzoo.adapters.fusion import AttentionFusion
from distillzoo.adapters.projections import NormedProjection


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal_fusion(module, features, carried, size):
    """The equations one after the other: concatenation, interpolation, convolution and norm as separate steps."""
    x = module.reduce.norm(module.reduce.conv(features))
    if module.attention is not None:
        y = F.interpolate(carried, x.shape[2:], mode="nearest")
        z = torch.sigmoid(module.attention(torch.cat([x, y], dim=1)))
        x = x * z[:, :1] + y * z[:, 1:]
    x = F.interpolate(x, size, mode="nearest")
    return module.norm(module.expand(x)), x


def compare(ours, theirs, inputs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    weights = [values(*x.shape, seed=9) for x in ours]
    inputs = [x for x in inputs if x is not None]
    grads = [torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights, strict=True)), inputs) for out in (ours, theirs)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("own", "deep", "size"),
    [
        ((8, 8), (4, 4), (8, 8)),
        ((8, 8), (1, 1), (8, 8)),
        ((4, 4), (4, 4), (4, 4)),
        ((6, 4), (3, 2), (6, 4)),
        ((6, 4), (3, 4), (6, 4)),
        ((7, 5), (3, 2), (7, 5)),
        ((4, 4), (8, 8), (4, 4)),
        ((8, 8), (4, 4), (4, 4)),
        ((8, 8), (4, 4), (24, 24)),
        ((4, 4), (2, 2), (7, 9)),
        ((6, 4), (3, 2), (12, 4)),
    ],
)
def test_equals_the_equations(own, deep, size):
    torch.manual_seed(0)
    module = AttentionFusion(3, 4, 5, fuse=True).double()
    reference = copy.deepcopy(module)
    features = values(3, 3, *own).requires_grad_()
    carried = values(3, 4, *deep, seed=1).requires_grad_()
    ours = module(features, carried, size)
    theirs = literal_fusion(reference, features, carried, size)
    compare(ours, theirs, [features, carried])


def test_every_parameter_has_the_gradient_of_the_equations():
    torch.manual_seed(0)
    module = AttentionFusion(3, 4, 5, fuse=True).double()
    reference = copy.deepcopy(module)
    features, carried, weight = values(4, 3, 4, 4), values(4, 4, 2, 2), values(4, 5, 8, 8)
    (module(features, carried, (8, 8))[0] * weight).sum().backward()
    (literal_fusion(reference, features, carried, (8, 8))[0] * weight).sum().backward()
    for (name, one), other in zip(module.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-10, msg=name)
    for (name, one), other in zip(module.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("third", [(4, 4), (8, 8), (16, 16), (6, 10), (2, 2)])
def test_a_doubled_map_is_handed_on_small_and_nobody_can_tell(third):
    torch.manual_seed(0)
    deep, shallow = AttentionFusion(3, 4, 5, fuse=False).double(), AttentionFusion(2, 4, 6, fuse=True).double()
    copies = copy.deepcopy(deep), copy.deepcopy(shallow)
    first, second = values(3, 3, 4, 4).requires_grad_(), values(3, 2, *third).requires_grad_()
    out, carried = deep(first, None, (8, 8))
    ours = (out, *shallow(second, carried, third))
    literal_out, literal_carried = literal_fusion(copies[0], first, None, (8, 8))
    theirs = (literal_out, *literal_fusion(copies[1], second, literal_carried, third))
    assert carried.shape[2:] == (4, 4)
    compare(ours, theirs, [first, second])


@pytest.mark.parametrize(("size", "chunk"), [((6, 4), 1 << 21), ((6, 4), 1), ((12, 4), 100)])
def test_gradcheck_of_the_mixture(monkeypatch, size, chunk):
    monkeypatch.setattr(fusion, "_CHUNK_CPU", chunk)
    inputs = [values(3, 2, *size), values(3, 2, 3, 2, seed=1), values(3, 2, *size, seed=2)]
    assert torch.autograd.gradcheck(fusion._Mix.apply, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (1, 4, 5, 3), (3, 4, 4, 6)])
def test_convolution_of_a_doubled_map(shape):
    x, weight = values(*shape).requires_grad_(), values(3, 4, 3, 3, seed=1).requires_grad_()
    ours = fusion._convolve_doubled(x, weight)
    theirs = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    compare([ours], [theirs], [x, weight])


def test_the_deepest_level_takes_a_batch_of_one():
    module = AttentionFusion(6, 4, 5, fuse=False).train()
    out, carried = module(torch.randn(1, 6, 1, 1), None, (1, 1))
    assert out.shape == (1, 5, 1, 1)
    assert torch.isfinite(out).all()
    assert carried.shape == (1, 4, 1, 1)


def test_initialisation():
    torch.manual_seed(0)
    module = AttentionFusion(100, 64, 50, fuse=True)
    for conv, fan in ((module.reduce.conv, 100), (module.expand, 64 * 9)):
        assert conv.weight.abs().max() <= (3 / fan) ** 0.5  # kaiming uniform, a = 1
        assert conv.weight.std().item() == pytest.approx((1 / fan) ** 0.5, rel=0.05)
    projection = NormedProjection(100, 64)
    assert projection.conv.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)


@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize(("shape", "width"), [((4, 3, 5, 6), 7), ((8, 6, 4, 4), 6)])
def test_projection_and_norm_in_one_equal_one_after_the_other(shape, width, offset):
    torch.manual_seed(0)
    module = NormedProjection(shape[1], width).double()
    with torch.no_grad():
        module.norm.weight.uniform_(-1.0, 2.0)
        module.norm.bias.normal_()
    reference = copy.deepcopy(module)
    x = (values(*shape) + offset).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = x.detach().contiguous().requires_grad_()
    assert module._joint_pays(x)
    assert not module._joint_pays(y)
    weight = values(shape[0], width, *shape[2:], seed=3)
    for step in range(2):
        ours, theirs = module(x), reference.norm(reference.conv(y))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
        (ours * weight).sum().backward()
        (theirs * weight).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-11)
        for (name, one), other in zip(module.named_parameters(), reference.named_parameters(), strict=True):
            torch.testing.assert_close(one.grad, other[1].grad, rtol=0, atol=1e-9, msg=name)
        for one, other in zip(module.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11, msg=f"step {step}")
    module.eval()
    reference.eval()
    torch.testing.assert_close(module(x), reference(y))
    assert module.norm.num_batches_tracked == 2


def test_projection_gradcheck():
    torch.manual_seed(0)
    module = NormedProjection(2, 3).double()
    x = values(3, 2, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert module._joint_pays(x)
    assert torch.autograd.gradcheck(module, (x,))


@pytest.mark.parametrize("level", [0.0, 3.0])
def test_projection_of_a_constant_map_is_finite(level):
    module = NormedProjection(3, 4)
    x = torch.full((4, 3, 4, 4), level).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert module._joint_pays(x)
    out = module(x)
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_a_norm_put_in_its_place_is_the_one_that_runs():
    module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(NormedProjection(3, 4))
    assert isinstance(module.norm, torch.nn.SyncBatchNorm)
    assert not module._joint_pays(torch.zeros(4, 3, 4, 4).contiguous(memory_format=torch.channels_last))

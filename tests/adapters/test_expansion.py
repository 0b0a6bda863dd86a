"""Layers of two widths: the wide one computes copies of what the narrow one does, and the narrow one is its slice."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distillzoo.adapters.copies import PerCopy, follow_copies
from distillzoo.adapters.dual_layers import dual_layer
from distillzoo.adapters.dual_network import duals, plain_network, replaced
from distillzoo.adapters.expansion import Mode, pick, tile
from distillzoo.adapters.orepa import LinearBranches, takes_branches
from distillzoo.adapters.trials import scrambled
from distillzoo.errors import UnsupportedPairError

OPS = {
    "dense": (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 5)),
    "strided": (nn.Conv2d(6, 8, 3, 2, 1, bias=False), (2, 6, 5, 5)),
    "reflecting": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 5, 5)),
    "dilated": (nn.Conv2d(6, 8, 3, padding="same", dilation=2), (2, 6, 7, 7)),
    "grouped": (nn.Conv2d(6, 9, 1, groups=3), (2, 6, 4, 4)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 4, 4)),
    "multiplied depthwise": (nn.Conv2d(6, 12, 3, padding=1, groups=6), (2, 6, 4, 4)),
    "linear": (nn.Linear(6, 4), (3, 6)),
    "linear on tokens": (nn.Linear(6, 4), (3, 5, 6)),
}
NORMS = {
    "batch": (nn.BatchNorm2d(6), (4, 6, 3, 3)),
    "batch without scale": (nn.BatchNorm2d(6, affine=False), (4, 6, 3, 3)),
    "batch of vectors": (nn.BatchNorm1d(6), (8, 6)),
    "group": (nn.GroupNorm(3, 6), (2, 6, 3, 3)),
    "layer": (nn.LayerNorm(6), (2, 5, 6)),
    "layer without scale": (nn.LayerNorm(6, elementwise_affine=False), (2, 5, 6)),
}


def channel_dim(layer, x):
    return x.ndim - 1 if isinstance(layer, nn.Linear | nn.LayerNorm) else 1


def test_tile_lays_copies_side_by_side_and_pick_takes_the_first():
    x = torch.arange(6.0).view(2, 3)
    wide = tile(x, 3, (0, 1), divide=True)
    assert wide.shape == (6, 9)
    assert wide[0].tolist() == pytest.approx([0, 0, 0, 1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3])
    assert torch.equal(wide[0], wide[2])
    torch.testing.assert_close(pick(wide, 3, (0, 1), multiply=True), x)


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("kind", OPS)
def test_an_op_keeps_the_rule_of_the_copies(kind, inputs, outputs, ratio):
    op, shape = OPS[kind]
    mode, x = Mode(), torch.randn(shape)
    dim = channel_dim(op, x)
    dual = dual_layer(op, ratio, mode, inputs=inputs, outputs=outputs)
    wanted = op(x)
    torch.testing.assert_close(dual(x), wanted)
    with mode:
        wide = dual(tile(x, ratio, (dim,), divide=True) if inputs else x)
    torch.testing.assert_close(wide, tile(wanted, ratio, (dim,), divide=True) if outputs else wanted)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_a_norm_keeps_the_rule_of_the_copies(kind, training):
    norm, shape = NORMS[kind]
    norm = scrambled(norm).train(training)
    mode, x = Mode(), 3.0 * torch.randn(shape) + 1.0
    dim = channel_dim(norm, x)
    dual = dual_layer(norm, 2, mode, inputs=True, outputs=True).train(training)
    wanted = norm(x)
    torch.testing.assert_close(dual(x), wanted)
    with mode:
        wide = dual(tile(x, 2, (dim,), divide=True))
    torch.testing.assert_close(wide, tile(wanted, 2, (dim,), divide=True), rtol=1e-5, atol=1e-6)


def test_the_modes_of_a_batch_norm_have_statistics_of_their_own():
    norm, mode = nn.BatchNorm2d(3), Mode()
    dual = dual_layer(norm, 2, mode, inputs=True, outputs=True)
    x = torch.randn(8, 3, 4, 4) + 5.0
    dual(x)
    norm(x)
    assert torch.equal(dual.running_mean, norm.running_mean)
    assert dual.wide_mean.abs().max() == 0.0
    with mode:
        dual(tile(x, 2, (1,), divide=True))
    torch.testing.assert_close(dual.wide_mean, tile(norm.running_mean, 2, (0,), divide=True))
    assert torch.equal(dual.running_mean, norm.running_mean)
    plain = dual.plain()
    assert {name: value.tolist() for name, value in plain.state_dict().items()} == {
        name: value.tolist() for name, value in norm.state_dict().items()
    }


@pytest.mark.parametrize("wide_first", [False, True])
def test_a_cumulative_average_counts_the_batches_of_each_mode(wide_first):
    norm, mode = nn.BatchNorm2d(3, momentum=None), Mode()
    dual = dual_layer(norm, 2, mode, inputs=True, outputs=True)
    x = torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(dual.eval()(x), norm.eval()(x))  # before any batch, where the rate has no value
    dual.train()
    norm.train()
    for number in range(3):
        x = torch.randn(8, 3, 4, 4)
        wanted = norm(x)
        for wide in (wide_first, not wide_first):
            if wide:
                with mode:
                    torch.testing.assert_close(dual(tile(x, 2, (1,), divide=True)), tile(wanted, 2, (1,), divide=True))
            else:
                torch.testing.assert_close(dual(x), wanted)
        assert dual.num_batches_tracked == dual.wide_batches_tracked == number + 1
    torch.testing.assert_close(dual.running_var, norm.running_var)
    torch.testing.assert_close(dual.wide_mean, tile(norm.running_mean, 2, (0,), divide=True))
    torch.testing.assert_close(dual.wide_var, tile(norm.running_var, 2, (0,)) / 4.0)


def test_neither_rate_nor_statistics_come_to_the_host(monkeypatch):
    norm = nn.BatchNorm2d(3, momentum=None)
    dual = dual_layer(norm, 2, Mode(), inputs=True, outputs=True)
    for name in ("__float__", "item", "tolist", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *args: pytest.fail("a tensor became a number"))
    dual(torch.zeros(8, 3, 4, 4))


@pytest.mark.parametrize("kind", ["dense", "depthwise", "grouped", "linear"])
def test_the_narrow_op_is_a_slice_that_learns_with_the_wide_one(kind):
    op, shape = OPS[kind]
    mode = Mode()
    dual = dual_layer(op, 2, mode, inputs=True, outputs=True)
    dual(torch.randn(shape)).square().sum().backward()
    touched = dual.weight.grad != 0
    assert 0.2 < touched.float().mean() <= 0.5  # every second row, and column where there are columns to repeat
    assert not touched[1::2].any()
    with torch.no_grad():
        dual.weight.add_(torch.randn_like(dual.weight))
    x = torch.randn(shape)
    plain = dual.plain()
    assert type(plain) is type(op)
    assert {name: value.shape for name, value in plain.state_dict().items()} == {
        name: value.shape for name, value in op.state_dict().items()
    }
    torch.testing.assert_close(plain(x), dual(x))
    assert repr(plain) == repr(op)


def test_a_narrow_op_of_its_own_does_not_move_with_the_wide_one():
    dual = dual_layer(nn.Linear(3, 4), 2, Mode(), inputs=True, outputs=True, shared=False)
    x = torch.randn(2, 3)
    before = dual(x)
    with torch.no_grad():
        dual.weight.zero_()
    assert torch.equal(dual(x), before)
    assert dual.plain().weight.data_ptr() != dual.own_weight.data_ptr()


@pytest.mark.parametrize("ratio", [2, 3])
def test_noise_tells_copies_apart_and_changes_neither_function(ratio):
    torch.manual_seed(0)
    op, mode, x = nn.Conv2d(8, 10, 3), Mode(), torch.randn(2, 8, 6, 6)
    dual = dual_layer(op, ratio, mode, inputs=True, outputs=True)
    before = dual.weight.clone()
    dual.perturb(0.1)
    moved = (dual.weight - before).detach()
    assert not moved[::ratio].any()  # the rows of the slice
    rows = moved.view(10, ratio, 8, ratio, 3, 3)[:, 1:]
    assert float(rows.std()) == pytest.approx(0.1, rel=0.05)
    assert float(rows.sum(3).abs().max()) < 1e-6
    assert torch.equal(dual(x), op(x)) or torch.allclose(dual(x), op(x), atol=1e-6)
    with mode:
        wide = dual(tile(x, ratio, (1,), divide=True))
    torch.testing.assert_close(wide, tile(op(x), ratio, (1,), divide=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.ConvTranspose2d(3, 3, 2), "another class"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), "no weight of its own"),
        (nn.BatchNorm2d(3, track_running_stats=False), "no statistics"),
        (nn.LayerNorm((3, 4)), "not the channels alone"),
    ],
)
def test_what_has_no_rule_is_not_guessed_at(layer, why):
    assert dual_layer(layer, 2, Mode(), inputs=True, outputs=True) is None, why


# --------------------------------------------------------------------------------------------- modules without parameters


class Swap(nn.Module):
    def forward(self, x):
        return x.flip(1)


@pytest.mark.parametrize(
    ("module", "shape", "wrapped"),
    [
        (nn.ReLU(inplace=True), (2, 4, 3, 3), None),
        (nn.MaxPool2d(2), (2, 4, 6, 6), None),
        (nn.Identity(), (2, 4), None),
        (nn.ReLU6(), (2, 4, 3, 3), (True, False)),
        (nn.SiLU(), (2, 4), (True, False)),
        (Swap(), (2, 4, 3, 3), None),  # a flip keeps the blocks of copies, and copies are alike
        (nn.ChannelShuffle(2), (2, 4, 3, 3), (False, True)),
        (nn.Flatten(), (2, 4, 3, 3), (False, True)),
        (nn.Softmax(1), (2, 4, 3, 3), (True, True)),
    ],
)
def test_modules_are_wrapped_where_they_need_it(module, shape, wrapped):
    mode, x = Mode(), 4.0 * torch.randn(shape)
    found = follow_copies(module, torch.Size(shape), 2, mode)
    assert (isinstance(found, PerCopy), wrapped) in ((False, None), (True, wrapped))
    if wrapped:
        assert (found.scaled, found.apart) == wrapped
    wanted = module(x.clone())
    assert torch.equal(found(x.clone()), wanted)
    with mode:
        torch.testing.assert_close(found(tile(x, 2, (1,), divide=True)), tile(wanted, 2, (1,), divide=True))


def test_what_mixes_images_is_refused():
    class Whiten(nn.Module):
        def forward(self, x):
            return x / x.square().sum()

    with pytest.raises(UnsupportedPairError, match=r"Whiten does not treat copies of its channels alike.*kd"):
        follow_copies(Whiten(), torch.Size((2, 4)), 2, Mode())


# --------------------------------------------------------------------------------------------------------- six branches


def slow_kernel(branches):
    """The branches as the convolutions that they stand for, one after the other, of the narrow mode."""
    get = {name: branches.read(name).detach() for name in branches._held}
    v = get["scales"][:, None, :, None, None]
    average, rows = torch.full((1, 1, 3, 3), 1.0 / 9.0), len(get["single"])

    def run(x):
        columns = x.shape[1]
        one = F.conv2d(x, get["average"][:, :, None, None])
        prior = F.conv2d(x, get["prior"][:, :, None, None])
        maps = F.conv2d(x, get["depthwise"].reshape(-1, 1, 3, 3), padding=1, groups=columns)
        every = [
            F.conv2d(x, get["single"], padding=1),
            F.conv2d(one, average.repeat(rows, 1, 1, 1), padding=1, groups=rows),
            F.conv2d(prior, branches.cosine[:, None], padding=1, groups=rows),
            F.conv2d(x + F.conv2d(x, get["before"][:, :, None, None]), get["after"], padding=1),
            F.conv2d(x, get["further"], padding=1),
            F.conv2d(maps, get["pointwise"].reshape(rows, -1, 1, 1)),
        ]
        return sum(v[number] * out for number, out in enumerate(every))

    return run


@pytest.mark.parametrize("start", ["pretrained", "scratch"])
@pytest.mark.parametrize(("inputs", "outputs"), [(True, True), (False, True), (True, False)])
def test_the_merged_kernel_is_the_six_branches(start, inputs, outputs):
    torch.manual_seed(0)
    conv, mode, x = nn.Conv2d(4, 5, 3, padding=1), Mode(), torch.randn(2, 4, 6, 6)
    branches = LinearBranches(conv, 2, mode, inputs=inputs, outputs=outputs, start=start)
    with torch.no_grad():
        branches.before.copy_(tile(torch.randn(4, 4), 2, (0, 1) if inputs else (), divide=inputs))
        if start == "scratch":
            branches.scales.add_(tile(torch.rand(6, 5), 2, (1,) if outputs else ()))
    dual = dual_layer(conv, 2, mode, inputs=inputs, outputs=outputs, kernel=branches)
    wanted = slow_kernel(branches)(x) + conv.bias[:, None, None]
    torch.testing.assert_close(dual(x), wanted, rtol=1e-4, atol=1e-5)
    if start == "pretrained":
        torch.testing.assert_close(dual(x), conv(x))
    with mode:
        wide = dual(tile(x, 2, (1,), divide=True) if inputs else x)
    torch.testing.assert_close(wide, tile(wanted, 2, (1,), divide=True) if outputs else wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dual.plain()(x), wanted, rtol=1e-4, atol=1e-5)
    assert set(dual.plain().state_dict()) == {"weight", "bias"}


def test_scales_start_as_published_and_every_branch_learns():
    conv = nn.Conv2d(4, 5, 3, padding=1)
    branches = LinearBranches(conv, 2, Mode(), inputs=True, outputs=True, start="scratch")
    assert branches.scales[:, 0].tolist() == pytest.approx([0.25, 0.25, 0.0, 0.5, 0.05, 0.5])
    branches.kernel().square().sum().backward()
    assert all(p.grad is not None for p in branches.parameters())


@pytest.mark.parametrize(
    ("op", "takes"),
    [
        (nn.Conv2d(4, 4, 3, padding="same"), True),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), False),
        (nn.Conv2d(4, 4, 3, padding=0), False),
        (nn.Conv2d(4, 4, 1), False),
        (nn.Conv2d(4, 4, 3, padding=1, dilation=2), False),
        (nn.Linear(4, 4), False),
    ],
)
def test_only_some_convolutions_take_branches(op, takes):
    assert takes_branches(op) is takes


# ------------------------------------------------------------------------------------------------------------ networks


def test_a_network_goes_there_and_back():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    widths = {"0": (torch.Size((2, 3, 3, 3)), False, True), "1": (torch.Size((2, 4, 1, 1)), True, True)}
    widths |= {"2.0": (torch.Size((2, 4, 1, 1)), True, True), "2.1": (torch.Size((2, 4)), True, False)}
    plain, mode, x = copy.deepcopy(net), Mode(), torch.randn(2, 3, 3, 3)
    replaced(net, duals(net, widths, 2, mode))
    with mode:
        torch.testing.assert_close(net(x), plain(x))
    back = plain_network(copy.deepcopy(net))
    assert str(back) == str(plain)
    assert torch.equal(back(x), plain(x))


def test_tied_weights_and_unknown_layers_are_refused():
    shape = torch.Size((2, 3))
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(UnsupportedPairError, match=r"0\.weight and 1\.weight of Sequential are one tensor"):
        duals(tied, {"0": (shape, False, True)}, 2, Mode())
    odd = nn.Sequential(nn.Linear(3, 3), nn.Bilinear(3, 3, 3), nn.Linear(3, 3))
    with pytest.raises(UnsupportedPairError, match="no rule to widen 1 of Sequential, a Bilinear"):
        duals(odd, {"1": (shape, True, True)}, 2, Mode())
    with pytest.raises(UnsupportedPairError, match="no channels between two layers"):
        duals(nn.Sequential(nn.Linear(3, 3)), {}, 2, Mode())

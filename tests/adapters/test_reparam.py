"""Branches of a linear op: the numbers of separate layers, and an exact way back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distillzoo.adapters.reparam import AfterNorm, Branched, check_not_frozen, check_not_tied, expand, fold, fold_network
from distillzoo.errors import OptionError, UnsupportedPairError

OPS = {
    "conv": lambda: (nn.Conv2d(6, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)),
    "biased": lambda: (nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12)),
    "grouped": lambda: (nn.Conv2d(6, 12, 1, groups=3, bias=False), nn.BatchNorm2d(12)),
    "depthwise": lambda: (nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.BatchNorm2d(6)),
    "dilated and strided": lambda: (nn.Conv2d(6, 12, 3, stride=2, dilation=2, padding=2), nn.BatchNorm2d(12)),
    "reflecting": lambda: (nn.Conv2d(6, 12, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(12)),
    "norm without affine map": lambda: (nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12, affine=False)),
    "conv alone": lambda: (nn.Conv2d(6, 12, 3, bias=False), None),
    "grouped alone": lambda: (nn.Conv2d(6, 12, 3, groups=2), None),
    "linear": lambda: (nn.Linear(6, 8), None),
    "linear and norm": lambda: (nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)),
}
M = 4


def images(op: nn.Module, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (5, 6, 9, 9) if isinstance(op, nn.Conv2d) else (5, 6)
    return torch.randn(*shape, generator=generator).mul(1.5).add(0.3)


@pytest.mark.parametrize("kind", OPS)
def test_the_output_is_the_mean_of_layers_that_each_keep_statistics_of_their_own(kind):
    torch.manual_seed(0)
    branched = Branched(*OPS[kind](), M).double()
    apart = copy.deepcopy(branched.branches)
    for seed in range(3):
        x = images(branched.branches[0].op, seed).double()
        together, alone = branched(x), torch.stack([layer(x) for layer in apart]).mean(0)
        torch.testing.assert_close(together, alone)
    together.square().sum().backward()
    alone.square().sum().backward()
    for (name, one), other in zip(branched.branches.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    after = branched.branches.state_dict()
    for name, tensor in apart.state_dict().items():
        torch.testing.assert_close(after[name], tensor, msg=name)


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
def test_folding_is_exact_after_ten_batches_of_training(kind, dtype, tolerance):
    torch.manual_seed(0)
    op, norm = OPS[kind]()
    plain_op, plain_norm = copy.deepcopy(op), copy.deepcopy(norm)
    branched, rest = expand(op.to(dtype), norm if norm is None else norm.to(dtype), M)
    optimiser = torch.optim.SGD(branched.parameters(), lr=0.1)
    for seed in range(10):
        branched(images(op, seed).to(dtype)).sin().sum().backward()
        optimiser.step()
    branched.eval()
    folded_op, folded_norm = fold(branched, rest)
    plain_op.to(dtype).load_state_dict(folded_op.state_dict())
    x = images(op, 11).to(dtype)
    result = plain_op(x)
    assert repr(folded_op) == repr(plain_op)
    if plain_norm is not None:
        plain_norm.to(dtype).eval().load_state_dict(folded_norm.state_dict())
        assert repr(folded_norm) == repr(plain_norm)
        result = plain_norm(result)
    expected = branched(x)
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_folded_norm_keeps_statistics_that_training_can_go_on_from():
    torch.manual_seed(0)
    op, norm = nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12, momentum=1.0)
    branched, rest = expand(op, norm, M)
    x = images(op)
    branched(x)
    folded, plain = fold(branched.eval(), rest)
    torch.testing.assert_close(plain.running_mean, folded(x).mean((0, 2, 3)), rtol=0, atol=1e-5)
    torch.testing.assert_close(plain.weight, (plain.running_var + plain.eps).sqrt())


def test_the_first_branch_keeps_the_weights_and_the_others_start_afresh_in_their_spread():
    torch.manual_seed(0)
    op, norm = nn.Conv2d(16, 32, 3, groups=2), nn.BatchNorm2d(32)
    with torch.no_grad():
        op.weight.mul_(7.0)
        norm.weight.uniform_(2.0, 3.0)
        norm.bias.uniform_(2.0, 3.0)
        norm.running_var.fill_(5.0)
    branched = Branched(op, norm, M)
    apart = branched.branches
    assert torch.equal(apart[0][0].weight, op.weight)
    for name, tensor in norm.state_dict().items():
        assert torch.equal(apart[0][1].state_dict()[name], tensor)
    for i in range(1, M):
        assert not torch.equal(apart[i][0].weight, apart[i - 1][0].weight)
        torch.testing.assert_close(apart[i][0].weight.std(), op.weight.std())
        for name, tensor in nn.BatchNorm2d(32).state_dict().items():
            assert torch.equal(apart[i][1].state_dict()[name], tensor)


@pytest.mark.parametrize("scale", [0.0, 0.2, 1.0])
def test_a_norm_that_the_network_starts_elsewhere_starts_there_in_every_branch(scale):
    norm = nn.BatchNorm2d(8)
    nn.init.constant_(norm.weight, scale)
    nn.init.constant_(norm.bias, -3.0)
    for branch in Branched(nn.Conv2d(3, 8, 1), norm, M).branches:
        assert torch.equal(branch.norm.weight, torch.full((8,), scale))
        assert torch.equal(branch.norm.bias, torch.full((8,), -3.0))
        assert branch.norm.weight.requires_grad


def test_weights_that_are_all_zero_stay_so_in_the_first_branch_only():
    op = nn.Conv2d(3, 4, 1, bias=False)
    nn.init.zeros_(op.weight)
    first, second = Branched(op, None, 2).branches
    assert not first.op.weight.any()
    assert second.op.weight.all()


class NormAct(nn.BatchNorm2d):
    """A norm with its activation inside, as some libraries fuse them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


def test_a_norm_with_its_activation_inside_is_taken_apart_and_put_together_again():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(6, 8, 3), NormAct(8))
    plain = copy.deepcopy(network)
    network[0], network[1] = expand(network[0], network[1], M)
    assert isinstance(network[1], AfterNorm)
    assert isinstance(network.get_submodule("1.act"), nn.ReLU)
    for seed in range(10):
        network(images(plain[0], seed))
    x = images(plain[0], 11)
    folded = fold_network(copy.deepcopy(network).eval(), {"0": "1"})
    plain.eval().load_state_dict(folded.state_dict())
    assert repr(plain) == repr(folded)
    torch.testing.assert_close(folded(x), network.eval()(x))
    torch.testing.assert_close(plain(x), network(x))
    assert (plain(x) == 0).any()


def test_folding_leaves_the_branches_as_they_were_and_shares_nothing():
    op, norm = OPS["biased"]()
    branched, rest = expand(op, norm, M)
    before = {name: tensor.clone() for name, tensor in branched.state_dict().items()}
    for layer in fold(branched, rest):
        for tensor in layer.state_dict().values():
            tensor.fill_(3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in branched.state_dict().items())


def test_what_is_frozen_stays_frozen():
    op, norm = OPS["biased"]()
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    for frozen in (op.weight, op.bias, norm.bias):
        frozen.requires_grad_(False)
    branched, rest = expand(op, norm, M)
    for branch in branched.branches:
        for parameter, given in ((branch.op.weight, op.weight), (branch.op.bias, op.bias), (branch.norm.bias, norm.bias)):
            assert not parameter.requires_grad
            assert torch.equal(parameter, given)
        assert branch.norm.weight.requires_grad
    assert not fold(branched, rest)[0].weight.requires_grad


def test_a_frozen_op_is_refused():
    network = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1))
    network[1].requires_grad_(False)
    network[2].weight.requires_grad_(False)
    check_not_frozen(network, ["0"])
    with pytest.raises(UnsupportedPairError, match=r"2\.weight of Sequential requires no gradient.*unfreeze it.*layers="):
        check_not_frozen(network, ["0", "2"])


def test_one_branch_is_the_layer_itself():
    op, norm = OPS["conv"]()
    branched = Branched(op, norm, 1)
    x = images(op)
    torch.testing.assert_close(branched(x), norm(op(x)))


def test_a_linear_layer_reads_tokens_and_channels_last_maps():
    op = nn.Linear(6, 8)
    branched = Branched(op, None, 2)
    tokens = torch.randn(2, 5, 5, 6)
    weight, bias = (torch.stack([getattr(branch.op, name) for branch in branched.branches]).mean(0) for name in ("weight", "bias"))
    torch.testing.assert_close(branched(tokens), F.linear(tokens, weight, bias))


def test_layers_that_share_no_tensor_with_others_are_taken():
    network = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))
    network[3].weight = network[2].weight
    check_not_tied(network, {"0": "1"})  # what is tied elsewhere stays so


@pytest.mark.parametrize(
    ("tie", "names"),
    [
        (lambda net: setattr(net[2], "weight", net[0].weight), r"0\.weight and 2\.weight"),
        (lambda net: net.add_module("3", net[0]), r"0\.weight and 3\.weight"),
        (lambda net: net.add_module("3", net[1]), r"1\.weight and 3\.weight"),
        (lambda net: setattr(net[3], "running_var", net[1].running_var), r"1\.running_var and 3\.running_var"),
    ],
    ids=["parameter", "op", "norm", "statistics"],
)
def test_layers_that_share_a_tensor_with_others_are_refused(tie, names):
    network = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    tie(network)
    with pytest.raises(UnsupportedPairError, match=names + r" of Sequential are one tensor.*layers=.*taps="):
        check_not_tied(network, {"0": "1"})


def test_what_has_no_weight_or_no_statistics_is_refused():
    with pytest.raises(OptionError, match=r"got ReLU, which has no weight"):
        Branched(nn.ReLU(), None, 2)
    with pytest.raises(OptionError, match=r"got GroupNorm.*Leave it out"):
        Branched(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), 2)

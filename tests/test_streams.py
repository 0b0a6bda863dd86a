from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distillzoo.errors import OptionError
from distillzoo.streams import Stream, draw_seed, forked_generator

STREAM = Stream.named(0, "tests", "values")
MASK = (1 << 32) - 1


def slow_bits(root: int, step: int, index: int) -> int:
    """The hash in Python's own integers, written from the module's description."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
        x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
        return x ^ (x >> 16)

    m64 = (1 << 64) - 1
    key = (root + (step + 1) * 0x9E3779B97F4A7C15) & m64
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & m64
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & m64
    key ^= key >> 31
    x = mix(((index & MASK) * 0x7F4A7C15 ^ key) & MASK)
    return mix((x ^ (index >> 32) ^ (key >> 32)) & MASK)


def test_known_values_never_change():
    index = torch.tensor([0, 1, 2, 1 << 40])
    assert Stream.named(0, "tests", "values").bits(0, index).tolist() == [691749457, 404801876, 2541361187, 694472248]
    assert Stream.named(7, "views", 3).permutation(2, 8).tolist() == [4, 3, 5, 6, 0, 2, 7, 1]
    assert Stream.named(7, "views", 3).seed(5) == 2209974914942453762


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**62), step=st.integers(0, 2**40), index=st.integers(0, 2**63 - 1))
def test_bits_equal_the_slow_form(seed, step, index):
    stream = Stream.named(seed, "slow")
    assert stream.bits(step, torch.tensor([index])).item() == slow_bits(stream.root, step, index)


def test_a_draw_depends_on_its_own_step_and_index_alone():
    index = torch.arange(1000)
    whole = STREAM.bits(3, index)
    order = torch.tensor(random.Random(0).sample(range(1000), 1000))
    assert torch.equal(STREAM.bits(3, index[order]), whole[order])
    assert torch.equal(STREAM.bits(3, index.view(10, 100)), whole.view(10, 100))
    assert STREAM.bits(3, torch.tensor(17)).item() == whole[17].item()
    assert torch.equal(STREAM.bits(3, index.to(torch.int32)), whole)


@pytest.mark.parametrize("draw", ["bits", "uniform", "normal"])
def test_a_step_in_a_tensor_equals_the_number(draw):
    index = torch.arange(64)
    for step in (0, 1, 12345, 2**40):
        assert torch.equal(getattr(STREAM, draw)(step, index), getattr(STREAM, draw)(torch.tensor(step), index))


def test_streams_steps_and_seeds_are_unlike_each_other():
    index = torch.arange(4096)
    draws = [Stream.named(*key).bits(step, index) for key in ((0, "a"), (0, "b"), (1, "a"), (0, "a", "b")) for step in (0, 1)]
    for one in range(len(draws)):
        for other in range(one):
            assert (draws[one] == draws[other]).float().mean() < 0.01
            r = np.corrcoef(draws[one].double().numpy(), draws[other].double().numpy())[0, 1]
            assert abs(r) < 0.08
    assert Stream.named(1, "2") != Stream.named(12)


def test_uniform_values_are_uniform_below_one_and_have_24_bits():
    values = STREAM.uniform(0, torch.arange(100_000))
    assert values.dtype == torch.float32
    assert 0.0 <= values.min() < 1e-3
    assert 1.0 - 1e-3 < values.max() < 1.0
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-4
    assert torch.equal(values * 2**24, (values * 2**24).round())
    pairs = np.histogram2d(values[::2].numpy(), values[1::2].numpy(), bins=16)[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-4


def test_normal_values_are_normal():
    values = STREAM.normal(0, torch.arange(100_000))
    assert torch.isfinite(values).all()
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("high", [1, 2, 10, 1000, 2**31])
def test_integers_are_uniform_below_high(high):
    values = STREAM.integers(4, torch.arange(20_000), high)
    assert values.min() >= 0
    assert values.max() < high
    if 1 < high <= 1000:
        assert stats.chisquare(torch.bincount(values, minlength=high).numpy()).pvalue > 1e-4
    if high == 2**31:
        assert values.max() > 0.99 * high


def test_integers_take_a_tensor_of_bounds():
    high = torch.tensor([1, 5, 50]).repeat(500)
    values = STREAM.integers(0, torch.arange(1500), high)
    assert (values < high).all()
    assert (values >= 0).all()
    assert set(values[1::3].tolist()) == set(range(5))


@pytest.mark.parametrize("flip", [1 << 0, 1 << 7, 1 << 15, 1 << 31, 1 << 32, 1 << 45])
def test_a_flipped_index_bit_flips_half_of_the_bits(flip):
    index = torch.arange(8192)
    changed = STREAM.bits(0, index) ^ STREAM.bits(0, index ^ flip)
    each = torch.stack([((changed >> bit) & 1).double().mean() for bit in range(32)])
    assert (each - 0.5).abs().max() < 0.07


def test_a_neighbouring_step_flips_half_of_the_bits():
    steps = torch.stack([STREAM.bits(step, torch.tensor(5)) ^ STREAM.bits(step + 1, torch.tensor(5)) for step in range(1500)])
    each = torch.stack([((steps >> bit) & 1).double().mean() for bit in range(32)])
    assert (each - 0.5).abs().max() < 0.07


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000])
def test_a_permutation_is_one(size):
    order = STREAM.permutation(9, size)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(size))


def test_permutations_of_three_are_equally_frequent():
    seen = [tuple(STREAM.permutation(step, 3).tolist()) for step in range(1200)]
    counts = [seen.count(order) for order in set(seen)]
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-4


def test_draws_neither_read_nor_move_the_global_generator():
    before = torch.get_rng_state()
    one = (STREAM.normal(0, torch.arange(9)), STREAM.permutation(0, 9), STREAM.seed(3))
    assert torch.equal(before, torch.get_rng_state())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        other = (STREAM.normal(0, torch.arange(9)), STREAM.permutation(0, 9), STREAM.seed(3))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert one[2] == other[2]


def test_torch_compile_accepts_a_draw_whole():
    def draw(step, index):
        return STREAM.normal(step, index), STREAM.integers(step, index, 7)

    torch.compiler.reset()
    compiled = torch.compile(draw, fullgraph=True, backend="eager")
    for step in (torch.tensor(3), torch.tensor(4)):
        for one, other in zip(compiled(step, torch.arange(33)), draw(step, torch.arange(33)), strict=True):
            assert torch.equal(one, other)
    torch.compiler.reset()


def test_seeds_for_foreign_generators_are_63_bits_and_differ():
    seeds = [STREAM.seed(step) for step in range(1000)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds).bit_length() == 63


def test_a_drawn_seed_comes_from_torch_and_a_given_one_stays():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        one = draw_seed(None)
        torch.manual_seed(1)
        assert draw_seed(None) == one
        assert draw_seed(None) != one
    assert draw_seed(0) == 0
    assert draw_seed(2**100) == 2**100


@pytest.mark.parametrize("seed", [-1, True, 1.5, "3"])
def test_a_seed_that_is_no_natural_number_is_refused(seed):
    with pytest.raises(OptionError, match="non-negative integer"):
        draw_seed(seed)


def test_a_forked_generator_is_seeded_inside_and_untouched_outside():
    before = torch.get_rng_state()
    with forked_generator(STREAM, 4):
        one = torch.randn(3)
    assert torch.equal(before, torch.get_rng_state())
    with forked_generator(STREAM, 4):
        assert torch.equal(torch.randn(3), one)
    with forked_generator(STREAM, 5):
        assert not torch.equal(torch.randn(3), one)
    with pytest.raises(RuntimeError, match="inside"), forked_generator(STREAM):
        raise RuntimeError("inside")
    assert torch.equal(before, torch.get_rng_state())


def test_a_generator_forked_for_the_cpu_leaves_cuda_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with forked_generator(STREAM):
        torch.rand(1)
    assert seeded == []


def test_box_muller_is_what_normal_computes():
    index = torch.arange(50)
    u, v = STREAM.uniform(2, 2 * index).double(), STREAM.uniform(2, 2 * index + 1).double()
    expected = torch.sqrt(-2.0 * torch.log(1.0 - u)) * torch.cos(2.0 * math.pi * v)
    torch.testing.assert_close(STREAM.normal(2, index).double(), expected, rtol=1e-4, atol=1e-5)

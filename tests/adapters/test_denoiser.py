import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from distillzoo.adapters import denoiser
from distillzoo.errors import OptionError, ShapeError
from tests.methods.oracles import sine

LEVELS = {400: (0.440, 0.898), 300: (0.628, 0.779), 200: (0.810, 0.586), 100: (0.946, 0.324), 0: (0.99995, 0.010)}


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts its networks from the same weights, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def test_alpha_bars_are_the_products_of_one_minus_beta():
    for steps in (1000, 20):
        levels, product = denoiser.alpha_bars(steps), 1.0
        for t in range(steps):
            product *= 1.0 - (1e-4 + (0.02 - 1e-4) * t / (steps - 1))
            assert levels[t].item() == pytest.approx(product, rel=1e-9)
        assert len(levels) == steps


def test_the_schedule_is_the_published_one():
    schedule = denoiser.ddim_schedule()
    assert [time for time, _ in schedule] == [400, 300, 200, 100, 0]
    for time, level in schedule:
        signal, noise = LEVELS[time]
        assert math.sqrt(level) == pytest.approx(signal, abs=6e-4 if time else 6e-6)
        assert math.sqrt(1 - level) == pytest.approx(noise, abs=6e-4 if time else 6e-6)
    assert [time for time, _ in denoiser.ddim_schedule(3, 1000)] == [332, 166, 0]
    assert [time for time, _ in denoiser.ddim_schedule(1, 2)] == [0]


@pytest.mark.parametrize("counts", [(0, 1000), (-1, 1000), (5, 9), (5, 1281), (2.0, 1000), (5, "1000"), (True, 1000)])
def test_times_that_cannot_be_are_refused(counts):
    with pytest.raises(OptionError, match=r"denoise_steps .* 1280"):
        denoiser.ddim_schedule(*counts)


@pytest.mark.parametrize("cleaner", [0.6563, 1.0])
def test_one_step_written_out(cleaner):
    x, e = sine(2, 3, 2, 2, alpha=0.3, delta=0.4), sine(2, 3, 2, 2, alpha=1.1)
    level = 0.394011
    origin = (x.numpy() - np.sqrt(1 - level) * e.numpy()) / np.sqrt(level)
    expected = np.sqrt(cleaner) * origin + np.sqrt(1 - cleaner) * e.numpy()
    np.testing.assert_allclose(denoiser.ddim_step(x, e, level, cleaner).numpy(), expected, rtol=0, atol=1e-12)


def test_who_knows_the_noise_recovers_the_feature_in_any_number_of_steps():
    clean, noise = sine(3, 4, 2, 2, alpha=0.7), sine(3, 4, 2, 2, alpha=1.7, delta=0.2)
    for steps in (1, 2, 5):
        schedule = denoiser.ddim_schedule(steps)
        seen = []

        def predictor(noisy, times, seen=seen):
            seen.append((noisy, times))
            return noise

        level = schedule[0][1]
        noisy = math.sqrt(level) * clean + math.sqrt(1 - level) * noise
        torch.testing.assert_close(denoiser.denoise(noisy, predictor, schedule), clean, rtol=0, atol=1e-12)
        assert [times.tolist() for _, times in seen] == [[time] * 3 for time, _ in schedule]
        for (fed, _), (_, level) in zip(seen, schedule, strict=True):  # on the way it is the feature noised for that time
            torch.testing.assert_close(fed, math.sqrt(level) * clean + math.sqrt(1 - level) * noise, rtol=0, atol=1e-12)


def test_every_step_of_the_chain_hands_gradients_on():
    """With e = s_k x every step multiplies x, so value and slopes are products."""
    scales = [0.3, -0.2, 0.5, 0.1, 0.7]
    feature = sine(2, 3, 1, 1, alpha=0.7, delta=0.1).requires_grad_()
    scale = torch.tensor(scales, dtype=torch.float64, requires_grad=True)
    calls = iter(range(5))
    schedule = denoiser.ddim_schedule()
    denoiser.denoise(feature, lambda noisy, _: scale[next(calls)] * noisy, schedule).sum().backward()
    levels = [level for _, level in schedule] + [1.0]
    kept = [math.sqrt(b / a) for a, b in pairwise(levels)]
    added = [math.sqrt(1 - b) - math.sqrt(b / a) * math.sqrt(1 - a) for a, b in pairwise(levels)]
    factors = [k + a * s for k, a, s in zip(kept, added, scales, strict=True)]
    torch.testing.assert_close(feature.grad, torch.full_like(feature, math.prod(factors)))
    slopes = [math.prod(factors) / factor * a * feature.sum().item() for factor, a in zip(factors, added, strict=True)]
    torch.testing.assert_close(scale.grad, torch.tensor(slopes, dtype=torch.float64))


def test_noise_is_mixed_in_linearly_by_sample():
    z, e = sine(3, 2, 2, 2, alpha=0.7), sine(3, 2, 2, 2, alpha=1.7, delta=0.2)
    share = torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64)
    mixed = denoiser.mix_noise(z, e, share)
    torch.testing.assert_close(mixed[0], z[0])
    torch.testing.assert_close(mixed[1], 0.25 * z[1] + 0.75 * e[1])  # neither root of either
    torch.testing.assert_close(mixed[2], e[2])
    torch.testing.assert_close(denoiser.mix_noise(2 * z, 2 * e, share), 2 * mixed)


def test_half_types_are_computed_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        x, e = sine(2, 3, 2, 2, alpha=0.3).to(dtype), sine(2, 3, 2, 2, alpha=1.1).to(dtype)
        step = denoiser.ddim_step(x, e, 0.2, 0.4)
        assert step.dtype == torch.float32
        torch.testing.assert_close(step, denoiser.ddim_step(x.float(), e.float(), 0.2, 0.4), rtol=0, atol=0)
        assert denoiser.mix_noise(x, e, torch.full((2,), 0.3, dtype=dtype)).dtype == torch.float32
        assert denoiser.denoise(x, lambda noisy, _: noisy, denoiser.ddim_schedule()).dtype == torch.float32


def test_shapes_that_do_not_fit_are_refused():
    x, y = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 1)
    with pytest.raises(ShapeError, match="ddim_step"):
        denoiser.ddim_step(x, y, 0.2, 0.4)
    for noise, share in ((y, torch.ones(2)), (x, torch.ones(3)), (x, torch.ones(2, 1)), (x, torch.ones(()))):
        with pytest.raises(ShapeError, match="mix_noise"):
            denoiser.mix_noise(x, noise, share)


# ------------------------------------------------------------------------------------------------------- the modules


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes_are_the_published_ones():
    """Written out for 16 and 10 channels, with every bias."""
    bottleneck = (16 * 4 + 4) + 8 + (4 * 4 * 9 + 4) + 8 + (4 * 16 + 16) + 32
    assert parameters(denoiser.NoisePredictor(16, 3)) == 1280 * 16 + 2 * bottleneck + (16 * 16 + 16) + 32
    half = (10 * 40 + 40) + 80 + (40 * 10 + 10)
    assert parameters(denoiser.NoisePredictor(10, 1)) == 1280 * 10 + half + 20 + half
    narrow = (16 * 2 + 2) + 4 + (2 * 2 * 9 + 2) + 4 + (2 * 16 + 16) + 32
    assert parameters(denoiser.NoiseAdapter(16, 3)) == narrow + 16 * 2 + 2
    assert parameters(denoiser.NoiseAdapter(10, 1)) == (10 * 20 + 20) + 40 + (20 * 10 + 10) + 20 + 10 * 2 + 2
    assert parameters(denoiser.LinearAutoencoder(6, 4)) == (6 * 4 + 4) + 8 + (4 * 6 + 6)


@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_any_width_and_batch_works(channels, kernel_size):
    for size in (1, 2, 5):
        x = sine(size, channels, 1, 1, alpha=0.7).float()
        noise = denoiser.NoisePredictor(channels, kernel_size)(x, torch.arange(size))
        share = denoiser.NoiseAdapter(channels, kernel_size)(x)
        assert noise.shape == x.shape
        assert share.shape == (size,)
        assert noise.isfinite().all()
        assert ((share > 0) & (share < 1)).all()


def test_a_bottleneck_adds_its_input_and_rectifies_nothing_after():
    block = denoiser.Bottleneck(8, 4).double()
    x = sine(2, 8, 3, 3, alpha=0.7)
    change = block(x) - x
    assert (block(x) < 0).any()
    nn.init.constant_(block.block[-1].weight, 2.0)
    torch.testing.assert_close(block(x) - x, 2 * change)
    nn.init.zeros_(block.block[-1].weight)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_time_is_an_embedding_added_everywhere(kernel_size):
    predictor = denoiser.NoisePredictor(8, kernel_size).double()
    x, times = sine(3, 8, 2, 2, alpha=0.7), torch.tensor([0, 999, 1279])
    shifted = x + torch.stack([predictor.time.weight[t] for t in times])[:, :, None, None]
    with torch.no_grad():
        expected = predictor(x, times)
        predictor.time.weight.zero_()
        torch.testing.assert_close(predictor(shifted, times), expected)
        assert not torch.allclose(predictor(x, times), expected)
    # only maps are looked at with neighbours; the last norm centres what maps predict
    assert any(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in predictor.modules()) == (kernel_size == 3)
    assert isinstance(predictor.body[-1], denoiser.DenoiserNorm if kernel_size == 3 else nn.Conv2d)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_share_is_the_first_of_two_probabilities_one_a_sample(kernel_size):
    adapter = denoiser.NoiseAdapter(8, kernel_size).double()
    x = sine(4, 8, 3, 3, alpha=0.7)
    assert len(adapter(x).unique()) == 4
    with torch.no_grad():
        adapter.choice.weight.zero_()
        adapter.choice.bias.copy_(torch.tensor([math.log(3.0), 0.0]))
    torch.testing.assert_close(adapter(x), torch.full((4,), 0.75, dtype=torch.float64))


def test_the_autoencoder_is_affine_and_its_latent_normalised():
    autoencoder = denoiser.LinearAutoencoder(6, 4).double()
    x, y = sine(5, 6, 3, 3, alpha=0.7) * 9 + 4, sine(5, 6, 3, 3, alpha=1.3)
    latent, restored = autoencoder(x)
    torch.testing.assert_close(latent.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(latent.var((0, 2, 3), unbiased=False), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-3)
    assert restored.shape == x.shape
    autoencoder.encoder[1] = nn.Identity()  # what normalises apart
    for of_mean, of_x, of_y in zip(autoencoder((x + y) / 2), autoencoder(x), autoencoder(y), strict=True):
        torch.testing.assert_close(of_mean, (of_x + of_y) / 2)


def test_a_norm_follows_the_batch_in_eval_mode():
    x = sine(4, 3, 2, 2, alpha=0.7, scale=5.0).float() + 2
    norm = denoiser.DenoiserNorm(3)
    trained = norm(x)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    norm.eval()
    torch.testing.assert_close(norm(x), trained)
    assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items())
    one = torch.full((1, 3, 1, 1), 7.0)
    for mode in (True, False):  # one value a channel has no variance: the running statistics serve
        expected = (one - norm.running_mean.view(1, 3, 1, 1)) / (norm.running_var + norm.eps).sqrt().view(1, 3, 1, 1)
        torch.testing.assert_close(norm.train(mode)(one), expected)

"""A small diffusion model of features: its times, a linear autoencoder, a noise predictor, an adapter that says how much to add.

Widths and layers are those of DiffKD (Huang et al., NeurIPS 2023); biases stand before norms too, as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo.adapters.connectors import EdgeSafeBatchNorm2d, full_precision
from distillzoo.errors import OptionError, ShapeError
from distillzoo.kinds import is_whole

__all__ = [
    "MOST_TIMES",
    "Bottleneck",
    "DenoiserNorm",
    "KernelSize",
    "LinearAutoencoder",
    "NoiseAdapter",
    "NoisePredictor",
    "Predictor",
    "alpha_bars",
    "check_shapes",
    "ddim_schedule",
    "ddim_step",
    "denoise",
    "mix_noise",
]

KernelSize = Literal[1, 3]
"""3 for maps: bottlenecks with a 3x3 convolution. 1 for vectors as ``(B, D, 1, 1)``: 1x1 convolutions, wide in the middle."""

Predictor = Callable[[Tensor, Tensor], Tensor]
"""Maps a noisy feature ``(B, C, H, W)`` and int64 times ``(B,)`` to noise."""

MOST_TIMES = 1280
"""Rows of the table of time embeddings."""


def alpha_bars(train_steps: int = 1000) -> Tensor:
    """Return the signal's part of the variance at every time: the running product of 1 - beta, beta linear from 1e-4 to 0.02.

    Args:
        train_steps: Number of times T.
    Returns:
        ``(T,)``, double precision.
    """
    return torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, train_steps, dtype=torch.float64), 0)


def ddim_schedule(denoise_steps: int = 5, train_steps: int = 1000) -> tuple[tuple[int, float], ...]:
    """Return the times at which a feature is denoised, noisy to clean, each with its alpha-bar: the last half of 2n even steps.

    Args:
        denoise_steps: Number of steps n.
        train_steps: Number of times T, from 2n to 1280 (rows of the time embedding).
    Raises:
        OptionError: If a number is out of range.
    Example:
        >>> [time for time, _ in ddim_schedule(5, 1000)]
        [400, 300, 200, 100, 0]
    """
    if not (is_whole(denoise_steps, 1) and is_whole(train_steps)) or not 2 * denoise_steps <= train_steps <= MOST_TIMES:
        raise OptionError(
            f"denoise_steps is an integer n of at least 1, train_steps one from 2n to {MOST_TIMES}; "
            f"got {denoise_steps!r} and {train_steps!r}. The authors' are 5 and 1000."
        )
    levels, stride = alpha_bars(train_steps).tolist(), train_steps // (2 * denoise_steps)
    return tuple((step * stride, levels[step * stride]) for step in reversed(range(denoise_steps)))


def ddim_step(noisy: Tensor, predicted_noise: Tensor, alpha_bar: float, cleaner: float) -> Tensor:
    """Take one deterministic step: x_0 = (x - sqrt(1 - a) e) / sqrt(a); the result is sqrt(a') x_0 + sqrt(1 - a') e.

    Args:
        noisy: x, of any shape.
        predicted_noise: e, of the same shape.
        alpha_bar: a, alpha-bar at the time of ``noisy``, in (0, 1].
        cleaner: a', alpha-bar at the time of the result; 1 is clean.
    Raises:
        ShapeError: If the shapes differ.
    """
    check_shapes("ddim_step", noisy, predicted_noise)
    kept = math.sqrt(cleaner / alpha_bar)  # x_0 put into the result leaves one coefficient for x and one for e
    added = math.sqrt(1.0 - cleaner) - kept * math.sqrt(1.0 - alpha_bar)
    return kept * full_precision(noisy) + added * full_precision(predicted_noise)


def denoise(noisy: Tensor, predictor: Predictor, schedule: Sequence[tuple[int, float]]) -> Tensor:
    """Denoise a feature step by step; gradients flow through every step, into the feature and the predictor.

    Args:
        noisy: ``(B, C, H, W)`` at the first time of the schedule.
        predictor: Maps a noisy feature and int64 times ``(B,)`` to noise.
        schedule: Times with their alpha-bars, noisy to clean, as :func:`ddim_schedule` gives; the last step ends at alpha-bar 1.
    """
    running, levels = full_precision(noisy), [level for _, level in schedule]
    for (time, level), cleaner in zip(schedule, (*levels[1:], 1.0), strict=True):
        times = torch.full((len(running),), time, dtype=torch.int64, device=running.device)
        running = ddim_step(running, predictor(running, times), level, cleaner)
    return running


def mix_noise(features: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """Return g z + (1 - g) e: linear, so that the variance is not preserved.

    Args:
        features: z, ``(B, C, H, W)``.
        noise: e, of the same shape.
        share: g, ``(B,)``, from 0 to 1.
    Raises:
        ShapeError: If the shapes do not fit.
    """
    check_shapes("mix_noise", features, noise, share)
    share = full_precision(share).view(-1, *[1] * (features.ndim - 1))
    return share * full_precision(features) + (1.0 - share) * full_precision(noise)


def check_shapes(name: str, first: Tensor, second: Tensor, rows: Tensor | None = None) -> None:
    """Raise ShapeError unless two tensors have one shape and ``rows``, if given, has one value for each of their rows."""
    if first.shape != second.shape or (rows is not None and rows.shape != first.shape[:1]):
        got = [tuple(x.shape) for x in (first, second, rows) if x is not None]
        raise ShapeError(f"{name} needs two tensors of one shape, with one value a sample beside them if it takes one; got {got}.")


class DenoiserNorm(EdgeSafeBatchNorm2d):
    """Batch norm that normalises by the batch in eval mode too, where the running statistics stay as they are.

    A noise predictor reads noised targets and half-denoised sources in turn: its running statistics are a blend that fits neither.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Map ``(B, C, H, W)`` to the same shape."""
        if self.training or input.numel() == self.num_features:
            return super().forward(input)
        return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)


class LinearAutoencoder(nn.Module):
    """A 1x1 convolution with batch norm to another width, and a 1x1 convolution back; no activation.

    Args:
        channels: Channels of the input.
        latent_channels: Channels in between.
    Example:
        >>> latent, restored = LinearAutoencoder(6, 4)(torch.zeros(2, 6, 3, 3))
        >>> latent.shape, restored.shape
        (torch.Size([2, 4, 3, 3]), torch.Size([2, 6, 3, 3]))
    """

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(channels, latent_channels, 1), DenoiserNorm(latent_channels))
        self.decoder = nn.Conv2d(latent_channels, channels, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(B, channels, H, W)`` to the latent ``(B, latent_channels, H, W)`` and the restored ``(B, channels, H, W)``."""
        latent = self.encoder(features)
        return latent, self.decoder(latent)


class Bottleneck(nn.Module):
    """A 1x1 convolution to a fraction of the width, a 3x3 and a 1x1 back, each with batch norm; the input is added, no ReLU after.

    Args:
        channels: Channels of input and output.
        reduction: What the width is divided by in the middle, where one channel at least is left.
    Example:
        >>> Bottleneck(8, 4)(torch.zeros(2, 8, 3, 3)).shape
        torch.Size([2, 8, 3, 3])
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        middle = max(channels // reduction, 1)
        self.block = nn.Sequential(
            nn.Conv2d(channels, middle, 1),
            DenoiserNorm(middle),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 3, padding=1),
            DenoiserNorm(middle),
            nn.ReLU(),
            nn.Conv2d(middle, channels, 1),
            DenoiserNorm(channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(B, channels, H, W)`` to the same shape."""
        out: Tensor = features + self.block(features)
        return out


class NoisePredictor(nn.Module):
    """Predict the noise in a noised feature from it and the time; nothing else is given.

    The embedding of the time is added to every position. Kernel 3: two :class:`Bottleneck` of reduction 4, a 1x1 convolution and
    batch norm. Kernel 1: twice a 1x1 convolution to four times the width, batch norm, ReLU and a 1x1 convolution back, with a
    batch norm between the two halves.

    Args:
        channels: Channels of the feature.
        kernel_size: 3 for maps, 1 for vectors.
    Example:
        >>> NoisePredictor(8, 3)(torch.zeros(2, 8, 3, 3), torch.tensor([0, 999])).shape
        torch.Size([2, 8, 3, 3])
    """

    def __init__(self, channels: int, kernel_size: KernelSize = 3) -> None:
        super().__init__()
        self.time = nn.Embedding(MOST_TIMES, channels)
        if kernel_size == 3:
            layers = [Bottleneck(channels, 4), Bottleneck(channels, 4), nn.Conv2d(channels, channels, 1), DenoiserNorm(channels)]
            self.body = nn.Sequential(*layers)
        else:
            self.body = nn.Sequential(*_widened(channels, 4), DenoiserNorm(channels), *_widened(channels, 4))

    def forward(self, noisy: Tensor, times: Tensor) -> Tensor:
        """Map ``(B, channels, H, W)`` and int64 times ``(B,)``, below :data:`MOST_TIMES`, to noise of the same shape."""
        noise: Tensor = self.body(noisy + self.time(times)[:, :, None, None])
        return noise


class NoiseAdapter(nn.Module):
    """Say for every sample which share of it is signal, from 0 to 1; the rest is to be made noise.

    Kernel 3: a :class:`Bottleneck` of reduction 8, averaged over the positions. Kernel 1: a 1x1 convolution to twice the width,
    batch norm, ReLU, a 1x1 convolution back, batch norm. Then a linear layer to two values: the first of their softmax.

    Args:
        channels: Channels of the feature.
        kernel_size: 3 for maps, 1 for vectors.
    Example:
        >>> NoiseAdapter(8, 3)(torch.zeros(2, 8, 3, 3)).shape
        torch.Size([2])
    """

    def __init__(self, channels: int, kernel_size: KernelSize = 3) -> None:
        super().__init__()
        if kernel_size == 3:
            self.features: nn.Module = Bottleneck(channels, 8)
        else:
            self.features = nn.Sequential(*_widened(channels, 2), DenoiserNorm(channels))
        self.choice = nn.Linear(channels, 2)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(B, channels, H, W)`` to ``(B,)``."""
        pooled = self.features(features).mean((2, 3))
        share: Tensor = self.choice(pooled).softmax(1)[:, 0]
        return share


def _widened(channels: int, factor: int) -> list[nn.Module]:
    """A 1x1 convolution to ``factor`` times the width, batch norm, ReLU, and a 1x1 convolution back."""
    wide = factor * channels
    return [nn.Conv2d(channels, wide, 1), DenoiserNorm(wide), nn.ReLU(), nn.Conv2d(wide, channels, 1)]

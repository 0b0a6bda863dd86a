"""The diffusion process between a feature and noise: amplitudes over time, the reverse posterior, and what plays the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from distillzoo.adapters.memory import rank_positions
from distillzoo.errors import OptionError
from distillzoo.kinds import check_choice, is_whole
from distillzoo.streams import Stream

__all__ = ["AmplitudeSchedule", "Noise", "Start", "diffusion_amplitudes", "draw_noise", "posterior_coefficients", "reverse_chain"]

AmplitudeSchedule = Literal["linear_amplitude", "cosine", "ddpm"]
Noise = Literal["student", "student_same", "gaussian", "zero"]
Start = Literal["student", "shared_noise"]
_LEAST_AMPLITUDE = 1e-3  # of the first time: at 0 the posterior is not defined


def diffusion_amplitudes(schedule: AmplitudeSchedule, steps: int) -> tuple[float, ...]:
    """Return the amplitudes A_0 < ... < A_m = 1 of the clean feature at the m + 1 times of the forward process.

    Args:
        schedule: ``"linear_amplitude"``: A_k = k / m. ``"cosine"``: Nichol and Dhariwal's, with the offset 0.008. ``"ddpm"``: Ho,
            Jain and Abbeel's 1000 betas from 1e-4 to 0.02, read at time round(999 (1 - k / m)).
        steps: Number of steps m, at least 1.
    Raises:
        OptionError: If the schedule does not exist or there is no step.
    Example:
        >>> diffusion_amplitudes("linear_amplitude", 4)
        (0.001, 0.25, 0.5, 0.75, 1.0)
    """
    check_choice("schedule", schedule, AmplitudeSchedule)
    if not is_whole(steps, 1):
        raise OptionError(f"The number of branches (steps) is an integer of at least 1; got {steps!r}. Pass 4.")
    parts = [k / steps for k in range(steps)]
    if schedule == "ddpm":
        kept = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).sqrt().tolist()
        return (*(kept[round(999 * (1.0 - part))] for part in parts), 1.0)
    if schedule == "cosine":
        quarter = 0.5 * math.pi / 1.008
        parts = [math.cos(quarter * (1.008 - part)) / math.cos(quarter * 0.008) for part in parts]
    return (max(parts[0], _LEAST_AMPLITUDE), *parts[1:], 1.0)


def posterior_coefficients(amplitude: float, cleaner: float) -> tuple[float, float, float]:
    """Return (u, v, w) of the reverse posterior q(x_s | x_n, x_0) = N(u x_n + v x_0, w sigma^2) of a variance-preserving process.

    Args:
        amplitude: A_n of the noisier time, in (0, 1).
        cleaner: A_s of the cleaner time, in (A_n, 1].
    Example:
        >>> posterior_coefficients(0.5, 1.0)
        (0.0, 1.0, 0.0)
    """
    ratio = amplitude / cleaner
    noise, cleaner_noise, between = 1.0 - amplitude**2, 1.0 - cleaner**2, 1.0 - ratio**2
    return cleaner_noise * ratio / noise, between * cleaner / noise, between * cleaner_noise / noise


def reverse_chain(amplitudes: Sequence[float], *, start: Start = "student", teacher_forced: bool = False) -> Tensor:
    """Return the walk through the reverse process as a matrix: what remains at every step is linear in branches, target and noise.

    X_k = A_k x_0 + B_k e with B_k^2 = 1 - A_k^2; h_0 = z_1 or X_0, h_k = u_k h_{k-1} + v_k z_k; m_k = u_k X_{k-1} + v_k x_0.

    Args:
        amplitudes: A_0 .. A_m.
        start: ``"student"``: h_0 = z_1. ``"shared_noise"``: h_0 = X_0.
        teacher_forced: Whether X_{k-1} stands in the place of h_{k-1}: step k is then v_k (z_k - x_0).
    Returns:
        ``(m, m + 2)``, double precision: row k has the coefficients of z_1 .. z_m, x_0 and e in h_k - m_k.
    Example:
        >>> reverse_chain([0.5, 1.0])
        tensor([[ 1., -1.,  0.]], dtype=torch.float64)
    """
    steps = len(amplitudes) - 1
    unit = torch.eye(steps + 2, dtype=torch.float64)
    clean, noise = unit[steps], unit[steps + 1]
    noised = [amplitude * clean + math.sqrt(1.0 - amplitude**2) * noise for amplitude in amplitudes]
    running = unit[0] if start == "student" else noised[0]
    rows: list[Tensor] = []
    for k, (amplitude, cleaner) in enumerate(pairwise(amplitudes)):
        u, v, _ = posterior_coefficients(amplitude, cleaner)
        running = u * (noised[k] if teacher_forced else running) + v * unit[k]
        rows.append(running - (u * noised[k] + v * clean))
    return torch.stack(rows)


def draw_noise(kind: Noise, branches: Tensor, scale: Tensor, stream: Stream, step: Tensor) -> Tensor:
    """Draw the noise of the forward process.

    Args:
        kind: ``"student"``: a random branch for another sample of the batch, its channels centred; zero for a batch of one.
            ``"student_same"``: a random branch for the same sample, as it is. ``"gaussian"``: independent normal values of the
            deviation ``scale``, others in every process of a distributed run. ``"zero"``: none.
        branches: ``(m, B, C, H, W)``; no gradient flows into it.
        scale: ``(n, C)``: deviations of the channels, of which a random row counts.
        stream: What is drawn from.
        step: Which step of it, 0-dim.
    Returns:
        ``(B, C, H, W)``.
    """
    branches, batch, device = branches.detach(), branches.shape[1], branches.device
    if kind == "zero" or (kind == "student" and batch == 1):
        return torch.zeros_like(branches[0])
    index = torch.arange(2, device=device)  # a draw each: of branch or row, of the roll
    first, second = index[:1], index[1:]
    if kind == "gaussian":
        row = scale.detach().index_select(0, stream.integers(step, first, len(scale))).view(1, -1, 1, 1)
        normal = stream.normal(step, 1 + rank_positions(branches[0].numel(), device))
        return row * normal.view(branches.shape[1:]).to(branches.dtype)
    picked = branches.index_select(0, stream.integers(step, first, len(branches))).squeeze(0)
    if kind == "student_same":
        return picked
    shift = 1 + stream.integers(step, second, batch - 1)
    others = picked.index_select(0, (torch.arange(batch, device=device) + shift) % batch)
    return others - others.mean((0, 2, 3), keepdim=True)

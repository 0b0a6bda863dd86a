"""Optimiser, learning-rate schedule and weight averaging of one member, from torch's own parts."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR
from torch.optim.optimizer import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distillzoo.copying import detached_copy
from distillzoo.distiller import Distiller
from distillzoo.engine.config import TrainConfig
from distillzoo.errors import OptionError
from distillzoo.types import Phase

__all__ = ["check_trains", "gradient_norm_clipped", "make_averaged", "make_optimizer", "make_scheduler"]

_Tensors = list[Tensor] | tuple[Tensor, ...]


def check_trains(distiller: Distiller, phase: Phase) -> None:
    """Refuse a phase in which nothing would train.

    Args:
        distiller: Whose phase it is.
        phase: The phase.
    Raises:
        OptionError: If its patterns match no parameter.
    """
    if not any(_trains(name, phase) for group in distiller.param_groups() for name in group.names):
        raise OptionError(
            f"The phase {phase.name!r} of {type(distiller).__name__} trains nothing: no parameter matches {phase.trainable}; name "
            "some by the patterns of Phase(trainable=...)."
        )


def _trains(name: str, phase: Phase) -> bool:
    return phase.trainable is None or any(fnmatchcase(name, pattern) for pattern in phase.trainable)


def make_optimizer(distiller: Distiller, config: TrainConfig, phase: Phase) -> SGD:
    """Return SGD over the parameters that train in a phase; what the method exempts is not decayed.

    Raises:
        OptionError: If the phase's patterns match no parameter.
    """
    check_trains(distiller, phase)
    groups = []
    for group in distiller.param_groups():
        params = [parameter for name, parameter in zip(group.names, group.params, strict=True) if _trains(name, phase)]
        decayed = group.kind == "weight" or (group.kind == "norm_bias" and config.decay_norm_bias)
        if params:
            groups.append({"params": params, "weight_decay": config.weight_decay if decayed else 0.0})
    # One kernel for all tensors: the same update, and measurably faster on CPU and GPU.
    optimizer = SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    optimizer.register_step_pre_hook(_fill_momentum)
    return optimizer


def _fill_momentum(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001 - torch's hook
    """Give a tensor whose first gradient comes later than others' (its term weighed 0 before) the momentum 0.

    The fused kernel takes the momenta of a group all or none; from 0 its first step is the one that it would have had alone
    (dampening is 0). Where no tensor of a group has one, torch makes them.
    """
    for group in optimizer.param_groups:
        if not group["momentum"]:
            continue
        trained = [parameter for parameter in group["params"] if parameter.grad is not None]
        late = [parameter for parameter in trained if optimizer.state[parameter].get("momentum_buffer") is None]
        if len(late) < len(trained):
            for parameter in late:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)


def make_scheduler(optimizer: SGD, config: TrainConfig, *, epochs: int, steps_per_epoch: int) -> LRScheduler:
    """Return the learning-rate schedule, stepped once after every optimiser step.

    Args:
        optimizer: What it drives.
        config: Which schedule.
        epochs: Length of the phase in epochs.
        steps_per_epoch: Batches in an epoch.
    """
    total = epochs * steps_per_epoch
    if config.schedule == "step":
        return MultiStepLR(optimizer, [epoch * steps_per_epoch for epoch in config.milestones], gamma=config.gamma)
    if config.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=total)
    rising = config.warmup_fraction
    while rising * total == 1.0:  # torch divides by the steps of the rise after the first, here none: begin at the peak
        rising = math.nextafter(rising, 0.0)
    return OneCycleLR(optimizer, max_lr=config.lr, total_steps=total, pct_start=rising, cycle_momentum=False)


def make_averaged(distiller: Distiller, config: TrainConfig) -> AveragedModel | None:
    """Return the exponential average of the distiller's weights and buffers, or None where the recipe has none.

    What is not floating-point (indices, counters, masks) is copied: an average of it would be another index.
    """
    if config.ema_decay is None:
        return None
    average = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def average_or_copy(averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        if averaged[0].is_floating_point() or averaged[0].is_complex():  # a list has one type
            average(averaged, current, count)
        else:
            torch._foreach_copy_(averaged, current)

    averaged = AveragedModel(torch.nn.Identity(), multi_avg_fn=average_or_copy, use_buffers=True)
    averaged.module = detached_copy(distiller)  # whose tensors torch's own copy may refuse
    for parameter in averaged.parameters():
        parameter.requires_grad_(False)
    return averaged


def gradient_norm_clipped(distiller: Distiller, optimizer: Optimizer, limit: float) -> Tensor:
    """Scale the gradients of what trains so that their common norm is at most ``limit``; returns the norm before, on the device.

    Args:
        distiller: Whose parameters these are; their order is that of the sum.
        optimizer: What trains in this phase: other parameters have gradients too, which move nothing and do not count.
        limit: Largest norm.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return torch.nn.utils.clip_grad_norm_([each for each in distiller.parameters() if id(each) in trained], limit)

"""Refuse a batch or a teacher's trace that a distiller cannot train on, before it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distillzoo.errors import OptionError, ShapeError, TapError
from distillzoo.taps import Teacher
from distillzoo.types import Batch, DataSpec, Requires, Trace

__all__ = ["check_batch", "check_device", "checked_trace"]


def check_batch(batch: Batch, data: DataSpec, requires: Requires, name: str) -> None:
    """Refuse a batch by types and shapes, and by its labels where reading them costs nothing.

    Args:
        batch: The batch.
        data: What is known about the data.
        requires: What the distiller needs.
        name: The distiller's name.
    Raises:
        OptionError: If something that the distiller needs is missing.
        ShapeError: If images, targets and index do not fit.
    """
    images, targets = batch.images, batch.targets
    if not (isinstance(images, Tensor) and isinstance(targets, Tensor)):
        raise ShapeError(f"images and targets must be tensors; got {type(images).__name__}, {type(targets).__name__}.")
    if not images.is_floating_point():
        raise ShapeError(f"images must be floating-point and normalised; got {images.dtype}: scale and normalise them.")
    if images.ndim != 4 or not len(images):
        raise ShapeError(f"images must be (B, C, H, W) with B at least 1; got {tuple(images.shape)}.")
    if targets.ndim not in (1, 2) or len(targets) != len(images):
        raise ShapeError(
            f"targets must be (B,) labels or (B, num_classes) probabilities with B = {len(images)}; got {tuple(targets.shape)}."
        )
    check_values = _check_labels if targets.ndim == 1 else _check_probabilities
    check_values(targets, data.num_classes)
    if requires.hard_labels and targets.ndim != 1:
        raise OptionError(f"{name} needs class numbers; got soft targets {tuple(targets.shape)}: switch mixing off.")
    if requires.index:
        _check_positions(name, batch.index, len(images))
    if requires.second_view and batch.second_view is None:
        raise OptionError(f"{name} needs second_view=: another augmentation of the same images.")


def check_device(teacher: Teacher, images: Tensor) -> None:
    """Refuse images on another device than the teacher's; torch's own error names neither network.

    Args:
        teacher: The teacher; one that is spread over several devices is left to torch.
        images: The images.
    Raises:
        OptionError: If the devices differ.
    """
    like = next(teacher.module.parameters(), None)
    if like is not None and like.device != images.device and len({each.device for each in teacher.module.parameters()}) == 1:
        raise OptionError(
            f"The images lie on {images.device} and the teacher on {like.device}; move it: a distiller takes its teacher along, "
            "distiller.to(device)."
        )


def checked_trace(trace: Trace, teacher: Teacher, requires: Requires, name: str) -> Trace:
    """Return of a teacher's trace what a distiller asked for, and refuse one that lacks some of it.

    In a group the trace holds what others asked for as well, which a method must not come to depend on, nor pay for.

    Args:
        trace: The trace of the batch.
        teacher: The teacher with its taps.
        requires: What the distiller needs.
        name: The distiller's name.
    Raises:
        OptionError: If there is none of the second view.
        TapError: If it lacks a tap.
    """
    if requires.second_view and trace.second is None:
        raise OptionError(f"{name} needs the teacher's trace of the second view too: Trace.second is None.")
    taps = teacher.names(*requires.teacher_taps)
    second = _only(trace.second, taps) if requires.second_view and trace.second is not None else None
    return replace(_only(trace, taps), second=second)


def _only(trace: Trace, taps: Sequence[str]) -> Trace:
    missing = [tap for tap in taps if tap not in trace.features]
    if missing:
        raise TapError(f"The teacher's trace lacks {', '.join(missing)}; request them: teacher.request({missing[0]!r}, ...).")
    return Trace(trace.logits, {tap: trace.features[tap] for tap in taps})


def _check_probabilities(targets: Tensor, num_classes: int) -> None:
    if targets.shape[1] != num_classes:
        raise ShapeError(f"Soft targets must be (B, {num_classes}); got {tuple(targets.shape)}.")
    if not targets.is_floating_point():
        raise ShapeError(f"Soft targets must be floating-point probabilities; got {targets.dtype}: convert them.")


def _check_labels(targets: Tensor, num_classes: int) -> None:
    """Refuse labels that are no class; by their values only where reading them does not make the host wait for a device."""
    if targets.is_floating_point():
        raise ShapeError(f"Labels of shape (B,) must be integers; got {targets.dtype}: convert them, or pass probabilities.")
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low < 0 or high >= num_classes:
        raise ShapeError(f"Labels must be from 0 to {num_classes - 1}; got {low} to {high}: check the data set.")


def _check_positions(name: str, index: Any, count: int) -> None:
    """Refuse what are no positions of the samples, by type and shape alone: a shorter index would broadcast and train on."""
    if index is None:
        raise OptionError(f"{name} needs index=: the (B,) positions of the samples in the training set.")
    got = f"{tuple(index.shape)} {index.dtype}" if isinstance(index, Tensor) else type(index).__name__
    integers = isinstance(index, Tensor) and not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    if not integers or index.shape != (count,):
        raise ShapeError(
            f"index must be ({count},) integers, one position in the training set for every image; got {got}: pass those that the "
            "loader drew the images by."
        )

"""ReviewKD: every level of the student, fused with the deeper ones, against the teacher's, at several scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo.adapters.connectors import full_precision
from distillzoo.adapters.fusion import AttentionFusion
from distillzoo.distiller import Distiller
from distillzoo.errors import OptionError, ShapeError
from distillzoo.kinds import is_whole
from distillzoo.registry import register_distiller
from distillzoo.schedules import LinearWarmup, Weight
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import Batch, DataSpec, Requires, Trace

__all__ = ["ReviewKD", "hierarchical_context_loss"]

_SCALES = (4, 2, 1)
_MOST_MID_CHANNELS = 512


def hierarchical_context_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Match two maps at their own resolution and average-pooled to 4x4, 2x2 and 1x1.

    Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044, section 3.3.
    L = [MSE(F, t) + sum_l w_l MSE(pool_l F, pool_l t)] / (1 + sum_l w_l) over the l of 4, 2, 1 below the maps' height; w is 1/2 for
    the first l that is used and halves with each.

    Args:
        student_map: ``(B, C, H, W)``.
        teacher_map: ``(B, C, H, W)``; no gradient flows into it.
    Returns:
        Scalar, mean over every element.
    Raises:
        ShapeError: If the maps differ in shape.
    Example:
        >>> hierarchical_context_loss(torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))
        tensor(1.)
    """
    if student_map.ndim != 4 or student_map.shape != teacher_map.shape or not student_map.numel():
        raise ShapeError(
            f"hierarchical_context_loss needs two (B, C, H, W) maps of one shape; got {tuple(student_map.shape)} and "
            f"{tuple(teacher_map.shape)}. Bring the student's to the teacher's size and width first."
        )
    student, teacher = full_precision(student_map), full_precision(teacher_map.detach())
    height, width = student.shape[2:]
    total, share, shares = F.mse_loss(student, teacher), 1.0, 1.0
    for scale in _SCALES:
        if scale >= height:
            continue
        own, other = (F.adaptive_avg_pool2d(features, scale) for features in (student, teacher))
        share /= 2.0
        shares += share
        total = total + share * F.mse_loss(own, other)
        if height % scale == 0 and width % scale == 0:
            student, teacher = own, other  # equal windows nest: the next scale pools what is pooled already
    return total / shares


@register_distiller("reviewkd")
class ReviewKD(Distiller):
    """Match every level of the student, fused with all deeper ones, to the teacher's, and the pooled vectors.

    Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044. Authors' code:
    dvlab-research/ReviewKD. Term ``review``: the sum over the levels of :func:`hierarchical_context_loss`. Levels are the stages,
    paired from the deep end, and the pooled vector as a 1x1 map; :class:`~distillzoo.adapters.fusion.AttentionFusion` goes from
    the deepest to the shallowest and hands each level over at the teacher's size and width. Sizes are measured at each step.

    Weight of ``review``: the authors' code has 5 for most CIFAR-100 pairs (0.6 to 8), which is the default, with the authors'
    warm-up over 20 epochs, min((e + 1) / 20, 1) with e from 0 as in mdistiller; the authors' own starts one epoch later, at 0.
    ImageNet: 1 without warm-up (preset ``"imagenet"``; MobileNetV1 8).
    Student maps are read after their activation and the teacher's before it, as for CIFAR in the authors' code;
    ``student_preact=True`` is their ImageNet form. Published CIFAR numbers belong to another protocol: batch 128, lr
    0.1, nesterov, older normalisation, 151 epochs at full lr.
    Differs from the authors' code: the teacher is in eval mode; the deepest level's norm uses its running statistics
    for a batch of 1. Differs from mdistiller: the middle width is an option, which mdistiller's configs name and its code ignores.

    Args:
        student: The student with its taps.
        teacher: The teacher with its taps.
        data: What may be known about the data.
        mid_channels: Width of what is carried from level to level; ``None`` is the width of the student's pooled vector, 512 at
            most. Authors' ImageNet: 512 (ResNet18), 256 (MobileNetV1).
        student_preact: Whether the student's stages are read before their activation.
        weights: Weights of ``ce`` and ``review``, or ``"imagenet"``.
        seed: Seed of the distiller.
    Raises:
        OptionError: If ``mid_channels`` is out of range.
        UnsupportedPairError: If a network has no stages.
        TapError: If a network has no ``pooled`` tap.
    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> student, teacher = (create_model(name, num_classes=10) for name in ("resnet8", "resnet20"))
        >>> build_distiller("reviewkd", student, teacher, input_size=32).mid_channels
        64
    """

    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {
        "cifar": {"ce": 1.0, "review": LinearWarmup(5.0, 20)},  # authors' scripts; mdistiller's resnet32x4 -> resnet8x4
        "imagenet": {"ce": 1.0, "review": 1.0},  # authors' ResNet18, mdistiller
    }

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        mid_channels: int | None = None,
        student_preact: bool = False,
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        net = self._teacher()
        stages = self.stage_pairs("stages.pre" if student_preact else "stages", "stages.pre")
        pooled = (*student.names("pooled"), *net.names("pooled"))
        self.levels = (*stages, (pooled[0], pooled[1]))
        self.requires = Requires(tuple(own for own, _ in self.levels), tuple(other for _, other in self.levels))
        if mid_channels is None:
            mid_channels = min(_MOST_MID_CHANNELS, student.shapes[pooled[0]][0])
        if not is_whole(mid_channels, 1):
            raise OptionError(f"mid_channels must be an integer of at least 1 or None; got {mid_channels!r}; the authors' is 512.")
        self.mid_channels = mid_channels
        self.fusions = nn.ModuleList(
            AttentionFusion(student.shapes[own][0], mid_channels, net.shapes[other][0], fuse=(own, other) != self.levels[-1])
            for own, other in self.levels
        )

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Return ``review``."""
        assert teacher is not None
        losses: list[Tensor] = []
        carried: Tensor | None = None
        for fusion, (own, other) in reversed(list(zip(self.fusions, self.levels, strict=True))):
            target = _as_map(teacher.features[other])
            out, carried = fusion(_as_map(student.features[own]), carried, (target.shape[2], target.shape[3]))
            losses.append(hierarchical_context_loss(out, target))
        return {"review": torch.stack(losses).sum()}


def _as_map(features: Tensor) -> Tensor:
    return features[:, :, None, None] if features.ndim == 2 else features

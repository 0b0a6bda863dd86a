"""OFD: overhaul of feature distillation, the teacher's maps before their activation, cut at a margin below zero."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from distillzoo.adapters.connectors import full_precision, pool_larger
from distillzoo.adapters.memory import gather_ranks
from distillzoo.adapters.projections import NormedProjection
from distillzoo.casting import full_precision_trace
from distillzoo.distiller import Distiller
from distillzoo.errors import OptionError, ShapeError
from distillzoo.kinds import check_choice
from distillzoo.registry import register_distiller
from distillzoo.schedules import Weight
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import Batch, DataSpec, Loader, Requires, Trace

__all__ = ["OFD", "ofd_loss", "ofd_margin"]

TeacherBN = Literal["running", "batch"]
_RAREST = 0.001  # the authors' switch: below this share of negatives the margin is -3 sigma
_CALIBRATION_BATCHES = 16


def ofd_margin(shift: Tensor, scale: Tensor) -> Tensor:
    """Return the mean of the negative part of what a batch norm puts out: the value below which "negative" is all that is asked.

    Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, arXiv 1904.01866, equation 4.
    With x ~ N(beta, gamma^2): m = E[x | x < 0] = beta - gamma phi(beta / gamma) / Phi(-beta / gamma) where Phi(...) > 0.001, else
    -3 gamma (the authors' code); phi and Phi are the standard normal density and distribution. A channel with gamma = 0, which
    divides by zero there, has the margin min(beta, 0).

    Args:
        shift: ``(C,)``, beta.
        scale: ``(C,)``, gamma; its sign does not matter.
    Returns:
        ``(C,)`` margins, none above 0.
    Raises:
        ShapeError: If the two are not ``(C,)`` of one size.
    Example:
        >>> ofd_margin(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.5]))
        tensor([-0.7979, -1.5000])
    """
    if shift.ndim != 1 or shift.shape != scale.shape:
        raise ShapeError(
            f"ofd_margin needs shift and scale of shape (C,); got {tuple(shift.shape)} and {tuple(scale.shape)}; pass a batch "
            "norm's bias and weight."
        )
    beta, gamma = shift.detach().double(), scale.detach().double().abs()
    ratio = beta / gamma  # not finite for a scale of 0, which the last line answers
    below = torch.special.ndtr(-ratio)
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2.0 * math.pi)
    mean = beta - gamma * density / below.clamp_min(_RAREST)
    margin = torch.where(below > _RAREST, mean, -3.0 * gamma)
    return torch.where(gamma > 0.0, margin, beta.clamp_max(0.0)).to(shift.dtype)


def ofd_loss(student_map: Tensor, teacher_map: Tensor, margin: Tensor) -> Tensor:
    """Match the connected student map of one stage to the teacher's before its activation, where that says something.

    Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, arXiv 1904.01866, equation 3.
    t' = max(t, m), L = 1/B sum over b, c, h, w of (s - t')^2 [s > t' or t > 0]: a student below the margin is left alone where the
    teacher is not positive. A sum over the map, so its scale follows the map's size.

    Args:
        student_map: ``(B, C, H, W)``, what the connector returned.
        teacher_map: ``(B, C, H, W)`` before the activation; no gradient flows into it.
        margin: ``(C,)``, at most 0.
    Returns:
        Scalar, sum over channels and positions, mean over the batch.
    Raises:
        ShapeError: If the maps differ in shape or there is not one margin a channel.
    Example:
        >>> ofd_loss(torch.full((2, 1, 2, 2), -5.0), torch.full((2, 1, 2, 2), -0.5), torch.tensor([-1.0]))
        tensor(0.)
    """
    if student_map.ndim != 4 or student_map.shape != teacher_map.shape or not student_map.numel():
        raise ShapeError(
            f"ofd_loss needs two (B, C, H, W) maps of one shape; got {tuple(student_map.shape)} and {tuple(teacher_map.shape)}. "
            "Connect and pool the student's map first."
        )
    if margin.shape != student_map.shape[1:2]:
        raise ShapeError(f"ofd_loss needs one margin for each of {student_map.shape[1]} channels; got {tuple(margin.shape)}.")
    teacher = full_precision(teacher_map.detach())
    student = full_precision(student_map)
    goal = torch.maximum(teacher, margin.detach().to(teacher.dtype).view(-1, 1, 1))
    with torch.no_grad():  # where nothing is asked the goal is what is there: one squared difference, value and gradient alike
        goal = torch.where((student > goal) | (teacher > 0.0), goal, student)
    return F.mse_loss(student, goal, reduction="sum") / len(student)


@register_distiller("ofd")
class OFD(Distiller):
    """Match every stage before its activation to the teacher's, cut at a margin, through a 1x1 convolution and batch norm.

    Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, arXiv 1904.01866. Authors'
    code: clovaai/overhaul-distillation. Term ``feature``: sum_i 2^-(n-1-i) ofd_loss_i over n stages paired from the deep end, the
    last with weight 1. The margin comes from the batch norm before the teacher's activation; where there is none of the map's
    width (transformers, linear bottlenecks, joined branches) it is the mean of the negative values per channel, from
    :meth:`prepare` or else the first training batch, of all processes in a distributed run, and 0 where a channel has none.

    Maps of different size: the larger is average-pooled to the smaller, the teacher's as mdistiller does it, the student's before
    its connector; the authors' code assumes equal sizes.
    Differs from the authors' code: the teacher is in eval mode; ``teacher_bn="batch"`` gives it the batch's statistics as the
    authors do, in a pass of its own, and the running ones never change; a batch of one image has none and takes the running ones.
    Channels and norms are read from the networks, so that all pairs work (mdistiller raises on 5 of 12). Margins are vectorised,
    and a norm of scale 0 has one. Where a stage ends without activation the map itself is matched.

    Args:
        student: The student with its taps.
        teacher: The teacher with its taps.
        data: What may be known about the data.
        teacher_bn: Statistics of the teacher's batch norms: ``"running"`` or ``"batch"`` (a second teacher pass each step).
        weights: Weights of ``ce`` and ``feature``, or ``"imagenet"``.
        seed: Seed of the distiller.
    Raises:
        OptionError: If ``teacher_bn`` is unknown, or ``"batch"`` for a teacher without batch norm.
        UnsupportedPairError: If a network has no stages.
    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> student, teacher = (create_model(name, num_classes=10) for name in ("resnet8", "resnet20"))
        >>> build_distiller("ofd", student, teacher, input_size=32).margin(0)[:2]
        tensor([-0.7979, -0.7979])
    """

    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {
        "cifar": {"ce": 1.0, "feature": 1e-3},  # authors' CIFAR-100 code, mdistiller
        "imagenet": {"ce": 1.0, "feature": 1e-4},  # authors' ImageNet code, mdistiller
    }
    measured: Tensor

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        teacher_bn: TeacherBN = "running",
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        net = self._teacher()
        check_choice("teacher_bn", teacher_bn, TeacherBN)
        if teacher_bn == "batch" and not any(isinstance(module, _BatchNorm) for module in net.module.modules()):
            raise OptionError(
                f"teacher_bn='batch' needs a teacher with batch norms; {type(net.module).__name__} has none (or they were folded "
                "into its convolutions); use 'running'."
            )
        self.teacher_bn = teacher_bn
        self.pairs = self.stage_pairs("stages.pre", "stages.pre")
        self.requires = Requires(tuple(own for own, _ in self.pairs), tuple(other for _, other in self.pairs))
        self.connectors = nn.ModuleList(NormedProjection(student.shapes[own][0], net.shapes[other][0]) for own, other in self.pairs)
        margins = [_norm_margin(net, other) for _, other in self.pairs]
        for number, (margin, (_, other)) in enumerate(zip(margins, self.pairs, strict=True)):
            self.register_buffer(f"margin{number}", torch.zeros(net.shapes[other][0]) if margin is None else margin)
        self.register_buffer("measured", torch.tensor([margin is not None for margin in margins]))
        self.empirical = tuple(number for number, margin in enumerate(margins) if margin is None)

    def margin(self, number: int) -> Tensor:
        """Return the ``(C,)`` margins of the pair ``number``, counted from 0 at the shallow end."""
        return self.get_buffer(f"margin{number}")

    def prepare(self, loader: Loader) -> None:
        """Measure the margins that no norm gives, on the first 16 batches of a view stream of their own."""
        if not self.empirical:
            return
        totals = {number: torch.zeros(2, len(self.margin(number))) for number in self.empirical}
        for batch in islice(loader.epoch(0, phase="prepare"), _CALIBRATION_BATCHES):
            features = self._trace(batch).features
            for number in self.empirical:
                found = _negatives(full_precision(features[self.pairs[number][1]]))
                totals[number] = totals[number].to(found) + found
        for number, total in totals.items():
            self.margin(number).copy_(_mean_negative(gather_ranks(total.unsqueeze(0)).sum(0)))
            self.measured[number].fill_(True)

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:
        """Return ``feature``."""
        assert teacher is not None
        if self.teacher_bn == "batch":
            with torch.autocast(batch.images.device.type, enabled=self.student_net.autocast):  # as the loop runs the other passes
                teacher = full_precision_trace(self._trace(batch))
        losses: list[Tensor] = []
        for number, (own, other) in enumerate(self.pairs):
            target = teacher.features[other]
            margin = self._first_batch_margin(number, target) if number in self.empirical else self.margin(number)
            source, target = pool_larger(student.features[own], target)
            share = 2.0 ** (number + 1 - len(self.pairs))
            losses.append(share * ofd_loss(self.connectors[number](source), target, margin))
        return {"feature": torch.stack(losses).sum()}

    def _trace(self, batch: Batch) -> Trace:
        """Run the teacher, with the batch's statistics where the option says so and there is a batch."""
        net = self._teacher()
        with _batch_statistics(net.module, self.teacher_bn == "batch" and len(batch.images) > 1):
            return net(batch.images)

    def _first_batch_margin(self, number: int, features: Tensor) -> Tensor:
        """The margin of a stage without norm: measured, or of this very batch; chosen on the device."""
        stored = self.margin(number)
        found = _negatives(full_precision(features))
        if self.training:  # not the processes' own: they would train towards different margins
            found = gather_ranks(found.unsqueeze(0)).sum(0)
        now = _mean_negative(found).to(stored.dtype)
        chosen = torch.where(self.measured[number], stored, now)
        if self.training:
            stored.copy_(chosen)
            self.measured[number].fill_(True)
        return chosen


def _norm_margin(net: Teacher, tap: str) -> Tensor | None:
    """The margin that the norm before a stage's activation gives; None where there is no batch norm of the map's width."""
    stage = net.stages[net.names("stages.pre").index(tap)]
    norm = None if stage.norm is None else net.submodule(stage.norm)
    if not isinstance(norm, _BatchNorm) or norm.num_features != net.shapes[tap][0]:
        return None
    if not norm.affine:
        like = torch.zeros(norm.num_features)
        return ofd_margin(like, like + 1.0)
    return ofd_margin(norm.bias.detach(), norm.weight.detach())


def _negatives(features: Tensor) -> Tensor:
    """Sum and number of the negative values of each channel: ``(B, C, H, W)`` to ``(2, C)``."""
    return torch.stack([features.clamp_max(0.0).sum((0, 2, 3)), (features < 0.0).sum((0, 2, 3)).to(features.dtype)])


def _mean_negative(totals: Tensor) -> Tensor:
    return totals[0] / totals[1].clamp_min(1.0)


@contextmanager
def _batch_statistics(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Let batch norms normalise by the batch, without touching a running statistic; all else stays in eval mode."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.track_running_stats] if wanted else []
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = False, True

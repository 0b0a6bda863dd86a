"""DKD: the softened probabilities in two parts, the true class against the rest and the rest among themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from distillzoo.adapters.connectors import full_precision
from distillzoo.distiller import Distiller
from distillzoo.errors import OptionError, ShapeError
from distillzoo.kinds import check_positive
from distillzoo.registry import register_distiller
from distillzoo.schedules import LinearWarmup, Weight
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import Batch, DataSpec, Requires, Trace

__all__ = ["DKD", "dkd_loss", "nckd_loss", "tckd_loss"]

_LOWEST = -1e30  # teachers given as log(one-hot): -inf would meet a probability of 0


def tckd_loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float = 4.0) -> Tensor:
    """Match how sure the student is of the true class to how sure the teacher is (target class knowledge distillation).

    Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679.
    L = T^2 (1/B) sum_b KL(b^t || b^s) with b = (p_y, 1 - p_y), p = softmax(z / T), in logarithms throughout:
    log(1 - p_y) is the log-sum-exp over the other classes less that over all.

    Args:
        student_logits: ``(B, C)``, C at least 2.
        teacher_logits: ``(B, C)``; no gradient flows into it.
        targets: ``(B,)`` class numbers.
        temperature: Softmax temperature, > 0.
    Returns:
        Scalar, mean over the batch.
    Raises:
        ShapeError: If the shapes do not fit.
        OptionError: If the temperature is not above 0 or the targets are soft.
    Example:
        >>> import torch
        >>> tckd_loss(torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([0, 1]))
        tensor(0.)
    """
    student, teacher, true = _prepare("tckd_loss", student_logits, teacher_logits, targets, temperature)
    own, other = _binary_log_probabilities(student, true), _binary_log_probabilities(teacher, true)
    return _divergence(other, own).mean() * temperature**2


def nckd_loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float = 4.0) -> Tensor:
    """Match the student's probabilities among the wrong classes to the teacher's (non-target class knowledge distillation).

    Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679.
    L = T^2 (1/B) sum_b KL(q^t || q^s), q the softmax of z / T over the classes other than the true one.

    Args:
        student_logits: ``(B, C)``, C at least 2.
        teacher_logits: ``(B, C)``; no gradient flows into it.
        targets: ``(B,)`` class numbers.
        temperature: Softmax temperature, > 0.
    Returns:
        Scalar, mean over the batch.
    Raises:
        ShapeError: If the shapes do not fit.
        OptionError: If the temperature is not above 0 or the targets are soft.
    Example:
        >>> import torch
        >>> nckd_loss(torch.zeros(2, 5), torch.eye(5)[:2] * 9, torch.tensor([0, 1]))
        tensor(0.)
    """
    student, teacher, true = _prepare("nckd_loss", student_logits, teacher_logits, targets, temperature)
    own, other = (z.masked_fill(true, -torch.inf).log_softmax(1).masked_fill(true, 0.0) for z in (student, teacher))
    # the true class holds 0 in both logarithms, so that it adds 1 * (0 - 0)
    return _divergence(other, own).mean() * temperature**2


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 4.0,
    target_weight: float = 1.0,
    non_target_weight: float = 8.0,
) -> Tensor:
    """Return the weighted sum of :func:`tckd_loss` and :func:`nckd_loss` (equation 7; alpha and beta of the paper).

    Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679. L = alpha TCKD + beta NCKD.

    Args:
        student_logits: ``(B, C)``, C at least 2.
        teacher_logits: ``(B, C)``; no gradient flows into it.
        targets: ``(B,)`` class numbers.
        temperature: Softmax temperature, > 0. CIFAR-100: 4, ImageNet: 1.
        target_weight: Alpha. Paper: 1.
        non_target_weight: Beta. Authors' code: 8 by default; 2, 6 or 8 by pair on CIFAR-100, 0.5 or 2 on ImageNet.
    Returns:
        Scalar, mean over the batch.
    Raises:
        ShapeError: If the shapes do not fit.
        OptionError: If the temperature is not above 0 or the targets are soft.
    Example:
        >>> import torch
        >>> dkd_loss(torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([0, 1]))
        tensor(0.)
    """
    target = tckd_loss(student_logits, teacher_logits, targets, temperature)
    non_target = nckd_loss(student_logits, teacher_logits, targets, temperature)
    return target_weight * target + non_target_weight * non_target


def _prepare(name: str, student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments; return both logits over the temperature and a ``(B, C)`` mask of the true class."""
    if student.ndim != 2 or student.shape != teacher.shape or student.shape[1] < 2 or not len(student):
        raise ShapeError(
            f"{name} needs two (B, C) tensors of one shape, C at least 2; got {tuple(student.shape)} and {tuple(teacher.shape)}. "
            "Flatten dense or token logits to (B, C) first."
        )
    if targets.is_floating_point() or targets.shape != student.shape[:1]:
        raise OptionError(
            f"{name} needs ({len(student)},) class numbers; got {tuple(targets.shape)} {targets.dtype}; "
            "switch mixing and soft targets off, or pass the class of largest weight."
        )
    check_positive("temperature", temperature)
    true = torch.zeros(student.shape, dtype=torch.bool, device=student.device).scatter_(1, targets.long().unsqueeze(1), True)
    own, other = full_precision(student), full_precision(teacher.detach()).clamp(min=_LOWEST)
    return own / temperature, other / temperature, true


def _binary_log_probabilities(scaled: Tensor, true: Tensor) -> Tensor:
    """Return ``(B, 2)``: the logarithms of p_y and 1 - p_y, neither of which underflows."""
    everything = scaled.logsumexp(1)
    target = scaled.masked_fill(~true, 0.0).sum(1)
    rest = scaled.masked_fill(true, -torch.inf).logsumexp(1)
    return torch.stack([target - everything, rest - everything], 1)


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL of two ``(B, K)`` log-probabilities, ``(B,)``."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


@register_distiller("dkd")
class DKD(Distiller):
    """Match the softened probabilities in two parts that are weighted apart: the true class, and the others.

    Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679. Authors' code: mdistiller
    (a08d46f). Total = ce + warm (alpha tckd + beta nckd), warm = min((e + 1) / 20, 1) with the epoch e counted from 0, which is
    the code's count from 1; a schedule of the weights. Beta depends on the pair: on CIFAR-100 theirs is 2 for resnet56 to resnet20
    and resnet110 to resnet32, 6 for vgg13 as the teacher and between wide residual networks, else 8, which is the preset's;
    another is given as ``weights={"nckd": LinearWarmup(2.0, 20)}``.
    Differs from the authors' code: logarithms throughout, where the code's TCKD is not a number at a logit gap over T of about
    104; the true class is left out exactly, not by -1000 on its logit.

    Args:
        student: The student with its taps.
        teacher: The teacher with its taps.
        data: What may be known about the data.
        temperature: Softmax temperature, > 0. CIFAR-100: 4, ImageNet: 1.
        weights: Weights of ``ce``, ``tckd`` and ``nckd``, or ``"imagenet"``.
        seed: Seed of the distiller.
    Raises:
        OptionError: If the temperature is not above 0.
    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> student, teacher = (create_model(name, num_classes=10) for name in ("resnet8", "resnet20"))
        >>> list(build_distiller("dkd", student, teacher, input_size=32).weights)
        ['ce', 'tckd', 'nckd']
    """

    requires = Requires(hard_labels=True)
    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {
        # the authors' default; 8 is beta of resnet32x4 -> resnet8x4 and of the ShuffleNet and ResNet50 pairs
        "cifar": {"ce": 1.0, "tckd": LinearWarmup(1.0, 20), "nckd": LinearWarmup(8.0, 20)},
        "imagenet": {"ce": 1.0, "tckd": 1.0, "nckd": 0.5},  # ResNet34 -> ResNet18, with temperature 1 and no warm-up
    }

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        temperature: float = 4.0,
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        check_positive("temperature", temperature)
        self.temperature = temperature

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:
        """Return ``tckd`` and ``nckd``."""
        assert teacher is not None
        return {
            "tckd": tckd_loss(student.logits, teacher.logits, batch.targets, self.temperature),
            "nckd": nckd_loss(student.logits, teacher.logits, batch.targets, self.temperature),
        }

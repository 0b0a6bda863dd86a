"""Knowledge distillation: softened probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from distillzoo.adapters.connectors import softened_divergence
from distillzoo.distiller import Distiller
from distillzoo.errors import ShapeError
from distillzoo.kinds import check_positive
from distillzoo.registry import register_distiller
from distillzoo.schedules import Weight
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import Batch, DataSpec, Trace

__all__ = ["KD", "kd_loss"]


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Match the student's softened class probabilities to the teacher's.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", NIPS Deep Learning Workshop 2014, arXiv 1503.02531.
    L = T^2 (1/B) sum_b sum_c p^t log(p^t / p^s), p = softmax(z / T). The T^2 keeps the gradient's scale over temperatures.

    Args:
        student_logits: ``(B, C)``.
        teacher_logits: ``(B, C)``; no gradient flows into it.
        temperature: Softmax temperature, > 0.
    Returns:
        Scalar, sum over classes, mean over the batch.
    Raises:
        ShapeError: If the logits differ in shape, are not ``(B, C)`` or are empty.
        OptionError: If the temperature is not above 0.
    Example:
        >>> import torch
        >>> kd_loss(torch.zeros(2, 5), torch.zeros(2, 5), temperature=4.0)
        tensor(0.)
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape or not student_logits.numel():
        raise ShapeError(
            f"kd_loss needs two (B, C) tensors of one shape that are not empty; got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}. Flatten dense or token logits to (B, C) first."
        )
    check_positive("temperature", temperature)
    return softened_divergence(student_logits, teacher_logits, temperature)


@register_distiller("kd")
class KD(Distiller):
    """Match the student's softened class probabilities to the teacher's.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", NIPS Deep Learning Workshop 2014, arXiv 1503.02531.
    No authors' code; the field's form (RepDistiller, mdistiller): total = 0.1 ce + 0.9 kd with T = 4 on CIFAR-100, and
    0.5 ce + 0.5 kd with T = 1 on ImageNet (weights preset ``"imagenet"``; set ``temperature=1.0`` with it).
    Differs from other code: torchdistill drops T^2 when its alpha is 0 or absent, attention-transfer averages over classes as
    well; here there is one definition.

    Args:
        student: The student with its taps.
        teacher: The teacher with its taps.
        data: What may be known about the data.
        temperature: Softmax temperature, > 0. CIFAR-100: 4, ImageNet: 1.
        weights: Weights of ``ce`` and ``kd``, or ``"imagenet"``.
        seed: Seed of the distiller.
    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> student, teacher = (create_model(name, num_classes=10) for name in ("resnet8", "resnet20"))
        >>> build_distiller("kd", student, teacher, input_size=32, temperature=2.0).temperature
        2.0
    """

    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {
        "cifar": {"ce": 0.1, "kd": 0.9},  # RepDistiller's and mdistiller's scripts
        "imagenet": {"ce": 0.5, "kd": 0.5},  # mdistiller, with temperature 1
    }
    composed_weights: ClassVar[Mapping[str, Weight]] = {"kd": 1.0}  # RepDistiller's "+KD" rows

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

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Return ``kd``."""
        assert teacher is not None
        return {"kd": kd_loss(student.logits, teacher.logits, self.temperature)}

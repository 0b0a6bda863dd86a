"""SP: similarity-preserving distillation, which samples of a batch excite the last map alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from distillzoo.adapters.connectors import full_precision, unit_rows
from distillzoo.distiller import Distiller
from distillzoo.errors import ShapeError
from distillzoo.registry import register_distiller
from distillzoo.schedules import Weight
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import Batch, DataSpec, Requires, Trace

__all__ = ["SP", "sp_loss"]

_SMALLEST_NORM = 1e-12  # the references' floor on the norm of a row of similarities


def sp_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Match the student's matrix of similarities between the samples of a batch to the teacher's.

    Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv 1907.09682.
    Equations 1 to 4: G = F F^T of the flattened features, each row over max(its norm, 1e-12), L = |G_t - G_s|_F^2 / B^2.

    Args:
        student_features: ``(B, ...)``, a map or a vector.
        teacher_features: ``(B, ...)``, of any other size; no gradient flows into it.
    Returns:
        Scalar, mean over the B^2 pairs; it falls as the batch grows. A sample whose features are all zero has zero similarities.
    Raises:
        ShapeError: If these are not features of one batch.
    Example:
        >>> import torch
        >>> sp_loss(torch.eye(3), 2 * torch.eye(3))
        tensor(0.)
    """
    if min(student_features.ndim, teacher_features.ndim) < 2 or not 0 < len(student_features) == len(teacher_features):
        raise ShapeError(
            f"sp_loss needs (B, ...) features of one batch that is not empty; got {tuple(student_features.shape)} and "
            f"{tuple(teacher_features.shape)}; tap the same stage or vector of both networks on the same images."
        )
    with torch.autocast(student_features.device.type, enabled=False):  # else the products would be made in 16 bits
        own, other = _similarities(student_features), _similarities(teacher_features.detach())
        return (other - own).square().mean()


def _similarities(features: Tensor) -> Tensor:
    """Return the ``(B, B)`` similarities with rows of unit length.

    The features are divided by their largest value first, since their products overflow, and the floor by its square: this
    leaves every value as it was, and so needs no gradient.
    """
    rows = full_precision(features).flatten(1)
    tiny = torch.finfo(rows.dtype).tiny
    largest = rows.detach().abs().amax().clamp(min=tiny)
    rows = rows / largest
    return unit_rows(rows @ rows.T, floor=(_SMALLEST_NORM / largest / largest).clamp(min=tiny))


@register_distiller("sp")
class SP(Distiller):
    """Match, between the samples of a batch, the similarities of the last map.

    Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv 1907.09682. No authors' code; total = ce + 3000
    similarity as RepDistiller (b84f547) and mdistiller (a08d46f), who read the last map before pooling, with its own height and
    width on either side.
    The value falls about as one over the batch, and 3000 was tuned at 64: 3000 times it is 0.56, 0.16, 0.041 at 16, 64, 256 samples
    of 256 uniform random features. On several devices the pairs are those of one device's batch.
    Differs from torchdistill: its sample weight is 1.

    Args:
        student: The student with its taps.
        teacher: The teacher with its taps.
        data: What may be known about the data.
        weights: Weights of ``ce`` and ``similarity``.
        seed: Seed of the distiller.
    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> student, teacher = (create_model(name, num_classes=10) for name in ("resnet8", "resnet20"))
        >>> build_distiller("sp", student, teacher, input_size=32).pair
        ('stage3', 'stage3')
    """

    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {
        "cifar": {"ce": 1.0, "similarity": 3000.0},  # RepDistiller's and mdistiller's scripts, batch 64
    }

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        self.pair = self.stage_pairs()[-1]
        self.requires = Requires(student_taps=self.pair[:1], teacher_taps=self.pair[1:])

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Return ``similarity``."""
        assert teacher is not None
        return {"similarity": sp_loss(student.features[self.pair[0]], teacher.features[self.pair[1]])}

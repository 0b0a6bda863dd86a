"""PKT: probabilistic knowledge transfer, how likely each sample of a batch is to be the neighbour of each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distillzoo.adapters.connectors import full_precision, unit_rows
from distillzoo.distiller import Distiller
from distillzoo.errors import ShapeError
from distillzoo.kinds import check_choice
from distillzoo.registry import register_distiller
from distillzoo.schedules import Weight
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import Batch, DataSpec, Requires, Trace

__all__ = ["PKT", "pkt_loss"]

Mean = Literal["pairs", "rows"]
_EPSILON = 1e-7  # of the authors' code, added to norms and to probabilities
_SMALLEST_NORM = 1e-12


def pkt_loss(student_vectors: Tensor, teacher_vectors: Tensor, *, mean: Mean = "pairs") -> Tensor:
    """Match the student's probabilities of neighbourhood within a batch to the teacher's.

    Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018, arXiv 1803.10837.
    With unit vectors e, K = (e e^T + 1) / 2 and q_ij = K_ij / sum_j K_ij: L = mean over the B^2 pairs of
    q^t log((q^t + 1e-7) / (q^s + 1e-7)).

    Args:
        student_vectors: ``(B, D)``.
        teacher_vectors: ``(B, E)``; no gradient flows into it.
        mean: ``"pairs"`` as published, about 1/B; ``"rows"`` is B times that, the mean divergence of a sample, whose scale does not
            depend on the batch.
    Returns:
        Scalar. A vector that is zero counts as it is, without a gradient.
    Raises:
        ShapeError: If these are not vectors of one batch.
        OptionError: If the mean does not exist.
    Example:
        >>> import torch
        >>> pkt_loss(torch.eye(3), 2 * torch.eye(3))
        tensor(0.)
    """
    if student_vectors.ndim != 2 or teacher_vectors.ndim != 2 or not 0 < len(student_vectors) == len(teacher_vectors):
        raise ShapeError(
            f"pkt_loss needs (B, D) vectors of one batch that is not empty; got {tuple(student_vectors.shape)} and "
            f"{tuple(teacher_vectors.shape)}; pool or flatten maps first."
        )
    check_choice("mean", mean, Mean)
    with torch.autocast(student_vectors.device.type, enabled=False):  # else the products would be made in 16 bits
        own, other = _neighbourhoods(student_vectors), _neighbourhoods(teacher_vectors.detach())
        divergence = other * ((other + _EPSILON).log() - (own + _EPSILON).log())
        return divergence.mean() if mean == "pairs" else divergence.sum(1).mean()


def _neighbourhoods(vectors: Tensor) -> Tensor:
    """Return ``(B, B)`` probabilities with rows that sum to one, the diagonal among them."""
    unit = unit_rows(full_precision(vectors), floor=_SMALLEST_NORM, added=_EPSILON)
    kernel = ((unit @ unit.T + 1.0) / 2.0).clamp(min=0.0)  # opposite vectors may round to a cosine below -1
    return kernel / kernel.sum(1, keepdim=True)


@register_distiller("pkt")
class PKT(Distiller):
    """Match, between the samples of a batch, the probabilities of neighbourhood of the pooled features.

    Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018, arXiv 1803.10837. Authors'
    code: passalis/probabilistic_kt. Total = ce + 30000 probability, as RepDistiller (b84f547) and mdistiller (a08d46f).
    The published mean over B^2 falls as 1/B, and 30000 was tuned at 64: 30000 times it is 0.17, 0.047, 0.012 at 16, 64, 256 samples
    of 256 uniform random features. ``mean="rows"`` does not fall, and its weight of the same strength at 64 is the preset
    ``"rows"``. On several devices the pairs are those of one device's batch.
    Differs from the authors' code: a zero vector gets no gradient, where theirs is not a number; that code has no cross-entropy and
    its own optimiser.

    Args:
        student: The student with its taps.
        teacher: The teacher with its taps.
        data: What may be known about the data.
        mean: ``"pairs"`` or ``"rows"``.
        weights: Weights of ``ce`` and ``probability``, or ``"rows"``.
        seed: Seed of the distiller.
    Raises:
        OptionError: If the mean does not exist.
    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> student, teacher = (create_model(name, num_classes=10) for name in ("resnet8", "resnet20"))
        >>> build_distiller("pkt", student, teacher, input_size=32, mean="rows", weights="rows").mean
        'rows'
    """

    requires = Requires(student_taps=("pooled",), teacher_taps=("pooled",))
    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {
        "cifar": {"ce": 1.0, "probability": 30000.0},  # RepDistiller's and mdistiller's scripts, batch 64
        "rows": {"ce": 1.0, "probability": 468.75},  # 30000 / 64, with mean="rows"
    }

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        mean: Mean = "pairs",
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        self.mean: Mean = check_choice("mean", mean, Mean)

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Return ``probability``."""
        assert teacher is not None
        return {"probability": pkt_loss(student.features["pooled"], teacher.features["pooled"], mean=self.mean)}

"""RKD: relational knowledge distillation, the distances and angles between the samples of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distillzoo.adapters.connectors import full_precision, unit_rows
from distillzoo.distiller import Distiller
from distillzoo.errors import ShapeError
from distillzoo.registry import register_distiller
from distillzoo.schedules import Weight
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import Batch, DataSpec, Requires, Trace

__all__ = ["RKD", "rkd_angle_loss", "rkd_distance_loss"]

_SMALLEST_DISTANCE = 1e-6  # the references' 1e-12 under the square root
_SMALLEST_EDGE = 1e-12  # a shorter difference has no direction
_BY_SUBTRACTION = "donot_use_mm_for_euclid_dist"  # by inner products equal vectors would lie some rounding error apart
_MOST_ANGLES = 1 << 21  # that are held at once: 16 MB a tensor, all of a batch of 128


def rkd_distance_loss(student_vectors: Tensor, teacher_vectors: Tensor, *, normalize: bool = False) -> Tensor:
    """Match the distances between the samples of a batch, relative to their mean.

    Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068.
    d_ij = sqrt(max(|e_i - e_j|^2, 1e-12)) for i not j and 0 on the diagonal, delta = d / (mean of the positive d),
    L = mean over the B^2 pairs of Huber(delta^s - delta^t), Huber(x) = x^2/2 below 1 and |x| - 1/2 above.

    Args:
        student_vectors: ``(B, D)``.
        teacher_vectors: ``(B, E)``; no gradient flows into it.
        normalize: Whether the vectors get unit length first, as in the authors' classification script.
    Returns:
        Scalar; 0 for one sample. The mean distance of the student is part of its graph.
    Raises:
        ShapeError: If these are not vectors of one batch.
    Example:
        >>> import torch
        >>> rkd_distance_loss(torch.eye(3), 2 * torch.eye(3))
        tensor(0.)
    """
    student, teacher = _prepare("rkd_distance_loss", student_vectors, teacher_vectors, normalize)
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def _relative_distances(vectors: Tensor) -> Tensor:
    """Return ``(B, B)`` distances over their mean."""
    count = len(vectors)
    distances = torch.cdist(vectors, vectors, compute_mode=_BY_SUBTRACTION).clamp(min=_SMALLEST_DISTANCE)
    distances = distances * (1.0 - torch.eye(count, dtype=distances.dtype, device=distances.device))
    mean = distances.sum() / max(count * (count - 1), 1)  # off the diagonal every distance is positive
    return distances / mean.clamp(min=torch.finfo(mean.dtype).tiny)


def rkd_angle_loss(student_vectors: Tensor, teacher_vectors: Tensor, *, normalize: bool = False) -> Tensor:
    """Match the cosine of every angle that three samples of a batch form.

    Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068.
    v_ij = (e_j - e_i) / |e_j - e_i|, L = mean over the B^3 triples of Huber(<v_ij, v_ik>_s - <v_ij, v_ik>_t); the degenerate
    triples count with cosine 0 or 1. Differences shorter than 1e-12 have cosine 0 and no gradient.

    Args:
        student_vectors: ``(B, D)``.
        teacher_vectors: ``(B, E)``; no gradient flows into it.
        normalize: Whether the vectors get unit length first, as in the authors' classification script.
    Returns:
        Scalar. Above 128 samples, parts of the batch are done one after the other, and again in the backward pass, so that memory
        stays bounded.
    Raises:
        ShapeError: If these are not vectors of one batch.
    Example:
        >>> import torch
        >>> rkd_angle_loss(torch.eye(3), 2 * torch.eye(3))
        tensor(0.)
    """
    student, teacher = _prepare("rkd_angle_loss", student_vectors, teacher_vectors, normalize)
    count = len(student)
    inputs = (student, _inner_products(student), teacher, _inner_products(teacher))
    at_once = max(_MOST_ANGLES // count**2, 1)
    if at_once >= count:
        total = _angle_sum(*inputs, 0, count)
    else:
        parts = [
            checkpoint(_angle_sum, *inputs, start, start + at_once, use_reentrant=False, preserve_rng_state=False)
            for start in range(0, count, at_once)
        ]
        total = torch.stack(parts).sum()
    return total / count**3


def _inner_products(vectors: Tensor) -> Tensor:
    """Return ``(B, B)`` inner products about the mean, in double precision: angles are made of their differences."""
    centred = vectors.double() - vectors.detach().double().mean(0)  # no angle depends on the mean, so it needs no gradient
    with torch.autocast(vectors.device.type, enabled=False):  # else the products would be made in 16 bits
        return centred @ centred.T


def _angle_sum(student: Tensor, own: Tensor, teacher: Tensor, other: Tensor, start: int, stop: int) -> Tensor:
    """Sum the Huber losses of the angles at the vertices ``start`` to ``stop``."""
    return F.smooth_l1_loss(_cosines(student, own, start, stop), _cosines(teacher, other, start, stop), reduction="sum")


def _cosines(vectors: Tensor, inner: Tensor, start: int, stop: int) -> Tensor:
    """Return ``(V, B, B)``: at vertex i, the cosine between the directions to j and to k.

    <e_j - e_i, e_k - e_i> is made of inner products of the vectors; the B^2 D differences are never held.
    """
    to_others = inner[start:stop]
    own = inner.diagonal()[start:stop].unsqueeze(1)
    products = (inner - to_others.unsqueeze(2)) - (to_others - own).unsqueeze(1)
    lengths = torch.cdist(vectors[start:stop], vectors, compute_mode=_BY_SUBTRACTION)  # exactly 0 between equal vectors
    inverse = torch.where(lengths > _SMALLEST_EDGE, lengths.clamp(min=_SMALLEST_EDGE).reciprocal(), 0.0)
    return products.to(vectors.dtype) * inverse.unsqueeze(2) * inverse.unsqueeze(1)


def _prepare(name: str, student: Tensor, teacher: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or not len(student):
        raise ShapeError(
            f"{name} needs (B, D) vectors of one batch; got {tuple(student.shape)} and {tuple(teacher.shape)}; "
            "pool or flatten maps first."
        )
    student, teacher = full_precision(student), full_precision(teacher.detach())
    return (unit_rows(student), unit_rows(teacher)) if normalize else (student, teacher)


@register_distiller("rkd")
class RKD(Distiller):
    """Match the distances and angles between the pooled features of a batch.

    Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068. Authors' code: lenscloth/RKD.
    Total = ce + 25 distance + 50 angle, as RepDistiller (b84f547) and mdistiller (a08d46f).
    Differs from the authors' code: their classification script gives the vectors unit length first
    (``normalize=True``) and adds KD at temperature 4 with its T^2 (``"rkd+kd"``). All three give no number for one sample, and
    make distances from inner products, by which equal vectors differ by rounding. On several devices the pairs are those of one
    device's batch.

    Args:
        student: The student with its taps.
        teacher: The teacher with its taps.
        data: What may be known about the data.
        normalize: Whether the vectors get unit length first.
        weights: Weights of ``ce``, ``distance`` and ``angle``.
        seed: Seed of the distiller.
    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> student, teacher = (create_model(name, num_classes=10) for name in ("resnet8", "resnet20"))
        >>> list(build_distiller("rkd", student, teacher, input_size=32).weights)
        ['ce', 'distance', 'angle']
    """

    requires = Requires(student_taps=("pooled",), teacher_taps=("pooled",))
    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {
        "cifar": {"ce": 1.0, "distance": 25.0, "angle": 50.0},  # authors' classification script, RepDistiller, mdistiller
    }

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        normalize: bool = False,
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        self.normalize = normalize

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Return ``distance`` and ``angle``."""
        assert teacher is not None
        own, other = student.features["pooled"], teacher.features["pooled"]
        return {
            "distance": rkd_distance_loss(own, other, normalize=self.normalize),
            "angle": rkd_angle_loss(own, other, normalize=self.normalize),
        }

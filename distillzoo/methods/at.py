"""AT: attention transfer, where in the image the energy of each stage lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distillzoo.adapters.connectors import full_precision, pool_larger
from distillzoo.distiller import Distiller
from distillzoo.errors import OptionError, ShapeError
from distillzoo.kinds import check_choice
from distillzoo.registry import register_distiller
from distillzoo.schedules import Weight
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import Batch, DataSpec, Requires, Trace

__all__ = ["AT", "attention_loss", "attention_map"]

Form = Literal["code", "paper"]
_SMALLEST_NORM = 1e-12  # the references' floor: adding a constant instead would move every value


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    """Return where the energy of a feature map lies, as unit vectors over the positions.

    Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928.
    A(f)_b = v_b / max(|v_b|, 1e-12) with v_b = vec(mean over c of abs(f_bc)^p).

    Args:
        features: ``(B, C, H, W)``.
        power: Exponent p, at least 1. Paper and code: 2.
    Returns:
        ``(B, H * W)``; zero for a map that is zero.
    Raises:
        ShapeError: If ``features`` is no map.
        OptionError: If the exponent is below 1.
    Example:
        >>> import torch
        >>> attention_map(torch.ones(1, 3, 2, 2))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    if features.ndim != 4 or not features.numel():
        raise ShapeError(f"attention_map needs a (B, C, H, W) tensor; got {tuple(features.shape)}; tap a feature map.")
    check_power(power)
    features = full_precision(features)
    # absolute values first: an odd power of a negative feature must not cancel (RepDistiller and mdistiller forget them)
    energy = features.square() if power == 2.0 else features.abs().pow(power)
    return F.normalize(energy.mean(1).flatten(1), dim=1, eps=_SMALLEST_NORM)


def attention_loss(student_map: Tensor, teacher_map: Tensor, *, power: float = 2.0, form: Form = "code") -> Tensor:
    """Match the student's attention map of one stage to the teacher's.

    Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928.
    Code form: L = 1/(B H W) sum_b |A(f_s)_b - A(f_t)_b|^2. Paper form, equation 2: the norm is not squared and has a factor 1/2,
    L = 1/(2 B H W) sum_b |A(f_s)_b - A(f_t)_b|; its beta of 1000 over the number of elements is the weight 1000 in both forms.
    Maps of different size are average-pooled to the smaller one before the power.

    Args:
        student_map: ``(B, C, H, W)``.
        teacher_map: ``(B, D, G, V)``; no gradient flows into it.
        power: Exponent p, at least 1.
        form: ``"code"`` or ``"paper"``.
    Returns:
        Scalar, mean over batch and positions.
    Raises:
        ShapeError: If these are not two maps of one batch.
        OptionError: If the exponent or the form is not allowed.
    Example:
        >>> import torch
        >>> attention_loss(torch.ones(2, 3, 4, 4), 7 * torch.ones(2, 5, 4, 4))
        tensor(0.)
    """
    if student_map.ndim != 4 or teacher_map.ndim != 4 or len(student_map) != len(teacher_map):
        raise ShapeError(
            f"attention_loss needs (B, C, H, W) maps of one batch; got {tuple(student_map.shape)} and {tuple(teacher_map.shape)}; "
            "tap one stage of each network."
        )
    check_choice("form", form, Form)
    student_map, teacher_map = pool_larger(full_precision(student_map), full_precision(teacher_map.detach()))
    difference = attention_map(student_map, power) - attention_map(teacher_map, power)
    if form == "code":
        return difference.square().mean()
    squares = difference.square().sum(1)
    smallest = torch.finfo(squares.dtype).tiny
    distance = torch.where(squares > smallest, squares.clamp(min=smallest).sqrt(), 0.0)  # no slope where the maps are equal
    return 0.5 * distance.mean() / difference.shape[1]


def check_power(power: float) -> None:
    """Raise OptionError unless ``power`` is a finite number of at least 1 (below, a zero feature has no finite slope)."""
    if not 1.0 <= power < float("inf"):
        raise OptionError(f"power must be a finite number of at least 1; got {power}; the paper takes 2.")


@register_distiller("at")
class AT(Distiller):
    """Match, at every stage, where in the image the energy of student and teacher lies.

    Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928. Authors' code:
    szagoruyko/attention-transfer. Term ``attention``: the sum over the stages of :func:`attention_loss`, weight 1000.
    Differs from the paper: the default is the squared, averaged distance of the authors' code, as RepDistiller and mdistiller
    have it; ``form="paper"`` is equation 2, and torchdistill's "paper" mode is 2 H W times that per stage.
    Differs from mdistiller: a stem is never a stage and stages pair from the deep end; its ImageNet pairs are off by one.

    Args:
        student: The student with its taps.
        teacher: The teacher with its taps.
        data: What may be known about the data.
        power: Exponent of the features, at least 1.
        form: ``"code"`` or ``"paper"``.
        weights: Weights of ``ce`` and ``attention``, or ``"imagenet"``.
        seed: Seed of the distiller.
    Raises:
        OptionError: If the exponent or the form is not allowed.
    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> student, teacher = (create_model(name, num_classes=10) for name in ("resnet8", "resnet20"))
        >>> build_distiller("at", student, teacher, input_size=32).pairs[-1]
        ('stage3', 'stage3')
    """

    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {
        "cifar": {"ce": 1.0, "attention": 1000.0},  # authors' code (CIFAR-10), RepDistiller, mdistiller
        "imagenet": {"ce": 1.0, "attention": 1000.0},  # authors' code, mdistiller (batch 512), torchdistill (last two stages only)
    }

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        power: float = 2.0,
        form: Form = "code",
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        check_power(power)
        self.power = power
        self.form: Form = check_choice("form", form, Form)
        self.pairs = self.stage_pairs()
        self.requires = Requires(tuple(pair[0] for pair in self.pairs), tuple(pair[1] for pair in self.pairs))

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Return ``attention``."""
        assert teacher is not None
        losses = [
            attention_loss(student.features[own], teacher.features[other], power=self.power, form=self.form)
            for own, other in self.pairs
        ]
        return {"attention": torch.stack(losses).sum()}

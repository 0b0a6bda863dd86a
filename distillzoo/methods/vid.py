"""VID: variational information distillation, a Gaussian around what the student predicts of the teacher's features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo.adapters.connectors import PointwiseRegressor, full_precision, pool_larger
from distillzoo.distiller import Distiller
from distillzoo.errors import OptionError, ShapeError
from distillzoo.registry import register_distiller
from distillzoo.schedules import Weight
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import Batch, DataSpec, Requires, Trace

__all__ = ["VID", "vid_loss"]

_SMALLEST_VARIANCE = 1e-5  # epsilon of RepDistiller's code, the surviving copy of the authors'


def vid_loss(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """Return the negative log-likelihood of the teacher's map under a Gaussian around the student's prediction.

    Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge Transfer", CVPR 2019, arXiv 1904.05835.
    L = mean over b, c, h, w of 1/2 [(mu - f_t)^2 / sigma_c^2 + log sigma_c^2]; the constant 1/2 log 2 pi is left out.

    Args:
        mean: ``(B, C, H, W)``, what the student predicts.
        target: ``(B, C, H, W)``, the teacher's map; no gradient flows into it.
        variance: ``(C,)``, every value above 0; a gradient flows into it.
    Returns:
        Scalar, mean over every element; may be negative.
    Raises:
        ShapeError: If the maps differ in shape or there is not one variance a channel.
    Example:
        >>> import torch
        >>> vid_loss(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4), torch.ones(3))
        tensor(0.5000)
    """
    if mean.ndim != 4 or mean.shape != target.shape or not mean.numel() or variance.shape != mean.shape[1:2]:
        raise ShapeError(
            f"vid_loss needs two (B, C, H, W) maps of one shape and (C,) variances; got {tuple(mean.shape)}, {tuple(target.shape)} "
            f"and {tuple(variance.shape)}. Pool and regress the student's map first."
        )
    variance = full_precision(variance)
    squares = (full_precision(mean) - full_precision(target.detach())).square().mean((0, 2, 3))
    return 0.5 * (squares / variance + variance.log()).mean()


@register_distiller("vid")
class VID(Distiller):
    """Predict every stage of the teacher from the student's, with a learned variance for each of the teacher's channels.

    Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge Transfer", CVPR 2019, arXiv 1904.05835.
    The authors' repository is gone; RepDistiller (b84f547) holds the surviving copy. Term ``vid``: the sum over the stages of
    :func:`vid_loss`; the mean comes from three 1x1 convolutions, the variance is softplus(rho) + 1e-5 and starts at 5. The larger
    map is average-pooled first.
    Differs from the paper: mean over positions, not sum (the code's form).
    Differs from RepDistiller: rho is not decayed, since decay pulls the variance towards 0.69 (``decay_variance=True`` restores
    it), and softplus is the library's, which does not overflow.
    Differs from mdistiller: there the variances are neither trained, moved nor saved, so that its VID is a squared error with a
    fixed factor, and its dry run changes the teacher's statistics.

    Args:
        student: The student with its taps.
        teacher: The teacher with its taps.
        data: What may be known about the data.
        initial_variance: Variance of every channel before training, above 1e-5. Code: 5.
        decay_variance: Whether rho is decayed where the recipe decays norms and biases. In a loop of your own rho is spared only by
            an optimiser that follows ``param_groups()``.
        weights: Weights of ``ce`` and ``vid``.
        seed: Seed of the distiller.
    Raises:
        OptionError: If the initial variance is out of range.
    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> student, teacher = (create_model(name, num_classes=10) for name in ("resnet8", "resnet20"))
        >>> build_distiller("vid", student, teacher, input_size=32).variance(0)[:2]
        tensor([5.0000, 5.0000], grad_fn=<SliceBackward0>)
    """

    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {
        "cifar": {"ce": 1.0, "vid": 1.0},  # RepDistiller's and mdistiller's scripts
    }
    exempt_from_decay: ClassVar[tuple[str, ...]] = ("rho.*",)

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        initial_variance: float = 5.0,
        decay_variance: bool = False,
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        if not _SMALLEST_VARIANCE < initial_variance < float("inf"):
            raise OptionError(f"initial_variance must be a finite number above {_SMALLEST_VARIANCE}; got {initial_variance}.")
        self.pairs = self.stage_pairs()
        self.requires = Requires(tuple(pair[0] for pair in self.pairs), tuple(pair[1] for pair in self.pairs))
        if decay_variance:
            self.exempt_from_decay = ()  # type: ignore[misc]  # this instance's option, not the class's
        start = initial_variance - _SMALLEST_VARIANCE
        start = start + math.log(-math.expm1(-start))  # the inverse of softplus, without overflow
        own = [student.shapes[name][0] for name, _ in self.pairs]
        other = [self._teacher().shapes[name][0] for _, name in self.pairs]
        self.regressors = nn.ModuleList(PointwiseRegressor(*channels) for channels in zip(own, other, strict=True))
        self.rho = nn.ParameterList(nn.Parameter(torch.full((channels,), start)) for channels in other)

    def variance(self, number: int) -> Tensor:
        """Return the ``(C,)`` variances of the pair ``number``, counted from 0 at the shallow end."""
        return F.softplus(full_precision(self.rho[number])) + _SMALLEST_VARIANCE

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Return ``vid``."""
        assert teacher is not None
        losses: list[Tensor] = []
        for number, (own, other) in enumerate(self.pairs):
            source, target = pool_larger(student.features[own], teacher.features[other])
            losses.append(vid_loss(self.regressors[number](source), target, self.variance(number)))
        return {"vid": torch.stack(losses).sum()}

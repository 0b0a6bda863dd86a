"""FitNet: a regressor on the student's middle stage predicts the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from distillzoo.adapters.connectors import ConvRegressor, full_precision
from distillzoo.dataflow.experiments import watch
from distillzoo.distiller import Distiller
from distillzoo.errors import OptionError, ShapeError
from distillzoo.kinds import check_choice
from distillzoo.registry import register_distiller
from distillzoo.schedules import Weight
from distillzoo.stages import Probe
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import Batch, DataSpec, Requires, Trace

__all__ = ["FitNet", "hint_loss"]

Head = Literal["auto", "relu", "linear"]
_USUAL_STAGE = 2  # the references' index 2, their stem being 0


def hint_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Return the mean squared difference between a regressed student map and the teacher's.

    Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550.
    L = mean over b, c, h, w of (r(f_s) - f_t)^2, the single-stage form of RepDistiller and mdistiller. The paper's equation 3 has
    1/2 and sums over an axis.

    Args:
        student_map: ``(B, C, H, W)``, after the regressor; any shape of two or more dimensions works.
        teacher_map: The same shape; no gradient flows into it.
    Returns:
        Scalar, mean over every element.
    Raises:
        ShapeError: If the shapes differ or there is no sample.
    Example:
        >>> import torch
        >>> hint_loss(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0))
        tensor(4.)
    """
    if student_map.ndim < 2 or student_map.shape != teacher_map.shape or not student_map.numel():
        raise ShapeError(
            f"hint_loss needs two (B, C, H, W) tensors of one shape; got {tuple(student_map.shape)} and "
            f"{tuple(teacher_map.shape)}. Put the student's map through a regressor first."
        )
    return (full_precision(student_map) - full_precision(teacher_map.detach())).square().mean()


@register_distiller("fitnet")
class FitNet(Distiller):
    """Match one middle stage of the teacher with a regressor on the student's.

    Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550. Authors'
    code (Theano): adri-romsor/FitNets. Total = ce + 100 hint from the first epoch, as RepDistiller (b84f547) and mdistiller
    (a08d46f) train it; the regressor is their ConvReg: convolution, batch norm, maybe a ReLU.
    Differs from the authors' code: that has two stages (the hint alone with 1/2 and a sum, then KD) and no batch norm.
    Differs from RepDistiller and mdistiller: the ReLU at the regressor's end stays only where the teacher's stage ends with one,
    since it cannot reach the negative values of wide residual networks and MobileNetV2 (``head="relu"`` restores theirs); shapes
    come from a dry run that leaves the teacher's statistics alone (mdistiller's changes them); what ConvReg cannot
    bridge, or only with a kernel above 7, is resized where the references fail, and so are the maps of images of another size.

    Args:
        student: The student with its taps.
        teacher: The teacher with its taps.
        data: What may be known about the data.
        hint_stage: Number of the teacher's stage that is the hint, 1 = the shallowest after the stem. It guides the student's
            stage that lies as far from the deep end. ``None`` takes stage 2, or the pair nearest to it where 2 has no partner.
        head: ``"relu"`` or ``"linear"`` end of the regressor; ``"auto"`` takes ReLU where the hint of a dry batch has no negative
            values, as behind a ReLU.
        weights: Weights of ``ce`` and ``hint``.
        seed: Seed of the distiller.
    Raises:
        OptionError: If the head does not exist or the stage has no partner.
    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> student, teacher = (create_model(name, num_classes=10) for name in ("resnet8", "resnet20"))
        >>> build_distiller("fitnet", student, teacher, input_size=32).pair
        ('stage2', 'stage2')
    """

    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {
        "cifar": {"ce": 1.0, "hint": 100.0},  # RepDistiller's and mdistiller's scripts
    }

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        hint_stage: int | None = None,
        head: Head = "auto",
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        self.head = check_choice("head", head, Head)
        self.pair = self._choose(hint_stage)
        self.requires = Requires(student_taps=self.pair[:1], teacher_taps=self.pair[1:])
        rectify = self._hint_is_rectified() if head == "auto" else head == "relu"
        self.regressor = ConvRegressor(student.shapes[self.pair[0]], self._teacher().shapes[self.pair[1]], rectify=rectify)

    def _choose(self, number: int | None) -> tuple[str, str]:
        pairs = {int(teacher.removeprefix("stage")): (student, teacher) for student, teacher in self.stage_pairs()}
        if number is None:
            number = min(pairs, key=lambda known: abs(known - _USUAL_STAGE))
        if isinstance(number, bool) or number not in pairs:
            raise OptionError(
                f"hint_stage is the number of a teacher's stage that pairs with one of the student's; got {number!r}; "
                f"choose one of {', '.join(map(str, pairs))}, or name stages with taps=."
            )
        return pairs[number]

    def _hint_is_rectified(self) -> bool:
        """Whether the hint of a dry batch has no negative value, whatever makes it so: module, function, or both within a block."""
        teacher = self._teacher()
        hint = watch(Probe(teacher.module, teacher.data), "", teacher.path(self.pair[1]))[1]
        return bool((hint >= 0.0).all())

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Return ``hint``."""
        assert teacher is not None
        guided, hint = student.features[self.pair[0]], teacher.features[self.pair[1]]
        return {"hint": hint_loss(self.regressor(guided, (hint.shape[2], hint.shape[3])), hint)}

"""The student alone."""

from __future__ import annotations

from torch import Tensor

from distillzoo.distiller import Distiller
from distillzoo.registry import register_distiller
from distillzoo.types import Batch, Requires, Trace

__all__ = ["Vanilla"]


@register_distiller("vanilla")
class Vanilla(Distiller):
    """Train the student with cross-entropy and no teacher: the baseline of every table.

    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> distiller = build_distiller("vanilla", create_model("resnet8", num_classes=10), input_size=32)
        >>> list(distiller.weights)
        ['ce']
    """

    requires = Requires(teacher=False)

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Return no terms."""
        return {}

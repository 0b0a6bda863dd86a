"""Tell a plain network from one that a distiller has restructured: :func:`check_plain`."""

from __future__ import annotations

from torch import nn

from distillzoo.adapters.copies import PerCopy
from distillzoo.adapters.expansion import DualLayer
from distillzoo.adapters.reparam import AfterNorm, Branched
from distillzoo.errors import OptionError

__all__ = ["check_plain"]


def check_plain(network: nn.Module) -> None:
    """Refuse a network that holds layers which a distiller put there, branches or layers of two widths; so may a copy of it.

    Another distiller would train them as layers of the student's own, and export them.

    Args:
        network: What should be a student.
    Raises:
        OptionError: If it holds one.
    """
    for path, module in network.named_modules():
        if isinstance(module, AfterNorm | Branched | DualLayer | PerCopy):
            raise OptionError(
                f"{path} of the student {type(network).__name__} is a {type(module).__name__}, which a distiller put there when it "
                "took the student over; pass a plain student: a new one, or what export_student() of that distiller returns. "
                "Two methods that restructure the student cannot be composed."
            )

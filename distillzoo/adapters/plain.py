"""Tell a plain network from one that a distiller has restructured: :func:`check_plain`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from distillzoo.adapters.copies import PerCopy
from distillzoo.adapters.expansion import DualLayer
from distillzoo.adapters.reparam import AfterNorm, Branched
from distillzoo.errors import OptionError, UnsupportedPairError

__all__ = ["check_plain"]


def check_plain(network: nn.Module, restructured: Sequence[str] = ()) -> None:
    """Refuse a network that holds layers which a distiller put there, branches or layers of two widths; so may a copy of it.

    Another distiller would train them as layers of the student's own, and export them.

    Args:
        network: What should be a student.
        restructured: Paths of modules that another member of a composition has replaced.
    Raises:
        OptionError: If it holds one.
        UnsupportedPairError: If another member has restructured it.
    """
    if restructured:
        raise UnsupportedPairError(
            f"Another method of the composition has replaced {restructured[0]} of the student {type(network).__name__} already; "
            "compose with one of those only that restructure the student."
        )
    for path, module in network.named_modules():
        if isinstance(module, AfterNorm | Branched | DualLayer | PerCopy):
            raise OptionError(
                f"{path} of the student {type(network).__name__} is a {type(module).__name__}, which a distiller put there when it "
                "took the student over; pass a plain student: a new one, or what export_student() of that distiller returns."
            )

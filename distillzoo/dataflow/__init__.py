"""What feeds a tap and what follows it, in any network: found by one dry run and numeric experiments, never by class names.

:class:`Flow` names the last linear op that feeds a tap, the batch norm behind it, the activation in front of a tap, and the first
linear op after it; :func:`reaches_by_addition` tries whether an op's output arrives at a tap through additions alone;
:class:`RemainingPath` runs what a frozen network does after a tap; :func:`inner_widths` names the layers whose channels may be made
more.
"""

from distillzoo.dataflow.experiments import reaches_by_addition, same_function
from distillzoo.dataflow.flow import Flow
from distillzoo.dataflow.replay import RemainingPath
from distillzoo.dataflow.sites import linear_sites, path_after, tap_before_activation, tap_reached_by_addition
from distillzoo.dataflow.widths import Width, inner_widths

__all__ = [
    "Flow",
    "RemainingPath",
    "Width",
    "inner_widths",
    "linear_sites",
    "path_after",
    "reaches_by_addition",
    "same_function",
    "tap_before_activation",
    "tap_reached_by_addition",
]

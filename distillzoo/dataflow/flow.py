"""What feeds a tap and what follows it, found in any network by running it once.

The graph is the one that autograd records: what really happened, whatever Python the network's ``forward`` is made of (tracers that
read the source stop at control flow). What a module computes is asked of it by numeric experiment, never of its class.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from distillzoo.dataflow.experiments import grows_with, is_linear_op
from distillzoo.errors import TapError, UnsupportedPairError, failure_of
from distillzoo.stages import Call, DryRun, Probe, is_activation, split_path
from distillzoo.types import DataSpec, Stage

__all__ = ["Flow"]


class Flow:
    """One dry run of a network, with the graph of what came from what.

    Args:
        module: The network; in eval mode during the run, its buffers untouched.
        data: Size and channels of the images.
    """

    def __init__(self, module: nn.Module, data: DataSpec) -> None:
        self.module = module
        self.data = data
        self.run = DryRun(Probe(module, data), lists=True)
        self.calls = self.run.calls
        self._linear: dict[str, bool] = {}

    def check_graph(self) -> None:
        """Refuse a network of which the dry run kept no graph, so that nothing can be followed in it.

        Raises:
            UnsupportedPairError: If what it computes keeps no gradients.
        """
        if all(call.node is None for call in self.calls):
            failed = self.run.failed
            why = "switches them off" if failed is None else f"fails where they are on ({failure_of(failed)})"
            raise UnsupportedPairError(
                f"What {type(self.module).__name__} computes of its images keeps no gradients: its forward {why}; remove that, or "
                "use a method that reads taps or logits alone (fitnet, kd)."
            ) from failed

    # ------------------------------------------------------------------ what feeds a tap

    def linear(self, tap: str) -> str:
        """Return the module path of the last linear op that feeds a tap.

        Of several that arrive without another in between (a shortcut's, a gate's) it is one whose map has the tap's size, then the
        one that lies deepest. Maps of 1 x 1 do not tell a gate from what it gates: there one that the tap grows with comes first.

        Raises:
            UnsupportedPairError: If no convolution or linear layer feeds the tap.
        """
        target = self._node(tap)
        made = {call.node: call for call in self.calls if call.node is not None and self._is_linear(call)}
        found = self.run.nearest(target, made)
        if not found:
            ops = [call.path for call in self.calls if self._is_linear(call)]
            raise UnsupportedPairError(
                f"No convolution or linear layer of {type(self.module).__name__} feeds the tap {tap!r}; its linear ops are "
                f"{', '.join(ops[-8:]) or 'none'}. Name one by hand: taps={{'student': [Stage(path=..., linear=...)]}}."
            )
        last = self._last(tap)
        shape = last.argument if split_path(tap)[1] == "input" else last.shape
        assert shape is not None
        alike = [call for call in found if _alike(call.shape, shape)] or found
        if len(alike) > 1 and all(size == 1 for size in shape[2:]):
            alike = [call for call in alike if grows_with(self.module, self.data, call.path, tap)] or alike
        return max(alike, key=self.run.depth).path

    def norm_after(self, linear: str) -> str | None:
        """Return the module path of the batch norm that reads what a linear op returned, or None."""
        op = self._last(linear)
        reads = (call for call in self.calls if call.source is op.node and call.start > op.end)
        return next((call.path for call in reads if isinstance(call.module._buffers.get("running_mean"), Tensor)), None)

    def handed_on(self, path: str) -> list[str]:
        """Return the paths of the modules that return in eval mode just what a module before them returned, the last one first."""
        made = self._last(path)
        later = (call for call in reversed(self.calls) if call.end > made.end and call.node is made.node)
        return [call.path for call in later if made.node is not None and len(self.calls_of(call.path)) == 1]

    def before_activation(self, stage: Stage) -> str:
        """Return the tap path of a stage before its activation; the stage's own where it ends without one."""
        if stage.pre is not None:
            return stage.pre
        target = self._node(stage.path)
        for call in reversed(self.calls):
            if call.node is target and self._last(call.path) is call and self._is_activation(call):
                return f"{call.path}:input"
        return stage.path

    def linear_after(self, tap: str) -> str | None:
        """Return the module path of the first linear op that runs after a tap and depends on it, or None."""
        node, time = self._node(tap), self.time(tap)
        later = sorted((call for call in self.calls if call.start >= time), key=lambda call: call.start)
        made = self.run.after([node])
        return next((call.path for call in later if call.node in made and self._is_linear(call)), None)

    def time(self, tap: str) -> int:
        """When the tap's tensor was there, on the clock of the calls."""
        call = self._last(tap)
        return call.start if split_path(tap)[1] == "input" else call.end

    def calls_of(self, path: str) -> list[Call]:
        """Return the calls of one module in order."""
        return [call for call in self.calls if call.path == path]

    def _last(self, tap: str) -> Call:
        calls = self.calls_of(split_path(tap)[0])
        if not calls:
            raise TapError(f"The forward of {type(self.module).__name__} does not reach {tap!r}; name a module that it calls.")
        return calls[-1]

    def _node(self, tap: str) -> Node:
        call = self._last(tap)
        # what an ending function takes feeds its output alone, and what follows reads that: one node serves both
        node = call.source if split_path(tap)[1] == "input" else call.node
        if node is None:
            self.check_graph()
            raise TapError(f"The tap {tap!r} of {type(self.module).__name__} does not depend on the images; name one that does.")
        return node

    def _is_linear(self, call: Call) -> bool:
        if call.path not in self._linear:
            once = len(self.calls_of(call.path)) == 1
            self._linear[call.path] = once and call.argument is not None and is_linear_op(call.module, call.argument)
        return self._linear[call.path]

    @staticmethod
    def _is_activation(call: Call) -> bool:
        return call.argument is not None and call.argument == call.shape and is_activation(call.module, call.argument)


def _alike(shape: torch.Size | None, other: torch.Size) -> bool:
    """Whether two tensors are of one size (however it is shaped), or their maps are."""
    return shape is not None and (shape.numel() == other.numel() or shape[2:] == other[2:])

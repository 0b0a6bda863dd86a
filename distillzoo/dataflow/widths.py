"""Which layers of a network have channels that may be made more, and which keep the images' channels or the classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import Node

from distillzoo.dataflow.flow import Flow
from distillzoo.errors import UnsupportedPairError

__all__ = ["Width", "inner_widths"]


@dataclass(frozen=True)
class Width:
    """Whether the channels of a layer lie inside the network.

    Args:
        shape: Shape of its input in the dry run.
        inputs: Whether its inputs come from a layer that is not the last.
        outputs: Whether its outputs go to another layer.
    """

    shape: torch.Size
    inputs: bool
    outputs: bool


def inner_widths(flow: Flow) -> dict[str, Width]:
    """Return, by path, the modules that see channels inside the network; outputs alone for a first layer.

    Listed are modules without children, and in place of its children one that holds all tensors itself: a norm with its activation.
    A layer that has a weight of two dimensions or more (convolution, linear layer) makes channels. The first ones read what none
    has made, the last ones write what none reads; channels lie inside after any that is not last. Modules that only see the images
    or what a last layer wrote are not listed, nor are those that see no tensor.

    Args:
        flow: A dry run of the network.
    Raises:
        UnsupportedPairError: If a layer with parameters does not run, or runs once inside and once outside.
    Example:
        >>> from distillzoo.types import DataSpec
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5))
        >>> {path: (w.inputs, w.outputs) for path, w in inner_widths(Flow(net, DataSpec(5, (3, 3)))).items()}
        {'0': (False, True), '1': (True, True), '2': (True, True), '3': (True, False)}
    """
    flow.check_graph()
    units = {path for path, module in flow.module.named_modules() if _is_unit(module)}
    calls = [call for call in flow.calls if call.path in units and not _lies_within(call.path, units)]
    _check_all_run(flow, {call.path for call in calls})
    makers = [call for call in calls if _makes_channels(call.module) and call.node is not None]
    read = _upstream(call.source for call in makers)
    inner = {call.node for call in makers if call.node in read}
    last = {call.node for call in makers if call.node not in read}
    found: dict[str, Width] = {}
    for call in calls:
        if call.argument is None or call.source is None:
            continue
        before = _upstream([call.source])
        inputs = bool(before & inner) and not before & last
        outputs = call.node in inner if _makes_channels(call.module) else inputs
        known = found.setdefault(call.path, Width(call.argument, inputs, outputs))
        if (known.inputs, known.outputs) != (inputs, outputs):
            raise UnsupportedPairError(
                f"{call.path} of {type(flow.module).__name__} runs several times, once where channels can be made more and once "
                "where they cannot; give each place a module of its own, or use kd."
            )
    return {path: width for path, width in found.items() if width.inputs or width.outputs}


def _is_unit(module: nn.Module) -> bool:
    own = sum(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values()))
    inside = sum(1 for _ in (*module.parameters(), *module.buffers()))
    return not any(True for _ in module.children()) or own == inside > 0


def _lies_within(path: str, units: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:number]) in units for number in range(1, len(parts)))


def _makes_channels(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim > 1


def _check_all_run(flow: Flow, run: set[str]) -> None:
    for path, module in flow.module.named_modules():
        if module._parameters and _is_unit(module) and path not in run:
            raise UnsupportedPairError(
                f"{path} of {type(flow.module).__name__} does not run as a module in eval mode, so that nothing tells which of its "
                "channels can be made more; use kd for this student."
            )


def _upstream(nodes: Iterable[Node | None]) -> set[Node | None]:
    """The nodes and all that they come from."""
    seen: set[Node | None] = set()
    waiting = [node for node in nodes if node is not None]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(parent for parent, _ in node.next_functions if parent is not None)
    return seen

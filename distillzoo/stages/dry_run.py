"""One run of a dry batch that remembers which module made what of what."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.nn.utils.parametrize import is_parametrized

if TYPE_CHECKING:
    from distillzoo.stages.probe import Probe

__all__ = ["Call", "DryRun", "tensor_of"]


def tensor_of(value: Any, images: int) -> Tensor | None:
    """Return a tensor, or of several the one that is meant: the first with a row for each image, else the first.

    A block may return more than what the next one goes on with: the size of its maps, or tokens of patches of patches, whose first
    dimension holds images and positions.

    Args:
        value: What a module took or returned.
        images: Number of images of the batch.
    Example:
        >>> tensor_of((torch.zeros(8, 3), torch.zeros(2, 5), 7), images=2).shape
        torch.Size([2, 5])
    """
    if isinstance(value, Tensor):
        return value
    tensors = [item for item in value if isinstance(item, Tensor)] if isinstance(value, tuple | list) else []
    return next((item for item in tensors if item.ndim and item.shape[0] == images), tensors[0] if tensors else None)


def _is_computed(module: nn.Module, child: str) -> bool:
    """Whether a child is no part of a module but what its parameters are computed from (:mod:`torch.nn.utils.parametrize`)."""
    return child == "parametrizations" and is_parametrized(module)


def _own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module without those of its children; in place of one that is computed, what it is computed from."""
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    if is_parametrized(module):
        for name, made in module.get_submodule("parametrizations").named_children():
            for each, parameter in made.named_parameters(recurse=False):
                own[name if each == "original" else f"{name}.{each}"] = parameter
    return own


@dataclass(eq=False)
class Call:
    """One call of one module during a dry run.

    Args:
        path: Path of the module.
        module: The module.
        start: When it began, on a clock that counts the beginnings and ends of all calls.
        argument: Shape of the first tensor that it took.
        source: What made that tensor, a node of the graph of gradients.
        end: When it ended.
        shape: Shape of what it returned; ``None`` where that is no tensor.
        node: What made it.
        alone: Whether it returned one tensor and nothing else.
    """

    path: str
    module: nn.Module
    start: int
    argument: torch.Size | None = None
    source: Node | None = None
    end: int = -1
    shape: torch.Size | None = None
    node: Node | None = None
    alone: bool = True

    @property
    def has_weights(self) -> bool:
        """Whether it is an op that mixes channels or positions: one with a weight of its own of two dimensions or more."""
        own = _own_parameters(self.module).values()
        inside = (name for name, _ in self.module.named_children() if not _is_computed(self.module, name))
        return any(p.ndim >= 2 for p in own) and not any(True for _ in inside)

    @property
    def is_norm(self) -> bool:
        """Whether it is a norm: no weights to mix by, but a scale of one number a channel, or running statistics."""
        own = _own_parameters(self.module)
        scale = own.get("weight", self.module._buffers.get("running_mean"))
        return scale is not None and scale.ndim == 1 and all(p.ndim == 1 for p in own.values()) and len(own) != 1


class DryRun:
    """The calls of all modules in the order they ended, with the graph of what came from what.

    The graph is that of gradients, kept without the tensors that a backward pass would need.

    Args:
        probe: Network and dry batch.
        lists: Whether of a module that returns a list a tensor of it is noted; such a list is one of branches.

    Attributes:
        calls: The calls in the order they ended.
        logits: What the network returned.
        failed: Why it did not run with gradients on, so that there is no graph; else None.
    """

    def __init__(self, probe: Probe, *, lists: bool = False) -> None:
        self.module = probe.module
        self.lists = lists
        self.calls: list[Call] = []
        self.failed: RuntimeError | None = None
        try:
            with probe.evaluating(), torch.enable_grad(), saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):  # noqa: ARG005
                self.logits = self._record(probe.images.clone().requires_grad_().clone())
        except RuntimeError as error:  # a network that only runs without gradients: as a teacher it may
            self.failed = error.with_traceback(None)  # which would keep the tensors of the run
            self.calls.clear()
            with probe.evaluating():
                self.logits = self._record(probe.images)

    def _record(self, images: Tensor) -> Any:
        self._root = images.grad_fn
        opened: list[Call] = []
        clock = itertools.count()

        def begin(path: str, child: nn.Module, args: Sequence[Any]) -> None:
            first = next((item for item in args if isinstance(item, Tensor)), None)
            shape, source = (None, None) if first is None else (first.shape, first.grad_fn)
            opened.append(Call(path, child, next(clock), shape, source))

        def end(output: Any) -> None:
            call = opened.pop()
            call.end, call.alone = next(clock), isinstance(output, Tensor)
            found = None if isinstance(output, list) and not self.lists else tensor_of(output, len(images))
            if found is not None:
                call.shape, call.node = found.shape, found.grad_fn
            self.calls.append(call)

        handles: list[Any] = []
        for path, child in self.module.named_modules():
            handles.append(child.register_forward_pre_hook(lambda m, a, path=path: begin(path, m, a)))
            handles.append(child.register_forward_hook(lambda m, a, output: end(output)))  # noqa: ARG005
        try:
            return self.module(images)
        finally:
            for handle in handles:
                handle.remove()

    def last(self, path: str) -> Call | None:
        """Return the last call of the module at ``path``, None where the forward does not reach it."""
        return next((call for call in reversed(self.calls) if call.path == path), None)

    @cached_property
    def depths(self) -> dict[Node, int]:
        """Every node between images and logits with the length of the longest way to it from the images, in that order."""
        target = self.logits.grad_fn if isinstance(self.logits, Tensor) else None
        depths: dict[Node, int | None] = {}
        waiting = [] if target is None or self._root is None else [target]
        if self._root is not None:
            depths[self._root] = 0
        while waiting:
            node = waiting[-1]
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            missing = [parent for parent in parents if parent not in depths]
            if node in depths or not missing:
                waiting.pop()
            if node not in depths:
                if missing:
                    waiting.extend(missing)
                    continue
                reached = [depth for parent in parents if (depth := depths[parent]) is not None]
                depths[node] = 1 + max(reached) if reached else None  # None: made of parameters alone
        return dict(sorted(((n, d) for n, d in depths.items() if d is not None), key=lambda item: item[1]))

    def depth(self, call: Call) -> int:
        """Return the length of the longest way from the images to what a call returned; -1 where the logits do not come from it."""
        return -1 if call.node is None else self.depths.get(call.node, -1)

    def nearest(self, start: Node, made: Mapping[Node, Call], through: Callable[[Node], bool] | None = None) -> list[Call]:
        """Return the calls that a node comes from with no other of them in between.

        Args:
            start: The node.
            made: The calls that are looked for, by what made their outputs.
            through: Which nodes may lie in between; ``None``: any.
        """
        found, seen, waiting = [], {start}, [start]
        while waiting:
            node = waiting.pop()
            if node in made:
                found.append(made[node])
            elif through is None or through(node):
                for parent, _ in node.next_functions:
                    if parent is not None and parent not in seen:
                        seen.add(parent)
                        waiting.append(parent)
        return found

    def after(self, nodes: Iterable[Node | None]) -> set[Node]:
        """Return the nodes, and every node that is made of one of them."""
        found = {node for node in nodes if node is not None}
        for node in self.depths:  # what a node is made of comes before it
            if any(parent in found for parent, _ in node.next_functions):
                found.add(node)
        return found

    @cached_property
    def trunk(self) -> set[Node]:
        """The nodes that every way from the images to the logits passes: ends of blocks, never the inside of a branch."""
        order = list(self.depths)
        position = {node: number for number, node in enumerate(order)}
        reach = 0
        found: set[Node] = set()
        children: dict[Node, int] = {}
        for node in order:
            for parent, _ in node.next_functions:
                if parent in position:
                    children[parent] = max(children.get(parent, 0), position[node])
        for number, node in enumerate(order):
            if reach <= number:
                found.add(node)
            reach = max(reach, children.get(node, 0))
        return found

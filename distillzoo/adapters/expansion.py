"""Layers that are two layers in one: a wide one, and the narrow one whose weights are a slice of the wide one's.

A network whose layers are replaced by these runs in two modes. Narrow, it is the network that was given. Wide, every channel in
between stands ``ratio`` times, and at the start the wide network computes what the narrow one does: every activation is ``ratio``
copies of (activation / ratio). The copies of a channel lie side by side, channel c at ``c * ratio .. c * ratio + ratio - 1``, so
that concatenation, splitting and groups of channels keep the order; the slice takes every ``ratio``-th channel. Copies in whole
blocks would give the same plain networks, permuted, and would break in these three.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DualLayer", "DualOp", "Mode", "emptied", "pick", "tile"]


class Mode:
    """Whether the layers that share this object are wide; narrow but for ``with mode:`` blocks."""

    def __init__(self) -> None:
        self.wide = False

    def __enter__(self) -> None:
        self.wide = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.wide = False


def tile(tensor: Tensor, ratio: int, dims: tuple[int, ...], *, divide: bool = False) -> Tensor:
    """Repeat every entry along some dimensions, its copies side by side.

    Args:
        tensor: What is repeated.
        ratio: How often.
        dims: Along which dimensions.
        divide: Whether the values are divided by ``ratio``, as those that make an expanded activation are.
    Example:
        >>> tile(torch.tensor([2.0, 4.0]), 2, (0,), divide=True)
        tensor([1., 1., 2., 2.])
    """
    for dim in dims:
        tensor = tensor.repeat_interleave(ratio, dim)
    return tensor / ratio if divide else tensor


def pick(tensor: Tensor, ratio: int, dims: tuple[int, ...], *, multiply: bool = False) -> Tensor:
    """Undo :func:`tile`: take the first of the copies along some dimensions.

    Args:
        tensor: What is sliced.
        ratio: How many copies there are.
        dims: Along which dimensions.
        multiply: Whether the values are multiplied by ``ratio``.
    Example:
        >>> pick(torch.tensor([1.0, 1.5, 2.0, 2.5]), 2, (0,), multiply=True)
        tensor([2., 4.])
    """
    for dim in dims:
        tensor = tensor[(slice(None),) * dim + (slice(None, None, ratio),)]
    return tensor * ratio if multiply else tensor


class DualLayer(nn.Module):
    """What all layers of two widths share: tensors that are held wide and read in either mode.

    A subclass that :meth:`filled` makes plain again keeps in ``shell`` what :func:`emptied` returned.

    Args:
        ratio: Width of the wide layer, as a multiple.
        mode: What says which of the two it is now.
        shared: Whether the narrow layer is a slice of the wide one; else it has parameters of its own.
    """

    shell: nn.Module

    def __init__(self, ratio: int, mode: Mode, *, shared: bool = True) -> None:
        super().__init__()
        self.ratio, self.mode, self.shared = ratio, mode, shared
        self._held: dict[str, tuple[tuple[int, ...], bool]] = {}

    def hold(
        self, name: str, tensor: Tensor | None, dims: tuple[int, ...], *, divide: bool = False, train: bool | None = None
    ) -> None:
        """Hold a narrow tensor, or None, expanded along ``dims``; read it with :meth:`read`. ``train``: None is as the tensor."""
        self._held[name] = dims, divide
        if tensor is None:
            self.register_parameter(name, None)
            return
        train = tensor.requires_grad if train is None else train
        self.register_parameter(name, nn.Parameter(tile(tensor.detach(), self.ratio, dims, divide=divide).clone(), train))
        if not self.shared:
            self.register_parameter(f"own_{name}", nn.Parameter(tensor.detach().clone(), train))

    def read(self, name: str) -> Tensor | None:
        """Return a tensor as the current mode has it."""
        tensor: Tensor | None = getattr(self, name)
        if tensor is None or self.mode.wide:
            return tensor
        if not self.shared:
            own: Tensor = getattr(self, f"own_{name}")
            return own
        dims, divided = self._held[name]
        return pick(tensor, self.ratio, dims, multiply=divided)

    def filled(self, parameters: Mapping[str, Tensor | None], buffers: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Return a plain layer with tensors in it, copied; parameters that are held frozen are frozen there."""
        layer = copy.deepcopy(self.shell).train(self.training)
        for name, tensor in parameters.items():
            held = getattr(self, name, None)  # a weight that is made of branches is not held itself
            trains = any(each.requires_grad for each in (self.parameters() if held is None else [held]))
            layer._parameters[name] = None if tensor is None else nn.Parameter(tensor.detach().clone(), trains)
        for name, tensor in (buffers or {}).items():
            layer._buffers[name] = tensor.detach().clone()
        return layer

    @torch.no_grad()
    def perturb(self, deviation: float) -> None:
        """Add normal noise from torch's generator to weights that read copies and make copies, so that copies come to differ.

        It sums to zero over the copies that are read, which are alike at the start, so that the function is unchanged; the rows
        of the slice are spared.

        Args:
            deviation: Of what is added to a wide weight.
        """
        kept = math.sqrt(1.0 - 1.0 / self.ratio)  # of the deviation of r draws, once their mean is taken off
        for name, (dims, _) in self._held.items():
            tensor: Tensor | None = getattr(self, name)
            if tensor is not None and dims == (0, 1):
                wide = tensor.view(-1, self.ratio, tensor.shape[1] // self.ratio, self.ratio, *tensor.shape[2:])
                noise = torch.randn_like(wide[:, 1:]) * (deviation / kept)
                wide[:, 1:] += noise - noise.mean(3, keepdim=True)


class DualOp(DualLayer):
    """A convolution or linear layer of two widths.

    With activations as copies of (a / r): rows of the weight are repeated and divided by r where the outputs are expanded, columns
    repeated where the inputs are, since sum over r copies of W (a / r) is W a. Groups stay, each r times as wide; a depth-wise
    convolution gets r times the groups instead, and its weight, which sums over no copies, is repeated as it is.

    Args:
        op: What is expanded.
        ratio: Width of the wide layer, as a multiple.
        mode: What says which of the two it is now.
        inputs: Whether its inputs are expanded.
        outputs: Whether its outputs are.
        kernel: What makes the weight in place of a parameter: a module with ``kernel()`` of the same mode.
        shared: Whether the narrow layer is a slice of the wide one.
    """

    def __init__(
        self, op: nn.Module, ratio: int, mode: Mode, *, inputs: bool, outputs: bool, kernel: nn.Module | None = None,
        shared: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(ratio, mode, shared=shared)
        assert isinstance(op, nn.Conv2d | nn.Linear)
        self.shell = emptied(op)
        self.depthwise = inputs and outputs and isinstance(op, nn.Conv2d) and 1 < op.groups == op.in_channels == op.out_channels
        self.branches = kernel
        if kernel is None:
            dims = (0,) if self.depthwise else (0,) * outputs + (1,) * inputs
            self.hold("weight", op.weight, dims, divide=outputs and not self.depthwise)
        self.hold("bias", op.bias, (0,) * outputs, divide=outputs)

    def weights(self) -> Tensor:
        """Return the weight of the current mode; branches are merged."""
        weight = self.read("weight") if self.branches is None else self.branches.kernel()  # type: ignore[operator]
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Map the op's input, of the current mode's width, to its output."""
        weight, bias, op = self.weights(), self.read("bias"), self.shell
        if isinstance(op, nn.Linear):
            return F.linear(x, weight, bias)
        assert isinstance(op, nn.Conv2d)
        groups = op.groups * (self.ratio if self.depthwise and self.mode.wide else 1)
        padding: str | int | tuple[int, ...] = op.padding
        if op.padding_mode != "zeros":
            x, padding = F.pad(x, op._reversed_padding_repeated_twice, mode=op.padding_mode), 0
        return F.conv2d(x, weight, bias, op.stride, padding, op.dilation, groups)

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """Return the narrow op as a plain one that shares no tensor; branches are merged into its weight."""
        return self.filled({"weight": self.weights(), "bias": self.read("bias")})


def emptied(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer that holds no tensor: what it was, for :meth:`DualLayer.filled`."""
    tensors = {id(t): None for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))}
    return copy.deepcopy(layer, dict(tensors))  # None stands for every tensor

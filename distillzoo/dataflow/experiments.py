"""Small numeric experiments on modules: what they compute is asked of them, not of their class."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distillzoo.errors import TapError
from distillzoo.stages import Probe, split_path
from distillzoo.streams import Stream, forked_generator
from distillzoo.taps.recording import ActivationHook, ActivationWatch, InputHook, OutputHook, Recorder
from distillzoo.types import DataSpec

__all__ = ["LastFunction", "grows_with", "is_linear_op", "last_function", "reaches_by_addition", "same", "same_function", "watch"]

_TOLERANCE = 1e-3  # relative, of single-precision sums over a layer's inputs
_DOUBLE_TOLERANCE = 1e-6  # relative, of what a whole network makes of another order of sums in double precision
_DRAWS = Stream.named(0, "dataflow", "training")
_TRIALS = 4  # runs in training mode where something is drawn: one on which nothing is dropped tells little
_FAR = 1e3  # times the largest value: every gate is open or shut there
_ULPS = 8  # a few additions err by fewer; 1 / sqrt(1 + 1e-5), a fresh norm's slope, by more than forty


def _draw(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(like)


def same(one: Tensor, other: Tensor, tolerance: float = _TOLERANCE) -> bool:
    """Whether two tensors agree within what single precision and another order of sums may cost."""
    return one.shape == other.shape and bool((one - other).abs().max() <= tolerance * other.abs().max())


@torch.no_grad()
def is_linear_op(module: nn.Module, shape: torch.Size) -> bool:
    """Whether a leaf computes an affine map of its input whose output channels scale with the rows of its weight and bias.

    Args:
        module: The leaf.
        shape: Shape of its input.
    """
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    leaf = not list(module.children()) and not module._buffers and own.keys() <= {"weight", "bias"}
    if not leaf or weight is None or weight.ndim < 2 or not weight.is_floating_point():
        return False
    if weight.dtype in (torch.float16, torch.bfloat16):  # sums of so few digits would look bent
        module = copy.deepcopy(module).float()
        own = dict(module.named_parameters(recurse=False))
        weight = own["weight"]
    x, y = _draw(shape, weight, 0), _draw(shape, weight, 1)
    try:
        fx, fy, origin = module(x), module(y), module(torch.zeros_like(x))
        rows = _draw((len(weight),), weight, 2)
        scaled = {name: rows.view(-1, *[1] * (tensor.ndim - 1)) * tensor for name, tensor in own.items()}
        changed = functional_call(module, scaled, (x,))
    except (RuntimeError, TypeError, ValueError):
        return False  # it wants other inputs: not an op that branches can be made of
    if fx.ndim < 2 or not same(module(2.0 * x - y) - origin, 2.0 * (fx - origin) - (fy - origin)):
        return False
    dim = 1 if weight.ndim > 2 else fx.ndim - 1
    return fx.shape[dim] == len(rows) and same(changed, fx * rows.view(-1, *[1] * (fx.ndim - 1 - dim)))


def same_function(one: nn.Module, other: nn.Module, data: DataSpec) -> bool:
    """Whether two networks return the same for a dry batch in eval mode, up to rounding in their own floating type.

    Args:
        one: A network.
        other: Another one.
        data: Size and channels of the images.
    """
    results = []
    for network in (one, other):
        probe = Probe(network, data)
        with probe.evaluating():
            results.append(network(probe.images))
    one_result, other_result = results
    return same(one_result, other_result, _DOUBLE_TOLERANCE if other_result.dtype is torch.float64 else _TOLERANCE)


@torch.no_grad()
def reaches_by_addition(module: nn.Module, data: DataSpec, source: str, tap: str, *, training: bool = False) -> bool:
    """Whether what is added to the output of a module arrives at a tap unchanged.

    Args:
        module: The network.
        data: Size and channels of the images.
        source: Module path of what is moved.
        tap: Tap path of what is watched.
        training: Whether it is tried in training mode, with draws of our own: blocks may drop there what they add in eval mode.
    """
    probe = Probe(module, data)
    first: Tensor | None = None
    for draw in range(_TRIALS) if training else (None,):
        at_source, before = watch(probe, source, tap, draw=draw)
        if first is not None and torch.equal(first, before):
            return True  # nothing that is drawn arrives there
        shift = 8.0 * before.abs().max().clamp_min(1.0) * _draw(at_source.shape, before, 0)
        after = watch(probe, source, tap, shift, draw=draw)[1]
        if after.shape != shift.shape:
            return False
        allowed = _ULPS * torch.finfo(after.dtype).eps * (before.abs().max() + shift.abs().max())
        if not bool((after - before - shift).abs().max() <= allowed):
            return False
        first = before
    return True


@torch.no_grad()
def grows_with(module: nn.Module, data: DataSpec, source: str, tap: str) -> bool:
    """Whether what arrives at a tap grows on and on with what a module returns; what a gate returns saturates.

    Args:
        module: The network.
        data: Size and channels of the images.
        source: Module path of what is moved.
        tap: Tap path of what is watched.
    """
    probe = Probe(module, data)
    at_source, before = watch(probe, source, tap)
    shift = _FAR * at_source.abs().max().clamp_min(1.0) * _draw(at_source.shape, at_source, 0)
    once, twice = (float((watch(probe, source, tap, by * shift)[1] - before).abs().sum()) for by in (1.0, 2.0))
    return not twice <= 1.5 * once  # not a number where the type's range ends: it has grown


def watch(probe: Probe, source: str, tap: str, shift: Tensor | None = None, *, draw: int | None = None) -> tuple[Tensor, Tensor]:
    """Return what a module returns and what then arrives at a tap.

    Args:
        probe: Dry batch and network.
        source: Module path.
        tap: Tap path.
        shift: What is added to the module's output before it goes on.
        draw: ``None`` runs in eval mode, a number in training mode, with what dropout draws under that number.
    Raises:
        TapError: If no such tensor passes the tap.
    """
    seen: list[Tensor] = []
    path, side = split_path(tap)

    def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        seen.append(output.clone())
        return output if shift is None else output + shift

    recorder = Recorder()
    hook = {"input": InputHook, "output": OutputHook, "activation": ActivationHook}[side](recorder, tap, clone=True)
    handles = [probe.module.get_submodule(source).register_forward_hook(move), hook.attach(probe.module.get_submodule(path))]
    recorder.start(len(probe.images))
    try:
        with ExitStack() as mode:
            mode.enter_context(probe.evaluating() if draw is None else probe.training())
            if draw is not None:
                mode.enter_context(forked_generator(_DRAWS, draw, device=probe.images.device))
            if side == "activation":
                mode.enter_context(ActivationWatch(recorder))
            probe.module(probe.images)
        return seen[-1], recorder.values[tap]
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class LastFunction:
    """A call of a function that activates, to be repeated with another tensor.

    Args:
        function: The function.
        rest: What it took after the tensor.
        named: What it took by name.
    """

    function: Any
    rest: tuple[Any, ...]
    named: Mapping[str, Any]

    def __call__(self, value: Tensor) -> Tensor:
        """Map a tensor to another of its shape."""
        result: Tensor = self.function(value, *self.rest, **self.named)
        return result


def last_function(probe: Probe, path: str) -> LastFunction:
    """Return the function that ends a module's last forward, a function such as ``relu`` that is no module.

    Args:
        probe: Dry batch and network.
        path: Module path.
    Raises:
        TapError: If the forward does not end with such a function.
    """
    found: list[LastFunction] = []
    watching = ActivationWatch(Recorder())

    def read(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
        activation = watching.recorder.activation
        found[:] = [LastFunction(*activation[2:])] if activation is not None and activation[1] is output else []

    handle = probe.module.get_submodule(path).register_forward_hook(read)
    try:
        with probe.evaluating(), watching:
            probe.module(probe.images)
    finally:
        handle.remove()
    if not found:
        raise TapError(
            f"The forward of {path} of {type(probe.module).__name__} does not end with a function that activates; name a module "
            "that does, as 'path:input'."
        )
    return found[0]

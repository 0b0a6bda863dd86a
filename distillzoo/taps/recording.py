"""What hooks write down while a network runs: tensors by name, as they were when they passed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from distillzoo.errors import TapError
from distillzoo.stages import tensor_of

__all__ = ["ActivationHook", "ActivationWatch", "Hook", "InputHook", "OutputHook", "Recorder", "remove_hooks"]

_NAMES = ("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "hardswish", "hardtanh",
          "hardsigmoid", "sigmoid", "tanh", "clamp", "clamp_min")  # fmt: skip
_FUNCTIONS = {
    function: name.endswith("_")
    for base in _NAMES
    for name in (base, f"{base}_")
    for owner in (F, torch, Tensor)
    if (function := getattr(owner, name, None)) is not None
}


class Recorder:
    """What the hooks of one network's taps write to, during its own passes only."""

    def __init__(self) -> None:
        self.active = False
        self.images = 0
        self.values: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}
        # what the last function that activates took and returned, the function, and what else it took
        self.activation: tuple[Tensor, Any, Any, tuple[Any, ...], Mapping[str, Any]] | None = None
        self.doubtful: Collection[str] = ()
        self.unread: set[str] = set()  # the doubtful ones that found no activation

    def start(self, images: int, doubtful: Collection[str] = ()) -> None:
        """Begin a pass of so many images, in which some taps are doubtful: where there is no activation the output is read."""
        self.images, self.doubtful, self.unread = images, doubtful, set()
        self.values, self.versions, self.activation, self.active = {}, {}, None, True

    def stop(self) -> None:
        """End a pass."""
        self.values, self.versions, self.activation, self.active = {}, {}, None, False

    def record(self, name: str, value: Any, clone: bool) -> None:
        """Keep a tensor, or of several the one that is meant.

        Raises:
            TapError: If there is none.
        """
        tensor = tensor_of(value, self.images)
        if tensor is None:
            raise TapError(f"The tap {name!r} saw a {type(value).__name__}; a tap needs a module that takes or returns one tensor.")
        self.values[name] = tensor.clone() if clone else tensor
        if not torch.compiler.is_compiling() and not tensor.is_inference():  # inference tensors keep no version
            self.versions[name] = self.values[name]._version

    def overwritten(self) -> list[str]:
        """Return the names of the tensors that were changed in place after they were recorded."""
        return [name for name, version in self.versions.items() if self.values[name]._version != version]


class Hook:
    """Forward hook or forward pre-hook that hands one tensor to a recorder.

    Args:
        recorder: Where the tensor goes.
        name: Name of the tap.
        clone: Whether a copy goes there, since the network overwrites the tensor.
    """

    def __init__(self, recorder: Recorder, name: str, *, clone: bool) -> None:
        self.recorder = recorder
        self.name = name
        self.clone = clone

    def attach(self, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        """Register on a module."""
        register: Callable[[Any], torch.utils.hooks.RemovableHandle] = module.register_forward_hook
        return register(self)


class OutputHook(Hook):
    """Records what a module returns."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        """Take the output."""
        if self.recorder.active:
            self.recorder.record(self.name, output, self.clone)


class InputHook(Hook):
    """Records what a module takes."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        """Take the first input."""
        if self.recorder.active:
            self.recorder.record(self.name, args[0] if args else None, self.clone)

    def attach(self, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        """Register on a module."""
        return module.register_forward_pre_hook(self)


class ActivationHook(Hook):
    """Records what a module's last function took, a function such as ``relu`` that is no module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        """Take what was kept of the function whose result is the output, or of several tensors the one that is meant."""
        if not self.recorder.active:
            return
        found = self.recorder.activation
        before = found[0] if found is not None and found[1] is tensor_of(output, self.recorder.images) else None
        if self.name in self.recorder.doubtful:  # of several calls of a module the last one counts
            if before is None:
                self.recorder.unread.add(self.name)
            else:
                self.recorder.unread.discard(self.name)
        elif before is None:
            raise TapError(
                f"The tap {self.name!r} asks for what a {type(module).__name__} was before its activation, and its forward does "
                f"not end with a call of one in {'training' if module.training else 'eval'} mode; name a module that reads it, as "
                "'path:input'."
            )
        self.recorder.record(self.name, output if before is None else before, self.clone)


class ActivationWatch(TorchFunctionMode):
    """Tells a recorder what every function that activates took, while the block runs.

    Args:
        recorder: Where it is kept until the next such function.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in _FUNCTIONS or not args:
            return func(*args, **kwargs)
        overwrites = _FUNCTIONS[func] or kwargs.get("inplace") or (func is F.relu and len(args) > 1 and args[1])
        before = args[0].clone() if overwrites else args[0]
        output = func(*args, **kwargs)
        self.recorder.activation = (before, output, func, args[1:], kwargs)
        return output


def remove_hooks(module: nn.Module) -> nn.Module:
    """Remove this package's hooks from a module and all its children, in place."""
    for child in module.modules():
        for hooks in (child._forward_hooks, child._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
                del hooks[key]
    return module

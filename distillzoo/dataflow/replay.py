"""Run what a frozen network does after a tap, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from distillzoo.dataflow.experiments import LastFunction, last_function, same, watch
from distillzoo.dataflow.flow import Flow
from distillzoo.errors import UnsupportedPairError
from distillzoo.stages import Probe, split_path

__all__ = ["RemainingPath"]


class _Run:
    """What the parts of a remaining path share during one pass."""

    value: Tensor  # what arrives at the tap

    def __init__(self, batch: int) -> None:
        self.batch = batch  # of the dry run
        self.counts: dict[str, int] = {}  # calls so far, by module
        self.fill: float | None = float("nan")  # of tensors that nobody should read, while it is verified that nobody does
        self.dense = False  # whether those tensors take memory, as what works in place needs

    def count(self, path: str) -> int:
        """Count a call; returns how many came before it."""
        self.counts[path] = self.counts.get(path, 0) + 1
        return self.counts[path] - 1


class _ReachedError(Exception):
    """Ends a pass with the output of its last op: nothing after it is run."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


class _Skipped(nn.Module):
    """Stands for a module that runs before the tap: returns tensors of its outputs' shapes, at no cost."""

    def __init__(self, run: _Run, path: str, shapes: Sequence[torch.Size]) -> None:
        super().__init__()
        self.run, self.path, self.shapes = run, path, tuple(shapes)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        rows, *rest = self.shapes[self.run.count(self.path)]
        shape = (rows * self.run.value.shape[0] // self.run.batch, *rest)
        value, fill = self.run.value, self.run.fill
        if self.run.dense:
            return value.new_empty(shape) if fill is None else value.new_full(shape, fill)
        return value.new_full((), fill or 0.0).expand(shape)


class _Entry(nn.Module):
    """Stands for the tap's module: hands the given value on where the tap is, in the last of its calls.

    Args:
        run: The pass.
        path: The module's path.
        side: Whether the tap is the module's input, its output, or what the function that ends its forward takes.
        calls: How often it runs.
        inner: The module.
        function: That function, where the tap is what it takes.
    """

    def __init__(self, run: _Run, path: str, side: str, calls: int, inner: nn.Module, function: LastFunction | None = None) -> None:
        super().__init__()
        self.run, self.path, self.side, self.calls, self.inner, self.function = run, path, side, calls, inner, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.run.count(self.path) + 1 < self.calls:
            return self.inner(*args, **kwargs)
        value = self.run.value.clone()  # what follows may work in place, and the value is somebody's target
        if self.side == "input":
            return self.inner(value, *args[1:], **kwargs)
        return value if self.function is None else self.function(value)


class _Exit(nn.Module):
    """Stands for the last op."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise _ReachedError(self.inner(*args, **kwargs))


class RemainingPath:
    """What a frozen network does from a tap to its logits, or to an op: exactly its own modules, nothing that comes before.

    The network's own ``forward`` runs on a twin that shares every module, except that those which run before the tap are skipped
    and the tap's value is given. A value of smaller height and width than the tap's is allowed where the modules allow it. Tokens
    before the grid (a class token, which a map does not hold) become the mean of the map.

    Args:
        flow: A dry run of the network.
        tap: Tap path where the path begins.
        shape: ``(C, H, W)`` of the tap as it is handed out.
        size: ``(H, W)`` of the maps that will be given.
        stop: Module path of the op whose output is the result; ``None`` goes on to the logits.
    Raises:
        UnsupportedPairError: If what follows the tap reads other tensors as well, or cannot be cut there.
    """

    __slots__ = ("_images", "_network", "_prefix", "_raw", "_root", "_run", "_shape")  # like the Teacher: no part of who holds it

    def __init__(self, flow: Flow, tap: str, shape: Sequence[int], size: Sequence[int], stop: str | None = None) -> None:
        self._network = flow.module
        probe = Probe(flow.module, flow.data)
        source, raw = watch(probe, stop or "", tap)
        self._run, self._images = _Run(len(raw)), probe.images.shape[1:]
        self._raw, self._shape = raw.shape, tuple(shape)
        self._prefix = raw.shape[1] - shape[1] * shape[2] if raw.ndim == 3 else 0
        self._root = _graft(flow.module, self._replacements(flow, tap, stop))
        if not self._runs(raw, source, size):
            self._run.dense = True
            if not self._runs(raw, source, size):
                raise UnsupportedPairError(
                    f"The guide follows {type(flow.module).__name__} from {tap!r} to {stop or 'its logits'}, and what lies there "
                    f"reads other tensors as well, cannot be cut or takes no maps of {tuple(size)}; name the teacher's stages with "
                    "taps=, or use guide=False."
                )
        self._run.fill = None
        with torch.enable_grad():
            result = self(raw.new_zeros((len(raw), self._shape[0], *size)).requires_grad_())
        if not result.requires_grad:
            raise UnsupportedPairError(
                f"The guide follows {type(flow.module).__name__} from {tap!r} to {stop or 'its logits'}, and gradients do not: its "
                "forward switches them off or detaches what it computes. Remove that, or use guide=False."
            )

    @torch.no_grad()
    def _runs(self, raw: Tensor, expected: Tensor, size: Sequence[int]) -> bool:
        """Whether the path gives what the network gave, from the tap alone, and takes maps of another size."""
        try:
            self(raw.new_zeros((len(raw), self._shape[0], *size)))
            return same(self._follow(raw), expected)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return False

    def __call__(self, features: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` features of the tap to ``(B, num_classes)`` logits, or to the op's output.

        The network computes in its own floating type; the result has that of the features.
        """
        like = next((p for p in self._network.parameters() if p.is_floating_point()), features)
        return self._follow(self._as_raw(features.to(like.dtype))).to(features.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def _follow(self, raw: Tensor) -> Tensor:
        self._run.value, self._run.counts = raw, {}
        try:
            result: Tensor = self._root(raw.new_zeros(()).expand(raw.shape[0], *self._images))
        except _ReachedError as reached:
            result = reached.output
        del self._run.value
        return result

    def _as_raw(self, features: Tensor) -> Tensor:
        if len(self._raw) == 2:
            return features.flatten(1)
        if len(self._raw) == 3:
            tokens = features.flatten(2).transpose(1, 2)
            return torch.cat([tokens.mean(1, keepdim=True).expand(-1, self._prefix, -1), tokens], 1)
        return features if tuple(self._raw[1:]) == self._shape else features.permute(0, 2, 3, 1)

    def _replacements(self, flow: Flow, tap: str, stop: str | None) -> dict[str, nn.Module]:
        path, side = split_path(tap)
        time = flow.time(tap)
        function = last_function(Probe(flow.module, flow.data), path) if side == "activation" else None
        entry = _Entry(self._run, path, side, len(flow.calls_of(path)), flow.module.get_submodule(path), function)
        replaced: dict[str, nn.Module] = {path: entry}
        if stop is not None:
            replaced[stop] = _Exit(flow.module.get_submodule(stop))
        for name, _ in flow.module.named_modules():  # parents come before their children
            calls = flow.calls_of(name)
            inside = any(name.startswith(f"{other}.") for other in replaced)
            shapes = [call.shape for call in calls if call.end < time and call.alone and call.shape is not None]
            if calls and name != path and not inside and len(shapes) == len(calls):
                replaced[name] = _Skipped(self._run, name, shapes)
        return replaced


def _graft(module: nn.Module, replaced: Mapping[str, nn.Module], prefix: str = "") -> nn.Module:
    """A twin of a module with other modules at some paths, which shares everything else with it."""
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        path = prefix + name
        deeper = any(other.startswith(f"{path}.") for other in replaced)
        children[name] = replaced.get(path) or (_graft(child, replaced, f"{path}.") if deeper and child is not None else child)
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_modules"] = children
    return twin

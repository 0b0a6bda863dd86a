"""Find a network's stages and what its classifier reads: declared, from timm's ``feature_info``, a table, or a dry run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distillzoo.errors import TapError, near_matches
from distillzoo.registry import STAGE_FINDERS
from distillzoo.types import DataSpec, Layout, Stage

__all__ = ["Probe", "classifier_input", "find_stages", "resolve_stages", "split_path", "to_features"]

_MOST_STAGES = 4  # feature_info lists stems as well: of a longer list the last four are the stages
_LINEAR = (nn.Linear, nn.Conv2d)


def split_path(path: str) -> tuple[str, Literal["input", "output"]]:
    """Split a tap path into module path and which side of it is meant.

    Example:
        >>> split_path("layer1.0.relu:input"), split_path("layer1")
        (('layer1.0.relu', 'input'), ('layer1', 'output'))
    """
    name, _, side = path.partition(":")
    if side not in ("", "input", "output"):
        raise TapError(f"A tap path ends in ':input', ':output' or neither; got {path!r}.")
    return name, "input" if side == "input" else "output"


class Probe:
    """A dry batch: two images of the size and channels of ``data``, on the module's device and in its floating type.

    Args:
        module: The network to be probed.
        data: Image size and channels.
    """

    def __init__(self, module: nn.Module, data: DataSpec) -> None:
        self.module = module
        self.data = data
        like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
        count = 2 * data.channels * data.input_size[0] * data.input_size[1]
        values = torch.linspace(-1.0, 1.0, count, dtype=torch.float64).mul(311.0).sin()  # smooth, and no two images alike
        self.images = values.to(like).view(2, data.channels, *data.input_size)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run the block in eval mode without gradients; training flags and buffers are put back as they were."""
        flags = [(child, child.training) for child in self.module.modules()]
        buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for child, flag in flags:
                child.training = flag

    def layout(self, value: Tensor, declared: Layout, prefix: int) -> tuple[Layout, int, tuple[int, int]]:
        """Decide how a tapped tensor is laid out: (layout, number of prefix tokens, token grid)."""
        if value.ndim == 3:
            tokens = value.shape[1] - prefix
            return "tokens", prefix, self._grid(tokens)
        if value.ndim == 4 and declared == "auto":
            declared = "nhwc" if _looks_channels_last(value, self.data) else "nchw"
        return declared, 0, (0, 0)

    def _grid(self, tokens: int) -> tuple[int, int]:
        height, width = self.data.input_size
        rows = math.isqrt(max(tokens * height // width, 1))
        if rows * (tokens // max(rows, 1)) != tokens:
            raise TapError(f"{tokens} tokens do not form a grid for images of {height}x{width}; tap a module that returns maps.")
        return rows, tokens // rows

    def run(self, on_output: Any) -> Any:
        """Run the dry batch with ``on_output(path, module, args, output)`` called after every module; returns the logits."""
        handles = [
            child.register_forward_hook(lambda m, a, o, path=path: on_output(path, m, a, o))
            for path, child in self.module.named_modules()
        ]
        try:
            with self.evaluating():
                result: Any = self.module(self.images)
        finally:
            for handle in handles:
                handle.remove()
        return result


def _looks_channels_last(value: Tensor, data: DataSpec) -> bool:
    """Whether a 4-d tensor has its two spatial sizes, which share the image's aspect, in the middle."""
    height, width = data.input_size
    middle = value.shape[1] * width == value.shape[2] * height
    last = value.shape[2] * width == value.shape[3] * height
    return middle and not last


def to_features(value: Tensor, layout: Layout, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Return a tapped tensor as ``(B, C, H, W)``, or ``(B, D)`` if it is a vector."""
    if layout == "tokens":
        tokens = value[:, prefix:]
        return tokens.transpose(1, 2).reshape(value.shape[0], value.shape[2], *grid)
    if layout == "vector":
        return value.flatten(1)
    if layout == "nhwc":
        return value.permute(0, 3, 1, 2)
    return value


def _stage(item: Stage | str) -> Stage:
    return item if isinstance(item, Stage) else Stage(path=item)


def _check_paths(module: nn.Module, stage: Stage) -> None:
    paths = dict(module.named_modules())
    for path in (stage.path, stage.pre, stage.linear, stage.linear_norm, stage.norm):
        if path is not None and split_path(path)[0] not in paths:
            near = near_matches(split_path(path)[0], paths, limit=5) or list(paths)[1:6]
            raise TapError(
                f"{type(module).__name__} has no module {split_path(path)[0]!r}; the nearest paths are {', '.join(near)}. "
                "A tap is a module path, with ':input' after it for the module's input."
            )


def resolve_stages(
    module: nn.Module, given: Sequence[Stage | str] | Mapping[str, Stage | str]
) -> tuple[tuple[Stage, ...], dict[str, Stage]]:
    """Turn taps that a user named into stages and extra taps.

    Args:
        module: The network.
        given: Stages or tap paths shallow to deep; or a mapping in which ``stage1`` .. ``stageN`` are the stages and any other
            name is a tap of its own (``pooled`` replaces what was found).
    Raises:
        TapError: If a path does not exist, or there is no stage.
    """
    items = {f"stage{number}": item for number, item in enumerate(given, 1)} if not isinstance(given, Mapping) else dict(given)
    named = {name: _stage(item) for name, item in items.items()}
    for stage in named.values():
        _check_paths(module, stage)
    count = sum(name.removeprefix("stage").isdigit() for name in named)
    stages = [named.pop(f"stage{number}", None) for number in range(1, count + 1)]
    if not count:
        found = declared_stages(module)
        return (found or ()), named
    if None in stages:
        raise TapError(f"Stages must be named stage1 .. stage{count} without a gap; got {', '.join(items)}.")
    return tuple(stage for stage in stages if stage is not None), named


def declared_stages(module: nn.Module) -> tuple[Stage, ...] | None:
    """Return the stages that a network declares itself (``stages``: a tuple of :class:`Stage`, maybe empty), or None."""
    stages = getattr(module, "stages", None)
    if isinstance(stages, tuple) and all(isinstance(stage, Stage) for stage in stages):
        return stages
    return None


def find_stages(module: nn.Module, probe: Probe) -> tuple[Stage, ...]:
    """Find the stages of a network, shallow to deep, the stem not among them.

    Declared stages come first, then what a registered table knows, then timm's ``feature_info``, then a dry run that looks for
    changes of resolution.
    """
    finders = (declared_stages, *STAGE_FINDERS.values(), _from_feature_info)
    found = next((stages for finder in finders if (stages := finder(module)) is not None), None)
    stages = _from_resolutions(probe) if found is None else found
    for stage in stages:
        _check_paths(module, stage)
    return stages


def _evenly(items: Sequence[Stage]) -> tuple[Stage, ...]:
    """Four evenly spaced items ending with the last."""
    if len(items) <= _MOST_STAGES:
        return tuple(items)
    return tuple(items[math.ceil((k + 1) * len(items) / _MOST_STAGES) - 1] for k in range(_MOST_STAGES))


def _from_feature_info(module: nn.Module) -> tuple[Stage, ...] | None:
    info = getattr(module, "feature_info", None)
    entries = list(getattr(info, "info", info) or ())
    paths = dict(module.named_modules())
    stages = [
        Stage(path=str(entry["module"]), channels=entry.get("num_chs"), stride=entry.get("reduction"))
        for entry in entries
        if isinstance(entry, Mapping) and str(entry.get("module")) in paths
    ]
    if not stages:
        return None
    isotropic = len({stage.stride for stage in stages}) == 1
    return _evenly(stages) if isotropic else tuple(stages[-_MOST_STAGES:])


def _from_resolutions(probe: Probe) -> tuple[Stage, ...]:
    """The last module at each resolution of the maps, the image's own resolution left out where a smaller one exists."""
    seen: dict[tuple[int, int], str] = {}

    def look(path: str, child: nn.Module, args: Any, output: Any) -> None:
        del child, args
        if path and isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] * output.shape[-2] > 1:
            size = (int(output.shape[-2]), int(output.shape[-1]))
            seen.pop(size, None)
            seen[size] = path

    probe.run(look)
    return tuple(Stage(path=path) for path in list(seen.values())[-_MOST_STAGES:])


def classifier_input(module: nn.Module, probe: Probe) -> str | None:
    """Return the tap path of what the classifier reads: the input of the linear layer that returned the logits."""
    declared = getattr(module, "classifier_path", None)
    if isinstance(declared, str):
        return f"{declared}:input"
    found: list[tuple[str, Tensor]] = []

    def look(path: str, child: nn.Module, args: Any, output: Any) -> None:
        del args
        if isinstance(child, _LINEAR) and isinstance(output, Tensor):
            found.append((path, output))

    logits = probe.run(look)
    if not isinstance(logits, Tensor):
        return None
    for path, output in reversed(found):
        if output.numel() == logits.numel() and torch.equal(output.flatten(), logits.flatten()):
            return f"{path}:input"
    return None

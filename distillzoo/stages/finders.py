"""Find stages: declared ones, registered tables, timm's ``feature_info``, else a dry run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.autograd.graph import Node

from distillzoo.errors import TapError, near_matches
from distillzoo.registry import STAGE_FINDERS
from distillzoo.stages.activations import complete_stage
from distillzoo.stages.classifier import heads
from distillzoo.stages.dry_run import Call
from distillzoo.stages.layouts import map_size
from distillzoo.stages.probe import Probe, split_path
from distillzoo.types import Stage

__all__ = ["declared_stages", "find_stages", "resolve_stages"]

_PATHS = ("path", "pre", "linear", "linear_norm", "norm")  # of a stage
_ENOUGH_STAGES = 3
_MOST_STAGES = 4  # feature_info lists stems as well: of a longer list the last four are the stages


def _named(module: nn.Module, given: object) -> dict[str, Stage]:
    """Return what a user named as stages by the names of their taps; refuse what is neither paths nor stages."""
    if isinstance(given, str | Stage) or not isinstance(given, Mapping | Sequence):
        raise TapError(
            f"The taps of {type(module).__name__} are a list of tap paths or Stages, shallow to deep, or a mapping from names to "
            f"them; got {given!r}; write one of them as a list too: ['layer3']."
        )
    items = given if isinstance(given, Mapping) else {f"stage{number}": item for number, item in enumerate(given, 1)}
    for name, item in items.items():
        if not (isinstance(name, str) and isinstance(item, str | Stage)):
            raise TapError(
                f"A tap of {type(module).__name__} is a tap path or a Stage, and its name is text; got {item!r} for {name!r}; "
                "write 'layer1', 'layer1:input' or Stage('layer1')."
            )
    return {name: item if isinstance(item, Stage) else Stage(path=item) for name, item in items.items()}


def split_and_get(module: nn.Module, path: str) -> nn.Module:
    """Return the submodule that a module path or tap path names.

    Raises:
        TapError: If there is none; the nearest paths are named.
    """
    name = split_path(path)[0]
    try:
        return module.get_submodule(name)
    except AttributeError:
        paths = [known for known, _ in module.named_modules() if known]
        near = near_matches(name, paths, limit=5) or paths[:5]
        raise TapError(
            f"{type(module).__name__} has no module {name!r}; the nearest paths are {', '.join(near)}. "
            "A tap is a module path, with ':input' after it for the module's input."
        ) from None


def _checked_paths(module: nn.Module, stage: Stage) -> Stage:
    """The stage with the first path of every module that has several: its calls are known by that."""
    first = {child: path for path, child in module.named_modules()}
    paths = {field: path for field in _PATHS if (path := getattr(stage, field)) is not None}
    for field, path in paths.items():
        child = split_and_get(module, path)
        paths[field] = "".join((first.get(child, path.partition(":")[0]), *path.partition(":")[1:]))
    return replace(stage, **paths)


def resolve_stages(
    given: Sequence[Stage | str] | Mapping[str, Stage | str], probe: Probe
) -> tuple[tuple[Stage, ...], dict[str, Stage]]:
    """Turn taps that a user named into stages and extra taps.

    Args:
        given: Stages or tap paths shallow to deep; or a mapping in which ``stage1`` .. ``stageN`` are the stages and any other
            name is a tap of its own (``pooled`` replaces what was found).
        probe: The network and its dry batch, to find what stages given by path alone were before their activation, and the
            stages where none is named.
    Raises:
        TapError: If a path does not exist, what is given is neither paths nor stages, or numbers of stages are left out.
    """
    named = {name: _checked_paths(probe.module, stage) for name, stage in _named(probe.module, given).items()}
    items, count = list(named), sum(name.removeprefix("stage").isdigit() for name in named)
    stages = [named.pop(f"stage{number}", None) for number in range(1, count + 1)]
    if not count:
        return find_stages(probe), named
    if None in stages:
        raise TapError(f"Stages must be named stage1 .. stage{count} without a gap; got {', '.join(items)}.")
    found = (stage for stage in stages if stage is not None)
    return tuple(complete_stage(probe.dry_run, stage) if stage == Stage(stage.path) else stage for stage in found), named


def declared_stages(module: nn.Module) -> tuple[Stage, ...] | None:
    """Return the stages that a network declares itself (``stages``: a tuple of :class:`Stage`, maybe empty), or None."""
    stages = getattr(module, "stages", None)
    if isinstance(stages, tuple) and all(isinstance(stage, Stage) for stage in stages):
        return stages
    return None


def find_stages(probe: Probe) -> tuple[Stage, ...]:
    """Find the stages of a network, shallow to deep, the stem not among them.

    Declared stages come first, then what a registered table knows, then timm's ``feature_info``, then a dry run that looks for
    changes of resolution. What stages were before their activation is declared too, or found in the dry run.

    Args:
        probe: The network and its dry batch.
    """
    known = (declared_stages, *STAGE_FINDERS.values())
    stages = next((stages for finder in known if (stages := finder(probe.module)) is not None), None)
    if stages is None:
        found = _from_feature_info(probe) or _from_resolutions(probe)
        stages = tuple(complete_stage(probe.dry_run, stage) for stage in found)
    return tuple(_checked_paths(probe.module, stage) for stage in stages)


def _evenly(items: Sequence[Stage]) -> tuple[Stage, ...]:
    """Four evenly spaced items ending with the last."""
    if len(items) <= _MOST_STAGES:
        return tuple(items)
    return tuple(items[math.ceil((k + 1) * len(items) / _MOST_STAGES) - 1] for k in range(_MOST_STAGES))


def _from_feature_info(probe: Probe) -> tuple[Stage, ...] | None:
    """What timm's networks say; None where a module that they name does not return maps or tokens."""
    info = getattr(probe.module, "feature_info", None)
    entries = list(getattr(info, "info", info) or ())
    paths = dict(probe.module.named_modules())
    known = [entry for entry in entries if isinstance(entry, Mapping) and str(entry.get("module")) in paths]
    known = [entry for entry in known if not _pools(probe.dry_run.last(str(entry["module"])))]
    stages = [Stage(path=str(entry["module"]), channels=entry.get("num_chs")) for entry in known]
    isotropic = len({entry.get("reduction") for entry in known}) == 1
    chosen = _evenly(stages) if isotropic else tuple(stages[-_MOST_STAGES:])
    calls = [probe.dry_run.last(stage.path) for stage in chosen]
    if any(call is None or call.shape is None or map_size(probe.module, probe.data, call.shape) is None for call in calls):
        return None
    return chosen or None


def _pools(call: Call | None) -> bool:
    """Whether it is a pooling: it learns nothing and makes maps smaller; the stage is what it reads."""
    return call is not None and call.shape != call.argument and not any(True for _ in call.module.parameters())


def _from_resolutions(probe: Probe) -> tuple[Stage, ...]:
    """The end of the trunk at each of its last four resolutions, or four evenly spaced blocks where there is but one.

    The trunk are the tensors that everything passes on its way from the images to the logits. Where it has one or two resolutions,
    branches may run side by side at others: the last tensor of each of those is taken as well. A resolution at which nothing but a
    pooling or the first op works is no stage.
    """
    run = probe.dry_run
    trunk = _by_size(probe, run.trunk)
    found = trunk if len(trunk) >= _ENOUGH_STAGES else _by_size(probe, run.depths) | trunk
    sizes = sorted(found, key=lambda size: -size[0] * size[1])
    if len(sizes) > 1:
        return tuple(Stage(path=_end(probe, found[size])) for size in sizes[-_MOST_STAGES:])
    if not sizes:
        return ()
    group = found[sizes[0]]
    blocks: dict[tuple[str, type[nn.Module]], list[str]] = {}
    for call in group:
        family = blocks.setdefault((call.path.rpartition(".")[0], type(call.module)), [])
        family.append(call.path)
    largest = max(blocks.values(), key=len)
    return _evenly([Stage(path) for path in largest]) if len(largest) > 1 else (Stage(group[-1].path),)


def _end(probe: Probe, group: list[Call]) -> str:
    """The path of the last call of a group that does not lie inside the block that makes the maps smaller.

    A block whose stride comes after its first op or after a norm (an inverted residual, a pre-norm transformer) holds maps of the
    size before; they belong to it. A module that does more at that size holds whole blocks and is none itself.
    """
    run, path = probe.dry_run, group[-1].path

    def size(shape: tuple[int, ...] | None) -> tuple[int, int] | None:
        return map_size(probe.module, probe.data, shape) if shape else None

    here = size(group[-1].shape)
    for depth in range(1, path.count(".") + 1):
        outer = ".".join(path.split(".")[:depth])
        call = run.last(outer)
        if call is None or size(call.argument) != here or size(call.shape) == here:
            continue
        before = run.calls[: run.calls.index(group[-1]) + 1]
        ops = sum(c.has_weights and c.path.startswith(f"{outer}.") and size(c.shape) == here for c in before)
        outside = [call for call in group if not call.path.startswith(f"{outer}.")]
        if ops <= 1 and outside:
            return outside[-1].path
    return path


def _by_size(probe: Probe, nodes: Mapping[Node, int] | set[Node]) -> dict[tuple[int, int], list[Call]]:
    """The calls whose outputs are among the nodes, by size, largest first; the outermost of those that return the same."""
    run = probe.dry_run
    behind = run.after(head.node for head in heads(run))
    groups: dict[tuple[int, int], dict[Node, Call]] = {}
    ops: dict[tuple[int, int], int] = {}
    last = {call.path: call for call in run.calls}
    for call in run.calls:
        size = None if call.shape is None or not call.path else map_size(probe.module, probe.data, call.shape)
        if size is None or call.node not in run.depths or call.node in behind:  # the classifier's own maps are no stage
            continue
        ops[size] = ops.get(size, 0) + call.has_weights
        if call.node in nodes and size[0] * size[1] > 1 and last[call.path] is call:  # a tap sees the last call of a module
            same = groups.setdefault(size, {})
            inner = same.setdefault(call.node, call)
            if inner.path.startswith(f"{call.path}."):  # a container; not a dropout that comes after and rests in eval mode
                same[call.node] = call
    kept = [size for size in sorted(groups, key=lambda size: -size[0] * size[1]) if ops[size]]
    if len(kept) > 1 and ops[kept[0]] == 1:
        del kept[0]  # a stem: one op on the images
    return {size: list(groups[size].values()) for size in kept}

"""What a network's classifier reads: the op that makes the logits, found in a dry run, and its input before any dropout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from distillzoo.errors import TapError, near_matches
from distillzoo.stages.dry_run import Call, DryRun
from distillzoo.stages.probe import Probe, split_path

__all__ = ["classifier_input", "heads"]


def classifier_input(probe: Probe) -> str | None:
    """Return the tap path of what the classifier reads: the input of the op that makes the logits, or what a dropout there takes.

    Of several such ops (a second head for a distillation token) it is the one that the network declares first, as
    ``classifier_path`` or in timm's configuration; None where it declares none.

    Args:
        probe: The network and its dry batch.
    Raises:
        TapError: If the declared ``classifier_path`` does not exist.
    """
    module = probe.module
    if hasattr(module, "classifier_path"):
        declared = module.classifier_path
        if not isinstance(declared, str):
            return None
        if ":" in declared or declared not in dict(module.named_modules()):
            near = near_matches(declared, [path for path, _ in module.named_modules()], limit=5)
            hint = f"did you mean {' or '.join(map(repr, near))}" if near else "name the layer that makes the logits"
            raise TapError(
                f"The classifier_path of {type(module).__name__} must be a module path, and it has no module {declared!r}; {hint}; "
                "None says that there is none."
            )
        return _before_dropout(probe, declared)
    found = heads(probe.dry_run)
    if len(found) == 1:
        return _before_dropout(probe, found[0].path)
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    said = config.get("classifier") if isinstance(config, Mapping) else None
    names = [said] if isinstance(said, str) else list(said or ())
    return next((_before_dropout(probe, name) for name in names for head in found if head.path == name), None)


def _before_dropout(probe: Probe, head: str) -> str:
    """The tap path of a module's input; where training drops some of it at random, of the same tensor as it was before.

    In eval mode a dropout returns what it takes, so that all that makes or takes the tensor has one node of the graph. The first of
    them is compared with the input in training mode.
    """
    run, path = probe.dry_run, f"{head}:input"
    read = run.last(head)
    if read is None or read.source is None:
        return path
    calls = [call for call in run.calls if call.path and run.last(call.path) is call]
    places = [(call.end, call.path) for call in calls if call.alone and call.node is read.source and call.shape == read.argument]
    takers = (call for call in calls if call.source is read.source and call.argument == read.argument)
    places += [(call.start, f"{call.path}:input") for call in takers]
    first = min(places, default=(0, path))[1]
    if first == path:
        return path
    often = [sum(call.path == split_path(tap)[0] for call in run.calls) for tap in (first, path)]
    seen = _values(probe, (first, path), training=True)
    if [len(values) for values in seen] != often or torch.equal(seen[0][-1], seen[1][-1]):
        return path  # the network runs otherwise in training mode, or not at all; or nothing is dropped
    one, two = _values(probe, (first, path), training=False)  # parts of one tensor have one node as well
    return first if torch.equal(one[-1], two[-1]) else path


def _values(probe: Probe, taps: Sequence[str], *, training: bool) -> list[list[Tensor]]:
    """What passes some taps, call by call, in training or eval mode; of a network that fails, what passed until then."""
    seen: list[list[Tensor]] = [[] for _ in taps]
    handles = []
    for values, tap in zip(seen, taps, strict=True):
        path, side = split_path(tap)
        module = probe.module.get_submodule(path)

        def note(value: Any, values: list[Tensor] = values) -> None:
            values.extend([value.clone()] if isinstance(value, Tensor) else [])  # a dropout may work in place

        if side == "input":
            handles.append(module.register_forward_pre_hook(lambda _, args, note=note: note(args[0] if args else None)))
        else:
            handles.append(module.register_forward_hook(lambda _, args, output, note=note: note(output)))  # noqa: ARG005
    try:
        with suppress(Exception), probe.training() if training else probe.evaluating():  # who trains it will be told
            probe.module(probe.images.clone())  # in training mode alone it may write to them
    finally:
        for handle in handles:
            handle.remove()
    return seen


def heads(run: DryRun) -> list[Call]:
    """Return the ops with as many outputs as there are classes that the logits come from with no other op in between.

    Args:
        run: The dry run.
    """
    logits = run.logits
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.grad_fn is None:
        return []
    made = {call.node: call for call in run.calls if call.node in run.depths and call.has_weights}
    found = run.nearest(logits.grad_fn, made, run.depths.__contains__)
    width = logits.shape[1]
    heads = [call for call in found if call.shape is not None and width in (call.shape[1], call.shape[-1])]
    return [call for call in heads if run.last(call.path) is call and call.argument is not None]

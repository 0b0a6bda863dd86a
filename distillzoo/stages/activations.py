"""Find what a stage was before its activation, and the norm that made it so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from distillzoo.stages.dry_run import Call, DryRun
from distillzoo.stages.probe import split_path
from distillzoo.stages.restoring import restored
from distillzoo.types import Stage

__all__ = ["complete_stage", "is_activation"]

_TOLERANCE = 1e-3  # relative; single precision errs by less, the mildest activation by more
_ADDING = ("AddBackward", "AliasBackward", "CloneBackward", "ViewBackward", "UnsafeViewBackward")  # what a norm's output may pass
_ACTIVATING = ("Relu", "LeakyRelu", "Gelu", "Silu", "Hardswish", "Hardtanh", "Hardsigmoid", "Elu", "Mish", "Softplus", "Tanh",
               "Sigmoid", "Clamp")  # fmt: skip


@torch.no_grad()
def is_activation(module: nn.Module, shape: Sequence[int]) -> bool:
    """Tell by experiment whether a module maps every element of its input by itself, and not by an affine map.

    What the module keeps is left as it was.

    Args:
        module: The module; it must not draw in eval mode.
        shape: Shape of its input.
    Example:
        >>> is_activation(nn.GELU(), (2, 3, 4, 4)), is_activation(nn.BatchNorm2d(3), (2, 3, 4, 4))
        (True, False)
    """
    if any("running_mean" in child._buffers or isinstance(child, nn.Linear | nn.Conv2d) for child in module.modules()):
        return False  # a norm and its activation in one: the norm inside is what feeds the activation
    like = next(module.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    one, other, choice = (torch.randn(*shape, generator=generator).mul(4.0).to(like) for _ in range(3))
    kept = choice > 0
    try:
        with restored(module):
            module.eval()
            outputs = [module(x.clone()) for x in (one, torch.where(kept, one, other), other, (one + other) / 2)]
    except (RuntimeError, TypeError, ValueError):
        return False  # it wants other inputs
    if not all(isinstance(out, Tensor) and tuple(out.shape) == tuple(shape) for out in outputs):
        return False
    alone, mixed, far, middle = outputs
    bent = (middle - (alone + far) / 2).abs().max() > _TOLERANCE * alone.abs().max()
    return bool(torch.equal(alone[kept], mixed[kept]) and bent)


def complete_stage(run: DryRun, stage: Stage) -> Stage:
    """Return the stage with ``pre`` and ``norm`` where they can be read off a dry run.

    The innermost module whose output is the stage's output and that bends it is the activation: its input is ``pre``. Where a
    function and no module does it, ``pre`` is the output of the module before it, or ``"path:activation"``. The batch norm whose
    output reaches ``pre`` through additions alone is ``norm``; of several it is that of the longest branch.

    Args:
        run: Dry run of the network.
        stage: The stage; what it declares stays.
    """
    path, side = split_path(stage.path)
    call = run.last(path)
    if stage.pre is not None or call is None or side == "activation":
        return stage
    target = call.node if side == "output" else call.source
    if target is None:
        return stage
    found = next((call for call in run.calls if call.node is target and _bends(call)), None)
    if found is not None and run.last(found.path) is found:
        return replace(stage, pre=f"{found.path}:input", norm=stage.norm or _fused(run, found) or _norm(run, found.source))
    name = target.name()
    if not any(name.startswith(kind) for kind in _ACTIVATING):
        return stage
    source = next((parent for parent, _ in target.next_functions if parent in run.depths), None)
    before = next((call for call in run.calls if source is not None and call.node is source and run.last(call.path) is call), None)
    pre = before.path if before is not None else f"{path}:activation" if side == "output" else None
    return replace(stage, pre=pre, norm=stage.norm or _norm(run, source))


def _bends(call: Call) -> bool:
    """Whether the call is that of an activation: nothing but a change of every element by itself."""
    return (
        call.source is not None
        and call.source is not call.node
        and call.argument is not None
        and call.argument == call.shape
        and is_activation(call.module, call.argument)
    )


def _fused(run: DryRun, activation: Call) -> str | None:
    """The layer that norms and activates, whose inner activation this is (timm's ``BatchNormAct2d``); its scale is the norm's."""
    parent = activation.path.rpartition(".")[0]
    call = run.last(parent) if parent else None
    return parent if call is not None and call.is_norm else None


def _norm(run: DryRun, source: Node | None) -> str | None:
    if source is None:
        return None
    made = {call.node: call for call in reversed(run.calls) if call.is_norm and call.node is not None}
    found = run.nearest(source, made, lambda node: node.name().startswith(_ADDING))
    depths = sorted(((run.depth(call), call.path) for call in found), reverse=True)
    if not depths or (len(depths) > 1 and depths[0][0] == depths[1][0]):
        return None  # equal branches that are added up (re-parameterisable blocks): no one norm describes their sum
    return depths[0][1]

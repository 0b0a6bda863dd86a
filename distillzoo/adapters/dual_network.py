"""A whole network of two widths: which layers take the place of its own, and the plain network back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from distillzoo.adapters.copies import PerCopy, follow_copies
from distillzoo.adapters.dual_layers import DualNorm, dual_layer
from distillzoo.adapters.expansion import DualLayer, DualOp, Mode
from distillzoo.adapters.orepa import BranchStart, LinearBranches, takes_branches
from distillzoo.adapters.per_channel import DualPerChannel, per_channel_layer
from distillzoo.errors import UnsupportedPairError

__all__ = ["duals", "perturb", "plain_network", "replaced"]

_NOWHERE = "use a network of convolutions, linear layers and norms, or kd for this student."


@torch.no_grad()
def duals(
    network: nn.Module,
    widths: Mapping[str, tuple[torch.Size, bool, bool]],
    ratio: int,
    mode: Mode,
    *,
    branch_start: BranchStart | None = None,
    shared: bool = True,
) -> dict[str, nn.Module]:
    """Return, by path, what takes the place of a network's layers to make it one of two widths.

    Args:
        network: The network; it is left as it is.
        widths: By path of the modules that make up the network: shape of the input, and whether inputs and outputs are expanded.
        ratio: Width of the wide network, as a multiple.
        mode: What says which of the two it is now.
        branch_start: Start of the six branches that 3x3 convolutions become; ``None`` leaves them single, as those that are frozen.
        shared: Whether the narrow network is a slice of the wide one.
    Raises:
        UnsupportedPairError: If a layer has no rule, nothing can be expanded, or parameters are shared between layers.
    """
    _check_not_tied(network)
    made: dict[str, nn.Module] = {}
    for path, (shape, inputs, outputs) in widths.items():
        layer = network.get_submodule(path)
        if not layer._parameters and not layer._buffers:
            training = layer.training
            wrapped = follow_copies(layer.eval(), shape, ratio, mode)
            layer.train(training)
            wrapped.training = training
            if wrapped is not layer:
                made[path] = wrapped
            continue
        kernel = None
        weight = layer._parameters.get("weight")
        trains = weight is not None and weight.requires_grad  # branches that do not would stay as they were drawn
        if branch_start is not None and trains and takes_branches(layer):
            kernel = LinearBranches(layer, ratio, mode, inputs=inputs, outputs=outputs, start=branch_start, shared=shared)
        dual = dual_layer(layer, ratio, mode, inputs=inputs, outputs=outputs, kernel=kernel, shared=shared)
        if dual is None and inputs and outputs:
            dual = per_channel_layer(layer, shape, ratio, mode, shared=shared)
        if dual is None or not path:
            raise UnsupportedPairError(
                f"There is no rule to widen {path or 'the network itself'} of {type(network).__name__}, a {type(layer).__name__}; "
                + _NOWHERE
            )
        made[path] = dual.train(layer.training)
    if not any(isinstance(layer, DualLayer) for layer in made.values()):
        raise UnsupportedPairError(
            f"{type(network).__name__} has no channels between two layers that could be made more; {_NOWHERE}"
        )
    return made


def _check_not_tied(network: nn.Module) -> None:
    paths: dict[int, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        other = paths.setdefault(id(parameter), name)
        if other != name:
            raise UnsupportedPairError(
                f"{other} and {name} of {type(network).__name__} are one tensor, which widening would part; {_NOWHERE}"
            )


def replaced(network: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Put layers into a network by path, in place; returns the network."""
    for path, layer in layers.items():
        parent, _, child = path.rpartition(".")
        setattr(network.get_submodule(parent), child, layer)
    return network


def plain_network(network: nn.Module) -> nn.Module:
    """Make the plain narrow network of one of two widths, in place; returns the network."""
    for name, child in network.named_children():
        if isinstance(child, DualOp | DualNorm | DualPerChannel):
            setattr(network, name, child.plain())
        elif isinstance(child, PerCopy):
            setattr(network, name, child.inner)
        else:
            plain_network(child)
    return network


def perturb(network: nn.Module, deviation: float) -> None:
    """Add noise to the wide weights of a network of two widths; neither of its functions changes."""
    for module in network.modules():
        if isinstance(module, DualLayer):
            module.perturb(deviation)

"""A linear layer as the mean of several, each with a norm of its own, and the exact way back to one layer.

:func:`expand` makes the branches of a convolution or linear layer and of the batch norm that follows it; :func:`fold` makes the
plain pair again, which computes what the branches compute in eval mode. Nothing here asks for a class: an op is a module with a
``weight`` whose rows are output channels and maybe a ``bias``, a norm is a module with running statistics.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from distillzoo.errors import OptionError, UnsupportedPairError

__all__ = ["AfterNorm", "Branched", "check_not_frozen", "check_not_tied", "expand", "fold", "fold_network", "is_batch_norm"]


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module normalises every channel by running statistics, which makes it affine in eval mode."""
    return all(isinstance(module._buffers.get(name), Tensor) for name in ("running_mean", "running_var")) and hasattr(module, "eps")


class Branched(nn.Module):
    """The mean of parallel copies of a linear op, each with a batch norm of its own where one follows.

    Branch 1 keeps the given weights and statistics. The others start afresh by the layer's own ``reset_parameters`` and follow
    the network's way of initialising: their weights are scaled to the spread of the given ones, and their norm's scale and shift
    start where the given ones stand if those are all alike, as where a network starts a block's last norm at zero; ones that
    differ have been trained, and start anew at one and zero. A parameter that requires no gradient has the given values in every
    branch: what is drawn anew must train. They stay separate layers, which taps can read one by one; one stacked layer would be
    slower on a CPU, whose caches it leaves.

    Args:
        op: Convolution or linear layer.
        norm: The batch norm that follows it, children (a fused activation) left out of account; ``None`` where none follows.
        branches: Number of branches, at least 1.
    Raises:
        OptionError: If ``op`` has no weight, or ``norm`` no running statistics.
    Example:
        >>> branched = Branched(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), 4)
        >>> branched(torch.zeros(2, 3, 5, 5)).shape, len(branched.branches)
        (torch.Size([2, 8, 5, 5]), 4)
    """

    def __init__(self, op: nn.Module, norm: nn.Module | None, branches: int) -> None:
        super().__init__()
        if not isinstance(op._parameters.get("weight"), Tensor):
            raise OptionError(f"Branches are made of a convolution or linear layer; got {type(op).__name__}, which has no weight.")
        if norm is not None and not is_batch_norm(norm):
            raise OptionError(
                f"Only a norm with running statistics folds; got {type(norm).__name__}. Leave it out of the branches."
            )
        layers = OrderedDict(op=copy.deepcopy(op)) if norm is None else OrderedDict(op=copy.deepcopy(op), norm=_bare(norm))
        self.branches = nn.ModuleList([nn.Sequential(layers)])
        for _ in range(branches - 1):
            fresh = OrderedDict((name, _afresh(layer)) for name, layer in layers.items())
            self.branches.append(nn.Sequential(fresh))

    def forward(self, x: Tensor) -> Tensor:
        """Map the op's input, ``(B, C, H, W)`` or ``(..., C)``, to the mean of the branches, shaped as the op's output."""
        first, *others = (branch(x) for branch in self.branches)
        total: Tensor = first
        for other in others:
            total = total + other
        return total * (1.0 / len(self.branches))

    @torch.no_grad()
    def folded(self) -> tuple[nn.Module, nn.Module | None]:
        """Return a plain op and norm, children left out, that compute in eval mode what the branches compute.

        W' = mean_i s_i W_i with s_i = gamma_i / sqrt(var_i + eps), and so for the bias. The norm keeps an affine map of slope 1
        and shift mean_i (beta_i - s_i mu_i): its running mean is what the folded op's output averages to, and its scale equals
        its running deviation. The deviation is that of single branches; their mean varies less, by up to sqrt(m) where they are
        independent, so that in training mode the norm scales its output up by as much, as its statistics come from the batch.
        """
        op, norm = self._first()
        tensors = {name: self._each(f"op.{name}") for name, _ in op.named_parameters()}
        if norm is None:
            return _plain(op, {name: each.mean(0) for name, each in tensors.items()}), None
        eps = float(norm.eps)  # type: ignore[arg-type]  # a number on every norm
        scale = (self._each("norm.running_var") + eps).rsqrt()
        values = {"running_var": torch.full_like(scale[0], 1.0 - eps)}
        if getattr(norm, "weight", None) is not None:
            gamma = self._each("norm.weight")
            variance = gamma.square().mean(0)  # what the branches vary by; any value gives the same function
            scale, values = gamma * scale, {"running_var": variance, "weight": (variance + eps).sqrt()}
        if getattr(norm, "bias", None) is not None:
            values["bias"] = self._each("norm.bias").mean(0)
        values["running_mean"] = (scale * self._each("norm.running_mean")).mean(0)
        rows = {name: (each * scale.view(*scale.shape, *[1] * (each.ndim - 2))).mean(0) for name, each in tensors.items()}
        return _plain(op, rows), _plain(norm, values)

    def _first(self) -> tuple[nn.Module, nn.Module | None]:
        layers = dict(self.branches[0].named_children())
        return layers["op"], layers.get("norm")

    def _each(self, name: str) -> Tensor:
        """A tensor of every branch, stacked, in double precision, on the CPU (some devices have none)."""
        path, _, leaf = name.rpartition(".")
        return torch.stack([_tensor(branch.get_submodule(path), leaf).to("cpu", torch.float64) for branch in self.branches])


class AfterNorm(nn.Module):
    """What a norm with children, such as a fused activation, does after it has normalised: its children, one after the other.

    Args:
        norm: The norm.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name, child in norm.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        for child in self.children():
            x = child(x)
        return x


def check_not_tied(network: nn.Module, sites: Mapping[str, str | None]) -> None:
    """Refuse ops and norms that share a tensor with another layer: branches would part what is one.

    Args:
        network: The network, not yet expanded.
        sites: Module path of every op that is to be expanded with the path of its norm, or None.
    Raises:
        UnsupportedPairError: If one does.
    """
    layers = [f"{path}." for site in sites.items() for path in site if path is not None]
    tensors = (*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False))
    names: dict[int, str] = {}
    for name, tensor in tensors:
        other = names.setdefault(id(tensor), name)
        if other != name and any(each.startswith(layer) for each in (name, other) for layer in layers):
            raise UnsupportedPairError(
                f"{other} and {name} of {type(network).__name__} are one tensor, which branches would part; branch another layer "
                "with layers=, name another op by hand: taps={'student': [Stage(path=..., linear=...)]}, or use kd."
            )


def check_not_frozen(network: nn.Module, ops: Iterable[str]) -> None:
    """Refuse ops whose weight requires no gradient: their branches could neither differ nor learn.

    Args:
        network: The network, not yet expanded.
        ops: Module paths of what is to be expanded.
    Raises:
        UnsupportedPairError: If one is frozen.
    """
    for path in ops:
        weight = network.get_submodule(path)._parameters.get("weight")
        if weight is not None and not weight.requires_grad:
            raise UnsupportedPairError(
                f"{path}.weight of {type(network).__name__} requires no gradient, and branches have weights to learn; unfreeze it, "
                "branch another layer with layers=, or use kd."
            )


def expand(op: nn.Module, norm: nn.Module | None, branches: int) -> tuple[Branched, nn.Module | None]:
    """Make the branches of an op and the norm that follows it.

    Args:
        op: Convolution or linear layer.
        norm: The batch norm that follows it; ``None`` where none does.
        branches: Number of branches.
    Returns:
        What takes the op's place, and what takes the norm's (``None`` where there is none).
    Example:
        >>> expand(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), 2)[1]
        Identity()
    """
    rest = None if norm is None else AfterNorm(norm) if any(True for _ in norm.children()) else nn.Identity()
    return Branched(op, norm, branches), rest


def fold(branched: Branched, rest: nn.Module | None) -> tuple[nn.Module, nn.Module | None]:
    """Make the plain op and norm again from what :func:`expand` returned; both are new and share no tensor.

    Args:
        branched: What stands in the op's place.
        rest: What stands in the norm's place.
    Returns:
        A plain op and norm of the classes and shapes that were expanded.
    Example:
        >>> op, norm = fold(*expand(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), 2))
        >>> op
        Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
    """
    op, norm = branched.folded()
    if norm is not None and rest is not None:
        for name, child in rest.named_children():
            setattr(norm, name, copy.deepcopy(child))
    return op, norm


def fold_network(network: nn.Module, sites: Mapping[str, str | None]) -> nn.Module:
    """Fold every expanded op of a network, in place.

    Args:
        network: The network.
        sites: Module path of every :class:`Branched` with the path of what stands in its norm's place, or None.
    Returns:
        The network.
    """
    for path, norm_path in sites.items():
        branched = network.get_submodule(path)
        assert isinstance(branched, Branched)
        op, norm = fold(branched, None if norm_path is None else network.get_submodule(norm_path))
        for where, plain in ((path, op), (norm_path, norm)):
            if where is not None and plain is not None:
                parent, _, child = where.rpartition(".")
                setattr(network.get_submodule(parent), child, plain.train(branched.training))
    return network


def _tensor(module: nn.Module, name: str) -> Tensor:
    tensor = getattr(module, name)
    assert isinstance(tensor, Tensor)
    return tensor


def _plain(layer: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a layer with other values."""
    plain = copy.deepcopy(layer)
    for name, value in values.items():
        _tensor(plain, name).copy_(value)
    return plain


def _bare(norm: nn.Module) -> nn.Module:
    """A copy of a norm whose children do nothing."""
    bare = copy.deepcopy(norm)
    for name, _ in norm.named_children():
        setattr(bare, name, nn.Identity())
    return bare


def _afresh(layer: nn.Module) -> nn.Module:
    """A copy of a layer that starts anew."""
    fresh = copy.deepcopy(layer)
    reset = getattr(fresh, "reset_parameters", None)
    if not callable(reset):  # a frozen norm has nothing to draw
        return fresh
    reset()
    own, drawn = _spread(layer), _spread(fresh)
    with torch.no_grad():
        if own is not None and drawn is not None:
            _tensor(fresh, "weight").mul_(own / drawn)
        if is_batch_norm(layer):
            for name, value in layer.named_parameters(recurse=False):
                if bool((value == value[0]).all()):
                    _tensor(fresh, name).copy_(value)
        for name, value in layer.named_parameters(recurse=False):
            if not value.requires_grad:
                _tensor(fresh, name).copy_(value)
    return fresh


def _spread(layer: nn.Module) -> Tensor | None:
    """Standard deviation of a layer's weight; None for norms and for weights that are all alike."""
    weight = layer._parameters.get("weight")
    if weight is None or weight.ndim < 2 or weight.numel() < 2:
        return None
    spread = weight.detach().std()
    return spread if float(spread) > 0 else None

"""A linear layer as the mean of several, each with a norm of its own, and the exact way back to one layer.

:func:`expand` makes the branches of a convolution or linear layer and of the batch norm that follows it; :func:`fold` makes the
plain pair again, which computes what the branches compute in eval mode. Nothing here asks for a class: an op is a module with a
``weight`` whose rows are output channels and maybe a ``bias``, a norm is a module with running statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distillzoo.errors import OptionError

__all__ = ["AfterNorm", "Branched", "expand", "fold", "fold_network", "is_batch_norm", "split_branches"]

_WIDTHS = ("out_channels", "out_features", "num_features")  # what layers call their number of output channels


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module normalises every channel by running statistics, which makes it affine in eval mode."""
    return all(isinstance(module._buffers.get(name), Tensor) for name in ("running_mean", "running_var")) and hasattr(module, "eps")


def split_branches(stacked: Tensor, branches: int, groups: int, added: Tensor | None = None) -> tuple[Tensor, ...]:
    """Take the stacked output of a :class:`Branched` apart.

    Args:
        stacked: ``(B, branches * C, H, W)``, channels ordered by (group, branch, channel within the group).
        branches: Number of branches.
        groups: Groups of the op.
        added: ``(B, C, H, W)``, added to every branch.
    Returns:
        As many tensors ``(B, C, H, W)`` as there are branches.
    Example:
        >>> [branch.flatten().tolist() for branch in split_branches(torch.arange(8.0).view(1, 8, 1, 1), 2, 2)]
        [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]
    """
    apart = _apart(stacked, 1, groups, branches).unbind(2)
    if added is not None:
        grouped = added.reshape(added.shape[0], groups, -1, *added.shape[2:])
        apart = tuple(branch + grouped for branch in apart)
    return tuple(branch.flatten(1, 2) for branch in apart)


class Branched(nn.Module):
    """The mean of parallel copies of a linear op, each with a batch norm of its own where one follows.

    The copies are one op of as many times the output channels and one norm over all of these: the numbers of separate calls in
    a fraction of their time. A grouped convolution wants the stacked channels ordered by (group, branch, channel within the
    group), so that is their order everywhere. The stacked outputs pass through the child ``outputs``, where a tap can read them.

    Branch 1 keeps the given weights and statistics. The others start afresh by the layer's own ``reset_parameters``, their
    weights scaled to the spread of the given ones, so that they follow the network's way of initialising.

    Args:
        op: Convolution or linear layer.
        norm: The batch norm that follows it, children (a fused activation) left out of account; ``None`` where none follows.
        branches: Number of branches, at least 1.
    Raises:
        OptionError: If ``branches`` is no positive integer, ``op`` has no weight, or ``norm`` no running statistics.
    Example:
        >>> branched = Branched(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), 4)
        >>> branched(torch.zeros(2, 3, 5, 5)).shape, branched.op.weight.shape
        (torch.Size([2, 8, 5, 5]), torch.Size([32, 3, 1, 1]))
    """

    def __init__(self, op: nn.Module, norm: nn.Module | None, branches: int) -> None:
        super().__init__()
        if isinstance(branches, bool) or not isinstance(branches, int) or branches < 1:
            raise OptionError(f"branches must be an integer of at least 1; got {branches!r}. Pass 4, or 1 for a single one.")
        if not isinstance(op._parameters.get("weight"), Tensor):
            raise OptionError(f"Branches are made of a convolution or linear layer; got {type(op).__name__}, which has no weight.")
        if norm is not None and not is_batch_norm(norm):
            raise OptionError(
                f"Only a norm with running statistics folds; got {type(norm).__name__}. Leave it out of the branches."
            )
        self.branches = branches
        self.groups = int(getattr(op, "groups", 1))
        self.channels = _tensor(op, "weight").shape[0]
        self._dim = 1 if _tensor(op, "weight").ndim > 2 else -1  # convolutions have their channels second, linear layers last
        self.op = _stack([op, *(_afresh(op) for _ in range(branches - 1))], self.groups)
        bare = None if norm is None else _bare(norm)
        self.norm = None if bare is None else _stack([bare, *(_afresh(bare) for _ in range(branches - 1))], self.groups)
        self.outputs = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map the op's input, ``(B, C, H, W)`` or ``(..., C)``, to the mean of the branches, shaped as the op's output."""
        stacked = self.op(x)
        if self.norm is not None:
            stacked = self.norm(stacked)
        stacked = self.outputs(stacked)
        dim = self._dim % stacked.ndim
        total = _apart(stacked, dim, self.groups, self.branches).sum(dim + 1)
        return (total * (1.0 / self.branches)).flatten(dim, dim + 1)  # not mean(): its backward would divide a stacked gradient

    def extra_repr(self) -> str:
        """Return what the module's representation shows in brackets."""
        return f"branches={self.branches}, channels={self.channels}, groups={self.groups}"

    @torch.no_grad()
    def folded(self) -> tuple[nn.Module, nn.Module | None]:
        """Return a plain op and norm, children left out, that compute in eval mode what the branches compute.

        W' = mean_i s_i W_i with s_i = gamma_i / sqrt(var_i + eps), and so for the bias. The norm keeps an affine map of slope 1
        and shift mean_i (beta_i - s_i mu_i): its running mean is what the folded op's output averages to, and its scale equals
        its running deviation, so that training can go on from it.
        """
        tensors = {name: self._each(tensor) for name, tensor in self.op.named_parameters(recurse=False)}
        if self.norm is None:
            return self._plain(self.op, {name: each.mean(0) for name, each in tensors.items()}), None
        eps = float(self.norm.eps)  # type: ignore[arg-type]  # a float on every norm
        own = {name: self._each(t) for name in ("weight", "bias") if (t := getattr(self.norm, name, None)) is not None}
        scale = (self._each(_tensor(self.norm, "running_var")) + eps).rsqrt() * own.get("weight", torch.ones(()))
        values = {name: (each * scale.view(*each.shape[:2], *[1] * (each.ndim - 2))).mean(0) for name, each in tensors.items()}
        norm = {"running_mean": (scale * self._each(_tensor(self.norm, "running_mean"))).mean(0)}
        if "weight" in own:
            variance = own["weight"].square().mean(0)  # that of the branches; any value gives the same function
            norm |= {"running_var": variance, "weight": (variance + eps).sqrt()}
        else:
            norm["running_var"] = torch.full_like(norm["running_mean"], 1.0 - eps)
        if "bias" in own:
            norm["bias"] = own["bias"].mean(0)
        return self._plain(self.op, values), self._plain(self.norm, norm)

    def _each(self, tensor: Tensor) -> Tensor:
        """A stacked tensor as ``(branches, C, ...)`` in double precision, on the CPU (some devices have none)."""
        apart = _apart(tensor.detach().to("cpu", torch.float64), 0, self.groups, self.branches)
        return apart.movedim(1, 0).flatten(1, 2)

    def _plain(self, stacked: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
        plain = copy.deepcopy(stacked)
        for name, value in values.items():
            _assign(plain, name, value)
        return _set_width(plain, self.channels)


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


def _apart(stacked: Tensor, dim: int, groups: int, branches: int) -> Tensor:
    """Split dimension ``dim`` into (group, branch, channel within the group)."""
    return stacked.reshape(*stacked.shape[:dim], groups, branches, -1, *stacked.shape[dim + 1 :])


def _tensor(module: nn.Module, name: str) -> Tensor:
    tensor = getattr(module, name)
    assert isinstance(tensor, Tensor)
    return tensor


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a value in the place of a parameter or buffer, in that one's type, device and willingness to train."""
    before = _tensor(module, name)
    value = value.to(before)
    setattr(module, name, nn.Parameter(value, before.requires_grad) if isinstance(before, nn.Parameter) else value)


def _set_width(module: nn.Module, width: int) -> nn.Module:
    for name in _WIDTHS:
        if hasattr(module, name):
            setattr(module, name, width)
    return module


def _bare(norm: nn.Module) -> nn.Module:
    """A norm whose children do nothing."""
    bare = copy.deepcopy(norm)
    for name, _ in norm.named_children():
        setattr(bare, name, nn.Identity())
    return bare


def _afresh(module: nn.Module) -> nn.Module:
    fresh = copy.deepcopy(module)
    reset = getattr(fresh, "reset_parameters", None)
    if not callable(reset):  # a frozen norm has nothing to draw
        return fresh
    reset()
    own, drawn = _spread(module), _spread(fresh)
    if own is not None and drawn is not None:
        with torch.no_grad():
            _tensor(fresh, "weight").mul_(own / drawn)
    return fresh


def _spread(module: nn.Module) -> Tensor | None:
    """Standard deviation of a layer's weight; None for norms and for weights that are all alike."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim < 2 or weight.numel() < 2:
        return None
    spread = weight.detach().std()
    return spread if float(spread) > 0 else None


def _stack(modules: Sequence[nn.Module], groups: int) -> nn.Module:
    """One module with the output channels of all, ordered by (group, module, channel within the group)."""
    first = modules[0]
    stacked = copy.deepcopy(first)
    for name, tensor in (*first.named_parameters(recurse=False), *first.named_buffers(recurse=False)):
        if tensor.ndim:  # a counter of batches stays as it is
            each = torch.stack([_tensor(module, name).detach() for module in modules])
            _assign(stacked, name, each.view(len(modules), groups, -1, *tensor.shape[1:]).transpose(0, 1).flatten(0, 2))
    return _set_width(stacked, len(modules) * int(_tensor(first, _rows(first)).shape[0]))


def _rows(module: nn.Module) -> str:
    """Name of a tensor that has one row an output channel."""
    return "running_mean" if is_batch_norm(module) else "weight"

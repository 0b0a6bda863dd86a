"""Modules without parameters in a network of two widths: what keeps the rule of the copies, and how the rest is made to.

:mod:`distillzoo.adapters.expansion` says what the copies are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distillzoo.adapters.expansion import Mode, tile
from distillzoo.errors import UnsupportedPairError

__all__ = ["PerCopy", "follow_copies"]

_TOLERANCE = 1e-4  # relative, in single precision


class PerCopy(nn.Module):
    """A module without parameters that keeps the rule of the copies: in the wide mode it sees them in the narrow one's scale.

    Args:
        inner: The module.
        ratio: How many copies.
        mode: What says which of the two it is now.
        scaled: Whether its input is multiplied by the ratio and its output divided: what is not homogeneous, such as GELU.
        apart: Whether it sees every copy by itself: what moves channels, such as a channel shuffle.
        dim: Dimension of the channels.
    """

    def __init__(self, inner: nn.Module, ratio: int, mode: Mode, *, scaled: bool, apart: bool, dim: int = 1) -> None:
        super().__init__()
        self.inner, self.ratio, self.mode, self.scaled, self.apart, self.dim = inner, ratio, mode, scaled, apart, dim

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, ...)`` as the module does, ``(B, ratio * C, ...)`` in the wide mode."""
        if not self.mode.wide:
            out: Tensor = self.inner(x)
            return out
        if self.scaled:
            x = x * self.ratio
        if self.apart:
            batch, dim = len(x), self.dim % x.ndim
            x = (
                x.reshape(*x.shape[:dim], -1, self.ratio, *x.shape[dim + 1 :]).movedim(dim + 1, 0).flatten(0, 1)
            )  # (ratio * B, C, ...)
            out = self.inner(x)
            out = out.reshape(self.ratio, batch, *out.shape[1:])
            dim = min(dim, out.ndim - 2)  # a module may flatten what comes behind the channels
            out = out.movedim(0, dim + 1).flatten(dim, dim + 1)
        else:
            out = self.inner(x)
        return out / self.ratio if self.scaled else out


@torch.no_grad()
def follow_copies(module: nn.Module, shape: torch.Size, ratio: int, mode: Mode) -> nn.Module:
    """Return a module without parameters, wrapped where it would not keep the rule of the copies by itself; found by trying.

    Args:
        module: The module, in eval mode.
        shape: Shape of its narrow input.
        ratio: How many copies.
        mode: What says which of the two it is now.
    Raises:
        UnsupportedPairError: If it does not keep the rule however it is wrapped.
    Example:
        >>> follow_copies(nn.ReLU(), torch.Size((2, 4, 3, 3)), 2, Mode())
        ReLU()
        >>> follow_copies(nn.GELU(), torch.Size((2, 4, 3, 3)), 2, Mode()).scaled
        True
    """
    dim = 1 if len(shape) in (2, 4) else -1
    x = 8.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))  # large enough to meet the bounds of a ReLU6
    try:
        wanted = module(x.clone())
        if not isinstance(wanted, Tensor):
            return module
    except (RuntimeError, TypeError, ValueError, IndexError):
        return module  # it wants other inputs: whether the network survives it is tried as a whole
    wide = tile(x, ratio, (dim % len(shape),), divide=True)
    wanted = tile(wanted, ratio, (min(dim % len(shape), wanted.ndim - 1),), divide=True)
    for apart in (False, True):
        for scaled in (False, True):
            wrapped = PerCopy(module, ratio, mode, scaled=scaled, apart=apart, dim=dim)
            with mode:
                if _agree(wrapped, wide, wanted):
                    return wrapped if scaled or apart else module
    raise UnsupportedPairError(f"A {type(module).__name__} does not treat copies of its channels alike; use kd for this student.")


def _agree(module: nn.Module, x: Tensor, wanted: Tensor) -> bool:
    try:
        found = module(x.clone())
    except (RuntimeError, ValueError, IndexError):
        return False
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())

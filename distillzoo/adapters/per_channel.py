"""Modules of two widths that have numbers for each channel, found by trying: norms with an activation inside, PReLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distillzoo.adapters.expansion import DualLayer, Mode, emptied, tile
from distillzoo.adapters.trials import exact_copies

__all__ = ["DualPerChannel", "per_channel_layer"]

_TOLERANCE = 1e-4  # relative


class DualPerChannel(DualLayer):
    """A module that has numbers for each channel, and no other tensors, in two widths.

    The wide one sees r times its input, which is copies of what the narrow one sees, and divides its output by r, so that what it
    does in between, bounds of activations among it, is on the narrow one's scale. Buffers, such as running statistics, are apart.

    Args:
        module: What is expanded; modules inside it hold no tensors.
        channels: Number of channels; tensors of this length are tiled, and single numbers are not.
        ratio: Width of the wide layer, as a multiple.
        mode: What says which of the two it is now.
        shared: Whether the narrow layer is a slice of the wide one.
    Example:
        >>> dual = DualPerChannel(nn.PReLU(4), 4, 2, Mode())
        >>> dual.weight.shape
        torch.Size([8])
    """

    def __init__(self, module: nn.Module, channels: int, ratio: int, mode: Mode, *, shared: bool = True) -> None:
        super().__init__(ratio, mode, shared=shared)
        self.shell = emptied(module)
        self._names = tuple(module._parameters), tuple(name for name, value in module._buffers.items() if value is not None)
        for name, parameter in module._parameters.items():
            self.hold(name, parameter, (0,) if parameter is not None and parameter.shape == (channels,) else ())
        for name in self._names[1]:
            value = module._buffers[name]
            assert value is not None
            self.register_buffer(name, value.detach().clone())
            self.register_buffer(f"wide_{name}", tile(value, ratio, (0,) if value.shape == (channels,) else ()).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, ...)``, of the current mode's width, as the module does."""
        wide = self.mode.wide
        tensors = {name: self.read(name) for name in self._names[0]}
        tensors |= {name: getattr(self, f"wide_{name}" if wide else name) for name in self._names[1]}
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self.shell.train(self.training)
        out: Tensor = functional_call(self.shell, given, (x * self.ratio if wide else x,))
        return out / self.ratio if wide else out

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """Return the narrow module with its own buffers."""
        buffers = {name: getattr(self, name) for name in self._names[1]}
        return self.filled({name: self.read(name) for name in self._names[0]}, buffers)


@torch.no_grad()
def per_channel_layer(
    module: nn.Module, shape: torch.Size, ratio: int, mode: Mode, *, shared: bool = True
) -> DualPerChannel | None:
    """Return a module in two widths if it treats copies of channels alike, which is tried; else None.

    Args:
        module: The module.
        shape: Shape of its narrow input.
        ratio: Width of the wide layer, as a multiple.
        mode: What says which of the two it is now.
        shared: Whether the narrow layer is a slice of the wide one.
    """
    dim = (1 if len(shape) in (2, 4) else -1) % len(shape)
    own = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    total = sum(1 for _ in (*module.parameters(), *module.buffers()))
    if total > len(own) or any(tensor.ndim > 1 or tensor.numel() not in (1, shape[dim]) for tensor in own):
        return None
    if not any(_widens(twin, shape, dim, ratio) for twin in exact_copies(module)):
        return None
    return DualPerChannel(module, shape[dim], ratio, mode, shared=shared).train(module.training)


def _widens(module: nn.Module, shape: torch.Size, dim: int, ratio: int) -> bool:
    mode = Mode()
    dual = DualPerChannel(module, shape[dim], ratio, mode).eval()
    tensors = (*module.parameters(), *module.buffers())
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    x = 8.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like)  # large enough to meet bounds
    try:
        wanted = dual(x.clone())
        with mode:
            found = dual(tile(x, ratio, (dim,), divide=True))
    except Exception:  # foreign code may raise anything on a width or type that it does not expect
        return False
    if wanted.shape != x.shape:
        return False
    wanted = tile(wanted, ratio, (dim,), divide=True)
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())

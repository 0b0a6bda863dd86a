"""Norms of two widths, and the rule for every kind of layer; :mod:`distillzoo.adapters.expansion` says what the widths are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo.adapters.expansion import DualLayer, DualOp, Mode, emptied, tile

__all__ = ["DualBatchNorm", "DualNorm", "dual_layer"]


class DualNorm(DualLayer):
    """A layer norm or group norm of two widths; in the wide one they see the copies of what the narrow one sees.

    Copies of (a / r) have the mean and deviation of a, divided by r: dividing epsilon by r^2 normalises alike, and dividing scale
    and shift by r gives copies of (output / r).

    Args:
        norm: What is expanded; a layer norm is over the channels alone.
        ratio: Width of the wide layer, as a multiple.
        mode: What says which of the two it is now.
        shared: Whether the narrow layer is a slice of the wide one.
    """

    def __init__(self, norm: nn.Module, ratio: int, mode: Mode, *, shared: bool = True) -> None:
        super().__init__(ratio, mode, shared=shared)
        assert isinstance(norm, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm)
        self.shell = emptied(norm)
        self.eps = float(norm.eps)
        self.hold("weight", norm.weight, (0,))
        self.hold("bias", norm.bias, (0,))

    def affine(self) -> tuple[Tensor | None, Tensor | None, float]:
        """Return scale, shift and epsilon of the current mode. A norm without scale needs one that divides by the ratio."""
        weight, bias = self.read("weight"), self.read("bias")
        if not self.mode.wide:
            return weight, bias, self.eps
        scaled = None if weight is None else weight / self.ratio
        return scaled, None if bias is None else bias / self.ratio, self.eps / self.ratio**2

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., C)`` of a layer norm, ``(B, C, ...)`` of a group norm, to the same shape."""
        weight, bias, eps = self.affine()
        if isinstance(self.shell, nn.GroupNorm):
            out = F.group_norm(x, self.shell.num_groups, weight, bias, eps)
        else:
            out = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return out / self.ratio if weight is None and self.mode.wide else out

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """Return the narrow norm as a plain one that shares no tensor."""
        return self.filled({"weight": self.read("weight"), "bias": self.read("bias")})


class DualBatchNorm(DualNorm):
    """A batch norm of two widths: the modes share scale and shift and have running statistics of their own.

    The wide statistics are those of the activations as they are, copies of (a / r).

    Args:
        norm: What is expanded; it has running statistics.
        ratio: Width of the wide layer, as a multiple.
        mode: What says which of the two it is now.
        shared: Whether the narrow layer is a slice of the wide one.
    """

    running_mean: Tensor
    running_var: Tensor
    wide_mean: Tensor
    wide_var: Tensor
    num_batches_tracked: Tensor
    wide_batches_tracked: Tensor

    def __init__(self, norm: nn.Module, ratio: int, mode: Mode, *, shared: bool = True) -> None:
        super().__init__(norm, ratio, mode, shared=shared)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        self.momentum = norm.momentum
        self.register_buffer("running_mean", mean.clone())
        self.register_buffer("running_var", variance.clone())
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked.clone())  # type: ignore[union-attr]
        self.register_buffer("wide_batches_tracked", self.num_batches_tracked.clone())
        self.register_buffer("wide_mean", tile(mean, ratio, (0,)) / ratio)
        self.register_buffer("wide_var", tile(variance, ratio, (0,)) / ratio**2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, ...)`` to the same shape; in training mode the statistics of the current mode follow the batch."""
        weight, bias, eps = self.affine()
        wide = self.mode.wide
        mean, variance = (self.wide_mean, self.wide_var) if wide else (self.running_mean, self.running_var)
        count = self.wide_batches_tracked if wide else self.num_batches_tracked
        if self.training:
            count.add_(1)
        if self.training and self.momentum is None:
            out = _cumulative_batch_norm(x, mean, variance, weight, bias, eps, count)
        else:
            out = F.batch_norm(x, mean, variance, weight, bias, self.training, self.momentum or 0.0, eps)
        return out / self.ratio if weight is None and wide else out

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """Return the narrow norm with its own statistics."""
        buffers = {name: getattr(self, name) for name in ("running_mean", "running_var", "num_batches_tracked")}
        return self.filled({"weight": self.read("weight"), "bias": self.read("bias")}, buffers)


def _cumulative_batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, count: Tensor
) -> Tensor:
    """Batch norm in training mode whose statistics become the average over ``count`` batches.

    The rate 1 / count stays on the device: as a number, which torch's function wants, it would stop the host in every layer.
    """
    seen_mean, seen_variance = torch.zeros_like(mean), torch.zeros_like(variance)
    out = F.batch_norm(x, seen_mean, seen_variance, weight, bias, True, 1.0, eps)
    rate = count.reciprocal().to(mean.dtype)
    mean.lerp_(seen_mean, rate)
    variance.lerp_(seen_variance, rate)
    return out


def dual_layer(
    layer: nn.Module, ratio: int, mode: Mode, *, inputs: bool, outputs: bool, kernel: nn.Module | None = None, shared: bool = True
) -> DualLayer | None:
    """Return a layer of two widths for one that has parameters, or None where there is no rule for its kind.

    Args:
        layer: Convolution, linear layer or norm.
        ratio: Width of the wide layer, as a multiple.
        mode: What says which of the two it is now.
        inputs: Whether its inputs are expanded.
        outputs: Whether its outputs are.
        kernel: As for :class:`DualOp`.
        shared: Whether the narrow layer is a slice of the wide one.
    Example:
        >>> dual = dual_layer(nn.Conv2d(3, 8, 3), 2, Mode(), inputs=False, outputs=True)
        >>> dual(torch.zeros(1, 3, 5, 5)).shape, dual.weight.shape
        (torch.Size([1, 8, 3, 3]), torch.Size([16, 3, 3, 3]))
    """
    forward, weight = type(layer).forward, layer._parameters.get("weight")
    if isinstance(layer, nn.Conv2d | nn.Linear) and forward in (nn.Conv2d.forward, nn.Linear.forward) and weight is not None:
        return DualOp(layer, ratio, mode, inputs=inputs, outputs=outputs, kernel=kernel, shared=shared)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and forward is nn.modules.batchnorm._BatchNorm.forward:
        return None if layer.running_mean is None else DualBatchNorm(layer, ratio, mode, shared=shared)
    if forward is nn.GroupNorm.forward or (isinstance(layer, nn.LayerNorm) and forward is nn.LayerNorm.forward):
        one = not isinstance(layer, nn.LayerNorm) or len(layer.normalized_shape) == 1
        return DualNorm(layer, ratio, mode, shared=shared) if one else None
    return None

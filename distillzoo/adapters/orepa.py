"""Six linear branches that are one convolution: merged into one kernel in every forward, so that the branches cost no pass.

Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, arXiv 2204.00826, in the form that GPD takes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from distillzoo.adapters.expansion import DualLayer, Mode, tile

__all__ = ["BranchStart", "LinearBranches", "start_for", "takes_branches"]

BranchStart = Literal["pretrained", "scratch"]
_SCALES: dict[BranchStart, tuple[float, ...]] = {
    "pretrained": (1.0, 0.0, 0.0, 0.0, 0.0, 0.0),  # the first branch has the given kernel: the function is unchanged
    "scratch": (0.25, 0.25, 0.0, 0.5, 0.05, 0.5),  # the authors' values
}
_EXPANSION = 8  # of the depth-wise branch, authors' value


def start_for(network: nn.Module) -> BranchStart:
    """Return the start that suits a network: ``"scratch"`` if its batch norms have seen no data, ``"pretrained"`` if they have.

    A network without running statistics does not tell, and keeps its function.

    Example:
        >>> start_for(nn.BatchNorm2d(3)), start_for(nn.Conv2d(3, 3, 3))
        ('scratch', 'pretrained')
    """
    norms = (module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    means = [norm.running_mean for norm in norms if norm.running_mean is not None]
    return "scratch" if means and not any(mean.any() for mean in means) else "pretrained"


def takes_branches(op: nn.Module) -> bool:
    """Whether an op is a 3x3 convolution of stride 1 that keeps the size of its maps and has no groups.

    Example:
        >>> takes_branches(nn.Conv2d(4, 8, 3, padding=1)), takes_branches(nn.Conv2d(4, 8, 3, 2, 1))
        (True, False)
    """
    if not isinstance(op, nn.Conv2d) or op.kernel_size != (3, 3) or op.stride != (1, 1):
        return False
    same = op.padding == "same" or (op.padding == (1, 1) and op.dilation == (1, 1))
    return same and op.groups == 1


class LinearBranches(DualLayer):
    """The kernel of a 3x3 convolution as W = sum_b diag(v_b) W_b over six branches, of either width.

    W_1 is a 3x3 kernel; W_2 a 1x1 kernel and then the 3x3 average; W_3 a 1x1 kernel and then a fixed cosine of each output channel;
    W_4 a 3x3 kernel after (identity + 1x1 kernel); W_5 another 3x3 kernel; W_6 a 1x1 kernel after a depth-wise 3x3 one that makes
    eight maps of each channel. Branch 1 takes the given kernel. The others start by torch's rule for convolutions, the 1x1 kernel
    beside the identity at zero. The branches are the narrow convolution's; each of their tensors is then expanded, so that the wide
    convolution has six branches as well and the narrow kernel is merged from slices. A kernel that is followed by another within a
    branch hands on copies of (activation / ratio), like any layer.

    Args:
        op: A convolution that :func:`takes_branches`.
        ratio: Width of the wide layer, as a multiple.
        mode: What says which of the two it is now.
        inputs: Whether the inputs are expanded.
        outputs: Whether the outputs are.
        start: Scales v at the start: ``"pretrained"`` leaves branch 1 alone, ``"scratch"`` mixes all six.
        shared: Whether the narrow kernel is a slice of the wide one.
    Example:
        >>> conv = nn.Conv2d(4, 8, 3, padding=1)
        >>> branches = LinearBranches(conv, 2, Mode(), inputs=True, outputs=True)
        >>> bool(torch.allclose(branches.kernel(), conv.weight))
        True
    """

    cosine: Tensor

    def __init__(
        self, op: nn.Module, ratio: int, mode: Mode, *, inputs: bool, outputs: bool, start: BranchStart = "pretrained",
        shared: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(ratio, mode, shared=shared)
        assert isinstance(op, nn.Conv2d)
        rows, columns = op.out_channels, op.in_channels
        self.outputs, train = outputs, op.weight.requires_grad
        kernels = {
            "single": op.weight.detach(),
            "average": _drawn(op.weight, rows, columns, 1, 1)[:, :, 0, 0],
            "prior": _drawn(op.weight, rows, columns, 1, 1)[:, :, 0, 0],
            "after": _drawn(op.weight, rows, columns, 3, 3),
            "further": _drawn(op.weight, rows, columns, 3, 3),
        }
        for name, kernel in kernels.items():
            self.hold(name, kernel, (0,) * outputs + (1,) * inputs, divide=outputs, train=train)
        self.hold("before", op.weight.new_zeros(columns, columns), (0, 1) if inputs else (), divide=inputs, train=train)
        self.hold(
            "depthwise",
            _drawn(op.weight, columns * _EXPANSION, 1, 3, 3).view(columns, _EXPANSION, 3, 3),
            (0,) * inputs,
            train=train,
        )
        pointwise = _drawn(op.weight, rows, columns * _EXPANSION, 1, 1).view(rows, columns, _EXPANSION)
        self.hold("pointwise", pointwise, (0,) * outputs + (1,) * inputs, divide=outputs, train=train)
        self.hold(
            "scales",
            op.weight.new_tensor(_SCALES[start]).view(6, 1).repeat(1, rows),
            (1,) * outputs,
            train=train,
        )
        self.register_buffer("cosine", _cosines(rows).to(op.weight), persistent=False)

    def kernel(self) -> Tensor:
        """Return the merged kernel of the current mode, ``(C_out, C_in, 3, 3)``."""
        single, average, prior, after, further, before, depthwise, pointwise, scales = (
            self._tensor(name)
            for name in ("single", "average", "prior", "after", "further", "before", "depthwise", "pointwise", "scales")
        )
        cosine = tile(self.cosine, self.ratio, (0,)) if self.mode.wide and self.outputs else self.cosine
        branches = (
            single,
            average[:, :, None, None].expand_as(single) / 9.0,
            prior[:, :, None, None] * cosine[:, None],
            after + torch.einsum("omhw,mi->oihw", after, before),
            further,
            torch.einsum("oie,iehw->oihw", pointwise, depthwise),
        )
        return sum((v[:, None, None, None] * w for v, w in zip(scales.unbind(), branches, strict=True)), torch.zeros_like(single))

    def _tensor(self, name: str) -> Tensor:
        tensor = self.read(name)
        assert tensor is not None
        return tensor


def _drawn(like: Tensor, *shape: int) -> Tensor:
    """A kernel by torch's rule for convolutions: uniform with bound 1 / sqrt(fan-in)."""
    kernel = torch.empty(*shape, dtype=like.dtype, device=like.device)
    nn.init.kaiming_uniform_(kernel, a=math.sqrt(5.0))
    return kernel


def _cosines(channels: int) -> Tensor:
    """``(channels, 3, 3)``: cos(pi f (h + 1/2) / 3) down even channels and along odd ones, f = 1 and 2 in turn.

    Those are the frequencies that three positions hold, but for the constant, which the averaging branch has.
    """
    position = (torch.arange(3, dtype=torch.float64) + 0.5) * (math.pi / 3.0)
    channel = torch.arange(channels)
    waves = torch.cos((channel // 2 % 2 + 1)[:, None] * position)  # (channels, 3)
    down = (channel % 2 == 0)[:, None, None]
    return torch.where(down, waves[:, :, None].expand(-1, 3, 3), waves[:, None, :].expand(-1, 3, 3))

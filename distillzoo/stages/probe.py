"""A dry batch of a network, and how it is run without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distillzoo.errors import OptionError, ShapeError, TapError
from distillzoo.stages.dry_run import DryRun
from distillzoo.stages.restoring import restored
from distillzoo.types import DataSpec

__all__ = ["Probe", "split_path"]

_IMAGES = 2


def split_path(path: str) -> tuple[str, Literal["input", "output", "activation"]]:
    """Split a tap path into module path and what of it is meant.

    Example:
        >>> split_path("layer1.0.relu:input"), split_path("layer1"), split_path("layer1.0:activation")
        (('layer1.0.relu', 'input'), ('layer1', 'output'), ('layer1.0', 'activation'))
    """
    name, _, side = path.partition(":")
    if side in ("", "output"):
        return name, "output"
    if side in ("input", "activation"):
        return name, "input" if side == "input" else "activation"
    raise TapError(f"A tap path ends in ':input', ':output', ':activation' or none of them; got {path!r}.")


class Probe:
    """A dry batch: two images of the size and channels of ``data``, on the module's device and in its floating type.

    Args:
        module: The network to be probed.
        data: Image size and channels.
    """

    def __init__(self, module: nn.Module, data: DataSpec) -> None:
        self.module = module
        self.data = data
        like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
        count = _IMAGES * data.channels * data.input_size[0] * data.input_size[1]
        values = torch.linspace(-1.0, 1.0, count, dtype=torch.float64).mul(311.0).sin()  # smooth, and no two images alike
        self.images = values.to(like).view(_IMAGES, data.channels, *data.input_size)

    @contextmanager
    def evaluating(self, *, dropping: bool = False) -> Iterator[None]:
        """Run the block in eval mode without gradients; flags, buffers, caches and generators are put back as they were.

        Args:
            dropping: Whether dropout that works in place is switched on: it overwrites what it reads, and only then.
        """
        with self._put_back_after(draws=dropping):
            self.module.eval()
            for child in self.overwriting_dropouts() if dropping else ():
                child.training = True
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Run the block in training mode without gradients; flags, buffers, caches and generators are put back as they were."""
        with self._put_back_after(draws=True):
            self.module.train()
            yield

    @contextmanager
    def _put_back_after(self, *, draws: bool) -> Iterator[None]:
        devices = [self.images.device] if self.images.is_cuda else []
        with restored(self.module), torch.random.fork_rng(devices, enabled=draws):
            yield

    def overwriting_dropouts(self) -> list[nn.Module]:
        """Return the dropouts of the network that work in place."""
        return [m for m in self.module.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.inplace and m.p > 0.0]

    def width(self, logits: Any, role: str) -> int:
        """Return the number of classes of what the network returned for the dry batch.

        Args:
            logits: What it returned.
            role: What the network is, for the message.
        Raises:
            ShapeError: If that is not ``(B, num_classes)``.
        """
        if isinstance(logits, Tensor) and logits.ndim == 2:
            return int(logits.shape[1])
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ShapeError(
            f"The {role} {type(self.module).__name__} returned {shape} for images of shape {tuple(self.images.shape)}; "
            "a classifier must return logits of shape (B, num_classes). Wrap it in a module that does."
        )

    def check_images_kept(self, role: str) -> None:
        """Refuse a network that wrote to the dry batch: of a batch that is trained on, all others would see what it left of it.

        Args:
            role: What the network is, for the message.
        Raises:
            OptionError: If it was written to.
        """
        if not self.images.is_inference() and self.images._version:  # torch counts the writes, and a new one has none
            raise OptionError(
                f"The {role} {type(self.module).__name__} writes to the images that it is given, which others see as well: its "
                "forward begins in place, as by x.sub_(mean) or nn.ReLU(inplace=True); write x = x - mean or inplace=False, or "
                "begin it with x = x.clone()."
            )

    @cached_property
    def dry_run(self) -> DryRun:
        """One run of the dry batch."""
        return DryRun(self)

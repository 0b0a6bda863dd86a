"""A tapped network in another mode: :class:`TappedWithin`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distillzoo.stages import Probe
from distillzoo.taps.recording import Recorder
from distillzoo.taps.tapped import Tapped
from distillzoo.types import Trace

__all__ = ["TappedWithin"]


class TappedWithin(Tapped):
    """The taps of a network while it runs within a context that changes it, such as a mode in which its layers are wider.

    The taps are those of the given one under the same names, measured anew. It shares the network, is nobody's to claim, and runs
    under autocast where the last pass of the given one did.

    Args:
        net: The network with its taps, restructured already.
        within: What every pass runs within; it can be entered again and again.
    Raises:
        TapError: If a tap is not reached within the context.
    """

    def __init__(self, net: Tapped, within: AbstractContextManager[None]) -> None:
        # nothing is looked for again: the base's constructor is not run
        self.module, self.role, self.data = net.module, net.role, net.data
        self.stages = tuple(replace(stage, channels=None) for stage in net.stages)
        self.restructured: list[str] = []
        self.autocast = False
        self._claimed = True
        self._recorder = Recorder()
        self._clones: set[str] = set()
        self._doubtful: set[str] = set()
        self._requested: dict[str, None] = {}
        self._taps = dict(net._taps)
        self._net, self._within = net, within
        self._measure(Probe(self.module, self.data))

    def __call__(self, images: Tensor) -> Trace:
        """Run the network within the context on ``(B, C, H, W)`` images and return logits and the requested features."""
        with torch.autocast(images.device.type, enabled=self._net.autocast):
            return super().__call__(images)

    def _run(self, images: Tensor) -> Any:
        with self._within:
            return self.module(images)

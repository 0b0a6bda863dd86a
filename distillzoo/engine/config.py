"""How a student is trained: one frozen record, the same for every row of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from distillzoo.errors import OptionError
from distillzoo.kinds import is_number, is_whole

__all__ = ["TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """The training configuration: everything that changes the numbers and nothing that does not.

    Defaults are RepDistiller's CIFAR-100 protocol.

    Args:
        epochs: Length of the main phase in epochs.
        batch_size: Images in a batch; an incomplete last batch is kept.
        lr: Learning rate; the peak of a one-cycle schedule.
        momentum: SGD momentum.
        nesterov: Whether the momentum is Nesterov's.
        weight_decay: L2 penalty of SGD.
        decay_norm_bias: Whether norms and biases are decayed too (RepDistiller: yes).
        schedule: ``"step"`` (times ``gamma`` at each milestone), ``"cosine"`` (to 0 over the run) or ``"onecycle"`` (cosine up to
            ``lr``, cosine down to almost 0).
        milestones: Epochs, counted from 0, from whose start the step schedule has dropped.
        gamma: Factor of a drop.
        warmup_fraction: Share of the steps that a one-cycle schedule rises.
        clip_norm: Largest norm of all gradients together; ``None`` does not clip.
        ema_decay: Decay per step of the averaged weights that are evaluated and exported; ``None`` averages nothing.
        precision: ``"float32"``, or ``"bf16"``: autocast of student and teacher, losses in float32.
        channels_last: Memory layout of networks and images.
        eval_batch_size: Images in a batch of the evaluation; does not change the numbers but for rounding.
    Raises:
        OptionError: If a value is of another kind or out of range.
    """

    epochs: int = 240
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norm_bias: bool = True
    schedule: Literal["step", "cosine", "onecycle"] = "step"
    milestones: tuple[int, ...] = (150, 180, 210)
    gamma: float = 0.1
    warmup_fraction: float = 0.3
    clip_norm: float | None = None
    ema_decay: float | None = None
    precision: Literal["float32", "bf16"] = "float32"
    channels_last: bool = False
    eval_batch_size: int = 500

    def __post_init__(self) -> None:
        for item in fields(self):
            kind, value = str(item.type), getattr(self, item.name)
            if kind == "bool":
                self._check(item.name, isinstance(value, bool), "true or false")
            elif kind.startswith("int"):
                self._check(item.name, is_whole(value), "a whole number")
            elif kind.startswith("float"):
                self._check(item.name, is_number(value) or (value is None and "None" in kind), "a finite number")
        given = self.milestones
        whole = isinstance(given, Sequence) and all(map(is_whole, given))
        self._check("milestones", whole, "whole numbers, as (150, 180, 210)")
        for name in ("epochs", "batch_size", "eval_batch_size"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("lr", self.lr > 0, "above 0")
        self._check("momentum", 0 <= self.momentum < 1, "from 0 to below 1")
        self._check("weight_decay", self.weight_decay >= 0, "at least 0")
        self._check("gamma", 0 < self.gamma <= 1, "above 0 and at most 1")
        self._check("warmup_fraction", 0 < self.warmup_fraction < 1, "between 0 and 1")
        self._check("nesterov", not self.nesterov or self.momentum > 0, "false where momentum is 0")
        self._check("schedule", self.schedule in ("step", "cosine", "onecycle"), "step, cosine or onecycle")
        self._check("precision", self.precision in ("float32", "bf16"), "float32 or bf16")
        rising = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        self._check("milestones", rising and all(m >= 1 for m in self.milestones), "rising epochs of at least 1")
        if self.clip_norm is not None:
            self._check("clip_norm", self.clip_norm > 0, "above 0 or null")
        if self.ema_decay is not None:
            self._check("ema_decay", 0 < self.ema_decay < 1, "between 0 and 1 or null")

    def _check(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise OptionError(f"{name} of the training configuration must be {allowed}; got {getattr(self, name)!r}.")

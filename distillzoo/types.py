"""The small frozen records that the parts of the project hand to each other.

They hold tensors and numbers and do nothing else: a network's stages (:class:`Stage`), what a network returned
(:class:`Trace`), what a loop hands to a distiller (:class:`Batch`, :class:`Progress`), what a distiller asks of the loop
(:class:`Requires`, :class:`Phase`) and gives back (:class:`StepOutput`, :class:`ParamGroup`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from distillzoo.errors import OptionError
from distillzoo.kinds import is_number, is_whole

__all__ = [
    "Batch",
    "DataSpec",
    "Layout",
    "Loader",
    "ParamGroup",
    "Phase",
    "Progress",
    "Requires",
    "Stage",
    "StepOutput",
    "Trace",
]

Layout = Literal["auto", "nchw", "nhwc", "tokens", "vector"]
"""How a tap's tensor is laid out: maps with channels first or last, ``(B, N, C)`` tokens, or whatever is read as ``(B, D)``."""


@dataclass(frozen=True, eq=False)
class DataSpec:
    """What a distiller may know about the data.

    Args:
        num_classes: Number of classes, at least 2.
        input_size: Height and width of the images that the student reads, in pixels.
        mean: Per-channel mean that was subtracted from images scaled to 0..1; its length is the number of channels.
        std: Per-channel standard deviation that the images were divided by.
        num_samples: Size of the training set (subset, where one is held out); ``index`` counts within it. Needed by memory banks.
        targets: ``(num_samples,)`` int64 labels of the training set, from 0 to ``num_classes - 1``, for methods that draw by class.
    Raises:
        OptionError: If a value is of another kind or out of range, or the lengths disagree.
    """

    num_classes: int
    input_size: tuple[int, int]
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    num_samples: int | None = None
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.num_classes, 2):
            raise OptionError(f"num_classes must be at least 2, a whole number; got {self.num_classes!r}.")
        size = self.input_size
        if not isinstance(size, Sequence) or len(size) != 2 or not all(is_whole(pixels, 1) for pixels in size):
            raise OptionError(f"input_size must be positive pixels (height, width), as (32, 32); got {size!r}.")
        object.__setattr__(self, "input_size", tuple(size))
        if not (_numbers(self.mean) and _numbers(self.std)) or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise OptionError(
                f"mean and std need one number a channel each, as (0.5, 0.5, 0.5), std above 0; got mean={self.mean!r}, "
                f"std={self.std!r}."
            )
        for name in ("mean", "std"):  # lists, as of YAML, become what compares equal
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.num_samples is not None and not is_whole(self.num_samples, 1):
            raise OptionError(f"num_samples must be at least 1 or None, a whole number; got {self.num_samples!r}.")
        if self.targets is not None:
            self._check_targets(self.targets)
            if self.num_samples is None:
                object.__setattr__(self, "num_samples", len(self.targets))
            if self.num_samples != len(self.targets):
                raise OptionError(f"targets has {len(self.targets)} labels but num_samples is {self.num_samples}.")

    def _check_targets(self, targets: Any) -> None:
        if not isinstance(targets, Tensor):
            raise OptionError(f"targets must be a tensor of integer labels (N,); got {type(targets).__name__}: torch.tensor(it).")
        if targets.ndim != 1 or not len(targets) or targets.is_floating_point() or targets.dtype == torch.bool:
            raise OptionError(f"targets must be (N,) integer labels, N at least 1; got {tuple(targets.shape)} {targets.dtype}.")
        if targets.device.type == "cpu":  # elsewhere the host would wait for the device
            low, high = (int(bound) for bound in torch.aminmax(targets))
            if low < 0 or high >= self.num_classes:
                raise OptionError(
                    f"targets must be labels from 0 to {self.num_classes - 1}, as num_classes is {self.num_classes}; got {low} to "
                    f"{high}: correct one of them."
                )

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return len(self.mean)


def _numbers(values: Any) -> bool:
    """Whether values are finite numbers, at least one."""
    return isinstance(values, Sequence) and len(values) > 0 and all(map(is_number, values))


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch as the loop hands it out.

    Args:
        images: ``(B, C, H, W)`` normalised images.
        targets: ``(B,)`` int64 labels or ``(B, num_classes)`` probabilities.
        index: ``(B,)`` int64 positions in the training set, for methods with a memory.
        second_view: ``(B, C, H, W)``, another augmentation of the same images.
    """

    images: Tensor
    targets: Tensor
    index: Tensor | None = None
    second_view: Tensor | None = None


class Loader(Protocol):
    """Batches of one split, replayable: what an epoch holds is a pure function of (seed, phase, epoch)."""

    @property
    def spec(self) -> DataSpec:
        """What a distiller may know about the data."""
        ...

    def __len__(self) -> int:
        """Return the number of batches in an epoch; an incomplete last batch counts."""
        ...

    def epoch(self, epoch: int, *, phase: str = "main", second_view: bool = False) -> Iterable[Batch]:
        """Return the batches of an epoch (counted from 0) of a phase, on the loader's device."""
        ...


@dataclass(frozen=True)
class Progress:
    """Where training stands. Everything counts from 0.

    Args:
        epoch: Current epoch of the phase.
        epochs: Number of epochs of the phase.
        step: Optimiser steps done so far in the whole run (phases count on).
        steps_per_epoch: Batches in an epoch.
        phase: Name of the current phase; ``"main"`` is the last one.
    """

    epoch: int
    epochs: int
    step: int
    steps_per_epoch: int
    phase: str = "main"


@dataclass(frozen=True)
class Stage:
    """One stage of a network: the table that taps, OFD and KDiffusion read.

    A *tap path* is a module path as :meth:`torch.nn.Module.get_submodule` takes it and means that module's output;
    ``"path:input"`` means its first positional input (of its last call in a forward, where it is called several times).

    Args:
        path: Tap path of the stage's output.
        pre: Tap path of the same tensor before its activation; ``None`` where the stage ends without one (then it is ``path``).
        linear: Module path of the last linear op (convolution or linear layer) that feeds the tap.
        linear_norm: Module path of the norm that directly follows ``linear``; ``None`` where none does (pre-activation networks).
        norm: Module path of the norm before the activation: its scale and shift describe ``pre``.
        channels: Channels of the output, where the network says so: with ``layout="auto"`` they tell which dimension holds them.
            Nothing else reads them; the shapes of taps are measured (``Tapped.shapes``).
        layout: How the tensor is laid out; ``"auto"`` decides by its shape.
    Raises:
        OptionError: If there is no such layout.
    """

    path: str
    pre: str | None = None
    linear: str | None = None
    linear_norm: str | None = None
    norm: str | None = None
    channels: int | None = None
    layout: Layout = "auto"

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            meant = str(self.layout).lower()
            hint = f"write {meant!r}" if meant in get_args(Layout) else "write 'auto' to have it decided by the tensor's shape"
            raise OptionError(
                f"The layout of the stage {self.path!r} must be one of {', '.join(get_args(Layout))}; got {self.layout!r}; {hint}."
            )


@dataclass(frozen=True, eq=False)
class Trace:
    """What one forward pass of a network returned.

    Args:
        logits: ``(B, num_classes)``.
        features: Tapped tensors by name: ``stage1`` .. ``stageN`` and ``stageN.pre`` as ``(B, C, H, W)``, ``pooled`` as ``(B, D)``.
        second: The trace of the batch's second view, where there is one.
    """

    logits: Tensor
    features: Mapping[str, Tensor]
    second: Trace | None = None


@dataclass(frozen=True)
class Requires:
    """What a method needs from the loop, so that the loop never asks which method it is running.

    Args:
        student_taps: Names (``"stage2"``, ``"stage2.pre"``, ``"pooled"``) or groups of names (``"stages"``, ``"stages.pre"``,
            ``"last"``, ``"last.pre"``: the last stage).
        teacher_taps: The same for the teacher.
        index: Whether every batch must carry data-set indices.
        second_view: Whether every batch must carry a second augmentation.
        hard_labels: Whether targets must be class numbers (no mixup).
        teacher: Whether a teacher is needed at all.
    """

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    index: bool = False
    second_view: bool = False
    hard_labels: bool = False
    teacher: bool = True

    @classmethod
    def joined(cls, needs: Sequence[Requires]) -> Requires:
        """Return what several methods need together.

        Args:
            needs: What each of them needs.
        """
        return cls(
            student_taps=tuple(dict.fromkeys(tap for need in needs for tap in need.student_taps)),
            teacher_taps=tuple(dict.fromkeys(tap for need in needs for tap in need.teacher_taps)),
            index=any(need.index for need in needs),
            second_view=any(need.second_view for need in needs),
            hard_labels=any(need.hard_labels for need in needs),
            teacher=any(need.teacher for need in needs),
        )


@dataclass(frozen=True)
class Phase:
    """A part of training with its own optimiser.

    Args:
        name: Name of the phase; the last phase of a method is ``"main"``.
        epochs: Length in epochs; ``None`` takes the recipe's, which alone decides on the main phase: all of a group share it.
        trainable: Patterns (:mod:`fnmatch`) of the distiller's parameter names that train; ``None`` trains all.
        terms: Names of the loss terms that count; ``None`` counts all.
    Raises:
        OptionError: If the main phase is given a length.
    """

    name: str = "main"
    epochs: int | None = None
    trainable: tuple[str, ...] | None = None
    terms: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.name == "main" and self.epochs is not None:
            raise OptionError(
                f"The main phase takes its length from the training configuration; got epochs={self.epochs!r}: leave it out, or "
                "give them to a phase of another name before it."
            )


@dataclass(frozen=True, eq=False)
class StepOutput:
    """What one step of a distiller returns.

    Args:
        logits: ``(B, num_classes)`` logits of the student.
        loss: Scalar: the weighted sum of ``terms``.
        terms: Unweighted scalars by name.
        weights: The 0-dim weights that multiplied them, by the same names.
    """

    logits: Tensor
    loss: Tensor
    terms: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class ParamGroup:
    """Parameters that an optimiser treats alike.

    Args:
        owner: Whose parameters these are.
        kind: ``"weight"``, ``"norm_bias"`` (norms and biases: decayed where the recipe says so) or ``"exempt"`` (declared by the
            method: never decayed).
        params: The tensors, each in exactly one group.
        names: Their names in the distiller, in the same order.
    """

    owner: Literal["student", "adapters"]
    kind: Literal["weight", "norm_bias", "exempt"]
    params: tuple[nn.Parameter, ...]
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """``owner.kind``."""
        return f"{self.owner}.{self.kind}"

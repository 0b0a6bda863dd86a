"""What the trainer tells whoever watches: plain numbers, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["EpochReport", "MemberResult", "Observer", "StepReport"]


@dataclass(frozen=True)
class StepReport:
    """One step of the group is done.

    Args:
        phase: Current phase.
        epoch: Current epoch of the phase, from 0.
        epochs: Epochs of the phase.
        step: Steps done in this epoch.
        steps: Steps of an epoch.
        active: Members that trained in this step.
    """

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    active: int


@dataclass(frozen=True)
class EpochReport:
    """One member has finished an epoch.

    Args:
        member: Its name in the group.
        phase: The phase.
        epoch: The epoch of the phase, from 0.
        accuracy: Top-1 on the evaluation images, per cent; ``None`` outside the main phase.
        eval_loss: Cross-entropy on the evaluation images; ``None`` outside the main phase.
        loss: Mean over the epoch's images of the weighted loss.
        terms: Mean over the epoch's images of each unweighted term.
        train_accuracy: Top-1 on the augmented training images as they came, per cent.
        lr: Learning rate of the last step.
        seconds: Wall time of the epoch for the whole group, without evaluation, in seconds.
        group_size: Members that trained in the epoch.
    """

    member: str
    phase: str
    epoch: int
    accuracy: float | None
    eval_loss: float | None
    loss: float
    terms: Mapping[str, float]
    train_accuracy: float
    lr: float
    seconds: float
    group_size: int


@dataclass(frozen=True)
class MemberResult:
    """How a member ended.

    Args:
        status: ``"done"``, ``"diverged"`` or ``"failed"``.
        last_accuracy: Top-1 after the last epoch, per cent.
        best_accuracy: Best top-1 over the epochs, per cent (on the evaluation images: an optimistic figure).
        best_epoch: The epoch, from 0, that reached it first.
        last_loss: Cross-entropy on the evaluation images after the last epoch.
        epochs: Epochs of the main phase that were trained.
        message: What happened, where the status is not ``"done"``.
        history: Every epoch's report, in order.
    """

    status: str
    last_accuracy: float | None
    best_accuracy: float | None
    best_epoch: int | None
    last_loss: float | None
    epochs: int
    message: str = ""
    history: tuple[EpochReport, ...] = field(default=(), repr=False)


class Observer:
    """Watches a trainer; every method does nothing by default."""

    def on_step(self, report: StepReport) -> None:
        """A step of the group is done."""

    def on_epoch(self, report: EpochReport) -> None:
        """A member has finished an epoch, and its state can be saved (``trainer.state(report.member)``)."""

    def on_end(self, member: str, result: MemberResult) -> None:
        """A member is done, or has diverged."""

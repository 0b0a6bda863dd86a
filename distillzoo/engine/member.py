"""One member of a group: a distiller with its optimiser, schedule, averaged weights, sums and history."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from distillzoo.distiller import Distiller
from distillzoo.engine.config import TrainConfig
from distillzoo.engine.evaluation import autocast
from distillzoo.engine.optim import check_trains, gradient_norm_clipped, make_averaged, make_optimizer, make_scheduler
from distillzoo.engine.reports import EpochReport, MemberResult
from distillzoo.errors import OptionError, RecordError
from distillzoo.streams import Stream, forked_generator
from distillzoo.types import Batch, Phase, Progress, Trace

__all__ = ["Member"]

_STATE_VERSION = 1


class Member:
    """Trains one distiller step by step; knows nothing of the others.

    Args:
        name: Its name in the group.
        distiller: What is trained.
        config: How.
        seed: Seed of the run: draws that networks make themselves (dropout) are seeded from it and the step.
        steps_per_epoch: Batches in an epoch.
        device: Where it trains.
    Raises:
        OptionError: If the method's phases do not end with ``main``, or nothing would train in one of them.
    """

    def __init__(
        self, name: str, distiller: Distiller, config: TrainConfig, *, seed: int, steps_per_epoch: int, device: torch.device
    ) -> None:
        self.name = name
        self.distiller = distiller
        self.config = config
        self.device = device
        self.steps_per_epoch = steps_per_epoch
        self.phases = tuple(distiller.phases())
        if not self.phases or self.phases[-1].name != "main":
            raise OptionError(f"The last phase of {type(distiller).__name__} must be called 'main'; got {self.phases}.")
        for phase in self.phases:
            check_trains(distiller, phase)
        self.phase_number = 0
        self.epoch = 0
        self.step = 0
        self.status = "running"
        self.message = ""
        self.history: list[EpochReport] = []
        self._dropout = Stream.named(seed, "dropout")
        self.averaged = make_averaged(distiller, config)
        self._start_phase()

    # ------------------------------------------------------------------ where it stands

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.phases[self.phase_number]

    @property
    def epochs(self) -> int:
        """Epochs of the current phase."""
        return self.config.epochs if self.phase.epochs is None else self.phase.epochs

    def _start_phase(self) -> None:
        self.optimizer = make_optimizer(self.distiller, self.config, self.phase)
        self.scheduler = make_scheduler(self.optimizer, self.config, epochs=self.epochs, steps_per_epoch=self.steps_per_epoch)

    def finish_phase(self) -> None:
        """Go on to the next phase, with an optimiser of its own."""
        self.phase_number += 1
        self.epoch = 0
        self._start_phase()

    # ------------------------------------------------------------------ training

    def start_epoch(self) -> None:
        """Set training mode and clear the epoch's sums."""
        self.distiller.train()
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._count = 0

    def train_step(self, batch: Batch, teacher: Trace | None) -> None:
        """Do one optimiser step on a batch."""
        self.distiller.set_progress(Progress(self.epoch, self.epochs, self.step, self.steps_per_epoch, self.phase.name))
        with forked_generator(self._dropout, self.step, device=self.device):
            with autocast(self.config, self.device):
                out = self.distiller(batch.images, batch.targets, index=batch.index, second_view=batch.second_view, teacher=teacher)
            self.distiller.zero_grad(set_to_none=True)
            out.loss.backward()
        if self.config.clip_norm is not None:
            gradient_norm_clipped(self.distiller, self.optimizer, self.config.clip_norm)
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.scheduler.step()
        self.distiller.after_step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.distiller)
        self.step += 1
        self._add(out.loss, out.terms, out.logits, batch)

    @torch.no_grad()
    def _add(self, loss: Tensor, terms: Mapping[str, Tensor], logits: Tensor, batch: Batch) -> None:
        count = len(batch.images)
        labels = batch.targets if batch.targets.ndim == 1 else batch.targets.argmax(1)
        correct = (logits.argmax(1) == labels).sum()
        values = torch.stack([value.double() for value in (loss, *terms.values())]) * count
        values = torch.cat([values, correct.double().view(1)])
        self._sums = values if self._sums is None else self._sums + values
        self._names = tuple(terms)
        self._count += count

    def check_finite(self) -> bool:
        """Whether the losses of the epoch so far are finite; a member that diverged is marked. Reads one number from the device."""
        if self._sums is not None and not math.isfinite(float(self._sums[0])):
            terms = dict(zip(("loss", *self._names), self._sums.tolist(), strict=False))
            bad = ", ".join(name for name, value in terms.items() if not math.isfinite(value))
            self.fail("diverged", f"not finite by step {self.step} (epoch {self.epoch + 1}): {bad}")
        return self.status == "running"

    def check_evaluation(self, loss: float | None) -> bool:
        """Whether the loss on the evaluation images is finite at an epoch's end; a member that diverged is marked.

        Args:
            loss: The loss; ``None`` outside the main phase.
        """
        if loss is not None and not math.isfinite(loss):
            self.fail("diverged", f"not finite by step {self.step} (epoch {self.epoch + 1}): loss on the evaluation images")
        return self.status == "running"

    def finish(self) -> None:
        """Mark a member that trained to its end as done; where its last loss is not finite (an older state), as diverged."""
        loss = self.history[-1].eval_loss if self.history else None
        if self.status == "running" and self.check_evaluation(loss):
            self.status = "done"

    def fail(self, status: str, message: str) -> None:
        """Stop this member; the others go on."""
        self.status, self.message = status, message
        self.optimizer.zero_grad(set_to_none=True)

    def predict(self, images: Tensor) -> Tensor:
        """Predict with the averaged weights where the recipe averages them, else with the current ones."""
        if self.averaged is not None:
            return cast(Distiller, self.averaged.module.eval()).predict(images)
        return self.distiller.predict(images)

    def export_student(self) -> torch.nn.Module:
        """Return the plain student that :meth:`predict` stands for."""
        source = self.distiller if self.averaged is None else cast(Distiller, self.averaged.module)
        return source.export_student()

    def finish_epoch(self, evaluation: tuple[float, float] | None, seconds: float, group_size: int) -> EpochReport:
        """Write the epoch's figures down and go on to the next epoch."""
        if self._sums is None:
            raise OptionError("The training loader is empty: an epoch had no batch.")
        *sums, correct = (value / self._count for value in self._sums.tolist())
        report = EpochReport(
            member=self.name,
            phase=self.phase.name,
            epoch=self.epoch,
            accuracy=None if evaluation is None else evaluation[0],
            eval_loss=None if evaluation is None else evaluation[1],
            loss=sums[0],
            terms=dict(zip(self._names, sums[1:], strict=True)),
            train_accuracy=100.0 * correct,
            lr=self.lr,
            seconds=seconds,
            group_size=group_size,
        )
        self.history.append(report)
        self.epoch += 1
        return report

    def result(self) -> MemberResult:
        """Return how the member ended."""
        scored = [report for report in self.history if report.accuracy is not None]
        best = max(scored, key=lambda report: (report.accuracy or 0.0, -report.epoch), default=None)
        done = self.status == "done"
        return MemberResult(
            status=self.status,
            last_accuracy=scored[-1].accuracy if scored and done else None,
            best_accuracy=None if best is None else best.accuracy,
            best_epoch=None if best is None else best.epoch,
            last_loss=scored[-1].eval_loss if scored and done else None,
            epochs=len(scored),
            message=self.message,
            history=tuple(self.history),
        )

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """Return everything to resume at the end of an epoch, as ``torch.load(weights_only=True)`` takes it."""
        return {
            "version": _STATE_VERSION,
            "phase": self.phase.name,
            "phase_number": self.phase_number,
            "epoch": self.epoch,
            "step": self.step,
            "history": [{**asdict(report), "terms": dict(report.terms)} for report in self.history],
            "distiller": self.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a state that :meth:`state` returned.

        Raises:
            RecordError: If the state is of another version, method or network.
        """
        try:
            if state["version"] != _STATE_VERSION:
                raise RecordError(f"A checkpoint of version {state['version']} cannot be resumed by version {_STATE_VERSION}.")
            self.phase_number = int(state["phase_number"])
            self.epoch, self.step = int(state["epoch"]), int(state["step"])
            self._start_phase()
            self.distiller.load_state_dict(state["distiller"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.averaged is not None:
                self.averaged.load_state_dict(state["averaged"])
            self.history = [EpochReport(**report) for report in state["history"]]
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise RecordError(
                f"The checkpoint of {self.name!r} does not fit ({type(error).__name__}: {error}); "
                "it belongs to another method, network or version."
            ) from error

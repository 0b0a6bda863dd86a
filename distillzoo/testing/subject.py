"""What the checks stand on: a distiller under test, what it is fed, and a small training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from distillzoo.build import build_distiller
from distillzoo.distiller import Distiller
from distillzoo.errors import DistillZooError
from distillzoo.schedules import Weight
from distillzoo.streams import Stream, forked_generator
from distillzoo.testing.networks import Pair, PairMaker, tiny_data, tiny_pair
from distillzoo.types import Batch, DataSpec, Phase, Progress, StepOutput, Trace

__all__ = ["Check", "ContractError", "Loop", "Subject", "TinyLoader", "hold", "point"]

STEPS_PER_EPOCH = 2
_MAIN_EPOCHS, _FIRST_EPOCHS = 2, 1


class ContractError(DistillZooError, AssertionError):
    """A distiller breaks the contract; the message says which point, what was found and what to do."""


def hold(condition: object, sentence: str) -> None:
    """Raise ContractError with the sentence unless the condition holds."""
    if not condition:
        raise ContractError(sentence)


@dataclass(frozen=True, eq=False)
class Subject:
    """A distiller under test: how to build it and what to feed it. Everything it makes is the same on every call.

    Args:
        method: A registered name, a composition such as ``"vid+kd"``, or a subclass of :class:`~distillzoo.distiller.Distiller`.
        make_pair: Makes student and teacher afresh; ``None`` takes tiny CNNs for the data. The networks must not draw (no dropout),
            or point 10 finds their draws.
        options: The method's options; those that make it fast on small data.
        data: Data of the pair.
    """

    method: str | type[Distiller]
    make_pair: PairMaker | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    data: DataSpec = field(default_factory=tiny_data)

    @property
    def name(self) -> str:
        """The registered name, or the name of the class."""
        return self.method if isinstance(self.method, str) else self.method.__name__

    def on(self, make_pair: PairMaker) -> Subject:
        """Return the same method on another pair."""
        return replace(self, make_pair=make_pair)

    def pair(self) -> Pair:
        """Make the pair, with the same weights on every call."""
        with forked_generator(Stream.named(0, "testing", "pair")):
            return tiny_pair(self.data) if self.make_pair is None else self.make_pair()

    def build(
        self,
        *,
        pair: Pair | None = None,
        seed: int = 0,
        prepare: bool = True,
        weights: Mapping[str, Weight] | None = None,
        **options: Any,
    ) -> Distiller:
        """Build the distiller in training mode, prepared as a loop prepares it."""
        student, teacher = pair or self.pair()
        distiller = build_distiller(
            self.method, student, teacher, data=self.data, seed=seed, weights=weights, **{**self.options, **options}
        )
        distiller.train()
        if prepare:
            distiller.prepare(TinyLoader(self.data))
        return distiller

    def batch(self, number: int = 0, size: int = 4) -> Batch:
        """Make batch ``number``: a pure function of its number and size."""
        return make_batch(self.data, number, size)

    def trace(self, distiller: Distiller, batch: Batch) -> Trace | None:
        """Run the distiller's teacher as a loop runs it for a group; None where there is no teacher."""
        return None if distiller.teacher_net is None else distiller.teacher_net.trace(_needed(distiller, batch))

    def feed(
        self, distiller: Callable[..., Any], batch: Batch, trace: Trace | None = None, *, like: Distiller | None = None
    ) -> StepOutput:
        """Call a distiller (or ``distiller`` as a compiled form of ``like``) with what it requires of the batch."""
        owner = like if like is not None else distiller
        assert isinstance(owner, Distiller)
        given = _needed(owner, batch)
        out = distiller(given.images, given.targets, index=given.index, second_view=given.second_view, teacher=trace)
        assert isinstance(out, StepOutput)
        return out

    def step(self, distiller: Distiller, batch: Batch, *, given_trace: bool = False) -> StepOutput:
        """Feed a distiller under a generator of its own, for dropout; it runs its teacher itself unless it is given the trace."""
        with forked_generator(Stream.named(0, "testing", "dropout")):
            return self.feed(distiller, batch, self.trace(distiller, batch) if given_trace else None)


def _needed(distiller: Distiller, batch: Batch) -> Batch:
    needs = distiller.requires
    return replace(batch, index=batch.index if needs.index else None, second_view=batch.second_view if needs.second_view else None)


def make_batch(data: DataSpec, number: int, size: int) -> Batch:
    """Make a batch of noise with everything a method can ask for: labels, indices, a second view."""
    index = (torch.arange(size) + number * size) % (data.num_samples or size)
    numbers = torch.arange(size * data.channels * data.input_size[0] * data.input_size[1])
    shape = (size, data.channels, *data.input_size)
    images = [Stream.named(0, "testing", view).normal(number, numbers).view(shape) for view in ("first", "second")]
    targets = index % data.num_classes if data.targets is None else data.targets[index].long()
    return Batch(images[0], targets, index, images[1])


class TinyLoader:
    """Batches of noise that follow the loader's protocol; the last one is ragged.

    Args:
        data: What the batches look like.
    """

    def __init__(self, data: DataSpec) -> None:
        self.spec = data

    def __len__(self) -> int:
        return 3

    def epoch(self, epoch: int, *, phase: str = "main", second_view: bool = False) -> Iterable[Batch]:
        """Return the batches of an epoch of a phase."""
        del phase
        batches = [make_batch(self.spec, 3 * epoch + number, size) for number, size in enumerate((5, 5, 2))]
        return batches if second_view else [replace(batch, second_view=None) for batch in batches]


class Loop:
    """A small training loop that honours phases: SGD with momentum, ``set_progress``, ``after_step``.

    It stands for anybody's loop. Every step runs under a generator seeded by the step, as the engine does it for dropout.

    Args:
        subject: What is trained.
        distiller: The distiller of the subject.
        given_trace: Whether the loop runs the teacher, as for a group.
    """

    def __init__(self, subject: Subject, distiller: Distiller, *, given_trace: bool = False) -> None:
        self.subject = subject
        self.distiller = distiller
        self.given_trace = given_trace
        self.losses: list[Tensor] = []
        self._trainable = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
        self._phase: Phase | None = None
        self._optimizer: torch.optim.SGD | None = None
        self.plan = self._make_plan()

    def _make_plan(self) -> list[tuple[Phase, Progress]]:
        plan: list[tuple[Phase, Progress]] = []
        for phase in self.distiller.phases():
            epochs = _MAIN_EPOCHS if phase.name == "main" else _FIRST_EPOCHS
            for number in range(epochs * STEPS_PER_EPOCH):
                epoch = number // STEPS_PER_EPOCH
                plan.append((phase, Progress(epoch, epochs, len(plan), STEPS_PER_EPOCH, phase.name)))
        return plan

    def breaks(self) -> list[int]:
        """Return the steps after which to interrupt: inside the first phase, and inside the main one."""
        return sorted({1, len(self.plan) - 2})

    def run(self, first: int = 0, last: int | None = None) -> Loop:
        """Run the steps ``first`` to before ``last`` of the plan; all of them by default."""
        for number, (phase, progress) in list(enumerate(self.plan))[first:last]:
            self.enter(phase)
            self.distiller.set_progress(progress)
            self.step(number)
        return self

    def enter(self, phase: Phase) -> None:
        """Set what trains in the phase, with an optimiser of its own; nothing where the loop is in the phase already."""
        if phase is self._phase or phase == self._phase:
            return
        for name, parameter in self._trainable.items():
            parameter.requires_grad_(phase.trainable is None or any(fnmatchcase(name, pattern) for pattern in phase.trainable))
            parameter.grad = None
        groups = [{"params": group.params} for group in self.distiller.param_groups()]
        hold(
            groups, f"Phase {phase.name!r} trains no tensor: its patterns {phase.trainable} match no parameter name; correct them."
        )
        self._phase, self._optimizer = phase, torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    def step(self, number: int) -> StepOutput:
        """Do one step: forward, backward, optimiser, ``after_step``."""
        batch = self.subject.batch(number)
        with forked_generator(Stream.named(0, "testing", "dropout"), number):
            trace = self.subject.trace(self.distiller, batch) if self.given_trace else None
            out = self.subject.feed(self.distiller, batch, trace)
            assert self._optimizer is not None
            self._optimizer.zero_grad(set_to_none=True)
            out.loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self.distiller.after_step()
        self.losses.append(out.loss.detach())
        return out

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds: the distiller's state and the optimiser's."""
        assert self._optimizer is not None
        return {"distiller": self.distiller.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: Mapping[str, Any], done: int) -> Loop:
        """Take up a checkpoint that was written after ``done`` steps, in the middle of a phase."""
        self.distiller.load_state_dict(state["distiller"], strict=True)
        self.enter(self.plan[done - 1][0])
        assert self._optimizer is not None
        self._optimizer.load_state_dict(state["optimizer"])
        return self


Check = Callable[[Subject], None]
"""One point of the battery: raises ContractError, or returns."""


def point(number: int, rule: str) -> Callable[[Check], Check]:
    """Make a function a point of the battery: whatever it raises becomes a ContractError that names method, point and rule."""

    def decorate(check: Check) -> Check:
        @wraps(check)
        def checked(subject: Subject) -> None:
            where = f"{subject.name}, point {number} ({rule})"
            try:
                check(subject)
            except ContractError as error:
                raise ContractError(f"{where}: {error}") from error
            except Exception as error:
                raise ContractError(
                    f"{where}: it stopped with {type(error).__name__}: {str(error).strip() or 'no message'} "
                    "This is raised by the distiller or by what it calls; make the step run."
                ) from error

        return checked

    return decorate

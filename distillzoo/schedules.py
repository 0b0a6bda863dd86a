"""Term weights over time: a weight is a number or a schedule of :class:`~distillzoo.types.Progress`.

Warm-up is data, not code: a method writes its terms unweighted, and the base multiplies by the current value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

from distillzoo.errors import OptionError, unknown_name
from distillzoo.kinds import is_whole
from distillzoo.types import Progress

__all__ = ["Constant", "Cosine", "LinearWarmup", "Schedule", "Weight", "as_schedule", "describe_weight"]


@runtime_checkable
class Schedule(Protocol):
    """A weight as a function of progress."""

    def __call__(self, progress: Progress) -> float:
        """Return the weight at ``progress``."""
        ...

    def final(self) -> float:
        """Return the weight at the end of training: what holds when nobody reports progress."""
        ...


Weight = float | int | Schedule
"""A term's weight: a number, or a schedule."""


def _check(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise OptionError(f"{name} must be a finite number of at least 0; got {value!r}; 0 leaves the term out.")


def _check_epochs(value: int) -> None:
    if not is_whole(value, 1):
        raise OptionError(f"epochs of a schedule must be an integer of at least 1; got {value!r}.")


@dataclass(frozen=True)
class Constant:
    """The same weight throughout.

    Args:
        value: The weight.
    """

    value: float

    def __post_init__(self) -> None:
        _check("weight", self.value)

    def __call__(self, progress: Progress) -> float:  # noqa: ARG002 - the interface of a schedule
        """Return the weight."""
        return float(self.value)

    def final(self) -> float:
        """Return the weight."""
        return float(self.value)


@dataclass(frozen=True)
class LinearWarmup:
    """``value * min((epoch + 1) / epochs, 1)``, epochs counted from 0: constant within an epoch, full from epoch ``epochs - 1`` on.

    This is DKD's and ReviewKD's ``min(e / 20, 1)`` with e counted from 1.

    Args:
        value: The weight after the warm-up.
        epochs: Length of the warm-up in epochs.
    """

    value: float
    epochs: int

    def __post_init__(self) -> None:
        _check("weight", self.value)
        _check_epochs(self.epochs)

    def __call__(self, progress: Progress) -> float:
        """Return the weight in ``progress.epoch``."""
        return float(self.value) * min((progress.epoch + 1) / self.epochs, 1.0)

    def final(self) -> float:
        """Return the weight after the warm-up."""
        return float(self.value)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from ``start`` to ``end`` over the first ``epochs`` epochs, then ``end``; constant within an epoch.

    Args:
        start: The weight in epoch 0.
        end: The weight from epoch ``epochs`` on.
        epochs: Length in epochs.
    """

    start: float
    end: float
    epochs: int

    def __post_init__(self) -> None:
        _check("start", self.start)
        _check("end", self.end)
        _check_epochs(self.epochs)

    def __call__(self, progress: Progress) -> float:
        """Return the weight in ``progress.epoch``."""
        done = min(progress.epoch / self.epochs, 1.0)
        return float(self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * done)))

    def final(self) -> float:
        """Return ``end``."""
        return float(self.end)


_KINDS: Mapping[str, type[Constant] | type[LinearWarmup] | type[Cosine]] = {
    "constant": Constant,
    "linear_warmup": LinearWarmup,
    "cosine": Cosine,
}


def as_schedule(weight: Weight | Mapping[str, object], name: str = "weight") -> Schedule:
    """Turn a number, a schedule, or a mapping ``{"kind": "linear_warmup", "value": 5, "epochs": 20}`` into a schedule.

    Args:
        weight: What the user wrote.
        name: Name of the term, for the error.
    Raises:
        OptionError: If it is none of these, or a number is not finite.
    """
    if isinstance(weight, Mapping):
        fields = dict(weight)
        kind = str(fields.pop("kind", ""))
        if kind not in _KINDS:
            raise OptionError(f"weight of {name!r}: " + unknown_name("schedule", kind, _KINDS, listed="Allowed"))
        try:
            return _KINDS[kind](**fields)  # type: ignore[arg-type]  # checked by the dataclass itself
        except TypeError as error:
            raise OptionError(
                f"weight of {name!r}: schedule {kind!r} does not take the fields {sorted(fields)} ({error})."
            ) from error
    if isinstance(weight, Schedule):
        return weight
    _check(f"weight of {name!r}", weight)
    return Constant(float(weight))


def describe_weight(weight: Weight) -> float | dict[str, object]:
    """Return a weight as plain data: what :func:`as_schedule` takes, for recipes and records."""
    schedule = as_schedule(weight)
    if isinstance(schedule, Constant):
        return float(schedule.value)
    for kind, cls in _KINDS.items():
        if type(schedule) is cls:
            return {"kind": kind, **asdict(schedule)}
    raise OptionError(f"A schedule of class {type(schedule).__name__} cannot be written down; use one of {sorted(_KINDS)}.")

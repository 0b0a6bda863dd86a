"""The weights of a distiller's terms: schedules by name, their current values on the device, and the weighted sum."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from distillzoo.errors import OptionError, ShapeError, unknown_name
from distillzoo.schedules import Schedule, Weight, as_schedule
from distillzoo.types import Progress

__all__ = ["TermWeights", "preset_weights"]


def preset_weights(
    presets: Mapping[str, Mapping[str, Weight]], weights: Mapping[str, Weight] | str | None, owner: str
) -> dict[str, Weight]:
    """Return the weights of a preset, ``ce`` first; of the first one where none is named.

    Args:
        presets: Weights by term, by name of the preset.
        weights: Which one, as users give it: weights by term, and ``None``, name none.
        owner: Whose presets they are, for the error.
    Raises:
        OptionError: If there is no such preset.
    """
    preset = weights if isinstance(weights, str) else next(iter(presets))
    if preset not in presets:
        raise OptionError(unknown_name(f"weight preset of {owner}", preset, presets, listed="Allowed"))
    chosen = presets[preset]
    return {"ce": chosen.get("ce", 1.0), **{name: weight for name, weight in chosen.items() if name != "ce"}}


class TermWeights:
    """Schedules by term and their current values: a vector on the device, in float64 whatever the networks use.

    A weight of 0 leaves its term out of the sum instead of multiplying it (0 times infinity would poison it); a graph that was
    captured must be captured again when :attr:`silent` changes.

    Args:
        weights: Weights by term.
        owner: Whose terms they are, for errors.

    Attributes:
        schedules: The schedule of every term.
        silent: Terms whose weight is 0 now.
    """

    def __init__(self, weights: Mapping[str, Weight], owner: str) -> None:
        self.owner = owner
        self.schedules: dict[str, Schedule] = {name: as_schedule(weight, name) for name, weight in weights.items()}
        self.silent: frozenset[str] = frozenset()
        self._current: list[float] = []
        self._values = torch.zeros(len(weights), dtype=torch.float64)
        self._fill([schedule.final() for schedule in self.schedules.values()])  # as at the end of training

    def overridden(self, weights: Mapping[str, Weight]) -> TermWeights:
        """Return these weights with some replaced.

        Raises:
            OptionError: If ``weights`` is no mapping, or a name is no term.
        """
        if not isinstance(weights, Mapping):
            raise OptionError(f"weights is a mapping from terms to weights or the name of a preset; got {weights!r}.")
        for name in weights:
            if name not in self.schedules:
                raise OptionError(unknown_name(f"term of {self.owner}", name, self.schedules, listed="Its terms are"))
        return TermWeights({**self.schedules, **weights}, self.owner).to(self._values.device)

    def to(self, device: torch.device) -> TermWeights:
        """Move the values; returns itself."""
        self._values = self._values.to(device)
        return self

    def advance(self, progress: Progress, terms: Collection[str] | None) -> None:
        """Take the values at ``progress``, 0 for terms that are not among ``terms`` (``None``: all are)."""
        self._fill([schedule(progress) if terms is None or name in terms else 0.0 for name, schedule in self.schedules.items()])

    def _fill(self, values: list[float]) -> None:
        if values != self._current:
            self._current = values
            self._values.copy_(torch.tensor(values, dtype=torch.float64), non_blocking=True)
            self.silent = frozenset(name for name, value in zip(self.schedules, values, strict=True) if value == 0.0)

    def weigh(self, terms: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the terms, and the weights as 0-dim tensors that later steps do not change.

        Raises:
            OptionError: If terms and weights differ in their names.
            ShapeError: If a term is no scalar.
        """
        if terms.keys() != self.schedules.keys():
            raise OptionError(
                f"{self.owner} returned the terms {sorted(terms)} but has weights for {sorted(self.schedules)}; "
                "both must name the same terms."
            )
        for name, term in terms.items():
            if term.ndim:
                raise ShapeError(f"The term {name!r} of {self.owner} must be a scalar; got {tuple(term.shape)}: reduce it.")
        weights = dict(zip(self.schedules, self._values.clone().unbind(), strict=True))
        parts = [weights[name].to(term.dtype) * term for name, term in terms.items() if name not in self.silent]
        total = torch.stack(parts).sum() if parts else next(iter(terms.values())) * 0.0
        return total, weights

"""Several distillers over one student and one trace: ``"crd+kd"``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from distillzoo.distiller import Distiller
from distillzoo.errors import OptionError, UnsupportedPairError
from distillzoo.schedules import Weight
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import Batch, DataSpec, Phase, Requires, Trace

__all__ = ["Composition", "Maker", "composed_weights"]

Maker = Callable[[Tapped, "Teacher | None", DataSpec], Distiller]
"""Makes one member on the shared student and teacher."""

_STUDENT = "student."  # what the names of the student's parameters begin with, in a member alone as in a composition


class Composition(Distiller):
    """The sum of several distillers: their terms as ``member.term``, cross-entropy once.

    ``ce`` weighs 1, whatever the members' own weight of it; a member's terms keep their weights, but for those that the member
    lists in ``composed_weights`` (KD's weighs 1: RepDistiller's "+KD" rows).

    Args:
        student: The student with its taps.
        teacher: The teacher with its taps.
        data: What may be known about the data.
        makers: What makes each member, by name, in order.
        weights: Weights by term (``"crd.contrast"``) that override the members'.
        seed: Seed of every draw.

    Raises:
        OptionError: If there are fewer than two members.
        UnsupportedPairError: If two members restructure the student or override ``predict``.
    """

    requires = Requires(teacher=False)  # the members say; the constructor joins their answers

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        makers: Mapping[str, Maker],
        weights: Mapping[str, Weight] | None = None,
        seed: int | None = None,
    ) -> None:
        if len(makers) < 2:
            raise OptionError(f"A composition needs at least two members; got {', '.join(makers) or 'none'}.")
        super().__init__(student, teacher, data, seed=seed)
        members: dict[str, Distiller] = {}
        singular: list[str] = []
        for name, maker in makers.items():
            before = len(student.restructured)
            members[name] = member = maker(student, teacher, data)
            own_ways = any(getattr(type(member), name) is not getattr(Distiller, name) for name in ("predict", "export_student"))
            if len(student.restructured) > before or own_ways:
                singular.append(name)
        if len(singular) > 1:
            raise UnsupportedPairError(
                f"{' and '.join(singular)} each restructure the student or predict in their own way; compose with one of them only."
            )
        self.members = nn.ModuleDict(dict(members))
        self._singular = singular[0] if singular else None
        self.requires = Requires.joined([member.requires for member in members.values()])
        own = {name: (member.weights, member.composed_weights) for name, member in members.items()}
        self.set_weights(composed_weights(own), weights)

    def parts(self) -> Sequence[Distiller]:
        """Return the members in order."""
        return tuple(self._named().values())

    def _named(self) -> dict[str, Distiller]:
        return {name: member for name, member in self.members.items() if isinstance(member, Distiller)}

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:
        """Return every member's terms under ``member.term``; a member sees no teacher and no second view but those it requires."""
        one_view = replace(student, second=None), replace(batch, second_view=None)
        terms: dict[str, Tensor] = {}
        for name, member in self._named().items():
            own, given = (student, batch) if member.requires.second_view else one_view
            found = member.distill_terms(own, teacher if member.requires.teacher else None, given)
            terms |= {f"{name}.{term}": value for term, value in found.items()}
        return terms

    def phases(self) -> Sequence[Phase]:
        """Return the members' first phases one after the other, then the main one."""
        named = self._named()
        first = [self._outer(name, phase) for name, member in named.items() for phase in member.phases() if phase.name != "main"]
        main = [(name, member.phases()[-1]) for name, member in named.items()]
        if all(phase.trainable is None and phase.terms is None for _, phase in main):
            return (*first, Phase())
        joined = [self._outer(name, phase) for name, phase in main]
        trainable = tuple(dict.fromkeys(pattern for phase in joined for pattern in phase.trainable or ()))
        terms = tuple(dict.fromkeys(term for phase in joined for term in phase.terms or ()))
        return (*first, Phase(trainable=trainable, terms=terms))

    def _outer(self, name: str, phase: Phase) -> Phase:
        """A member's phase in the composition's names; what it leaves open is the student and that member, not the others."""
        own = self._named()[name].weights if phase.terms is None else phase.terms
        patterns = ("*",) if phase.trainable is None else phase.trainable
        return Phase(
            f"{name}.{phase.name}",
            phase.epochs,
            tuple(dict.fromkeys(outer for pattern in patterns for outer in _outer_patterns(name, pattern))),
            tuple(term if term == "ce" else f"{name}.{term}" for term in own),
        )

    def predict(self, images: Tensor) -> Tensor:
        """Predict as the one member that restructures the student or predicts in its own way, if there is one."""
        return super().predict(images) if self._singular is None else self._named()[self._singular].predict(images)

    def export_student(self) -> nn.Module:
        """Export as the one member that restructures the student or predicts in its own way, if there is one."""
        return super().export_student() if self._singular is None else self._named()[self._singular].export_student()


def _outer_patterns(name: str, pattern: str) -> Iterator[str]:
    """Yield what matches in a composition the parameters that a pattern matches in the member alone: the student's, its own."""
    yield from (_STUDENT + rest for rest in _rests(pattern, _STUDENT))
    if not pattern.startswith(_STUDENT):
        yield f"members.{name}.{pattern}"


def _rests(pattern: str, start: str) -> tuple[str, ...]:
    """Return patterns that together match what may follow ``start`` in a name that ``pattern`` (:mod:`fnmatch`) matches.

    Example:
        >>> _rests("*.weight", "student."), _rests("st?dent.*", "student."), _rests("regressor.*", "student.")
        (('*.weight', 'weight'), ('*',), ())
    """
    if not start or not pattern:
        return () if start else (pattern,)
    token = re.match(r"\[!?\]?[^]]*\]|.", pattern, re.DOTALL)
    assert token is not None
    rest = pattern[token.end() :]
    if token[0] == "*":  # takes the first letter of the start and goes on, or takes nothing
        return tuple(dict.fromkeys((*_rests(pattern, start[1:]), *_rests(rest, start))))
    return _rests(rest, start[1:]) if fnmatchcase(start[0], token[0]) else ()


def composed_weights(members: Mapping[str, tuple[Mapping[str, Weight], Mapping[str, Weight]]]) -> dict[str, Weight]:
    """Return the weights of a composition: ``ce`` weighs 1, and every member's terms as ``member.term``.

    Args:
        members: By name: the member's weights, and those of them that differ in a composition.
    """
    joined: dict[str, Weight] = {"ce": 1.0}
    for name, (own, composed) in members.items():
        joined |= {f"{name}.{term}": weight for term, weight in {**own, **composed}.items() if term != "ce"}
    return joined

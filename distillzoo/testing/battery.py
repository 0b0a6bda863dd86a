"""All points in order, and the call that runs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distillzoo.distiller import Distiller
from distillzoo.errors import OptionError, unknown_name
from distillzoo.testing import checks_state, checks_step
from distillzoo.testing.networks import PairMaker, tiny_data
from distillzoo.testing.subject import Check, ContractError, Subject
from distillzoo.types import DataSpec

__all__ = ["CHECKS", "check_distiller"]

CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        checks_step.check_terms,
        checks_step.check_gradients,
        checks_state.check_hidden_state,
        checks_state.check_teacher,
        checks_state.check_resume,
        checks_state.check_export,
        checks_state.check_eval,
        checks_step.check_batch_sizes,
        checks_step.check_pairs,
        checks_step.check_seed,
        checks_state.check_moves,
        checks_step.check_misspelt_options,
        checks_step.check_compile,
    )
}
"""The thirteen points by name, in order; each takes a :class:`Subject` and raises :class:`ContractError`."""


def check_distiller(
    name_or_class: str | type[Distiller],
    *,
    make_pair: PairMaker | None = None,
    options: Mapping[str, Any] | None = None,
    data: DataSpec | None = None,
    skip: Mapping[str, str] | None = None,
) -> None:
    """Run the contract battery over a distiller and report everything that fails at once.

    Args:
        name_or_class: A registered name, a composition such as ``"vid+kd"``, or a subclass of
            :class:`~distillzoo.distiller.Distiller`.
        make_pair: Makes student and teacher (or None) afresh on every call, without dropout; the default is a pair of tiny
            CNNs for the data.
        options: The method's options; those that make it fast on twelve samples. Where the battery tries other pairs, one that
            lacks what they ask for (a stage by name) may refuse them with OptionError.
        data: Data of the pair, and of the other pairs that the battery tries; the default is 16x16 pixels in five classes.
        skip: Points to leave out by name, each with its reason.
    Raises:
        ContractError: If any point fails; every failure is a sentence of the message.
        OptionError: If ``skip`` names no point, or gives no reason.
    Example:
        >>> check_distiller("vanilla", skip={"check_compile": "takes seconds"})
    """
    left_out = dict(skip or {})
    for name, reason in left_out.items():
        if name not in CHECKS:
            raise OptionError(unknown_name("point of the battery", name, CHECKS, listed="Points"))
        if not isinstance(reason, str) or not reason.strip():
            raise OptionError(f"skip gives a reason for every point it leaves out; got {reason!r} for {name!r}. Write why.")
    subject = Subject(name_or_class, make_pair, dict(options or {}), data or tiny_data())
    failures: list[ContractError] = []
    for name, check in CHECKS.items():
        if name in left_out:
            continue
        try:
            check(subject)
        except ContractError as error:
            failures.append(error)
    if failures:
        raise ContractError("\n".join(str(failure) for failure in failures)) from failures[0]

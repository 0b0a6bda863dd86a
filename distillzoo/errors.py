"""The errors of the project: one sentence that says what is wrong, what came, what is allowed and what to do.

Every error is a child of :class:`DistillZooError` and of the builtin that a caller would expect: an unknown name of ``KeyError``, a
missing package of ``ImportError``, all others here of ``ValueError``. The command line turns any of them into one line and exit
code 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "DataError",
    "DistillZooError",
    "MissingDependencyError",
    "OptionError",
    "RecordError",
    "ShapeError",
    "TapError",
    "UnknownNameError",
    "UnsupportedPairError",
    "failure_of",
    "near_matches",
    "unknown_name",
]


class DistillZooError(Exception):
    """Base of every error that this package raises on purpose."""


class OptionError(DistillZooError, ValueError):
    """An option, weight or argument has a value that is not allowed, or does not exist."""


class UnknownNameError(DistillZooError, KeyError):
    """A name (of a distiller, model, data set, recipe, ...) is not known; the message lists the near matches."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class ShapeError(DistillZooError, ValueError):
    """Tensors do not have the shapes that a loss or an adapter needs."""


class TapError(DistillZooError, ValueError):
    """A tap does not exist in the network, was not reached, or was overwritten in place."""


class UnsupportedPairError(DistillZooError, ValueError):
    """A method cannot work on this student-teacher pair; the message gives the reason and a method that can."""


class DataError(DistillZooError, ValueError):
    """A data set is missing, damaged, or not the one that was asked for."""


class RecordError(DistillZooError, ValueError):
    """A file that the harness wrote earlier cannot be read back as what it should be."""


class MissingDependencyError(DistillZooError, ImportError):
    """An optional package is needed and is not installed."""


def failure_of(error: BaseException) -> str:
    """Return the first line of what foreign code raised, with its type where that says more than that it failed.

    Example:
        >>> failure_of(KeyError("mask")), failure_of(RuntimeError("sizes differ")), failure_of(AssertionError())
        ("KeyError: 'mask'", 'sizes differ', 'AssertionError')
    """
    line = next(iter(str(error).splitlines()), "")
    return (
        line if line and isinstance(error, AssertionError | RuntimeError) else ": ".join(filter(None, (type(error).__name__, line)))
    )


def near_matches(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return up to ``limit`` names of ``known`` that look like ``name``, best first, whatever the case."""
    lowered = {candidate.lower(): candidate for candidate in known}
    return [lowered[match] for match in get_close_matches(name.lower(), list(lowered), n=limit, cutoff=0.55)]


def unknown_name(kind: str, name: object, known: Iterable[str], *, listed: str = "Registered") -> str:
    """Write the sentence for an unknown name, be it text or not: what came, the near matches, and everything that is allowed.

    Example:
        >>> unknown_name("distiller", "revewkd", ["kd", "reviewkd"])
        "Unknown distiller 'revewkd'. Did you mean 'reviewkd'? Registered: kd, reviewkd."
    """
    names = sorted(known)
    matches = near_matches(str(name), names)
    hint = f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
    return f"Unknown {kind} {name!r}.{hint} {listed}: {', '.join(names) or 'none'}."

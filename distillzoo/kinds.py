"""Of what kind a value is that came from outside: whole numbers, numbers, one of a few words."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, get_args

from distillzoo.errors import OptionError

__all__ = ["check_choice", "check_positive", "is_number", "is_whole"]


def is_whole(value: object, least: int | None = None) -> bool:
    """Whether a value is a whole number, numpy's among them; a truth value is none.

    Args:
        value: Anything.
        least: The smallest that will do; ``None``: any.
    Example:
        >>> is_whole(3, 1), is_whole(0, 1), is_whole(3.0), is_whole(True)
        (True, False, False, False)
    """
    return not isinstance(value, bool) and isinstance(value, Integral) and (least is None or int(value) >= least)


def is_number(value: object) -> bool:
    """Whether a value is a finite number; a truth value is none.

    Args:
        value: Anything.
    Example:
        >>> is_number(3), is_number(float("nan")), is_number("3")
        (True, False, False)
    """
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def check_choice(name: str, value: Any, allowed: Any) -> Any:
    """Return a value that is one of a ``Literal``'s, and refuse any other.

    Args:
        name: What the value is, for the sentence.
        value: Anything.
        allowed: The ``Literal``.
    Raises:
        OptionError: If it is another.
    Example:
        >>> from typing import Literal
        >>> check_choice("start", "warm", Literal["hot", "cold"])
        Traceback (most recent call last):
        distillzoo.errors.OptionError: start is one of hot, cold; got 'warm'. Choose one of these.
    """
    if value not in get_args(allowed):
        raise OptionError(f"{name} is one of {', '.join(get_args(allowed))}; got {value!r}. Choose one of these.")
    return value


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is not finite and above 0.

    Args:
        name: What the number is, for the sentence.
        value: The number.
    Raises:
        OptionError: If it is another.
    Example:
        >>> check_positive("temperature", 0.0)
        Traceback (most recent call last):
        distillzoo.errors.OptionError: temperature must be a finite number above 0; got 0.0.
    """
    if not 0.0 < value < math.inf:
        raise OptionError(f"{name} must be a finite number above 0; got {value}.")

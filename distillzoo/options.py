"""Options of a method: what its constructor takes beside what every constructor does, and which values are of their kind."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from numbers import Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from distillzoo.distiller import Distiller
from distillzoo.errors import OptionError, unknown_name

__all__ = ["check_options", "option_defaults"]


def option_defaults(method: type[Distiller]) -> dict[str, Any]:
    """Return the options of a method with their defaults: what its constructor takes beside what every constructor does.

    Args:
        method: The class.
    """
    base, parameters = inspect.signature(Distiller.__init__).parameters, inspect.signature(method.__init__).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in base and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }


def check_options(member: str, method: type[Distiller], given: Mapping[str, Any]) -> None:
    """Refuse options that a method does not have, and values that are of another kind than its annotations say.

    What values are in range the method says itself.

    Args:
        member: The method's name, for the sentence.
        method: The class.
        given: Values by name of the option.
    Raises:
        OptionError: If an option does not exist, or its value is of another kind.
    Example:
        >>> from distillzoo.methods.rkd import RKD
        >>> check_options("rkd", RKD, {"normalize": "off"})
        Traceback (most recent call last):
        distillzoo.errors.OptionError: The option normalize of rkd is True or False; got 'off'; the default is False.
    """
    known = option_defaults(method)
    for name, value in given.items():
        if name not in known:
            raise OptionError(unknown_name(f"option of {member}", name, known, listed="Its options are"))
        _check_kind(member, method, name, value)


def _check_kind(member: str, method: type[Distiller], name: str, value: Any) -> None:
    """Refuse what is no number where an option is one, and what is no truth value where it is one; ``None`` where it may be."""
    try:
        wanted = get_type_hints(method.__init__).get(name)
    except NameError:  # somebody's own method whose annotations do not exist at run time
        return
    kinds = set(get_args(wanted)) if get_origin(wanted) in (Union, UnionType) else {wanted}
    default = option_defaults(method)[name]
    if value is None and type(None) in kinds:
        return
    kinds.discard(type(None))
    if kinds == {bool} and not isinstance(value, bool):
        raise OptionError(f"The option {name} of {member} is True or False; got {value!r}; the default is {default}.")
    if kinds <= {int, float} and (isinstance(value, bool) or not isinstance(value, Real)):
        hint = " Text such as '1e-6' is no number in YAML; write 1.0e-6." if isinstance(value, str) else ""
        raise OptionError(f"The option {name} of {member} must be a number; got {value!r}; the default is {default!r}.{hint}")

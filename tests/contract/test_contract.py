"""Every registered distiller, and some compositions, against every point of the battery."""

from __future__ import annotations

import pytest

from distillzoo import list_distillers
from distillzoo.testing import CHECKS, Subject

# Options that keep a method small on twelve samples; each must exist on the method (build_distiller refuses it otherwise).
OPTIONS: dict[str, dict[str, object]] = {"crd": {"negatives": 6}}

# What is known to fail, by (method, point), each with its reason.
KNOWN_FAILURES: dict[tuple[str, str], str] = {}

_COMPOSED = [f"{name}+kd" for name in ("fitnet", "at", "vid", "crd", "kdiffusion") if name in list_distillers()]
METHODS = [*list_distillers(), "kd+vanilla", *_COMPOSED]


def subject(method: str) -> Subject:
    members = method.split("+")
    if len(members) == 1:
        return Subject(method, options=OPTIONS.get(method, {}))
    return Subject(method, options={member: OPTIONS[member] for member in members if member in OPTIONS})


# Tracing takes most of the time, and a composition adds nothing to its members' forward: one stands for all.
CASES = [(method, check) for method in METHODS for check in CHECKS if check != "check_compile" or method not in _COMPOSED[1:]]


@pytest.mark.parametrize(("method", "check"), CASES)
def test_contract(method, check, request):
    reason = KNOWN_FAILURES.get((method, check))
    if reason:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    CHECKS[check](subject(method))


def test_known_failures_name_what_exists_and_say_why():
    for (method, check), reason in KNOWN_FAILURES.items():
        assert method in METHODS
        assert check in CHECKS
        assert reason.strip()
    assert set(OPTIONS) <= set(list_distillers())

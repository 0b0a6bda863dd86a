from __future__ import annotations

import inspect

from distillzoo import functional

LOSSES = [getattr(functional, name) for name in functional.__all__]


def test_everything_listed_is_a_function_of_a_method():
    assert functional.__all__ == sorted(set(functional.__all__))
    for loss in LOSSES:
        assert inspect.isfunction(loss)
        assert loss.__module__.startswith("distillzoo.methods.")
        assert loss.__doc__


def test_every_public_loss_of_a_method_is_listed():
    import pkgutil
    from importlib import import_module

    import distillzoo.methods

    found = set()
    for info in pkgutil.iter_modules(distillzoo.methods.__path__):
        module = import_module(f"distillzoo.methods.{info.name}")
        if info.name in distillzoo.methods.__all__:
            found |= {name for name in module.__all__ if name.endswith("_loss")}
    assert found <= set(functional.__all__)

from __future__ import annotations

import inspect

import pytest
import torch

from distillzoo import functional
from distillzoo.errors import ShapeError

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


def test_kd_loss_is_usable_without_a_distiller():
    student = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    teacher = torch.tensor([[3.0, 2.0, 1.0]])
    loss = functional.kd_loss(student, teacher, temperature=2.0)
    p, q = (teacher / 2).softmax(1), (student.detach() / 2).softmax(1)
    assert loss.item() == pytest.approx(4.0 * (p * (p / q).log()).sum().item(), rel=1e-5)
    loss.backward()
    assert student.grad is not None
    with pytest.raises(ShapeError, match="one shape"):
        functional.kd_loss(torch.zeros(2, 3), torch.zeros(2, 4))

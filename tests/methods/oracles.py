"""What the tests of the methods share: inputs of the oracle values, a tiny pair, and checks that every loss passes."""

import math

import torch
from hypothesis import settings
from torch import Tensor, nn

from distillzoo import build_distiller
from distillzoo.types import Stage

UNHURRIED = settings(deadline=None, max_examples=50)
"""For property tests: a busy machine is no failure."""


def sine(*shape: int, alpha: float, delta: float = 0.0, scale: float = 1.0) -> Tensor:
    """x_k = scale * sin(alpha * k + delta), k row-major, double precision."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(alpha * k + delta)).view(shape)


def student_logits() -> Tensor:
    return sine(4, 5, alpha=0.7, scale=3.0)


def teacher_logits() -> Tensor:
    return sine(4, 5, alpha=1.3, delta=0.5, scale=3.0)


LABELS = torch.arange(4)


def student_vectors() -> Tensor:
    return sine(4, 6, alpha=0.9, delta=0.1)


def teacher_vectors() -> Tensor:
    return sine(4, 6, alpha=0.5, delta=0.3)


def student_map() -> Tensor:
    return sine(4, 3, 4, 4, alpha=0.31)


def teacher_map() -> Tensor:
    return sine(4, 5, 4, 4, alpha=0.17, delta=0.2)


def wide_student_map() -> Tensor:
    return sine(4, 5, 4, 4, alpha=0.31)


class TinyNet(nn.Module):
    """Three stages of stride 1, 2, 2 with declared taps; ``linear_end`` leaves the stages without activation."""

    classifier_path = "fc"

    def __init__(self, width: int = 4, *, stages: int = 3, linear_end: bool = False, classes: int = 5) -> None:
        super().__init__()
        widths = [3] + [width * 2**i for i in range(stages)]
        self.blocks = nn.Sequential(*(self._block(widths[i], widths[i + 1], 1 if i == 0 else 2, linear_end) for i in range(stages)))
        self.fc = nn.Linear(widths[-1], classes)
        self.stages = tuple(Stage(f"blocks.{i}", None if linear_end else f"blocks.{i}.2:input") for i in range(stages))

    @staticmethod
    def _block(inputs: int, outputs: int, stride: int, linear_end: bool) -> nn.Sequential:
        layers = [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)]
        return nn.Sequential(*layers, *([] if linear_end else [nn.ReLU()]))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.blocks(images).mean((2, 3)))


def tiny_pair(name: str, *, student: nn.Module | None = None, teacher: nn.Module | None = None, **options: object):
    """Build a distiller on a tiny pair of different widths, reproducibly."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, teacher = student or TinyNet(4), teacher or TinyNet(8)
    return build_distiller(name, student, teacher, input_size=16, seed=1, **options)


def tiny_batch(size: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    images = sine(size, 3, 16, 16, alpha=0.37, delta=0.3).float()
    return images, torch.arange(size) % classes


def check_two_steps(distiller, size: int = 6) -> None:
    """Two optimiser steps: finite terms named as the weights, a gradient on every trainable tensor, a loss that moves."""
    images, targets = tiny_batch(size)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        out = distiller(images, targets)
        assert out.terms.keys() == out.weights.keys() == distiller.weights.keys()
        assert all(torch.isfinite(term) and term.ndim == 0 for term in out.terms.values())
        optimizer.zero_grad()
        out.loss.backward()
        for parameter_name, parameter in distiller.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert torch.isfinite(parameter.grad).all(), parameter_name
        optimizer.step()
        distiller.after_step()
        losses.append(out.loss.item())
    assert losses[0] != losses[1]


def check_finite(loss, *inputs: Tensor) -> Tensor:
    """The loss and its gradient by every floating input that wants one are finite; returns the loss."""
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    value = loss(*leaves)
    assert value.ndim == 0
    assert torch.isfinite(value)
    value.backward()
    for leaf in leaves:
        assert leaf.grad is None or torch.isfinite(leaf.grad).all()
    assert leaves[0].grad is not None
    return value.detach()


def check_half_types(loss, *inputs: Tensor) -> None:
    """Half types give the float32 loss of their rounded values, and gradients in their own type."""
    for dtype in (torch.float16, torch.bfloat16):
        rounded = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        leaf = rounded[0].clone().requires_grad_()
        value = loss(leaf, *rounded[1:])
        assert value.dtype == torch.float32
        expected = loss(*(x.float() if x.is_floating_point() else x for x in rounded))
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
        value.backward()
        assert leaf.grad.dtype == dtype
    assert loss(*inputs).dtype == torch.float64


def check_compiles(loss, *inputs: Tensor) -> None:
    """``torch.compile(fullgraph=True)`` accepts the loss: no host sync, no branch on data."""
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    leaf = inputs[0].clone().requires_grad_()
    torch.testing.assert_close(compiled(leaf, *inputs[1:]), loss(*inputs))
    compiled(leaf, *inputs[1:]).backward()


def check_teacher_is_constant(loss, student: Tensor, teacher: Tensor) -> None:
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None

"""The points about state: what hides, what a checkpoint holds, what is exported, what moves and copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from distillzoo.distiller import Distiller
from distillzoo.taps import Teacher
from distillzoo.testing.comparing import difference, snapshot, trace_tensors
from distillzoo.testing.hidden import hidden
from distillzoo.testing.subject import Loop, Subject, hold, point
from distillzoo.types import Batch

__all__ = [
    "check_eval",
    "check_export",
    "check_hidden_state",
    "check_moves",
    "check_resume",
    "check_teacher",
]

_TORCH_KEYS = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@point(3, "nothing trainable hides")
def check_hidden_state(subject: Subject) -> None:
    """(3) No parameter and no module hides in a container, function or plain object, where no optimiser and checkpoint finds it.

    The teacher and what is made of its layers alone are exempt: it is a :class:`~distillzoo.taps.Teacher`, no child module, by
    design.
    """
    pair = subject.pair()
    foreign = {id(module) for network in pair if network is not None for module in network.modules()}
    distiller = subject.build(pair=pair)
    registered = {id(thing) for thing in (*distiller.modules(), *distiller.parameters(), *distiller.buffers())}
    teacher = distiller.teacher_net
    frozen: set[int] = set() if teacher is None else {id(parameter) for parameter in teacher.module.parameters()}

    def known(thing: Any) -> bool:
        own: set[int] = {id(parameter) for parameter in thing.parameters()} if isinstance(thing, nn.Module) else set()
        return id(thing) in registered or isinstance(thing, Teacher) or (bool(own) and own <= frozen)

    found: list[str] = []
    for name, module in distiller.named_modules():
        if id(module) not in foreign:
            where = f"distiller.{name}" if name else "distiller"
            own = {key: value for key, value in vars(module).items() if key not in _TORCH_KEYS}
            found += [path for key, value in own.items() for path in hidden(value, f"{where}.{key}", known, set())]
    hold(
        not found,
        f"{', '.join(found)} is trainable and not registered, so it is neither optimised nor saved nor moved; "
        "use nn.Parameter, nn.ParameterList, nn.ModuleList or nn.ModuleDict as attributes.",
    )


@point(4, "the teacher is left alone")
def check_teacher(subject: Subject) -> None:
    """(4) The teacher is bit-equal after training, in eval mode, without gradients, absent from state and parameters.

    Its trace, which the members of a group share, is bit-equal after a step too.
    """
    distiller = subject.build()
    if distiller.teacher_net is None:
        return
    teacher = distiller.teacher_net.module
    before = snapshot(teacher.state_dict().items())
    for given in (False, True):
        Loop(subject, distiller, given_trace=given).run()
        lively = [name or "itself" for name, module in teacher.named_modules() if module.training]
        hold(not lively, f"after a step the teacher is in training mode ({', '.join(lively[:3])}); leave it in eval.")
    changed = difference(before, teacher.state_dict())
    hold(not changed, f"training changed the teacher's {', '.join(changed[:3])}; work on a copy.")
    distiller.eval().train()
    hold(
        not any(module.training for module in teacher.modules()), "train() puts the teacher into training mode; do not override it."
    )
    trainable = [name for name, p in teacher.named_parameters() if p.requires_grad or p.grad is not None]
    hold(not trainable, f"the teacher's {', '.join(trainable[:3])} require or have gradients; run it under no_grad.")
    inside = _addresses(teacher.state_dict()) & _addresses(distiller.state_dict())
    registered = {id(module) for module in teacher.modules()} & {id(module) for module in distiller.modules()}
    hold(
        not inside and not registered,
        "the teacher is part of the distiller's state; do not assign its modules to attributes, read self.teacher_net.",
    )
    _check_trace_untouched(subject, distiller)


def _check_trace_untouched(subject: Subject, distiller: Distiller) -> None:
    batch = subject.batch()
    trace = subject.trace(distiller, batch)
    assert trace is not None
    before = snapshot(trace_tensors(trace))
    subject.feed(distiller, batch, trace).loss.backward()  # type: ignore[no-untyped-call]
    changed = difference(before, dict(trace_tensors(trace)))
    hold(
        not changed,
        f"a step changed the teacher's trace in place ({', '.join(changed)}), which other members read; work on a copy.",
    )


def _addresses(state: Mapping[str, Tensor]) -> set[int]:
    return {tensor.data_ptr() for tensor in state.values() if isinstance(tensor, Tensor) and tensor.numel()}


@point(5, "resume equals an unbroken run")
def check_resume(subject: Subject) -> None:
    """(5) ``state_dict()`` loads strictly into a freshly built distiller, and training goes on bit for bit.

    The fresh one is not prepared and its student has other weights: what is needed must be in the state.
    """
    unbroken = Loop(subject, subject.build()).run()
    final = snapshot(unbroken.distiller.state_dict().items())
    for done in unbroken.breaks():
        first = Loop(subject, subject.build()).run(0, done)
        file = io.BytesIO()
        torch.save(first.state(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        student, teacher = subject.pair()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(0.5)
        resumed = Loop(subject, subject.build(pair=(student, teacher), prepare=False)).load(state, done).run(done)
        wrong = difference(final, resumed.distiller.state_dict())
        differ = [
            done + number
            for number, (one, other) in enumerate(zip(unbroken.losses[done:], resumed.losses, strict=True))
            if not torch.equal(one, other)
        ]
        hold(
            not wrong and not differ,
            f"resumed after {done} of {len(unbroken.plan)} steps it differs from an unbroken run (losses of steps {differ}, state "
            f"{wrong[:3]}); keep what changes in parameters and persistent buffers, not in plain attributes.",
        )


@point(6, "the export is the plain student")
def check_export(subject: Subject) -> None:
    """(6) The export has the student's class, modules and keys, predicts the same, has no hooks; training goes on."""
    pair = subject.pair()
    plain = _Structure.of(pair[0])  # as it came: another call makes other classes where layers are parametrized
    loop = Loop(subject, subject.build(pair=pair)).run(0, 2)
    exported = loop.distiller.export_student()
    found = _Structure.of(exported)
    hold(found.kinds[""] is plain.kinds[""], f"the export is a {_name(found)}; the student was a {_name(plain)}.")
    odd = [name for name in {**plain.kinds, **found.kinds} if plain.kinds.get(name) is not found.kinds.get(name)]
    hold(not odd, f"the export's modules {', '.join(sorted(odd)[:3])} are not the plain student's; fold what was put in.")
    hold(
        found.shapes == plain.shapes,
        f"the export's keys or shapes differ: {sorted(set(plain.shapes.items()) ^ set(found.shapes.items()))[:3]}.",
    )
    hold(found.hooks == plain.hooks, "the export still has hooks; return remove_hooks(copy) or call super().export_student().")
    hold(
        not _addresses(exported.state_dict()) & _addresses(loop.distiller.state_dict()),
        "the export shares tensors with the distiller, so further training changes it; return a copy.",
    )
    _check_prediction(subject, loop.distiller, exported)
    loop.run(2)
    wrong = difference(dict(Loop(subject, subject.build()).run().distiller.state_dict()), loop.distiller.state_dict())
    hold(not wrong, f"export changed the training that followed ({', '.join(wrong[:3])}); work on a copy.")


@dataclass(frozen=True)
class _Structure:
    """What an export has in common with the student that it was."""

    kinds: dict[str, type[nn.Module]]
    shapes: dict[str, tuple[int, ...]]
    hooks: int

    @classmethod
    def of(cls, network: nn.Module) -> Self:
        return cls(
            {name: type(module) for name, module in network.named_modules()},
            {name: tuple(value.shape) for name, value in network.state_dict().items()},
            sum(len(getattr(module, hooks)) for module in network.modules() for hooks in _HOOKS),
        )


def _name(structure: _Structure) -> str:
    return structure.kinds[""].__name__


def _check_prediction(subject: Subject, distiller: Distiller, exported: nn.Module) -> None:
    images = subject.batch(1, 5).images
    distiller.eval()
    exported.eval()
    with torch.no_grad():
        expected, got = distiller.predict(images), exported(images)
    distiller.train()
    hold(
        got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-4, atol=1e-5),
        f"the export's logits differ from predict's by up to {float((got - expected).abs().max())}; they must be one function.",
    )


@point(7, "eval() changes nothing")
def check_eval(subject: Subject) -> None:
    """(7) A forward in eval mode changes no buffer and no step, and gives the same loss twice."""
    distiller = Loop(subject, subject.build()).run(0, 2).distiller.eval()
    before = snapshot([*distiller.named_buffers(), *distiller.named_parameters()])
    batch = subject.batch(1)
    losses = []
    for given in (False, True, False):
        with torch.no_grad():
            losses.append(subject.step(distiller, batch, given_trace=given).loss)
    changed = difference(before, dict([*distiller.named_buffers(), *distiller.named_parameters()]))
    hold(not changed, f"a forward in eval mode changed {', '.join(changed[:3])}; write to buffers only while self.training.")
    hold(
        all(torch.equal(losses[0], loss) for loss in losses),
        f"the same batch gave the losses {[float(loss) for loss in losses]} in eval mode; they must be one number.",
    )


@point(11, "moves, copies, autocast")
def check_moves(subject: Subject) -> None:
    """(11) ``.to(float64)`` moves all of it, a deep copy trains alone, and autocast in bfloat16 runs."""
    _check_float64(subject)
    _check_copy(subject)
    for given in (False, True):
        distiller = subject.build()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = subject.step(distiller, subject.batch(), given_trace=given).loss
        hold(loss.dtype == torch.float32, f"under autocast the loss is {loss.dtype}; compute losses in float32.")
        hold(torch.isfinite(loss), f"under autocast the loss is {loss.item()}; it must be finite.")
        loss.backward()  # type: ignore[no-untyped-call]


def _check_float64(subject: Subject) -> None:
    distiller = subject.build().to(torch.float64)
    batch = subject.batch()
    second = None if batch.second_view is None else batch.second_view.double()
    loss = subject.step(distiller, Batch(batch.images.double(), batch.targets, batch.index, second)).loss
    hold(loss.dtype == torch.float64, f"after .to(float64) the loss is {loss.dtype}; do not cast to a fixed type.")
    loss.backward()  # type: ignore[no-untyped-call]
    distiller.after_step()
    tensors = (*distiller.named_parameters(), *distiller.named_buffers())
    left = [name for name, tensor in tensors if tensor.is_floating_point() and tensor.dtype != torch.float64]
    hold(not left, f"after .to(float64) {', '.join(left[:3])} is not float64; register it, and do not write another type to it.")


def _check_copy(subject: Subject) -> None:
    original = Loop(subject, subject.build()).run(0, 2).distiller
    twin = copy.deepcopy(original)
    shared = _addresses(dict([*original.named_parameters(), *original.named_buffers()])) & _addresses(
        dict([*twin.named_parameters(), *twin.named_buffers()])
    )
    hold(not shared, "a deep copy shares tensors with the original; hold them in parameters and buffers.")
    before = snapshot(original.state_dict().items())
    losses = Loop(subject, twin).run().losses
    wrong = difference(before, original.state_dict())
    hold(not wrong, f"training a deep copy changed the original's {', '.join(wrong[:3])}; hooks or objects are shared.")
    again = Loop(subject, original).run().losses
    hold(
        all(torch.equal(one, other) for one, other in zip(losses, again, strict=True))
        and not _recorders(original) & _recorders(twin),
        "a deep copy trains differently from the original: hooks or objects are shared between them.",
    )


def _recorders(distiller: Distiller) -> set[int]:
    """The hooks on student and adapters, by identity."""
    return {id(hook) for module in distiller.modules() for name in _HOOKS for hook in getattr(module, name).values()}

"""What :func:`distillzoo.build_distiller` is given: checked, and completed from the networks themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from distillzoo.adapters.plain import check_plain
from distillzoo.errors import DistillZooError, OptionError, ShapeError, failure_of
from distillzoo.registry import DISTILLERS
from distillzoo.stages import Probe
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import DataSpec, Stage

__all__ = ["check_arguments", "check_classes", "check_taps", "measured_data", "tapped_student", "unchanged_if_refused"]

_GUESSED_SIZES = ((224, 224), (32, 32))


def check_arguments(name: Any, student: Any, teacher: Any, data: Any, input_size: Any) -> None:
    """Refuse arguments of :func:`distillzoo.build_distiller` that are of a wrong type, each with what to pass instead.

    Args:
        name: What should be a name or a class.
        student: What should be a network.
        teacher: What should be a network, several, or none.
        data: What should be a :class:`DataSpec` or none.
        input_size: What should be pixels or none.
    Raises:
        OptionError: If one is something else, or the student has a part in a teacher.
    """
    if not isinstance(name, str | type):
        raise OptionError(
            f"A distiller is a name or a subclass of Distiller; got {name!r}; names: {', '.join(DISTILLERS.names())}."
        )
    if not isinstance(student, nn.Module):
        raise OptionError(
            f"The student must be a torch.nn.Module; got {student!r}; make one with create_model(name, num_classes=...)."
        )
    _check_network("student", student)
    check_plain(student)
    for one in _networks_of(teacher):
        _check_network("teacher", one)
        _check_apart(student, one)
    if next(student.parameters(), None) is not None and not any(p.requires_grad for p in student.parameters()):
        raise OptionError(
            f"No parameter of the student {type(student).__name__} requires a gradient, as those of a network that was a teacher; "
            "a student must have some to train: call student.requires_grad_(True), or pass a copy that has."
        )
    if data is not None and not isinstance(data, DataSpec):
        raise OptionError(f"data must be a DataSpec; got {type(data).__name__}; write DataSpec(num_classes, (height, width)).")
    sizes = input_size if isinstance(input_size, tuple) else (input_size, input_size)
    if input_size is not None and (len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes)):
        raise OptionError(f"input_size must be pixels, as 32 or (height, width); got {input_size!r}.")


def _networks_of(teacher: Any) -> list[nn.Module]:
    """The networks of a teacher, of several, or of none; anything else is refused."""
    several = isinstance(teacher, Sequence) and not isinstance(teacher, str)
    for one in teacher if several else [teacher]:
        if several and (one is None or isinstance(one, Teacher)):
            raise OptionError(
                f"A list of teachers holds networks (torch.nn.Module) and got {'None' if one is None else 'a Teacher'}; pass each "
                "network itself (the .module of a Teacher), or one Teacher alone."
            )
        if not (one is None or isinstance(one, nn.Module | Teacher)):
            raise OptionError(
                f"A teacher must be a torch.nn.Module; got {one!r}; make one with create_model(name, num_classes=...)."
            )
    if several:
        return list(teacher)
    return [] if teacher is None else [teacher.module if isinstance(teacher, Teacher) else teacher]


@contextmanager
def unchanged_if_refused(student: nn.Module, teacher: Any) -> Iterator[None]:
    """Give networks back as they came if what is done to them within fails: layers, hooks, modes, and what requires a gradient.

    A method replaces layers before it has seen whether the rest of its options holds; a network that stayed so would be exported
    so by the next method that takes it.

    Args:
        student: The student.
        teacher: The teacher, several, or none.
    """
    networks = [student, *_networks_of(teacher)]
    layers = [
        (module, dict(module._modules), module.training, set(module._forward_hooks), set(module._forward_pre_hooks))
        for network in networks
        for module in network.modules()
    ]
    trained = [(parameter, parameter.requires_grad) for network in networks for parameter in network.parameters()]
    try:
        yield
    except BaseException:
        for module, children, training, after, before in layers:
            module._modules.clear()
            module._modules.update(children)
            module.training = training
            for hooks, kept in ((module._forward_hooks, after), (module._forward_pre_hooks, before)):
                for key in [key for key in hooks if key not in kept]:
                    del hooks[key]
        for parameter, required in trained:
            parameter.requires_grad_(required)
        raise


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a student that a frozen teacher would freeze."""
    if student is teacher:
        raise OptionError("Student and teacher are one and the same module, which would be frozen; pass a copy as the teacher.")
    trained = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in trained]
    if shared or any(part is student for part in teacher.modules()):
        what = f"{len(shared)} parameters of the student (the first as {shared[0]!r})" if shared else "the student itself"
        raise OptionError(
            f"The teacher {type(teacher).__name__} holds {what}, which would be frozen; pass a copy as the teacher: "
            "copy.deepcopy(network)."
        )


def _check_network(role: str, network: nn.Module) -> None:
    if isinstance(network, torch.jit.ScriptModule):
        raise OptionError(
            f"The {role} is a torch.jit.ScriptModule, whose inside cannot be read; pass the module that it was made of."
        )
    compiled = isinstance(network._modules.get("_orig_mod"), nn.Module)  # asking torch for the class would take seconds
    if compiled or isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inside, instead = ("_orig_mod", "compile") if compiled else ("module", "wrap")
        instead += " the distiller that is built on it"
        if isinstance(network, nn.DataParallel):  # whose copies would go on with the student and the teacher of the first device
            instead = "wrap the distiller in torch.nn.parallel.DistributedDataParallel"
        raise OptionError(
            f"The {role} is a network inside {type(network).__name__}, where its layers have other paths; pass the network itself "
            f"(.{inside}), and {instead}."
        )
    if any(is_lazy(tensor) for tensor in (*network.parameters(), *network.buffers())):
        raise OptionError(
            f"The {role} {type(network).__name__} has lazy layers, which have no weights yet; run it once on some images first."
        )


def check_taps(taps: Any) -> None:
    """Refuse taps that are not given by network; what is given for a network is looked at with the network.

    Args:
        taps: What should be a mapping with the keys ``"student"`` and ``"teacher"``, or none.
    Raises:
        OptionError: If it is something else.
    """
    if taps is not None and not isinstance(taps, Mapping):
        raise OptionError(f"taps has the keys 'student' and 'teacher'; got {taps!r}; write taps={{'student': [...]}}.")
    for part in taps or {}:
        if part not in ("student", "teacher"):
            raise OptionError(f"taps has the keys 'student' and 'teacher'; got {part!r}.")


def measured_data(student: nn.Module, input_size: int | tuple[int, int] | None) -> DataSpec:
    """Return what can be known of the images when only the networks are given.

    Args:
        student: The network that says, or is tried.
        input_size: Height and width in pixels; ``None``: what the network declares, else 224, then 32 are tried.
    Raises:
        ShapeError: If it runs at none of the sizes.
    """
    config = getattr(student, "pretrained_cfg", None) or getattr(student, "default_cfg", None) or {}
    declared = config.get("input_size") if isinstance(config, Mapping) else None
    channels = next((m.in_channels for m in student.modules() if isinstance(m, nn.Conv2d)), 3)
    if isinstance(input_size, int):
        input_size = (input_size, input_size)
    sizes = [input_size] if input_size else [*([tuple(declared[1:])] if declared else []), *_GUESSED_SIZES]
    mean, std = config.get("mean"), config.get("std")
    if not (mean and std and len(mean) == channels):
        mean, std = (0.0,) * channels, (1.0,) * channels
    problems: list[str] = []
    for height, width in dict.fromkeys(sizes):
        probe = Probe(student, DataSpec(2, (height, width), tuple(mean), tuple(std)))
        try:
            with probe.evaluating():
                classes = probe.width(student(probe.images), "student")
        except ShapeError:  # it runs, and returns no logits: at another size it would not either
            raise
        except Exception as error:  # a network may raise anything at a size that it cannot take
            problems.append(f"at {height}x{width}: {failure_of(error)}")
            continue
        return DataSpec(classes, (height, width), tuple(mean), tuple(std))
    raise ShapeError(
        f"The student {type(student).__name__} does not run ({'; '.join(problems)}); pass input_size= in pixels, or data=."
    )


def tapped_student(student: nn.Module, data: DataSpec, stages: Sequence[Stage | str] | Mapping[str, Stage | str] | None) -> Tapped:
    """Wrap the student.

    Args:
        student: The network.
        data: Size of the images.
        stages: As for :class:`Tapped`.
    Raises:
        OptionError: If it writes to the images.
        TapError: As for :class:`Tapped`.
        ShapeError: If it does not run on images of that size, in eval or in training mode, or returns no logits.
    """
    ran = "run"
    try:
        tapped = Tapped(student, data, stages=stages)
        ran = "train"
        tapped.try_training()  # some have branches that only run here, such as auxiliary classifiers, and need larger maps
    except DistillZooError:
        raise
    except Exception as error:  # a network may raise anything at a size that it cannot take
        height, width = data.input_size
        raise ShapeError(
            f"The student {type(student).__name__} does not {ran} on {data.channels}-channel images of {height}x{width} "
            f"({failure_of(error)}); pass input_size= in pixels, or data= of images that it takes."
        ) from error
    return tapped


def check_classes(student: Tapped, teacher: Teacher | None, num_classes: int | None) -> None:
    """Refuse a pair of other classes than those asked for, or of different ones or floating types.

    Args:
        student: The student.
        teacher: The teacher, if there is one.
        num_classes: The number of classes that was asked for; ``None`` takes the student's.
    Raises:
        OptionError: If they disagree.
    """
    if num_classes is not None and student.num_classes != num_classes:
        raise OptionError(
            f"The student {type(student.module).__name__} has {student.num_classes} classes and num_classes is {num_classes}; "
            "make them equal."
        )
    if teacher is not None:
        own, theirs = (next((p for p in net.module.parameters() if p.is_floating_point()), None) for net in (student, teacher))
        if own is not None and theirs is not None and own.dtype != theirs.dtype:
            raise OptionError(f"The student computes in {own.dtype} and the teacher in {theirs.dtype}; cast one of them.")
    if teacher is not None and teacher.num_classes != student.num_classes:
        raise OptionError(
            f"The teacher {type(teacher.module).__name__} has {teacher.num_classes} classes and the student "
            f"{type(student.module).__name__} has {student.num_classes}; they must agree."
        )

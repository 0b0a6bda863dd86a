"""Build a distiller by name on any pair of networks: :func:`build_distiller`, :func:`list_distillers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

import distillzoo.methods  # noqa: F401 - registers them
from distillzoo.arguments import (
    check_arguments,
    check_classes,
    check_taps,
    measured_data,
    tapped_student,
    unchanged_if_refused,
)
from distillzoo.composition import Composition, Maker, composed_weights
from distillzoo.distiller import Distiller
from distillzoo.errors import OptionError, unknown_name
from distillzoo.options import check_options, option_defaults
from distillzoo.registry import DISTILLERS
from distillzoo.schedules import Weight, describe_weight
from distillzoo.streams import Stream, draw_seed, forked_generator
from distillzoo.taps import Ensemble, Tapped, Teacher
from distillzoo.taps.teacher import as_teacher
from distillzoo.types import DataSpec, Stage
from distillzoo.weighting import TermWeights, preset_weights

__all__ = ["Ensemble", "build_distiller", "describe_distiller", "list_distillers", "resolve_distiller"]

Taps = Mapping[str, Sequence[Stage | str] | Mapping[str, Stage | str]]


def list_distillers(pattern: str = "*") -> list[str]:
    """Return the registered names that match a shell pattern, sorted.

    Args:
        pattern: As ``"*kd*"``.
    Example:
        >>> "kd" in list_distillers()
        True
    """
    return DISTILLERS.names(pattern)


def resolve_distiller(name: str | type[Distiller]) -> dict[str, type[Distiller]]:
    """Return the classes that a name, a composition (``"crd+kd"``) or a class stands for, by member name.

    Raises:
        UnknownNameError: If a name is not registered.
        OptionError: If a composition is malformed or a class is no distiller.
    """
    if isinstance(name, type):
        return _checked({name.__name__.lower(): name})
    parts = [part.strip() for part in name.split("+")]
    if len(set(parts)) < len(parts) or "" in parts:
        raise OptionError(f"A composition is different names joined by '+', as 'crd+kd'; got {name!r}.")
    return _checked({part: DISTILLERS[part] for part in parts})


def _checked(methods: dict[str, type[Any]]) -> dict[str, type[Distiller]]:
    for name, method in methods.items():
        if not (isinstance(method, type) and issubclass(method, Distiller)):
            raise OptionError(f"A distiller is a subclass of distillzoo.Distiller; {name!r} is {method!r}.")
    return methods


def describe_distiller(
    name: str | type[Distiller], *, weights: Mapping[str, Weight] | str | None = None, **options: Any
) -> dict[str, Any]:
    """Return a method's resolved options and weights as plain data, for records: every default filled in.

    Nothing is built, so weights may be listed of terms that the options leave out (KDiffusion's guide): they are without effect.

    Args:
        name: As for :func:`build_distiller`.
        weights: As for :func:`build_distiller`.
        options: As for :func:`build_distiller`.
    Raises:
        OptionError: If an option or a preset does not exist, or the method has no such term whatever its options.
    Example:
        >>> describe_distiller("kd", temperature=2.0)["options"]
        {'temperature': 2.0}
    """
    methods = resolve_distiller(name)
    given = _split_options(methods, options)
    described = {member: {**option_defaults(method), **given[member]} for member, method in methods.items()}
    if len(methods) == 1:
        ((member, method),) = methods.items()
        presets = method.presets_with(described[member])
        values = preset_weights(presets, weights, method.__name__)
        known = {term: weight for each in presets.values() for term, weight in each.items()} | values
        chosen: dict[str, Any] = described[member]
    else:
        _by_term(weights)
        presets_of = {m: method.presets_with(described[m]) for m, method in methods.items()}
        defaults = {m: (preset_weights(presets_of[m], None, m), method.composed_weights) for m, method in methods.items()}
        values = known = composed_weights(defaults)
        chosen = dict(described)
    if weights is not None and not isinstance(weights, str):
        TermWeights(known, name if isinstance(name, str) else name.__name__).overridden(weights)
        values = {**values, **weights}
    return {"options": chosen, "weights": {term: describe_weight(weight) for term, weight in values.items()}}


def _by_term(weights: Mapping[str, Weight] | str | None) -> Mapping[str, Weight] | None:
    if isinstance(weights, str):
        raise OptionError(f"A composition takes weights by term, as {{'kd.kd': 0.5}}; got the preset name {weights!r}.")
    return weights


def _split_options(methods: Mapping[str, type[Distiller]], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Give every member its options; a composition takes them as ``member={"option": value}``."""
    if len(methods) == 1:
        given = {next(iter(methods)): dict(options)}
    else:
        unknown = [name for name in options if name not in methods]
        if unknown:
            allowed = unknown_name("member of the composition", unknown[0], methods, listed="Members")
            raise OptionError(f"{allowed} Options of a composition are given as kd={{'temperature': 2.0}}.")
        given = {member: _member_options(member, options.get(member)) for member in methods}
    for member, method in methods.items():
        check_options(member, method, given[member])
    return given


def _member_options(member: str, given: Any) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise OptionError(
            f"Options of a member of a composition are a mapping, as kd={{'temperature': 2.0}}; got {member}={given!r}; name the "
            "option."
        )
    return dict(given or {})


def build_distiller(
    name: str | type[Distiller],
    student: nn.Module,
    teacher: nn.Module | Teacher | Sequence[nn.Module] | None = None,
    *,
    num_classes: int | None = None,
    data: DataSpec | None = None,
    input_size: int | tuple[int, int] | None = None,
    weights: Mapping[str, Weight] | str | None = None,
    taps: Taps | None = None,
    teacher_data: DataSpec | Literal["declared"] | None = None,
    seed: int | None = None,
    **options: Any,
) -> Distiller:
    """Build a distiller on a pair of networks and take the student over; where it refuses, both networks stay as they came.

    The distiller is in training mode, as every new module, and with it the student.

    Args:
        name: A registered name, a composition such as ``"crd+kd"``, or a subclass of :class:`Distiller`.
        student: Any classifier.
        teacher: Any classifier of the same classes; a list is averaged; a :class:`Teacher` is shared with other distillers.
        num_classes: Number of classes; checked against both networks, measured where it is not given.
        data: What may be known about the data; needed by methods with a memory. Stands in for ``num_classes`` and ``input_size``.
        input_size: Height and width of the images in pixels; else what the network declares, else 224, then 32 are tried.
        weights: Weights by term that override the defaults, or the name of a preset (``"imagenet"``).
        taps: ``{"student": ..., "teacher": ...}``: tap paths, shallow to deep, or a mapping from names to paths, in place of those
            that are found.
        teacher_data: Normalisation and size that the teacher wants where they differ from the student's, which ``data`` must
            give: it then sees the same crop, renormalised and resized. ``"declared"`` takes what it declares itself, as timm's
            networks do (``pretrained_cfg``; of a list each teacher its own); ``None``: the teacher sees what the student sees.
        seed: Seed of adapters and draws; ``None`` draws one from torch's global generator.
        options: The method's own options; of a composition ``member={"option": value}``.
    Raises:
        UnknownNameError: If the name is not registered; near matches are listed.
        OptionError: If an option, a weight or a number of classes is wrong.
        ShapeError: If a network does not return ``(B, num_classes)``.
        TapError: If a tap does not exist.
        UnsupportedPairError: If the method cannot work on this pair.
    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> student, teacher = (create_model(name, num_classes=10) for name in ("resnet8", "resnet20"))
        >>> distiller = build_distiller("kd", student, teacher, input_size=32)
        >>> out = distiller(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))
        >>> sorted(out.terms)
        ['ce', 'kd']
    """
    check_arguments(name, student, teacher, data, input_size)
    methods = resolve_distiller(name)
    given = _split_options(methods, options)
    check_taps(taps)
    if teacher_data is not None and data is None:
        raise OptionError(
            "teacher_data says what the teacher wants of the images, and nothing says what the images are, so their normalisation "
            "would be a guess; pass data=DataSpec(num_classes, (height, width), mean, std) of the student's images as well."
        )
    if isinstance(teacher, Teacher) and "teacher" in (taps or {}):
        raise OptionError("taps of the teacher are chosen where its Teacher is made: Teacher(network, data, stages=...).")
    spec = data or measured_data(student, input_size)
    if data is not None and num_classes not in (None, data.num_classes):
        raise OptionError(f"num_classes is {num_classes} and data says {data.num_classes}; give one of them.")
    if data is not None and input_size is not None:
        raise OptionError(f"input_size {input_size} beside data, which says {data.input_size}; give one of them.")
    with unchanged_if_refused(student, teacher):
        tapped = tapped_student(student, spec, (taps or {}).get("student"))
        teacher = as_teacher(teacher, spec, (taps or {}).get("teacher"), teacher_data)
        check_classes(tapped, teacher, data.num_classes if data is not None else num_classes)
        seed = draw_seed(seed)
        alone = weights if len(methods) == 1 else None
        makers = {member: _maker(member, method, {**given[member], "weights": alone}, seed) for member, method in methods.items()}
        if len(makers) == 1:
            distiller = next(iter(makers.values()))(tapped, teacher, spec)
        else:
            distiller = Composition(tapped, teacher, spec, makers=makers, weights=_by_term(weights), seed=seed)
        _follow_student(distiller)
        tapped.request(*distiller.requires.student_taps)
        if teacher is not None and distiller.requires.teacher:
            teacher.request(*distiller.requires.teacher_taps)
        return distiller.train()  # as every new module: the student may have been evaluated just now


def _maker(member: str, method: type[Distiller], arguments: Mapping[str, Any], seed: int) -> Maker:
    def make(student: Tapped, teacher: Teacher | None, data: DataSpec) -> Distiller:
        # A stream for each member: its adapters start alike alone and in any composition. Branches are drawn where the student is.
        like = next(student.module.parameters(), torch.empty(0))
        with forked_generator(Stream.named(seed, "adapters", member), device=like.device):
            return method(student, teacher, data, seed=seed, **arguments)

    return make


def _follow_student(distiller: Distiller) -> None:
    """Move adapters and buffers to the student's device and floating type; student and teacher stay as and where they are."""
    student = distiller.student_net.module
    like = next((p for p in student.parameters() if p.is_floating_point()), None)
    if like is None:
        return
    dtype = torch.float32 if like.dtype in (torch.float16, torch.bfloat16) else like.dtype  # losses run in float32 at least
    distiller._apply_to_own(lambda tensor: tensor.to(like.device, dtype if tensor.is_floating_point() else tensor.dtype))

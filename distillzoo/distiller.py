"""The contract between a method and the loop: :class:`Distiller`, one hook to write, four methods final."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo.casting import OwnTensors, full_precision_trace
from distillzoo.checking import check_batch, check_device, checked_trace
from distillzoo.copying import detached_copy
from distillzoo.errors import OptionError, UnsupportedPairError, unknown_name
from distillzoo.schedules import Schedule, Weight
from distillzoo.streams import Stream, draw_seed
from distillzoo.taps import Tapped, Teacher, pair_from_deep_end, remove_hooks
from distillzoo.taps.teacher import Loan
from distillzoo.types import Batch, DataSpec, Loader, ParamGroup, Phase, Progress, Requires, StepOutput, Trace
from distillzoo.weighting import TermWeights, preset_weights

__all__ = ["Distiller"]

_FINAL = ("forward", "set_progress", "param_groups", "train")
_KINDS: tuple[Literal["weight", "norm_bias", "exempt"], ...] = ("weight", "norm_bias", "exempt")


class Distiller(nn.Module, ABC):
    """A student, its teacher, and one way to teach.

    A method writes :meth:`distill_terms`, sets ``requires``, and makes its adapters in its constructor from measured shapes.
    The rest has defaults. What it needs from the loop it declares; the loop never asks which method it is running.

    Args:
        student: The student with its taps; a method may restructure it before it returns from its constructor.
        teacher: The teacher with its taps; ``None`` for self-distillation.
        data: What may be known about the data.
        weights: Weights by term that override the method's defaults, or the name of one of ``weight_presets``.
        seed: Seed of every draw; ``None`` draws one from torch's global generator.

    Attributes:
        weight_presets: Default weights by name of a setting; the first is the default.
        composed_weights: Weights that differ when the method is part of a composition such as ``"crd+kd"``.
        exempt_from_decay: Patterns of parameter names that are never decayed.
        requires: What the method needs from the loop; set on the instance where options decide.
        student_net: The student with its taps.
        teacher_net: The teacher with its taps; no child module, so absent from state, optimiser and checkpoints. It follows
            ``.to()``; a deep copy of the distiller shares it, and refuses to be cast to another floating type.

    Raises:
        OptionError: If a weight names no term, or a value is out of range.
        UnsupportedPairError: If the method needs a teacher and there is none.
    """

    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {"default": {"ce": 1.0}}
    composed_weights: ClassVar[Mapping[str, Weight]] = {}
    exempt_from_decay: ClassVar[tuple[str, ...]] = ()
    requires: Requires = Requires()
    step: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        taken = [name for name in _FINAL if getattr(cls, name) is not getattr(Distiller, name)]  # a mixin's count as well
        if taken:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(taken)}, which Distiller keeps final; write distill_terms instead."
            )

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if teacher is None and self.requires.teacher:
            raise UnsupportedPairError(f"{type(self).__name__} needs a teacher and got none; pass one to build_distiller.")
        self.student_net = student
        self.teacher_net = teacher
        self._loan = Loan()
        self.data = data
        self.seed = draw_seed(seed)
        if student.claim():
            self.student = student.module
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.set_weights(preset_weights(self.weight_presets, weights, type(self).__name__), weights)

    # ------------------------------------------------------------------ to write, or to leave as they are

    @abstractmethod
    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:
        """Return the method's unweighted scalar terms by name, cross-entropy not among them.

        Args:
            student: The student's logits and the taps that ``requires.student_taps`` names.
            teacher: The teacher's, without gradients; ``None`` if there is no teacher.
            batch: Images, targets and what else ``requires`` asks for.
        """

    @classmethod
    def presets_with(cls, options: Mapping[str, Any]) -> Mapping[str, Mapping[str, Weight]]:  # noqa: ARG003
        """Return ``weight_presets`` as a method with these options has them, for records. Default: whatever the options."""
        return cls.weight_presets

    @classmethod
    def reads_teacher(cls, options: Mapping[str, Any]) -> bool:  # noqa: ARG003
        """Return whether the method reads a teacher where there is one, with these options. Default: whether it needs one."""
        return cls.requires.teacher

    def phases(self) -> Sequence[Phase]:
        """Return the phases of training; the last is the main one. Default: the main phase alone."""
        return (Phase(),)

    def prepare(self, loader: Loader) -> None:
        """Gather statistics before training (class means, margins); trains nothing. Default: its parts do."""
        for part in self.parts():
            part.prepare(loader)

    def after_step(self) -> None:
        """Do what comes after ``optimizer.step()`` (memory banks). Default: its parts do."""
        for part in self.parts():
            part.after_step()

    def parts(self) -> Sequence[Distiller]:
        """Return the distillers that this one is made of (child modules); their steps advance with it. Default: none."""
        return ()

    def predict(self, images: Tensor) -> Tensor:
        """Return the logits that are evaluated, ``(B, num_classes)``; ``export_student()(images)`` must equal them."""
        logits: Tensor = self.student_net.module(images)
        return logits

    def export_student(self) -> nn.Module:
        """Return a copy of the plain student, without hooks; training can go on."""
        return remove_hooks(detached_copy(self.student_net.module))

    # ------------------------------------------------------------------ final

    @final  # type: ignore[misc]  # nn.Module declares forward as a writable attribute
    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        index: Tensor | None = None,
        second_view: Tensor | None = None,
        teacher: Trace | None = None,
    ) -> StepOutput:
        """Run student and teacher on a batch and return the weighted loss with its named parts.

        Args:
            images: ``(B, C, H, W)`` normalised images.
            targets: ``(B,)`` labels or ``(B, num_classes)`` probabilities.
            index: ``(B,)`` data-set indices, for methods that require them.
            second_view: ``(B, C, H, W)``, for methods that require it; others do not see it.
            teacher: The teacher's trace of the same batch, for methods that require one; without it the distiller runs its own
                teacher.
        Raises:
            OptionError: If something that the method requires is missing, or the teacher lies on another device.
            ShapeError: If images, targets and index do not fit.
            TapError: If the given trace lacks a tap.
        """
        hard = isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point()
        needs = self.requires  # in a group others' needs are met too, and a method must compute there what it computes alone
        second_view, teacher = second_view if needs.second_view else None, teacher if needs.teacher else None
        batch = Batch(images, targets.to(torch.int64) if hard else targets, index, second_view)
        check_batch(batch, self.data, self.requires, type(self).__name__)
        student = self.student_net(images)
        if second_view is not None:
            student = Trace(student.logits, student.features, self.student_net(second_view))
        if needs.teacher and self.teacher_net is not None:
            if teacher is None:
                check_device(self.teacher_net, images)
                teacher = self.teacher_net.trace(batch)
            teacher = checked_trace(teacher, self.teacher_net, self.requires, type(self).__name__)
        with torch.autocast(images.device.type, enabled=False):
            student, teacher = full_precision_trace(student), None if teacher is None else full_precision_trace(teacher)
            terms = {"ce": F.cross_entropy(student.logits, batch.targets)}
            terms.update(self.distill_terms(student, teacher, batch))
            loss, weights = self._weighting.weigh(terms)
        if self.training:
            for distiller in self._distillers():
                distiller.step.add_(1)
        return StepOutput(student.logits, loss, terms, weights)

    @final
    def set_progress(self, progress: Progress) -> None:
        """Tell the distiller where training stands: sets ``step`` and the weights' current values, without a host sync.

        Raises:
            OptionError: If there is no such phase.
        """
        phases = {phase.name: phase for phase in self.phases()}
        if progress.phase not in phases:
            raise OptionError(unknown_name(f"phase of {type(self).__name__}", progress.phase, phases, listed="Its phases are"))
        for distiller in self._distillers():
            distiller.step.fill_(progress.step)
        self._weighting.advance(progress, phases[progress.phase].terms)

    @final
    def param_groups(self) -> list[ParamGroup]:
        """Return every trainable tensor once, grouped by owner (student, adapters) and kind (weight, norm_bias, exempt)."""
        own = {id(parameter) for parameter in self.student_net.module.parameters()}
        exempt = [
            f"{prefix}.{pattern}" if prefix else pattern
            for prefix, module in self.named_modules()
            if isinstance(module, Distiller)
            for pattern in module.exempt_from_decay
        ]
        sorted_: dict[tuple[Literal["student", "adapters"], str], dict[str, nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            owner: Literal["student", "adapters"] = "student" if id(parameter) in own else "adapters"
            kind = "norm_bias" if parameter.ndim <= 1 else "weight"
            if any(fnmatchcase(name, pattern) for pattern in exempt):
                kind = "exempt"
            sorted_.setdefault((owner, kind), {})[name] = parameter
        return [
            ParamGroup(owner, kind, tuple(found.values()), tuple(found))
            for owner in ("student", "adapters")
            for kind in _KINDS
            if (found := sorted_.get((owner, kind)))
        ]

    @final
    def train(self, mode: bool = True) -> Self:
        """Set training mode of student and adapters; the teacher stays in eval."""
        super().train(mode)
        if self.teacher_net is not None:
            self.teacher_net.module.eval()
        return self

    # ------------------------------------------------------------------ for methods

    @property
    def weights(self) -> dict[str, Schedule]:
        """The schedule of every term's weight, ``ce`` first."""
        return dict(self._weighting.schedules)

    def stream(self, name: str) -> Stream:
        """Return the method's own stream of draws, a pure function of the seed, the class and ``name``.

        Make streams in the constructor: the name is hashed on the host, which no compiled step can trace.
        """
        return Stream.named(self.seed, type(self).__name__, name)

    def stage_pairs(self, student: str = "stages", teacher: str = "stages") -> tuple[tuple[str, str], ...]:
        """Pair taps of student and teacher one to one from the deep end: names into the traces' features."""
        pairs = pair_from_deep_end(self.student_net.names(student), self._teacher().names(teacher))
        if not pairs:
            raise UnsupportedPairError(
                f"{type(self).__name__} reads feature maps, and student or teacher has no stages (an ensemble has none); "
                "name stages with taps=, or use a method that reads logits alone (kd)."
            )
        return pairs

    def set_weights(self, weights: Mapping[str, Weight], given: Mapping[str, Weight] | str | None = None) -> None:
        """Give every term its weight, ``ce`` among them; for methods whose terms follow from their options.

        Args:
            weights: Weights of all terms.
            given: What the user passed as ``weights``: if by term, they override; the values of a preset are among ``weights``.
        Raises:
            OptionError: If a name is no term of this method, or there is no such preset.
        """
        self._weighting = TermWeights(weights, type(self).__name__).to(self.step.device)
        if given is None or isinstance(given, str):
            preset_weights(self.weight_presets, given, type(self).__name__)
        else:
            self.override_weights(given)

    def override_weights(self, weights: Mapping[str, Weight]) -> None:
        """Replace some of the weights.

        Raises:
            OptionError: If a name is no term of this method.
        """
        self._weighting = self._weighting.overridden(weights)

    # ------------------------------------------------------------------ inside

    def _teacher(self) -> Teacher:
        if self.teacher_net is None:
            raise UnsupportedPairError(f"{type(self).__name__} needs a teacher and has none; pass one to build_distiller.")
        return self.teacher_net

    def _distillers(self) -> Iterator[Distiller]:
        yield self
        for part in self.parts():
            yield from part._distillers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not isinstance(fn, OwnTensors):  # the distiller that was called, not one that it is made of: the networks first
            self._apply_to_networks(fn)
            fn = OwnTensors(fn, self._networks())
        for child in self.children() if recurse else ():
            if child is not self.student_net.module:
                child._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse=False)  # type: ignore[no-untyped-call]
        self._weighting.to(self.step.device)
        return self

    def _apply_to_own(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply ``fn`` to what belongs to the method and its parts, and to no tensor of student or teacher, wherever it hangs."""
        self._apply(OwnTensors(fn, self._networks()))

    def _apply_to_networks(self, fn: Callable[[Tensor], Tensor]) -> None:
        distillers = [module for module in self.modules() if isinstance(module, Distiller)]
        for each in distillers:
            if each.teacher_net is not None:
                each._loan.check_cast(each.teacher_net, fn)  # before anything is changed
        shared = {each.student_net.module for each in distillers} - set(self.modules())  # a part's student is its owner's to move
        for network in self._networks():
            if network not in shared:
                network._apply(fn)  # type: ignore[no-untyped-call]

    def _networks(self) -> list[nn.Module]:
        """Return student and teacher of this distiller and of its parts, each once."""
        distillers = [module for module in self.modules() if isinstance(module, Distiller)]
        nets = [net for each in distillers for net in (each.student_net, each.teacher_net) if net is not None]
        return list(dict.fromkeys(net.module for net in nets))

"""GPD: a wider network that shares the student's weights learns beside it and teaches it, so that the gap stays small."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo import dataflow
from distillzoo.adapters.connectors import full_precision
from distillzoo.adapters.dual_network import duals, perturb, plain_network, replaced
from distillzoo.adapters.expansion import Mode
from distillzoo.adapters.orepa import BranchStart, LinearBranches, start_for
from distillzoo.adapters.plain import check_plain
from distillzoo.adapters.trials import exact_copies, scrambled
from distillzoo.casting import full_precision_trace
from distillzoo.distiller import Distiller
from distillzoo.errors import OptionError, ShapeError, UnsupportedPairError, failure_of
from distillzoo.kinds import check_choice, is_number, is_whole
from distillzoo.options import check_options, option_defaults
from distillzoo.registry import DISTILLERS, register_distiller
from distillzoo.schedules import Weight
from distillzoo.stages import Probe, tensor_of
from distillzoo.streams import Stream, forked_generator
from distillzoo.taps import Tapped, TappedWithin, Teacher
from distillzoo.types import Batch, DataSpec, Phase, Requires, Trace
from distillzoo.weighting import preset_weights

__all__ = ["GPD", "GPDReduced", "dynamic_teacher_loss"]

Strategy = Literal["both", "hard", "soft"]
_TOLERANCE = 1e-4  # relative, between the logits of the two widths
_INSTEAD = ", and GPD widens the student itself; take one that only adds losses, such as static='dkd' or 'reviewkd'."


def dynamic_teacher_loss(student_logits: Tensor, dynamic_logits: Tensor, smoothing: float = 0.1) -> Tensor:
    """Teach the dynamic teacher's smoothed probabilities: L = (1 - s) H(softmax(z_D), p_S) + s H(uniform, p_S), no temperature.

    Guo, Zhang, Pan, Liu, Zhang, Chen, "Gap Preserving Distillation by Building Bidirectional Mappings with A Dynamic Teacher",
    ICLR 2025, arXiv 2410.04140.

    Args:
        student_logits: ``(B, C)``.
        dynamic_logits: z_D, ``(B, C)``; no gradient flows into it.
        smoothing: s, from 0 to 1. Authors: 0.1.
    Returns:
        Scalar, mean over the batch.
    Raises:
        ShapeError: If the logits differ in shape.
        OptionError: If ``smoothing`` is out of range.
    Example:
        >>> dynamic_teacher_loss(torch.zeros(3, 4), torch.randn(3, 4))  # log 4
        tensor(1.3863)
    """
    if student_logits.shape != dynamic_logits.shape or student_logits.ndim != 2:
        raise ShapeError(
            "dynamic_teacher_loss needs two tensors of logits (B, C) of one shape; got "
            f"{tuple(student_logits.shape)} and {tuple(dynamic_logits.shape)}. Pass both networks' logits of one batch."
        )
    _check_smoothing(smoothing)
    wanted = F.softmax(full_precision(dynamic_logits.detach()), 1)
    log_student = F.log_softmax(full_precision(student_logits), 1)
    smoothed = (1.0 - smoothing) * wanted + smoothing / wanted.shape[1]
    return -(smoothed * log_student).sum(1).mean()


def _check_smoothing(smoothing: float) -> None:
    if not 0.0 <= smoothing <= 1.0:
        raise OptionError(f"smoothing must be from 0 to 1; got {smoothing!r}. The authors' is 0.1.")


@register_distiller("gpd")
class GPD(Distiller):
    """A dynamic teacher, the student made wider and multi-branch, learns beside it, shares its weights and teaches it.

    Guo, Zhang, Pan, Liu, Zhang, Chen, "Gap Preserving Distillation by Building Bidirectional Mappings with A Dynamic Teacher",
    ICLR 2025, arXiv 2410.04140. Authors' code: guoyongcs/GPD. Total = ce + L_static(T, S) + 3 :func:`dynamic_teacher_loss` + ce of
    the dynamic teacher (``ce_dynamic``) + L_static(T, D), one backward (the authors' two add the same gradients).
    Every 3x3 convolution of stride 1 without groups that keeps its maps' size is six linear branches merged online (MobileNetV2 and
    ShuffleNets have none: for them this is ``gpd_reduced``), and every channel stands ``ratio`` times in D, which
    computes the student's function at the start. The student is a slice of D with batch statistics of its own, so that the export
    is that slice, branches merged, without further training. The static loss is any registered method that only adds losses; its
    terms are ``static_*`` for the student and ``static_dynamic_*`` for D, with its own weights. Without a teacher (from scratch, or
    fine-tuning a trained student) there is none. The published recipe clips the norm of gradients at 5 and averages weights:
    ``clip_norm`` and ``ema_decay`` of the training configuration, for every row of a table alike.
    Differs from the authors' code: the static DKD has its settings of CIFAR-100, temperature 4 and beta 8 after a warm-up, where
    theirs of ImageNet, 1 and 0.5 (2 for MobileNet), are ``static_options={"temperature": 1.0}, static_weights="imagenet"``. Copies
    of a channel lie side by side and the slice is every ``ratio``-th channel, a permutation of their blocks and leading slice that
    concatenation, splitting and channel shuffle keep; a grouped convolution keeps its groups, each ``ratio`` times as wide, only a
    depth-wise one gets more; the noise spares the slice and sums to zero over the copies of an input, so that neither function
    changes at the start. The cosines of the third branch and the draws of branches are ours. Attention, gates, transposed
    convolutions, layer scales and activations that are no modules (unless homogeneous) are refused; of the forms of ``dynamic``
    that the authors compare there is the best one. On CIFAR the authors published nothing.

    Args:
        student: The student with its taps; its layers are replaced by such as have two widths.
        teacher: The static teacher with its taps; ``None`` trains without one.
        data: What may be known about the data.
        static: Registered name of the static loss; ``None`` is none. The authors': DKD, ReviewKD.
        static_options: Options of the static loss.
        static_weights: Its weights by term, or the name of one of its presets; ``None``: those it has in a composition.
        teach_dynamic: Whether the static teacher teaches the dynamic one as well.
        ratio: How many times as wide the dynamic teacher is, an integer of at least 2. Authors: 2.
        strategy: ``"hard"``: student and dynamic teacher share weights, and no loss joins them; ``"soft"``: the loss does, and the
            dynamic teacher, made from the student, has weights of its own; ``"both"``, as published.
        smoothing: Label smoothing of ``dynamic``, from 0 to 1. Authors: 0.1.
        noise: Deviation of the noise that tells copies of a weight apart; 0 is none. Authors: 1e-6.
        branch_start: ``"scratch"`` starts with the published mix of six branches, so that the student's function is not the given
            one; ``"pretrained"`` keeps it (branch 1 has its kernel). ``None``: scratch if the student's batch norms have seen no
            data, else pretrained.
        weights: Weights by term.
        seed: Seed of the distiller.
    Raises:
        OptionError: If an option is out of range, or ``branch_start`` is ``"scratch"`` and no convolution takes branches.
        UnsupportedPairError: If the student cannot be widened, or checkpoints activations, or the static loss restructures it.
    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> student, teacher = (create_model(name, num_classes=10) for name in ("resnet8", "resnet20"))
        >>> list(build_distiller("gpd", student, teacher, input_size=32, static="kd").weights)
        ['ce', 'ce_dynamic', 'dynamic', 'static_kd', 'static_dynamic_kd']
    """

    branched: ClassVar[bool] = True
    requires = Requires(teacher=False)
    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {"default": {"ce": 1.0, "ce_dynamic": 1.0, "dynamic": 3.0}}

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        static: str | None = "dkd",
        static_options: Mapping[str, Any] | None = None,
        static_weights: Mapping[str, Weight] | str | None = None,
        teach_dynamic: bool = True,
        ratio: int = 2,
        strategy: Strategy = "both",
        smoothing: float = 0.1,
        noise: float = 1e-6,
        branch_start: BranchStart | None = None,
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(student, teacher, data, seed=seed)
        if not is_whole(ratio, 2):
            raise OptionError(f"ratio must be an integer of at least 2; got {ratio!r}. The authors' is 2.")
        check_choice("strategy", strategy, Strategy)
        if not is_number(noise) or noise < 0.0:
            raise OptionError(f"noise must be a finite deviation of at least 0; got {noise!r}. The authors' is 1e-6, 0 is none.")
        _check_smoothing(smoothing)
        start = start_for(student.module) if branch_start is None else check_choice("branch_start", branch_start, BranchStart)
        self.smoothing, self.distils = smoothing, strategy != "hard"
        method = _static_method(static, static_options, teacher)
        mode = Mode()
        self._widen(mode, ratio, start if self.branched else None, noise, shared=strategy != "soft")
        if branch_start == "scratch" and not any(isinstance(module, LinearBranches) for module in student.module.modules()):
            raise OptionError(
                f"branch_start 'scratch' mixes branches, and {type(student.module).__name__} has no 3x3 convolution of stride 1 "
                "without groups that keeps its maps' size and trains, so nothing takes them; leave it out."
            )
        self.dynamic_net = TappedWithin(student, mode)
        for name, net in {"static": student, "static_dynamic": self.dynamic_net}.items():
            if method is not None and (teach_dynamic or name == "static"):
                before = len(net.restructured)
                with forked_generator(Stream.named(self.seed, "adapters", str(static))):  # as where it is built alone
                    part = method(net, teacher, data, weights=static_weights, seed=self.seed, **(static_options or {}))
                self.add_module(name, _check_static(part, restructured=len(net.restructured) > before))
        self._composed = static_weights is None
        self.requires = self._joined()
        self.dynamic_net.request(*(tap for name, part in self._static() if name != "static" for tap in part.requires.student_taps))
        self._set_all_weights(weights)

    def _widen(self, mode: Mode, ratio: int, branch_start: BranchStart | None, noise: float, *, shared: bool) -> None:
        """Give the student's layers their second width, after trying it on a copy of which every norm and bias counts."""
        net = self.student_net
        check_plain(net.module, net.restructured)
        found = dataflow.inner_widths(dataflow.Flow(net.module, net.data))
        widths = {path: (width.shape, width.inputs, width.outputs) for path, width in found.items()}
        problem = ""
        for trial in exact_copies(scrambled(net.module)):
            probe = Probe(trial, net.data)
            replaced(trial, duals(trial, widths, ratio, mode))  # branches change nothing of what could go wrong, and cost
            try:
                with probe.evaluating():
                    gap = _gap(trial, probe.images, mode)
                if gap <= _TOLERANCE:
                    _check_backward(probe, mode, ratio)
            except UnsupportedPairError:
                raise
            except Exception as error:
                problem = f"it stops with {type(error).__name__}: {' '.join(str(error).split())[:120]}"
                continue
            problem = "" if gap <= _TOLERANCE else f"its logits then differ by {gap:.1g} of the largest"
            break
        if problem:
            raise UnsupportedPairError(
                f"{type(net.module).__name__} cannot be made {ratio} times as wide: {problem}. Its forward counts "
                "channels, or moves, bends or multiplies them by a function that is no module; make it a module, or use kd instead."
            )
        for path, layer in duals(net.module, widths, ratio, mode, branch_start=branch_start, shared=shared).items():
            net.replace(path, layer)
        like = next(net.module.parameters(), torch.empty(0))
        with forked_generator(self.stream("symmetry"), device=like.device):
            perturb(net.module, noise)

    @classmethod
    def presets_with(cls, options: Mapping[str, Any]) -> Mapping[str, Mapping[str, Weight]]:
        """Return the presets with the terms of the static loss that the options name, the teacher's presence taken for granted."""
        static, given = options.get("static"), options.get("static_weights")
        terms: dict[str, Weight] = {}
        if static is not None:
            method: type[Distiller] = DISTILLERS[static]
            presets = method.presets_with({**option_defaults(method), **(options.get("static_options") or {})})
            terms |= preset_weights(presets, given, static)
            terms |= method.composed_weights if given is None else given if isinstance(given, Mapping) else {}
        names = ("static", "static_dynamic") if options.get("teach_dynamic", True) else ("static",)
        added = {f"{name}_{term}": weight for name in names for term, weight in terms.items() if term != "ce"}
        left_out = ("dynamic",) if options.get("strategy") == "hard" else ()
        return {
            preset: {term: weight for term, weight in own.items() if term not in left_out} | added
            for preset, own in cls.weight_presets.items()
        }

    @classmethod
    def reads_teacher(cls, options: Mapping[str, Any]) -> bool:
        """Return whether the static loss that the options name reads one: without a teacher there is none, and GPD trains on."""
        static = options.get("static")
        return static is not None and DISTILLERS[static].reads_teacher(options.get("static_options") or {})

    def _static(self) -> list[tuple[str, Distiller]]:
        return [(name, part) for name, part in self.named_children() if isinstance(part, Distiller)]

    def _joined(self) -> Requires:
        needs = {name: part.requires for name, part in self._static()}
        taps = needs["static"].student_taps if needs else ()  # the dynamic teacher's taps are of another width
        return replace(Requires.joined(tuple(needs.values())), student_taps=taps)

    def _set_all_weights(self, weights: Mapping[str, Weight] | str | None) -> None:
        own = preset_weights(self.weight_presets, weights, type(self).__name__)
        chosen = {term: weight for term, weight in own.items() if self.distils or term != "dynamic"}
        for name, part in self._static():
            given = {**part.weights, **(part.composed_weights if self._composed else {})}
            chosen |= {f"{name}_{term}": weight for term, weight in given.items() if term != "ce"}
        self.set_weights(chosen, weights)

    def parts(self) -> Sequence[Distiller]:
        """Return the static losses of the student and of the dynamic teacher, where there are any."""
        return tuple(part for _, part in self._static())

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:
        """Return ``ce_dynamic``, ``dynamic`` unless it is off, and the static terms as ``static_*`` and ``static_dynamic_*``."""
        dynamic = self._run_dynamic(batch.images)
        if self.requires.second_view and batch.second_view is not None:
            dynamic = Trace(dynamic.logits, dynamic.features, self._run_dynamic(batch.second_view))
        terms = {"ce_dynamic": F.cross_entropy(dynamic.logits, batch.targets)}
        if self.distils:
            terms["dynamic"] = dynamic_teacher_loss(student.logits, dynamic.logits, self.smoothing)
        for name, part in self._static():
            found = part.distill_terms(student if name == "static" else dynamic, teacher, batch)
            terms |= {f"{name}_{term}": value for term, value in found.items()}
        return terms

    def _run_dynamic(self, images: Tensor) -> Trace:
        return full_precision_trace(self.dynamic_net(images))

    def export_student(self) -> nn.Module:
        """Return a copy of the narrow network as a plain student: class, keys and shapes of the one that was given."""
        return plain_network(super().export_student())


@register_distiller("gpd_reduced")
class GPDReduced(GPD):
    """GPD without branches: the dynamic teacher is wider than the student and no more; an ablation, not the published method.

    Guo, Zhang, Pan, Liu, Zhang, Chen, "Gap Preserving Distillation by Building Bidirectional Mappings with A Dynamic Teacher",
    ICLR 2025, arXiv 2410.04140. Everything else is as in :class:`GPD`, at a fraction of the cost on wide networks.

    Args:
        student: The student with its taps; its layers are replaced by such as have two widths.
        teacher: The static teacher with its taps; ``None`` trains without one.
        data: What may be known about the data.
        static: Registered name of the static loss; ``None`` is none.
        static_options: Options of the static loss.
        static_weights: Its weights by term, or the name of one of its presets; ``None``: those it has in a composition.
        teach_dynamic: Whether the static teacher teaches the dynamic one as well.
        ratio: How many times as wide the dynamic teacher is, an integer of at least 2.
        strategy: ``"both"``, ``"hard"`` or ``"soft"``, as in :class:`GPD`.
        smoothing: Label smoothing of ``dynamic``, from 0 to 1.
        noise: Deviation of the noise that tells copies apart; 0 is none.
        weights: Weights by term.
        seed: Seed of the distiller.
    Raises:
        OptionError: If an option is out of range.
        UnsupportedPairError: If the student cannot be widened, or checkpoints activations, or the static loss restructures it.
    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> distiller = build_distiller("gpd_reduced", create_model("resnet8", num_classes=10), input_size=32)  # no teacher
        >>> list(distiller.weights)
        ['ce', 'ce_dynamic', 'dynamic']
    """

    branched: ClassVar[bool] = False

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        static: str | None = "dkd",
        static_options: Mapping[str, Any] | None = None,
        static_weights: Mapping[str, Weight] | str | None = None,
        teach_dynamic: bool = True,
        ratio: int = 2,
        strategy: Strategy = "both",
        smoothing: float = 0.1,
        noise: float = 1e-6,
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            student, teacher, data, static=static, static_options=static_options, static_weights=static_weights,
            teach_dynamic=teach_dynamic, ratio=ratio, strategy=strategy, smoothing=smoothing, noise=noise, weights=weights,
            seed=seed,
        )  # fmt: skip


def _gap(network: nn.Module, images: Tensor, mode: Mode) -> float:
    """How far the logits of the two widths are apart, relative to the largest."""
    narrow = network(images)
    with mode:
        wide = network(images)
    return float((wide - narrow).abs().max() / narrow.abs().max()) if wide.shape == narrow.shape else math.inf


def _check_backward(probe: Probe, mode: Mode, ratio: int) -> None:
    """Refuse a network that runs its layers again in the backward pass: that comes when they are narrow again."""
    with probe.training(), torch.enable_grad():
        with mode:
            logits = tensor_of(probe.module(probe.images), len(probe.images))
        if logits is None or not logits.requires_grad:
            return
        try:
            torch.autograd.backward(logits.sum())
        except Exception as error:  # of whatever shapes then meet
            raise UnsupportedPairError(
                f"{type(probe.module).__name__} cannot be trained {ratio} times as wide: the backward pass stops with "
                f"{failure_of(error)}. Two widths do not bear activations that are computed again there (checkpointing): switch it "
                "off, as by set_grad_checkpointing(False), or use kd instead."
            ) from error


def _static_method(static: str | None, options: Mapping[str, Any] | None, teacher: Teacher | None) -> type[Distiller] | None:
    """The class of the static loss; None where there is none, or no teacher that it could read."""
    if static is None:
        if options:
            raise OptionError(f"static_options are of the static loss, and static is None; got {dict(options)}: leave them out.")
        return None
    method: type[Distiller] = DISTILLERS[static]
    ways = [name for name in ("predict", "export_student") if getattr(method, name) is not getattr(Distiller, name)]
    if ways:
        raise UnsupportedPairError(f"static={static!r} has a {' and '.join(ways)} of its own{_INSTEAD}")
    check_options(static, method, options or {})
    return None if teacher is None and method.requires.teacher else method


def _check_static(part: Distiller, *, restructured: bool) -> Distiller:
    name = type(part).__name__
    if restructured:
        raise UnsupportedPairError(f"The static loss {name} restructures the student{_INSTEAD}")
    if tuple(part.phases()) != (Phase(),):
        raise UnsupportedPairError(f"The static loss {name} trains in phases of its own; take one that does not, such as 'dkd'.")
    return part

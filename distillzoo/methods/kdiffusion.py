"""KDiffusion: the student's parallel branches walk the reverse diffusion process from noise to the teacher's feature."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo import dataflow
from distillzoo.adapters.bridge import Bridge
from distillzoo.adapters.connectors import full_precision, pool_larger
from distillzoo.adapters.plain import check_plain
from distillzoo.adapters.reparam import check_not_frozen, check_not_tied, expand, fold_network
from distillzoo.adapters.reverse import AmplitudeSchedule, Noise, Start, diffusion_amplitudes, draw_noise, reverse_chain
from distillzoo.adapters.trials import exact_copies, scrambled
from distillzoo.distiller import Distiller
from distillzoo.errors import OptionError, ShapeError, UnsupportedPairError
from distillzoo.kinds import check_choice
from distillzoo.registry import register_distiller
from distillzoo.schedules import Weight
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import Batch, DataSpec, Requires, Trace
from distillzoo.weighting import preset_weights

__all__ = ["KDiffusion", "progressive_loss"]

Objective = Literal["progressive", "average", "teacher_forced"]
GuideOn = Literal["mean", "final"]
BridgeKind = Literal["shared", "per_branch"]


def progressive_loss(branches: Tensor, target: Tensor, noise: Tensor, chain: Tensor) -> Tensor:
    """Match the student's running reconstruction to the teacher's posterior mean at every step of the reverse process.

    Yao et al., "Progressively Knowledge Distillation via Re-parameterizing Diffusion Reverse Process", AAAI 2024, equation 12:
    L = (1/m) sum_k of the mean of (h_k - m_k)^2 with h_k = u_k h_{k-1} + v_k z_k and m_k = u_k X_{k-1} + v_k x_0. The exact
    divergence would weigh step k by 1 / (2 w_k sigma^2), infinite at the last; the paper drops the factor, and so do we.

    Args:
        branches: ``(m, B, C, H, W)``: z_1 .. z_m.
        target: ``(B, C, H, W)``: x_0; no gradient flows into it.
        noise: ``(B, C, H, W)``: e; no gradient flows into it.
        chain: ``(m, m + 2)``: h_k - m_k as :func:`~distillzoo.adapters.reverse.reverse_chain` gives it, in any floating type.
            Permuting its first m columns lets branches serve other steps.
    Returns:
        Scalar, mean over steps, batch, channels and space.
    Raises:
        ShapeError: If the shapes do not fit.
    Example:
        >>> z = torch.ones(1, 2, 3, 4, 4)
        >>> progressive_loss(z, 3 * z[0], z[0], torch.tensor([[1.0, -1.0, 0.0]]))
        tensor(4.)
    """
    steps = len(branches)
    if not branches.shape[1:] == target.shape == noise.shape or chain.shape != (steps, steps + 2):
        raise ShapeError(
            f"progressive_loss needs (m, *shape) branches, target and noise of that shape and an (m, m + 2) chain; got "
            f"{[tuple(x.shape) for x in (branches, target, noise, chain)]}. Bring the branches to the target's shape."
        )
    branches, target, noise = (full_precision(x) for x in (branches, target.detach(), noise.detach()))
    chain, given = chain.to(branches.dtype), torch.stack([target, noise]).to(branches.dtype)
    with torch.autocast(branches.device.type, enabled=False):  # the products' difference drowns in 16 bits
        return F.mse_loss(chain[:, :steps] @ branches.flatten(1), -chain[:, steps:] @ given.flatten(1))


@dataclass(frozen=True)
class _Layer:
    """One pair of stages: the student's name and the taps that are read.

    ``total`` is the sum that the mean is part of, None where the op is read alone; ``added`` is what arrives of the mean in that
    sum, None where that is the mean itself: a block may drop it at random.
    """

    stage: str
    branches: tuple[str, ...]
    mean: str
    total: str | None
    added: str | None
    target: str


@register_distiller("kdiffusion")
class KDiffusion(Distiller):
    """Split the way from the student's feature to the teacher's into steps, one parallel linear branch of the student for each.

    Yao, Lu, Zhang, Zhang, Zhao, Yu, "Progressively Knowledge Distillation via Re-parameterizing Diffusion Reverse Process", AAAI
    2024, 38(15), doi 10.1609/aaai.v38i15.29579. Authors' code: none known. Total = ce + progressive + guide, weighted.
    The last linear op of a stage (with its batch norm) becomes m branches; the network goes on with their mean, and they fold back
    exactly on export. A branch's feature is what the stage would be before its activation if that branch alone were there; where
    the op does not get there through additions alone it is the op's own (normed) output. The guide (equation 14) compares what
    the frozen teacher makes of its feature and of the prediction: logits from the last stage, else the next linear op's output.
    Ours, as the paper leaves it open: fresh branches draw from torch's ``reset_parameters``, scaled to the spread of the student's
    own weights (which branch 1 keeps); terms are means over the layers. The weights are the best of sweeps on held-out images of
    CIFAR-100, resnet20 to resnet8 (``benchmarks/results/kdiffusion``: progressive from 0.3 to 100, flat from 10 on, record
    16608ceefbe23248; guide 0.1, 1 and 10, record f9a3303a5047d2e9). Branches, schedule, noise, shuffle, layer and bridge follow the
    paper where it speaks and are guesses elsewhere, and these records do not bear the paper out. Over three seeds the plain average
    is level with the progressive objective, and one branch no worse than four (record b4ac253fe89c2453 and the other finalists');
    in the table of the recipe ``cpu``, three seeds on the test set, it stands below it (``benchmarks/results/cifar100_cpu``).
    Between families, resnet20 to MobileNetV2, the average does better, at a third of the weight, and all stages do better than
    the last (record 94ffa413acdcaa3b, one seed). Of the other options only the first or the middle stage and a bridge for each
    branch lose more than a point, with one seed each. Not tried: a bridge without its norm, a target after the activation or in
    units of its running deviation, branches of a stage that is a sum read without the shortcut.

    Args:
        student: The student with its taps; its ops are replaced.
        teacher: The teacher with its taps.
        data: What may be known about the data.
        start: Start of the student's chain: its first branch (``"student"``) or the noised teacher (``"shared_noise"``).
        noise: ``"student"`` (a random branch for another sample, centred), ``"student_same"`` (for the same sample, as it is),
            ``"gaussian"`` (deviation: scale of the bridge's norm) or ``"zero"``.
        schedule: Amplitudes over time: ``"linear_amplitude"``, ``"cosine"`` or ``"ddpm"``.
        branches: Number of branches and steps m, at least 1.
        shuffle: Whether a permutation, drawn every step, says which branch serves which step.
        layers: ``"last"``, ``"first"``, ``"middle"``, ``"all"``, or names of the student's stages.
        objective: ``"progressive"``, ``"average"`` (plain L2 of the branches' mean) or ``"teacher_forced"``.
        guide: Whether there is a guide.
        guide_on: What the guide looks at: the ``"mean"`` of the branches or the ``"final"`` reconstruction.
        bridge: ``"shared"`` by the branches, or one ``"per_branch"``.
        weights: Weights of ``ce``, ``progressive`` and, with a guide, ``guide``.
        seed: Seed of the distiller.
    Raises:
        OptionError: If an option has no such value, or two layers have one op.
        UnsupportedPairError: If a stage has no op that branches and folds and trains, or the guide's path cannot be followed.
    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> student, teacher = (create_model(name, num_classes=10) for name in ("resnet8", "resnet20"))
        >>> type(build_distiller("kdiffusion", student, teacher, input_size=32).student.layer3[0].conv2).__name__
        'Branched'
    """

    chain: Tensor
    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {"default": {"ce": 1.0, "progressive": 30.0, "guide": 1.0}}

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        start: Start = "student",
        noise: Noise = "student",
        schedule: AmplitudeSchedule = "linear_amplitude",
        branches: int = 4,
        shuffle: bool = True,
        layers: str | Sequence[str] = "last",
        objective: Objective = "progressive",
        guide: bool = False,
        guide_on: GuideOn = "mean",
        bridge: BridgeKind = "shared",
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(student, teacher, data, seed=seed)
        self.noise, self.objective = check_choice("noise", noise, Noise), check_choice("objective", objective, Objective)
        self.guide_on = check_choice("guide_on", guide_on, GuideOn)
        count = branches if check_choice("bridge", bridge, BridgeKind) == "per_branch" else 1
        if guide and (objective, guide_on) == ("average", "final"):
            raise OptionError("guide_on='final' needs a chain, and objective='average' has none; use guide_on='mean'.")
        self.branches, self.shuffle, amplitudes = branches, shuffle, diffusion_amplitudes(schedule, branches)
        chain = reverse_chain(amplitudes, start=check_choice("start", start, Start), teacher_forced=objective == "teacher_forced")
        self.register_buffer("chain", chain, persistent=False)  # in the student's floating type once it is built
        chosen = preset_weights(self.weight_presets, weights, type(self).__name__)
        self.set_weights({name: weight for name, weight in chosen.items() if guide or name != "guide"}, weights)
        pairs = self._choose(layers)
        self.layers = self._restructure(pairs, frozen := dataflow.Flow(self._teacher().module, self._teacher().data))
        taps = (tap for layer in self.layers for tap in (*layer.branches, layer.mean, layer.total, layer.added) if tap)
        self.requires = Requires(tuple(taps), tuple(layer.target for layer in self.layers))
        shapes = {layer.stage: (student.shapes[layer.mean], self._teacher().shapes[layer.target]) for layer in self.layers}
        self.bridges = nn.ModuleDict({name: Bridge(own[0], wanted[0], count) for name, (own, wanted) in shapes.items()})
        self._guides = {
            name: dataflow.path_after(self._teacher(), frozen, pairs[name], [*map(min, own[1:], wanted[1:])])
            for name, (own, wanted) in shapes.items()
            if guide
        }
        self._draws = {name: (self.stream(f"{name}.order"), self.stream(f"{name}.noise")) for name in shapes}

    def _choose(self, layers: str | Sequence[str]) -> dict[str, str]:
        """The chosen stages of the student with the teacher's that they are paired with."""
        known = dict(self.stage_pairs())
        names = list(known)
        ends = {"last": names[-1:], "first": names[:1], "middle": names[len(names) // 2 :][:1], "all": names}
        chosen = ends.get(layers, [layers]) if isinstance(layers, str) else list(layers)
        if not chosen or not known.keys() >= set(chosen):
            raise OptionError(
                f"layers is one of {', '.join(ends)}, or some of the stages {', '.join(names)}; got {layers!r}. Choose among these."
            )
        return {name: known[name] for name in names if name in chosen}

    def _restructure(self, pairs: Mapping[str, str], frozen: dataflow.Flow) -> tuple[_Layer, ...]:
        """Put the branches into the student, and find where they and the teacher are read."""
        net = self.student_net
        check_plain(net.module, net.restructured)
        flow = dataflow.Flow(net.module, net.data)
        sites = dataflow.linear_sites(net, flow, pairs)
        self._sites = dict(sites.values())
        check_not_tied(net.module, self._sites)
        check_not_frozen(net.module, self._sites if self.branches > 1 else ())
        for op, norm in sites.values():
            branched, rest = expand(net.submodule(op), None if norm is None else net.submodule(norm), self.branches)
            net.replace(op, branched)
            if norm is not None and rest is not None:
                net.replace(norm, rest)
        if not _folds_back(net.module, self._sites, net.data):
            raise UnsupportedPairError(
                f"Branches at {', '.join(self._sites)} of {type(net.module).__name__} do not fold back: an op's output is read "
                "elsewhere too, or its norm serves another. Name an op by hand: taps={'student': [Stage(path=..., linear=...)]}."
            )
        paths = {name: [f"{op}.branches.{i}" for i in range(self.branches)] for name, (op, _) in sites.items()}
        taps = {f"{name}.branch{i}": path for name, each in paths.items() for i, path in enumerate(each, 1)}
        net.add_taps(taps | {f"{name}.mean": op for name, (op, _) in sites.items()})
        return tuple(
            _Layer(
                name,
                tuple(f"{name}.branch{i + 1}" for i in range(self.branches)),
                f"{name}.mean",
                *dataflow.tap_reached_by_addition(net, flow, name, op),
                dataflow.tap_before_activation(self._teacher(), frozen, pairs[name]),
            )
            for name, (op, _) in sites.items()
        )

    def export_student(self) -> nn.Module:
        """Return a copy of the student with its branches folded: class, keys and shapes of the plain student."""
        return fold_network(super().export_student(), self._sites)

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Return ``progressive``, and ``guide`` if there is one: means over the layers."""
        assert teacher is not None
        values = [self._layer_terms(layer, student.features, teacher.features[layer.target]) for layer in self.layers]
        return {name: torch.stack([value[name] for value in values]).mean() for name in values[0]}

    def _layer_terms(self, layer: _Layer, features: Mapping[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        bridge, branches, mean = self.bridges[layer.stage], [features[name] for name in layer.branches], features[layer.mean]
        assert isinstance(bridge, Bridge)
        if layer.total is not None:  # where the stage is a sum, a branch alone would make it the sum with that branch as the mean
            total = features[layer.total]
            others = total - (mean if layer.added is None else features[layer.added])
            branches = [branch + others for branch in branches]
            mean = total if layer.added is None else mean + others  # what is dropped at random counts: a branch is read as it is
        mean, target = pool_larger(mean, target)
        predicted: Tensor | None = None  # what the guide looks at
        if self.objective == "average":
            predicted = bridge.mean(mean)
            terms = {"progressive": F.mse_loss(predicted, target)}
        else:
            z = torch.stack(bridge([pool_larger(branch, target)[0] for branch in branches]))
            orders, noises = self._draws[layer.stage]
            order = torch.arange(self.branches, device=z.device)  # which step a branch serves
            if self.shuffle and self.branches > 1:
                order = orders.permutation(self.step, self.branches, z.device)
            noise = draw_noise(self.noise, z, bridge.scale(), noises, self.step)
            chain = torch.cat([self.chain[:, : self.branches].index_select(1, order), self.chain[:, self.branches :]], 1)
            terms = {"progressive": progressive_loss(z, target, noise, chain)}
            if self.guide_on == "final":  # u_m = 0 and v_m = 1: the final reconstruction is the branch of the last step
                predicted = z.index_select(0, order.argmax().view(1)).squeeze(0)
        if path := self._guides.get(layer.stage):
            with torch.no_grad():
                wanted = path(target)
            terms["guide"] = F.mse_loss(path(bridge.mean(mean) if predicted is None else predicted), wanted)
        return terms


def _folds_back(network: nn.Module, sites: Mapping[str, str | None], data: DataSpec) -> bool:
    """Whether a network computes the same with its branches folded, tried on a copy of which every norm counts."""
    problem: Exception | None = None
    for trial in exact_copies(scrambled(network)):
        try:
            return dataflow.same_function(trial, fold_network(copy.deepcopy(trial), sites), data)
        except (RuntimeError, TypeError) as error:  # a forward that casts to single
            problem = error
    assert problem is not None
    raise problem

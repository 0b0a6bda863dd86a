"""CRD: contrastive representation distillation, the same sample in both networks against many others."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo.adapters.connectors import full_precision, unit_rows
from distillzoo.adapters.memory import EmbeddingBank, NegativeSampler, gather_ranks
from distillzoo.distiller import Distiller
from distillzoo.errors import OptionError, ShapeError
from distillzoo.kinds import check_choice, check_positive, is_whole
from distillzoo.registry import register_distiller
from distillzoo.schedules import Weight
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import Batch, DataSpec, Requires, Trace

__all__ = ["CRD", "nce_loss"]

Mode = Literal["exact", "relax"]
Normalizer = Literal["first_batch", "none"]
_EPSILON = 1e-7  # the authors' constant
_SOFTPLUS_EXACT = 40.0  # from here on softplus(x) is x in double precision
_LONGEST_ROW = math.sqrt(3.0)  # of a bank as it starts; afterwards rows are of length 1, as anchors always are
_EXP_SAFE = 60.0  # exponentials of this size can be summed in float32


def nce_loss(log_scores: Tensor, num_samples: int, *, log_normalizer: Tensor | None = None, epsilon: float = _EPSILON) -> Tensor:
    """Tell the positive from the noise: noise-contrastive estimation with K uniform negatives.

    Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699, equations 16 and 17.
    With scores x, x_b0 the positive's, and c = K / N:
    L = -(1/B) sum_b [log(x_b0 / (x_b0 + c + eps)) + sum_k log(c / (x_bk + c + eps))].
    Computed from log x, exactly and with the epsilon: log(x / (x + d)) = -softplus(log d - log x) and log(c / (x + d)) =
    log(c / d) - softplus(log x - log d), d = c + eps. exp(1 / 0.07) alone would overflow half precision.

    Args:
        log_scores: ``(B, 1 + K)`` logarithms of the scores, the positive's first.
        num_samples: N, the number of samples that negatives are drawn from, at least 1.
        log_normalizer: 0-dim logarithm of what all scores are divided by; no gradient flows into it. ``None`` is 0.
        epsilon: The authors' constant against a division by zero, >= 0.
    Returns:
        Scalar, sum over the negatives, mean over the batch.
    Raises:
        ShapeError: If the scores are not ``(B, 1 + K)`` with a negative at least.
        OptionError: If a number is out of range.
    Example:
        >>> nce_loss(torch.full((2, 1 + 16384), -math.log(50000)), 50000)
        tensor(10.7091)
    """
    if log_scores.ndim != 2 or log_scores.shape[1] < 2 or not len(log_scores):
        raise ShapeError(
            f"nce_loss needs (B, 1 + K) log-scores, the positive's first and K at least 1; got {tuple(log_scores.shape)}. "
            "Put positive and negatives side by side."
        )
    if num_samples < 1 or not 0.0 <= epsilon < float("inf"):
        raise OptionError(
            f"nce_loss needs num_samples of at least 1 and a finite epsilon of at least 0; got {num_samples} and {epsilon}; "
            "pass the size of the training set."
        )
    positive, negative = torch.split(full_precision(log_scores), [1, log_scores.shape[1] - 1], dim=1)
    return _nce(positive, negative, num_samples, log_normalizer, epsilon)


def _nce(positive: Tensor, negative: Tensor, num_samples: int, log_normalizer: Tensor | None, epsilon: float) -> Tensor:
    """Return :func:`nce_loss` of ``(B, 1)`` and ``(B, K)`` log-scores."""
    batch, count = negative.shape
    noise = count / num_samples
    threshold: Tensor | float = math.log(noise + epsilon)
    if log_normalizer is not None:
        threshold = threshold + full_precision(log_normalizer.detach())
    excess = _softplus(threshold - positive).sum() + _softplus(negative - threshold).sum()
    return excess / batch + count * math.log1p(epsilon / noise)


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=_SOFTPLUS_EXACT)


@register_distiller("crd")
class CRD(Distiller):
    """Match the student's embedding of a sample to the teacher's of the same sample, against the bank's other samples.

    Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699. Authors' code: RepDistiller at
    b84f547. Term ``contrast``: nce_loss over <M_t[i], g_s(f_s)> / tau - log Z_s, plus the same with the roles changed. g are
    linear layers to unit vectors, M the embeddings of every training sample, moved by momentum after each step
    (:meth:`after_step`; the last occurrence of a sample in a batch counts). Z_s and Z_t are set on the first training batch and
    then stay. Banks, embeddings and Z are part of the state.

    Differs from the authors' code: negatives are drawn on the device from the labels, uniform over the other classes and with
    replacement (there: by the data set, without), as a function of seed, step and sample; where fewer exist than asked for, all of
    them once. Scores stay in log-space. A zero embedding is zero, not not-a-number. In a distributed run all processes see the
    same banks. In a loop that accumulates gradients the bank learns the last forward alone.
    Differs from the paper: its critic has no Z; that is ``normalizer="none"``.

    Args:
        student: The student with its taps.
        teacher: The teacher with its taps.
        data: ``num_samples`` or ``targets`` of it count the bank, ``targets`` give the classes.
        negatives: K, negatives for every sample, at least 1. Paper: 16384. Where fewer exist, those; see ``sampler.count``.
        temperature: tau, > 0. Code: 0.07.
        momentum: Share of a bank's row that stays, 0 to 1. Paper: 0.5.
        dim: Width of the embeddings, at least 1. Paper: 128.
        mode: Positive of a sample: itself (``"exact"``) or one of its class (``"relax"``).
        normalizer: ``"first_batch"`` (code) or ``"none"`` (paper).
        weights: Weights of ``ce`` and ``contrast``.
        seed: Seed of the distiller.
    Raises:
        OptionError: If an option is out of range, or ``data`` lacks the labels of the training set.
        TapError: If a network has no ``pooled`` tap.
    Example:
        >>> from distillzoo import DataSpec, build_distiller, create_model
        >>> student, teacher = (create_model(name, num_classes=10) for name in ("resnet8", "resnet20"))
        >>> data = DataSpec(10, (32, 32), targets=torch.arange(10).repeat(8))
        >>> build_distiller("crd", student, teacher, data=data, negatives=32).sampler.count
        32
    """

    requires = Requires(student_taps=("pooled",), teacher_taps=("pooled",), index=True, hard_labels=True)
    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {
        "cifar": {"ce": 1.0, "contrast": 0.8},  # RepDistiller's script; mdistiller's configs
        "imagenet": {"ce": 1.0, "contrast": 0.8},  # mdistiller's configs, torchdistill's sample
    }
    log_normalizers: Tensor
    normalized: Tensor

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        dim: int = 128,
        mode: Mode = "exact",
        normalizer: Normalizer = "first_batch",
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        _check_options(temperature, momentum, dim, mode, normalizer)
        if data.targets is None:
            raise OptionError(
                "CRD draws negatives by class from the whole training set and got no labels of it; build it with "
                "data=DataSpec(..., num_samples=N, targets=labels)."
            )
        self.temperature = temperature
        self.momentum = momentum
        self.mode = mode
        self.normalizer = normalizer
        self.sampler = NegativeSampler(data.targets, num_classes=data.num_classes, count=negatives)
        if self.sampler.count < negatives:
            warnings.warn(
                f"CRD was asked for {negatives} negatives and the smallest choice that a class of this training set leaves is "
                f"{self.sampler.count}; it takes those.",
                stacklevel=2,
            )
        own, other = (net.shapes[net.names("pooled")[0]][0] for net in (student, self._teacher()))
        self.num_samples = len(data.targets)
        self.student_embed = nn.Linear(own, dim)
        self.teacher_embed = nn.Linear(other, dim)
        self.student_bank = EmbeddingBank(self.num_samples, dim)
        self.teacher_bank = EmbeddingBank(self.num_samples, dim)
        # made here: a name is hashed on the host, which no compiled step can trace
        self._negatives, self._positives = self.stream("negatives"), self.stream("positives")
        self.register_buffer("log_normalizers", torch.zeros(2))  # of the student's anchors, of the teacher's
        self.register_buffer("normalized", torch.zeros(2, dtype=torch.bool))
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:
        """Return ``contrast``."""
        assert teacher is not None
        assert batch.index is not None
        index = batch.index.to(torch.int64)
        self._check_index(index)
        own = unit_rows(self.student_embed(student.features["pooled"]))
        other = unit_rows(self.teacher_embed(teacher.features["pooled"]))
        positive = index
        if self.mode == "relax":
            positive = self.sampler.draw_same_class(self._positives, self.step, labels=batch.targets, index=index)
        negatives = self.sampler.draw(self._negatives, self.step, labels=batch.targets, index=index)
        rows = (positive.unsqueeze(1), negatives)
        loss = self._one_side(0, own, self.teacher_bank, *rows) + self._one_side(1, other, self.student_bank, *rows)
        if self.training:
            self._latest = (index, own.detach(), other.detach())
        return {"contrast": loss}

    def after_step(self) -> None:
        """Move the banks' rows of the last training batch towards its embeddings."""
        if self._latest is None:
            return
        index, own, other = (gather_ranks(tensor) for tensor in self._latest)
        self.student_bank.update(index, own, self.momentum)
        self.teacher_bank.update(index, other, self.momentum)
        self._latest = None

    def _one_side(self, side: int, anchors: Tensor, bank: EmbeddingBank, positive: Tensor, negatives: Tensor) -> Tensor:
        """One network's embeddings as anchors against the other's bank."""
        anchors = anchors / self.temperature
        near, far = bank.scores(anchors, positive), bank.scores(anchors, negatives)
        log_normalizer = self._log_normalizer(side, near.detach(), far.detach()) if self.normalizer == "first_batch" else None
        return _nce(near, far, self.num_samples, log_normalizer, _EPSILON)

    def _log_normalizer(self, side: int, near: Tensor, far: Tensor) -> Tensor:
        """Return log Z: what the first training batch said, chosen on the device so that no step differs from another."""
        sums = torch.logaddexp(self._log_sum(near), self._log_sum(far)).view(1)
        if self.training:  # one a process; an evaluation may be one process's own, and others would wait for theirs
            sums = gather_ranks(sums)
        now = sums.logsumexp(0) + math.log(self.num_samples / (len(sums) * (near.numel() + far.numel())))
        stored = self.log_normalizers[side]
        chosen = torch.where(self.normalized[side], stored.to(now.dtype), now)
        if self.training:
            stored.copy_(chosen)
            self.normalized[side].fill_(True)
        return chosen

    def _log_sum(self, log_scores: Tensor) -> Tensor:
        if _LONGEST_ROW / self.temperature < _EXP_SAFE:
            return log_scores.exp().sum().log()  # half the time of the general form
        return log_scores.flatten().logsumexp(0)

    def _check_index(self, index: Tensor) -> None:
        if index.device.type != "cpu" or torch.compiler.is_compiling():
            return  # reading a device's tensor would make the host wait; there the device itself refuses the row
        low, high = torch.aminmax(index)
        if low < 0 or high >= self.num_samples:
            raise OptionError(
                f"index must hold positions in the training set, 0 to {self.num_samples - 1}; got {low} to {high}; "
                "build with the DataSpec of the set that the loader indexes."
            )


def _check_options(temperature: float, momentum: float, dim: int, mode: str, normalizer: str) -> None:
    check_positive("temperature", temperature)
    if not 0.0 <= momentum <= 1.0:
        raise OptionError(f"momentum must be from 0 to 1; got {momentum}; the paper's is 0.5.")
    if not is_whole(dim, 1):
        raise OptionError(f"dim must be an integer of at least 1; got {dim!r}; the paper's is 128.")
    check_choice("mode", mode, Mode)
    check_choice("normalizer", normalizer, Normalizer)

"""DiffKD: the student's feature as a noisy form of the teacher's, denoised by a small diffusion model of the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo.adapters import denoiser
from distillzoo.adapters.connectors import full_precision, pool_larger, softened_divergence
from distillzoo.adapters.memory import rank_positions
from distillzoo.distiller import Distiller
from distillzoo.errors import OptionError
from distillzoo.kinds import check_choice, check_positive, is_whole
from distillzoo.registry import register_distiller
from distillzoo.schedules import LinearWarmup, Weight
from distillzoo.streams import Stream
from distillzoo.taps import Tapped, Teacher
from distillzoo.types import Batch, DataSpec, Requires, Trace
from distillzoo.weighting import preset_weights

__all__ = ["DiffKD", "diffusion_loss"]

Target = Literal["autoencoder", "normalized", "raw"]
Places = Literal["both", "map", "logits"]
_MOST_CHANNELS, _MOST_CHANNELS_SMALL, _SMALL_IMAGE = 1024, 256, 64  # authors' width; ours for images of at most 64 pixels
_TERMS = ("ce", "feature", "autoencoder", "logits", "diffusion")
_LARGEST_LOGIT = 1e4  # a teacher given as log-probabilities may hold -inf, whose noised form no network can read


def diffusion_loss(
    clean: Tensor, noise: Tensor, times: Tensor, predictor: denoiser.Predictor, levels: Tensor | None = None
) -> Tensor:
    """Train a noise predictor: L = mean |e_theta(sqrt(a_t) h + sqrt(1 - a_t) e, t) - e|^2 over batch and elements.

    Huang, Zhang, Zheng, You, Wang, Qian, Xu, "Knowledge Diffusion for Distillation", NeurIPS 2023, arXiv 2305.15712.

    Args:
        clean: h, ``(B, C, H, W)``; no gradient flows into it.
        noise: e, of the same shape; no gradient flows into it.
        times: t, int64 ``(B,)``.
        predictor: e_theta: maps a noisy feature and times to noise.
        levels: a, ``(T,)``, as :func:`~distillzoo.adapters.denoiser.alpha_bars` gives; ``None`` is that of 1000 times.
    Returns:
        Scalar.
    Raises:
        ShapeError: If the shapes do not fit.
    """
    denoiser.check_shapes("diffusion_loss", clean, noise, times)
    clean, noise = full_precision(clean.detach()), full_precision(noise.detach())
    level = (denoiser.alpha_bars() if levels is None else levels).to(times.device)[times].view(-1, *[1] * (clean.ndim - 1))
    signal, spread = level.sqrt().to(clean.dtype), (1.0 - level).sqrt().to(clean.dtype)
    predicted = predictor(signal * clean + spread * noise, times)
    return F.mse_loss(full_precision(predicted), noise)


class _Place(nn.Module):
    """What serves one pair of tensors: the projection to the target's width, noise matching, the denoiser, the last projection."""

    def __init__(self, source: int, channels: int, kernel_size: denoiser.KernelSize, *, noise_matching: bool) -> None:
        super().__init__()
        self.projection = nn.Conv2d(source, channels, 1)
        self.predictor = denoiser.NoisePredictor(channels, kernel_size)
        self.adapter = denoiser.NoiseAdapter(channels, kernel_size) if noise_matching else None
        self.output = nn.Sequential(nn.Conv2d(channels, channels, 1), denoiser.DenoiserNorm(channels))

    def forward(self, features: Tensor, noise: Tensor, schedule: Sequence[tuple[int, float]]) -> Tensor:
        """Map ``(B, source, H, W)`` and noise ``(B, channels, H, W)`` to denoised features of the noise's shape."""
        noisy = self.projection(features)
        if self.adapter is not None:
            noisy = denoiser.mix_noise(noisy, noise, self.adapter(noisy))
        denoised: Tensor = self.output(denoiser.denoise(noisy, self.predictor, schedule))
        return denoised


@register_distiller("diffkd")
class DiffKD(Distiller):
    """Match the student's feature, denoised by a small diffusion model that learns the teacher's, to the teacher's.

    Huang, Zhang, Zheng, You, Wang, Qian, Xu, "Knowledge Diffusion for Distillation", NeurIPS 2023, arXiv 2305.15712. Authors' code:
    hunto/DiffKD (7fcf2e5). Total = ce + the four terms, every weight 1. Two places at once: the last stage's map (``feature``: mean
    squared error to the latent of a linear autoencoder, which learns from ``autoencoder`` alone) and the logits (``logits``:
    KD's loss of the denoised ones, no autoencoder). ``diffusion`` sums :func:`diffusion_loss` over the places; it trains the noise
    predictors alone, while ``feature`` and ``logits`` reach student and predictors through five denoising steps. The denoiser is
    random at first: ``"warmup"`` lets these two grow over 20 epochs, which the authors do not. Exports hold the plain student.
    Differs from the authors' code: of two maps the larger is pooled; the width is that of the teacher's map, 1024 at most and 256
    for images of 64 pixels or less (authors' recipe: 1024 throughout); eval mode too normalises by the batch, as running statistics
    blend noised teacher and denoised student; a batch of one value a channel uses them; logits are cut at 1e4 before being noised.
    Where layers follow the last stage the authors read those: the last ReLU of wide residual networks, MobileNetV2's last 1x1
    convolution (1280 wide), Swin's last norm; as ``taps={"student": ["relu"], "teacher": ["relu"]}``, ``["relu2"]`` (torchvision's
    ``["features.18"]``), ``["norm"]``.
    The authors published nothing on CIFAR; others' code takes temperature 4 there. The paper's text may start at time 500, not 400.

    Args:
        student: The student with its taps.
        teacher: The teacher with its taps.
        data: What may be known about the data.
        target: What the map is denoised towards: the latent of the ``"autoencoder"``, or the teacher's map ``"normalized"`` (batch
            norm without scale and shift) or ``"raw"`` (as the authors' without autoencoder, neither centred nor of unit variance);
            both keep its full width, whatever the size of the images.
        latent_channels: Width of the latent; ``None`` is as above. Authors: 1024.
        places: ``"both"``, ``"map"`` or ``"logits"``.
        noise_matching: Whether noise is mixed in, as much as an adapter says, before denoising.
        temperature: Softmax temperature of ``logits``, > 0. Authors' ImageNet: 1.
        denoise_steps: Steps n from the student's feature to the denoised one; their times are the last n of 2n even ones.
        train_steps: Times that the noise predictors learn, from 2n to 1280.
        weights: Weights of ``ce``, ``feature``, ``autoencoder``, ``logits`` and ``diffusion``, or ``"warmup"``.
        seed: Seed of the distiller.
    Raises:
        OptionError: If an option is out of range.
        UnsupportedPairError: If a network has no stages, and a map is asked for.
    Example:
        >>> from distillzoo import build_distiller, create_model
        >>> student, teacher = (create_model(name, num_classes=10) for name in ("resnet8", "resnet20"))
        >>> list(build_distiller("diffkd", student, teacher, input_size=32).weights)
        ['ce', 'feature', 'autoencoder', 'logits', 'diffusion']
    """

    levels: Tensor
    weight_presets: ClassVar[Mapping[str, Mapping[str, Weight]]] = {
        "default": dict.fromkeys(_TERMS, 1.0),
        "warmup": dict.fromkeys(_TERMS, 1.0) | dict.fromkeys(("feature", "logits"), LinearWarmup(1.0, 20)),
    }

    def __init__(
        self,
        student: Tapped,
        teacher: Teacher | None,
        data: DataSpec,
        *,
        target: Target = "autoencoder",
        latent_channels: int | None = None,
        places: Places = "both",
        noise_matching: bool = True,
        temperature: float = 1.0,
        denoise_steps: int = 5,
        train_steps: int = 1000,
        weights: Mapping[str, Weight] | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(student, teacher, data, seed=seed)
        check_positive("temperature", temperature)
        check_choice("target", target, Target)
        check_choice("places", places, Places)
        if latent_channels is not None and (places == "logits" or target != "autoencoder"):
            raise OptionError(
                f"latent_channels is the width of the map's autoencoder; got {latent_channels!r} with places={places!r} and "
                f"target={target!r}, which have none: leave it out."
            )
        self.temperature, self.schedule = temperature, denoiser.ddim_schedule(denoise_steps, train_steps)
        self.register_buffer("levels", denoiser.alpha_bars(train_steps), persistent=False)  # in the student's type once it is built
        self.places = nn.ModuleDict()
        self.target: nn.Module = nn.Identity()
        present = {"ce", "diffusion"}
        if places != "logits":
            own, other = self.map_taps = self.stage_pairs()[-1]
            self.requires = Requires((own,), (other,))
            width = self._make_target(target, self._teacher().shapes[other][0], latent_channels)
            self.places["map"] = _Place(student.shapes[own][0], width, 3, noise_matching=noise_matching)
            present |= {"feature", "autoencoder"} if target == "autoencoder" else {"feature"}
        if places != "map":
            present.add("logits")
            self.places["logits"] = _Place(student.num_classes, student.num_classes, 1, noise_matching=noise_matching)
        self._streams = {place: [self.stream(f"{place}.{draw}") for draw in ("matching", "noise", "time")] for place in self.places}
        chosen = preset_weights(self.weight_presets, weights, type(self).__name__)
        self.set_weights({name: weight for name, weight in chosen.items() if name in present}, weights)

    def _make_target(self, target: Target, channels: int, latent_channels: int | None) -> int:
        """Make what turns the teacher's map into the target; return the target's channels."""
        if target == "normalized":
            self.target = denoiser.DenoiserNorm(channels, affine=False)
        if target != "autoencoder":
            return channels
        most = _MOST_CHANNELS_SMALL if max(self.data.input_size) <= _SMALL_IMAGE else _MOST_CHANNELS
        width = min(channels, most) if latent_channels is None else latent_channels
        if not is_whole(width, 1):
            raise OptionError(f"latent_channels is an integer of at least 1 or None; got {width!r}. The authors' is 1024.")
        self.target = denoiser.LinearAutoencoder(channels, width)
        return width

    def distill_terms(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Return ``diffusion`` and what there is of ``feature``, ``autoencoder`` and ``logits``."""
        assert teacher is not None
        terms: dict[str, Tensor] = {}
        diffusion: list[Tensor] = []
        if "map" in self.places:
            own, other = self.map_taps
            source, wanted = pool_larger(_as_map(student.features[own]), _as_map(teacher.features[other]))
            latent = self.target(wanted)
            if isinstance(self.target, denoiser.LinearAutoencoder):
                latent, restored = latent
                terms["autoencoder"] = F.mse_loss(restored, wanted)
            latent = latent.detach()  # the encoder learns from its reconstruction alone
            denoised, loss = self._denoise("map", source, latent)
            terms["feature"] = F.mse_loss(denoised, latent)
            diffusion.append(loss)
        if "logits" in self.places:
            latent = teacher.logits.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
            denoised, loss = self._denoise("logits", _as_map(student.logits), _as_map(latent))
            terms["logits"] = softened_divergence(denoised.flatten(1), teacher.logits, self.temperature)
            diffusion.append(loss)
        return {**terms, "diffusion": torch.stack(diffusion).sum()}

    def _denoise(self, place: str, source: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the denoised source, and the diffusion loss of the latent, both ``(B, D, H, W)``."""
        module = self.places[place]
        assert isinstance(module, _Place)
        matching, noise, time = self._streams[place]
        denoised = module(source, self._normal(matching, latent), self.schedule)
        times = time.integers(self.step, rank_positions(len(latent), latent.device), len(self.levels))
        return denoised, diffusion_loss(latent, self._normal(noise, latent), times, module.predictor, self.levels)

    def _normal(self, stream: Stream, like: Tensor) -> Tensor:
        return stream.normal(self.step, rank_positions(like.numel(), like.device)).view(like.shape).to(like.dtype)


def _as_map(features: Tensor) -> Tensor:
    return features[:, :, None, None] if features.ndim == 2 else features

"""Frozen networks: the teacher, several as one, and what they see of images that were prepared for another network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo.errors import DistillZooError, OptionError, ShapeError, failure_of
from distillzoo.stages import Probe
from distillzoo.taps.tapped import Tapped
from distillzoo.types import Batch, DataSpec, Stage, Trace

__all__ = ["Ensemble", "Loan", "OwnView", "Teacher", "as_teacher", "declared_data"]


class Teacher(Tapped):
    """A frozen network: in eval mode, without gradients, its buffers untouched; shared by a deep copy of what holds it.

    Args:
        module: A plain classifier; its parameters stop requiring gradients.
        data: Size and normalisation of the images that it is given.
        stages: As for :class:`Tapped`.
        own_data: Size and normalisation that the network itself wants: it then sees the same images renormalised, and resized
            (antialiased) where the sizes differ. ``None``: it sees them as they are.

    Raises:
        OptionError: If ``own_data`` is no :class:`DataSpec` or has other channels, or the network writes to the images that the
            student sees as well.
        TapError: As for :class:`Tapped`.
        ShapeError: As for :class:`Tapped`.
    """

    def __init__(
        self,
        module: nn.Module,
        data: DataSpec,
        *,
        stages: Sequence[Stage | str] | Mapping[str, Stage | str] | None = None,
        own_data: DataSpec | None = None,
    ) -> None:
        _check_own("own_data", "a DataSpec or None", own_data)
        self._view = None if own_data is None else OwnView(data, own_data)
        module.requires_grad_(False)
        module.eval()
        super().__init__(module, own_data or data, stages=stages, role="teacher")

    def __call__(self, images: Tensor) -> Trace:
        """Run the network on its own view of ``(B, C, H, W)`` images and return logits and the requested features."""
        return super().__call__(images if self._view is None else self._view(images))

    def trace(self, batch: Batch) -> Trace:
        """Run the teacher on the batch, and on its second view where it has one."""
        second = None if batch.second_view is None else self(batch.second_view)
        first = self(batch.images)
        return Trace(first.logits, first.features, second)

    def _run(self, images: Tensor) -> Any:
        if self.module.training:
            self.module.eval()
        with torch.no_grad():
            return self.module(images)

    def _measure(self, probe: Probe) -> None:
        super()._measure(probe)
        if self._view is None or self._view.passes_on:  # else what it writes to is its own view
            probe.check_images_kept(self.role)

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self


class Loan:
    """Tells a deep copy of what holds a teacher from the one that was built with it: the copy has the teacher on loan.

    Args:
        borrowed: Whether it is on loan.
    """

    def __init__(self, *, borrowed: bool = False) -> None:
        self.borrowed = borrowed

    def __deepcopy__(self, memo: dict[int, Any]) -> Loan:
        return Loan(borrowed=True)

    def check_cast(self, teacher: Teacher, fn: Callable[[Tensor], Tensor]) -> None:
        """Refuse to cast a teacher that is on loan to another floating type; its owner would train with it unknowingly.

        Args:
            teacher: The teacher.
            fn: What is about to be applied to every tensor, as in ``Module._apply``.
        Raises:
            OptionError: If that changes a borrowed teacher's floating type.
        """
        like = next((p for p in teacher.module.parameters() if p.is_floating_point()), None) if self.borrowed else None
        wanted = None if like is None else fn(like.detach().new_empty(0)).dtype
        if like is not None and wanted != like.dtype:
            raise OptionError(
                f"This distiller is a deep copy, which shares its teacher, and a cast from {like.dtype} to {wanted} would change "
                "the teacher of the original as well; cast the original, or build a distiller on networks that are cast: "
                "build_distiller(name, student.double(), copy.deepcopy(teacher).double())."
            )


class Ensemble(nn.Module):
    """Several teachers as one: its logits are the logarithm of the averaged probabilities.

    Args:
        teachers: Classifiers of the same classes.
        views: What each sees of the images, one a teacher; none: all see them as they are.
    Raises:
        OptionError: If there is no teacher, one is no network, or their classes or the number of views differ.
    """

    def __init__(self, teachers: Sequence[nn.Module], views: Sequence[OwnView] = ()) -> None:
        super().__init__()
        if not teachers:
            raise OptionError("A list of teachers needs at least one network; got none.")
        other = [one for one in teachers if not isinstance(one, nn.Module)]
        if other:
            raise OptionError(
                f"A list of teachers holds networks (torch.nn.Module); got {other[0]!r}; pass of a Teacher its .module, and leave "
                "out what is no network."
            )
        if len(views) not in (0, len(teachers)):
            raise OptionError(f"An ensemble of {len(teachers)} teachers takes one view each or none; got {len(views)}.")
        self.teachers = nn.ModuleList(teachers)
        self.views = tuple(views)
        self.stages: tuple[Stage, ...] = ()  # logits only: an ensemble has no feature maps of its own,
        self.classifier_path: str | None = None  # and no one vector that its logits are made of

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(B, num_classes)`` log-probabilities."""
        seen = [view(images) for view in self.views] or [images] * len(self.teachers)
        every = [teacher(each).log_softmax(1) for teacher, each in zip(self.teachers, seen, strict=True)]
        if len({logits.shape[1] for logits in every}) > 1:
            found = ", ".join(str(logits.shape[1]) for logits in every)
            raise OptionError(f"The teachers of a list must have the same classes; they have {found}.")
        logs = torch.stack(every)
        mean: Tensor = logs.logsumexp(0) - torch.log(torch.tensor(float(len(self.teachers)), dtype=logs.dtype))
        return mean


class OwnView:
    """Renormalise and resize a batch: the same crop as another network wants it.

    Args:
        images: What the batch is: its normalisation and size.
        own: What the network wants.
    Raises:
        OptionError: If the channels differ and the batch is not grey.
    Example:
        >>> view = OwnView(DataSpec(10, (4, 4), (0.5,), (0.5,)), DataSpec(10, (8, 8), (0.0,), (1.0,)))
        >>> view(torch.ones(2, 1, 4, 4)).shape, float(view(torch.ones(2, 1, 4, 4)).max())
        (torch.Size([2, 1, 8, 8]), 1.0)
    """

    def __init__(self, images: DataSpec, own: DataSpec) -> None:
        if images.channels not in (own.channels, 1):
            raise OptionError(
                f"The teacher wants {own.channels} channels (its mean is {own.mean}) and the images have {images.channels}; only "
                "grey images are spread over the channels. Give teacher_data a mean for each channel of the images."
            )
        self.size = own.input_size if own.input_size != images.input_size else None
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (images.mean, images.std))
        own_mean, own_std = (torch.tensor(values, dtype=torch.float64) for values in (own.mean, own.std))
        # with x' = x std + mean the pixel and y = (x' - own mean) / own std: y = scale x + shift
        self._scale, self._shift = (std / own_std).view(-1, 1, 1), ((mean - own_mean) / own_std).view(-1, 1, 1)
        self._same = images.channels == own.channels and bool((self._scale == 1).all() and (self._shift == 0).all())
        self.passes_on = self._same and self.size is None  # the very images that it is given
        self._moved: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` images to the network's own view of them."""
        if self.size is not None and images.shape[2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", align_corners=False, antialias=True)
        if self._same:
            return images
        key = (images.device, images.dtype)
        if key not in self._moved:  # copied to the device once, not every step
            self._moved[key] = (self._scale.to(*key), self._shift.to(*key))
        scale, shift = self._moved[key]
        return images * scale + shift


def _check_own(name: str, allowed: str, given: Any) -> None:
    """Refuse what does not say what a teacher wants to see."""
    if not (given is None or isinstance(given, DataSpec)):
        raise OptionError(
            f"{name} is {allowed}; got {given!r}; make one by DataSpec(num_classes, (height, width), mean=..., std=...)."
        )


def declared_data(module: nn.Module, data: DataSpec) -> DataSpec:
    """Return the normalisation and size that a network declares as timm's do (``pretrained_cfg``, else ``default_cfg``).

    Args:
        module: The network.
        data: What is taken where the network does not say, and the number of classes.
    Raises:
        OptionError: If it declares nothing.
    """
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    if not isinstance(config, Mapping) or not {"input_size", "mean", "std"} & config.keys():
        raise OptionError(
            f"{type(module).__name__} declares neither size nor normalisation (timm's networks do, as pretrained_cfg); "
            "pass teacher_data=DataSpec(num_classes, input_size, mean, std)."
        )
    size = config.get("input_size")
    return DataSpec(
        data.num_classes,
        (int(size[-2]), int(size[-1])) if size else data.input_size,
        tuple(config.get("mean") or data.mean),
        tuple(config.get("std") or data.std),
    )


def as_teacher(
    teacher: nn.Module | Teacher | Sequence[nn.Module] | None,
    data: DataSpec,
    stages: Sequence[Stage | str] | Mapping[str, Stage | str] | None,
    own_data: DataSpec | str | None,
) -> Teacher | None:
    """Wrap a teacher with the view of the images that it wants.

    Args:
        teacher: A network, several to be averaged, or what is wrapped already.
        data: Size and normalisation of the images.
        stages: As for :class:`Teacher`.
        own_data: What the teacher wants; ``"declared"``: what it declares, of several each its own.
    Raises:
        OptionError: If ``own_data`` is given for what takes none, or is none of the three.
        ShapeError: If the network does not run.
    """
    if not (isinstance(own_data, str) and own_data == "declared"):
        _check_own("teacher_data", "a DataSpec, 'declared' or None", own_data)
    if teacher is None or isinstance(teacher, Teacher):
        if own_data is not None:
            wrong = "there is no teacher" if teacher is None else "the teacher's view is chosen where its Teacher is made"
            raise OptionError(f"teacher_data was given, and {wrong}; leave it out: Teacher(network, data, own_data=...).")
        return teacher
    if isinstance(teacher, Sequence):
        views = [OwnView(data, declared_data(each, data)) for each in teacher] if own_data == "declared" else ()
        teacher, own_data = Ensemble(teacher, views), None if own_data == "declared" else own_data
    own = declared_data(teacher, data) if isinstance(own_data, str) else own_data
    try:
        return Teacher(teacher, data, stages=stages, own_data=own)
    except DistillZooError:
        raise
    except Exception as error:  # a network may raise anything at a size that it cannot take
        height, width = (own or data).input_size
        raise ShapeError(
            f"The teacher {type(teacher).__name__} does not run on images of {height}x{width} ({failure_of(error)}); if it wants "
            "another size or normalisation than the student, pass teacher_data='declared' or teacher_data=DataSpec(...)."
        ) from error

"""What one network sees of images that were prepared for another: its own normalisation and size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillzoo.errors import OptionError
from distillzoo.types import DataSpec

__all__ = ["OwnView", "declared_data"]


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

"""What all networks of the project share: the base class, the registry of models, and initialisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from distillzoo.errors import OptionError
from distillzoo.kinds import is_whole
from distillzoo.registry import Registry
from distillzoo.types import Stage

__all__ = ["MODELS", "ChannelShuffle", "ModelBuilder", "Network", "check_count", "initialise", "register_model"]

ModelBuilder = Callable[..., nn.Module]
"""What a model name stands for: called with ``num_classes`` and the model's own options, returns a classifier."""

MODELS: Registry[ModelBuilder] = Registry("model")
"""Builders of this project's own networks (and of those that users register) by name."""


def register_model(name: str) -> Callable[[ModelBuilder], ModelBuilder]:
    """Register a builder of classifiers under ``name``, for :func:`~distillzoo.models.create_model`.

    Args:
        name: Lower-case name. The builder, a class or function, is called with ``num_classes`` and the user's options.
    Raises:
        OptionError: If the name is malformed or taken.
    """
    return MODELS.register(name)


def check_count(name: str, value: object, least: int) -> None:
    """Refuse anything but an integer of at least ``least``.

    Raises:
        OptionError: If ``value`` is something else; ``name`` is the argument that the message speaks of.
    """
    if not is_whole(value, least):
        raise OptionError(f"{name} must be an integer of at least {least}; got {value!r}. Pass {name}={least} or more.")


class Network(nn.Module):
    """A plain classifier, ``(B, in_channels, H, W)`` images to ``(B, num_classes)`` logits, that declares where its features are.

    Its ``forward`` has no switches: every tensor that somebody may want to tap is the input or output of a module. For that reason
    no activation works in place.

    Args:
        num_classes: Width of the logits, at least 2.
        in_channels: Channels of the images, at least 1.
    Raises:
        OptionError: If a number is out of range.
    """

    input_size: tuple[int, int] = (32, 32)
    """Height and width that the network was designed for, in pixels; others work as well."""

    classifier_path: ClassVar[str] = "fc"
    """Module path of the final linear layer; its input is the pooled feature."""

    published_keys: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Regular expressions and replacements that turn the keys of the literature's published checkpoints into ours."""

    stages: tuple[Stage, ...]
    """The stages of the network, shallow to deep, the stem not among them."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        check_count("num_classes", num_classes, 2)
        check_count("in_channels", in_channels, 1)
        self.num_classes = num_classes
        self.in_channels = in_channels

    @property
    def default_cfg(self) -> dict[str, object]:
        """What images the network was designed for, ``input_size`` as (channels, height, width), by the name that timm uses."""
        return {"input_size": (self.in_channels, *self.input_size), "num_classes": self.num_classes}


def initialise(network: nn.Module, *, linear_std: float | None = None, zero_linear_bias: bool = False) -> None:
    """Initialise convolutions by He's normal rule over the fan out, N(0, sqrt(2 / (k^2 C_out))), and their biases by zero.

    Norms keep scale 1 and shift 0, which is how torch makes them. Linear layers keep torch's own rule unless told otherwise.

    Args:
        network: Network whose parameters are overwritten.
        linear_std: Standard deviation of the weights of linear layers; ``None`` keeps torch's rule.
        zero_linear_bias: Whether the biases of linear layers become zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            if linear_std is not None:
                nn.init.normal_(module.weight, std=linear_std)
            if zero_linear_bias:
                nn.init.zeros_(module.bias)


class ChannelShuffle(nn.Module):
    """Interleave the channels of ``groups`` equal groups: channel ``j`` of group ``i`` goes to position ``j * groups + i``.

    Args:
        groups: Number of groups, a divisor of the number of channels.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        batch, channels, height, width = x.shape
        grouped = x.view(batch, self.groups, channels // self.groups, height, width)
        return grouped.transpose(1, 2).reshape(batch, channels, height, width)

    def extra_repr(self) -> str:
        """Return what the module's representation shows in brackets."""
        return f"groups={self.groups}"

"""Where the stages of torchvision's classifiers are.

A stage ends where the resolution falls next, or the network does. Only what a module path gives exactly is declared: ``pre`` where
a module reads the sum before the activation; ``linear`` where its output (after ``linear_norm``) reaches the tap through additions
alone, and in ShuffleNetV2 and DenseNet, whose concatenations leave no such op, the last one of the last block.
Stages that a changed network no longer has are nobody's: the answer is then ``None``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

from torch import nn

from distillzoo.registry import STAGE_FINDERS
from distillzoo.types import Stage

__all__ = ["torchvision_stages"]

_MOST = 4  # classifiers have four or five resolutions: the shallowest of five belongs to the stem
_Finder = Callable[[nn.Module], tuple[Stage, ...]]


@STAGE_FINDERS.register("torchvision")
def torchvision_stages(model: nn.Module) -> tuple[Stage, ...] | None:
    """Return the stages of a torchvision classifier, shallow to deep, or None if it is none that the table knows.

    Args:
        model: Any network. Known are ResNet, ResNeXt and Wide ResNet, RegNet, VGG, DenseNet, ShuffleNetV2, MobileNetV2 and V3,
            EfficientNet and its V2, ConvNeXt, Swin and its V2, and ViT; a subclass of one of these is one of these.
    Example:
        >>> import torchvision
        >>> [stage.pre for stage in torchvision_stages(torchvision.models.resnet18())][-1]
        'layer4.1.relu:input'
    """
    for cls in type(model).__mro__:
        if cls.__module__.startswith("torchvision.models.") and cls.__name__ in _FINDERS:
            try:
                stages = _FINDERS[cls.__name__](model)
            except (AttributeError, IndexError):  # a user took modules out or put others in
                return None
            return stages if stages and _exist(model, stages) else None
    return None


def _exist(model: nn.Module, stages: tuple[Stage, ...]) -> bool:
    known = dict(model.named_modules())
    declared = [path for s in stages for path in (s.path, s.pre, s.linear, s.linear_norm, s.norm) if path is not None]
    return all(path.partition(":")[0] in known for path in declared)


def _named_last(model: nn.Module, path: str) -> tuple[str, nn.Module]:
    """Return path and module of the last child of the module at ``path``."""
    name, child = list(model.get_submodule(path).named_children())[-1]
    return f"{path}.{name}", child


def _last_of_kind(block: nn.Module, path: str, kind: type[nn.Module]) -> str | None:
    """Return the path of the last module of a kind inside a block, or None."""
    found = [name for name, child in block.named_modules() if isinstance(child, kind)]
    return f"{path}.{found[-1]}" if found else None


def _resnet(model: nn.Module) -> tuple[Stage, ...]:
    # one activation module serves the whole block: what its last call reads is the sum
    return tuple(_residual(path, *_named_last(model, path)) for path in ("layer1", "layer2", "layer3", "layer4"))


def _residual(path: str, last: str, block: nn.Module) -> Stage:
    number = 3 if "conv3" in block._modules else 2
    norm = f"{last}.bn{number}"
    return Stage(path, f"{last}.relu:input", f"{last}.conv{number}", norm, norm, layout="nchw")


def _regnet(model: nn.Module) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    for name, _ in model.get_submodule("trunk_output").named_children():
        path = f"trunk_output.{name}"
        last, _ = _named_last(model, path)
        stages.append(Stage(path, f"{last}.activation:input", f"{last}.f.c.0", f"{last}.f.c.1", f"{last}.f.c.1", layout="nchw"))
    return tuple(stages)


def _vgg(model: nn.Module) -> tuple[Stage, ...]:
    """The activations that a pooling reads, and the last one where the last pooling was taken out."""
    layers = list(model.get_submodule("features").named_children())
    ends = [number for number, (_, layer) in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    weighted = [number for number, (_, layer) in enumerate(layers) if any(True for _ in layer.parameters())]
    if weighted[-1] > ends[-1]:
        ends.append(weighted[-1] + 2)
    stages: list[Stage] = []
    for number in ends:
        relu = f"features.{layers[number - 1][0]}"
        normed = isinstance(layers[number - 2][1], nn.BatchNorm2d)
        norm = f"features.{layers[number - 2][0]}" if normed else None
        conv = f"features.{layers[number - (3 if normed else 2)][0]}"
        stages.append(Stage(relu, f"{relu}:input", conv, norm, norm, layout="nchw"))
    return tuple(stages[-_MOST:])


def _densenet(model: nn.Module) -> tuple[Stage, ...]:
    """The concatenations at the ends of the dense blocks, which the norm behind each activates."""
    blocks = [name for name, _ in model.get_submodule("features").named_children() if name.startswith("denseblock")]
    stages: list[Stage] = []
    for number, name in enumerate(blocks, 1):
        last, _ = _named_last(model, f"features.{name}")
        norm = f"features.transition{number}.norm" if number < len(blocks) else "features.norm5"
        stages.append(Stage(f"features.{name}", norm, f"{last}.conv2", norm=norm, layout="nchw"))
    return tuple(stages)


def _shufflenetv2(model: nn.Module) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    for path in ("stage2", "stage3", "stage4"):
        last, _ = _named_last(model, path)
        stages.append(Stage(path, linear=f"{last}.branch2.5", linear_norm=f"{last}.branch2.6", layout="nchw"))
    return tuple(stages)


def _inverted(model: nn.Module) -> tuple[Stage, ...]:
    """MobileNetV2, V3 and EfficientNet: ``features`` is a stem, then blocks or groups of blocks, then a 1x1 convolution."""
    body = list(model.get_submodule("features").named_children())[1:-1]
    ends = [name for (name, _), (_, after) in pairwise(body) if _reduces(after)] + [body[-1][0]]
    return tuple(_bottleneck(model, f"features.{name}") for name in ends[-_MOST:])


def _reduces(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Conv2d) and max(child.stride) > 1 for child in module.modules())


def _bottleneck(model: nn.Module, path: str) -> Stage:
    module = model.get_submodule(path)
    last, block = _named_last(model, path) if type(module) is nn.Sequential else (path, module)
    conv, norm = (_last_of_kind(block, last, kind) for kind in (nn.Conv2d, nn.BatchNorm2d))
    return Stage(path, linear=conv, linear_norm=norm, layout="nchw")


def _every_second(model: nn.Module) -> Iterator[str]:
    """``features`` of ConvNeXt and Swin alternates: patches, stage, down-sampling, stage, ..., stage."""
    for name, _ in list(model.get_submodule("features").named_children())[1::2]:
        yield f"features.{name}"


def _convnext(model: nn.Module) -> tuple[Stage, ...]:
    return tuple(Stage(path, layout="nchw") for path in _every_second(model))


def _swin(model: nn.Module) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    for path in _every_second(model):
        last, block = _named_last(model, path)
        linear = None if type(block).__name__.endswith("V2") else f"{last}.mlp.3"  # V2 norms the result before it is added
        stages.append(Stage(path, linear=linear, layout="nhwc"))
    return tuple(stages)


def _vit(model: nn.Module) -> tuple[Stage, ...]:
    """Four evenly spaced blocks, ending with the last."""
    blocks = [f"encoder.layers.{name}" for name, _ in model.get_submodule("encoder.layers").named_children()]
    count = min(_MOST, len(blocks))
    ends = [blocks[math.ceil((k + 1) * len(blocks) / count) - 1] for k in range(count)]
    return tuple(Stage(path, linear=f"{path}.mlp.3", layout="tokens") for path in ends)


_FINDERS: dict[str, _Finder] = {
    "ConvNeXt": _convnext,
    "DenseNet": _densenet,
    "EfficientNet": _inverted,
    "MobileNetV2": _inverted,
    "MobileNetV3": _inverted,
    "RegNet": _regnet,
    "ResNet": _resnet,
    "ShuffleNetV2": _shufflenetv2,
    "SwinTransformer": _swin,
    "VGG": _vgg,
    "VisionTransformer": _vit,
}

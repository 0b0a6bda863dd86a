"""Networks by name: this project's, timm's (``timm/...``) and torchvision's (``torchvision/...``)."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from distillzoo.errors import DistillZooError, OptionError, UnknownNameError, near_matches, unknown_name
from distillzoo.models.base import MODELS, check_count
from distillzoo.models.declared import timm_config
from distillzoo.models.weights import check_file, load_weights

__all__ = ["create_model", "list_models"]

_TIMM, _TORCHVISION = "timm/", "torchvision/"
_TIMM_HUBS = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's own prefixes: names that no list holds
_AUXILIARY = ("aux1", "aux2", "AuxLogits")  # what torchvision's networks call their auxiliary classifiers
# torchvision sets these options where it loads weights, and others where it does not; no file of weights tells which were set
_AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "transform_input": True},
    "inception_v3": {"aux_logits": False, "transform_input": True},
    "vit_h_14": {"image_size": 518},
}
_Path = str | os.PathLike[str]


def create_model(
    name: str,
    *,
    num_classes: int,
    pretrained: bool = False,
    checkpoint_path: _Path | None = None,
    **options: Any,
) -> nn.Module:
    """Build a classifier by name.

    Args:
        name: A name of :func:`list_models`: this project's bare (``"resnet32x4"``), others with their source
            (``"timm/swin_tiny_patch4_window7_224"``, ``"torchvision/resnet18"``).
        num_classes: Width of the logits, at least 2.
        pretrained: Whether to download weights; timm's and torchvision's names only. The classifier is made afresh where the
            number of classes differs.
        checkpoint_path: File with a state dict to load, in place of a download.
        **options: Options of the network itself, such as ``in_channels`` (ours) or ``drop_path_rate`` (timm). torchvision's
            GoogLeNet and Inception are built as its weights want them, pretrained or not: ``transform_input=True`` (images in
            ImageNet's normalisation) and, as no method trains them, without auxiliary classifiers (``aux_logits=False``); so is
            its ViT-H/14 (``image_size=518``).
    Returns:
        The network in training mode, on the CPU.
    Raises:
        UnknownNameError: If there is no such network; the message lists near matches.
        OptionError: If an option is out of range or unknown, no weights are to be had, or a checkpoint does not fit.
    Example:
        >>> sum(p.numel() for p in create_model("resnet8", num_classes=100).parameters())
        83892
    """
    check_count("num_classes", num_classes, 2)
    if pretrained and checkpoint_path is not None:
        raise OptionError(f"pretrained and checkpoint_path={os.fspath(checkpoint_path)!r} exclude each other; keep one of the two.")
    if checkpoint_path is not None:
        check_file(checkpoint_path)
    if name.startswith(_TIMM):
        return _from_timm(name.removeprefix(_TIMM), num_classes, pretrained, checkpoint_path, options)
    if name.startswith(_TORCHVISION):
        model = _from_torchvision(name.removeprefix(_TORCHVISION), num_classes, pretrained, options)
    else:
        model = _from_registry(name, num_classes, pretrained, options)
    if checkpoint_path is not None:
        load_weights(model, checkpoint_path)
    return model


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that :func:`create_model` knows and that match a shell pattern: this project's first, then the others'.

    Args:
        pattern: Shell pattern of whole names: ``"resnet*"`` (ours alone), ``"timm/*"``, ``"*shuffle*"`` (everybody's).
    Example:
        >>> list_models("resnet8*")
        ['resnet8', 'resnet8x4']
    """
    return MODELS.names(pattern) + [name for name in _foreign_names() if fnmatchcase(name, pattern)]


def _timm_names() -> list[str]:
    import timm  # timm and torchvision take seconds to import, and a run with our own networks needs neither

    return list(timm.list_models())


def _torchvision_names() -> list[str]:
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def _foreign_names() -> list[str]:
    return [_TIMM + name for name in _timm_names()] + [_TORCHVISION + name for name in _torchvision_names()]


def _from_registry(name: str, num_classes: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    if name not in MODELS:
        elsewhere = [known for known in _foreign_names() if known.partition("/")[2] == name]
        hint = f" Other projects' names need their source: {' or '.join(map(repr, elsewhere))}." if elsewhere else ""
        raise UnknownNameError(unknown_name("model", name, MODELS) + hint)
    if pretrained:
        raise OptionError(
            f"No pretrained weights are shipped for {name!r}, and pretrained=True was asked for; pass checkpoint_path=FILE (the "
            "benchmark trains teachers and keeps their checkpoints), or take a 'timm/...' or 'torchvision/...' network."
        )
    signature = inspect.signature(MODELS[name])
    try:
        signature.bind(num_classes=num_classes, **options)
    except TypeError as error:
        allowed = ", ".join(option for option in signature.parameters if option != "num_classes")
        raise OptionError(f"Model {name!r} was given options that do not fit ({error}); it takes {allowed or 'none'}.") from error
    return _explained(name, lambda: MODELS[name](num_classes=num_classes, **options), pretrained, "", options)


def _from_timm(name: str, num_classes: int, pretrained: bool, checkpoint_path: _Path | None, options: dict[str, Any]) -> nn.Module:
    import timm

    if not name.startswith(_TIMM_HUBS) and not timm.is_model(name):
        raise UnknownNameError(_unknown_foreign(_TIMM, name, _timm_names()))
    timm_config(_TIMM + name)  # refuses a tag that the network does not have
    path = "" if checkpoint_path is None else os.fspath(checkpoint_path)

    def build() -> nn.Module:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, pretrained=pretrained, checkpoint_path=path, **options)
        return model

    return _explained(_TIMM + name, build, pretrained, path, options)


def _from_torchvision(name: str, num_classes: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import torchvision

    names = _torchvision_names()
    if name not in names:
        raise UnknownNameError(_unknown_foreign(_TORCHVISION, name, names))

    options = {**_AS_PUBLISHED.get(name, {}), **options}

    def build() -> nn.Module:
        if not pretrained:
            plain: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
            return plain
        stripped = options.get("aux_logits") is False  # which torchvision does not take beside its weights
        asked = {option: value for option, value in options.items() if not (stripped and option == "aux_logits")}
        model: nn.Module = torchvision.models.get_model(name, weights="DEFAULT", **asked)
        if stripped:
            model.aux_logits = False  # type: ignore[assignment]
            for part in _AUXILIARY:
                setattr(model, part, None)
        _resize_head(model, num_classes)
        return model

    model = _explained(_TORCHVISION + name, build, pretrained, "", options)
    if isinstance(model, torchvision.models.VisionTransformer):
        model.num_prefix_tokens = 1  # the class token, declared as timm's networks do, so that tokens can become a map
    if getattr(model, "aux_logits", None) is False:
        model.unused_keys = rf"({'|'.join(_AUXILIARY)})\."  # type: ignore[assignment] # published files hold them nevertheless
    return model


def _resize_head(model: nn.Module, num_classes: int) -> None:
    """Put a fresh classifier of ``num_classes`` in the place of the last linear layer, and of the auxiliary ones of its width."""
    layers = [(path, child) for path, child in model.named_modules() if isinstance(child, nn.Linear | nn.Conv2d)]
    last = layers[-1][1]
    if isinstance(last, nn.Conv2d):  # SqueezeNet classifies by a 1x1 convolution
        heads = layers[-1:]
    else:
        heads = [(path, each) for path, each in layers if isinstance(each, nn.Linear) and each.out_features == last.out_features]
    for path, head in heads:
        parent, _, child_name = path.rpartition(".")
        if isinstance(head, nn.Linear) and head.out_features != num_classes:
            setattr(model.get_submodule(parent), child_name, nn.Linear(head.in_features, num_classes, head.bias is not None))
        elif isinstance(head, nn.Conv2d) and head.out_channels != num_classes:
            setattr(model.get_submodule(parent), child_name, nn.Conv2d(head.in_channels, num_classes, 1))


def _unknown_foreign(source: str, name: str, known: Sequence[str]) -> str:
    """Write the sentence for an unknown name of another project, without its thousand allowed names."""
    matches = [repr(source + match) for match in near_matches(name.partition(".")[0], known, limit=5)]
    hint = f" Did you mean {' or '.join(matches)}?" if matches else ""
    return f"Unknown model {source + name!r}.{hint} list_models({source + '*'!r}) lists all {len(known)}."


def _explained(name: str, build: Callable[[], nn.Module], pretrained: bool, path: str, options: dict[str, Any]) -> nn.Module:
    """Run a builder; say in one sentence what was asked of it when it fails, whatever it raises."""
    try:
        return build()
    except DistillZooError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        if pretrained:
            raise OptionError(
                f"The pretrained weights of {name!r} could not be had ({reason}); without a network, pass checkpoint_path=FILE "
                "(a state dict downloaded elsewhere), or pretrained=False for fresh weights."
            ) from error
        if path:
            raise OptionError(
                f"{name!r} could not be built with the checkpoint {path!r} ({reason}); pass one that fits it."
            ) from error
        raise OptionError(
            f"{name!r} could not be built with the options {options} ({reason}); see its constructor for those it takes."
        ) from error

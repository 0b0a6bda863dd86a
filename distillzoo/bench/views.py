"""Teachers whose weights come from elsewhere: which weights, and the normalisation and size of the crop that they want."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distillzoo.errors import OptionError, unknown_name
from distillzoo.kinds import is_number, is_whole
from distillzoo.models import create_model, timm_config
from distillzoo.taps import OwnView
from distillzoo.types import DataSpec

__all__ = ["as_view", "check_teacher_data", "describe_view", "published_weights", "view_spec"]

_LENGTHS = {"mean": 3, "std": 3, "input_size": 2}
_TIMM, _TORCHVISION = "timm/", "torchvision/"
_IMAGENET_CLASSES = 1000


def check_teacher_data(given: Mapping[str, Any]) -> None:
    """Refuse anything but ``mean``, ``std`` and ``input_size``, each ``declared`` or numbers.

    Args:
        given: The recipe's ``teacher_data``.
    Raises:
        OptionError: If a key or a value is another.
    """
    for key, value in given.items():
        if key not in _LENGTHS:
            raise OptionError(unknown_name("field of teacher_data", str(key), _LENGTHS, listed="Its fields are"))
        numbers = isinstance(value, list | tuple) and len(value) == _LENGTHS[key]
        if value != "declared" and not (numbers and all(_fits(key, each) for each in value)):
            what = "2 whole numbers of pixels" if key == "input_size" else f"3 numbers, one a channel{', above 0' * (key == 'std')}"
            raise OptionError(
                f"teacher_data.{key} must be 'declared' (what timm says of the teacher) or {what}; got {value!r}; write one."
            )


def _fits(key: str, value: Any) -> bool:
    return is_whole(value, 1) if key == "input_size" else is_number(value) and (value > 0 or key == "mean")


def describe_view(name: str, given: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return what a teacher wants to see, in numbers: what the recipe says, ``declared`` looked up in timm's table.

    Args:
        name: Name of the network; another project's than timm declares nothing.
        given: The recipe's ``teacher_data``.
    Raises:
        UnknownNameError: If timm does not have the network with the tag of this name.
    Example:
        >>> describe_view("resnet8", {"mean": "declared", "input_size": [64, 64]})
        {'input_size': [64, 64]}
    """
    declared: dict[str, Any] = {}
    if name.startswith(_TIMM) and "declared" in given.values():
        config = timm_config(name)
        if config is not None and len(config.mean) == 3:
            declared = {"mean": config.mean, "std": config.std, "input_size": config.input_size[1:]}
    values = {key: declared.get(key) if value == "declared" else value for key, value in given.items()}
    return {key: list(value) for key, value in values.items() if value is not None}


def view_spec(described: Mapping[str, Any], data: DataSpec) -> DataSpec | None:
    """Return what a teacher wants to see, ``None`` where that is what there is.

    Args:
        described: As :func:`describe_view` returns it.
        data: What the images are.
    """
    mean, std = (tuple(map(float, described.get(key, getattr(data, key)))) for key in ("mean", "std"))
    height, width = described.get("input_size", data.input_size)
    if (mean, std, (height, width)) == (tuple(data.mean), tuple(data.std), tuple(data.input_size)):
        return None
    return DataSpec(data.num_classes, (int(height), int(width)), mean, std)


def as_view(described: Mapping[str, Any], data: DataSpec) -> OwnView | None:
    """Return the map from the images to the teacher's own view of them, ``None`` where it sees them as they are.

    Args:
        described: As :func:`describe_view` returns it.
        data: What the images are.
    """
    own = view_spec(described, data)
    return None if own is None else OwnView(data, own)


def published_weights(name: str) -> str:
    """Return what names a network's published weights of ImageNet's 1,000 classes; nothing is fetched.

    Args:
        name: Name of the network.
    Raises:
        UnknownNameError: If there is no such network; near matches are named.
        OptionError: If there are none, or they are of other classes.
    """
    if name.startswith(_TIMM):
        config = timm_config(name)
        source = None if config is None else config.hf_hub_id or config.url
        if config is not None and source and config.num_classes == _IMAGENET_CLASSES:
            return str(source)
    elif name.startswith(_TORCHVISION):
        import torchvision

        if name.removeprefix(_TORCHVISION) in torchvision.models.list_models(module=torchvision.models):
            weights = torchvision.models.get_model_weights(name.removeprefix(_TORCHVISION)).DEFAULT
            return f"torchvision {weights}"
    create_model(name, num_classes=_IMAGENET_CLASSES)  # raises, with near matches, where there is no such network
    raise OptionError(
        f"There are no published weights of {name!r} for ImageNet's 1,000 classes, whose head could be cut; give a file of a "
        "network with 1,000 classes (--teacher-checkpoint), or train the teacher here (--teacher-head own)."
    )

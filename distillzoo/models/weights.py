"""Read weights from a file into a network."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distillzoo.errors import OptionError

__all__ = ["check_file", "load_weights"]

_WRAPPERS = ("state_dict", "model", "student", "net")  # keys under which training scripts keep the weights
_PREFIXES = ("module.", "_orig_mod.")  # left by data-parallel and compiled wrappers, nested as their owner liked


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a state dict into a network, in place and strictly; returns the network.

    Keys of the checkpoints that the distillation literature published for our networks are translated.

    Args:
        model: The network.
        path: A ``.safetensors`` file, or what :func:`torch.save` wrote: a state dict, or a dictionary that holds one under
            ``state_dict``, ``model``, ``student`` or ``net``. Nothing but tensors and plain containers is ever unpickled.
    Raises:
        OptionError: If the file is missing, holds no state dict, or does not fit the network.
    """
    name = os.fspath(path)
    check_file(name)
    state = _translated(_state_dict(_read(name), name), model)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise OptionError(f"The checkpoint {name!r} does not fit {type(model).__name__}: {_first_lines(error)}") from error
    return model


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that is not there, before anybody's reader says so in words of its own.

    Args:
        path: Where it should be.
    Raises:
        OptionError: If there is no file.
    """
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise OptionError(
            f"The checkpoint {os.fspath(path)!r} {what}; give the path of a .safetensors file or one that torch.save wrote."
        )


def _read(path: str) -> Any:
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # junk can raise anything in there: SafetensorError, struct.error, AttributeError, ...
        raise OptionError(
            f"The checkpoint {path!r} cannot be read ({_reason(error)}); give a .safetensors file or one that torch.save "
            "wrote, holding tensors only."
        ) from error


def _state_dict(found: Any, path: str) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise OptionError(
            f"The checkpoint {path!r} holds no state dict but {_described(found)}; save model.state_dict(), alone or under "
            "'state_dict'."
        )
    state = {str(key): value for key, value in found.items()}
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _translated(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename published keys to ours where that makes the names agree; leave out those of parts that the network does without."""
    unused = getattr(model, "unused_keys", None)
    if unused is not None:
        state = {key: value for key, value in state.items() if not re.match(unused, key)}
    wanted, keys = set(model.state_dict()), list(state)
    for pattern, replacement in getattr(model, "published_keys", ()):
        keys = [re.sub(pattern, replacement, key) for key in keys]
    if set(keys) == wanted:
        return dict(zip(keys, state.values(), strict=True))
    return state


def _described(found: Any) -> str:
    if isinstance(found, Mapping):
        return f"a dictionary with the keys {', '.join(map(str, list(found)[:8])) or 'none'}"
    return f"a {type(found).__name__}"


def _reason(error: Exception) -> str:
    """Say in our words why a file cannot be read: torch's own advise to load it unsafely."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, pickle.UnpicklingError):
        return "it holds other objects than tensors, or is damaged"
    return "it is truncated, damaged or of another format"


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__

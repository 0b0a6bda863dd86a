"""What timm says of its networks and their weights."""

from __future__ import annotations

from typing import Any

from distillzoo.errors import UnknownNameError, unknown_name

__all__ = ["timm_config"]

_TIMM = "timm/"


def timm_config(name: str) -> Any:
    """Return timm's ``PretrainedCfg`` of a network: its images, its weights, where they come from.

    Args:
        name: ``"timm/ARCHITECTURE"``, which means the default weights, or ``"timm/ARCHITECTURE.TAG"``.
    Returns:
        The configuration; ``None`` where timm says nothing of such a network, or it is none of timm's.
    Raises:
        UnknownNameError: If timm has the network, but not with this tag; its tags are listed.
    Example:
        >>> timm_config("timm/resnet18.a1_in1k").input_size
        (3, 224, 224)
    """
    if not name.startswith(_TIMM):
        return None
    import timm  # takes seconds

    bare = name.removeprefix(_TIMM)
    try:
        return timm.get_pretrained_cfg(bare, allow_unregistered=True)
    except RuntimeError as error:  # its only reason
        architecture, _, tag = bare.partition(".")
        listed = timm.list_models(f"{architecture}.*", include_tags=True)
        tags = [known.partition(".")[2] for known in listed]
        sentence = unknown_name(f"tag of {_TIMM + architecture!r}", tag, tags, listed="Its tags are")
        raise UnknownNameError(f"{sentence} Without a tag the default is taken: {_TIMM + architecture!r}.") from error

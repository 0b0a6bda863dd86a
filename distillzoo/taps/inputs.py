"""What a network does to the images that it is given: :func:`check_input_kept`."""

from __future__ import annotations

from distillzoo.errors import OptionError
from distillzoo.stages import Probe

__all__ = ["check_input_kept"]


def check_input_kept(probe: Probe, role: str) -> None:
    """Refuse a network that wrote to its dry batch: of a batch that is trained on, all others would see what it left of it.

    Args:
        probe: The dry batch, after the network ran on it.
        role: ``"student"`` or ``"teacher"``, for the message.
    Raises:
        OptionError: If it was written to.
    """
    if not probe.images.is_inference() and probe.images._version:  # torch counts the writes, and a new one has none
        raise OptionError(
            f"The {role} {type(probe.module).__name__} writes to the images that it is given, which others see as well: its "
            "forward begins in place, as by x.sub_(mean) or nn.ReLU(inplace=True); write x = x - mean or inplace=False, or begin "
            "it with x = x.clone()."
        )

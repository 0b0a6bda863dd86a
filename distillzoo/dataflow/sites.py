"""Where a method may put branches into a tapped network, where it reads them, and what follows a tap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distillzoo.dataflow.experiments import reaches_by_addition
from distillzoo.dataflow.flow import Flow
from distillzoo.dataflow.replay import RemainingPath
from distillzoo.errors import OptionError, UnsupportedPairError
from distillzoo.taps import Tapped
from distillzoo.types import Stage

__all__ = ["linear_sites", "path_after", "tap_before_activation", "tap_reached_by_addition"]


def linear_sites(net: Tapped, flow: Flow, names: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """Return, by stage, the module paths of the last linear op that feeds it and of the batch norm behind that, or None.

    What a stage declares, by its network or by hand, is taken as it is.

    Args:
        net: The network.
        flow: A dry run of it.
        names: Names of its stages, ``"stage3"``.
    Raises:
        OptionError: If two stages have one op.
        UnsupportedPairError: If no convolution or linear layer feeds a stage.
    """
    sites: dict[str, tuple[str, str | None]] = {}
    for name in names:
        stage = _stage(net, name)
        op = stage.linear or flow.linear(stage.path)
        sites[name] = op, stage.linear_norm or flow.norm_after(op)
    if len({op for op, _ in sites.values()}) < len(sites):
        ops = ", ".join(f"{name} at {op}" for name, (op, _) in sites.items())
        raise OptionError(
            f"Every stage needs a linear op of its own to branch; got {ops}. Choose fewer layers, or others with taps=."
        )
    return sites


def tap_before_activation(net: Tapped, flow: Flow, name: str) -> str:
    """Return the name of the tap of a stage before its activation, or of its output where it ends without one.

    Args:
        net: The network.
        flow: A dry run of it.
        name: Name of the stage.
    """
    stage = _stage(net, name)
    path = flow.before_activation(stage)
    if path == (stage.pre or stage.path):
        return f"{name}.pre"
    return net.add_taps({f"{name}.before_activation": path}, stage.layout)[0]


def tap_reached_by_addition(net: Tapped, flow: Flow, name: str, op: str) -> tuple[str | None, str | None]:
    """Return the name of the tap of a stage that a module's output reaches through additions alone, and that of what is added.

    In training mode a block may drop at random what it adds in eval mode. Where a module does so, what it returns is what is added.

    Args:
        net: The network, restructured or not.
        flow: A dry run of it as it was.
        name: Name of the stage; it is tried before its activation, then at its output.
        op: Path of the module.
    Returns:
        The tap, None where there is none; and a tap of what arrives there, None where that is the module's output itself.
    """
    stage = _stage(net, name)
    before = flow.before_activation(stage)
    for path in dict.fromkeys((before, stage.path)):
        # in 16 bits the slope of a fresh norm passes for 1 in eval mode; training mode, where it follows the batch, tells it apart
        added = _added(net, op, path) if reaches_by_addition(net.module, net.data, op, path) else None
        if added is not None:
            tap = tap_before_activation(net, flow, name) if path == before else name
            return tap, None if added == op else net.add_taps({f"{name}.added": added})[0]
    return None, None


def _added(net: Tapped, op: str, path: str) -> str | None:
    """The module whose output arrives at a tap by addition in training mode too: the op, or one that hands its output on."""
    if reaches_by_addition(net.module, net.data, op, path, training=True):
        return op
    later = Flow(net.module, net.data).handed_on(op)
    return next((each for each in later if reaches_by_addition(net.module, net.data, each, path, training=True)), None)


def path_after(net: Tapped, flow: Flow, name: str, size: Sequence[int]) -> RemainingPath:
    """Return what a frozen network does after a stage's tap before the activation.

    Args:
        net: The network.
        flow: A dry run of it.
        name: Name of the stage; the path goes from the last one to the logits, from others to the first linear op that follows.
        size: ``(H, W)`` of the maps that will be given.
    Raises:
        UnsupportedPairError: If the path cannot be followed from the tap alone.
    """
    tap = flow.before_activation(_stage(net, name))
    stop = None if name == net.names("last")[0] else flow.linear_after(tap)
    return RemainingPath(flow, tap, net.shapes[tap_before_activation(net, flow, name)], size, stop)


def _stage(net: Tapped, name: str) -> Stage:
    if len(net.shapes[name]) != 3:
        raise UnsupportedPairError(
            f"Branches and guides need maps (C, H, W); {net.role} {name} is {tuple(net.shapes[name])}. Name its stages with taps=."
        )
    return net.stages[int(name.removeprefix("stage")) - 1]

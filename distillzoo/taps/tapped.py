"""A network with named taps: :class:`Tapped`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distillzoo.errors import OptionError, TapError, near_matches
from distillzoo.stages import Probe, classifier_input, declared_stages, find_stages, resolve_stages, split_path
from distillzoo.stages.finders import split_and_get
from distillzoo.stages.layouts import as_view, pooled_view
from distillzoo.taps.outputs import logits_of
from distillzoo.taps.recording import ActivationHook, ActivationWatch, InputHook, OutputHook, Recorder
from distillzoo.types import DataSpec, Layout, Stage, Trace

__all__ = ["Tapped"]


_NO_POOLED = " Name the classifier's input with taps={...: {'pooled': 'path:input'}}, or use a method that reads logits alone (kd)."


class Tapped:
    """A network with named taps.

    Args:
        module: A plain classifier: ``forward(images) -> (B, num_classes)``.
        data: Size and channels of the images of the dry batch that measures shapes (in eval mode, buffers untouched).
        stages: Stages, or tap paths, shallow to deep, in place of those found; a mapping names any taps, ``pooled`` among them.
        role: What the network is, for messages: ``"student"``, ``"teacher"``, ``"network"``.

    Attributes:
        module: The network.
        data: Size and channels of the images that it was measured with.
        stages: Its stages, shallow to deep.
        shapes: Shape of every tap as it is handed out, without the batch dimension: ``(C, H, W)`` or ``(D,)``.
        num_classes: Width of the logits.
        restructured: Paths of the modules that a method has replaced.
        autocast: Whether the last pass ran under autocast.

    Raises:
        TapError: If a tap does not exist or was not reached.
        ShapeError: If the network does not return ``(B, num_classes)`` logits.
    """

    def __init__(
        self,
        module: nn.Module,
        data: DataSpec,
        *,
        stages: Sequence[Stage | str] | Mapping[str, Stage | str] | None = None,
        role: str = "student",
    ) -> None:
        self.module = module
        self.role = role
        self.data = data
        self.restructured: list[str] = []
        self.autocast = False
        self._claimed = False
        self._recorder = Recorder()
        self._clones: set[str] = set()
        self._requested: dict[str, None] = {}
        probe = Probe(module, data)
        extra: dict[str, Stage] = {}
        if stages is None:
            self.stages = find_stages(probe)
        else:
            self.stages, extra = resolve_stages(stages, probe)
        self._doubtful = self._found_in_graph(stages) - extra.keys()
        self._taps = self._table(extra, None if "pooled" in extra else classifier_input(probe))
        self._measure(probe)

    def _found_in_graph(self, given: Sequence[Stage | str] | Mapping[str, Stage | str] | None) -> set[str]:
        """The taps before a function that were not named, but found by what made a stage in eval mode."""
        said: set[Stage | str] = set(declared_stages(self.module) or ())
        if given is not None:
            said.update(given.values() if isinstance(given, Mapping) else given)
        found = enumerate(self.stages, 1)
        return {f"stage{n}.pre" for n, stage in found if stage not in said and (stage.pre or "").endswith(":activation")}

    def _table(self, extra: Mapping[str, Stage], pooled: str | None) -> dict[str, tuple[str, Layout]]:
        taps: dict[str, tuple[str, Layout]] = {}
        for number, stage in enumerate(self.stages, 1):
            taps[f"stage{number}"] = (stage.path, stage.layout)
            taps[f"stage{number}.pre"] = (stage.pre or stage.path, stage.layout)
        taps |= {name: (stage.path, stage.layout) for name, stage in extra.items()}
        if pooled is not None:
            taps["pooled"] = (pooled, "auto")
        return taps

    def _measure(self, probe: Probe) -> None:
        """Run the dry batch with every tap: shapes, and which tensors are overwritten in place and must be cloned."""
        with self._hooked(self._taps):
            logits, values = self._dry(probe)
            if probe.overwriting_dropouts():
                self._dry(probe, dropping=True)
        self.num_classes = probe.width(logits, self.role)
        self._check_reached(values, self._taps)
        widths = {f"stage{number}{side}": s.channels for number, s in enumerate(self.stages, 1) for side in ("", ".pre")}
        self._views = {
            name: pooled_view(self.module, self.data, values[name].shape)
            if name == "pooled" and layout == "auto"
            else as_view(self.module, self.data, values[name].shape, layout, widths.get(name))
            for name, (_, layout) in self._taps.items()
        }
        self.shapes = {name: self._views[name](value).shape[1:] for name, value in values.items()}

    def try_training(self) -> None:
        """Run the dry batch in training mode as well, as a student will run: there it may return more, or end its blocks otherwise.

        A stage whose function that activates can be read in eval mode alone (dropout comes after it) ends without one from now on.

        Raises:
            ShapeError: If what it returns holds no logits.
            OptionError: If it writes to the images.
        """
        probe = Probe(self.module, self.data)
        with self._hooked(self._doubtful), probe.training():
            output, _ = self._noted(probe, self._doubtful)
            logits_of(self.module, output, len(probe.images), self.num_classes, self.role)
        probe.check_images_kept(self.role)  # dropout may work in place on the images themselves

    def _dry(self, probe: Probe, *, dropping: bool = False) -> tuple[Any, dict[str, Tensor]]:
        with probe.evaluating(dropping=dropping):
            return self._noted(probe, self._taps)

    def _noted(self, probe: Probe, names: Iterable[str]) -> tuple[Any, dict[str, Tensor]]:
        """Run the dry batch and note which taps are overwritten, and which are before no activation."""
        self._recorder.start(len(probe.images), self._doubtful)
        try:
            output, values = self._watched(probe.images, names), self._recorder.values
            self._clones.update(self._recorder.overwritten())
            self._end_bare(self._recorder.unread)
        finally:
            self._recorder.stop()
        return output, values

    def _end_bare(self, names: set[str]) -> None:
        """Let stages end without an activation: their taps before it are their outputs."""
        stages = {f"stage{number}.pre": stage for number, stage in enumerate(self.stages, 1)}
        self.stages = tuple(replace(stage, pre=None, norm=None) if name in names else stage for name, stage in stages.items())
        self._taps |= {name: (stages[name].path, stages[name].layout) for name in names}

    @contextmanager
    def _hooked(self, names: Iterable[str]) -> Iterator[None]:
        handles: list[torch.utils.hooks.RemovableHandle] = []
        try:  # those that came before one that cannot be attached are taken off as well
            for name in names:
                handles.append(self._attach(name))  # noqa: PERF401
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, name: str) -> torch.utils.hooks.RemovableHandle:
        path, side = split_path(self._taps[name][0])
        hook = {"input": InputHook, "output": OutputHook, "activation": ActivationHook}[side]
        return hook(self._recorder, name, clone=name in self._clones).attach(self.module.get_submodule(path))

    def names(self, *requested: str) -> tuple[str, ...]:
        """Expand groups (``"stages"``, ``"stages.pre"``, ``"last"``, ``"last.pre"``) into names of taps, shallow to deep.

        Raises:
            TapError: If a name is no tap of this network; the nearest ones are named.
        """
        found: dict[str, None] = {}
        for name in requested:
            if name in ("stages", "stages.pre"):
                found |= dict.fromkeys(f"stage{number}{name[6:]}" for number in range(1, len(self.stages) + 1))
            elif name in ("last", "last.pre"):
                found[f"stage{len(self.stages)}{name[4:]}"] = None
            else:
                found[name] = None
        for name in found:
            if name not in self._taps:
                near = near_matches(name, self._taps) or sorted(self._taps)
                hint = _NO_POOLED if name == "pooled" else ""
                raise TapError(f"The {self.role} has no tap {name!r}; it has {', '.join(near) or 'none'}.{hint}")
        return tuple(found)

    def path(self, name: str) -> str:
        """Return the tap path that a name stands for.

        Raises:
            TapError: If the name is no tap of this network.
        """
        return self._taps[self.names(name)[0]][0]

    def add_taps(self, paths: Mapping[str, str], layout: Layout = "auto") -> tuple[str, ...]:
        """Make tensors of the network tappable under names of one's own and measure them; every other tap is measured anew.

        Args:
            paths: Tap paths by new name; a name that stands for its very path already is left as it is.
            layout: How the tensors are laid out.
        Returns:
            The names, to request.
        Raises:
            OptionError: If a name stands for another path, or there is no such layout.
            TapError: If there is no such path, or the forward does not reach it.
        """
        asked = {name: (path, Stage(path, layout=layout).layout) for name, path in paths.items()}  # a stage checks its layout
        new = {name: tap for name, tap in asked.items() if self._taps.get(name) != tap}
        for name, (path, _) in new.items():
            if name in self._taps:
                raise OptionError(
                    f"The {self.role}'s tap {name!r} is {self._taps[name][0]!r} already; got {path!r}: take another name."
                )
            self.submodule(path)
        if new:
            self._taps |= new
            try:
                self._measure(Probe(self.module, self.data))
            except TapError:
                for name in new:
                    del self._taps[name]
                raise
        return tuple(paths)

    def request(self, *requested: str) -> tuple[str, ...]:
        """Hook the taps, so that every later trace holds them; returns their names."""
        names = self.names(*requested)
        for name in names:
            if name not in self._requested:
                self._requested[name] = None
                self._attach(name)
        return names

    def replace(self, path: str, module: nn.Module) -> None:
        """Put ``module`` in the place of the submodule at ``path``, before any tap is requested; recorded in ``restructured``.

        Raises:
            TapError: If there is no such submodule.
            OptionError: If taps are hooked already, which the new module would lose.
        """
        if self._requested:
            raise OptionError(f"The {self.role} must be restructured before its taps are hooked; {path!r} came after.")
        parent, _, child = path.rpartition(".")
        self.submodule(path)
        setattr(self.module.get_submodule(parent), child, module)
        self.restructured.append(path)

    def submodule(self, path: str) -> nn.Module:
        """Return the submodule at ``path``.

        Raises:
            TapError: If there is none; the nearest paths are named.
        """
        return split_and_get(self.module, path)

    def claim(self) -> bool:
        """Return True to the first caller: whose child module the network is (the others share it)."""
        claimed, self._claimed = self._claimed, True
        return not claimed

    def __call__(self, images: Tensor) -> Trace:
        """Run the network on ``(B, C, H, W)`` images and return logits and the requested features."""
        self.autocast = torch.is_autocast_enabled(images.device.type)
        self._recorder.start(len(images))
        try:
            logits = self._watched(images, self._requested)
            if not isinstance(logits, Tensor):  # in training mode alone
                logits = logits_of(self.module, logits, len(images), self.num_classes, self.role)
            values = self._recorder.values
            self._check_reached(values, self._requested)
            if not torch.compiler.is_compiling():
                self._check_not_overwritten()
            features = {name: self._views[name](value) for name, value in values.items()}
        finally:
            self._recorder.stop()
        return Trace(logits, features)

    def _watched(self, images: Tensor, names: Iterable[str]) -> Any:
        """Run the network; functions are watched only where a tap is what one of them took."""
        if not any(self._taps[name][0].endswith(":activation") for name in names):
            return self._run(images)
        with ActivationWatch(self._recorder):
            return self._run(images)

    def _run(self, images: Tensor) -> Any:
        return self.module(images)

    def _check_reached(self, values: Mapping[str, Tensor], names: Iterable[str]) -> None:
        missing = [name for name in names if name not in values]
        if missing:
            paths = ", ".join(f"{name} ({self._taps[name][0]})" for name in missing)
            raise TapError(f"The {self.role}'s forward did not reach the taps {paths}; name modules that its forward calls.")

    def _check_not_overwritten(self) -> None:
        for name in self._recorder.overwritten():
            raise TapError(
                f"The tap {name!r} ({self._taps[name][0]}) of the {self.role} was overwritten in place after it was read; "
                "switch the in-place operation that follows it off."
            )

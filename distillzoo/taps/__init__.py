"""Run a network and read named features from it, without changing its ``forward``.

:class:`Tapped` wraps a plain classifier: it knows the network's stages (:mod:`distillzoo.stages`), their measured shapes, and
returns a :class:`~distillzoo.types.Trace` of the taps that were requested. Names are ours, paths are the network's::

    stage1 .. stageN    output of a stage, (B, C, H, W), whatever layout the network uses inside
    stageN.pre          the same before its activation (the output again, where the stage ends without one)
    pooled              what the classifier reads, (B, D)

Groups stand for several: ``stages``, ``stages.pre``, ``last``, ``last.pre``. Hooks are objects of a top-level class, registered
on the bare module by path; they record only while their own :class:`Tapped` runs the network.
"""

from distillzoo.taps.pairs import pair_from_deep_end
from distillzoo.taps.recording import remove_hooks
from distillzoo.taps.tapped import Tapped
from distillzoo.taps.teacher import Ensemble, OwnView, Teacher
from distillzoo.taps.within import TappedWithin

__all__ = ["Ensemble", "OwnView", "Tapped", "TappedWithin", "Teacher", "pair_from_deep_end", "remove_hooks"]
